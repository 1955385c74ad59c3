"""Run a PyTorch module as it is, and once more while it is watched."""

import copy
import zlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from parity_tests.harness.compare import Refused
from parity_tests.harness.nests import flat as flat
from parity_tests.harness.nests import map_leaves
from parity_tests.harness.watch import Watch, describe, shorten, to_numpy

# Where each function takes the rate of its dropout: the place among the arguments, and the name.
RATES = {"scaled_dot_product_attention": (4, "dropout_p"), "multi_head_attention_forward": (10, "dropout_p")}
for function in ("dropout", "dropout1d", "dropout2d", "dropout3d", "feature_dropout"):
    RATES[function] = RATES[function.replace("dropout", "alpha_dropout")] = (1, "p")


class Call(Protocol):
    """What a module is called with (`Inputs`): positional and keyword arguments, any nest of arrays."""

    @property
    def args(self) -> tuple[Any, ...]: ...  # noqa: D102 (see the class)

    @property
    def kwargs(self) -> Mapping[str, Any]: ...  # noqa: D102 (see the class)


class TorchCapture(NamedTuple):
    """What one run of a PyTorch module shows.

    Attributes:
        outputs: what the module returned, with arrays in the place of tensors.
        values: what each submodule and each function returned, in the order of the run: `layer1.0.conv1`, `block#2` for
            its second call, `lstm[1][0]` for a part of a nest, `layer1.0.add` for a function. The root is "".
        gradients: the gradient of the objective by those values. One that cannot be known is missing.
        kinds: the class name of the submodule, or "function", by the names of `values`.
        weight_gradients: by the name of the parameter. One that the objective does not depend on is missing.
        buffers: the module's buffers after the run.
        loss: the objective, or None if the outputs have no floating-point tensor in it.
        notes: what could not be seen, and why.
    """

    outputs: Any
    values: dict[str, np.ndarray]
    gradients: dict[str, np.ndarray]
    kinds: dict[str, str]
    weight_gradients: dict[str, np.ndarray]
    buffers: dict[str, np.ndarray]
    loss: float | None
    notes: tuple[str, ...]


def capture_torch(
    module: nn.Module,
    inputs: Call,
    objective: Any,
    *,
    training: bool,
    dtype: str = "float64",
    functions: bool = True,
    verify: bool = True,
) -> TorchCapture:
    """Run a copy of the module forward and backward, and return all that is seen inside.

    Args:
        module: the reference. It is not changed.
        inputs: floating-point arrays are cast to `dtype`; integers and booleans keep their type.
        objective: a function from the module's outputs to a scalar tensor, or cotangents, a nest like the outputs. The
            objective is then the sum of the products over all floating-point outputs.
        training: use training mode, with all dropout at rate 0. Otherwise evaluation mode.
        dtype: "float64" or "float32", for parameters, buffers and inputs.
        functions: record the functions between the submodules as well.
        verify: run the module unwatched first, and require the same bits in outputs, buffers and gradients by weights.
            Off, a module that was verified on other inputs takes half the time.

    Raises:
        Refused: the module does not run on these inputs, or gives other results while it is watched.
    """

    def run_fresh(watch: Watch | None) -> Run:
        precision = getattr(torch, dtype)
        model = fresh_copy(module, training, precision)
        with watch.attach(model) if watch else nullcontext():
            return run(model, inputs, objective, training, precision, watch)

    plain = run_fresh(None).digests() if verify else None
    # Views of what a module hands through can change the order in which gradients are summed, hence their last bit.
    # The second try does without them: the gradients by those values are then missing.
    for views in (True, False):
        watch = Watch(functions, views)
        result = run_fresh(watch)
        if plain is None:
            break
        watched = result.digests()
        changed = [name for name in plain | watched if plain.get(name) != watched.get(name)]
        if not changed:
            break
    else:
        again = run_fresh(None).digests()
        why = "when its submodules are watched" if again == plain else "each time it runs"
        raise Refused(f"the reference gives other results {why}, first: {changed[0]}")
    notes = (*watch.notes, *watch.explain_missing(), *find_unseen(module, watch, result), *result.notes)
    return TorchCapture(
        result.outputs,
        watch.values,
        watch.gradients,
        watch.kinds,
        result.weight_gradients,
        result.buffers,
        result.loss,
        tuple(dict.fromkeys(notes)),
    )


def find_unseen(module: nn.Module, watch: Watch, result: "Run") -> Iterator[str]:
    """Yield a note about submodules whose hooks did not run, though their weights were used."""
    used = {name.rpartition(".")[0] for name in result.weight_gradients}
    silent = [
        name
        for name, part in module.named_modules()
        if name not in watch.called and name in used and not isinstance(part, nn.ParameterList | nn.ParameterDict)
    ]
    if silent:
        yield f"used without being called, so that what they return was not seen: {shorten(silent)}"


class Run(NamedTuple):
    """The results of one run, as arrays."""

    outputs: Any
    loss: float | None
    weight_gradients: dict[str, np.ndarray]
    buffers: dict[str, np.ndarray]
    notes: tuple[str, ...]

    def digests(self) -> dict[str, tuple[Any, ...]]:
        """Return a check sum of the bits of each array."""
        arrays = {f"output {name or 'of the module'}": leaf for name, leaf in flat(self.outputs).items()}
        arrays |= {f"gradient by {name}": array for name, array in self.weight_gradients.items()}
        arrays |= {f"buffer {name}": array for name, array in self.buffers.items()}
        arrays |= {} if self.loss is None else {"the objective": self.loss}
        return {
            name: (np.shape(array), np.asarray(array).dtype, zlib.crc32(np.ascontiguousarray(array).data))
            for name, array in arrays.items()
            if np.size(array)
        }


def fresh_copy(module: nn.Module, training: bool, dtype: torch.dtype) -> nn.Module:
    """Return a copy of the module on the CPU in the asked mode and dtype, without dropout."""
    try:
        model = copy.deepcopy(module).cpu()
    except Exception as error:
        raise Refused(f"the reference cannot be copied: {describe(error)}. Give a function that makes it") from error
    # Complex parameters keep their imaginary part, which `Module.to(dtype)` would drop.
    model._apply(lambda tensor: cast(tensor, dtype))
    for part in model.modules():
        for name, value in list(vars(part).items()):  # constants that are no buffers
            if isinstance(value, torch.Tensor):
                setattr(part, name, cast(value.detach(), dtype))
        if isinstance(part, nn.MultiheadAttention | nn.RNNBase):
            part.dropout = 0.0
        elif "drop" in type(part).__name__.lower() or type(part).__name__ == "StochasticDepth":
            for name in ("p", "drop_prob", "drop_rate"):
                if isinstance(getattr(part, name, None), float):
                    setattr(part, name, 0.0)
    model.zero_grad(set_to_none=True)
    return model.train(training)


def cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return a floating-point or complex tensor in the precision of `dtype`, and any other tensor as it is."""
    if tensor.is_complex():
        return tensor.to(torch.complex128 if dtype is torch.float64 else torch.complex64)
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


class WithoutDropout(TorchFunctionMode):
    """Sets the rate of every dropout function to 0."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the function, at rate 0 if it drops."""
        kwargs = dict(kwargs or {})
        if (place := RATES.get(getattr(func, "__name__", ""))) is not None:
            index, name = place
            if len(args) > index:
                args = (*args[:index], 0.0, *args[index + 1 :])
            else:
                kwargs[name] = 0.0
        return func(*args, **kwargs)


@contextmanager
def fixed_settings(dtype: torch.dtype) -> Iterator[None]:
    """Set what the results depend on beside the module, and restore it afterwards.

    PyTorch computes attention by another formula ("fast path") when no gradient is asked for. New tensors in a forward
    method take the default dtype. Random numbers are the same in each run.
    """
    default, fast = torch.get_default_dtype(), torch.backends.mha.get_fastpath_enabled()
    try:
        torch.set_default_dtype(dtype)
        torch.backends.mha.set_fastpath_enabled(False)
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(0)
            yield
    finally:
        torch.set_default_dtype(default)
        torch.backends.mha.set_fastpath_enabled(fast)


def run(
    model: nn.Module, inputs: Call, objective: Any, training: bool, dtype: torch.dtype, watch: Watch | None = None
) -> Run:
    """Run the model forward and backward once.

    Raises:
        Refused: it does not run.
    """
    with ExitStack() as stack:
        stack.enter_context(fixed_settings(dtype))
        if training:
            stack.enter_context(WithoutDropout())
        random_state = torch.get_rng_state()
        args, kwargs = (
            map_leaves(lambda _, leaf: to_input(leaf, dtype), nest) for nest in (inputs.args, inputs.kwargs)
        )
        try:
            with watch or nullcontext():
                outputs = model(*args, **kwargs)
            arrays = map_leaves(lambda _, leaf: keep_copy(leaf, watch), outputs)
            drew = not torch.equal(random_state, torch.get_rng_state())
            loss = objective(outputs) if callable(objective) else sum_of_products(outputs, objective)
            if loss is not None and loss.numel() != 1:
                raise Refused(f"the objective gives {loss.numel()} values; one is needed")
            if loss is not None and loss.requires_grad:
                if watch:
                    watch.begin_backward()
                # `loss.backward()` would leave `WithoutDropout`, which torch.utils.checkpoint needs: it computes the
                # forward again during the backward pass.
                engine = torch.autograd.Variable._execution_engine
                engine.run_backward((loss,), (torch.ones_like(loss),), False, False, (), True, accumulate_grad=True)
        except Refused:
            raise
        except Exception as error:
            raise Refused(f"the reference does not run on these inputs in {dtype}: {describe(error)}") from error
    gradients = {name: to_numpy(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    buffers = {name: to_numpy(buffer).copy() for name, buffer in model.named_buffers()}
    notes = ("the reference draws random numbers",) if drew else ()
    return Run(arrays, None if loss is None else float(loss.detach()), gradients, buffers, notes)


def to_input(leaf: Any, dtype: torch.dtype) -> Any:
    """Return a tensor for an array, and a number as it is.

    Floating-point inputs take part in the gradient, so that gradients reach values before the first weight. They are no
    leaves of the graph, because a module may change its input in place.
    """
    if not hasattr(leaf, "shape"):
        return leaf
    tensor = leaf.detach().cpu().clone() if isinstance(leaf, torch.Tensor) else torch.tensor(np.asarray(leaf))
    tensor = cast(tensor, dtype)
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return tensor
    return tensor.requires_grad_().clone()


def keep_copy(leaf: Any, watch: Watch | None) -> Any:
    """Return a copy of a tensor as an array, if possible the one that was recorded."""
    if not isinstance(leaf, torch.Tensor):
        return leaf
    return watch.copy(leaf) if watch else to_numpy(leaf.detach().clone())


def sum_of_products(outputs: Any, cotangents: Any) -> torch.Tensor | None:
    """Return the sum of cotangent times output over the floating-point outputs, or None if there are none.

    Raises:
        Refused: a cotangent belongs to no such output, or has another shape.
    """
    leaves = {
        name: leaf
        for name, leaf in flat(outputs).items()
        if isinstance(leaf, torch.Tensor) and (leaf.is_floating_point() or leaf.is_complex())
    }
    total = None
    for name, cotangent in flat(cotangents).items():
        if name not in leaves or tuple(leaves[name].shape) != np.shape(cotangent):
            raise Refused(f"the cotangent {name!r} of shape {np.shape(cotangent)} fits no output of the reference")
        factor = torch.tensor(np.asarray(cotangent)).to(leaves[name].dtype)
        part = (leaves[name] * factor).sum().real
        total = part if total is None else total + part
    return total

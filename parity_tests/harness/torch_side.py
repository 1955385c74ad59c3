"""Run a PyTorch module as it is, once more while it is watched, and measure how exact it is itself.

Forward hooks see what each submodule returns, and a `TorchFunctionMode` sees the functions that a forward method calls
between them. A tensor is recorded as a copy, because a later operation may change it in place. The gradient by it comes
from `Tensor.register_hook`, which stays with the value as it was when the hook was placed. A tensor that a module hands
through unchanged is returned as a view of itself: the view is a node of its own in the graph, so its gradient is the
part that flows through this module.
"""

import copy
import sys
import weakref
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from parity_tests.harness.compare import Refused, describe, keeps_float32, map_leaves, note_rate, shorten
from parity_tests.harness.compare import flat as flat

# Functions that compute nothing: they ask for a property, make a constant, or give the same numbers another form.
# Views need no name here, because they share memory with their source.
UNRECORDED = {"get", "set", "size", "stride", "dim", "numel", "type", "requires_grad", "retain_grad", "detach", "clone"}
UNRECORDED |= {"to", "type_as", "float", "double", "half", "bfloat16", "long", "int", "bool", "cpu", "cuda"}
UNRECORDED |= {"reshape", "flatten", "ravel", "contiguous", "tensor", "as_tensor", "multi_head_attention_forward"}
UNRECORDED |= {f"{what}_like" for what in ("zeros", "ones", "full", "empty", "rand", "randn")}
UNRECORDED |= {f"new_{what}" for what in ("zeros", "ones", "full", "empty", "tensor")}
# Operators and second names, by the name that is shown.
SYNONYMS = {
    **{f"{side}{name}": name for name in ("add", "sub", "mul", "matmul", "pow") for side in "ri"},
    **dict.fromkeys(("truediv", "rtruediv", "itruediv", "rdiv", "idiv", "divide", "true_divide"), "div"),
    **{"subtract": "sub", "multiply": "mul", "negative": "neg", "absolute": "abs"},
}

ROOT = "the module itself"
NO_GRADIENT = "computed without a gradient, or from nothing that has one"


class Scope(NamedTuple):
    """A module that is running, and the version of each tensor that it was given."""

    name: str
    given: dict[int, int]


class Watch(TorchFunctionMode):
    """Records what submodules and functions return while it is entered.

    Args:
        functions: record functions as well as submodules.
        views: return a view of what a submodule hands through, to tell its gradient from that of other uses.
        calls_of: names of stages whose calls are kept, with copies of their arguments.
    """

    def __init__(self, functions: bool = True, views: bool = True, calls_of: Collection[str] = ()):
        super().__init__()
        self.calls_of = calls_of
        self.kept_calls: dict[str, tuple[Callable[..., Any], Any, Any]] = {}
        self.functions, self.views = functions, views
        self.values: dict[str, np.ndarray] = {}
        self.gradients: dict[str, np.ndarray] = {}
        self.kinds: dict[str, str] = {}
        self.notes: list[str] = []
        self.called: set[str] = set()
        self.lost: dict[str, list[str]] = {}  # reason -> names without a gradient
        self.backward = False
        self.calls: Counter[str] = Counter()
        self.scopes: list[Scope] = []
        self.copies: dict[int, tuple[weakref.ref[torch.Tensor], np.ndarray, torch.Tensor]] = {}
        self.recorded_views: list[tuple[str, torch.Tensor, int]] = []
        self.nodes: dict[tuple[Any, int], list[str]] = {}  # node of autograd's graph and number of its output -> values
        self.sources: dict[str, set[str]] = {}
        self.busy = False

    @contextmanager
    def attach(self, model: nn.Module) -> Iterator[None]:
        """Place the hooks, and remove them afterwards."""
        self.names = {name for name, _ in model.named_modules()}
        self.closed = {name for name, part in model.named_modules() if is_closed(part, root=not name)}
        handles: list[Any] = []
        for name, part in model.named_modules():
            handles += [
                part.register_forward_pre_hook(self.make_before(name), with_kwargs=True),
                part.register_forward_hook(self.make_after(name), with_kwargs=True, always_call=True),
            ]
        yield
        for handle in handles:
            handle.remove()

    def make_before(self, name: str) -> Callable[..., None]:
        """Return the hook that runs before a module."""

        def before(part: nn.Module, args: Any, kwargs: Any) -> None:
            if not in_backward():
                self.scopes.append(Scope(name, self.versions((args, kwargs))))
                self.keep_call(name, part, args, kwargs)

        return before

    def make_after(self, name: str) -> Callable[..., Any]:
        """Return the hook that runs after a module."""

        def after(part: nn.Module, args: Any, kwargs: Any, outputs: Any) -> Any:
            if in_backward():  # torch.utils.checkpoint computes the forward again
                return None
            scope = self.scopes.pop()
            self.called.add(name)
            changed = self.record(name, type(part).__name__, outputs, scope.given)
            return None if changed is outputs else changed

        return after

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function, and record what it returns."""
        kwargs = kwargs or {}
        label = getattr(func, "__name__", "").strip("_")
        label = SYNONYMS.get(label, label)
        scope = self.scopes[-1].name if self.scopes else ""
        if self.busy or not self.functions or label in UNRECORDED or scope in self.closed or in_backward():
            return func(*args, **kwargs)
        given = self.versions((args, kwargs))
        name = f"{scope}.{label}".removeprefix(".")
        name += "()" if name in self.names else ""
        self.keep_call(name, func, args, kwargs)
        outputs = func(*args, **kwargs)
        if given:
            self.record_function(name, outputs, (args, kwargs), given)
        return outputs

    def keep_call(self, name: str, function: Callable[..., Any], args: Any, kwargs: Any) -> None:
        """Keep a call that was asked for, with copies of its arguments."""
        if not self.calls_of:
            return
        key = self.number(name, self.calls[name] + 1)
        if key in self.calls_of and key not in self.kept_calls:
            self.busy = True
            self.kept_calls[key] = (function, *map_leaves(lambda _, leaf: detached(leaf), (args, kwargs)))
            self.busy = False

    @staticmethod
    def number(name: str, call: int) -> str:
        """Return the name of a stage's n-th call."""
        return name if call == 1 else f"{name}#{call}"

    def record_function(self, name: str, outputs: Any, arguments: Any, given: dict[int, int]) -> None:
        """Record what a function returned, unless it is one of its arguments, unchanged, or a part of one."""
        tensors = [leaf for leaf in flat(outputs).values() if isinstance(leaf, torch.Tensor)]
        sources = {memory(leaf) for leaf in flat(arguments).values() if isinstance(leaf, torch.Tensor)}
        new = [t for t in tensors if (given[id(t)] != t._version if id(t) in given else memory(t) not in sources)]
        if new and len(new) == len(tensors):
            self.record(name, "function", outputs, given)

    def versions(self, arguments: Any) -> dict[int, int]:
        """Return how often each tensor among the arguments was changed in place, by its identity."""
        return {id(leaf): leaf._version for leaf in flat(arguments).values() if isinstance(leaf, torch.Tensor)}

    def record(self, name: str, kind: str, outputs: Any, given: dict[int, int]) -> Any:
        """Record the tensors of a nest, and return the nest with views of those that were handed through."""
        self.calls[name] += 1
        base = self.number(name, self.calls[name])
        tensors = [leaf for leaf in flat(outputs).values() if isinstance(leaf, torch.Tensor)]
        shared = find_shared(tensors) if len(tensors) > 1 else set()

        def record_leaf(place: str, tensor: Any) -> Any:
            if not isinstance(tensor, torch.Tensor):
                return tensor
            key = base + place
            try:
                self.values[key] = self.copy(tensor)
            except (RuntimeError, NotImplementedError, TypeError) as error:
                if kind != "function":
                    self.notes.append(f"{key or 'the output'} cannot be recorded: {describe(error)}")
                return tensor
            self.kinds[key] = kind
            if not (tensor.is_floating_point() or tensor.is_complex()):
                return tensor
            version, is_shared = given.get(id(tensor)), id(tensor) in shared
            watched = self.record_gradient(key, tensor, version, is_shared, kind == "function")
            if watched.grad_fn is not None:
                self.nodes.setdefault((watched.grad_fn, watched.output_nr), []).append(key)
            return watched

        self.busy = True
        try:
            return map_leaves(record_leaf, outputs)
        finally:
            self.busy = False

    def record_gradient(
        self, key: str, tensor: torch.Tensor, version: int | None, shared: bool, function: bool
    ) -> torch.Tensor:
        """Ask for the gradient by a tensor, and return the tensor or a view of it that has a gradient of its own.

        Args:
            key: the name of the value.
            tensor: what a module or a function returned.
            version: how often the tensor had been changed in place when it was given to it; None if it was not given.
            shared: whether other outputs of the same call depend on it.
            function: whether a function returned it, whose result cannot be replaced.
        """
        if not tensor.requires_grad:
            self.lost.setdefault(NO_GRADIENT, []).append(key)
            return tensor
        changed = version is not None and version != tensor._version
        if changed and tensor._is_view():
            self.lost.setdefault("a view that was changed in place", []).append(key)
            return tensor
        node = tensor
        if (version is not None and not changed) or shared or tensor.is_leaf:
            if function or not self.views:
                self.lost.setdefault("its gradient cannot be told from that of other uses", []).append(key)
                return tensor
            node = tensor.view_as(tensor)
            if (known := self.copies.get(id(tensor))) is not None:
                self.copies[id(node)] = (weakref.ref(node), *known[1:])

        def add(gradient: torch.Tensor) -> None:
            if self.backward:  # not in a gradient that the forward itself computes
                array = to_numpy(gradient)
                self.gradients[key] = self.gradients[key] + array if key in self.gradients else array

        node.register_hook(add)
        if node._is_view():
            self.recorded_views.append((key, node, node._version))
        return node

    def copy(self, tensor: torch.Tensor) -> np.ndarray:
        """Return a copy of a tensor's values, the one made before if the tensor is unchanged since."""
        known = self.copies.get(id(tensor))
        if known is not None and known[0]() is tensor and torch.equal(tensor, known[2]):
            return known[1]
        kept = tensor.detach().clone()
        array = to_numpy(kept)
        self.copies[id(tensor)] = (weakref.ref(tensor), array, kept)
        return array

    def find_sources(self) -> dict[str, set[str]]:
        """Return for each value the recorded ones that it was computed from, with none between, by autograd's graph."""
        sources: dict[str, set[str]] = {}
        for (node, _), names in self.nodes.items():
            sources |= {later: {earlier} for earlier, later in pairwise(names)}
            nearest, seen, edges = set[str](), set[Any](), list(node.next_functions)
            while edges:
                edge = edges.pop()
                if edge in self.nodes:
                    nearest.add(self.nodes[edge][-1])
                elif edge[0] is not None and edge not in seen:
                    seen.add(edge)
                    edges += edge[0].next_functions
            sources[names[0]] = nearest
        return sources

    def end_forward(self, backward: bool) -> None:
        """End the recording of values, and let go of the graph; a backward pass may follow.

        A view that was changed in place since it was recorded would get a part of its gradient.
        """
        self.backward = backward
        self.changed_views = {key for key, view, version in self.recorded_views if view._version != version}
        self.sources = self.find_sources()
        self.recorded_views.clear()
        self.copies.clear()
        self.nodes.clear()

    def explain_missing(self) -> Iterator[str]:
        """Drop the incomplete gradients of views that were changed in place, and yield why each gradient is missing."""
        for key in sorted(self.changed_views if self.backward else ()):
            self.gradients.pop(key, None)
            self.lost.setdefault("a view that was changed in place", []).append(key)
        explained = {key for keys in self.lost.values() for key in keys}
        constants = self.lost.pop(NO_GRADIENT, [])
        if constants := [key for key in constants if self.kinds[key] != "function"]:  # masks and tables
            self.lost[NO_GRADIENT] = constants
        floats = [key for key, value in self.values.items() if value.dtype.kind in "fc"]
        if unused := [key for key in floats if key not in self.gradients and key not in explained]:
            self.lost["the objective does not depend on it"] = unused
        for reason, keys in self.lost.items():
            yield f"no gradient ({reason}): {shorten([key or ROOT for key in keys])}"


def detached(leaf: Any) -> Any:
    """Return a copy of a tensor that belongs to no graph, and a number as it is."""
    return leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf


def in_backward() -> bool:
    """Return whether a backward pass is running."""
    return torch._C._current_graph_task_id() != -1


def is_closed(part: nn.Module, root: bool) -> bool:
    """Return whether the functions inside a module are not recorded, because it is one operation.

    A leaf is one, unless it is a user's module that is the whole model or holds several matrices.
    """
    own = type(part).__module__.startswith("torch.nn.")
    if any(True for _ in part.children()):
        return isinstance(part, nn.MultiheadAttention)
    return own or not (root or sum(parameter.ndim > 1 for parameter in part.parameters(recurse=False)) > 1)


def memory(tensor: torch.Tensor) -> int:
    """Return the address of the memory that holds a tensor and its views."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # sparse and wrapped tensors
        return id(tensor)


def find_shared(tensors: list[torch.Tensor]) -> set[int]:
    """Return the identities of the tensors that another one of them is, or was computed from.

    A graph's node has a higher number than those it depends on, so the search ends at the oldest of the tensors.
    """
    shared = {id(t) for t, uses in ((t, sum(t is other for other in tensors)) for t in tensors) if uses > 1}
    producers = {(t.grad_fn, t.output_nr): id(t) for t in tensors if t.grad_fn is not None}
    if not producers:
        return shared
    oldest = min(node._sequence_nr() for node, _ in producers)
    seen: set[Any] = set()
    waiting = [node for node, _ in producers]
    while waiting:
        for edge in waiting.pop().next_functions:
            if edge in producers:
                shared.add(producers[edge])
            node = edge[0]
            if node is not None and node not in seen and node._sequence_nr() > oldest:
                seen.add(node)
                waiting.append(node)
    return shared


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """Return a tensor's values as an array, which shares memory with it where it can."""
    tensor = tensor.detach().cpu()
    if tensor.layout is not torch.strided:
        tensor = tensor.to_dense()
    if tensor.dtype in (torch.bfloat16, torch.float16):
        tensor = tensor.float()
    return tensor.resolve_conj().resolve_neg().numpy()


# Where each function takes the rate of its dropout: the place among the arguments, and the name.
RATES = {"scaled_dot_product_attention": (4, "dropout_p"), "multi_head_attention_forward": (10, "dropout_p")}
for function in ("dropout", "dropout1d", "dropout2d", "dropout3d", "feature_dropout"):
    RATES[function] = RATES[function.replace("dropout", "alpha_dropout")] = (1, "p")


class Call(Protocol):
    """The arguments of a call (`Inputs`): positional and keyword arguments, any nest of arrays."""

    @property
    def args(self) -> tuple[Any, ...]: ...  # noqa: D102 (see the class)

    @property
    def kwargs(self) -> Mapping[str, Any]: ...  # noqa: D102 (see the class)


class TorchCapture(NamedTuple):
    """The values, gradients and buffers that one run of a PyTorch module shows.

    Attributes:
        outputs: what the module returned, with arrays in the place of tensors.
        values: what each submodule and each function returned, in the order of the run: `layer1.0.conv1`, `block#2` for
            its second call, `lstm[1][0]` for a part of a nest, `layer1.0.add` for a function. The root is "".
        gradients: the gradient of the objective by those values. One that cannot be known is missing.
        kinds: the class name of the submodule, or "function", by the names of `values`.
        sources: the values that each was computed from, with no other between. One that has no gradient is missing.
        weight_gradients: by the name of the parameter. One that the objective does not depend on is missing.
        buffers: the module's buffers after the run.
        loss: the objective, or None if the outputs have no floating-point tensor in it.
        notes: what could not be seen, and why.
    """

    outputs: Any
    values: dict[str, np.ndarray]
    gradients: dict[str, np.ndarray]
    kinds: dict[str, str]
    sources: dict[str, set[str]]
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
            return run(model, inputs, objective, precision, watch)

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
        watch.sources,
        result.weight_gradients,
        result.buffers,
        result.loss,
        tuple(dict.fromkeys(notes)),
    )


def find_unseen(module: nn.Module, watch: Watch, result: "Run") -> Iterator[str]:
    """Yield a note about submodules whose hooks did not run, though their weights were used."""
    used = {name.rpartition(".")[0] for name in result.weight_gradients}
    silent = [
        name or ROOT
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


def copy_module(module: nn.Module) -> nn.Module:
    """Return a copy of a module. A tensor that it computed of its parameters, as weight_norm does, loses its graph."""
    held = [value for child in module.modules() for value in vars(child).values() if isinstance(value, torch.Tensor)]
    computed = {id(tensor): tensor.detach().clone() for tensor in held if not tensor.is_leaf}
    try:
        return copy.deepcopy(module, computed)
    except Exception as error:
        raise Refused(f"the reference cannot be copied: {describe(error)}. Give a function that makes it") from error


def hold_real(module: nn.Module) -> nn.Module:
    """Return the module, or a copy that holds complex parameters as real ones with a last axis of 2, under their names.

    Its own methods see them complex all the same, and torch's optimizers treat the two parts alike.
    """
    if not any(parameter.is_complex() for parameter in module.parameters()):
        return module
    module, real = copy_module(module), dict[int, nn.Parameter]()
    for part in module.modules():
        own = {name: value for name, value in part._parameters.items() if value is not None and value.is_complex()}
        for name, value in own.items():
            pairs = torch.view_as_real(value.detach()).clone()
            part._parameters[name] = real.setdefault(id(value), nn.Parameter(pairs, value.requires_grad))
        if own:
            part.__class__ = seen_complex(type(part), frozenset(own))
    return module


def seen_complex(cls: type[nn.Module], names: frozenset[str]) -> type[nn.Module]:
    """Return the class of a module that holds these parameters real, and sees them complex."""

    def get(self: nn.Module, name: str) -> Any:
        value: Any = cls.__getattr__(self, name)
        return torch.view_as_complex(value) if name in names else value

    return type(cls.__name__, (cls,), {"__getattr__": get, "__module__": cls.__module__})


def fresh_copy(module: nn.Module, training: bool, dtype: torch.dtype) -> nn.Module:
    """Return a copy of the module on the CPU in the asked mode and dtype, without dropout."""
    model = copy_module(module).cpu()
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
        if func is torch.Tensor.backward:
            with self:
                return run_backward(*args, **kwargs)
        if (place := RATES.get(getattr(func, "__name__", ""))) is not None:
            index, name = place
            if name != "p" or kwargs.get("training", args[2] if len(args) > 2 else True):
                note_rate(args[index] if len(args) > index else kwargs.get(name, 0.5 if name == "p" else 0.0))
            if len(args) > index:
                args = (*args[:index], 0.0, *args[index + 1 :])
            else:
                kwargs[name] = 0.0
        return func(*args, **kwargs)


class WithoutTiny(TorchFunctionMode):
    """Computes `cosine_embedding_loss` without the 1e-12 that PyTorch adds to each squared length."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the function, or compute the loss of cosines."""
        if func is not nn.functional.cosine_embedding_loss:
            return func(*args, **(kwargs or {}))
        return cosine_loss(*args, **(kwargs or {}))


def cosine_loss(
    one: torch.Tensor, other: torch.Tensor, target: torch.Tensor, margin: float = 0.0, reduction: str = "mean", **_: Any
) -> torch.Tensor:
    """Compute what `cosine_embedding_loss` does."""
    cosines = (one * other).sum(-1) / (one.norm(dim=-1) * other.norm(dim=-1))
    losses = torch.where(target == 1, 1 - cosines, (cosines - margin).clamp(min=0))
    return losses if reduction == "none" else losses.sum() if reduction == "sum" else losses.mean()


class WithoutThreshold(TorchFunctionMode):
    """Computes softplus above 20 too, where PyTorch takes its input for it: the two are 2e-9 apart there."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the function, softplus with a threshold beyond what float64 tells apart."""
        if getattr(func, "__name__", "") == "softplus":
            args, kwargs = without_threshold(*args, **(kwargs or {})), {}
        return func(*args, **(kwargs or {}))


def without_threshold(x: torch.Tensor, beta: float = 1.0, threshold: float = 20.0) -> tuple[torch.Tensor, float, float]:
    """Return softplus's arguments with a high threshold."""
    return x, beta, max(threshold, 40.0)


EPSILONS = (1e-5, 1e-6, 1e-3, 1e-4, 1e-7, 1e-8, 1e-12, 0.0)  # that layers of either framework have
LARGEST_EPSILON = 1e-2
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {  # that a port may have in the place of another one
    "nothing": lambda x: x,
    "relu": nn.functional.relu,
    "leaky_relu": nn.functional.leaky_relu,
    "leaky_relu of slope 0.2": lambda x: nn.functional.leaky_relu(x, 0.2),
    "relu6": nn.functional.relu6,
    "elu": nn.functional.elu,
    "selu": nn.functional.selu,
    "gelu": nn.functional.gelu,
    "gelu by tanh": lambda x: nn.functional.gelu(x, approximate="tanh"),
    "gelu by sigmoid": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": nn.functional.silu,
    "mish": nn.functional.mish,
    "softplus": nn.functional.softplus,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "hardsigmoid": nn.functional.hardsigmoid,
    "hardswish": nn.functional.hardswish,
}


class Otherwise(TorchFunctionMode):
    """Runs operations with another eps, axis, form of GELU or mode; `changed` says what was changed.

    Args:
        change: what takes the place of each small constant, or the axis of a softmax if it is an integer; None: GELU
            and the mode of batch normalisation are changed.
    """

    def __init__(self, change: float | None) -> None:
        super().__init__()
        self.instead, self.changed = change, ""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the function with the change."""
        kwargs = dict(kwargs or {})
        if isinstance(self.instead, int):
            if (label := getattr(func, "__name__", "")).endswith("softmax"):
                args, kwargs = (args[0], *args[2:]), kwargs | {"dim": self.instead}
                self.changed = f"the {label} over axis {self.instead}"
        elif self.instead is not None:
            args, kwargs = tuple(map(self.change, args)), {name: self.change(leaf) for name, leaf in kwargs.items()}
        elif (label := getattr(func, "__name__", "")) == "batch_norm" and "training" in kwargs:
            kwargs |= {"training": not kwargs["training"], "momentum": 0.0}  # the running statistics stay as they are
            self.changed = f"the statistics of {'the batch' if kwargs['training'] else 'evaluation mode'}"
        elif label == "gelu":
            exact = kwargs.get("approximate") == "tanh"
            kwargs["approximate"] = "none" if exact else "tanh"
            self.changed = f"the {'exact GELU' if exact else 'approximation of GELU by tanh'}"
        return func(*args, **kwargs)

    def change(self, leaf: Any) -> Any:
        """Return the other eps in the place of one."""
        if not isinstance(leaf, float) or not 0 < leaf <= LARGEST_EPSILON or leaf == self.instead:
            return leaf
        self.changed = f"{self.instead:g} in the place of {leaf:g}"
        return self.instead


# The lower and the upper limit of the values of each function that has some.
LIMITS: dict[str, Callable[..., tuple[Any, Any]]] = {
    "clamp": lambda given, min=None, max=None, **_: (min, max),
    "clamp_min": lambda given, min, **_: (min, None),
    "clamp_max": lambda given, max, **_: (None, max),
    "hardtanh": lambda given, min_val=-1.0, max_val=1.0, **_: (min_val, max_val),
    "relu6": lambda given, **_: (None, 6.0),
    "hardsigmoid": lambda given, **_: (-3.0, 3.0),
    "hardswish": lambda given, **_: (-3.0, 3.0),
}
LIMITS["clip"] = LIMITS["clamp"]
SMALLEST_LIMIT, LARGEST_LIMIT = 1e-3, 100.0  # others guard a division, or are as large as a dtype allows
CHANNELS_SECOND = (nn.modules.batchnorm._NormBase, nn.GroupNorm)  # with a weight of one axis; convolutions have more
BEYOND, MOST_TIMES = 1.5, 1e3  # how far beyond a limit a value moves, and how many times as large it becomes at most


class Reached(TorchFunctionMode):
    """Finds the limits, such as the 6 of a ReLU6, that no value reaches: another limit in JAX would not show.

    Attributes:
        missed: the limits, by the module with the function.
        factors: how many times as large an output of the layer before must become: by layer, and the output's number.
    """

    def __init__(self) -> None:
        super().__init__()
        self.missed: dict[str, float] = {}
        self.factors: dict[tuple[str, int], float] = {}
        self.scopes: list[str] = []
        self.layer: tuple[str, torch.Tensor, int] | None = None  # the last one, its output, and the axis of channels

    @contextmanager
    def attach(self, module: nn.Module) -> Iterator[None]:
        """Watch a module while it runs."""
        handles: list[Any] = []
        for name, part in module.named_modules():
            handles.append(part.register_forward_pre_hook(lambda _, args, name=name: self.scopes.append(name)))
            handles.append(part.register_forward_hook(self.after, always_call=True))
        with self:
            yield
        for handle in handles:
            handle.remove()

    def after(self, part: nn.Module, args: Any, output: Any) -> None:
        """Note the last layer with a weight."""
        name, weight = self.scopes.pop(), getattr(part, "weight", None)
        if not isinstance(weight, torch.Tensor) or not isinstance(output, torch.Tensor):
            return
        axis = 1 if weight.dim() > 2 or isinstance(part, CHANNELS_SECOND) else -1
        own = isinstance(weight, nn.Parameter) and not getattr(part, "transposed", False)
        self.layer = (name, output, axis) if own and output.shape[axis] == len(weight) else None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Compare what the function is given with its limits, and call it."""
        find = LIMITS.get(getattr(func, "__name__", "").strip("_"))
        if find is not None and args and args[0].numel():
            for sign, limit in zip((-1, 1), find(*args, **(kwargs or {})), strict=True):
                if isinstance(limit, int | float) and SMALLEST_LIMIT < abs(limit) <= LARGEST_LIMIT:
                    self.compare(sign * args[0].detach(), sign * float(limit), sign)
        return func(*args, **(kwargs or {}))

    def compare(self, given: torch.Tensor, limit: float, sign: int) -> None:
        """Note an upper limit of values that none reaches, and what would reach it."""
        most = float(given.max())
        if most > limit:
            return
        self.missed[self.scopes[-1] if self.scopes else ""] = sign * limit
        if self.layer is None or not limit <= MOST_TIMES * most:
            return
        name, output, axis = self.layer
        if output.numel() == given.numel():  # else it may be another value
            place = np.unravel_index(int((sign * output.detach()).argmax()), output.shape)
            key = name, int(place[axis])
            self.factors[key] = max(self.factors.get(key, 0.0), BEYOND * limit / most)


WIDER = {torch.float32: torch.float64, torch.complex64: torch.complex128, "torch.FloatTensor": "torch.DoubleTensor"}


class Widened(TorchFunctionMode):
    """Computes in float64 wherever a module asks for float32, as `taps.widen` does in JAX.

    The constants of float64 itself become those of float32: a module whose eps is that of its dtype is used, and
    ported, with the one of float32.

    Attributes:
        changed: the functions that were asked for float32, or for a constant of the dtype.
    """

    def __init__(self) -> None:
        super().__init__()
        self.changed: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the function with float64 in the place of float32."""
        label, kwargs = getattr(func, "__name__", ""), dict(kwargs or {})
        if label == "view":  # reads the bits in another dtype
            return func(*args, **kwargs)
        new_args = tuple(wider(value) for value in args)
        new_kwargs = {name: wider(value) for name, value in kwargs.items()}
        given = zip((*args, *kwargs.values()), (*new_args, *new_kwargs.values()), strict=True)
        changed = any(before is not after for before, after in given)
        if func is torch.Tensor.float:
            func, changed = torch.Tensor.double, True
        if label == "rms_norm" and (*args[3:], kwargs.get("eps"))[0] is None and args[0].dtype is torch.float64:
            new_args, new_kwargs["eps"], changed = new_args[:3], FINFO(torch.float32).eps, True
        if changed:
            self.changed.add(label)
        try:
            outputs = func(*new_args, **new_kwargs)
        except RuntimeError:  # some functions do not promote a float32 tensor, such as the weights of a loss's classes
            tensors = [value.dtype for value in (*new_args, *new_kwargs.values()) if isinstance(value, torch.Tensor)]
            if not {torch.float32, torch.float64} <= set(tensors):
                raise
            outputs = func(*map(to_double, new_args), **{name: to_double(value) for name, value in new_kwargs.items()})
        if label in ("tensor", "as_tensor", "asarray"):  # may take the dtype of an array
            return cast(outputs, torch.float64)
        return outputs

    def finfo(self, dtype: torch.dtype | None = None) -> torch.finfo:
        """Return the constants of a dtype as a module gets them, those of float32 for float64."""
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if (dtype or torch.get_default_dtype()) is not torch.float64 or caller.startswith("torch._"):
            return FINFO() if dtype is None else FINFO(dtype)
        self.changed.add("finfo")
        return FINFO(torch.float32)


FINFO = torch.finfo


def wider(value: Any) -> Any:
    """Return float64 for float32, and anything else as it is."""
    return WIDER.get(value, value) if isinstance(value, torch.dtype | str) else value


def to_double(value: Any) -> Any:
    """Return a float32 tensor in float64, and anything else as it is."""
    return value.double() if isinstance(value, torch.Tensor) and value.dtype is torch.float32 else value


class Rounded(TorchDispatchMode):
    """Moves each result of an operation, forward and backward, by one unit in the last place: another way to round it.

    What then moves further shows how much rounding alone can do, as where large terms cancel in a gradient. This is
    the Monte Carlo arithmetic of Parker (1997), for float64. An operation that keeps its result for the backward pass,
    as softmax does, keeps the moved one. Whole numbers, such as a mask or positions, are exact, and so is what is only
    chosen: the gradient of a maximum goes to the values that are equal to it.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the operation, and move what it computed; a view has nothing of its own."""
        outputs = func(*args, **(kwargs or {}))
        exact = func.is_view or func.overloadpacket.__name__ in ("amax", "amin", "max", "min")
        for result in () if exact else outputs if isinstance(outputs, tuple | list) else (outputs,):
            if isinstance(result, torch.Tensor) and result.dtype is torch.float64 and result.layout is torch.strided:
                self.move(result)
        return outputs

    def move(self, result: torch.Tensor) -> None:
        """Move each value of a tensor up or down, in place."""
        if bool((result == result.round()).all()):
            return
        up = torch.randint(0, 2, result.shape, generator=self.generator, dtype=torch.float64)
        moved = result * (1 + FINFO(torch.float64).eps * (2 * up - 1))
        result.copy_(torch.where(moved.isfinite(), moved, result))


@contextmanager
def fixed_settings(dtype: torch.dtype, module: nn.Module | None = None) -> Iterator[Widened]:
    """Set what the results depend on beside the module, and restore it afterwards.

    PyTorch computes attention by another formula ("fast path") when no gradient is asked for. New tensors in a forward
    method take the default dtype. Random numbers are the same in each run. In float64, float32 becomes float64 too,
    unless the module says that it does not run so.
    """
    default, fast = torch.get_default_dtype(), torch.backends.mha.get_fastpath_enabled()
    widened = Widened()
    try:
        torch.set_default_dtype(dtype)
        torch.backends.mha.set_fastpath_enabled(False)
        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(devices=[]))
            stack.enter_context(torch.enable_grad())
            if dtype is torch.float64 and not getattr(module, "keeps_float32", False):
                torch.finfo = widened.finfo  # type: ignore[misc, assignment]
                stack.enter_context(widened)
            torch.manual_seed(0)
            yield widened
    finally:
        torch.finfo = FINFO  # type: ignore[misc]
        torch.set_default_dtype(default)
        torch.backends.mha.set_fastpath_enabled(fast)


def run(model: nn.Module, inputs: Call, objective: Any, dtype: torch.dtype, watch: Watch | None = None) -> Run:
    """Run the model forward and backward once.

    Raises:
        Refused: it does not run.
    """
    with ExitStack() as stack:
        widened = stack.enter_context(fixed_settings(dtype, model))
        stack.enter_context(WithoutDropout())  # some models forget to switch a function of dropout off
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
            if watch:
                watch.end_forward(loss is not None and loss.requires_grad)
            if loss is not None and loss.requires_grad:
                run_backward(loss)
        except Refused:
            raise
        except Exception as error:
            raise Refused(f"the reference does not run on these inputs in {dtype}: {describe(error)}") from error
    gradients = {name: to_numpy(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    buffers = {name: to_numpy(buffer).copy() for name, buffer in model.named_buffers()}
    notes = ["the reference draws random numbers"] if drew else []
    if widened.changed:
        notes.append(f"PyTorch's float32 ({shorten(sorted(widened.changed))}) is float64 in the float64 run")
    return Run(arrays, None if loss is None else float(loss.detach()), gradients, buffers, tuple(notes))


def run_backward(
    tensor: torch.Tensor,
    gradient: torch.Tensor | None = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    inputs: Any = None,
) -> None:
    """Run the backward pass from a tensor.

    `Tensor.backward` would leave the modes of this file. But torch.utils.checkpoint, which computes the forward again
    during the backward pass, needs them.
    """
    start = torch.ones_like(tensor) if gradient is None else gradient
    keep = create_graph if retain_graph is None else retain_graph
    engine = torch.autograd.Variable._execution_engine
    engine.run_backward((tensor,), (start,), keep, create_graph, tuple(inputs or ()), True, accumulate_grad=True)


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


FIRST = "[0]"  # behind the name of a call: the first of its outputs


def calls_in(
    module: nn.Module, inputs: Call, names: Collection[str], *, training: bool
) -> dict[str, tuple[Callable[..., Any], Any, Any]]:
    """Return function, positional and keyword arguments of these calls in a float64 run of the reference.

    The first of several outputs stands for its call: `attention[0]`.
    """
    keys = {name: name.removesuffix(FIRST) for name in names}
    watch, model = Watch(calls_of={*keys.values()}), fresh_copy(module, training, torch.float64)
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    with watch.attach(model):
        run(model, inputs, lambda outputs: None, torch.float64, watch)
    for buffer, before in buffers:  # the calls run again with the statistics that they had
        buffer.copy_(before)
    return {name: watch.kept_calls[key] for name, key in keys.items() if key in watch.kept_calls}


# The reference's own errors: where it is less exact than float64, so that float64 cannot judge a port of it. Some
# stages compute in float32 inside a float64 run (a softmax, a time embedding): all their values then fit float32,
# though weights and inputs were moved so that no exact result would. Some stages have a gradient that is off by more
# than rounding (a factor of 1/6 that was rounded to float32): a finite difference shows it.

MOVE = 1e-7  # relative change of weights and inputs: a few units in the last place of float32
NOISE = 1e-12  # relative: above what rounding in float64 gives
UNIT = 2.0**-24  # the largest relative error of rounding to float32


class ReferenceError(NamedTuple):
    """The reference's own errors. Each is relative to the largest value of its array.

    Attributes:
        values: how far the values of stages move by rounding inside the reference, by the names of `TorchCapture`.
        gradients: how far the gradients by these values move.
        weight_gradients: how far the gradients by the parameters move.
        born: the stages in `values` that keep float32 themselves. The others follow after one.
        born_gradients: the stages in `gradients` that keep float32 themselves.
        backward: the error of a stage's backward pass, for the stages that were asked for. It shows in the gradients
            by what goes into the stage.
    """

    values: dict[str, float]
    gradients: dict[str, float]
    weight_gradients: dict[str, float]
    born: frozenset[str]
    born_gradients: frozenset[str]
    backward: dict[str, float]


def reference_error(
    module: nn.Module,
    inputs: Call,
    objective: Any,
    capture: TorchCapture,
    *,
    training: bool = False,
    backward_of: Collection[str] = (),
) -> ReferenceError:
    """Return how far the reference's own stages move between two ways to compute them.

    The reference runs with all weights and inputs moved by some 1e-7 in both directions. What is smooth cancels in the
    second difference, and what is left is rounding. Nothing more is run if no stage keeps float32.

    Args:
        module: the reference.
        inputs: what `capture` was made with.
        objective: what `capture` was made with.
        capture: the unmoved run in float64, which gives the names.
        training: what `capture` was made with.
        backward_of: names of stages whose gradient is compared with a finite difference.
    """
    backward = backward_errors(module, inputs, objective, training, backward_of) if backward_of else {}
    up, watch = run_moved(module, inputs, objective, training, +1)
    born = frozenset(name for name, value in watch.values.items() if keeps_float32(value))
    born_gradients = frozenset(name for name, value in watch.gradients.items() if keeps_float32(value))
    if not born and not born_gradients:
        return ReferenceError({}, {}, {}, born, born_gradients, backward)
    down, other = run_moved(module, inputs, objective, training, -1)
    return ReferenceError(
        second_differences(capture.values, watch.values, other.values, born),
        second_differences(capture.gradients, watch.gradients, other.gradients, born_gradients),
        second_differences(capture.weight_gradients, up.weight_gradients, down.weight_gradients, frozenset()),
        born,
        born_gradients,
        backward,
    )


def run_moved(module: nn.Module, inputs: Call, objective: Any, training: bool, sign: int) -> tuple[Run, Watch]:
    """Run the reference with weights, buffers and inputs moved, the same way for the same sign."""
    generator = torch.Generator().manual_seed(0)

    def move(tensor: torch.Tensor) -> torch.Tensor:
        change = torch.rand(tensor.shape, generator=generator, dtype=torch.float64) * 2 - 1
        return tensor * (1 + sign * MOVE * change) if tensor.is_floating_point() else tensor

    class Moved(NamedTuple):
        args: tuple[Any, ...]
        kwargs: Mapping[str, Any]

    model = fresh_copy(module, training, torch.float64)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.copy_(move(tensor))
        args, kwargs = (
            map_leaves(
                lambda _, leaf: move(to_input(leaf, torch.float64).detach()) if hasattr(leaf, "shape") else leaf, nest
            )
            for nest in (inputs.args, inputs.kwargs)
        )
    watch = Watch()
    with watch.attach(model):
        return run(model, Moved(args, kwargs), objective, torch.float64, watch), watch


def second_differences(
    middle: Mapping[str, np.ndarray],
    up: Mapping[str, np.ndarray],
    down: Mapping[str, np.ndarray],
    born: frozenset[str],
) -> dict[str, float]:
    """Return the relative rounding error of each array in which it is larger than float64 rounding explains."""
    errors = {}
    for name, value in middle.items():
        arrays = (value, up.get(name), down.get(name))
        if value.dtype.kind != "f" or any(array is None or array.shape != value.shape for array in arrays):
            continue
        scale = float(np.abs(value).max(initial=0.0))
        if not 0 < scale < np.inf:
            continue
        difference = np.abs((up[name].astype(np.float64) - value) + (down[name].astype(np.float64) - value)).max()
        # The rounding of three runs is in the difference, once of them twice.
        error = max(float(difference) / 2 / scale, UNIT if name in born else 0.0)
        if error > NOISE:
            errors[name] = error
    return errors


# Gradients against finite differences


def backward_errors(
    module: nn.Module, inputs: Call, objective: Any, training: bool, names: Collection[str]
) -> dict[str, float]:
    """Return the relative error of each stage's gradient by its inputs, where it is more than 1e-9.

    An error of more than 1e-5 is left out: that is no rounding but a gradient by intention (straight through).
    """
    stages = {name.split("[")[0] for name in names}
    watch = Watch(calls_of=stages)
    model = fresh_copy(module, training, torch.float64)
    with watch.attach(model):
        run(model, inputs, objective, torch.float64, watch)
    errors = {}
    for name in names:
        if (call := watch.kept_calls.get(name.split("[")[0])) is None:
            continue
        with fixed_settings(torch.float64, model):
            error = gradient_error(*call)
        if error is not None and 1e-9 < error < 1e-5:
            errors[name] = error
    return errors


def gradient_error(function: Callable[..., Any], args: Any, kwargs: Any) -> float | None:
    """Return the relative difference between a function's gradient and a finite difference, the median of a few.

    Returns:
        None if it has no gradient, or if every direction that was tried passes a kink.
    """
    generator = torch.Generator().manual_seed(0)
    points = [leaf for leaf in flat((args, kwargs)).values() if is_movable(leaf)]

    def outputs_at(moves: list[torch.Tensor]) -> list[torch.Tensor]:
        moved = iter(moves)
        new_args, new_kwargs = map_leaves(
            lambda _, leaf: leaf + next(moved) if is_movable(leaf) else leaf, (args, kwargs)
        )
        return [leaf for leaf in flat(function(*new_args, **new_kwargs)).values() if is_movable(leaf)]

    zeros = [torch.zeros_like(point).requires_grad_() for point in points]
    outputs = outputs_at(zeros)
    cotangents = [torch.rand(leaf.shape, generator=generator, dtype=torch.float64) + 0.5 for leaf in outputs]
    total = sum(((c * leaf).sum() for c, leaf in zip(cotangents, outputs, strict=True)), torch.zeros(()))
    if not points or not total.requires_grad:
        return None
    engine, one = torch.autograd.Variable._execution_engine, torch.ones_like(total)  # as in `run_backward`
    gradients = engine.run_backward((total,), (one,), False, False, tuple(zeros), True, accumulate_grad=False)
    slopes = [torch.zeros_like(p) if g is None else g for p, g in zip(points, gradients, strict=True)]
    errors = []
    for _ in range(8):
        direction = [sparse_direction(point, generator) for point in points]
        products = [slope * part for slope, part in zip(slopes, direction, strict=True)]
        scale = sum(float(product.abs().sum()) for product in products)
        differences = [finite_difference(outputs_at, direction, cotangents, step, scale) for step in (1e-4, 7e-5)]
        if scale and None not in differences:
            slope = sum(float(product.sum()) for product in products)
            errors.append(min(abs(difference - slope) / scale for difference in differences if difference is not None))
    return float(np.median(errors)) if errors else None


def is_movable(leaf: Any) -> bool:
    """Return whether a part of a nest is a floating-point tensor with values."""
    return isinstance(leaf, torch.Tensor) and leaf.is_floating_point() and leaf.numel() > 0


def sparse_direction(point: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return a direction in which a few elements move, so that few pass a kink, by the size of the point."""
    direction = torch.zeros_like(point).flatten()
    places = torch.randint(direction.numel(), (8,), generator=generator)
    size = float(point[point.isfinite()].abs().max()) if point.isfinite().any() else 1.0
    direction[places] = (torch.rand(8, generator=generator, dtype=torch.float64).to(point.dtype) + 0.5) * (size or 1.0)
    return direction.view_as(point)


@torch.no_grad()
def finite_difference(
    outputs_at: Callable[[list[torch.Tensor]], list[torch.Tensor]],
    direction: list[torch.Tensor],
    cotangents: list[torch.Tensor],
    step: float,
    scale: float,
) -> float | None:
    """Return the slope in a direction from differences of fourth order (Richardson), or None at a kink.

    Where the function is smooth, the difference between its right and its left slope is proportional to the step.
    Outputs are subtracted before they are summed, so that those that do not move leave no rounding.
    """

    def difference(start: float, end: float) -> float:
        ends = (outputs_at([h * part for part in direction]) for h in (end, start))
        return sum(float((c * (b - a)).sum()) for c, b, a in zip(cotangents, *ends, strict=True)) / step

    right, left = difference(0.0, step), difference(-step, 0.0)
    near_right, near_left = 2 * difference(0.0, step / 2), 2 * difference(-step / 2, 0.0)
    if abs(2 * (near_right - near_left) - (right - left)) > 1e-9 * scale:
        return None
    return (2 * (near_right + near_left) - (right + left) / 2) / 3

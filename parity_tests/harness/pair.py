"""A pair: a PyTorch module and a JAX model that are meant to be the same network, as a user declares them.

Only the first three fields have to be given. All others have a default that fits most ports, and can be given where a
port needs another. Nothing is guessed in silence: what a default chose stands in the report.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import Any, NamedTuple

import jax
import numpy as np
import torch
from jax import numpy as jnp
from torch import nn

from parity_tests.harness.compare import Refused, blame, flat
from parity_tests.harness.taps import in_float64
from parity_tests.harness.torch_side import cast, copy_module, hold_real

TorchDict = dict[str, np.ndarray]  # arrays by the names of PyTorch's tensors

LARGE = 20_000_000  # parameters: with more, one batch of 2 has to do
NORMS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)
NOISE = 1e-3  # how far the nearly constant row of a probe varies


@jax.tree_util.register_static
@dataclass(frozen=True)
class Fixed:
    """A value that is no array, and that a compiled program is made for."""

    value: Any


class Inputs:
    """The arguments of one call, batch first: `Inputs(images)`, `Inputs(ids, attention_mask=mask)`.

    Attributes:
        args: positional arguments: arrays, or any nest of tuples, lists and dictionaries of arrays.
        kwargs: keyword arguments, of the same kinds.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args, self.kwargs = args, kwargs

    def map(self, function: Callable[[Any], Any]) -> "Inputs":
        """Return the inputs with a function applied to each array; what is no array stays."""

        def apply(nest: Any) -> Any:
            return jax.tree.map(lambda leaf: function(leaf) if is_array(leaf) else leaf, nest)

        # JAX sorts the names of a dictionary, and a port may take the arguments by their order.
        return Inputs(*apply(self.args), **{name: apply(nest) for name, nest in self.kwargs.items()})

    def fixed(self) -> "Inputs":
        """Return the inputs for a program that JAX compiles: what is no array, such as True, is no argument of it."""
        args, kwargs = jax.tree.map(lambda leaf: leaf if is_array(leaf) else Fixed(leaf), (self.args, self.kwargs))
        return Inputs(*args, **kwargs)

    def unfixed(self) -> "Inputs":
        """Return the inputs as they were."""
        both, is_fixed = (self.args, self.kwargs), lambda leaf: isinstance(leaf, Fixed)
        args, kwargs = jax.tree.map(lambda leaf: leaf.value if is_fixed(leaf) else leaf, both, is_leaf=is_fixed)
        return Inputs(*args, **kwargs)

    def arrays(self) -> list[Any]:
        """Return all arrays, in order."""
        return [leaf for leaf in jax.tree.leaves((self.args, self.kwargs)) if is_array(leaf)]


class Batch(NamedTuple):
    """One batch of a data pipeline: inputs as PyTorch takes them, and targets (None if the loss needs none)."""

    inputs: Any
    targets: Any = None


Batches = Callable[[int, int], Iterator[Batch]]  # (seed, epoch) -> the batches of this epoch
TorchLoss = Callable[[Any, Any], torch.Tensor]  # (outputs, targets) -> loss
JaxLoss = Callable[[Any, Any], jax.Array]


@dataclass(frozen=True, eq=False)
class Pair:
    """A PyTorch module, a JAX model, and example inputs; PyTorch is the reference."""

    torch_module: nn.Module | Callable[[], nn.Module]
    """The reference, or a function that makes a new one. Initial weights can be compared only if it is a function."""
    jax_model: Any
    """A Flax Linen, NNX or Equinox module, a Haiku transform, a function f(variables, *args, **kwargs), or a tuple:
    (NNX or Equinox module, function f(module, *args, **kwargs)), (variables, Linen module or Haiku transform), or what
    `nnx.split` or `eqx.partition` returned."""
    inputs: Any
    """An example of what PyTorch takes, batch first: an array, a tuple of arrays or `Inputs`; or a function
    (random number generator, batch size) that draws it."""
    weights: Any = None
    """Where PyTorch's tensors stand in JAX's variables: a mapping of names, patterns or rules (what it leaves out is
    proposed), a function from PyTorch's state dict to JAX's variables, a `WeightMap`, or None: all is proposed."""
    stages: Mapping[str, str] = field(default_factory=dict)
    """PyTorch's stages and the JAX stages with the same value, where weights and order do not tell; patterns too."""
    jax_inputs: Any = None
    """How JAX takes the inputs: "same", "channels_last", or a function from `Inputs` to `Inputs`. None means
    channels-last for float arrays of 4 and 5 axes, but for Equinox, whose layers take channels first. "channels_last"
    also turns arrays of 3 axes, as sounds are, if no input has more."""
    jax_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """More keyword arguments of the JAX model in evaluation mode."""
    jax_training_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """More keyword arguments of the JAX model in training mode."""
    torch_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """More keyword arguments of the PyTorch module, which are not for JAX."""
    targets: Any = None
    """An example of what the losses compare the outputs with, or a function (random number generator, batch size)."""
    torch_loss: TorchLoss | None = None
    """(outputs, targets) -> loss. None: cross-entropy for integer targets, half the mean square of all outputs else."""
    jax_loss: JaxLoss | None = None
    """The same in JAX."""
    torch_optimizer: Callable[[nn.Module], torch.optim.Optimizer] | None = None
    """Makes the optimizer of a module. None: Adam with a learning rate of 0.001."""
    jax_optimizer: Any = None
    """An optax transformation of JAX's own trainable variables, or a function that makes it. None: optax.adam(1e-3)."""
    torch_step: Callable[[nn.Module, torch.optim.Optimizer, Iterator[torch.Tensor]], None] | None = None
    """(module, optimizer, losses) -> None: one step, where it is more than `backward` and `optimizer.step()`: clipping,
    or several losses that are summed up. The gradients are 0 before it."""
    jax_step: Callable[..., Any] | None = None
    """(optimizer, list of gradients, optimizer state, params) -> (params, optimizer state): the same in JAX."""
    micro_batches: int = 1
    """The number of batches, hence of losses and gradients, of one step."""
    torch_schedule: Callable[[int], float] | None = None
    """The learning rate of PyTorch's step, counted from 0."""
    jax_schedule: Callable[[int], Any] | None = None
    """The learning rate of JAX's step, counted from 0."""
    schedule_steps: int = 1000
    """The steps over which the schedules are compared."""
    training: bool | None = None
    """Whether to compare training mode too. None: if the module has batch normalisation or dropout. False: both sides
    train in evaluation mode, as a fine-tuning with fixed statistics does."""
    torch_batches: Batches | None = None
    """The batches of PyTorch's data pipeline; None: inputs are drawn like the example."""
    jax_batches: Batches | None = None
    """The batches of JAX's data pipeline, with inputs as PyTorch takes them."""
    jax_init: Any = None
    """Draws JAX's own variables from a key; "model" is the model's own way. None: initial weights are not compared."""
    precision_factor: float | None = None
    """How many times as far from float64 JAX's float32 may be as PyTorch's. None: float32 is not compared."""
    batch_sizes: tuple[int, ...] | None = None
    """The batches that are compared. None: 8 and 5, or 2 for more than 20 million parameters."""
    name: str = ""
    """The name in the report. Empty: that of the PyTorch module."""

    def title(self) -> str:
        """Return the name in the report."""
        return self.name or type(self.new_module()).__name__

    def new_module(self, seed: int = 0) -> nn.Module:
        """Return a new reference, drawn with this seed, or the given one if the pair has no way to make another."""
        module: Any = self.torch_module
        if not isinstance(module, nn.Module):
            torch.manual_seed(seed)
            module = module()
        if not isinstance(module, nn.Module):
            raise Refused(f"the function of the PyTorch side makes a {type(module).__name__}, not a torch.nn.Module")
        weights = [*module.parameters(), *module.buffers()]
        if any(weight.is_meta or nn.parameter.is_lazy(weight) for weight in weights):
            raise Refused(
                "the PyTorch module has weights without values (lazy, or on the meta device): run it once, or load them"
            )
        if not weights:
            raise Refused("the PyTorch module has no weights: put a layer that has some in front of what is compared")
        return hold_real(getattr(module, "_orig_mod", module))  # the one that torch.compile was given

    def sizes(self) -> tuple[int, ...]:
        """Return the sizes of the batches that are compared."""
        if self.batch_sizes is not None:
            return self.batch_sizes
        large = sum(parameter.numel() for parameter in self.new_module().parameters()) > LARGE
        return (2,) if large else (8, 5)  # a loss that divides by the wrong number shows on the second

    def draw_inputs(self, seed: int, size: int, extremes: bool = True) -> Inputs:
        """Return inputs of this batch size that show as much as random numbers can, with or without extreme rows."""
        rng = np.random.default_rng((seed, size))
        if callable(self.inputs):
            return as_inputs(self.inputs(rng, size))
        return draw_like(self.inputs, rng, size, extremes=extremes)

    def draw_targets(self, seed: int, size: int) -> Any:
        """Return targets for a batch of this size: drawn by the pair's function, or rows of the example."""
        rng = np.random.default_rng((seed, size, 1))
        if self.targets is None or callable(self.targets):
            return self.targets and self.targets(rng, size)
        return jax.tree.map(lambda leaf: draw_rows(np.asarray(leaf), (seed, size, 1), size), self.targets)

    def draw_batch(self, seed: int, size: int, extremes: bool = True) -> Batch:
        """Return inputs and targets of this batch size."""
        return Batch(self.draw_inputs(seed, size, extremes), self.draw_targets(seed, size))


FUNCTIONS = {
    "torch_loss": "of (outputs, targets)",
    "jax_loss": "of (outputs, targets)",
    "torch_optimizer": "that makes one for a module",
    "torch_step": "of (module, optimizer, losses)",
    "jax_step": "of (optimizer, gradients, optimizer state, params)",
    "torch_schedule": "from the step, counted from 0, to the rate",
    "jax_schedule": "from the step, counted from 0, to the rate",
    "torch_batches": "of (seed, epoch) that gives a Batch at a time",
    "jax_batches": "of (seed, epoch) that gives a Batch at a time",
}


def name_of(value: Any) -> str:
    """Return what a value is, for a message."""
    return f"the class {value.__name__}" if isinstance(value, type) else f"a {type(value).__name__}"


def with_blame(pair: Pair) -> Pair:
    """Return the pair with functions whose errors say which field they are."""
    names = (*FUNCTIONS, "torch_module", "inputs", "targets", "jax_inputs", "jax_init", "jax_optimizer")
    given = {name: getattr(pair, name) for name in names}
    functions = {
        name: blame(f"{name}=")(function)
        for name, function in given.items()
        if callable(function) and not hasattr(function, "init") and name != "jax_loss"
    }
    if isinstance(pair.torch_module, nn.Module):
        functions.pop("torch_module")
    return replace(pair, **functions)


def find_slip(pair: Pair) -> str:
    """Return what is wrong with a declaration in any case, or an empty string."""
    reference, sizes = pair.torch_module, pair.batch_sizes
    libraries = {base.__module__.partition(".")[0] for base in type(reference).__mro__}
    if not callable(reference) or libraries & {"flax", "equinox", "haiku"}:
        return f"the first field is a {type(reference).__name__}, not a torch.nn.Module or a function that makes one"
    if isinstance(reference, torch.jit.ScriptModule):
        return "the PyTorch module is scripted, and nothing is seen inside: give the module that it was made of"
    if isinstance(pair.jax_model, type):
        return f"the JAX model is the class {pair.jax_model.__name__}: give a model, {pair.jax_model.__name__}(...)"
    if pair.inputs is None:
        return "inputs= is None: give an example of what PyTorch takes"
    for name, what in FUNCTIONS.items():
        given = getattr(pair, name)
        if given is not None and (not callable(given) or (isinstance(given, type) and name.endswith("loss"))):
            return f"{name}= is {name_of(given)}: give a function {what}"
    if not (pair.jax_optimizer is None or callable(pair.jax_optimizer) or hasattr(pair.jax_optimizer, "init")):
        return f"jax_optimizer= is {name_of(pair.jax_optimizer)}: give an optax transformation"
    for what in ("loss", "optimizer", "batches"):
        if (getattr(pair, f"torch_{what}") is None) != (getattr(pair, f"jax_{what}") is None):
            return f"the pair declares one of torch_{what}= and jax_{what}= only: give both, or neither"
    for name in ("stages", "jax_kwargs", "jax_training_kwargs", "torch_kwargs"):
        if not isinstance(getattr(pair, name), Mapping):
            return f"{name}= is {name_of(getattr(pair, name))}: give a mapping"
    if isinstance(pair.weights, list | tuple | str):
        return f"weights= is {name_of(pair.weights)}: give a mapping of names, or a function from PyTorch's state dict"
    if not (pair.jax_init is None or pair.jax_init == "model" or callable(pair.jax_init)):
        return f'jax_init= is {name_of(pair.jax_init)}: give "model", or a function from a key to JAX\'s variables'
    if not isinstance(pair.training, bool | None):
        return f"training={pair.training!r}: give True, False or None"
    for name in ("micro_batches", "schedule_steps"):
        if not isinstance(given := getattr(pair, name), Integral) or given < 1:
            return f"{name}={given!r}: give a whole number, 1 or more"
    if not isinstance(pair.precision_factor, int | float | None):
        return f"precision_factor={pair.precision_factor!r} is no number"
    if not callable(pair.inputs) and not isinstance(pair.inputs, Inputs):
        arrays = as_inputs(pair.inputs).arrays()
        if not arrays or arrays[0].shape[:1] == (0,):
            return f"inputs= is {name_of(pair.inputs)} without rows: give an array, a tuple of arrays or Inputs(...)"
    if isinstance(pair.targets, list | str):
        return f"targets= is {name_of(pair.targets)}: give an array, or a tuple or dictionary of arrays"
    if isinstance(pair.jax_inputs, str) and pair.jax_inputs not in ("same", "channels_last"):
        return f'jax_inputs={pair.jax_inputs!r} is unknown: give "same", "channels_last" or a function'
    if sizes is not None and not (
        isinstance(sizes, tuple | list) and sizes and all(isinstance(size, Integral) and size > 0 for size in sizes)
    ):
        return f"batch_sizes={sizes!r} is no tuple of sizes, such as (8, 5)"
    return ""


def is_array(leaf: Any) -> bool:
    """Return whether a leaf of a nest is an array of any framework."""
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def as_inputs(value: Any) -> Inputs:
    """Return what a user gave as inputs: an array, a tuple of positional arguments, keyword arguments, or Inputs."""
    if isinstance(value, Inputs):
        inputs = value
    elif isinstance(value, tuple):
        inputs = Inputs(*value)
    else:
        inputs = Inputs(value)
    return inputs.map(lambda leaf: leaf.detach().cpu().numpy() if isinstance(leaf, torch.Tensor) else np.asarray(leaf))


def batch_of(example: Any) -> int:
    """Return the batch size of an example: the first axis of its first array; 0 if it has none."""
    arrays = [leaf for leaf in jax.tree.leaves(example) if is_array(leaf) and len(leaf.shape)]
    return int(arrays[0].shape[0]) if arrays else 0


def draw_like(example: Any, rng: np.random.Generator, size: int, zeros: bool = True, extremes: bool = True) -> Inputs:
    """Draw inputs like an example: floats anew, integers and booleans from the example's own values."""
    inputs = as_inputs(example)
    batch = batch_of((inputs.args, inputs.kwargs))
    rows = {"zeros": zeros, "extremes": extremes}
    args = jax.tree.map(lambda leaf: redraw(leaf, rng, size, batch, **rows), inputs.args)
    kwargs = {
        name: jax.tree.map(lambda leaf, name=name: redraw(leaf, rng, size, batch, "mask" in name, **rows), value)
        for name, value in inputs.kwargs.items()
    }
    return Inputs(*args, **kwargs)


def draw_rows(example: np.ndarray, seed: Sequence[int], size: int) -> np.ndarray:
    """Return rows of an example in another order, all of them if there are enough: the same rows of all examples.

    A loss may take no other values: probabilities, for example, or labels as long as another target says. Floats of
    one value are a placeholder, and are drawn anew.
    """
    rng = np.random.default_rng(seed)
    if not example.ndim:
        return example
    if np.issubdtype(example.dtype, np.floating) and example.size and np.ptp(example) == 0:
        return np.asarray(redraw(example, rng, size, len(example)))
    return example[np.resize(rng.permutation(len(example)), size)]


def redraw(
    example: Any,
    rng: np.random.Generator,
    size: int,
    batch: int,
    mask: bool = False,
    zeros: bool = True,
    extremes: bool = True,
) -> Any:
    """Draw one array like the example, with another batch size if its first axis is the batch.

    Floats are drawn from a normal distribution with the example's mean and deviation, inside its range if it has no
    negative value. With 4 rows or more, some are extreme unless `extremes` is false: the first is zero if it may be,
    the second nearly constant, the third ten times as large, and the next two are three times as large at both ends of
    each axis: of many points, a maximum hardly ever takes the last one. Masks, zeros and ones, and all that is no float
    keep the example's own rows or values; what a mask does that is the same everywhere shows where its last value is
    another one.
    """
    if not is_array(example):
        return example
    array = np.asarray(example)
    if array.ndim == 0 or array.shape[0] != batch:
        return array
    rows = array[np.resize(np.arange(batch), size)]
    if np.issubdtype(array.dtype, np.integer) and not mask:
        drawn = rng.choice(array.reshape(-1), size=rows.shape)
        drawn[: min(batch, size)] = rows[: min(batch, size)]
        return drawn.astype(array.dtype)
    if mask and size >= 4 and array.ndim > 1 < array.shape[-1] and np.unique(array).tolist() in ([0], [1]):
        rows[3:5, ..., -1] = 1 - int(array.flat[0])
    is_mask = mask or (np.isin(array, (0, 1)).all() and array.min() < array.max())
    if not np.issubdtype(array.dtype, np.floating) or is_mask or not np.isfinite(array).all():
        return rows  # a mask that is added has infinities
    spread = float(array.std()) or 1.0
    drawn = float(array.mean()) * (array.std() > 0) + spread * rng.standard_normal(rows.shape)
    if array.min() >= 0 and array.max() > 0:
        drawn = np.abs(drawn)
    if size >= 4 and extremes:
        drawn[0] = 0 if zeros else drawn[0]
        drawn[1] = spread * (0.03 + NOISE * rng.random(rows.shape[1:]))
        drawn[2] *= 10
        for axis in range(1, drawn.ndim if drawn.ndim > 2 else 0):
            np.moveaxis(drawn, axis, 0)[[0, -1], 3:5] *= 3
    return drawn.astype(array.dtype)


def tensors_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return parameters and persistent float buffers by their first names, but for those without values."""
    first: dict[int, str] = {}
    state = module.state_dict(keep_vars=True)
    floats = {name: tensor for name, tensor in state.items() if tensor.is_floating_point() and tensor.numel()}
    return {name: tensor for name, tensor in floats.items() if first.setdefault(id(tensor), name) == name}


def draw_tensors(pair: Pair, seed: int) -> TorchDict:
    """Return the reference's own weights and float buffers in float32, by name: views, where they are float32.

    A reference that cannot be made anew has one set of weights: for seeds above 0 each tensor's values change places.
    """
    tensors = {
        name: tensor.detach().cpu().float().numpy() for name, tensor in tensors_of(pair.new_module(seed)).items()
    }
    if isinstance(pair.torch_module, nn.Module) and seed:
        rng = np.random.default_rng(seed)
        tensors = {name: rng.permutation(array.reshape(-1)).reshape(array.shape) for name, array in tensors.items()}
    return tensors


def probing_tensors(pair: Pair, seed: int) -> TorchDict:
    """Return the reference's weights in float32, changed so that they hide no fault.

    A tensor that is all zeros or all ones, as biases, scales and statistics are at first, is drawn away from there, and
    so is any other parameter of one value, as the slopes of a PReLU or a factor that is learned, and each that is its
    own transpose, as the identity is.
    Every second bias is 0, so that an input of zeros asks an activation for its gradient at 0. The first two scales of
    a norm are 0: its first channel is 0 everywhere, as after a start from 0, and its second a positive constant, from
    which a max-pool cannot choose a largest value.
    """
    rng = np.random.default_rng((seed, 7))
    module = pair.new_module(seed)
    parameters = {name for name, _ in module.named_parameters()}
    tensors = draw_tensors(pair, seed)
    for name, array in tensors.items():
        several = array.size > 1 or name in parameters  # a scale of 0 would hide all that it scales
        if several and np.all(array == 0):
            tensors[name] = (0.2 * rng.standard_normal(array.shape)).astype(np.float32)
        elif several and np.ptp(array) == 0 and (name in parameters or np.all(array == 1)):
            tensors[name] = (array * rng.uniform(0.5, 1.5, array.shape)).astype(np.float32)
        elif name in parameters and array.ndim == 2 and array.size > 1 and np.array_equal(array, array.T):
            noise = rng.uniform(-0.1, 0.1, array.shape)  # else the map could not tell it from its transpose
            tensors[name] = (array + noise * np.abs(array).max()).astype(np.float32)
        if name in parameters and name.endswith("bias") and array.ndim == 1:
            tensors[name] = tensors[name].copy()
            tensors[name][::2] = 0
    for name, layer in module.named_modules():
        scale, bias = f"{name}.weight".lstrip("."), f"{name}.bias".lstrip(".")
        if isinstance(layer, NORMS) and {scale, bias} <= tensors.keys() and tensors[scale].size >= 4:
            tensors |= {own: tensors[own].copy() for own in (scale, bias)}
            tensors[scale].reshape(-1)[:2] = 0
            tensors[bias].reshape(-1)[1] = 0.2
    return tensors


def module_with(pair: Pair, tensors: Mapping[str, np.ndarray], dtype: str, seed: int = 0) -> nn.Module:
    """Return a reference of its own in this dtype, with these tensors, in evaluation mode."""
    module = copy_module(pair.new_module(seed)).cpu()
    module._apply(lambda tensor: cast(tensor, getattr(torch, dtype)))  # complex buffers stay complex
    return load_tensors(module.eval(), tensors)


def load_tensors(module: nn.Module, tensors: Mapping[str, np.ndarray]) -> nn.Module:
    """Return the module, with these tensors in it."""
    own = tensors_of(module)
    with torch.no_grad():
        for name, array in tensors.items():
            own[name].copy_(torch.from_numpy(np.array(array)))
    return module


def torch_objective(pair: Pair) -> TorchLoss:
    """Return the loss in PyTorch: the pair's, or a default one."""
    return pair.torch_loss or blame("the default loss")(default_torch_loss)


def jax_objective(pair: Pair) -> JaxLoss:
    """Return the loss in JAX: the pair's, or a default one."""
    what = "the default loss" if pair.jax_loss is None else "jax_loss="
    return blame(what)(in_float64(pair.jax_loss or default_jax_loss))  # which needs the error itself


def default_torch_loss(outputs: Any, targets: Any) -> torch.Tensor:
    """Compute the mean cross-entropy for integer targets, and half the mean square of all float outputs without any."""
    if targets is not None and not targets.is_floating_point():
        return nn.functional.cross_entropy(outputs, targets.long())
    if targets is not None:
        return nn.functional.mse_loss(outputs, targets)
    return torch.stack([0.5 * leaf.square().mean() for leaf in float_leaves(outputs)]).sum()


def default_jax_loss(outputs: Any, targets: Any) -> jax.Array:
    """Compute the default loss in JAX."""
    if targets is not None and not jnp.issubdtype(targets.dtype, jnp.floating):
        chosen = jnp.take_along_axis(jax.nn.log_softmax(outputs), targets[..., None].astype(jnp.int32), -1)
        return -chosen.mean()
    if targets is not None:
        return jnp.square(outputs - targets).mean()
    return sum((0.5 * jnp.square(leaf).mean() for leaf in float_leaves(outputs)), start=jnp.zeros(()))


def float_leaves(outputs: Any) -> list[Any]:
    """Return the float arrays of a nest of outputs, of either framework."""

    def is_float(leaf: Any) -> bool:
        if isinstance(leaf, torch.Tensor):
            return leaf.is_floating_point()
        return is_array(leaf) and bool(jnp.issubdtype(leaf.dtype, jnp.floating))

    return [leaf for leaf in flat(outputs).values() if is_float(leaf)]

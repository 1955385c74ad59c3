"""Both sides in training: PyTorch's module and optimizer, and JAX's model with optax, step by step.

Nothing here compares. Weights, gradients and moments go from PyTorch to JAX by the map of weights, tensor by tensor and
through views, so that there is never a second copy of a network.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, NamedTuple

import jax
import numpy as np
import torch
from jax import numpy as jnp
from jax.tree_util import GetAttrKey
from torch import nn

from parity_tests.harness.capture import exact_arithmetic, release_memory
from parity_tests.harness.compare import Refused, blame
from parity_tests.harness.pair import is_array
from parity_tests.harness.taps import compiled, rewrite
from parity_tests.harness.torch_side import WithoutDropout, fixed_settings, fresh_copy

Nest = Any  # a batch: any tree of NumPy arrays that JAX can flatten
Arrays = dict[str, np.ndarray]
Leaves = list[Any]  # of what the optimizer sees, in its order
Gradient = Callable[[str], np.ndarray | None]  # the gradient by a tensor, by name; or the moment of a tensor
BatchPair = tuple[Nest, Nest]  # JAX's and PyTorch's

# PyTorch's name of a moment -> what it is called here, and its field in optax's states.
MOMENTS = {
    "exp_avg": ("first moment", "mu"),
    "exp_avg_sq": ("second moment", "nu"),
    "square_avg": ("mean square", "nu"),
    "grad_avg": ("mean gradient", "mu"),
    "momentum_buffer": ("momentum", "trace"),
    "sum": ("sum of squares", "sum_of_squares"),
}
FIELD_OF = dict(MOMENTS.values())
SQUARES = {"second moment", "mean square", "sum of squares"}


class Link(NamedTuple):
    """One entry of the map, with the number of the PyTorch tensor that each value of each leaf comes from.

    `codes` is None where the entry has one tensor.
    """

    entry: Any
    codes: tuple[np.ndarray, ...] | None


@dataclass(frozen=True, eq=False)
class Setup:
    """Both sides of a pair, ready to be trained.

    Attributes:
        module: the reference in float64. It is not changed.
        model: the JAX side's functions (adapters.Model).
        variables: JAX's variables. The values of leaves that the map fills are not read.
        weight_map: carries PyTorch's tensors to JAX's leaves (weights.WeightMap).
        pair: gives `torch_optimizer`, `jax_optimizer`, `torch_schedule`, `torch_step`, `jax_step` and `micro_batches`.
        torch_objective: (module, batch of tensors) -> loss.
        jax_objective: (variables, batch, training) -> loss and the new variables.
        coarse: whether the JAX model keeps float32 constants.
        weights: the tensors with which training starts in the place of the module's.
        kept: what the checks of one setup share, such as compiled programs.
    """

    module: nn.Module
    model: Any
    variables: Any
    weight_map: Any
    pair: Any
    torch_objective: Callable[[nn.Module, Nest], torch.Tensor]
    jax_objective: Callable[[Any, Nest, bool], tuple[jax.Array, Any]]
    coarse: bool = False
    weights: Mapping[str, np.ndarray] = field(default_factory=dict)
    kept: dict[str, Any] = field(default_factory=dict)

    @property
    def start(self) -> Arrays:
        """Return views of all tensors that training starts from, each under every name that it has."""
        return {**tensors_of(self.module), **under_every_name(self.module, self.weights)}

    @cached_property
    def links(self) -> list[Link]:
        """Return the entries of the map, ready to compare."""
        tensors = tensors_of(self.module)
        return [link(entry, tensors) for entry in self.weight_map.entries]

    @cached_property
    def held(self) -> tuple[frozenset[str], frozenset[str]]:
        """Return the names of parameters and the paths of leaves that cannot train alike.

        JAX holds values that are computed from these parameters.
        """
        tensors = tensors_of(self.module)
        parameters = {name for name, _ in self.module.named_parameters(remove_duplicate=False)}
        names = parameters & {name for entry in self.weight_map.entries for name in entry.torch}
        names -= self.weight_map.rearranges
        paths = set()
        for entry in self.weight_map.entries:
            if names & set(entry.torch):
                probes = [np.full(tensors[name].shape, np.nan if name in names else 0.0) for name in entry.torch]
                paths |= {path for path, leaf in convert(entry, probes) if np.isnan(leaf).any()}
        return frozenset(names), frozenset(paths)

    def programs(self, dtype: str) -> "JaxPrograms":
        """Return the compiled programs of the JAX side."""
        if dtype not in self.kept:
            self.kept[dtype] = JaxPrograms(self, dtype)
        programs: JaxPrograms = self.kept[dtype]
        return programs

    @property
    def micro_batches(self) -> int:
        """Return the number of batches that one step of the optimizer takes."""
        return int(self.pair.micro_batches)


def link(entry: Any, tensors: Arrays) -> Link:
    """Find out which tensor each value of an entry's leaves comes from."""
    if len(entry.torch) == 1:
        return Link(entry, None)
    codes = [np.full(tensors[name].shape, float(number)) for number, name in enumerate(entry.torch)]
    return Link(entry, tuple(leaf.astype(np.int16) for _, leaf in convert(entry, codes)))


def convert(entry: Any, tensors: Sequence[np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    """Yield path and value of each leaf of an entry; the dtype stays."""
    with jax.enable_x64(True):
        leaves = entry.convert(*tensors)  # in NumPy as far as it goes: a program for each shape would take longer
    for path, leaf in zip(entry.jax, leaves, strict=True):
        yield path, np.asarray(leaf)


def match(
    links: Sequence[Link], leaves: Mapping[str, np.ndarray], *sides: Mapping[str, np.ndarray]
) -> Iterator[tuple[str, str, np.ndarray, list[np.ndarray]]]:
    """Yield name, path, JAX's values, and in its layout those that each side of PyTorch's has; skip what one lacks."""
    for entry, codes in links:
        if not any(path in leaves for path in entry.jax):
            continue
        if not all(name in tensors for tensors in sides for name in entry.torch):
            continue
        converted = [[leaf for _, leaf in convert(entry, [side[name] for name in entry.torch])] for side in sides]
        for number, path in enumerate(entry.jax):
            if path not in leaves:
                continue
            values = [side[number] for side in converted]
            if codes is None:
                yield entry.torch[0], path, leaves[path], values
                continue
            for code, name in enumerate(entry.torch):
                if (mask := codes[number] == code).any():
                    yield name, path, leaves[path][mask], [value[mask] for value in values]


def named_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield all parameters and buffers, by every name that they have."""
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def tensors_of(module: nn.Module) -> Arrays:
    """Return views of all parameters and buffers, by every name that they have."""
    return {name: tensor.detach().numpy() for name, tensor in named_tensors(module)}


def under_every_name(module: nn.Module, weights: Mapping[str, np.ndarray]) -> Arrays:
    """Return tensors that are given under one of their names under all names that they have."""
    given = {id(tensor): weights[name] for name, tensor in named_tensors(module) if name in weights}
    return {name: given[id(tensor)] for name, tensor in named_tensors(module) if id(tensor) in given}


def cast(array: np.ndarray, dtype: str) -> np.ndarray:
    """Return floating-point values in this dtype, and others as they are."""
    return array.astype(dtype, copy=False) if np.issubdtype(array.dtype, np.floating) else array


# --- PyTorch ---


class TorchRun:
    """The reference in training, from the start of a setup."""

    def __init__(
        self, setup: Setup, *, dtype: str = "float64", training: bool = False, weights: Mapping[str, np.ndarray] = {}
    ) -> None:
        release_memory()
        self.setup, self.dtype, self.training = setup, dtype, training
        self.module = fresh_copy(setup.module, training, getattr(torch, dtype))
        self.start = {**setup.start, **under_every_name(setup.module, weights)}
        self.load(self.start)
        self.parameters = dict(self.module.named_parameters())
        for name, parameter in self.module.named_parameters(remove_duplicate=False):
            if name in setup.held[0]:
                parameter.requires_grad_(False)
        self.optimizer = setup.pair.torch_optimizer(self.module)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.numbers = [numbers_of(group) for group in self.optimizer.param_groups]
        self.steps = 0
        self.gradient_sizes: dict[str, float] = dict.fromkeys(self.parameters, 0.0)
        for name, parameter in self.parameters.items():
            if parameter.requires_grad:
                parameter.register_hook(partial(note_size, self.gradient_sizes, name))

    def step(self, batches: Sequence[Nest]) -> list[float]:
        """Take one step of the optimizer on these batches; return their losses."""
        values: list[float] = []

        def losses() -> Iterator[torch.Tensor]:
            for batch in batches:
                loss = self.setup.torch_objective(self.module, self._to_tensors(batch))
                values.append(loss.item())
                yield loss

        self._take_step(losses())
        return values

    def observe(self, batch: Nest) -> None:
        """Run forward only: statistics of batch normalisation may change."""
        with self._arithmetic(), torch.no_grad():
            self.setup.torch_objective(self.module, self._to_tensors(batch))

    def apply_gradients(self, gradients: Sequence[Gradient]) -> None:
        """Take one step of the optimizer with these gradients, one for each micro-batch, by name."""
        trained = [(name, parameter) for name, parameter in self.parameters.items() if parameter.requires_grad]
        self._take_step(
            torch.stack([GivenGradient.apply(parameter, partial(draw, name)) for name, parameter in trained]).sum()
            for draw in gradients
        )

    def moments(self) -> dict[str, Arrays]:
        """Return views of the known moments: kind -> name -> values."""
        moments: dict[str, Arrays] = {}
        for name, parameter in self.parameters.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                if key in MOMENTS and isinstance(value, torch.Tensor):
                    moments.setdefault(MOMENTS[key][0], {})[name] = value.detach().numpy()
        return moments

    def unknown(self) -> set[str]:
        """Return what the optimizer keeps, for a parameter or a group of them, that is no known moment."""
        states = [self.optimizer.state.get(parameter, {}) for parameter in self.parameters.values()]
        kept = {key for state in states for key, value in state.items() if value is not None}
        for group, old in zip(self.optimizer.param_groups, self.numbers, strict=False):
            kept |= {key for key, number in numbers_of(group).items() if number != old.get(key)} - {"lr"}
        return kept - {*MOMENTS, "step"}

    def count(self) -> int | None:
        """Return the number of steps that the optimizer has counted, or None if it does not count."""
        return max((int(state["step"]) for state in self._counters()), default=None)

    def _counters(self) -> list[dict[str, Any]]:
        """Return what holds a counter: PyTorch counts for each parameter, timm and others for each group of them."""
        states = [self.optimizer.state.get(parameter, {}) for parameter in self.parameters.values()]
        return [state for state in [*states, *self.optimizer.param_groups] if "step" in state]

    def load(self, weights: Mapping[str, np.ndarray]) -> None:
        """Set parameters and buffers."""
        with torch.no_grad():
            for name, tensor in named_tensors(self.module):
                if name in weights:
                    tensor.copy_(torch.from_numpy(np.array(weights[name])))

    def load_moments(self, kind: str, get: Gradient) -> None:
        """Set those moments of this kind that the optimizer keeps by now, where `get` gives one for the name."""
        for name, parameter in self.parameters.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                if key in MOMENTS and MOMENTS[key][0] == kind and (moment := get(name)) is not None:
                    value.copy_(torch.from_numpy(np.array(moment)))

    def set_count(self, steps: int) -> None:
        """Set the counters."""
        self.steps = steps
        for state in self._counters():
            old = state["step"]
            state["step"] = torch.full_like(old, steps) if isinstance(old, torch.Tensor) else steps

    def has_scheduler(self) -> bool:
        """Return whether the user's step holds a scheduler, which counts on its own."""
        return any("initial_lr" in group for group in self.optimizer.param_groups)

    def _to_tensors(self, batch: Nest) -> Nest:
        """Turn arrays into tensors, floating-point ones in the dtype of the run; `False` is no array."""

        def convert(leaf: Any) -> Any:
            return torch.from_numpy(np.array(cast(np.asarray(leaf), self.dtype))) if is_array(leaf) else leaf

        return jax.tree.map(convert, batch)

    def _take_step(self, losses: Iterator[torch.Tensor]) -> None:
        if (schedule := self.setup.pair.torch_schedule) and not self.has_scheduler():
            for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
                group["lr"] = float(schedule(self.steps)) * (rate / self.rates[0] if self.rates[0] else 1.0)
        take_step = self.setup.pair.torch_step or mean_step
        release_memory()
        with self._arithmetic():
            self.optimizer.zero_grad(set_to_none=True)
            take_step(self.module, self.optimizer, losses)
            self.optimizer.zero_grad(set_to_none=True)
        self.steps += 1

    @contextmanager
    def _arithmetic(self) -> Iterator[None]:
        with exact_arithmetic(self.dtype), fixed_settings(getattr(torch, self.dtype), self.module), WithoutDropout():
            yield


def numbers_of(group: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of a group of parameters; an optimizer may change some of them at each step."""
    return {key: float(value) for key, value in group.items() if isinstance(value, int | float)}


def note_size(sizes: dict[str, float], name: str, gradient: torch.Tensor) -> None:
    """Keep the largest value of a gradient. A hook that held the run would keep it from being freed."""
    sizes[name] = max(sizes[name], float(torch.linalg.vector_norm(gradient.detach(), torch.inf)))


def mean_step(module: nn.Module, optimizer: torch.optim.Optimizer, losses: Iterator[torch.Tensor]) -> None:
    """Take a step with the sum of the gradients of all losses; there is one loss unless the pair says otherwise."""
    for loss in losses:
        loss.backward()
    with blame("torch_optimizer="):
        optimizer.step()


class GivenGradient(torch.autograd.Function):
    """A loss of 0 whose gradient by a parameter is given, so that a user's own step can run on it."""

    @staticmethod
    def forward(ctx: Any, parameter: torch.Tensor, draw: Callable[[], np.ndarray]) -> torch.Tensor:
        """Return a loss of 0, and keep the function that draws its gradient."""
        ctx.draw, ctx.dtype = draw, parameter.dtype
        return parameter.new_zeros(())

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> Any:
        """Return the gradient, drawn now and for this parameter alone, times that of the loss."""
        return torch.from_numpy(ctx.draw()).to(ctx.dtype).mul_(upstream), None


# --- JAX ---


class JaxPrograms:
    """The optimizer, the names of its leaves and the compiled programs, which all runs of a setup share."""

    def __init__(self, setup: Setup, dtype: str) -> None:
        self.setup, self.dtype = setup, dtype
        self.optimizer = make_optimizer(setup.pair)
        self.take_step = setup.pair.jax_step or update_step
        with exact_arithmetic(dtype):
            self.names, self.treedef = name_parameters(setup.model, setup.variables)
        self.held = [name in setup.held[1] for name in self.names]
        self.init = compiled(blame("jax_optimizer=")(lambda params: self.optimizer.init(self.tree(params))))
        self.gradient = compiled(self.compute_gradient, static_argnums=3)
        self.update = compiled(self.update_params, donate_argnums=(0, 1))
        self.observe = compiled(self.compute_statistics)

    def tree(self, leaves: Sequence[Any]) -> Any:
        """Return what the optimizer sees."""
        return jax.tree.unflatten(self.treedef, leaves)

    def objective(self, params: Leaves, rest: dict[str, Any], batch: Nest, training: bool) -> tuple[Any, Any]:
        """Return the loss, and the leaves that are not trained."""
        model = self.setup.model
        variables = model.with_leaves(self.setup.variables, dict(zip(self.names, params, strict=True)) | rest)
        loss, variables = self.setup.jax_objective(variables, batch, training)
        leaves = model.leaves(variables)
        return loss, {path: leaves[path] for path in rest}

    def compute_gradient(self, params: Leaves, rest: dict[str, Any], batch: Nest, training: bool) -> Any:
        """Return the loss, the leaves that are not trained, the gradients, and the largest value of each gradient."""
        compute = jax.value_and_grad(partial(self.objective, training=training), has_aux=True)
        (loss, rest), gradients = (rewrite(compute) if self.dtype == "float64" else compute)(params, rest, batch)
        return loss, rest, gradients, jnp.stack([jnp.max(jnp.abs(leaf), initial=0) for leaf in gradients])

    def compute_statistics(self, params: Leaves, rest: dict[str, Any], batch: Nest) -> dict[str, Any]:
        """Return the leaves that are not trained, after a forward pass in training mode."""
        return self.objective(params, rest, batch, True)[1]

    def update_params(self, params: Leaves, opt_state: Any, gradients: Sequence[Leaves]) -> tuple[Leaves, Any]:
        """Step with these gradients, one list for each micro-batch. Leaves that are held keep their values."""
        trees = [
            self.tree([jnp.zeros_like(leaf) if hold else leaf for hold, leaf in zip(self.held, leaves, strict=True)])
            for leaves in gradients
        ]
        with blame("jax_optimizer=" if self.take_step is update_step else "jax_step="):
            tree, opt_state = self.take_step(self.optimizer, trees, opt_state, self.tree(params))
        if list(map(jnp.shape, jax.tree.leaves(tree))) != list(map(jnp.shape, params)):
            raise Refused("jax_step= gives something else than (params, optimizer state), in this order")
        updated = zip(self.held, params, jax.tree.leaves(tree), strict=True)
        return [old if hold else new for hold, old, new in updated], opt_state


class JaxRun:
    """The JAX side in training, from the start of a setup.

    Args:
        setup: what trains.
        dtype: of weights, moments and inputs.
        training: whether the model is in training mode.
        weights: PyTorch's tensors that differ from the start of the setup.
        exact: compute what depends on counters alone (bias corrections, schedules) in float64. optax keeps counters of
            32 bits, and JAX computes functions of them in float32 even where all else is float64.
    """

    def __init__(
        self,
        setup: Setup,
        *,
        dtype: str = "float64",
        training: bool = False,
        weights: Mapping[str, np.ndarray] = {},
        exact: bool = True,
    ) -> None:
        self.setup, self.dtype, self.training, self.exact = setup, dtype, training, exact
        self.programs = setup.programs(dtype)
        self.names = self.programs.names
        mapped = {path for entry in setup.weight_map.entries for path in entry.jax}
        with exact_arithmetic(dtype):
            given = setup.model.leaves(setup.variables)
            leaves = {
                path: jnp.array(cast(np.asarray(leaf), dtype)) for path, leaf in given.items() if path not in mapped
            }
            leaves |= self._carry({**setup.start, **under_every_name(setup.module, weights)})
            self.params = [leaves.pop(name) for name in self.names]
            self.rest = leaves
            self.opt_state = own_memory(self.programs.init(self.params), self.params, exact)
            tree = self.programs.tree(self.params)
        self.moment_places, self.counters, self.unknown = find_moments(self.opt_state, tree, self.names)
        self.steps = 0
        self.gradient_sizes = np.zeros(len(self.names))
        self.silent: frozenset[str] = frozenset()  # leaves whose given gradients are 0

    def step(self, batches: Sequence[Nest]) -> list[float]:
        """Take one step of the optimizer on these batches; return their losses."""
        losses, kept = [], []
        release_memory()
        for batch in batches:
            with exact_arithmetic(self.dtype):
                loss, self.rest, gradients, sizes = self.programs.gradient(
                    self.params, self.rest, self._to_arrays(batch), self.training
                )
            losses.append(float(loss))
            self.gradient_sizes = np.maximum(self.gradient_sizes, np.asarray(sizes))
            kept.append(gradients)
            del gradients
            if self.programs.take_step is update_step:
                self._update([kept.pop()])
        if kept:
            self._update(kept)
        self.steps += 1
        return losses

    def observe(self, batch: Nest) -> None:
        """Run forward only: statistics of batch normalisation may change."""
        with exact_arithmetic(self.dtype):
            self.rest = self.programs.observe(self.params, self.rest, self._to_arrays(batch))

    def find_stopped(self, batch: Nest) -> frozenset[str]:
        """Return the leaves whose gradient is exactly 0 everywhere, as behind `stop_gradient`."""
        with exact_arithmetic(self.dtype):
            sizes = self.programs.gradient(self.params, self.rest, self._to_arrays(batch), self.training)[-1]
        return frozenset(name for name, size in zip(self.names, np.asarray(sizes), strict=True) if size == 0)

    def apply_gradients(self, gradients: Sequence[Gradient]) -> None:
        """Take one step of the optimizer with these gradients, one for each micro-batch, by PyTorch's names."""
        kept = []
        for draw in gradients:
            leaves = dict(self._carry(draw, set(self.names)))
            alone = {name for name in self.names if name not in leaves}  # what only JAX has
            with jax.enable_x64(True):
                leaves |= {
                    name: jnp.zeros_like(param)
                    for name, param in zip(self.names, self.params, strict=True)
                    if name in self.silent | alone
                }
            kept.append([leaves[name] for name in self.names])
            del leaves
            if self.programs.take_step is update_step:
                self._update([kept.pop()])
        if kept:
            self._update(kept)
        self.steps += 1

    def leaves(self) -> Arrays:
        """Return views of all leaves, by path. They must be gone before the next step."""
        named = itertools.chain(zip(self.names, self.params, strict=True), self.rest.items())
        return {path: np.asarray(leaf) for path, leaf in named}

    def moments(self) -> dict[str, Arrays]:
        """Return views of the known moments: optax's field -> path -> values."""
        leaves = jax.tree.leaves(self.opt_state)
        return {
            field: {path: np.asarray(leaves[place]) for path, place in places.items()}
            for field, places in self.moment_places.items()
        }

    def count(self) -> int | None:
        """Return the number of steps that the optimizer has counted, or None if it does not count."""
        leaves = jax.tree.leaves(self.opt_state)
        return max((int(leaves[place]) for place in self.counters), default=None)

    def rounding(self) -> float:
        """Return the relative rounding error of what the model or the optimizer keeps.

        A model may have tables in float32, and optax.MultiSteps adds up in float32.
        """
        coarse = any(leaf.size > 1 and leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(self.opt_state))
        return 2.0**-24 if coarse or self.setup.coarse else 2.0**-53

    def load(self, weights: Mapping[str, np.ndarray]) -> None:
        """Set the leaves of every entry whose tensors are all given."""
        places = {name: place for place, name in enumerate(self.names)}
        for path, leaf in self._carry(weights):
            if path in places:
                self.params[places[path]] = leaf
            else:
                self.rest[path] = leaf

    def load_moments(self, kind: str, get: Gradient) -> None:
        """Set the moments of this kind to what `get` gives for PyTorch's name, in JAX's unit."""
        unit = self.setup.kept.get("units", {}).get(kind, 1.0)
        leaves, treedef = jax.tree.flatten(self.opt_state)
        self.opt_state = None  # so that each leaf is freed where it is replaced
        places = self.moment_places.get(FIELD_OF[kind], {})
        with jax.enable_x64(True):
            for path, leaf in self._carry(get, set(places)):
                if path in places:
                    leaves[places[path]] = leaf if unit == 1 else leaf * unit
        self.opt_state = jax.tree.unflatten(treedef, leaves)

    def set_count(self, steps: int) -> None:
        """Set the counters."""
        self.steps = steps
        leaves, treedef = jax.tree.flatten(self.opt_state)
        with jax.enable_x64(True):
            for place in self.counters:
                leaves[place] = jnp.asarray(steps, leaves[place].dtype)
        self.opt_state = jax.tree.unflatten(treedef, leaves)

    def _update(self, gradients: Sequence[Leaves]) -> None:
        """Step with these gradients, with functions of counters in float64 or as optax computes them."""
        release_memory()
        with exact_arithmetic("float64" if self.exact else self.dtype):
            self.params, self.opt_state = self.programs.update(self.params, self.opt_state, gradients)

    def _carry(
        self, tensors: Mapping[str, np.ndarray] | Gradient, paths: Collection[str] | None = None
    ) -> Iterator[tuple[str, jax.Array]]:
        """Carry tensors to leaves of their own memory: all whose tensors are there, or those with such paths."""
        get = tensors.get if isinstance(tensors, Mapping) else tensors
        for entry in self.setup.weight_map.entries:
            if paths is None or not set(entry.jax).isdisjoint(paths):
                arrays = [cast(array, self.dtype) for name in entry.torch if (array := get(name)) is not None]
                if len(arrays) == len(entry.torch):
                    for path, leaf in convert(entry, arrays):
                        with jax.enable_x64(True):
                            carried = jnp.array(leaf)
                        yield path, carried

    def _to_arrays(self, batch: Nest) -> Nest:
        """Turn arrays into JAX's, floating-point ones in the dtype of the run."""
        return jax.tree.map(lambda leaf: jnp.asarray(cast(np.asarray(leaf), self.dtype)), batch)


def own_memory(opt_state: Any, params: Sequence[jax.Array], exact: bool) -> Any:
    """Give every array of a state memory of its own, so that a step may give it away.

    Args:
        opt_state: may hold the parameters themselves.
        params: the parameters.
        exact: make counters of 64 bits.
    """
    seen = {param.unsafe_buffer_pointer() for param in params}

    def own(leaf: jax.Array) -> jax.Array:
        if exact and leaf.shape == () and leaf.dtype == jnp.int32:
            with jax.enable_x64(True):
                return jnp.asarray(np.asarray(leaf), jnp.int64)
        if (pointer := leaf.unsafe_buffer_pointer()) in seen:
            return jnp.array(leaf)
        seen.add(pointer)
        return leaf

    return jax.tree.map(own, opt_state)


def update_step(optimizer: Any, gradients: Sequence[Any], opt_state: Any, params: Any) -> tuple[Any, Any]:
    """Update the parameters with one gradient after the other; optax.MultiSteps accumulates by itself."""
    for gradient in gradients:
        try:
            updates, opt_state = optimizer.update(gradient, opt_state, params)
        except TypeError as error:
            if "required keyword-only argument" not in str(error):
                raise
            words = str(error).partition("\n")[0]  # JAX adds a line
            raise Refused(
                f"jax_optimizer= takes more than gradients ({words}): give jax_step= and torch_step="
            ) from None
        params = jax.tree.map(lambda param, update: (param + update).astype(param.dtype), params, updates)
    return params, opt_state


def make_optimizer(pair: Any) -> Any:
    """Return the pair's optax transformation, or Adam with optax's defaults."""
    optimizer = pair.jax_optimizer
    if optimizer is None:
        import optax

        return optax.adam(1e-3)
    return optimizer if hasattr(optimizer, "update") else optimizer()


def name_parameters(model: Any, variables: Any) -> tuple[list[str], Any]:
    """Return the paths of the leaves of the tree that the optimizer sees, in its order, and its structure."""
    leaves = {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in model.leaves(variables).items()}
    closed, shapes = jax.make_jaxpr(
        lambda leaves: model.params(model.with_leaves(variables, leaves)), return_shape=True
    )(leaves)
    paths = dict(zip(map(id, closed.jaxpr.invars), sorted(leaves), strict=True))
    names = [paths.get(id(variable)) for variable in closed.jaxpr.outvars]
    if None in names:
        raise ValueError(f"{names.count(None)} leaves of the optimizer's tree are no leaves of the model")
    return [name for name in names if name is not None], jax.tree.structure(shapes)


def find_moments(
    opt_state: Any, params: Any, names: Sequence[str]
) -> tuple[dict[str, dict[str, int]], list[int], set[str]]:
    """Find the known moments wherever they are nested: in chain, masked, partition, MultiSteps, inject_hyperparams.

    Returns:
        For each field, the place of each parameter's moment among the leaves of the state; the places of counters; and
        the names of what else the optimizer keeps for parameters.
    """
    trained = {tuple(keys): leaf.shape for keys, leaf in jax.tree_util.tree_leaves_with_path(params)}
    name_of = dict(zip(trained, names, strict=True))
    places: dict[str, dict[str, int]] = {}
    counters, unknown = [], set()
    for place, (keys, leaf) in enumerate(jax.tree_util.tree_leaves_with_path(opt_state)):
        fields = [key.name if isinstance(key, GetAttrKey) else "" for key in keys]
        ends = {field: tuple(keys[index + 1 :]) for index, field in enumerate(fields) if field in FIELD_OF.values()}
        field, end = next(((field, end) for field, end in ends.items() if trained.get(end) == leaf.shape), ("", ()))
        if field and name_of[end] not in places.setdefault(field, {}):
            places[field][name_of[end]] = place
        elif fields and fields[-1] in ("count", "gradient_step") and leaf.shape == ():
            counters.append(place)
        elif leaf.size > 1 and "acc_grads" not in fields:
            unknown.add(next((field for field in reversed(fields) if field), "state"))
    return {field: by_name for field, by_name in places.items() if field not in unknown}, counters, unknown


def to_torch(weight_map: Any, leaves: Mapping[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    """Yield name and values of each tensor that JAX holds as it is and whose leaves are there, one copy at a time."""
    entries = [
        entry
        for entry in weight_map.entries
        if set(entry.jax) <= leaves.keys() and set(entry.torch) <= weight_map.rearranges
    ]
    missing = Counter(name for entry in entries for name in entry.torch)
    sums: Arrays = {}
    for entry in entries:
        shapes = [weight_map.tensors[name] for name in entry.torch]
        back = entry.convert_back(shapes, [leaves[path] for path in entry.jax])
        for name, value in zip(entry.torch, back, strict=True):
            share = np.asarray(value) / weight_map.counts[name] if name in weight_map.counts else np.asarray(value)
            sums[name] = sums[name] + share if name in sums else share
            missing[name] -= 1
            if not missing[name]:
                yield name, sums.pop(name)

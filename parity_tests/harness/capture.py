"""A pair made ready to be compared, and what both sides compute on one batch: outputs, stages, gradients.

JAX runs twice. *Inherited*: from end to end, so that a difference passes from stage to stage as it does in use.
*Local*: every stage goes on with PyTorch's value, and every gradient with PyTorch's gradient, so that a difference
shows in the stage where it is born, and only there. One compiled program serves both runs.
"""

import ctypes
import os
import re
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import cached_property, partial
from math import prod
from typing import Any, NamedTuple

import jax
import numpy as np
import torch
from jax import numpy as jnp
from torch.overrides import TorchFunctionMode

from parity_tests.harness.adapters import Model, adapt, hold_real, is_complex
from parity_tests.harness.compare import (
    Bound,
    Refused,
    add_note,
    blame,
    find_difference,
    flat,
    keeps_float32,
    largest,
    map_leaves,
    relative_error,
    shorten,
)
from parity_tests.harness.pair import (
    LARGE,
    Inputs,
    Pair,
    draw_like,
    find_slip,
    load_tensors,
    module_with,
    probing_tensors,
    tensors_of,
    with_blame,
)
from parity_tests.harness.propose import Proposal, propose
from parity_tests.harness.stages import (
    IDENTITIES,
    Carry,
    candidates,
    carry_stage,
    find_parts,
    is_part,
    jax_stages,
    kind_of,
    match,
    torch_stages,
)
from parity_tests.harness.taps import (
    Sweep,
    Traced,
    compiled,
    in_float64,
    make_sweep,
    trace,
)
from parity_tests.harness.torch_side import (
    Reached,
    TorchCapture,
    WithoutDropout,
    capture_torch,
    copy_module,
    detached,
    fixed_settings,
    fresh_copy,
)
from parity_tests.harness.weights import (
    UNUSED,
    CannotCarry,
    WeightMap,
    check_complete,
    from_function,
    parent,
    size_of,
    squeezed,
)

STAGE_BOUND = Bound(1e-12, "float64 rounding; worst seen over 20 seeds 5.0e-15 of the tensor's largest value")
SMALL = 1e-3  # a tensor smaller than this, in units of the largest of its kind, is judged in units of that one
MASK = 1e30  # no activation is so large; the smallest float32 and the smallest float64 are
SAME_VALUES = 1e-3  # a relative error below this, in float32 too, means that a layout is right
NOISE = "the reference draws random numbers, and JAX would draw others: make them an input"
LARGEST_OF_TABLES = 1e-2  # relative: float32 in a table of angles up to 10,000
NEARLY_ZERO, JUMP = 1e-14, 1e-6  # inputs beside 0, and a change of an output, relative to the largest, that is a choice
TIMES_LARGER = 4  # single outputs of layers are made larger, so that values reach the limits behind them
SHORTEST, FEWER = 4, (1, 3, 7, 15, 31)  # how long an axis is that is made shorter, and by how much: 33, 17, 9, 5 is odd
TIMES_BESIDE_ZERO = 3  # such inputs are drawn
CHOOSING = ("topk", "sort", "argsort", "argmax", "argmin", "grad")  # a derivative has one of two slopes at a kink

Quiet = Callable[[str], None]
Limits = Mapping[str, Mapping[str, float]]  # by the kind of a value and its name


@contextmanager
def exact_arithmetic(dtype: str) -> Iterator[None]:
    """Let both frameworks compute in this dtype and with nothing less: no TF32 and no bfloat16 on any device."""
    torch_settings = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        with jax.enable_x64(dtype == "float64"), jax.default_matmul_precision("highest"):
            yield
    finally:
        torch.set_float32_matmul_precision(torch_settings[0])
        torch.backends.cudnn.allow_tf32 = torch_settings[1]


_next_release = 0.0  # when memory may be given back again, by the monotonic clock


def release_memory() -> None:
    """Give freed memory back to the system: glibc keeps it, and what comes next could not use it in one piece.

    This happens twice a second at most: it would take a fifth of the time of small networks, whose steps are short.
    """
    global _next_release
    if time.monotonic() < _next_release:
        return
    _next_release = time.monotonic() + 0.5
    with suppress(AttributeError, OSError, TypeError):  # other systems have no such function
        ctypes.CDLL(None).malloc_trim(0)


class Difference(NamedTuple):
    """How far one value of JAX's is from PyTorch's."""

    error: float  # in units of the tensor's largest value
    problem: str  # empty if rounding explains the error


class Side(NamedTuple):
    """The differences of one run of JAX, by PyTorch's names."""

    outputs: dict[str, Difference]
    values: dict[str, Difference]
    gradients: dict[str, Difference]
    weights: dict[str, Difference]


class Stage(NamedTuple):
    """A value that both sides have."""

    jax: str
    kind: str
    shape: tuple[int, ...]
    carry: Carry
    sure: bool


class Origin(NamedTuple):
    """The operation in which a difference is born, and the values before it that JAX does not have.

    Where JAX takes other parts of a stage, or in another order, `taken` is its name.
    """

    place: str
    problem: str
    gap: tuple[str, ...]
    taken: str = ""


class Comparison(NamedTuple):
    """Hold the results of the comparison of both sides on one batch."""

    size: int
    training: bool
    stages: dict[str, Stage]
    inherited: Side
    local: Side
    order: tuple[str, ...]  # all of PyTorch's values, in the order of its run
    functions: dict[str, Difference]  # values between modules in the local run; they say where, and never whether
    notes: tuple[str, ...]
    unseen: Mapping[str, str] = {}  # PyTorch's operations of whose value JAX has none that is known, and why
    sources: Mapping[str, Collection[str]] = {}  # the values that each of PyTorch's was computed from
    born: tuple[str, ...] = ()  # functions with a difference of their own: the local run goes on with PyTorch's value
    idle: tuple[str, ...] = ()  # weights on which only PyTorch's outputs depend
    origins: Mapping[str, "Origin"] = {}  # where differences are born that showed in a later stage, or in outputs ("")
    causes: Mapping[str, str] = {}  # with what change PyTorch's operation gives JAX's value where a difference is born
    cuts: tuple["Cut", ...] = ()  # how its inputs are smaller than the example

    @property
    def batch(self) -> str:
        """Return how a message names the batch."""
        return f"(batch of {self.size}{describe_cuts(self.cuts)})"

    @property
    def mode(self) -> str:
        """Return what a message adds to a place in training mode."""
        return ", in training mode" if self.training else ""


class Cut(NamedTuple):
    """Shorten each of these axes that has this length, such as 64 rows and columns of an image."""

    length: int
    shorter: int
    axes: Collection[int]

    def changes(self, leaf: np.ndarray) -> bool:
        """Return whether an array has such an axis."""
        return any(leaf.shape[axis] == self.length for axis in self.axes if axis < leaf.ndim)

    def apply(self, leaf: np.ndarray) -> np.ndarray:
        """Return an array without the last values along these axes."""
        cut = (axis in self.axes and size == self.length for axis, size in enumerate(leaf.shape))
        return leaf[tuple(slice(self.shorter) if is_cut else slice(None) for is_cut in cut)]


def describe_cuts(cuts: Iterable[Cut]) -> str:
    """Return how a message names the smaller inputs."""
    return "".join(f", with axes of {cut.shorter} in the place of {cut.length}" for cut in cuts)


class Case:
    """A pair with the weights of one seed, ready for every check.

    Raises:
        Refused: the pair cannot be compared.
    """

    def __init__(self, pair: Pair, seed: int = 0, progress: Quiet = lambda text: None) -> None:
        self.pair, self.seed, self.progress = pair, seed, progress
        self.notes: list[str] = []
        self.shared: dict[str, Any] = {}  # what several checks use
        self.coarse = False  # whether the JAX model keeps float32 constants
        if slip := find_slip(pair):
            raise Refused(slip)
        self.pair = pair = with_blame(pair)
        self.adapted = adapt(pair.jax_model, pair.jax_kwargs, pair.jax_training_kwargs)
        model, blamed = hold_real(self.adapted), blame("the JAX model", self.layout_hint)
        apply, init = blamed(in_float64(self.adapted.apply)), model.init and blamed(model.init)
        self.model: Model = model._replace(apply=apply, init=init)
        self.tensors = probing_tensors(pair, seed)
        self.sizes = pair.sizes()
        self.module = self.make_module()
        self.keeps_float32 = False
        try:
            outputs = self.first_outputs()
        except Exception:  # a reference that checks its dtypes
            vars(self.module)["keeps_float32"] = self.keeps_float32 = True
            self.notes.append("the reference keeps its float32: it does not run with float64 in its place")
            outputs = self.first_outputs()
        limits = Reached()
        with limits.attach(self.module):
            others = self.first_outputs(noise=1)
        if draws_otherwise(outputs, others):
            raise Refused(f"{NOISE} of both sides, such as the noise of a VAE")
        if has_nan(outputs) and not callable(pair.inputs):
            self.pair = replace(pair, inputs=partial(draw_like, pair.inputs, zeros=False))
            if has_nan(self.first_outputs()):  # for another reason
                self.pair = pair
            else:
                self.notes.append("no row of the inputs is zero, because PyTorch gives NaN for it")
        elif not callable(pair.inputs) and self.chooses_at_zero(outputs):
            self.pair = replace(pair, inputs=partial(draw_like, pair.inputs, zeros=False))
            self.notes.append(
                "no row of the inputs is zero: PyTorch chooses there, as a top-k between equal values, or a derivative "
                "between two slopes"
            )
        self.reach_limits(limits)
        self.check_probe()
        self.small = sum(array.size for array in self.tensors.values()) <= LARGE  # functions between modules are seen

    def chooses_at_zero(self, outputs: Mapping[str, Any]) -> bool:
        """Return whether the reference chooses, as by sorting, and gives other outputs for inputs near 0 than for 0."""
        inputs = self.cast(self.pair.draw_inputs(self.seed, self.sizes[-1]), "float64")
        rng = np.random.default_rng(self.seed)

        def beside(leaf: np.ndarray) -> np.ndarray:
            zeros = (leaf == 0) * np.issubdtype(leaf.dtype, np.floating)
            return np.where(zeros, NEARLY_ZERO * rng.normal(size=leaf.shape), leaf) if zeros.any() else leaf

        for _ in range(TIMES_BESIDE_ZERO):
            with Choices() as choices:
                again = flat(self.torch_outputs(inputs.map(beside)))
            if not choices.seen:
                return False
            floats = [name for name, leaf in outputs.items() if torch.is_tensor(leaf) and leaf.is_floating_point()]
            if any(relative_error(again[name].numpy(), outputs[name].numpy()) > JUMP for name in floats):
                return True
        return False

    def reach_limits(self, limits: Reached) -> None:
        """Enlarge single outputs of layers until the limits behind them, such as the 6 of a ReLU6, are reached.

        Where no value reaches a limit all the same, another one in JAX would not show, which is said.
        """
        for _ in range(TIMES_LARGER):
            if not limits.factors:
                break
            for (layer, number), factor in limits.factors.items():
                for name in {f"{layer}.weight".lstrip("."), f"{layer}.bias".lstrip(".")} & self.tensors.keys():
                    self.tensors[name] = self.tensors[name].copy()
                    self.tensors[name][number] *= factor
            load_tensors(self.module, self.tensors)
            limits = Reached()
            with limits.attach(self.module):
                self.first_outputs()
        if limits.missed:
            places = shorten([f"{limit:g} in {name or 'the module'}" for name, limit in limits.missed.items()])
            add_note(self.notes, f"no value reaches the limit of {places}: another one in JAX would not show")

    def check_probe(self) -> None:
        """Refuse inputs that can show nothing.

        Raises:
            Refused: the reference gives NaN, or is given one number only.
        """
        arrays = self.pair.draw_inputs(self.seed, self.sizes[0]).arrays()
        if arrays and all(array.size > 1 and (array == array.flat[0]).all() for array in arrays):
            raise Refused("inputs= gives the same number everywhere, which shows nothing: give some that vary")
        # NaN in the weights is told by the check of transfer.
        if any(np.isnan(array).any() for array in self.tensors.values()) or not has_nan(self.first_outputs()):
            return
        if any(array.dtype.kind == "f" and not np.isfinite(array).all() for array in arrays):
            raise Refused("inputs= holds NaN or infinities, and PyTorch gives NaN for them: give an example without")
        raise Refused("PyTorch gives NaN for inputs like the example: give inputs=, a function that draws others")

    # --- The JAX side ---

    def jax_inputs(self, inputs: Inputs) -> Inputs:
        """Return the inputs as the JAX model takes them."""
        way = self.pair.jax_inputs
        if callable(way):
            if not isinstance(turned := way(inputs), Inputs):
                raise Refused(f"jax_inputs= gives a {type(turned).__name__}: give a function from Inputs to Inputs")
            return turned
        if not self.channels_last:
            return inputs
        images = any(is_image(leaf) for leaf in inputs.arrays())
        return inputs.map(lambda leaf: channels_last(leaf, 3 if way is not None and not images else 4))

    @property
    def channels_last(self) -> bool:
        """Return whether JAX's images have their channels last."""
        way = self.pair.jax_inputs
        return way != "same" and (way is not None or self.model.library != "Equinox")

    def layout_hint(self) -> str:
        """Return what may help where the JAX model fails with inputs that were turned by default."""
        inputs = self.pair.draw_inputs(self.seed, self.sizes[0]).arrays()
        if self.pair.jax_inputs is not None or not self.channels_last or not any(map(is_image, inputs)):
            return ""
        return '; it was given images with channels last: declare jax_inputs="same" if it takes them as PyTorch does'

    def cast(self, inputs: Inputs, dtype: str) -> Inputs:
        """Return the inputs with floats in this dtype."""
        return inputs.map(lambda leaf: leaf.astype(dtype) if np.issubdtype(leaf.dtype, np.floating) else leaf)

    @property
    def holds_complex(self) -> bool:
        """Return whether the JAX side trains complex weights."""
        own = self.own_variables
        return own is not None and any(map(is_complex, self.adapted.leaves(own).values()))

    @cached_property
    def float32_tables(self) -> list[str]:
        """Return the names of the float32 tables that nothing carries to JAX: a port computes them itself."""
        carried = self.module.state_dict().keys() - self.weight_map.unused
        return [name for name, table in tables_of(self.module) if name not in carried and keeps_float32(table.numpy())]

    @property
    def can_draw(self) -> bool:
        """Return whether the JAX side draws weights of its own."""
        return callable(self.pair.jax_init) or self.model.init is not None

    def draw_variables(self, seed: int) -> Any:
        """Return variables that the JAX side draws itself, in float32."""
        key = jax.random.key(seed)
        if callable(self.pair.jax_init):
            return self.pair.jax_init(key)
        return self.initialise(key)

    def initialise(self, key: jax.Array) -> Any:
        """Return the variables that the model makes itself, in float32."""
        assert self.model.init is not None
        inputs = self.cast(self.jax_inputs(self.pair.draw_inputs(self.seed, self.sizes[0])), "float32")
        return self.model.init(key, inputs.map(jnp.asarray))

    @cached_property
    def own_variables(self) -> Any:
        """Return the variables that the JAX side makes itself, in float32, or None if it cannot make any.

        Weights that a model's `init` would draw are zeros: PyTorch's take their place, and to draw them takes long.
        """
        if self.model.variables is not None:
            return self.model.variables
        if callable(self.pair.jax_init) or self.model.init is None:
            return self.draw_variables(self.seed) if self.can_draw else None
        key = jax.random.key(self.seed)
        shapes = jax.eval_shape(self.initialise, key)
        trained = self.model.trainable(shapes)
        drawn = {id(leaf) for path, leaf in self.model.leaves(shapes).items() if path in trained - self.left_out}
        leaves, structure = jax.tree.flatten(shapes)

        def make(key: jax.Array) -> dict[int, jax.Array]:
            numbered_leaves = enumerate(jax.tree.leaves(self.initialise(key)))
            return {number: leaf for number, leaf in numbered_leaves if id(leaves[number]) not in drawn}

        values = compiled(make)(key)  # the compiler leaves out whatever these do not depend on
        zeros = (values[n] if n in values else np.zeros(leaf.shape, leaf.dtype) for n, leaf in enumerate(leaves))
        return jax.tree.unflatten(structure, zeros)

    @cached_property
    def loaded(self) -> Any:
        """Return what the pair's own loader makes of PyTorch's tensors, or None if the pair has no loader."""
        state = {name: tensor.detach().numpy() for name, tensor in self.module.state_dict().items()}
        return self.pair.weights(state) if callable(self.pair.weights) else None

    @cached_property
    def proposal(self) -> Proposal:
        """Return the map of the weights, with the evidence for each row of it."""
        self.progress("the map of the weights")
        proposal = find_map(self)
        if proposal.assumed:
            add_note(
                self.notes,
                "no map of the weights makes the outputs agree; compared with the likeliest, by names and order (if "
                f"another is right, declare weights=): {'; '.join(proposal.assumed)}",
            )
        given = isinstance(self.pair.torch_module, torch.nn.Module)  # no seed tells its tables
        trained = {name for name, weight in self.module.named_parameters() if weight.requires_grad or given}
        tables = self.find_tables({*proposal.gaps.torch} - trained)
        if tables:
            names = shorten(sorted(tables))
            add_note(self.notes, f"not trained and only in PyTorch, taken for what JAX computes itself: {names}")
        unused = proposal.map.unused | tables
        self.keep_own_values(unused)
        gaps = proposal.gaps._replace(
            torch=tuple(name for name in proposal.gaps.torch if name not in tables),
            jax=tuple(path for path in proposal.gaps.jax if path not in self.no_weights),
        )
        return proposal._replace(map=replace(proposal.map, unused=unused), gaps=gaps)

    @property
    def left_out(self) -> frozenset[str]:
        """Return what the user declares as unused: names of either side."""
        declared = self.pair.weights if isinstance(self.pair.weights, Mapping) else {}
        return frozenset(name for name, rule in declared.items() if rule is UNUSED)

    @property
    def no_weights(self) -> frozenset[str]:
        """Return the leaves that are no weights, such as an order of channels, and the leaves that JAX alone has."""
        leaves = {} if self.own_variables is None else self.model.leaves(self.own_variables)
        whole = (path for path, leaf in leaves.items() if not jnp.issubdtype(leaf.dtype, jnp.inexact))
        return frozenset(whole) | self.alone(leaves)

    def alone(self, leaves: Mapping[str, Any]) -> frozenset[str]:
        """Return the leaves that JAX alone has: declared as unused, or constants with a shape that PyTorch lacks."""
        shapes = {squeezed(tensor.shape) for tensor in self.tensors.values()}
        other = (path for path in self.model.constants if squeezed(leaves[path].shape) not in shapes)
        return (self.left_out | frozenset(other)) & leaves.keys()

    def find_tables(self, names: Collection[str]) -> frozenset[str]:
        """Return the tensors that a port may compute itself: those that no seed and no training changes.

        One of zeros or ones may wait for values, as those of a frozen norm do.
        """
        if not names:
            return frozenset()
        again = self.pair.new_module(self.seed + 1).state_dict()
        first = self.pair.new_module(self.seed).state_dict()
        module = fresh_copy(self.module, True, torch.float64)
        before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        self.first_outputs(module)
        after = module.state_dict()
        return frozenset(
            name
            for name in names
            if torch.equal(before[name], after[name]) and torch.equal(first[name], again[name])
            if not any(bool((first[name] == value).all()) for value in (0, 1))
        )

    def keep_own_values(self, names: Collection[str]) -> None:
        """Give the reference its own values of what the port does not need, such as a shift that is always 0."""
        own = tensors_of(self.pair.new_module(self.seed)) if names else {}
        kept = {name: own[name].detach().float().numpy() for name in sorted(own.keys() & names)}
        moved = {
            name: array for name, array in kept.items() if not np.array_equal(array, np.float32(self.tensors[name]))
        }
        self.tensors |= moved
        load_tensors(self.module, moved)

    @property
    def weight_map(self) -> WeightMap:
        """Return the map of the weights.

        Raises:
            Refused: two maps fit equally. Where either lacks a weight, the check of parameters tells that first.
        """
        gaps = self.proposal.gaps
        if self.proposal.ambiguous and not (gaps.torch or gaps.jax):
            first, *others = self.proposal.ambiguous
            more = f" (and {len(others)} more)" if others else ""
            raise Refused(
                f"two maps of the weights fit equally: {first}{more}; say which in weights= (--propose shows all, and "
                "the first of each as Python)"
            )
        return self.proposal.map

    def variables(self, tensors: Mapping[str, Any], weight_map: WeightMap | None = None) -> Any:
        """Return JAX's variables with PyTorch's tensors in them; what is not mapped stays as JAX made it."""
        leaves = (weight_map or self.weight_map).to_leaves(tensors)
        own = self.loaded if self.own_variables is None else self.own_variables
        if own is None:
            return self.model.with_leaves(None, leaves)
        dtype = next(iter(leaves.values())).dtype
        kept = {
            path: jnp.asarray(leaf, dtype)
            for path, leaf in self.model.leaves(own).items()
            if path not in leaves and jnp.issubdtype(leaf.dtype, jnp.floating)
        }
        return self.model.with_leaves(own, {**kept, **leaves})

    def run(self, training: bool) -> Callable[[Any, Any], Any]:
        """Return the JAX side as a function of PyTorch's tensors and (positional, keyword) inputs."""
        known = self.weight_map  # found now: while JAX traces, nothing can be compared

        def run(tensors: Mapping[str, jax.Array], call: tuple[Any, Any]) -> Any:
            args, kwargs = call
            return self.model.apply(self.variables(tensors, known), Inputs(*args, **kwargs), training)[0]

        return run

    # --- The PyTorch side ---

    def make_module(self) -> torch.nn.Module:
        """Return the reference in float64; its tables are not those of float32 if it can be made in float64 as well.

        A table among its tensors is taken as exact: a port may compute it itself.
        """
        module = module_with(self.pair, self.tensors, "float64", self.seed)
        if isinstance(self.pair.torch_module, torch.nn.Module):
            return module
        try:
            with fixed_settings(torch.float64):
                exact = module_with(self.pair, {}, "float64", self.seed)
        except Exception:
            return module
        for name, array in {name: buffer.numpy() for name, buffer in exact.named_buffers()}.items():
            if name in self.tensors and np.array_equal(array.astype(np.float32), self.tensors[name]):
                self.tensors[name] = array.copy()
        load_tensors(exact, self.tensors)
        buffers = dict(module.named_buffers())
        errors = [relative_error(buffers[name].numpy(), buffer.numpy()) for name, buffer in exact.named_buffers()]
        return exact if max(errors, default=0.0) < LARGEST_OF_TABLES else module  # random ones are others in float64

    def reference(self, tensors: Mapping[str, np.ndarray], dtype: str = "float64") -> torch.nn.Module:
        """Return a reference in this dtype, with these tensors, in evaluation mode: the case's own if it has them."""
        if dtype == "float64":
            return self.module if tensors is self.tensors else load_tensors(copy_module(self.module), tensors)
        return module_with(self.pair, tensors, dtype, self.seed)

    def first_outputs(self, module: torch.nn.Module | None = None, noise: int = 0) -> dict[str, Any]:
        """Return what the reference, or a copy of it, returns for the smallest batch, by name."""
        return flat(self.torch_outputs(self.pair.draw_inputs(self.seed, self.sizes[-1]), module, noise))

    def torch_outputs(self, inputs: Inputs, module: torch.nn.Module | None = None, noise: int = 0) -> Any:
        """Return what the reference, or a copy of it, returns in float64, without dropout and without its graph.

        The graph is there for a forward that needs gradients of its own, such as a derivative by the inputs. `noise` is
        the seed of random numbers.
        """
        given, module = self.torch_inputs(inputs).map(torch.from_numpy), self.module if module is None else module
        with exact_arithmetic("float64"), fixed_settings(torch.float64, module), WithoutDropout():
            torch.manual_seed(noise)
            shapes = ", ".join(f"{leaf.dtype} {list(leaf.shape)}" for leaf in inputs.arrays())
            with blame(f"the PyTorch module, on inputs like the example (batch first: {shapes}),"):
                outputs = module(*given.args, **given.kwargs)
            return map_leaves(lambda _, leaf: detached(leaf), outputs)

    def torch_inputs(self, inputs: Inputs, dtype: str = "float64") -> Inputs:
        """Return the inputs of the module, with the keyword arguments that only PyTorch takes."""
        cast = self.cast(inputs, dtype)
        return Inputs(*cast.args, **{**cast.kwargs, **self.pair.torch_kwargs})

    @cached_property
    def noise_in_training(self) -> bool:
        """Return whether what the reference computes in training mode depends on random numbers, apart from dropout."""
        module = fresh_copy(self.module, True, torch.float64)
        return draws_otherwise(self.first_outputs(module), self.first_outputs(module, noise=1))

    @cached_property
    def modes(self) -> tuple[bool, ...]:
        """Return evaluation mode, and training mode too if it computes something else that JAX can compute as well."""
        training = self.pair.training
        if training is None:
            training = has_training_mode(self.module)
        training = training and not self.noise_in_training
        return (False, True) if training else (False,)

    @cached_property
    def cuts(self) -> tuple[Cut, ...]:
        """Return the ways to make the inputs smaller that the reference accepts.

        A padding, for example, may be right for images of even sizes only. Most convolutions and pools get an odd size
        in the place of an even one, or the other way round.
        """
        inputs, cuts = self.pair.draw_inputs(self.seed, self.sizes[-1]), list[Cut]()
        try:
            whole, shapes = self.strided_sizes(inputs), [leaf.shape for leaf in inputs.arrays()]
        except Refused:  # NaN in the weights is told by the check of transfer
            return ()
        most = max(map(len, shapes), default=0)
        for length in sorted({size for shape in shapes for size in shape[1:] if size >= SHORTEST}):
            for axes in (range(1, most), (1,), range(2, most)):
                changed: dict[Cut, int] = {}
                for cut in (Cut(length, length - less, axes) for less in FEWER if 2 * less <= length):
                    with suppress(Refused):
                        sizes = self.strided_sizes(inputs.map(cut.apply))
                        changed[cut] = sum((size - other) % 2 for size, other in zip(whole, sizes, strict=False))
                    if not whole or not changed:
                        break  # a size is as good as another, or none is taken
                best = max(changed, key=lambda cut: changed[cut], default=None)
                if best is not None and any(map(best.changes, inputs.arrays())):
                    inputs = inputs.map(best.apply)
                    cuts.append(best)
                    break
        return tuple(cuts)

    def strided_sizes(self, inputs: Inputs) -> list[int]:
        """Return the sizes of all that the reference gives to convolutions and pools, for these inputs.

        Raises:
            Refused: it does not take them, or gives NaN.
        """
        with StridedSizes() as sizes:
            if has_nan(flat(self.torch_outputs(inputs))):
                raise Refused("PyTorch gives NaN")
        return sizes.seen


def draws_otherwise(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Return whether two runs on the same inputs gave other outputs."""
    pairs = zip(one.values(), other.values(), strict=True)
    return any(torch.is_tensor(leaf) and not np.array_equal(leaf, again, equal_nan=True) for leaf, again in pairs)


def has_nan(outputs: Mapping[str, Any]) -> bool:
    """Return whether any output is NaN somewhere."""
    return any(torch.is_tensor(leaf) and bool(torch.isnan(leaf).any()) for leaf in outputs.values())


def is_image(array: np.ndarray, axes: int = 4) -> bool:
    """Return whether an array is of floats and has this number of axes, or more, up to 5."""
    return axes <= array.ndim <= 5 and bool(np.issubdtype(array.dtype, np.floating))


def channels_last(array: np.ndarray, axes: int = 4) -> np.ndarray:
    """Turn float [batch, channel, row, column], with a depth too, and from 3 axes on a sequence, into channels-last."""
    return np.ascontiguousarray(np.moveaxis(array, 1, -1)) if is_image(array, axes) else array


def has_training_mode(module: torch.nn.Module) -> bool:
    """Return whether the module computes something else in training mode, apart from dropout."""
    return any(getattr(child, "track_running_stats", False) for child in module.modules())


def find_map(case: Case) -> Proposal:
    """Find where each of PyTorch's tensors stands in JAX's variables.

    Raises:
        Refused: the declared map does not fit, or the JAX side has no variables that a map could lead to.
    """
    pair, own = case.pair, case.own_variables
    if isinstance(pair.weights, WeightMap):
        paths = list(pair.weights.leaves if own is None else case.model.leaves(own))
        gaps = check_complete(pair.weights, list(pair.weights.tensors), paths)
        return Proposal(pair.weights, (), (), "", gaps)
    loader = pair.weights if callable(pair.weights) else None
    if own is None and loader is None:
        raise Refused(
            "the JAX side has no variables: give the module itself, (variables, function), weights=, a function from "
            "PyTorch's state dict to them, or jax_init="
        )
    leaves = case.model.leaves(case.loaded if own is None else own)
    try:
        with exact_arithmetic("float64"):
            if loader is not None:
                weight_map = from_function(loader, case.model.leaves, case.module, leaves)
                return Proposal(
                    weight_map, (), (), "", check_complete(weight_map, list(weight_map.tensors), list(leaves))
                )
            alone = case.alone(leaves)
            leaves = {path: leaf for path, leaf in leaves.items() if path not in alone}
            order, flattened = torch_order(case)
            calls, flattened_last = jax_order(case, own)
            return propose(
                module_with(pair, {}, "float64", case.seed),  # its own values may be those that JAX holds
                leaves,
                {name: to for name, to in (pair.weights or {}).items() if name not in alone},
                order,
                calls,
                lambda other: distance(case, other),
                flattened,
                flattened_last,
            )
    except CannotCarry as error:
        raise Refused(str(error)) from error


class Choices(TorchFunctionMode):
    """Record whether a function is called that chooses: no rule says which of equal values comes first."""

    seen = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the function."""
        self.seen |= getattr(func, "__name__", "") in CHOOSING
        return func(*args, **(kwargs or {}))


class StridedSizes(TorchFunctionMode):
    """Record the sizes of the images or sequences that convolutions and pools are given."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the function."""
        if re.search("conv|pool", getattr(func, "__name__", "")) and args and isinstance(args[0], torch.Tensor):
            self.seen += args[0].shape[2:]
        return func(*args, **(kwargs or {}))


class Sizes(TorchFunctionMode):
    """Record the shapes of examples in the results of functions, and when weights are used.

    `seen` maps a number of values to the last shape that has so many values. Shapes with one axis are left out.

    Args:
        use: called with each tensor that a function is given.
    """

    def __init__(self, use: Callable[[torch.Tensor], None]) -> None:
        super().__init__()
        self.seen: dict[int, tuple[int, ...]] = {}
        self.use = use

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the function."""
        for part in jax.tree.leaves((args, [*(kwargs or {}).values()])):  # JAX would sort a dictionary
            if isinstance(part, torch.Tensor):
                self.use(part)
        result = func(*args, **(kwargs or {}))
        if type(result) is torch.Tensor and len(shape := result.size()) > 2:
            self.seen[prod(shape[1:])] = tuple(shape[1:])
        return result


def torch_order(case: Case) -> tuple[list[tuple[str, str]], dict[str, tuple[int, ...]]]:
    """Return names and classes of PyTorch's modules in the order of their calls, and the images that some may flatten.

    Such a module gets rows of as many values as an image before it has. Among them are the names of tensors, each where
    a function first gets it.
    """
    order: list[tuple[str, str]] = []
    flattened: dict[str, tuple[int, ...]] = {}
    module = copy_module(case.module)
    names = {id(tensor): name for name, tensor in [*module.named_parameters(), *module.named_buffers()]}

    def use(tensor: torch.Tensor) -> None:
        if id(tensor) in names:
            order.append((names.pop(id(tensor)), ""))

    sizes = Sizes(use)

    def note(child: torch.nn.Module, args: tuple[Any, ...], name: str) -> None:
        order.append((name, type(child).__name__))
        if args and isinstance(args[0], torch.Tensor) and args[0].dim() == 2 and args[0].size(1) in sizes.seen:
            flattened[name] = sizes.seen[args[0].size(1)]

    for name, child in module.named_modules():
        child.register_forward_pre_hook(partial(note, name=name))
    with sizes:
        case.torch_outputs(case.pair.draw_inputs(case.seed, case.sizes[-1]), module)
    return order, flattened


def jax_order(case: Case, variables: Any) -> tuple[list[tuple[str, str]], bool | None]:
    """Return paths and classes of JAX's modules in the order of their calls, and how images are flattened.

    That is with their channels last (True), first (False), or it is not sure (None). A plain function has no modules,
    but leaves, each where it is first used, and what holds them.
    """
    call = case.cast(case.jax_inputs(case.pair.draw_inputs(case.seed, case.sizes[-1])), "float64")
    leaves = {
        path: np.asarray(leaf, np.float64) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf
        for path, leaf in case.model.leaves(variables).items()
    }

    def run(leaves: Mapping[str, jax.Array], call: tuple[Any, Any]) -> Any:
        return case.model.apply(case.model.with_leaves(variables, leaves), Inputs(*call[0], **call[1]), False)[0]

    arguments = jax.tree.map(to_jnp, (call.args, call.kwargs))
    traced = trace(run, leaves, arguments, context=case.model.context, verify=False)
    case.coarse |= bool(traced.float32_constants)
    calls = list(traced.calls)
    if not calls:
        paths = sorted(leaves)  # as JAX sorts a dictionary
        used = [paths[number] for number in traced.order_of_use if number < len(paths)]
        calls = [(path, "") for leaf in used for path in (parent(leaf), leaf)]
    layouts = {layout_of(order, case.channels_last) for order in traced.flattened_orders}
    return calls, layouts.pop() if len(layouts) == 1 else None


def layout_of(order: tuple[int, ...], channels_last: bool) -> bool | None:
    """Return whether images with their axes in this order have channels last; None if they have them in the middle."""
    axes = range(1, len(order))
    turned = (0, axes[-1], *axes[:-1]) if channels_last else (0, *axes[1:], axes[0])
    return channels_last if order == (0, *axes) else not channels_last if order == turned else None


def distance(case: Case, weight_map: WeightMap) -> float:
    """Return how far the outputs of both sides are apart with this map; infinity if they have other shapes."""
    inputs = case.pair.draw_inputs(case.seed, case.sizes[-1])
    call = case.cast(case.jax_inputs(inputs), "float64")
    tensors = {name: jnp.asarray(array, jnp.float64) for name, array in case.tensors.items()}
    model, own = case.model, case.variables(tensors, weight_map)

    def run(leaves: Mapping[str, jax.Array], call: tuple[Any, Any]) -> Any:
        return model.apply(model.with_leaves(own, leaves), Inputs(*call[0], **call[1]), False)[0]

    program = case.shared.setdefault("outputs by leaves", compiled(run))  # one program for all maps
    actual = flat(program(model.leaves(own), jax.tree.map(to_jnp, (call.args, call.kwargs))))
    expected = flat(case.torch_outputs(inputs))
    errors = [
        min(relative_error(carried(actual[output.jax], way), expected[name].numpy()) for way in output.ways or (None,))
        for name, output in align_outputs(expected, actual, case.channels_last).items()
    ]
    return float(np.mean(errors))


def difference(actual: np.ndarray, expected: np.ndarray, floor: float, bound: Bound = STAGE_BOUND) -> Difference:
    """Compare one value of JAX's with PyTorch's; two constants of a mask, beyond 1e30 on both sides, are the same."""
    if actual.shape == expected.shape and np.issubdtype(expected.dtype, np.floating):
        masked = (np.abs(actual) > MASK) & (np.abs(expected) > MASK) & (np.sign(actual) == np.sign(expected))
        if masked.any():
            actual, expected = np.where(masked, 0, actual), np.where(masked, 0, expected)
    bound = bound._replace(floor=floor)
    problem = find_difference(actual, expected, bound)
    error = relative_error(actual, expected, floor) if actual.shape == expected.shape else float("inf")
    return Difference(error, problem)


def differences(actual: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> dict[str, Difference]:
    """Compare all values of one kind: the largest of them sets what counts as zero but for rounding.

    The large constant of a mask is no measure: no value counts as zero that is as large as most.
    """
    sizes = [size for array in expected.values() if (size := largest(array))]
    floor = min(SMALL * max(sizes, default=0.0), float(np.median(sizes or [0.0])))
    return {name: difference(actual[name], expected[name], floor) for name in expected if name in actual}


def objective(seed: int) -> Callable[[Any], torch.Tensor]:
    """Return the sum of all float outputs times random numbers: every output has an influence on every gradient."""

    def weighted_sum(outputs: Any) -> torch.Tensor:
        terms = [
            (leaf * torch.from_numpy(cotangent(seed, number, tuple(leaf.shape))).to(leaf.dtype)).sum()
            for number, leaf in enumerate(flat(outputs).values())
            if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() and leaf.requires_grad
        ]
        if not terms:
            raise Refused("no output of the PyTorch module depends on its parameters: there is no gradient to compare")
        return torch.stack(terms).sum()

    return weighted_sum


def cotangent(seed: int, number: int, shape: tuple[int, ...]) -> np.ndarray:
    """Return the random numbers that an output is multiplied with."""
    return np.random.default_rng((seed, number, 11)).standard_normal(shape)


class Output(NamedTuple):
    """One output of both sides; there is no way to carry it where the shapes do not allow one."""

    jax: str
    carry: Carry | None
    ways: tuple[Carry, ...] = ()  # all that the shapes allow


def align_outputs(expected: Mapping[str, Any], actual: Mapping[str, Any], channels_last: bool) -> dict[str, Output]:
    """Return the JAX output that belongs to each of PyTorch's: by name if all names are the same, else in order.

    Raises:
        Refused: the sides return different numbers of arrays.
    """
    if len(expected) != len(actual):
        sides = [f"{len(side)} array{'s' * (len(side) != 1)}{names_of(side)}" for side in (expected, actual)]
        raise Refused(
            f"PyTorch returns {sides[0]}, JAX {sides[1]}: switch off what only one returns, such as a cache, or take "
            "the rest from it in jax_model=, a function or (module, function)"
        )
    names = dict(zip(expected, expected if expected.keys() == actual.keys() else actual, strict=True))
    aligned = {}
    for name, other in names.items():
        dtype = actual[other].dtype
        if jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32:
            raise Refused(f"JAX returns {dtype}, whose rounding hides faults: make the model without it")
        ways = candidates(tuple(expected[name].shape), tuple(actual[other].shape), channels_last)
        aligned[name] = Output(other, ways[0] if ways else None, tuple(ways))
    return aligned


def names_of(outputs: Mapping[str, Any]) -> str:
    """Return the names of several outputs in brackets; a single array has none."""
    return f" ({', '.join(outputs)})" if any(outputs) else ""


class Sweeper:
    """PyTorch's values on one batch, and the JAX side's program that runs on the same batch.

    Without `inside`, no stage is matched: the program then takes about half as long to compile. With `cuts`, the inputs
    are smaller than the example.

    Attributes:
        reference: what PyTorch computed, with its gradients.
        stages: the values that both sides have, by PyTorch's names, in PyTorch's order.
        functions: values between modules, which are compared but never replaced.
    """

    def __init__(
        self,
        case: Case,
        size: int,
        training: bool,
        dtype: str = "float64",
        *,
        verify: bool = True,
        inside: bool = True,
        cuts: tuple[Cut, ...] = (),
    ) -> None:
        self.case, self.size, self.training, self.dtype, self.cuts = case, size, training, dtype, cuts
        self.limits: list[Limits] = []  # differences up to these are no fault
        self.load(case.seed, case.tensors, verify=verify)
        with exact_arithmetic(dtype):
            run = case.run(training)
            stacks = find_stacks(case.weight_map)
            self.traced: Traced = trace(
                run,
                self.tensors,
                self.call,
                context=case.model.context,
                verify=False,
                stacks=stacks,
                tensors=sorted(self.tensors),  # as JAX sorts a dictionary
            )
            self.shapes = flat(self.traced.outputs)
            case.coarse |= bool(self.traced.float32_constants)
            self.outputs = align_outputs(flat(self.reference.outputs), self.shapes, case.channels_last)
            matched, self.operations = match_stages(case, self.reference, self.traced) if inside else ({}, {})
            self.stages = {name: stage for name, stage in matched.items() if stage.kind != "function"}
            self.functions = {name: stage for name, stage in matched.items() if stage.kind == "function"}
            self.sweep = make_sweep(self.traced, {stage.jax for stage in matched.values()})
        self.settle_layouts()
        if verify:
            with exact_arithmetic(dtype):
                self.traced.verify(self.tensors, self.call, outputs=self.steered(False, False).outputs)

    def load(self, seed: int, tensors: Mapping[str, np.ndarray], *, verify: bool = False) -> None:
        """Take the weights and inputs of a seed, and run PyTorch with them; JAX's program stays."""
        release_memory()
        case, dtype = self.case, self.dtype
        self.seed = seed
        self.inputs = case.pair.draw_inputs(seed, self.size)
        for cut in self.cuts:
            self.inputs = self.inputs.map(cut.apply)
        self.module = case.reference(tensors, dtype)
        with exact_arithmetic(dtype):
            self.reference = self.capture(self.module, self.inputs, verify)
            call = case.cast(case.jax_inputs(self.inputs), dtype)
            self.call = jax.tree.map(to_jnp, (call.args, call.kwargs))
            self.tensors = {name: to_jnp(np.asarray(array, dtype)) for name, array in tensors.items()}

    def settle_layouts(self) -> None:
        """Choose a layout where a shape allows several, as 8 channels of 8 x 8 do.

        It is the one in which both sides have the same values, or else that of most stages with as many axes.
        """
        both, prefer = {**self.stages, **self.functions}, self.case.channels_last
        ways = {
            name: carries
            for name, stage in both.items()
            if stage.carry in (carries := candidates(stage.shape, stage.carry.jax_shape, prefer))
        }
        outputs = {name: output for name, output in self.outputs.items() if len(output.ways) > 1}
        if not outputs and all(len(carries) == 1 for carries in ways.values()):
            return
        sweep = self.steered(False, False)
        actual, expected_outputs = flat(sweep.outputs), flat(self.reference.outputs)
        for name, output in outputs.items():
            expected = np.asarray(expected_outputs[name])
            errors = [relative_error(carried(actual[output.jax], way), expected) for way in output.ways]
            if min(errors) < SAME_VALUES:
                self.outputs[name] = output._replace(carry=output.ways[int(np.argmin(errors))])
        sure = Counter((len(carries[0].axes), carries[0].axes) for carries in ways.values() if len(carries) == 1)
        values = sweep.values
        for name, carries in ways.items():
            stage, expected = both[name], self.reference.values[name]
            errors = [relative_error(way.to_torch(np.asarray(values[stage.jax])), expected) for way in carries]
            best = int(np.argmin(errors))
            usual = max(range(len(carries)), key=lambda n: sure[len(carries[n].axes), carries[n].axes])
            way = carries[best if errors[best] < SAME_VALUES else usual]
            kept = self.stages if name in self.stages else self.functions
            kept[name] = stage._replace(carry=way)

    def capture(
        self, module: torch.nn.Module, inputs: Inputs, verify: bool = False, dtype: str | None = None
    ) -> TorchCapture:
        """Run PyTorch on these inputs, in the dtype of this run if no other is given."""
        dtype = dtype or self.dtype
        return capture_torch(
            module,
            self.case.torch_inputs(inputs, dtype),
            objective(self.seed),
            training=self.training,
            dtype=dtype,
            functions=self.case.small,
            verify=verify,
        )

    def in_float64(self, tensors: Mapping[str, np.ndarray]) -> TorchCapture:
        """Run PyTorch on the inputs of this run, in float64."""
        module = self.case.reference(tensors)
        with exact_arithmetic("float64"):
            return self.capture(module, self.case.cast(self.inputs, self.dtype), dtype="float64")

    def in_jax(self, values: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """Return PyTorch's values of stages and functions under JAX's names and in its layouts.

        The given arrays are replaced by views of what is returned, so that no value is held twice.
        """
        arrays = {}
        for name, stage in {**self.stages, **self.functions}.items():
            if name in values:
                arrays[stage.jax] = jnp.asarray(stage.carry.to_jax(values[name]), real(values[name].dtype, self.dtype))
                if arrays[stage.jax].dtype == values[name].dtype:
                    values[name] = stage.carry.to_torch(np.asarray(arrays[stage.jax]))
        return arrays

    def cotangents(self) -> dict[str, jax.Array]:
        """Return the random numbers that JAX's float outputs are multiplied with: those of PyTorch's."""
        cotangents = {}
        for number, (name, output) in enumerate(self.outputs.items()):
            shape = self.shapes[output.jax]
            if jnp.issubdtype(shape.dtype, jnp.floating):
                array = cotangent(self.seed, number, np.shape(flat(self.reference.outputs)[name]))
                in_jax = np.zeros(shape.shape) if output.carry is None else output.carry.to_jax(array)
                cotangents[output.jax] = jnp.asarray(in_jax, self.dtype)
        return cotangents

    def run(
        self, forward: Callable[[str], bool], backward: Callable[[str], bool], given: TorchCapture | None = None
    ) -> Sweep:
        """Run JAX; stages for which the functions are true go on with PyTorch's value or gradient."""
        given, both = given or self.reference, {**self.stages, **self.functions}
        with exact_arithmetic(self.dtype):
            values = self.in_jax(given.values) if any(map(forward, both)) else {}
            gradients = self.in_jax(given.gradients) if any(map(backward, self.stages)) else {}
            return self.sweep(
                self.tensors,
                self.call,
                self.cotangents(),
                values,
                gradients,
                {stage.jax: forward(name) for name, stage in both.items()},
                {stage.jax: backward(name) and stage.jax in gradients for name, stage in self.stages.items()},
            )

    def side(self, sweep: Sweep) -> tuple[Side, dict[str, Difference]]:
        """Compare one run of JAX with PyTorch; the second part are the functions between modules."""
        reference, expected_outputs = self.reference, flat(self.reference.outputs)
        actual_outputs = flat(sweep.outputs)
        outputs = {name: carried(actual_outputs[output.jax], output.carry) for name, output in self.outputs.items()}
        weights = {
            name: np.asarray(sweep.weight_gradients[name])
            for name in self.expected_gradients
            if name in sweep.weight_gradients
        }
        stages, functions = self.stages, self.functions
        side = Side(
            differences(outputs, {name: np.asarray(array) for name, array in expected_outputs.items()}),
            differences(take(sweep.values, stages), take_expected(reference.values, stages)),
            differences(take(sweep.gradients, stages), take_expected(reference.gradients, stages)),
            differences(weights, self.expected_gradients),
        )
        of_functions = differences(take(sweep.values, functions), take_expected(reference.values, functions))
        for limits in self.limits:
            side, of_functions = excuse_side(side, limits), excuse(of_functions, limits["values"])
        return excuse_padding(self, sweep, side), of_functions

    def idle(self, sweep: Sweep) -> tuple[str, ...]:
        """Return the weights whose gradient is 0 in a run of JAX, and not in PyTorch.

        An output of another shape has no gradient: nothing is said then.
        """
        actual, expected = flat(sweep.outputs), flat(self.reference.outputs)
        shapes = {name: carried(actual[output.jax], output.carry).shape for name, output in self.outputs.items()}
        if any(shape != tuple(expected[name].shape) for name, shape in shapes.items()):
            return ()
        return tuple(
            name
            for name, gradient in self.expected_gradients.items()
            if gradient.any() and name in sweep.weight_gradients and not np.asarray(sweep.weight_gradients[name]).any()
        )

    @property
    def expected_gradients(self) -> Mapping[str, np.ndarray]:
        """Return PyTorch's gradients by all parameters that it trains. Detached parameters have a gradient of 0."""
        trained = {name: value for name, value in self.module.named_parameters() if value.requires_grad}
        zeros = {name: np.zeros(tuple(value.shape)) for name, value in trained.items()}
        return {**zeros, **self.reference.weight_gradients}

    def steered(
        self,
        forward: bool,
        backward: bool,
        without: str = "",
        given: TorchCapture | None = None,
        functions: Collection[str] = (),
    ) -> Sweep:
        """Run JAX with PyTorch's values (or those of `given`) at all stages but one, forward or backward or both.

        The values of these functions are PyTorch's too.
        """
        stages = {name for name in self.stages if name != without}
        return self.run(
            lambda name: name in functions or (forward and name in stages),
            lambda name: backward and name in stages,
            given,
        )

    def named(self, capture: TorchCapture) -> dict[str, np.ndarray]:
        """Return what PyTorch computed under the names of a report."""
        return named_values(
            flat(capture.outputs),
            take_expected(capture.values, self.stages),
            take_expected(capture.gradients, self.stages),
            capture.weight_gradients,
        )

    def named_sweep(self, sweep: Sweep) -> dict[str, np.ndarray]:
        """Return what JAX computed under the same names, in PyTorch's layouts."""
        outputs = flat(sweep.outputs)
        return named_values(
            {name: carried(outputs[output.jax], output.carry) for name, output in self.outputs.items()},
            take(sweep.values, self.stages),
            take(sweep.gradients, self.stages),
            {name: np.asarray(sweep.weight_gradients[name]) for name in self.reference.weight_gradients},
        )


def named_values(
    outputs: Mapping[str, Any], values: Mapping[str, Any], gradients: Mapping[str, Any], weights: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """Return all float values of a run under the names of a report."""
    named = {f"output {name}".rstrip() + " of the network": array for name, array in outputs.items()}
    named |= {f"output of {name}": array for name, array in values.items()}
    named |= {f"gradient by the output of {name}": array for name, array in gradients.items()}
    named |= {f"gradient by {name}": array for name, array in weights.items()}
    return {name: np.asarray(a) for name, a in named.items() if np.issubdtype(np.asarray(a).dtype, np.floating)}


def real(dtype: np.dtype, wanted: str) -> Any:
    """Return the wanted dtype for floats, and the given one for others."""
    return wanted if np.issubdtype(dtype, np.floating) else dtype


def to_jnp(leaf: Any) -> Any:
    """Return an array as JAX's; what is no array stays. `jnp.asarray` would compile a program for each shape."""
    return jax.device_put(leaf) if isinstance(leaf, np.ndarray) else leaf


def carried(value: Any, way: Carry | None) -> np.ndarray:
    """Return a value of JAX's in PyTorch's layout, or as it is where the shapes do not allow that."""
    return np.asarray(value) if way is None else np.asarray(way.to_torch(np.asarray(value)))


def take(values: Mapping[str, Any], stages: Mapping[str, Stage]) -> dict[str, np.ndarray]:
    """Return JAX's values of the stages under PyTorch's names and in its layouts."""
    return {name: carried(values[stage.jax], stage.carry) for name, stage in stages.items() if stage.jax in values}


def take_expected(values: Mapping[str, np.ndarray], stages: Mapping[str, Stage]) -> dict[str, np.ndarray]:
    """Return PyTorch's values of the stages."""
    return {name: values[name] for name in stages if name in values}


def any_problem(*sides: Side) -> bool:
    """Return whether any value of these runs differs."""
    return any(difference.problem for side in sides for part in side for difference in part.values())


def excuse_padding(sweeper: Sweeper, sweep: Sweep, side: Side) -> Side:
    """Take back what PyTorch's gradient shows in the row of an embedding's padding, if JAX's is 0 behind the embedding.

    PyTorch stops this gradient inside of the layer, such a port behind it: its weight alone must not be judged there.
    """
    for name, layer in sweeper.module.named_modules():
        gradient, weight = side.gradients.get(name), f"{name}.weight".lstrip(".")
        if (
            getattr(layer, "padding_idx", None) is None
            or weight not in side.weights
            or not (gradient and gradient.problem)
        ):
            continue
        expected = sweeper.reference.gradients[name]
        actual = take(sweep.gradients, {name: sweeper.stages[name]})[name]
        stopped = np.all(actual == 0, axis=-1) & np.any(expected != 0, axis=-1)
        both = sweep.weight_gradients[weight], sweeper.expected_gradients[weight]
        ours, theirs = (np.delete(np.asarray(array), layer.padding_idx, 0) for array in both)
        limits: dict[str, dict[str, float]] = {kind: {} for kind in Side._fields}
        if stopped.any() and relative_error(ours, theirs) <= STAGE_BOUND.limit:
            limits["weights"] = {weight: np.inf}
        if relative_error(actual[~stopped], expected[~stopped]) <= STAGE_BOUND.limit:
            limits["gradients"] = {name: np.inf}
        side = excuse_side(side, limits)
    return side


def tables_of(module: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of a module and its constants that are none, by name; complex ones with a last axis of 2."""
    for front, part in module.named_modules():
        for name, value in {**part._parameters, **part._buffers, **vars(part)}.items():
            if isinstance(value, torch.Tensor) and value.dtype.itemsize >= torch.float32.itemsize:
                value = value.detach()
                yield f"{front}.{name}".lstrip("."), torch.view_as_real(value) if value.is_complex() else value


def excuse_side(side: Side, limits: Limits) -> Side:
    """Take back the problems of one run."""
    return Side(*(excuse(part, limits[kind]) for kind, part in side._asdict().items()))


def excuse(part: Mapping[str, Difference], limits: Mapping[str, float]) -> dict[str, Difference]:
    """Take back the problems of values of one kind."""
    return {
        name: difference._replace(problem="") if difference.error <= limits.get(name, 0.0) else difference
        for name, difference in part.items()
    }


def has_problem(part: Mapping[str, Difference]) -> bool:
    """Return whether one of the values differs."""
    return any(difference.problem for difference in part.values())


def match_stages(case: Case, reference: TorchCapture, traced: Traced) -> tuple[dict[str, Stage], dict[str, str]]:
    """Return the values that both sides have, by PyTorch's names, in the order of its run, and all its operations.

    Beside an operation stands the size of JAX's value, where that is another.
    """
    shapes = {name: tuple(array.shape) for name, array in reference.values.items()}
    modules = dict(case.module.named_modules(remove_duplicate=False))
    in_torch = {
        name: stage._replace(batch_first=getattr(modules.get(stage.owner), "batch_first", None))
        for name, stage in torch_stages(reference.kinds, shapes, modules).items()
    }
    in_jax = jax_stages(traced.taps)
    owners = find_owners(case.weight_map)
    matches = match(
        in_torch,
        in_jax,
        owners,
        case.pair.stages,
        case.channels_last,
        find_holders(case.weight_map),
        traced.meetings,
    )
    stages = {}
    for name, stage in in_torch.items():
        if name and name in matches and traced.taps[matches[name].jax].steered:
            way = carry_stage(stage, in_jax[matches[name].jax], case.channels_last)
            if way is not None:
                stages[name] = Stage(matches[name].jax, stage.kind, stage.shape, way, matches[name].sure)
    sizes: dict[Any, tuple[int, ...]] = {
        (stage.owner, stage.call, stage.place): stage.shape
        for stage in in_jax.values()
        if not stage.label and not stage.steps
    }
    operations = {}
    for stage in find_parts(in_torch.values()):
        key = owners.get(stage.owner), stage.call, stage.place
        size = stage.shape if stage.label else sizes.get(key, stage.shape)
        if kind_of(stage) not in IDENTITIES:
            why = f" ({size_of(size)} in JAX, {size_of(stage.shape)} in PyTorch)"
            operations[stage.name] = why if prod(size) != prod(stage.shape) else ""
    return stages, operations


def find_stacks(weight_map: WeightMap) -> set[tuple[int, ...]]:
    """Return the shapes of JAX's leaves that stack the tensors of several layers."""
    leaves = {path: len(entry.torch) for entry in weight_map.entries for path in entry.jax if len(entry.torch) > 1}
    shapes = ((weight_map.leaves[path], count) for path, count in leaves.items())
    return {shape for shape, count in shapes if shape and shape[0] > 1 and count % shape[0] == 0}


def find_holders(weight_map: WeightMap) -> dict[str, set[str]]:
    """Return the JAX modules that hold the weights of each of PyTorch's modules."""
    holders: dict[str, set[str]] = {}
    for entry in weight_map.entries:
        for name in entry.torch:
            holders.setdefault(name.rpartition(".")[0], set()).update(map(module_of, entry.jax))
    return holders


def find_owners(weight_map: WeightMap) -> dict[str, str]:
    """Return the JAX module that holds all weights of each of PyTorch's modules, itself or in its parts.

    A module that also holds weights of other modules in its parts is not one, as a block that holds the slope of its
    activation. Nor is one that has only the module's own parameter, such as a factor, and not the parts of the module.
    """
    holders = find_holders(weight_map)

    def others_in(path: str, name: str) -> set[str]:
        others = [other for other in holders if name and not f"{other}.".startswith(f"{name}.")]
        return {part for other in others for part in holders[other] if is_part(part, path)}

    owners = {}
    for name, (path, *more) in holders.items():
        parts = (part for other in holders if other.startswith(f"{name}.") or not name for part in holders[other])
        if not more and (not path or all(is_part(part, path) for part in parts)) and not others_in(path, name) - {path}:
            owners[name] = path
    for name, paths in holders.items():
        if len(paths) > 1 and (whole := os.path.commonpath(paths)) and not others_in(whole, name):
            owners[name] = whole
    return owners


def module_of(path: str) -> str:
    """Return the path of the module of a leaf; Haiku's norms keep their statistics in modules of their own."""
    return re.sub("/~/(mean|var)_ema$", "", path.rpartition("/")[0])

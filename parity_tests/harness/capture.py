"""A pair made ready to be compared, and what both sides compute on one batch: outputs, stages, gradients.

JAX runs twice. *Inherited*: from end to end, so that a difference passes from stage to stage as it does in use.
*Local*: every stage goes on with PyTorch's value, and every gradient with PyTorch's gradient, so that a difference
shows in the stage where it is born, and only there. One compiled program serves both runs.
"""

import copy
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Any, NamedTuple

import jax
import numpy as np
import torch
from jax import numpy as jnp

from parity_tests.harness.adapters import Model, adapt
from parity_tests.harness.compare import Bound, Refused, find_difference, flat, largest, relative_error
from parity_tests.harness.pair import (
    LARGE,
    Inputs,
    Pair,
    is_array,
    module_with,
    probing_tensors,
)
from parity_tests.harness.propose import Proposal, propose
from parity_tests.harness.stages import Carry, candidates, carry, jax_stages, match, torch_stages
from parity_tests.harness.taps import Sweep, Traced, in_float64, make_sweep, trace
from parity_tests.harness.torch_side import TorchCapture, capture_torch, reference_error
from parity_tests.harness.weights import CannotCarry, WeightMap, check_complete, from_function

STAGE_BOUND = Bound(1e-12, "float64 rounding; worst seen over 20 seeds 5.0e-15 of the tensor's largest value")
SMALL = 1e-3  # a tensor smaller than this, in units of the largest of its kind, is judged in units of that one
NUDGE_FACTOR = (
    50.0  # JAX may be this many times as far off as PyTorch is from itself when its arguments change by an ULP
)
WIDEST = 1e-7  # and no further, however badly conditioned the network is
OWN_FACTOR = 8.0  # JAX may be this many times as far off as float32 inside the reference puts the reference itself
LARGEST_OWN_ERROR = 1e-4  # a larger difference is not float32's rounding
MASK = 1e30  # no activation is so large; the smallest float32 and the smallest float64 are
SAME_VALUES = 1e-3  # a relative error below this, in float32 too, means that a layout is right
UNSWAPPED = 12  # suspicious stages that are tried without PyTorch's value

Quiet = Callable[[str], None]


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


class Comparison(NamedTuple):
    """Both sides on one batch."""

    size: int
    training: bool
    stages: dict[str, Stage]
    inherited: Side
    local: Side
    order: tuple[str, ...]  # all of PyTorch's values, in the order of its run
    functions: dict[str, Difference]  # values between modules in the local run; they say where, and never whether
    notes: tuple[str, ...]

    @property
    def mode(self) -> str:
        """Return what a message adds to a place in training mode."""
        return ", in training mode" if self.training else ""


class Case:
    """A pair with the weights of one seed, ready for every check.

    Raises:
        Refused: the pair cannot be compared.
    """

    def __init__(self, pair: Pair, seed: int = 0, progress: Quiet = lambda text: None) -> None:
        self.pair, self.seed, self.progress = pair, seed, progress
        self.notes: list[str] = []
        self.shared: dict[str, Any] = {}  # what several checks use
        if (pair.torch_loss is None) != (pair.jax_loss is None):
            raise Refused("the pair declares the loss of one side only: give torch_loss and jax_loss, or neither")
        model = adapt(pair.jax_model, pair.jax_kwargs, pair.jax_training_kwargs)
        self.model: Model = model._replace(apply=in_float64(model.apply))
        self.tensors = probing_tensors(pair, seed)
        self.module = module_with(pair, self.tensors, "float64", seed)
        self.sizes = pair.sizes()
        self.small = sum(array.size for array in self.tensors.values()) <= LARGE  # functions between modules are seen

    # --- The JAX side ---

    def jax_inputs(self, inputs: Inputs) -> Inputs:
        """Return the inputs as the JAX model takes them."""
        way = self.pair.jax_inputs
        if callable(way):
            return way(inputs)
        if way == "channels_last" or (way is None and self.model.library != "Equinox"):
            return inputs.map(channels_last)
        return inputs

    @property
    def channels_last(self) -> bool:
        """Return whether JAX's images have their channels last."""
        way = self.pair.jax_inputs
        return way != "same" and (way is not None or self.model.library != "Equinox")

    def cast(self, inputs: Inputs, dtype: str) -> Inputs:
        """Return the inputs with floats in this dtype."""
        return inputs.map(lambda leaf: leaf.astype(dtype) if np.issubdtype(leaf.dtype, np.floating) else leaf)

    @property
    def can_draw(self) -> bool:
        """Return whether the JAX side draws weights of its own."""
        return callable(self.pair.jax_init) or self.model.init is not None

    def draw_variables(self, seed: int) -> Any:
        """Return variables that the JAX side draws itself, in float32."""
        key = jax.random.key(seed)
        if callable(self.pair.jax_init):
            return self.pair.jax_init(key)
        assert self.model.init is not None
        inputs = self.cast(self.jax_inputs(self.pair.draw_inputs(self.seed, self.sizes[0])), "float32")
        return self.model.init(key, inputs.map(jnp.asarray))

    @cached_property
    def own_variables(self) -> Any:
        """The variables that the JAX side makes itself, in float32; None if it has no way to."""
        if self.model.variables is not None:
            return self.model.variables
        return self.draw_variables(self.seed) if self.can_draw else None

    @cached_property
    def proposal(self) -> Proposal:
        """The map of the weights, with how each row of it was found."""
        self.progress("the map of the weights")
        return find_map(self)

    @property
    def weight_map(self) -> WeightMap:
        """The map of the weights.

        Raises:
            Refused: two maps fit equally.
        """
        if self.proposal.ambiguous:
            first, *others = self.proposal.ambiguous
            more = f" (and {len(others)} more)" if others else ""
            raise Refused(
                f"two maps of the weights fit equally: {first}{more}; say which in weights= (--propose shows all)"
            )
        return self.proposal.map

    def variables(self, tensors: Mapping[str, Any], weight_map: WeightMap | None = None) -> Any:
        """Return JAX's variables with PyTorch's tensors in them; what is not mapped stays as JAX made it."""
        leaves = (weight_map or self.weight_map).to_leaves(tensors)
        own = self.own_variables
        if own is None:
            return leaves_to_tree(leaves)
        dtype = next(iter(leaves.values())).dtype
        kept = {
            path: jnp.asarray(leaf, dtype)
            for path, leaf in self.model.leaves(own).items()
            if path not in leaves and jnp.issubdtype(leaf.dtype, jnp.floating)
        }
        return self.model.with_leaves(own, {**kept, **leaves})

    def run(self, training: bool, weight_map: WeightMap | None = None) -> Callable[[Any, Any], Any]:
        """Return the JAX side as a function of PyTorch's tensors and (positional, keyword) inputs."""
        known = weight_map or self.weight_map  # found now: while JAX traces, nothing can be compared

        def run(tensors: Mapping[str, jax.Array], call: tuple[Any, Any]) -> Any:
            args, kwargs = call
            return self.model.apply(self.variables(tensors, known), Inputs(*args, **kwargs), training)[0]

        return run

    # --- The PyTorch side ---

    def torch_inputs(self, inputs: Inputs, dtype: str = "float64") -> Inputs:
        """Return the inputs of the module, with the keyword arguments that only PyTorch takes."""
        cast = self.cast(inputs, dtype)
        return Inputs(*cast.args, **{**cast.kwargs, **self.pair.torch_kwargs})

    @cached_property
    def modes(self) -> tuple[bool, ...]:
        """Evaluation mode, and training mode too if it computes something else."""
        training = self.pair.training
        if training is None:
            training = has_training_mode(self.module)
        return (False, True) if training else (False,)

    @cached_property
    def comparisons(self) -> list[Comparison]:
        """Both sides on a batch of each size, in each mode."""
        return [compare_sides(self, size, training) for training in self.modes for size in self.sizes]


def channels_last(array: np.ndarray) -> np.ndarray:
    """Turn float [batch, channel, row, column] and [batch, channel, depth, row, column] into channels-last."""
    if array.ndim in (4, 5) and np.issubdtype(array.dtype, np.floating):
        return np.ascontiguousarray(np.moveaxis(array, 1, -1))
    return array


def leaves_to_tree(leaves: Mapping[str, Any]) -> Any:
    """Build nested dictionaries from leaves by path."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *branches, last = path.split("/")
        branch = tree
        for name in branches:
            branch = branch.setdefault(name, {})
        branch[last] = leaf
    return tree


def has_training_mode(module: torch.nn.Module) -> bool:
    """Return whether the module computes something else in training mode, apart from dropout."""
    kinds = (torch.nn.modules.batchnorm._BatchNorm,)
    return any(isinstance(child, kinds) and child.track_running_stats for child in module.modules())


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
            "the JAX side has no variables: give weights=, a function from PyTorch's state dict to them, or jax_init="
        )
    leaves = case.model.leaves(call_loader(case, loader) if own is None and loader else own)
    try:
        with exact_arithmetic("float64"):
            if loader is not None:
                weight_map = from_function(loader, case.model.leaves, case.module, leaves)
                return Proposal(
                    weight_map, (), (), "", check_complete(weight_map, list(weight_map.tensors), list(leaves))
                )
            return propose(
                case.module,
                leaves,
                pair.weights,
                torch_order(case),
                jax_order(case, own),
                lambda other: distance(case, other),
            )
    except CannotCarry as error:
        raise Refused(str(error)) from error


def torch_order(case: Case) -> list[tuple[str, str]]:
    """Return names and classes of PyTorch's modules in the order of their calls."""
    order: list[tuple[str, str]] = []
    module = copy.deepcopy(case.module)
    for name, child in module.named_modules():
        child.register_forward_pre_hook(lambda child, _, name=name: order.append((name, type(child).__name__)))
    inputs = case.torch_inputs(case.pair.draw_inputs(case.seed, case.sizes[-1])).map(torch.from_numpy)
    with torch.no_grad():
        module(*inputs.args, **inputs.kwargs)
    return order


def jax_order(case: Case, variables: Any) -> list[tuple[str, str]]:
    """Return paths and classes of JAX's modules in the order of their calls; nothing for a plain function."""
    call = case.cast(case.jax_inputs(case.pair.draw_inputs(case.seed, case.sizes[-1])), "float64")
    leaves = {
        path: jnp.asarray(leaf, jnp.float64 if jnp.issubdtype(leaf.dtype, jnp.floating) else None)
        for path, leaf in case.model.leaves(variables).items()
    }

    def run(leaves: Mapping[str, jax.Array], call: tuple[Any, Any]) -> Any:
        return case.model.apply(case.model.with_leaves(variables, leaves), Inputs(*call[0], **call[1]), False)[0]

    arguments = jax.tree.map(to_jnp, (call.args, call.kwargs))
    return trace(run, leaves, arguments, context=case.model.context, verify=False).calls


def distance(case: Case, weight_map: WeightMap) -> float:
    """Return how far the outputs of both sides are apart with this map; infinity if they have other shapes."""
    inputs = case.pair.draw_inputs(case.seed, case.sizes[-1])
    call = case.cast(case.jax_inputs(inputs), "float64")
    tensors = {name: jnp.asarray(array, jnp.float64) for name, array in case.tensors.items()}
    actual = flat(jax.jit(case.run(False, weight_map))(tensors, jax.tree.map(to_jnp, (call.args, call.kwargs))))
    given = case.torch_inputs(inputs).map(torch.from_numpy)
    with torch.no_grad():
        expected = flat(case.module(*given.args, **given.kwargs))
    errors = [
        relative_error(carried(actual[output.jax], output.carry), expected[name].numpy())
        for name, output in align_outputs(expected, actual, case.channels_last).items()
    ]
    return float(np.mean(errors))


def call_loader(case: Case, loader: Callable[[Any], Any]) -> Any:
    """Return the variables that the pair's own loader makes of PyTorch's tensors."""
    return loader({name: tensor.detach().numpy() for name, tensor in case.module.state_dict().items()})


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
    sizes = [largest(array) for array in expected.values()]
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
    return {
        name: Output(other, carry(tuple(expected[name].shape), tuple(actual[other].shape), channels_last))
        for name, other in names.items()
    }


def names_of(outputs: Mapping[str, Any]) -> str:
    """Return the names of several outputs in brackets; a single array has none."""
    return f" ({', '.join(outputs)})" if any(outputs) else ""


class Sweeper:
    """PyTorch's values on one batch, and the JAX side's program that runs on the same batch.

    Attributes:
        reference: what PyTorch computed, with its gradients.
        stages: the values that both sides have, by PyTorch's names, in PyTorch's order.
        functions: values between modules, which are compared but never replaced.
    """

    def __init__(self, case: Case, size: int, training: bool, dtype: str = "float64", *, verify: bool = True) -> None:
        self.case, self.size, self.training, self.dtype = case, size, training, dtype
        self.load(case.seed, case.tensors, verify=verify)
        with exact_arithmetic(dtype):
            run = case.run(training)
            self.traced: Traced = trace(run, self.tensors, self.call, context=case.model.context, verify=verify)
            self.shapes = flat(jax.eval_shape(run, self.tensors, self.call))
            self.outputs = align_outputs(flat(self.reference.outputs), self.shapes, case.channels_last)
            matched = match_stages(case, self.reference, self.traced)
            self.stages = {name: stage for name, stage in matched.items() if stage.kind != "function"}
            self.functions = {name: stage for name, stage in matched.items() if stage.kind == "function"}
            self.sweep = make_sweep(self.traced, {stage.jax for stage in matched.values()})
        self.settle_layouts()

    def load(self, seed: int, tensors: Mapping[str, np.ndarray], *, verify: bool = False) -> None:
        """Take the weights and inputs of a seed, and run PyTorch with them; JAX's program stays."""
        case, dtype = self.case, self.dtype
        self.seed = seed
        self.inputs = case.pair.draw_inputs(seed, self.size)
        self.module = module_with(case.pair, tensors, dtype, case.seed)
        with exact_arithmetic(dtype):
            self.reference = self.capture(self.module, self.inputs, verify)
            call = case.cast(case.jax_inputs(self.inputs), dtype)
            self.call = jax.tree.map(to_jnp, (call.args, call.kwargs))
            self.tensors = {name: jnp.asarray(array, dtype) for name, array in tensors.items()}

    def settle_layouts(self) -> None:
        """Choose a layout where a shape allows several, as 8 channels of 8 x 8 do.

        It is the one in which both sides have the same values, or else that of most stages with as many axes.
        """
        both, prefer = {**self.stages, **self.functions}, self.case.channels_last
        ways = {
            name: found
            for name, stage in both.items()
            if stage.carry in (found := candidates(stage.shape, stage.carry.jax_shape, prefer))
        }
        if all(len(found) == 1 for found in ways.values()):
            return
        sure = Counter((len(found[0].axes), found[0].axes) for found in ways.values() if len(found) == 1)
        values = self.steered(False, False).values
        for name, found in ways.items():
            stage, expected = both[name], self.reference.values[name]
            errors = [relative_error(way.to_torch(np.asarray(values[stage.jax])), expected) for way in found]
            best = int(np.argmin(errors))
            usual = max(range(len(found)), key=lambda n: sure[len(found[n].axes), found[n].axes])
            way = found[best if errors[best] < SAME_VALUES else usual]
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
        module = module_with(self.case.pair, tensors, "float64", self.case.seed)
        with exact_arithmetic("float64"):
            return self.capture(module, self.case.cast(self.inputs, self.dtype), dtype="float64")

    def in_jax(self, values: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        """Return PyTorch's values of the stages under JAX's names and in its layouts."""
        return {
            stage.jax: jnp.asarray(stage.carry.to_jax(values[name]), real(values[name].dtype, self.dtype))
            for name, stage in self.stages.items()
            if name in values
        }

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
        given = given or self.reference
        with exact_arithmetic(self.dtype):
            values, gradients = self.in_jax(given.values), self.in_jax(given.gradients)
            return self.sweep(
                self.tensors,
                self.call,
                self.cotangents(),
                values,
                gradients,
                {stage.jax: forward(name) for name, stage in self.stages.items()},
                {stage.jax: backward(name) and stage.jax in gradients for name, stage in self.stages.items()},
            )

    def side(self, sweep: Sweep) -> tuple[Side, dict[str, Difference]]:
        """Compare one run of JAX with PyTorch; the second part are the functions between modules."""
        reference, expected_outputs = self.reference, flat(self.reference.outputs)
        actual_outputs = flat(sweep.outputs)
        outputs = {name: carried(actual_outputs[output.jax], output.carry) for name, output in self.outputs.items()}
        weights = {
            name: np.asarray(sweep.weight_gradients[name])
            for name in reference.weight_gradients
            if name in sweep.weight_gradients
        }
        stages, functions = self.stages, self.functions
        side = Side(
            differences(outputs, {name: np.asarray(array) for name, array in expected_outputs.items()}),
            differences(take(sweep.values, stages), take_expected(reference.values, stages)),
            differences(take(sweep.gradients, stages), take_expected(reference.gradients, stages)),
            differences(weights, reference.weight_gradients),
        )
        return side, differences(take(sweep.values, functions), take_expected(reference.values, functions))

    def steered(self, forward: bool, backward: bool, without: str = "", given: TorchCapture | None = None) -> Sweep:
        """Run JAX with PyTorch's values (or those of `given`) at all stages but one, forward or backward or both."""
        return self.run(lambda name: forward and name != without, lambda name: backward and name != without, given)

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
    """Return an array as JAX's; what is no array stays."""
    return jnp.asarray(leaf) if isinstance(leaf, np.ndarray) else leaf


def carried(value: Any, way: Carry | None) -> np.ndarray:
    """Return a value of JAX's in PyTorch's layout, or as it is where the shapes do not allow that."""
    return np.asarray(value) if way is None else np.asarray(way.to_torch(np.asarray(value)))


def take(values: Mapping[str, Any], stages: Mapping[str, Stage]) -> dict[str, np.ndarray]:
    """Return JAX's values of the stages under PyTorch's names and in its layouts."""
    return {name: carried(values[stage.jax], stage.carry) for name, stage in stages.items() if stage.jax in values}


def take_expected(values: Mapping[str, np.ndarray], stages: Mapping[str, Stage]) -> dict[str, np.ndarray]:
    """Return PyTorch's values of the stages."""
    return {name: values[name] for name in stages if name in values}


def compare_sides(case: Case, size: int, training: bool) -> Comparison:
    """Run both sides on one batch and compare all that they compute."""
    case.progress(f"batch of {size}" + (" in training mode" if training else ""))
    sweeper = Sweeper(case, size, training, verify=size == case.sizes[0])
    inherited, _ = sweeper.side(sweeper.steered(False, False))
    local, functions = sweeper.side(sweeper.steered(True, True))
    notes = (*sweeper.reference.notes, *sweeper.traced.notes)
    order = tuple(sweeper.reference.values)
    comparison = Comparison(size, training, sweeper.stages, inherited, local, order, functions, notes)
    if not any_problem(inherited, local):
        return comparison
    return drop_false_matches(sweeper, excuse_rounding(sweeper, comparison))


def any_problem(*sides: Side) -> bool:
    """Return whether any value of these runs differs."""
    return any(difference.problem for side in sides for part in side for difference in part.values())


def excuse_rounding(sweeper: Sweeper, comparison: Comparison) -> Comparison:
    """Take back differences that rounding explains.

    Both sides run again with every input and weight moved by one unit in the last place: where that moves a value of
    either by more than the bound allows, they may be as far apart, times a factor. And some references keep float32
    inside a float64 run, or have a gradient that is off by more than rounding: JAX may be as far off there, and after.
    """
    reference, moved = sweeper.reference, move_reference(sweeper)
    allowed = {
        "outputs": movement(flat(reference.outputs), flat(moved.outputs)),
        "values": movement(reference.values, moved.values),
        "gradients": movement(reference.gradients, moved.gradients),
        "weights": movement(reference.weight_gradients, moved.weight_gradients),
    }
    in_jax = move_jax(sweeper)
    limits = {
        kind: {
            name: min(NUDGE_FACTOR * max(error, in_jax[kind].get(name, 0.0)), WIDEST) for name, error in errors.items()
        }
        for kind, errors in allowed.items()
    }
    comparison = excuse(comparison, limits)
    small = [
        difference.error
        for side in (comparison.inherited, comparison.local)
        for part in side
        for difference in part.values()
        if difference.problem
    ]
    if not small or max(small) > LARGEST_OWN_ERROR:
        return comparison
    return excuse_own_errors(sweeper, comparison)


def excuse_own_errors(sweeper: Sweeper, comparison: Comparison) -> Comparison:
    """Take back differences that come from float32 inside the reference, or from its own wrong gradient."""
    asked = [name for name, difference in comparison.local.gradients.items() if difference.problem]
    with exact_arithmetic("float64"):
        errors = reference_error(
            sweeper.module,
            sweeper.case.torch_inputs(sweeper.inputs),
            objective(sweeper.seed),
            sweeper.reference,
            training=sweeper.training,
            backward_of=tuple(comparison.order) if asked else (),
        )
    last = max(errors.values.values(), default=0.0)
    backward = max(errors.backward.values(), default=0.0)
    limits = {
        "outputs": dict.fromkeys(flat(sweeper.reference.outputs), OWN_FACTOR * last),
        "values": {name: OWN_FACTOR * error for name, error in errors.values.items()},
        "gradients": {
            name: OWN_FACTOR * max(errors.gradients.get(name, 0.0), backward) for name in sweeper.reference.gradients
        },
        "weights": {
            name: OWN_FACTOR * max(errors.weight_gradients.get(name, 0.0), backward)
            for name in sweeper.reference.weight_gradients
        },
    }
    inexact = sorted(errors.born | {name for name, error in errors.backward.items() if error > STAGE_BOUND.limit})
    note = f"PyTorch itself is no more exact than float32 in {', '.join(inexact)}: judged by its own error"
    return excuse(comparison, limits)._replace(notes=(*comparison.notes, *([note] if inexact else [])))


def excuse(comparison: Comparison, limits: Mapping[str, Mapping[str, float]]) -> Comparison:
    """Take back the problems of differences up to these limits."""

    def side(given: Side) -> Side:
        return Side(
            *(
                {
                    name: difference._replace(problem="")
                    if difference.error <= limits[kind].get(name, 0.0)
                    else difference
                    for name, difference in part.items()
                }
                for kind, part in given._asdict().items()
            )
        )

    return comparison._replace(inherited=side(comparison.inherited), local=side(comparison.local))


def movement(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, float]:
    """Return how far each float value moved, in units of its largest value."""
    return {
        name: relative_error(np.asarray(other[name]), np.asarray(array))
        for name, array in one.items()
        if name in other and np.issubdtype(np.asarray(array).dtype, np.floating)
    }


def nudge(sweeper: Sweeper) -> Callable[[Any], Any]:
    """Return a function that moves every value of a float array by one unit in the last place; zeros stay zero."""
    rng = np.random.default_rng((sweeper.seed, sweeper.size, 3))

    def move(array: Any) -> Any:
        if not np.issubdtype(array.dtype, np.floating):
            return array
        return array * (1 + np.finfo(np.float64).eps * rng.choice((-1.0, 1.0), array.shape))

    return move


def move_reference(sweeper: Sweeper) -> TorchCapture:
    """Run the reference with every float input and weight moved by one unit in the last place."""
    case, move = sweeper.case, nudge(sweeper)
    tensors = {name: move(array.astype(np.float64)) for name, array in case.tensors.items()}
    module = module_with(case.pair, tensors, "float64", case.seed)
    with exact_arithmetic("float64"):
        return sweeper.capture(module, case.cast(sweeper.inputs, "float64").map(move))


def move_jax(sweeper: Sweeper) -> dict[str, dict[str, float]]:
    """Return how far JAX's values move, by PyTorch's names, with every float input and weight moved likewise."""
    other, move = copy.copy(sweeper), nudge(sweeper)
    with exact_arithmetic("float64"):
        other.tensors = {name: move(array) for name, array in sweeper.tensors.items()}
        other.call = jax.tree.map(lambda leaf: move(leaf) if is_array(leaf) else leaf, sweeper.call)

    def parts(run: Sweeper) -> dict[str, Mapping[str, Any]]:
        sweep = run.steered(False, False)
        outputs = {name: flat(sweep.outputs)[output.jax] for name, output in run.outputs.items()}
        stages = {
            kind: {name: found[stage.jax] for name, stage in run.stages.items() if stage.jax in found}
            for kind, found in (("values", sweep.values), ("gradients", sweep.gradients))
        }
        return {"outputs": outputs, **stages, "weights": sweep.weight_gradients}

    before, after = parts(sweeper), parts(other)
    return {kind: movement(before[kind], after[kind]) for kind in before}


def drop_false_matches(sweeper: Sweeper, comparison: Comparison) -> Comparison:
    """Drop stages that differ only because both sides do not mean the same value.

    Such a stage disturbs the stages after it when PyTorch's value is put in its place, and only then. A stage with a
    fault does the opposite: without PyTorch's value, its error goes on.
    """
    suspicious = [name for name, difference in comparison.local.values.items() if difference.problem][:UNSWAPPED]
    for name in suspicious:
        wrong = wrong_places(comparison.local)
        if not wrong - {name}:
            break
        side, functions = sweeper.side(sweeper.steered(True, True, without=name))
        without = wrong_places(side)
        others = [(errors_of(side)[other], errors_of(comparison.local)[other]) for other in wrong - {name}]
        if without - {name} <= wrong - {name} and any(after < 0.1 * before for after, before in others):
            stages = {other: stage for other, stage in comparison.stages.items() if other != name}
            note = f"{name} and {comparison.stages[name].jax} are not the same value, although their places suggest it"
            local = side._replace(
                values={other: difference for other, difference in side.values.items() if other != name},
                gradients={other: difference for other, difference in side.gradients.items() if other != name},
            )
            inherited = comparison.inherited._replace(
                values={other: value for other, value in comparison.inherited.values.items() if other != name},
                gradients={other: value for other, value in comparison.inherited.gradients.items() if other != name},
            )
            del sweeper.stages[name]
            comparison = comparison._replace(
                stages=stages, local=local, inherited=inherited, functions=functions, notes=(*comparison.notes, note)
            )
    return comparison


def errors_of(side: Side) -> dict[str, float]:
    """Return how far the stages and outputs are apart."""
    values = {name: difference.error for name, difference in side.values.items()}
    return values | {f"output {name}": difference.error for name, difference in side.outputs.items()}


def wrong_places(side: Side) -> set[str]:
    """Return the stages and outputs whose values differ."""
    values = {name for name, difference in side.values.items() if difference.problem}
    return values | {f"output {name}" for name, difference in side.outputs.items() if difference.problem}


def sharpen(comparison: Comparison, name: str) -> str:
    """Return the first function in front of a wrong stage whose value is wrong, or the stage if there is none.

    Only functions after the last stage that agrees are asked: what they compute starts from PyTorch's own values.
    """
    order = list(comparison.order)
    end = order.index(name)
    stages = [order.index(other) for other in comparison.stages if other in order and order.index(other) < end]
    start = max(stages, default=-1)
    for function in order[start + 1 : end + 1]:
        if function in comparison.functions and comparison.functions[function].problem:
            return function
    return name


def has_problem(part: Mapping[str, Difference]) -> bool:
    """Return whether one of the values differs."""
    return any(difference.problem for difference in part.values())


def match_stages(case: Case, reference: TorchCapture, traced: Traced) -> dict[str, Stage]:
    """Return the values that both sides have, by PyTorch's names, in the order of its run."""
    shapes = {name: tuple(array.shape) for name, array in reference.values.items()}
    modules = {name for name, _ in case.module.named_modules(remove_duplicate=False)}
    found = match(
        torch_stages(reference.kinds, shapes, modules),
        jax_stages(traced.taps),
        find_owners(case.weight_map),
        case.pair.stages,
        case.channels_last,
    )
    stages = {}
    for name, shape in shapes.items():
        if name and name in found and traced.taps[found[name].jax].steered:
            info = traced.taps[found[name].jax]
            way = carry(shape, tuple(info.shape), case.channels_last)
            if way is not None:
                stages[name] = Stage(info.name, reference.kinds[name], shape, way, found[name].sure)
    return stages


def find_owners(weight_map: WeightMap) -> dict[str, str]:
    """Return the JAX module that holds the weights of each of PyTorch's modules, where it is one."""
    owners: dict[str, set[str]] = {}
    for entry in weight_map.entries:
        for name in entry.torch:
            owners.setdefault(name.rpartition(".")[0], set()).update(map(module_of, entry.jax))
    return {name: paths.pop() for name, paths in owners.items() if len(paths) == 1}


def module_of(path: str) -> str:
    """Return the path of the module of a leaf; Haiku's norms keep their statistics in modules of their own."""
    return re.sub("/~/(mean|var)_ema$", "", path.rpartition("/")[0])

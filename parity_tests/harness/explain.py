"""Both sides compared on one batch, and why they differ.

Rounding, or a choice between two right values, is taken back with a note. Of every other difference, the operation is
found in which it is born.
"""

import copy
import itertools
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any, NamedTuple

import jax
import numpy as np
import torch
from jax import numpy as jnp

from parity_tests.harness.capture import (
    MASK,
    STAGE_BOUND,
    Case,
    Comparison,
    Cut,
    Difference,
    Limits,
    Origin,
    Side,
    Sweeper,
    any_problem,
    carried,
    describe_cuts,
    difference,
    exact_arithmetic,
    excuse,
    excuse_side,
    has_problem,
    objective,
    tables_of,
    take,
)
from parity_tests.harness.compare import (
    Refused,
    add_note,
    describe,
    flat,
    largest,
    map_leaves,
    order_between,
    relative_error,
    shorten,
)
from parity_tests.harness.pair import (
    draw_like,
    is_array,
)
from parity_tests.harness.stages import (
    candidates,
)
from parity_tests.harness.taps import (
    TINY,
    TINY_CONSTANTS,
    make_sweep,
    values_inside,
)
from parity_tests.harness.torch_side import (
    ACTIVATIONS,
    EPSILONS,
    FIRST,
    Otherwise,
    Rounded,
    TorchCapture,
    WithoutDropout,
    WithoutThreshold,
    calls_in,
    detached,
    fixed_settings,
    reference_error,
)

NUDGE_FACTOR = (
    50.0  # JAX may be this many times as far off as PyTorch is from itself when its arguments change by an ULP
)
WIDEST = 1e-7  # and no further, however badly conditioned the network is
TINY_FACTOR = 4.0  # JAX may be this many times as far off as half of its tiny constants puts it: all, and twice that
OWN_FACTOR = 8.0  # JAX may be this many times as far off as float32 inside the reference puts the reference itself
LARGEST_OWN_ERROR = 1e-4  # a larger difference is not float32's rounding
KINK = 1e-9  # how far a bias of 0 moves, to get beside the kink of an activation
EQUAL = 1e-9  # relative: values of both sides that differ less are one value, whatever a model amplified on the way
ONE_SIDED = 1e-6  # relative: gradients that differ less are those of the same side of a kink
MOST_OF_TWO = 44  # values of JAX's that are tried for either of two arguments of one operation
MOST_ARGUMENTS = 3  # of such an operation, as of an attention
MOST_INSTEAD = 64  # values that are tried in the place of one
UNSWAPPED = 12  # suspicious stages that are tried without PyTorch's value
MUCH_BETTER = 1e-3  # of an error: less may be chance


def compare_batches(case: Case) -> list[Comparison]:
    """Compare both sides on a batch of each size, in each mode. A further call returns the same comparisons."""
    if "comparisons" not in case.shared:
        first, *others = case.sizes
        comparisons = []
        for training in case.modes:
            comparisons.append(compare_sides(case, first, training))
            comparisons += [compare_smaller(case, size, training) for size in others]
        case.shared["comparisons"] = comparisons
    return case.shared["comparisons"]


def compare_smaller(case: Case, size: int, training: bool) -> Comparison:
    """Compare both sides on a further batch, with smaller inputs if both sides take them."""
    if case.cuts:
        try:
            return compare_sides(case, size, training, case.cuts)
        except Refused as refused:
            sizes = describe_cuts(case.cuts).removeprefix(", ")
            add_note(case.notes, f"JAX does not take inputs of another size, {sizes}, which PyTorch takes: {refused}")
    return compare_sides(case, size, training)


def compare_sides(case: Case, size: int, training: bool, cuts: tuple[Cut, ...] = ()) -> Comparison:
    """Run both sides on one batch and compare all that they compute, for further batch sizes only from end to end.

    Where such a batch shows a difference, its stages are compared too.

    Raises:
        Refused: JAX does not run on inputs with these cuts, or gives NaN.
    """
    case.progress(f"batch of {size}" + (" in training mode" if training else ""))
    first = size == case.sizes[0]
    sweeper = Sweeper(case, size, training, verify=first, inside=first, cuts=cuts)
    whole = sweeper.steered(False, False)
    if cuts and any(not np.size(leaf) or np.isnan(leaf).any() for leaf in flat(whole.outputs).values()):
        raise Refused("it gives NaN, or no values")
    inherited, _ = sweeper.side(whole)
    if not first and not any_problem(inherited):
        return Comparison(size, training, {}, inherited, inherited, (), {}, (), cuts=cuts)
    idle = sweeper.idle(whole)
    if not first:
        sweeper = Sweeper(case, size, training, verify=False, cuts=cuts)
        inherited, _ = sweeper.side(sweeper.steered(False, False))
    local, functions = sweeper.side(sweeper.steered(True, True))
    notes = (*sweeper.reference.notes, *sweeper.traced.notes)
    order = tuple(sweeper.reference.values)
    unseen = {name: why for name, why in sweeper.operations.items() if name not in {**sweeper.stages, **functions}}
    sources = sweeper.reference.sources
    comparison = Comparison(
        size, training, sweeper.stages, inherited, local, order, functions, notes, unseen, sources, cuts=cuts
    )
    if not any_problem(inherited, local):
        return comparison
    comparison = exchange_names(sweeper, excuse_rounding(sweeper, comparison))
    moved = find_moved(sweeper, comparison)
    comparison = comparison if moved else exchange_operations(sweeper, comparison)
    comparison = follow_functions(sweeper, drop_false_matches(sweeper, comparison))
    comparison = comparison if moved else exchange_unseen(sweeper, comparison)
    comparison = tell_once(sweeper, comparison._replace(idle=idle), moved)
    try:
        comparison = find_causes(sweeper, comparison)
        return comparison._replace(origins={**find_origins(sweeper, comparison), **comparison.origins})
    except Exception as error:  # an operation may not run on its own, and the report must not fail for a sharper place
        note = f"the places of differences are less exact: PyTorch's operations do not run alone ({describe(error)})"
        return comparison._replace(notes=(*comparison.notes, note))


def excuse_rounding(sweeper: Sweeper, comparison: Comparison) -> Comparison:
    """Take back differences that rounding explains.

    Both sides run again with every input and weight moved by one unit in the last place: where that moves a value of
    either by more than the bound allows, they may be as far apart, times a factor. And some references keep float32
    inside a float64 run, or have a gradient that is off by more than rounding: JAX may be as far off there, and after.
    """
    allowed = movement_in_torch(sweeper, move_reference(sweeper))
    in_jax = move_jax(sweeper)
    limits = {
        kind: {
            name: min(NUDGE_FACTOR * max(error, in_jax[kind].get(name, 0.0)), WIDEST) for name, error in errors.items()
        }
        for kind, errors in allowed.items()
    }
    comparison = take_back(sweeper, comparison, limits)
    comparison = excuse_noise(sweeper, comparison, [allowed["weights"], in_jax["weights"]])
    comparison = excuse_threshold(sweeper, excuse_tiny(sweeper, excuse_constants(sweeper, comparison)))
    comparison = excuse_ties(sweeper, excuse_kinks(sweeper, excuse_tables(sweeper, comparison)))
    alarms = comparison.inherited.outputs, comparison.inherited.weights  # a stage alone raises none
    small = [difference.error for part in alarms for difference in part.values() if difference.problem]
    if not small or max(small) > LARGEST_OWN_ERROR:
        return comparison
    return excuse_own_errors(sweeper, comparison)


def excuse_noise(sweeper: Sweeper, comparison: Comparison, moved: list[dict[str, float]]) -> Comparison:
    """Take back differences of gradients that a row of zeros alone shows, and that rounding makes in either side too.

    A norm turns a channel that is the same everywhere to 0 but for rounding, which then says which slope an activation
    has there. Later checks go on without this row.
    """
    case, pair = sweeper.case, sweeper.case.pair
    wrong = {name: difference.error for name, difference in comparison.inherited.weights.items() if difference.problem}
    is_noise = all(error <= NUDGE_FACTOR * max(one.get(name, 0.0) for one in moved) for name, error in wrong.items())
    if not wrong or not is_noise or has_problem(comparison.inherited.outputs) or callable(pair.inputs):
        return comparison
    other = copy.copy(sweeper)
    other.case = copy.copy(case)
    other.case.pair = replace(pair, inputs=partial(draw_like, pair.inputs, zeros=False))
    other.load(sweeper.seed, case.tensors)
    if has_problem(other.side(other.steered(False, False))[0].weights):
        return comparison
    case.pair = other.case.pair
    both = (comparison.inherited, comparison.local)
    everything = {name: np.inf for side in both for part in (side.gradients, side.weights) for name in part}
    limits: Limits = {"outputs": {}, "values": {}} | dict.fromkeys(("gradients", "weights"), everything)
    note = "rounding decides on gradients of a row of zeros, such as the slope of an activation: compared without it"
    return take_back(sweeper, comparison, limits)._replace(notes=(*comparison.notes, note))


def excuse_constants(sweeper: Sweeper, comparison: Comparison) -> Comparison:
    """Take back differences that the rounding of JAX's own float32 constants explains, such as a table of sines.

    JAX runs again with these constants moved by one unit in the last place of float32.
    """
    traced, rng = sweeper.traced, np.random.default_rng(sweeper.seed)
    if not traced.float32_constants or not any_problem(comparison.inherited):
        return comparison
    moved, other = {}, copy.copy(sweeper)
    with exact_arithmetic("float64"):
        for key, constant in traced.float32_constants.items():
            moved[key] = jnp.asarray(nudge_float32(np.asarray(constant), rng), constant.dtype)
        other.traced = replace(traced, moved=moved)
        other.sweep = make_sweep(other.traced, {stage.jax for stage in sweeper.stages.values()})
    note = f"JAX keeps {len(traced.float32_constants)} of its own constants in float32: judged by their rounding"
    return take_back_own(sweeper, comparison, movement_in_jax(sweeper, other), note)


def excuse_tiny(sweeper: Sweeper, comparison: Comparison) -> Comparison:
    """Take back differences that a tiny constant of JAX's explains, such as the 1e-12 in the root of Flax's WeightNorm.

    JAX runs again with half of each.
    """
    if not sweeper.traced.plan.adds_tiny() or not any_problem(comparison.inherited):
        return comparison
    other = copy.copy(sweeper)
    with exact_arithmetic("float64"):
        other.traced = replace(sweeper.traced, moved={TINY_CONSTANTS: 0.5})
        other.sweep = make_sweep(other.traced, {stage.jax for stage in sweeper.stages.values()})
    limits = {
        kind: {name: min(TINY_FACTOR * error, WIDEST) for name, error in errors.items()}
        for kind, errors in movement_in_jax(sweeper, other).items()
    }
    taken = take_back(sweeper, comparison, limits)
    if taken == comparison:
        return comparison
    note = f"JAX adds constants of {TINY:g} at most, which float32 does not see: judged by what half of them change"
    return taken._replace(notes=(*taken.notes, note))


def excuse_threshold(sweeper: Sweeper, comparison: Comparison) -> Comparison:
    """Take back differences that come from the threshold of PyTorch's softplus, which is run again without it."""
    is_used = any("softplus" in f"{name} {kind}".lower() for name, kind in sweeper.reference.kinds.items())
    if not is_used or not any_problem(comparison.inherited):
        return comparison
    case = sweeper.case
    with exact_arithmetic("float64"), WithoutThreshold():
        run = sweeper.capture(case.reference(case.tensors), case.cast(sweeper.inputs, "float64"))
    note = "PyTorch's softplus is its input above 20: judged by how far that is off"
    return take_back_own(sweeper, comparison, movement_in_torch(sweeper, run), note)


def excuse_tables(sweeper: Sweeper, comparison: Comparison) -> Comparison:
    """Take back differences that the rounding of PyTorch's own tables explains, where the port computes them itself.

    PyTorch runs again with what nothing carries to JAX moved by one unit in the last place of float32.
    """
    case, rng = sweeper.case, np.random.default_rng(sweeper.seed)
    if not case.float32_tables or not any_problem(comparison.inherited):
        return comparison
    module = case.reference({**case.tensors})
    for name, table in tables_of(module):
        if name in case.float32_tables:
            with torch.no_grad():
                table.copy_(torch.from_numpy(nudge_float32(table.numpy(), rng)))
    with exact_arithmetic("float64"):
        moved = movement_in_torch(sweeper, sweeper.capture(module, case.cast(sweeper.inputs, "float64")))
    note = f"PyTorch keeps {shorten(case.float32_tables)} in float32: judged by the rounding"
    return take_back_own(sweeper, comparison, moved, note)


def nudge_float32(array: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return the array with every value moved by one unit in the last place of float32."""
    return np.asarray(array * (1 + np.finfo(np.float32).eps * rng.choice((-1.0, 1.0), array.shape)), np.float32)


def take_back_own(sweeper: Sweeper, comparison: Comparison, errors: Limits, note: str) -> Comparison:
    """Take back differences that a rounding on one side explains, and say so if there are some."""
    limits = {
        kind: {name: min(OWN_FACTOR * error, LARGEST_OWN_ERROR) for name, error in of_kind.items()}
        for kind, of_kind in errors.items()
    }
    taken = take_back(sweeper, comparison, limits)
    return taken if taken == comparison else taken._replace(notes=(*comparison.notes, note))


def excuse_kinks(sweeper: Sweeper, comparison: Comparison) -> Comparison:
    """Take back differences of gradients at a kink where one side uses the left slope and the other the right slope.

    An activation such as leaky ReLU has two slopes at 0, and either is right. Both sides run again with every bias of 0
    a little above and a little below: there they agree, and at 0 each has one of these gradients. Other weights stay:
    a scale of 0 that moves would put some values above 0 and others below.
    """
    gradients = [part for side in (comparison.inherited, comparison.local) for part in (side.gradients, side.weights)]
    wrong = has_problem(comparison.inherited.outputs)
    if not any(map(has_problem, gradients)) or wrong or sweeper.dtype != "float64":
        return comparison
    runs = []
    for move in (0.0, KINK, -KINK):
        other = copy.copy(sweeper)
        moved = {
            name: np.where(array == 0, move, array) if name.endswith("bias") else array
            for name, array in sweeper.case.tensors.items()
        }
        other.load(sweeper.seed, moved)
        sweep = other.steered(False, False)
        if move and has_problem(other.side(sweep)[0].weights):
            return comparison
        runs.append((sweep.weight_gradients, other.reference.weight_gradients))
    differing = {name for name, difference in comparison.inherited.weights.items() if difference.problem}
    for at_0, *beside in zip(*runs, strict=True):  # others may be 0 but for rounding, which moves with everything
        moves = [movement(at_0, run) for run in beside]
        distances = [max((each[name] for name in differing & each.keys()), default=0.0) for each in moves]
        if min(distances) > ONE_SIDED:
            return comparison
    everything = {name: np.inf for part in gradients for name in part}
    comparison = take_back(
        sweeper, comparison, {"outputs": {}, "values": {}} | dict.fromkeys(("gradients", "weights"), everything)
    )
    if not differing:  # stages alone differ, which is no alarm
        return comparison
    sweeper.case.shared["kinks"] = True
    note = "an activation has two slopes where its input is exactly 0: JAX takes the one, PyTorch the other"
    return comparison._replace(notes=(*comparison.notes, note))


def excuse_ties(sweeper: Sweeper, comparison: Comparison) -> Comparison:
    """Take back differences of gradients by how a maximum along an axis shares its gradient among equal values.

    `torch.max` gives it to one of them, `jnp.max` to all. Equal are the values of a channel whose scale is 0: both
    sides run again with the scales of 0 moved. A max-pool gives it to the first value on both sides.
    """
    gradients = [part for side in (comparison.inherited, comparison.local) for part in (side.gradients, side.weights)]
    ties = any(re.search(r"(^|\.)(max|min)(#\d+)?\[0\]$", name) for name in comparison.order)
    pools = any("MaxPool" in kind for kind in sweeper.reference.kinds.values())
    wrong = has_problem(comparison.inherited.outputs) or has_problem(comparison.local.values)
    if not ties or pools or wrong or not has_problem(comparison.inherited.weights) or sweeper.dtype != "float64":
        return comparison
    other = copy.copy(sweeper)
    moved = {name: np.where(array == 0, 1.0, array) for name, array in sweeper.case.tensors.items() if array.ndim == 1}
    other.load(sweeper.seed, {**sweeper.case.tensors, **moved})
    if has_problem(other.side(other.steered(False, False))[0].weights):
        return comparison
    everything = {name: np.inf for part in gradients for name in part}
    note = "PyTorch's max gives the gradient to one of several equal values, JAX's to all: compared without equal ones"
    limits: Limits = {"outputs": {}, "values": {}} | dict.fromkeys(("gradients", "weights"), everything)
    return take_back(sweeper, comparison, limits)._replace(notes=(*comparison.notes, note))


def excuse_own_errors(sweeper: Sweeper, comparison: Comparison) -> Comparison:
    """Take back differences that come from float32 inside the reference, or from its own wrong gradient."""
    asked = any(has_problem(part) for part in (comparison.local.gradients, comparison.local.weights))
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
    note = f"PyTorch itself is no more exact than float32 in {shorten(inexact)}: judged by its own error"
    comparison = take_back(sweeper, comparison, limits)
    return comparison._replace(notes=(*comparison.notes, *([note] if inexact else [])))


def take_back(sweeper: Sweeper, comparison: Comparison, limits: Limits) -> Comparison:
    """Take back the problems of differences up to these limits, in this comparison and in further runs."""
    sweeper.limits.append(limits)
    return comparison._replace(
        inherited=excuse_side(comparison.inherited, limits),
        local=excuse_side(comparison.local, limits),
        functions=excuse(comparison.functions, limits["values"]),
    )


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
        return np.asarray(array) * (1 + np.finfo(np.float64).eps * rng.choice((-1.0, 1.0), array.shape))

    return move


def move_reference(sweeper: Sweeper) -> TorchCapture:
    """Run the reference with every float input, weight and result moved by one unit in the last place."""
    case, move = sweeper.case, nudge(sweeper)
    module = case.reference({name: move(array.astype(np.float64)) for name, array in case.tensors.items()})
    with exact_arithmetic("float64"), Rounded(sweeper.seed):
        return sweeper.capture(module, case.cast(sweeper.inputs, "float64").map(move))


def move_jax(sweeper: Sweeper) -> dict[str, dict[str, float]]:
    """Return how far JAX's values move, by PyTorch's names, with every float input and weight moved so."""
    other, move = copy.copy(sweeper), nudge(sweeper)
    with exact_arithmetic("float64"):
        other.tensors = {name: move(array) for name, array in sweeper.tensors.items()}
        other.call = jax.tree.map(lambda leaf: move(leaf) if is_array(leaf) else leaf, sweeper.call)
    return movement_in_jax(sweeper, other)


def movement_in_torch(sweeper: Sweeper, moved: TorchCapture) -> dict[str, dict[str, float]]:
    """Return how far the values of another run of the reference are from those of the first."""
    reference = sweeper.reference
    return {
        "outputs": movement(flat(reference.outputs), flat(moved.outputs)),
        "values": movement(reference.values, moved.values),
        "gradients": movement(reference.gradients, moved.gradients),
        "weights": movement(reference.weight_gradients, moved.weight_gradients),
    }


def movement_in_jax(sweeper: Sweeper, other: Sweeper) -> dict[str, dict[str, float]]:
    """Return how far the values of one run of JAX are from those of another, by PyTorch's names."""

    def parts(run: Sweeper) -> dict[str, Mapping[str, Any]]:
        sweep = run.steered(False, False)
        outputs = {name: flat(sweep.outputs)[output.jax] for name, output in run.outputs.items()}
        stages = {
            kind: {name: arrays[stage.jax] for name, stage in run.stages.items() if stage.jax in arrays}
            for kind, arrays in (("values", sweep.values), ("gradients", sweep.gradients))
        }
        return {"outputs": outputs, **stages, "weights": sweep.weight_gradients}

    before, after = parts(sweeper), parts(other)
    return {kind: movement(before[kind], after[kind]) for kind in before}


def exchange_names(sweeper: Sweeper, comparison: Comparison) -> Comparison:
    """Match two functions the other way round where JAX computes either in the place of the other, as two gathers."""
    wrong = [name for name, difference in comparison.functions.items() if difference.problem][:UNSWAPPED]
    actual = take(sweeper.steered(True, True).values, sweeper.functions) if len(wrong) > 1 else {}
    expected, exchanged = sweeper.reference.values, False
    for one, other in itertools.combinations(wrong, 2):
        if is_same(actual[one], expected[other]) and is_same(actual[other], expected[one]):
            stages, exchanged = sweeper.functions, True
            stages[one], stages[other] = (
                stages[one]._replace(jax=stages[other].jax, carry=stages[other].carry),
                stages[other]._replace(jax=stages[one].jax, carry=stages[one].carry),
            )
    if not exchanged:
        return comparison
    side, functions = sweeper.side(sweeper.steered(True, True))
    return comparison._replace(local=side, functions=functions)


def exchange_operations(sweeper: Sweeper, comparison: Comparison) -> Comparison:
    """Compare each of two operations that JAX does in the other order with what JAX does in its place.

    Otherwise what comes after both would go on with the value of the first. The fault is told of the first alone.
    """
    places = {name: number for number, name in enumerate(sweeper.traced.taps)}
    differences = {**comparison.functions, **comparison.local.values}
    wrong = [name for name in comparison.order if name in differences and differences[name].problem][:UNSWAPPED]

    def put(jax: Mapping[str, str]) -> None:
        for part in (sweeper.stages, sweeper.functions):
            part |= {name: part[name]._replace(jax=place) for name, place in jax.items() if name in part}

    for one, other in itertools.combinations(wrong, 2):
        both = {**sweeper.stages, **sweeper.functions}
        first, second = both[one], both[other]
        if places[first.jax] < places[second.jax] or (first.shape, first.carry) != (second.shape, second.carry):
            continue
        put({one: second.jax, other: first.jax})
        born = (*comparison.born, one, other)
        side, functions = sweeper.side(sweeper.steered(True, True, functions=born))
        if not wrong_places(side) - {one, other} < wrong_places(comparison.local) - {one, other}:
            put({one: first.jax, other: second.jax})
            continue
        inherited, _ = sweeper.side(sweeper.steered(False, False))
        causes = {**comparison.causes, one: f"JAX computes {other} before it"}
        comparison = comparison._replace(
            stages=dict(sweeper.stages), inherited=inherited, local=side, functions=functions, born=born, causes=causes
        )
        of_both: Limits = {
            "outputs": {},
            "values": {other: float("inf")},
            "gradients": {other: float("inf")},
            "weights": {},
        }
        comparison = take_back(sweeper, comparison, of_both)
    return comparison


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


def follow_functions(sweeper: Sweeper, comparison: Comparison) -> Comparison:
    """Let the local run go on with PyTorch's value behind each function in which a difference is born.

    The value may be used again later, as in a residual sum, where its difference would look like another one. If
    PyTorch's value disturbs what comes after, JAX's function is not the one that it was taken for. Nor is it sure to be
    if nothing there gets better and JAX does not have all operations around it: a formula may be written otherwise.
    """
    for _ in range(UNSWAPPED):
        wrong = [name for name, difference in comparison.local.values.items() if difference.problem]
        ends = [*wrong, *([""] if has_problem(comparison.local.outputs) else [])]
        tables = [name for name in tables_among(comparison) if name not in comparison.born] if ends else []
        pairs = itertools.chain(zip(tables, tables, strict=True), ((sharpen(comparison, end), end) for end in ends))
        place, end = next((pair for pair in pairs if pair[0] in comparison.functions), ("", ""))
        if not place:
            break
        side, functions = sweeper.side(sweeper.steered(True, True, functions=(*comparison.born, place)))
        before, after = errors_of(comparison.local, comparison.functions), errors_of(side, functions)
        differing = {name for name, difference in comparison.functions.items() if difference.problem} - {place}
        better = any(after[name] < MUCH_BETTER * before[name] for name in differing | wrong_places(comparison.local))
        worse = any(after[name] > 10 * before[name] for name in wrong_places(comparison.local))
        sure = (better or not (place in tables or has_gap(comparison, end))) and not worse
        if sure and wrong_places(side) <= wrong_places(comparison.local):
            comparison = comparison._replace(local=side, functions=functions, born=(*comparison.born, place))
        else:
            kept = {name: value for name, value in comparison.functions.items() if name != place}
            del sweeper.functions[place]
            comparison = comparison._replace(functions=kept, unseen={**comparison.unseen, place: ""})
    return comparison


def tables_among(comparison: Comparison) -> list[str]:
    """Return the functions whose value differs and depends on no weight and no float input, such as a mask."""
    return [
        name
        for name, difference in comparison.functions.items()
        if difference.problem and name not in comparison.sources
    ]


def exchange_unseen(sweeper: Sweeper, comparison: Comparison) -> Comparison:
    """Report a stage only once if JAX computes it after the next operation, such as a norm after a residual sum.

    JAX has no value that is taken for this operation. The stage is what PyTorch's operations make in the other order.
    """
    seen = {**sweeper.stages, **sweeper.functions}
    wrong = [name for name, value in comparison.local.values.items() if value.problem][:UNSWAPPED]
    pairs = [(name, other) for other in comparison.order for name in wrong if name in comparison.sources.get(other, ())]
    pairs = [(name, other) for name, other in pairs if other not in seen and {name, other}.isdisjoint(comparison.born)]
    if not pairs:
        return comparison
    names = set(itertools.chain(*pairs))
    calls = calls_in(sweeper.module, sweeper.case.torch_inputs(sweeper.inputs), names, training=sweeper.training)
    actual = take(sweeper.steered(True, True, functions=comparison.born).values, sweeper.stages)
    for name, other in pairs:
        if not {name, other} <= calls.keys() or sweeper.reference.values[other].shape != seen[name].shape:
            continue
        with alone(sweeper), suppress(Exception):  # as where an operation takes several values, or other shapes
            (given,) = flat(calls[name][1]).values()
            later = run_with(calls[other], sweeper.reference.values[name], given.numpy())
            if not is_same(actual[name], run_with(calls[name], given.numpy(), later)):
                continue
            sweeper.functions[other] = seen[name]
            comparison = comparison._replace(
                born=(*comparison.born, other),
                causes={**comparison.causes, name: f"JAX computes {other} before it"},
            )
    side, functions = sweeper.side(sweeper.steered(True, True, functions=comparison.born))
    moved = {name: np.inf for name in names if name in comparison.born}
    limits: Limits = {"outputs": {}, "values": moved, "gradients": moved, "weights": {}}
    return take_back(sweeper, comparison._replace(local=side, functions=functions), limits)


def run_with(call: tuple[Callable[..., Any], Any, Any], given: np.ndarray, instead: np.ndarray) -> np.ndarray:
    """Return the first value that an operation of the reference gives with another one of its arguments."""
    function, *nest = call
    tensors = {key: leaf for key, leaf in flat(nest).items() if isinstance(leaf, torch.Tensor)}
    keys = [key for key, leaf in tensors.items() if np.array_equal(leaf.numpy(), given)]
    args, kwargs = map_leaves(partial(put, keys, instead), nest)
    return next(iter(flat(function(*args, **kwargs)).values())).detach().numpy()


def find_moved(sweeper: Sweeper, comparison: Comparison) -> dict[str, str]:
    """Return the stages that JAX computes in another place of the network, as norms behind the layers, and where.

    JAX cannot compute a stage before another one from which PyTorch computes it, unless one of the two has moved.
    """
    stages = {name: stage for name, stage in sweeper.stages.items() if stage.sure}
    places, moved = {name: number for number, name in enumerate(sweeper.traced.taps)}, dict[str, str]()
    for after in [name for name, value in comparison.local.values.items() if value.problem and name in stages]:
        for before in inputs_of(comparison, after) & stages.keys():
            if places[stages[after].jax] > places[stages[before].jax]:
                continue
            if "norm" in stages[after].kind.lower() and "norm" not in stages[before].kind.lower():
                moved[after] = f"JAX computes {before} from it, PyTorch it from {before}"
            else:
                moved[before] = f"JAX computes it behind {after}, PyTorch {after} from it"
    return moved


def tell_once(sweeper: Sweeper, comparison: Comparison, moved: Mapping[str, str]) -> Comparison:
    """Take back differences that another one explains: those after a cast to 16 bits, or around a stage that moved.

    What either side computes from such a stage goes on with another value.
    """
    stages, taps, local = sweeper.stages, sweeper.traced.taps, comparison.local
    both = {**stages, **sweeper.functions}
    dtypes = {name: taps[stage.jax].dtype for name, stage in both.items()}
    narrow = {name for name, dtype in dtypes.items() if jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize < 4}
    sources = narrow | moved.keys()
    if not sources:
        return comparison

    def errors_without(free: Collection[str]) -> dict[str, float]:
        given = {*stages} - {*free}
        return errors_of(*sweeper.side(sweeper.run(lambda name: name in given, lambda name: False)))

    explained = {name for name in {*both, *local.outputs} if inputs_of(comparison, name) & sources}
    if moved:
        explained |= {name for name, stage in both.items() if not stage.sure}  # its neighbours told what it is
        before, after = errors_without(()), errors_without(moved)
        explained |= {name.removeprefix("output ") for name in before if abs(after[name] - before[name]) > EQUAL}
    rounded = "what follows from it is rounded too, and was not judged"
    limits = dict.fromkeys(explained - moved.keys(), np.inf)
    silent = {name for name in moved if name in local.values and not local.values[name].problem}
    whole = {name: comparison.inherited.values[name] for name in silent}
    local = local._replace(values=excuse({**local.values, **whole}, limits), outputs=excuse(local.outputs, limits))
    return comparison._replace(
        local=local,
        functions=excuse(comparison.functions, limits),
        born=(*comparison.born, *(limits.keys() & both.keys())),
        causes={**comparison.causes, **dict.fromkeys(narrow - explained, rounded), **moved},
    )


def inputs_of(comparison: Comparison, name: str) -> set[str]:
    """Return the nearest stages from which PyTorch computes a value."""
    seen, ends = set[str](), [name]
    while ends:
        new = set(comparison.sources.get(ends.pop(), ())) - seen
        seen |= new
        ends += new - comparison.stages.keys()
    return seen & comparison.stages.keys()


def errors_of(side: Side, functions: Mapping[str, Difference] | None = None) -> dict[str, float]:
    """Return how far the stages and outputs are apart, and these functions."""
    values = {name: difference.error for name, difference in {**side.values, **(functions or {})}.items()}
    return values | {f"output {name}": difference.error for name, difference in side.outputs.items()}


def wrong_places(side: Side) -> set[str]:
    """Return the stages and outputs whose values differ."""
    values = {name for name, difference in side.values.items() if difference.problem}
    return values | {f"output {name}" for name, difference in side.outputs.items() if difference.problem}


def sharpen(comparison: Comparison, name: str) -> str:
    """Return the first function in front of a wrong stage whose value is wrong, or the stage if there is none.

    Only functions after the last value of PyTorch's own are asked: what they compute starts from there.
    """
    before = behind_last_given(comparison, name)
    wrong = [other for other in before if other in comparison.functions and comparison.functions[other].problem]
    return wrong[0] if wrong else name


def behind_last_given(comparison: Comparison, name: str) -> list[str]:
    """Return PyTorch's values from which a stage, or the output "", is computed, from the last given values on.

    Where autograd does not know them, these are all values between the last given one and the stage.
    """
    given = {*comparison.stages, *comparison.born}
    if name in comparison.sources:
        behind, ends = set[str](), [name]
        while ends:
            new = set(comparison.sources.get(ends.pop(), ())) - given - behind
            behind |= new
            ends += new
        return [other for other in comparison.order if other in behind]
    before = list(itertools.takewhile(lambda other: other != name, comparison.order))
    last = max((number for number, other in enumerate(before) if other in given), default=-1)
    return before[last + 1 :]


def gap_before(comparison: Comparison, place: str) -> list[str]:
    """Return the operations in which a difference may be born as well, with the reason why JAX has no value of them."""
    gap: list[str] = []
    for name in behind_last_given(comparison, place):
        why = comparison.unseen.get(name)
        gap = [] if name in comparison.functions else gap if why is None else [*gap, f"{name}{why}"]
    return gap


def has_gap(comparison: Comparison, place: str) -> bool:
    """Return whether PyTorch has a value before a place, behind the last given one, that JAX has not under a name."""
    return any(name not in comparison.functions for name in behind_last_given(comparison, place))


@contextmanager
def alone(sweeper: Sweeper) -> Iterator[None]:
    """Let operations of the reference run alone as they do in the whole."""
    with exact_arithmetic("float64"), fixed_settings(torch.float64, sweeper.module), torch.no_grad(), WithoutDropout():
        yield


def find_causes(sweeper: Sweeper, comparison: Comparison) -> Comparison:
    """Return the comparison with what change of PyTorch's operations gives JAX's values where differences are born.

    Two operations that take each other's values, as a scale and a shift, are one fault.
    """
    places = [name for name, value in comparison.local.values.items() if value.problem] + list(comparison.born)
    if not places or not sweeper.case.small or not has_problem(comparison.inherited.outputs):
        return comparison
    calls = calls_in(sweeper.module, sweeper.case.torch_inputs(sweeper.inputs), places, training=sweeper.training)
    side = sweeper.steered(True, True, functions=comparison.born)
    actual = take(side.values, {**sweeper.stages, **sweeper.functions})
    places = [name for name in comparison.order if name in places and name in calls]
    with alone(sweeper):
        causes = {name: cause for name in places if (cause := cause_of(actual[name], *calls[name]))}
        causes |= comparison.causes
        values = {name: value for name, value in sweeper.reference.values.items() if value.dtype.kind == "f" and name}
        unknown = [name for name in places if name not in causes and not gap_before(comparison, name)]
        unknown = [name for name in unknown if name in values and not is_same(actual[name], values[name])]
        for name in unknown:  # parts of a value have no name
            for given in floats_in(calls[name]):
                if not any(np.array_equal(given, value) for value in values.values()):
                    values[f"what {name} takes"] = given
        instead = {name: taken for name in unknown if (taken := taken_instead(actual[name], calls[name], values))}
    wrong = {*comparison.born, *(name for name, value in comparison.local.values.items() if value.problem)}
    left_out = {name for name, (own, _) in instead.items() if users_of(comparison, own) <= wrong}
    origins = {
        name: Origin(own, f"{difference(values[other], values[own], 0.0).problem}; JAX takes {other} in its place", ())
        for name, (own, other) in instead.items()
        if name in left_out
    }
    instead = {name: both for name, both in instead.items() if name not in left_out}
    causes |= {name: f"JAX takes {other} in the place of {own}" for name, (own, other) in instead.items()}
    silent = set[str]()
    for one, other in itertools.combinations(instead, 2):
        if instead[one] == instead[other][::-1] and silent.isdisjoint({one, other}):
            causes[one] += f", and the other way round in {other}"
            silent.add(other)
    limits: Limits = {kind: {} for kind in Side._fields} | {"values": dict.fromkeys(silent, np.inf)}
    return take_back(sweeper, comparison._replace(causes=causes, origins=origins), limits)


def users_of(comparison: Comparison, name: str) -> set[str]:
    """Return the values that are computed from a value which JAX has not under a name.

    For any other name, return all values.
    """
    known = {*comparison.stages, *comparison.functions}
    if name in known or name not in comparison.order:
        return {*comparison.order}
    return {other for other in known if name in behind_last_given(comparison, other)}


def taken_instead(
    actual: np.ndarray, call: tuple[Callable[..., Any], Any, Any], values: Mapping[str, np.ndarray]
) -> tuple[str, str] | None:
    """Return which value an operation takes, and from which other one of PyTorch's it makes JAX's value; or None."""
    for given in floats_in(call):
        own = next((name for name, value in values.items() if np.array_equal(value, given)), "")
        others = [name for name, value in values.items() if value.shape == given.shape and name != own]
        for other in others[-MOST_INSTEAD:] if own else ():
            with suppress(Exception):  # as where a value is not in an operation's range
                if is_same(actual, run_with(call, given, values[other])):
                    return own, other
    return None


def floats_in(call: tuple[Callable[..., Any], Any, Any]) -> list[np.ndarray]:
    """Return the float arguments of an operation that have several values."""
    tensors = [leaf for leaf in flat(call[1:]).values() if isinstance(leaf, torch.Tensor)]
    return [leaf.numpy() for leaf in tensors if leaf.is_floating_point() and leaf.numel() > 1]


def cause_of(actual: np.ndarray, function: Callable[..., Any], args: Any, kwargs: Any) -> str:
    """Return with which eps, axis, form of GELU or mode PyTorch's operation gives JAX's value, or an empty string.

    Or which other activation does.
    """
    widths = map(float, actual.shape[1:])  # a library's first argument may be the eps, where PyTorch's is the width
    for change in (None, *EPSILONS, *widths, *range(actual.ndim)):
        with suppress(Exception), Otherwise(change) as other:  # as where an operation takes no eps of 0
            values = flat(function(*args, **kwargs)).values()
            if other.changed and any(is_same(actual, value.numpy()) for value in values):
                return f"equal with {other.changed}"
    given = floats_in((function, args, kwargs))
    for name, activation in ACTIVATIONS.items() if len(given) == 1 and given[0].shape == actual.shape else ():
        if is_same(actual, activation(torch.from_numpy(given[0])).numpy()):
            return f"equal with {name} in its place"
    return ""


def find_origins(sweeper: Sweeper, comparison: Comparison) -> dict[str, Origin]:
    """Return where a difference is born whose place is not sure, because JAX has no named value before it.

    JAX's values without a name help. Where one of them is what PyTorch has before the place, the fault is behind it;
    and where PyTorch's own operation gives JAX's value from another one, that operation is right, and the fault is
    before it.
    """
    values = sweeper.reference.values
    wrong = {name for name, difference in comparison.local.values.items() if difference.problem} | {*comparison.born}
    uses = Counter(stage for name in wrong for stage in inputs_of(comparison, name))
    several = {name for name in wrong if any(uses[stage] > 1 for stage in inputs_of(comparison, name))}
    tables = {name for name in values if name not in comparison.sources and name not in comparison.stages}
    places = [name for name in comparison.order if name in several or (name in wrong and has_gap(comparison, name))]
    shared = sorted(wrong - {*places} - comparison.causes.keys()) if tables and len(wrong) > 1 else []
    ends = [name for name, output in comparison.local.outputs.items() if output.problem and has_gap(comparison, "")]
    ends = [name for name in ends if name in values and sweeper.outputs[name].carry is not None]
    if not (places or ends or shared) or not sweeper.case.small or not has_problem(comparison.inherited.outputs):
        return {}
    calls = calls_in(
        sweeper.module, sweeper.case.torch_inputs(sweeper.inputs), set(values) - {""}, training=sweeper.training
    )
    leaves = [leaf for _, *arguments in calls.values() for leaf in flat(arguments).values() if is_array(leaf)]
    arrays = [np.asarray(leaf) for leaf in [*leaves, *values.values()]]
    sizes = {size for array in arrays for size in (array.size, without_copies(array).size)} - {1}
    given = {*sweeper.stages, *comparison.born}
    with exact_arithmetic("float64"):
        taken = sweeper.in_jax({name: values[name] for name in given if name in values})
        inner_values = values_inside(sweeper.traced, sizes, sweeper.size, taken, sweeper.tensors, sweeper.call)
    if not inner_values:
        return {}
    side = sweeper.steered(True, True, functions=comparison.born)
    actual = take(side.values, {**sweeper.stages, **sweeper.functions})
    outputs, aligned = flat(side.outputs), sweeper.outputs
    actual |= {name: carried(outputs[aligned[name].jax], aligned[name].carry) for name in ends}
    history = History(comparison, values, calls, Inside(inner_values, sweeper.case.channels_last))
    with alone(sweeper):
        traced = {name: history.trace_back(name, actual[name]) for name in [*places, *ends]}
        traced |= {name: history.trace_table(name, actual[name], tables) for name in shared}
    known = {name: origin for name, origin in traced.items() if origin is not None}
    origins = {
        name: next(other for other in known.values() if other.taken == origin.taken) if origin.taken else origin
        for name, origin in known.items()
        if origin.taken or name in ends or has_gap(comparison, name) or origin.place in tables
    }
    # A difference that may be born in the place of another one is told there, once.
    by_place = {origin.place: origin for origin in origins.values()}
    return {
        name: next((by_place[place] for part in origin.gap if (place := part.partition(" (")[0]) in by_place), origin)
        for name, origin in origins.items()
    }


class Inside:
    """All values of a run of JAX, with or without a name."""

    def __init__(self, values: list[np.ndarray], channels_last: bool) -> None:
        self.channels_last = channels_last
        self.by_size: dict[int, list[np.ndarray]] = {}
        self.sums: dict[int, np.ndarray] = {}
        self.shaped: dict[tuple[int, ...], list[tuple[int, np.ndarray]]] = {}
        self.order = {id(value): number for number, value in enumerate(values)}
        for value in values:
            self.by_size.setdefault(value.size, []).append(value)

    def of_shape(self, shape: tuple[int, ...]) -> list[np.ndarray]:
        """Return JAX's values that fit a shape of PyTorch's, in every layout that fits, without duplicates."""
        return [value for _, value in self.numbered(shape)]

    def nearest(self, shape: tuple[int, ...], actual: np.ndarray) -> list[np.ndarray]:
        """Return the values of a shape that JAX computes last before this one, which are likely to be of its layer."""
        fitting = self.numbered(shape)
        end = next((number for number, value in self.numbered(actual.shape) if is_same(value, actual)), 0)
        near = sorted(fitting, key=lambda pair: (pair[0] >= end, abs(end - pair[0])))[:MOST_OF_TWO]
        return [value for _, value in sorted(near, key=lambda pair: pair[0])]

    def numbered(self, shape: tuple[int, ...]) -> list[tuple[int, np.ndarray]]:
        """Return the values that fit a shape of PyTorch's, each once, with their places in the program."""
        if shape not in self.shaped:
            unique: dict[bytes, tuple[int, np.ndarray]] = {}
            for number, value in self.views(shape):
                unique.setdefault(value.tobytes(), (number, value))
            self.shaped[shape] = [*unique.values()]
        return self.shaped[shape]

    def views(self, shape: tuple[int, ...]) -> Iterator[tuple[int, np.ndarray]]:
        """Yield the values in every layout that fits a shape of PyTorch's; many are only copies of others."""
        for value in self.by_size.get(prod(shape), []):
            number = self.order[id(value)]
            for way in candidates(shape, value.shape, self.channels_last):
                yield number, np.asarray(way.to_torch(value))
            if value.ndim in (2, 3, 4) and value.shape != shape and sorted(value.shape) == sorted(shape):
                for axes in itertools.permutations(range(value.ndim)):
                    if tuple(value.shape[axis] for axis in axes) == shape:
                        yield number, value.transpose(axes)

    def of_another_size(self, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
        """Yield the values of the same batch and as many channels, but of images or sequences of another size."""
        for value in itertools.chain(*self.by_size.values()):
            if value.ndim != len(shape) or value.ndim < 3 or value.shape[0] != shape[0]:
                continue
            first = np.moveaxis(value, -1, 1)
            for array in (value, first) if value.shape[1] == shape[1] else (first,):
                if array.shape[1] == shape[1] and array.shape != shape:
                    whole = all(size in (1, other) for size, other in zip(array.shape, shape, strict=True))
                    yield np.broadcast_to(array, shape) if whole else array

    def without_copies(self, array: np.ndarray) -> Iterator[np.ndarray]:
        """Yield JAX's values that fit PyTorch's array without its repeated values, broadcast to the array's shape."""
        if (once := without_copies(array)).size < array.size:
            yield from (np.broadcast_to(value, array.shape) for value in self.of_shape(once.shape))

    def has(self, array: np.ndarray) -> bool:
        """Return whether JAX has this value of PyTorch's. The sums of the values tell most of them apart."""
        known = self.by_size.get(array.size, [])
        if array.size not in self.sums:
            self.sums[array.size] = np.array([value.sum() for value in known])
        with np.errstate(invalid="ignore"):  # as where masked values are infinite
            distance = np.abs(self.sums[array.size] - array.sum())
        is_near = (distance <= EQUAL * array.size * largest(array)).any() or not np.isfinite(distance).all()
        if is_near and any(is_same(value, array) for value in self.of_shape(array.shape)):
            return True
        return any(is_same(value, array) for value in self.without_copies(array))


def without_copies(array: np.ndarray) -> np.ndarray:
    """Return an array with the first part alone of each axis along which all parts are the same, as in a mask."""
    for axis in range(array.ndim if array.ndim > 2 else 0):
        first = array.take([0], axis)
        if array.shape[axis] > 1 and np.array_equal(np.broadcast_to(first, array.shape), array):
            array = first
    return array


def is_same(one: np.ndarray, other: np.ndarray) -> bool:
    """Return whether two values are the same but for rounding."""
    if one.shape != other.shape:
        return False
    one, other = np.clip(one, -MASK, MASK), np.clip(other, -MASK, MASK)  # masks have several constants
    limit = EQUAL * largest(other[np.abs(other) < MASK])
    if one.size and abs(one.flat[0] - other.flat[0]) > limit:  # most are told apart by their first value
        return False
    return np.allclose(one, other, rtol=0.0, atol=limit, equal_nan=True)


class History(NamedTuple):
    """How PyTorch's values came about, and what JAX has of them."""

    comparison: Comparison
    values: Mapping[str, np.ndarray]
    calls: Mapping[str, tuple[Callable[..., Any], Any, Any]]
    inside: Inside

    def trace_back(self, place: str, actual: np.ndarray) -> Origin | None:
        """Return the first operation before a place from which on JAX's values are what PyTorch makes of JAX's."""
        inmost = self.maker(self.values[place], place)  # in a module of several operations
        if inmost is not None and np.array_equal(self.values[inmost], self.values[place]) and not self.is_known(inmost):
            place = inmost
        if place not in self.calls:
            return None
        while (step := self.find_argument(place, actual)) is not None:
            argument, instead = step
            before = self.maker(argument, place)
            if before is None and (holder := self.holder(argument, place)) is not None:
                return Origin(holder, difference(instead, argument, 0.0).problem, ())
            moved = before not in self.comparison.stages and bool(order_between(instead, argument))
            if before is None:
                break
            if self.is_known(before) and not moved:  # JAX has the right value, but takes another
                if before in self.comparison.stages and is_taken(instead, self.values[before]):
                    problem = difference(actual, self.values[place], 0.0).problem
                    return Origin(
                        place, f"{problem}; JAX takes other parts of {before}, or in another order", (), before
                    )
                if (
                    before in self.comparison.stages
                    or self.has(instead)
                    or largest(instead) < EQUAL * largest(argument)
                ):
                    break  # if it is 0, JAX leaves a term of a sum out
                problem = difference(instead, argument, 0.0).problem
                return Origin(before, f"{problem}; JAX has PyTorch's value too, and goes on with this one", ())
            if (laid_out := lay_out(instead, argument, self.values[before])) is None:
                break
            place, actual = before, laid_out
        unseen = self.unseen_before(place)
        if (sooner := self.find_sooner(place, unseen) if unseen else None) is not None:
            return sooner
        problem, cause = difference(actual, self.values[place], 0.0).problem, cause_of(actual, *self.calls[place])
        problem = f"{problem}; {cause}" if problem and cause else problem
        gap = (name for name in unseen if not any(self.right_steps(name)))
        return Origin(place, problem, tuple(f"{name}{self.comparison.unseen.get(name, '')}" for name in gap))

    def trace_table(self, place: str, actual: np.ndarray, tables: Collection[str]) -> Origin | None:
        """Return where a table is made that other operations may take too, if JAX's one makes JAX's value."""
        for argument, instead, result in self.tries(place, tables):
            if is_same(result, actual) and (before := self.maker(argument, place)) is not None:
                laid_out = lay_out(instead, argument, self.values[before])
                return None if laid_out is None else self.trace_back(before, laid_out)
        return None

    def is_known(self, name: str) -> bool:
        """Return whether JAX has this value."""
        return name in self.comparison.stages or self.inside.has(self.values[name])

    def has(self, value: np.ndarray) -> bool:
        """Return whether PyTorch has this value of JAX's, in some order."""
        return any(is_alike(value, other) for other in self.values.values())

    def maker(self, array: np.ndarray, place: str) -> str | None:
        """Return the first operation before a place that gave this value, in whatever order of its axes, or None.

        It may be a part of what the operation gave.
        """
        before = itertools.takewhile(lambda name: name != place, self.comparison.order)
        larger = [name for name in before if name in self.calls and self.values[name].size >= array.size]
        same_size = [name for name in larger if self.values[name].size == array.size]
        for name in same_size:
            if np.array_equal(self.values[name], array, equal_nan=True):
                return name
        for name in same_size:
            value = self.values[name]
            alike = np.array_equal(value.max(), array.max(), equal_nan=True)
            if alike and np.array_equal(np.sort(value, axis=None), np.sort(array, axis=None), equal_nan=True):
                return name
        parts = (name for name in larger if not name.endswith(FIRST))
        return next((name for name in parts if is_taken(array, self.values[name])), None)

    def holder(self, array: np.ndarray, place: str) -> str | None:
        """Return a value before a place that holds this one, where nothing is seen inside, as in an LSTM; or None."""
        behind = behind_last_given(self.comparison, place)
        before = [name for name in behind if name not in self.calls or name.endswith(FIRST)]
        return next((name for name in before if np.isin(array, self.values[name]).all()), None)

    def arguments(self, place: str) -> Iterator[tuple[list[str], np.ndarray]]:
        """Yield the float arguments of an operation, with their places; one that is given twice comes once."""
        _, *nest = self.calls[place]
        tensors = {key: leaf for key, leaf in flat(nest).items() if isinstance(leaf, torch.Tensor)}
        arrays = {key: leaf.numpy() for key, leaf in tensors.items() if leaf.is_floating_point() and leaf.numel() > 1}
        while arrays:
            array = next(iter(arrays.values()))
            keys = [key for key, other in arrays.items() if np.array_equal(other, array)]
            yield keys, array
            arrays = {key: other for key, other in arrays.items() if key not in keys}

    def tries(
        self, place: str, among: Collection[str] | None = None
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Yield an argument of an operation, a value of JAX's in its place, and what PyTorch makes of that.

        The argument is one of these values, if some are given.
        """
        if place not in self.calls:
            return
        function, *nest = self.calls[place]
        for keys, argument in self.arguments(place):
            if among is not None and self.maker(argument, place) not in among:
                continue
            inside, shape = self.inside, argument.shape
            fitting = inside.of_shape(shape), inside.without_copies(argument), inside.of_another_size(shape)
            for instead in itertools.chain(*fitting):
                if is_same(instead, argument):
                    continue
                args, kwargs = map_leaves(partial(put, keys, instead), nest)
                with suppress(Exception):  # as where a value is not in an operation's range
                    yield argument, instead, next(iter(flat(function(*args, **kwargs)).values())).detach().numpy()

    def tries_of_two(self, place: str, actual: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Yield the same as `tries`, but with two arguments replaced by JAX's values, as in a loop.

        The argument and the value that it yields are those of the argument that is made first.
        """
        known = list(self.arguments(place)) if place in self.calls else []
        makers = [self.maker(argument, place) for _, argument in known]
        positions = sorted((self.comparison.order.index(name), n) for n, name in enumerate(makers) if name is not None)
        if not 1 < len(known) <= MOST_ARGUMENTS:
            return
        function, *nest = self.calls[place]
        values = [
            [value for value in self.inside.nearest(argument.shape, actual) if not is_same(value, argument)]
            for _, argument in known
        ]
        for (_, first), (_, second) in itertools.combinations(positions, 2):
            for one, other in itertools.product(values[first], values[second]):
                instead = map_leaves(partial(put, known[first][0], one), nest)
                args, kwargs = map_leaves(partial(put, known[second][0], other), instead)
                with suppress(Exception):
                    result = next(iter(flat(function(*args, **kwargs)).values())).detach().numpy()
                    yield known[first][1], one, result

    def find_argument(self, place: str, actual: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        """Return an argument, and a value of JAX's from which the operation makes JAX's value instead; or None."""
        if len(np.unique(actual)) < 2:
            return None
        pairs = (
            (argument, instead)
            for argument, instead, result in itertools.chain(self.tries(place), self.tries_of_two(place, actual))
            if is_same(result, actual) and not is_same(instead, actual)
        )
        return next(pairs, None)

    def right_steps(self, place: str) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Yield an argument, a value of JAX's in its place, and JAX's value that PyTorch's operation makes of that."""
        for argument, instead, result in self.tries(place):
            if not is_same(result, instead) and len(np.unique(result)) > 1 and self.inside.has(result):
                yield argument, instead, result

    def unseen_before(self, place: str) -> list[str]:
        """Return the operations that a value depends on up to those whose value JAX has."""
        waiting, seen = [place], set[str]()
        while waiting:
            name = waiting.pop()
            for _, argument in self.arguments(name) if name in self.calls else ():
                before = self.maker(argument, name)
                known = before is None or self.is_known(before) or self.inside.has(argument)
                if before is not None and before not in seen and not known:
                    seen.add(before)
                    waiting.append(before)
        return [name for name in self.comparison.order if name in seen]

    def find_sooner(self, place: str, unseen: Collection[str]) -> Origin | None:
        """Return where a difference is born before a place, by an operation that is right but gets another value."""
        for name in [*unseen, place]:
            for argument, instead, result in self.right_steps(name):
                if self.has(result):
                    continue  # of another layer
                if (before := self.maker(argument, name)) is None:
                    continue
                if before in unseen and (laid_out := lay_out(instead, argument, self.values[before])) is not None:
                    return self.trace_back(before, laid_out)
                if self.has(instead):
                    return Origin(name, difference(result, self.values[name], 0.0).problem, ())
        return None


def is_taken(array: np.ndarray, value: np.ndarray) -> bool:
    """Return whether an array consists of parts of a value; a mask would be a part of everything."""
    return 2 * len(np.unique(array)) > array.size and bool(np.isin(array, value).all())


def is_alike(one: np.ndarray, other: np.ndarray) -> bool:
    """Return whether two values are the same in some order."""
    return one.size == other.size and is_same(np.sort(one, axis=None), np.sort(other, axis=None))


def lay_out(instead: np.ndarray, argument: np.ndarray, value: np.ndarray) -> np.ndarray | None:
    """Return what stands instead of an argument in the layout that the value had before it became the argument."""
    if argument.shape == value.shape and np.array_equal(argument, value, equal_nan=True):
        return instead
    if argument.size != value.size or instead.shape != argument.shape:
        return None
    for axes in itertools.permutations(range(argument.ndim)):
        if np.array_equal(argument.transpose(axes).reshape(value.shape), value, equal_nan=True):
            return instead.transpose(axes).reshape(value.shape)
    for axes in itertools.permutations(range(value.ndim)):
        if np.array_equal(value.transpose(axes).reshape(argument.shape), argument, equal_nan=True):
            return instead.reshape([value.shape[axis] for axis in axes]).transpose(np.argsort(axes))
    return None


def put(keys: Collection[str], value: np.ndarray, key: str, leaf: Any) -> Any:
    """Return a tensor with this value for the arguments with these keys, and a copy of any other."""
    return torch.from_numpy(np.array(value)) if key in keys else detached(leaf)

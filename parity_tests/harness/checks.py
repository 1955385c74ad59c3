"""The checks in the order in which they run, and `examine`, which runs them all.

Each check is one function: it takes a `Case` and yields every difference, where it is born. All but `precision`
compute in float64, where a difference is a bug. A stage alone never raises an alarm: an alarm needs a difference from
end to end, in an output, the loss, a weight's gradient, the statistics or the training; stages say where it is born.
"""

import copy
import inspect
import itertools
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import numpy as np
import scipy  # its statistics load where `initialisation` uses them: they take two seconds
import torch
from jax import numpy as jnp
from torch import nn

from parity_tests.harness import training
from parity_tests.harness.adapters import Model, has_collections, without_training
from parity_tests.harness.capture import (
    LARGEST_OF_TABLES,
    NOISE,
    Case,
    Comparison,
    Origin,
    Sweeper,
    align_outputs,
    carried,
    exact_arithmetic,
    has_problem,
    release_memory,
    to_jnp,
)
from parity_tests.harness.compare import (
    EXACT,
    NAMES_SHOWN,
    Bound,
    Divergence,
    Refused,
    add_note,
    blame,
    compare,
    dropped,
    flat,
    judge,
    largest,
    largest_error,
    map_leaves,
    note_rate,
    relative_error,
    shorten,
    without_float32,
)
from parity_tests.harness.explain import KINK, compare_batches, gap_before
from parity_tests.harness.pair import (
    Batch,
    Inputs,
    Pair,
    as_inputs,
    draw_tensors,
    jax_objective,
    tensors_of,
    torch_objective,
)
from parity_tests.harness.propose import fold_names, skeleton
from parity_tests.harness.report import header, sentences
from parity_tests.harness.runs import Arrays, BatchPair, Link, Setup, cast, link, make_optimizer, match
from parity_tests.harness.taps import compiled
from parity_tests.harness.torch_side import TorchCapture, WithoutTiny, copy_module, fixed_settings
from parity_tests.harness.weights import check_complete, expression, size_of

LOSS_BOUND = Bound(1e-12, "float64 rounding; worst seen over 20 seeds 2.0e-16 of the loss")
EPOCHS_COMPARED = 2
INITIALISATION_SEEDS, TRAJECTORY_STEPS, HANDOVER_STEPS = 20, 12, 6
FEW_SEEDS, FEW_STEPS = 6, 3  # for a large network
PARAMETERS_TRAINED = 60_000_000  # in all steps of a check: ResNet-18 takes 5 steps, and networks of 20 million 3
INITIALISATION_SAMPLE = 2_000  # values of a tensor and seed: 40,000 in all show a difference of 2 % in distribution
LARGEST_GRAM = 64  # rows of a matrix whose products are all taken
FALSE_ALARMS = 1e-4  # how often the check may fail although the distributions are the same
FLOAT32_ROUNDING = 4 * 2.0**-23  # of constants, relative to the largest
PRECISION_SEEDS = 2
DRIFT_POINTS = 40  # steps at which weights are compared, evenly spaced on a logarithmic axis

NAN = (
    "Where a norm or a root is taken of 0, or 0 is divided by, JAX's gradient is NaN, even if jnp.where then takes "
    "another value; one of the examples is all zeros"
)
COMPLEX = "JAX's weights are complex: optax takes each as one number, PyTorch as two"

Check = Callable[[Case], Iterator[Divergence]]


def parameters(case: Case) -> Iterator[Divergence]:
    """Compare names, numbers and dtypes of all tensors: nothing is missing, nothing is extra, nothing is float32."""
    weight_map = case.weight_map
    own = case.own_variables
    leaves = weight_map.leaves if own is None else case.model.leaves(own)
    paths = [path for path in leaves if path not in case.no_weights]
    gaps = check_complete(weight_map, list(tensors_of(case.module)), paths)
    counts = f"{gaps.torch_parameters:,} values in PyTorch, {gaps.jax_parameters:,} in JAX"
    names = list(weight_map.tensors)
    lost = {name: size_of(weight_map.tensors[name]) for name in gaps.torch if name in weight_map.lost}
    missing = wholes([name for name in gaps.torch if name not in lost], names, weight_map.tensors, ".") | lost
    known = [*names, *(name[: mark.start()] for name in names for mark in re.finditer(r"\.", name))]
    for name, size in missing.items():
        if callable(case.pair.weights):
            popped = f": state.pop({name!r})" if name in names else ""
            hint = f"; if the port needs none, let your function take it out of the state dict{popped}"
        else:
            key = pattern_of(name, [*missing], known)
            hint = f"; if the port needs none, declare weights={{{key!r}: unused()}}, of parity_tests.harness.weights"
        what = "a part of it" if name in lost else "it"
        yield Divergence(
            "parameters", name, f"PyTorch has it, {size}, and nothing carries {what} to JAX ({counts}){hint}"
        )
    for path, size in wholes(gaps.jax, paths, weight_map.leaves, "/").items():
        key = repr(path) if path in leaves else "the path of each leaf in it"
        hint = "" if callable(case.pair.weights) else f"; if JAX alone has it, declare weights={{{key}: unused()}}"
        yield Divergence(
            "parameters", path, f"JAX has it, {size}, and no tensor of PyTorch's fills it ({counts}){hint}"
        )
    for path in gaps.twice:
        yield Divergence("parameters", path, "two tensors of PyTorch's fill it")
    with exact_arithmetic("float64"):
        tensors = {name: array.astype(np.float64) for name, array in case.tensors.items()}
        whole = not gaps.torch and not gaps.jax
        leaves = case.model.leaves(case.variables(tensors)) if whole else weight_map.to_leaves(tensors)
    for path, leaf in leaves.items():
        if jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.dtype != jnp.float64:
            yield Divergence("parameters", path, f"it is {leaf.dtype} in JAX in a float64 run")


def wholes(missing: Sequence[str], names: Collection[str], shapes: Mapping[str, Any], separator: str) -> dict[str, str]:
    """Return the outermost modules that are missing as a whole, and the other missing tensors, with their sizes."""
    inside, gone = dict[str, list[str]](), {*missing}
    for name in missing:
        fronts = [name[: mark.start() + 1] for mark in re.finditer(re.escape(separator), name)]
        below = ({other for other in names if other.startswith(front)} for front in fronts)
        whole = (front for front, own in zip(fronts, below, strict=True) if len(own) > 1 and own <= gone)
        inside.setdefault(next(whole, name), []).append(name)
    return {
        front.removesuffix(separator): shorten(
            [f"{name.removeprefix(front)} {size_of(shapes[name])}".lstrip() for name in own]
        )
        for front, own in inside.items()
    }


def pattern_of(name: str, missing: Sequence[str], tensors: Sequence[str]) -> str:
    """Return the pattern of what is missing like this tensor, in other layers too, and of no other tensor."""
    alike = [other for other in missing if skeleton(other) == skeleton(name)]
    patterns = [pattern for pattern, _ in fold_names(alike, dict.fromkeys(tensors, ()))]
    return next(pattern for pattern in patterns if re.fullmatch(expression(pattern), name))


def transfer(case: Case) -> Iterator[Divergence]:
    """Carry weights to JAX and back: no bit may change, and none may be NaN or infinite."""
    weight_map = case.weight_map
    weights = draw_tensors(case.pair, case.seed)
    kept = tuple(entry for entry in weight_map.entries if set(entry.torch) <= weight_map.rearranges)
    there_and_back = replace(weight_map, entries=kept)
    back = there_and_back.to_torch(there_and_back.to_leaves(weights))
    if lost := sorted(weights.keys() - back.keys() - weight_map.unused):
        case.notes.append(f"transfer: not tried for {', '.join(lost)}: JAX does not hold every value")
    expected = {name: array for name, array in weights.items() if name in back}
    yield from compare("transfer", {name: np.asarray(array) for name, array in back.items()}, expected, EXACT)


def data(case: Case) -> Iterator[Divergence]:
    """Compare both pipelines' batches to the last bit; the second epoch must have another order than the first."""
    pair = case.pair
    if pair.torch_batches is None or pair.jax_batches is None:
        return
    first: list[dict[str, np.ndarray]] = []
    for epoch in range(EPOCHS_COMPARED):
        batches = itertools.zip_longest(pair.jax_batches(case.seed, epoch), pair.torch_batches(case.seed, epoch))
        for step, (actual, expected) in enumerate(batches):
            where = f"epoch {epoch}, batch {step}"
            if actual is None or expected is None:
                yield Divergence("data", where, f"{'JAX' if actual is None else 'PyTorch'} has no such batch")
                return
            divergences = list(compare("data", arrays_of(actual), arrays_of(expected), EXACT, f"{where}: {{}}"))
            if step == 0:
                first.append(arrays_of(expected))
            if divergences:
                yield from divergences
                return
    if len(first) == EPOCHS_COMPARED and not list(compare("data", first[1], first[0], EXACT)):
        yield Divergence("data", "epochs 0 and 1", "both begin with the same batch: the order is not shuffled anew")


def arrays_of(batch: Batch) -> dict[str, np.ndarray]:
    """Return the arrays of a batch by name."""
    if not isinstance(batch, Batch):
        raise Refused(f"a pipeline gives a {type(batch).__name__}: give parity_tests.harness.Batch(inputs, targets)")
    inputs = as_inputs(batch.inputs)
    named = {f"inputs{place if len(inputs.arrays()) > 1 else ''}": leaf for place, leaf in flat(inputs.args).items()}
    named |= {f"inputs.{place}": leaf for place, leaf in flat(inputs.kwargs).items()}
    named |= {f"labels{place}": leaf for place, leaf in flat(batch.targets).items() if leaf is not None}
    return {name: np.asarray(leaf) for name, leaf in named.items()}


def outputs(case: Case) -> Iterator[Divergence]:
    """Compare the final outputs, and say in which stages a difference is born."""
    seen: set[str] = set()
    for comparison in compare_batches(case):
        if not has_problem(comparison.inherited.outputs):
            continue
        idle = f"JAX's outputs do not depend on {shorten(comparison.idle)}" if comparison.idle else ""
        for place, problem in births(comparison):
            if place not in seen:
                cause = "" if seen else idle
                seen.add(place)
                text = f"{problem} {comparison.batch}"
                yield Divergence("outputs", f"{place}{comparison.mode}", text, cause)


def births(comparison: Comparison) -> Iterator[tuple[str, str]]:
    """Yield the places where a difference of the outputs is born, with what is wrong there."""
    wrong = {name: value for name, value in comparison.local.values.items() if value.problem}
    of_functions = ((name, comparison.functions.get(name)) for name in comparison.born)
    wrong |= {name: difference for name, difference in of_functions if difference is not None and difference.problem}
    origins, reported = comparison.origins, set[str]()
    for name in comparison.order:
        place = origins[name].place if name in origins and name not in comparison.causes else name
        first = in_first_call(comparison, place)
        if first in reported and first != place and comparison.causes.get(first) == comparison.causes.get(place):
            continue  # the same line of a module that is called again
        if name in wrong:
            reported.add(place)
        if name in wrong and name in comparison.causes:
            yield f"output of {name}", f"{wrong[name].problem}; {comparison.causes[name]}"
        elif name in wrong and name not in origins:
            yield f"output of {name}", f"{wrong[name].problem}{or_before(comparison, name)}"
        elif name in wrong:
            yield describe_origin(origins[name], wrong[name].problem)
    of_model = {name: difference for name, difference in comparison.local.outputs.items() if difference.problem}
    for name, difference in of_model.items():
        if name in origins:
            yield describe_origin(origins[name], difference.problem)
        else:
            yield describe_output(name), f"{difference.problem}{or_before(comparison, '')}"
    if not wrong and not of_model:
        for name, difference in comparison.inherited.outputs.items():
            if difference.problem:
                yield f"{describe_output(name)}, end to end", f"{difference.problem}; no single stage shows it"


def in_first_call(comparison: Comparison, name: str) -> str:
    """Return the name that a value has in the first call of its module; a function's values are numbered through."""
    head, bracket, place = name.partition("[")
    head, _, number = head.partition("#")
    if number and name in comparison.stages:
        return head + bracket + place
    bases = Counter(re.sub(r"#\d+$", "", base) for base in {other.partition("[")[0] for other in comparison.order})
    each, rest = divmod(bases[head], max(1, bases[head.rpartition(".")[0]]))
    if not number or rest or not each:
        return name
    call = (int(number) - 1) % each + 1
    return (head if call == 1 else f"{head}#{call}") + bracket + place


def or_before(comparison: Comparison, place: str) -> str:
    """Return what a message adds where the difference may be born before the place."""
    return or_in(gap_before(comparison, place))


def or_in(gap: Sequence[str]) -> str:
    """Return what a message adds where the difference may be born in these operations."""
    return f"; or in {shorten([*gap])} before it, where JAX has no value to compare" if gap else ""


def describe_origin(origin: Origin, problem: str) -> tuple[str, str]:
    """Return the place where a difference is born, and what is wrong there, or else what is wrong where it showed."""
    return f"output of {origin.place}", f"{origin.problem or problem}{or_in(origin.gap)}"


def describe_output(name: str) -> str:
    """Return the name of one of the network's outputs in a message."""
    return f"output {name} of the network" if name else "output of the network"


def loss(case: Case) -> Iterator[Divergence]:
    """Compare the loss of each batch size and its gradient by the outputs, both computed from PyTorch's outputs.

    Only the first size that differs is reported.
    """
    pair = case.pair
    if pair.torch_loss is None and pair.targets is None:
        return
    for size in case.sizes:
        divergences = compare_losses(case, size)
        if divergences:
            with WithoutTiny():
                again = compare_losses(case, size)
            if not again:
                add_note(case.notes, "loss: PyTorch adds 1e-12 to squared lengths; compared without it")
            divergences = again
        yield from divergences
        if divergences:  # a batch of another size would show it again
            return


def compare_losses(case: Case, size: int) -> list[Divergence]:
    """Return how the losses of a batch of this size differ, or else their gradients by the outputs."""
    pair, where = case.pair, f"loss, batch of {size}"
    batch = pair.draw_batch(case.seed, size)
    results = case.torch_outputs(as_inputs(batch.inputs))
    with exact_arithmetic("float64"), fixed_settings(torch.float64, case.module):
        leaves = map_leaves(lambda name, leaf: leaf.clone().requires_grad_() if is_real(leaf) else leaf, results)
        targets = jax.tree.map(lambda leaf: torch.from_numpy(cast(np.asarray(leaf), "float64")), batch.targets)
        expected = torch_objective(pair)(leaves, targets)
        check_loss("torch_loss", expected)
        reals = {name: leaf for name, leaf in flat(leaves).items() if is_real(leaf)}
        if not expected.requires_grad:
            raise Refused("torch_loss= does not depend on the outputs: nothing of it could be compared")
        if torch.isnan(expected):
            raise Refused("torch_loss= gives NaN: give targets= that it takes")
        grads = torch.autograd.grad(expected, list(reals.values()), allow_unused=True)
        value, actual_grads = jax_loss_of(case, batch, flat(results), size)
    if divergences := list(compare("loss", {where: value}, {where: np.asarray(expected.detach())}, LOSS_BOUND)):
        return divergences
    by_torch = {
        n: np.zeros(tuple(r.shape)) if g is None else g.numpy() for (n, r), g in zip(reals.items(), grads, strict=True)
    }
    return list(compare("loss", actual_grads, by_torch, LOSS_BOUND, f"{where}, gradient by output {{}}"))


def check_loss(name: str, value: Any) -> Any:
    """Return the value of a loss, if it is one number that gradients can go through."""
    shape = getattr(value, "shape", None)
    if shape is None or len(shape):
        what = f"a {type(value).__name__}" if shape is None else f"values of the shape {list(shape)}"
        raise Refused(f"{name}= gives {what}, and an array of one number without axes is needed")
    return value


def is_real(leaf: Any) -> bool:
    """Return whether a leaf of PyTorch's outputs is a float tensor."""
    return isinstance(leaf, torch.Tensor) and leaf.is_floating_point()


def jax_loss_of(
    case: Case, batch: Batch, results: Mapping[str, Any], size: int
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return JAX's loss of PyTorch's outputs, and its gradients by them in PyTorch's layouts."""
    call = case.cast(case.jax_inputs(as_inputs(batch.inputs)), "float64")
    tensors = {name: jnp.asarray(array, jnp.float64) for name, array in case.tensors.items()}
    shapes = jax.eval_shape(case.run(training=False), tensors, jax.tree.map(to_jnp, (call.args, call.kwargs)))
    aligned = align_outputs(results, flat(shapes), case.channels_last)
    if any(len(output.ways) > 1 for output in aligned.values()):
        aligned = Sweeper(case, size, False, verify=False, inside=False).outputs
    names = {output.jax: name for name, output in aligned.items()}
    constants = {
        output.jax: jnp.asarray(output.carry.to_jax(results[name].numpy()))
        for name, output in aligned.items()
        if output.carry is not None
    }
    reals = {name: value for name, value in constants.items() if jnp.issubdtype(value.dtype, jnp.floating)}
    targets = jax.tree.map(lambda leaf: jnp.asarray(cast(np.asarray(leaf), "float64")), batch.targets)

    def objective(reals: dict[str, jax.Array]) -> jax.Array:
        values = {**constants, **reals}
        return check_loss("jax_loss", jax_objective(case.pair)(map_leaves(lambda n, leaf: values[n], shapes), targets))

    value, grads = compiled(jax.value_and_grad(objective))(reals)
    return np.asarray(value), {names[name]: carried(grad, aligned[names[name]].carry) for name, grad in grads.items()}


def gradients(case: Case) -> Iterator[Divergence]:
    """Compare the gradient by every weight, and say at which stages a difference is born.

    Where outputs differ, gradients differ with them: only weights of layers that compute the right output are judged.
    """
    seen: set[str] = set()
    for name, paths in case.proposal.gaps.untied.items():
        problem = (
            f"JAX holds it {len(paths)} times, as {' and '.join(paths)}: each gets the gradient of its own use alone"
        )
        yield Divergence("gradients", f"gradient by {name}", problem)
    for comparison in compare_batches(case):
        if not has_problem(comparison.inherited.weights):
            continue
        wrong_outputs = has_problem(comparison.inherited.outputs)
        for place, problem in wrong_gradients(comparison, wrong_outputs):
            if place not in seen:
                seen.add(place)
                cause = padding_cause(case.module, place, problem) or (NAN if "JAX has nan" in problem else "")
                text = f"{problem} {comparison.batch}"
                yield Divergence("gradients", f"{place}{comparison.mode}", text, cause)


def padding_cause(module: nn.Module, place: str, problem: str) -> str:
    """Return why the gradient by an embedding differs in the row of its padding, or an empty string."""
    names = place.removeprefix("gradient by ").removesuffix(", end to end").rpartition(".")[0]
    padding = getattr(dict(module.named_modules()).get(names), "padding_idx", None)
    if padding is None or f" at [{padding}, " not in problem:
        return ""
    return f"PyTorch's padding_idx={padding} gives this row no gradient"


def wrong_gradients(comparison: Comparison, wrong_outputs: bool) -> Iterator[tuple[str, str]]:
    """Yield the places where a difference of the gradients is born: stages from the last one back, then weights."""
    if wrong_outputs:
        wrong = {name for name, value in comparison.local.values.items() if value.problem} | {*comparison.born}
        places = {name.partition("#")[0] for name in wrong}  # any call
        # The gradient by a module's own weights comes through the stages inside it.
        right = {
            name for name in comparison.local.values if not any(f"{place}.".startswith(f"{name}.") for place in places)
        }
        for name, difference in comparison.local.weights.items():
            if difference.problem and name.rpartition(".")[0] in right:
                yield f"gradient by {name}", difference.problem
        return
    differing = {name for name, difference in comparison.local.gradients.items() if difference.problem}
    again = {name for name in differing if (first := in_first_call(comparison, name)) != name and first in differing}
    stages = [name for name in comparison.local.gradients if name in differing - again]
    weights = [name for name, difference in comparison.local.weights.items() if difference.problem]
    reported, last_first = set[str](), [*reversed(stages)]
    for name in sorted(last_first, key=lambda name: name in comparison.local.outputs):  # a module's own name first
        if (problem := comparison.local.gradients[name].problem) not in reported:
            reported.add(problem)
            yield f"gradient by the output of {name}", problem
    for name in weights:
        yield f"gradient by {name}", comparison.local.weights[name].problem
    if not stages and not weights:
        for name, difference in comparison.inherited.weights.items():
            if difference.problem:
                yield f"gradient by {name}, end to end", difference.problem


# --- Training ---


def setup_of(case: Case) -> Setup:
    """Return what the checks of training work on: both sides with the reference's initial weights in float64."""
    pair = case.pair
    tensors = draw_tensors(pair, case.seed)
    if "kinks" in case.shared:  # where the sides may differ, and weights of 0 would train at them
        tensors = {name: np.where(array == 0, np.float32(KINK), array) for name, array in tensors.items()}
    tables = {name: case.tensors[name] for name in case.weight_map.unused & tensors.keys()}  # the port computes them
    tensors |= {name: table for name, table in tables.items() if np.array_equal(np.float32(table), tensors[name])}
    coarse = case.coarse or bool(case.float32_tables)

    def torch_loss(module: nn.Module, batch: Any) -> torch.Tensor:
        outputs = module(*batch["args"], **batch["kwargs"])
        return check_loss("torch_loss", torch_objective(pair)(outputs, batch["targets"]))

    def jax_loss(variables: Any, batch: Any, training: bool) -> tuple[jax.Array, Any]:
        inputs = Inputs(*batch["args"], **batch["kwargs"])
        results, after = model.apply(variables, inputs.unfixed(), training)
        return check_loss("jax_loss", jax_objective(pair)(results, batch["targets"])), after

    variables = case.own_variables
    if variables is None:
        with exact_arithmetic("float64"):
            variables = case.variables({name: jnp.asarray(array, jnp.float64) for name, array in tensors.items()})
    model, buffers = case.model, untrained(case, variables)
    if buffers and accepts(pair, pruned := without_training(model, buffers), variables):
        add_note(
            case.notes,
            f"training: {shorten(sorted(buffers))} not trained: a buffer in PyTorch, and a function does not tell",
        )
        model = pruned
    complete = replace(
        pair,
        torch_optimizer=pair.torch_optimizer or (lambda module: torch.optim.Adam(module.parameters(), lr=1e-3)),
    )
    return Setup(case.module, model, variables, case.weight_map, complete, torch_loss, jax_loss, coarse, tensors)


def untrained(case: Case, variables: Any) -> frozenset[str]:
    """Return the leaves of a function's one tree that are buffers in PyTorch: it does not say what is trained."""
    if case.model.library != "function" or has_collections(variables):
        return frozenset()
    buffers = buffers_of(case.module).keys()
    filled = {path for entry in case.weight_map.entries if buffers >= {*entry.torch} for path in entry.jax}
    return case.model.trainable(variables) & filled


def accepts(pair: Pair, model: Model, variables: Any) -> bool:
    """Return whether the pair's optimizer accepts the leaves that a model trains.

    An optimizer with a label for each leaf does not accept fewer leaves.
    """
    try:
        jax.eval_shape(lambda: make_optimizer(pair).init(model.params(variables)))
    except Exception:
        return False
    return True


def case_setup(case: Case) -> Setup:
    """Return the setup of a case, made once: what it compiles serves all checks of training."""
    if "setup" not in case.shared:
        case.shared["setup"] = setup_of(case)
    return case.shared["setup"]


def training_batches(case: Case, count: int, sizes: Sequence[int]) -> list[BatchPair]:
    """Return batches for both sides, JAX's first: from the pair's pipelines, or drawn in these sizes in turn.

    These have no extreme rows. In a row that is nearly constant, a norm of Flax's loses digits in the variance, and
    Adam makes more of that than of PyTorch's own rounding.
    """
    pair = case.pair
    if pair.jax_batches is not None and pair.torch_batches is not None:
        both = ((a, b) for e in itertools.count() for a, b in epoch_of(case, e))
    else:
        seeds = ((case.seed * 1009 + step, size) for step, size in enumerate(itertools.cycle(sizes)))
        drawn = (pair.draw_batch(*seed, extremes=False) for seed in seeds)
        both = ((batch, batch) for batch in drawn)
    return [(for_jax(case, a), for_torch(case, b)) for a, b in itertools.islice(both, count)]


def epoch_of(case: Case, epoch: int) -> Iterator[tuple[Batch, Batch]]:
    """Yield pairs of batches, JAX's first, from one epoch of both pipelines, until the shorter pipeline ends."""
    pair, has_batches = case.pair, False
    assert pair.jax_batches is not None
    assert pair.torch_batches is not None
    for both in zip(pair.jax_batches(case.seed, epoch), pair.torch_batches(case.seed, epoch), strict=False):
        has_batches = True
        yield both
    if not has_batches:
        raise Refused(f"jax_batches= or torch_batches= gives no batch in epoch {epoch}")


def batches_of(case: Case, steps: int) -> list[BatchPair]:
    """Return the batches of these steps, or of fewer, the more parameters the network has, but three at least.

    They have one size, if no data pipelines are given: another is one more program to compile, and its gradients are
    compared elsewhere.
    """
    parameters = sum(parameter.numel() for parameter in case.module.parameters())
    steps = max(FEW_STEPS, min(steps, PARAMETERS_TRAINED // max(parameters, 1)))
    return training_batches(case, steps * case.pair.micro_batches, case.sizes[:1])


def for_torch(case: Case, batch: Batch) -> Any:
    """Return a batch as the module takes it."""
    inputs = case.torch_inputs(as_inputs(batch.inputs))
    return {"args": inputs.args, "kwargs": inputs.kwargs, "targets": batch.targets}


def for_jax(case: Case, batch: Batch) -> Any:
    """Return a batch as the JAX model takes it."""
    inputs = case.cast(case.jax_inputs(as_inputs(batch.inputs)), "float64").fixed()
    return {"args": inputs.args, "kwargs": inputs.kwargs, "targets": batch.targets}


def tables(case: Case) -> Iterator[Divergence]:
    """Compare the tables and buffers that both sides build themselves, before any weight is carried over."""
    own = case.own_variables
    if own is not None:
        buffers = buffers_of(case.pair.new_module(case.seed))
        if random := drawn_buffers(case, buffers):
            add_note(case.notes, f"tables: not tried for {shorten(sorted(random))}: PyTorch draws them at random")
            buffers = {name: array for name, array in buffers.items() if name not in random}
        if buffers:
            paths = {p for entry in case.weight_map.entries if set(entry.torch) <= buffers.keys() for p in entry.jax}
            undrawn = case.model.variables is None and bool(paths & case.model.trainable(own))  # these are zeros
            variables = case.draw_variables(case.seed) if undrawn and case.can_draw else own
            exact = {} if isinstance(case.pair.torch_module, nn.Module) else exact_buffers(case, buffers)
            leaves = to_numpy_leaves(case, variables)
            divergences = list(compare_tables(case.weight_map, buffers, leaves, exact))
            if divergences and (of_a_batch := made_of_a_batch(case, leaves)):
                entries = tuple(entry for entry in case.weight_map.entries if of_a_batch.isdisjoint(entry.jax))
                add_note(
                    case.notes,
                    f"tables: not tried for {shorten(sorted(of_a_batch))}: JAX makes them of its first batch",
                )
                divergences = list(compare_tables(replace(case.weight_map, entries=entries), buffers, leaves, exact))
            yield from divergences


def made_of_a_batch(case: Case, leaves: Arrays) -> set[str]:
    """Return the leaves that are others if a model's `init` is given another batch, as Haiku's averages are."""
    if case.model.variables is not None or case.model.init is None or callable(case.pair.jax_init):
        return set()
    other = copy.copy(case)
    other.seed += 1
    again = to_numpy_leaves(case, other.initialise(jax.random.key(case.seed)))
    trained = case.model.trainable(case.own_variables)
    return {path for path, leaf in leaves.items() if path not in trained and not np.array_equal(leaf, again[path])}


def buffers_of(module: nn.Module) -> dict[str, np.ndarray]:
    """Return the persistent float buffers of a module by name."""
    trained = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    return {name: tensor.detach().numpy() for name, tensor in tensors_of(module).items() if name not in trained}


def drawn_buffers(case: Case, buffers: Arrays) -> set[str]:
    """Return the buffers that are others with another seed, as the frequencies of random Fourier features are."""
    again = buffers_of(case.pair.new_module(case.seed + 1))
    return {name for name, array in buffers.items() if name in again and not np.array_equal(array, again[name])}


def exact_buffers(case: Case, buffers: Arrays) -> dict[str, np.ndarray]:
    """Return the buffers of a module made in float64, but for those that are others there, such as random ones."""
    try:
        with fixed_settings(torch.float64, case.module):
            exact = buffers_of(case.pair.new_module(case.seed))
    except Exception:  # it is made in float32 alone
        return {}
    return {
        name: array
        for name, array in exact.items()
        if name in buffers and relative_error(buffers[name], array) < LARGEST_OF_TABLES
    }


def to_numpy_leaves(case: Case, variables: Any) -> dict[str, np.ndarray]:
    """Return the leaves of JAX's variables as NumPy arrays."""
    return {path: np.asarray(leaf) for path, leaf in case.model.leaves(variables).items()}


def initialisation(case: Case) -> Iterator[Divergence]:
    """Compare the distributions of both sides' initial weights over many seeds."""
    count = INITIALISATION_SEEDS if case.small else FEW_SEEDS
    seeds = [case.seed * count + offset for offset in range(count)]
    trained = {name for name, _ in case.module.named_parameters()}

    def draw_jax(seed: int) -> dict[str, np.ndarray]:
        return to_numpy_leaves(case, case.draw_variables(seed))

    draw = compare_distributions(
        case.weight_map, lambda seed: draw_tensors(case.pair, seed), draw_jax, seeds, case.notes
    )
    yield from (divergence for divergence in draw if divergence.where in trained)


def compare_distributions(
    weight_map: Any,
    draw_torch: Callable[[int], Arrays],
    draw_jax: Callable[[int], Arrays],
    seeds: Sequence[int],
    notes: list[str],
) -> Iterator[Divergence]:
    """Compare the distributions of both sides' initial weights, tensor by tensor, by statistical tests.

    The tests are Kolmogorov-Smirnov's on the shape, Welch's t on the mean and the mean square, the number of values
    beyond the other side's extremes, and Kolmogorov-Smirnov's on how even the singular values of a matrix are, which
    tells orthogonal weights from normal ones. Each may fail by chance with probability `FALSE_ALARMS` / (number of
    tests), so that the check as a whole fails by chance with probability `FALSE_ALARMS` (Bonferroni). Values that are
    the same for all seeds are constants, and compared as such.

    Args:
        weight_map: carries PyTorch's tensors to JAX's leaves.
        draw_torch: (seed) -> PyTorch's initial tensors, by name.
        draw_jax: (seed) -> JAX's initial leaves, by path.
        seeds: of the draws.
        notes: gets what was not tried.
    """
    in_torch: dict[tuple[str, str], list[np.ndarray]] = {}
    in_jax: dict[tuple[str, str], list[np.ndarray]] = {}
    evenness: dict[tuple[str, str], list[tuple[float, float]]] = {}
    links: list[Link] = []
    for seed in seeds:
        tensors, leaves = draw_torch(seed), draw_jax(seed)
        if not links:
            kept = [entry for entry in weight_map.entries if set(entry.torch) <= weight_map.rearranges]
            links = [link(entry, tensors) for entry in kept]
            if lost := {name for entry in weight_map.entries for name in entry.torch} - weight_map.rearranges:
                add_note(
                    notes, f"initialisation: not tried for {shorten(sorted(lost))}: JAX's leaf is computed from them"
                )
        for name, path, actual, (expected,) in match(links, leaves, tensors):
            stride = -(-actual.size // INITIALISATION_SAMPLE)
            in_jax.setdefault((name, path), []).append(actual.ravel()[::stride].astype(np.float64))
            in_torch.setdefault((name, path), []).append(expected.ravel()[::stride].astype(np.float64))
            if actual.ndim > 1 and actual.shape == expected.shape:
                evenness.setdefault((name, path), []).append((evenness_of(actual), evenness_of(expected)))
    level = FALSE_ALARMS / max(6 * len(in_torch), 1)
    for (name, path), draws in in_torch.items():
        problem = find_difference_of_distributions(np.stack(in_jax[name, path]), np.stack(draws), level)
        if not problem and (name, path) in evenness:
            ours, theirs = np.transpose(evenness[name, path])
            if (p_value := scipy.stats.ks_2samp(ours, theirs).pvalue) < level:
                even = "JAX's" if ours.mean() < theirs.mean() else "PyTorch's"
                problem = f"singular values differ: p = {p_value:.1e} < {level:.1e}; {even} are more even (orthogonal?)"
        if problem:
            yield Divergence("initialisation", name, problem)


def evenness_of(array: np.ndarray) -> float:
    """Return the sum of squares of a matrix's squared singular values, relative to the square of their sum.

    It is smallest where all are equal. Rounding is cut off, and of a large matrix a part has to do.
    """
    matrix = array.reshape(-1, array.shape[-1]).astype(np.float64)
    matrix = (matrix if len(matrix) < matrix.shape[1] else matrix.T)[:LARGEST_GRAM]
    gram = matrix @ matrix.T
    return round(float(np.square(gram).sum() / (np.trace(gram) ** 2 or 1.0)), 6)


def find_difference_of_distributions(actual: np.ndarray, expected: np.ndarray, level: float) -> str:
    """Return in what two samples differ, or an empty string.

    Args:
        actual: JAX's values [seed, value].
        expected: PyTorch's.
        level: a test with a p-value below it fails.
    """
    fixed = np.ptp(expected, axis=0) == 0 if len(expected) > 1 else np.full(expected.shape[1], np.ptp(expected) == 0)
    if fixed.any():
        constants, ours = expected[0, fixed], actual[:, fixed]
        if not (np.abs(ours - constants) <= FLOAT32_ROUNDING * np.abs(constants).max()).all():
            same = f"all {constants[0]:g}" if np.ptp(constants) == 0 else "constants"
            return f"PyTorch's values are {same}, JAX's go from {ours.min():.6g} to {ours.max():.6g}"
    if fixed.all():
        return ""
    actual, expected = actual[:, ~fixed].ravel(), expected[:, ~fixed].ravel()
    if np.ptp(actual) == 0:
        return f"JAX's values are all {actual[0]:g}, PyTorch's are not"
    p_values = {
        "distribution (Kolmogorov-Smirnov)": scipy.stats.ks_2samp(actual, expected).pvalue,
        "mean (Welch's t)": scipy.stats.ttest_ind(actual, expected, equal_var=False).pvalue,
        "mean square (Welch's t)": scipy.stats.ttest_ind(actual**2, expected**2, equal_var=False).pvalue,
        "largest value": probability_beyond(actual, expected),
        "smallest value": probability_beyond(-actual, -expected),
    }
    for test, p_value in p_values.items():
        if not p_value >= level:  # a NaN is a failure
            figures = [
                f"{side} has standard deviation {values.std():.3g}, from {values.min():.3g} to {values.max():.3g}"
                for side, values in (("JAX", actual), ("PyTorch", expected))
            ]
            return f"{test} differs: p = {p_value:.1e} < {level:.1e}; {'; '.join(figures)}"
    return ""


def probability_beyond(one: np.ndarray, other: np.ndarray) -> float:
    """Return how probable it is that so many values of one sample are above all of the other's, if both are alike.

    Each of the largest values of both samples together is as likely from one as from the other.
    """
    beyond = max(int((one > other.max()).sum()), int((other > one.max()).sum()))
    return float(min(1.0, 2 * 0.5**beyond))


def compare_tables(
    weight_map: Any, torch_buffers: Arrays, jax_leaves: Arrays, exact: Mapping[str, np.ndarray] | None = None
) -> Iterator[Divergence]:
    """Compare buffers that both sides build themselves, before anything is carried over.

    Args:
        weight_map: carries PyTorch's tensors to JAX's leaves.
        torch_buffers: as a new module has them.
        jax_leaves: as the port builds them.
        exact: the buffers of a module made in float64: a table of float32 may be as far from it as PyTorch's own.
    """
    truth = {name: np.asarray((exact or {}).get(name, array)) for name, array in torch_buffers.items()}
    entries = [entry for entry in weight_map.entries if set(entry.torch) <= torch_buffers.keys()]
    links = [link(entry, torch_buffers) for entry in entries]
    alike: dict[str, list[tuple[str, str]]] = {}  # by the last part of the name
    for name, path, actual, (expected, correct) in match(links, jax_leaves, torch_buffers, truth):
        if actual.shape != expected.shape:
            problem = f"it has the shape {list(actual.shape)} in JAX, and {list(expected.shape)} is expected"
        else:
            limit, source = 0.0, "both are whole numbers, or infinite"
            ours, theirs, correct = (array.astype(np.float64) for array in (actual, expected, correct))
            finite = np.isfinite(ours) & np.isfinite(theirs)
            if np.issubdtype(expected.dtype, np.floating) and np.array_equal(ours[~finite], theirs[~finite]):
                ours, theirs, correct = ours[finite], theirs[finite], correct[finite]
                limit = 4 * largest_error(theirs, correct) + FLOAT32_ROUNDING * largest(correct)
                source = "float32 rounding, and four times PyTorch's own error"
            with np.errstate(invalid="ignore"):
                problem = judge(ours, correct, limit, source)[1]
        if problem:
            alike.setdefault(name.rpartition(".")[2], []).append((name, f"{path} otherwise than PyTorch: {problem}"))
    for problems in alike.values():  # such as the running variances of all norms
        first = "JAX builds " if len(problems) == 1 else "JAX builds the first of them, "
        yield Divergence("tables", shorten([*dict.fromkeys(name for name, _ in problems)]), first + problems[0][1])


def statistics(case: Case) -> Iterator[Divergence]:
    """Compare the statistics that training mode keeps of its batches, after steps 1 and 3."""
    setup = case_setup(case)
    batches = [training_batches(drawn(case), 3, [size]) for size in case.sizes]
    yield from training.statistics(setup, batches, case.seed)


def drawn(case: Case) -> Case:
    """Return the case without its data pipelines: its batches are drawn in the sizes that are asked for."""
    other = copy.copy(case)
    other.pair = replace(case.pair, torch_batches=None, jax_batches=None)
    return other


def schedule(case: Case) -> Iterator[Divergence]:
    """Compare the learning rates as functions of the step."""
    pair = case.pair
    if pair.torch_schedule is not None and pair.jax_schedule is not None:
        with blame("torch_schedule= or jax_schedule="):
            divergences = list(
                training.schedule(pair.torch_schedule, pair.jax_schedule, pair.schedule_steps, case.notes)
            )
        case.shared["schedules differ"] = bool(divergences)
        yield from divergences


def optimizer(case: Case) -> Iterator[Divergence]:
    """Compare the optimizers alone, on the same gradients; where the schedules differ, with JAX's on both sides too."""
    setup, batch = case_setup(case), training_batches(case, 1, case.sizes)[0]
    divergences = list(training.optimizer(setup, case.seed, case.notes, batch))
    rates = case.pair.jax_schedule
    if divergences and rates is not None and case.shared.get("schedules differ"):
        alike = replace(setup, pair=replace(setup.pair, torch_schedule=partial(exact_rate, rates)))
        if not list(training.optimizer(alike, case.seed, case.notes, batch)):
            add_note(case.notes, "optimizer: compared with JAX's learning rates on both sides, because they differ")
            return
    yield from divergences


def exact_rate(schedule: Callable[[Any], Any], step: int) -> float:
    """Return a learning rate of JAX's as its optimizer has it in a float64 run."""
    with jax.enable_x64(True):
        return float(schedule(jnp.asarray(step, jnp.int64)))


def in_training_mode(case: Case) -> bool:
    """Return whether both sides train in training mode; a pair that has none to compare trains in evaluation mode."""
    return case.pair.training is not False


def trajectory(case: Case) -> Iterator[Divergence]:
    """Compare losses, weights, moments and statistics step by step in training."""
    batches = batches_of(case, TRAJECTORY_STEPS)
    if in_training_mode(case):
        yield from dropout_rates(case, batches[0][0])
    yield from training.trajectory(case_setup(case), batches, case.notes, training=in_training_mode(case))


def dropout_rates(case: Case, batch: Any) -> Iterator[Divergence]:
    """Compare the rates of dropout in training.

    Another rate is a fault if both sides drop equally often, or no rate of one side is the other's, else a remark. So
    are the rates of two layers the other way round.
    """
    rates: dict[str, list[tuple[str, float]]] = {"PyTorch": [], "JAX": []}
    token = dropped.set(rates["PyTorch"])
    try:
        module = copy_module(case.module).train()
        for part in module.modules():
            if isinstance(part, nn.RNNBase) and part.num_layers > 1:
                note_rate(part.dropout)
            elif "drop" in type(part).__name__.lower() and not isinstance(part, nn.modules.dropout._DropoutNd):
                for name in ("p", "drop_prob", "drop_rate"):
                    note_rate(getattr(part, name, 0.0))
        case.first_outputs(module)
        dropped.set(rates["JAX"])
        inputs = Inputs(*batch["args"], **batch["kwargs"]).unfixed()
        with exact_arithmetic("float64"):
            variables = case.variables({name: jnp.asarray(array, "float64") for name, array in case.tensors.items()})
            jax.eval_shape(lambda: case.model.apply(variables, inputs.map(jnp.asarray), True)[0])
    finally:
        dropped.reset(token)
    lists = {side: [rate for _, rate in named] for side, named in rates.items()}
    counts = {side: Counter(values) for side, values in lists.items()}
    others = {*(counts["PyTorch"] - counts["JAX"]), *(counts["JAX"] - counts["PyTorch"])}
    as_often = counts["PyTorch"].total() == counts["JAX"].total()
    if case.model.library in ("Haiku", "function"):  # which tell no rates
        return
    own = {name: part.p for name, part in case.module.named_modules() if isinstance(getattr(part, "p", None), float)}
    own = {name: without_float32(rate) for name, rate in own.items()}
    if not others and lists["PyTorch"] != lists["JAX"]:  # in the same order they fit, whatever stages are matched
        stages, of_jax = compare_batches(case)[0].stages, dict(rates["JAX"])
        in_jax = {name: of_jax.get(stages[name].jax, rate) for name, rate in own.items() if name in stages}
        if wrong := [name for name, rate in in_jax.items() if rate != own[name]]:
            sides = [", ".join(f"{of_side[name]:g}" for name in wrong[:NAMES_SHOWN]) for of_side in (in_jax, own)]
            text = f"the rates of dropout in training are, in this order, {sides[0]} in JAX, and {sides[1]} in PyTorch"
            yield Divergence("trajectory", f"dropout {shorten(wrong)}", text)
    if not others:
        return
    shown = {side: sorted(values if as_often else {*values}) for side, values in lists.items()}
    seen = {side: ", ".join(f"{rate:g}" for rate in values) or "none" for side, values in shown.items()}
    text = f"the rates of dropout in training are {seen['JAX']} in JAX, and {seen['PyTorch']} in PyTorch"
    if as_often or (all(lists.values()) and counts["PyTorch"].keys().isdisjoint(counts["JAX"])):
        yield Divergence(
            "trajectory", f"dropout {shorten([n for n, rate in own.items() if rate in others])}".rstrip(), text
        )
    elif counts["PyTorch"].keys() != counts["JAX"].keys():
        add_note(case.notes, f"{text}; both sides are compared at a rate of 0")


def handover(case: Case) -> Iterator[Divergence]:
    """Change the framework in mid-training, and compare with PyTorch's uninterrupted run."""
    batches = batches_of(case, HANDOVER_STEPS)
    yield from training.handover(case_setup(case), batches, case.notes, training=in_training_mode(case))


def precision(case: Case) -> Iterator[Divergence]:
    """Compare how far both sides are from float64 when they compute in training."""
    size = case.sizes[0]
    single = Sweeper(case, size, False, "float32", verify=False)
    truths: dict[int, TorchCapture] = {}

    def load(seed: int) -> TorchCapture:
        if seed not in truths:
            truths.clear()  # one set of values at a time
            tensors = draw_tensors(case.pair, seed)
            single.load(seed, tensors)
            truths[seed] = single.in_float64(tensors)
        return truths[seed]

    def run(seed: int, dtype: str) -> training.Sides:
        truth = load(seed)
        if dtype == "float64":
            return training.Sides({}, single.named(truth))
        sides = training.Sides(single.named_sweep(single.steered(False, False)), single.named(single.reference))
        if seed == case.seed:
            case.shared["float32"] = stage_errors(single.stages, sides, single.named(truth))
        return sides

    def steered(seed: int) -> dict[str, np.ndarray]:
        return single.named_sweep(single.steered(True, False, given=load(seed)))

    seeds = range(case.seed, case.seed + (PRECISION_SEEDS if case.small else 1))
    yield from training.precision(
        run, seeds, case.notes, steered=steered, setup=case_setup(case), factor=case.pair.precision_factor or 4.0
    )


def stage_errors(
    stages: Iterable[str], sides: training.Sides, truth: Mapping[str, np.ndarray]
) -> dict[str, tuple[float, float]]:
    """Return how far JAX's and PyTorch's float32 value of each stage is from the float64 one."""
    named = {stage: f"output of {stage}" for stage in stages}
    return {
        stage: (relative_error(sides.jax[name], truth[name]), relative_error(sides.torch[name], truth[name]))
        for stage, name in named.items()
        if name in truth
    }


def drift(case: Case, steps: int, **options: Any) -> dict[str, list[float]]:
    """Return how far apart the weights of both sides are in training; `options` are those of `training.drift`."""
    compared = sorted({round(step) for step in np.geomspace(1, steps, DRIFT_POINTS)})
    setup = case_setup(case)
    batches = training_batches(case, steps * setup.micro_batches, case.sizes[:1])
    curves = training.drift(setup, batches, compared, training=in_training_mode(case), **options)
    return {"steps": list[float](compared), **curves}


CHECKS: Mapping[str, Check] = {
    "parameters": parameters,
    "transfer": transfer,
    "tables": tables,
    "initialisation": initialisation,
    "data": data,
    "outputs": outputs,
    "loss": loss,
    "gradients": gradients,
    "statistics": statistics,
    "schedule": schedule,
    "optimizer": optimizer,
    "trajectory": trajectory,
    "handover": handover,
    "precision": precision,
}

TRAINING = ("transfer", "data", "outputs", "loss", "gradients", "statistics", "schedule", "optimizer")

# A check whose result would only repeat a fault of these is not run.
INHERITS: Mapping[str, Sequence[str]] = {
    "statistics": ("outputs",),
    "trajectory": TRAINING,
    "handover": (*TRAINING, "trajectory"),
    "precision": ("transfer", "data", "outputs", "gradients"),
}


@dataclass
class Result:
    """The differences that `examine` found, and how it looked for them.

    Attributes:
        pair: the name of the pair.
        seed: of the weights and the inputs.
        divergences: every difference, where it is born.
        passed: the names of the checks that found none.
        not_checked: the names of the other checks, with the reason.
        notes: remarks on how the pair was compared, such as values that could not be seen.
        weights: the map of the weights, a row for each entry.
        comparisons: both sides stage by stage, for each batch size and mode.
        header: versions, device, dtypes, and what defaults chose.
        float32: how far JAX's and PyTorch's float32 value of each stage is from float64, if `precision` ran.
        drift: distances of the weights in training, by what they are between; `steps` are the steps.
    """

    pair: str
    seed: int
    divergences: list[Divergence] = field(default_factory=list)
    passed: list[str] = field(default_factory=list)
    not_checked: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    weights: Sequence[Any] = ()
    comparisons: list[Comparison] = field(default_factory=list)
    header: dict[str, str] = field(default_factory=dict)
    float32: dict[str, tuple[float, float]] = field(default_factory=dict)
    drift: dict[str, list[float]] = field(default_factory=dict)


def examine(
    pair: Pair,
    *,
    seed: int = 0,
    steps: int = 0,
    names: Collection[str] = tuple(CHECKS),
    progress: Callable[[str], None] = lambda text: None,
) -> Result:
    """Run the checks and return all differences, each where it is born.

    Args:
        pair: what is compared.
        seed: of the weights and the inputs.
        steps: training steps of the drift; 0 leaves it out.
        names: the checks to run.
        progress: called with what begins, before it begins.

    Raises:
        Refused: the pair cannot be compared.
    """
    case = Case(pair, seed, progress)
    result = Result(pair.title(), seed, header=header(case))
    failed: list[str] = []
    for name, check in CHECKS.items():
        if name not in names:
            continue
        reason = find_obstacle(case, name, failed)
        if reason:
            result.not_checked[name] = reason
            continue
        progress(name)
        release_memory()
        divergences = list(check(case))
        result.divergences += divergences
        if divergences:
            failed.append(name)
        else:
            result.passed.append(name)
    result.weights = case.proposal.rows
    if "parameters" not in failed:
        result.comparisons = compare_batches(case) if {"outputs", "gradients"} & set(names) else []
        result.float32 = case.shared.get("float32", {})
        if steps and not (why_not_optimized(case) or why_not_trained(case)):
            progress(f"drift over {steps} steps")
            result.drift = drift(case, steps)
    result.notes = list(dict.fromkeys([*case.notes, *(note for part in result.comparisons for note in part.notes)]))
    return result


def find_obstacle(case: Case, name: str, failed: Sequence[str]) -> str:
    """Return why a check cannot be run or would only repeat another's fault, or an empty string."""
    if "parameters" in failed and name != "parameters":
        return "the map of the weights is not complete"
    for other in INHERITS.get(name, ()):
        if other in failed:
            return f"the fault that {other} found would show here too"
    pair = case.pair
    undeclared = {
        "data": pair.torch_batches is None or pair.jax_batches is None,
        "loss": pair.torch_loss is None and pair.targets is None,
        "schedule": pair.torch_schedule is None or pair.jax_schedule is None,
        "precision": pair.precision_factor is None,
    }
    if undeclared.get(name):
        return "the pair declares none"
    if name == "initialisation":
        if case.pair.jax_init is None or not case.can_draw:
            return "the pair declares no jax_init"
        if isinstance(pair.torch_module, torch.nn.Module):
            return "the PyTorch side is one module, not a function that makes one"
    if name in ("statistics", "optimizer", "trajectory", "handover", "precision") and case.holds_complex:
        return COMPLEX
    if name == "statistics" and True not in case.modes:
        return why_not_trained(case) or "the network has no running statistics"
    if name in ("optimizer", "trajectory", "handover"):
        return why_not_optimized(case) or (why_not_trained(case) if name != "optimizer" else "")
    return ""


def why_not_optimized(case: Case) -> str:
    """Return why the optimizers of both sides cannot be compared, or an empty string."""
    if not any(parameter.requires_grad for parameter in case.module.parameters()):
        return "the reference trains no parameter"
    if case.pair.torch_optimizer is None:
        return ""
    if "optimizer" not in case.shared:
        torch_optimizer = case.pair.torch_optimizer(module := copy_module(case.module))
        case.shared["optimizer"] = type(torch_optimizer)
        trained = [one for group in getattr(torch_optimizer, "param_groups", []) for one in group["params"]]
        if trained and {*map(id, trained)}.isdisjoint(map(id, module.parameters())):
            raise Refused("torch_optimizer= makes one of other parameters: take those of the module it is given")
    kind = case.shared["optimizer"]
    if not issubclass(kind, torch.optim.Optimizer):
        raise Refused(
            f"torch_optimizer= makes a {kind.__name__}, not one optimizer: give one with a group of parameters for "
            "each part of the network, and optax.multi_transform in JAX"
        )
    if case.pair.torch_step is not None:
        return ""
    closure = inspect.signature(kind.step).parameters.get("closure")
    if closure is None or closure.default is not closure.empty:
        return ""
    return f"{kind.__name__} computes the loss several times a step, and optax at other points"


def why_not_trained(case: Case) -> str:
    """Return why both sides cannot be trained alike, or an empty string."""
    if case.holds_complex:
        return COMPLEX
    if in_training_mode(case) and case.noise_in_training:
        return f"{NOISE} of both sides, or declare training=False"
    return ""


def check(pair: Pair, *names: str, seed: int = 0) -> None:
    """Compare a pair in a test of your own: `check(pair)` runs every check, `check(pair, "outputs")` one of them.

    Raises:
        AssertionError: the sides differ; the message is the report's.
        Refused: the pair cannot be compared.
    """
    unknown = set(names) - set(CHECKS)
    if unknown:
        raise ValueError(f"there is no check {', '.join(sorted(unknown))}; the checks are {', '.join(CHECKS)}")
    result = examine(pair, seed=seed, names=names or tuple(CHECKS))
    if result.divergences:
        raise AssertionError(sentences(result))

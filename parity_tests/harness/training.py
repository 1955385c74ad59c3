"""The checks of training: optimizers, steps in lockstep, a change of framework midway, statistics, schedules, float32.

A difference is an alarm only if rounding cannot explain it. Where a training amplifies rounding, the reference itself
tells by how much: it is run again with every weight and every result moved by one unit in the last place.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
import torch
from jax import numpy as jnp

from parity_tests.harness.compare import (
    UNITS_IN_THE_LAST_PLACE,
    Bound,
    Divergence,
    Wrong,
    add_note,
    compare_tensor,
    judge,
    largest,
    largest_error,
    report,
    shorten,
    slices,
    slope,
    with_counts,
)
from parity_tests.harness.runs import (
    FIELD_OF,
    SQUARES,
    Arrays,
    BatchPair,
    Gradient,
    JaxRun,
    Nest,
    Setup,
    TorchRun,
    convert,
    match,
    tensors_of,
    to_torch,
)
from parity_tests.harness.torch_side import Rounded

# Errors of weights are relative to how far the tensor has moved, all others to its largest value.
OPTIMIZER_BOUND = Bound(1e-11, "float64 rounding on the same gradients; worst seen 2e-13")
TRAJECTORY_BOUND = Bound(1e-7, "float64 rounding, amplified over the steps; worst seen 5e-8")
VALUE_BOUND = Bound(1e-10, "float64 rounding; worst seen 1e-14")
FLOAT32_ROUNDING = 4 * 2.0**-23
MOSTLY_ROUNDING = 1e-5  # a tensor of whose step a larger part is rounding says nothing of the others
NOISE_FACTOR = 8.0  # how many times the reference's own change, when its weights move by rounding, is rounding
# The most such runs, in a case of doubt: Adam divides a gradient of nearly 0 by its size, and by chance a run hardly
# changes it. In ResNet-18 (5 seeds) a weight of JAX's differed by up to 48 times its change in two runs, 6.5 in four.
MOST_NUDGES = 6
CERTAIN = 1e3  # a difference that many times as large as the reference's own change is none, whatever more runs show
ONLY_ROUNDING = 1e-12  # gradients this small, relative to the largest one of the network, are terms that cancel

OPTIMIZER_STEPS = 5
LATER_STEP = 7
SCALES = tuple(2.0**-power for power in (33, 27, 13, 0))  # 1e-10 to 1: around Adam's eps, and far from it
STATISTICS_STEPS = (1, 3)

# --- What differs ---


def differences(jax_run: JaxRun, torch_run: TorchRun, bound: Bound) -> list[Wrong]:
    """Compare counters, moments, statistics and weights of two runs that started from the same setup."""
    setup, skipped, wrong = jax_run.setup, only_rounding(jax_run, torch_run), list[Wrong]()
    start, in_jax = torch_run.start, jax_run.moments()
    for kind, named in torch_run.moments().items():
        if unit := units_of(setup).get(kind):
            for name, path, actual, values in match(setup.links, in_jax.get(FIELD_OF[kind], {}), named, start):
                if (name, path) not in skipped:
                    actual = actual if unit == 1 else actual / unit
                    wrong += compare_tensor(kind, name, actual, values, bound)
    wrong += compare_weights(jax_run, torch_run, bound)
    return with_counts(wrong, jax_run.count(), torch_run.count())


def compare_weights(jax_run: JaxRun, torch_run: TorchRun, bound: Bound) -> list[Wrong]:
    """Compare statistics and weights of two runs that started from the same setup."""
    setup, skipped, wrong = jax_run.setup, only_rounding(jax_run, torch_run), list[Wrong]()
    sides = tensors_of(torch_run.module), torch_run.start
    for name, path, actual, values in match(setup.links, jax_run.leaves(), *sides):
        if (name, path) not in skipped and path not in setup.held[1] and name not in reported_statistics(setup):
            wrong += compare_tensor("weights" if path in jax_run.names else "statistics", name, actual, values, bound)
    return wrong


def reported_statistics(setup: Setup) -> set[str]:
    """Return the names of the statistics that the check of them reported: they are not reported again."""
    names: set[str] = setup.kept.get("statistics", set())
    return names


def compare_losses(actual: Sequence[float], expected: Sequence[float]) -> Iterator[Wrong]:
    """Compare the losses of one step."""
    for ours, theirs in zip(actual, expected, strict=True):
        error = abs(ours - theirs)
        if not error <= VALUE_BOUND.limit * abs(theirs) + UNITS_IN_THE_LAST_PLACE:
            factor = f", JAX / PyTorch = {ours / theirs:.6g}" if theirs else ""
            problem = f"JAX {ours:.9g}, PyTorch {theirs:.9g}{factor} (bound: {VALUE_BOUND.source})"
            yield Wrong("loss", "", error, problem)


def compare_torch_runs(actual: TorchRun, expected: TorchRun) -> list[Wrong]:
    """Compare two runs of the reference; the first one was in JAX for a while."""
    buffers = {name for name, _ in expected.module.named_buffers(remove_duplicate=False)}
    start, ours, moments, wrong = expected.start, tensors_of(actual.module), actual.moments(), list[Wrong]()
    for name, values in tensors_of(expected.module).items():
        if name in reported_statistics(expected.setup):
            continue
        part = "statistics" if name in buffers else "weights"
        wrong += compare_tensor(part, name, ours[name], (values, start[name]), TRAJECTORY_BOUND)
    for kind, named in expected.moments().items():
        for name, values in named.items():
            wrong += compare_tensor(kind, name, moments[kind][name], (values, start[name]), TRAJECTORY_BOUND)
    return with_counts(wrong, actual.count(), expected.count())


def only_rounding(jax_run: JaxRun, torch_run: TorchRun) -> set[tuple[str, str]]:
    """Return names and paths whose gradients were rounding alone on both sides, such as those by a key's bias.

    Adam and Lion turn them into steps as large as any other.
    """
    in_torch, in_jax = torch_run.gradient_sizes, dict(zip(jax_run.names, jax_run.gradient_sizes, strict=True))
    threshold = ONLY_ROUNDING * max(in_torch.values(), default=0.0)
    return {
        (name, path)
        for entry in jax_run.setup.weight_map.entries
        for name in entry.torch
        for path in entry.jax
        if in_torch.get(name, np.inf) < threshold and in_torch.get(name, 0) + in_jax.get(path, 0) > 0
        if in_jax.get(path, np.inf) < threshold
    }


# --- Optimizers alone ---


def given_gradients(setup: Setup, *seed: int, step: int) -> list[Gradient]:
    """Return functions that draw the gradient by a tensor, one for each micro-batch of a step.

    The values are whole numbers, multiples of all numbers up to that of micro-batches, times powers of two: their mean
    is exact even in float32, in which optax accumulates. Every fourth step has entries of one scale, the others
    entries of all scales.
    """
    shapes = setup.weight_map.tensors
    multiple = int(np.lcm.reduce(np.arange(1, setup.micro_batches + 1)))

    def draw(name: str, micro: int) -> np.ndarray:
        code = (*seed, step, *name.encode())
        rng, scale_rng = np.random.default_rng((*code, micro)), np.random.default_rng(code)
        size = min(int(np.prod(shapes[name])), 99_991)  # a prime number, so that rows of large tensors differ
        scales = scale_rng.choice(SCALES, size) if step % 4 else SCALES[step // 4 % len(SCALES)]
        block = rng.integers(-63, 64, size) * (multiple / 64) * scales
        return np.resize(block, shapes[name])

    return [partial(draw, micro=micro) for micro in range(setup.micro_batches)]


def optimizer(setup: Setup, seed: int, notes: list[str], batch: BatchPair | None = None) -> Iterator[Divergence]:
    """Compare the optimizers alone, on the same gradients, from the start and from a later state.

    Args:
        setup: what is compared.
        seed: of the gradients.
        notes: gets what was not tried.
        batch: tells which leaves JAX freezes with `stop_gradient`; needed only where PyTorch freezes parameters.
    """
    divergences = retry(lambda: compare_optimizers(setup, seed, notes, batch), setup, notes)
    setup.kept["differs"] = "the optimizers" if divergences else ""
    yield from divergences


def compare_optimizers(setup: Setup, seed: int, notes: list[str], batch: BatchPair | None) -> Iterator[Divergence]:
    """Compare the optimizers alone, as `optimizer` does."""
    begin(setup, notes)
    weights = away_from_constants(setup, seed)
    torch_run, jax_run = TorchRun(setup, weights=weights), JaxRun(setup, weights=weights)
    trained = {name for name, parameter in torch_run.parameters.items() if parameter.requires_grad}
    frozen = {path for entry in setup.weight_map.entries if not trained & set(entry.torch) for path in entry.jax}
    if batch is not None and frozen & set(jax_run.names) - setup.held[1]:
        jax_run.silent = jax_run.find_stopped(batch[0]) & frozen
    for phase, label in enumerate(("from the start", f"from step {LATER_STEP}")):
        if phase and not begin_later(setup, seed, jax_run, torch_run, notes):
            return
        for step in range(1, OPTIMIZER_STEPS + 1):
            gradients = given_gradients(setup, seed, phase, step=step)
            torch_run.apply_gradients(gradients)
            jax_run.apply_gradients(gradients)
            if wrong := differences(jax_run, torch_run, OPTIMIZER_BOUND):
                yield from report("optimizer", f"{label}, step {step}, {{}}", wrong)
                return


def away_from_constants(setup: Setup, seed: int) -> Arrays:
    """Return values for the parameters that are constant, as a bias of zeros, on which no decay would show."""
    start = setup.start
    return {
        name: np.random.default_rng((seed, *name.encode())).uniform(0.5, 1.5, start[name].shape)
        for name, _ in setup.module.named_parameters()
        if not start[name].size or np.ptp(start[name]) == 0
    }


def begin_later(setup: Setup, seed: int, jax_run: JaxRun, torch_run: TorchRun, notes: list[str]) -> bool:
    """Give both optimizers the same moments, drawn at random, as of a later step; return whether that is possible."""
    if reason := why_not_carried(setup, jax_run, torch_run):
        add_note(notes, f"optimizer: not tried from a later state: {reason}")
        return False

    def draw(kind: str, name: str) -> np.ndarray | None:
        if name not in torch_run.moments()[kind]:
            return None
        values = np.random.default_rng((seed, *kind.encode(), *name.encode())).uniform(0.25, 1, shapes[name])
        return 4 * values if kind in SQUARES else values - 0.6  # no mean of squares is below the square of the mean

    shapes = setup.weight_map.tensors
    for run in (torch_run, jax_run):
        run.load(torch_run.start)
        for kind in torch_run.moments():
            run.load_moments(kind, partial(draw, kind))
        run.set_count(LATER_STEP)
    return True


def why_not_carried(setup: Setup, jax_run: JaxRun, torch_run: TorchRun) -> str:
    """Return why moments cannot be carried from one side to the other, or an empty string."""
    kinds, fields = set(torch_run.moments()), set(jax_run.moments())
    unknown = torch_run.unknown() | jax_run.unknown | (kinds - units_of(setup).keys())
    unknown |= fields - {FIELD_OF[kind] for kind in kinds}
    if unknown:
        return f"what the optimizers keep is not known on both sides ({', '.join(sorted(unknown))})"
    return "the schedule of PyTorch's own step counts by itself" if torch_run.has_scheduler() else ""


def begin(setup: Setup, notes: list[str]) -> None:
    """Measure the units of moments before other runs take memory, and say which tensors are not trained."""
    names, paths = setup.held
    if names:
        add_note(
            notes,
            f"training: not tried for {shorten(sorted(names))}: {shorten(sorted(paths))} in JAX is computed from them "
            "(two biases added, for example), and an optimizer treats one tensor otherwise than two",
        )
    units_of(setup)


def units_of(setup: Setup) -> dict[str, float]:
    """Return the kinds of moments that both sides keep, and the size of JAX's in PyTorch's.

    optax's RMSprop, for example, keeps momentum times the learning rate.
    """
    if "units" not in setup.kept:
        setup.kept["units"] = measure_units(setup)
    units: dict[str, float] = setup.kept["units"]
    return units


def measure_units(setup: Setup) -> dict[str, float]:
    """Take two steps on the same gradients; where the weights agree, return the ratio of both sides' moments.

    A part of each tensor is enough, because the moments are compared as a whole later.
    """
    torch_run, jax_run = TorchRun(setup), JaxRun(setup)
    units: dict[str, float] = {}
    for step in (1, 2):
        gradients = given_gradients(setup, step=step)
        torch_run.apply_gradients(gradients)
        jax_run.apply_gradients(gradients)
        in_torch, in_jax = torch_run.moments(), jax_run.moments()
        if compare_weights(jax_run, torch_run, OPTIMIZER_BOUND):
            return {kind: 1.0 for kind in in_torch if FIELD_OF[kind] in in_jax}
        for kind in in_torch if step == 1 else list(units):
            matched = match(setup.links, in_jax.get(FIELD_OF[kind], {}), in_torch[kind])
            parts = [(actual, expected, next(slices(expected))) for _, _, actual, (expected,) in matched]
            unit = measure_ratio([(actual[part], expected[part]) for actual, expected, part in parts])
            if unit is None or abs(units.setdefault(kind, unit) - unit) > 1e-9 * abs(unit):
                units.pop(kind, None)
        del in_jax  # JAX's next step could not reuse the memory of what has a view
    return units


def measure_ratio(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> float | None:
    """Return c if all JAX's arrays are c times PyTorch's, exactly 1 if they are equal; None if neither."""
    square = sum(float(np.vdot(expected, expected)) for _, expected in pairs)
    if not square:
        return 1.0 if pairs else None
    factor = sum(float(np.vdot(expected, actual)) for actual, expected in pairs) / square
    factor = 1.0 if abs(factor - 1) < 1e-9 else factor
    errors = sum(float(np.square(actual - factor * expected).sum()) for actual, expected in pairs)
    return factor if factor and errors <= 1e-18 * factor**2 * square else None


@contextmanager
def clipping_without_epsilon() -> Iterator[None]:
    """Let `clip_grad_norm_` divide by the norm itself. It adds 1e-6 to it, and optax does not."""
    module = torch.nn.utils.clip_grad
    original = module._clip_grads_with_norm_

    def clip(parameters: Any, max_norm: float, total_norm: torch.Tensor, foreach: bool | None = None) -> None:
        original(parameters, max_norm, total_norm - 1e-6, foreach)

    module._clip_grads_with_norm_ = clip
    try:
        yield
    finally:
        module._clip_grads_with_norm_ = original


def retry(check: Callable[[], Iterator[Divergence]], setup: Setup, notes: list[str]) -> list[Divergence]:
    """Run a check; if it fails and the user's step may clip by norm, again without the 1e-6 that PyTorch adds.

    The run that finds fewer differences counts: the other one adds those of the 1e-6 to a fault.
    """
    divergences = list(check())
    if divergences and setup.pair.torch_step is not None:
        with clipping_without_epsilon():
            again = list(check())
        if count_parts(again) < count_parts(divergences):
            add_note(notes, "clipping: PyTorch's clip_grad_norm_ adds 1e-6 to the norm; compared without it")
            return again
    return divergences


def count_parts(divergences: Sequence[Divergence]) -> int:
    """Return how many parts of the training differ, with those that a message reports as consequences."""
    return sum(1 + each.cause.count(" with it") for each in divergences)


def is_inherited(check: str, setup: Setup, notes: list[str]) -> bool:
    """Return whether an earlier check of this setup found a difference that this one would only repeat, and note it."""
    if differs := setup.kept.get("differs", ""):
        add_note(notes, f"{check}: not tried, because {differs} differ")
    return bool(differs)


# --- Training ---


def groups_of(setup: Setup, batches: Sequence[BatchPair]) -> list[Sequence[BatchPair]]:
    """Split batches into those of one step each."""
    size = setup.micro_batches
    return [batches[begin : begin + size] for begin in range(0, len(batches) - size + 1, size)]


def jax_batches(group: Sequence[BatchPair]) -> list[Nest]:
    """Return JAX's batches."""
    return [batch for batch, _ in group]


def torch_batches(group: Sequence[BatchPair]) -> list[Nest]:
    """Return PyTorch's batches."""
    return [batch for _, batch in group]


def trajectory(
    setup: Setup, batches: Sequence[BatchPair], notes: list[str], *, training: bool = False
) -> Iterator[Divergence]:
    """Compare losses, moments, statistics and weights in training; stop at the first step where they differ."""
    if not is_inherited("trajectory", setup, notes):
        divergences = retry(lambda: compare_trajectories(setup, batches, notes, training), setup, notes)
        setup.kept["differs"] = "the trajectories" if divergences else ""
        yield from divergences


def compare_trajectories(
    setup: Setup, batches: Sequence[BatchPair], notes: list[str], training: bool
) -> Iterator[Divergence]:
    """Compare both sides in training, as `trajectory` does."""
    begin(setup, notes)
    torch_run, jax_run = TorchRun(setup, training=training), JaxRun(setup, training=training)
    for step, group in enumerate(groups_of(setup, batches), start=1):
        losses = torch_run.step(torch_batches(group))
        wrong = [*compare_losses(jax_run.step(jax_batches(group)), losses)]
        wrong += differences(jax_run, torch_run, TRAJECTORY_BOUND)
        if small := only_rounding(jax_run, torch_run):
            names = sorted({name for name, _ in small})
            add_note(notes, f"trajectory: not tried for {shorten(names)}: the gradient is 0 but for rounding")
        if wrong:
            unit = jax_run.rounding()
            del jax_run, torch_run  # their memory is needed
            used = batches[: step * setup.micro_batches]
            wrong = above_noise(wrong, setup, used, notes, training, unit)
            yield from report("trajectory", f"step {step}, {{}}", wrong)
            return


def above_noise(
    wrong: Sequence[Wrong], setup: Setup, batches: Sequence[BatchPair], notes: list[str], training: bool, unit: float
) -> list[Wrong]:
    """Return the differences that are larger than what rounding makes of the reference's own training."""
    if not wrong:
        return []
    kept: list[Wrong] = []
    for noise in measure_noise(setup, torch_batches(batches), training, unit):
        kept = [item for item in wrong if not item.error <= NOISE_FACTOR * noise.get((item.part, item.name), 0.0)]
        if all(item.part == "step count" for item in kept):
            step = len(batches) // setup.micro_batches
            names = shorten(sorted({item.name or item.part for item in wrong}))
            add_note(
                notes,
                f"training: not tried beyond step {step}: if its weights move by rounding ({unit:.0e}), PyTorch's own "
                f"{names} changes as much as the two sides differ",
            )
            return []
        values = [item for item in kept if item.part != "step count"]
        if any(not item.error <= CERTAIN * noise.get((item.part, item.name), 0.0) for item in values):
            break
    return kept


def measure_noise(
    setup: Setup, batches: Sequence[Nest], training: bool, unit: float
) -> Iterator[dict[tuple[str, str], float]]:
    """Yield how much PyTorch's own state changes, by part and name, if weights and results are rounded otherwise.

    The first is the largest change of two such runs, and each later one that of one run more.
    """
    size, noise = setup.micro_batches, dict[tuple[str, str], float]()

    def train(seed: int | None = None) -> tuple[TorchRun, float]:
        run, losses = TorchRun(setup, training=training), [0.0]
        if seed is not None:
            nudge(run.module, seed, unit)
        with nullcontext() if seed is None else Rounded(seed):
            for begin in range(0, len(batches), size):
                losses = run.step(batches[begin : begin + size])
        return run, losses[-1]

    plain, loss = train()
    buffers = {name for name, _ in setup.module.named_buffers(remove_duplicate=False)}
    start, trained = setup.start, tensors_of(plain.module)
    for seed in range(MOST_NUDGES):
        nudged, nudged_loss = train(seed)
        pairs = {"weights": (tensors_of(nudged.module), tensors_of(plain.module))}
        pairs |= {kind: (named, plain.moments()[kind]) for kind, named in nudged.moments().items()}
        for part, (moved, still) in pairs.items():
            for name in moved:
                if np.issubdtype(moved[name].dtype, np.floating):
                    key = ("statistics" if part == "weights" and name in buffers else part, name)
                    noise[key] = max(noise.get(key, 0.0), largest_error(moved[name], still[name]))
        noise["loss", ""] = max(noise.get(("loss", ""), 0.0), abs(nudged_loss - loss))
        del nudged, pairs, moved, still  # their memory is needed for the next run
        if seed == 0:
            continue
        # Of millions of weights, Adam turns the rounding of a few into a step. In which tensor they are is chance.
        moves = {name: largest_error(trained[name], start[name]) for part, name in noise if part == "weights"}
        shares = [noise["weights", name] / move for name, move in moves.items() if move]
        share = max((share for share in shares if share < MOSTLY_ROUNDING), default=0.0)
        yield noise | {("weights", name): max(noise["weights", name], share * move) for name, move in moves.items()}


def nudge(module: torch.nn.Module, seed: int, unit: float) -> None:
    """Move each value of all parameters up or down by this relative amount; zeros stay."""
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(torch.as_tensor(1 + 2 * unit * rng.choice([-1.0, 1.0], size=tuple(parameter.shape))))


def handover(
    setup: Setup, batches: Sequence[BatchPair], notes: list[str], *, training: bool = False
) -> Iterator[Divergence]:
    """Train a third of the steps in PyTorch, carry all to JAX, train a third there, and the last one in PyTorch.

    The end is compared with PyTorch's uninterrupted run.
    """
    if not is_inherited("handover", setup, notes):
        yield from retry(lambda: compare_handover(setup, batches, notes, training), setup, notes)


def compare_handover(
    setup: Setup, batches: Sequence[BatchPair], notes: list[str], training: bool
) -> Iterator[Divergence]:
    """Change the framework twice, as `handover` does."""
    begin(setup, notes)
    third = len(groups_of(setup, batches)) // 3
    batches = batches[: 3 * third * setup.micro_batches] or batches
    groups = groups_of(setup, batches)
    torch_run, jax_run = TorchRun(setup, training=training), JaxRun(setup, training=training)
    train_torch(torch_run, groups[:third])
    if reason := why_not_carried(setup, jax_run, torch_run):
        add_note(notes, f"handover: not tried: {reason}")
        return
    hand_to_jax(torch_run, jax_run)
    for group in groups[third : 2 * third]:
        jax_run.step(jax_batches(group))
    hand_to_torch(jax_run, torch_run)
    skipped, unit = {name for name, _ in only_rounding(jax_run, torch_run)}, jax_run.rounding()
    del jax_run  # its memory is needed
    train_torch(torch_run, groups[2 * third :])
    whole = TorchRun(setup, training=training)
    train_torch(whole, groups)
    wrong = [item for item in compare_torch_runs(torch_run, whole) if item.name not in skipped]
    del torch_run, whole
    wrong = above_noise(wrong, setup, batches, notes, training, unit)
    yield from report("handover", "PyTorch, then JAX, then PyTorch: {}", wrong)


def hand_to_jax(torch_run: TorchRun, jax_run: JaxRun) -> None:
    """Carry weights, statistics, moments and counters to JAX."""
    jax_run.load(tensors_of(torch_run.module))
    for kind, named in torch_run.moments().items():
        jax_run.load_moments(kind, named.get)
    jax_run.set_count(torch_run.steps)


def hand_to_torch(jax_run: JaxRun, torch_run: TorchRun) -> None:
    """Carry weights, statistics, moments and counters back to PyTorch."""
    weight_map = jax_run.setup.weight_map
    with jax.enable_x64(True):
        for name, values in to_torch(weight_map, jax_run.leaves()):
            torch_run.load({name: values})
        for kind, unit in units_of(jax_run.setup).items():
            for name, values in to_torch(weight_map, jax_run.moments()[FIELD_OF[kind]]):
                torch_run.load_moments(kind, {name: values / unit}.get)
    torch_run.set_count(jax_run.steps)


def train_torch(run: TorchRun, groups: Sequence[Sequence[BatchPair]]) -> None:
    """Take one step on each group of batches."""
    for group in groups:
        run.step(torch_batches(group))


# --- Statistics ---


def statistics(setup: Setup, batches: Sequence[Sequence[BatchPair]], seed: int) -> Iterator[Divergence]:
    """Compare what training mode keeps of its batches, such as running means, after steps 1 and 3.

    Args:
        setup: what is compared.
        batches: for each batch size, at least three batches.
        seed: of the statistics that both sides start from.
    """
    for sequence in batches:
        start = draw_statistics(setup, sequence[0], seed)
        torch_run, jax_run = TorchRun(setup, training=True, weights=start), JaxRun(setup, training=True)
        jax_run.load(tensors_of(torch_run.module))
        before = jax_run.leaves()
        for step, (jax_batch, torch_batch) in enumerate(sequence[: max(STATISTICS_STEPS)], start=1):
            jax_run.observe(jax_batch)
            torch_run.observe(torch_batch)
            if step not in STATISTICS_STEPS:
                continue
            wrong = list(compare_statistics(setup, jax_run, torch_run, start, before))
            if wrong:
                setup.kept["statistics"] = {item.name for item in wrong}
                causes = explain_statistics(setup, sequence[0], seed)
                wrong = [item._replace(causes=tuple(causes.get(item.name, ()))) for item in wrong]
                yield from report("statistics", f"{{}} after step {step}, batch of {length(torch_batch)}", wrong)
                return


def length(batch: Nest) -> int:
    """Return the size of a batch."""
    return next((len(leaf) for leaf in jax.tree.leaves(batch) if np.ndim(leaf)), 0)


def draw_statistics(setup: Setup, batch: BatchPair, seed: int) -> Arrays:
    """Return values for the buffers that a step in training mode changes: away from 0 and 1, and of the same sign."""
    run, rng = TorchRun(setup, training=True), np.random.default_rng(seed)
    run.observe(batch[1])
    before, after = setup.start, tensors_of(run.module)
    changed = [
        name
        for name, _ in setup.module.named_buffers()
        if np.issubdtype(before[name].dtype, np.floating) and not np.array_equal(before[name], after[name])
    ]
    return {
        name: rng.uniform(0.5, 2, before[name].shape)
        if (after[name] >= 0).all()
        else rng.normal(size=before[name].shape)
        for name in changed
    }


def compare_statistics(
    setup: Setup, jax_run: JaxRun, torch_run: TorchRun, start: Arrays, before: Arrays
) -> Iterator[Wrong]:
    """Compare all buffers, and see that JAX changes no other leaves."""
    leaves, tensors = jax_run.leaves(), tensors_of(torch_run.module)
    for name, path, actual, (expected,) in match(setup.links, leaves, tensors):
        if not np.issubdtype(expected.dtype, np.floating):
            continue
        if name in start or not np.array_equal(leaves[path], before[path]):
            error, problem = judge(actual, expected, VALUE_BOUND.limit * largest(expected), VALUE_BOUND.source)
            if problem:
                yield Wrong("", name, error, problem)


def explain_statistics(setup: Setup, batch: BatchPair, seed: int) -> dict[str, list[tuple[str, str]]]:
    """Return, for each statistic that differs, how the two sides use the old value and the batch differently.

    One step from each of two different old values shows this.
    """
    links = [item for item in setup.links if len(item.entry.torch) == 1]
    steps: list[dict[tuple[str, str], tuple[np.ndarray, ...]]] = []
    for offset in (0, 1):
        start = draw_statistics(setup, batch, seed + offset)
        torch_run, jax_run = TorchRun(setup, training=True, weights=start), JaxRun(setup, training=True)
        jax_run.load(tensors_of(torch_run.module))
        jax_run.observe(batch[0])
        torch_run.observe(batch[1])
        matched = match(links, jax_run.leaves(), tensors_of(torch_run.module), setup.start | start)
        steps.append({(name, path): (actual, *values) for name, path, actual, values in matched if name in start})
    causes: dict[str, list[tuple[str, str]]] = {}
    for (name, path), (actual, expected, old) in steps[0].items():
        actual2, expected2, old2 = steps[1][name, path]
        keeps = [slope(new - new2, old - old2) or 0.0 for new, new2 in ((actual, actual2), (expected, expected2))]
        share = slope(actual - keeps[0] * old, expected - keeps[1] * old)
        part = share and share * (1 - keeps[1]) / ((1 - keeps[0]) or 1.0)  # of the batch's own statistics
        size = 1 / (1 - part) if part and part < 1 - 1e-9 else 0.5
        biased = f"{size - 1:.0f}/{size:.0f} of PyTorch's" if abs(size - round(size)) < 1e-3 else ""  # in each norm
        if abs(keeps[0] - keeps[1]) > 1e-6:
            sense = ": the momentum is meant in the other sense" if abs(keeps[0] + keeps[1] - 1) < 1e-6 else ""
            if abs(keeps[0] * (1 - keeps[1]) - keeps[1]) < 1e-6:
                sense = ": it corrects for a start at 0, so that its count of steps has to be large from the start"
            if abs(keeps[0] - 1) < 1e-12:
                sense = ": a JAX function returns new statistics as (outputs, variables)"
            text = f"JAX keeps {keeps[0]:.4g} of the old value, PyTorch {keeps[1]:.4g}{sense}"
            note = f"takes the biased variance of the batch too, {biased}" if biased else ""
        elif biased:
            text, note = "JAX takes the biased variance of the batch", biased
        elif share and abs(share - 1) > 1e-9:
            text, note = f"JAX takes {share:.6g} times PyTorch's share of the batch", ""
        else:
            continue
        causes.setdefault(name, [(text, note)])
    return causes


# --- Schedules ---


def schedule(
    torch_schedule: Callable[[int], float], jax_schedule: Callable[[Any], Any], last: int, notes: list[str]
) -> Iterator[Divergence]:
    """Compare learning rates as functions of the step: the first steps, around every change, and the last.

    Args:
        torch_schedule: (step) -> learning rate.
        jax_schedule: the same function of JAX. It gets a counter of 64 bits, and so JAX computes in float64.
        last: the number of the last step.
        notes: gets how far the rate is off with optax's own counter of 32 bits.
    """
    steps = interesting_steps(torch_schedule, last)
    expected = np.array([float(torch_schedule(step)) for step in steps])
    with jax.enable_x64(True):
        values = [jnp.asarray(jax_schedule(jnp.asarray(step, jnp.int64))) for step in steps]
        actual = np.array([float(value) for value in values])
        as_used = np.array([float(jax_schedule(jnp.asarray(step, jnp.int32))) for step in steps])
        single = any(value.dtype == jnp.float32 for value in values)
    scale = float(np.abs(expected).max()) or 1.0
    limit = (FLOAT32_ROUNDING if single else 1e-12) * scale
    wrong = np.flatnonzero(~(np.abs(actual - expected) <= limit))
    if len(wrong):
        where = wrong[0]
        text = f"JAX {actual[where]:.9g}, PyTorch {expected[where]:.9g}"
        for shift, words in ((1, "behind"), (-1, "ahead of")):
            shifted = np.array([float(torch_schedule(min(max(step - shift, 0), last))) for step in steps])
            inner = [number for number, step in enumerate(steps) if 0 < step < last]
            if np.abs(actual - shifted)[inner].max(initial=0) <= limit:
                text += f"; JAX is one step {words} PyTorch"
                break
        else:
            if (factor := slope(actual, expected)) is not None and f"{factor:.6g}" != "1":
                text += f"; JAX's is {factor:.6g} times PyTorch's"
        several = f"; {len(wrong)} of {len(steps)} steps compared differ, up to step {steps[wrong[-1]]}"
        yield Divergence("schedule", f"step {steps[where]}", f"{text}{several if len(wrong) > 1 else ''}")
    elif (off := float(np.abs(as_used - expected).max()) / scale) > 1e-12:
        if off > FLOAT32_ROUNDING:
            where = int(np.abs(as_used - expected).argmax())
            text = f"JAX {as_used[where]:.9g} with a counter of 32 bits, PyTorch {expected[where]:.9g}"
            yield Divergence("schedule", f"step {steps[where]}", text)
        else:
            add_note(notes, f"schedule: optax computes it in float32: {off:.0e} of the largest rate")


def interesting_steps(function: Callable[[int], float], last: int) -> list[int]:
    """Return the first steps, those around a bend or a jump of a schedule, some in between, and the last ones."""
    grid = np.unique(np.linspace(0, last, min(last, 20_000) + 1).astype(int))
    values = np.array([float(function(int(step))) for step in grid])
    bends = np.abs(np.diff(values, 2)) if len(values) > 2 else np.zeros(0)
    order = np.argsort(-bends)[:20]
    around = {int(grid[place + 1 + offset]) for place in order if bends[place] for offset in (-1, 0, 1)}
    spread = {int(step) for step in np.linspace(0, last, 20)}
    return sorted({*range(min(last, 12) + 1), *around, *spread, max(last - 1, 0), last})


# float32 measured against float64: how exact each framework is, and whether they drift apart by rounding alone. The
# truth is what the reference computes in float64. The other checks show that JAX computes the same in float64.

FACTOR = 4.0  # JAX's distance from the truth may be this many times PyTorch's
HALF_ULP = 2.0**-24  # no result in float32 can be expected to be closer to the truth
STATES_AFTER = (0, 1, 10, 1000)  # steps that the optimizer has taken; its bias correction matters for the early ones
FEWEST_VALUES = 16  # distances of fewer values, over all seeds, say more about chance than about the arithmetic


class Sides(NamedTuple):
    """The values of both sides in one run, under the same names; JAX may have fewer."""

    jax: Arrays
    torch: Arrays


class Error:
    """How far both sides are from the truth in one tensor, over several runs."""

    def __init__(self, factor: float = FACTOR) -> None:
        self.factor = factor
        self.values = self.runs = 0
        self.squares = np.zeros(3)  # sums over the runs of mean squares: JAX's error, PyTorch's, and the truth itself

    def add(self, in_jax: np.ndarray, in_torch: np.ndarray, truth: np.ndarray) -> None:
        """Add one run."""
        self.values += truth.size
        self.runs += 1
        truth = truth.astype(np.float64)
        self.squares += [np.mean(np.square(array)) for array in (in_jax - truth, in_torch - truth, truth)]

    @property
    def jax(self) -> float:
        """Return JAX's distance from the truth: the root mean square, relative to that of the truth."""
        return float(np.sqrt(self.squares[0] / (self.squares[2] or self.runs)))

    @property
    def torch(self) -> float:
        """Return PyTorch's distance from the truth."""
        return float(np.sqrt(self.squares[1] / (self.squares[2] or self.runs)))

    @property
    def budget(self) -> float:
        """Return how far JAX may be from the truth, given how far PyTorch is."""
        return self.factor * max(self.torch, HALF_ULP)

    @property
    def passes(self) -> bool:
        """Return whether JAX keeps to the budget, or whether there are too few values for a judgement."""
        return self.values < FEWEST_VALUES or self.jax <= self.budget


def precision(
    run: Callable[[int, str], Sides],
    seeds: Sequence[int],
    notes: list[str],
    *,
    steered: Callable[[int], Arrays] | None = None,
    setup: Setup | None = None,
    factor: float = FACTOR,
) -> Iterator[Divergence]:
    """Yield float32 values, gradients and updates where JAX is further from the truth than PyTorch, times a factor.

    Two causes other than rounding are taken away, and nothing else. A ReLU or a pool can choose differently between
    nearly equal values: what is beyond the budget is measured again with the truth's choices. optax computes functions
    of its counters, such as Adam's bias correction, in float32: updates are measured with exact ones.

    Args:
        run: (seed, dtype) -> values and gradients of one pass by name. In float64 only PyTorch's are used.
        seeds: of the passes.
        notes: gets what was not tried.
        factor: how many times as far from the truth JAX may be as PyTorch.
        steered: (seed) -> JAX's float32 gradients by those names, when each of its stages makes the truth's choices.
        setup: measures the updates of the optimizers, if given.
    """
    errors = measure(run, seeds, factor=factor)
    suspects = {name for name, error in errors.items() if not error.passes}
    if suspects and steered is not None:
        again = measure(run, seeds, steered, suspects, factor=factor)
        errors = {name: error for name, error in errors.items() if name not in again}
        errors |= {f"{name}, with the truth's choices": error for name, error in again.items()}
    if setup is not None:
        errors |= measure_updates(setup, seeds, notes)
    for name, error in errors.items():
        if not error.passes:
            problem = (
                f"JAX is {error.jax:.1e} from the float64 truth, more than {error.budget:.1e} (bound: "
                f"{error.factor:g} times PyTorch's own distance {error.torch:.1e}, {error.runs} seeds)"
            )
            yield Divergence("precision", name, problem)


def measure(
    run: Callable[[int, str], Sides],
    seeds: Sequence[int],
    steered: Callable[[int], Arrays] | None = None,
    only: Collection[str] | None = None,
    *,
    factor: float = FACTOR,
) -> dict[str, Error]:
    """Measure one pass in float32 for each seed; with `steered`, JAX's values of those names that it returns."""
    errors: dict[str, Error] = {}
    for seed in seeds:
        single, truth = run(seed, "float32"), run(seed, "float64").torch
        for name, values in (single.jax if steered is None else steered(seed)).items():
            if name in truth and (only is None or name in only):
                errors.setdefault(name, Error(factor)).add(values, single.torch[name], truth[name])
    return errors


def measure_updates(setup: Setup, seeds: Sequence[int], notes: list[str]) -> dict[str, Error]:
    """Measure what one float32 step of the optimizer adds to every weight when it has taken some steps before."""
    errors: dict[str, Error] = {}
    start = {name: array.astype(np.float32) for name, array in setup.start.items() if is_float(array)}
    for seed in seeds:
        jax_run = JaxRun(setup, dtype="float32")
        torch_runs = [TorchRun(setup, dtype=dtype, weights=start) for dtype in ("float32", "float64")]
        runs: list[JaxRun | TorchRun] = [jax_run, *torch_runs]
        for after in STATES_AFTER:
            if after and (reason := why_not_carried(setup, jax_run, torch_runs[0])):
                add_note(notes, f"precision: updates not tried after the first step: {reason}")
                break
            for run in runs:
                if after:
                    run.load(start)
                    for kind in torch_runs[0].moments():
                        run.load_moments(kind, later_moments(setup, kind, seed, after))
                    run.set_count(after)
                run.apply_gradients([small_gradients(setup, seed)] * setup.micro_batches)
            sides = [tensors_of(run.module) for run in torch_runs]
            for name, path, in_jax, (in_torch, truth, old) in match(setup.links, jax_run.leaves(), *sides, start):
                if path in jax_run.names and path not in setup.held[1]:
                    error = errors.setdefault(f"update of {name} after {after} steps", Error())
                    error.add(*(array.astype(np.float64) - old for array in (in_jax, in_torch, truth)))
    return errors


def is_float(array: np.ndarray) -> bool:
    """Return whether an array is of a floating-point dtype."""
    return np.issubdtype(array.dtype, np.floating)


def small_gradients(setup: Setup, *seed: int) -> Callable[[str], np.ndarray]:
    """Return a function that takes a tensor's name and draws its gradient, in values that float32 holds exactly."""
    shapes = setup.weight_map.tensors

    def draw(name: str) -> np.ndarray:
        values = 1e-3 * np.random.default_rng((*seed, *name.encode())).normal(size=shapes[name])
        return values.astype(np.float32).astype(np.float64)

    return draw


def later_moments(setup: Setup, kind: str, seed: int, after: int) -> Callable[[str], np.ndarray]:
    """Return a function that takes a tensor's name and draws its moment, in float32.

    The moment is about as large as it would be after this many steps.
    """
    draw = small_gradients(setup, seed, len(kind), after)

    def moments(name: str) -> np.ndarray:
        noise = draw(name)
        values = min(1, 1e-3 * after) * 4 * noise**2 if kind in SQUARES else min(1, 0.1 * after) * 0.2 * noise
        return values.astype(np.float32)

    return moments


def drift(
    setup: Setup,
    batches: Iterable[BatchPair],
    steps: Sequence[int],
    nudges: int = 2,
    *,
    training: bool = False,
    with_truth: bool = True,
) -> dict[str, list[float]]:
    """Train many runs from the same weights and record how far apart they are after each of these steps.

    Returns:
        Distances (root mean square) by what they are between: the frameworks in float32; and each framework in float32
        and itself, the furthest of `nudges` runs that start with every weight moved by one unit in the last place
        (ULP), up or down at random. With the truth also: the frameworks in float64, and each framework's float32 and
        its own float64.
    """
    start = {name: array.astype(np.float32) for name, array in setup.start.items() if is_float(array)}
    trained = {name for name, _ in setup.module.named_parameters()}
    weights = {"float64": start} if with_truth else {}
    weights |= {"float32": start} | {f"nudge {seed}": start | one_ulp(start, trained, seed) for seed in range(nudges)}
    runs: dict[tuple[str, str], JaxRun | TorchRun] = {}
    for label, given in weights.items():
        dtype = "float64" if label == "float64" else "float32"
        runs["JAX", label] = JaxRun(setup, dtype=dtype, training=training, weights=given, exact=label == "float64")
        runs["PyTorch", label] = TorchRun(setup, dtype=dtype, training=training, weights=given)
    curves: dict[str, list[float]] = {}
    stream = iter(batches)
    for step in range(1, max(steps) + 1):
        group = [next(stream) for _ in range(setup.micro_batches)]
        for (side, _), run in runs.items():
            run.step([batch[side == "PyTorch"] for batch in group])
        if step in steps:
            for name, value in distances({key: trained_leaves(run) for key, run in runs.items()}).items():
                curves.setdefault(name, []).append(value)
    return curves


def trained_leaves(run: JaxRun | TorchRun) -> Arrays:
    """Return the trained weights of a run in JAX's layout, by path."""
    names = run.setup.programs(run.dtype).names
    if isinstance(run, JaxRun):
        leaves = run.leaves()
        return {name: leaves[name].astype(np.float64) for name in names}
    tensors = tensors_of(run.module)
    carried = (convert(entry, [tensors[name] for name in entry.torch]) for entry in run.setup.weight_map.entries)
    return {path: leaf.astype(np.float64) for entry in carried for path, leaf in entry if path in names}


def distances(weights: dict[tuple[str, str], Arrays]) -> dict[str, float]:
    """Return every distance that `drift` records, from the weights of all runs."""
    with_truth = ("JAX", "float64") in weights
    apart = {
        f"{dtype}: JAX from PyTorch": distance(weights["JAX", dtype], weights["PyTorch", dtype])
        for dtype in (["float64"] if with_truth else []) + ["float32"]
    }
    for side in ("JAX", "PyTorch"):
        single = weights[side, "float32"]
        if with_truth:
            apart[f"float32: {side} from float64"] = distance(single, weights[side, "float64"])
        nudged = [leaves for (name, run), leaves in weights.items() if name == side and "nudge" in run]
        if nudged:
            apart[f"float32: {side} from itself, one ULP"] = max(distance(single, other) for other in nudged)
    return apart


def one_ulp(weights: Arrays, names: Collection[str], seed: int) -> Arrays:
    """Move every value of these tensors to a neighbouring float, up or down at random."""
    rng = np.random.default_rng(seed)
    return {
        name: np.nextafter(array, np.where(rng.random(array.shape) < 0.5, -np.inf, np.inf).astype(array.dtype))
        for name, array in weights.items()
        if name in names
    }


def distance(one: Arrays, other: Arrays) -> float:
    """Return the root mean square difference over all weights; the largest one depends on a single weight's luck."""
    squares = sum(float(np.square(one[name] - other[name]).sum()) for name in one)
    return float(np.sqrt(squares / sum(array.size for array in one.values())))

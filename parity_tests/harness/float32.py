"""float32 measured against float64: how exact each framework is, and whether they drift apart by rounding alone.

The truth is what the reference computes in float64. The other checks show that JAX computes the same in float64.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from parity_tests.harness.compare import Divergence
from parity_tests.harness.differences import add_note
from parity_tests.harness.runs import (
    SQUARES,
    Arrays,
    BatchPair,
    JaxRun,
    Setup,
    TorchRun,
    convert,
    match,
    tensors_of,
)
from parity_tests.harness.training import why_not_carried

FACTOR = 4.0  # JAX's distance from the truth may be this many times PyTorch's
HALF_ULP = 2.0**-24  # no result in float32 can be expected to be closer to the truth
STATES_AFTER = (0, 1, 10, 1000)  # steps that the optimizer has taken; its bias correction matters for the early ones
FEWEST_VALUES = 16  # distances of fewer values, over all seeds, say more about chance than about the arithmetic


class Sides(NamedTuple):
    """What both sides give in one run, under the same names; JAX may have fewer."""

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
        """JAX's distance from the truth: the root mean square, relative to that of the truth."""
        return float(np.sqrt(self.squares[0] / (self.squares[2] or self.runs)))

    @property
    def torch(self) -> float:
        """PyTorch's distance from the truth."""
        return float(np.sqrt(self.squares[1] / (self.squares[2] or self.runs)))

    @property
    def budget(self) -> float:
        """How far JAX may be from the truth, given how far PyTorch is."""
        return self.factor * max(self.torch, HALF_ULP)

    @property
    def passes(self) -> bool:
        """Whether JAX keeps to the budget, or too few values tell."""
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
    start = {name: array.astype(np.float32) for name, array in tensors_of(setup.module).items() if is_float(array)}
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
    """Return a function that draws the gradient by a tensor; float32 holds the values exactly."""
    shapes = setup.weight_map.tensors

    def draw(name: str) -> np.ndarray:
        values = 1e-3 * np.random.default_rng((*seed, *name.encode())).normal(size=shapes[name])
        return values.astype(np.float32).astype(np.float64)

    return draw


def later_moments(setup: Setup, kind: str, seed: int, after: int) -> Callable[[str], np.ndarray]:
    """Return a function that draws moments about as large as after so many steps; float32 holds the values exactly."""
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
    start = {name: array.astype(np.float32) for name, array in tensors_of(setup.module).items() if is_float(array)}
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

"""How both sides start: the distributions of initial weights, and the tables that a port builds itself."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from parity_tests.harness.compare import Divergence
from parity_tests.harness.differences import add_note, judge, largest, shorten
from parity_tests.harness.runs import Arrays, Link, link, match

INITIALISATION_SAMPLE = 2_000  # values of a tensor and seed: 40,000 in all show a difference of 2 % in distribution
FALSE_ALARMS = 1e-4  # how often the check may fail although the distributions are the same
FLOAT32_ROUNDING = 4 * 2.0**-23  # of constants, relative to the largest


def initialisation(
    weight_map: Any,
    draw_torch: Callable[[int], Arrays],
    draw_jax: Callable[[int], Arrays],
    seeds: Sequence[int],
    notes: list[str],
) -> Iterator[Divergence]:
    """Compare the distributions of both sides' initial weights, tensor by tensor, by statistical tests.

    The tests are Kolmogorov-Smirnov's on the shape, Welch's t on the mean and the mean square, and the number of values
    beyond the other side's extremes. Each may fail by chance with probability `FALSE_ALARMS` / (number of tests), so
    that the check as a whole fails by chance with probability `FALSE_ALARMS` (Bonferroni). Values that are the same
    for all seeds are constants, and compared as such.

    Args:
        weight_map: carries PyTorch's tensors to JAX's leaves.
        draw_torch: (seed) -> PyTorch's initial tensors, by name.
        draw_jax: (seed) -> JAX's initial leaves, by path.
        seeds: of the draws.
        notes: gets what was not tried.
    """
    in_torch: dict[tuple[str, str], list[np.ndarray]] = {}
    in_jax: dict[tuple[str, str], list[np.ndarray]] = {}
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
    level = FALSE_ALARMS / max(5 * len(in_torch), 1)
    for (name, path), draws in in_torch.items():
        problem = find_difference_of_distributions(np.stack(in_jax[name, path]), np.stack(draws), level)
        if problem:
            yield Divergence("initialisation", name, problem)


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
        "distribution (Kolmogorov-Smirnov)": stats.ks_2samp(actual, expected).pvalue,
        "mean (Welch's t)": stats.ttest_ind(actual, expected, equal_var=False).pvalue,
        "mean square (Welch's t)": stats.ttest_ind(actual**2, expected**2, equal_var=False).pvalue,
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


def tables(
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
    for name, path, actual, (expected, correct) in match(links, jax_leaves, torch_buffers, truth):
        if actual.shape != expected.shape:
            problem = f"it has the shape {list(actual.shape)} in JAX, and {list(expected.shape)} is expected"
        else:
            limit, source = 0.0, "both are whole numbers, or infinite"
            ours, theirs, correct = (array.astype(np.float64) for array in (actual, expected, correct))
            finite = np.isfinite(ours) & np.isfinite(theirs)
            if np.issubdtype(expected.dtype, np.floating) and np.array_equal(ours[~finite], theirs[~finite]):
                ours, theirs, correct = ours[finite], theirs[finite], correct[finite]
                limit = 4 * largest(theirs, correct) + FLOAT32_ROUNDING * largest(correct)
                source = "float32 rounding, and four times PyTorch's own error"
            with np.errstate(invalid="ignore"):
                problem = judge(ours, correct, limit, source)[1]
        if problem:
            yield Divergence("tables", name, f"JAX builds {path} otherwise than PyTorch: {problem}")

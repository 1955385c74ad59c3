"""What differs between two runs of a training, and in the same way for several tensors."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from parity_tests.harness.compare import Bound, Divergence

UNITS_IN_THE_LAST_PLACE = 64 * 2.0**-52  # what adding steps to a weight may cost, relative to the largest weight
NAMES_SHOWN = 6


class Wrong(NamedTuple):
    """One tensor that differs.

    Attributes:
        part: "weights", "statistics" or a kind of moments.
        name: in PyTorch.
        error: the largest one.
        problem: the figures.
        causes: what would explain it: (the same for all tensors that are wrong in the same way, what it says of one).
    """

    part: str
    name: str
    error: float
    problem: str
    causes: tuple[tuple[str, str], ...] = ()


def largest(array: np.ndarray, other: np.ndarray | None = None) -> float:
    """Return the largest absolute value or difference, without a temporary array of that size; NaN if there is one."""
    flat, size, worst = array.reshape(-1), 2**18, 0.0
    for begin in range(0, flat.size, size):
        part = flat[begin : begin + size]
        if other is not None:
            part = part - other.reshape(-1)[begin : begin + size]
        worst = max(worst, float(np.abs(part).max()), key=lambda value: np.inf if np.isnan(value) else value)
    return worst


def judge(actual: np.ndarray, expected: np.ndarray, limit: float, source: str) -> tuple[float, str]:
    """Return the largest error and the figures of a difference, or "" if there is none."""
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        sides = [f"{list(side.shape)} {side.dtype}" for side in (actual, expected)]
        return np.inf, f"JAX's is {sides[0]}, PyTorch's {sides[1]}"
    error = largest(actual, expected)
    if error <= limit:
        return error, ""
    errors = np.abs(actual.astype(np.float64) - expected)
    worst = np.where(np.isnan(errors), np.inf, errors)
    index = tuple(int(place) for place in np.unravel_index(int(worst.argmax()), errors.shape))
    return error, (
        f"error {error:.1e} > {limit:.1e} at {list(index)} (JAX {actual[index]:.9g}, PyTorch {expected[index]:.9g}; "
        f"{int((~(errors <= limit)).sum()):,} of {errors.size:,} values; bound: {source})"
    )


def slope(values: np.ndarray, by: np.ndarray) -> float | None:
    """Return c if `values` are c times `by`, but for a thousandth."""
    values, by = values.ravel().astype(np.float64), by.ravel().astype(np.float64)
    square = float(by @ by)
    if not square or not np.isfinite(values).all():
        return None
    factor = float(values @ by) / square
    return factor if factor and np.linalg.norm(values - factor * by) <= 1e-3 * np.linalg.norm(values) else None


def explain_weights(actual: np.ndarray, expected: np.ndarray, start: np.ndarray) -> Iterator[tuple[str, str]]:
    """Yield what would explain a difference of weights that began equal."""
    rounding = UNITS_IN_THE_LAST_PLACE * largest(start)
    if largest(expected, start) <= rounding:
        yield "frozen on one side", "moved in JAX, frozen in PyTorch"
    elif largest(actual, start) <= rounding:
        yield "frozen on one side", "moved in PyTorch, frozen in JAX"
    if decay := slope(actual - expected, start):
        side = "JAX" if decay < 0 else "PyTorch"
        yield (
            f"the difference is {abs(decay):.2g} times the weight",
            f"decayed in {side} alone, or more than in the other",
        )
    if (factor := slope(actual - start, expected - start)) and abs(factor - 1) > 1e-3:
        yield f"JAX's step is {factor:.4g} times PyTorch's", ""


def explain_moments(actual: np.ndarray, expected: np.ndarray, start: np.ndarray) -> Iterator[tuple[str, str]]:
    """Yield what would explain a difference of moments."""
    if decay := slope(actual - expected, start):
        side = "JAX" if decay > 0 else "PyTorch"
        yield (
            f"the difference is {abs(decay):.2g} times the weight",
            f"weight decay is a part of the gradient in {side} alone",
        )
    if (factor := slope(actual, expected)) and abs(factor - 1) > 1e-3:
        yield f"JAX's are {factor:.4g} times PyTorch's", ""


def explain_nothing(actual: np.ndarray, expected: np.ndarray, start: np.ndarray) -> Iterator[tuple[str, str]]:
    """Yield nothing: a difference of statistics in mid-training comes from elsewhere."""
    yield from ()


def compare_tensor(
    part: str, name: str, actual: np.ndarray, values: Sequence[np.ndarray], bound: Bound
) -> Iterator[Wrong]:
    """Compare one tensor: weights relative to how far they have moved, others to their largest value.

    Args:
        part: "weights", "statistics" or a kind of moments.
        name: in PyTorch.
        actual: JAX's.
        values: PyTorch's, and the weights at the start.
        bound: relative to the largest value, or to how far a weight has moved.
    """
    expected, start = values
    if not np.issubdtype(expected.dtype, np.floating):
        return
    scale = largest(expected)
    allowed = bound.limit * (largest(expected, start) if part == "weights" else scale)
    if part in ("weights", "statistics"):
        allowed += UNITS_IN_THE_LAST_PLACE * scale
    error, problem = judge(actual, expected, allowed, bound.source)
    if problem:
        explain = {"weights": explain_weights, "statistics": explain_nothing}.get(part, explain_moments)
        yield Wrong(part, name, error, problem, tuple(explain(actual, expected, start)))


def with_counts(wrong: list[Wrong], actual: int | None, expected: int | None) -> list[Wrong]:
    """Add to differences that the optimizers have counted other numbers of steps. Alone, it is no difference."""
    if not wrong or actual is None or expected is None or actual == expected:
        return wrong
    return [
        *wrong,
        Wrong("step count", "", np.inf, f"JAX's optimizer has counted {actual} steps, PyTorch's {expected}"),
    ]


def report(check: str, label: str, wrong: Sequence[Wrong]) -> Iterator[Divergence]:
    """Yield one message for all tensors that are wrong in the same way.

    Args:
        check: its name.
        label: where that is, with {} in the place of the tensors: "step 3, {}".
        wrong: tensors.
    """
    counts = [item.problem for item in wrong if item.part == "step count"]
    wrong = [item for item in wrong if item.part != "step count"]
    causes = Counter((item.part, text) for item in wrong for text, _ in item.causes)
    tensors = Counter(item.part for item in wrong)
    groups: dict[tuple[str, str], list[tuple[Wrong, str]]] = {}
    for item in wrong:
        # A factor is the cause only if it is the same for all: small tensors fit many factors.
        fitting = [
            (causes[item.part, text], text, note)
            for text, note in item.causes
            if note or causes[item.part, text] == tensors[item.part]
        ]
        _, text, note = max(fitting, default=(0, "", ""))
        groups.setdefault((item.part, text), []).append((item, note))
    for (part, text), items in groups.items():
        by_note: dict[str, list[str]] = {}
        for item, note in items:
            names = by_note.setdefault(note, [])
            names += [] if item.name in names else [item.name]
        sides = [f"{shorten(names)} {note}" if len(by_note) > 1 else note for note, names in by_note.items()]
        worst = max((item for item, _ in items), key=lambda item: item.error).problem
        rest = "nothing else differs: look at the learning rate, eps and what else makes the step of the moments"
        cause = [*counts, text, *sides, rest if not text and not counts and tensors.keys() == {"weights"} else ""]
        tensors_named = f"{part} {shorten([name for names in by_note.values() for name in names])}".strip()
        yield Divergence(check, label.format(tensors_named), worst, "; ".join(filter(None, cause)))


def shorten(names: Sequence[str]) -> str:
    """Join names; of many only the first ones."""
    more = len(names) - NAMES_SHOWN
    return ", ".join(names[:NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")


def add_note(notes: list[str], note: str) -> None:
    """Add a remark once."""
    if note not in notes:
        notes.append(note)

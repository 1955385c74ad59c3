"""How two sets of arrays are compared, and how a difference is reported."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

SLICE = 2**20  # values that are compared at once: large tensors need no second copy


class Refused(Exception):
    """The two sides cannot be compared, and the message says in one line why and what to do."""


class Divergence(NamedTuple):
    """One place where the two sides differ by more than rounding can explain."""

    check: str
    where: str
    problem: str
    cause: str = ""  # what would explain the difference; empty where nothing is known

    def __str__(self) -> str:
        sentence = f"{self.check}: {self.where}: {self.problem}"
        return f"{sentence}. {self.cause}" if self.cause else sentence


class Bound(NamedTuple):
    """The largest error allowed, and where that number comes from.

    Attributes:
        limit: absolute, or in units of the largest expected value of the tensor if `relative`.
        source: the measurement behind the limit.
        relative: see `limit`.
        floor: if `relative`, the smallest value that counts as a tensor's largest one: below it, a tensor is zero but
            for rounding.
    """

    limit: float
    source: str
    relative: bool = True
    floor: float = 0.0


EXACT = Bound(0.0, "both sides hold the same bits", relative=False)


def compare(
    check: str,
    actual: Mapping[str, np.ndarray],
    expected: Mapping[str, np.ndarray],
    bound: Bound,
    label: str = "{}",
) -> Iterator[Divergence]:
    """Yield every difference, in the order of `expected`.

    Whatever the bound, these count as differences: a missing or an extra key, another shape or dtype (nothing is
    broadcast or cast), a NaN or an infinity on either side or on both, and a comparison of nothing.

    Args:
        check: the name of the check that compares.
        actual: JAX's arrays, by name.
        expected: PyTorch's arrays, by name.
        bound: the largest error allowed.
        label: how a name is shown, with {} in its place: "gradient of {}".
    """
    if not expected:
        yield Divergence(check, label.format("anything"), "there is nothing to compare")
    for name in actual.keys() - expected.keys():
        yield Divergence(check, label.format(name), "JAX has it and PyTorch does not")
    for name, reference in expected.items():
        problem = (
            "PyTorch has it and JAX does not" if name not in actual else find_difference(actual[name], reference, bound)
        )
        if problem:
            yield Divergence(check, label.format(name), problem)


def find_difference(actual: np.ndarray, expected: np.ndarray, bound: Bound) -> str:
    """Return what is wrong with one array of JAX's, or an empty string."""
    if actual.shape != expected.shape:
        return f"JAX's shape is {list(actual.shape)}, PyTorch's {list(expected.shape)}"
    if actual.dtype != expected.dtype:
        return f"JAX's dtype is {actual.dtype}, PyTorch's {expected.dtype}"
    if actual.size == 0:
        return "it is empty on both sides"
    for side, array in (("JAX", actual), ("PyTorch", expected)):
        if np.issubdtype(array.dtype, np.inexact) and not np.isfinite(array).all():
            index = first_index(~np.isfinite(array))
            return f"{side} has {array[index]} at {list(index)}"
    limit = bound.limit * (max(largest(expected), bound.floor) if bound.relative else 1.0)
    if largest_error(actual, expected) <= limit:
        return ""
    errors = np.abs(widened(actual) - widened(expected))
    index = first_index(errors == errors.max())
    return (
        f"error {errors.max():.1e} > {limit:.1e} at {list(index)} "
        f"(JAX {actual[index]:.9g}, PyTorch {expected[index]:.9g}; "
        f"{(errors > limit).sum():,} of {errors.size:,} values; bound: {bound.source})"
    )


def first_index(mask: np.ndarray) -> tuple[int, ...]:
    """Return the index of the first True."""
    return tuple(int(index) for index in np.unravel_index(int(mask.argmax()), mask.shape))


def widened(array: np.ndarray) -> np.ndarray:
    """Return the values in float64 or complex128, so that a difference does not overflow or round."""
    return array.astype(np.complex128 if np.iscomplexobj(array) else np.float64, copy=False)


def slices(array: np.ndarray) -> Iterator[tuple[slice, ...]]:
    """Yield slices of the first axis that hold about `SLICE` values each."""
    if array.ndim == 0 or array.size <= SLICE:
        yield ()
        return
    rows = max(1, SLICE * len(array) // array.size)
    for start in range(0, len(array), rows):
        yield (slice(start, start + rows),)


def largest(array: np.ndarray) -> float:
    """Return the largest absolute value; 0 for an empty array."""
    return max((float(np.abs(array[part]).max(initial=0)) for part in slices(array)), default=0.0)


def largest_error(actual: np.ndarray, expected: np.ndarray) -> float:
    """Return the largest absolute difference; NaN if a value is NaN."""
    with np.errstate(invalid="ignore"):  # infinity minus infinity
        errors = [np.abs(widened(actual[part]) - widened(expected[part])).max(initial=0) for part in slices(expected)]
    return float(np.max(errors))


def relative_error(actual: np.ndarray, expected: np.ndarray, floor: float = 0.0) -> float:
    """Return the largest error in units of the largest expected value; infinity if the shapes differ."""
    if actual.shape != expected.shape:
        return float("inf")
    return largest_error(actual, expected) / (max(largest(expected), floor) or 1.0)

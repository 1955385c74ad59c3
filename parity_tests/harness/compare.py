"""How two sets of arrays are compared, and how a difference is reported."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np


class Divergence(NamedTuple):
    """One place where the two sides differ by more than rounding can explain."""

    check: str
    where: str
    problem: str

    def __str__(self) -> str:
        return f"{self.check}: {self.where}: {self.problem}"


class Bound(NamedTuple):
    """The largest error allowed, and where that number comes from.

    Attributes:
        limit: absolute, or in units of the largest expected value of the tensor if `relative`.
        source: the measurement behind the limit.
        relative: see `limit`.
    """

    limit: float
    source: str
    relative: bool = True


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
        if not np.isfinite(array).all():
            index = first_index(~np.isfinite(array))
            return f"{side} has {array[index]} at {list(index)}"
    errors = np.abs(actual.astype(np.float64) - expected.astype(np.float64))
    limit = bound.limit * (float(np.abs(expected).max()) if bound.relative else 1.0)
    if errors.max() <= limit:
        return ""
    index = first_index(errors == errors.max())
    return (
        f"error {errors.max():.1e} > {limit:.1e} at {list(index)} "
        f"(JAX {actual[index]:.9g}, PyTorch {expected[index]:.9g}; "
        f"{(errors > limit).sum():,} of {errors.size:,} values; bound: {bound.source})"
    )


def first_index(mask: np.ndarray) -> tuple[int, ...]:
    """Return the index of the first True."""
    return tuple(int(index) for index in np.unravel_index(int(mask.argmax()), mask.shape))


def relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    """Return the largest error, in units of the largest expected value."""
    scale = float(np.abs(expected).max()) or 1.0
    return float(np.abs(actual.astype(np.float64) - expected.astype(np.float64)).max()) / scale

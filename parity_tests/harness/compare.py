"""How two sets of arrays are held together, and how a difference is told."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np


class Divergence(NamedTuple):
    """One place where the sides differ by more than rounding can explain."""

    check: str
    where: str
    problem: str

    def __str__(self) -> str:
        return f"{self.check}: {self.where}: {self.problem}"


class Bound(NamedTuple):
    """The largest error allowed, and where that number comes from.

    Attributes:
        limit: absolute, or in units of the largest expected value of the tensor if `relative`.
        source: the measurement behind it.
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
    """Yield what differs, in the order of `expected`.

    A missing or an extra key, another shape or dtype (nothing is broadcast or cast), a NaN or an infinity on either
    side or on both, and an empty comparison are differences, whatever the bound.

    Args:
        check: the name of the check that asks.
        actual: JAX's arrays, by name.
        expected: PyTorch's.
        bound: the largest error allowed.
        label: how a name is told, with {} where it goes: "gradient of {}".
    """
    if not expected:
        yield Divergence(check, label.format("anything"), "there is nothing to compare")
    for name in actual.keys() - expected.keys():
        yield Divergence(check, label.format(name), "JAX has it and PyTorch does not")
    for name, reference in expected.items():
        problem = (
            "PyTorch has it and JAX does not" if name not in actual else difference(actual[name], reference, bound)
        )
        if problem:
            yield Divergence(check, label.format(name), problem)


def difference(actual: np.ndarray, expected: np.ndarray, bound: Bound) -> str:
    """What is wrong with one array, or an empty string."""
    if actual.shape != expected.shape:
        return f"JAX's shape is {list(actual.shape)}, PyTorch's {list(expected.shape)}"
    if actual.dtype != expected.dtype:
        return f"JAX's dtype is {actual.dtype}, PyTorch's {expected.dtype}"
    if actual.size == 0:
        return "it is empty on both sides"
    for side, array in (("JAX", actual), ("PyTorch", expected)):
        if not np.isfinite(array).all():
            at = first_index(~np.isfinite(array))
            return f"{side} has {array[at]} at {list(at)}"
    errors = np.abs(actual.astype(np.float64) - expected.astype(np.float64))
    limit = bound.limit * (float(np.abs(expected).max()) if bound.relative else 1.0)
    if errors.max() <= limit:
        return ""
    at = first_index(errors == errors.max())
    return (
        f"error {errors.max():.1e} > {limit:.1e} at {list(at)} "
        f"(JAX {actual[at]:.9g}, PyTorch {expected[at]:.9g}; {(errors > limit).sum():,} of {errors.size:,} values; "
        f"bound: {bound.source})"
    )


def first_index(mask: np.ndarray) -> tuple[int, ...]:
    """Where the first True is."""
    return tuple(int(index) for index in np.unravel_index(int(mask.argmax()), mask.shape))


def relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    """Largest error, in units of the largest expected value: the number that the tables show."""
    scale = float(np.abs(expected).max()) or 1.0
    return float(np.abs(actual.astype(np.float64) - expected.astype(np.float64)).max()) / scale

"""Median and spread of figures that were measured several times, alone and in pairs."""

from collections.abc import Sequence
from typing import TypedDict, TypeVar

import numpy as np

Name = TypeVar("Name", bound=str)


class Spread(TypedDict):
    """A figure over all rounds, as a file of results holds it. Half of the rounds lie between the quartiles."""

    n: int
    median: float
    low_quartile: float
    high_quartile: float
    least: float
    most: float


def spread(values: Sequence[float]) -> Spread:
    """Return the number of values, their median, their quartiles, the least and the largest.

    Raises:
        ValueError: there are no values, or one is not finite.
    """
    if not values or not np.isfinite(values).all():
        raise ValueError(f"no median of {list(values)}")
    least, low, median, high, most = np.percentile(values, (0, 25, 50, 75, 100)).tolist()
    return Spread(n=len(values), median=median, low_quartile=low, high_quartile=high, least=least, most=most)


def paired_ratios(numerators: Sequence[float], denominators: Sequence[float]) -> list[float]:
    """Return the ratio of every round. What slows both sides of a round down cancels out.

    Raises:
        ValueError: the two have different numbers of rounds.
    """
    return [one / other for one, other in zip(numerators, denominators, strict=True)]


def error_bars(spreads: Sequence[Spread]) -> list[list[float]]:
    """Return the distances from the medians down and up to the quartiles, for a chart."""
    return [
        [spread["median"] - spread["low_quartile"] for spread in spreads],
        [spread["high_quartile"] - spread["median"] for spread in spreads],
    ]


def order_of_round(names: Sequence[Name], number: int) -> list[Name]:
    """Return the order of the names in a round: each round begins one name later than the round before."""
    start = number % len(names)
    return [*names[start:], *names[:start]]

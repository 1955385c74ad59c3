"""What many rounds say: median and spread, alone and in pairs. Plain numbers in, plain numbers out."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Spread(NamedTuple):
    """A figure over rounds. The quartiles hold the middle half of them."""

    n: int
    median: float
    low_quartile: float
    high_quartile: float
    least: float
    most: float


def spread(values: Sequence[float]) -> Spread:
    """Sum up the figures of all rounds.

    Raises:
        ValueError: there is none, or one is not finite.
    """
    if not values or not np.isfinite(values).all():
        raise ValueError(f"no median of {list(values)}")
    least, low, median, high, most = np.percentile(values, (0, 25, 50, 75, 100)).tolist()
    return Spread(len(values), median, low, high, least, most)


def paired_ratios(one: Sequence[float], other: Sequence[float]) -> list[float]:
    """One's figure over the other's, round by round: what slowed a whole round cancels out.

    Raises:
        ValueError: they have not the same number of rounds.
    """
    return [mine / theirs for mine, theirs in zip(one, other, strict=True)]


def turns(names: Sequence[str], rounds: int) -> list[list[str]]:
    """Who goes when: in every round all, in an order that starts one further each time."""
    shifts = [number % len(names) for number in range(rounds)]
    return [[*names[shift:], *names[:shift]] for shift in shifts]

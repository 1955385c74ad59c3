"""The statistics of the accuracy study, which asks whether two networks are equally accurate."""

import math
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from scipy import stats

SIGNIFICANCE = 0.05  # of each of the two one-sided tests, which corresponds to a 90 % confidence interval
ROUNDING = 1e-9  # values that differ by less, relative to the largest, are equal up to rounding


def equivalence(differences: Float[np.ndarray, " n"], margin: float) -> dict[str, Any]:
    """Test whether the mean of paired differences lies within ±margin: two one-sided paired t-tests (TOST).

    A test that finds no difference proves nothing: few or noisy data find none either. This test assumes a difference
    of at least the margin, and only enough data with little noise reject that.

    Source: D. J. Schuirmann, A comparison of the two one-sided tests procedure and the power approach for assessing the
    equivalence of average bioavailability, J. Pharmacokinet. Biopharm. 15 (1987) 657-680. Like every t-test it takes
    the differences to be independent and roughly normal.

    Args:
        differences: first minus second for each pair; here percentage points of accuracy for each seed.
        margin: the largest difference that does not matter, in the same unit; positive.

    Raises:
        ValueError: the differences allow no test (see `mean_and_deviation`).
    """
    mean, deviation = mean_and_deviation(differences)
    n = len(differences)
    standard_error = deviation / math.sqrt(n)
    student = stats.t(n - 1)
    half_width = float(student.ppf(1 - SIGNIFICANCE)) * standard_error
    p_low = float(student.sf((mean + margin) / standard_error))  # if the true mean were -margin or less
    p_high = float(student.cdf((mean - margin) / standard_error))  # if the true mean were margin or more
    return {
        "margin": margin,
        "n": n,
        "mean": mean,
        "standard_error": standard_error,
        "low": mean - half_width,
        "high": mean + half_width,
        "p_low": p_low,
        "p_high": p_high,
        "equivalent": max(p_low, p_high) < SIGNIFICANCE,
        "p_value": max(p_low, p_high),
        "smallest_margin": abs(mean) + half_width,  # any wider margin passes the test, any narrower one fails it
    }


def count_correct(correct_a: Bool[np.ndarray, " items"], correct_b: Bool[np.ndarray, " items"]) -> dict[str, int]:
    """Count on how many items both classifiers are right, only the first, only the second, and neither."""
    cells = {
        "both": correct_a & correct_b,
        "only_a": correct_a & ~correct_b,
        "only_b": ~correct_a & correct_b,
        "neither": ~correct_a & ~correct_b,
    }
    return {name: int(np.count_nonzero(cell)) for name, cell in cells.items()}


def mcnemar_p_value(only_a: int, only_b: int) -> float:
    """Return the exact two-sided p-value of McNemar's test: is each classifier equally often the only right one?

    Source: Q. McNemar, Note on the sampling error of the difference between correlated proportions or percentages,
    Psychometrika 12 (1947) 153-157, with the binomial distribution instead of its approximation by chi-square.

    It takes items to be independent. Pooled over seeds they are not, because the images of a seed share two networks.
    The p-value then speaks of these networks on these images; as evidence about two ways of training it is too small
    (T. G. Dietterich, Approximate statistical tests for comparing supervised classification learning algorithms, Neural
    Computation 10 (1998) 1895-1923). For that question `equivalence` takes a seed as one item.

    Raises:
        ValueError: both are right on the very same items, so that there is nothing to test.
    """
    if only_a + only_b == 0:
        raise ValueError("both are right on the very same items: is one classifier compared with itself?")
    return float(stats.binomtest(only_a, only_a + only_b, 0.5).pvalue)


def prediction_interval(values: Float[np.ndarray, " n"], false_alarm: float) -> tuple[float, float]:
    """Return the interval that one more value of the same normal distribution rarely leaves.

    It is mean ± t · s · sqrt(1 + 1/n), where t is Student's quantile for n - 1 degrees of freedom. Source: G. A.
    Whitmore, Prediction limits for a univariate normal observation, The American Statistician 40 (1986) 141-143.

    Args:
        values: the values that are known.
        false_alarm: the probability of lying outside, between 0 and 1.

    Raises:
        ValueError: the values are unusable (see `mean_and_deviation`).
    """
    mean, deviation = mean_and_deviation(values)
    n = len(values)
    half_width = float(stats.t(n - 1).ppf(1 - false_alarm / 2)) * deviation * math.sqrt(1 + 1 / n)
    return mean - half_width, mean + half_width


def mean_and_deviation(values: Float[np.ndarray, " n"]) -> tuple[float, float]:
    """Return mean and sample standard deviation (n - 1) of values from independent runs.

    Raises:
        ValueError: the values are fewer than two, not finite, or all equal, which independent runs never are.
    """
    if len(values) < 2 or not np.isfinite(values).all():
        raise ValueError(f"two or more finite values are needed, not {values.tolist()}")
    if np.ptp(values) <= ROUNDING * np.abs(values).max():
        raise ValueError(f"all {len(values)} values are {values[0]}: is one run compared with itself?")
    return float(values.mean()), float(values.std(ddof=1))

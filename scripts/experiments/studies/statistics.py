"""Are two networks equally accurate? The statistics of the accuracy study: NumPy in, numbers out, no framework."""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from scipy import stats

SIGNIFICANCE = 0.05  # of each of the two one-sided tests; the interval that goes with them is the 90 % one
ROUNDING = 1e-9  # values that differ by less, relative to the largest, are equal up to rounding


class Equivalence(NamedTuple):
    """Two one-sided tests of a mean paired difference. All but `n` and the p-values in the units of the differences."""

    margin: float
    n: int
    mean: float
    standard_error: float
    low: float
    """Lower end of the 90 % confidence interval of the mean."""
    high: float
    """Upper end of it."""
    p_low: float
    """Against the hypothesis that the true mean is -margin or less."""
    p_high: float
    """Against the hypothesis that it is margin or more."""

    @property
    def p_value(self) -> float:
        """Of the whole: both hypotheses must fall."""
        return max(self.p_low, self.p_high)

    @property
    def equivalent(self) -> bool:
        """Whether the true mean is shown to lie within the margin: just when the interval does."""
        return self.p_value < SIGNIFICANCE

    @property
    def smallest_margin(self) -> float:
        """The limit of what these data can show: any wider margin would have passed, any narrower one would not."""
        return max(-self.low, self.high)


class McNemar(NamedTuple):
    """On how many items both classifiers are right, only one of them, or neither."""

    both: int
    only_a: int
    only_b: int
    neither: int

    @property
    def p_value(self) -> float:
        """Exact and two-sided, against the hypothesis that either is as likely as the other to be the only right one.

        Raises:
            ValueError: the two are right on the very same items, so that there is nothing to test.
        """
        if self.only_a + self.only_b == 0:
            raise ValueError("both are right on the very same items: is one classifier compared with itself?")
        return float(stats.binomtest(self.only_a, self.only_a + self.only_b, 0.5).pvalue)


def equivalence(differences: Float[np.ndarray, " n"], margin: float) -> Equivalence:
    """Test whether the mean of paired differences lies within ±margin: two one-sided paired t-tests.

    A test that finds no difference proves none: few or noisy data find nothing either. This one has it the other way
    round. What it assumes is a difference of a margin or more, and noise keeps that assumption standing.

    Source: D. J. Schuirmann, A comparison of the two one-sided tests procedure and the power approach for assessing the
    equivalence of average bioavailability, J. Pharmacokinet. Biopharm. 15 (1987) 657-680. As every t-test it takes the
    differences to be independent of each other and roughly normal.

    Args:
        differences: first minus second, one for each pair; here percentage points of accuracy, one for each seed.
        margin: in the same units, positive: the largest difference that does not matter.

    Raises:
        ValueError: there are fewer than two differences, one is not finite, all are equal (as when a run is compared
            with itself; independent ones differ), or the margin is not a positive number.
    """
    if not (math.isfinite(margin) and margin > 0):
        raise ValueError(f"the margin must be a positive number, not {margin}")
    mean, deviation = mean_and_deviation(differences)
    n = len(differences)
    standard_error = deviation / math.sqrt(n)
    student = stats.t(n - 1)
    half_width = student.ppf(1 - SIGNIFICANCE) * standard_error
    return Equivalence(
        margin=margin,
        n=n,
        mean=mean,
        standard_error=standard_error,
        low=float(mean - half_width),
        high=float(mean + half_width),
        p_low=float(student.sf((mean + margin) / standard_error)),
        p_high=float(student.cdf((mean - margin) / standard_error)),
    )


def mcnemar(correct_a: Bool[np.ndarray, "*items"], correct_b: Bool[np.ndarray, "*items"]) -> McNemar:
    """Cross-tabulate on which items two classifiers are right; the result's `p_value` is McNemar's exact test.

    Source: Q. McNemar, Note on the sampling error of the difference between correlated proportions or percentages,
    Psychometrika 12 (1947) 153-157, with the binomial in place of his chi-square, which approximates it.

    Pooled over the seeds of independently trained networks ([seeds, images]) it takes every item to be independent of
    every other. They are not: the images of a seed share that seed's two networks, of which one is the luckier, and
    every seed is scored on the same images. So it speaks of these very networks on these very images; as evidence about
    two ways of training its p-value is too small (T. G. Dietterich, Approximate statistical tests for comparing
    supervised classification learning algorithms, Neural Computation 10 (1998) 1895-1923). About those `equivalence`
    speaks, for which a seed is one item.

    Args:
        correct_a: whether the first is right, for each item.
        correct_b: whether the second is right, for the same items in the same order.

    Raises:
        ValueError: the shapes differ, there are no items, or the arrays are not boolean.
    """
    if correct_a.shape != correct_b.shape:
        raise ValueError(f"the two are scored on different items: {correct_a.shape} and {correct_b.shape}")
    if correct_a.size == 0:
        raise ValueError("there are no items")
    if correct_a.dtype != bool or correct_b.dtype != bool:
        raise ValueError(f"right or wrong must be boolean, not {correct_a.dtype} and {correct_b.dtype}")
    both, only_a, only_b, neither = (
        int(np.count_nonzero(cell))
        for cell in (correct_a & correct_b, correct_a & ~correct_b, ~correct_a & correct_b, ~(correct_a | correct_b))
    )
    return McNemar(both, only_a, only_b, neither)


def prediction_interval(values: Float[np.ndarray, " n"], false_alarm: float) -> tuple[float, float]:
    """Where one more value from the same normal distribution falls, but for a probability of `false_alarm`.

    Mean ± t · s · sqrt(1 + 1/n), t being Student's quantile for n - 1 degrees of freedom: wider than a normal one's, as
    mean and s are estimates. Source: G. A. Whitmore, Prediction limits for a univariate normal observation, The
    American Statistician 40 (1986) 141-143.

    Raises:
        ValueError: there are fewer than two values, one is not finite, all are equal, or the probability is not between
            0 and 1.
    """
    if not 0 < false_alarm < 1:
        raise ValueError(f"the false-alarm rate must be between 0 and 1, not {false_alarm}")
    mean, deviation = mean_and_deviation(values)
    n = len(values)
    half_width = float(stats.t(n - 1).ppf(1 - false_alarm / 2)) * deviation * math.sqrt(1 + 1 / n)
    return mean - half_width, mean + half_width


def mean_and_deviation(values: Float[np.ndarray, " n"]) -> tuple[float, float]:
    """Mean and sample standard deviation (n - 1) of values that can bear a test.

    Raises:
        ValueError: they are not a vector of two or more finite and different values.
    """
    if values.ndim != 1 or len(values) < 2:
        raise ValueError(f"two values or more are needed, not an array of shape {values.shape}")
    if not np.isfinite(values).all():
        at = int(np.flatnonzero(~np.isfinite(values))[0])
        raise ValueError(f"value {at} of {len(values)} is {values[at]}")
    if np.ptp(values) <= ROUNDING * np.abs(values).max():
        raise ValueError(f"all {len(values)} values are {values[0]}: is one run compared with itself?")
    return float(values.mean()), float(values.std(ddof=1))

"""The statistics of the accuracy study, compared with published and hand-computed values."""

import math
from typing import Any

import numpy as np
import pytest
from scipy import stats

from experiments.studies.accuracy import count_correct, equivalence, mcnemar_p_value, prediction_interval

SPREAD = np.array([-0.31, 0.12, 0.25, -0.08, 0.02, -0.17, 0.29, -0.22, 0.14, -0.04])  # points, ten seeds of equals


def test_tost_gives_the_value_that_pingouin_publishes() -> None:
    # pingouin-stats.org/generated/pingouin.tost.html, example 2: bound 0.5, 5 degrees of freedom, p = 0.954854
    differences = np.array([4.0, 7, 8, 6, 3, 2]) - np.array([6.0, 8, 7, 10, 11, 9])
    assert equivalence(differences, 0.5)["p_value"] == pytest.approx(0.954854, abs=1e-6)


@pytest.mark.parametrize(
    ("differences", "equivalent"),
    [
        (SPREAD, True),
        (SPREAD + 1, False),
        (SPREAD - 1, False),
        (SPREAD + 0.5, False),
        (SPREAD[:2], False),
        (5 * SPREAD, False),
    ],
    ids=["equals", "a point better", "a point worse", "the margin", "two seeds", "noisy"],
)
def test_tost_is_two_of_scipys_one_sided_tests(differences: np.ndarray, equivalent: bool) -> None:
    result = equivalence(differences, 0.5)
    assert result["equivalent"] is equivalent
    assert (result["mean"], result["standard_error"]) == pytest.approx((differences.mean(), stats.sem(differences)))
    assert result["p_low"] == pytest.approx(stats.ttest_1samp(differences, -0.5, alternative="greater").pvalue)
    assert result["p_high"] == pytest.approx(stats.ttest_1samp(differences, 0.5, alternative="less").pvalue)
    interval = stats.ttest_1samp(differences, 0).confidence_interval(0.90)
    assert (result["low"], result["high"]) == pytest.approx((interval.low, interval.high))
    assert equivalence(differences, result["smallest_margin"] * 1.0001)["equivalent"]
    assert not equivalence(differences, result["smallest_margin"] * 0.9999)["equivalent"]


@pytest.mark.parametrize(
    ("values", "complaint"),
    [
        ([], "two or more finite"),
        ([0.1], "two or more finite"),
        ([0.1, math.nan, 0.2], "two or more finite"),
        ([0.1, 0.2, -math.inf], "two or more finite"),
        ([0.0, 0.0, 0.0], "compared with itself"),
        ([0.3, 0.1 + 0.2, 0.3], "compared with itself"),
    ],
)
def test_values_that_allow_no_test_are_errors(values: list[Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        equivalence(np.array(values, float), 0.5)
    with pytest.raises(ValueError, match=complaint):
        prediction_interval(np.array(values, float), 0.05)


@pytest.mark.parametrize(
    ("only_a", "only_b", "p_value"),
    [
        (2, 9, 2 * (1 + 11 + 55) / 2**11),  # by hand; Fay's vignette exactMcNemar of R's exact2x2 prints 0.06543
        (12, 5, 0.1435),  # stat-tools.xyz/mcnemar?b=12&c=5
        (1, 9, 22 / 1024),  # by hand
        (7, 7, 1.0),
    ],
)
def test_mcnemars_exact_p_value(only_a: int, only_b: int, p_value: float) -> None:
    assert mcnemar_p_value(only_a, only_b) == pytest.approx(p_value, abs=5e-5)
    assert mcnemar_p_value(only_b, only_a) == pytest.approx(p_value, abs=5e-5)


def test_a_classifier_compared_with_itself_is_an_error() -> None:
    with pytest.raises(ValueError, match="compared with itself"):
        mcnemar_p_value(0, 0)


def test_items_are_counted_by_who_is_right() -> None:
    a = np.array([True, True, True, False, False, False, True, True])
    b = np.array([True, False, False, True, False, False, True, True])
    assert count_correct(a, b) == {"both": 3, "only_a": 2, "only_b": 1, "neither": 2}


def test_a_prediction_interval_by_hand() -> None:
    # One degree of freedom: the upper quartile of Student's t is tan(pi / 4) = 1, so 1 ± sqrt(2) sqrt(1 + 1/2).
    assert prediction_interval(np.array([0.0, 2.0]), 0.5) == pytest.approx((1 - math.sqrt(3), 1 + math.sqrt(3)))

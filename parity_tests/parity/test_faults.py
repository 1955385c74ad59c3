"""The harness can fail: every planted fault is found by the check that is meant for it, at the right place."""

from pathlib import Path

import numpy as np
import pytest

from parity_tests.harness.checks import first_divergence
from parity_tests.harness.compare import EXACT, Bound, compare
from parity_tests.harness.faults import FAULTS
from parity_tests.harness.pair import Pair
from parity_tests.harness.product_pairs import BATCH_SIZE, feed_forward, simple_cnn

WITHOUT_CONVOLUTION = ("bias-left-out", "relu-leaky", "gradient-sign", "learning-rate", "one-weight")
WITH_CONVOLUTION_OR_DATA = ("flatten-order", "padding-one-sided", "pool-averages", "labels-shifted", "fixed-order")

BY_NAME = {fault.name: fault for fault in FAULTS}


def assert_found(name: str, pair: Pair) -> None:
    """Plant a fault and assert that the check that is meant for it finds it, and where."""
    fault = BY_NAME[name]
    divergence = first_divergence(fault.plant(pair))
    assert divergence is not None
    assert divergence.check == fault.check
    assert fault.where(pair) in divergence.where


@pytest.mark.parametrize("name", BY_NAME)
def test_a_planted_fault_is_caught_and_localised(name: str, data_dir: Path) -> None:
    assert_found(name, simple_cnn(data_dir, 3 * BATCH_SIZE + 8))


@pytest.mark.parametrize("name", WITHOUT_CONVOLUTION)
def test_the_same_faults_can_be_planted_in_another_pair(name: str) -> None:
    assert_found(name, feed_forward())


@pytest.mark.parametrize("name", WITH_CONVOLUTION_OR_DATA)
def test_a_fault_that_a_pair_has_no_place_for_is_refused_with_the_reason(name: str) -> None:
    with pytest.raises(LookupError, match="FeedForward in linen has no "):
        BY_NAME[name].plant(feed_forward())


def test_a_sound_pair_diverges_nowhere() -> None:
    assert first_divergence(feed_forward()) is None


# --- The comparison of two sets of arrays ---

ONE = np.ones(1)


@pytest.mark.parametrize(
    ("actual", "expected", "problem"),
    [
        ({}, {}, "nothing to compare"),
        ({"w": np.ones(0)}, {"w": np.ones(0)}, "empty"),
        ({}, {"w": ONE}, "PyTorch has it and JAX does not"),
        ({"w": ONE, "v": ONE}, {"w": ONE}, "JAX has it and PyTorch does not"),
        ({"w": np.ones((1, 3))}, {"w": np.ones((3, 1))}, "shape"),
        ({"w": np.ones(())}, {"w": np.ones(3)}, "shape"),
        ({"w": np.ones(3, np.float32)}, {"w": np.ones(3)}, "dtype"),
        ({"w": np.array([1, np.nan])}, {"w": np.ones(2)}, "JAX has nan at [1]"),
        ({"w": np.ones(2)}, {"w": np.array([1, np.inf])}, "PyTorch has inf at [1]"),
        ({"w": np.array([np.nan])}, {"w": np.array([np.nan])}, "nan"),
        ({"w": np.array([np.inf])}, {"w": np.array([np.inf])}, "inf"),
    ],
)
def test_a_comparison_fails_whatever_the_bound(
    actual: dict[str, np.ndarray], expected: dict[str, np.ndarray], problem: str
) -> None:
    assert problem in str(next(compare("test", actual, expected, Bound(1e9, "the test's own"))))


def test_a_comparison_names_tensor_index_both_values_bound_and_its_source() -> None:
    actual, expected = np.ones((2, 3)), np.ones((2, 3))
    actual[1, 2] = 1.25
    (divergence,) = compare("test", {"w": actual}, {"w": expected}, Bound(0.1, "the test's own"))
    for part in ("w", "[1, 2]", "JAX 1.25", "PyTorch 1", "1.0e-01", "the test's own", "1 of 6"):
        assert part in str(divergence)


def test_equal_bits_pass_the_exact_bound_and_one_ulp_does_not() -> None:
    one = {"w": np.ones(3, np.float32)}
    assert not list(compare("test", one, one, EXACT))
    assert list(compare("test", {"w": np.nextafter(one["w"], np.float32(2))}, one, EXACT))

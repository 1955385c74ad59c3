"""The harness can fail: every planted fault is caught by the check that is meant for it, and told where it is."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from parity_tests.harness.checks import first_divergence
from parity_tests.harness.compare import EXACT, Bound, compare
from parity_tests.harness.faults import FAULTS, Fault
from parity_tests.harness.product_pairs import BATCH_SIZE, feed_forward, simple_cnn

TEN_PERCENT = Bound(0.1, "the test's own")


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_planted_fault_is_caught_and_localised(fault: Fault, data_dir: Path) -> None:
    pair = simple_cnn(data_dir, 3 * BATCH_SIZE + 8)
    divergence = first_divergence(fault.plant(pair))
    assert divergence is not None
    assert divergence.check == fault.check
    assert fault.where(pair) in divergence.where


@pytest.mark.parametrize("name", ["bias-left-out", "relu-leaky", "gradient-sign", "learning-rate", "one-weight"])
def test_the_same_faults_can_be_planted_in_another_pair(name: str) -> None:
    (fault,) = (fault for fault in FAULTS if fault.name == name)
    pair = feed_forward()
    divergence = first_divergence(fault.plant(pair))
    assert divergence is not None
    assert (divergence.check, fault.where(pair) in divergence.where) == (fault.check, True)


def problems(actual: dict[str, np.ndarray], expected: dict[str, np.ndarray], bound: Bound = TEN_PERCENT) -> list[str]:
    """What a comparison says."""
    return [str(divergence) for divergence in compare("test", actual, expected, bound)]


def test_a_comparison_tells_tensor_index_both_values_bound_and_its_source() -> None:
    actual, expected = np.ones((2, 3)), np.ones((2, 3))
    actual[1, 2] = 1.25
    (problem,) = problems({"w": actual}, {"w": expected})
    for part in ("w", "[1, 2]", "JAX 1.25", "PyTorch 1", "1.0e-01", "the test's own", "1 of 6"):
        assert part in problem


def test_a_comparison_of_nothing_fails() -> None:
    assert "nothing to compare" in problems({}, {})[0]
    assert "empty" in problems({"w": np.ones(0)}, {"w": np.ones(0)})[0]


def test_a_missing_or_an_extra_key_fails() -> None:
    one = {"w": np.ones(1)}
    assert "PyTorch has it and JAX does not" in problems({}, one)[0]
    assert "JAX has it and PyTorch does not" in problems(one | {"v": np.ones(1)}, one)[0]


def test_nan_and_infinity_fail_on_either_side_and_on_both() -> None:
    for bad in (np.nan, np.inf):
        sick, sound = {"w": np.array([1.0, bad])}, {"w": np.ones(2)}
        for actual, expected in ((sick, sound), (sound, sick), (sick, sick)):
            assert str(bad) in problems(actual, expected)[0]


def test_nothing_is_broadcast_or_cast() -> None:
    assert "shape" in problems({"w": np.ones((1, 3))}, {"w": np.ones((3, 1))})[0]
    assert "shape" in problems({"w": np.ones(())}, {"w": np.ones(3)})[0]
    assert "dtype" in problems({"w": np.ones(3, np.float32)}, {"w": np.ones(3)})[0]


def test_equal_bits_pass_the_exact_bound_and_one_ulp_does_not() -> None:
    one = {"w": np.ones(3, np.float32)}
    assert problems(one, one, EXACT) == []
    assert problems({"w": np.nextafter(one["w"], np.float32(2))}, one, EXACT)


def test_a_sound_pair_diverges_nowhere() -> None:
    assert first_divergence(replace(feed_forward(), name="again")) is None

"""The harness can fail: every planted fault is found by the check that is meant for it, at the right place."""

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest

from parity_tests.faults import FAULTS, Fault
from parity_tests.harness.checks import examine
from parity_tests.harness.compare import EXACT, Bound, compare
from parity_tests.harness.pair import Pair
from parity_tests.parity.networks import PAIRS
from parity_tests.planting import case_of

BY_NAME = {fault.name: fault for fault in FAULTS}
KINDS = tuple(PAIRS)


@cache
def sound(kind: str) -> Pair:
    """Return the sound network of a kind, with the map of its weights, which is the same for all faults."""
    pair = PAIRS[kind]()
    return replace(pair, weights=case_of(pair).weight_map)


def narrow(pair: Pair, fault: Fault) -> Pair:
    """Leave out the batches and modes that do not matter for the fault, because each is a program to compile."""
    training = fault.check == "statistics" or "training mode" in fault.where(pair)
    sizes = {"outputs": (5,), "gradients": (5,), "statistics": (5,)}.get(fault.check)
    return replace(pair, batch_sizes=sizes, training=training)


def plantings() -> Iterator[Any]:
    """Yield each fault with each kind of network that has a place for it; the default run takes them in turns."""
    for number, fault in enumerate(FAULTS):
        for kind in fault.kinds:
            first = kind == fault.kinds[number % len(fault.kinds)]
            yield pytest.param(fault.name, kind, marks=() if first else pytest.mark.slow)


@pytest.mark.parametrize(("name", "kind"), list(plantings()))
def test_a_planted_fault_is_caught_and_localised(name: str, kind: str) -> None:
    fault, pair = BY_NAME[name], sound(kind)
    result = examine(fault.plant(narrow(pair, fault)), names=("parameters", fault.check))
    found = [(divergence.check, divergence.where) for divergence in result.divergences]
    assert found, f"nothing was found; not checked: {result.not_checked}"
    assert found[0][0] == fault.check, found
    assert any(fault.where(pair) in where for _, where in found), found


# The recurrent network has an embedding and a sum too, though not of positions and not of a residual.
SIMILAR_PLACES = {("positions-off-by-one", "recurrent"), ("residual-twice", "recurrent")}


@pytest.mark.extended
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (fault.name, kind)
        for fault in FAULTS
        for kind in KINDS
        if kind not in fault.kinds and (fault.name, kind) not in SIMILAR_PLACES
    ],
)
def test_a_fault_that_a_pair_has_no_place_for_is_refused_with_the_reason(name: str, kind: str) -> None:
    with pytest.raises(LookupError, match=f"^{kind} "):
        BY_NAME[name].plant(sound(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_a_sound_pair_passes_every_check(kind: str) -> None:
    result = examine(sound(kind))
    assert not result.divergences, "\n".join(map(str, result.divergences))
    assert set(result.not_checked) <= {"precision", *(["statistics"] if kind != "convolutional" else [])}


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
        ({"w": np.array([np.inf])}, {"w": np.array([np.inf])}, "inf"),  # nothing else is compared
        ({"w": np.array([1, np.inf])}, {"w": np.array([1, -np.inf])}, "JAX has inf at [1]"),
        ({"w": np.array([1, -np.inf])}, {"w": np.array([-np.inf, 1])}, "JAX has -inf at [1]"),
        ({"w": np.array([-np.inf, 3e9])}, {"w": np.array([-np.inf, 1])}, "error 3.0e+09"),
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
    masked = {"w": np.array([-np.inf, 1.0, np.inf])}
    assert not list(compare("test", masked, masked, EXACT))

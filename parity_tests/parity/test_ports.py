"""The faults that people met in ports are found where they are, and the sound twins pass."""

from collections.abc import Collection
from dataclasses import replace

import pytest

from experiments.large_ports import Sizes, gpt2_pair, resnet_pair
from parity_tests.faults import FAULTS
from parity_tests.harness import CHECKS, Divergence, Pair, Result, examine
from parity_tests.harness.capture import Case, distance, exact_arithmetic
from parity_tests.parity.ports import PORTS, Finding

FAULTY = [name for name, port in PORTS.items() if port.findings]
SEEDS = 20
# The same fault is planted by default in test_faults.py, under this name. Here, its sound twin is compared by default.
PLANTED = {
    "P1": "padding-one-sided",
    "P3": "norm-eps",
    "P3-positional": "norm-eps",
    "P5": "gelu-tanh",
    "P5-functional": "gelu-tanh",
    "P7-GRU": "recurrent-bias-left-out",
    "P7-LSTM": "gates-exchanged",
    "P8": "statistics-momentum",
    "P10": "statistics-biased-variance",
    "P11": "rmsprop-eps",
    "P18": "tied-weights-untied",
    "P21": "labels-permuted",
    "P23-attention": "attention-unscaled",
    "P23-frozen": "frozen-trained",
}
# What every pair is held to in the default run; the slow tests run all checks.
QUICK = ("parameters", "outputs", "gradients")


def is_expected(divergence: Divergence, finding: Finding) -> bool:
    return divergence.check == finding.check and finding.where in divergence.where


def checks_of(name: str) -> set[str]:
    """Return the checks that must report the faulty twin."""
    return {finding.check for finding in PORTS[name].findings}


def quick(name: str, sound: bool) -> Pair:
    """Return a twin with batches of one size, because each size is a program to compile; the slow tests take two.

    A loss may be wrong for one size alone, so that it is compared with both.
    """
    pair = PORTS[name].make(sound)
    return pair if "loss" in checks_of(name) else replace(pair, batch_sizes=pair.batch_sizes or (5,))


def assert_found(name: str, pair: Pair, checks: Collection[str], seed: int = 0) -> None:
    """Check that each fault of a port is reported, where it is, and nothing else."""
    findings = PORTS[name].findings
    divergences = examine(pair, seed=seed, names=checks).divergences
    for finding in findings:
        assert any(is_expected(divergence, finding) for divergence in divergences), (finding, divergences)
    others = [entry for entry in divergences if not any(is_expected(entry, finding) for finding in findings)]
    assert not others, "\n".join(map(str, others))


def assert_sound(pair: Pair, checks: Collection[str] = tuple(CHECKS), seed: int = 0) -> Result:
    """Check that nothing is reported, and that something was compared."""
    result = examine(pair, seed=seed, names=checks)
    assert not result.divergences, "\n".join(map(str, result.divergences))
    return result


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in PLANTED else ()) for name in FAULTY]
)
def test_the_fault_is_found_where_it_is(name: str) -> None:
    assert name not in PLANTED or PLANTED[name] in {fault.name for fault in FAULTS}
    assert_found(name, quick(name, False), {"parameters"} | checks_of(name))


@pytest.mark.parametrize("name", PORTS)
def test_the_sound_twin_passes(name: str) -> None:
    checks = {*QUICK, *checks_of(name)}
    assert checks == set(assert_sound(quick(name, True), checks).passed)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTY)
def test_the_fault_is_found_by_all_checks_with_every_seed(name: str) -> None:
    for seed in range(SEEDS):
        assert_found(name, PORTS[name].make(False), tuple(CHECKS), seed)


@pytest.mark.slow
@pytest.mark.parametrize("name", PORTS)
def test_the_sound_twin_passes_all_checks_with_every_seed(name: str) -> None:
    for seed in range(SEEDS):
        assert {*QUICK, "transfer", "optimizer", "trajectory"} <= set(
            assert_sound(PORTS[name].make(True), seed=seed).passed
        )


@pytest.mark.slow
@pytest.mark.parametrize("block", ["BasicBlock", "Bottleneck"])
def test_a_short_resnet_passes_all_checks(block: str) -> None:
    assert "statistics" in assert_sound(resnet_pair(block, (1, 1, 1, 1), 64, 10, (3, 2))).passed


def test_a_small_resnet_and_a_small_gpt2_have_a_map_and_the_same_outputs() -> None:
    sizes = Sizes(layers=2, heads=2, features=16, vocabulary=31, positions=12)
    for pair in (resnet_pair("BasicBlock", (1, 1, 1, 1), 32, 10, (3,)), gpt2_pair(sizes, 7, (3,))):
        case = Case(pair)
        with exact_arithmetic("float64"):
            assert distance(case, case.weight_map) < 1e-12

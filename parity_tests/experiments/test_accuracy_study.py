"""The committed study of ten seeds, and a seed that it has not seen, trained for real.

The study's file is held to its own numbers; `scripts/accuracy_study.py` wrote it.
"""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from experiments.studies import accuracy, runs
from experiments.studies.runs import Run, StudyConfig
from experiments.studies.statistics import McNemar
from jax_cnn.config import TEST_SIZE, TrainConfig
from parity_tests.support import ROOT

RESULTS = ROOT / "docs" / "results" / "accuracy" / "accuracy.json"
LARGEST_FILE = 60_000  # bytes

# --- The committed study ---


@pytest.fixture(scope="module")
def results() -> accuracy.Json:
    """The results file; NaN and infinity are no JSON."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{RESULTS} holds {constant}")

    if not RESULTS.exists():
        pytest.fail(f"{RESULTS} is missing: run scripts/accuracy_study.py and commit the file it writes")
    loaded: accuracy.Json = json.loads(RESULTS.read_text(), parse_constant=refuse)
    return loaded


def training(results: accuracy.Json, setting: str, **changes: Any) -> TrainConfig:
    """The training that the study's file describes; its numbers of Adam must be today's."""
    described = results[setting]["config"]
    config = TrainConfig(**{name: described[name] for name in ("epochs", "batch_size", "limit_train", "limit_test")})
    assert described == {name: runs.as_json(config)[name] for name in described}
    return replace(config, **changes)


def test_the_study_is_of_the_defaults_and_of_at_least_ten_seeds(results: accuracy.Json) -> None:
    assert RESULTS.stat().st_size < LARGEST_FILE
    assert training(results, "full") == TrainConfig()
    assert training(results, "short") == runs.short_config(StudyConfig())
    for setting in ("full", "short"):
        seeds = results[setting]["seeds"]
        assert len(seeds) >= 10
        assert [seed["seed"] for seed in seeds] == list(range(len(seeds)))


def test_the_study_tells_where_it_comes_from(results: accuracy.Json) -> None:
    assert "accuracy_study.py" in results["provenance"]["command"]
    assert results["provenance"]["machine"]["cpu"]
    assert set(accuracy.PACKAGES) < set(results["provenance"]["versions"])
    assert results["trained"]["first"] <= results["trained"]["last"] <= results["provenance"]["started"]


@pytest.mark.parametrize("setting", ["full", "short"])
def test_every_seed_of_the_study_is_whole(results: accuracy.Json, setting: str) -> None:
    epochs = results[setting]["config"]["epochs"]
    for seed in results[setting]["seeds"]:
        table = McNemar(**seed["table"])
        assert sum(table) == TEST_SIZE
        assert min(table) > 0
        for framework, alone in (("jax", table.only_a), ("torch", table.only_b)):
            figures = seed[framework]
            assert len(figures["test_accuracy"]) == len(figures["train_seconds"]) == epochs
            counted = (table.both + alone) / TEST_SIZE
            assert figures["test_accuracy"][-1] == pytest.approx(counted, abs=accuracy.SCORING_SLACK / TEST_SIZE)


@pytest.mark.parametrize("setting", ["full", "short"])
def test_the_studys_verdict_follows_from_its_seeds(results: accuracy.Json, setting: str) -> None:
    verdict = accuracy.judge(results[setting]["seeds"])
    for part, figures in verdict.items():
        for name, figure in figures.items():
            assert results[setting][part][name] == pytest.approx(figure), f"{part}: {name}"


def test_the_study_shows_both_frameworks_equally_accurate(results: accuracy.Json) -> None:
    assert results["full"]["equivalence"]["margin"] == accuracy.MARGIN == 0.5
    assert results["full"]["equivalence"]["equivalent"], accuracy.sentence(results)


def test_a_point_more_for_one_framework_would_have_failed(results: accuracy.Json) -> None:
    seeds = json.loads(json.dumps(results["full"]["seeds"]))
    for seed in seeds:
        seed["jax"]["test_accuracy"][-1] += 0.01
    assert not accuracy.judge(seeds)["equivalence"]["equivalent"]


# --- A new seed against the study's spread ---


@pytest.fixture(scope="module")
def new_pair(results: accuracy.Json, data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Run]:
    """The shortened training in both frameworks, with a seed that the study has not seen."""
    folder = tmp_path_factory.mktemp("new_seed")
    config = training(results, "short", seed=len(results["short"]["seeds"]), data_dir=data_dir)
    jax_run = Run("short", "jax", replace(config, out_dir=folder / "jax"))
    torch_run = Run("short", "torch", replace(config, out_dir=folder / "torch"))
    for run in (jax_run, torch_run):
        runs.train(run, print)
    return jax_run, torch_run


def test_a_new_seed_lies_within_the_studys_spread(results: accuracy.Json, new_pair: tuple[Run, Run]) -> None:
    # Bounds: prediction intervals, each missed by one sound seed in 10,000.
    jax_run, torch_run = new_pair
    observed = accuracy.observations({"jax": accuracy.describe_run(jax_run), "torch": accuracy.describe_run(torch_run)})
    assert not accuracy.outliers(observed, results["short"]["spread"])


def test_a_learning_rate_ten_times_too_small_lies_outside(
    results: accuracy.Json, new_pair: tuple[Run, Run], tmp_path: Path
) -> None:
    # Ten times too large would not: after 200 steps it costs no more than a bad seed. The trajectory tests see that.
    jax_run, torch_run = new_pair
    faulty = jax_run._replace(config=replace(jax_run.config, out_dir=tmp_path))
    runs.train(faulty, print, extra_flags=("--learning-rate", "1e-4"))
    observed = accuracy.observations({"jax": accuracy.describe_run(faulty), "torch": accuracy.describe_run(torch_run)})
    found = accuracy.outliers(observed, results["short"]["spread"])
    assert any(finding.startswith("jax") for finding in found), found
    assert not any(finding.startswith("torch") for finding in found), found


def test_nan_lies_outside_of_any_spread() -> None:
    spread = {"jax loss": {"low": 0.0, "high": 1.0}}
    assert accuracy.outliers({"jax loss": math.nan}, spread)
    assert not accuracy.outliers({"jax loss": 0.5}, spread)

"""The accuracy study's machinery: everything but the training, which random networks stand in for."""

import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from experiments.processes import SCRIPTS
from experiments.studies import accuracy, runs
from experiments.studies.runs import Run, StudyConfig
from jax_cnn.config import UserError
from jax_cnn.run.folder import METRICS, WEIGHTS, RunFolder
from jax_cnn.run.provenance import provenance
from jax_cnn.torch_layout import SIMPLE_CNN, save_weights


def pretend_to_train(run: Run) -> None:
    """Leave the files of a finished run of a random network, whose accuracy is true."""
    config = run.config
    rng = np.random.default_rng((config.seed, run.framework == "jax", run.setting == "full"))
    folder = RunFolder(config.out_dir, print)
    folder.write_config(
        runs.as_asked(run), {"framework": run.framework, "device": "cpu (cpu)"} | provenance(("numpy",))
    )
    folder.write_weights({name: rng.normal(0, 0.1, leaf.shape).astype(np.float32) for name, leaf in SIMPLE_CNN.items()})
    scorer = accuracy.score_jax if run.framework == "jax" else accuracy.score_torch
    correct = scorer(config.out_dir / WEIGHTS, config.data_dir, config.limit_test)
    row = {"test_accuracy": float(correct.mean()), "test_loss": 2.3 + rng.normal(0, 0.01)}
    seconds = {"train_seconds": 1.0, "compile_seconds": 1.0}
    folder.write_metrics([{"epoch": epoch + 1, **seconds, **row} for epoch in range(config.epochs)])


@pytest.fixture
def small(data_dir: Path, tmp_path: Path) -> StudyConfig:
    """A study of 2 seeds on a batch of images."""
    return StudyConfig(
        seeds=2,
        epochs=2,
        out_dir=tmp_path / "runs",
        data_dir=data_dir,
        results=tmp_path / "results" / "accuracy.json",
        limit_train=64,
        limit_test=400,
        short_train=32,
    )


@pytest.fixture
def run(small: StudyConfig) -> Run:
    """One finished run of that study."""
    run = runs.planned_runs(small)[2]
    assert (run.setting, run.framework) == ("full", "jax")
    pretend_to_train(run)
    assert runs.is_finished(run)
    return run


def test_every_pair_shares_all_but_framework_and_folder() -> None:
    planned = runs.planned_runs(StudyConfig(seeds=3))
    assert len({run.config.out_dir for run in planned}) == len(planned) == 12
    for jax_run, torch_run in zip(planned[::2], planned[1::2], strict=True):
        assert (jax_run.framework, torch_run.framework) == ("jax", "torch")
        assert replace(jax_run.config, out_dir=Path()) == replace(torch_run.config, out_dir=Path())


def test_an_interrupted_study_goes_on_where_it_stopped(small: StudyConfig) -> None:
    planned = runs.planned_runs(small)
    for run in planned:
        pretend_to_train(run)
    (planned[0].config.out_dir / WEIGHTS).unlink()  # as if the study had been stopped in it
    before = {run: (run.config.out_dir / METRICS).stat().st_mtime_ns for run in planned}

    flags = [word for name, value in asdict(small).items() for word in (f"--{name.replace('_', '-')}", str(value))]
    line = [sys.executable, str(SCRIPTS / "accuracy_study.py"), *flags]
    done = subprocess.run(line, capture_output=True, text=True, check=False)

    assert done.stderr == ""
    assert done.returncode == 1  # all is done, and two untrained networks are not equivalent
    assert "8 runs: 7 are there, 1 to do" in done.stdout
    assert [run for run in planned if (run.config.out_dir / METRICS).stat().st_mtime_ns != before[run]] == planned[:1]
    result = json.loads(small.results.read_text())
    assert accuracy.sentence(result) in done.stdout
    assert accuracy.sentence(result).startswith("NOT shown to be equivalent")
    for setting in ("short", "full"):
        assert [sum(seed["table"].values()) for seed in result[setting]["seeds"]] == [400, 400]
        assert accuracy.judge(result[setting]["seeds"])["spread"] == result[setting]["spread"]


@pytest.mark.parametrize("change", [{"seed": 9}, {"epochs": 3}, {"limit_train": 65}, {"batch_size": 32}])
def test_a_run_of_another_configuration_is_not_reused(run: Run, change: dict[str, Any]) -> None:
    assert not runs.is_finished(run._replace(config=replace(run.config, **change)))


def test_a_run_may_move(run: Run, tmp_path: Path) -> None:
    moved = run.config.out_dir.rename(tmp_path / "moved")
    assert runs.is_finished(run._replace(config=replace(run.config, out_dir=moved)))


def test_a_run_cut_short_is_not_reused(run: Run) -> None:
    (run.config.out_dir / WEIGHTS).unlink()
    assert not runs.is_finished(run)
    pretend_to_train(run)
    metrics = run.config.out_dir / METRICS
    metrics.write_text(metrics.read_text().splitlines(keepends=True)[0])
    assert not runs.is_finished(run)


def test_a_run_of_the_other_framework_or_version_is_not_reused(run: Run) -> None:
    assert not runs.is_finished(run._replace(framework="torch"))
    config = run.config.out_dir / "config.json"
    record = json.loads(config.read_text())
    config.write_text(json.dumps(record | {"versions": record["versions"] | {"numpy": "1.0"}}))
    assert not runs.is_finished(run)


def test_weights_that_belie_the_metrics_are_an_error(run: Run) -> None:
    save_weights(
        run.config.out_dir / WEIGHTS, {name: np.zeros(leaf.shape, np.float32) for name, leaf in SIMPLE_CNN.items()}
    )
    with pytest.raises(UserError, match="delete the folder"):
        accuracy.score(run)


def test_both_scorers_agree_on_the_same_weights(run: Run) -> None:
    arguments = (run.config.out_dir / WEIGHTS, run.config.data_dir, run.config.limit_test)
    np.testing.assert_array_equal(accuracy.score_jax(*arguments), accuracy.score_torch(*arguments))


def test_a_failed_training_says_which_and_why(run: Run) -> None:
    with pytest.raises(UserError, match=r"train_jax\.py .*status 2: error: --batch-size must be"):
        runs.train(run, print, extra_flags=("--batch-size", "0"))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [({"seeds": 1}, "--seeds"), ({"epochs": 0}, "--epochs"), ({"short_train": 0}, "--short-train")],
)
def test_a_study_that_cannot_be_is_refused(change: dict[str, int], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        StudyConfig(**change)  # type: ignore[arg-type]  # any field

"""The study of what convolution buys: its terms, its trainings, and its judgement."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from experiments.studies import convolution, convolution_figure, convolution_training, runs
from experiments.studies.convolution import DIRECTIONS, shift
from experiments.studies.convolution_runs import (
    ENTRIES,
    FRAMEWORKS,
    SAME_PARAMETERS,
    TIMED,
    ConvolutionConfig,
    Pace,
    base_config,
    configured,
    epochs_of,
    planned_runs,
)
from experiments.studies.runs import Run, is_finished, read_metrics
from jax_cnn.config import CNN, Network, UserError
from jax_cnn.data import FashionMNIST
from jax_cnn.run.folder import WEIGHTS, RunFolder
from jax_cnn.run.provenance import provenance
from jax_cnn.torch_layout import layout_of, load_weights
from parity_tests.support import ROOT

PACE: Pace = {framework: {"linear": 1.0, "mlp": 2.0, "cnn": 3.1} for framework in FRAMEWORKS}


@pytest.fixture
def small(data_dir: Path, tmp_path: Path) -> ConvolutionConfig:
    """A study of two seeds on a few images."""
    return ConvolutionConfig(
        seeds=2, epochs=2, out_dir=tmp_path / "study", data_dir=data_dir, limit_train=128, limit_test=60, pace_train=64
    )


# --- Terms ---


def test_equal_parameters_are_as_equal_as_can_be() -> None:
    counts = [convolution.parameters(Network("mlp", hidden)) for hidden in (SAME_PARAMETERS, SAME_PARAMETERS + 1)]
    assert counts[0] < convolution.parameters(CNN) == 1_630_090 < counts[1]


def test_equal_time_is_turned_into_epochs(small: ConvolutionConfig) -> None:
    epochs = {entry.name: epochs_of(entry, small, PACE["jax"]) for entry in ENTRIES}
    assert epochs["SimpleCNN"] == epochs["feed-forward"] == epochs["feed-forward, equal parameters"] == small.epochs
    assert epochs["softmax regression, equal time"] == round(2 * 3.1)
    assert epochs["feed-forward, equal time"] == round(2 * 3.1 / 2)
    assert [network.model for network in TIMED] == ["linear", "mlp", "cnn"]


def test_images_are_shifted_and_what_comes_in_is_black() -> None:
    images = np.zeros((1, 28, 28), np.uint8)
    images[0, 10, 20] = 255
    for rows, columns in (*DIRECTIONS, (2, -2), (0, 0)):
        moved = shift(images, rows, columns)
        assert moved.shape == images.shape
        assert np.argwhere(moved).tolist() == [[0, 10 + rows, 20 + columns]]
    full = np.full((1, 28, 28), 255, np.uint8)
    assert np.count_nonzero(shift(full, 2, 0) == 0) == 2 * 28
    assert np.count_nonzero(shift(full, -1, 1) == 0) == 28 + 27
    assert len(set(DIRECTIONS)) == 8


# --- Training ---


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_the_weights_are_the_commands_own_bit_by_bit(
    framework: runs.Framework, small: ConvolutionConfig, tmp_path: Path
) -> None:
    base = replace(base_config(small), limit_train=200)  # with a remainder
    run = Run("", framework, configured(base, Network("mlp", 20), tmp_path / "here", seed=3))
    there = run._replace(config=replace(run.config, out_dir=tmp_path / "there"))
    convolution_training.train(run, print)
    runs.train(there, print)
    assert is_finished(run)
    assert is_finished(there)
    ours, theirs = (load_weights(each.config.out_dir / WEIGHTS, "float32", None) for each in (run, there))
    assert all(np.array_equal(ours[name], theirs[name]) for name in theirs)
    ours_rows, their_rows = (read_metrics(each.config.out_dir) for each in (run, there))
    for one, other in zip(ours_rows, their_rows, strict=True):
        assert [one[name] for name in ("train_loss", "test_loss", "test_accuracy")] == [
            other[name] for name in ("train_loss", "test_loss", "test_accuracy")
        ]


# --- Judgement: random networks stand in for the trained ones ---


def pretend_to_train(run: Run, data: FashionMNIST) -> None:
    """Leave the files of a finished run of a random network, whose accuracy is true."""
    config = run.config
    rng = np.random.default_rng((config.seed, run.framework == "jax", config.epochs))
    weights = {
        name: rng.normal(0, 0.1, leaf.shape).astype(np.float32) for name, leaf in layout_of(config.network).items()
    }
    classifiers = {"jax": convolution.jax_classifier, "torch": convolution.torch_classifier}
    pixels, labels = data.test_images[: config.limit_test], data.test_labels[: config.limit_test]
    accuracy = float((classifiers[run.framework](weights, config.network)(pixels) == labels).mean())
    with RunFolder(config.out_dir, print) as folder:
        folder.write_config(runs.as_asked(run), {"framework": run.framework} | provenance(("numpy",)))
        folder.write_weights(weights)
        row = {"test_accuracy": accuracy, "train_loss": 2.3, "test_loss": 2.3, "train_seconds": 1.0}
        folder.write_metrics([row] * config.epochs)


def test_results_table_figure_and_sentences_come_of_the_runs(small: ConvolutionConfig, data: FashionMNIST) -> None:
    runs = planned_runs(small, PACE)
    for run in runs:
        pretend_to_train(run, data)
        assert is_finished(run)
    result = convolution.conclude(small, PACE)
    assert [entry["name"] for entry in result["entries"]] == [entry.name for entry in ENTRIES]
    for entry in result["entries"]:
        assert [len(entry[framework]["shifted"]["2"]) for framework in FRAMEWORKS] == [2, 2]
    convolution.write(result, small.out_dir)
    convolution_figure.draw(result, small.out_dir / "convolution.png")
    assert (small.out_dir / "convolution.png").stat().st_size > 20_000
    assert json.loads((small.out_dir / "convolution.json").read_text()) == json.loads(json.dumps(result))
    assert len(convolution_figure.markdown(result)) == len(ENTRIES) + 2
    assert convolution_figure.accuracy_table(result).row_count == len(ENTRIES)
    assert "SimpleCNN reaches" in convolution.sentences(result)[0]

    rows = read_metrics(runs[0].config.out_dir)  # and a run that is not what it says is refused
    rows[-1]["test_accuracy"] -= 0.1
    (runs[0].config.out_dir / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (runs[0].config.out_dir / convolution.SCORES).unlink()
    with pytest.raises(UserError, match="run the study again"):
        convolution.conclude(small, PACE)


def study_command(*flags: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """What a person types."""
    command = [sys.executable, str(ROOT / "scripts" / "convolution_study.py"), *map(str, flags)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


def test_a_slip_is_one_line(tmp_path: Path) -> None:
    for flags, words in (
        (("--seeds", 1), "--seeds must be at least 2"),
        (("--pace-train", 0), "--pace-train must be between 1 and 60,000"),
        (("--epochs", 0), "--epochs must be between"),
    ):
        done = study_command(*flags, cwd=tmp_path)
        assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
        assert words in done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_the_whole_study_runs_and_repeats_nothing(data_dir: Path, tmp_path: Path) -> None:
    flags = ("--seeds", 2, "--epochs", 1, "--limit-train", 640, "--limit-test", 100, "--pace-train", 320)
    first = study_command(*flags, "--data-dir", data_dir, cwd=tmp_path)
    assert (first.returncode, first.stderr) == (0, "")
    again = study_command(*flags, "--data-dir", data_dir, cwd=tmp_path)
    assert "24 runs: 24 are there, 0 to do" in again.stdout
    assert again.stdout.splitlines()[-10:] == first.stdout.splitlines()[-10:]

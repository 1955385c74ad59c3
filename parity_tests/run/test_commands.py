"""The two training commands, run as a person runs them: in their own process, in a pipe and on a terminal."""

import math
import re
import shlex
import shutil
import sys
from importlib.metadata import version
from pathlib import Path

import matplotlib.image
import pytest
import safetensors.torch
import torch

from jax_cnn.run.folder import FILES
from jax_cnn.torch_layout import SIMPLE_CNN
from parity_tests.support import (
    TrainedRun,
    TrainOnce,
    command_line,
    read_json,
    read_metrics,
    run_on_a_terminal,
    run_successfully,
    without_styles,
)

CHECKPOINTS = tuple(f"checkpoint-{step:09}.safetensors" for step in (4, 8))  # after each epoch of four steps
SMALL = ("--limit-train", "200", "--limit-test", "100", "--epochs", "2", "--seed", "3", "--device", "cpu")


@pytest.fixture
def run(train_once: TrainOnce, framework: str) -> TrainedRun:
    """Return a small run in a pipe, into the default folder."""
    return train_once(framework, *SMALL)


@pytest.fixture(scope="module")
def second_runs(train_once: TrainOnce, tmp_path_factory: pytest.TempPathFactory) -> dict[str, TrainedRun]:
    """Return for each framework the small run again: on a terminal, and over a copy of the first one's results."""
    second_runs = {}
    for framework in ("jax", "torch"):
        first = train_once(framework, *SMALL)
        cwd = tmp_path_factory.mktemp("again")
        results = shutil.copytree(first.results, cwd / "runs" / framework)
        status, output = run_on_a_terminal(f"train_{framework}", *first.arguments, cwd=cwd)
        assert status == 0, output
        second_runs[framework] = TrainedRun(cwd, results, first.arguments, output)
    return second_runs


def names(folder: Path) -> list[str]:
    """Return the names of everything in a folder, in order."""
    return sorted(path.name for path in folder.iterdir())


# What a run leaves behind


def test_a_run_leaves_its_files_and_nothing_else(run: TrainedRun) -> None:
    assert names(run.results) == sorted([*FILES, *CHECKPOINTS, ".lock"])
    assert names(run.cwd) == ["runs"]


def test_the_config_file_says_what_ran_by_which_command_and_on_what(run: TrainedRun, framework: str) -> None:
    record = read_json(run.results / "config.json")
    flags = {"limit_train": 200, "limit_test": 100, "epochs": 2, "seed": 3, "device": "cpu", "precision": "float32"}
    assert flags.items() <= record["config"].items()
    assert record["config"]["adam"] == {"learning_rate": 1e-3, "b1": 0.9, "b2": 0.999, "eps": 1e-8}
    command = ["python", *command_line(f"train_{framework}", *run.arguments)[1:]]
    assert shlex.split(record["command"]) == command
    assert record["framework"] == framework
    assert record["device"].startswith("cpu")
    assert record["versions"][framework] == version(framework)
    assert record["versions"]["python"] == sys.version.split()[0]
    assert record["machine"]["cores"] >= 1


def test_the_metrics_have_a_line_for_every_epoch(run: TrainedRun, framework: str) -> None:
    """Only JAX compiles, and only once."""
    rows = read_metrics(run.results)
    assert [row["epoch"] for row in rows] == [1, 2]
    for row in rows:
        assert all(math.isfinite(value) for value in row.values()), row
        assert all(row[name] > 0 for name in ("train_loss", "test_loss", "train_seconds", "eval_seconds")), row
        assert row["test_accuracy"] in [count / 100 for count in range(101)], "there are 100 test images"
        assert row["images_per_second"] == pytest.approx(200 / row["train_seconds"])
    assert [row["compile_seconds"] > 0 for row in rows] == [framework == "jax", False]
    assert rows[1]["train_loss"] < rows[0]["train_loss"], "it does not learn"


def test_the_curves_are_a_picture(run: TrainedRun) -> None:
    picture = matplotlib.image.imread(run.results / "curves.png")
    height, width, _ = picture.shape
    assert height >= 400
    assert width >= 800
    assert picture[..., :3].min() < 0.3 < 0.9 < picture[..., :3].max(), "nothing is drawn on it"


def test_a_second_run_into_the_same_folder_keeps_the_files_of_the_first_and_gives_the_same_bits(
    run: TrainedRun, second_runs: dict[str, TrainedRun], framework: str
) -> None:
    second_run = second_runs[framework]
    aside = second_run.results / "earlier-1"
    assert names(aside) == sorted([*FILES, *CHECKPOINTS])
    assert all((aside / name).read_bytes() == (run.results / name).read_bytes() for name in names(aside))
    assert names(second_run.results) == sorted([*FILES, *CHECKPOINTS, ".lock", "earlier-1"])
    first, second = (results / "weights.safetensors" for results in (run.results, second_run.results))
    assert first.read_bytes() == second.read_bytes(), "the same seed gave other bits"
    (notice,) = [line for line in second_run.output.splitlines() if "earlier-1" in line]
    assert str(aside.relative_to(second_run.cwd)) in notice


# Mean loss over 100 images, computed once in float32 and once in float64. The worst difference seen was 2.1e-7, over 10
# seeds trained by each framework.
LOSS_BOUND = 1e-6


def test_either_framework_starts_from_the_weights_of_the_other_and_keeps_them_in_float64(
    train_once: TrainOnce, tmp_path: Path, framework: str
) -> None:
    """With steps too small to change a float64 number, the weights and the loss stay as the other left them.

    They are given as what PyTorch saves.
    """
    source = train_once("torch" if framework == "jax" else "jax", *SMALL)
    weights = source.results / "weights.safetensors"
    torch.save({"state_dict": safetensors.torch.load_file(weights), "epoch": 2}, tmp_path / "weights.pth")
    flags = (*source.arguments, "--epochs", 1, "--learning-rate", 1e-30, "--precision", "float64")
    run_successfully(f"train_{framework}", *flags, "--init-weights", "weights.pth", "--out-dir", "out", cwd=tmp_path)
    before, after = (
        safetensors.torch.load_file(folder / weights.name) for folder in (source.results, tmp_path / "out")
    )
    assert before.keys() == after.keys() == SIMPLE_CNN.keys()
    assert {tensor.dtype for tensor in before.values()} == {torch.float32}
    for name, tensor in after.items():
        assert tensor.dtype == torch.float64, f"{name} is {tensor.dtype}"
        assert torch.equal(tensor, before[name].double()), f"{name} changed"
    loss_before, loss_after = (read_metrics(folder)[-1]["test_loss"] for folder in (source.results, tmp_path / "out"))
    assert abs(loss_before - loss_after) <= LOSS_BOUND, f"{abs(loss_before - loss_after):.1e} > {LOSS_BOUND:.1e}"


# What a run prints

PROGRESS = r"\d+ of 200 images, loss [1-9]\.\d{3}, [1-9][\d,]* images/s, \d+ s left"


def test_a_pipe_gets_plain_lines_a_table_and_the_place_of_the_results(run: TrainedRun, framework: str) -> None:
    assert not re.search(r"[\x1b\r]", run.output), "a log file should hold no control codes"
    lines = run.output.splitlines()
    assert f"{framework} on cpu: 200 images an epoch" in lines[:2]
    assert any(re.fullmatch(f"epoch 1/2: {PROGRESS}", line) for line in lines), run.output
    assert_table_and_place(run)


def test_a_terminal_gets_a_bar_that_is_gone_at_the_end(second_runs: dict[str, TrainedRun], framework: str) -> None:
    second_run = second_runs[framework]
    bars, _, rest = second_run.output.rpartition("\x1b[2K")
    frames = without_styles(bars).split("\r")
    bar = re.compile(rf"epoch \d/2 [━╸╺ ]+ {PROGRESS}\s*")
    assert any(bar.fullmatch(frame) for frame in frames), frames
    assert max(map(len, frames)) <= 81, "the bar does not fit on 80 columns"
    assert bars.count("\x1b[?25l") == bars.count("\x1b[?25h"), "the cursor stays hidden"
    assert_table_and_place(second_run._replace(output=without_styles(rest)))


def assert_table_and_place(run: TrainedRun) -> None:
    """Assert that the output ends with a table of the recorded metrics, the folder and the names of its files."""
    lines = run.output.splitlines()
    cells = [re.split(r"\s*[│┃|]\s*", line)[1:-1] for line in lines]
    assert ["epoch", "train loss", "test loss", "test accuracy", "train s", "test s", "images/s"] in cells
    for row in read_metrics(run.results):
        (line,) = [cell for cell in cells if cell[:1] == [str(row["epoch"])]]
        assert line[1:4] == [f"{row['train_loss']:.4f}", f"{row['test_loss']:.4f}", f"{row['test_accuracy']:.2%}"]
    assert str(run.results.relative_to(run.cwd)) in lines[-1]
    assert all(name in lines[-1] for name in FILES)

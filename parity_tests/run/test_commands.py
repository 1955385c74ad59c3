"""The commands as a person runs them: in their own process, in a pipe and on a terminal, with and without a mistake."""

import importlib.util
import math
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from subprocess import CompletedProcess

import jax
import matplotlib.image
import pytest
import safetensors.torch
import torch
from PIL import Image

from experiments.answers import FRAMEWORKS
from jax_cnn.config import Network
from jax_cnn.run.folder import FILES
from jax_cnn.torch_layout import SIMPLE_CNN
from jax_cnn.weights import save_weights
from parity_tests.support import (
    ENVIRONMENT,
    ROOT,
    TrainedRun,
    TrainOnce,
    assert_user_error,
    command_line,
    contents,
    read_json,
    read_metrics,
    run_command,
    run_in_one_process,
    run_on_a_terminal,
    run_successfully,
    without_styles,
    zero_weights,
)
from torch_ref.trainer import pick_device

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


# --- What a run leaves behind ---


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


@pytest.mark.extended
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


@pytest.mark.extended
def test_either_framework_starts_from_the_weights_of_the_other_and_keeps_them_in_float64(
    train_once: TrainOnce, tmp_path: Path, framework: str
) -> None:
    """With steps too small to change a float64 number, the weights and the loss stay as the other left them.

    They are given as what PyTorch saves.
    """
    source = train_once("torch" if framework == "jax" else "jax", *SMALL)
    weights = source.results / "weights.safetensors"
    torch.save({"state_dict": safetensors.torch.load_file(weights), "epoch": 2}, tmp_path / "weights.pth")
    one_step = ("--epochs", 1, "--limit-train", 64, "--learning-rate", 1e-30)
    flags = (*source.arguments, *one_step, "--precision", "float64")
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


# --- What a run prints ---

PROGRESS = r"\d+ of 200 images, loss [1-9]\.\d{3}, [1-9][\d,]* images/s, \d+ s left"


def test_a_pipe_gets_plain_lines_a_table_and_the_place_of_the_results(run: TrainedRun, framework: str) -> None:
    assert not re.search(r"[\x1b\r]", run.output), "a log file should hold no control codes"
    lines = run.output.splitlines()
    assert f"{framework} on cpu: 200 images an epoch" in lines[:2]
    assert any(re.fullmatch(f"epoch 1/2: {PROGRESS}", line) for line in lines), run.output
    assert_table_and_place(run)


@pytest.mark.extended
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


# --- A user's mistake: one plain line that says what is wrong and what to do, and nothing changes ---


ADVICE = re.compile(r"must (be|name)|--help|\b(add|choose|give|install|leave|put|train|try|use)\b")

# Flags, and what the message names.
TRAINING_MISTAKES = {
    "--epochs -1": ("--epochs", "-1", "between 1 and"),
    "--epochs abc": ("--epochs", "abc"),
    "--epoch 3": ("--epoch", "Perhaps you meant --epochs"),
    "--batch-size 0": ("--batch-size", "between 1 and"),
    "--limit-train 0": ("--limit-train", "between 1 and 60,000"),
    "--limit-train 70000": ("--limit-train", "between 1 and 60,000"),
    "--learning-rate -1": ("--learning-rate", "positive", "-1"),
    "--learning-rate nan": ("--learning-rate", "positive", "nan"),
    "--model resnet": ("--model", "linear", "mlp", "cnn"),
    "--hidden 20": ("--hidden 20 is the mlp's: add --model mlp",),
    "--model mlp --hidden 0": ("--hidden must be between 1 and 8,192, not 0",),
    "--device abacus": ("--device", "abacus", "gpu"),
    "--out-dir taken": ("--out-dir", "taken"),
    "--out-dir taken/results": ("--out-dir", "taken/results"),
    "--out-dir new --resume": ("--resume", "no usable checkpoint in new", "leave --resume out"),
}
MISTAKES = {
    **{f"train_{name} {flags}": words for flags, words in TRAINING_MISTAKES.items() for name in FRAMEWORKS},
    "train_jax --dialect haiku": ("--dialect", "linen", "nnx", "plain"),
    "train_jax --devices 0": ("--devices must be between 1 and 1,000,000, not 0",),
    "train_jax --coordinator here": ("--coordinator must be HOST:PORT or cluster, not here",),
    "train_jax --coordinator here:99999": ("--coordinator must be HOST:PORT or cluster, not here:99999",),
    "train_jax --coordinator here:1": ("--coordinator here:1: give --num-processes and --process-id too",),
    "train_jax --process-id 1": ("--num-processes and --process-id: give --coordinator HOST:PORT too",),
    "train_jax --coordinator here:1 --num-processes 2 --process-id 2": (
        "--process-id must be between 0 and 1 (--num-processes - 1), not 2",
    ),
    "train_torch --dialect nnx": ("--dialect",),
    "train_torch --precision bfloat16": ("--precision bfloat16", "train_jax.py"),
    "predict": ("there is no picture to look at: give one or more files",),
    "predict boot.png": ("no trained network in runs/jax/weights", "train one first (python scripts/train_jax.py)"),
    "predict boot.png --framework torch": ("runs/torch/weights", "train one first (python scripts/train_torch.py)"),
    "predict boot.png --weights w": ("weights file w: No such file or directory; give",),
    "predict boot.png --weights cut": ("weights file cut: not a readable safetensors file",),
    "predict boot.png --framework numpy": ("--framework",),
    "predict boot.png --invert maybe": ("--invert",),
    "predict boot.png --weight w": ("--weight",),
    "predict none.png --weights weights": ("none.png: No such file or directory; give",),
    "benchmark --rounds 0": ("--rounds", "between 1 and"),
    "benchmark --contenders jax torch-course": ("--contenders", "torch-fused"),  # which does not compete
    "benchmark --contenders jax abacus": ("--contenders", "abacus", "torch-fused"),
    "benchmark --steps 2000": ("--steps", "128,000", "60,000"),
    "benchmark --thread-counts 9999": ("--thread-counts", "9999"),
    "benchmark --round 3": ("--round", "--help"),
    "benchmark --out-dir taken": ("--out-dir", "taken", "choose"),
    "benchmark --data-dir taken --out-dir new": ("--data-dir", "taken", "give"),
    "compare --jax-run nowhere": ("--jax-run nowhere: no run is there (No such file or directory); give",),
    "compare --epochs 0": ("--epochs must be between 1 and 10,000, not 0",),
    "compare --images 0": ("--images must be between 1 and 200, not 0",),
    "compare --retrain --jax-run x": ("--retrain trains both and --jax-run or --torch-run takes",),
    "compare --run-benchmark --benchmark x": ("--run-benchmark measures again and --benchmark FILE",),
    "compare --epoch 1": ("Unrecognized options: --epoch",),
    "compare --benchmark nowhere": ("--benchmark nowhere: No such file or directory; give",),
    "compare --benchmark other.json": ("--benchmark other.json: its content is not what is needed; give",),
    "compare --parity-report nowhere": ("--parity-report nowhere: No such file or directory",),
    "compare --parity-report other.json": ("--parity-report other.json: its content is not what",),
    "compare --out-dir /dev/null/x": ("--out-dir /dev/null/x: ",),
    "compile_tpu --precisions float64": ("--precisions",),
    "compile_tpu --batch-per-chip 0": ("--batch-per-chip must be between 1 and 60,000, not 0",),
    "study": ("give the study first: study.py accuracy, convolution or pictures",),
    "study speed": ("give the study first",),
    "study accuracy --pace-train 64": ("--pace-train",),
    "study accuracy --short-train 0": ("--short-train must be between 1 and 60,000",),
    "study convolution --seeds 1": ("--seeds must be at least 2",),
    "study convolution --pace-train 0": ("--pace-train must be between 1 and 60,000",),
    "study convolution --epochs 0": ("--epochs must be between",),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with an earlier log of each training, a file where a folder is expected, and other inputs."""
    folder = tmp_path_factory.mktemp("folder")
    for framework in FRAMEWORKS:
        results = folder / "runs" / framework
        results.mkdir(parents=True)
        for name in set(FILES) - {"weights.safetensors"}:
            (results / name).write_text(f"{framework}'s earlier {name}", encoding="utf-8")
    (folder / "taken").write_text("not a folder", encoding="utf-8")
    (folder / "new").mkdir()
    (folder / "other.json").write_text("{}", encoding="utf-8")
    save_weights(folder / "weights", zero_weights(Network("linear")))
    (folder / "cut").write_bytes((folder / "weights").read_bytes()[:-1])
    Image.new("L", (28, 28)).save(folder / "boot.png")
    return folder


def without_data(script: str, *flags: str) -> list[str]:
    """Return the words of a command. Training has no data folder: a mistake that is not noticed ends in no download."""
    return [script, *(("--data-dir", "taken") if script.startswith("train_") else ()), *flags]


def assert_plain_line(done: CompletedProcess[str], words: tuple[str, ...]) -> None:
    """Assert that the message is one printable line that names these words and says what to do."""
    assert_user_error(done, *words)
    assert done.stderr.endswith("\n")
    assert done.stderr.rstrip().isprintable(), f"not a line of plain text: {done.stderr!r}"
    assert ADVICE.search(done.stderr), f"what to do? {done.stderr}"


@pytest.fixture(scope="module")
def without_frameworks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return the environment of a command that fails when it imports a framework."""
    folder = tmp_path_factory.mktemp("without_frameworks")
    for name in ("jax", "flax", "torch", "torchvision"):
        (folder / f"{name}.py").write_text(f"raise ImportError('{name} was imported')", encoding="utf-8")
    return ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(filter(None, (str(folder), ENVIRONMENT.get("PYTHONPATH"))))}


def end_unchanged(commands: Iterable[str], folder: Path, env: dict[str, str]) -> dict[str, CompletedProcess[str]]:
    """Return how each of these commands ends, and assert that all of them leave the folder as it was."""
    before = contents(folder)
    lines = [command_line(*without_data(*command.split()))[1:] for command in commands]
    paths = (str(ROOT / "scripts"), *filter(None, [env.get("PYTHONPATH")]))
    done = run_in_one_process(lines, folder, env | {"PYTHONPATH": os.pathsep.join(paths)})
    assert contents(folder) == before
    return dict(zip(commands, done, strict=True))


@pytest.fixture(scope="module")
def mistakes(folder: Path, without_frameworks: dict[str, str]) -> dict[str, CompletedProcess[str]]:
    """Return how each command of `MISTAKES` ends."""
    return end_unchanged(MISTAKES, folder, without_frameworks)


@pytest.mark.parametrize(("command", "words"), MISTAKES.items(), ids=MISTAKES)
def test_a_wrong_flag_is_one_line_before_a_framework_loads_and_changes_nothing(
    mistakes: dict[str, CompletedProcess[str]], command: str, words: tuple[str, ...]
) -> None:
    assert_plain_line(mistakes[command], words)
    assert "Traceback" not in mistakes[command].stdout


def test_without_a_mistake_the_command_loads_a_framework(folder: Path, without_frameworks: dict[str, str]) -> None:
    done = run_command("predict", "boot.png", "--weights", "weights", cwd=folder, env=without_frameworks)
    assert "ImportError: jax was imported" in done.stderr


def test_a_mistake_on_a_terminal_is_one_plain_line_too(folder: Path, framework: str) -> None:
    """The library that reads the command line would draw a coloured frame there."""
    status, message = run_on_a_terminal(f"train_{framework}", "--epochs", "abc", cwd=folder)
    done = CompletedProcess([], status, "", message.replace("\r\n", "\n"))
    assert_plain_line(done, ("--epochs", "abc"))


# What a command notices once its framework is loaded. The devices come first: nothing may have started JAX before.
LATE_MISTAKES: dict[str, tuple[str, ...]] = {
    "train_jax --coordinator cluster": ("--coordinator cluster: no cluster's environment tells where",),
    "train_jax --devices 3": ("--batch-size 64 cannot be shared among 3 devices; use --batch-size 66",),
    "train_jax --device gpu": ("--device gpu",),
    "train_torch --device gpu": ("--device gpu",),
    "train_jax": ("taken", "data folder"),
    "train_torch": ("taken", "data folder"),
    "train_jax --init-weights weights": ("weights: it is of",),
    "train_torch --init-weights weights": ("weights: it is of",),
}
if importlib.util.find_spec("libtpu") is None:
    LATE_MISTAKES["compile_tpu --out-dir new"] = ("the TPU compiler is not installed here; pip install",)
CLUSTERLESS = {name: value for name, value in ENVIRONMENT.items() if not name.startswith(("SLURM", "OMPI", "PMI"))}


@pytest.fixture(scope="module")
def late_mistakes(folder: Path) -> dict[str, CompletedProcess[str]]:
    """Return how each command of `LATE_MISTAKES` ends."""
    return end_unchanged(LATE_MISTAKES, folder, CLUSTERLESS)


@pytest.mark.parametrize(("command", "words"), LATE_MISTAKES.items(), ids=LATE_MISTAKES)
def test_devices_data_or_weights_that_do_not_serve_are_one_line_and_change_nothing(
    late_mistakes: dict[str, CompletedProcess[str]], command: str, words: tuple[str, ...]
) -> None:
    sees_gpu = torch.cuda.is_available() if "torch" in command else any(gpu.platform == "gpu" for gpu in jax.devices())
    if "gpu" in command and sees_gpu:
        pytest.skip("a GPU is here")
    assert_plain_line(late_mistakes[command], words)
    assert "Traceback" not in late_mistakes[command].stdout


def test_pytorch_has_no_tpu_and_says_what_has() -> None:
    with pytest.raises(ValueError, match=r"use train_jax\.py$"):
        pick_device("tpu")

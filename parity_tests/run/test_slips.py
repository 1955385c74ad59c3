"""A user's slip with a command: one plain line that says what is wrong and what to do, and nothing changes."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest
import torch
from PIL import Image

from jax_cnn.config import Network
from jax_cnn.run.folder import FILES
from jax_cnn.weights import save_weights
from parity_tests.support import (
    ENVIRONMENT,
    ROOT,
    assert_slip,
    command_line,
    contents,
    run_command,
    run_on_a_terminal,
    zero_weights,
)
from torch_ref.trainer import pick_device

FRAMEWORKS = ("jax", "torch")
ADVICE = re.compile(r"must (be|name)|--help|\b(add|choose|give|install|leave|put|train|try|use)\b")

# Flags, and what the message names.
SLIPS_OF_TRAINING = {
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
SLIPS = {
    **{f"train_{name} {flags}": words for flags, words in SLIPS_OF_TRAINING.items() for name in FRAMEWORKS},
    "train_jax --dialect haiku": ("--dialect", "linen", "nnx", "plain"),
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
    """Return the words of a command. Training has no data folder: a slip that is not noticed ends in no download."""
    return [script, *(("--data-dir", "taken") if script.startswith("train_") else ()), *flags]


def assert_plain_slip(script: str, *flags: str, words: tuple[str, ...], cwd: Path) -> None:
    """Assert that a command ends with one plain line that names these words, and leaves the folder as it was."""
    before = contents(cwd)
    done = run_command(*without_data(script, *flags), cwd=cwd)
    assert_plain_line(done, words)
    assert "Traceback" not in done.stdout
    assert contents(cwd) == before


def assert_plain_line(done: subprocess.CompletedProcess[str], words: tuple[str, ...]) -> None:
    """Assert that the message is one printable line that names these words and says what to do."""
    assert_slip(done, *words)
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


# Runs commands one after the other, and prints a line of JSON with the exit status, the output and the errors of each.
IN_ONE_PROCESS = """
import contextlib, io, json, runpy, sys, traceback
for sys.argv in json.load(sys.stdin):
    status, output, errors = None, io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as stop:
            status = stop.code
        except BaseException:
            traceback.print_exc()
    print(json.dumps([status, output.getvalue(), errors.getvalue()]))
"""


@pytest.fixture(scope="module")
def slips(folder: Path, without_frameworks: dict[str, str]) -> dict[str, subprocess.CompletedProcess[str]]:
    """Return how each command of `SLIPS` ends. They run in one process, because most of their time is its start."""
    before = contents(folder)
    lines = [command_line(*without_data(*command.split()))[1:] for command in SLIPS]
    process = [sys.executable, "-c", IN_ONE_PROCESS]
    env = without_frameworks | {
        "PYTHONPATH": os.pathsep.join((str(ROOT / "scripts"), without_frameworks["PYTHONPATH"]))
    }
    done = subprocess.run(process, input=json.dumps(lines), cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert contents(folder) == before
    results = map(json.loads, done.stdout.splitlines())
    return {name: subprocess.CompletedProcess(name, *result) for name, result in zip(SLIPS, results, strict=True)}


@pytest.mark.parametrize(("command", "words"), SLIPS.items(), ids=SLIPS)
def test_a_wrong_flag_is_one_line_before_a_framework_loads_and_changes_nothing(
    slips: dict[str, subprocess.CompletedProcess[str]], command: str, words: tuple[str, ...]
) -> None:
    assert_plain_line(slips[command], words)
    assert "Traceback" not in slips[command].stdout


def test_without_a_slip_the_command_loads_a_framework(folder: Path, without_frameworks: dict[str, str]) -> None:
    done = run_command("predict", "boot.png", "--weights", "weights", cwd=folder, env=without_frameworks)
    assert "ImportError: jax was imported" in done.stderr


def test_a_slip_on_a_terminal_is_one_plain_line_too(folder: Path, framework: str) -> None:
    """The library that reads the command line would draw a coloured frame there."""
    status, message = run_on_a_terminal(f"train_{framework}", "--epochs", "abc", cwd=folder)
    done = subprocess.CompletedProcess([], status, "", message.replace("\r\n", "\n"))
    assert_plain_line(done, ("--epochs", "abc"))


def test_a_data_folder_that_is_a_file_is_one_line_and_stays(folder: Path, framework: str) -> None:
    assert_plain_slip(f"train_{framework}", words=("taken", "data folder"), cwd=folder)


def test_a_missing_device_is_one_line_and_changes_nothing(folder: Path, framework: str) -> None:
    if torch.cuda.is_available() if framework == "torch" else any(gpu.platform == "gpu" for gpu in jax.devices()):
        pytest.skip(f"{framework} sees a GPU")
    assert_plain_slip(f"train_{framework}", "--device", "gpu", words=("--device gpu",), cwd=folder)


def test_pytorch_has_no_tpu_and_says_what_has() -> None:
    with pytest.raises(ValueError, match=r"use train_jax\.py$"):
        pick_device("tpu")


def test_weights_that_do_not_fit_are_one_line_and_change_nothing(folder: Path, framework: str) -> None:
    assert_plain_slip(f"train_{framework}", "--init-weights", "weights", words=("weights: it is of",), cwd=folder)

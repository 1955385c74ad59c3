"""A user's slip with a training command: one plain line that says what is wrong and what to do, and nothing changes."""

import re
import subprocess
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch

from jax_cnn.config import Network
from jax_cnn.run.folder import FILES
from jax_cnn.torch_layout import TorchDict, layout_of
from parity_tests.run.training import run_on_a_terminal
from parity_tests.support import assert_slip, run_command

FRAMEWORKS = ("jax", "torch")
ADVICE = re.compile(r"must be|--help|\b(add|choose|give|install|leave|put|try|use)\b")

# Flags, and what the message names. None of these needs a framework to be seen.
FLAG_SLIPS = (
    (("--epochs", "-1"), ("--epochs", "-1", "between 1 and")),
    (("--epochs", "abc"), ("--epochs", "abc")),
    (("--epoch", "3"), ("--epoch",)),
    (("--batch-size", "0"), ("--batch-size", "between 1 and")),
    (("--limit-train", "0"), ("--limit-train", "between 1 and 60,000")),
    (("--limit-train", "70000"), ("--limit-train", "between 1 and 60,000")),
    (("--learning-rate", "-1"), ("--learning-rate", "positive", "-1")),
    (("--learning-rate", "nan"), ("--learning-rate", "positive", "nan")),
    (("--model", "resnet"), ("--model", "linear", "mlp", "cnn")),
    (("--hidden", "20"), ("--hidden 20 is the mlp's: add --model mlp",)),
    (("--model", "mlp", "--hidden", "0"), ("--hidden must be between 1 and 8,192, not 0",)),
    (("--device", "abacus"), ("--device", "abacus", "gpu")),
    (("--out-dir", "taken"), ("--out-dir", "taken")),
    (("--out-dir", "taken/results"), ("--out-dir", "taken/results")),
    (("--out-dir", "new", "--resume"), ("--resume", "no usable checkpoint in new", "leave --resume out")),
    ((), ("taken", "data folder")),  # the data folder is a file, which is not an empty folder to download into
)
SLIPS_OF_ONE = (
    ("jax", ("--dialect", "haiku"), ("--dialect", "linen", "nnx", "plain")),
    ("torch", ("--dialect", "nnx"), ("--dialect",)),
    ("torch", ("--precision", "bfloat16"), ("--precision bfloat16", "train_jax.py")),
)
SLIPS = (*((framework, *slip) for slip in FLAG_SLIPS for framework in FRAMEWORKS), *SLIPS_OF_ONE)
SLIP_NAMES = [" ".join((framework, *flags)) for framework, flags, _ in SLIPS]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with an earlier run of each command in its default place, and a regular file `taken`."""
    for framework in FRAMEWORKS:
        results = tmp_path / "runs" / framework
        results.mkdir(parents=True)
        for name in FILES:
            (results / name).write_text(f"{framework}'s earlier {name}", encoding="utf-8")
    (tmp_path / "taken").write_text("not a folder", encoding="utf-8")
    (tmp_path / "new").mkdir()
    return tmp_path


def contents(folder: Path) -> dict[str, str]:
    """Return all paths in a folder: the SHA-256 of the files, an empty string for the folders."""
    return {
        str(path.relative_to(folder)): sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in folder.rglob("*")
    }


def assert_training_slip(framework: str, *flags: object, words: tuple[str, ...], cwd: Path) -> None:
    """Assert that a training command ends with one plain line that names these words, and leaves the folder as it was.

    It has no data folder to continue with: a slip that is not noticed ends there, not in a download and a training.
    """
    before = contents(cwd)
    done = run_command(f"train_{framework}", "--data-dir", "taken", *flags, cwd=cwd)
    assert_plain_line(done, words)
    assert "Traceback" not in done.stdout
    assert contents(cwd) == before


def assert_plain_line(done: subprocess.CompletedProcess[str], words: tuple[str, ...]) -> None:
    """Assert that the message is one printable line that names these words and says what to do."""
    assert_slip(done, *words)
    assert done.stderr.endswith("\n")
    assert done.stderr.rstrip().isprintable(), f"not a line of plain text: {done.stderr!r}"
    assert ADVICE.search(done.stderr), f"what to do? {done.stderr}"


@pytest.mark.parametrize(
    ("framework", "flags", "words"), SLIPS, ids=[" ".join((name, *flags)) for name, flags, _ in SLIPS]
)
def test_a_wrong_flag_is_one_line_and_changes_nothing(
    folder: Path, framework: str, flags: tuple[str, ...], words: tuple[str, ...]
) -> None:
    assert_training_slip(framework, *flags, words=words, cwd=folder)


def test_a_slip_on_a_terminal_is_one_plain_line_too(folder: Path, framework: str) -> None:
    """The library that reads the command line would draw a coloured frame there."""
    status, message = run_on_a_terminal(f"train_{framework}", "--epochs", "abc", cwd=folder)
    done = subprocess.CompletedProcess([], status, "", message.replace("\r\n", "\n"))
    assert_plain_line(done, ("--epochs", "abc"))


@pytest.mark.parametrize("device", ["gpu", "tpu"])
def test_a_missing_device_is_one_line_and_changes_nothing(folder: Path, framework: str, device: str) -> None:
    is_there = torch.cuda.is_available() and device == "gpu"
    if framework == "jax":
        is_there = any(known.platform == device for known in jax.devices())
    if is_there:
        pytest.skip(f"{framework} sees a {device}")
    assert_training_slip(framework, "--device", device, words=("--device", device), cwd=folder)


Tensors = dict[str, np.ndarray | None]


def edited(tensors: TorchDict, changes: Tensors) -> bytes:
    """Return a safetensors file of these tensors with some replaced or added; None leaves one out."""
    return safetensors.numpy.save({name: array for name, array in (tensors | changes).items() if array is not None})


def in_bfloat16(tensors: TorchDict) -> bytes:
    """Return a safetensors file of the same weights in bfloat16, as models are often published."""
    return safetensors.torch.save({name: torch.from_numpy(array).bfloat16() for name, array in tensors.items()})


def small_mlp(_: TorchDict) -> bytes:
    """Return a safetensors file of an mlp's weights."""
    leaves = layout_of(Network("mlp", 20))
    return safetensors.numpy.save({name: np.zeros(leaf.shape, np.float32) for name, leaf in leaves.items()})


TOO_LARGE = np.full(10, 1e300)  # a number in float64, infinity in float32

WEIGHTS_SLIPS: dict[str, tuple[Callable[[TorchDict], bytes | None], str]] = {
    "no file": (lambda good: None, "No such file"),
    "no safetensors": (lambda good: b"PK\3\4 and so on", "safetensors"),
    "cut short": (lambda good: edited(good, {})[:-1], "safetensors"),
    "a tensor too few": (lambda good: edited(good, {"fc2.bias": None}), "fc2.bias"),
    "a tensor too many": (lambda good: edited(good, {"fc3.bias": good["fc2.bias"]}), "fc3.bias"),
    "a tensor transposed": (lambda good: edited(good, {"fc2.weight": good["fc2.weight"].T.copy()}), "(512, 10)"),
    "not a number": (lambda good: edited(good, {"fc2.bias": good["fc2.bias"] * np.float32("nan")}), "fc2.bias"),
    "beyond float32": (lambda good: edited(good, {"fc2.bias": TOO_LARGE}), "fc2.bias"),
    "bfloat16, which NumPy lacks": (in_bfloat16, "dtype"),
    "another network": (small_mlp, "of --model mlp --hidden 20, not of --model cnn"),
}


@pytest.mark.parametrize(("make", "word"), WEIGHTS_SLIPS.values(), ids=WEIGHTS_SLIPS)
def test_weights_that_do_not_fit_are_one_line_and_change_nothing(
    folder: Path, torch_weights: TorchDict, framework: str, make: Callable[[TorchDict], bytes | None], word: str
) -> None:
    content = make(torch_weights)
    if content is not None:
        (folder / "given.safetensors").write_bytes(content)
    flags = ("--init-weights", "given.safetensors")
    assert_training_slip(framework, *flags, words=("given.safetensors", word), cwd=folder)

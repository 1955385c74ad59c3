"""The two training commands, run as a person runs them: in a process of their own, in a pipe and on a terminal."""

import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jax
import matplotlib.image
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch

from jax_cnn.torch_layout import TorchDict
from parity_tests.support import ROOT
from torch_ref.model import SimpleCNN

SCRIPTS = ("jax", "torch")
FILES = ("config.json", "metrics.jsonl", "weights.safetensors", "curves.png")
CHECKPOINTS = tuple(f"checkpoint-{step:09}.safetensors" for step in (4, 8))  # after each epoch of four steps
SMALL = ("--limit-train", "200", "--limit-test", "100", "--epochs", "2", "--seed", "3", "--device", "cpu")
TIMEOUT = 120.0  # seconds for a small run, on a machine that is busy with other things

# What changes how a program prints, and is not there on a plain terminal.
STYLING = ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS", "LINES")
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in STYLING} | {"TERM": "xterm"}

both_scripts = pytest.mark.parametrize("script", SCRIPTS)


class Run(NamedTuple):
    """A command that has ended well: the folder it was started in, the folder of its results, what it printed."""

    cwd: Path
    results: Path
    arguments: tuple[str, ...]
    output: str


Train = Callable[[str], Run]  # by the name of the script; a run is made once and shared


def command(script: str, *arguments: object) -> list[str]:
    """What a person types."""
    return [sys.executable, str(ROOT / "scripts" / f"train_{script}.py"), *map(str, arguments)]


def in_a_pipe(script: str, *arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a command with its output caught."""
    return subprocess.run(
        command(script, *arguments), cwd=cwd, env=ENVIRONMENT, capture_output=True, text=True, timeout=TIMEOUT
    )


def on_a_terminal(script: str, *arguments: object, cwd: Path) -> tuple[int, str]:
    """Run a command on a terminal of 80 columns; returns its exit status and all that the terminal got."""
    pty = pytest.importorskip("pty", reason="needs a POSIX terminal")
    screen, terminal = pty.openpty()
    with subprocess.Popen(
        command(script, *arguments), cwd=cwd, env=ENVIRONMENT, stdin=terminal, stdout=terminal, stderr=terminal
    ) as process:
        os.close(terminal)
        received = b"".join(iter(lambda: read_screen(screen), b""))
    os.close(screen)
    return process.returncode, received.decode()


def read_screen(screen: int) -> bytes:
    """What has come since the last time; nothing once the program has ended."""
    try:
        return os.read(screen, 2**16)
    except OSError:  # how Linux says that nobody holds the terminal's other end any more
        return b""


@pytest.fixture(scope="module")
def trained(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Train:
    """A small run in a pipe, into the default folder."""

    @cache
    def train(script: str) -> Run:
        cwd = tmp_path_factory.mktemp(script)
        arguments = ("--data-dir", str(data_dir), *SMALL)
        done = in_a_pipe(script, *arguments, cwd=cwd)
        assert (done.returncode, done.stderr) == (0, "")
        return Run(cwd, cwd / "runs" / script, arguments, done.stdout)

    return train


@pytest.fixture(scope="module")
def trained_again(trained: Train, tmp_path_factory: pytest.TempPathFactory) -> Train:
    """The same command over a copy of that run's results, on a terminal this time."""

    @cache
    def train(script: str) -> Run:
        first = trained(script)
        cwd = tmp_path_factory.mktemp(f"{script}-again")
        results = cwd / "runs" / script
        shutil.copytree(first.results, results)
        status, output = on_a_terminal(script, *first.arguments, cwd=cwd)
        assert status == 0, output
        return Run(cwd, results, first.arguments, output)

    return train


def read_metrics(results: Path) -> list[dict[str, Any]]:
    """The epochs of a run, from a file that any JSON reader takes: Python's own would let NaN pass."""

    def refuse(constant: str) -> NoReturn:
        raise AssertionError(f"{constant} is not JSON")

    lines = (results / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


# What a run leaves behind


@both_scripts
def test_a_run_leaves_its_files_and_nothing_else(trained: Train, script: str) -> None:
    """No half file, no temporary one: the four files, a checkpoint of each epoch, and the lock."""
    run = trained(script)
    assert sorted(path.name for path in run.results.iterdir()) == sorted([*FILES, *CHECKPOINTS, ".lock"])
    assert list(run.cwd.iterdir()) == [run.cwd / "runs"]


@both_scripts
def test_the_config_says_what_ran_by_which_command_on_what(trained: Train, script: str) -> None:
    """Enough to run it again."""
    run = trained(script)
    record = json.loads((run.results / "config.json").read_text())
    asked = {"limit_train": 200, "limit_test": 100, "epochs": 2, "seed": 3, "device": "cpu", "precision": "float32"}
    assert asked.items() <= record["config"].items()
    assert record["config"]["adam"] == {"learning_rate": 1e-3, "b1": 0.9, "b2": 0.999, "eps": 1e-8}
    assert shlex.split(record["command"]) == ["python", *command(script, *run.arguments)[1:]]
    assert record["framework"] == script
    assert record["device"].startswith("cpu")
    assert record["versions"][script] == version(script)
    assert record["versions"]["python"] == sys.version.split()[0]
    assert record["machine"]["cores"] >= 1


@both_scripts
def test_the_metrics_have_a_line_for_every_epoch(trained: Train, script: str) -> None:
    """Each with finite losses, a true accuracy and the time that it took; only JAX compiles, and only once."""
    rows = read_metrics(trained(script).results)
    assert [row["epoch"] for row in rows] == [1, 2]
    for row in rows:
        assert all(math.isfinite(value) for value in row.values()), row
        assert row["train_loss"] > 0
        assert row["test_loss"] > 0
        assert 0 <= row["test_accuracy"] <= 1
        assert row["test_accuracy"] * 100 == pytest.approx(round(row["test_accuracy"] * 100)), "there are 100 images"
        assert row["train_seconds"] > 0
        assert row["eval_seconds"] > 0
        assert row["images_per_second"] == pytest.approx(200 / row["train_seconds"])
    assert [row["compile_seconds"] > 0 for row in rows] == [script == "jax", False]
    assert rows[1]["train_loss"] < rows[0]["train_loss"], "it does not learn"


@both_scripts
def test_pytorch_loads_the_weights_that_either_trained(trained: Train, script: str) -> None:
    """By name and strictly; and training has moved every tensor."""
    tensors = safetensors.torch.load_file(trained(script).results / "weights.safetensors")
    SimpleCNN().load_state_dict(tensors)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    assert all(tensor.isfinite().all() and tensor.std() > 0 for tensor in tensors.values())


@both_scripts
def test_the_curves_are_a_picture(trained: Train, script: str) -> None:
    """A PNG that can be opened, large enough to read, with something on it."""
    path = trained(script).results / "curves.png"
    assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    height, width, _ = (picture := matplotlib.image.imread(path)).shape
    assert height >= 400
    assert width >= 800
    assert picture[..., :3].min() < 0.3 < 0.9 < picture[..., :3].max()


@both_scripts
def test_a_second_run_into_the_same_folder_loses_nothing(trained: Train, trained_again: Train, script: str) -> None:
    """The first run's files are in `earlier-1`, byte for byte, and a line says so."""
    first, second = trained(script), trained_again(script)
    aside = second.results / "earlier-1"
    assert tree(aside) == {name: content for name, content in tree(first.results).items() if name != ".lock"}
    assert sorted(path.name for path in second.results.iterdir()) == sorted(
        [*FILES, *CHECKPOINTS, ".lock", "earlier-1"]
    )
    (notice,) = [line for line in second.output.splitlines() if "earlier-1" in line]
    assert f"{aside.relative_to(second.cwd)}" in notice


@both_scripts
def test_the_same_seed_gives_the_same_bits(trained: Train, trained_again: Train, script: str) -> None:
    """On the CPU."""
    first, second = (
        safetensors.torch.load_file(train(script).results / "weights.safetensors") for train in (trained, trained_again)
    )
    assert first.keys() == second.keys()
    differing = [name for name in first if not torch.equal(first[name], second[name])]
    assert not differing


# Mean loss over 100 images, computed in float32 by the one and in float64 by the other. The worst difference seen was
# 2.1e-7, over 10 seeds trained by each.
LOSS_BOUND = 1e-6


@both_scripts
def test_the_weights_of_either_start_the_other_and_float64_keeps_them(
    trained: Train, data_dir: Path, tmp_path: Path, script: str
) -> None:
    """Steps too small to change a float64 end where they started: at the other's weights and the other's loss."""
    (other,) = set(SCRIPTS) - {script}
    given = trained(other).results
    arguments = ("--epochs", 1, "--learning-rate", 1e-30, "--precision", "float64")
    weights = given / "weights.safetensors"
    done = in_a_pipe(
        script, "--data-dir", data_dir, *SMALL, *arguments, "--init-weights", weights, "--out-dir", "out", cwd=tmp_path
    )
    assert (done.returncode, done.stderr) == (0, "")
    before, after = (safetensors.torch.load_file(folder / weights.name) for folder in (given, tmp_path / "out"))
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        assert tensor.dtype == torch.float64, f"{name} is {tensor.dtype}"
        assert torch.equal(tensor, before[name].double()), f"{name} changed"
    loss_before, loss_after = (read_metrics(folder)[-1]["test_loss"] for folder in (given, tmp_path / "out"))
    assert abs(loss_before - loss_after) <= LOSS_BOUND, f"{abs(loss_before - loss_after):.1e} > {LOSS_BOUND:.1e}"


# What a run prints


@both_scripts
def test_a_pipe_gets_plain_lines_a_table_and_the_place_of_the_results(trained: Train, script: str) -> None:
    """No escape codes, nothing drawn over: what a log file should hold."""
    run = trained(script)
    assert not re.search(r"[\x1b\r]", run.output)
    lines = run.output.splitlines()
    assert f"{script} on cpu: 200 images an epoch" in lines[:2]
    progress = r"epoch 1/2: \d+ of 200 images, loss \d\.\d{3}, [\d,]+ images/s, \d+ s left"
    assert any(re.fullmatch(progress, line) for line in lines)
    assert_table_and_place(run)


@both_scripts
def test_a_terminal_gets_a_bar_with_loss_speed_and_time_left(trained_again: Train, script: str) -> None:
    """It is gone at the end, and the table and the place of the results stay."""
    run = trained_again(script)
    drawn, _, rest = run.output.rpartition("\x1b[2K")
    frames = without_styles(drawn).split("\r")
    bar = re.compile(r"epoch \d/2 [━╸╺ ]+ loss [1-9]\.\d{3} +[1-9][\d,]* images/s +left +\d:\d\d:\d\d\s*")
    assert any(bar.fullmatch(frame) for frame in frames), frames
    assert "of 200 images" not in run.output, "plain progress lines are for pipes"
    assert max(map(len, frames)) <= 81, "the bar does not fit on 80 columns"
    assert drawn.count("\x1b[?25l") == drawn.count("\x1b[?25h"), "the cursor stays hidden"
    assert_table_and_place(run._replace(output=without_styles(rest)))


def without_styles(text: str) -> str:
    """Text without colours and other control codes of a terminal."""
    return re.sub(r"\x1b\[[?\d;]*[A-Za-z]", "", text)


def assert_table_and_place(run: Run) -> None:
    """Hold the output's end to the recorded metrics, a row to an epoch, and to the folder, its files named."""
    lines = run.output.splitlines()
    cells = [re.split(r"\s*[│┃|]\s*", line)[1:-1] for line in lines]
    assert ["epoch", "train loss", "test loss", "test accuracy", "train s", "test s", "images/s"] in cells
    for row in read_metrics(run.results):
        (shown,) = [cell for cell in cells if cell[:1] == [str(row["epoch"])]]
        assert shown[1:4] == [f"{row['train_loss']:.4f}", f"{row['test_loss']:.4f}", f"{row['test_accuracy']:.2%}"]
    assert str(run.results.relative_to(run.cwd)) in lines[-1]
    assert all(name in lines[-1] for name in FILES)


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT as a terminal does")
def test_jax_takes_its_first_step_within_ten_seconds_and_ends_at_once_when_interrupted(
    data_dir: Path, tmp_path: Path
) -> None:
    """Whole data set, all compiled; the wall clock starts with the process."""
    started = time.monotonic()
    with subprocess.Popen(
        command("jax", "--data-dir", data_dir),
        cwd=tmp_path,
        env=ENVIRONMENT | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "none kept yet")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        seen = list(itertools.takewhile(lambda line: not line.startswith("epoch 1/5"), process.stdout))
        elapsed = time.monotonic() - started
        process.send_signal(signal.SIGINT)
        rest, errors = process.stdout.read(), process.stderr.read()
    assert process.returncode == 130, "".join(seen) + rest
    assert errors.startswith("stopped, and saved. To go on: python "), errors
    busy = os.getloadavg()[0] / (os.cpu_count() or 1)
    if elapsed > 10 and busy > 1.5:
        pytest.skip(f"{elapsed:.1f} s prove nothing: {busy:.1f} processes wanted each core")
    assert elapsed <= 10, f"the first 64 steps were done after {elapsed:.1f} s"


# A person's slips

TELLS_WHAT_TO_DO = re.compile(r"must be|--help|\b(use|try|give|choose|put|install)\b")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with an earlier run of each script where it writes by default, and a regular file `taken`."""
    for script in SCRIPTS:
        results = tmp_path / "runs" / script
        results.mkdir(parents=True)
        for name in FILES:
            (results / name).write_text(f"{script}'s earlier {name}")
    (tmp_path / "taken").write_text("not a folder")
    return tmp_path


def tree(folder: Path) -> dict[str, str]:
    """All that a folder holds: the SHA-256 of its files, an empty string for its folders."""
    return {
        str(path.relative_to(folder)): sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in folder.rglob("*")
    }


def assert_slip(script: str, *arguments: object, names: tuple[str, ...], cwd: Path) -> None:
    """Hold a command to one line that names what is wrong and tells what to do, status 2, and an untouched folder.

    It has no data folder to go on with: a slip that nobody sees ends there, and not in a download and a training.
    """
    before = tree(cwd)
    done = in_a_pipe(script, "--data-dir", "taken", *arguments, cwd=cwd)
    assert_one_plain_line(done.returncode, done.stderr, names)
    assert "Traceback" not in done.stdout
    assert tree(cwd) == before


def assert_one_plain_line(status: int, message: str, names: tuple[str, ...]) -> None:
    """`error: `, what is wrong, what to do, and the exit status of a wrong use."""
    assert message.startswith("error: "), message
    assert "Traceback" not in message
    assert message.endswith("\n")
    assert len(message.splitlines()) == 1, message
    assert message.rstrip().isprintable(), f"not a line of plain text: {message!r}"
    assert all(name in message for name in names), f"{message} does not name {' and '.join(names)}"
    assert TELLS_WHAT_TO_DO.search(message), f"what to do? {message}"
    assert status == 2


FLAG_SLIPS = {
    "negative epochs": (("--epochs", "-1"), ("--epochs", "-1", "between 1 and")),
    "epochs that are no number": (("--epochs", "abc"), ("--epochs", "abc")),
    "empty batches": (("--batch-size", "0"), ("--batch-size", "between 1 and")),
    "no images": (("--limit-train", "0"), ("--limit-train", "between 1 and 60,000")),
    "more images than there are": (("--limit-train", "70000"), ("--limit-train", "between 1 and 60,000")),
    "a negative learning rate": (("--learning-rate", "-1"), ("--learning-rate", "positive", "-1")),
    "a learning rate of NaN": (("--learning-rate", "nan"), ("--learning-rate", "positive", "nan")),
    "an unknown device": (("--device", "abacus"), ("--device", "abacus", "gpu")),
    "an unknown flag": (("--epoch", "3"), ("--epoch",)),
    "results into a file": (("--out-dir", "taken"), ("--out-dir", "taken")),
    "results below a file": (("--out-dir", "taken/results"), ("--out-dir", "taken/results")),
}


@pytest.mark.parametrize(("arguments", "names"), FLAG_SLIPS.values(), ids=FLAG_SLIPS)
@both_scripts
def test_a_wrong_flag_is_one_line_and_changes_nothing(
    folder: Path, script: str, arguments: tuple[str, ...], names: tuple[str, ...]
) -> None:
    """Of all the slips, these need no framework to be seen."""
    assert_slip(script, *arguments, names=names, cwd=folder)


@both_scripts
def test_a_slip_on_a_terminal_is_one_plain_line_too(folder: Path, script: str) -> None:
    """Whatever the library that reads the command line would like to draw there."""
    status, message = on_a_terminal(script, "--epochs", "abc", cwd=folder)
    assert_one_plain_line(status, message.replace("\r\n", "\n"), ("--epochs", "abc"))


def edited(tensors: TorchDict, changes: dict[str, np.ndarray | None]) -> bytes:
    """A safetensors file of these tensors with some exchanged or added, and left out where the change is None."""
    return safetensors.numpy.save({name: array for name, array in (tensors | changes).items() if array is not None})


def in_bfloat16(tensors: TorchDict) -> bytes:
    """The same weights, as models are often published."""
    return safetensors.torch.save({name: torch.from_numpy(array).bfloat16() for name, array in tensors.items()})


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
}


@pytest.mark.parametrize(("make", "name"), WEIGHTS_SLIPS.values(), ids=WEIGHTS_SLIPS)
@both_scripts
def test_weights_that_do_not_fit_are_one_line_and_change_nothing(
    folder: Path,
    torch_weights: TorchDict,
    script: str,
    make: Callable[[TorchDict], bytes | None],
    name: str,
) -> None:
    """The line names the file and what is wrong in it."""
    content = make(torch_weights)
    if content is not None:
        (folder / "given.safetensors").write_bytes(content)
    assert_slip(script, "--init-weights", "given.safetensors", names=("given.safetensors", name), cwd=folder)


@pytest.mark.parametrize("device", ["gpu", "tpu"])
@both_scripts
def test_a_device_that_is_not_there_is_one_line_and_changes_nothing(folder: Path, script: str, device: str) -> None:
    """Where it is there, there is nothing to test."""
    there = torch.cuda.is_available() and device == "gpu"
    if script == "jax":
        there = any(seen.platform == device for seen in jax.devices())
    if there:
        pytest.skip(f"{script} sees a {device}")
    assert_slip(script, "--device", device, names=("--device", device), cwd=folder)


@both_scripts
def test_a_data_folder_that_is_a_file_is_one_line_and_changes_nothing(folder: Path, script: str) -> None:
    """And it is not taken for a folder that only lacks the data: nothing is fetched."""
    assert_slip(script, names=("taken", "data folder"), cwd=folder)

"""Helpers for the tests: they run the project's commands, and read what these write."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any, NamedTuple, NoReturn

import numpy as np
import pytest

from jax_cnn.config import Network
from jax_cnn.data.files import FILES
from jax_cnn.torch_layout import TorchDict, layout_of

ROOT = Path(__file__).parents[1]
TIMEOUT = 300.0  # seconds for a small run of a command, on a machine that is busy with other work

# Variables that change how a program prints, and that a plain terminal does not set.
STYLING = ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS", "LINES")
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in STYLING} | {"TERM": "xterm"}

# The names of two files of the data set, and all paths in a data folder after a download.
IMAGES, LABELS = "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"
COMPLETE = sorted(
    [".fashion_mnist.lock", "FashionMNIST", "FashionMNIST/raw", *(f"FashionMNIST/raw/{name}" for name in FILES)]
)


class TrainedRun(NamedTuple):
    """A training command that has succeeded: where it started, its results, its arguments and its output."""

    cwd: Path
    results: Path
    arguments: tuple[str, ...]
    output: str


TrainOnce = Callable[..., TrainedRun]  # (framework, *flags)


def command_line(script: str, *arguments: object) -> list[str]:
    """Return the words of a command as a person types it: `command_line("train_jax", "--epochs", 1)`."""
    return [sys.executable, str(ROOT / "scripts" / f"{script}.py"), *map(str, arguments)]


def run_command(
    script: str,
    *arguments: object,
    cwd: Path,
    env: Mapping[str, str] = ENVIRONMENT,
    timeout: float = TIMEOUT,
) -> CompletedProcess[str]:
    """Run `scripts/<script>.py` to its end with its output in pipes, whatever its exit status is."""
    line = command_line(script, *arguments)
    return subprocess.run(line, cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout, check=False)


def start_python(code: str, *arguments: object) -> subprocess.Popen[str]:
    """Start a process that runs code which imports the project, with its output in pipes."""
    line = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(line, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run_python(code: str, *arguments: object, env: Mapping[str, str] = ENVIRONMENT) -> CompletedProcess[str]:
    """Run such code to its end, whatever its exit status is."""
    line = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(line, cwd=ROOT, env=env, capture_output=True, text=True, timeout=TIMEOUT, check=False)


# Runs Python programs one after the other, and prints a line of JSON with the exit status, output and errors of each.
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


def run_in_one_process(
    lines: Sequence[Sequence[str]], cwd: Path, env: Mapping[str, str], python: str | Path = sys.executable
) -> list[CompletedProcess[str]]:
    """Run Python programs, each the words of a line, in one process, because most of their time is its start."""
    process = [python, "-c", IN_ONE_PROCESS]
    done = subprocess.run(process, input=json.dumps(lines), cwd=cwd, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    results = map(json.loads, done.stdout.splitlines())
    return [CompletedProcess(line, *result) for line, result in zip(lines, results, strict=True)]


def run_successfully(script: str, *arguments: object, cwd: Path) -> str:
    """Run a command, assert that it succeeds and prints nothing on stderr, and return what it prints."""
    done = run_command(script, *arguments, cwd=cwd)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout + done.stderr
    return done.stdout


def run_on_a_terminal(script: str, *arguments: object, cwd: Path) -> tuple[int, str]:
    """Run a command on a terminal of 80 columns; return its exit status and everything that the terminal received."""
    pty = pytest.importorskip("pty", reason="needs a POSIX terminal")
    screen, terminal = pty.openpty()
    line = command_line(script, *arguments)
    with subprocess.Popen(line, cwd=cwd, env=ENVIRONMENT, stdin=terminal, stdout=terminal, stderr=terminal) as process:
        os.close(terminal)
        received = b"".join(iter(lambda: read_screen(screen), b""))
    os.close(screen)
    return process.returncode, received.decode()


def read_screen(screen: int) -> bytes:
    """Return what has come since the last call, and nothing once the program has ended."""
    try:
        return os.read(screen, 2**16)
    except OSError:  # Linux raises it when no process holds the other end of the terminal any more
        return b""


def without_styles(text: str) -> str:
    """Return the text without colours and other control codes of a terminal."""
    return re.sub(r"\x1b\[[?\d;]*[A-Za-z]", "", text)


def wait_until(condition: Callable[[], object]) -> None:
    """Return as soon as the condition is true; fail if that takes more than `TIMEOUT`."""
    end = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < end, "what the test waits for did not happen"
        time.sleep(0.002)


def assert_user_error(done: CompletedProcess[str], *words: str) -> None:
    """Assert that a command ended as it must after a user's mistake: status 2 and one line that names these words."""
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1, done.stderr
    for word in words:
        assert word in done.stderr


def read_json(path: Path) -> Any:
    """Read a JSON file and refuse NaN and Infinity, which Python's own reader accepts and others do not."""
    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse_constant)


def read_metrics(results: Path) -> list[dict[str, Any]]:
    """Read a run's metrics.jsonl: one dictionary for each epoch."""
    lines = (results / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line, parse_constant=refuse_constant) for line in lines]


def refuse_constant(name: str) -> NoReturn:
    """Fail on a number that is not JSON."""
    raise AssertionError(f"{name} is not JSON")


def contents(folder: Path) -> dict[Path, bytes | None]:
    """Return everything in a folder: the bytes of each file, None for a folder."""
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def listing(folder: Path) -> list[str]:
    """Return every path under a folder, relative to it; `COMPLETE` for a data folder that was fetched."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def zero_weights(network: Network) -> TorchDict:
    """Return weights of a network that are all 0."""
    return {name: np.zeros(leaf.shape, np.float32) for name, leaf in layout_of(network).items()}

"""Training commands that have run, weights for them, and commands on a terminal."""

import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from jax_cnn.config import Network
from jax_cnn.torch_layout import TorchDict, layout_of
from parity_tests.support import ENVIRONMENT, command_line


class TrainedRun(NamedTuple):
    """A training command that has succeeded: where it started, its results, its arguments and its output."""

    cwd: Path
    results: Path
    arguments: tuple[str, ...]
    output: str


TrainOnce = Callable[..., TrainedRun]  # (framework, *flags)


def contents(folder: Path) -> dict[Path, bytes | None]:
    """Return everything in a folder: the bytes of each file, None for a folder."""
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def zero_weights(network: Network) -> TorchDict:
    """Return weights of a network that are all 0."""
    return {name: np.zeros(leaf.shape, np.float32) for name, leaf in layout_of(network).items()}


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

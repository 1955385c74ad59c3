"""Run one of the project's commands as a user does, and measure its time and its peak memory."""

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from jax_cnn.config import UserError

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "scripts"
PLAIN = {"PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8", "COLUMNS": "200"}  # whole lines, without delay
Show = Callable[[str], None]  # is called with a line about what is under way

MIB = 2**20
RSS_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes in a unit of ru_maxrss


class Finished(NamedTuple):
    """The time and the memory of a command that has ended."""

    seconds: float
    """From before its process started to after its end."""
    peak_bytes: int
    """Peak memory. On Linux at least what this process held when it started the command."""


def run(script: str, arguments: Sequence[str], show: Show, environment: Mapping[str, str] | None = None) -> Finished:
    """Run `scripts/<script>.py` to its end in a process of its own.

    `show` is called with every line that is not empty as soon as the command prints it, and `environment` is added to
    the variables of this process.

    Raises:
        UserError: the command failed; the message ends with the last line that it printed.
    """
    command = [sys.executable, str(SCRIPTS / f"{script}.py"), *arguments]
    last_line, started = "", time.perf_counter()
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        env={**os.environ, **PLAIN, **(environment or {})},
    ) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if line.strip():
                    last_line = line.strip()
                    show(last_line)
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:  # Ctrl-C above all: no command may outlive this process
            process.terminate()
            raise
        process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - started
    if process.returncode:
        raise UserError(f"{shlex.join(command)} ended with status {process.returncode}: {last_line}")
    return Finished(seconds, usage.ru_maxrss * RSS_UNIT)

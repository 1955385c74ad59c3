"""One of the project's commands as a user runs it, to its end: its lines as they come, then its time and its memory."""

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from jax_cnn.config import UserError

SCRIPTS = Path(__file__).parents[1]
PLAIN = {"PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8", "COLUMNS": "200"}  # every line whole, and at once


class Finished(NamedTuple):
    """What a command took."""

    seconds: float
    """From before its process started to after its end."""
    peak_bytes: int
    """The most memory that it held. Linux counts from what the process that started it held, which is less here."""


def run(
    script: str, arguments: Sequence[str], show: Callable[[str], None], environment: Mapping[str, str] | None = None
) -> Finished:
    """Run `scripts/<script>.py` in a process of its own.

    Args:
        script: its name without the ending.
        arguments: its command line.
        show: takes every line that it prints and that is not empty, as it comes.
        environment: variables beside those that are there.

    Raises:
        UserError: it failed; with its last line.
    """
    line = [sys.executable, str(SCRIPTS / f"{script}.py"), *arguments]
    last, started = "", time.perf_counter()
    with subprocess.Popen(
        line,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        env={**os.environ, **PLAIN, **(environment or {})},
    ) as process:
        assert process.stdout is not None
        try:
            for printed in process.stdout:
                if printed.strip():
                    last = printed.strip()
                    show(last)
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:  # Ctrl-C above all: leave no command behind
            process.terminate()
            raise
        process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - started
    if process.returncode:
        raise UserError(f"{shlex.join(line)} ended with status {process.returncode}: {last}")
    return Finished(seconds, usage.ru_maxrss * rss_unit())


def rss_unit() -> int:
    """Bytes in a unit of ru_maxrss."""
    return 1 if sys.platform == "darwin" else 1024

"""Commands in processes of their own: killed, paused, waited for, and what they hold meanwhile."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple

from jax_cnn.errors import UserError
from parity_tests.harness.command import SCRIPTS

Process = subprocess.Popen[str]


class Ended(NamedTuple):
    """A command that has ended well."""

    output: str
    peak_bytes: int
    open_files: int
    seconds: float


class Held(NamedTuple):
    """What a process holds at a moment."""

    bytes: int
    open_files: int


def start(script: str, *flags: object, output: int | IO[str] = subprocess.PIPE) -> Process:
    """Start one of the project's commands."""
    line = [sys.executable, str(SCRIPTS / f"{script}.py"), *map(str, flags)]
    return subprocess.Popen(line, stdout=output, stderr=subprocess.STDOUT, text=True)


def kill(process: Process, ready: Callable[[], bool], pause: float) -> bool:
    """Let a command work until it is ready for it and a little longer, and kill it; whether it was still there."""
    while process.poll() is None and not ready():
        time.sleep(0.01)
    time.sleep(pause)
    process.kill()
    process.communicate()
    return process.returncode == -signal.SIGKILL


def finish(process: Process) -> Ended:
    """Wait for a command, and see what it holds meanwhile.

    Raises:
        UserError: it failed.
    """
    peak, files, started = 0, 0, time.monotonic()
    while True:
        peak = max(peak, memory(process.pid, "VmHWM"))
        files = max(files, open_files(process.pid))
        try:
            output, _ = process.communicate(timeout=0.1)
            break
        except subprocess.TimeoutExpired:
            continue
    if process.returncode:
        raise UserError(f"a command that nobody disturbed ended with status {process.returncode}: {output[-300:]}")
    return Ended(output, peak, files, time.monotonic() - started)


@dataclass
class Marathon:
    """A command that lives on, and works only while it is let."""

    process: Process
    log: IO[str]
    """What it says: a pipe that nobody reads would stop it."""

    def work(self, seconds: float) -> Held:
        """Let it work for a while; what it holds then.

        Raises:
            UserError: it is no longer there.
        """
        self.process.send_signal(signal.SIGCONT)
        time.sleep(seconds)
        if self.process.poll() is not None:
            raise UserError(f"a command that should go on ended with {self.process.returncode}: {self.said()}")
        held = Held(memory(self.process.pid, "VmRSS"), open_files(self.process.pid))
        self.process.send_signal(signal.SIGSTOP)
        return held

    def stop(self) -> int:
        """Ask it to end; its status."""
        self.process.send_signal(signal.SIGTERM)
        self.process.send_signal(signal.SIGCONT)
        return self.process.wait()

    def said(self) -> str:
        """The end of what it said."""
        self.log.seek(0)
        return self.log.read()[-300:]


@contextmanager
def marathon(script: str, *flags: object) -> Iterator[Marathon]:
    """Start a command, paused, that lives until the block ends at the latest."""
    with tempfile.TemporaryFile("w+") as log, start(script, *flags, output=log) as process:
        process.send_signal(signal.SIGSTOP)
        try:
            yield Marathon(process, log)
        finally:
            process.kill()


def memory(pid: int, field: str) -> int:
    """Bytes that a process holds (VmRSS) or has held at most (VmHWM); 0 where the system does not tell."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field)), 0)


def open_files(pid: int) -> int:
    """How many files a process holds open; 0 where the system does not tell."""
    try:
        return len(os.listdir(f"/proc/{pid}/fd"))
    except OSError:
        return 0

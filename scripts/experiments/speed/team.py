"""Workers side by side: all alive, all idle but the one that is timed."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from experiments.processes import SCRIPTS
from experiments.speed.contenders import CONTENDERS, Task, Unavailable
from experiments.speed.progress import Show
from experiments.speed.worker import encode
from experiments.spread import turns

Json = dict[str, Any]

# What tells thread pools how to wait or how many to be is set here and nowhere else, and nothing compiled is kept.
CLEARED = ("OMP_", "GOMP_", "KMP_", "MKL_", "JAX_COMPILATION_CACHE", "TORCHINDUCTOR_")
STOP_TIMEOUT = 5.0  # seconds for an idle worker to see the end of its input


class Team:
    """The workers of one comparison. Leaving the `with` block ends all of them, however it is left."""

    def __init__(self) -> None:
        """Start with nobody."""
        self._workers: list[Worker] = []
        self._scratch = Path(tempfile.mkdtemp(prefix="benchmark-"))

    def __enter__(self) -> Self:
        """Nothing to do yet."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """End all workers: at once if the work was broken off."""
        try:
            for worker in self._workers:
                worker.stop(STOP_TIMEOUT if kind is None else 0.0)
        finally:
            shutil.rmtree(self._scratch, ignore_errors=True)

    def hire(self, task: Task) -> "Worker":
        """Start a worker, and wait until it is built and warm: it shares the machine with nobody meanwhile.

        Raises:
            Unavailable: it cannot run on this machine.
            WorkerFailed: it ended.
        """
        worker = Worker(task, self._scratch)
        self._workers.append(worker)
        worker.ready = worker.answer()
        if "unavailable" in worker.ready:
            raise Unavailable(worker.ready["unavailable"])
        return worker


class WorkerFailed(Exception):
    """A worker ended by itself; the message says how, and all that it wrote."""


class Worker:
    """A contender's process."""

    def __init__(self, task: Task, scratch: Path) -> None:
        """Start it; `scratch` takes whatever it has to write."""
        self.ready: Json = {}
        self._name = task.contender
        self._complaints = tempfile.TemporaryFile()  # noqa: SIM115  closed by stop
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "experiments.speed.worker", encode(task)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._complaints,
            env=environment(task.contender, scratch),
            encoding="utf-8",
            start_new_session=True,  # Ctrl-C is for the benchmark alone, which then ends the whole group
        )

    def round(self, number: int) -> Json:
        """Let it do a round, and wait for its answer.

        Raises:
            WorkerFailed: it ended.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{number}\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._failure() from None
        return self.answer()

    def answer(self) -> Json:
        """Wait for what it says next.

        Raises:
            WorkerFailed: it ended.
        """
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._failure()
        said: Json = json.loads(line)
        return said

    def stop(self, timeout: float) -> None:
        """Let it end by itself for so many seconds, then end it and all that it has started."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout)
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._process.stdout.close()
        self._complaints.close()

    def _failure(self) -> WorkerFailed:
        status = self._process.wait()
        self._complaints.seek(0)
        wrote = self._complaints.read().decode(errors="replace").strip()
        return WorkerFailed(f"the worker for {self._name} ended with status {status}\n{wrote}")


def environment(contender: str, scratch: Path) -> dict[str, str]:
    """What a contender's process finds in its environment."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(CLEARED)}
    return (
        kept
        | {
            "PYTHONPATH": os.pathsep.join(filter(None, (str(SCRIPTS), os.environ.get("PYTHONPATH")))),
            "JAX_PLATFORMS": "cpu",
            "CUDA_VISIBLE_DEVICES": "",
            "TORCHINDUCTOR_CACHE_DIR": str(scratch / "inductor"),
            "TMPDIR": str(scratch),  # where its compiler leaves precompiled headers, whatever its own folder is
            "TORCHINDUCTOR_COMPILE_THREADS": "1",  # a pool of compilers would stay on beside the rounds
        }
        | CONTENDERS[contender].environment
    )


def alternate(workers: Mapping[str, Worker], rounds: int, show: Show) -> dict[str, list[Json]]:
    """Time all workers in turns; returns the answers of each, one for every round."""
    answers: dict[str, list[Json]] = {name: [] for name in workers}
    for number, order in enumerate(turns(list(workers), rounds)):
        show(f"round {number + 1} of {rounds}")
        for name in order:
            answers[name].append(workers[name].round(number))
    return answers


def measure(tasks: Sequence[Task], rounds: int, show: Show) -> dict[str, Json]:
    """Start a worker for each task, time them in turns, end them.

    Returns:
        For each contender what its start took (`start`) and the answers to its rounds (`rounds`), or why it cannot run
        here (`unavailable`).

    Raises:
        WorkerFailed: a worker ended by itself.
    """
    with Team() as team:
        found: dict[str, Json] = {}
        workers = {}
        for task in tasks:
            show(f"starting {CONTENDERS[task.contender].title}")
            try:
                workers[task.contender] = team.hire(task)
                found[task.contender] = {"start": workers[task.contender].ready}
            except Unavailable as reason:
                found[task.contender] = {"unavailable": str(reason)}
        for name, answers in alternate(workers, rounds, show).items():
            found[name]["rounds"] = answers
    return found

"""One process for each contender, timed in turns: only one of them works at a time.

In one process the frameworks' threads would share cores and caches, and neither the memory of one nor its time to load
could be measured. A worker is a process that runs `main` of this file, with a `Task` as JSON on its command line. It
builds its work and reports that. Then it does one round for every line that it reads, and ends when its input ends, so
that no worker outlives the benchmark. It answers in lines of JSON.
"""

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import TYPE_CHECKING, Any, NamedTuple, Self, TypeVar

import numpy as np
from jaxtyping import Float

from experiments.records import SCRIPTS, Json, Show, read_peak_memory
from experiments.speed.config import CONTENDERS, Task, Unavailable
from jax_cnn.checkpoint import AdamState, Checkpoint, Progress
from jax_cnn.run.resume import CheckpointWriter

if TYPE_CHECKING:  # the loop and its display would only add to the memory of every worker
    from jax_cnn.run.loop import Trainer

Name = TypeVar("Name", bound=str)

START = "from experiments.speed.workers import main; main()"  # the program of a worker

PREALLOCATE = "XLA_PYTHON_CLIENT_PREALLOCATE"  # of a GPU's memory 75 %, when JAX starts
# Only this file sets variables that tell thread pools how to wait and how large to be, and no compiled code is reused.
REMOVED = ("OMP_", "GOMP_", "KMP_", "MKL_", "JAX_COMPILATION_CACHE", "TORCHINDUCTOR_")
STOP_TIMEOUT = 5.0  # seconds for an idle worker to notice the end of its input

DOT_SIZE = 2048  # rows and columns of the square matrices
DOTS_PER_ROUND = 8
DOT_FLOP = 2 * DOT_SIZE**3 * DOTS_PER_ROUND
WARM_UP_IMAGES = 4096


def time_in_turns(tasks: Sequence[Task], rounds: int, show: Show) -> dict[str, Json]:
    """Start a worker for each task, one after the other, time them in turns, and end them.

    Returns:
        For each contender what its start took (`start`) and its answers (`rounds`), or why it cannot run here
        (`unavailable`).

    Raises:
        WorkerFailed: a worker ended too early.
    """
    results: dict[str, Json] = {}
    workers: dict[str, Worker] = {}
    with (
        TemporaryDirectory(prefix="benchmark-", ignore_cleanup_errors=True) as scratch,
        contextlib.ExitStack() as running,
    ):
        for task in tasks:
            show(f"starting {CONTENDERS[task.contender].title}")
            worker = running.enter_context(Worker(task, Path(scratch)))
            start = worker.read_answer()
            if "unavailable" in start:
                results[task.contender] = start
            else:
                results[task.contender] = {"start": start, "rounds": []}
                workers[task.contender] = worker
        for number in range(rounds if workers else 0):
            show(f"round {number + 1} of {rounds}")
            for name in order_of_round(list(workers), number):
                results[name]["rounds"].append(workers[name].time_round(number))
    return results


def order_of_round(names: Sequence[Name], number: int) -> list[Name]:
    """Return the order of the names in a round: each round begins one name later than the round before."""
    start = number % len(names)
    return [*names[start:], *names[:start]]


class WorkerFailed(Exception):
    """A worker ended too early. The message gives its exit status and all that it wrote to stderr."""


class Worker:
    """The process of one contender, as the benchmark sees it."""

    def __init__(self, task: Task, scratch: Path) -> None:
        """Start the process. All that it writes goes into the folder `scratch`."""
        self._name = task.contender
        self._errors = scratch / f"{task.contender}.log"
        with self._errors.open("wb") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", START, json.dumps(asdict(task))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=worker_environment(task, scratch),
                encoding="utf-8",
                start_new_session=True,  # Ctrl-C reaches the benchmark alone, which then ends the worker's whole group
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._input, self._output = self._process.stdin, self._process.stdout

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """End the process and all that it has started: at once after an error, else when it has had time to end."""
        with contextlib.suppress(BrokenPipeError):
            self._input.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_TIMEOUT if kind is None else 0.0)
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._output.close()

    def time_round(self, number: int) -> Json:
        """Let the worker do a round, and return its answer.

        Raises:
            WorkerFailed: it ended instead.
        """
        with contextlib.suppress(BrokenPipeError):  # then there is no answer to read
            self._input.write(f"{number}\n")
            self._input.flush()
        return self.read_answer()

    def read_answer(self) -> Json:
        """Wait for the next answer.

        Raises:
            WorkerFailed: the worker ended instead.
        """
        if line := self._output.readline():
            answer: Json = json.loads(line)
            return answer
        status = self._process.wait()
        errors = self._errors.read_text(encoding="utf-8", errors="replace").strip()
        raise WorkerFailed(f"the worker for {self._name} ended with status {status}\n{errors}")


def worker_environment(task: Task, scratch: Path) -> dict[str, str]:
    """Return the environment of a contender's process."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(REMOVED)}
    common = {
        "PYTHONPATH": os.pathsep.join(filter(None, (str(SCRIPTS), os.environ.get("PYTHONPATH")))),
        "TORCHINDUCTOR_CACHE_DIR": str(scratch / "inductor"),
        "TMPDIR": str(scratch),  # torch.compile leaves precompiled headers there, wherever its own folder is
    }
    on_cpu = {
        "JAX_PLATFORMS": "cpu",
        "CUDA_VISIBLE_DEVICES": "",
        "TORCHINDUCTOR_COMPILE_THREADS": "1",  # a pool of compiler processes would live on during the rounds
    }
    # Otherwise JAX would take most of the memory, which the processes of all contenders share.
    on_gpu = {PREALLOCATE: os.environ.get(PREALLOCATE, "false")}
    return inherited | common | (on_cpu if task.device == "cpu" else on_gpu) | CONTENDERS[task.contender].environment


# --- The work of a worker, as far as it does not depend on a framework ---


class Work(NamedTuple):
    """Work that can be timed again and again."""

    round: Callable[[int], dict[str, Any]]
    """Does the work of the round with this number, and returns what belongs into the results."""
    compile_seconds: float = 0.0
    warm_up: Callable[[], object] | None = None
    """Works until the next round takes as long as all later ones. Without it a round does."""


class Point(NamedTuple):
    """A part of a round that is timed alone, such as the training at one precision and batch size."""

    steps: int
    take: Callable[[], float | None]
    """Takes the steps, waits for the last one, and may return its loss."""


def training(train_epoch: Callable[[int], Iterator[tuple[int, Any]]], compile_seconds: float = 0.0) -> Work:
    """Return work whose round is one epoch. `train_epoch` trains it and yields numbers of images with their losses."""

    def warm_up() -> None:
        images = 0
        for count, _ in train_epoch(0):
            images += count
            if images >= WARM_UP_IMAGES:  # a whole epoch can be long
                break

    def train(number: int) -> dict[str, Any]:
        parts = list(train_epoch(1 + number))  # to read a loss earlier would mean to wait for its step
        loss_sum = sum(count * float(np.asarray(losses).mean()) for count, losses in parts)
        return {"loss": loss_sum / sum(count for count, _ in parts)}

    return Work(train, compile_seconds, warm_up)


def sweep(points: Mapping[str, Point], compile_seconds: float) -> Work:
    """Return work whose round takes every point once, in turns: the seconds of a step, and the last loss."""

    def take_all(number: int) -> dict[str, Any]:
        seconds, losses = dict.fromkeys(points, 0.0), {}
        for name in order_of_round(list(points), number):
            started = time.perf_counter()
            losses[name] = points[name].take()
            seconds[name] = (time.perf_counter() - started) / points[name].steps
        return {"seconds_a_step": seconds, "losses": losses}

    return Work(take_all, compile_seconds)


def checkpointing(trainer: "Trainer") -> Work:
    """Return work whose round is two epochs. One of them writes a checkpoint while it trains.

    A single checkpoint in 30 s of training would be lost in the noise of a step's time. The files go into a temporary
    folder, which is removed with those of the other workers.
    """
    epochs = itertools.count()
    writer = CheckpointWriter(Path(mkdtemp()), interval=0.0)

    def train_both(number: int) -> dict[str, Any]:
        """Return the seconds of each epoch, and those for which training waits for a copy of the state."""
        seconds = {}
        for epoch in order_of_round(("without", "with"), number):
            started = time.perf_counter()
            if epoch == "with":
                state = AdamState(*trainer.state())
                writer.write(Checkpoint(state, Progress(0, state.step, 0.0, 0.0, []), {}))
                seconds["copy"] = time.perf_counter() - started
            for _ in trainer.train_epoch(next(epochs)):
                pass
            writer.wait()  # until the file is on disk, although a run would train on meanwhile
            seconds[epoch] = time.perf_counter() - started
        return {f"{name}_seconds": value for name, value in seconds.items()}

    return Work(train_both, trainer.compile_seconds)


def dot_factors(seed: int) -> tuple[Float[np.ndarray, "size size"], Float[np.ndarray, "size size"]]:
    """Return two float32 matrices. Repeated products with the second one keep the size of the numbers."""
    generator = np.random.default_rng(seed)
    left, right = generator.standard_normal((2, DOT_SIZE, DOT_SIZE), np.float32)
    return left, right / np.float32(DOT_SIZE**0.5)


# --- In the worker's process ---


def main() -> None:
    """Build the work, and do rounds until the input ends."""
    # What libraries print goes to stderr: stdout is for the answers alone.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1, encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def answer(content: Json) -> None:
        print(json.dumps(content | {"peak_bytes": read_peak_memory()}), file=answers)

    task = Task(**json.loads(sys.argv[1]))
    if hasattr(os, "sched_setaffinity"):  # before a framework loads: JAX starts a thread for each core it may use
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: task.threads])
    try:
        work, seconds = build(task)
    except Unavailable as reason:
        answer({"unavailable": str(reason)})
        return
    answer(seconds)
    idle_since = time.process_time()  # CPU time of all threads together
    for line in sys.stdin:
        started, cpu_started = time.perf_counter(), time.process_time()
        results = work.round(int(line))
        seconds = {
            "seconds": time.perf_counter() - started,
            "cpu_seconds": time.process_time() - cpu_started,
            "idle_cpu_seconds": cpu_started - idle_since,
        }
        answer(results | seconds)
        idle_since = time.process_time()


def build(task: Task) -> tuple[Work, dict[str, float]]:
    """Load the framework, build the work and warm it up; return the work and the seconds of each part.

    Raises:
        Unavailable: the contender cannot run on this machine.
    """
    started = time.perf_counter()
    module = import_module(f"experiments.speed.{CONTENDERS[task.contender].framework}_steps")
    loaded = time.perf_counter()
    work: Work = module.make(task)
    built = time.perf_counter()
    (work.warm_up or partial(work.round, 0))()
    return work, {
        "import_seconds": loaded - started,
        "build_seconds": built - loaded - work.compile_seconds,  # to read and verify the data set, to draw the weights
        "compile_seconds": work.compile_seconds,
        "warm_up_seconds": time.perf_counter() - built,
    }

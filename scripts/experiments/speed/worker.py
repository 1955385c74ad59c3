"""One contender in a process of its own: ``python -m experiments.speed.worker TASK``, with a `Task` as JSON.

Sharing a process, the frameworks' threads would share cores and caches, and neither's memory nor its time to load could
be told. The worker builds its work and says so, then does a round for every line that it reads, and ends when its input
does, so that none outlives the benchmark. It answers in lines of JSON.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from experiments.processes import rss_unit
from experiments.speed.contenders import Task, Unavailable
from experiments.speed.work import Work, load, make

STATUS = Path("/proc/self/status")


def main() -> None:
    """Build, answer, and do rounds until the input ends."""
    # What libraries print goes to stderr: the answers have stdout for themselves.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def answer(content: Mapping[str, Any]) -> None:
        print(json.dumps(content), file=answers)

    task = decode(sys.argv[1])
    keep_to_cores(task.threads)  # before a framework loads: JAX starts a thread for each core that it may use
    try:
        work, seconds = build(task)
    except Unavailable as reason:
        answer({"unavailable": str(reason)})
        return
    answer(seconds | {"peak_bytes": peak_memory()})
    rested_since = time.process_time()
    for line in sys.stdin:
        idle = time.process_time() - rested_since
        answer(timed_round(work, int(line)) | {"idle_cpu_seconds": idle, "peak_bytes": peak_memory()})
        rested_since = time.process_time()


def build(task: Task) -> tuple[Work, dict[str, float]]:
    """Load the framework, build the work, warm it up; returns it and the seconds that each took.

    Raises:
        Unavailable: it cannot run on this machine.
    """
    started = time.perf_counter()
    load(task)
    loaded = time.perf_counter()
    work = make(task)
    made = time.perf_counter()
    work.warm_up()
    return work, {
        "import_seconds": loaded - started,
        "build_seconds": made - loaded - work.compile_seconds,  # the data set read and verified, the weights drawn
        "compile_seconds": work.compile_seconds,
        "warm_up_seconds": time.perf_counter() - made,
    }


def timed_round(work: Work, number: int) -> dict[str, Any]:
    """Do a round; returns what it says, how long it took, and the time of all threads together."""
    started, cpu_started = time.perf_counter(), time.process_time()
    said = work.round(number)
    return said | {"seconds": time.perf_counter() - started, "cpu_seconds": time.process_time() - cpu_started}


def keep_to_cores(count: int) -> None:
    """Keep this process to the first so many of the cores that it may use; nothing is done if that is all of them."""
    if not hasattr(os, "sched_getaffinity"):
        return
    cores = sorted(os.sched_getaffinity(0))
    if count < len(cores):
        os.sched_setaffinity(0, cores[:count])


def peak_memory() -> int:
    """The most memory that this process has held at once, in bytes.

    From Linux's own account where there is one: getrusage's starts with that of the process that started this one.
    """
    if STATUS.exists():
        for line in STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * rss_unit()


def encode(task: Task) -> str:
    """A task for the command line."""
    return json.dumps(asdict(task), default=str)


def decode(text: str) -> Task:
    """And back."""
    content = json.loads(text)
    return Task(**content | {"data_dir": Path(content["data_dir"])})


if __name__ == "__main__":
    main()

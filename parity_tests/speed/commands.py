"""The two training commands as a user runs them, from the start of the process to its end."""

import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

from jax_cnn.config import TrainConfig
from jax_cnn.errors import UserError
from parity_tests.harness.study_runs import SCRIPTS, flags, read_metrics
from parity_tests.speed.progress import Show, labelled
from parity_tests.speed.settings import BenchmarkConfig
from parity_tests.speed.spread import spread, turns
from parity_tests.speed.team import Json
from parity_tests.speed.worker import rss_unit

FRAMEWORKS = ("jax", "torch")
FIRST_REPORT = re.compile(r"epoch 1/\d+: ([\d,]+) of [\d,]+ images")


def commands(config: BenchmarkConfig, show: Show) -> Json:
    """Run both commands in turns, into a temporary folder, in the environment that the benchmark was started in.

    Raises:
        UserError: a command failed.
    """
    runs: dict[str, list[Json]] = {framework: [] for framework in FRAMEWORKS}
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder:
        for number, order in enumerate(turns(FRAMEWORKS, config.command_runs)):
            for framework in order:
                label = f"train_{framework}.py, run {number + 1} of {config.command_runs}"
                out_dir = Path(folder) / f"{framework}-{number}"
                runs[framework].append(run(framework, config, out_dir, labelled(label, show)))
    return {framework: describe(each) for framework, each in runs.items()}


def run(framework: str, config: BenchmarkConfig, out_dir: Path, show: Show) -> Json:
    """Run one command to its end.

    Raises:
        UserError: it failed.
    """
    training = TrainConfig(
        epochs=config.command_epochs,
        seed=config.seed,
        data_dir=config.data_dir,
        out_dir=out_dir,
        limit_train=config.command_images,
    )
    more = ("--batch-size", str(config.batch_size), "--device", "cpu")
    command = [sys.executable, str(SCRIPTS / f"train_{framework}.py"), *flags(training), *more]
    env = os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8", "COLUMNS": "200"}
    show("starting")
    last, first_seconds, first_images = "", None, None
    started = time.perf_counter()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", env=env
    ) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                last = line.strip() or last
                report = FIRST_REPORT.match(last)
                if report and first_seconds is None:
                    first_seconds, first_images = time.perf_counter() - started, int(report[1].replace(",", ""))
                if last.startswith("epoch"):
                    show(last)
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:  # Ctrl-C above all: leave no training behind
            process.terminate()
            raise
        seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise UserError(f"{shlex.join(command)} ended with status {process.returncode}: {last}")
    return {
        "command": shlex.join(
            ["python", f"scripts/train_{framework}.py", *flags(replace(training, out_dir=Path("RUN"))), *more]
        ),
        "seconds": seconds,
        "first_report_seconds": first_seconds,
        "first_report_images": first_images,
        # Linux counts from what this process held when it started the command, which is far less than either needs.
        "peak_bytes": usage.ru_maxrss * rss_unit(),
        "epochs": read_metrics(out_dir),
    }


def describe(runs: list[Json]) -> Json:
    """A command's figures over its runs; an epoch's over all epochs of all runs."""
    epochs = [epoch for run in runs for epoch in run["epochs"]]
    first = [run["first_report_seconds"] for run in runs if run["first_report_seconds"] is not None]
    return {
        "seconds": spread([run["seconds"] for run in runs])._asdict(),
        "first_report_seconds": spread(first)._asdict() if first else None,
        "first_report_images": runs[0]["first_report_images"],
        "compile_seconds": spread([run["epochs"][0]["compile_seconds"] for run in runs])._asdict(),
        "train_seconds": spread([epoch["train_seconds"] for epoch in epochs])._asdict(),
        "evaluate_seconds": spread([epoch["eval_seconds"] for epoch in epochs])._asdict(),
        "test_accuracy": median(run["epochs"][-1]["test_accuracy"] for run in runs),
        "peak_bytes": max(run["peak_bytes"] for run in runs),
        "runs": runs,
    }

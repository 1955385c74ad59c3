"""The two training commands as a user runs them, from the start of the process to its end."""

import re
import shlex
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

from experiments import processes
from experiments.records import flags, read_metrics
from experiments.speed.progress import Show, labelled
from experiments.speed.settings import BenchmarkConfig
from experiments.speed.spread import spread, turns
from experiments.speed.team import Json
from jax_cnn.config import TrainConfig

FRAMEWORKS = ("jax", "torch")
FIRST_REPORT = re.compile(r"epoch 1/\d+: ([\d,]+) of [\d,]+ images")


def commands(config: BenchmarkConfig, show: Show) -> Json:
    """Run both commands in turns, into a temporary folder, in the environment that the benchmark was started in.

    Each compiles as on a machine that has never run it: what JAX kept from another day would make it start faster.

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
    first: list[tuple[float, int]] = []  # seconds and images of the first report

    def watch(line: str) -> None:
        if not first and (report := FIRST_REPORT.match(line)):
            first.append((time.perf_counter() - started, int(report[1].replace(",", ""))))
        if line.startswith("epoch"):
            show(line)

    show("starting")
    started = time.perf_counter()
    nothing_compiled = {"JAX_COMPILATION_CACHE_DIR": f"{out_dir}-compiled"}
    finished = processes.run(f"train_{framework}", [*flags(training), *more], watch, nothing_compiled)
    first_seconds, first_images = first[0] if first else (None, None)
    return {
        "command": shlex.join(
            ["python", f"scripts/train_{framework}.py", *flags(replace(training, out_dir=Path("RUN"))), *more]
        ),
        "seconds": finished.seconds,
        "first_report_seconds": first_seconds,
        "first_report_images": first_images,
        "peak_bytes": finished.peak_bytes,
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

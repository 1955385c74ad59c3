"""The whole benchmark: what is measured in which order, and the files that it leaves."""

import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from experiments.speed import sections
from experiments.speed.commands import commands
from experiments.speed.progress import Steps
from experiments.speed.settings import BenchmarkConfig
from experiments.speed.team import Json
from jax_cnn.files import writing
from jax_cnn.run.folder import set_aside
from jax_cnn.run.provenance import provenance, usable_cores

PACKAGES = ("jax", "jaxlib", "flax", "optax", "torch", "torchvision", "numpy")
RESULT, THROUGHPUT, GROWTH = "benchmark.json", "throughput.png", "growth.png"
FILES = (RESULT, THROUGHPUT, GROWTH)
TELLING = ("OMP_", "GOMP_", "KMP_", "MKL_", "XLA_", "JAX_", "TORCH", "LD_PRELOAD", "MALLOC_", "GLIBC_TUNABLES")
BUSY = 0.3  # processes that want a core, for each core, before the benchmark has started any
Measure = Callable[[], Json | list[Json]]
NOTHING: dict[str, Any] = {"batch_sizes": [], "thread_counts": [], "train_sizes": [], "stages": None, "commands": None}


def run(config: BenchmarkConfig, steps: Steps, say: Callable[[str], None]) -> Json:
    """Measure section by section. After each, the file holds all that there is: what is done outlives Ctrl-C.

    Returns:
        What the file holds.

    Raises:
        UserError: nothing to compare with, a command failed, or the folder cannot be written.
        WorkerFailed: a contender's process ended by itself.
    """
    result = describe_run(config)
    if result["load_before"] > BUSY * usable_cores():
        say(
            f"This machine is busy (load {result['load_before']:.1f} on {usable_cores()} cores): only ratios between "
            "contenders mean something, and even they little."
        )
    planned = sections_of(config, result, steps.show)
    for number, (key, measure) in enumerate(planned.items()):
        steps.section(key.replace("_", " "), number, len(planned))
        result[key] = measure()
        if not number:  # as late as can be: a benchmark broken off before has moved nothing
            set_aside(config.out_dir, FILES, say)
        write(result, config.out_dir)
    return result


def sections_of(config: BenchmarkConfig, result: Json, show: Callable[[str], None]) -> dict[str, Measure]:
    """What the config asks for, in order, by its key in the file. All but the contest build on the contest's result."""

    def growth(changes: list[dict[str, int]], rounds: int) -> Measure:
        return lambda: sections.growth(config, result["contest"]["best_torch"], changes, rounds, show)

    batches = [{"batch_size": size, "images": max(size, config.round_images)} for size in config.batch_sizes]
    planned: dict[str, Measure] = {"contest": lambda: sections.contest(config, show)}
    if config.batch_sizes and config.sweep_rounds:
        planned["batch_sizes"] = growth(batches, config.sweep_rounds)
    if config.counts and config.sweep_rounds:
        planned["thread_counts"] = growth([{"threads": count} for count in config.counts], config.sweep_rounds)
    if config.train_sizes and config.epoch_rounds:
        planned["train_sizes"] = growth([{"images": size} for size in config.train_sizes], config.epoch_rounds)
    if config.stage_rounds:
        planned["stages"] = lambda: sections.stages(config, show)
    if config.command_runs:
        planned["commands"] = lambda: commands(config, show)
    return planned


def describe_run(config: BenchmarkConfig) -> Json:
    """Where the figures come from, and an empty place for each of them."""
    return (
        provenance(PACKAGES)
        | {
            "config": asdict(config),
            "environment": {name: value for name, value in os.environ.items() if name.startswith(TELLING)},
            "load_before": os.getloadavg()[0],
            "contest": None,
        }
        | NOTHING
    )


def write(result: Json, out_dir: Path) -> None:
    """Write the file whole or not at all.

    Raises:
        UserError: the folder cannot be written.
    """
    with writing(out_dir):
        temporary = out_dir / f"{RESULT}.tmp"
        temporary.write_text(json.dumps(result, indent=1, default=str, allow_nan=False) + "\n")
        temporary.replace(out_dir / RESULT)


def draw(result: Json, out_dir: Path) -> list[str]:
    """Draw the charts of what was measured; returns the names of all files of the benchmark that are there now.

    Raises:
        UserError: the folder cannot be written.
    """
    from experiments.speed import charts  # only now: no slip and no --help should wait for matplotlib

    with writing(out_dir):
        charts.plot_throughput(result["contest"], out_dir / THROUGHPUT)
        if any(result[section] for section in charts.PANELS):
            charts.plot_growth(result, out_dir / GROWTH)
            return list(FILES)
    return [RESULT, THROUGHPUT]

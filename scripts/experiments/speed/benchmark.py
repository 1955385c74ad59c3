"""The whole benchmark: the order of its sections, and the files that it writes."""

import os
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

from experiments.records import PACKAGES, Json, Show
from experiments.speed import sections
from experiments.speed.config import BenchmarkConfig
from jax_cnn.files import write_json, writing
from jax_cnn.run.display import ProgressBar
from jax_cnn.run.folder import set_aside
from jax_cnn.run.provenance import provenance, usable_cores

RESULT, THROUGHPUT, GROWTH = "benchmark.json", "throughput.png", "growth.png"
FILES = (RESULT, THROUGHPUT, GROWTH)
RECORDED = ("OMP_", "GOMP_", "KMP_", "MKL_", "XLA_", "JAX_", "TORCH", "LD_PRELOAD", "MALLOC_", "GLIBC_TUNABLES")
BUSY_LOAD = 0.3  # processes for each core that want to run before the benchmark starts any
EMPTY_SECTIONS: Json = {
    "batch_sizes": [],
    "thread_counts": [],
    "train_sizes": [],
    "stages": None,
    "checkpoints": None,
    "commands": None,
}


def run(config: BenchmarkConfig, progress: ProgressBar) -> Json:
    """Measure section by section, and return what the result file holds.

    The file is written after every section, so an interrupted benchmark keeps what it has measured.

    Raises:
        UserError: no PyTorch is left to compare with, a command failed, or the folder cannot be written.
        WorkerFailed: the process of a contender ended too early.
    """
    result: Json = provenance(PACKAGES) | {
        "config": asdict(config),
        "environment": {name: value for name, value in os.environ.items() if name.startswith(RECORDED)},
        "load_before": os.getloadavg()[0],
        "contest": None,
        **EMPTY_SECTIONS,
    }
    if result["load_before"] > BUSY_LOAD * usable_cores():
        progress.say(
            f"This machine is busy (load {result['load_before']:.1f} on {usable_cores()} cores): only large "
            "differences between contenders mean something."
        )
    measurements = plan(config, result, progress.report)
    for number, (name, measure) in enumerate(measurements.items()):
        title = f"{number + 1} of {len(measurements)}: {name.replace('_', ' ')}"
        progress.begin(title, number, len(measurements))
        result[name] = measure()
        if number == 0:  # as late as possible: a benchmark that was interrupted before has moved nothing
            set_aside(config.out_dir, FILES, progress.say)
        with writing(config.out_dir):
            write_json(config.out_dir / RESULT, result)
    return result


def plan(config: BenchmarkConfig, result: Json, show: Show) -> dict[str, Callable[[], Json | list[Json]]]:
    """Return the sections that the config asks for, in order. Some need the contest, which is then in `result`."""
    batches = [{"batch_size": size, "images": max(size, config.round_images)} for size in config.batch_sizes]
    threads = [{"threads": count} for count in config.swept_threads]
    sizes = [{"images": size} for size in config.train_sizes]
    measurements: dict[str, Callable[[], Json | list[Json]]] = {
        "contest": partial(sections.measure_contest, config, show)
    }
    for name, points, rounds in (
        ("batch_sizes", batches, config.sweep_rounds),
        ("thread_counts", threads, config.sweep_rounds),
        ("train_sizes", sizes, config.epoch_rounds),
    ):
        if points and rounds:
            measurements[name] = partial(sections.measure_growth, config, result, points, rounds, show)
    if config.stage_rounds:
        measurements["stages"] = partial(sections.measure_stages, config, show)
    if config.checkpoint_pairs:
        measurements["checkpoints"] = partial(sections.measure_checkpoints, config, show)
    if config.command_runs:
        measurements["commands"] = partial(sections.measure_commands, config, show)
    return measurements


def draw(result: Json, out_dir: Path) -> list[str]:
    """Draw the charts of all measured sections, and return the names of the benchmark's files.

    Raises:
        UserError: the folder cannot be written.
    """
    from experiments.speed import charts  # only now: --help and error messages need not wait for matplotlib

    with writing(out_dir):
        charts.plot_throughput(result["contest"], out_dir / THROUGHPUT)
        if any(result[section] for section in charts.PANELS):
            charts.plot_growth(result, out_dir / GROWTH)
            return list(FILES)
    return [RESULT, THROUGHPUT]

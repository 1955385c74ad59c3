"""The whole benchmark on the CPU: its sections, each measured in turns, and the files that it writes."""

import math
import os
import re
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from experiments.answers import FRAMEWORKS, Framework
from experiments.records import PACKAGES, Json, Show, flags, read_metrics, train
from experiments.speed import results
from experiments.speed.config import CHECKPOINTS, CONTENDERS, DOTS, STAGE_TIMES, BenchmarkConfig, Task
from experiments.speed.results import Spread, paired_ratios, spread
from experiments.speed.workers import DOT_FLOP, order_of_round, time_in_turns
from jax_cnn.config import TrainConfig, UserError
from jax_cnn.files import write_json, writing
from jax_cnn.run.display import ProgressBar
from jax_cnn.run.folder import set_aside
from jax_cnn.run.provenance import provenance, usable_cores
from jax_cnn.torch_layout import SIMPLE_CNN

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

# Positions of an image at which the weights of each layer are applied.
POSITIONS = {"conv1": 28 * 28, "conv2": 14 * 14, "fc1": 1, "fc2": 1}
# Products of a layer in a training step: forward pass, gradient by the weights, gradient by the input. The input of
# conv1 is the image, whose gradient nothing needs.
PRODUCTS = {"conv1": 2, "conv2": 3, "fc1": 3, "fc2": 3}

FIRST_REPORT = re.compile(r"epoch 1/\d+: ([\d,]+) of [\d,]+ images")


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

    def measure_points(points: Sequence[dict[str, int]], rounds: int) -> list[Json]:
        return [measure_point(config, result["contest"]["best_torch"], changes, rounds, show) for changes in points]

    measurements: dict[str, Callable[[], Json | list[Json]]] = {"contest": partial(measure_contest, config, show)}
    for name, points, rounds in (
        ("batch_sizes", batches, config.sweep_rounds),
        ("thread_counts", threads, config.sweep_rounds),
        ("train_sizes", sizes, config.epoch_rounds),
    ):
        if points and rounds:
            measurements[name] = partial(measure_points, points, rounds)
    if config.stage_rounds:
        measurements["stages"] = partial(measure_stages, config, show)
    if config.checkpoint_pairs:
        measurements["checkpoints"] = partial(measure_checkpoints, config, show)
    if config.command_runs:
        measurements["commands"] = partial(measure_commands, config, show)
    return measurements


def draw(result: Json, out_dir: Path) -> list[str]:
    """Draw the charts of all measured sections, and return the names of the benchmark's files.

    Raises:
        UserError: the folder cannot be written.
    """
    with writing(out_dir):
        results.plot_throughput(result["contest"], out_dir / THROUGHPUT)
        if any(result[section] for section in results.PANELS):
            results.plot_growth(result, out_dir / GROWTH)
            return list(FILES)
    return [RESULT, THROUGHPUT]


def make_task(config: BenchmarkConfig, contender: str, **changes: Any) -> Task:
    """Return what a contender does in the contest, or a task that differs from it in some fields."""
    task = Task(
        contender=contender,
        batch_size=config.batch_size,
        images=config.round_images,
        threads=config.cores,
        seed=config.seed,
        data_dir=str(config.data_dir),
    )
    return replace(task, **changes)


def measure_contest(config: BenchmarkConfig, show: Show) -> Json:
    """Time all contenders; compare them with the best PyTorch, and with the floor under a step's time."""
    tasks = {name: make_task(config, name) for name in (*config.contenders, *DOTS)}
    measured = time_in_turns(list(tasks.values()), config.rounds, show)
    lines = {str(name): describe_contender(tasks[name], measured[name]) for name in config.contenders}
    best = find_best_torch(lines)
    floor = describe_floor(config.batch_size, {name: round_seconds(measured[name]) for name in DOTS})
    for line in lines.values():
        if "rounds" in line:
            milliseconds = [1e3 * seconds / line["steps"] for seconds in round_seconds(line)]
            line["speed_to_best_torch"] = spread(paired_ratios(round_seconds(lines[best]), round_seconds(line)))
            line["times_floor"] = spread(paired_ratios(milliseconds, floor["rounds_ms_per_step"]))
    return {"best_torch": best, "contenders": lines, "floor": floor}


def find_best_torch(lines: dict[str, Json]) -> str:
    """Return the competing PyTorch with the smallest median time.

    Raises:
        UserError: none can run on this machine.
    """
    rivals = {name: line for name, line in lines.items() if CONTENDERS[name].competes}
    medians = {name: line["seconds"]["median"] for name, line in rivals.items() if "rounds" in line}
    if not medians:
        reasons = "; ".join(f"{name}: {line['unavailable']}" for name, line in rivals.items())
        raise UserError(f"--contenders: no PyTorch is left to compare with ({reasons}); choose another")
    return min(medians, key=medians.__getitem__)


def describe_contender(task: Task, measured: Json) -> Json:
    """Return a contender's figures over all rounds, or why it has none."""
    contender = CONTENDERS[task.contender]
    if "unavailable" in measured:
        return {"title": contender.title, "unavailable": measured["unavailable"]}
    rounds, seconds, steps = measured["rounds"], round_seconds(measured), math.ceil(task.images / task.batch_size)
    return {
        "title": contender.title,
        "environment": contender.environment,
        "images": task.images,
        "steps": steps,
        "threads": task.threads,
        "seconds": spread(seconds),
        "ms_per_step": spread_ms([value / steps for value in seconds]),
        "images_per_second": spread([task.images / value for value in seconds]),
        "cores_used": spread([answer["cpu_seconds"] / answer["seconds"] for answer in rounds]),
        "idle_cpu_seconds": sum(answer["idle_cpu_seconds"] for answer in rounds),
        "peak_bytes": max(answer["peak_bytes"] for answer in rounds),
        "start": measured["start"],
        "rounds": rounds,
    }


def describe_floor(batch_size: int, dot_seconds: dict[str, list[float]]) -> Json:
    """Return how long a step would take at the rate of the faster of the two matrix products, round by round."""
    flop_by_layer = count_flop(batch_size)
    flop_per_step = sum(flop_by_layer.values())
    rates = {name: [DOT_FLOP / value for value in seconds] for name, seconds in dot_seconds.items()}
    fastest = max(rates, key=lambda name: spread(rates[name])["median"])
    milliseconds = [1e3 * flop_per_step / rate for rate in rates[fastest]]
    return {
        "flop_per_step": flop_per_step,
        "flop_by_layer": flop_by_layer,
        "fastest_dot": fastest,
        "flop_per_second": {name: spread(rate) for name, rate in rates.items()},
        "ms_per_step": spread(milliseconds),
        "rounds_ms_per_step": milliseconds,
        "rounds_dot_seconds": dot_seconds,
    }


def count_flop(batch_size: int) -> dict[str, int]:
    """Return the floating-point operations that a training step needs at least, by layer.

    Every product multiplies and adds once for each weight and position. Products with the zeros around an image count.
    Biases, ReLU, pooling, the loss and Adam do not: they are less than 1 % of all operations, and bound by memory.
    """
    return {
        layer: 2 * math.prod(SIMPLE_CNN[f"{layer}.weight"].shape) * positions * PRODUCTS[layer] * batch_size
        for layer, positions in POSITIONS.items()
    }


def measure_point(config: BenchmarkConfig, best_torch: str, changes: dict[str, int], rounds: int, show: Show) -> Json:
    """Time JAX and the best PyTorch at tasks that differ from the contest's in these fields."""
    label = ", ".join(f"{field.replace('_', ' ')} {value:,}" for field, value in changes.items())
    tasks = [make_task(config, name, **changes) for name in ("jax", best_torch)]
    measured = time_in_turns(tasks, rounds, lambda now: show(f"{label}, {now}"))
    jax, torch = (describe_contender(task, measured[task.contender]) for task in tasks)
    speed = spread(paired_ratios(round_seconds(torch), round_seconds(jax)))
    return changes | {"contenders": {"jax": jax, best_torch: torch}, "jax_speed_to_torch": speed}


def measure_stages(config: BenchmarkConfig, show: Show) -> Json:
    """Time every stage of a JAX step alone, forward and backward, and the whole step."""
    measured = time_in_turns([make_task(config, STAGE_TIMES)], config.stage_rounds, show)[STAGE_TIMES]
    rounds = [answer["seconds_a_step"] for answer in measured["rounds"]]
    *parts, whole = rounds[0]
    sums = [sum(seconds[part] for part in parts) for seconds in rounds]
    wholes = [seconds[whole] for seconds in rounds]
    return {
        "ms": {part: spread_ms([seconds[part] for seconds in rounds]) for part in parts},
        "sum_ms": spread_ms(sums),
        "whole_step_ms": spread_ms(wholes),
        "sum_to_whole": spread(paired_ratios(sums, wholes)),
        "rounds_seconds_a_step": rounds,
    }


def measure_checkpoints(config: BenchmarkConfig, show: Show) -> Json:
    """Time trainings with and without a checkpoint in turns. How much slower does one in every interval make them?"""
    tasks = [make_task(config, contender) for contender in CHECKPOINTS.values()]
    measured = time_in_turns(tasks, config.checkpoint_pairs, show)
    interval = TrainConfig.checkpoint_seconds
    costs = {}
    for framework, contender in CHECKPOINTS.items():
        pairs = measured[contender]["rounds"]
        extra = [pair["with_seconds"] - pair["without_seconds"] for pair in pairs]
        costs[framework] = {
            "ms_per_step": spread_ms([pair["without_seconds"] / config.steps for pair in pairs]),
            "copy_ms": spread_ms([pair["copy_seconds"] for pair in pairs]),
            "extra_ms": spread_ms(extra),
            "slower_by": spread([seconds / interval for seconds in extra]),
            "rounds": pairs,
        }
    return {"interval_seconds": interval} | costs


def measure_commands(config: BenchmarkConfig, show: Show) -> Json:
    """Run both commands in turns into a temporary folder. They inherit the environment of the benchmark.

    Each run compiles everything: compiled programs that JAX has kept would make it start faster.
    """
    runs: dict[Framework, list[Json]] = {framework: [] for framework in FRAMEWORKS}
    with TemporaryDirectory(prefix="benchmark-") as folder:
        for number in range(config.command_runs):
            for framework in order_of_round(list(runs), number):
                label = f"train_{framework}.py, run {number + 1} of {config.command_runs}"
                training = config.training(Path(folder) / f"{framework}-{number}")
                runs[framework].append(time_command(framework, training, label, show))
    return {framework: describe_command(own_runs) for framework, own_runs in runs.items()}


def time_command(framework: Framework, config: TrainConfig, label: str, show: Show) -> Json:
    """Run one training command to its end, and show its progress behind the label."""
    first_report: tuple[float, int] | None = None  # its seconds and images

    def watch(line: str) -> None:
        nonlocal first_report
        report = FIRST_REPORT.match(line)
        if report and first_report is None:
            first_report = time.perf_counter() - started, int(report[1].replace(",", ""))
        show(f"{label}, {line}")

    show(f"{label}, starting")
    started = time.perf_counter()
    finished = train(framework, config, watch, {"JAX_COMPILATION_CACHE_DIR": f"{config.out_dir}-compiled"})
    first_seconds, first_images = first_report or (None, None)
    without_folder = flags(replace(config, out_dir=Path("RUN")))  # the folder exists only while this runs
    return {
        "command": shlex.join(["python", f"scripts/train_{framework}.py", *without_folder]),
        "seconds": finished.seconds,
        "first_report_seconds": first_seconds,
        "first_report_images": first_images,
        "peak_bytes": finished.peak_bytes,
        "epochs": read_metrics(config.out_dir),
    }


def describe_command(runs: list[Json]) -> Json:
    """Return the figures of a command over its runs; those of an epoch over all epochs of all runs."""
    epochs = [epoch for run in runs for epoch in run["epochs"]]
    first_reports = [run["first_report_seconds"] for run in runs if run["first_report_seconds"] is not None]
    return {
        "seconds": spread([run["seconds"] for run in runs]),
        "first_report_seconds": spread(first_reports) if first_reports else None,
        "first_report_images": runs[0]["first_report_images"],
        "compile_seconds": spread([run["epochs"][0]["compile_seconds"] for run in runs]),
        "train_seconds": spread([epoch["train_seconds"] for epoch in epochs]),
        "evaluate_seconds": spread([epoch["eval_seconds"] for epoch in epochs]),
        "test_accuracy": median(run["epochs"][-1]["test_accuracy"] for run in runs),
        "peak_bytes": max(run["peak_bytes"] for run in runs),
        "runs": runs,
    }


def round_seconds(measured: Json) -> list[float]:
    """Return how long each round of a contender took."""
    return [answer["seconds"] for answer in measured["rounds"]]


def spread_ms(seconds: Sequence[float]) -> Spread:
    """Return the spread of these times in milliseconds."""
    return spread([1e3 * value for value in seconds])

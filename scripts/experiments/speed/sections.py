"""The parts of the benchmark, each measured by workers in turns and summed up as what its file will hold."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from experiments.speed.contenders import CONTENDERS, DOTS, STAGES, Task
from experiments.speed.flop import layer_flop, step_flop
from experiments.speed.progress import Show, labelled
from experiments.speed.settings import BenchmarkConfig
from experiments.speed.team import Json, measure
from experiments.speed.work import DOT_FLOP
from experiments.spread import paired_ratios, spread
from jax_cnn.config import UserError

Measure = Callable[[Sequence[Task], int, Show], dict[str, Json]]


def task(config: BenchmarkConfig, contender: str, **changes: Any) -> Task:
    """A contender's task in the contest, or one that differs from it in a few things."""
    standard = Task(
        contender=contender,
        batch_size=config.batch_size,
        images=config.round_images,
        threads=config.cores,
        seed=config.seed,
        data_dir=config.data_dir,
    )
    return Task(**asdict(standard) | changes)


def contest(config: BenchmarkConfig, show: Show, measure: Measure = measure) -> Json:
    """All contenders, and the floor under them: the step's operations at the rate of a large matrix product.

    Raises:
        UserError: no PyTorch is left to compare with.
    """
    tasks = [task(config, name) for name in (*config.contenders, *DOTS)]
    found = measure(tasks, config.rounds, show)
    lines = {str(name): describe(name, found[name], tasks[0]) for name in config.contenders}
    best = best_torch(lines)
    floor = describe_floor(config.batch_size, {name: round_seconds(found[name]) for name in DOTS})
    for line in lines.values():
        if "rounds" in line:
            speed = paired_ratios(round_seconds(lines[best]), round_seconds(line))
            line["speed_to_best_torch"] = spread(speed)._asdict()
            line["times_floor"] = spread(paired_ratios(ms_per_step(line), floor["rounds_ms_per_step"]))._asdict()
    return {"best_torch": best, "contenders": lines, "floor": floor}


def best_torch(lines: dict[str, Json]) -> str:
    """The PyTorch with the smallest median among those that compete.

    Raises:
        UserError: none can run here.
    """
    rivals = {name: line for name, line in lines.items() if CONTENDERS[name].competes}
    medians = {name: line["seconds"]["median"] for name, line in rivals.items() if "rounds" in line}
    if not medians:
        why = "; ".join(f"{name}: {line['unavailable']}" for name, line in rivals.items())
        raise UserError(f"--contenders: no PyTorch is left to compare with ({why}); choose another")
    return min(medians, key=medians.__getitem__)


def describe(contender: str, found: Json, task: Task) -> Json:
    """A contender's figures, or why it has none."""
    title = CONTENDERS[contender].title
    if "unavailable" in found:
        return {"title": title, "unavailable": found["unavailable"]}
    measured, steps = round_seconds(found), math.ceil(task.images / task.batch_size)
    used = [answer["cpu_seconds"] / answer["seconds"] for answer in found["rounds"]]
    return {
        "title": title,
        "environment": CONTENDERS[contender].environment,
        "images": task.images,
        "steps": steps,
        "threads": task.threads,
        "seconds": spread(measured)._asdict(),
        "ms_per_step": spread([1e3 * one / steps for one in measured])._asdict(),
        "images_per_second": spread([task.images / one for one in measured])._asdict(),
        "cores_used": spread(used)._asdict(),
        "idle_cpu_seconds": sum(answer["idle_cpu_seconds"] for answer in found["rounds"]),
        "peak_bytes": max(answer["peak_bytes"] for answer in found["rounds"]),
        "start": found["start"],
        "rounds": found["rounds"],
    }


def describe_floor(batch_size: int, dots: dict[str, list[float]]) -> Json:
    """The faster of the two matrix products, round by round, and how long a step would take at its rate."""
    rates = {name: [DOT_FLOP / one for one in measured] for name, measured in dots.items()}
    fastest = max(rates, key=lambda name: spread(rates[name]).median)
    least = [1e3 * step_flop(batch_size) / rate for rate in rates[fastest]]
    return {
        "flop_per_step": step_flop(batch_size),
        "flop_by_layer": layer_flop(batch_size),
        "fastest_dot": fastest,
        "flop_per_second": {name: spread(rate)._asdict() for name, rate in rates.items()},
        "ms_per_step": spread(least)._asdict(),
        "rounds_ms_per_step": least,
        "rounds_dot_seconds": dots,
    }


def growth(
    config: BenchmarkConfig,
    best: str,
    changes: Sequence[dict[str, int]],
    rounds: int,
    show: Show,
    measure: Measure = measure,
) -> list[Json]:
    """JAX and the best PyTorch at tasks that differ from the contest's, one after the other.

    Args:
        config: of the benchmark.
        best: the contender to hold JAX against.
        changes: how each task differs.
        rounds: of each task.
        show: takes what is under way.
        measure: starts the workers and times them.

    Returns:
        For each task its changes, the figures of both, and how many times as fast as PyTorch JAX is.
    """
    points = []
    for change in changes:
        label = ", ".join(f"{name.replace('_', ' ')} {value:,}" for name, value in change.items())
        tasks = [task(config, name, **change) for name in ("jax", best)]
        found = measure(tasks, rounds, labelled(label, show))
        jax, torch = (describe(task.contender, found[task.contender], task) for task in tasks)
        speed = spread(paired_ratios(round_seconds(torch), round_seconds(jax)))._asdict()
        points.append(change | {"contenders": {"jax": jax, best: torch}, "jax_speed_to_torch": speed})
    return points


def stages(config: BenchmarkConfig, show: Show, measure: Measure = measure) -> Json:
    """Milliseconds of a JAX step by stage and pass, each alone, their sum, and the whole step."""
    found = measure([task(config, STAGES)], config.stage_rounds, show)[STAGES]
    rounds = [answer["seconds_a_step"] for answer in found["rounds"]]
    names = list(rounds[0])
    *parts, whole = names
    sums = [sum(one[name] for name in parts) for one in rounds]
    return {
        "ms": {name: spread([1e3 * one[name] for one in rounds])._asdict() for name in parts},
        "sum_ms": spread([1e3 * one for one in sums])._asdict(),
        "whole_step_ms": spread([1e3 * one[whole] for one in rounds])._asdict(),
        "sum_to_whole": spread(paired_ratios(sums, [one[whole] for one in rounds]))._asdict(),
        "rounds_seconds_a_step": rounds,
    }


def round_seconds(found: Json) -> list[float]:
    """How long each round of a contender took, measured or described."""
    return [answer["seconds"] for answer in found["rounds"]]


def ms_per_step(line: Json) -> list[float]:
    """Milliseconds a step, round by round."""
    return [1e3 * one / line["steps"] for one in round_seconds(line)]

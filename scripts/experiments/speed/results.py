"""Show what the benchmark measured: the spread of its figures, tables of 80 columns, and two pictures.

matplotlib is loaded only to draw: --help and error messages need not wait for it.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypedDict

import numpy as np
from rich.box import SIMPLE
from rich.table import Table

from experiments.answers import FRAMEWORKS
from experiments.records import MIB, Json
from experiments.speed.config import CONTENDERS
from jax_cnn.run.display import BLUE, GREY, VERMILION, save_figure

WIDTH = 79
COMMAND_ROWS = {
    "start to end, s": "seconds",
    "start to first steps reported, s": "first_report_seconds",
    "compiling, s": "compile_seconds",
    "training an epoch, s": "train_seconds",
    "evaluating 10,000 images, s": "evaluate_seconds",
}
# The sections about growth: the field that varies and its label, the figure on the chart and its label.
PANELS = {
    "batch_sizes": ("batch_size", "batch size (images)", "images_per_second", "images per second"),
    "thread_counts": ("threads", "threads", "images_per_second", "images per second"),
    "train_sizes": ("images", "training images", "seconds", "seconds per epoch"),
}


class Spread(TypedDict):
    """A figure over all rounds, as a file of results holds it. Half of the rounds lie between the quartiles."""

    n: int
    median: float
    low_quartile: float
    high_quartile: float
    least: float
    most: float


def spread(values: Sequence[float]) -> Spread:
    """Return the number of values, their median, their quartiles, the least and the largest.

    Raises:
        ValueError: there are no values, or one is not finite.
    """
    if not values or not np.isfinite(values).all():
        raise ValueError(f"no median of {list(values)}")
    least, low, median, high, most = np.percentile(values, (0, 25, 50, 75, 100)).tolist()
    return Spread(n=len(values), median=median, low_quartile=low, high_quartile=high, least=least, most=most)


def paired_ratios(numerators: Sequence[float], denominators: Sequence[float]) -> list[float]:
    """Return the ratio of every round. What slows both sides of a round down cancels out.

    Raises:
        ValueError: the two have different numbers of rounds.
    """
    return [one / other for one, other in zip(numerators, denominators, strict=True)]


def error_bars(spreads: Sequence[Spread]) -> list[list[float]]:
    """Return the distances from the medians down and up to the quartiles, for a chart."""
    return [
        [spread["median"] - spread["low_quartile"] for spread in spreads],
        [spread["high_quartile"] - spread["median"] for spread in spreads],
    ]


def tables(result: Json) -> Iterator[Table]:
    """Build a table for each section in the result. Results of older versions lack the section of checkpoints."""
    yield contest_table(result["contest"])
    yield start_table(result["contest"])
    for section, (field, label, _, _) in PANELS.items():
        if result[section]:
            yield growth_table(result[section], field, label.removesuffix(" (images)"), result["contest"]["best_torch"])
    if result["stages"]:
        yield stage_table(result["stages"])
    if result.get("checkpoints"):
        yield checkpoint_table(result["checkpoints"])
    if result["commands"]:
        yield command_table(result["commands"])


def contest_table(contest: Json) -> Table:
    """Build the table of how fast each contender trains."""
    floor = contest["floor"]
    rate = floor["flop_per_second"][floor["fastest_dot"]]["median"]
    table = plain(
        "Training, in turns",
        "Medians over rounds (quartiles). All but the first PyTorch use fused Adam, all but the course's train from "
        f"memory. Best PyTorch: {CONTENDERS[contest['best_torch']].title}. Floor: {floor['flop_per_step'] / 1e9:.2f} "
        f"GFLOP a step at the {rate / 1e9:.0f} GFLOP/s of {CONTENDERS[floor['fastest_dot']].title} (2048 cubed).",
        ("\ncontender", "\nms a step", "images\nper s", "times as fast\nas best PyTorch", "times\nfloor"),
    )
    for line in contest["contenders"].values():
        if "unavailable" in line:
            table.add_row(line["title"], "not available")
            continue
        table.add_row(
            line["title"],
            with_quartiles(line["ms_per_step"]),
            f"{line['images_per_second']['median']:,.0f}",
            with_quartiles(line["speed_to_best_torch"]),
            short(line["times_floor"]["median"]),
        )
    table.add_row("floor", with_quartiles(floor["ms_per_step"]))
    return table


def start_table(contest: Json) -> Table:
    """Build the table of the seconds before the first round, and of each process's memory and CPU time."""
    lines = contest["contenders"].values()
    missing = [f" {line['title']} is not available: {line['unavailable']}." for line in lines if "start" not in line]
    table = plain(
        "Each contender's own process",
        "Cores in use while a contender is timed (median), and all CPU time that it used while others were timed."
        + "".join(missing),
        ("\ncontender", "import\ns", "compile\ns", "warm-up\ns", "peak\nMiB", "cores\nin use", "CPU when\nidle, ms"),
    )
    for line in lines:
        if "start" in line:
            table.add_row(
                line["title"],
                *(f"{line['start'][name]:.1f}" for name in ("import_seconds", "compile_seconds", "warm_up_seconds")),
                f"{line['peak_bytes'] / MIB:,.0f}",
                f"{line['cores_used']['median']:.2f}",
                f"{1e3 * line['idle_cpu_seconds']:.1f}",
            )
    return table


def growth_table(points: Sequence[Json], column: str, title: str, best: str) -> Table:
    """Build the table of how the cost grows, with a row for each value."""
    rounds = points[0]["jax_speed_to_torch"]["n"]
    table = plain(
        f"By {title}",
        f"JAX and {CONTENDERS[best].title}. Medians over {rounds} rounds (quartiles); peak memory of each process.",
        (
            f"\n{title}",
            *("JAX\ns", "PyTorch\ns"),
            *("JAX\nms/step", "PyTorch\nms/step"),
            *("JAX\nMiB", "PyTorch\nMiB"),
            "JAX is\ntimes as fast",
        ),
    )
    for point in points:
        lines = [point["contenders"][name] for name in ("jax", best)]
        table.add_row(
            f"{point[column]:,}",
            *(short(line["seconds"]["median"]) for line in lines),
            *(short(line["ms_per_step"]["median"]) for line in lines),
            *(f"{line['peak_bytes'] / MIB:,.0f}" for line in lines),
            with_quartiles(point["jax_speed_to_torch"]),
        )
    return table


def stage_table(stages: Json) -> Table:
    """Build the table of the time of each stage of a JAX step."""
    table = plain(
        "Where a JAX step's time goes, ms",
        "Each stage alone in a loop; medians. Their sum is not the whole step: alone, a stage may find its input in "
        "the cache, writes out what the step fuses into the next stage, and in its backward pass computes again what "
        "the step may have kept.",
        ("stage", "forward", "backward", "update", "of the sum"),
    )
    total = stages["sum_ms"]["median"]
    for stage in dict.fromkeys(name.rpartition(", ")[0] for name in stages["ms"]):
        times = [stages["ms"].get(f"{stage}, {part}", {}).get("median") for part in ("forward", "backward", "update")]
        share = sum(time or 0 for time in times) / total
        table.add_row(stage, *("" if time is None else f"{time:.2f}" for time in times), f"{share:.0%}")
    table.add_row("sum", with_quartiles(stages["sum_ms"]))
    table.add_row("whole step", with_quartiles(stages["whole_step_ms"]))
    return table


def checkpoint_table(checkpoints: Json) -> Table:
    """Build the table of what a checkpoint costs."""
    table = plain(
        "What a checkpoint costs",
        f"Medians over {len(checkpoints['jax']['rounds'])} pairs of trainings with and without a checkpoint "
        "(quartiles). Training stands still for the copy alone: the file is written in the background.",
        ("", "JAX", "PyTorch"),
    )
    for label, name, text in (
        ("a step, ms", "ms_per_step", with_quartiles),
        ("to copy the state, ms", "copy_ms", with_quartiles),
        ("to copy and write it, ms", "extra_ms", with_quartiles),
        (f"one in {checkpoints['interval_seconds']:g} s slows training by", "slower_by", in_percent),
    ):
        table.add_row(label, *(text(checkpoints[framework][name]) for framework in FRAMEWORKS))
    return table


def command_table(commands: Json) -> Table:
    """Build the table of both commands, from the start of the process to its end."""
    jax, torch = commands["jax"], commands["torch"]
    table = plain(
        f"Whole commands, epochs of each: {len(jax['runs'][0]['epochs'])}",
        f"Median, least and most. Runs of each: {len(jax['runs'])}. The first report comes after "
        f"{jax['first_report_images']} images (JAX) and {torch['first_report_images']} (PyTorch). No program was "
        "compiled before.",
        ("", "train_jax.py", "train_torch.py"),
    )
    for label, name in COMMAND_ROWS.items():
        table.add_row(label, *(with_ends(command[name]) for command in (jax, torch)))
    table.add_row("peak memory, MiB", *(f"{command['peak_bytes'] / MIB:,.0f}" for command in (jax, torch)))
    table.add_row("test accuracy", *(f"{command['test_accuracy']:.2%}" for command in (jax, torch)))
    return table


def sentence(result: Json) -> str:
    """Return the result of the contest in one sentence."""
    contest = result["contest"]
    jax, best = contest["contenders"]["jax"], CONTENDERS[contest["best_torch"]].title
    speed = jax["speed_to_best_torch"]
    return (
        f"JAX trains {jax['images_per_second']['median']:,.0f} images a second, {speed['median']:.2f} times as many as "
        f"the best PyTorch ({best}; quartiles {quartiles(speed)}, n = {speed['n']} rounds), in "
        f"{jax['times_floor']['median']:.2f} times the floor's time."
    )


def plain(title: str, caption: str, headings: Sequence[str]) -> Table:
    """Return an empty table with words on the left and numbers on the right."""
    table = Table(title=title, caption=caption, box=SIMPLE, padding=(0, 1, 0, 0), width=WIDTH)
    for column, heading in enumerate(headings):
        table.add_column(heading, justify="right" if column else "left", no_wrap=column > 0)
    return table


def with_quartiles(spread: Spread) -> str:
    """Write the median with the quartiles: `1.06 (1.03–1.10)`."""
    return f"{short(spread['median'])} ({quartiles(spread)})"


def quartiles(spread: Spread) -> str:
    """Write the quartiles: `1.03–1.10`."""
    return f"{short(spread['low_quartile'])}–{short(spread['high_quartile'])}"


def with_ends(spread: Spread | None) -> str:
    """Write the median with the least and the largest value."""
    return "–" if spread is None else f"{short(spread['median'])} ({short(spread['least'])}–{short(spread['most'])})"


def in_percent(spread: Spread) -> str:
    """Write the median with the quartiles in percent: `0.23% (0.11–0.33)`."""
    return f"{spread['median']:.2%} ({100 * spread['low_quartile']:.2f}–{100 * spread['high_quartile']:.2f})"


def short(number: float) -> str:
    """Write three digits or more, but nothing smaller than hundredths."""
    size = abs(number)
    return f"{number:.2f}" if size < 10 else f"{number:.1f}" if size < 100 else f"{number:,.0f}"


def plot_throughput(contest: Json, path: Path) -> None:
    """Draw the images per second of every contender with their quartiles into a PNG."""
    lines = {name: line for name, line in contest["contenders"].items() if "rounds" in line}
    speeds = [line["images_per_second"] for line in lines.values()]
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.2 + 0.45 * len(lines)), layout="constrained")
    axes = figure.subplots()
    axes.barh(
        [line["title"] for line in lines.values()],
        [speed["median"] for speed in speeds],
        xerr=error_bars(speeds),
        color=[choose_colour(name) for name in lines],
        capsize=4,
    )
    for row, speed in enumerate(speeds):
        axes.annotate(
            f"{speed['median']:,.0f}", (0, row), (6, 0), textcoords="offset points", va="center", color="white"
        )
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.set(xlabel=f"images per second in training (median and quartiles, n = {speeds[0]['n']} rounds)")
    ratio = contest["contenders"]["jax"]["speed_to_best_torch"]["median"]
    figure.suptitle(f"JAX trains {ratio:.2f} times as fast as the best PyTorch")
    save_figure(figure, path)


def plot_growth(result: Json, path: Path) -> None:
    """Draw how time and memory of JAX and of the best PyTorch grow, a column for each measured section, into a PNG."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    contenders = ("jax", result["contest"]["best_torch"])
    sections = [section for section in PANELS if result[section]]
    figure = Figure(figsize=(4.2 * len(sections), 6.5), layout="constrained")
    for (upper, lower), section in zip(figure.subplots(2, len(sections), squeeze=False).T, sections, strict=True):
        field, xlabel, cost, ylabel = PANELS[section]
        values = [point[field] for point in result[section]]
        for name, marker in zip(contenders, ("o-", "s--"), strict=True):
            lines = [point["contenders"][name] for point in result[section]]
            medians, colour = [line[cost]["median"] for line in lines], choose_colour(name)
            errors = error_bars([line[cost] for line in lines])
            upper.errorbar(values, medians, errors, fmt=marker, color=colour, capsize=4, label=CONTENDERS[name].title)
            lower.plot(values, [line["peak_bytes"] / MIB for line in lines], marker, color=colour)
        for axes in (upper, lower):
            if section == "train_sizes":
                axes.set_xlim(left=0)
            else:  # its values double
                axes.set_xscale("log", base=2)
            axes.set_xticks(values, [f"{value:,}" for value in values], rotation=30)
            axes.xaxis.set_minor_locator(NullLocator())
            axes.set_ylim(bottom=0)
            axes.grid(alpha=0.3)
        upper.set(ylabel=ylabel)
        lower.set(xlabel=xlabel, ylabel="peak memory, MiB")
    ratios = [point["jax_speed_to_torch"]["median"] for section in sections for point in result[section]]
    figure.suptitle(f"JAX is {min(ratios):.2f} to {max(ratios):.2f} times as fast (medians, bars to the quartiles)")
    figure.legend(*upper.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    save_figure(figure, path)


def choose_colour(name: str) -> str:
    """Return blue for JAX, orange for a competing PyTorch, grey for one that does not compete."""
    return BLUE if name == "jax" else VERMILION if CONTENDERS[name].competes else GREY

"""The benchmark as two pictures."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from experiments.speed.contenders import CONTENDERS
from experiments.speed.team import Json
from jax_cnn.run.charts import BLUE, GREY, VERMILION


class Panel(NamedTuple):
    """Of the growth chart: what is varied, the labels of both axes, the figure, and whether values double."""

    varied: str
    xlabel: str
    ylabel: str
    figure: str
    doubling: bool


PANELS = {
    "batch_sizes": Panel("batch_size", "batch size (images)", "images per second", "images_per_second", doubling=True),
    "thread_counts": Panel("threads", "threads", "images per second", "images_per_second", doubling=True),
    "train_sizes": Panel("images", "training images", "seconds per epoch", "seconds", doubling=False),
}


def plot_throughput(contest: Json, path: Path) -> None:
    """Draw every contender's images per second, with its quartiles, into a PNG."""
    lines = {name: line for name, line in contest["contenders"].items() if "rounds" in line}
    speeds = [line["images_per_second"] for line in lines.values()]
    figure = Figure(figsize=(9, 1.2 + 0.45 * len(lines)), layout="constrained")
    axes = figure.subplots()
    axes.barh(
        [line["title"] for line in lines.values()],
        [speed["median"] for speed in speeds],
        xerr=error_bars(speeds),
        color=[colour(name) for name in lines],
        capsize=4,
    )
    for at, speed in enumerate(speeds):
        axes.annotate(
            f"{speed['median']:,.0f}", (0, at), (6, 0), textcoords="offset points", va="center", color="white"
        )
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.set(xlabel=f"images per second in training (median and quartiles, n = {speeds[0]['n']} rounds)")
    speed = contest["contenders"]["jax"]["speed_to_best_torch"]["median"]
    figure.suptitle(f"JAX trains {speed:.2f} times as fast as the best PyTorch")
    figure.savefig(path, dpi=150)


def plot_growth(result: Json, path: Path) -> None:
    """Draw how the cost of JAX and of the best PyTorch grows, a panel for each measured section, into a PNG."""
    best = result["contest"]["best_torch"]
    panels = {section: panel for section, panel in PANELS.items() if result[section]}
    figure = Figure(figsize=(4.2 * len(panels), 4.0), layout="constrained")
    for axes, (section, panel) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        values = [point[panel.varied] for point in result[section]]
        for name, marker in (("jax", "o-"), (best, "s--")):
            spreads = [point["contenders"][name][panel.figure] for point in result[section]]
            medians = [spread["median"] for spread in spreads]
            axes.errorbar(values, medians, error_bars(spreads), fmt=marker, color=colour(name), capsize=4)
        label_values(axes, values, panel.doubling)
        axes.set(xlabel=panel.xlabel, ylabel=panel.ylabel)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    speeds = [point["jax_speed_to_torch"]["median"] for section in panels for point in result[section]]
    figure.suptitle(f"JAX is {min(speeds):.2f} to {max(speeds):.2f} times as fast (medians, bars to the quartiles)")
    figure.legend(
        axes.containers, [CONTENDERS[name].title for name in ("jax", best)], loc="outside lower center", ncols=2
    )
    figure.savefig(path, dpi=150)


def label_values(axes: Axes, values: Sequence[int], doubling: bool) -> None:
    """A tick at each value, and none elsewhere."""
    if doubling:
        axes.set_xscale("log", base=2)
    else:
        axes.set_xlim(left=0)
    axes.set_xticks(values, [f"{value:,}" for value in values], rotation=30)
    axes.xaxis.set_minor_locator(NullLocator())


def error_bars(spreads: Sequence[Json]) -> list[list[float]]:
    """From the median down and up to the quartiles."""
    return [
        [spread["median"] - spread["low_quartile"] for spread in spreads],
        [spread["high_quartile"] - spread["median"] for spread in spreads],
    ]


def colour(name: str) -> str:
    """Blue for JAX, orange for PyTorch, grey for what does not compete."""
    return BLUE if name == "jax" else VERMILION if CONTENDERS[name].competes else GREY

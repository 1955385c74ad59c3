"""The two pictures of the benchmark."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from experiments.records import Json
from experiments.speed.config import CONTENDERS
from experiments.spread import error_bars
from jax_cnn.run.display import BLUE, GREY, VERMILION, save_figure

# Panels of the growth chart: the field that varies and its label, the figure and its label.
PANELS = {
    "batch_sizes": ("batch_size", "batch size (images)", "images_per_second", "images per second"),
    "thread_counts": ("threads", "threads", "images_per_second", "images per second"),
    "train_sizes": ("images", "training images", "seconds", "seconds per epoch"),
}


def plot_throughput(contest: Json, path: Path) -> None:
    """Draw the images per second of every contender with their quartiles into a PNG."""
    lines = {name: line for name, line in contest["contenders"].items() if "rounds" in line}
    speeds = [line["images_per_second"] for line in lines.values()]
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
    """Draw how the cost of JAX and of the best PyTorch grows, a panel for each measured section, into a PNG."""
    contenders = ("jax", result["contest"]["best_torch"])
    sections = [section for section in PANELS if result[section]]
    figure = Figure(figsize=(4.2 * len(sections), 4.0), layout="constrained")
    for axes, section in zip(figure.subplots(1, len(sections), squeeze=False)[0], sections, strict=True):
        field, xlabel, cost, ylabel = PANELS[section]
        values = [point[field] for point in result[section]]
        for name, marker in zip(contenders, ("o-", "s--"), strict=True):
            spreads = [point["contenders"][name][cost] for point in result[section]]
            medians = [spread["median"] for spread in spreads]
            axes.errorbar(values, medians, error_bars(spreads), fmt=marker, color=choose_colour(name), capsize=4)
        label_values(axes, values, doubling=section != "train_sizes")
        axes.set(xlabel=xlabel, ylabel=ylabel)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    ratios = [point["jax_speed_to_torch"]["median"] for section in sections for point in result[section]]
    figure.suptitle(f"JAX is {min(ratios):.2f} to {max(ratios):.2f} times as fast (medians, bars to the quartiles)")
    figure.legend(axes.containers, [CONTENDERS[name].title for name in contenders], loc="outside lower center", ncols=2)
    save_figure(figure, path)


def label_values(axes: Axes, values: Sequence[int], doubling: bool) -> None:
    """Set a tick at each value and none elsewhere, on a logarithmic axis if the values double."""
    if doubling:
        axes.set_xscale("log", base=2)
    else:
        axes.set_xlim(left=0)
    axes.set_xticks(values, [f"{value:,}" for value in values], rotation=30)
    axes.xaxis.set_minor_locator(NullLocator())


def choose_colour(name: str) -> str:
    """Return blue for JAX, orange for a competing PyTorch, grey for one that does not compete."""
    return BLUE if name == "jax" else VERMILION if CONTENDERS[name].competes else GREY

"""Figures with curves and dots: loss, accuracy, drift, speed, classes. Each is drawn from the report alone."""

import math
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from experiments.comparison.theme import Theme, figure, title

Json = dict[str, Any]
NAMES = {"jax": "JAX", "torch": "PyTorch"}
MARKERS = {"jax": "o", "torch": "s"}


def loss(report: Json, theme: Theme) -> Figure:
    """Both losses of both frameworks by epoch, and below how far they are apart."""
    rows = {side: report["runs"][side]["epochs"] for side in NAMES}
    made, upper, lower, epochs = two_panels(rows["jax"])
    for side, name in NAMES.items():
        style: Json = {
            "color": theme.side(side),
            "marker": MARKERS[side],
            "fillstyle": "none" if side == "torch" else "full",
        }
        for key, label, line in (("train_loss", "training", "--"), ("test_loss", "test", "-")):
            size = 9 if side == "torch" else 5  # both can be seen where they coincide
            values = [row[key] for row in rows[side]]
            upper.plot(epochs, values, line, label=f"{name}, {label}", markersize=size, **style)
    for key, label, line in (("train_loss", "training", "--"), ("test_loss", "test", "-")):
        apart = [jax[key] - torch[key] for jax, torch in zip(rows["jax"], rows["torch"], strict=True)]
        lower.plot(epochs, apart, line, color=theme.ink, marker=".", label=label)
    last = {side: each[-1]["test_loss"] for side, each in rows.items()}
    upper.set(ylabel="cross-entropy (nats per image)")
    upper.margins(y=0.1)
    upper.set_ylim(bottom=0)
    title(made, f"Test loss at the end: {last['jax']:.4f} (JAX) and {last['torch']:.4f} (PyTorch)")
    upper.legend(ncols=2, handlelength=3.2)
    lower.set(ylabel="JAX − PyTorch\n(nats per image)")
    lower.legend(ncols=2, handlelength=3.2)
    return made


def accuracy(report: Json, theme: Theme) -> Figure:
    """Test accuracy of both by epoch, and below how far they are apart, with what chance explains."""
    rows = {side: report["runs"][side]["epochs"] for side in NAMES}
    made, upper, lower, epochs = two_panels(rows["jax"])
    for side, name in NAMES.items():
        fill: Json = {"fillstyle": "none", "markersize": 9} if side == "torch" else {}
        values = [100 * row["test_accuracy"] for row in rows[side]]
        upper.plot(epochs, values, "-", color=theme.side(side), marker=MARKERS[side], label=name, **fill)
    pairs = list(zip(rows["jax"], rows["torch"], strict=True))
    apart = [100 * (jax["test_accuracy"] - torch["test_accuracy"]) for jax, torch in pairs]
    allowed = 100 * report["verdict"]["accuracy_allowed"]
    lower.axhspan(-allowed, allowed, color=theme.quiet, alpha=0.18, linewidth=0, label="explained by chance")
    lower.plot(epochs, apart, "-", color=theme.ink, marker=".")
    last = [each[-1]["test_accuracy"] for each in rows.values()]
    upper.margins(y=0.1)
    upper.set(ylabel="test accuracy (%)")
    equally = "As far as chance can tell, equally" if abs(apart[-1]) <= allowed else "Not equally"
    title(made, f"{equally} accurate: {last[0]:.2%} and {last[1]:.2%}")
    upper.legend()
    lower.set(ylabel="JAX − PyTorch\n(points)")
    lower.legend()
    return made


def two_panels(rows: list[Json]) -> tuple[Figure, Axes, Axes, list[int]]:
    """A curve and, below it, a difference, over the same epochs."""
    made = figure(4.6)
    upper, lower = made.subplots(2, 1, sharex=True, height_ratios=(2.4, 1))
    lower.axhline(0, color="0.5", linewidth=0.8)
    lower.set(xlabel="epoch")
    lower.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (upper, lower):
        axes.grid(True)
    return made, upper, lower, [row["epoch"] for row in rows]


def drift(report: Json, theme: Theme) -> Figure:
    """How far weights are apart over the steps, on logarithmic axes."""
    at, curves = report["parity"]["drift"]["steps"], report["parity"]["drift"]["curves"]
    styles = {
        "float64: JAX from PyTorch": (theme.jax, "-"),
        "float32: JAX from PyTorch": (theme.torch, "-"),
        "float32: JAX from float64": (theme.third, "--"),
        "float32: PyTorch from float64": (theme.fourth, "--"),
        "float32: JAX from itself, one ULP": (theme.ink, ":"),
        "float32: PyTorch from itself, one ULP": (theme.ink, "-."),
    }
    made = figure(4.9)
    axes = made.subplots()
    for name, values in curves.items():
        colour, line = styles[name]
        axes.loglog(at, values, line, color=colour, label=name.replace(", one ULP", ", moved by one ULP"))
    axes.set(xlabel="training steps", ylabel="distance of the weights (root mean square)")
    together = (
        "stay together; in float32 they part as rounding sends them"
        if report["parity"]["drift"]["together"]
        else "part too"
    )
    title(made, f"In float64 they {together}")
    axes.grid(True)
    made.legend(loc="outside lower left", ncols=1, fontsize=8.5)
    return made


def throughput(report: Json, theme: Theme) -> Figure:
    """Images per second by configuration: medians, with bars to the quartiles."""
    rows = report["speed"]["rows"][::-1]
    made = figure(1.2 + 0.42 * len(rows))
    axes = made.subplots()
    for at, row in enumerate(rows):
        side = "jax" if row["name"] == "jax" else "torch"
        speed = row["images_per_second"]
        bars = [[speed["median"] - speed["low_quartile"]], [speed["high_quartile"] - speed["median"]]]
        axes.errorbar(speed["median"], at, xerr=bars, fmt=MARKERS[side], color=theme.side(side), capsize=3)
    axes.set_yticks(range(len(rows)), [row["title"].replace("PyTorch, ", "PyTorch,\n") for row in rows], fontsize=8.5)
    axes.set(xlabel="images per second (median, quartiles)", ylabel="configuration")
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.grid(True, axis="x")
    ratio = next(row for row in rows if row["name"] == "jax")["speed_to_best_torch"]["median"]
    title(made, f"JAX trains {ratio:.2f} times as fast as the best PyTorch")
    return made


def classes(report: Json, theme: Theme) -> Figure:
    """Accuracy by class, with the standard error of each."""
    rows = [row for row in report["scores"]["classes"] if row["images"]][::-1]
    made = figure(4.2)
    axes = made.subplots()
    for side, shift in (("jax", 0.13), ("torch", -0.13)):
        shares = np.array([row[side]["accuracy"] for row in rows])
        errors = [math.sqrt(p * (1 - p) / row["images"]) for p, row in zip(shares, rows, strict=True)]
        axes.errorbar(
            100 * shares,
            np.arange(len(rows)) + shift,
            xerr=100 * np.array(errors),
            fmt=MARKERS[side],
            color=theme.side(side),
            capsize=2,
            elinewidth=1,
            label=NAMES[side],
        )
    hardest = [report["classes"][min(rows, key=lambda row: row[side]["accuracy"])["label"]] for side in NAMES]
    axes.set_yticks(range(len(rows)), [report["classes"][row["label"]] for row in rows])
    axes.set(xlabel="recognised (% of the class), ± standard error", ylabel="class")
    whose = f"{hardest[0]}, for both" if hardest[0] == hardest[1] else f"{hardest[0]} (JAX), {hardest[1]} (PyTorch)"
    title(made, f"The hardest class: {whose}")
    axes.grid(True)
    axes.legend(loc="lower left", frameon=True, framealpha=0.9, edgecolor="none")
    return made

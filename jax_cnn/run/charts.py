"""The palette of every chart in this project, and the chart of a run."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from jax_cnn.files import write_atomically

# Okabe & Ito's palette, which colour-blind readers can tell apart (Color Universal Design, 2008).
BLUE, VERMILION, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
ORANGE, SKY_BLUE, BLACK, GREY = "#E69F00", "#56B4E9", "#000000", "#999999"

FRAMEWORK_COLOURS = {"jax": BLUE, "torch": VERMILION}
FRAMEWORK_MARKERS = {"jax": "o", "torch": "s"}


def plot_curves(rows: Sequence[Mapping[str, Any]], title: str, path: Path) -> None:
    """Draw the losses and the test accuracy of each epoch (rows of metrics.jsonl) into a PNG.

    Raises:
        OSError: the folder cannot be written.
    """
    epochs = [row["epoch"] for row in rows]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    loss.plot(epochs, [row["train_loss"] for row in rows], "o-", color=BLUE, label="training, mean over the epoch")
    loss.plot(epochs, [row["test_loss"] for row in rows], "s--", color=VERMILION, label="test, after the epoch")
    loss.set(ylabel="cross-entropy (nats per image)")
    loss.legend()
    accuracy.plot(epochs, [row["test_accuracy"] for row in rows], "s--", color=VERMILION)
    accuracy.set(ylabel="test accuracy")
    accuracy.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=1))
    for axes in (loss, accuracy):
        axes.set(xlabel="epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    figure.suptitle(title)
    save_figure(figure, path)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as a PNG, atomically.

    Raises:
        OSError: the folder cannot be written.
    """
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=150)
    write_atomically(path, png.getvalue())

"""Pictures of a run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

BLUE, ORANGE = "#0072B2", "#D55E00"  # Okabe & Ito's palette: colour-blind readers tell them apart


def plot_curves(rows: Sequence[Mapping[str, Any]], title: str, path: Path) -> None:
    """Draw loss and accuracy by epoch into a PNG."""
    epochs = [row["epoch"] for row in rows]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    loss.plot(epochs, [row["train_loss"] for row in rows], "o-", color=BLUE, label="training, mean over the epoch")
    loss.plot(epochs, [row["test_loss"] for row in rows], "s--", color=ORANGE, label="test, after the epoch")
    loss.set(ylabel="cross-entropy (nats per image)")
    loss.legend()
    accuracy.plot(epochs, [row["test_accuracy"] for row in rows], "s--", color=ORANGE)
    accuracy.set(ylabel="test accuracy")
    accuracy.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=1))
    for axes in (loss, accuracy):
        axes.set(xlabel="epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    figure.suptitle(title)
    figure.savefig(path, dpi=150)

"""Progress of long work, as a bar on a terminal or as plain lines in a pipe or a log; the table and the chart of a run.

It also holds the palette of every chart in this project.
"""

import io
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from jax_cnn.files import write_atomically

if TYPE_CHECKING:
    import matplotlib.figure

PLAIN_INTERVAL = 10.0  # seconds between two plain lines

# Okabe & Ito's palette, which colour-blind readers can tell apart (Color Universal Design, 2008).
BLUE, VERMILION, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
ORANGE, SKY_BLUE, BLACK, GREY = "#E69F00", "#56B4E9", "#000000", "#999999"

FRAMEWORK_COLOURS = {"jax": BLUE, "torch": VERMILION}
FRAMEWORK_MARKERS = {"jax": "o", "torch": "s"}


class ProgressBar:
    """The progress of long work: a bar on a terminal, a line of text every `PLAIN_INTERVAL` seconds elsewhere."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = console.is_terminal and not console.is_dumb_terminal
        self._title = ""
        self._last_line = -PLAIN_INTERVAL
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=None), TextColumn("{task.fields[detail]}"))
        self._bar = Progress(*columns, console=console, transient=True, disable=not self._live)
        self._task = self._bar.add_task("", total=None, detail="")

    def __enter__(self) -> "ProgressBar":
        """Show the bar."""
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Remove the bar, so that the next line of output starts on a clean line."""
        self._bar.stop()

    def begin(self, title: str, completed: int | float = 0, total: int | float | None = None) -> None:
        """Begin a part of the work and name it. `completed` and `total` count the whole work, in any unit."""
        self._title = title
        self._bar.update(self._task, description=title, completed=completed, total=total, detail="")

    def announce(self, title: str) -> None:
        """Begin a part whose length is not known, and print its name if there is no bar."""
        self.begin(title)
        if not self._live:
            self.say(title)

    def report(self, detail: str, completed: int | float | None = None) -> None:
        """Show what is under way, and how much of the whole work is done."""
        self._bar.update(self._task, detail=detail, completed=completed)
        now = time.monotonic()
        if not self._live and now - self._last_line >= PLAIN_INTERVAL:
            self._last_line = now
            self.say(f"{self._title}: {detail}")

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        self._console.print(line, highlight=False, soft_wrap=True)


def epoch_table(rows: Sequence[Mapping[str, Any]], data: Mapping[str, str] | None = None) -> Table:
    """Return a table with one row for each epoch of metrics.jsonl.

    `data` holds the SHA-256 of each file that differs from the published FashionMNIST, by name. Its caption lists them.
    """
    table = Table()
    if data:
        lines = (f"{name}: {digest}" for name, digest in data.items())
        table.caption = "\n".join(["not FashionMNIST as published, but (SHA-256)", *lines])
    for heading in ("epoch", "train loss", "test loss", "test accuracy", "train s", "test s", "images/s"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            f"{row['epoch']}",
            f"{row['train_loss']:.4f}",
            f"{row['test_loss']:.4f}",
            f"{row['test_accuracy']:.2%}",
            f"{row['train_seconds']:.1f}",
            f"{row['eval_seconds']:.2f}",
            f"{row['images_per_second']:,.0f}",
        )
    return table


def show_table(console: Console, table: Table) -> None:
    """Print a table as wide as its figures need. Where the terminal is narrower its lines wrap, and no digit is cut."""

    def count_cuts(width: int | None) -> int:
        table.width = width
        return sum(segment.text.count("…") for segment in console.render(table))

    widths = [table.width, *range((table.width or console.width) + 1, 1_000)]
    own = count_cuts(1_000)  # an ellipsis in a cell's own text
    table.width = next((width for width in widths if count_cuts(width) <= own), 1_000)
    console.print(table, crop=False)


def plot_curves(rows: Sequence[Mapping[str, Any]], title: str, path: Path) -> None:
    """Draw the losses and the test accuracy of each epoch (rows of metrics.jsonl) into a PNG.

    Raises:
        OSError: the folder cannot be written.
    """
    # Matplotlib reports on stderr that it builds its list of fonts: nothing that the user has to know.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    from matplotlib.figure import Figure  # only now: --help and errors should not wait for it
    from matplotlib.ticker import MaxNLocator, PercentFormatter

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


def save_figure(figure: "matplotlib.figure.Figure", path: Path) -> None:
    """Write a figure as a PNG, atomically.

    Raises:
        OSError: the folder cannot be written.
    """
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=150)
    write_atomically(path, png.getvalue())

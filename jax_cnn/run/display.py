"""Progress of long work, as a bar on a terminal or as plain lines in a pipe or a log, and the table of a run."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

PLAIN_INTERVAL = 10.0  # seconds between two plain lines


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

    Below it is the SHA-256 of each file, by name, that is not as FashionMNIST was published.
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

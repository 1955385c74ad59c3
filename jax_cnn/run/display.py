"""What a person sees while training runs: a bar on a terminal, plain lines in a pipe or a log, a table at the end."""

import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

PLAIN_INTERVAL = 10.0  # seconds between two plain lines


class ProgressBar:
    """The progress of long work: a bar on a terminal, a line of text every `PLAIN_INTERVAL` seconds elsewhere."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = console.is_terminal and not console.is_dumb_terminal
        self._title = ""
        self._last_line = 0.0
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[detail]}"))
        self._bar = Progress(*columns, console=console, transient=True, disable=not self._live)
        self._task = self._bar.add_task("", total=None, detail="")

    def __enter__(self) -> "ProgressBar":
        """Show the bar."""
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Remove the bar, so that the next line of output starts on a clean line."""
        self._bar.stop()

    def begin(self, title: str, completed: float = 0, total: float | None = None) -> None:
        """Begin a part of the work and name it. `completed` and `total` count the whole work, in any unit."""
        self._title = title
        self._bar.update(self._task, description=title, completed=completed, total=total, detail="")

    def report(self, detail: str, completed: float | None = None) -> None:
        """Show what is under way, and how much of the whole work is done."""
        self._bar.update(self._task, detail=detail, completed=completed)
        now = time.monotonic()
        if not self._live and now - self._last_line >= PLAIN_INTERVAL:
            self._last_line = now
            self.say(f"{self._title}: {detail}")

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        self._console.print(line, highlight=False, soft_wrap=True)


class Display:
    """Progress over all epochs. Without a terminal, a line at the first report and then every `PLAIN_INTERVAL`."""

    def __init__(self, console: Console, epochs: int, epoch_size: int) -> None:
        """Say how much there is to do: epochs, and images in each."""
        self._console = console
        self._live = console.is_terminal and not console.is_dumb_terminal
        self._epochs = epochs
        self._epoch_size = epoch_size
        self._last_line = -PLAIN_INTERVAL
        columns = (
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(bar_width=None),
            TextColumn("loss {task.fields[loss]}  {task.fields[rate]} images/s  left"),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, console=console, transient=True, disable=not self._live)
        self._task = self._bar.add_task("", total=epochs * epoch_size, epoch=f"1/{epochs}", loss="–", rate="–")

    def __enter__(self) -> "Display":
        """Show the bar."""
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Take the bar away, so that what follows starts on a clean line."""
        self._bar.stop()

    def report(self, epoch: int, images: int, loss: float, rate: float) -> None:
        """Show that so many images of this epoch (counted from 0) are done, at a running mean loss and images/s."""
        label = f"{epoch + 1}/{self._epochs}"
        self._bar.update(
            self._task,
            completed=epoch * self._epoch_size + images,
            epoch=label,
            loss=f"{loss:.3f}",
            rate=f"{rate:,.0f}",
        )
        now = time.monotonic()
        if not self._live and now - self._last_line >= PLAIN_INTERVAL:
            self._last_line = now
            left = ((self._epochs - epoch) * self._epoch_size - images) / rate
            self._console.print(
                f"epoch {label}: {images:,} of {self._epoch_size:,} images, loss {loss:.3f}, {rate:,.0f} images/s, "
                f"{left:.0f} s left"
            )

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        self._console.print(line, highlight=False, soft_wrap=True)


def epoch_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The run's epochs, one to a row."""
    table = Table()
    for heading in ("epoch", "train loss", "test loss", "test accuracy", "train s", "test s", "images/s"):
        table.add_column(heading, justify="right")
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


def network_table(seeds: Sequence[int], rows: Sequence[Mapping[str, Any]]) -> Table:
    """Networks that trained at once, one to a row, after their last epoch."""
    table = Table(caption=f"{len(seeds)} networks at once: {rows[0]['train_seconds']:.1f} s of training per epoch")
    for heading in ("seed", "train loss", "test loss", "test accuracy"):
        table.add_column(heading, justify="right")
    for seed, row in zip(seeds, rows, strict=True):
        table.add_row(str(seed), f"{row['train_loss']:.4f}", f"{row['test_loss']:.4f}", f"{row['test_accuracy']:.2%}")
    return table

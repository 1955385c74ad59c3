"""What a person sees while the benchmark runs: a bar on a terminal, plain lines in a pipe or a log."""

import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

Show = Callable[[str], None]  # takes what is under way

PLAIN_INTERVAL = 10.0  # seconds between two plain lines of one section


def labelled(label: str, show: Show) -> Show:
    """Shows what is under way behind a label."""
    return lambda now: show(f"{label}, {now}")


class Steps:
    """Progress through the sections of the benchmark."""

    def __init__(self, console: Console) -> None:
        """Show nothing yet."""
        self._console = console
        self._live = console.is_terminal and not console.is_dumb_terminal
        self._title = ""
        self._last_line = 0.0
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[now]}"), TimeElapsedColumn())
        self._bar = Progress(*columns, console=console, transient=True, disable=not self._live)
        self._task = self._bar.add_task("", total=None, now="")

    def __enter__(self) -> Self:
        """Show the bar."""
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Take the bar away, so that what follows starts on a clean line."""
        self._bar.stop()

    def section(self, title: str, number: int, of: int) -> None:
        """Begin a section, the first being number 0."""
        self._title, self._last_line = title, time.monotonic()
        self._bar.update(self._task, completed=number, total=of, description=title, now="")
        if not self._live:
            self.say(f"{number + 1} of {of}: {title}")

    def show(self, now: str) -> None:
        """Tell what is under way in this section."""
        self._bar.update(self._task, now=now)
        if not self._live and time.monotonic() - self._last_line >= PLAIN_INTERVAL:
            self._last_line = time.monotonic()
            self.say(f"{self._title}: {now}")

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        self._console.print(line, highlight=False, soft_wrap=True)

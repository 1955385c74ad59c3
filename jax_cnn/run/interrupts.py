"""Ctrl-C and SIGTERM as a question that the training loop answers between two steps."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(Exception):
    """The run was asked to stop, and did.

    Args:
        number: of the signal.
        message: a line for the person who sent it.
    """

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number


@contextmanager
def postponed_interrupts() -> Iterator[Callable[[], int | None]]:
    """Until the block ends, note a first signal instead of obeying it; a second one ends the process at once.

    Yields a function that tells the signal's number, or None.
    """
    received: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        if received:
            os._exit(128 + number)
        received.append(number)

    before = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield lambda: received[0] if received else None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

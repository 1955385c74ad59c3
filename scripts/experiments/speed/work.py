"""What a worker runs, by name, and what all of it has in common."""

from collections.abc import Callable, Iterator
from importlib import import_module
from types import ModuleType
from typing import Any, Protocol

import numpy as np
from jaxtyping import Float

from experiments.speed.contenders import CONTENDERS, STAGES, Task

DOT_SIZE = 2048
DOTS_PER_ROUND = 8
DOT_FLOP = 2 * DOT_SIZE**3 * DOTS_PER_ROUND
WARM_UP_IMAGES = 4096


class Work(Protocol):
    """Something that can be timed again and again."""

    compile_seconds: float

    def warm_up(self) -> None:
        """Do enough of it that the next round is like all others."""

    def round(self, number: int) -> dict[str, Any]:
        """Do it once, and tell what came out."""


class Training:
    """A round that is an epoch; it is warmed up by the epoch's first `WARM_UP_IMAGES`."""

    def __init__(self, train_epoch: Callable[[int], Iterator[tuple[int, Any]]], compile_seconds: float) -> None:
        """Take the function that trains an epoch, yielding image counts and their mean losses."""
        self.compile_seconds = compile_seconds
        self._train_epoch = train_epoch

    def warm_up(self) -> None:
        """Train on the first images of epoch 0."""
        images = 0
        for count, _ in self._train_epoch(0):
            images += count
            if images >= WARM_UP_IMAGES:
                break

    def round(self, number: int) -> dict[str, Any]:
        """Train an epoch; returns its mean loss."""
        parts = list(self._train_epoch(1 + number))
        counts, losses = (
            np.array([count for count, _ in parts]),
            np.array([np.asarray(loss).mean() for _, loss in parts]),
        )
        return {"loss": float(counts @ losses / counts.sum())}


def load(task: Task) -> ModuleType:
    """Import the module that does the task, and with it the framework."""
    framework = CONTENDERS[task.contender].framework
    return import_module(f"experiments.speed.{'stages' if task.contender == STAGES else framework + '_work'}")


def make(task: Task) -> Work:
    """Build what the task names.

    Raises:
        Unavailable: it cannot run on this machine.
    """
    work: Work = load(task).make(task)
    return work


def dot_factors(seed: int) -> tuple[Float[np.ndarray, "size size"], Float[np.ndarray, "size size"]]:
    """Two float32 matrices; multiplying by the second keeps numbers at their size, however often."""
    generator = np.random.default_rng(seed)
    left, right = generator.standard_normal((2, DOT_SIZE, DOT_SIZE), np.float32)
    return left, right / np.float32(DOT_SIZE**0.5)

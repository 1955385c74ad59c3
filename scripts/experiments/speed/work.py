"""The work that a worker times, as far as it does not depend on a framework."""

import itertools
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jaxtyping import Float

from experiments.spread import order_of_round
from jax_cnn.checkpoint import AdamState, Checkpoint, Progress
from jax_cnn.run.resume import CheckpointWriter

if TYPE_CHECKING:  # the loop and its display would only add to the memory of every worker
    from jax_cnn.run.loop import Trainer

DOT_SIZE = 2048  # rows and columns of the square matrices
DOTS_PER_ROUND = 8
DOT_FLOP = 2 * DOT_SIZE**3 * DOTS_PER_ROUND
WARM_UP_IMAGES = 4096


class Work(ABC):
    """Work that can be timed again and again."""

    compile_seconds = 0.0

    def warm_up(self) -> None:
        """Work until the next round takes as long as all later ones."""
        self.round(0)

    @abstractmethod
    def round(self, number: int) -> dict[str, Any]:
        """Do the work once, and return what belongs into the results."""


class Training(Work):
    """Work whose round is one epoch of training."""

    def __init__(self, train_epoch: Callable[[int], Iterator[tuple[int, Any]]], compile_seconds: float = 0.0) -> None:
        """Take the function that trains an epoch and yields numbers of images with their losses."""
        self.compile_seconds = compile_seconds
        self._train_epoch = train_epoch

    def warm_up(self) -> None:
        """Train on the first `WARM_UP_IMAGES` images of epoch 0: an epoch can be long."""
        images = 0
        for count, _ in self._train_epoch(0):
            images += count
            if images >= WARM_UP_IMAGES:
                break

    def round(self, number: int) -> dict[str, Any]:
        """Train an epoch, and return its mean loss."""
        parts = list(self._train_epoch(1 + number))  # to read a loss earlier would mean to wait for its step
        loss_sum = sum(count * float(np.asarray(losses).mean()) for count, losses in parts)
        return {"loss": loss_sum / sum(count for count, _ in parts)}


class Point(NamedTuple):
    """A training at one precision and batch size."""

    steps: int
    train: Callable[[], float]
    """Take the steps, wait for the last one, and return its loss."""


class Sweep(Work):
    """Work whose round trains at every point once, in turns."""

    def __init__(self, points: dict[str, Point], compile_seconds: float) -> None:
        """Take the points by name."""
        self.compile_seconds = compile_seconds
        self._points = points

    def round(self, number: int) -> dict[str, Any]:
        """Return the seconds of a step, and the last loss, of every point."""
        seconds, losses = {}, {}
        for name in order_of_round(list(self._points), number):
            started = time.perf_counter()
            losses[name] = self._points[name].train()
            seconds[name] = (time.perf_counter() - started) / self._points[name].steps
        return {"seconds_a_step": seconds, "losses": losses}


class Checkpointing(Work):
    """Work whose round is two epochs. One of them writes a checkpoint while it trains.

    A single checkpoint in 30 s of training would be lost in the noise of a step's time.
    """

    def __init__(self, trainer: "Trainer") -> None:
        """Write into a temporary folder, which is removed with those of the other workers."""
        self.compile_seconds = trainer.compile_seconds
        self._trainer = trainer
        self._epochs = itertools.count()
        self._writer = CheckpointWriter(Path(tempfile.mkdtemp()), interval=0.0)

    def round(self, number: int) -> dict[str, Any]:
        """Train both epochs; return the seconds of each, and those for which training waits for a copy of the state."""
        seconds = {}
        for epoch in order_of_round(("without", "with"), number):
            started = time.perf_counter()
            if epoch == "with":
                state = AdamState(*self._trainer.state())
                self._writer.write(Checkpoint(state, Progress(0, state.step, 0.0, 0.0, []), {}))
                seconds["copy"] = time.perf_counter() - started
            for _ in self._trainer.train_epoch(next(self._epochs)):
                pass
            self._writer.wait()  # until the file is on disk, although a run would train on meanwhile
            seconds[epoch] = time.perf_counter() - started
        return {f"{name}_seconds": value for name, value in seconds.items()}


def dot_factors(seed: int) -> tuple[Float[np.ndarray, "size size"], Float[np.ndarray, "size size"]]:
    """Return two float32 matrices. Repeated products with the second one keep the size of the numbers."""
    generator = np.random.default_rng(seed)
    left, right = generator.standard_normal((2, DOT_SIZE, DOT_SIZE), np.float32)
    return left, right / np.float32(DOT_SIZE**0.5)

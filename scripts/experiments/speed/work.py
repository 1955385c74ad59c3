"""The work that a worker times, as far as it does not depend on a framework, and the order of work in a round."""

import itertools
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
from jaxtyping import Float

from jax_cnn.checkpoint import AdamState, Checkpoint, Progress
from jax_cnn.run.resume import CheckpointWriter

if TYPE_CHECKING:  # the loop and its display would only add to the memory of every worker
    from jax_cnn.run.loop import Trainer

Name = TypeVar("Name", bound=str)

DOT_SIZE = 2048  # rows and columns of the square matrices
DOTS_PER_ROUND = 8
DOT_FLOP = 2 * DOT_SIZE**3 * DOTS_PER_ROUND
WARM_UP_IMAGES = 4096


class Work(NamedTuple):
    """Work that can be timed again and again."""

    round: Callable[[int], dict[str, Any]]
    """Does the work of the round with this number, and returns what belongs into the results."""
    compile_seconds: float = 0.0
    warm_up: Callable[[], object] | None = None
    """Works until the next round takes as long as all later ones. Without it a round does."""


class Point(NamedTuple):
    """A part of a round that is timed alone, such as the training at one precision and batch size."""

    steps: int
    take: Callable[[], float | None]
    """Takes the steps, waits for the last one, and may return its loss."""


def order_of_round(names: Sequence[Name], number: int) -> list[Name]:
    """Return the order of the names in a round: each round begins one name later than the round before."""
    start = number % len(names)
    return [*names[start:], *names[:start]]


def training(train_epoch: Callable[[int], Iterator[tuple[int, Any]]], compile_seconds: float = 0.0) -> Work:
    """Return work whose round is one epoch. `train_epoch` trains it and yields numbers of images with their losses."""

    def warm_up() -> None:
        images = 0
        for count, _ in train_epoch(0):
            images += count
            if images >= WARM_UP_IMAGES:  # a whole epoch can be long
                break

    def train(number: int) -> dict[str, Any]:
        parts = list(train_epoch(1 + number))  # to read a loss earlier would mean to wait for its step
        loss_sum = sum(count * float(np.asarray(losses).mean()) for count, losses in parts)
        return {"loss": loss_sum / sum(count for count, _ in parts)}

    return Work(train, compile_seconds, warm_up)


def sweep(points: Mapping[str, Point], compile_seconds: float) -> Work:
    """Return work whose round takes every point once, in turns: the seconds of a step, and the last loss."""

    def take_all(number: int) -> dict[str, Any]:
        seconds, losses = dict.fromkeys(points, 0.0), {}
        for name in order_of_round(list(points), number):
            started = time.perf_counter()
            losses[name] = points[name].take()
            seconds[name] = (time.perf_counter() - started) / points[name].steps
        return {"seconds_a_step": seconds, "losses": losses}

    return Work(take_all, compile_seconds)


def checkpointing(trainer: "Trainer") -> Work:
    """Return work whose round is two epochs. One of them writes a checkpoint while it trains.

    A single checkpoint in 30 s of training would be lost in the noise of a step's time. The files go into a temporary
    folder, which is removed with those of the other workers.
    """
    epochs = itertools.count()
    writer = CheckpointWriter(Path(tempfile.mkdtemp()), interval=0.0)

    def train_both(number: int) -> dict[str, Any]:
        """Return the seconds of each epoch, and those for which training waits for a copy of the state."""
        seconds = {}
        for epoch in order_of_round(("without", "with"), number):
            started = time.perf_counter()
            if epoch == "with":
                state = AdamState(*trainer.state())
                writer.write(Checkpoint(state, Progress(0, state.step, 0.0, 0.0, []), {}))
                seconds["copy"] = time.perf_counter() - started
            for _ in trainer.train_epoch(next(epochs)):
                pass
            writer.wait()  # until the file is on disk, although a run would train on meanwhile
            seconds[epoch] = time.perf_counter() - started
        return {f"{name}_seconds": value for name, value in seconds.items()}

    return Work(train_both, trainer.compile_seconds)


def dot_factors(seed: int) -> tuple[Float[np.ndarray, "size size"], Float[np.ndarray, "size size"]]:
    """Return two float32 matrices. Repeated products with the second one keep the size of the numbers."""
    generator = np.random.default_rng(seed)
    left, right = generator.standard_normal((2, DOT_SIZE, DOT_SIZE), np.float32)
    return left, right / np.float32(DOT_SIZE**0.5)

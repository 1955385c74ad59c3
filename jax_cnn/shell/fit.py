"""The loop over epochs that both frameworks run in: train, score, record, show."""

import math
import time
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np
from rich.console import Console

from jax_cnn.config import TrainConfig
from jax_cnn.errors import UserError
from jax_cnn.shell.display import Display, epoch_table
from jax_cnn.shell.provenance import provenance
from jax_cnn.shell.run_folder import FILES, RunFolder


class Trainer(Protocol):
    """One framework's half of a run: all that the shell needs to know of it."""

    framework: str
    compile_seconds: float

    @property
    def packages(self) -> tuple[str, ...]:
        """Whose versions belong in the record."""

    @property
    def train_size(self) -> int:
        """Images in an epoch."""

    @property
    def device(self) -> str:
        """What the run computes on, for the record."""

    def train_epoch(self, epoch: int) -> Iterator[tuple[int, float]]:
        """Train on every image once, yielding image counts and their mean losses as they come."""

    def evaluate(self) -> tuple[float, float]:
        """Mean loss and accuracy (0 … 1) over the whole test set."""

    def weights(self) -> dict[str, np.ndarray]:
        """The current weights under PyTorch's names and layouts."""


def fit(config: TrainConfig, trainer: Trainer, console: Console) -> None:
    """Run every epoch, and write the run's files as it goes.

    Raises:
        UserError: `config.out_dir` cannot be written, or the loss is no longer a number.
    """
    display = Display(console, config.epochs, trainer.train_size)
    folder = RunFolder(config.out_dir, display.say)
    record = {"framework": trainer.framework, "device": trainer.device} | provenance(trainer.packages)
    folder.write_config(config, record)
    display.say(f"{trainer.framework} on {trainer.device}: {trainer.train_size:,} images an epoch")
    rows = []
    try:
        with display:
            for epoch in range(config.epochs):
                row = run_epoch(trainer, epoch, display)
                if not math.isfinite(row["train_loss"]):
                    raise UserError(
                        f"the training loss became {row['train_loss']} in epoch {epoch + 1} with --learning-rate "
                        f"{config.adam.learning_rate:g}: try a smaller one"
                    )
                folder.add_epoch(row)
                folder.write_weights(trainer.weights())
                rows.append(row)
                display.say(f"epoch {epoch + 1}/{config.epochs}: test accuracy {row['test_accuracy']:.2%}")
    except KeyboardInterrupt:
        display.say(f"{len(rows)} finished epochs and the weights after them are in {folder.path}")
        raise
    folder.write_curves(rows, f"{trainer.framework}: test accuracy {row['test_accuracy']:.1%} after {len(rows)} epochs")
    console.print(epoch_table(rows))
    display.say(f"Results are in {folder.path}: {', '.join(FILES)}")


def run_epoch(trainer: Trainer, epoch: int, display: Display) -> dict[str, Any]:
    """Train and score one epoch; returns its line of metrics.jsonl."""
    started = time.perf_counter()
    images, loss_sum = 0, 0.0
    for count, loss in trainer.train_epoch(epoch):
        images += count
        loss_sum += loss * count
        display.report(epoch, images, loss_sum / images, images / (time.perf_counter() - started))
    trained = time.perf_counter()
    test_loss, test_accuracy = trainer.evaluate()
    return {
        "epoch": epoch + 1,
        "train_loss": loss_sum / images,
        "test_loss": test_loss,
        "test_accuracy": test_accuracy,
        "train_seconds": trained - started,
        "eval_seconds": time.perf_counter() - trained,
        "compile_seconds": trainer.compile_seconds if epoch == 0 else 0.0,
        "images_per_second": images / (trained - started),
    }

"""The loop over epochs that both frameworks run in: train, score, record, show."""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike
from rich.console import Console

from jax_cnn.config import TrainConfig
from jax_cnn.errors import UserError
from jax_cnn.shell.display import Display, epoch_table, network_table
from jax_cnn.shell.provenance import provenance
from jax_cnn.shell.run_folder import FILES, RunFolder

Row = dict[str, Any]  # a line of metrics.jsonl


class Trainer(Protocol):
    """One framework's half of a run: all that the shell needs to know of it.

    It trains one network or several at once. A figure of each is an array [networks], or a number if there is one.
    """

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

    def train_epoch(self, epoch: int) -> Iterator[tuple[int, ArrayLike]]:
        """Train on every image once, yielding image counts and each network's mean loss as they come."""

    def evaluate(self) -> tuple[ArrayLike, ArrayLike]:
        """Each network's mean loss and accuracy (0 … 1) over the whole test set."""

    def weights(self) -> list[dict[str, np.ndarray]]:
        """Each network's current weights under PyTorch's names and layouts."""


def fit(config: TrainConfig, trainer: Trainer, console: Console, seeds: Sequence[int] | None = None) -> None:
    """Run every epoch, and write the run's files as it goes.

    Args:
        config: of the run.
        trainer: the framework's half.
        console: where a person looks.
        seeds: of the networks, if they are several: each has a folder in `config.out_dir`, as if it ran alone.

    Raises:
        UserError: `config.out_dir` cannot be written, or a loss is no longer a number.
    """
    display = Display(console, config.epochs, trainer.train_size)
    folders = open_folders(config, trainer, display, seeds)
    display.say(f"{trainer.framework} on {trainer.device}: {trainer.train_size:,} images an epoch")
    epochs: list[list[Row]] = []
    try:
        with display:
            for epoch in range(config.epochs):
                rows = run_epoch(trainer, epoch, display)
                for row in rows:
                    check_finite(row, config)
                for folder, row, weights in zip(folders, rows, trainer.weights(), strict=True):
                    folder.add_epoch(row)
                    folder.write_weights(weights)
                epochs.append(rows)
                display.say(f"epoch {epoch + 1}/{config.epochs}: test accuracy {describe_accuracies(rows)}")
    except KeyboardInterrupt:
        display.say(f"{len(epochs)} finished epochs and the weights after them are in {config.out_dir}")
        raise
    for folder, history in zip(folders, zip(*epochs, strict=True), strict=True):
        accuracy = history[-1]["test_accuracy"]
        folder.write_curves(history, f"{trainer.framework}: test accuracy {accuracy:.1%} after {len(history)} epochs")
    console.print(epoch_table([rows[0] for rows in epochs]) if seeds is None else network_table(seeds, epochs[-1]))
    display.say(f"Results are in {', '.join(str(folder.path) for folder in folders)}: {', '.join(FILES)}")


def follow(config: TrainConfig, trainer: Trainer) -> None:
    """Do what every process of a run but its first does: compute its share, and write nothing."""
    for epoch in range(config.epochs):
        for _ in trainer.train_epoch(epoch):
            pass
        trainer.evaluate()


def open_folders(
    config: TrainConfig, trainer: Trainer, display: Display, seeds: Sequence[int] | None
) -> list[RunFolder]:
    """A folder for each network, with what was asked for written down in it."""
    if seeds is None:
        configs = [config]
    else:
        configs = [replace(config, seed=seed, out_dir=config.out_dir / f"seed-{seed}") for seed in seeds]
    record = {"framework": trainer.framework, "device": trainer.device} | provenance(trainer.packages)
    folders = [RunFolder(each.out_dir, display.say) for each in configs]
    for folder, each in zip(folders, configs, strict=True):
        folder.write_config(each, record)
    return folders


def run_epoch(trainer: Trainer, epoch: int, display: Display) -> list[Row]:
    """Train and score one epoch; returns each network's line of metrics.jsonl."""
    started = time.perf_counter()
    images, loss_sum = 0, np.zeros(1)
    for count, loss in trainer.train_epoch(epoch):
        images += count
        loss_sum = loss_sum + np.asarray(loss) * count
        display.report(epoch, images, float(loss_sum.mean()) / images, images / (time.perf_counter() - started))
    trained = time.perf_counter()
    test_losses, test_accuracies = (np.atleast_1d(figures) for figures in trainer.evaluate())
    evaluated = time.perf_counter()
    return [
        {
            "epoch": epoch + 1,
            "train_loss": float(train_loss) / images,
            "test_loss": float(test_loss),
            "test_accuracy": float(test_accuracy),
            "train_seconds": trained - started,
            "eval_seconds": evaluated - trained,
            "compile_seconds": trainer.compile_seconds if epoch == 0 else 0.0,
            "images_per_second": images / (trained - started),
        }
        for train_loss, test_loss, test_accuracy in zip(loss_sum, test_losses, test_accuracies, strict=True)
    ]


def check_finite(row: Row, config: TrainConfig) -> None:
    """Stop a training that has lost its way.

    Raises:
        UserError: the loss is NaN or infinite.
    """
    if not math.isfinite(row["train_loss"]):
        raise UserError(
            f"the training loss became {row['train_loss']} in epoch {row['epoch']} with --learning-rate "
            f"{config.adam.learning_rate:g}: try a smaller one"
        )


def describe_accuracies(rows: Sequence[Row]) -> str:
    """The accuracy, or the mean and the range of several."""
    accuracies = [row["test_accuracy"] for row in rows]
    if len(rows) == 1:
        return f"{accuracies[0]:.2%}"
    mean = sum(accuracies) / len(rows)
    return f"{mean:.2%} (mean of {len(rows)} networks, {min(accuracies):.2%} to {max(accuracies):.2%})"

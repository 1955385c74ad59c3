"""The loop over epochs that both frameworks run in: train, score, record, show; stop and go on."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import ArrayLike
from rich.console import Console

from jax_cnn.checkpoint import AdamState, Checkpoint, Progress
from jax_cnn.config import TrainConfig, UserError
from jax_cnn.run.checkpoints import CheckpointWriter
from jax_cnn.run.display import Display, epoch_table, network_table
from jax_cnn.run.folder import FILES, RunFolder, writing
from jax_cnn.run.interrupts import Interrupted, postponed_interrupts
from jax_cnn.run.provenance import provenance
from jax_cnn.run.resume import checkpoint_to_resume, how_to_resume, run_record

Row = dict[str, Any]  # a line of metrics.jsonl


@runtime_checkable
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

    def train_epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[int, ArrayLike]]:
        """Train on every image once, from step `start` on; yields image counts and losses [networks, steps]."""

    def evaluate(self) -> tuple[ArrayLike, ArrayLike]:
        """Each network's mean loss and accuracy (0 … 1) over the whole test set."""

    def weights(self) -> list[dict[str, np.ndarray]]:
        """Each network's current weights under PyTorch's names and layouts."""

    def state(self) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray], dict[str, np.ndarray], int]:
        """The first network's weights, both moments, and the step count."""

    def restore(
        self,
        weights: dict[str, np.ndarray],
        first_moment: dict[str, np.ndarray],
        second_moment: dict[str, np.ndarray],
        step: int,
    ) -> None:
        """Go on from there."""


def fit(config: TrainConfig, trainer: Trainer, console: Console, seeds: Sequence[int] | None = None) -> None:
    """Run every epoch, and write the run's files as it goes.

    Args:
        config: of the run.
        trainer: the framework's half.
        console: where a person looks.
        seeds: of the networks, if they are several: each has a folder in `config.out_dir`, as if it ran alone.

    Raises:
        UserError: `config.out_dir` cannot be written, holds no checkpoint to resume, or a loss is no longer a number.
        Interrupted: by Ctrl-C or SIGTERM; all that was done is saved.
    """
    display = Display(console, config.epochs, trainer.train_size)
    record = run_origin(trainer)
    with ExitStack() as stack:
        folders = [stack.enter_context(folder) for folder in open_folders(config, display, record, seeds)]
        run = Run(config, trainer, display, folders, run_record(config, record))
        if config.resume:
            run.resume()
        display.say(f"{trainer.framework} on {trainer.device}: {trainer.train_size:,} images an epoch")
        with display, postponed_interrupts() as signal_received:
            run.train(signal_received)
        for folder, rows in zip(folders, run.histories, strict=True):
            accuracy = rows[-1]["test_accuracy"]
            folder.write_curves(rows, f"{trainer.framework}: test accuracy {accuracy:.1%} after {len(rows)} epochs")
    console.print(
        epoch_table(run.histories[0]) if seeds is None else network_table(seeds, [rows[-1] for rows in run.histories])
    )
    display.say(f"Results are in {', '.join(str(folder.path) for folder in folders)}: {', '.join(FILES)}")


def follow(config: TrainConfig, trainer: Trainer) -> None:
    """Do what every process of a run but its first does: compute its share, and write nothing.

    Raises:
        UserError: the run is to be resumed, and this process finds no checkpoint of it in `config.out_dir`.
    """
    epoch, start = 0, 0
    if config.resume:
        record = run_record(config, run_origin(trainer))
        found = checkpoint_to_resume(config, record, lambda line: None)
        trainer.restore(*found.state)
        epoch, start = found.progress.epoch, found.progress.steps
    for later in range(epoch, config.epochs):
        for _ in trainer.train_epoch(later, start if later == epoch else 0):
            pass
        trainer.evaluate()


def run_origin(trainer: Trainer) -> dict[str, Any]:
    """What computes the run, where, and with which versions."""
    return {"framework": trainer.framework, "device": trainer.device} | provenance(trainer.packages)


def open_folders(
    config: TrainConfig, display: Display, record: dict[str, Any], seeds: Sequence[int] | None
) -> Iterator[RunFolder]:
    """A folder for each network, with what was asked for written down in it."""
    if seeds is None:
        configs = [config]
    else:
        configs = [replace(config, seed=seed, out_dir=config.out_dir / f"seed-{seed}") for seed in seeds]
    for each in configs:
        folder = RunFolder(each.out_dir, display.say, config.resume)
        if not config.resume:
            folder.write_config(each, record)
        yield folder


class Run:
    """A run's place in its epochs, and what it has found so far."""

    def __init__(
        self,
        config: TrainConfig,
        trainer: Trainer,
        display: Display,
        folders: Sequence[RunFolder],
        record: dict[str, Any],
    ) -> None:
        """Start at the beginning. Of several networks no checkpoints are kept."""
        self.histories: list[list[Row]] = [[] for _ in folders]
        self._config = config
        self._trainer = trainer
        self._display = display
        self._folders = folders
        self._record = record
        self._checkpoints = CheckpointWriter(config.out_dir, config.checkpoint_seconds) if len(folders) == 1 else None
        self._steps, self._loss_sums, self._seconds = 0, np.zeros(len(folders)), 0.0

    def resume(self) -> None:
        """Go on where the run in the folder stopped."""
        found = checkpoint_to_resume(self._config, self._record, self._display.say)
        progress = found.progress
        self._trainer.restore(*found.state)
        self.histories = [list(progress.rows)]
        self._steps, self._seconds = progress.steps, progress.seconds
        self._loss_sums = np.array([progress.loss_sum])
        self._folders[0].write_metrics(progress.rows)
        if progress.rows:
            self._folders[0].write_weights(found.state.weights)  # the epoch's, if that was cut off
        self._display.say(f"going on after step {found.state.step:,}")

    def train(self, signal_received: Callable[[], int | None]) -> None:
        """Run the epochs that are left."""
        while len(self.histories[0]) < self._config.epochs:
            self._train_epoch(signal_received)
            self._finish_epoch()
            self._save()
            self._stop_if(signal_received())
        if self._checkpoints is not None:
            with writing(self._config.out_dir):
                self._checkpoints.wait()

    def _train_epoch(self, signal_received: Callable[[], int | None]) -> None:
        """Train what is left of the epoch."""
        size = self._trainer.train_size
        started = time.perf_counter()
        before, images_before = self._seconds, min(self._steps * self._config.batch_size, size)
        images = images_before
        for count, losses in self._trainer.train_epoch(len(self.histories[0]), self._steps):
            losses = np.reshape(np.asarray(losses, np.float64), (len(self._folders), -1))
            self._check_finite(losses)
            images += count
            self._steps += losses.shape[1]
            self._loss_sums = self._loss_sums + losses.mean(axis=1) * count
            elapsed = time.perf_counter() - started
            self._seconds = before + elapsed
            mean_loss = float(self._loss_sums.mean()) / images
            self._display.report(len(self.histories[0]), images, mean_loss, (images - images_before) / elapsed)
            if self._checkpoints is not None and self._checkpoints.due and images < size:
                self._save()
            self._stop_if(signal_received())

    def _finish_epoch(self) -> None:
        """Score, and write each network's line of metrics.jsonl and its weights."""
        started = time.perf_counter()
        test_losses, test_accuracies = (np.atleast_1d(figures) for figures in self._trainer.evaluate())
        evaluated = time.perf_counter()
        epoch, size = len(self.histories[0]), self._trainer.train_size
        for at, (folder, weights) in enumerate(zip(self._folders, self._trainer.weights(), strict=True)):
            row = {
                "epoch": epoch + 1,
                "train_loss": float(self._loss_sums[at]) / size,
                "test_loss": float(test_losses[at]),
                "test_accuracy": float(test_accuracies[at]),
                "train_seconds": self._seconds,
                "eval_seconds": evaluated - started,
                "compile_seconds": self._trainer.compile_seconds if epoch == 0 else 0.0,
                "images_per_second": size / self._seconds,
            }
            self.histories[at].append(row)
            folder.write_metrics(self.histories[at])
            folder.write_weights(weights)
        self._steps, self._loss_sums, self._seconds = 0, np.zeros(len(self._folders)), 0.0
        accuracies = describe_accuracies([rows[-1] for rows in self.histories])
        self._display.say(f"epoch {epoch + 1}/{self._config.epochs}: test accuracy {accuracies}")

    def _save(self) -> None:
        """Have the whole state written while training goes on.

        Raises:
            UserError: the folder cannot be written, or a weight is no longer a number.
        """
        if self._checkpoints is None:
            return
        state = AdamState(*self._trainer.state())
        for name, weight in state.weights.items():
            if not np.isfinite(weight).all():
                raise self._lost(f"the weights {name} became NaN or infinite by step {state.step:,}")
        rows = self.histories[0]
        progress = Progress(len(rows), self._steps, float(self._loss_sums[0]), self._seconds, list(rows))
        with writing(self._config.out_dir):
            self._checkpoints.write(Checkpoint(state, progress, self._record))

    def _stop_if(self, number: int | None) -> None:
        """Save and stop, if a signal has asked for it."""
        if number is None:
            return
        if self._checkpoints is None:
            raise Interrupted(
                number, f"stopped; {len(self.histories[0])} finished epochs are in {self._config.out_dir}"
            )
        self._save()
        with writing(self._config.out_dir):
            self._checkpoints.wait()
        raise Interrupted(number, f"stopped, and saved. To go on: {how_to_resume()}")

    def _check_finite(self, losses: np.ndarray) -> None:
        """Stop a training that has lost its way, before anything of it is saved."""
        lost = np.argwhere(~np.isfinite(losses.T))
        if len(lost):
            steps_per_epoch = -(-self._trainer.train_size // self._config.batch_size)
            step = len(self.histories[0]) * steps_per_epoch + self._steps + int(lost[0, 0]) + 1
            raise self._lost(f"the training loss became {losses.T[tuple(lost[0])]} at step {step:,}")

    def _lost(self, what: str) -> UserError:
        return UserError(
            f"{what}, with --learning-rate {self._config.adam.learning_rate:g}: try a smaller one; "
            f"what was saved before is in {self._config.out_dir}"
        )


def describe_accuracies(rows: Sequence[Row]) -> str:
    """The accuracy, or the mean and the range of several."""
    accuracies = [row["test_accuracy"] for row in rows]
    if len(rows) == 1:
        return f"{accuracies[0]:.2%}"
    mean = sum(accuracies) / len(rows)
    return f"{mean:.2%} (mean of {len(rows)} networks, {min(accuracies):.2%} to {max(accuracies):.2%})"

"""The loop over epochs that both frameworks share: train an epoch, evaluate, record, save; stop and resume."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import ArrayLike
from rich.console import Console

from jax_cnn.checkpoint import AdamState, Checkpoint, Progress
from jax_cnn.config import TEST_SIZE, TrainConfig, UserError
from jax_cnn.data import other_files
from jax_cnn.run.command_line import Interrupted, postponed_interrupts
from jax_cnn.run.display import ProgressBar, epoch_table, show_table
from jax_cnn.run.folder import FILES, RunFolder
from jax_cnn.run.provenance import provenance
from jax_cnn.run.resume import CheckpointWriter, Record, how_to_resume, rounding_changes, run_record
from jax_cnn.torch_layout import TorchDict


@runtime_checkable  # the tests check the types of arguments at run time
class Trainer(Protocol):
    """One framework's half of a run, as far as the loop needs to know it."""

    framework: str
    """jax or torch."""
    packages: tuple[str, ...]
    """Names of the packages whose versions belong in the record."""
    device_name: str
    """The device or devices, as the record names them."""
    train_size: int
    """Images in an epoch."""
    compile_seconds: float

    def train_epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[int, ArrayLike]]:
        """Train on every image once, from step `start` on. Yield the number of images and the losses of some steps."""

    def evaluate(self) -> tuple[float, float]:
        """Return the mean loss and the accuracy (0 … 1) over the whole test set."""

    def weights(self) -> TorchDict:
        """Return the current weights."""

    def state(self) -> tuple[TorchDict, TorchDict, TorchDict, int]:
        """Return copies of the weights and both of Adam's moments, and the number of steps so far."""

    def restore(self, weights: TorchDict, first_moment: TorchDict, second_moment: TorchDict, step: int) -> None:
        """Continue from a state that `state` returned in either framework."""


def fit(config: TrainConfig, trainer: Trainer, console: Console, checkpoint: Checkpoint | None = None) -> None:
    """Train every epoch that is left, and write the run's files meanwhile.

    It continues from the checkpoint that `find_checkpoint` returned, or starts a new run.

    Raises:
        UserError: `config.out_dir` cannot be written, or a loss is no longer a number.
        Interrupted: Ctrl-C or SIGTERM stopped the run; everything that was done is saved.
    """
    bar = ProgressBar(console)
    data = other_files(config.data_dir) if config.any_data else {}
    origin = {"framework": trainer.framework, "device": trainer.device_name} | provenance(trainer.packages)
    if data:
        origin["data"] = data
    with RunFolder(config.out_dir, bar.say, resume=checkpoint is not None) as folder:
        with postponed_interrupts() as signal_received:
            checkpoints = CheckpointWriter(folder.path, config.checkpoint_seconds)
            run = Run(config, trainer, folder, bar, checkpoints, run_record(config, origin), signal_received)
            if checkpoint is None:
                folder.write_config(config, origin)
            else:
                run.resume(checkpoint)
            bar.say(f"{trainer.framework} on {trainer.device_name}: {trainer.train_size:,} images an epoch")
            with bar:
                run.train()
        rows = run.progress.rows
        accuracy = rows[-1]["test_accuracy"]
        folder.write_curves(rows, f"{trainer.framework}: test accuracy {accuracy:.1%} after {len(rows)} epochs")
    show_table(console, epoch_table(rows, data))
    if accuracy < chance(config.limit_test or TEST_SIZE):
        bar.say(
            f"a test accuracy of {accuracy:.2%} is no better than chance: try another --learning-rate than "
            f"{config.adam.learning_rate:g}, or more epochs"
        )
    bar.say(f"Results are in {folder.path}: {', '.join(FILES)}")


def chance(images: int) -> float:
    """Return the accuracy below which answers on so many images may be guesses: 1 of 10, and two standard errors."""
    return 0.1 + 2 * math.sqrt(0.1 * 0.9 / images)


def follow(config: TrainConfig, trainer: Trainer, checkpoint: Checkpoint | None = None) -> None:
    """Train as `fit` does, but write and show nothing. Every process of a run does this, except the first."""
    progress = Progress()
    if checkpoint is not None:
        trainer.restore(*checkpoint.state)
        progress = checkpoint.progress
    for epoch in range(progress.epoch, config.epochs):
        for _ in trainer.train_epoch(epoch, progress.steps if epoch == progress.epoch else 0):
            pass
        trainer.evaluate()


@dataclass
class Run:
    """A run that is under way."""

    config: TrainConfig
    trainer: Trainer
    folder: RunFolder
    bar: ProgressBar
    checkpoints: CheckpointWriter
    record: Record
    signal_received: Callable[[], int | None]
    progress: Progress = field(default_factory=Progress)

    def resume(self, checkpoint: Checkpoint) -> None:
        """Continue from a checkpoint, and write the files that belong to it."""
        if changes := rounding_changes(checkpoint, self.record):
            self.bar.say(
                f"not as it was: {'; '.join(changes)}. The weights may differ in their last bits from an uninterrupted "
                "run's"
            )
        self.trainer.restore(*checkpoint.state)
        self.progress = checkpoint.progress
        self.folder.write_metrics(self.progress.rows)
        if self.progress.rows:
            self.folder.write_weights(checkpoint.state.weights)  # the run may have ended before it wrote them
        self.bar.say(f"going on after step {checkpoint.state.step:,}")

    def train(self) -> None:
        """Train the epochs that are left: train, evaluate, record, save."""
        while self.progress.epoch < self.config.epochs:
            self.train_epoch()
            self.finish_epoch(self.evaluate())
            self.save()
            self.stop_if_asked()
        self.checkpoints.wait()

    def train_epoch(self) -> None:
        """Train the rest of the epoch."""
        progress, size = self.progress, self.trainer.train_size
        first_image = min(progress.steps * self.config.batch_size, size)
        self.bar.begin(
            f"epoch {progress.epoch + 1}/{self.config.epochs}",
            completed=progress.epoch * size + first_image,
            total=self.config.epochs * size,
        )
        seconds_before, started = progress.seconds, time.perf_counter()
        images_done = first_image
        for count, step_losses in self.trainer.train_epoch(progress.epoch, progress.steps):
            losses = np.atleast_1d(np.asarray(step_losses, np.float64))
            self.check_finite(losses)
            images_done += count
            progress.steps += len(losses)
            progress.loss_sum += float(losses.mean()) * count
            elapsed = time.perf_counter() - started
            progress.seconds = seconds_before + elapsed
            self.show_progress(images_done, images_per_second=(images_done - first_image) / elapsed)
            if self.checkpoints.due and images_done < size:
                self.save()
            self.stop_if_asked()

    def show_progress(self, images_done: int, images_per_second: float) -> None:
        """Show how far the epoch is, and how long the rest of the run will take."""
        progress, size = self.progress, self.trainer.train_size
        completed = progress.epoch * size + images_done
        seconds_left = (self.config.epochs * size - completed) / images_per_second
        detail = f"{images_done:,} of {size:,} images, loss {progress.loss_sum / images_done:.3f}, "
        detail += f"{images_per_second:,.0f} images/s, {seconds_left:.0f} s left"
        self.bar.report(detail, completed)

    def evaluate(self) -> dict[str, Any]:
        """Evaluate on the test set, and return the epoch's line of metrics.jsonl."""
        started = time.perf_counter()
        test_loss, test_accuracy = self.trainer.evaluate()
        progress, size = self.progress, self.trainer.train_size
        return {
            "epoch": progress.epoch + 1,
            "train_loss": progress.loss_sum / size,
            "test_loss": float(test_loss),
            "test_accuracy": float(test_accuracy),
            "train_seconds": progress.seconds,
            "eval_seconds": time.perf_counter() - started,
            "compile_seconds": self.trainer.compile_seconds if progress.epoch == 0 else 0.0,
            "images_per_second": size / progress.seconds,
        }

    def finish_epoch(self, row: dict[str, Any]) -> None:
        """Record the epoch's measurements and weights, and go to the first step of the next epoch."""
        rows = [*self.progress.rows, row]
        self.folder.write_metrics(rows)
        self.folder.write_weights(self.trainer.weights())
        self.progress = Progress(epoch=len(rows), rows=rows)
        self.bar.say(f"epoch {len(rows)}/{self.config.epochs}: test accuracy {row['test_accuracy']:.2%}")

    def save(self) -> None:
        """Begin to write a checkpoint.

        Raises:
            UserError: the folder cannot be written, or a weight is no longer a number.
        """
        state = AdamState(*self.trainer.state())
        for name, weight in state.weights.items():
            if not np.isfinite(weight).all():
                raise self.not_finite_error(f"the weights {name} became NaN or infinite by step {state.step:,}")
        self.checkpoints.write(Checkpoint(state, replace(self.progress), self.record))

    def stop_if_asked(self) -> None:
        """Save and stop if Ctrl-C or SIGTERM has come.

        Raises:
            Interrupted: a signal has come, and everything is saved.
        """
        number = self.signal_received()
        if number is None:
            return
        self.save()
        self.checkpoints.wait()
        raise Interrupted(number, f"stopped, and saved. To go on: {how_to_resume()}")

    def check_finite(self, losses: np.ndarray) -> None:
        """Stop a run whose loss is no longer a number, before it is saved.

        Raises:
            UserError: a loss is NaN or infinite.
        """
        not_finite = np.flatnonzero(~np.isfinite(losses))
        if len(not_finite):
            first = int(not_finite[0])
            steps_per_epoch = math.ceil(self.trainer.train_size / self.config.batch_size)
            step = self.progress.epoch * steps_per_epoch + self.progress.steps + first + 1
            raise self.not_finite_error(f"the training loss became {losses[first]} at step {step:,}")

    def not_finite_error(self, what: str) -> UserError:
        """Return the error that stops a run after a loss or a weight became NaN or infinite."""
        return UserError(
            f"{what}, with --learning-rate {self.config.adam.learning_rate:g}: try a smaller one; "
            f"what was saved before is in {self.config.out_dir}"
        )

"""The loop over epochs that both frameworks share: train an epoch, evaluate, record, save; stop and resume."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import ArrayLike
from rich.console import Console

from jax_cnn.checkpoint import AdamState, Checkpoint, Progress
from jax_cnn.config import TrainConfig, UserError
from jax_cnn.run.command_line import Interrupted, postponed_interrupts
from jax_cnn.run.display import ProgressBar, epoch_table
from jax_cnn.run.folder import FILES, RunFolder
from jax_cnn.run.provenance import provenance
from jax_cnn.run.resume import CheckpointWriter, how_to_resume, rounding_changes, run_record

Arrays = dict[str, np.ndarray]  # under PyTorch's names and in its layouts


@runtime_checkable  # the tests check the types of arguments at run time
class Trainer(Protocol):
    """One framework's half of a run: all that the loop needs to know of it."""

    framework: str
    compile_seconds: float

    @property
    def packages(self) -> tuple[str, ...]:
        """Names of the packages whose versions belong in the record."""

    @property
    def train_size(self) -> int:
        """Images in an epoch."""

    @property
    def device(self) -> str:
        """The device, as the record names it."""

    def train_epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[int, ArrayLike]]:
        """Train on every image once, from step `start` on. Yield numbers of images and the losses of their steps."""

    def evaluate(self) -> tuple[float, float]:
        """Return the mean loss and the accuracy (0 … 1) over the whole test set."""

    def weights(self) -> Arrays:
        """Return the current weights."""

    def state(self) -> tuple[Arrays, Arrays, Arrays, int]:
        """Return copies of the weights and both of Adam's moments, and the number of steps so far."""

    def restore(self, weights: Arrays, first_moment: Arrays, second_moment: Arrays, step: int) -> None:
        """Continue from such a state."""


def fit(config: TrainConfig, trainer: Trainer, console: Console, checkpoint: Checkpoint | None = None) -> None:
    """Train every epoch that is left, and write the run's files meanwhile.

    Args:
        config: the configuration of the run.
        trainer: the framework's half of the run.
        console: where the user sees progress and results.
        checkpoint: the state to continue from, as `find_checkpoint` returns it; None starts a new run.

    Raises:
        UserError: `config.out_dir` cannot be written, or a loss is no longer a number.
        Interrupted: Ctrl-C or SIGTERM stopped the run; everything that was done is saved.
    """
    bar = ProgressBar(console)
    origin = {"framework": trainer.framework, "device": trainer.device} | provenance(trainer.packages)
    with RunFolder(config.out_dir, bar.say, resume=checkpoint is not None) as folder:
        with postponed_interrupts() as signal_received:
            checkpoints = CheckpointWriter(folder.path, config.checkpoint_seconds)
            run = Run(config, trainer, folder, bar, checkpoints, run_record(config, origin), signal_received)
            if checkpoint is None:
                folder.write_config(config, origin)
            else:
                run.resume(checkpoint)
            bar.say(f"{trainer.framework} on {trainer.device}: {trainer.train_size:,} images an epoch")
            with bar:
                run.train()
        rows = run.progress.rows
        accuracy = rows[-1]["test_accuracy"]
        folder.write_curves(rows, f"{trainer.framework}: test accuracy {accuracy:.1%} after {len(rows)} epochs")
    console.print(epoch_table(rows))
    bar.say(f"Results are in {folder.path}: {', '.join(FILES)}")


def follow(config: TrainConfig, trainer: Trainer, checkpoint: Checkpoint | None = None) -> None:
    """Do what every process of a run but its first does: compute its share of each step, and write nothing."""
    first_epoch, first_step = 0, 0
    if checkpoint is not None:
        trainer.restore(*checkpoint.state)
        first_epoch, first_step = checkpoint.progress.epoch, checkpoint.progress.steps
    for epoch in range(first_epoch, config.epochs):
        for _ in trainer.train_epoch(epoch, first_step if epoch == first_epoch else 0):
            pass
        trainer.evaluate()


@dataclass
class Run:
    """A run under way. `progress` says where it is and what it has measured so far."""

    config: TrainConfig
    trainer: Trainer
    folder: RunFolder
    bar: ProgressBar
    checkpoints: CheckpointWriter
    record: dict[str, Any]
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
            self.folder.write_weights(checkpoint.state.weights)  # in case they were cut off
        self.bar.say(f"going on after step {checkpoint.state.step:,}")

    def train(self) -> None:
        """Train the epochs that are left: train, evaluate, record, save."""
        while self.progress.epoch < self.config.epochs:
            self.train_epoch()
            row = self.evaluate()
            self.finish_epoch(row)
            self.save()
            self.stop_if_asked()
        self.checkpoints.wait()

    def train_epoch(self) -> None:
        """Train what is left of the epoch."""
        progress, size = self.progress, self.trainer.train_size
        first_image = min(progress.steps * self.config.batch_size, size)
        self.bar.begin(
            f"epoch {progress.epoch + 1}/{self.config.epochs}",
            completed=progress.epoch * size + first_image,
            total=self.config.epochs * size,
        )
        seconds_before, started = progress.seconds, time.perf_counter()
        images = first_image
        for count, step_losses in self.trainer.train_epoch(progress.epoch, progress.steps):
            losses = np.atleast_1d(np.asarray(step_losses, np.float64))
            self.check_finite(losses)
            images += count
            progress.steps += len(losses)
            progress.loss_sum += float(losses.mean()) * count
            elapsed = time.perf_counter() - started
            progress.seconds = seconds_before + elapsed
            self.report(images, images_per_second=(images - first_image) / elapsed)
            if self.checkpoints.due and images < size:
                self.save()
            self.stop_if_asked()

    def report(self, images: int, images_per_second: float) -> None:
        """Show how far the epoch is, and how long the rest of the run will take."""
        progress, size = self.progress, self.trainer.train_size
        completed = progress.epoch * size + images
        seconds_left = (self.config.epochs * size - completed) / images_per_second
        detail = f"{images:,} of {size:,} images, loss {progress.loss_sum / images:.3f}, "
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
        """Begin to write a checkpoint of the whole state.

        Raises:
            UserError: the folder cannot be written, or a weight is no longer a number.
        """
        state = AdamState(*self.trainer.state())
        for name, weight in state.weights.items():
            if not np.isfinite(weight).all():
                raise self.divergence(f"the weights {name} became NaN or infinite by step {state.step:,}")
        self.checkpoints.write(Checkpoint(state, replace(self.progress), self.record))

    def stop_if_asked(self) -> None:
        """Save and stop after Ctrl-C or SIGTERM."""
        number = self.signal_received()
        if number is None:
            return
        self.save()
        self.checkpoints.wait()
        raise Interrupted(number, f"stopped, and saved. To go on: {how_to_resume()}")

    def check_finite(self, losses: np.ndarray) -> None:
        """Stop a training that has diverged, before any of it is saved."""
        lost = np.flatnonzero(~np.isfinite(losses))
        if len(lost):
            steps_per_epoch = -(-self.trainer.train_size // self.config.batch_size)
            step = self.progress.epoch * steps_per_epoch + self.progress.steps + int(lost[0]) + 1
            raise self.divergence(f"the training loss became {losses[lost[0]]} at step {step:,}")

    def divergence(self, what: str) -> UserError:
        """Return the error for a loss or a weight that is no longer a number."""
        return UserError(
            f"{what}, with --learning-rate {self.config.adam.learning_rate:g}: try a smaller one; "
            f"what was saved before is in {self.config.out_dir}"
        )

"""What the benchmark measures, and how often: its command line."""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from experiments.speed.contenders import CONTENDERS, TRAINING, ContenderName
from jax_cnn.config import LIMITS, TRAIN_SIZE, TrainConfig, UserError
from jax_cnn.run.provenance import usable_cores

CAN_LIMIT_CORES = hasattr(os, "sched_setaffinity")  # Linux: JAX has no flag for its threads, it counts its cores


@dataclass(frozen=True)
class BenchmarkConfig:
    """What to measure, and how often. An empty list of sizes, or 0 rounds or runs, leaves a section out."""

    quick: bool = False
    """Fewer rounds, fewer sizes and no whole commands, unless asked for: a few minutes."""
    rounds: int = 9
    """How many times every contender's training is timed, in turns."""
    steps: int = 64
    """Training steps in a round."""
    batch_size: int = 64
    """Images in a step."""
    contenders: tuple[ContenderName, ...] = TRAINING
    """Who takes part."""
    threads: int | None = None
    """Cores and threads of every contender; all that there are if not given. The whole commands use all."""
    batch_sizes: tuple[int, ...] = (16, 32, 64, 128, 256, 512, 1024)
    """Batch sizes for which JAX and the best PyTorch are timed, on the images of a round or a whole batch."""
    thread_counts: tuple[int, ...] | None = None
    """Numbers of threads for which both are timed; 1, 2, 4 and so on up to all cores if not given."""
    sweep_rounds: int = 5
    """Rounds for each batch size and each number of threads."""
    train_sizes: tuple[int, ...] = (7_500, 15_000, 30_000, 60_000)
    """Training images for which a whole epoch of both is timed."""
    epoch_rounds: int = 3
    """Rounds for each number of training images."""
    stage_rounds: int = 5
    """Rounds in which each stage of a JAX step is timed alone."""
    command_runs: int = 2
    """How many times train_jax.py and train_torch.py are run, in turns, from the start of the process to its end."""
    command_epochs: int = TrainConfig.epochs
    """Epochs of each of these runs."""
    command_images: int | None = None
    """Train these runs on the first N images only."""
    seed: int = 0
    """Of the weights and the order of the images."""
    data_dir: Path = TrainConfig.data_dir
    """Where the data set is, or is put."""
    out_dir: Path = Path("runs/benchmark")
    """Where the figures and charts are written. Earlier ones that are there are moved aside, not overwritten."""

    def __post_init__(self) -> None:
        check_range("--rounds", self.rounds, 1, 1_000)
        check_range("--steps", self.steps, 1, TRAIN_SIZE)
        check_range("--batch-size", self.batch_size, 1, TRAIN_SIZE)
        for flag, value in (("sweep", self.sweep_rounds), ("epoch", self.epoch_rounds), ("stage", self.stage_rounds)):
            check_range(f"--{flag}-rounds", value, 0, 1_000)
        check_range("--command-runs", self.command_runs, 0, 100)
        if self.round_images > TRAIN_SIZE:
            raise UserError(
                f"--steps {self.steps} of --batch-size {self.batch_size} are {self.round_images:,} images a round, and "
                f"there are {TRAIN_SIZE:,}; use fewer steps"
            )
        for size in self.batch_sizes:
            check_range("--batch-sizes", size, 1, TRAIN_SIZE)
        for size in self.train_sizes:
            check_range("--train-sizes", size, 1, TRAIN_SIZE)
        rivals = [name for name in TRAINING if CONTENDERS[name].competes]
        if "jax" not in self.contenders or not set(rivals) & set(self.contenders):
            raise UserError(f"--contenders must name jax and at least one of {', '.join(rivals)}")
        if len(set(self.contenders)) < len(self.contenders):
            raise UserError("--contenders must name nobody twice")
        for flag, counts in (("--threads", (self.threads,)), ("--thread-counts", self.thread_counts or ())):
            for count in counts:
                if count is not None:
                    check_threads(flag, count)
        check_range("--command-epochs", self.command_epochs, *LIMITS["epochs"])
        check_range("--seed", self.seed, *LIMITS["seed"])
        if self.command_images is not None:
            check_range("--command-images", self.command_images, *LIMITS["limit_train"])

    @property
    def round_images(self) -> int:
        """Images of a round."""
        return self.steps * self.batch_size

    @property
    def cores(self) -> int:
        """Cores and threads of every contender."""
        return self.threads or usable_cores()

    @property
    def counts(self) -> tuple[int, ...]:
        """The numbers of threads to sweep."""
        if self.thread_counts is not None:
            return self.thread_counts
        if not CAN_LIMIT_CORES:
            return ()
        powers = [2**power for power in range(usable_cores().bit_length())]
        return tuple(sorted({*powers, usable_cores()}))


QUICK: dict[str, Any] = {
    "rounds": 5,
    "batch_sizes": (16, 64, 256),
    "sweep_rounds": 3,
    "train_sizes": (7_500,),
    "epoch_rounds": 2,
    "stage_rounds": 3,
    "command_runs": 0,
}


def planned(config: BenchmarkConfig) -> BenchmarkConfig:
    """The config with `--quick` carried out: what was not given on the command line becomes smaller."""
    if not config.quick:
        return config
    standard = BenchmarkConfig()
    left = {key: value for key, value in QUICK.items() if getattr(config, key) == getattr(standard, key)}
    return replace(config, **left)


def check_range(flag: str, value: int, least: int, most: int) -> None:
    """Hold a number to its limits.

    Raises:
        UserError: it is outside.
    """
    if not least <= value <= most:
        raise UserError(f"{flag} must be between {least} and {most:,}, not {value}")


def check_threads(flag: str, count: int) -> None:
    """Hold a number of threads to the cores there are.

    Raises:
        UserError: there are fewer, or this system cannot give a process fewer than all.
    """
    check_range(flag, count, 1, usable_cores())
    if count != usable_cores() and not CAN_LIMIT_CORES:
        raise UserError(f"{flag} {count}: only Linux can keep JAX to fewer cores than all; give {usable_cores()}")

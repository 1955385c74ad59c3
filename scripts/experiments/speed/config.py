"""The settings of the benchmark: which programs are timed, on what, and how often.

This file loads no framework: each contender has a process of its own.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from experiments.answers import Framework
from jax_cnn.config import LIMITS, TRAIN_SIZE, Device, FolderConfig, SeedConfig, TrainConfig, UserError, check_limits
from jax_cnn.run.provenance import usable_cores

CAN_LIMIT_CORES = hasattr(os, "sched_setaffinity")  # Linux. JAX has no flag for its threads: it counts its cores

ContenderName = Literal[
    "jax",
    "torch-adam",
    "torch-fused",
    "torch-channels-last",
    "torch-default-waiting",
    "torch-compile",
    "torch-course",
]
TRAINING: tuple[ContenderName, ...] = get_args(ContenderName)
DOTS = ("jax-dot", "torch-dot")
STAGE_TIMES = "jax-stages"
CHECKPOINTS = {"jax": "jax-checkpoints", "torch": "torch-checkpoints"}

TEST_IMAGES = 100  # the trainers need a test set, which no round evaluates

# How the threads of PyTorch (libgomp) wait for each other: passive ones yield, those with the default spin for a while
# and then sleep. Neither disturbs the other contenders: between rounds an idle worker used 0.1 ms of CPU, or 3 ms with
# threads that spin. Within a step it depends on the machine: on two cores that others used as well, spinning took up to
# five times as long; on cores of its own it may be faster. So every run times both, and either can be the best.
PASSIVE = {"OMP_WAIT_POLICY": "PASSIVE"}


@dataclass(frozen=True)
class Contender:
    """A program that is timed."""

    title: str
    framework: Framework
    competes: bool = False
    """Whether it can be the best PyTorch."""
    environment: dict[str, str] = field(default_factory=lambda: dict(PASSIVE))
    """Variables set for its process. Other variables that configure its thread pools are removed."""


CONTENDERS: dict[str, Contender] = {
    "jax": Contender("JAX", "jax"),
    "torch-adam": Contender("PyTorch, Adam", "torch", competes=True),
    "torch-fused": Contender("PyTorch, fused Adam", "torch", competes=True),
    "torch-channels-last": Contender("PyTorch, channels_last", "torch", competes=True),
    "torch-default-waiting": Contender("PyTorch, channels_last, spinning", "torch", competes=True, environment={}),
    "torch-compile": Contender("PyTorch, channels_last, compiled", "torch", competes=True),
    "torch-course": Contender("PyTorch, course's DataLoader", "torch"),
    "jax-dot": Contender("JAX's matrix product", "jax"),
    "torch-dot": Contender("PyTorch's matrix product", "torch"),
    STAGE_TIMES: Contender("JAX, stage by stage", "jax"),
    CHECKPOINTS["jax"]: Contender("JAX, saving checkpoints", "jax"),
    CHECKPOINTS["torch"]: Contender("PyTorch, saving checkpoints", "torch"),
    "gpu-jax-command": Contender("JAX as train_jax.py, fed by the CPU", "jax"),
    "gpu-jax": Contender("JAX", "jax"),
    "gpu-jax-plain": Contender("JAX, XLA's own gradients", "jax"),
    "gpu-torch-adam": Contender("PyTorch, Adam", "torch", competes=True),
    "gpu-torch-channels-last": Contender("PyTorch, channels_last", "torch", competes=True),
    "gpu-torch-fused": Contender("PyTorch, fused Adam", "torch", competes=True),
    "gpu-torch-graph": Contender("PyTorch, CUDA graph", "torch", competes=True),
    "gpu-torch-graph-channels-last": Contender("PyTorch, CUDA graph, channels_last", "torch", competes=True),
    "gpu-torch-compile": Contender("PyTorch, compiled", "torch", competes=True),
    "gpu-torch-max-autotune": Contender("PyTorch, compiled, max-autotune", "torch", competes=True),
}
GPU_CONTENDERS = tuple(name for name in CONTENDERS if name.startswith("gpu-"))
# float32 with products in TensorFloat-32, as both frameworks can do them on a GPU; in float32; weights in float32 and
# products in bfloat16.
PRECISIONS = ("tf32", "float32", "bfloat16")


@dataclass(frozen=True)
class Task:
    """The command line of a worker, as JSON."""

    contender: str
    batch_size: int
    images: int
    """Training images in a round."""
    threads: int
    seed: int
    data_dir: str
    device: Device = "cpu"
    batch_sizes: Sequence[int] = ()
    """The batch sizes that a contender for the GPU trains with, instead of `batch_size`."""

    @property
    def config(self) -> TrainConfig:
        """A training run whose epoch is one round."""
        return TrainConfig(
            batch_size=self.batch_size,
            seed=self.seed,
            data_dir=Path(self.data_dir),
            device=self.device,
            limit_train=self.images,
            limit_test=TEST_IMAGES,
        )

    @property
    def points(self) -> list[tuple[str, int]]:
        """Return the precisions and batch sizes that a contender for the GPU trains with; a slow compiler gets half."""
        slow = self.contender in ("gpu-torch-compile", "gpu-torch-max-autotune")
        return [
            (precision, size)
            for size in self.batch_sizes[:: 2 if slow else 1]
            for precision in PRECISIONS
            if not (slow and precision == "float32")
        ]


class Unavailable(Exception):
    """A contender cannot run on this machine. The message gives the reason in one line."""


@dataclass(frozen=True)
class BenchmarkConfig(FolderConfig, SeedConfig):
    """The sizes and repetitions of the benchmark. An empty list of sizes leaves a section out."""

    quick: bool = False
    """Measure fewer rounds and sizes and no whole commands, unless other flags ask for them: a few minutes."""
    device: Literal["cpu", "gpu"] = "cpu"
    """gpu times an epoch on an NVIDIA GPU instead, with each of --batch-sizes and in three precisions."""
    rounds: int = 9
    """How many times the training of every contender is timed, in turns."""
    steps: int = 64
    """Training steps in a round."""
    batch_size: int = 64
    """Images in a step."""
    contenders: tuple[ContenderName, ...] = TRAINING
    """Which configurations take part."""
    threads: int | None = None
    """Cores and threads of every contender; all cores if not given. The whole commands always use all cores."""
    batch_sizes: tuple[int, ...] = (16, 32, 64, 128, 256, 512, 1024)
    """Batch sizes at which JAX and the best PyTorch are timed, on the images of a round or on one whole batch."""
    thread_counts: tuple[int, ...] | None = None
    """Numbers of threads at which JAX and the best PyTorch are timed; 1, 2, 4, … up to all cores if not given."""
    sweep_rounds: int = 5
    """Rounds at each batch size and with each number of threads; 0 leaves both sections out."""
    train_sizes: tuple[int, ...] = (7_500, 15_000, 30_000, 60_000)
    """Numbers of training images for which a whole epoch of JAX and of the best PyTorch is timed."""
    epoch_rounds: int = 3
    """Rounds for each number of training images; 0 leaves the section out."""
    stage_rounds: int = 5
    """Rounds in which each stage of a JAX step is timed alone; 0 leaves the section out."""
    checkpoint_pairs: int = 3
    """Pairs of trainings of each framework, with and without a checkpoint, timed in turns; 0 leaves the section out."""
    command_runs: int = 2
    """How many times train_jax.py and train_torch.py are run as whole commands; 0 leaves the section out."""
    command_epochs: int = TrainConfig.epochs
    """Epochs of each run of a whole command."""
    command_images: int | None = None
    """Run the whole commands on the first N training images only."""
    out_dir: Path = Path("runs/benchmark")
    """Folder for the figures and charts. Earlier ones in it are moved aside, not overwritten."""

    def __post_init__(self) -> None:
        limits = LIMITS | {
            "rounds": (1, 1_000),
            "steps": (1, TRAIN_SIZE),
            "threads": (1, usable_cores()),
            "batch_sizes": (1, TRAIN_SIZE),
            "thread_counts": (1, usable_cores()),
            "sweep_rounds": (0, 1_000),
            "train_sizes": (1, TRAIN_SIZE),
            "epoch_rounds": (0, 1_000),
            "stage_rounds": (0, 1_000),
            "checkpoint_pairs": (0, 1_000),
            "command_runs": (0, 100),
            "command_epochs": LIMITS["epochs"],
            "command_images": LIMITS["limit_train"],
        }
        check_limits(self, limits)
        if self.round_images > TRAIN_SIZE:
            raise UserError(
                f"--steps {self.steps} of --batch-size {self.batch_size} are {self.round_images:,} images a round, and "
                f"there are {TRAIN_SIZE:,}; use fewer steps"
            )
        fewer_cores = {self.threads, *(self.thread_counts or ())} - {None, usable_cores()}
        if fewer_cores and not CAN_LIMIT_CORES:
            raise UserError(
                f"--threads, --thread-counts: only Linux can keep JAX to fewer cores than all; give {usable_cores()}"
            )
        rivals = [name for name in TRAINING if CONTENDERS[name].competes]
        if "jax" not in self.contenders or not set(rivals) & set(self.contenders):
            raise UserError(f"--contenders must name jax and at least one of {', '.join(rivals)}")
        if len(set(self.contenders)) < len(self.contenders):
            raise UserError("--contenders must not name the same one twice")

    @property
    def round_images(self) -> int:
        """Images in a round."""
        return self.steps * self.batch_size

    @property
    def cores(self) -> int:
        """Cores and threads of every contender."""
        return self.threads or usable_cores()

    @property
    def swept_threads(self) -> tuple[int, ...]:
        """Numbers of threads at which JAX and the best PyTorch are timed."""
        if self.thread_counts is not None:
            return self.thread_counts
        if not CAN_LIMIT_CORES:
            return ()
        powers = [2**power for power in range(usable_cores().bit_length())]
        return tuple(sorted({*powers, usable_cores()}))

    def training(self, out_dir: Path) -> TrainConfig:
        """Return the configuration of a whole command."""
        return TrainConfig(
            epochs=self.command_epochs,
            batch_size=self.batch_size,
            seed=self.seed,
            data_dir=self.data_dir,
            out_dir=out_dir,
            device=self.device,
            limit_train=self.command_images,
        )


QUICK: dict[str, Any] = {
    "rounds": 5,
    "batch_sizes": (16, 64, 256),
    "sweep_rounds": 3,
    "train_sizes": (7_500,),
    "epoch_rounds": 2,
    "stage_rounds": 3,
    "checkpoint_pairs": 2,
    "command_runs": 0,
}
GPU: dict[str, Any] = {"rounds": 5, "batch_sizes": (64, 256, 1024, 4096), "command_runs": 1}


def apply_presets(config: BenchmarkConfig) -> BenchmarkConfig:
    """Return the config with the values of `--device gpu` or `--quick` in place of all defaults, if one was given."""
    preset = GPU if config.device == "gpu" else QUICK if config.quick else {}
    standard = BenchmarkConfig()
    return replace(
        config, **{name: value for name, value in preset.items() if getattr(config, name) == getattr(standard, name)}
    )

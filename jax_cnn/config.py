"""Every number of a run, written once. Both training commands build their command line from `TrainConfig`."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

Device = Literal["auto", "cpu", "gpu", "tpu"]
Precision = Literal["float32", "float64", "bfloat16"]
TpuPrecision = Literal["float32", "bfloat16"]  # a TPU computes no float64
Model = Literal["linear", "mlp", "cnn"]
Dialect = Literal["linen", "nnx", "plain"]

CLUSTER = "cluster"
HIDDEN = 512  # units of the mlp's hidden layer
TRAIN_SIZE = 60_000
TEST_SIZE = 10_000
LIMITS = {
    "epochs": (1, 10_000),
    "batch_size": (1, TRAIN_SIZE),
    "seed": (0, 2**32 - 1),
    "hidden": (1, 8192),
    "limit_train": (1, TRAIN_SIZE),
    "limit_test": (1, TEST_SIZE),
}
JAX_LIMITS = {
    "seeds": (1, 1_000),
    "devices": (1, 1_000_000),
    "num_processes": (1, 1_000_000),
}


class UserError(Exception):
    """What is wrong, where, and what to do, in one line.

    The commands print the message without a traceback and exit with status 2.
    """


@dataclass(frozen=True)
class AdamConfig:
    """Adam as in Kingma & Ba, 2015 (arXiv:1412.6980), Algorithm 1; PyTorch's and optax's defaults."""

    learning_rate: float = 1e-3
    """Step size, alpha in the paper."""
    b1: float = 0.9
    """Decay of the mean of the gradients."""
    b2: float = 0.999
    """Decay of the mean of their squares."""
    eps: float = 1e-8
    """Added outside the square root, in torch and in optax alike."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise UserError(f"--learning-rate must be a positive number, not {self.learning_rate}; try 1e-3")
        for flag, decay in (("--b1", self.b1), ("--b2", self.b2)):
            if not 0 <= decay < 1:
                raise UserError(f"{flag} must be at least 0 and below 1, not {decay}; try 0.9 and 0.999")
        if not (math.isfinite(self.eps) and self.eps > 0):
            raise UserError(f"--eps must be a positive number, not {self.eps}; try 1e-8")


class Network(NamedTuple):
    """Which network, in either framework."""

    model: Model = "cnn"
    hidden: int = HIDDEN
    """Of the mlp alone."""

    def __str__(self) -> str:
        """The flags that ask for it."""
        return f"--model {self.model}" + (f" --hidden {self.hidden}" if self.model == "mlp" else "")


CNN = Network()


@dataclass(frozen=True)
class TrainConfig:
    """One training run on FashionMNIST, in either framework."""

    model: Model = "cnn"
    """linear is softmax regression, mlp has one hidden layer, cnn is SimpleCNN."""
    hidden: int = HIDDEN
    """Units of the mlp's hidden layer; 2050 give it as many parameters as the cnn has."""
    epochs: int = 5
    """Passes over the training set."""
    batch_size: int = 64
    """Images in a step; the last batch of an epoch holds what is left over."""
    adam: AdamConfig = field(default_factory=AdamConfig)
    seed: int = 0
    """Seeds the initial weights and the order of the images."""
    data_dir: Path = Path("data")
    """Where the data set is, or is put."""
    out_dir: Path = Path("runs")
    """Where results are written. A run that is already there is moved aside, not overwritten."""
    device: Device = "auto"
    """auto takes an accelerator if the framework sees one."""
    precision: Precision = "float32"
    """Of weights, activations and gradients. bfloat16 (JAX only) keeps weights and Adam's moments in float32."""
    init_weights: Path | None = None
    """Start from this safetensors file (PyTorch's names and layouts) instead of drawing weights."""
    limit_train: int | None = None
    """Train on the first N images only."""
    limit_test: int | None = None
    """Score the first N test images only."""
    resume: bool = False
    """Go on from the newest checkpoint in out-dir, exactly where it stopped."""
    checkpoint_seconds: float = 30.0
    """Save the whole state so often, and at the end of every epoch."""

    def __post_init__(self) -> None:
        check_limits(self, LIMITS)
        if self.hidden != HIDDEN and self.model != "mlp":
            raise UserError(f"--hidden {self.hidden} is the mlp's: add --model mlp, or leave it out")
        if not self.checkpoint_seconds >= 0:
            raise UserError(f"--checkpoint-seconds must be 0 or more, not {self.checkpoint_seconds}; try 30")

    @property
    def network(self) -> Network:
        """Which network it trains."""
        return Network(self.model, self.hidden)

    @property
    def weights_dtype(self) -> Literal["float32", "float64"]:
        """Of weights and moments, which mixed precision keeps wider than what it computes with."""
        return "float64" if self.precision == "float64" else "float32"


@dataclass(frozen=True)
class JaxTrainConfig(TrainConfig):
    """A training run with what only the JAX version offers: dialects, and several networks, devices and processes."""

    dialect: Dialect = "linen"
    """How the network is written: in Flax Linen, in Flax NNX, or as plain functions. The results are the same."""
    seeds: int = 1
    """Train so many networks at once: with seed, seed + 1, and so on."""
    devices: int | None = None
    """Share each batch among so many devices of all processes; 1, or all where there are several processes."""
    coordinator: str | None = None
    """Where several processes meet: host:port of the first, or `cluster` (Slurm, Open MPI, TPU pod) to be told."""
    num_processes: int | None = None
    """How many processes meet there; `cluster` knows."""
    process_id: int | None = None
    """Which of them this one is, from 0; `cluster` knows."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_limits(self, JAX_LIMITS)
        if self.resume and self.seeds > 1:
            raise UserError("--resume goes with --seeds 1 only: no checkpoints are kept of several networks at once")
        place, numbers = self.coordinator, (self.num_processes, self.process_id)
        if place in (None, CLUSTER):
            if numbers != (None, None):
                raise UserError("--num-processes and --process-id need --coordinator HOST:PORT, where processes meet")
        elif not re.fullmatch(r".+:\d{1,5}", str(place)):
            raise UserError(f"--coordinator must be HOST:PORT or {CLUSTER}, not {place}")
        elif self.num_processes is None or self.process_id is None:
            raise UserError(f"--coordinator {place} needs --num-processes and --process-id as well")
        elif not 0 <= self.process_id < self.num_processes:
            last = self.num_processes - 1
            raise UserError(f"--process-id must be between 0 and {last} (--num-processes - 1), not {self.process_id}")


def check_limits(config: object, limits: Mapping[str, tuple[int, int]]) -> None:
    """Hold a config's numbers to their limits.

    Raises:
        UserError: one is outside.
    """
    for name, (least, most) in limits.items():
        value = getattr(config, name)
        if value is not None and not least <= value <= most:
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag} must be between {least} and {most:,}, not {value}")

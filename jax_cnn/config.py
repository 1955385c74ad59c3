"""Every number of a run, written once. Each command builds its command line from one of these classes.

The docstring of a field is its text in `--help`.
"""

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
    "devices": (1, 1_000_000),
    "num_processes": (1, 1_000_000),
}


class UserError(Exception):
    """A mistake of the user. The message is one line: what is wrong, where, and what to do.

    The commands print it without a traceback and exit with status 2.
    """

    def _render_traceback_(self) -> list[str]:
        """Return what IPython shows if a command's `main()` fails in a cell of a notebook: the one line."""
        return [f"error: {self}"]


@dataclass(frozen=True)
class FolderConfig:
    """The folders of a command."""

    data_dir: Path = Path("data")
    """Folder of the data set. Files that are missing are downloaded into it."""
    out_dir: Path = Path("runs")
    """Folder for the results. Earlier results in it are moved aside, not overwritten."""


@dataclass(frozen=True)
class SeedConfig:
    """The seed of a command."""

    seed: int = 0
    """Seed of everything that is drawn at random, such as the initial weights and the order of the images."""


@dataclass(frozen=True)
class LimitConfig:
    """How much a command trains and tests."""

    epochs: int = 5
    """Number of passes over the training set."""
    limit_train: int | None = None
    """Train on the first N images only."""
    limit_test: int | None = None
    """Test on the first N test images only."""


@dataclass(frozen=True)
class AdamConfig:
    """Adam as in Kingma & Ba, 2015 (arXiv:1412.6980), Algorithm 1, with the defaults of PyTorch and optax."""

    learning_rate: float = 1e-3
    """Adam's step size, alpha in the paper."""
    b1: float = 0.9
    """Adam's decay of the running mean of the gradients."""
    b2: float = 0.999
    """Adam's decay of the running mean of the squared gradients."""
    eps: float = 1e-8
    """Adam's constant in the denominator, added outside the square root."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise UserError(f"--learning-rate must be a positive number, not {self.learning_rate}; try 1e-3")
        for flag, decay in (("--b1", self.b1), ("--b2", self.b2)):
            if not 0 <= decay < 1:
                raise UserError(f"{flag} must be at least 0 and below 1, not {decay}; try 0.9 and 0.999")
        if not (math.isfinite(self.eps) and self.eps > 0):
            raise UserError(f"--eps must be a positive number, not {self.eps}; try 1e-8")


class Network(NamedTuple):
    """One of the networks, in either framework. Only the mlp uses `hidden`."""

    model: Model = "cnn"
    hidden: int = HIDDEN

    def __str__(self) -> str:
        """Return the flags that ask for this network."""
        return f"--model {self.model}" + (f" --hidden {self.hidden}" if self.model == "mlp" else "")


CNN = Network()


@dataclass(frozen=True)
class TrainConfig(FolderConfig, SeedConfig, LimitConfig):
    """One training run on FashionMNIST, in either framework."""

    model: Model = "cnn"
    """linear is softmax regression, mlp has one hidden layer, cnn is SimpleCNN."""
    hidden: int = HIDDEN
    """Units of the mlp's hidden layer. With 2050 it has as many parameters as the cnn."""
    batch_size: int = 64
    """Images in a training step. The last batch of an epoch may be smaller."""
    adam: AdamConfig = field(default_factory=AdamConfig)
    any_data: bool = False
    """Train on files of the same format with other contents: own labels, MNIST, KMNIST. Their SHA-256 is recorded."""
    device: Device = "auto"
    """Device to train on. auto takes an accelerator if the framework sees one."""
    precision: Precision = "float32"
    """Dtype of weights, activations and gradients. bfloat16 (JAX only) keeps weights and Adam's moments in float32."""
    init_weights: Path | None = None
    """Start from these weights instead of random ones: a run's folder, a safetensors file, or a .pth of PyTorch's."""
    resume: bool = False
    """Continue from the newest checkpoint in --out-dir, exactly where the run stopped."""
    checkpoint_seconds: float = 30.0
    """Seconds between checkpoints. A checkpoint is also written after every epoch."""

    def __post_init__(self) -> None:
        check_limits(self)
        if self.hidden != HIDDEN and self.model != "mlp":
            raise UserError(f"--hidden {self.hidden} is the mlp's: add --model mlp, or leave it out")
        if not self.checkpoint_seconds >= 0:
            raise UserError(f"--checkpoint-seconds must be 0 or more, not {self.checkpoint_seconds}; try 30")

    @property
    def network(self) -> Network:
        """The network that the run trains."""
        return Network(self.model, self.hidden)

    @property
    def weights_dtype(self) -> Literal["float32", "float64"]:
        """Dtype of weights and moments. With bfloat16 they are wider than what the run computes with."""
        return "float64" if self.precision == "float64" else "float32"


@dataclass(frozen=True)
class JaxTrainConfig(TrainConfig):
    """A training run with what only the JAX version offers: dialects, and several devices and processes."""

    dialect: Dialect = "linen"
    """How the network is written: in Flax Linen, in Flax NNX, or as plain functions. The results are the same."""
    devices: int | None = None
    """Number of devices that share each batch, over all processes. The default is 1; with several processes, all."""
    coordinator: str | None = None
    """Address host:port of the first of several processes, or `cluster` to ask Slurm, Open MPI or the TPU pod."""
    num_processes: int | None = None
    """Number of processes that meet at that address. Not needed with `cluster`."""
    process_id: int | None = None
    """Number of this process, counted from 0. Not needed with `cluster`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        address, numbers = self.coordinator, (self.num_processes, self.process_id)
        if address in (None, CLUSTER):
            if numbers != (None, None):
                raise UserError("--num-processes and --process-id: give --coordinator HOST:PORT too")
        elif not (port := re.fullmatch(r".+:(\d{1,5})", str(address))) or not 1 <= int(port[1]) <= 65_535:
            raise UserError(f"--coordinator must be HOST:PORT or {CLUSTER}, not {address}")
        elif self.num_processes is None or self.process_id is None:
            raise UserError(f"--coordinator {address}: give --num-processes and --process-id too")
        elif not 0 <= self.process_id < self.num_processes:
            last = self.num_processes - 1
            raise UserError(f"--process-id must be between 0 and {last} (--num-processes - 1), not {self.process_id}")


def check_limits(config: object, limits: Mapping[str, tuple[int, int]] = LIMITS) -> None:
    """Check those fields of a configuration that have limits: a number, each of several numbers, or None.

    Raises:
        UserError: a number is outside its limits.
    """
    for name, (least, most) in limits.items():
        value = getattr(config, name, None)
        for number in value if isinstance(value, tuple) else (value,):
            if number is not None and not least <= number <= most:
                flag = "--" + name.replace("_", "-")
                raise UserError(f"{flag} must be between {least} and {most:,}, not {number}")

"""Which programs are timed, and on what. This file loads no framework: each contender has a process of its own."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from experiments.answers import Framework
from jax_cnn.config import Device, TrainConfig

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
        """What a contender for the GPU trains with: a precision and a batch size. What compiles for long gets half."""
        slow = self.contender in ("gpu-torch-compile", "gpu-torch-max-autotune")
        return [
            (precision, size)
            for size in self.batch_sizes[:: 2 if slow else 1]
            for precision in PRECISIONS
            if not (slow and precision == "float32")
        ]


class Unavailable(Exception):
    """A contender cannot run on this machine. The message gives the reason in one line."""

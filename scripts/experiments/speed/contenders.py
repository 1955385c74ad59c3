"""Who is timed. No framework is loaded here: each contender lives in a process of its own (`worker`)."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

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
STAGES = "jax-stages"

# PyTorch's threads (libgomp's) yield while they wait for each other. By default they spin for a while, then sleep.
# Between rounds that disturbs nobody either way: an idle worker used 0.1 ms of CPU, or 3 ms with threads that spin. In
# a step it depends on the machine: on two cores that others used as well, spinning took up to five times as long; on
# cores of one's own it may be the faster way. So every run times both, and either can be the best.
PASSIVE = {"OMP_WAIT_POLICY": "PASSIVE"}


@dataclass(frozen=True)
class Contender:
    """One line of the table."""

    title: str
    framework: Literal["jax", "torch"]
    competes: bool = False
    """Whether it may be the best PyTorch."""
    environment: dict[str, str] = field(default_factory=lambda: dict(PASSIVE))
    """What its process is told; variables of its thread pools that are not named here are not set."""


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
    STAGES: Contender("JAX, stage by stage", "jax"),
}


@dataclass(frozen=True)
class Task:
    """What a worker is told to do."""

    contender: str
    batch_size: int
    images: int
    """Training images of a round."""
    threads: int
    seed: int
    data_dir: Path


class Unavailable(Exception):
    """Why a contender cannot run here, in one line."""

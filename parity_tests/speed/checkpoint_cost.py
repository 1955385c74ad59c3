"""What saving costs a training: the same stretch of steps with a checkpoint and without, in turns, in one process.

One checkpoint in 30 s would drown in the noise of a step's time. So each stretch is about a second, every other one
saves once, and what it takes longer than its neighbour, over 30 s, is by how much saving slows a training down.
"""

import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from jax_cnn import fashion_mnist
from jax_cnn.checkpoint import AdamState, Checkpoint, Progress
from jax_cnn.config import TrainConfig
from jax_cnn.shell.checkpoints import CheckpointWriter
from jax_cnn.shell.fit import Trainer

Framework = Literal["jax", "torch"]
FRAMEWORKS: tuple[Framework, ...] = ("jax", "torch")
CHUNKS = 2  # of JAX's 64 steps, in a stretch of either framework
BOUND = 0.01  # of a step's time: what saving may cost


@dataclass(frozen=True)
class CostConfig:
    """What is measured, and how often."""

    rounds: int = 20
    """Pairs of stretches for each framework."""
    frameworks: tuple[Framework, ...] = FRAMEWORKS
    """Which of the two."""
    data_dir: Path = TrainConfig.data_dir
    """Where the data set is, or is put."""
    out_dir: Path = Path("runs/checkpoint_cost")
    """Where checkpoints are written meanwhile, and checkpoint_cost.json. An earlier one is moved aside."""


def measure(config: CostConfig, framework: str, say: Callable[[str], None]) -> dict[str, Any]:
    """Train in turns with and without saving.

    Returns:
        Steps of a stretch, and for each pair: seconds of both, and seconds that training stood still for a copy.
    """
    run = TrainConfig(limit_train=CHUNKS * 64 * TrainConfig.batch_size, data_dir=config.data_dir, device="cpu")
    trainer = make_trainer(run, framework, say)
    epochs = itertools.count()
    for _ in range(2):
        stretch(trainer, next(epochs))  # to warm up
    pairs = []
    with TemporaryDirectory(prefix="checkpoints-", dir=config.out_dir) as folder:
        writer = CheckpointWriter(Path(folder), run.checkpoint_seconds)
        for round_number in range(config.rounds):
            taken: dict[bool, tuple[float, float]] = {}
            for saving in (False, True) if round_number % 2 else (True, False):
                taken[saving] = stretch(trainer, next(epochs), writer if saving else None)
            pairs.append({"without": taken[False][0], "with": taken[True][0], "copy": taken[True][1]})
    return {"steps": CHUNKS * 64, "pairs": pairs}


def stretch(trainer: Trainer, epoch: int, writer: CheckpointWriter | None = None) -> tuple[float, float]:
    """Train one short epoch, saving as it begins if there is a writer; its seconds, and those of copying the state.

    It ends when the file is on disk, though a training would not wait for it.
    """
    started = copied = time.perf_counter()
    if writer is not None:
        state = AdamState(*trainer.state())
        writer.write(Checkpoint(state, Progress(0, state.step, 0.0, 0.0, []), {"framework": trainer.framework}))
        copied = time.perf_counter()
    for _ in trainer.train_epoch(epoch):
        pass
    if writer is not None:
        writer.wait()
    return time.perf_counter() - started, copied - started


def make_trainer(run: TrainConfig, framework: str, say: Callable[[str], None]) -> Trainer:
    """As the training command makes it."""
    if framework == "jax":
        import jax

        from jax_cnn.compiler import keep_compiled_programs
        from jax_cnn.trainer import JaxTrainer

        keep_compiled_programs()
        return JaxTrainer(run, fashion_mnist.load(run.data_dir, say), jax.devices("cpu")[:1])
    from parity_tests.harness.torch_options import torch_options
    from torch_ref.trainer import TorchTrainer

    fashion_mnist.prepare(run.data_dir, say)
    return TorchTrainer(**torch_options(run))


def summary(measured: dict[str, Any]) -> dict[str, Any]:
    """Medians and quartiles of what was measured."""
    pairs = measured["pairs"]
    every = TrainConfig.checkpoint_seconds
    return {
        "step_milliseconds": quartiles([1000 * pair["without"] / measured["steps"] for pair in pairs]),
        "copy_milliseconds": quartiles([1000 * pair["copy"] for pair in pairs]),
        "extra_milliseconds_per_checkpoint": quartiles([1000 * (pair["with"] - pair["without"]) for pair in pairs]),
        "slower_by": quartiles([(pair["with"] - pair["without"]) / every for pair in pairs]),
    }


def quartiles(values: list[float]) -> dict[str, float]:
    """Median, and the quartiles beside it."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": median, "low": low, "high": high}

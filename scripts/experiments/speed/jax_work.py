"""JAX's work: what train_jax.py runs, and a large matrix product."""

import sys
import time
from typing import Any

import jax
from jax import lax

from experiments.speed.contenders import Task
from experiments.speed.work import DOTS_PER_ROUND, Training, Work, dot_factors
from jax_cnn.compiler import compiler_options
from jax_cnn.config import TrainConfig
from jax_cnn.data import load_fashion_mnist
from jax_cnn.trainer import JaxTrainer

TEST_IMAGES = 100  # scored by nobody here, but compiled for


def make(task: Task) -> Work:
    """The work that the task names."""
    if task.contender == "jax-dot":
        return Dot(task.seed)
    trainer = make_trainer(task)
    return Training(trainer.train_epoch, trainer.compile_seconds)


def make_trainer(task: Task) -> JaxTrainer:
    """What train_jax.py builds, on the CPU, with as many images as a round has."""
    config = TrainConfig(
        batch_size=task.batch_size,
        seed=task.seed,
        data_dir=task.data_dir,
        device="cpu",
        limit_train=task.images,
        limit_test=TEST_IMAGES,
    )
    data = load_fashion_mnist(task.data_dir, lambda line: print(line, file=sys.stderr))
    return JaxTrainer(config, data, jax.devices("cpu")[:1])


class Dot:
    """Large float32 matrix products, each of the last one's result, in one call: nothing is allocated in between."""

    def __init__(self, seed: int) -> None:
        """Compile with the options that the training is compiled with."""
        self._factors = jax.device_put(dot_factors(seed))
        multiply = jax.jit(lambda left, right: lax.fori_loop(0, DOTS_PER_ROUND, lambda _, left: left @ right, left))
        started = time.perf_counter()
        self._program = multiply.lower(*self._factors).compile(compiler_options("cpu"))
        self.compile_seconds = time.perf_counter() - started

    def warm_up(self) -> None:
        """Multiply once."""
        self.round(0)

    def round(self, number: int) -> dict[str, Any]:
        """Multiply `DOTS_PER_ROUND` times."""
        del number
        self._program(*self._factors).block_until_ready()
        return {}

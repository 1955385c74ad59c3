"""PyTorch's work: the training loop at its fastest, the loop as a course writes it, and a large matrix product."""

import sys
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from experiments.speed.contenders import Task, Unavailable
from experiments.speed.work import DOTS_PER_ROUND, Training, Work, dot_factors
from jax_cnn.config import AdamConfig, TrainConfig
from jax_cnn.data import epoch_order, load_fashion_mnist
from torch_ref.model import SimpleCNN
from torch_ref.train import criterion
from torch_ref.trainer import TorchTrainer

ADAM = AdamConfig()


def make(task: Task) -> Work:
    """The work that the task names.

    Raises:
        Unavailable: there is no compiler for torch.compile.
    """
    torch.set_num_threads(task.threads)
    if task.contender == "torch-dot":
        return Dot(task.seed)
    if task.contender == "torch-course":
        return Training(course_trainer(task).train_epoch, compile_seconds=0.0)
    loop = InMemoryLoop(
        task,
        fused=task.contender != "torch-adam",
        channels_last=task.contender not in ("torch-adam", "torch-fused"),
    )
    seconds = loop.compile() if task.contender == "torch-compile" else 0.0
    return Training(loop.train_epoch, seconds)


def course_trainer(task: Task) -> TorchTrainer:
    """What train_torch.py builds, with as many images as a round has."""
    config = TrainConfig(
        data_dir=task.data_dir, batch_size=task.batch_size, seed=task.seed, limit_train=task.images, limit_test=1
    )
    return TorchTrainer(config, epoch_order=partial(epoch_order, config.seed), device=torch.device("cpu"))


class InMemoryLoop:
    """The course's loop without its loader, and with no number read back before the epoch's end."""

    def __init__(self, task: Task, *, fused: bool, channels_last: bool) -> None:
        """Put the training images of a round in memory, and draw the weights that the course's loop starts with."""
        data = load_fashion_mnist(task.data_dir, lambda line: print(line, file=sys.stderr))
        self._format = torch.channels_last if channels_last else torch.contiguous_format
        # Kept as float32: fetching a batch of uint8 and converting it takes about twice as long.
        self._images = torch.from_numpy(data.train_images[: task.images].astype("float32"))[:, None] / 255
        self._labels = torch.from_numpy(data.train_labels[: task.images].astype("int64"))
        self._task = task
        torch.manual_seed(task.seed)
        self._model: nn.Module = SimpleCNN().to(memory_format=self._format)
        self._optimizer = torch.optim.Adam(
            self._model.parameters(), lr=ADAM.learning_rate, betas=(ADAM.b1, ADAM.b2), eps=ADAM.eps, fused=fused
        )

    def train_epoch(self, epoch: int) -> Iterator[tuple[int, Tensor]]:
        """Train on every image once; after each step, yield how many images it held and their mean loss."""
        order = torch.from_numpy(epoch_order(self._task.seed, epoch, len(self._images)))
        for batch in order.split(self._task.batch_size):
            self._optimizer.zero_grad()
            loss = self._loss(batch)
            loss.backward()
            self._optimizer.step()
            yield len(batch), loss.detach()

    def compile(self) -> float:
        """Compile forward and backward for full batches and for the smaller last one; returns the seconds it took.

        Raises:
            Unavailable: there is no C++ compiler, or it fails.
        """
        started = time.perf_counter()
        self._model.compile(dynamic=False)
        sizes = {min(self._task.batch_size, self._task.images), self._task.images % self._task.batch_size} - {0}
        for size in sizes:
            try:
                self._loss(torch.arange(size)).backward()
            except RuntimeError as error:  # of which torch.compile's own are all subclasses
                raise Unavailable(f"torch.compile failed: {str(error).strip().splitlines()[0]}") from error
        return time.perf_counter() - started

    def _loss(self, batch: Tensor) -> Tensor:
        images = self._images[batch].to(memory_format=self._format)
        return criterion(self._model(images), self._labels[batch])


class Dot:
    """Large float32 matrix products, each of the last one's result; nothing is allocated in between."""

    compile_seconds = 0.0

    def __init__(self, seed: int) -> None:
        """Make the factors, and room for two results."""
        self._left, self._right = map(torch.from_numpy, dot_factors(seed))
        self._room = torch.empty_like(self._left), torch.empty_like(self._left)

    def warm_up(self) -> None:
        """Multiply `DOTS_PER_ROUND` times."""
        self.round(0)

    def round(self, number: int) -> dict[str, Any]:
        """Multiply `DOTS_PER_ROUND` times."""
        del number
        left = self._left
        for at in range(DOTS_PER_ROUND):
            left = torch.mm(left, self._right, out=self._room[at % 2])
        return {}

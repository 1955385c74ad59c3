"""The work of PyTorch's workers: the fastest training loop, the loop of a course, and a large matrix product."""

import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from experiments.speed.contenders import CHECKPOINTS, Task, Unavailable
from experiments.speed.work import DOTS_PER_ROUND, Checkpointing, Training, Work, dot_factors
from jax_cnn.data import epoch_order, load_fashion_mnist
from torch_ref.model import SimpleCNN
from torch_ref.train import criterion
from torch_ref.trainer import TorchTrainer


def make(task: Task) -> Work:
    """Build the work of a task.

    Raises:
        Unavailable: there is no compiler for torch.compile.
    """
    torch.set_num_threads(task.threads)
    if task.contender == "torch-dot":
        return Dot(task.seed)
    if task.contender in ("torch-course", CHECKPOINTS["torch"]):
        order = partial(epoch_order, task.config.seed)
        trainer = TorchTrainer(task.config, epoch_order=order, device=torch.device("cpu"))
        return Checkpointing(trainer) if task.contender == CHECKPOINTS["torch"] else Training(trainer.train_epoch)
    loop = InMemoryLoop(
        task,
        fused=task.contender != "torch-adam",
        channels_last=task.contender not in ("torch-adam", "torch-fused"),
    )
    return Training(loop.train_epoch, loop.compile() if task.contender == "torch-compile" else 0.0)


class InMemoryLoop:
    """The course's loop without its DataLoader. It reads no number back before the end of an epoch."""

    def __init__(self, task: Task, *, fused: bool, channels_last: bool) -> None:
        """Load the images of a round, and draw the same initial weights as the course's loop."""
        data, adam = load_fashion_mnist(task.config.data_dir), task.config.adam
        self._format = torch.channels_last if channels_last else torch.contiguous_format
        # Kept as float32: to fetch a batch of uint8 and convert it takes about twice as long.
        self._images = torch.from_numpy(data.train_images[: task.images].astype("float32"))[:, None] / 255
        self._labels = torch.from_numpy(data.train_labels[: task.images].astype("int64"))
        self._task = task
        torch.manual_seed(task.seed)
        self._model: nn.Module = SimpleCNN().to(memory_format=self._format)
        self._optimizer = torch.optim.Adam(
            self._model.parameters(), lr=adam.learning_rate, betas=(adam.b1, adam.b2), eps=adam.eps, fused=fused
        )

    def train_epoch(self, epoch: int) -> Iterator[tuple[int, Tensor]]:
        """Train on every image once. After each step yield the number of its images and their mean loss."""
        order = torch.from_numpy(epoch_order(self._task.seed, epoch, len(self._images)))
        for batch in order.split(self._task.batch_size):
            self._optimizer.zero_grad()
            loss = self._loss(batch)
            loss.backward()
            self._optimizer.step()
            yield len(batch), loss.detach()

    def compile(self) -> float:
        """Compile the forward and backward pass for full batches and for a smaller last one; return the seconds.

        Raises:
            Unavailable: there is no C++ compiler, or it fails.
        """
        started = time.perf_counter()
        self._model.compile(dynamic=False)
        sizes = {min(self._task.batch_size, self._task.images), self._task.images % self._task.batch_size} - {0}
        for size in sizes:
            try:
                self._loss(torch.arange(size)).backward()
            except RuntimeError as error:  # all errors of torch.compile are subclasses of it
                raise Unavailable(f"torch.compile failed: {str(error).strip().splitlines()[0]}") from error
        return time.perf_counter() - started

    def _loss(self, batch: Tensor) -> Tensor:
        images = self._images[batch].to(memory_format=self._format)
        return criterion(self._model(images), self._labels[batch])


class Dot(Work):
    """Large float32 matrix products, each with the result of the last. No memory is allocated in between."""

    def __init__(self, seed: int) -> None:
        self._left, self._right = map(torch.from_numpy, dot_factors(seed))
        self._results = torch.empty_like(self._left), torch.empty_like(self._left)  # written in turns

    def round(self, number: int) -> dict[str, Any]:
        """Multiply `DOTS_PER_ROUND` times."""
        left = self._left
        for product in range(DOTS_PER_ROUND):
            left = torch.mm(left, self._right, out=self._results[product % 2])
        return {}

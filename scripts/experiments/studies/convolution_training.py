"""Does convolution pay? How its runs are trained: by the product's own trainers and loop, many in one process.

PyTorch's images come out of memory and not out of its DataLoader, which would take nine tenths of the small networks'
time. The weights are the training commands' own, bit by bit (`test_convolution_study.py`).
"""

from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path

import jax
import numpy as np
import torch
from rich.console import Console

from experiments.studies.runs import Framework, Run, as_asked
from jax_cnn.config import TrainConfig
from jax_cnn.data import FashionMNIST, epoch_order, load_fashion_mnist
from jax_cnn.run.command_line import Interrupted
from jax_cnn.run.loop import Trainer, fit
from jax_cnn.trainer import JaxTrainer
from torch_ref.train import evaluate, train_one_epoch
from torch_ref.trainer import TorchTrainer

TEST_BATCH = 1000  # as `torch_ref.trainer` scores

Arrays = tuple[torch.Tensor, torch.Tensor]


class InMemoryTrainer(TorchTrainer):
    """`torch_ref`'s trainer, fed with tensors that are made once."""

    def __init__(self, config: TrainConfig, data: FashionMNIST) -> None:
        """Draw the weights, and put the images into memory."""
        super().__init__(config, epoch_order=partial(epoch_order, config.seed), device=torch.device("cpu"))
        self._training = as_tensors(data.train_images[: config.limit_train], data.train_labels[: config.limit_train])
        self._test = as_tensors(data.test_images[: config.limit_test], data.test_labels[: config.limit_test])

    def train_epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[int, float]]:
        """Train on every image once."""
        order = self._epoch_order(epoch, self.train_size)[start * self._batch_size :]
        batches = [
            tuple(part[chosen] for part in self._training) for chosen in torch.from_numpy(order).split(self._batch_size)
        ]
        return train_one_epoch(self._model, batches, self._optimizer, self._device)  # type: ignore[arg-type]  # a list

    def evaluate(self) -> tuple[float, float]:
        """Mean loss and accuracy (0 … 1) over the whole test set."""
        batches = list(zip(*(part.split(TEST_BATCH) for part in self._test), strict=True))
        return evaluate(self._model, batches, self._device)  # type: ignore[arg-type]  # likewise


def as_tensors(pixels: np.ndarray, labels: np.ndarray) -> Arrays:
    """What ToTensor and the loader make of them."""
    return torch.tensor(pixels)[:, None].float() / 255, torch.from_numpy(labels.astype(np.int64))


def jax_trainer(config: TrainConfig, data: FashionMNIST) -> JaxTrainer:
    """What train_jax.py makes."""
    return JaxTrainer(config, data, jax.devices("cpu")[:1])


def train(run: Run, show: Callable[[str], None]) -> None:
    """Train to the end; the folder then holds what the training command leaves there.

    Args:
        run: what to train.
        show: takes a line for a person.

    Raises:
        UserError: the folder cannot be written, or a loss is no longer a number.
        Interrupted: by Ctrl-C or SIGTERM. What is finished is there, and this run starts anew.
    """
    trainers: dict[Framework, Callable[[TrainConfig, FashionMNIST], Trainer]] = {
        "jax": jax_trainer,
        "torch": InMemoryTrainer,
    }
    config = as_asked(run)
    show(f"{config.epochs} epochs")
    try:
        fit(config, trainers[run.framework](config, load(config.data_dir)), Console(quiet=True))
    except Interrupted as stop:
        raise Interrupted(stop.number, "stopped; the same command goes on with the next run that is missing") from None


@cache
def load(data_dir: Path) -> FashionMNIST:
    """The data set, read once."""
    return load_fashion_mnist(data_dir)

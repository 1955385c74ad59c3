"""Data with torchvision, and the training loop as a PyTorch course teaches it."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.datasets import FashionMNIST
from torchvision.transforms import ToTensor

Batches = DataLoader[tuple[Tensor, Tensor]]

criterion = nn.CrossEntropyLoss()


def load_dataset(data_dir: Path, *, train: bool, limit: int | None = None) -> Dataset[tuple[Tensor, Tensor]]:
    """Return the training or the test set. An item is an image [1, 28, 28] in 0 … 1 and its class.

    The images have torch's default dtype.

    Raises:
        RuntimeError: the files are not in `data_dir`.
    """
    dataset = FashionMNIST(root=data_dir, train=train, transform=ToTensor())
    return dataset if limit is None else Subset(dataset, range(limit))


def load_batches(
    dataset: Dataset[tuple[Tensor, Tensor]], batch_size: int, order: Sequence[int] | None = None
) -> Batches:
    """Return batches of images [batch, 1, 28, 28] and classes [batch], in this order. The last may be smaller."""
    return DataLoader(dataset, batch_size=batch_size, sampler=order)


def train_one_epoch(
    model: nn.Module, batches: Batches, optimizer: torch.optim.Optimizer, device: torch.device
) -> Iterator[tuple[int, float]]:
    """Train on every batch once. After each step, yield its number of images and their mean loss before the step."""
    model.train()
    for images, labels in batches:
        images, labels = images.to(device), labels.to(device)

        optimizer.zero_grad()
        loss = criterion(model(images), labels)
        loss.backward()
        optimizer.step()

        yield len(images), loss.item()


@torch.no_grad()
def evaluate(model: nn.Module, batches: Batches, device: torch.device) -> tuple[float, float]:
    """Return the mean loss and the accuracy (0 … 1) over all images, whatever the sizes of the batches."""
    model.eval()
    loss_sum, correct, count = 0.0, 0, 0
    for images, labels in batches:
        images, labels = images.to(device), labels.to(device)
        logits = model(images)
        loss_sum += criterion(logits, labels).item() * len(images)
        correct += int((logits.argmax(dim=1) == labels).sum())
        count += len(images)
    return loss_sum / count, correct / count

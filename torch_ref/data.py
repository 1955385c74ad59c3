"""FashionMNIST with torchvision: a data set of images and a loader of batches."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.datasets import FashionMNIST
from torchvision.transforms import ToTensor

Batches = DataLoader[tuple[Tensor, Tensor]]


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

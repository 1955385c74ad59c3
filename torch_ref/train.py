"""The training loop as a PyTorch course teaches it."""

from collections.abc import Iterator

import torch
from torch import nn

from torch_ref.data import Batches

criterion = nn.CrossEntropyLoss()


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

"""The reference networks.

Each takes images [batch, 1, 28, 28] with values in 0 … 1 and returns logits [batch, 10] in the dtype of its weights.
"""

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn


class SimpleCNN(nn.Module):
    """Conv-relu-pool twice and two linear layers: 1,630,090 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, kernel_size=3, padding=1)
        self.relu1 = nn.ReLU()
        self.pool1 = nn.MaxPool2d(2)
        self.conv2 = nn.Conv2d(32, 64, kernel_size=3, padding=1)
        self.relu2 = nn.ReLU()
        self.pool2 = nn.MaxPool2d(2)
        self.flatten = nn.Flatten()
        self.fc1 = nn.Linear(64 * 7 * 7, 512)
        self.relu3 = nn.ReLU()
        self.fc2 = nn.Linear(512, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Compute the logits."""
        pool1 = self.pool1(self.relu1(self.conv1(images)))  # 28 -> 14
        pool2 = self.pool2(self.relu2(self.conv2(pool1)))  # 14 -> 7
        flatten = self.flatten(pool2)  # channel, row, column
        fc1 = self.fc1(flatten)
        relu3 = self.relu3(fc1)
        return self.fc2(relu3)


class SoftmaxRegression(nn.Module):
    """One linear layer: 7,850 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(28 * 28, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Compute the logits."""
        flatten = self.flatten(images)
        return self.fc(flatten)


class FeedForward(nn.Module):
    """Two linear layers: 407,050 parameters with 512 hidden units."""

    def __init__(self, hidden: int = 512) -> None:
        super().__init__()
        self.flatten = nn.Flatten()
        self.fc1 = nn.Linear(28 * 28, hidden)
        self.relu = nn.ReLU()
        self.fc2 = nn.Linear(hidden, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Compute the logits."""
        flatten = self.flatten(images)
        fc1 = self.fc1(flatten)
        relu = self.relu(fc1)
        return self.fc2(relu)


def make_model(name: str = "cnn", hidden: int = 512) -> nn.Module:
    """Return the network of this name (linear, mlp or cnn), with PyTorch's own random weights."""
    models: dict[str, Callable[[], nn.Module]] = {
        "cnn": SimpleCNN,
        "mlp": partial(FeedForward, hidden),
        "linear": SoftmaxRegression,
    }
    return models[name]()

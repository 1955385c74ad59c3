"""The reference networks.

Each takes images [batch, 1, 28, 28] with values in 0 … 1 and returns logits [batch, 10] in the dtype of its weights.
"""

from collections.abc import Callable, Mapping

from torch import Tensor, nn


class SoftmaxRegression(nn.Module):
    """One linear layer: 7,850 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(28 * 28, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Compute the logits [batch, 10] of images [batch, 1, 28, 28]."""
        logits: Tensor = self.fc(self.flatten(images))
        return logits


class FeedForward(nn.Module):
    """Two linear layers: 407,050 parameters with 512 hidden units."""

    def __init__(self, hidden: int = 512) -> None:
        super().__init__()
        self.flatten = nn.Flatten()
        self.fc1 = nn.Linear(28 * 28, hidden)
        self.relu = nn.ReLU()
        self.fc2 = nn.Linear(hidden, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Compute the logits [batch, 10] of images [batch, 1, 28, 28]."""
        x = self.relu(self.fc1(self.flatten(images)))
        logits: Tensor = self.fc2(x)
        return logits


class SimpleCNN(nn.Module):
    """Conv-relu-pool twice and two linear layers: 1,630,090 parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 32, kernel_size=3, padding=1)
        self.relu1 = nn.ReLU()
        self.pool1 = nn.MaxPool2d(2)  # 28 -> 14
        self.conv2 = nn.Conv2d(32, 64, kernel_size=3, padding=1)
        self.relu2 = nn.ReLU()
        self.pool2 = nn.MaxPool2d(2)  # 14 -> 7
        self.flatten = nn.Flatten()
        self.fc1 = nn.Linear(64 * 7 * 7, 512)
        self.relu3 = nn.ReLU()
        self.fc2 = nn.Linear(512, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Compute the logits [batch, 10] of images [batch, 1, 28, 28]."""
        x = self.pool1(self.relu1(self.conv1(images)))
        x = self.pool2(self.relu2(self.conv2(x)))
        x = self.relu3(self.fc1(self.flatten(x)))
        logits: Tensor = self.fc2(x)
        return logits


MODELS: Mapping[str, Callable[..., nn.Module]] = {"linear": SoftmaxRegression, "mlp": FeedForward, "cnn": SimpleCNN}


def make_model(name: str = "cnn", hidden: int = 512) -> nn.Module:
    """Build the network of that name, with PyTorch's own random weights.

    Args:
        name: linear, mlp or cnn.
        hidden: width of the mlp's hidden layer.
    """
    return FeedForward(hidden) if name == "mlp" else MODELS[name]()

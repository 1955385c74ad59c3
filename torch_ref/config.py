"""The settings that `TorchTrainer` needs. Any object with these attributes will do."""

from pathlib import Path
from typing import Protocol


class Adam(Protocol):
    """The settings of Adam."""

    @property
    def learning_rate(self) -> float:
        """Size of a step."""

    @property
    def b1(self) -> float:
        """Decay of the running mean of the gradients."""

    @property
    def b2(self) -> float:
        """Decay of the running mean of the squared gradients."""

    @property
    def eps(self) -> float:
        """Constant in the denominator, added outside the square root."""


class Config(Protocol):
    """The settings of a run."""

    @property
    def model(self) -> str:
        """Name of the network: linear, mlp or cnn."""

    @property
    def hidden(self) -> int:
        """Units of the mlp's hidden layer."""

    @property
    def precision(self) -> str:
        """Name of the dtype of weights and images: float32 or float64."""

    @property
    def seed(self) -> int:
        """Seed of the initial weights."""

    @property
    def adam(self) -> Adam:
        """Settings of the optimizer."""

    @property
    def batch_size(self) -> int:
        """Images in a step."""

    @property
    def data_dir(self) -> Path:
        """Folder that holds the data set in torchvision's layout."""

    @property
    def limit_train(self) -> int | None:
        """Train on the first N images only."""

    @property
    def limit_test(self) -> int | None:
        """Test on the first N images only."""

"""The reference network."""

from torch import Tensor, nn


class SimpleCNN(nn.Module):
    """Conv-relu-pool twice and two linear layers: 1,630,090 parameters.

    Takes images [batch, 1, 28, 28] with values in 0 … 1 and returns logits [batch, 10], in the dtype of its weights.
    """

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

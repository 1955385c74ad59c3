"""torchvision's ResNets, and the same networks written in Flax Linen."""

from functools import partial
from typing import Any

import jax
import numpy as np
import optax
from flax import linen
from torch.nn import functional
from torchvision.models import resnet as torchvision_resnet

from parity_tests.harness.pair import Pair


class BatchNorm(linen.BatchNorm):
    """Flax's batch norm with PyTorch's running variance, which is that of the unbiased estimate."""

    def __call__(self, x: jax.Array, use_running_average: bool | None = None) -> jax.Array:  # type: ignore[override]
        """Normalise x over all axes but the last."""
        before: jax.Array | None = self.get_variable("batch_stats", "var")
        y = super().__call__(x, use_running_average=use_running_average)
        if before is not None and not (self.use_running_average or use_running_average):
            count = x.size // x.shape[-1]
            share = self.get_variable("batch_stats", "var") - self.momentum * before
            self.put_variable("batch_stats", "var", self.momentum * before + share * count / (count - 1))
        return y


class BasicBlock(linen.Module):
    """Two 3x3 convolutions beside a shortcut."""

    width: int
    stride: int
    conv: Any
    norm: Any

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Compute [batch, row, column, width]."""
        y = self.conv(self.width, (3, 3), strides=self.stride, padding=1)(x)
        y = linen.relu(self.norm()(y))
        y = self.norm()(self.conv(self.width, (3, 3), padding=1)(y))
        if x.shape != y.shape:
            x = self.conv(self.width, (1, 1), strides=self.stride, name="downsample_conv")(x)
            x = self.norm(name="downsample_norm")(x)
        return linen.relu(y + x)


class Bottleneck(linen.Module):
    """A 3x3 convolution between two of 1x1, beside a shortcut."""

    width: int
    stride: int
    conv: Any
    norm: Any

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Compute [batch, row, column, 4 · width]."""
        y = linen.relu(self.norm()(self.conv(self.width, (1, 1))(x)))
        y = self.conv(self.width, (3, 3), strides=self.stride, padding=1)(y)
        y = linen.relu(self.norm()(y))
        y = self.norm()(self.conv(4 * self.width, (1, 1))(y))
        if x.shape != y.shape:
            x = self.conv(4 * self.width, (1, 1), strides=self.stride, name="downsample_conv")(x)
            x = self.norm(name="downsample_norm")(x)
        return linen.relu(y + x)


class ResNet(linen.Module):
    """A ResNet for images [batch, row, column, channel]."""

    block: Any
    depths: tuple[int, ...]
    classes: int

    @linen.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Compute the logits [batch, classes]."""
        conv = partial(linen.Conv, use_bias=False)
        norm = partial(BatchNorm, use_running_average=not train, momentum=0.9, epsilon=1e-5)
        x = conv(64, (7, 7), strides=2, padding=3, name="conv_init")(x)
        x = linen.relu(norm(name="norm_init")(x))
        x = linen.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        for stage, depth in enumerate(self.depths):
            for index in range(depth):
                stride = 2 if stage > 0 and index == 0 else 1
                x = self.block(64 * 2**stage, stride, conv, norm, name=f"stage{stage}_block{index}")(x)
        return linen.Dense(self.classes, name="head")(x.mean(axis=(1, 2)))


def resnet_pair(
    block: str, depths: tuple[int, int, int, int], pixels: int, classes: int, batch_sizes: tuple[int, ...] | None = None
) -> Pair:
    """Return the pair of torchvision's ResNet and this one.

    Args:
        block: "BasicBlock" or "Bottleneck".
        depths: blocks of each stage.
        pixels: height and width of the images.
        classes: number of logits.
        batch_sizes: the sizes of the batches that both sides compute; None for the harness's own.
    """
    names = {
        "conv1": "conv_init",
        "bn1": "norm_init",
        "layer{stage}.{block}": "stage{stage-1}_block{block}",
        "layer{stage}.{block}.downsample.0": "stage{stage-1}_block{block}/downsample_conv",
        "layer{stage}.{block}.downsample.1": "stage{stage-1}_block{block}/downsample_norm",
        "fc": "head",
    }
    return Pair(
        torchvision_resnet.ResNet(getattr(torchvision_resnet, block), list(depths), num_classes=classes),
        ResNet({"BasicBlock": BasicBlock, "Bottleneck": Bottleneck}[block], depths, classes),
        np.random.default_rng(0).normal(size=(2, 3, pixels, pixels)).astype(np.float32),
        names,
        targets=lambda rng, size: rng.integers(classes, size=size),
        torch_loss=functional.cross_entropy,
        jax_loss=lambda logits, labels: optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(),
        batch_sizes=batch_sizes,
    )

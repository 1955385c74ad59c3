"""The networks in Flax NNX. A module creates its parameters at once and holds them, as in PyTorch."""

from collections.abc import Callable
from functools import partial

import jax
from flax import nnx
from jax import numpy as jnp
from jaxtyping import Array, Float

from jax_cnn.config import HIDDEN, Model, Network
from jax_cnn.model import Apply, Params, conv_relu_pool


class SimpleCNN(nnx.Module):
    """Conv-relu-pool twice and two linear layers: 1,630,090 parameters."""

    def __init__(self, fused: bool = True, *, rngs: nnx.Rngs) -> None:
        self.conv1 = ConvReluPool(1, 32, fused, rngs=rngs)
        self.conv2 = ConvReluPool(32, 64, fused, rngs=rngs)
        self.fc1 = nnx.Linear(7 * 7 * 64, 512, rngs=rngs)
        self.fc2 = nnx.Linear(512, 10, rngs=rngs)

    def __call__(self, images: Float[Array, "batch 28 28 1"]) -> Float[Array, "batch 10"]:
        """Compute the logits."""
        pool1 = self.conv1(images)  # 28 -> 14
        pool2 = self.conv2(pool1)  # 14 -> 7
        flatten = pool2.reshape(len(pool2), -1)  # row, column, channel: PyTorch flattens channels first
        fc1 = self.fc1(flatten)
        relu3 = nnx.relu(fc1)
        return self.fc2(relu3)


class ConvReluPool(nnx.Module):
    """A block: 3x3 convolution with zero padding 1 and a bias, ReLU, and 2x2 max-pool."""

    def __init__(self, channels: int, features: int, fused: bool = True, *, rngs: nnx.Rngs) -> None:
        draw = nnx.initializers.lecun_normal()
        self.kernel = nnx.Param(draw(rngs.params(), (3, 3, channels, features)))
        self.bias = nnx.Param(jnp.zeros(features))
        self.fused = fused

    def __call__(
        self, images: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch height/2 width/2 features"]:
        """Compute the output of the block, with half the height and width."""
        return conv_relu_pool(images, self.kernel[...], self.bias[...], self.fused)


class SoftmaxRegression(nnx.Module):
    """One linear layer: 7,850 parameters."""

    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.fc = nnx.Linear(28 * 28, 10, rngs=rngs)

    def __call__(self, images: Float[Array, "batch 28 28 1"]) -> Float[Array, "batch 10"]:
        """Compute the logits."""
        flatten = images.reshape(len(images), -1)
        return self.fc(flatten)


class FeedForward(nnx.Module):
    """Two linear layers: 407,050 parameters with 512 hidden units."""

    def __init__(self, hidden: int = HIDDEN, *, rngs: nnx.Rngs) -> None:
        self.fc1 = nnx.Linear(28 * 28, hidden, rngs=rngs)
        self.fc2 = nnx.Linear(hidden, 10, rngs=rngs)

    def __call__(self, images: Float[Array, "batch 28 28 1"]) -> Float[Array, "batch 10"]:
        """Compute the logits."""
        flatten = images.reshape(len(images), -1)
        fc1 = self.fc1(flatten)
        relu = nnx.relu(fc1)
        return self.fc2(relu)


def make_module(network: Network, fused: bool) -> SimpleCNN | FeedForward | SoftmaxRegression:
    """Return the module of a network, with Flax's own initial weights."""
    modules: dict[Model, Callable[..., SimpleCNN | FeedForward | SoftmaxRegression]] = {
        "cnn": partial(SimpleCNN, fused),
        "mlp": partial(FeedForward, network.hidden),
        "linear": SoftmaxRegression,
    }
    return modules[network.model](rngs=nnx.Rngs(0))


def make_apply(network: Network, fused: bool) -> Apply:
    """Return a network as a pure function, which puts the parameters into the structure of the module in every call."""
    structure = nnx.graphdef(nnx.eval_shape(partial(make_module, network, fused)))

    def apply(params: Params, images: jax.Array) -> jax.Array:
        return nnx.merge(structure, jax.tree.map(nnx.Param, params))(images)

    return apply

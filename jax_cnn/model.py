"""The networks in Flax Linen: SimpleCNN, and two without convolution to compare it with.

Each takes images [batch, 28, 28, 1] with values in 0 … 1 and returns logits [batch, 10], in the dtype of its weights.
`jax_cnn.dialects` has the same networks in Flax NNX and as plain functions.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax import numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from jax_cnn import ops
from jax_cnn.config import CNN, HIDDEN, Network

Params = dict[str, dict[str, jax.Array]]  # {"conv1": {"kernel": …, "bias": …}, "conv2": …, "fc1": …, "fc2": …}
Apply = Callable[[Params, jax.Array], jax.Array]  # a network: (params, images) -> logits


class SimpleCNN(nn.Module):
    """Conv-relu-pool twice and two linear layers: 1,630,090 parameters."""

    fused: bool = True
    """Compute each conv-relu-pool block as one operation, which is faster. False computes it in three stages."""

    @nn.compact
    def __call__(self, images: Float[Array, "batch 28 28 1"]) -> Float[Array, "batch 10"]:
        """Compute the logits."""
        pool1 = ConvReluPool(32, self.fused, name="conv1")(images)  # 28 -> 14
        pool2 = ConvReluPool(64, self.fused, name="conv2")(pool1)  # 14 -> 7
        flatten = pool2.reshape(len(pool2), -1)  # row, column, channel: PyTorch flattens channels first
        fc1 = nn.Dense(512, name="fc1")(flatten)
        relu3 = nn.relu(fc1)
        return nn.Dense(10, name="fc2")(relu3)


class ConvReluPool(nn.Module):
    """A block: 3x3 convolution with zero padding 1 and a bias, ReLU, and 2x2 max-pool."""

    features: int
    fused: bool = True

    @nn.compact
    def __call__(
        self, images: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch height/2 width/2 features"]:
        """Compute the output of the block, with half the height and width."""
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (3, 3, images.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        return conv_relu_pool(images, kernel, bias, self.fused)


class SoftmaxRegression(nn.Module):
    """One linear layer: 7,850 parameters."""

    @nn.compact
    def __call__(self, images: Float[Array, "batch 28 28 1"]) -> Float[Array, "batch 10"]:
        """Compute the logits."""
        flatten = images.reshape(len(images), -1)
        return nn.Dense(10, name="fc")(flatten)


class FeedForward(nn.Module):
    """Two linear layers: 407,050 parameters with 512 hidden units."""

    hidden: int = HIDDEN

    @nn.compact
    def __call__(self, images: Float[Array, "batch 28 28 1"]) -> Float[Array, "batch 10"]:
        """Compute the logits."""
        flatten = images.reshape(len(images), -1)
        fc1 = nn.Dense(self.hidden, name="fc1")(flatten)
        relu = nn.relu(fc1)
        return nn.Dense(10, name="fc2")(relu)


def conv_relu_pool(
    images: Float[Array, "batch height width channels"],
    kernel: Float[Array, "3 3 channels features"],
    bias: Float[Array, " features"],
    fused: bool,
) -> Float[Array, "batch height/2 width/2 features"]:
    """Compute a block as one operation or in three stages. The values are the same, bit by bit."""
    if fused:
        return ops.conv_bias_relu_pool(images, kernel, bias)
    conv = ops.add_bias(ops.conv3x3(images, kernel), bias)
    relu = jax.nn.relu(conv)
    return ops.max_pool2x2(relu)


def make_module(network: Network = CNN, fused: bool = True) -> nn.Module:
    """Return the Linen module of a network."""
    modules = {"cnn": SimpleCNN(fused), "mlp": FeedForward(network.hidden), "linear": SoftmaxRegression()}
    return modules[network.model]


def make_apply(network: Network = CNN, fused: bool = True) -> Apply:
    """Return a network as a pure function."""
    module = make_module(network, fused)

    def apply(params: Params, images: jax.Array) -> jax.Array:
        logits: jax.Array = module.apply({"params": params}, images)  # type: ignore[assignment]  # nothing mutable
        return logits

    return apply


apply = make_apply()  # SimpleCNN, which the functions of `jax_cnn.train` take unless they are given another network


@partial(jax.jit, static_argnames=("dtype", "network"))
def init_params(key: PRNGKeyArray, dtype: Any = jnp.float32, network: Network = CNN) -> Params:
    """Draw initial weights and biases from PyTorch's default distribution: uniform within 1 / sqrt(fan_in).

    Source: `reset_parameters` of torch.nn.Linear and torch.nn.Conv2d. Flax's own default is another experiment: LeCun
    normal kernels and zero biases. The weights are the same in all dialects.
    """
    shapes = jax.eval_shape(make_module(network).init, key, jnp.zeros((1, 28, 28, 1)))["params"]
    leaves, tree = jax.tree.flatten(shapes)
    ends = np.cumsum([leaf.size for leaf in leaves])
    numbers = jax.random.uniform(key, (int(ends[-1]),), dtype, -1, 1)  # one draw: each compiles for half a second
    parts = jnp.split(numbers, ends[:-1])
    unit = jax.tree.unflatten(tree, [part.reshape(leaf.shape) for part, leaf in zip(parts, leaves, strict=True)])

    def scale(layer: dict[str, jax.Array]) -> dict[str, jax.Array]:
        fan_in = math.prod(layer["kernel"].shape[:-1])
        return {name: value / math.sqrt(fan_in) for name, value in layer.items()}

    return {name: scale(layer) for name, layer in unit.items()}

"""SimpleCNN in Flax Linen, NHWC, as two pure functions: `init_params` and `apply`."""

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

Params = dict[str, dict[str, jax.Array]]
Tap = Callable[[str, jax.Array], jax.Array]


def no_tap(stage: str, value: jax.Array) -> jax.Array:
    """Let every stage's output pass. A tap that records, replaces or perturbs it looks inside the network."""
    del stage
    return value


class Conv3x3(nn.Module):
    """3x3 convolution with stride 1, zero padding 1 and a bias, built on `ops`."""

    features: int
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, images: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch height width features"]:
        """Convolve; the spatial size stays."""
        kernel = self.param(
            "kernel", nn.initializers.lecun_normal(), (3, 3, images.shape[-1], self.features), self.param_dtype
        )
        bias = self.param("bias", nn.initializers.zeros, (self.features,), self.param_dtype)
        return ops.add_bias(ops.conv3x3(images, kernel), bias)


class SimpleCNN(nn.Module):
    """The network of `torch_ref`, with the same names for layers and stages."""

    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, images: Float[Array, "batch 28 28 1"], tap: Tap = no_tap) -> Float[Array, "batch 10"]:
        """Compute the logits; `tap(stage, value)` is called with every stage's output and may replace it."""
        dtype = self.param_dtype
        conv1 = tap("conv1", Conv3x3(32, param_dtype=dtype, name="conv1")(images))
        relu1 = tap("relu1", nn.relu(conv1))
        pool1 = tap("pool1", ops.max_pool2x2(relu1))  # 28 -> 14

        conv2 = tap("conv2", Conv3x3(64, param_dtype=dtype, name="conv2")(pool1))
        relu2 = tap("relu2", nn.relu(conv2))
        pool2 = tap("pool2", ops.max_pool2x2(relu2))  # 14 -> 7

        flatten = tap("flatten", pool2.reshape(len(pool2), -1))  # row, column, channel: torch flattens channels first
        fc1 = tap("fc1", nn.Dense(512, param_dtype=dtype, name="fc1")(flatten))
        relu3 = tap("relu3", nn.relu(fc1))
        return tap("fc2", nn.Dense(10, param_dtype=dtype, name="fc2")(relu3))


@partial(jax.jit, static_argnames="dtype")
def init_params(key: PRNGKeyArray, dtype: Any = jnp.float32) -> Params:
    """Draw initial weights *and* biases from PyTorch's default distribution: uniform within 1 / sqrt(fan_in).

    Source: `reset_parameters` of torch.nn.Linear and torch.nn.Conv2d. Flax's own default, which `SimpleCNN().init`
    draws, is another experiment: LeCun normal, zero biases.

    Args:
        key: from `jax.random.key`.
        dtype: float32 or float64.

    Returns:
        {"conv1": {"kernel", "bias"}, "conv2": …, "fc1": …, "fc2": …}, 1,630,090 numbers.
    """
    shapes = jax.eval_shape(SimpleCNN(dtype).init, key, jnp.zeros((1, 28, 28, 1), dtype))["params"]
    leaves, tree = jax.tree.flatten(shapes)
    ends = np.cumsum([leaf.size for leaf in leaves])
    numbers = jax.random.uniform(key, (int(ends[-1]),), dtype, -1, 1)  # one draw: each compiles for half a second
    parts = jnp.split(numbers, ends[:-1])
    unit = jax.tree.unflatten(tree, [part.reshape(leaf.shape) for part, leaf in zip(parts, leaves, strict=True)])

    def scale(layer: dict[str, jax.Array]) -> dict[str, jax.Array]:
        fan_in = math.prod(layer["kernel"].shape[:-1])
        return {name: value / math.sqrt(fan_in) for name, value in layer.items()}

    return {name: scale(layer) for name, layer in unit.items()}


def apply(params: Params, images: Float[Array, "batch 28 28 1"], tap: Tap = no_tap) -> Float[Array, "batch 10"]:
    """Compute the logits of images with values in 0 … 1, in the dtype of both."""
    logits: jax.Array = SimpleCNN().apply({"params": params}, images, tap)  # type: ignore[assignment]  # no mutable state
    return logits

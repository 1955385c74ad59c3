"""The three networks in three dialects of JAX: Flax Linen, Flax NNX, and plain functions.

All have the parameter tree {"conv1": {"kernel", "bias"}, …}, the stages of `torch_ref.model` and the operations of
`jax_cnn.ops`; only how they are written differs. `jax_cnn.model` is the door to them.
"""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import jax

from jax_cnn import ops

Params = dict[str, dict[str, jax.Array]]
Tap = Callable[[str, jax.Array], jax.Array]


def no_tap(stage: str, value: jax.Array) -> jax.Array:
    """Let every stage's output pass. A tap that records, replaces or perturbs it looks inside the network."""
    del stage
    return value


def conv_bias_relu_pool(images: jax.Array, kernel: jax.Array, bias: jax.Array, tap: Tap, number: int) -> jax.Array:
    """Three stages: a convolution with its bias, ReLU, and a pool that halves height and width.

    Where nobody looks in between they are one operation, which is faster.

    Args:
        images: [batch, height, width, channels].
        kernel: [3, 3, channels, features].
        bias: [features].
        tap: sees the stages conv, relu and pool of this number.
        number: 1 or 2.
    """
    if tap is no_tap:
        return ops.conv_bias_relu_pool(images, kernel, bias)
    conv = tap(f"conv{number}", ops.add_bias(ops.conv3x3(images, kernel), bias))
    relu = tap(f"relu{number}", jax.nn.relu(conv))
    return tap(f"pool{number}", ops.max_pool2x2(relu))


@runtime_checkable
class Apply(Protocol):
    """A network as a pure function."""

    def __call__(self, params: Params, images: jax.Array, tap: Tap = no_tap) -> jax.Array:
        """Compute the logits [batch, 10] of images [batch, 28, 28, 1]; `tap` sees every stage's output."""

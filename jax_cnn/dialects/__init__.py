"""The same networks in three dialects of JAX: Flax Linen (`jax_cnn.model`), Flax NNX, and plain functions.

All have the parameter tree {"conv1": {"kernel", "bias"}, …} and the operations of `jax_cnn.ops`, and give the same
logits and gradients, bit by bit.
"""

from functools import cache

import jax

from jax_cnn.config import CNN, Dialect, Network
from jax_cnn.model import Apply, Params, Tap, make_module, no_tap


@cache  # the same function each time, so that JAX finds what it has compiled for it
def make_apply(network: Network = CNN, dialect: Dialect = "linen", fused: bool = True) -> Apply:
    """Return a network as a pure function: (params, images [batch, 28, 28, 1] in 0 … 1, tap) to logits [batch, 10].

    Args:
        network: SimpleCNN, or one of the two networks without convolution.
        dialect: in which it is written.
        fused: compute SimpleCNN's blocks as one operation each, as training does; else stage by stage.
    """
    if dialect == "plain":
        from jax_cnn.dialects import plain

        return plain.make_apply(network, fused)
    if dialect == "nnx":
        from jax_cnn.dialects import nnx  # loads slowly

        return nnx.make_apply(network, fused)
    module = make_module(network, fused)

    def apply(params: Params, images: jax.Array, tap: Tap = no_tap) -> jax.Array:
        logits: jax.Array = module.apply({"params": params}, images, tap)  # type: ignore[assignment]  # nothing mutable
        return logits

    return apply

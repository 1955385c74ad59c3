"""The same networks in three dialects of JAX: Flax Linen (`jax_cnn.model`), Flax NNX, and plain functions.

All have the parameter tree {"conv1": {"kernel", "bias"}, …} and the operations of `jax_cnn.ops`, and give the same
logits and gradients, bit by bit.
"""

from functools import cache

from jax_cnn import model
from jax_cnn.config import CNN, Dialect, Network
from jax_cnn.model import Apply


@cache  # the same function each time, so that JAX finds what it has compiled for it
def make_apply(network: Network = CNN, dialect: Dialect = "linen", fused: bool = True) -> Apply:
    """Return a network as a pure function: (params, images [batch, 28, 28, 1] in 0 … 1) to logits [batch, 10].

    `fused` computes each of SimpleCNN's blocks as one operation, as training does, and not in three stages.
    """
    if dialect == "plain":
        from jax_cnn.dialects import plain

        return plain.make_apply(network, fused)
    if dialect == "nnx":
        from jax_cnn.dialects import nnx  # loads slowly

        return nnx.make_apply(network, fused)
    return model.make_apply(network, fused)

"""The three networks in three dialects of JAX: Flax Linen, Flax NNX, and plain functions.

All have the parameter tree {"conv1": {"kernel", "bias"}, …}, the stages of `torch_ref.model` and the operations of
`jax_cnn.ops`; only how they are written differs. `jax_cnn.model` is the door to them.
"""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import jax

Params = dict[str, dict[str, jax.Array]]
Tap = Callable[[str, jax.Array], jax.Array]


def no_tap(stage: str, value: jax.Array) -> jax.Array:
    """Let every stage's output pass. A tap that records, replaces or perturbs it looks inside the network."""
    del stage
    return value


@runtime_checkable
class Apply(Protocol):
    """A network as a pure function."""

    def __call__(self, params: Params, images: jax.Array, tap: Tap = no_tap) -> jax.Array:
        """Compute the logits [batch, 10] of images [batch, 28, 28, 1]; `tap` sees every stage's output."""

"""The door to the networks: `init_params`, and `network` or `apply`, in whichever dialect they are written."""

import importlib
import math
from functools import cache, partial
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp
from jaxtyping import PRNGKeyArray

from jax_cnn.config import HIDDEN, Dialect, Model
from jax_cnn.dialects import Apply, Params, Tap, linen, no_tap

__all__ = ["Apply", "Params", "Tap", "apply", "init_params", "network", "no_tap"]


@partial(jax.jit, static_argnames=("dtype", "model", "hidden"))
def init_params(key: PRNGKeyArray, dtype: Any = jnp.float32, model: Model = "cnn", hidden: int = HIDDEN) -> Params:
    """Draw initial weights *and* biases from PyTorch's default distribution: uniform within 1 / sqrt(fan_in).

    Source: `reset_parameters` of torch.nn.Linear and torch.nn.Conv2d. Flax's own default, which a module's `init`
    draws, is another experiment: LeCun normal, zero biases.

    Args:
        key: from `jax.random.key`.
        dtype: float32 or float64.
        model: whose; all dialects share them.
        hidden: width of the mlp's hidden layer.

    Returns:
        {"conv1": {"kernel", "bias"}, "conv2": …, "fc1": …, "fc2": …}, of the cnn: 1,630,090 numbers.
    """
    shapes = jax.eval_shape(linen.make_module(model, hidden).init, key, jnp.zeros((1, 28, 28, 1)))["params"]
    leaves, tree = jax.tree.flatten(shapes)
    ends = np.cumsum([leaf.size for leaf in leaves])
    numbers = jax.random.uniform(key, (int(ends[-1]),), dtype, -1, 1)  # one draw: each compiles for half a second
    parts = jnp.split(numbers, ends[:-1])
    unit = jax.tree.unflatten(tree, [part.reshape(leaf.shape) for part, leaf in zip(parts, leaves, strict=True)])

    def scale(layer: dict[str, jax.Array]) -> dict[str, jax.Array]:
        fan_in = math.prod(layer["kernel"].shape[:-1])
        return {name: value / math.sqrt(fan_in) for name, value in layer.items()}

    return {name: scale(layer) for name, layer in unit.items()}


@cache  # the same function each time, so that JAX finds what it has compiled for it
def network(model: Model = "cnn", dialect: Dialect = "linen", hidden: int = HIDDEN) -> Apply:
    """A network as a pure function: (params, images [batch, 28, 28, 1] in 0 … 1, tap) to logits [batch, 10].

    It computes in the dtype of both. All dialects give the same logits and gradients, bit by bit.

    Args:
        model: linear (softmax regression), mlp (feed-forward, one hidden layer) or cnn (SimpleCNN).
        dialect: in which it is written.
        hidden: width of the mlp's hidden layer.
    """
    written = importlib.import_module(f"jax_cnn.dialects.{dialect}")  # NNX, which loads slowly, only if asked for
    found: Apply = written.network(model, hidden)
    return found


apply = network()  # SimpleCNN, as Linen has it

"""Faults in norms: their eps, and what batch norm does in training."""

from typing import Any

import jax
from flax import linen, nnx
from jax import lax
from jax import numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from torch import nn

from experiments.large_ports import BatchNorm
from parity_tests.harness.pair import Pair
from parity_tests.parity.ports.registry import linear, nested, network, port, values


@port("P3", ("outputs", "output of norm"))
def epsilon(sound: bool) -> Pair:
    """Flax's LayerNorm has eps 1e-6 where PyTorch's has 1e-5 (ml-explore/mlx-examples#1434)."""

    class Net(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.fc = nnx.Linear(6, 12, rngs=rngs)
            self.norm = nnx.LayerNorm(12, epsilon=1e-5 if sound else 1e-6, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.norm(self.fc(x))

    return Pair(network(fc=nn.Linear(6, 12), norm=nn.LayerNorm(12)), Net(nnx.Rngs(0)), values(2, 6))


@port("P3-positional", ("outputs", "output of norm"))
def first_field(sound: bool) -> Pair:
    """The first field of Flax's LayerNorm is eps, that of PyTorch's the number of features (google/flax#2195)."""

    class Net(linen.Module):
        @linen.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            x = linen.Dense(12, name="fc")(x)
            return linen.LayerNorm(1e-5 if sound else 12, name="norm")(x)

    return Pair(network(fc=nn.Linear(6, 12), norm=nn.LayerNorm(12)), Net(), values(2, 6))


@port("P4", ("outputs", "output of norm"))
def epsilon_of_dtype(sound: bool) -> Pair:
    """RMSNorm's default eps is that of the dtype, so that float64 does not judge it (goodfire-ai/spd#625)."""

    def net(variables: Any, x: jax.Array) -> jax.Array:
        x = linear(variables["fc"], x)
        eps = 1.1920929e-07 if sound else 1e-5
        x = x * lax.rsqrt(jnp.square(x).mean(axis=-1, keepdims=True) + eps) * variables["norm"]["weight"]
        return linear(variables["out"], checkpoint_name(x, "norm"))

    return Pair(network(fc=nn.Linear(5, 6), norm=nn.RMSNorm(6), out=nn.Linear(6, 3)), net, values(2, 5), nested)


class NnxBatchNorm(nnx.BatchNorm):
    """NNX's batch norm with PyTorch's running variance, which is that of the unbiased estimate."""

    def __call__(self, x: jax.Array, use_running_average: bool | None = None) -> jax.Array:  # type: ignore[override]
        """Normalise x over all axes but the last."""
        before = self.var[...]
        y = super().__call__(x, use_running_average=use_running_average)
        if not (self.use_running_average if use_running_average is None else use_running_average):
            count = x.size // x.shape[-1]
            share = self.var[...] - self.momentum * before
            self.var[...] = self.momentum * before + share * count / (count - 1)
        return y


@port("P8", ("statistics", "norm.running_mean"))
def momentum(sound: bool) -> Pair:
    """PyTorch's momentum is the share of the new, Flax's that of the old (scvi-tools#2309)."""

    class Net(linen.Module):
        @linen.compact
        def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
            x = linen.Conv(4, (3, 3), padding=1, name="conv")(x)
            x = BatchNorm(momentum=0.9 if sound else 0.1, name="norm")(x, use_running_average=not train)
            return linen.relu(x)

    module = network(conv=nn.Conv2d(3, 4, 3, padding=1), norm=nn.BatchNorm2d(4), relu=nn.ReLU())
    return Pair(module, Net(), values(2, 3, 6, 6))


@port("P9", ("outputs", "output of norm"))
def running_statistics(sound: bool) -> Pair:
    """A batch norm that normalises by its running statistics in training (equinox#659, #948)."""

    class Net(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.fc = nnx.Linear(5, 4, rngs=rngs)
            self.norm = NnxBatchNorm(4, momentum=0.9, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.norm(self.fc(x), use_running_average=None if sound else True)

    return Pair(network(fc=nn.Linear(5, 4), norm=nn.BatchNorm1d(4)), Net(nnx.Rngs(0)), values(4, 5))


@port("P10", ("statistics", "norm.running_var"))
def biased_variance(sound: bool) -> Pair:
    """Flax keeps the biased variance of a batch, PyTorch the unbiased one (pytorch#1410)."""

    class Net(linen.Module):
        @linen.compact
        def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
            norm = BatchNorm if sound else linen.BatchNorm
            return norm(momentum=0.9, name="norm")(linen.Dense(4, name="fc")(x), use_running_average=not train)

    return Pair(network(fc=nn.Linear(5, 4), norm=nn.BatchNorm1d(4)), Net(), values(4, 5))

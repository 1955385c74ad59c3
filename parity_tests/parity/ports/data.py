"""Faults outside of the network: losses, labels, initial weights, and how the weights were loaded."""

from collections.abc import Iterator
from typing import Any

import haiku as hk
import jax
import numpy as np
import optax
import torch
from flax import linen
from jax import numpy as jnp
from jax.nn import initializers
from torch import nn
from torch.nn import functional

from parity_tests.harness.pair import Batch, Pair
from parity_tests.parity.ports.registry import linear, nested, network, port, tokens, values

IGNORED = -100  # the label of positions that are padding


@port("P15", ("loss", "batch of 8"), ("loss", "batch of 5"))
def divided_by_all_positions(sound: bool) -> Pair:
    """A loss per token is divided by the padded positions as well (algorithmic-efficiency#314, #318)."""

    def labels(rng: np.random.Generator, size: int) -> np.ndarray:
        lengths = np.resize([6, 3, 1, 0], size)
        return np.where(np.arange(6) < lengths[:, None], rng.integers(11, size=(size, 6)), IGNORED)

    def torch_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)

    def jax_loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
        valid = labels != IGNORED
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.where(valid, labels, 0))
        return (losses * valid).sum() / (valid.sum() if sound else valid.size)

    return Pair(
        network(embed=nn.Embedding(11, 6), head=nn.Linear(6, 11)),
        hk.transform(lambda ids: hk.Linear(11, name="head")(hk.Embed(11, 6, name="embed")(ids))),
        tokens(2, 6, 11),
        targets=labels,
        torch_loss=torch_loss,
        jax_loss=jax_loss,
    )


@port("P20")
def eight_significant_bits(sound: bool) -> Pair:
    """A reference that was loaded in bfloat16 computes the same as its port (maxtext#4310)."""

    def net(variables: Any, x: jax.Array) -> jax.Array:
        return linear(variables["fc2"], jnp.tanh(linear(variables["fc1"], x)))

    module = network(fc1=nn.Linear(5, 6), tanh=nn.Tanh(), fc2=nn.Linear(6, 3)).bfloat16().float()
    return Pair(module, net, values(2, 5), nested)


@port("P21", ("data", "batch 0"))
def relabelled(sound: bool) -> Pair:
    """The classes of one pipeline are a permutation of the other's (dualprompt-pytorch#3)."""

    def net(variables: Any, x: jax.Array) -> jax.Array:
        return linear(variables["fc"], x)

    def batches(relabel: np.ndarray, seed: int, epoch: int) -> Iterator[Batch]:
        rng = np.random.default_rng((seed, epoch))
        for _ in range(3):
            yield Batch(rng.normal(size=(8, 5)).astype(np.float32), relabel[rng.integers(4, size=8)])

    def mean_cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    order = np.arange(4)
    return Pair(
        network(fc=nn.Linear(5, 4)),
        net,
        values(2, 5),
        nested,
        targets=lambda rng, size: rng.integers(4, size=size),
        torch_loss=functional.cross_entropy,
        jax_loss=mean_cross_entropy,
        torch_batches=lambda seed, epoch: batches(order, seed, epoch),
        jax_batches=lambda seed, epoch: batches(order if sound else order[[2, 0, 3, 1]], seed, epoch),
    )


@port("P22", ("initialisation", "fc1.weight"), ("initialisation", "fc2.weight"), ("initialisation", "norm.weight"))
def initial_weights(sound: bool) -> Pair:
    """A truncated normal of the same variance, and a last scale that starts at 1 (algorithmic-efficiency#189, #819)."""

    def module() -> nn.Module:
        fc1, fc2, norm = nn.Linear(16, 32), nn.Linear(32, 8), nn.LayerNorm(8)
        for layer in (fc1, fc2):
            nn.init.normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        nn.init.zeros_(norm.weight)
        return network(fc1=fc1, relu=nn.ReLU(), fc2=fc2, norm=norm)

    kernel = initializers.normal(0.02) if sound else initializers.truncated_normal(0.02 / 0.87962566103423978)

    class Net(linen.Module):
        @linen.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            x = linen.relu(linen.Dense(32, kernel_init=kernel, name="fc1")(x))
            x = linen.Dense(8, kernel_init=kernel, name="fc2")(x)
            scale = initializers.zeros if sound else initializers.ones
            return linen.LayerNorm(epsilon=1e-5, scale_init=scale, name="norm")(x)

    return Pair(module, Net(), values(2, 16), jax_init="model")

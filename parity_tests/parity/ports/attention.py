"""Faults in networks of tokens: attention, norms of embeddings, and tied weights."""

import math

import haiku as hk
import jax
import torch
from flax import linen
from jax import lax
from jax import numpy as jnp
from torch import nn

from parity_tests.harness.pair import Pair
from parity_tests.parity.ports.registry import network, port, tokens, values


class RMSNorm(nn.Module):
    """A norm whose scale is stored as its distance from 1, as in Gemma."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise the last axis."""
        normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
        return (normed * (1 + self.weight)).type_as(x)


@port("P6")
def cast_before_the_product(sound: bool) -> Pair:
    """Where the norm is cast down shows in bfloat16 alone (huggingface/transformers#29402, keras-hub#1508)."""

    class Norm(hk.Module):
        def __call__(self, x: jax.Array) -> jax.Array:
            scale = hk.get_parameter("scale", x.shape[-1:], init=jnp.zeros)
            normed = x * lax.rsqrt(jnp.square(x).mean(axis=-1, keepdims=True) + 1e-6)
            return normed.astype(x.dtype) * (1 + scale)

    net = hk.transform(lambda ids: Norm(name="norm")(hk.Embed(11, 6, name="embed")(ids)))
    return Pair(network(embed=nn.Embedding(11, 6), norm=RMSNorm(6)), net, tokens(2, 5, 11))


class Tied(nn.Module):
    """A language model whose last layer is its first."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.fc, self.head = nn.Embedding(11, 6), nn.Linear(6, 6), nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Compute logits [batch, time, 11] of token ids [batch, time]."""
        return self.head(torch.tanh(self.fc(self.embed(ids))))


@port("P18", ("gradients", "gradient by embed.weight"))
def untied(sound: bool) -> Pair:
    """Two leaves that start equal are trained apart where PyTorch has one (google/flax#1263, torchax#75)."""

    class Net(linen.Module):
        @linen.compact
        def __call__(self, ids: jax.Array) -> jax.Array:
            embed = linen.Embed(11, 6, name="embed")
            hidden = jnp.tanh(linen.Dense(6, name="fc")(embed(ids)))
            return embed.attend(hidden) if sound else linen.Dense(11, use_bias=False, name="head")(hidden)

    return Pair(Tied(), Net(), tokens(2, 5, 11))


class Scores(nn.Module):
    """The scores of attention."""

    def forward(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """Compute [batch, time, time] from two arrays [batch, time, feature]."""
        return query @ key.transpose(1, 2) / math.sqrt(query.shape[-1])


class Attention(nn.Module):
    """Attention with one head."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = nn.Linear(6, 4), nn.Linear(6, 4), nn.Linear(6, 4)
        self.scores = Scores()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute [batch, time, 4] from [batch, time, 6]."""
        scores = self.scores(self.query(x), self.key(x))
        return torch.softmax(scores, dim=-1) @ self.value(x)


@port("P23-attention", ("outputs", "output of attn.scores"))
def unscaled_attention(sound: bool) -> Pair:
    """Attention without the root of the number of features (esmjax#7)."""

    class JaxScores(hk.Module):
        def __call__(self, query: jax.Array, key: jax.Array) -> jax.Array:
            return jnp.einsum("bqd,bkd->bqk", query, key) / (math.sqrt(query.shape[-1]) if sound else 1)

    class JaxAttention(hk.Module):
        def __call__(self, x: jax.Array) -> jax.Array:
            query, key, value = (hk.Linear(4, name=name)(x) for name in ("query", "key", "value"))
            return jax.nn.softmax(JaxScores(name="scores")(query, key)) @ value

    net = hk.transform(lambda x: hk.Linear(3, name="out")(JaxAttention(name="attn")(x)))
    return Pair(network(attn=Attention(), out=nn.Linear(4, 3)), net, values(2, 5, 6))

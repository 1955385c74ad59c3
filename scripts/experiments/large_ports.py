"""Large networks that the harness is measured on, with their ports to Flax Linen: torchvision's ResNets, and GPT-2.

GPT-2 is written here in PyTorch too, with Hugging Face's names.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
import torch
from flax import linen
from jax import numpy as jnp
from jax.nn import initializers
from torch import nn
from torch.nn import functional
from torchvision.models import resnet as torchvision_resnet

from parity_tests.harness.pair import Pair


def jax_cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Return the mean cross-entropy, as PyTorch's `cross_entropy` does."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


# ResNet


class BatchNorm(linen.BatchNorm):
    """Flax's batch norm with PyTorch's running variance, which is that of the unbiased estimate."""

    def __call__(self, x: jax.Array, use_running_average: bool | None = None) -> jax.Array:  # type: ignore[override]
        """Normalise x over all axes but the last."""
        before: jax.Array | None = self.get_variable("batch_stats", "var")
        y = super().__call__(x, use_running_average=use_running_average)
        if before is not None and not (self.use_running_average or use_running_average):
            count = x.size // x.shape[-1]
            share = self.get_variable("batch_stats", "var") - self.momentum * before
            self.put_variable("batch_stats", "var", self.momentum * before + share * count / (count - 1))
        return y


class BasicBlock(linen.Module):
    """Two 3x3 convolutions beside a shortcut."""

    width: int
    stride: int
    conv: Any
    norm: Any

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Compute [batch, row, column, width]."""
        y = self.conv(self.width, (3, 3), strides=self.stride, padding=1)(x)
        y = linen.relu(self.norm()(y))
        y = self.norm()(self.conv(self.width, (3, 3), padding=1)(y))
        if x.shape != y.shape:
            x = self.conv(self.width, (1, 1), strides=self.stride, name="downsample_conv")(x)
            x = self.norm(name="downsample_norm")(x)
        return linen.relu(y + x)


class Bottleneck(linen.Module):
    """A 3x3 convolution between two of 1x1, beside a shortcut."""

    width: int
    stride: int
    conv: Any
    norm: Any

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Compute [batch, row, column, 4 · width]."""
        y = linen.relu(self.norm()(self.conv(self.width, (1, 1))(x)))
        y = self.conv(self.width, (3, 3), strides=self.stride, padding=1)(y)
        y = linen.relu(self.norm()(y))
        y = self.norm()(self.conv(4 * self.width, (1, 1))(y))
        if x.shape != y.shape:
            x = self.conv(4 * self.width, (1, 1), strides=self.stride, name="downsample_conv")(x)
            x = self.norm(name="downsample_norm")(x)
        return linen.relu(y + x)


class ResNet(linen.Module):
    """A ResNet for images [batch, row, column, channel]."""

    block: Any
    depths: tuple[int, ...]
    classes: int

    @linen.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Compute the logits [batch, classes]."""
        conv = partial(linen.Conv, use_bias=False)
        norm = partial(BatchNorm, use_running_average=not train, momentum=0.9, epsilon=1e-5)
        x = conv(64, (7, 7), strides=2, padding=3, name="conv_init")(x)
        x = linen.relu(norm(name="norm_init")(x))
        x = linen.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        for stage, depth in enumerate(self.depths):
            for index in range(depth):
                stride = 2 if stage > 0 and index == 0 else 1
                x = self.block(64 * 2**stage, stride, conv, norm, name=f"stage{stage}_block{index}")(x)
        return linen.Dense(self.classes, name="head")(x.mean(axis=(1, 2)))


def resnet_pair(
    block: str, depths: tuple[int, int, int, int], pixels: int, classes: int, batch_sizes: tuple[int, ...] | None = None
) -> Pair:
    """Return the pair of torchvision's ResNet and this one.

    `block` is BasicBlock or Bottleneck, and `depths` gives the number of blocks of each stage.
    """
    names = {
        "conv1": "conv_init",
        "bn1": "norm_init",
        "layer{stage}.{block}": "stage{stage-1}_block{block}",
        "layer{stage}.{block}.downsample.0": "stage{stage-1}_block{block}/downsample_conv",
        "layer{stage}.{block}.downsample.1": "stage{stage-1}_block{block}/downsample_norm",
        "fc": "head",
    }
    return Pair(
        torchvision_resnet.ResNet(getattr(torchvision_resnet, block), list(depths), num_classes=classes),
        ResNet({"BasicBlock": BasicBlock, "Bottleneck": Bottleneck}[block], depths, classes),
        np.random.default_rng(0).normal(size=(2, 3, pixels, pixels)).astype(np.float32),
        names,
        targets=lambda rng, size: rng.integers(classes, size=size),
        torch_loss=functional.cross_entropy,
        jax_loss=jax_cross_entropy,
        batch_sizes=batch_sizes,
    )


# GPT-2


class Sizes(NamedTuple):
    """The sizes of a GPT-2; the defaults are those of the smallest one that was published, with 124 million weights."""

    layers: int = 12
    heads: int = 12
    features: int = 768
    vocabulary: int = 50257
    positions: int = 1024


class Conv1D(nn.Module):
    """A linear layer whose weight is stored [inputs, outputs], as in Hugging Face's GPT-2."""

    def __init__(self, outputs: int, inputs: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(inputs, outputs)), nn.Parameter(torch.zeros(outputs))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute [batch, time, outputs] from [batch, time, inputs]."""
        return x @ self.weight + self.bias


class NewGELU(nn.Module):
    """The tanh approximation of the GELU."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the activation of each value."""
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


class Attention(nn.Module):
    """Causal attention with several heads."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.heads = sizes.heads
        self.c_attn = Conv1D(3 * sizes.features, sizes.features)
        self.c_proj = Conv1D(sizes.features, sizes.features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute [batch, time, feature] from the same."""
        batch, time, features = x.shape
        query, key, value = (
            part.view(batch, time, self.heads, features // self.heads).transpose(1, 2)
            for part in self.c_attn(x).split(features, dim=2)
        )
        scores = query @ key.transpose(2, 3) / math.sqrt(features // self.heads)
        future = torch.ones(time, time, dtype=torch.bool).triu(1)
        weights = torch.softmax(scores.masked_fill(future, torch.finfo(scores.dtype).min), dim=-1)
        return self.c_proj((weights @ value).transpose(1, 2).reshape(batch, time, features))


class MLP(nn.Module):
    """The two layers behind the attention of a block."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.c_fc = Conv1D(4 * sizes.features, sizes.features)
        self.act = NewGELU()
        self.c_proj = Conv1D(sizes.features, 4 * sizes.features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute [batch, time, feature] from the same."""
        return self.c_proj(self.act(self.c_fc(x)))


class Block(nn.Module):
    """Attention and MLP, each behind a norm and beside a shortcut."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(sizes.features), Attention(sizes)
        self.ln_2, self.mlp = nn.LayerNorm(sizes.features), MLP(sizes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute [batch, time, feature] from the same."""
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """The network without its last layer."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.wte = nn.Embedding(sizes.vocabulary, sizes.features)
        self.wpe = nn.Embedding(sizes.positions, sizes.features)
        self.h = nn.ModuleList([Block(sizes) for _ in range(sizes.layers)])
        self.ln_f = nn.LayerNorm(sizes.features)
        for embedding in (self.wte, self.wpe):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Compute [batch, time, feature] from token ids [batch, time]."""
        x = self.wte(ids) + self.wpe(torch.arange(ids.shape[1]))
        for block in self.h:
            x = block(x)
        return self.ln_f(x)


class GPT2(nn.Module):
    """GPT-2; its last layer is its first, the embedding of the tokens."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.transformer = Transformer(sizes)
        self.lm_head = nn.Linear(sizes.features, sizes.vocabulary, bias=False)
        self.lm_head.weight = self.transformer.wte.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Compute the logits [batch, time, vocabulary] of token ids [batch, time]."""
        return self.lm_head(self.transformer(ids))


class FlaxBlock(linen.Module):
    """Attention and MLP, each behind a norm and beside a shortcut."""

    sizes: Sizes

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Compute [batch, time, feature] from the same."""
        batch, time, features = x.shape
        kernel = initializers.normal(0.02)
        y = linen.LayerNorm(epsilon=1e-5, name="ln_1")(x)
        qkv = linen.Dense(3 * features, kernel_init=kernel, name="attn_qkv")(y)
        shape = batch, time, self.sizes.heads, features // self.sizes.heads
        query, key, value = (part.reshape(shape) for part in jnp.split(qkv, 3, axis=-1))
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) / math.sqrt(shape[-1])
        mask = jnp.tril(jnp.ones((time, time), bool))
        weights = linen.softmax(jnp.where(mask, scores, jnp.finfo(scores.dtype).min))
        y = jnp.einsum("bhqk,bkhd->bqhd", weights, value).reshape(batch, time, features)
        x = x + linen.Dense(features, kernel_init=kernel, name="attn_out")(y)
        y = linen.LayerNorm(epsilon=1e-5, name="ln_2")(x)
        y = linen.gelu(linen.Dense(4 * features, kernel_init=kernel, name="mlp_in")(y))
        return x + linen.Dense(features, kernel_init=kernel, name="mlp_out")(y)


class FlaxGPT2(linen.Module):
    """GPT-2 in Flax; `attend` makes the embedding of the tokens its last layer as well."""

    sizes: Sizes

    @linen.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        """Compute the logits [batch, time, vocabulary] of token ids [batch, time]."""
        initial = initializers.normal(0.02)
        wte = linen.Embed(self.sizes.vocabulary, self.sizes.features, embedding_init=initial, name="wte")
        wpe = linen.Embed(self.sizes.positions, self.sizes.features, embedding_init=initial, name="wpe")
        x = wte(ids) + wpe(jnp.arange(ids.shape[1]))
        for index in range(self.sizes.layers):
            x = FlaxBlock(self.sizes, name=f"block_{index}")(x)
        return wte.attend(linen.LayerNorm(epsilon=1e-5, name="ln_f")(x))


def gpt2_pair(sizes: Sizes, length: int, batch_sizes: tuple[int, ...] | None = None) -> Pair:
    """Return the pair of both, with texts of `length` tokens."""
    names = {
        "transformer.wte": "wte",
        "transformer.wpe": "wpe",
        "transformer.ln_f": "ln_f",
        "transformer.h.{i}": "block_{i}",
        "transformer.h.{i}.attn.c_attn": "block_{i}/attn_qkv",
        "transformer.h.{i}.attn.c_proj": "block_{i}/attn_out",
        "transformer.h.{i}.mlp.c_fc": "block_{i}/mlp_in",
        "transformer.h.{i}.mlp.c_proj": "block_{i}/mlp_out",
    }
    return Pair(
        GPT2(sizes),
        FlaxGPT2(sizes),
        np.random.default_rng(0).integers(sizes.vocabulary, size=(2, length)),
        names,
        targets=lambda rng, size: rng.integers(sizes.vocabulary, size=(size, length)),
        torch_loss=lambda logits, labels: functional.cross_entropy(logits.flatten(0, 1), labels.flatten()),
        jax_loss=jax_cross_entropy,
        batch_sizes=batch_sizes,
    )

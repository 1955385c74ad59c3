"""Three sound pairs of another kind each, to plant faults in: convolutional, recurrent, and with attention.

Both sides draw their initial weights from the same distributions, and train with dropout.
"""

import math
from functools import partial

import jax
import optax
import torch
from flax import linen, nnx
from jax import numpy as jnp
from jax.nn import initializers
from torch import nn
from torch.nn import functional

from experiments.large_ports import BatchNorm
from parity_tests.harness.pair import Pair
from parity_tests.parity.ports.registry import network, tokens, values

CLASSES = 5
VOCABULARY, LENGTH = 13, 6
FEATURES, HEADS = 8, 2
KERNEL = initializers.normal(0.1)


def draw_weights(module: nn.Module) -> nn.Module:
    """Draw all weights but those of norms from a normal distribution, and set biases to 0."""
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.1)
        elif "bias" in name:
            nn.init.zeros_(parameter)
    return module


def torch_mean_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Compute the mean cross-entropy of logits [..., class] and labels [...]."""
    return functional.cross_entropy(logits.flatten(0, -2), labels.flatten())


def jax_mean_loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Compute the mean cross-entropy of logits [..., class] and labels [...]."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


class TorchResidual(nn.Module):
    """A residual block that halves the image."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False)
        self.norm1, self.relu = nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
        self.conv2, self.norm2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute [batch, outputs, row, column] from images [batch, inputs, row, column]."""
        out = self.relu(self.norm1(self.conv1(x)))
        out = self.norm2(self.conv2(out))
        out += self.shortcut(x)
        return self.relu(out)


class LinenResidual(linen.Module):
    """The same with the channels last."""

    outputs: int

    @linen.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Compute [batch, row, column, outputs] from images [batch, row, column, inputs]."""
        conv = partial(linen.Conv, self.outputs, padding=1, use_bias=False, kernel_init=KERNEL)
        norm = partial(BatchNorm, use_running_average=not train, momentum=0.9)
        out = linen.relu(norm(name="norm1")(conv(kernel_size=(3, 3), strides=2, name="conv1")(x)))
        out = norm(name="norm2")(conv(kernel_size=(3, 3), name="conv2")(out))
        return linen.relu(out + linen.Conv(self.outputs, (1, 1), strides=2, kernel_init=KERNEL, name="shortcut")(x))


class LinenConvolutional(linen.Module):
    """A convolution, a max-pool, a residual block and a linear layer."""

    @linen.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Compute the logits [batch, class] of images [batch, row, column, 3]."""
        x = linen.Conv(4, (3, 3), padding=1, use_bias=False, kernel_init=KERNEL, name="conv")(x)
        x = linen.relu(BatchNorm(use_running_average=not train, momentum=0.9, name="norm")(x))
        x = linen.max_pool(x, (2, 2), strides=(2, 2))
        x = LinenResidual(6, name="block")(x, train)
        x = linen.Dropout(0.2, deterministic=not train)(x.reshape(len(x), -1))
        return linen.Dense(CLASSES, kernel_init=KERNEL, name="head")(x)


def convolutional() -> Pair:
    """Return a network for images with batch norm, a residual block and a flatten, in PyTorch and in Linen."""

    def module() -> nn.Module:
        return draw_weights(
            network(
                conv=nn.Conv2d(3, 4, 3, padding=1, bias=False),
                norm=nn.BatchNorm2d(4),
                relu=nn.ReLU(inplace=True),
                pool=nn.MaxPool2d(2),
                block=TorchResidual(4, 6),
                flatten=nn.Flatten(),
                dropout=nn.Dropout(0.2),
                head=nn.Linear(6 * 2 * 2, CLASSES),
            )
        )

    return Pair(
        module,
        LinenConvolutional(),
        values(2, 3, 8, 8),
        targets=lambda rng, size: rng.integers(CLASSES, size=size),
        torch_loss=torch_mean_loss,
        jax_loss=jax_mean_loss,
        jax_init="model",
        name="convolutional",
    )


class TorchRecurrent(nn.Module):
    """An embedding, an LSTM and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, FEATURES)
        self.lstm = nn.LSTM(FEATURES, FEATURES, batch_first=True)
        self.norm = nn.LayerNorm(FEATURES)
        self.head = nn.Linear(FEATURES, VOCABULARY)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Compute logits [batch, time, token] of token ids [batch, time]."""
        states, _ = self.lstm(self.embed(ids))
        return self.head(self.norm(states))


class LinenRecurrent(linen.Module):
    """The same in Linen."""

    @linen.compact
    def __call__(self, ids: jax.Array) -> jax.Array:
        """Compute logits [batch, time, token] of token ids [batch, time]."""
        x = linen.Embed(VOCABULARY, FEATURES, embedding_init=KERNEL, name="embed")(ids)
        cell = linen.OptimizedLSTMCell(FEATURES, kernel_init=KERNEL, recurrent_kernel_init=KERNEL, name="lstm")
        zeros = jnp.zeros((len(ids), FEATURES), x.dtype)
        states = linen.RNN(cell)(x, initial_carry=(zeros, zeros))
        states = linen.LayerNorm(epsilon=1e-5, name="norm")(states)
        return linen.Dense(VOCABULARY, kernel_init=KERNEL, name="head")(states)


def recurrent() -> Pair:
    """Return a language model with an LSTM, in PyTorch and in Linen."""
    return Pair(
        lambda: draw_weights(TorchRecurrent()),
        LinenRecurrent(),
        tokens(2, LENGTH, VOCABULARY),
        targets=lambda rng, size: rng.integers(VOCABULARY, size=(size, LENGTH)),
        torch_loss=torch_mean_loss,
        jax_loss=jax_mean_loss,
        jax_init="model",
        name="recurrent",
    )


class TorchAttention(nn.Module):
    """Causal attention with several heads."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(FEATURES, 3 * FEATURES), nn.Linear(FEATURES, FEATURES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute [batch, time, feature] from the same."""
        batch, time, _ = x.shape
        query, key, value = self.qkv(x).view(batch, time, 3, HEADS, -1).unbind(2)
        scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / math.sqrt(FEATURES // HEADS)
        future = torch.ones(time, time, dtype=torch.bool).triu(1)
        weights = torch.softmax(scores.masked_fill(future, -torch.inf), dim=-1)
        return self.out(torch.einsum("bhqk,bkhd->bqhd", weights, value).reshape(batch, time, FEATURES))


class TorchBlock(nn.Module):
    """Attention and two linear layers, each behind a norm and beside a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2 = nn.LayerNorm(FEATURES), TorchAttention(), nn.LayerNorm(FEATURES)
        self.fc1, self.fc2 = nn.Linear(FEATURES, 2 * FEATURES), nn.Linear(2 * FEATURES, FEATURES)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute [batch, time, feature] from the same."""
        x = x + self.attn(self.norm1(x))
        return x + self.dropout(self.fc2(functional.gelu(self.fc1(self.norm2(x)))))


class TorchLanguageModel(nn.Module):
    """A language model with attention; its last layer is its first."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.position = nn.Embedding(VOCABULARY, FEATURES), nn.Embedding(LENGTH, FEATURES)
        self.blocks, self.norm = nn.ModuleList([TorchBlock(), TorchBlock()]), nn.LayerNorm(FEATURES)
        self.head = nn.Linear(FEATURES, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Compute logits [batch, time, token] of token ids [batch, time]."""
        x = self.embed(ids) + self.position(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class NnxAttention(nnx.Module):
    """Causal attention with several heads."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.qkv = nnx.Linear(FEATURES, 3 * FEATURES, kernel_init=KERNEL, rngs=rngs)
        self.out = nnx.Linear(FEATURES, FEATURES, kernel_init=KERNEL, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Compute [batch, time, feature] from the same."""
        batch, time, _ = x.shape
        query, key, value = jnp.moveaxis(self.qkv(x).reshape(batch, time, 3, HEADS, -1), 2, 0)
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) / math.sqrt(FEATURES // HEADS)
        past = jnp.tril(jnp.ones((time, time), bool))
        weights = nnx.softmax(jnp.where(past, scores, -jnp.inf))
        return self.out(jnp.einsum("bhqk,bkhd->bqhd", weights, value).reshape(batch, time, FEATURES))


class NnxBlock(nnx.Module):
    """Attention and two linear layers, each behind a norm and beside a shortcut."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.norm1, self.norm2 = (nnx.LayerNorm(FEATURES, epsilon=1e-5, rngs=rngs) for _ in range(2))
        self.attn = NnxAttention(rngs)
        self.fc1 = nnx.Linear(FEATURES, 2 * FEATURES, kernel_init=KERNEL, rngs=rngs)
        self.fc2 = nnx.Linear(2 * FEATURES, FEATURES, kernel_init=KERNEL, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Compute [batch, time, feature] from the same."""
        x = x + self.attn(self.norm1(x))
        return x + self.dropout(self.fc2(nnx.gelu(self.fc1(self.norm2(x)), approximate=False)))


class NnxLanguageModel(nnx.Module):
    """A language model with attention; its last layer is its first."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(VOCABULARY, FEATURES, embedding_init=KERNEL, rngs=rngs)
        self.position = nnx.Embed(LENGTH, FEATURES, embedding_init=KERNEL, rngs=rngs)
        self.blocks = nnx.List([NnxBlock(rngs), NnxBlock(rngs)])
        self.norm = nnx.LayerNorm(FEATURES, epsilon=1e-5, rngs=rngs)

    def __call__(self, ids: jax.Array) -> jax.Array:
        """Compute logits [batch, time, token] of token ids [batch, time]."""
        x = self.embed(ids) + self.position(jnp.arange(ids.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.embed.attend(self.norm(x))


def attention() -> Pair:
    """Return a language model with two blocks of attention and a tied head, in PyTorch and in NNX."""
    return Pair(
        lambda: draw_weights(TorchLanguageModel()),
        NnxLanguageModel(nnx.Rngs(0)),
        tokens(2, LENGTH, VOCABULARY),
        targets=lambda rng, size: rng.integers(VOCABULARY, size=(size, LENGTH)),
        torch_loss=torch_mean_loss,
        jax_loss=jax_mean_loss,
        jax_init=lambda key: nnx.state(NnxLanguageModel(nnx.Rngs(key))),
        name="attention",
    )

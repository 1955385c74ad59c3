"""Networks that a function makes, and three small sound pairs in which faults are planted.

The pairs (convolutional, recurrent, and with attention) declare all that a pair can declare, so that every check runs.
"""

import math
import operator
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import numpy as np
import optax
import torch
from flax import linen, nnx
from flax.traverse_util import unflatten_dict
from jax import numpy as jnp
from torch import nn
from torch.nn import functional

from experiments.large_ports import BatchNorm
from parity_tests.harness import weights as rules
from parity_tests.harness.adapters import adapt
from parity_tests.harness.pair import Batch, Inputs, Pair, as_inputs

CLASSES = 5
VOCABULARY, LENGTH = 13, 6
FEATURES, HEADS = 8, 2
LENGTHS = (6, 3, 5, 1)  # of the sequences; what is behind is padding
IGNORED = -100  # the label of padding
EXAMPLES, BATCH_SIZE = 20, 8
PEAK, WARM_UP, STEPS = 1e-2, 4, 20
NORMS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm)


# --- Networks that a function makes ---


class TorchNet(nn.Module):
    """A PyTorch module of named layers and parameters, and the function that calls them.

    `TorchNet(lambda net, x: x + net.fc(x), fc=nn.Linear(4, 4))` is a residual block.
    """

    def __init__(self, function: Callable[..., Any], /, **layers: Any) -> None:
        super().__init__()
        self.function = function
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """Call the function with this module and the inputs."""
        return self.function(self, *inputs, **named)


class LinenNet(linen.Module):
    """A Linen module that calls a function; the layers that the function makes are its own.

    `LinenNet(lambda x: x + linen.Dense(4, name="fc")(x))` is the same block.
    """

    function: Callable[..., Any]

    @linen.compact
    def __call__(self, *inputs: Any) -> Any:
        """Call the function with the inputs."""
        return self.function(*inputs)


class NnxNet(nnx.Module):
    """An NNX module of named layers, and the function that calls them."""

    def __init__(self, function: Callable[..., Any], /, **layers: Any) -> None:
        self.function = function
        for name, layer in layers.items():
            setattr(self, name, layer)

    def __call__(self, *inputs: Any) -> Any:
        """Call the function with this module and the inputs."""
        return self.function(self, *inputs)


def network(**layers: nn.Module) -> nn.Sequential:
    """Return a chain of named layers."""
    return nn.Sequential(OrderedDict(layers))


def values(*shape: int) -> np.ndarray:
    """Return normal random values, float32."""
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def tokens(batch: int, length: int, vocabulary: int) -> np.ndarray:
    """Return random token ids, int64 [batch, length]."""
    return np.random.default_rng(0).integers(vocabulary, size=(batch, length))


# For functions that take PyTorch's tensors as they are: "fc.weight" becomes ["fc"]["weight"].
nested: Callable[[dict[str, Any]], Any] = partial(unflatten_dict, sep=".")


def linear(layer: Any, x: Any) -> Any:
    """Apply a linear layer that is stored as PyTorch stores it, weight [outputs, inputs]."""
    return x @ layer["weight"].T + layer["bias"]


# --- Data ---


def draw_mask(size: int) -> np.ndarray:
    """Return which positions hold tokens, bool [size, LENGTH]."""
    return np.arange(LENGTH) < np.resize(LENGTHS, size)[:, None]


def draw_tokens(rng: np.random.Generator, size: int) -> Inputs:
    """Return token ids, int64 [size, LENGTH]."""
    return Inputs(rng.integers(VOCABULARY, size=(size, LENGTH)))


def draw_masked_tokens(rng: np.random.Generator, size: int) -> Inputs:
    """Return token ids, int64 [size, LENGTH], and which of them are no padding."""
    return Inputs(rng.integers(VOCABULARY, size=(size, LENGTH)), mask=draw_mask(size))


def draw_token_labels(rng: np.random.Generator, size: int) -> np.ndarray:
    """Return a label for each token, int64 [size, LENGTH]; padding has none."""
    return np.where(draw_mask(size), rng.integers(VOCABULARY, size=(size, LENGTH)), IGNORED)


def draw_labels(rng: np.random.Generator, size: int) -> np.ndarray:
    """Return a class for each image, int64 [size]."""
    return rng.integers(CLASSES, size=size)


def batches(inputs: Callable[..., Any], targets: Callable[..., np.ndarray], seed: int, epoch: int) -> Iterator[Batch]:
    """Yield the examples of an epoch in batches of 8, 8 and 4, in another order in each epoch."""
    rng = np.random.default_rng(seed)
    examples, labels = as_inputs(inputs(rng, EXAMPLES)), targets(rng, EXAMPLES)
    order = np.random.default_rng((seed, epoch)).permutation(EXAMPLES)
    for start in range(0, EXAMPLES, BATCH_SIZE):
        rows = order[start : start + BATCH_SIZE]
        yield Batch(examples.map(operator.itemgetter(rows)), labels[rows])


def draw_images(rng: np.random.Generator, size: int) -> np.ndarray:
    """Return images, float32 [size, 3, 8, 8]."""
    return rng.normal(size=(size, 3, 8, 8)).astype(np.float32)


# --- Loss, learning rate and initial weights ---


def torch_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Compute the mean cross-entropy of logits [..., class] over labels [...] that are not ignored."""
    return functional.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORED)


def jax_loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Compute the mean cross-entropy of logits [..., class] over labels [...] that are not ignored."""
    valid = labels != IGNORED
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.where(valid, labels, 0))
    return (losses * valid).sum() / valid.sum()


def torch_rate(step: int) -> float:
    """Return a learning rate that rises over the first steps and then falls along a cosine."""
    if step < WARM_UP:
        return PEAK * (0.1 + 0.9 * step / WARM_UP)
    return 0.5 * PEAK * (1 + math.cos(math.pi * min((step - WARM_UP) / (STEPS - WARM_UP), 1)))


jax_rate = optax.warmup_cosine_decay_schedule(PEAK / 10, PEAK, WARM_UP, STEPS)


def draw_torch(make: Callable[[], nn.Module]) -> nn.Module:
    """Return a module whose weights and biases, but for those of norms, are normal random numbers."""
    module = make()
    for layer in module.modules():
        if not isinstance(layer, NORMS):
            for name, parameter in layer.named_parameters(recurse=False):
                if name != "layer_scale":
                    nn.init.normal_(parameter, std=0.1)
    return module


def draw_jax(pair: Pair) -> Callable[[jax.Array], Any]:
    """Return a function that draws the same weights for JAX from a key."""
    model = adapt(pair.jax_model)
    variables = model.variables
    if (init := model.init) is not None:
        example = as_inputs(pair.inputs(np.random.default_rng(0), 2))
        inputs = example.map(lambda array: np.moveaxis(array, 1, -1) if array.ndim == 4 else array)
        variables = jax.eval_shape(lambda key: init(key, inputs), jax.random.key(0))
    shapes = {path: leaf.shape for path, leaf in model.leaves(variables).items()}

    def draw(key: jax.Array) -> Any:
        rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
        leaves = {}
        for path, shape in shapes.items():
            constant = path.rpartition("/")[2] in ("scale", "var", "layer_scale")
            fixed = constant or "norm" in path
            array = np.full(shape, float(constant)) if fixed else 0.1 * rng.standard_normal(shape)
            leaves[path] = jnp.asarray(array, jnp.float32)
        return model.with_leaves(variables, leaves)

    return draw


def complete(pair: Pair, inputs: Callable[..., Any], targets: Callable[..., np.ndarray], **fields: Any) -> Pair:
    """Declare what all three pairs have in common."""
    pair = replace(pair, inputs=inputs, **fields)
    make = pair.torch_module
    return replace(
        pair,
        torch_module=lambda: draw_torch(make),
        targets=targets,
        torch_loss=torch_loss,
        jax_loss=jax_loss,
        torch_schedule=torch_rate,
        jax_schedule=jax_rate,
        schedule_steps=STEPS,
        torch_batches=partial(batches, inputs, targets),
        jax_batches=partial(batches, inputs, targets),
        jax_init=draw_jax(pair),
    )


# --- The pairs ---


def convolutional() -> Pair:
    """Return a network for images with batch norm, a residual block and a flatten, trained by SGD with momentum."""
    return complete(
        Pair(torch_convolutional, LinenConvolutional(), None, name="convolutional"),
        draw_images,
        draw_labels,
        weights={
            "conv": "conv",
            "norm": "norm",
            **{f"block.{layer}": f"block/{layer}" for layer in ("conv1", "norm1", "conv2", "norm2", "shortcut")},
            "head": rules.linear("head", flatten=(6, 2, 2)),
        },
        torch_optimizer=partial(make_sgd),
        jax_optimizer=optax.chain(optax.add_decayed_weights(1e-3), optax.sgd(jax_rate, momentum=0.9, nesterov=True)),
    )


def make_sgd(module: nn.Module) -> torch.optim.Optimizer:
    """Return SGD with Nesterov's momentum and decay of all weights."""
    return torch.optim.SGD(module.parameters(), lr=PEAK, momentum=0.9, nesterov=True, weight_decay=1e-3)


def recurrent() -> Pair:
    """Return a language model with an LSTM, trained by Adam with clipped gradients."""
    return complete(
        Pair(torch_recurrent, LinenNet(linen_recurrent), None, name="recurrent"),
        draw_tokens,
        draw_token_labels,
        weights={"embed": "embed", "lstm": "lstm", "norm": "norm", "head": "head"},
        stages={"lstm[0]": "RNN_0"},
        torch_optimizer=lambda module: torch.optim.Adam(module.parameters(), lr=PEAK),
        torch_step=clip_and_step,
        jax_optimizer=optax.chain(optax.clip_by_global_norm(1.0), optax.adam(jax_rate)),
    )


def clip_and_step(module: nn.Module, optimizer: torch.optim.Optimizer, losses: Iterator[torch.Tensor]) -> None:
    """Take a step along gradients whose norm is at most 1."""
    for loss in losses:
        loss.backward()
    nn.utils.clip_grad_norm_(module.parameters(), 1.0)
    optimizer.step()


def attention() -> Pair:
    """Return a language model with a block of attention and a tied head, trained by AdamW, which decays matrices."""
    return complete(
        Pair(torch_language_model, NnxLanguageModel(nnx.Rngs(0)), None, name="attention"),
        draw_masked_tokens,
        draw_token_labels,
        weights={name: name.replace(".", "/") for name in ("embed", "position", "block", "norm")},
        torch_optimizer=make_adamw,
        jax_optimizer=optax.adamw(jax_rate, weight_decay=0.1, mask=partial(jax.tree.map, lambda leaf: leaf.ndim > 1)),
    )


def make_adamw(module: nn.Module) -> torch.optim.Optimizer:
    """Return AdamW that decays weights but no biases and scales."""
    parameters = list(module.parameters())
    groups = [
        {"params": [parameter for parameter in parameters if parameter.ndim > 1], "weight_decay": 0.1},
        {"params": [parameter for parameter in parameters if parameter.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=PEAK)


PAIRS: dict[str, Callable[[], Pair]] = {
    "convolutional": convolutional,
    "recurrent": recurrent,
    "attention": attention,
}


# --- A network for images ---


def torch_residual(inputs: int, outputs: int) -> nn.Module:
    """Return a residual block that halves images [batch, inputs, row, column]."""

    def function(net: Any, x: torch.Tensor) -> torch.Tensor:
        out = net.relu(net.norm1(net.conv1(x)))
        out = net.norm2(net.conv2(out))
        out += net.shortcut(x)
        return net.relu(out)

    return TorchNet(
        function,
        conv1=nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False),
        norm1=nn.BatchNorm2d(outputs),
        relu=nn.ReLU(inplace=True),
        conv2=nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
        norm2=nn.BatchNorm2d(outputs),
        shortcut=nn.Conv2d(inputs, outputs, 1, stride=2),
    )


class LinenResidual(linen.Module):
    """The same with the channels last."""

    outputs: int

    @linen.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Compute [batch, row, column, outputs] from images [batch, row, column, inputs]."""
        conv = partial(linen.Conv, self.outputs, padding=1, use_bias=False)
        norm = partial(BatchNorm, use_running_average=not train, momentum=0.9)
        out = linen.relu(norm(name="norm1")(conv(kernel_size=(3, 3), strides=2, name="conv1")(x)))
        out = norm(name="norm2")(conv(kernel_size=(3, 3), name="conv2")(out))
        return linen.relu(out + linen.Conv(self.outputs, (1, 1), strides=2, name="shortcut")(x))


class LinenConvolutional(linen.Module):
    """A convolution, a max-pool, a residual block and a linear layer."""

    @linen.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Compute the logits [batch, class] of images [batch, row, column, 3]."""
        x = linen.Conv(4, (3, 3), padding=1, use_bias=False, name="conv")(x)
        x = linen.relu(BatchNorm(use_running_average=not train, momentum=0.9, name="norm")(x))
        x = linen.max_pool(x, (2, 2), strides=(2, 2))
        x = LinenResidual(6, name="block")(x, train)
        x = linen.Dropout(0.2, deterministic=not train)(x.reshape(len(x), -1))
        return linen.Dense(CLASSES, name="head")(x)


def torch_convolutional() -> nn.Module:
    """Return the same network in PyTorch."""
    return network(
        conv=nn.Conv2d(3, 4, 3, padding=1, bias=False),
        norm=nn.BatchNorm2d(4),
        relu=nn.ReLU(inplace=True),
        pool=nn.MaxPool2d(2),
        block=torch_residual(4, 6),
        flatten=nn.Flatten(),
        dropout=nn.Dropout(0.2),
        head=nn.Linear(6 * 2 * 2, CLASSES),
    )


# --- A language model with an LSTM ---


def torch_recurrent() -> nn.Module:
    """Return an embedding, an LSTM and a linear layer: logits [batch, time, token] of token ids [batch, time]."""
    return TorchNet(
        lambda net, ids: net.head(net.norm(net.lstm(net.embed(ids))[0])),
        embed=nn.Embedding(VOCABULARY, FEATURES),
        lstm=nn.LSTM(FEATURES, FEATURES, batch_first=True),
        norm=nn.LayerNorm(FEATURES),
        head=nn.Linear(FEATURES, VOCABULARY),
    )


def linen_recurrent(ids: jax.Array) -> jax.Array:
    """Compute the same in Linen."""
    x = linen.Embed(VOCABULARY, FEATURES, name="embed")(ids)
    cell = linen.OptimizedLSTMCell(FEATURES, name="lstm")
    zeros = jnp.zeros((len(ids), FEATURES), x.dtype)
    states = linen.RNN(cell)(x, initial_carry=(zeros, zeros))
    states = linen.LayerNorm(epsilon=1e-5, name="norm")(states)
    return linen.Dense(VOCABULARY, name="head")(states)


# --- A language model with attention ---


def torch_attention(net: Any, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Compute causal attention with several heads, which does not look at padding."""
    batch, time, _ = x.shape
    query, key, value = net.qkv(x).view(batch, time, 3, HEADS, -1).unbind(2)
    scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / math.sqrt(FEATURES // HEADS)
    seen = torch.ones(time, time, dtype=torch.bool).tril() & mask[:, None, None]
    weights = torch.softmax(scores.masked_fill(~seen, -torch.inf), dim=-1)
    return net.out(torch.einsum("bhqk,bkhd->bqhd", weights, value).reshape(batch, time, FEATURES))


def torch_block() -> nn.Module:
    """Return attention and two linear layers, each behind a norm and beside a shortcut, the latter with a scale."""

    def function(net: Any, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = x + net.attn(net.norm1(x), mask)
        return x + net.layer_scale * net.dropout(net.fc2(functional.gelu(net.fc1(net.norm2(x)))))

    return TorchNet(
        function,
        norm1=nn.LayerNorm(FEATURES),
        attn=TorchNet(torch_attention, qkv=nn.Linear(FEATURES, 3 * FEATURES), out=nn.Linear(FEATURES, FEATURES)),
        norm2=nn.LayerNorm(FEATURES),
        fc1=nn.Linear(FEATURES, 2 * FEATURES),
        fc2=nn.Linear(2 * FEATURES, FEATURES),
        dropout=nn.Dropout(0.1),
        layer_scale=nn.Parameter(torch.ones(FEATURES)),
    )


def torch_language_model() -> nn.Module:
    """Return a language model with attention, whose last layer is its first."""

    def function(net: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = net.embed(ids) + net.position(torch.arange(ids.shape[1]))
        return net.head(net.norm(net.block(x, mask)))

    embed, head = nn.Embedding(VOCABULARY, FEATURES), nn.Linear(FEATURES, VOCABULARY, bias=False)
    head.weight = embed.weight
    position = nn.Embedding(LENGTH, FEATURES)
    return TorchNet(
        function, embed=embed, position=position, block=torch_block(), norm=nn.LayerNorm(FEATURES), head=head
    )


class NnxAttention(nnx.Module):
    """Causal attention with several heads, which does not look at padding."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.qkv = nnx.Linear(FEATURES, 3 * FEATURES, rngs=rngs)
        self.out = nnx.Linear(FEATURES, FEATURES, rngs=rngs)

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """Compute [batch, time, feature] from the same and a mask [batch, time]."""
        batch, time, _ = x.shape
        query, key, value = jnp.moveaxis(self.qkv(x).reshape(batch, time, 3, HEADS, -1), 2, 0)
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) / math.sqrt(FEATURES // HEADS)
        seen = jnp.tril(jnp.ones((time, time), bool)) & mask[:, None, None]
        weights = nnx.softmax(jnp.where(seen, scores, -jnp.inf))
        return self.out(jnp.einsum("bhqk,bkhd->bqhd", weights, value).reshape(batch, time, FEATURES))


class NnxBlock(nnx.Module):
    """Attention and two linear layers, each behind a norm and beside a shortcut, the latter with a layer scale."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.norm1, self.norm2 = (nnx.LayerNorm(FEATURES, epsilon=1e-5, rngs=rngs) for _ in range(2))
        self.attn = NnxAttention(rngs)
        self.fc1 = nnx.Linear(FEATURES, 2 * FEATURES, rngs=rngs)
        self.fc2 = nnx.Linear(2 * FEATURES, FEATURES, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.layer_scale = nnx.Param(jnp.ones(FEATURES))

    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """Compute [batch, time, feature] from the same."""
        x = x + self.attn(self.norm1(x), mask)
        hidden = nnx.gelu(self.fc1(self.norm2(x)), approximate=False)
        return x + self.layer_scale[...] * self.dropout(self.fc2(hidden))


class NnxLanguageModel(nnx.Module):
    """A language model with attention; its last layer is its first."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(VOCABULARY, FEATURES, rngs=rngs)
        self.position = nnx.Embed(LENGTH, FEATURES, rngs=rngs)
        self.block, self.norm = NnxBlock(rngs), nnx.LayerNorm(FEATURES, epsilon=1e-5, rngs=rngs)

    def __call__(self, ids: jax.Array, mask: jax.Array) -> jax.Array:
        """Compute logits [batch, time, token] of token ids [batch, time]."""
        x = self.embed(ids) + self.position(jnp.arange(ids.shape[1]))
        return self.embed.attend(self.norm(self.block(x, mask)))

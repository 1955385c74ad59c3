"""Ports of small networks with the faults that people met, each with a sound twin.

The faults were told in public threads, which each function names. `PORTS` lists what each port is, and what the
harness must say of its faulty twin.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import haiku as hk
import jax
import numpy as np
import optax
import torch
from flax import linen, nnx
from jax import lax
from jax import numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.nn import initializers
from torch import nn
from torch.nn import functional

from experiments.large_ports import BatchNorm
from parity_tests.harness.pair import Batch, Inputs, Pair
from parity_tests.parity.networks import LinenNet, NnxNet, TorchNet, linear, nested, network, tokens, values


class Finding(NamedTuple):
    """A difference that the harness must report: the check, and a part of the place that it names."""

    check: str
    where: str


class Port(NamedTuple):
    """A port of a small PyTorch network to JAX.

    Attributes:
        make: returns the sound port for True, and the faulty one for False.
        findings: what must be reported of the faulty one; empty if there is no faulty one, because the fault that
            people met was a false alarm, or one that float64 cannot show.
    """

    make: Callable[[bool], Pair]
    findings: tuple[Finding, ...]


PORTS: dict[str, Port] = {}
RNGS = nnx.Rngs(0)


def port(name: str, *findings: tuple[str, str]) -> Callable[[Callable[[bool], Pair]], Callable[[bool], Pair]]:
    """Add a function that makes both twins to the list, under this name."""

    def add(make: Callable[[bool], Pair]) -> Callable[[bool], Pair]:
        PORTS[name] = Port(make, tuple(Finding(*finding) for finding in findings))
        return make

    return add


# --- Single layers: padding, kernels, activations, and what a network returns ---


@port("P1", ("outputs", "output of conv"))
def padding(sound: bool) -> Pair:
    """PyTorch pads both sides alike; "SAME" pads an even input more behind (google/flax#963, #2993)."""
    module = network(conv=nn.Conv2d(3, 4, 7, stride=2, padding=3), relu=nn.ReLU())
    net = LinenNet(lambda x: linen.relu(linen.Conv(4, (7, 7), strides=(2, 2), padding=3 if sound else "SAME")(x)))
    return Pair(module, net, values(2, 3, 16, 16))


@port("P2", ("outputs", "output of up"))
def transposed_kernel(sound: bool) -> Pair:
    """The kernel of a transposed convolution must be turned (equinox#574, jax-ml/jax#11252, google/flax#3137)."""

    class Net(eqx.Module):
        up: eqx.nn.ConvTranspose2d

        def __call__(self, x: jax.Array) -> jax.Array:
            return jax.nn.relu(self.up(x))

    up = eqx.nn.ConvTranspose2d(4, 3, 3, stride=2, padding=1, output_padding=1, key=jax.random.key(0))

    def load(state: dict[str, Any]) -> Net:
        kernel = jnp.swapaxes(state["up.weight"], 0, 1)
        kernel = jnp.flip(kernel, (2, 3)) if sound else kernel
        bias = jnp.reshape(state["up.bias"], (3, 1, 1))
        return eqx.tree_at(lambda net: (net.up.weight, net.up.bias), Net(up), (kernel, bias))

    module = network(up=nn.ConvTranspose2d(4, 3, 3, stride=2, padding=1, output_padding=1), relu=nn.ReLU())
    return Pair(module, Net(up), values(2, 4, 6, 6), load)


@port("P5", ("outputs", "output of gelu"))
def gelu_module(sound: bool) -> Pair:
    """JAX's GELU is the tanh approximation unless asked otherwise (levanter#618)."""

    class Net(eqx.Module):
        fc1: eqx.nn.Linear
        fc2: eqx.nn.Linear

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.fc2(jax.nn.gelu(self.fc1(x), approximate=not sound))

    keys = jax.random.split(jax.random.key(0))
    net = Net(eqx.nn.Linear(6, 8, key=keys[0]), eqx.nn.Linear(8, 4, key=keys[1]))
    return Pair(network(fc1=nn.Linear(6, 8), gelu=nn.GELU(), fc2=nn.Linear(8, 4)), net, values(2, 6))


@port("P5-functional", ("outputs", "output of block.gelu"))
def gelu_function(sound: bool) -> Pair:
    """The same where the activation is a function inside a forward (goodfire-ai/spd#624)."""

    class Block(hk.Module):
        def __call__(self, x: jax.Array) -> jax.Array:
            hidden = hk.Linear(8, name="fc1")(x)
            return x + hk.Linear(6, name="fc2")(jax.nn.gelu(hidden, approximate=not sound))

    layers = {"fc1": nn.Linear(6, 8), "fc2": nn.Linear(8, 6)}
    block = TorchNet(lambda net, x: x + net.fc2(functional.gelu(net.fc1(x))), **layers)
    net = hk.transform(lambda x: hk.Linear(3, name="out")(Block(name="block")(x)))
    return Pair(network(block=block, out=nn.Linear(6, 3)), net, values(2, 6))


@port("P16", ("gradients", "gradient by the output of small"))
def small_gradient(sound: bool) -> Pair:
    """A wrong gradient that is small beside the others is wrong all the same (huggingface/transformers#16058)."""

    def torch_net(net: Any, x: torch.Tensor) -> torch.Tensor:
        return net.large(x) + 1e-3 * net.middle(x) + 1e-6 * torch.tanh(net.small(x))

    def net(variables: Any, x: jax.Array) -> jax.Array:
        small = jnp.tanh(linear(variables["small"], x))
        if not sound:
            small = 0.99 * small + 0.01 * lax.stop_gradient(small)
        return linear(variables["large"], x) + 1e-3 * linear(variables["middle"], x) + 1e-6 * small

    branches = {name: nn.Linear(5, 4) for name in ("large", "middle", "small")}
    return Pair(TorchNet(torch_net, **branches), net, values(2, 5), nested)


@port(
    "P17", ("outputs", "output of time"), ("outputs", "output of blocks.0.norm"), ("outputs", "output of blocks.1.norm")
)
def time_and_groups(sound: bool) -> Pair:
    """Cosines before sines, and a constant number of groups (diffusers#1081, stable-diffusion-jax#5)."""

    def torch_time(net: Any, timestep: torch.Tensor) -> torch.Tensor:
        angles = timestep[:, None] * torch.exp(-math.log(10_000) * torch.arange(4, dtype=timestep.dtype) / 4)
        return torch.cat([angles.sin(), angles.cos()], dim=-1)

    def time(timestep: jax.Array) -> jax.Array:
        angles = timestep[:, None] * jnp.exp(-math.log(10_000) * jnp.arange(4, dtype=timestep.dtype) / 4)
        waves = (jnp.sin(angles), jnp.cos(angles))
        return jnp.concatenate(waves if sound else waves[::-1], axis=-1)

    def torch_block() -> nn.Module:
        def function(net: Any, x: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
            return x + net.conv(functional.silu(net.norm(x))) + embedding[:, :, None, None]

        return TorchNet(function, norm=nn.GroupNorm(4, 8), conv=nn.Conv2d(8, 8, 3, padding=1))

    def block(x: jax.Array, embedding: jax.Array) -> jax.Array:
        hidden = linen.GroupNorm(4 if sound else 2, epsilon=1e-5, name="norm")(x)
        return x + linen.Conv(8, (3, 3), padding=1, name="conv")(linen.silu(hidden)) + embedding[:, None, None, :]

    def torch_net(net: Any, sample: torch.Tensor, timestep: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        embedding = net.time_proj(net.time(timestep.to(sample.dtype))) + net.context_proj(context.mean(dim=1))
        x = net.conv_in(sample)
        for block in net.blocks:
            x = block(x, embedding)
        return x

    def net(sample: jax.Array, timestep: jax.Array, context: jax.Array) -> jax.Array:
        embedding = linen.Dense(8, name="time_proj")(LinenNet(time, name="time")(timestep.astype(sample.dtype)))
        embedding += linen.Dense(8, name="context_proj")(context.mean(axis=1))
        x = linen.Conv(8, (3, 3), padding=1, name="conv_in")(sample)
        for index in range(2):
            x = LinenNet(block, name=f"blocks_{index}")(x, embedding)
        return x

    layers = {"time": TorchNet(torch_time), "time_proj": nn.Linear(8, 8), "context_proj": nn.Linear(6, 8)}
    layers |= {"conv_in": nn.Conv2d(3, 8, 3, padding=1), "blocks": nn.ModuleList([torch_block(), torch_block()])}
    times = values(2).astype("int64") % 1000 + 3
    inputs = Inputs(values(2, 3, 6, 6), times, values(2, 5, 6))
    return Pair(TorchNet(torch_net, **layers), LinenNet(net), inputs, {"blocks.{i}": "blocks_{i}"})


@port("P19", ("outputs", "output of gelu"), ("outputs", "output of norm"), ("outputs", "mean"), ("outputs", "scale"))
def three_faults(sound: bool) -> Pair:
    """Three faults at once: the GELU, the eps of a norm, and two outputs exchanged (scvi-tools#3749)."""

    def torch_net(net: Any, x: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = net.norm(net.gelu(net.fc1(x)))
        return {"mean": net.fc2(hidden), "scale": functional.softplus(net.fc3(hidden))}

    def nnx_net(net: Any, x: jax.Array) -> dict[str, jax.Array]:
        hidden = net.norm(nnx.gelu(net.fc1(x), approximate=not sound))
        outputs = net.fc2(hidden), nnx.softplus(net.fc3(hidden))
        return dict(zip(("mean", "scale") if sound else ("scale", "mean"), outputs, strict=True))

    sizes = {"fc1": (5, 8), "fc2": (8, 3), "fc3": (8, 3)}
    layers = {name: nn.Linear(*size) for name, size in sizes.items()}
    nnx_layers = {name: nnx.Linear(*size, rngs=RNGS) for name, size in sizes.items()}
    norm = nnx.LayerNorm(8, epsilon=1e-5 if sound else 1e-3, rngs=RNGS)
    module = TorchNet(torch_net, gelu=nn.GELU(), norm=nn.LayerNorm(8), **layers)
    return Pair(module, NnxNet(nnx_net, norm=norm, **nnx_layers), values(2, 5))


@port("P24")
def in_place(sound: bool) -> Pair:
    """ReLU in place and `out += x` overwrite what a hook has kept: no alarm may come of it (captum#156)."""

    def torch_net(net: Any, x: torch.Tensor) -> torch.Tensor:
        out = net.conv2(net.relu(net.conv1(x)))
        out += x
        return net.relu(out)

    def linen_net(x: jax.Array) -> jax.Array:
        out = linen.relu(linen.Conv(3, (3, 3), padding=1)(x))
        out = linen.Conv(3, (3, 3), padding=1)(out)
        return linen.relu(out + x)

    layers = {name: nn.Conv2d(3, 3, 3, padding=1) for name in ("conv1", "conv2")}
    module = TorchNet(torch_net, relu=nn.ReLU(inplace=True), **layers)
    return Pair(module, LinenNet(linen_net), values(2, 3, 6, 6))


# --- Norms: their eps, and what batch norm does in training ---


@port("P3", ("outputs", "output of norm"))
def epsilon(sound: bool) -> Pair:
    """Flax's LayerNorm has eps 1e-6 where PyTorch's has 1e-5 (ml-explore/mlx-examples#1434)."""
    norm = nnx.LayerNorm(12, epsilon=1e-5 if sound else 1e-6, rngs=RNGS)
    net = NnxNet(lambda net, x: net.norm(net.fc(x)), fc=nnx.Linear(6, 12, rngs=RNGS), norm=norm)
    return Pair(network(fc=nn.Linear(6, 12), norm=nn.LayerNorm(12)), net, values(2, 6))


@port("P3-positional", ("outputs", "output of norm"))
def first_field(sound: bool) -> Pair:
    """The first field of Flax's LayerNorm is eps, that of PyTorch's the number of features (google/flax#2195)."""
    net = LinenNet(lambda x: linen.LayerNorm(1e-5 if sound else 12, name="norm")(linen.Dense(12, name="fc")(x)))
    return Pair(network(fc=nn.Linear(6, 12), norm=nn.LayerNorm(12)), net, values(2, 6))


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


# --- Networks of tokens: attention, norms of embeddings, and tied weights ---


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


@port("P18", ("gradients", "gradient by embed.weight"))
def untied(sound: bool) -> Pair:
    """Two leaves that start equal are trained apart where PyTorch has one (google/flax#1263, torchax#75)."""

    def linen_net(ids: jax.Array) -> jax.Array:
        embed = linen.Embed(11, 6, name="embed")
        hidden = jnp.tanh(linen.Dense(6, name="fc")(embed(ids)))
        return embed.attend(hidden) if sound else linen.Dense(11, use_bias=False, name="head")(hidden)

    embed, head = nn.Embedding(11, 6), nn.Linear(6, 11, bias=False)
    head.weight = embed.weight
    module = network(embed=embed, fc=nn.Linear(6, 6), tanh=nn.Tanh(), head=head)
    return Pair(module, LinenNet(linen_net), tokens(2, 5, 11))


@port("P23-attention", ("outputs", "output of attn.scores"))
def unscaled_attention(sound: bool) -> Pair:
    """Attention without the root of the number of features (esmjax#7)."""

    def torch_scores(net: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return query @ key.transpose(1, 2) / math.sqrt(query.shape[-1])

    def torch_attention(net: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.softmax(net.scores(net.query(x), net.key(x)), dim=-1) @ net.value(x)

    class JaxScores(hk.Module):
        def __call__(self, query: jax.Array, key: jax.Array) -> jax.Array:
            return jnp.einsum("bqd,bkd->bqk", query, key) / (math.sqrt(query.shape[-1]) if sound else 1)

    class JaxAttention(hk.Module):
        def __call__(self, x: jax.Array) -> jax.Array:
            query, key, value = (hk.Linear(4, name=name)(x) for name in ("query", "key", "value"))
            return jax.nn.softmax(JaxScores(name="scores")(query, key)) @ value

    net = hk.transform(lambda x: hk.Linear(3, name="out")(JaxAttention(name="attn")(x)))
    layers = {name: nn.Linear(6, 4) for name in ("query", "key", "value")}
    attention = TorchNet(torch_attention, scores=TorchNet(torch_scores), **layers)
    return Pair(network(attn=attention, out=nn.Linear(4, 3)), net, values(2, 5, 6))


# --- Recurrent layers: two biases for each gate, and the order of the gates ---


FEATURES, HIDDEN = 4, 6


def recurrent(layer: type[nn.GRU] | type[nn.LSTM]) -> nn.Module:
    """Return a recurrent layer and a linear one after it, [batch, time, 3] from [batch, time, feature]."""
    rnn = layer(FEATURES, HIDDEN, batch_first=True)
    return TorchNet(lambda net, x: net.head(net.rnn(x)[0]), rnn=rnn, head=nn.Linear(HIDDEN, 3))


@port("P7-GRU", ("parameters", "rnn.bias_hh_l0"))
def bias_left_out(sound: bool) -> Pair:
    """A GRU of PyTorch has two biases for each gate, and a port has the sum of both (equinox#1003)."""

    class Net(eqx.Module):
        rnn: eqx.nn.GRUCell
        head: eqx.nn.Linear

        def __call__(self, x: jax.Array) -> jax.Array:
            def step(state: jax.Array, frame: jax.Array) -> tuple[jax.Array, jax.Array]:
                state = self.rnn(frame, state)
                return state, state

            _, states = lax.scan(step, jnp.zeros(HIDDEN, x.dtype), x)
            return jax.vmap(self.head)(states)

    keys = jax.random.split(jax.random.key(0))
    net = Net(eqx.nn.GRUCell(FEATURES, HIDDEN, key=keys[0]), eqx.nn.Linear(HIDDEN, 3, key=keys[1]))

    def load(state: dict[str, Any]) -> Net:
        """Leave out the second bias, but for the gate that has it apart."""
        tensors = [state[f"rnn.{name}_l0"] for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
        return eqx.tree_at(
            lambda net: (
                net.rnn.weight_ih,
                net.rnn.weight_hh,
                net.rnn.bias,
                net.rnn.bias_n,
                net.head.weight,
                net.head.bias,
            ),
            net,
            (*tensors[:3], tensors[3][2 * HIDDEN :], state["head.weight"], state["head.bias"]),
        )

    return Pair(recurrent(nn.GRU), net, values(2, 5, FEATURES), None if sound else load)


@port("P7-LSTM", ("outputs", "output of rnn"))
def gates_exchanged(sound: bool) -> Pair:
    """Exchange the gates: PyTorch's order is input, forget, cell, output (google/flax#3746, #5594)."""

    def net(x: jax.Array) -> jax.Array:
        carry = jnp.zeros((len(x), HIDDEN), x.dtype), jnp.zeros((len(x), HIDDEN), x.dtype)
        states = linen.RNN(linen.OptimizedLSTMCell(HIDDEN, name="rnn"))(x, initial_carry=carry)
        return linen.Dense(3, name="head")(states)

    def load(state: dict[str, Any]) -> Any:
        """Take the gates in another order."""
        cell: dict[str, Any] = {}
        for index, gate in enumerate("ifog"):
            rows = slice(index * HIDDEN, (index + 1) * HIDDEN)
            bias = state["rnn.bias_ih_l0"] + state["rnn.bias_hh_l0"]
            cell[f"i{gate}"] = {"kernel": state["rnn.weight_ih_l0"][rows].T}
            cell[f"h{gate}"] = {"kernel": state["rnn.weight_hh_l0"][rows].T, "bias": bias[rows]}
        return {"params": {"rnn": cell, "head": {"kernel": state["head.weight"].T, "bias": state["head.bias"]}}}

    return Pair(recurrent(nn.LSTM), LinenNet(net), values(2, 5, FEATURES), None if sound else load)


@port("P7-scan", ("outputs", "output of rnn"))
def gates_exchanged_in_a_scan(sound: bool) -> Pair:
    """Exchange the gates in a cell that the port itself calls for each step (equinox#1003)."""

    class Net(eqx.Module):
        rnn: eqx.nn.LSTMCell
        head: eqx.nn.Linear

        def __call__(self, x: jax.Array) -> jax.Array:
            def step(state: tuple[jax.Array, jax.Array], frame: jax.Array) -> tuple[Any, jax.Array]:
                hidden, cell = self.rnn(frame, state)
                return (hidden, cell), hidden

            start = jnp.zeros(HIDDEN, x.dtype), jnp.zeros(HIDDEN, x.dtype)
            return jax.vmap(self.head)(lax.scan(step, start, x)[1])

    keys = jax.random.split(jax.random.key(0))
    net = Net(eqx.nn.LSTMCell(FEATURES, HIDDEN, key=keys[0]), eqx.nn.Linear(HIDDEN, 3, key=keys[1]))

    def load(state: dict[str, Any]) -> Net:
        """Take the gates in another order."""
        order = np.r_[: 2 * HIDDEN, 3 * HIDDEN : 4 * HIDDEN, 2 * HIDDEN : 3 * HIDDEN]
        bias = state["rnn.bias_ih_l0"] + state["rnn.bias_hh_l0"]
        return eqx.tree_at(
            lambda net: (net.rnn.weight_ih, net.rnn.weight_hh, net.rnn.bias, net.head.weight, net.head.bias),
            net,
            (
                *(leaf[order] for leaf in (state["rnn.weight_ih_l0"], state["rnn.weight_hh_l0"], bias)),
                state["head.weight"],
                state["head.bias"],
            ),
        )

    return Pair(recurrent(nn.LSTM), net, values(2, 5, FEATURES), None if sound else load)


# --- Optimizers: what is decayed, divided, clipped and trained ---


LEARNING_RATE = 1e-2


@port("P11", ("optimizer", "fc.weight"))
def eps_in_the_root(sound: bool) -> Pair:
    """RMSprop's eps stands behind the root in PyTorch, and inside it by default in optax (optax#532)."""

    def net(variables: Any, x: jax.Array) -> jax.Array:
        return linear(variables["fc"], x)

    return Pair(
        network(fc=nn.Linear(5, 3)),
        net,
        values(2, 5),
        nested,
        torch_optimizer=lambda module: torch.optim.RMSprop(module.parameters(), lr=LEARNING_RATE, alpha=0.9, eps=0.01),
        jax_optimizer=optax.rmsprop(LEARNING_RATE, decay=0.9, eps=0.01, eps_in_sqrt=not sound),
    )


@port("P12", ("optimizer", "fc1.weight"))
def coupled_decay(sound: bool) -> Pair:
    """PyTorch's Adam adds the decay to the gradient; optax.adamw adds it to the step (optax#417)."""

    class Net(eqx.Module):
        fc1: eqx.nn.Linear
        fc2: eqx.nn.Linear

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.fc2(jax.nn.relu(self.fc1(x)))

    keys = jax.random.split(jax.random.key(0))
    return Pair(
        network(fc1=nn.Linear(5, 6), relu=nn.ReLU(), fc2=nn.Linear(6, 3)),
        Net(eqx.nn.Linear(5, 6, key=keys[0]), eqx.nn.Linear(6, 3, key=keys[1])),
        values(2, 5),
        torch_optimizer=lambda module: torch.optim.Adam(module.parameters(), lr=LEARNING_RATE, weight_decay=0.1),
        jax_optimizer=optax.chain(optax.add_decayed_weights(0.1), optax.adam(LEARNING_RATE))
        if sound
        else optax.adamw(LEARNING_RATE, weight_decay=0.1),
    )


def normed_mlp() -> nn.Module:
    """Return two linear layers and a norm between them."""
    return network(fc1=nn.Linear(5, 6), norm=nn.LayerNorm(6), relu=nn.ReLU(), fc2=nn.Linear(6, 3))


def linen_mlp(x: jax.Array) -> jax.Array:
    """Compute the same with Linen's layers."""
    x = linen.LayerNorm(epsilon=1e-5, name="norm")(linen.Dense(6, name="fc1")(x))
    return linen.Dense(3, name="fc2")(linen.relu(x))


@port("P13", ("optimizer", "fc1.weight"), ("optimizer", "fc1.bias"))
def mask_the_wrong_way(sound: bool) -> Pair:
    """Biases and norms are decayed in place of all others (huggingface/transformers#11936, jax-ml/jax#31256)."""

    def torch_optimizer(module: nn.Module) -> torch.optim.Optimizer:
        decayed = [parameter for parameter in module.parameters() if parameter.ndim > 1]
        others = [parameter for parameter in module.parameters() if parameter.ndim == 1]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=LEARNING_RATE)

    def mask(params: Any) -> Any:
        return jax.tree.map(lambda leaf: (leaf.ndim > 1) == sound, params)

    return Pair(
        normed_mlp(),
        LinenNet(linen_mlp),
        values(2, 5),
        torch_optimizer=torch_optimizer,
        jax_optimizer=optax.adamw(LEARNING_RATE, weight_decay=0.1, mask=mask),
    )


@port("P14", ("optimizer", "step 1, "))
def steps_of_micro_batches(sound: bool) -> Pair:
    """One clipped step with the sum of four gradients, and four steps with one each (jenkspt/gpt-jax#2)."""

    def torch_step(module: nn.Module, optimizer: torch.optim.Optimizer, losses: Iterator[torch.Tensor]) -> None:
        for loss in losses:
            loss.backward()
        nn.utils.clip_grad_value_(module.parameters(), 0.1)
        optimizer.step()

    def jax_step(optimizer: Any, gradients: Sequence[Any], opt_state: Any, params: Any) -> tuple[Any, Any]:
        sums = [jax.tree.map(lambda *leaves: sum(leaves), *gradients)] if sound else gradients
        for gradient in sums:
            updates, opt_state = optimizer.update(gradient, opt_state, params)
            params = optax.apply_updates(params, updates)
        return params, opt_state

    return Pair(
        normed_mlp(),
        LinenNet(linen_mlp),
        values(2, 5),
        torch_optimizer=lambda module: torch.optim.Adam(module.parameters(), lr=LEARNING_RATE),
        jax_optimizer=optax.chain(optax.clip(0.1), optax.adam(LEARNING_RATE)),
        torch_step=torch_step,
        jax_step=jax_step,
        micro_batches=4,
    )


@port("P23-frozen", ("optimizer", "fc1.weight"))
def frozen(sound: bool) -> Pair:
    """A parameter with requires_grad=False that JAX trains (keras#22104)."""

    def labels(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, _: "frozen" if "fc1" in jax.tree_util.keystr(path) and "kernel" in str(path) else "trained",
            params,
        )

    nnx_layers = {"fc1": nnx.Linear(5, 6, rngs=RNGS), "fc2": nnx.Linear(6, 3, rngs=RNGS)}
    fc1 = nn.Linear(5, 6)
    fc1.weight.requires_grad = False
    adam = optax.adam(LEARNING_RATE)
    partly = optax.multi_transform({"trained": adam, "frozen": optax.set_to_zero()}, labels)
    return Pair(
        network(fc1=fc1, relu=nn.ReLU(), fc2=nn.Linear(6, 3)),
        NnxNet(lambda net, x: net.fc2(jax.nn.relu(net.fc1(x))), **nnx_layers),
        values(2, 5),
        torch_optimizer=lambda module: torch.optim.Adam(module.parameters(), lr=LEARNING_RATE),
        jax_optimizer=partly if sound else adam,
    )


# --- Outside of the network: losses, labels, initial weights, and how the weights were loaded ---


IGNORED = -100  # the label of positions that are padding


@port("P15", ("loss", "batch of 8"))
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

    scale = initializers.zeros if sound else initializers.ones

    def net(x: jax.Array) -> jax.Array:
        x = linen.relu(linen.Dense(32, kernel_init=kernel, name="fc1")(x))
        x = linen.Dense(8, kernel_init=kernel, name="fc2")(x)
        return linen.LayerNorm(epsilon=1e-5, scale_init=scale, name="norm")(x)

    return Pair(module, LinenNet(net), values(2, 16), jax_init="model")

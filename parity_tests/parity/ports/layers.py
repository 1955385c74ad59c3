"""Faults in single layers: padding, kernels, activations, and what a network returns."""

import math
from typing import Any

import equinox as eqx
import haiku as hk
import jax
import torch
from flax import linen, nnx
from jax import lax
from jax import numpy as jnp
from torch import nn
from torch.nn import functional

from parity_tests.harness.pair import Inputs, Pair
from parity_tests.parity.ports.registry import linear, nested, network, port, values


@port("P1", ("outputs", "output of conv"))
def padding(sound: bool) -> Pair:
    """PyTorch pads both sides alike; "SAME" pads an even input more behind (google/flax#963, #2993)."""

    class Net(linen.Module):
        @linen.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            x = linen.Conv(4, (7, 7), strides=(2, 2), padding=3 if sound else "SAME")(x)
            return linen.relu(x)

    return Pair(network(conv=nn.Conv2d(3, 4, 7, stride=2, padding=3), relu=nn.ReLU()), Net(), values(2, 3, 16, 16))


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


class FunctionalGelu(nn.Module):
    """A block whose activation is no module."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute [batch, 6] from [batch, 6]."""
        return x + self.fc2(functional.gelu(self.fc1(x)))


@port("P5-functional", ("outputs", "output of block.gelu"))
def gelu_function(sound: bool) -> Pair:
    """The same where the activation is a function inside a forward (goodfire-ai/spd#624)."""

    class Block(hk.Module):
        def __call__(self, x: jax.Array) -> jax.Array:
            hidden = hk.Linear(8, name="fc1")(x)
            return x + hk.Linear(6, name="fc2")(jax.nn.gelu(hidden, approximate=not sound))

    net = hk.transform(lambda x: hk.Linear(3, name="out")(Block(name="block")(x)))
    return Pair(network(block=FunctionalGelu(), out=nn.Linear(6, 3)), net, values(2, 6))


class Scales(nn.Module):
    """A network whose branches differ in size by factors of 1,000."""

    def __init__(self) -> None:
        super().__init__()
        self.large, self.middle, self.small = nn.Linear(5, 4), nn.Linear(5, 4), nn.Linear(5, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute [batch, 4] from [batch, 5]."""
        return self.large(x) + 1e-3 * self.middle(x) + 1e-6 * torch.tanh(self.small(x))


@port("P16", ("gradients", "gradient by small."))
def small_gradient(sound: bool) -> Pair:
    """A wrong gradient that is small beside the others is wrong all the same (huggingface/transformers#16058)."""

    def net(variables: Any, x: jax.Array) -> jax.Array:
        small = jnp.tanh(linear(variables["small"], x))
        if not sound:
            small = 0.99 * small + 0.01 * lax.stop_gradient(small)
        return linear(variables["large"], x) + 1e-3 * linear(variables["middle"], x) + 1e-6 * small

    return Pair(Scales(), net, values(2, 5), nested)


class Timesteps(nn.Module):
    """Sines and cosines of the time."""

    def forward(self, timestep: torch.Tensor) -> torch.Tensor:
        """Compute [batch, 8] from [batch]."""
        exponents = torch.arange(4, dtype=timestep.dtype) / 4
        angles = timestep[:, None] * torch.exp(-math.log(10_000) * exponents)
        return torch.cat([angles.sin(), angles.cos()], dim=-1)


class DenoiserBlock(nn.Module):
    """A residual block that adds an embedding to each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv = nn.GroupNorm(4, 8), nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        """Compute [batch, 8, row, column] from the same and an embedding [batch, 8]."""
        return x + self.conv(functional.silu(self.norm(x))) + embedding[:, :, None, None]


class Denoiser(nn.Module):
    """A small denoiser of images, with three inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.time, self.time_proj, self.context_proj = Timesteps(), nn.Linear(8, 8), nn.Linear(6, 8)
        self.conv_in = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.ModuleList([DenoiserBlock() for _ in range(2)])

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """Compute [batch, 8, row, column] from images, integer times [batch] and a context [batch, length, 6]."""
        embedding = self.time_proj(self.time(timestep.to(sample.dtype))) + self.context_proj(context.mean(dim=1))
        x = self.conv_in(sample)
        for block in self.blocks:
            x = block(x, embedding)
        return x


@port(
    "P17", ("outputs", "output of time"), ("outputs", "output of blocks.0.norm"), ("outputs", "output of blocks.1.norm")
)
def time_and_groups(sound: bool) -> Pair:
    """Cosines before sines, and a constant number of groups (diffusers#1081, stable-diffusion-jax#5)."""

    class Time(linen.Module):
        @linen.compact
        def __call__(self, timestep: jax.Array) -> jax.Array:
            angles = timestep[:, None] * jnp.exp(-math.log(10_000) * jnp.arange(4, dtype=timestep.dtype) / 4)
            waves = (jnp.sin(angles), jnp.cos(angles))
            return jnp.concatenate(waves if sound else waves[::-1], axis=-1)

    class Block(linen.Module):
        @linen.compact
        def __call__(self, x: jax.Array, embedding: jax.Array) -> jax.Array:
            hidden = linen.GroupNorm(4 if sound else 2, epsilon=1e-5, name="norm")(x)
            return x + linen.Conv(8, (3, 3), padding=1, name="conv")(linen.silu(hidden)) + embedding[:, None, None, :]

    class Net(linen.Module):
        @linen.compact
        def __call__(self, sample: jax.Array, timestep: jax.Array, context: jax.Array) -> jax.Array:
            time = Time(name="time")(timestep.astype(sample.dtype))
            embedding = linen.Dense(8, name="time_proj")(time)
            embedding += linen.Dense(8, name="context_proj")(context.mean(axis=1))
            x = linen.Conv(8, (3, 3), padding=1, name="conv_in")(sample)
            for index in range(2):
                x = Block(name=f"blocks_{index}")(x, embedding)
            return x

    times = values(2).astype("int64") % 1000 + 3
    inputs = Inputs(values(2, 3, 6, 6), times, values(2, 5, 6))
    return Pair(Denoiser(), Net(), inputs, {"blocks.{i}": "blocks_{i}"})


class TwoHeads(nn.Module):
    """A network with two outputs of one shape."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.gelu, self.norm = nn.Linear(5, 8), nn.GELU(), nn.LayerNorm(8)
        self.fc2, self.fc3 = nn.Linear(8, 3), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """Compute two outputs [batch, 3] from [batch, 5]."""
        hidden = self.norm(self.gelu(self.fc1(x)))
        return {"mean": self.fc2(hidden), "scale": functional.softplus(self.fc3(hidden))}


@port("P19", ("outputs", "output of gelu"), ("outputs", "output of norm"), ("outputs", "mean"), ("outputs", "scale"))
def three_faults(sound: bool) -> Pair:
    """Three faults at once: the GELU, the eps of a norm, and two outputs exchanged (scvi-tools#3749)."""

    class Net(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.fc1 = nnx.Linear(5, 8, rngs=rngs)
            self.norm = nnx.LayerNorm(8, epsilon=1e-5 if sound else 1e-3, rngs=rngs)
            self.fc2 = nnx.Linear(8, 3, rngs=rngs)
            self.fc3 = nnx.Linear(8, 3, rngs=rngs)

        def __call__(self, x: jax.Array) -> dict[str, jax.Array]:
            hidden = self.norm(nnx.gelu(self.fc1(x), approximate=not sound))
            outputs = self.fc2(hidden), nnx.softplus(self.fc3(hidden))
            return dict(zip(("mean", "scale") if sound else ("scale", "mean"), outputs, strict=True))

    return Pair(TwoHeads(), Net(nnx.Rngs(0)), values(2, 5))


class InPlace(nn.Module):
    """A residual block that overwrites its values, as torchvision's do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute [batch, 3, row, column] from the same."""
        out = self.conv2(self.relu(self.conv1(x)))
        out += x
        return self.relu(out)


@port("P24")
def in_place(sound: bool) -> Pair:
    """ReLU in place and `out += x` overwrite what a hook has kept: no alarm may come of it (captum#156)."""

    class Net(linen.Module):
        @linen.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            out = linen.relu(linen.Conv(3, (3, 3), padding=1)(x))
            out = linen.Conv(3, (3, 3), padding=1)(out)
            return linen.relu(out + x)

    return Pair(InPlace(), Net(), values(2, 3, 6, 6))

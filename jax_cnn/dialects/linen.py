"""The networks in Flax Linen: a module declares its parameters where it uses them, and holds none."""

import jax
from flax import linen as nn
from jaxtyping import Array, Float

from jax_cnn.config import Model
from jax_cnn.dialects import Apply, Params, Tap, conv_bias_relu_pool, no_tap


class SoftmaxRegression(nn.Module):
    """One linear layer: 7,850 parameters."""

    @nn.compact
    def __call__(self, images: Float[Array, "batch 28 28 1"], tap: Tap = no_tap) -> Float[Array, "batch 10"]:
        """Compute the logits."""
        flatten = tap("flatten", images.reshape(len(images), -1))
        return tap("fc", nn.Dense(10, name="fc")(flatten))


class FeedForward(nn.Module):
    """Two linear layers: 407,050 parameters with 512 hidden units."""

    hidden: int = 512

    @nn.compact
    def __call__(self, images: Float[Array, "batch 28 28 1"], tap: Tap = no_tap) -> Float[Array, "batch 10"]:
        """Compute the logits."""
        flatten = tap("flatten", images.reshape(len(images), -1))
        fc1 = tap("fc1", nn.Dense(self.hidden, name="fc1")(flatten))
        relu = tap("relu", nn.relu(fc1))
        return tap("fc2", nn.Dense(10, name="fc2")(relu))


class ConvReluPool(nn.Module):
    """3x3 convolution with zero padding 1 and a bias, ReLU, and 2x2 max-pool."""

    features: int

    @nn.compact
    def __call__(
        self, images: Float[Array, "batch height width channels"], tap: Tap, number: int
    ) -> Float[Array, "batch height/2 width/2 features"]:
        """Halve the spatial size; `tap` sees the three stages of that number."""
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (3, 3, images.shape[-1], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        return conv_bias_relu_pool(images, kernel, bias, tap, number)


class SimpleCNN(nn.Module):
    """Conv-relu-pool twice and two linear layers: 1,630,090 parameters."""

    @nn.compact
    def __call__(self, images: Float[Array, "batch 28 28 1"], tap: Tap = no_tap) -> Float[Array, "batch 10"]:
        """Compute the logits; `tap(stage, value)` is called with every stage's output and may replace it."""
        pool1 = ConvReluPool(32, name="conv1")(images, tap, 1)  # 28 -> 14
        pool2 = ConvReluPool(64, name="conv2")(pool1, tap, 2)  # 14 -> 7

        flatten = tap("flatten", pool2.reshape(len(pool2), -1))  # row, column, channel: torch flattens channels first
        fc1 = tap("fc1", nn.Dense(512, name="fc1")(flatten))
        relu3 = tap("relu3", nn.relu(fc1))
        return tap("fc2", nn.Dense(10, name="fc2")(relu3))


def make_module(model: Model, hidden: int) -> nn.Module:
    """The network of that name."""
    modules = {"linear": SoftmaxRegression(), "mlp": FeedForward(hidden), "cnn": SimpleCNN()}
    return modules[model]


def network(model: Model, hidden: int) -> Apply:
    """The network as a pure function: Linen's own `apply`."""
    module = make_module(model, hidden)

    def apply(params: Params, images: jax.Array, tap: Tap = no_tap) -> jax.Array:
        logits: jax.Array = module.apply({"params": params}, images, tap)  # type: ignore[assignment]  # no mutable state
        return logits

    return apply

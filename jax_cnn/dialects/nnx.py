"""The networks in Flax NNX: a module makes its parameters at once and holds them, as in PyTorch.

For a pure function of the parameters, a network is split into its structure and them, once, and put together anew in
every call.
"""

from collections.abc import Callable
from functools import partial

import jax
from flax import nnx
from jaxtyping import Array, Float

from jax_cnn.config import Model
from jax_cnn.dialects import Apply, Params, Tap, conv_bias_relu_pool, no_tap


class SoftmaxRegression(nnx.Module):
    """One linear layer: 7,850 parameters."""

    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.fc = nnx.Linear(28 * 28, 10, rngs=rngs)

    def __call__(self, images: Float[Array, "batch 28 28 1"], tap: Tap = no_tap) -> Float[Array, "batch 10"]:
        """Compute the logits."""
        flatten = tap("flatten", images.reshape(len(images), -1))
        return tap("fc", self.fc(flatten))


class FeedForward(nnx.Module):
    """Two linear layers: 407,050 parameters with 512 hidden units."""

    def __init__(self, hidden: int = 512, *, rngs: nnx.Rngs) -> None:
        self.fc1 = nnx.Linear(28 * 28, hidden, rngs=rngs)
        self.fc2 = nnx.Linear(hidden, 10, rngs=rngs)

    def __call__(self, images: Float[Array, "batch 28 28 1"], tap: Tap = no_tap) -> Float[Array, "batch 10"]:
        """Compute the logits."""
        flatten = tap("flatten", images.reshape(len(images), -1))
        fc1 = tap("fc1", self.fc1(flatten))
        relu = tap("relu", nnx.relu(fc1))
        return tap("fc2", self.fc2(relu))


class ConvReluPool(nnx.Module):
    """3x3 convolution with zero padding 1 and a bias, ReLU, and 2x2 max-pool."""

    def __init__(self, channels: int, features: int, *, rngs: nnx.Rngs) -> None:
        draw = nnx.initializers.lecun_normal()
        self.kernel = nnx.Param(draw(rngs.params(), (3, 3, channels, features)))
        self.bias = nnx.Param(jax.numpy.zeros(features))

    def __call__(
        self, images: Float[Array, "batch height width channels"], tap: Tap, number: int
    ) -> Float[Array, "batch height/2 width/2 features"]:
        """Halve the spatial size; `tap` sees the three stages of that number."""
        return conv_bias_relu_pool(images, self.kernel[...], self.bias[...], tap, number)


class SimpleCNN(nnx.Module):
    """Conv-relu-pool twice and two linear layers: 1,630,090 parameters."""

    def __init__(self, *, rngs: nnx.Rngs) -> None:
        self.conv1 = ConvReluPool(1, 32, rngs=rngs)
        self.conv2 = ConvReluPool(32, 64, rngs=rngs)
        self.fc1 = nnx.Linear(7 * 7 * 64, 512, rngs=rngs)
        self.fc2 = nnx.Linear(512, 10, rngs=rngs)

    def __call__(self, images: Float[Array, "batch 28 28 1"], tap: Tap = no_tap) -> Float[Array, "batch 10"]:
        """Compute the logits; `tap(stage, value)` is called with every stage's output and may replace it."""
        pool1 = self.conv1(images, tap, 1)  # 28 -> 14
        pool2 = self.conv2(pool1, tap, 2)  # 14 -> 7

        flatten = tap("flatten", pool2.reshape(len(pool2), -1))  # row, column, channel: torch flattens channels first
        fc1 = tap("fc1", self.fc1(flatten))
        relu3 = tap("relu3", nnx.relu(fc1))
        return tap("fc2", self.fc2(relu3))


def network(model: Model, hidden: int) -> Apply:
    """The network as a pure function: its structure, and whatever parameters it is given."""
    modules: dict[Model, Callable[..., SoftmaxRegression | FeedForward | SimpleCNN]] = {
        "linear": SoftmaxRegression,
        "mlp": partial(FeedForward, hidden),
        "cnn": SimpleCNN,
    }
    structure = nnx.graphdef(nnx.eval_shape(lambda: modules[model](rngs=nnx.Rngs(0))))

    def apply(params: Params, images: jax.Array, tap: Tap = no_tap) -> jax.Array:
        module = nnx.merge(structure, jax.tree.map(nnx.Param, params))
        return module(images, tap)

    return apply

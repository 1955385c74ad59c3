"""The networks in plain JAX: functions of the parameters and the images, and nothing else."""

import jax
from jaxtyping import Array, Float

from jax_cnn.config import Model
from jax_cnn.dialects import Apply, Params, Tap, conv_bias_relu_pool, no_tap

Layer = dict[str, jax.Array]


def dense(layer: Layer, inputs: Float[Array, "batch inputs"]) -> Float[Array, "batch outputs"]:
    """A linear layer."""
    return inputs @ layer["kernel"] + layer["bias"]


def conv_relu_pool(
    layer: Layer, images: Float[Array, "batch height width channels"], tap: Tap, number: int
) -> Float[Array, "batch height/2 width/2 features"]:
    """3x3 convolution with zero padding 1 and a bias, ReLU, and 2x2 max-pool; `tap` sees the stages of that number."""
    return conv_bias_relu_pool(images, layer["kernel"], layer["bias"], tap, number)


def softmax_regression(
    params: Params, images: Float[Array, "batch 28 28 1"], tap: Tap = no_tap
) -> Float[Array, "batch 10"]:
    """One linear layer: 7,850 parameters."""
    flatten = tap("flatten", images.reshape(len(images), -1))
    return tap("fc", dense(params["fc"], flatten))


def feed_forward(params: Params, images: Float[Array, "batch 28 28 1"], tap: Tap = no_tap) -> Float[Array, "batch 10"]:
    """Two linear layers: 407,050 parameters with 512 hidden units."""
    flatten = tap("flatten", images.reshape(len(images), -1))
    fc1 = tap("fc1", dense(params["fc1"], flatten))
    relu = tap("relu", jax.nn.relu(fc1))
    return tap("fc2", dense(params["fc2"], relu))


def simple_cnn(params: Params, images: Float[Array, "batch 28 28 1"], tap: Tap = no_tap) -> Float[Array, "batch 10"]:
    """Conv-relu-pool twice and two linear layers: 1,630,090 parameters."""
    pool1 = conv_relu_pool(params["conv1"], images, tap, 1)  # 28 -> 14
    pool2 = conv_relu_pool(params["conv2"], pool1, tap, 2)  # 14 -> 7

    flatten = tap("flatten", pool2.reshape(len(pool2), -1))  # row, column, channel: torch flattens channels first
    fc1 = tap("fc1", dense(params["fc1"], flatten))
    relu3 = tap("relu3", jax.nn.relu(fc1))
    return tap("fc2", dense(params["fc2"], relu3))


def network(model: Model, hidden: int) -> Apply:
    """The network of that name; how wide it is, its parameters say."""
    del hidden
    networks: dict[Model, Apply] = {"linear": softmax_regression, "mlp": feed_forward, "cnn": simple_cnn}
    return networks[model]

"""The networks in plain JAX: functions of the parameters and the images, and nothing else."""

import jax
from jaxtyping import Array, Float

from jax_cnn import ops
from jax_cnn.config import Model
from jax_cnn.dialects import Apply, Params, Tap, no_tap

Layer = dict[str, jax.Array]


def dense(layer: Layer, inputs: Float[Array, "batch inputs"]) -> Float[Array, "batch outputs"]:
    """A linear layer."""
    return inputs @ layer["kernel"] + layer["bias"]


def conv3x3(
    layer: Layer, images: Float[Array, "batch height width channels"]
) -> Float[Array, "batch height width features"]:
    """3x3 convolution with stride 1, zero padding 1 and a bias; the spatial size stays."""
    return ops.add_bias(ops.conv3x3(images, layer["kernel"]), layer["bias"])


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
    conv1 = tap("conv1", conv3x3(params["conv1"], images))
    relu1 = tap("relu1", jax.nn.relu(conv1))
    pool1 = tap("pool1", ops.max_pool2x2(relu1))  # 28 -> 14

    conv2 = tap("conv2", conv3x3(params["conv2"], pool1))
    relu2 = tap("relu2", jax.nn.relu(conv2))
    pool2 = tap("pool2", ops.max_pool2x2(relu2))  # 14 -> 7

    flatten = tap("flatten", pool2.reshape(len(pool2), -1))  # row, column, channel: torch flattens channels first
    fc1 = tap("fc1", dense(params["fc1"], flatten))
    relu3 = tap("relu3", jax.nn.relu(fc1))
    return tap("fc2", dense(params["fc2"], relu3))


def network(model: Model, hidden: int) -> Apply:
    """The network of that name; how wide it is, its parameters say."""
    del hidden
    networks: dict[Model, Apply] = {"linear": softmax_regression, "mlp": feed_forward, "cnn": simple_cnn}
    return networks[model]

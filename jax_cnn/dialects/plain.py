"""The networks in plain JAX: functions of the parameters and the images, and nothing else."""

from functools import partial

import jax
from jaxtyping import Array, Float

from jax_cnn.config import Model, Network
from jax_cnn.model import Apply, Params, conv_relu_pool


def simple_cnn(params: Params, images: Float[Array, "batch 28 28 1"], fused: bool = True) -> Float[Array, "batch 10"]:
    """Compute the logits of SimpleCNN: conv-relu-pool twice and two linear layers, 1,630,090 parameters."""
    conv1, conv2 = params["conv1"], params["conv2"]
    pool1 = conv_relu_pool(images, conv1["kernel"], conv1["bias"], fused)  # 28 -> 14
    pool2 = conv_relu_pool(pool1, conv2["kernel"], conv2["bias"], fused)  # 14 -> 7
    flatten = pool2.reshape(len(pool2), -1)  # row, column, channel: PyTorch flattens channels first
    fc1 = dense(params["fc1"], flatten)
    relu3 = jax.nn.relu(fc1)
    return dense(params["fc2"], relu3)


def dense(layer: dict[str, jax.Array], inputs: Float[Array, "batch inputs"]) -> Float[Array, "batch outputs"]:
    """Apply a linear layer."""
    return inputs @ layer["kernel"] + layer["bias"]


def softmax_regression(params: Params, images: Float[Array, "batch 28 28 1"]) -> Float[Array, "batch 10"]:
    """Compute the logits of one linear layer: 7,850 parameters."""
    flatten = images.reshape(len(images), -1)
    return dense(params["fc"], flatten)


def feed_forward(params: Params, images: Float[Array, "batch 28 28 1"]) -> Float[Array, "batch 10"]:
    """Compute the logits of two linear layers: 407,050 parameters with 512 hidden units."""
    flatten = images.reshape(len(images), -1)
    fc1 = dense(params["fc1"], flatten)
    relu = jax.nn.relu(fc1)
    return dense(params["fc2"], relu)


def make_apply(network: Network, fused: bool) -> Apply:
    """Return the function of a network. The width of the hidden layer is known from the parameters."""
    functions: dict[Model, Apply] = {
        "cnn": partial(simple_cnn, fused=fused),
        "mlp": feed_forward,
        "linear": softmax_regression,
    }
    return functions[network.model]

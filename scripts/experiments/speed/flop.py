"""How many floating-point operations a training step needs: the least that any framework has to do."""

import math

from jax_cnn.torch_layout import SIMPLE_CNN

# How many places of an image each layer's weights are applied at: a linear layer sees it as one.
PLACES = {"conv1": 28 * 28, "conv2": 14 * 14, "fc1": 1, "fc2": 1}
NO_INPUT_GRADIENT = "conv1"  # its input is the image, which is not trained


def layer_flop(batch_size: int) -> dict[str, int]:
    """Operations of one training step, by layer: forward pass, gradient by the input, gradient by the weights.

    Each of the three multiplies and adds as often as weights meet places; products with the zeros around an image are
    counted, as every implementation's tables do. What else a step does (biases, ReLU, pooling, the loss, Adam) is not:
    less than one operation in a hundred, and bound by memory.
    """
    return {
        layer: 2 * math.prod(SIMPLE_CNN[f"{layer}.weight"].shape) * places * batch_size * passes(layer)
        for layer, places in PLACES.items()
    }


def passes(layer: str) -> int:
    """How many products of the size of the forward pass a training step makes of a layer."""
    return 2 if layer == NO_INPUT_GRADIENT else 3


def step_flop(batch_size: int) -> int:
    """Operations of one training step."""
    return sum(layer_flop(batch_size).values())

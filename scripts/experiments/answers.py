"""Ask a trained network for its answers, in either framework: logits of many images, and every stage of one image.

Both frameworks compute in float32 on the CPU, because a GPU may round its float32 products to fewer bits. A framework
is loaded only when it is asked.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, UInt8

from jax_cnn.config import Network
from jax_cnn.torch_layout import TorchDict, layout_of, to_flax
from jax_cnn.weights import recognise

Framework = Literal["jax", "torch"]
Pixels = UInt8[np.ndarray, "size 28 28"]
Logits = Float[np.ndarray, "size 10"]

FRAMEWORKS: dict[Framework, str] = {"jax": "JAX", "torch": "PyTorch"}  # with their names for a reader
BATCH = 250

# The stages of SimpleCNN, without flatten, and how the harness names them in JAX.
STAGES = {
    "conv1": "conv1.add_bias",
    "relu1": "conv1.relu",
    "pool1": "conv1.max_pool2x2",
    "conv2": "conv2.add_bias",
    "relu2": "conv2.relu",
    "pool2": "conv2.max_pool2x2",
    "fc1": "fc1",
    "relu3": "relu",
    "fc2": "fc2",
}


def compute_logits(framework: Framework, weights: TorchDict, pixels: Pixels) -> Logits:
    """Return the logits of every image, as float32. The weights are those of any of the three networks."""
    batches = [pixels[start : start + BATCH] for start in range(0, len(pixels), BATCH)]
    if framework == "torch":
        model = _torch_module(weights)
        return np.concatenate([model(_torch_images(batch)).numpy() for batch in batches])
    import jax

    from jax_cnn.devices import find_devices, fix_settings

    fix_settings()
    network = recognise(weights)
    # Unlike arrays made on a default device, arrays put on one keep the computation there.
    params = jax.device_put(to_flax(weights, layout_of(network)), find_devices("cpu")[0])
    return np.concatenate([np.asarray(_compiled(network)(params, batch)) for batch in batches])


def softmax(logits: Logits) -> Float[np.ndarray, "size 10"]:
    """Return the probabilities of the classes, as float64."""
    exponentials = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))  # none overflows
    return exponentials / exponentials.sum(axis=1, keepdims=True)


def compute_stages(
    framework: Framework, weights: TorchDict, image: UInt8[np.ndarray, "28 28"]
) -> dict[str, np.ndarray]:
    """Return the output of every stage of SimpleCNN for one image: maps [channel, row, column] or vectors [feature]."""
    stages = {}
    if framework == "torch":
        value = _torch_images(image[None])
        for stage, module in _torch_module(weights).named_children():  # in the order of the forward pass
            value = module(value)
            stages[stage] = value[0].numpy()
        return {stage: stages[stage] for stage in STAGES}
    import jax

    from jax_cnn.train import to_images

    with jax.default_device(jax.devices("cpu")[0]):
        variables = {"params": jax.tree.map(jax.numpy.asarray, to_flax(weights))}
        images = to_images(jax.numpy.asarray(image[None]), jax.numpy.dtype("float32"))
        _, values = trace_simple_cnn(variables, images).run(
            variables, images, rule=lambda name, value, slot: (value, value)
        )
    for stage, name in STAGES.items():
        array = np.asarray(values[name][0])
        stages[stage] = np.moveaxis(array, -1, 0) if array.ndim == 3 else array
    return stages


@cache
def _compiled(network: Network) -> Callable[..., Any]:
    """Compile the network once, whatever weights it is called with."""
    import jax

    from jax_cnn.dialects import make_apply
    from jax_cnn.train import to_images

    apply = make_apply(network)
    return jax.jit(lambda params, pixels: apply(params, to_images(pixels, jax.numpy.dtype("float32"))))


def trace_simple_cnn(variables: Any, images: Any, verify: bool = True) -> Any:
    """Return the harness's trace of JAX's SimpleCNN, in which it sees every stage. To `verify` it needs arrays."""
    from jax_cnn.model import SimpleCNN
    from parity_tests.harness.adapters import adapt
    from parity_tests.harness.pair import Inputs
    from parity_tests.harness.taps import trace

    model = adapt(SimpleCNN(fused=False))

    def apply(variables: Any, images: Any) -> Any:
        return model.apply(variables, Inputs(images), False)

    return trace(apply, variables, images, context=model.context, verify=verify)


def _torch_images(pixels: Pixels) -> Any:
    import torch

    return torch.tensor(pixels)[:, None].float() / 255


def _torch_module(weights: TorchDict) -> Any:
    import torch

    from torch_ref.model import make_model

    model = make_model(*recognise(weights)).to(torch.float32).eval().requires_grad_(False)
    model.load_state_dict({name: torch.from_numpy(array) for name, array in weights.items()})
    return model

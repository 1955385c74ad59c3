"""What each trained network says of the test images, and what it makes of one of them stage by stage.

Each framework computes by itself, on images that its own loader prepares. Everything comes back as NumPy arrays in
PyTorch's names and layouts.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from jax_cnn.data import load_fashion_mnist
from jax_cnn.torch_layout import TorchDict, to_flax

BATCH = 250
STAGES = ("conv1", "relu1", "pool1", "conv2", "relu2", "pool2", "fc1", "relu3", "fc2")  # all but flatten


class Answers(NamedTuple):
    """One network's."""

    logits: Float[np.ndarray, "size 10"]
    stages: dict[str, np.ndarray]
    """Of one image, by name: maps [channel, row, column] or a vector [feature]."""


def jax_answers(weights: TorchDict, data_dir: Path, limit: int | None, image: int) -> Answers:
    """Ask JAX, on the CPU and in float32, about the first `limit` test images; `image` is the one to look into."""
    import jax

    from jax_cnn.model import apply
    from jax_cnn.train import to_images

    pixels = load_fashion_mnist(data_dir).test_images[:limit]
    stages: dict[str, np.ndarray] = {}

    def tap(stage: str, value: jax.Array) -> jax.Array:
        array = np.asarray(value[0])
        stages[stage] = np.moveaxis(array, -1, 0) if array.ndim == 3 else array
        return value

    with jax.default_device(jax.devices("cpu")[0]):
        params = jax.tree.map(jax.numpy.asarray, to_flax(weights))
        predict = jax.jit(lambda batch: apply(params, to_images(batch, jax.numpy.dtype("float32"))))
        logits = [np.asarray(predict(pixels[start : start + BATCH])) for start in range(0, len(pixels), BATCH)]
        apply(params, to_images(jax.numpy.asarray(pixels[image : image + 1]), jax.numpy.dtype("float32")), tap)
    return Answers(np.concatenate(logits), {stage: stages[stage] for stage in STAGES})


def torch_answers(weights: TorchDict, data_dir: Path, limit: int | None, image: int) -> Answers:
    """Ask PyTorch likewise."""
    import torch

    from torch_ref.data import load_batches, load_dataset
    from torch_ref.model import SimpleCNN

    model = SimpleCNN().to(torch.float32).eval()
    model.load_state_dict({name: torch.from_numpy(array) for name, array in weights.items()})
    dataset = load_dataset(data_dir, train=False, limit=limit)
    with torch.no_grad():
        logits = [model(images).numpy() for images, _ in load_batches(dataset, BATCH)]
        value, stages = dataset[image][0][None], {}
        for stage, module in model.named_children():  # in the order of the forward pass
            value = module(value)
            stages[stage] = value[0].numpy()
    return Answers(np.concatenate(logits), {stage: stages[stage] for stage in STAGES})

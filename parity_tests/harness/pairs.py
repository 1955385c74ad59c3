"""The pairs that come with the project: the network, and the feed-forward network that a course compares it with."""

from collections import OrderedDict
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp
from torch import nn

from jax_cnn import fashion_mnist, model, torch_layout
from jax_cnn.batches import epoch_order, split_batches
from jax_cnn.train import to_images
from parity_tests.harness.pair import Batch, Pair, Tap, channels_first, flattened
from torch_ref.data import load_batches, load_dataset
from torch_ref.model import SimpleCNN

BATCH_SIZE = 64


def torch_pipeline(data_dir: Path, limit: int | None, seed: int, epoch: int) -> Iterator[Batch]:
    """What torch_ref's loader serves: torchvision's images through ToTensor, batch by batch."""
    dataset = load_dataset(data_dir, train=True, limit=limit)
    order = epoch_order(seed, epoch, len(dataset))  # type: ignore[arg-type]  # both of ours have a length
    for images, labels in load_batches(dataset, BATCH_SIZE, order.tolist()):
        yield Batch(images.numpy(), labels.numpy())


def jax_pipeline(data_dir: Path, limit: int | None, seed: int, epoch: int) -> Iterator[Batch]:
    """What jax_cnn's training gathers on the device."""
    data = fashion_mnist.load(data_dir)
    pixels, labels = data.train_images[:limit], data.train_labels[:limit]
    full, rest = split_batches(epoch_order(seed, epoch, len(pixels)), BATCH_SIZE)
    scale = jax.jit(partial(to_images, dtype=jnp.dtype(jnp.float32)))
    for indices in [*full, rest] if rest.size else full:
        images = np.asarray(scale(jnp.asarray(pixels[indices])))
        yield Batch(channels_first(images), labels[indices].astype(np.int64))


def simple_cnn(data_dir: Path | None = None, limit: int | None = None) -> Pair:
    """SimpleCNN; with a data folder, on the first `limit` training images of FashionMNIST."""
    return Pair(
        name="SimpleCNN",
        module=SimpleCNN,
        apply=model.apply,
        layout=torch_layout.SIMPLE_CNN,
        input_shape=(1, 28, 28),
        stage_layouts={"flatten": flattened((64, 7, 7))},
        jax_init=model.init_params,
        torch_batches=partial(torch_pipeline, data_dir, limit) if data_dir else None,
        jax_batches=partial(jax_pipeline, data_dir, limit) if data_dir else None,
    )


def feed_forward() -> Pair:
    """Flatten, Linear 784 -> 512, ReLU, Linear 512 -> 10. Also the example of how a pair is declared."""

    def module() -> nn.Module:
        return nn.Sequential(
            OrderedDict(flatten=nn.Flatten(), fc1=nn.Linear(784, 512), relu1=nn.ReLU(), fc2=nn.Linear(512, 10))
        )

    def apply(params: Any, images: jax.Array, tap: Tap) -> jax.Array:
        flatten = tap("flatten", images.reshape(len(images), -1))
        fc1 = tap("fc1", flatten @ params["fc1"]["kernel"] + params["fc1"]["bias"])
        relu1 = tap("relu1", jax.nn.relu(fc1))
        return tap("fc2", relu1 @ params["fc2"]["kernel"] + params["fc2"]["bias"])

    return Pair(
        name="FeedForward",
        module=module,
        apply=apply,
        layout={**torch_layout.dense("fc1", 784, 512), **torch_layout.dense("fc2", 512, 10)},
        input_shape=(1, 28, 28),
    )

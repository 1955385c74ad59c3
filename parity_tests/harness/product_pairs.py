"""The pairs that come with the project: SimpleCNN and the two baselines. The only file here that knows FashionMNIST."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp

from jax_cnn import torch_layout
from jax_cnn.config import CNN, Dialect, Model, Network
from jax_cnn.data import epoch_order, load_fashion_mnist, split_batches
from jax_cnn.dialects import make_apply
from jax_cnn.model import Apply, Tap, init_params
from jax_cnn.train import to_images
from parity_tests.harness.pair import Batch, Pair, channels_first, flattened
from torch_ref.data import load_batches, load_dataset
from torch_ref.model import make_model

BATCH_SIZE = 64
REPORT_IMAGES = 40 * BATCH_SIZE + 32  # training images of a parity report: 40 full batches and a remainder
NAMES: dict[Model, str] = {"linear": "SoftmaxRegression", "mlp": "FeedForward", "cnn": "SimpleCNN"}


def torch_pipeline(data_dir: Path, limit: int | None, seed: int, epoch: int) -> Iterator[Batch]:
    """Yield the batches of torch_ref's loader: torchvision's images through ToTensor."""
    dataset = load_dataset(data_dir, train=True, limit=limit)
    order = epoch_order(seed, epoch, len(dataset))  # type: ignore[arg-type]  # both of ours have a length
    for images, labels in load_batches(dataset, BATCH_SIZE, order.tolist()):
        yield Batch(images.numpy(), labels.numpy())


def jax_pipeline(data_dir: Path, limit: int | None, seed: int, epoch: int) -> Iterator[Batch]:
    """Yield the batches that jax_cnn trains on, scaled by the same function."""
    data = load_fashion_mnist(data_dir)
    pixels, labels = data.train_images[:limit], data.train_labels[:limit]
    full, rest = split_batches(epoch_order(seed, epoch, len(pixels)), BATCH_SIZE)
    scale = jax.jit(partial(to_images, dtype=jnp.dtype(jnp.float32)))
    for indices in [*full, rest] if rest.size else full:
        images = np.asarray(scale(jnp.asarray(pixels[indices])))
        yield Batch(channels_first(images), labels[indices].astype(np.int64))


def with_torch_stages(network: Apply) -> Callable[[Any, jax.Array, Tap], jax.Array]:
    """Return the network with the stages of its blocks under PyTorch's names."""

    def apply(params: Any, images: jax.Array, tap: Tap) -> jax.Array:
        return network(params, images, lambda stage, output: tap(torch_layout.TORCH_STAGES.get(stage, stage), output))

    return apply


def product_pair(
    network: Network,
    dialect: Dialect = "linen",
    data_dir: Path | None = None,
    limit: int | None = None,
) -> Pair:
    """Return the pair of a network of the project.

    Args:
        network: which one.
        dialect: how the JAX side is written.
        data_dir: where FashionMNIST is, or None for a pair without data pipelines.
        limit: use only so many training images.
    """
    return Pair(
        name=f"{NAMES[network.model]} in {dialect}",
        module=partial(make_model, *network),
        apply=with_torch_stages(make_apply(network, dialect, fused=False)),
        training_apply=make_apply(network, dialect),
        layout=torch_layout.layout_of(network),
        input_shape=(1, 28, 28),
        stage_layouts={"flatten": flattened((64, 7, 7))} if network == CNN else {},
        jax_init=partial(init_params, network=network),
        torch_batches=partial(torch_pipeline, data_dir, limit) if data_dir else None,
        jax_batches=partial(jax_pipeline, data_dir, limit) if data_dir else None,
    )


def simple_cnn(data_dir: Path | None = None, limit: int | None = None, dialect: Dialect = "linen") -> Pair:
    """Return the pair of SimpleCNN."""
    return product_pair(CNN, dialect, data_dir, limit)


def feed_forward(data_dir: Path | None = None, limit: int | None = None, dialect: Dialect = "linen") -> Pair:
    """Return the pair of the network with one hidden layer of 512."""
    return product_pair(Network("mlp"), dialect, data_dir, limit)


def softmax_regression(data_dir: Path | None = None, limit: int | None = None, dialect: Dialect = "linen") -> Pair:
    """Return the pair of the network with a single linear layer."""
    return product_pair(Network("linear"), dialect, data_dir, limit)

"""The pairs that come with the project: SimpleCNN and the two networks without convolution, on FashionMNIST."""

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp
from torch import nn, optim

from jax_cnn.config import CNN, AdamConfig, Dialect, Model, Network
from jax_cnn.data import epoch_order, load_fashion_mnist, split_batches
from jax_cnn.dialects import make_apply
from jax_cnn.model import init_params, make_module
from jax_cnn.train import cross_entropy, make_optimizer, to_images
from parity_tests.harness.pair import Batch, Pair
from parity_tests.harness.weights import linear
from torch_ref.model import make_model
from torch_ref.train import criterion, load_batches, load_dataset

BATCH_SIZE = 64
REPORT_IMAGES = 40 * BATCH_SIZE + 32  # training images of a parity report: 40 full batches and a remainder
NAMES: Mapping[Model, str] = {"linear": "SoftmaxRegression", "mlp": "FeedForward", "cnn": "SimpleCNN"}


def product_pair(
    network: Network = CNN,
    dialect: Dialect = "linen",
    data_dir: Path | None = None,
    limit: int | None = None,
    *,
    fused: bool = False,
) -> Pair:
    """Return the pair of a network of the project.

    Args:
        network: which one.
        dialect: how the JAX side is written.
        data_dir: where FashionMNIST is, or None for a pair without data pipelines.
        limit: the number of training images, or None for all.
        fused: compute SimpleCNN's blocks as one operation each, as training does; else in three stages.
    """
    rng = np.random.default_rng(0)
    adam = AdamConfig()
    return Pair(
        torch_module=partial(make_model, *network),
        jax_model=jax_model(network, dialect, fused),
        inputs=rng.random((8, 1, 28, 28), np.float32),
        weights={"fc1": linear("fc1", flatten=(64, 7, 7))} if network == CNN else {},
        stages=block_stages(dialect, fused) if network == CNN else {},
        targets=np.arange(8),
        torch_loss=criterion,
        jax_loss=lambda logits, labels: cross_entropy(logits, labels).mean(),
        torch_optimizer=partial(make_torch_optimizer, adam),
        jax_optimizer=make_optimizer(adam),
        torch_batches=partial(torch_pipeline, data_dir, limit) if data_dir else None,
        jax_batches=partial(jax_pipeline, data_dir, limit) if data_dir else None,
        jax_init=partial(draw_variables, network, dialect),
        precision_factor=4.0,
        name=f"{NAMES[network.model]} in {dialect}",
    )


def jax_model(network: Network, dialect: Dialect, fused: bool) -> Any:
    """Return a network as its dialect has it: a module of Linen or NNX, or a function of weights and images."""
    if dialect == "nnx":
        from jax_cnn.dialects import nnx

        return nnx.make_module(network, fused)
    return make_module(network, fused) if dialect == "linen" else make_apply(network, dialect, fused)


def block_stages(dialect: Dialect, fused: bool) -> dict[str, str]:
    """Return where the stages of SimpleCNN's two blocks are in JAX; they have no module of their own there."""
    if dialect == "plain":
        blocks = {"conv1": "add_bias", "pool1": "max_pool2x2", "conv2": "add_bias#2", "pool2": "max_pool2x2#2"}
        return {} if fused else {**blocks, "fc1": "add"}
    return {"pool{i}": "conv{i}"} if fused else {"conv{i}": "conv{i}.add_bias", "pool{i}": "conv{i}"}


def draw_variables(network: Network, dialect: Dialect, key: jax.Array) -> Any:
    """Draw initial weights, which are the same in all dialects, as the variables of this one."""
    params = init_params(key, network=network)
    return params if dialect == "plain" else {"params": params}


def make_torch_optimizer(adam: AdamConfig, module: nn.Module) -> optim.Optimizer:
    """Return Adam as `torch_ref.trainer` makes it."""
    return optim.Adam(module.parameters(), lr=adam.learning_rate, betas=(adam.b1, adam.b2), eps=adam.eps)


def torch_pipeline(data_dir: Path, limit: int | None, seed: int, epoch: int) -> Iterator[Batch]:
    """Yield the batches of torch_ref's loader: torchvision's images through ToTensor."""
    dataset = load_dataset(data_dir, train=True, limit=limit)
    order = epoch_order(seed, epoch, len(dataset))  # type: ignore[arg-type]  # both of ours have a length
    for images, labels in load_batches(dataset, BATCH_SIZE, order.tolist()):
        yield Batch(images.numpy(), labels.numpy())


def jax_pipeline(data_dir: Path, limit: int | None, seed: int, epoch: int) -> Iterator[Batch]:
    """Yield the batches that jax_cnn trains on, scaled by the same function."""
    data = load_fashion_mnist(data_dir, any_data=True)  # what torch_pipeline reads, too
    pixels, labels = data.train_images[:limit], data.train_labels[:limit]
    full, rest = split_batches(epoch_order(seed, epoch, len(pixels)), BATCH_SIZE)
    scale = jax.jit(partial(to_images, dtype=jnp.dtype(jnp.float32)))
    for indices in [*full, rest] if rest.size else full:
        images = np.asarray(scale(jnp.asarray(pixels[indices])))
        yield Batch(np.moveaxis(images, -1, 1), labels[indices].astype(np.int64))


def simple_cnn(data_dir: Path | None = None, limit: int | None = None, dialect: Dialect = "linen") -> Pair:
    """Return the pair of SimpleCNN."""
    return product_pair(CNN, dialect, data_dir, limit)


def feed_forward(data_dir: Path | None = None, limit: int | None = None, dialect: Dialect = "linen") -> Pair:
    """Return the pair of the network with one hidden layer of 512."""
    return product_pair(Network("mlp"), dialect, data_dir, limit)


def softmax_regression(data_dir: Path | None = None, limit: int | None = None, dialect: Dialect = "linen") -> Pair:
    """Return the pair of the network with a single linear layer."""
    return product_pair(Network("linear"), dialect, data_dir, limit)

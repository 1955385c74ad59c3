"""JAX's loss, evaluation and training step. `parity/test_trainers.py` compares the training with PyTorch's."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
import pytest
import torch
from jax import numpy as jnp

from jax_cnn import model, torch_layout, train
from jax_cnn.config import AdamConfig, TrainConfig
from jax_cnn.data import FashionMNIST
from jax_cnn.model import apply
from jax_cnn.train import cross_entropy, to_images
from jax_cnn.trainer import JaxTrainer

LIMIT_TEST = 650  # not a multiple of the evaluation's batch


@pytest.fixture(scope="module")
def trainer(data: FashionMNIST) -> JaxTrainer:
    """Return a compiled trainer whose epoch has three full batches and a remainder."""
    return JaxTrainer(TrainConfig(limit_train=3 * 64 + 8, limit_test=LIMIT_TEST), data, jax.devices("cpu")[:1])


def test_the_evaluation_counts_every_image_once(data: FashionMNIST, trainer: JaxTrainer) -> None:
    """650 images are two batches of 250 and one of 150: a mean over batches would give the last 150 too much weight."""
    params = jax.tree.map(jnp.asarray, torch_layout.to_flax(trainer.weights()))
    pixels, labels = jnp.asarray(data.test_images[:LIMIT_TEST]), jnp.asarray(data.test_labels[:LIMIT_TEST])
    logits = apply(params, to_images(pixels, jnp.dtype(jnp.float32)))
    loss, accuracy = trainer.evaluate()
    assert loss == pytest.approx(float(cross_entropy(logits, labels).mean()), rel=1e-6)
    assert accuracy == int((logits.argmax(axis=1) == labels).sum()) / LIMIT_TEST


@pytest.mark.parametrize("dtype", ["uint8", "int32", "int64"])
def test_labels_of_every_integer_dtype_give_pytorchs_loss(dtype: str) -> None:
    logits, labels = np.random.default_rng(0).normal(size=(10, 10)).astype(np.float32), np.arange(10)
    expected = torch.nn.functional.cross_entropy(torch.from_numpy(logits), torch.from_numpy(labels), reduction="none")
    with jax.enable_x64(dtype == "int64"):
        ours = cross_entropy(jnp.asarray(logits), jnp.asarray(labels.astype(dtype)))
    assert np.asarray(ours) == pytest.approx(expected.numpy(), rel=1e-6)


@pytest.mark.parametrize("label", [10, 255])
def test_a_label_beyond_the_classes_makes_the_loss_nan(label: int) -> None:
    """PyTorch raises an error. Compiled code cannot, but it must not score the image as one of another class."""
    logits = jnp.zeros((2, 10))
    assert np.isnan(cross_entropy(logits, jnp.array([3, label], jnp.uint8))).tolist() == [False, True]
    clipped = cross_entropy(logits, jnp.clip(jnp.array([3, label], jnp.uint8), 0, 9))  # the check can fail
    assert np.isfinite(clipped).all()


def lowered_step(loss_fn: train.LossFn) -> str:
    """Trace a training step anew, and return the text of its program."""
    optimizer = train.make_optimizer(AdamConfig())
    state = jax.eval_shape(lambda: train.init_state(model.init_params(jax.random.key(0)), optimizer))
    images, labels = jax.ShapeDtypeStruct((8, 28, 28, 1), jnp.float32), jax.ShapeDtypeStruct((8,), jnp.uint8)
    step = jax.jit(partial(train.train_step, optimizer=optimizer, loss_fn=loss_fn))
    return step.lower(state, images, labels).as_text()


def test_tracing_a_step_twice_gives_the_same_program() -> None:
    """Python's counters and random numbers do not become part of the program."""
    assert lowered_step(train.loss_fn) == lowered_step(train.loss_fn)

    def noisy(*batch: Any) -> jax.Array:
        return train.loss_fn(*batch) * np.random.default_rng().random()

    assert lowered_step(noisy) != lowered_step(noisy)  # the check can fail


def compilations(run: Callable[[], object], log: pytest.LogCaptureFixture) -> list[str]:
    """Return JAX's messages about what it compiles during a call."""
    log.clear()
    with jax.log_compiles():
        run()
    return log.messages


def test_an_epoch_compiles_nothing(trainer: JaxTrainer, caplog: pytest.LogCaptureFixture) -> None:
    """All is compiled before: neither the first batch nor the smaller last one waits for a compilation."""
    assert not compilations(lambda: (list(trainer.train_epoch(0)), trainer.evaluate()), caplog)
    assert compilations(lambda: jax.jit(lambda: 0)(), caplog)  # the check can fail


def test_a_chunk_is_reported_when_it_is_done(trainer: JaxTrainer) -> None:
    """So the measured time of an epoch includes its work, and not only its dispatch."""

    def done() -> bool:
        return all(leaf.is_ready() for leaf in jax.tree.leaves(trainer._state))

    for _ in trainer.train_epoch(0):
        assert done()
    (first, *others), tree = jax.tree.flatten(trainer._state)
    trainer._state = jax.tree.unflatten(tree, [jax.jit(late)(first), *others])
    assert not done()  # the check can fail


def late(leaf: jax.Array) -> jax.Array:
    """Return the same leaf after about a second: XLA computes these products in plain loops."""
    square = jnp.full((700, 700), 1 / 700)
    return leaf + (0 * jnp.linalg.matrix_power(square, 8).sum()).astype(leaf.dtype)

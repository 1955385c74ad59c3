"""The trainers of the two training commands do the same: they are compared as they train, not copies of their parts."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest

import train_torch
from jax_cnn import train, trainer
from jax_cnn.checkpoint import AdamState
from jax_cnn.config import JaxTrainConfig
from jax_cnn.data import FashionMNIST, epoch_order
from jax_cnn.torch_layout import TorchDict
from jax_cnn.trainer import CHUNK_STEPS, EVALUATION_BATCH, Chunk, JaxTrainer, chunk_shapes
from parity_tests.parity.trainers import (
    Batch,
    compare_epochs,
    compare_feeds,
    compare_rounding,
    draw_weights,
    make_trainer,
    record_feed,
    train_epochs,
    train_last_steps,
    train_nudged,
)

BATCH = 3
REMAINDER = 2
STEPS = CHUNK_STEPS + 2  # full batches in an epoch, in two chunks
LONG = 300  # steps after which rounding has driven apart any two runs, of the same framework too
LONG_BATCH = 8  # with smaller batches that takes longer


@pytest.fixture(scope="module")
def short(data_dir: Path) -> JaxTrainConfig:
    """Return two epochs of SimpleCNN in float64. Training and test set end with a smaller batch."""
    config = JaxTrainConfig(data_dir=data_dir, device="cpu", precision="float64", batch_size=BATCH, epochs=2)
    return replace(config, limit_train=STEPS * BATCH + REMAINDER, limit_test=EVALUATION_BATCH + 10)


def compare_training(config: JaxTrainConfig) -> list[str]:
    """Train both trainers, as they are now, from the same weights, and return what differs."""
    start = draw_weights(config)
    return list(map(str, compare_epochs(train_epochs("jax", config, start), train_epochs("torch", config, start))))


def test_both_trainers_end_two_epochs_with_the_same_weights_moments_and_scores(short: JaxTrainConfig) -> None:
    shapes = chunk_shapes(STEPS * BATCH + REMAINDER, BATCH)
    assert shapes == [(CHUNK_STEPS, BATCH), (1, REMAINDER)]
    assert not compare_training(short)


def test_a_remainder_s_loss_divided_by_a_full_batch_is_caught(
    short: JaxTrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    sound = train.loss_fn

    def faulty(params: Any, images: jax.Array, labels: jax.Array, network: Any) -> jax.Array:
        return sound(params, images, labels, network) * len(images) / BATCH

    monkeypatch.setattr(train, "loss_fn", faulty)
    (difference,) = compare_training(replace(short, model="linear"))  # all networks train with the same loss
    assert difference.startswith(f"trainers: epoch 0, step {STEPS}, loss of {REMAINDER} images: error ")


@pytest.fixture(scope="module")
def whole(data_dir: Path) -> JaxTrainConfig:
    """Return two epochs of all images, of the network that trains fastest: all are fed the same way."""
    return JaxTrainConfig(data_dir=data_dir, device="cpu", precision="float64", epochs=2, model="linear")


@pytest.fixture(scope="module")
def torch_feed(whole: JaxTrainConfig) -> list[list[Batch]]:
    """Return what PyTorch's trainer is fed."""
    return record_feed("torch", whole)


@pytest.fixture(scope="module")
def train_set(data: FashionMNIST) -> Batch:
    """Return all training images with their labels."""
    return Batch(data.train_images, data.train_labels)


def test_both_trainers_are_fed_every_image_once_in_the_same_batches(
    whole: JaxTrainConfig, torch_feed: list[list[Batch]], train_set: Batch
) -> None:
    assert [len(batches) for batches in torch_feed] == [938, 938]
    assert not list(compare_feeds(record_feed("jax", whole), torch_feed, train_set))


def test_a_chunk_that_is_fed_twice_is_caught(
    whole: JaxTrainConfig, torch_feed: list[list[Batch]], train_set: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    early, late = 1, 12
    sound = JaxTrainer._chunks

    def faulty(self: JaxTrainer, epoch: int, start: int) -> Iterator[Chunk]:
        chunks = list(sound(self, epoch, start))
        chunks[late] = chunks[early]
        yield from chunks

    monkeypatch.setattr(JaxTrainer, "_chunks", faulty)
    jax_feed = record_feed("jax", replace(whole, epochs=1))
    pixels, labels, once = map(str, compare_feeds(jax_feed, torch_feed[:1], train_set))
    assert pixels.startswith(f"feed: epoch 0, batch {late * CHUNK_STEPS}, pixels: error ")
    assert labels.startswith(f"feed: epoch 0, batch {late * CHUNK_STEPS}, labels: error ")
    assert once == ("feed: epoch 0, every image once: JAX leaves out 4,096 images and is fed 4,096 once too often")


@pytest.mark.parametrize("sides", ["JAX", "JAX and PyTorch"])
def test_a_feed_that_repeats_the_first_order_is_caught(
    sides: str, whole: JaxTrainConfig, train_set: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    def first_order(seed: int, epoch: int, size: int) -> np.ndarray:
        return epoch_order(seed, 0, size)

    monkeypatch.setattr(trainer, "epoch_order", first_order)
    if sides == "JAX and PyTorch":
        monkeypatch.setattr(train_torch, "epoch_order", first_order)
    config, served = replace(whole, limit_train=200), Batch(*(array[:200] for array in train_set))
    differences = list(map(str, compare_feeds(record_feed("jax", config), record_feed("torch", config), served)))
    if sides == "JAX":
        assert differences[0].startswith("feed: epoch 1, batch 0, pixels: error ")
    assert "feed: epoch 1, order: JAX repeats the order of epoch 0" in differences
    assert ("feed: epoch 1, order: PyTorch repeats the order of epoch 0" in differences) == ("PyTorch" in sides)


NUDGES = {1: 2, LONG: 6}  # some nudged runs stay near the others for 300 steps, which says nothing of the noise


@pytest.fixture(scope="module")
def long(data_dir: Path) -> JaxTrainConfig:
    """Return an epoch of many steps in float32."""
    return JaxTrainConfig(
        data_dir=data_dir, device="cpu", batch_size=LONG_BATCH, limit_train=LONG * LONG_BATCH, limit_test=1
    )


def run_float32(framework: str, long: JaxTrainConfig, steps: int) -> list[AdamState]:
    """Return the states after the epoch's last steps in float32, without and with nudged weights."""
    start = draw_weights(long)
    with make_trainer(framework, long, start) as made:
        return train_nudged(made, start, LONG - steps, NUDGES[steps])


def run_float64(long: JaxTrainConfig, steps: int) -> AdamState:
    """Return the state after these steps in float64, which is the same in both frameworks."""
    start: TorchDict = {name: array.astype(np.float64) for name, array in draw_weights(long).items()}
    with make_trainer("torch", replace(long, precision="float64"), start) as made:
        return train_last_steps(made, start, LONG - steps)


@pytest.mark.parametrize("steps", [1, pytest.param(LONG, marks=pytest.mark.slow)])
def test_in_float32_both_trainers_are_as_near_float64_as_one_ulp_allows(long: JaxTrainConfig, steps: int) -> None:
    """Largest error over 3 seeds, in units of the noise: 1.5 after one step, 1.6 after 300."""
    jax_runs, torch_runs = (run_float32(framework, long, steps) for framework in ("jax", "torch"))
    assert not list(map(str, compare_rounding(jax_runs, torch_runs, run_float64(long, steps), steps)))


def test_gradients_rounded_to_bfloat16_are_caught(long: JaxTrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    sound = train.train_step

    def faulty(state: Any, images: Any, labels: Any, optimizer: optax.GradientTransformation, loss_fn: Any) -> Any:
        rounding = optax.stateless(lambda grads, _: jax.tree.map(to_bfloat16, grads))
        chained = optax.chain(rounding, optimizer)
        new_state, loss = sound(
            state._replace(opt_state=(optax.EmptyState(), state.opt_state)), images, labels, chained, loss_fn
        )
        return new_state._replace(opt_state=new_state.opt_state[1]), loss

    monkeypatch.setattr(train, "train_step", faulty)
    jax_runs, torch_runs = (run_float32(framework, long, 1) for framework in ("jax", "torch"))
    differences = list(map(str, compare_rounding(jax_runs, torch_runs, run_float64(long, 1), steps=1)))
    assert differences[0].startswith("float32: after step 1, first moment conv1.weight: JAX in float32 is ")


def to_bfloat16(gradient: jax.Array) -> jax.Array:
    """Round to bfloat16. XLA removes a cast there and back."""
    return jax.lax.reduce_precision(gradient, exponent_bits=8, mantissa_bits=7)

"""The network is the same network: names, shapes, numbers, data; and its operations, loss, evaluation and step.

`parity/test_trainers.py` compares the training with PyTorch's.
"""

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import numpy as np
import pytest
import torch
from jax import lax
from jax import numpy as jnp

from experiments.answers import FRAMEWORKS, compute_stages
from jax_cnn import ops, torch_layout, train
from jax_cnn.config import AdamConfig, TrainConfig
from jax_cnn.data import FashionMNIST
from jax_cnn.model import init_params
from jax_cnn.torch_layout import TorchDict, to_torch
from jax_cnn.train import cross_entropy, to_images
from jax_cnn.trainer import JaxTrainer


def test_every_stage_has_the_reference_shape(torch_weights: TorchDict, data: FashionMNIST) -> None:
    image = data.test_images[0]
    ours, theirs = (compute_stages(framework, torch_weights, image) for framework in FRAMEWORKS)
    assert list(ours) == list(theirs) == ["conv1", "relu1", "pool1", "conv2", "relu2", "pool2", "fc1", "relu3", "fc2"]
    assert ours["pool2"].shape == (64, 7, 7)
    for stage, expected in theirs.items():
        assert ours[stage].shape == expected.shape
        assert np.abs(ours[stage] - expected).max() <= 1e-6


def test_the_layout_map_goes_both_ways_bit_by_bit(torch_weights: TorchDict) -> None:
    back = torch_layout.to_torch(torch_layout.to_flax(torch_weights))
    assert back.keys() == torch_weights.keys()
    assert all(np.array_equal(back[name], torch_weights[name]) for name in back)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda tensors: tensors.pop("conv2.bias"), "conv2.bias is missing"),
        (lambda tensors: tensors.update({"fc3.bias": np.zeros(10)}), "fc3.bias is unknown"),
        (lambda tensors: tensors.update({"fc2.bias": np.zeros(1)}), r"fc2.bias has shape \(1,\), not \(10,\)"),
    ],
)
def test_the_layout_map_refuses_what_it_does_not_know(
    torch_weights: TorchDict, change: Callable[[TorchDict], object], complaint: str
) -> None:
    change(torch_weights)
    with pytest.raises(ValueError, match=complaint):
        torch_layout.to_flax(torch_weights)


def test_pixels_are_scaled_as_to_tensor_does_to_the_last_bit() -> None:
    every_value = np.resize(np.arange(256, dtype=np.uint8), (1, 28, 28))
    ours = np.asarray(jax.jit(to_images, static_argnums=1)(jnp.asarray(every_value), jnp.dtype(jnp.float32)))[..., 0]
    assert np.array_equal(ours, every_value.astype(np.float32) / np.float32(255))


# --- Initial weights ---


def draw(seed: int) -> TorchDict:
    """Return JAX's initial weights under PyTorch's names."""
    return to_torch(jax.device_get(init_params(jax.random.key(seed))))


def test_every_seed_draws_other_weights_and_keeps_them() -> None:
    first, again, other = (draw(seed)["fc1.weight"] for seed in (0, 0, 1))
    assert np.array_equal(first, again)
    assert np.mean(first == other) < 0.01


# --- Training ---


@pytest.fixture(scope="module")
def trainer(data: FashionMNIST) -> JaxTrainer:
    """Return a compiled trainer whose epoch has three full batches and a remainder."""
    return JaxTrainer(TrainConfig(limit_train=3 * 64 + 8, limit_test=650), data, jax.devices("cpu")[:1])


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
    state = jax.eval_shape(lambda: train.init_state(init_params(jax.random.key(0)), optimizer))
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
    """The measured time of an epoch has to include its work, and not only its dispatch."""

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


# --- The hand-written backward passes equal XLA's own, on ties too ---


FLOAT64_BOUND = 1e-12  # worst seen over 20 seeds: 5.7e-14, for gradients up to 68


def xla_conv(images: jax.Array, kernel: jax.Array) -> jax.Array:
    """Apply XLA's convolution with its own backward pass."""
    return lax.conv_general_dilated(images, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def xla_max_pool(images: jax.Array) -> jax.Array:
    """Apply XLA's max-pool: its backward pass, select-and-scatter, sends the gradient to the first maximum."""
    return lax.reduce_window(images, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")


def gradients(function: Callable[..., jax.Array], *arguments: jax.Array) -> tuple[np.ndarray, ...]:
    """Return gradients of an output whose places have different weights, so that exchanged places are noticed."""

    def weighted(*arguments: jax.Array) -> jax.Array:
        output = function(*arguments)
        return (output * jnp.cos(jnp.arange(output.size)).reshape(output.shape)).sum()

    return tuple(map(np.asarray, jax.grad(weighted, tuple(range(len(arguments))))(*arguments)))


@pytest.mark.parametrize("levels", [1, 3, 1000], ids=["all ties", "many ties", "few ties"])
def test_max_pool_sends_the_gradient_to_the_first_maximum(levels: int) -> None:
    images = jnp.asarray(np.random.default_rng(0).integers(levels, size=(4, 14, 10, 8)), jnp.float32)
    assert np.array_equal(ops.max_pool2x2(images), xla_max_pool(images))
    assert np.array_equal(gradients(ops.max_pool2x2, images)[0], gradients(xla_max_pool, images)[0])


def stage_by_stage(features: jax.Array, bias: jax.Array) -> jax.Array:
    """Compute the three stages that the merged operation replaces."""
    return ops.max_pool2x2(jax.nn.relu(ops.add_bias(features, bias)))


def rounded_together(shape: tuple[int, ...]) -> np.ndarray:
    """Return float32 numbers that often become equal when a bias of 1 is added, because their last bits are lost."""
    rng = np.random.default_rng(0)
    return (rng.integers(-2, 3, shape) + rng.integers(5, size=shape) * 2.0**-25).astype(np.float32)


@pytest.mark.parametrize("levels", [1, 3, 1000, None], ids=["all ties", "many ties", "few ties", "ties by rounding"])
def test_the_merged_bias_relu_and_pool_equals_the_three_stages_bit_by_bit(levels: int | None) -> None:
    rng, shape = np.random.default_rng(0), (4, 14, 10, 8)
    features = jnp.asarray(rounded_together(shape) if levels is None else rng.integers(levels, size=shape) - levels / 2)
    bias = jnp.asarray(np.ones(8) if levels is None else rng.normal(size=8), jnp.float32)
    features = features.astype(jnp.float32)
    assert np.array_equal(ops.bias_relu_max_pool2x2(features, bias), stage_by_stage(features, bias))
    ours, theirs = gradients(ops.bias_relu_max_pool2x2, features, bias), gradients(stage_by_stage, features, bias)
    assert np.array_equal(ours[0], theirs[0])
    np.testing.assert_allclose(ours[1], theirs[1], rtol=1e-5, atol=1e-5)  # summed in another order


def test_the_first_maximum_with_the_bias_is_another_one_than_without() -> None:
    """The test above could not see a gradient at the maximum without the bias if the two were at the same place."""
    features = jnp.asarray(rounded_together((4, 14, 10, 8)))
    with_bias, without = (np.asarray(ops._first_maximum(values)) for values in (features + 1, features))
    assert (with_bias != without).mean() > 0.01


@pytest.mark.parametrize("channels", [1, 32])
def test_a_block_is_convolution_bias_relu_and_pool(channels: int) -> None:
    """With one channel, the value alone is computed in another way than the value with a gradient."""

    def in_turn(images: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
        return stage_by_stage(xla_conv(images, kernel), bias)

    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        shapes = (4, 14, 10, channels), (3, 3, channels, 8), (8,)
        block = [jnp.asarray(rng.normal(size=shape)) for shape in shapes]
        ways = ops.conv_bias_relu_pool, ops.plain_conv_bias_relu_pool, in_turn
        values = [np.asarray(way(*block)) for way in ways]
        gradients_of_ways = [gradients(way, *block) for way in ways]
    for value, own in zip(values[:2], gradients_of_ways[:2], strict=True):
        assert np.abs(value - values[2]).max() <= FLOAT64_BOUND
        for our, their in zip(own, gradients_of_ways[2], strict=True):
            assert np.abs(our - their).max() <= FLOAT64_BOUND


@pytest.mark.parametrize("levels", [1, 3, None], ids=["all ties", "many ties", "ties by rounding"])
def test_both_ways_of_a_block_send_the_gradient_to_the_same_places(levels: int | None) -> None:
    rng, shape = np.random.default_rng(0), (4, 14, 10, 1)
    images = jnp.asarray(rounded_together(shape) if levels is None else rng.integers(levels, size=shape) - levels / 2)
    kernel = jnp.zeros((3, 3, 1, 1)).at[1, 1].set(1)  # each sum has one term, so both ways round alike
    block = images.astype(jnp.float32), kernel, jnp.ones(1)
    ours, theirs = gradients(ops.cpu_conv_bias_relu_pool, *block), gradients(ops.plain_conv_bias_relu_pool, *block)
    assert np.array_equal(ours[0], theirs[0])


def test_a_platform_gets_its_own_way() -> None:
    """XLA's own gradient of a pool is a select_and_scatter, and that of a convolution another convolution."""
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((4, 8, 8, 1), (3, 3, 1, 4), (4,))]
    traced = jax.jit(jax.grad(lambda *block: ops.conv_bias_relu_pool(*block).sum(), (0, 1, 2))).trace(*shapes)
    texts = {name: traced.lower(lowering_platforms=(name,)).as_text() for name in ("cpu", "cuda", "rocm", "tpu")}
    scatters = {name: len(re.findall(r"stablehlo\.select_and_scatter\b", text)) for name, text in texts.items()}
    convolutions = {name: len(re.findall(r"stablehlo\.convolution\b", text)) for name, text in texts.items()}
    assert scatters == {"cpu": 0, "cuda": 0, "rocm": 0, "tpu": 1}
    assert convolutions == {"cpu": 0, "cuda": 0, "rocm": 0, "tpu": 3}  # with one channel, a product takes their place


def test_a_block_sums_bfloat16_products_in_float32() -> None:
    """A block of one channel that rounded after every addition would agree in fewer places."""
    rng = np.random.default_rng(0)
    shapes = (64, 14, 10, 1), (3, 3, 1, 8), (8,)
    images, kernel, bias = (jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in shapes)
    expected = np.asarray(ops._block(images, kernel, bias), np.float32)
    assert (np.asarray(ops.conv_bias_relu_pool(images, kernel, bias), np.float32) == expected).mean() > 0.99


def test_nan_passes_through_the_pool() -> None:
    images = jnp.zeros((1, 2, 2, 1))
    for row, column in np.ndindex(2, 2):
        with_nan = images.at[0, row, column, 0].set(jnp.nan)
        assert np.isnan(ops.max_pool2x2(with_nan)).all()
        assert np.isnan(ops.bias_relu_max_pool2x2(with_nan, jnp.zeros(1))).all()
        assert np.isnan(ops.conv_bias_relu_pool(with_nan, jnp.ones((3, 3, 1, 1)), jnp.zeros(1))).all()

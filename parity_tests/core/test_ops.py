"""The hand-written backward passes equal XLA's own, on ties too."""

import re
from collections.abc import Callable

import jax
import numpy as np
import pytest
from jax import lax
from jax import numpy as jnp

from jax_cnn import ops

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


@pytest.mark.parametrize(("channels", "features"), [(1, 32), (32, 64)])
def test_convolution_equals_xlas_in_value_and_gradient(channels: int, features: int) -> None:
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        images = jnp.asarray(rng.normal(size=(4, 14, 10, channels)))
        kernel = jnp.asarray(rng.normal(size=(3, 3, channels, features)))
        assert np.abs(ops.conv3x3(images, kernel) - xla_conv(images, kernel)).max() <= FLOAT64_BOUND
        ours, theirs = gradients(ops.conv3x3, images, kernel), gradients(xla_conv, images, kernel)
    for our, their in zip(ours, theirs, strict=True):
        assert np.abs(our - their).max() <= FLOAT64_BOUND


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
    """So the test above fails if the gradient goes to the maximum of the features without their bias."""
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

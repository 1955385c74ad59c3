"""The network's convolution, bias and max-pool, with backward passes that are fast on the CPU.

Each operation has the value and the gradient of its XLA counterpart, ties included. Only the way to compute them
differs, because three of XLA's own ways are slow on a CPU:
- The gradient of `lax.conv_general_dilated` inside `lax.scan` runs in a naive loop, because XLA rewrites convolutions
  for its fast kernels only outside of loops: a step takes 271 ms.
- The gradient of `lax.reduce_window` runs on one thread: a step takes 41 ms.
- The gradient of a bias, which is a sum over all pixels, runs on one thread too.
A step with all operations of this file takes 10 ms (64 images, 2 cores with AVX-512, float32, jax 0.10.2, inside
`lax.scan`). The times in the docstrings are how much longer a step takes without the operation.

A TPU gets XLA's own ways: `conv_bias_relu_pool`, which the network uses, chooses by platform.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

Images = Float[Array, "batch height width channels"]
Features = Float[Array, "batch height width features"]
Pooled = Float[Array, "batch height/2 width/2 channels"]


def conv3x3(images: Images, kernel: Float[Array, "3 3 channels features"]) -> Features:
    """Apply a 3x3 convolution: stride 1, zero padding 1, no bias, as `nn.Conv2d(…, 3, padding=1, bias=False)`.

    With one channel, a matrix product over all patches is faster than a convolution of nine products per output, both
    forward and backward (0.2 to 0.6 ms).
    """
    if images.shape[-1] > 1:
        return _canonical_conv_with_vjp(images, kernel)
    # Both operands have two dimensions: with more, XLA transposes the output gradient (8 ms).
    return (_patches(images) @ kernel.reshape(9, -1)).reshape(*images.shape[:-1], -1)


def _patches(images: Float[Array, "batch height width 1"]) -> Float[Array, "batch*height*width 9"]:
    """Return the 3x3 neighbourhood of every pixel, row by row, with zeros outside the image."""
    _, height, width, _ = images.shape
    padded = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    shifted = [padded[:, row : row + height, column : column + width] for row in range(3) for column in range(3)]
    return jnp.concatenate(shifted, axis=-1).reshape(-1, 9)


def _canonical_conv(images: Array, kernel: Array) -> Array:
    """Convolve in the one form that XLA's fast CPU kernels accept inside a loop: NHWC images, HWIO kernel."""
    padding = ((1, 1), (1, 1))
    return lax.conv_general_dilated(images, kernel, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))


_canonical_conv_with_vjp = jax.custom_vjp(_canonical_conv)


def _canonical_conv_forward(images: Array, kernel: Array) -> tuple[Array, tuple[Array, Array]]:
    return _canonical_conv(images, kernel), (images, kernel)


def _canonical_conv_backward(residuals: tuple[Array, Array], grad: Array) -> tuple[Array, Array]:
    """Compute both gradients as convolutions in the same form."""
    images, kernel = residuals
    # A pixel's gradient comes from the 3x3 outputs that it fed: the kernel turned by 180 degrees, channels swapped.
    images_grad = _canonical_conv(grad, kernel[::-1, ::-1].swapaxes(2, 3))
    # The output gradient is a kernel as large as the images, and the sum runs over the batch.
    kernel_grad = _canonical_conv(images.transpose(3, 1, 2, 0), grad.transpose(1, 2, 0, 3))
    return images_grad, kernel_grad.transpose(1, 2, 0, 3)


_canonical_conv_with_vjp.defvjp(_canonical_conv_forward, _canonical_conv_backward)


@jax.custom_vjp
def add_bias(features: Features, bias: Float[Array, " features"]) -> Features:
    """Add a bias. Its gradient is summed over the batch first, on all threads and vectorised.

    XLA computes the sum over all pixels at once on one thread (0.9 ms).
    """
    return features + bias


def _bias_gradient(grad: Features) -> Float[Array, " features"]:
    over_batch = lax.optimization_barrier(grad.sum(0))  # XLA would merge the two sums into one again
    return over_batch.sum((0, 1))


add_bias.defvjp(lambda features, bias: (features + bias, None), lambda _, grad: (grad, _bias_gradient(grad)))


@jax.custom_vjp
def max_pool2x2(x: Images) -> Pooled:
    """Apply a 2x2 max-pool of stride 2. Of equal values the first gets the gradient, as in PyTorch.

    Height and width are even. The forward pass is `reduce_window`, because XLA would compute a maximum of slices again
    for every operation that reads it (0.4 ms).
    """
    return _window_maximum(x)


def _window_maximum(x: Images) -> Pooled:
    return lax.reduce_window(x, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")


def _first_maximum(x: Images) -> Int[Array, "batch height/2 width/2 channels"]:
    """Return the place (0 to 3, row by row) of the first maximum in each 2x2 window."""
    batch, height, width, channels = x.shape
    windows = x.reshape(batch, height // 2, 2, width // 2, 2, channels)
    left, right = windows[:, :, :, :, 0], windows[:, :, :, :, 1]
    row_maximum, column = lax.max(left, right), right > left  # > and not >=: the first of equals wins
    lower = row_maximum[:, :, 1] > row_maximum[:, :, 0]
    return (2 * lower + jnp.where(lower, column[:, :, 1], column[:, :, 0])).astype(jnp.int8)


def _to_first_maximum(x: Images, grad: Pooled) -> Images:
    """Send each window's gradient to its first maximum.

    Searching the maximum again is faster than storing its place in the forward pass (1 ms).
    """
    place = _first_maximum(x)[:, :, None, :, None, :]
    places = jnp.arange(4, dtype=place.dtype).reshape(2, 1, 2, 1)  # a window's rows and columns; the rest is broadcast
    grad_windows = jnp.where(place == places, grad[:, :, None, :, None, :], jnp.zeros((), grad.dtype))
    return grad_windows.reshape(x.shape)


max_pool2x2.defvjp(lambda x: (max_pool2x2(x), x), lambda x, grad: (_to_first_maximum(x, grad),))


@jax.custom_vjp
def bias_relu_max_pool2x2(features: Features, bias: Float[Array, " features"]) -> Pooled:
    """Compute `max_pool2x2(relu(add_bias(features, bias)))` with bias and ReLU after the pool (1.3 of 13.5 ms).

    The value is the same bit by bit: neither a rounded addition nor ReLU changes the order of numbers, so both can
    follow the maximum, where a quarter of the numbers is left. The gradient by the features is the same bit by bit too:
    it goes to the first maximum of the features with their bias, or nowhere if that is not above zero. Only the
    gradient by the bias is summed in another order.
    """
    return jax.nn.relu(_window_maximum(features) + bias)


def _bias_relu_max_pool2x2_forward(features: Array, bias: Array) -> tuple[Array, tuple[Array, Array, Array]]:
    pooled = bias_relu_max_pool2x2(features, bias)
    return pooled, (features, bias, pooled)


def _bias_relu_max_pool2x2_backward(residuals: tuple[Array, Array, Array], grad: Array) -> tuple[Array, Array]:
    features, bias, pooled = residuals
    passed = jnp.where(pooled > 0, grad, jnp.zeros((), grad.dtype))
    return _to_first_maximum(features + bias, passed), _bias_gradient(passed)


bias_relu_max_pool2x2.defvjp(_bias_relu_max_pool2x2_forward, _bias_relu_max_pool2x2_backward)


def conv_bias_relu_pool(
    images: Images, kernel: Float[Array, "3 3 channels features"], bias: Float[Array, " features"]
) -> Float[Array, "batch height/2 width/2 features"]:
    """Compute a block of the network: 3x3 convolution, bias, ReLU and 2x2 max-pool.

    JAX chooses one of two ways where it lowers the program for a platform. A TPU gets `plain_conv_bias_relu_pool`: its
    compiler estimates half of the cycles for a step with it. A GPU gets the same operations as the CPU, which were
    faster than the plain ones there, too (docs/hardware.md).
    """
    return lax.platform_dependent(images, kernel, bias, tpu=plain_conv_bias_relu_pool, default=cpu_conv_bias_relu_pool)


def plain_conv_bias_relu_pool(
    images: Images, kernel: Float[Array, "3 3 channels features"], bias: Float[Array, " features"]
) -> Float[Array, "batch height/2 width/2 features"]:
    """Compute the block as you would write it first: with XLA's operations, and the gradients that JAX derives."""
    conv = lax.conv_general_dilated(images, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return _window_maximum(jax.nn.relu(conv + bias))


def cpu_conv_bias_relu_pool(
    images: Images, kernel: Float[Array, "3 3 channels features"], bias: Float[Array, " features"]
) -> Float[Array, "batch height/2 width/2 features"]:
    """Compute `bias_relu_max_pool2x2(conv3x3(images, kernel), bias)`, with the operations of this file.

    With one channel and no gradient it needs no matrix product: each number of the output is the maximum of four sums
    of nine products, in registers (0.17 of the 0.66 s of evaluating 10,000 images). A training step needs the features
    again in the backward pass, and is not faster with it.
    """
    block = _block_of_one_channel if images.shape[-1] == 1 else _block
    return block(images, kernel, bias)


def _block(images: Array, kernel: Array, bias: Array) -> Array:
    return bias_relu_max_pool2x2(conv3x3(images, kernel), bias)


@jax.custom_vjp
def _block_of_one_channel(images: Array, kernel: Array, bias: Array) -> Array:
    dtype = jnp.promote_types(images.dtype, jnp.float32)  # sums are float32, as in matrix products of bfloat16
    _, height, width, _ = images.shape
    padded = jnp.pad(images.astype(dtype), ((0, 0), (1, 1), (1, 1), (0, 0)))

    def features(row: int, column: int) -> Array:
        """Return the features of the pixels at this place of their 2x2 windows."""
        total = jnp.zeros((), dtype)
        for (down, right), weights in zip(np.ndindex(3, 3), kernel.astype(dtype).reshape(9, -1), strict=True):
            rows = slice(row + down, row + down + height - 1, 2)
            columns = slice(column + right, column + right + width - 1, 2)
            total += padded[:, rows, columns] * weights
        return total

    largest = functools.reduce(lax.max, itertools.starmap(features, np.ndindex(2, 2)))
    return jax.nn.relu(largest.astype(images.dtype) + bias)


_block_of_one_channel.defvjp(functools.partial(jax.vjp, _block), lambda pull_back, grad: pull_back(grad))

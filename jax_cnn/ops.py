"""The network's two costly operations, with backward passes that stay fast on the CPU.

Both equal their XLA counterparts, `lax.conv_general_dilated` and `lax.reduce_window`, in value and in gradient. They
differ in how the gradient is computed: XLA turns convolutions into a form that its CPU kernels know only outside of
loops, so that the gradient of a convolution inside `lax.scan` runs in a naive loop; and the gradient of `reduce_window`
runs on one thread.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

Images = Float[Array, "batch height width channels"]
Kernel = Float[Array, "3 3 channels features"]


def _canonical_conv(images: Array, kernel: Array) -> Array:
    """Convolves in the one layout that XLA's fast CPU kernels take inside a loop: NHWC images, HWIO kernel."""
    return lax.conv_general_dilated(
        images, kernel, (1, 1), ((1, 1), (1, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


@jax.custom_vjp
def conv3x3(images: Images, kernel: Kernel) -> Float[Array, "batch height width features"]:
    """3x3 convolution, stride 1, zero padding 1, no bias: `nn.Conv2d(channels, features, 3, padding=1, bias=False)`."""
    return _canonical_conv(images, kernel)


def _conv3x3_forward(images: Images, kernel: Kernel) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _canonical_conv(images, kernel), (images, kernel)


def _conv3x3_backward(residuals: tuple[jax.Array, jax.Array], grad: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both gradients are convolutions too, written in canonical form."""
    images, kernel = residuals
    # Every input pixel gathers from the 3x3 outputs that it fed: the kernel turned by 180 degrees, channels swapped.
    images_grad = _canonical_conv(grad, kernel[::-1, ::-1].swapaxes(2, 3))
    # The output gradient slides over the images as a kernel as large as they are; the batch is what is summed over.
    kernel_grad = _canonical_conv(images.transpose(3, 1, 2, 0), grad.transpose(1, 2, 0, 3)).transpose(1, 2, 0, 3)
    return images_grad, kernel_grad


conv3x3.defvjp(_conv3x3_forward, _conv3x3_backward)


def _max_and_argmax(
    x: Images,
) -> tuple[Float[Array, "batch rows columns channels"], Int[Array, "batch rows columns channels"]]:
    """The maximum of each 2x2 window and the place (0 to 3, row-major) of the first element that attains it."""
    batch, height, width, channels = x.shape
    windows = x.reshape(batch, height // 2, 2, width // 2, 2, channels)
    left, right = windows[:, :, :, :, 0], windows[:, :, :, :, 1]
    row_max, column = lax.max(left, right), right > left  # > and not >=: the first of equals wins
    top, bottom = row_max[:, :, 0], row_max[:, :, 1]
    lower = bottom > top
    place = 2 * lower + jnp.where(lower, column[:, :, 1], column[:, :, 0])
    return lax.max(top, bottom), place.astype(jnp.int8)


@jax.custom_vjp
def max_pool2x2(x: Images) -> Float[Array, "batch height/2 width/2 channels"]:
    """2x2 max-pool, stride 2; of equal values the first in row-major order gets the gradient, as in PyTorch."""
    return _max_and_argmax(x)[0]


def _max_pool2x2_forward(x: Images) -> tuple[jax.Array, jax.Array]:
    return _max_and_argmax(x)


def _max_pool2x2_backward(place: jax.Array, grad: jax.Array) -> tuple[jax.Array]:
    batch, rows, columns, channels = grad.shape
    places = jnp.arange(4, dtype=place.dtype).reshape(
        2, 1, 2, 1
    )  # a window's rows and columns, broadcast over the others
    chosen = place[:, :, None, :, None, :] == places
    grad_windows = jnp.where(chosen, grad[:, :, None, :, None, :], jnp.zeros((), grad.dtype))
    return (grad_windows.reshape(batch, 2 * rows, 2 * columns, channels),)


max_pool2x2.defvjp(_max_pool2x2_forward, _max_pool2x2_backward)

"""The training core: pure functions from state to state. They use no devices, files or time."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax import lax
from jax import numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from jax_cnn.config import AdamConfig
from jax_cnn.model import Apply, Params, apply

PADDING = 255  # the label of an image that only fills up a batch of the evaluation

Pixels = UInt8[Array, "steps batch 28 28"]
Labels = UInt8[Array, "steps batch"]
LossFn = Callable[[Any, Any, Any], jax.Array]  # (params, images, labels) -> mean loss


class TrainState(NamedTuple):
    """All that a step changes."""

    params: Any  # the network's tree of weights
    opt_state: optax.OptState


class Scores(NamedTuple):
    """Sums over images: the caller divides once, by the number of all images."""

    loss_sum: Float[Array, ""]
    correct: Int[Array, ""]


def make_optimizer(config: AdamConfig) -> optax.GradientTransformation:
    """Return Adam with torch.optim.Adam's arithmetic: eps is added outside the square root (`eps_root=0`)."""
    return optax.adam(config.learning_rate, config.b1, config.b2, config.eps, eps_root=0.0)


def init_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """Return the state before the first step: these weights, and both moments zero."""
    return TrainState(params, optimizer.init(params))


def to_images(pixels: UInt8[Array, "batch 28 28"], dtype: jnp.dtype) -> Float[Array, "batch 28 28 1"]:
    """Scale 0 … 255 to 0 … 1 and add the channel, as torchvision's ToTensor does, to the last bit.

    This is a table and not a division, because XLA turns a division by a constant into a product with its reciprocal,
    which misses the last bit of some pixels.
    """
    levels = jnp.asarray(np.arange(256, dtype=dtype) / np.dtype(dtype).type(255))
    return levels[pixels][..., None]


def cross_entropy(
    logits: Float[Array, "batch 10"], labels: Int[Array, " batch"] | UInt8[Array, " batch"]
) -> Float[Array, " batch"]:
    """Return the negative log-likelihood of each image's class under softmax."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels.astype(jnp.int32))


def compute_logits(
    params: Params, images: Float[Array, "batch 28 28 1"], network: Apply = apply
) -> Float[Array, "batch 10"]:
    """Run the network in the dtype of the images, and return logits in the dtype of the weights.

    With bfloat16 images and float32 weights this is mixed precision (Micikevicius et al., 2018, arXiv:1710.03740): the
    weights that Adam keeps, their gradients and the loss stay float32. bfloat16 has float32's range, so no loss scaling
    is needed.
    """
    weights_dtype = jax.tree.leaves(params)[0].dtype
    cast_params = jax.tree.map(lambda weight: weight.astype(images.dtype), params)
    return network(cast_params, images).astype(weights_dtype)


def loss_fn(
    params: Params, images: Float[Array, "batch 28 28 1"], labels: UInt8[Array, " batch"], network: Apply = apply
) -> Float[Array, ""]:
    """Return the mean cross-entropy over the batch."""
    return cross_entropy(compute_logits(params, images, network), labels).mean()


def train_step(
    state: TrainState,
    images: Float[Array, "batch height width channels"],
    labels: UInt8[Array, " batch"],
    optimizer: optax.GradientTransformation,
    loss_fn: LossFn = loss_fn,
) -> tuple[TrainState, Float[Array, ""]]:
    """Take one step of the optimizer; return the new state, and the batch's mean loss before the step."""
    loss, grads = jax.value_and_grad(loss_fn)(state.params, images, labels)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    return TrainState(optax.apply_updates(state.params, updates), opt_state), loss


def train_chunk(
    state: TrainState,
    pixels: Pixels,
    labels: Labels,
    steps: Int[Array, ""],
    optimizer: optax.GradientTransformation,
    dtype: jnp.dtype,
    network: Apply = apply,
) -> tuple[TrainState, Float[Array, " steps"]]:
    """Train on the first `steps` batches, computing in `dtype`; return the mean loss of each, and zeros after them.

    One call runs many steps: no step waits for Python, and temporaries are allocated once. The number of steps is known
    only at run time, so that a last, shorter chunk needs no program of its own.
    """

    def step(
        index: Int[Array, ""], carry: tuple[TrainState, Float[Array, " steps"]]
    ) -> tuple[TrainState, Float[Array, " steps"]]:
        state, losses = carry
        images = to_images(pixels[index], dtype)
        state, loss = train_step(state, images, labels[index], optimizer, partial(loss_fn, network=network))
        return state, losses.at[index].set(loss)

    losses = jnp.zeros(len(pixels), jax.tree.leaves(state.params)[0].dtype)
    return lax.fori_loop(0, steps, step, (state, losses))


def evaluate(params: Params, pixels: Pixels, labels: Labels, dtype: jnp.dtype, network: Apply = apply) -> Scores:
    """Return the summed loss and the number of correct predictions over all images whose label is not `PADDING`."""

    def score(
        batch: tuple[UInt8[Array, "batch 28 28"], UInt8[Array, " batch"]],
    ) -> tuple[Float[Array, " batch"], Int[Array, " batch"]]:
        pixels, labels = batch
        logits = compute_logits(params, to_images(pixels, dtype), network)
        losses = jnp.where(labels == PADDING, 0, cross_entropy(logits, jnp.where(labels == PADDING, 0, labels)))
        return losses, (logits.argmax(axis=1) == labels).astype(jnp.int32)

    losses, correct = lax.map(score, (pixels, labels))
    return Scores(losses.sum(), correct.sum())

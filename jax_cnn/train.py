"""The training core: pure functions from state to state. No I/O, no printing, no clock."""

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
    """Adam with torch.optim.Adam's arithmetic: eps is added outside the square root (`eps_root=0`)."""
    return optax.adam(config.learning_rate, config.b1, config.b2, config.eps, eps_root=0.0)


def init_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """Start training from these weights, with both moments at zero."""
    return TrainState(params, optimizer.init(params))


def to_images(pixels: UInt8[Array, "batch 28 28"], dtype: jnp.dtype) -> Float[Array, "batch 28 28 1"]:
    """Scale 0 … 255 to 0 … 1 and add the channel, as torchvision's ToTensor does, to the last bit.

    A table and not a division: XLA multiplies by the reciprocal of a constant, which misses some pixels' last bit.
    """
    levels = jnp.asarray(np.arange(256, dtype=dtype) / np.dtype(dtype).type(255))
    return levels[pixels][..., None]


def cross_entropy(
    logits: Float[Array, "batch 10"], labels: Int[Array, " batch"] | UInt8[Array, " batch"]
) -> Float[Array, " batch"]:
    """Negative log-likelihood of each image's class under softmax."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels.astype(jnp.int32))


def compute_logits(
    params: Params, images: Float[Array, "batch 28 28 1"], network: Apply = apply
) -> Float[Array, "batch 10"]:
    """Run the network in the dtype of the images, and return logits in the dtype of the weights.

    With bfloat16 images and float32 weights this is mixed precision (Micikevicius et al., 2018, arXiv:1710.03740): the
    weights that Adam keeps, their gradients and the loss stay float32. bfloat16 has float32's range, so that no loss
    scaling is needed.
    """
    weights_dtype = jax.tree.leaves(params)[0].dtype
    cast = jax.tree.map(lambda weight: weight.astype(images.dtype), params)
    return network(cast, images).astype(weights_dtype)


def loss_fn(
    params: Params,
    images: Float[Array, "batch 28 28 1"],
    labels: UInt8[Array, " batch"],
    network: Apply = apply,
) -> Float[Array, ""]:
    """Mean cross-entropy over the batch."""
    return cross_entropy(compute_logits(params, images, network), labels).mean()


def train_step(
    state: TrainState,
    images: Float[Array, "batch height width channels"],
    labels: UInt8[Array, " batch"],
    optimizer: optax.GradientTransformation,
    loss_fn: LossFn = loss_fn,
    axis: str | None = None,
) -> tuple[TrainState, Float[Array, ""]]:
    """One step of the optimizer; returns the new state and the batch's mean loss before it.

    Along a mesh's `axis`, each device holds an equal share of the batch: the mean of their means is the batch's.
    """
    loss, grads = jax.value_and_grad(loss_fn)(state.params, images, labels)
    if axis is not None:
        loss, grads = lax.pmean((loss, grads), axis)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    return TrainState(optax.apply_updates(state.params, updates), opt_state), loss


def train_chunk(
    state: TrainState,
    pixels: Pixels,
    labels: Labels,
    steps: Int[Array, ""],
    optimizer: optax.GradientTransformation,
    dtype: jnp.dtype,
    axis: str | None = None,
    network: Apply = apply,
) -> tuple[TrainState, Float[Array, " steps"]]:
    """Train on the first `steps` batches, computing in `dtype`; returns the mean loss of each (zeros after them).

    One call runs many steps, so that no step waits for Python and temporaries are allocated once. How many is known
    only when it runs, so that a last, shorter chunk needs no program of its own.
    """

    def step(
        index: Int[Array, ""], carry: tuple[TrainState, Float[Array, " steps"]]
    ) -> tuple[TrainState, Float[Array, " steps"]]:
        state, losses = carry
        images = to_images(pixels[index], dtype)
        state, loss = train_step(state, images, labels[index], optimizer, partial(loss_fn, network=network), axis)
        return state, losses.at[index].set(loss)

    losses = jnp.zeros(len(pixels), jax.tree.leaves(state.params)[0].dtype)
    return lax.fori_loop(0, steps, step, (state, losses))


def evaluate(
    params: Params,
    pixels: Pixels,
    labels: Labels,
    dtype: jnp.dtype,
    axis: str | None = None,
    network: Apply = apply,
) -> Scores:
    """Summed loss and number of correct predictions over all images but those with the label `PADDING`."""

    def score(pixels: UInt8[Array, "batch 28 28"], labels: UInt8[Array, " batch"]) -> Scores:
        logits = compute_logits(params, to_images(pixels, dtype), network)
        losses = jnp.where(labels == PADDING, 0, cross_entropy(logits, jnp.where(labels == PADDING, 0, labels)))
        return Scores(losses.sum(), (logits.argmax(axis=1) == labels).sum())

    parts = lax.map(lambda batch: score(*batch), (pixels, labels))
    total: Scores = jax.tree.map(lambda part: part.sum(axis=0), parts)
    return total if axis is None else lax.psum(total, axis)

"""The training core: pure functions from state to state. No I/O, no printing, no clock."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax import lax
from jax import numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from jax_cnn.config import AdamConfig
from jax_cnn.model import Params, apply

EVALUATION_BATCH = 100  # 20 to 100 are equally fast on a CPU, 500 is slower: activations leave the cache

Pixels = UInt8[Array, "size 28 28"]
Labels = UInt8[Array, " size"]
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


def loss_fn(params: Params, images: Float[Array, "batch 28 28 1"], labels: UInt8[Array, " batch"]) -> Float[Array, ""]:
    """Mean cross-entropy over the batch."""
    return cross_entropy(apply(params, images), labels).mean()


def train_step(
    state: TrainState,
    images: Float[Array, "batch height width channels"],
    labels: UInt8[Array, " batch"],
    optimizer: optax.GradientTransformation,
    loss_fn: LossFn = loss_fn,
) -> tuple[TrainState, Float[Array, ""]]:
    """One step of the optimizer; returns the new state and the batch's mean loss before it."""
    loss, grads = jax.value_and_grad(loss_fn)(state.params, images, labels)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    return TrainState(optax.apply_updates(state.params, updates), opt_state), loss


def train_chunk(
    state: TrainState,
    pixels: Pixels,
    labels: Labels,
    order: Int[Array, "steps batch"],
    optimizer: optax.GradientTransformation,
) -> tuple[TrainState, Float[Array, " steps"]]:
    """As many steps as `order` has rows, each on the images that its row names; returns every step's mean loss.

    One call runs many steps, so that the data set stays on the device, no step waits for Python, and temporaries are
    allocated once.
    """
    dtype = jax.tree.leaves(state.params)[0].dtype

    def step(state: TrainState, batch: Int[Array, " batch"]) -> tuple[TrainState, Float[Array, ""]]:
        return train_step(state, to_images(pixels[batch], dtype), labels[batch], optimizer)

    return lax.scan(step, state, order)


def evaluate(params: Params, pixels: Pixels, labels: Labels) -> Scores:
    """Summed loss and number of correct predictions over all images, in batches of `EVALUATION_BATCH`."""
    dtype = jax.tree.leaves(params)[0].dtype

    def score(pixels: Pixels, labels: Labels) -> Scores:
        logits = apply(params, to_images(pixels, dtype))
        return Scores(cross_entropy(logits, labels).sum(), (logits.argmax(axis=1) == labels).sum())

    full = len(pixels) - len(pixels) % EVALUATION_BATCH
    batches = (pixels[:full].reshape(-1, EVALUATION_BATCH, 28, 28), labels[:full].reshape(-1, EVALUATION_BATCH))
    parts = lax.map(lambda batch: score(*batch), batches)
    total: Scores = jax.tree.map(lambda part: part.sum(axis=0), parts)
    if full < len(pixels):
        total = jax.tree.map(jnp.add, total, score(pixels[full:], labels[full:]))
    return total

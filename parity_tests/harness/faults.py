"""The catalogue of planted bugs, which the checks must find."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
import optax
import torch
from jax import numpy as jnp
from torch import nn

from jax_cnn.train import cross_entropy
from parity_tests.harness import planting
from parity_tests.harness.checks import BATCH_SIZES
from parity_tests.harness.pair import Pair
from parity_tests.harness.planting import (
    Find,
    Plant,
    change_batches,
    change_initialisation,
    change_middle,
    change_stage,
    change_tensor,
    find_stage,
    find_tensor,
    find_weight_after_flatten,
    set_fields,
    stage_before,
)


class Fault(NamedTuple):
    """A bug, the check that must find it, and the place that this check must name.

    Attributes:
        name: for the command line.
        side: where the bug is: JAX, PyTorch or both.
        what: the bug in words.
        check: the name of the check.
        where: part of the place, which depends on the pair.
        plant: returns the pair with the bug. It and `where` raise a LookupError if the pair has no place for it.
    """

    name: str
    side: str
    what: str
    check: str
    where: Callable[[Pair], str]
    plant: Plant


conv_weight = partial(find_tensor, ndim=4)
last_weight = partial(find_tensor, ndim=2, which=-1)
bias = partial(find_tensor, ndim=1)
relu = partial(find_stage, kind=nn.ReLU)
pool = partial(find_stage, kind=nn.MaxPool2d)
conv = partial(find_stage, kind=nn.Conv2d)
linear = partial(find_stage, kind=nn.Linear)


def output_of(find: Find) -> Find:
    """Return the output of the stage, or of the tensor's stage, as a check names it."""
    return lambda pair: f"output of {find(pair).rpartition('.')[0] or find(pair)}"


def gradient_before(find: Find) -> Find:
    """Return the gradient by the output of the stage in front of this one, as a check names it."""
    return lambda pair: f"gradient by the output of {stage_before(pair, find(pair))}"


def first_tensor(pair: Pair) -> str:
    """Return the name of the first tensor in the layout."""
    return next(iter(pair.layout))


def place(words: str) -> Find:
    """Return a place that is the same for every pair."""
    return lambda pair: words


FAULTS = (
    Fault("flatten-order", "JAX", "the linear weight behind the flatten keeps PyTorch's order of rows", "outputs",
          output_of(find_weight_after_flatten), planting.only_transpose_after_flatten),
    Fault("kernel-flipped", "JAX", "the convolution's kernel is turned by 180 degrees", "transfer",
          conv_weight, change_tensor(conv_weight, lambda kernel: kernel[::-1, ::-1])),
    Fault("axes-swapped", "JAX", "the convolution's rows and columns are swapped", "transfer",
          conv_weight, change_tensor(conv_weight, lambda kernel: kernel.swapaxes(0, 1))),
    Fault("padding-one-sided", "JAX", "the convolution pads below and to the right only", "outputs",
          output_of(conv), change_stage(conv, planting.one_sided_conv)),
    Fault("bias-left-out", "JAX", "a layer's bias is not added", "outputs",
          output_of(linear), change_stage(linear, lambda _, value, own: value - own["bias"])),
    Fault("relu-half-at-zero", "JAX", "ReLU has gradient 0.5 at 0, as max(x, 0) has", "gradients",
          gradient_before(relu), change_stage(relu, lambda inputs, *_: jnp.maximum(inputs, 0))),
    Fault("relu-leaky", "JAX", "ReLU lets 1 % of negative values through", "outputs",
          output_of(relu), change_stage(relu, lambda inputs, *_: jax.nn.leaky_relu(inputs, 0.01))),
    Fault("pool-splits-ties", "JAX", "max-pooling splits the gradient among equal values", "gradients",
          gradient_before(pool), change_stage(pool, lambda inputs, *_: planting.windows(inputs).max(axis=(2, 4)))),
    Fault("pool-averages", "JAX", "the pool averages", "outputs",
          output_of(pool), change_stage(pool, lambda inputs, *_: planting.windows(inputs).mean(axis=(2, 4)))),
    Fault("loss-summed", "JAX", "the loss is summed over the batch instead of averaged", "loss",
          place("batch of"), set_fields(jax_loss=lambda logits, labels: cross_entropy(logits, labels).sum())),
    Fault("remainder-weighted-wrongly", "JAX", "the smaller last batch is divided by the size of a full one", "loss",
          place(f"batch of {BATCH_SIZES[1]}"), set_fields(jax_loss=planting.mean_over(BATCH_SIZES[0]))),
    Fault("label-smoothing", "PyTorch", "the loss smooths labels by 1 %", "loss", place("batch of"),
          set_fields(torch_loss=nn.CrossEntropyLoss(label_smoothing=0.01))),
    Fault("gradient-sign", "JAX", "the sign of one entry of one gradient is flipped", "gradients",
          lambda pair: f"gradient by {last_weight(pair)}", planting.flip_one_gradient(last_weight)),
    Fault("eps-inside-root", "JAX", "Adam's eps is added inside the square root, as in TensorFlow's RMSprop",
          "optimizer", place("from the start, step 1, weights"),
          set_fields(jax_optimizer=lambda c: optax.adam(c.learning_rate, c.b1, c.b2, eps=0.0, eps_root=c.eps))),
    Fault("no-bias-correction", "JAX", "Adam's moments are not corrected for their start at 0", "optimizer",
          place("from the start, step 1, weights"), set_fields(jax_optimizer=planting.adam_without_bias_correction)),
    Fault("betas-swapped", "JAX", "Adam's two decays are swapped", "optimizer",
          place("from the start, step 1, first moment"),
          set_fields(jax_optimizer=lambda c: optax.adam(c.learning_rate, c.b2, c.b1, c.eps))),
    Fault("step-off-by-one", "JAX", "Adam's bias correction counts one step too many", "optimizer",
          place("from the start, step 1, weights"), set_fields(jax_optimizer=planting.adam_one_step_ahead)),
    Fault("learning-rate", "JAX", "the learning rate is 1 % too large", "optimizer",
          place("from the start, step 1, weights"),
          set_fields(jax_optimizer=lambda c: optax.adam(1.01 * c.learning_rate, c.b1, c.b2, c.eps))),
    Fault("weight-decay", "PyTorch", "Adam decays the weights by 1e-4", "optimizer",
          place("from the start, step 1, first moment"),
          set_fields(torch_optimizer=partial(torch.optim.Adam, weight_decay=1e-4))),
    Fault("biases-zero", "JAX", "biases are initialised to zero", "initialisation",
          bias, change_initialisation(planting.zero_biases)),
    Fault("lecun-normal", "JAX", "weights are drawn as Flax does by default", "initialisation",
          first_tensor, change_initialisation(planting.lecun_normal)),
    Fault("labels-shifted", "JAX", "labels are one too large", "data", place("epoch 0, batch 0: labels"),
          change_batches(lambda batch: batch._replace(labels=(batch.labels + 1) % 10))),
    Fault("pixels-not-scaled", "JAX", "pixels are not divided by 255", "data", place("epoch 0, batch 0: inputs"),
          change_batches(lambda batch: batch._replace(inputs=batch.inputs * 255))),
    Fault("fixed-order", "PyTorch", "every epoch visits the images in the order of the first", "data",
          place("epoch 1, batch 0"), planting.repeat_the_first_order),
    Fault("remainder-dropped", "JAX", "the images left over after the last full batch do not train", "data",
          place("epoch 0, batch"), planting.drop_remainder),
    Fault("one-nan", "JAX", "one weight is NaN", "transfer",
          conv_weight, change_tensor(conv_weight, change_middle(lambda value: np.nan))),
    Fault("nan-on-both-sides", "both", "one weight is NaN on both sides", "transfer",
          first_tensor, planting.poison_both),
    Fault("one-float32-tensor", "JAX", "one tensor is left at float32 in a float64 run", "shapes",
          last_weight, change_tensor(last_weight, lambda array: array.astype(np.float32))),
    Fault("one-weight", "JAX", "one weight is changed by 1e-6", "transfer",
          last_weight, change_tensor(last_weight, change_middle(lambda value: value + 1e-6))),
    Fault("unmapped-tensor", "JAX", "one tensor is missing in the layout", "shapes", bias, planting.unmap),
)  # fmt: skip

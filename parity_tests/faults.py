"""The catalogue of planted faults, which the checks must find in any pair that has a place for them."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
import torch
from jax import numpy as jnp
from torch import nn

from parity_tests import planting, programs
from parity_tests.harness.pair import Pair, as_inputs, jax_objective, torch_objective
from parity_tests.planting import (
    NORMS,
    Find,
    Leaves,
    Plant,
    change_in_use,
    change_module,
    change_tensor,
    find_layer,
    find_tensor,
    layer_before,
    layer_of,
    require,
    set_fields,
)


class Fault(NamedTuple):
    """A fault, the check that must find it, and the place that this check must name.

    Attributes:
        name: for the command line.
        side: where the fault is: JAX, PyTorch or both.
        what: the fault in words.
        check: the name of the check.
        where: part of the place, which depends on the pair.
        plant: returns the pair with the fault. It and `where` raise a LookupError if the pair has no place for it.
        kinds: the kinds of network that have a place for it.
    """

    name: str
    side: str
    what: str
    check: str
    where: Find
    plant: Plant
    kinds: tuple[str, ...]


CONV, REC, ATT = "convolutional", "recurrent", "attention"
ALL, TOKENS = (CONV, REC, ATT), (REC, ATT)

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
conv_weight = find_tensor(*CONVOLUTIONS)
last_weight = find_tensor(nn.Linear, which=-1)
last_bias = find_tensor(nn.Linear, name="bias", which=-1)
first_weight = find_tensor()
norm_weight = find_tensor(*NORMS)
embedding = find_tensor(nn.Embedding)
norm, batch_norm = find_layer(*NORMS), find_layer(nn.modules.batchnorm._BatchNorm)
middle = planting.find_first(norm, find_layer(*CONVOLUTIONS, nn.Linear))
relu, pool, dropout = find_layer(nn.ReLU), find_layer(nn.MaxPool2d), find_layer(nn.Dropout)
recurrent = find_layer(nn.RNNBase)


def place(words: str) -> Find:
    """Return a place that is the same for every pair."""
    return lambda pair: words


def name_of(find: Find, words: str = "{}") -> Find:
    """Return a place that holds the name of a layer or a tensor."""
    return lambda pair: words.format(find(pair))


def output_of(find: Find) -> Find:
    """Return the output of a layer, or of the layer that holds a tensor, as a check names it."""

    def where(pair: Pair) -> str:
        name = find(pair)
        layers = {layer for layer, _ in pair.new_module().named_modules()}
        return f"output of {name if name in layers else name.rpartition('.')[0]}"

    return where


# --- Losses ---


def change_loss(change: Callable[[Callable[..., Any], Any, Any], Any]) -> Plant:
    """Replace JAX's loss by change(loss, outputs, targets)."""

    def plant(pair: Pair) -> Pair:
        loss = jax_objective(pair)
        return set_fields(
            torch_loss=torch_objective(pair), jax_loss=lambda outputs, targets: change(loss, outputs, targets)
        )(pair)

    return plant


def need_tokens(plant: Plant) -> Plant:
    """Refuse a pair whose targets have no axis of time."""

    def checked(pair: Pair) -> Pair:
        if np.ndim(pair.draw_targets(0, 2)) < 2:
            raise LookupError(f"{pair.title()} has no target for each token")
        return plant(pair)

    return checked


def divide_by_full_batch(loss: Callable[..., Any], outputs: Any, targets: Any) -> Any:
    """Divide the sum over the batch by a size that only full batches have."""
    return loss(outputs, targets) * len(targets) / 8


def shift_targets(loss: Callable[..., Any], outputs: Any, targets: Any) -> Any:
    """Compare each token with the label of the next one."""
    return loss(outputs, jnp.concatenate([targets[:, 1:], targets[:, :1]], axis=1))


def mean_of_means(loss: Callable[..., Any], outputs: Any, targets: Any) -> Any:
    """Average the means of the sequences, which have different lengths."""
    return jnp.mean(jnp.stack([loss(outputs[row : row + 1], targets[row : row + 1]) for row in range(len(targets))]))


def smooth_labels(pair: Pair) -> Pair:
    """Give all classes together a share of 1 % in the targets of PyTorch's loss."""
    loss = torch_objective(pair)

    def smoothed(outputs: Any, targets: Any) -> torch.Tensor:
        return 0.99 * loss(outputs, targets) - 0.01 * torch.log_softmax(outputs, -1).mean()

    return set_fields(torch_loss=smoothed, jax_loss=jax_objective(pair))(pair)


# --- Optimizers ---


def train_by(
    torch_optimizer: Callable[[nn.Module], torch.optim.Optimizer],
    jax_optimizer: Callable[[Any], optax.GradientTransformation],
    **fields: Any,
) -> Plant:
    """Train by other optimizers on both sides. JAX's gets the pair's learning rate or schedule."""

    def plant(pair: Pair) -> Pair:
        rate = 1e-3 if pair.jax_schedule is None else pair.jax_schedule
        steps = {"torch_step": None, "jax_step": None, "micro_batches": 1, **fields}
        return set_fields(torch_optimizer=torch_optimizer, jax_optimizer=jax_optimizer(rate), **steps)(pair)

    return plant


def by_torch(kind: type[torch.optim.Optimizer], **options: Any) -> Callable[[nn.Module], torch.optim.Optimizer]:
    """Return how an optimizer of PyTorch is made for a module."""
    return lambda module: kind(module.parameters(), **{"lr": 1e-3, **options})


adam = by_torch(torch.optim.Adam)


def change_adam(change: Callable[[Any, Any], Any]) -> Callable[[Any], optax.GradientTransformation]:
    """Return Adam whose step is change(gradients, state before the step)."""

    def make(rate: Any) -> optax.GradientTransformation:
        sound = optax.scale_by_adam()

        def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
            _, after = sound.update(grads, state, params)
            return change(grads, state), after

        return optax.chain(optax.GradientTransformation(sound.init, update), optax.scale_by_learning_rate(rate))

    return make


def without_bias_correction(grads: Any, state: Any) -> Any:
    """Use both moments as they are, which makes the first steps too large."""
    _, after = optax.scale_by_adam().update(grads, state)
    return jax.tree.map(lambda mu, nu: mu / (jnp.sqrt(nu) + 1e-8), after.mu, after.nu)


def one_step_ahead(grads: Any, state: Any) -> Any:
    """Correct the moments as if one more step had been taken."""
    return optax.scale_by_adam().update(grads, state._replace(count=state.count + 1))[0]


def sgd_with_momentum(rate: Any) -> optax.GradientTransformation:
    """Return SGD with momentum as PyTorch has it by default."""
    return optax.sgd(rate, momentum=0.9)


def decay_matrices(module: nn.Module) -> torch.optim.Optimizer:
    """Return AdamW that decays no biases and no scales."""
    parameters = list(module.parameters())
    groups = [
        {"params": [parameter for parameter in parameters if parameter.ndim > 1], "weight_decay": 0.1},
        {"params": [parameter for parameter in parameters if parameter.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=1e-3)


def clip_and_step(module: nn.Module, optimizer: torch.optim.Optimizer, losses: Iterator[torch.Tensor]) -> None:
    """Take a step along gradients whose norm is at most 0.1."""
    for loss in losses:
        loss.backward()
    nn.utils.clip_grad_norm_(module.parameters(), 0.1)
    optimizer.step()


def average_and_step(module: nn.Module, optimizer: torch.optim.Optimizer, losses: Iterator[torch.Tensor]) -> None:
    """Take a step along the mean of two gradients."""
    for loss in losses:
        (loss / 2).backward()
    optimizer.step()


def sum_and_step(optimizer: Any, gradients: Any, state: Any, params: Any) -> tuple[Any, Any]:
    """Take a step along the sum of the gradients."""
    total = jax.tree.map(lambda *parts: sum(parts), *gradients)
    updates, state = optimizer.update(total, state, params)
    return optax.apply_updates(params, updates), state


def freeze(module: nn.Module) -> None:
    """Do not train the first weight."""
    next(module.parameters()).requires_grad_(False)


def shift_schedule(pair: Pair) -> Pair:
    """Let JAX's schedule be one step ahead."""
    schedule = require(pair, "jax_schedule")
    return set_fields(jax_schedule=lambda step: schedule(step + 1))(pair)


# --- Data and initial weights ---


def change_labels(change: Callable[[np.ndarray, int], np.ndarray]) -> Plant:
    """Change the labels of every batch of JAX's pipeline; labels below 0 are ignored ones."""

    def plant(pair: Pair) -> Pair:
        targets = [batch.targets for batch in require(pair, "jax_batches")(0, 0)]
        if not np.issubdtype(targets[0].dtype, np.integer):
            raise LookupError(f"{pair.title()} has no labels that are whole numbers")
        classes = 1 + max(int(array.max()) for array in targets)
        return planting.change_batches(
            lambda batch: batch._replace(
                targets=np.where(batch.targets < 0, batch.targets, change(np.maximum(batch.targets, 0), classes))
            )
        )(pair)

    return plant


def scale_inputs(pair: Pair) -> Pair:
    """Do not divide the inputs of JAX's pipeline by 255."""
    arrays = as_inputs(next(iter(require(pair, "jax_batches")(0, 0))).inputs).arrays()
    if not any(np.issubdtype(array.dtype, np.floating) for array in arrays):
        raise LookupError(f"{pair.title()} has no inputs that are real numbers")
    return planting.change_batches(
        lambda batch: batch._replace(
            inputs=as_inputs(batch.inputs).map(
                lambda array: array * array.dtype.type(255) if np.issubdtype(array.dtype, np.floating) else array
            )
        )
    )(pair)


def shift_tokens(pair: Pair) -> Pair:
    """Count the tokens of JAX's pipeline from 1."""
    arrays = as_inputs(next(iter(require(pair, "jax_batches")(0, 0))).inputs).arrays()
    if not any(array.dtype == np.int64 for array in arrays):
        raise LookupError(f"{pair.title()} has no inputs that are whole numbers")
    return planting.change_batches(
        lambda batch: batch._replace(
            inputs=as_inputs(batch.inputs).map(lambda array: array + 1 if array.dtype == np.int64 else array)
        )
    )(pair)


def repeat_the_first_order(pair: Pair) -> Pair:
    """Let PyTorch visit the examples of every epoch in the order of the first."""
    batches = require(pair, "torch_batches")
    return set_fields(torch_batches=lambda seed, _: batches(seed, 0))(pair)


def drop_remainder(pair: Pair) -> Pair:
    """Let JAX train on full batches only."""
    batches = require(pair, "jax_batches")

    def full_batches(seed: int, epoch: int) -> Iterator[Any]:
        size = 0
        for batch in batches(seed, epoch):
            size = size or len(batch.targets)
            if len(batch.targets) == size:
                yield batch

    return set_fields(jax_batches=full_batches)(pair)


def zero_biases(key: jax.Array, leaves: Leaves) -> Leaves:
    """Set biases to zero."""
    return {path: jnp.zeros_like(leaf) if path.endswith("bias") else leaf for path, leaf in leaves.items()}


def lecun_normal(key: jax.Array, leaves: Leaves) -> Leaves:
    """Draw weights as Flax does by default."""
    draw, keys = jax.nn.initializers.lecun_normal(), jax.random.split(key, len(leaves))
    return {
        path: draw(key, leaf.shape) if leaf.ndim > 1 else leaf
        for key, (path, leaf) in zip(keys, leaves.items(), strict=True)
    }


def truncate_normal(pair: Pair) -> Pair:
    """Draw weights from a normal distribution that ends at two standard deviations, with the same variance."""
    case = planting.case_of(pair)
    draws = [case.model.leaves(case.draw_variables(seed)) for seed in range(10)] if case.can_draw else [{}]
    spread = {path: float(np.std([leaves[path] for leaves in draws])) for path in draws[0]}

    def change(key: jax.Array, leaves: Leaves) -> Leaves:
        keys = jax.random.split(key, len(leaves))
        return {
            path: spread[path] / 0.87962566 * jax.random.truncated_normal(key, -2, 2, leaf.shape)
            if leaf.ndim > 1
            else leaf
            for key, (path, leaf) in zip(keys, leaves.items(), strict=True)
        }

    return planting.change_initialisation(change)(pair)


def poison(module: nn.Module) -> None:
    """Give the module a NaN, which then reaches JAX too."""
    with torch.no_grad():
        next(module.parameters()).view(-1)[0] = torch.nan


def shift_rows(array: jax.Array) -> jax.Array:
    """Return the array with its rows shifted by one."""
    return jnp.roll(array, 1, axis=0)


def split_heads_otherwise(array: jax.Array) -> jax.Array:
    """Take the rows of queries, keys and values as if each feature were split over two heads, and not each head."""
    features = array.shape[0] // 3
    return array.reshape(3, features // 2, 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)


def drop_some(value: jax.Array) -> jax.Array:
    """Set a fifth of the values to 0 and divide the others by 0.8, as dropout in training mode does."""
    kept = jax.random.bernoulli(jax.random.key(0), 0.8, value.shape)
    return jnp.where(kept, value / 0.8, 0)


def recast(array: jax.Array) -> jax.Array:
    """Return the array in float32."""
    return array.astype(jnp.float32)


def leaf_of(find: Find) -> Find:
    """Return the path of the JAX leaf that a tensor fills."""
    return lambda pair: planting.paths_of(pair, find(pair))[0]


def next_position(value: jax.Array) -> jax.Array:
    """Return the embedding of the next position [..., time, feature]; the last one stays."""
    return jnp.concatenate([value[..., 1:, :], value[..., -1:, :]], -2)


def gradient_by(find: Find) -> Find:
    """Return the gradient by a tensor, as a check names it."""
    return name_of(find, "gradient by {}")


def gradient_by_output(find: Find) -> Find:
    """Return the gradient by the output of a layer, as a check names it."""
    return name_of(find, "gradient by the output of {}")


FIRST_STEP = place("from the start, step 1, weights")
FIRST_MOMENT = place("from the start, step 1, first moment")
attention = output_of(planting.find_attention)
bias_hh = find_tensor(nn.RNNBase, name="bias_hh")
layer_scale = find_tensor(name="layer_scale")
position = layer_of(find_tensor(nn.Embedding, which=-1))

FAULTS = (
    # Tensors
    Fault("unmapped-tensor", "JAX", "one tensor is missing in the map", "parameters", last_weight,
          planting.drop_tensor(last_weight), ALL),
    Fault("extra-tensor", "JAX", "JAX has a parameter that PyTorch does not have", "parameters", place("extra/scale"),
          planting.add_leaf, ALL),
    Fault("missing-tensor", "PyTorch", "PyTorch has a parameter that JAX does not have", "parameters", place("extra"),
          planting.add_parameter, ALL),
    Fault("one-float32-tensor", "JAX", "one tensor is left at float32 in a float64 run",
          "parameters", leaf_of(last_weight), planting.change_leaves(last_weight, recast), ALL),
    Fault("tied-weights-untied", "JAX", "a tied weight is two leaves that start equal",
          "gradients", gradient_by(planting.find_tied), programs.untie, (ATT,)),
    Fault("nan-on-both-sides", "both", "one weight is NaN on both sides", "transfer", first_weight,
          change_module(poison), ALL),
    Fault("one-nan", "JAX", "one weight is NaN", "outputs", output_of(first_weight),
          change_in_use(first_weight, planting.change_one(lambda value: jnp.nan)), ALL),
    Fault("one-weight", "JAX", "one weight is changed by 1e-6", "outputs", output_of(last_weight),
          change_in_use(last_weight, planting.change_one(lambda value: value + 1e-6)), ALL),
    Fault("one-bfloat16-weight", "JAX", "one tensor is rounded to bfloat16", "outputs", output_of(last_weight),
          change_in_use(last_weight, planting.round_through("bfloat16")), ALL),
    Fault("flatten-order", "JAX", "the linear weight behind the flatten keeps PyTorch's order of rows",
          "outputs", output_of(planting.find_after_flatten), planting.only_transpose_after_flatten, (CONV,)),
    Fault("kernel-flipped", "JAX", "the convolution's kernel is turned by 180 degrees",
          "outputs", output_of(conv_weight),
          change_tensor(conv_weight, lambda kernel: kernel[:, :, ::-1, ::-1]), (CONV,)),
    Fault("axes-swapped", "JAX", "the convolution's rows and columns are swapped", "outputs", output_of(conv_weight),
          change_tensor(conv_weight, lambda kernel: kernel.swapaxes(2, 3)), (CONV,)),
    Fault("embedding-row-shifted", "JAX", "the rows of the embedding are shifted by one",
          "outputs", output_of(embedding), change_tensor(embedding, shift_rows), TOKENS),
    Fault("gates-exchanged", "JAX", "the forget gate and the cell's gate are exchanged",
          "outputs", output_of(recurrent), change_tensor(planting.find_gated, planting.swap_blocks(1, 2, 4)), (REC,)),
    Fault("recurrent-bias-left-out", "JAX", "one of the two biases of a recurrent layer is left out",
          "parameters", bias_hh, change_tensor(bias_hh, lambda bias: 0 * bias), (REC,)),
    Fault("head-split", "JAX", "the heads of attention are split in another order",
          "outputs", output_of(planting.find_fused_projection),
          change_tensor(planting.find_fused_projection, split_heads_otherwise), (ATT,)),
    # Layers
    Fault("norm-scale-left-out", "JAX", "a norm does not multiply by its scale", "outputs", output_of(norm_weight),
          change_in_use(norm_weight, jnp.ones_like), ALL),
    Fault("layer-scale-left-out", "JAX", "a branch is not multiplied by its layer scale",
          "outputs", output_of(layer_scale), change_in_use(layer_scale, jnp.ones_like), (ATT,)),
    Fault("bias-left-out", "JAX", "a layer's bias is not added", "outputs", output_of(last_bias),
          change_in_use(last_bias, jnp.zeros_like), ALL),
    Fault("norm-eps", "JAX", "a norm adds ten times its eps", "outputs", output_of(norm),
          programs.change_equation("norm with an eps", programs.change_eps), ALL),
    Fault("padding-one-sided", "JAX", "the convolution pads below and to the right only",
          "outputs", output_of(conv_weight),
          programs.change_equation("convolution with padding", programs.pad_one_sided), (CONV,)),
    Fault("relu-half-at-zero", "JAX", "ReLU has gradient 0.5 at 0, as max(x, 0) has",
          "gradients", gradient_by_output(layer_before(relu)),
          programs.change_equation("ReLU", programs.replace_relu(lambda x: jnp.maximum(x, 0))), (CONV,)),
    Fault("relu-leaky", "JAX", "ReLU lets 1 % of negative values through", "outputs", output_of(relu),
          programs.change_equation("ReLU", programs.replace_relu(lambda x: jnp.where(x < 0, 0.01 * x, x))), (CONV,)),
    Fault("pool-splits-ties", "JAX", "max-pooling splits the gradient among equal values",
          "gradients", gradient_by_output(layer_before(pool)),
          programs.change_equation("max-pool", programs.replace_pool(jnp.max)), (CONV,)),
    Fault("pool-averages", "JAX", "the pool averages", "outputs", output_of(pool),
          programs.change_equation("max-pool", programs.replace_pool(jnp.mean)), (CONV,)),
    Fault("gelu-tanh", "JAX", "GELU is approximated by the hyperbolic tangent", "outputs", place("gelu"),
          programs.change_equation("exact GELU", programs.approximate_gelu), (ATT,)),
    Fault("attention-unscaled", "JAX", "attention's scores are not divided by the root of the number of features",
          "outputs", attention, programs.change_equation("scaled attention", programs.leave_out_scale), (ATT,)),
    Fault("causal-mask-off-by-one", "JAX", "attention looks one position into the future", "outputs", attention,
          programs.change_equation("mask of attention", programs.shift_mask), (ATT,)),
    Fault("padding-mask-ignored", "JAX", "attention looks at padding", "outputs", attention,
          planting.ignore_mask, (ATT,)),
    Fault("positions-off-by-one", "JAX", "positions are counted from 1", "outputs", output_of(position),
          programs.change_output(position, next_position), (ATT,)),
    Fault("state-not-carried", "JAX", "every step of a recurrent layer starts from the first state",
          "outputs", output_of(recurrent), programs.change_equation("scan", programs.forget_state), (REC,)),
    Fault("residual-twice", "JAX", "one branch of a residual sum is added twice", "outputs", place("add"),
          programs.change_equation("residual sum", programs.add_twice), (CONV, ATT)),
    Fault("dropout-in-evaluation", "JAX", "dropout is left on in evaluation mode", "outputs", output_of(dropout),
          programs.change_kind(("Dropout",), drop_some, training=False), (CONV, ATT)),
    Fault("one-bfloat16-activation", "JAX", "the output of a layer is rounded to bfloat16",
          "outputs", output_of(middle), programs.change_output(middle, planting.round_through("bfloat16")), ALL),
    Fault("one-float32-activation", "JAX", "the output of a layer is left at float32 in a float64 run",
          "outputs", output_of(middle), programs.change_output(middle, planting.round_through("float32")), ALL),
    # Gradients
    Fault("gradient-sign", "JAX", "the sign of one entry of one gradient is flipped",
          "gradients", gradient_by(last_weight),
          change_in_use(last_weight, programs.change_gradient(programs.flip_largest)), ALL),
    Fault("gradient-stopped", "JAX", "no gradient flows through one branch", "gradients", gradient_by_output(middle),
          programs.change_output(middle, jax.lax.stop_gradient, gradient=True), ALL),
    Fault("gradient-scaled", "JAX", "the gradient is 0.1 % too large from one layer on",
          "gradients", gradient_by_output(middle),
          programs.change_output(middle, programs.change_gradient(lambda grad: 1.001 * grad), gradient=True), ALL),
    # Training mode
    Fault("statistics-momentum", "JAX", "the momentum of the statistics is meant in the other sense",
          "statistics", name_of(batch_norm, "{}.running_"),
          planting.change_statistics(planting.exchange_momentum), (CONV,)),
    Fault("statistics-biased-variance", "JAX", "the running variance is that of the biased estimate",
          "statistics", name_of(batch_norm, "{}.running_var"),
          planting.change_statistics(planting.bias_variance), (CONV,)),
    Fault("statistics-not-updated", "JAX", "the statistics stay as they were",
          "statistics", name_of(batch_norm, "{}.running_"), planting.change_statistics(planting.keep_old), (CONV,)),
    Fault("running-statistics-in-training", "JAX", "training mode normalises by the running statistics",
          "outputs", name_of(batch_norm, "output of {}, in training mode"),
          planting.normalise_by_running_statistics, (CONV,)),
    # Losses
    Fault("loss-summed", "JAX", "the loss is summed over the batch instead of averaged", "loss", place("batch of"),
          change_loss(lambda loss, outputs, targets: loss(outputs, targets) * len(targets)), ALL),
    Fault("remainder-weighted-wrongly", "JAX", "the smaller last batch is divided by the size of a full one",
          "loss", place("batch of 5"), change_loss(divide_by_full_batch), ALL),
    Fault("label-smoothing", "PyTorch", "the loss smooths labels by 1 %", "loss", place("batch of"),
          smooth_labels, ALL),
    Fault("loss-token-shift", "JAX", "each token is compared with the label of the next one",
          "loss", place("batch of"), need_tokens(change_loss(shift_targets)), TOKENS),
    Fault("loss-mean-of-means", "JAX", "the loss is the mean of the sequences' means", "loss", place("batch of"),
          need_tokens(change_loss(mean_of_means)), TOKENS),
    # Optimizers
    Fault("learning-rate", "JAX", "the learning rate is 1 % too large", "optimizer", FIRST_STEP,
          train_by(adam, lambda rate: optax.chain(optax.adam(rate), optax.scale(1.01))), ALL),
    Fault("eps-inside-root", "JAX", "Adam's eps is added inside the square root", "optimizer", FIRST_STEP,
          train_by(adam, lambda rate: optax.adam(rate, eps=0.0, eps_root=1e-8)), ALL),
    Fault("no-bias-correction", "JAX", "Adam's moments are not corrected for their start at 0",
          "optimizer", FIRST_STEP, train_by(adam, change_adam(without_bias_correction)), ALL),
    Fault("betas-swapped", "JAX", "Adam's two decays are swapped", "optimizer", FIRST_MOMENT,
          train_by(adam, lambda rate: optax.adam(rate, 0.999, 0.9)), ALL),
    Fault("step-off-by-one", "JAX", "Adam's bias correction counts one step too many", "optimizer", FIRST_STEP,
          train_by(adam, change_adam(one_step_ahead)), ALL),
    Fault("weight-decay", "PyTorch", "Adam decays the weights by 1e-4", "optimizer", FIRST_MOMENT,
          train_by(by_torch(torch.optim.Adam, weight_decay=1e-4), optax.adam), ALL),
    Fault("decay-coupled", "JAX", "the decay is a part of the gradient, where PyTorch's AdamW shrinks the weights",
          "optimizer", FIRST_MOMENT,
          train_by(by_torch(torch.optim.AdamW, weight_decay=0.1),
                   lambda rate: optax.chain(optax.add_decayed_weights(0.1), optax.adam(rate))), ALL),
    Fault("decay-on-biases", "JAX", "biases and scales are decayed too", "optimizer", FIRST_STEP,
          train_by(decay_matrices, lambda rate: optax.adamw(rate, weight_decay=0.1)), ALL),
    Fault("clipping-left-out", "JAX", "gradients are not clipped", "optimizer", FIRST_MOMENT,
          train_by(adam, optax.adam, torch_step=clip_and_step), ALL),
    Fault("nesterov", "JAX", "momentum is not Nesterov's", "optimizer", FIRST_STEP,
          train_by(by_torch(torch.optim.SGD, momentum=0.9, nesterov=True), sgd_with_momentum), ALL),
    Fault("momentum-dampened", "PyTorch", "momentum is an average of the gradients, not a sum",
          "optimizer", place("step 2, momentum"),
          train_by(by_torch(torch.optim.SGD, momentum=0.9, dampening=0.1), sgd_with_momentum), ALL),
    Fault("rmsprop-eps", "JAX", "RMSprop's eps is added inside the square root", "optimizer", FIRST_STEP,
          train_by(by_torch(torch.optim.RMSprop, eps=1e-2, alpha=0.9),
                   lambda rate: optax.rmsprop(rate, 0.9, eps=1e-2)), ALL),
    Fault("frozen-trained", "JAX", "a frozen parameter is trained", "optimizer", name_of(first_weight, "weights {}"),
          lambda pair: train_by(adam, optax.adam)(change_module(freeze)(pair)), ALL),
    Fault("accumulation-summed", "JAX", "accumulated gradients are summed, not averaged", "optimizer", FIRST_MOMENT,
          train_by(adam, optax.adam, torch_step=average_and_step, jax_step=sum_and_step, micro_batches=2), ALL),
    Fault("schedule-off-by-one", "JAX", "the schedule is one step ahead", "schedule", place("step "),
          shift_schedule, ALL),
    # Initial weights
    Fault("biases-zero", "JAX", "biases start at zero", "initialisation", last_bias,
          planting.change_initialisation(zero_biases), ALL),
    Fault("lecun-normal", "JAX", "weights are drawn as Flax does by default", "initialisation", last_weight,
          planting.change_initialisation(lecun_normal), ALL),
    Fault("truncated-normal", "JAX", "weights are drawn from a truncated normal distribution",
          "initialisation", last_weight, truncate_normal, ALL),
    # Data
    Fault("labels-shifted", "JAX", "labels are one too large", "data", place("epoch 0, batch 0: labels"),
          change_labels(lambda labels, classes: (labels + 1) % classes), ALL),
    Fault("labels-permuted", "JAX", "classes have other numbers", "data", place("epoch 0, batch 0: labels"),
          change_labels(lambda labels, classes: np.random.default_rng(1).permutation(classes)[labels]), ALL),
    Fault("pixels-not-scaled", "JAX", "pixels are not divided by 255", "data", place("epoch 0, batch 0: inputs"),
          scale_inputs, (CONV,)),
    Fault("tokens-shifted", "JAX", "tokens are counted from 1", "data", place("epoch 0, batch 0: inputs"),
          shift_tokens, TOKENS),
    Fault("fixed-order", "PyTorch", "every epoch visits the examples in the order of the first",
          "data", place("epoch 1, batch 0"), repeat_the_first_order, ALL),
    Fault("remainder-dropped", "JAX", "the examples left over after the last full batch do not train",
          "data", place("epoch 0, batch"), drop_remainder, ALL),
)  # fmt: skip

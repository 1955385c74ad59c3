"""Tools that plant bugs in a pair: for `faults.py`, and for faults of your own.

Nothing here knows a particular network. A place is found by its kind: a convolution's weight has four axes, a stage is
a ReLU if the reference's module is one. If a pair has no such place, the tools raise a LookupError that says so.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any, TypeVar

import jax
import numpy as np
import optax
import torch
from jax import lax
from jax import numpy as jnp
from torch import nn

from jax_cnn.config import AdamConfig
from jax_cnn.model import Tap
from jax_cnn.torch_layout import Layout, TorchDict
from jax_cnn.train import cross_entropy
from parity_tests.harness.pair import Batch, Pair

Find = Callable[[Pair], str]  # the name of a tensor or a stage
Plant = Callable[[Pair], Pair]
Leaves = Mapping[str, jax.Array]  # under PyTorch's names
Part = TypeVar("Part")


def set_fields(**fields: Any) -> Plant:
    """Give the pair other values in these fields."""
    return lambda pair: replace(pair, **fields)


# --- Places ---


def find_tensor(pair: Pair, ndim: int, which: int = 0) -> str:
    """Return the name of a tensor with so many axes: the first in the layout, or the one at index `which`."""
    names = [name for name, leaf in pair.layout.items() if len(leaf.shape) == ndim]
    if not names:
        raise LookupError(f"{pair.name} has no tensor with {ndim} axes")
    return names[which]


def find_stage(pair: Pair, kind: type[nn.Module]) -> str:
    """Return the name of the first stage of this kind."""
    for stage, module in pair.module().named_children():
        if isinstance(module, kind):
            return stage
    raise LookupError(f"{pair.name} has no stage {kind.__name__}")


def find_weight_after_flatten(pair: Pair) -> str:
    """Return the name of the linear weight whose rows JAX has in another order: it is more than transposed."""
    for name, leaf in pair.layout.items():
        if len(leaf.shape) == 2:
            probe = np.arange(np.prod(leaf.shape)).reshape(leaf.shape)
            if not np.array_equal(leaf.to_jax(probe), probe.T):
                return name
    raise LookupError(f"{pair.name} has no linear layer behind a flatten of several channels")


def stage_before(pair: Pair, stage: str) -> str | None:
    """Return the name of the stage in front of this one, or None for the first."""
    stages = [name for name, _ in pair.module().named_children()]
    return stages[stages.index(stage) - 1] if stages.index(stage) else None


def require(part: Part | None, pair: Pair, name: str) -> Part:
    """Return an optional part of the pair that a fault needs."""
    if part is None:
        raise LookupError(f"{pair.name} has no {name}")
    return part


# --- Weights ---


def change_tensor(find: Find, change: Callable[[np.ndarray], np.ndarray]) -> Plant:
    """Change one tensor, in JAX's layout, on its way to JAX."""

    def plant(pair: Pair) -> Pair:
        path = pair.layout[find(pair)].path

        def carry(weights: TorchDict, layout: Layout) -> Any:
            tree = pair.torch_to_jax(weights, layout)
            branch = tree
            for module in path[:-1]:
                branch = branch[module]
            branch[path[-1]] = change(np.array(branch[path[-1]]))
            return tree

        return replace(pair, torch_to_jax=carry)

    return plant


def change_middle(change: Callable[[float], float]) -> Callable[[np.ndarray], np.ndarray]:
    """Return a function that changes the value in the middle of an array."""

    def changed(array: np.ndarray) -> np.ndarray:
        array.reshape(-1)[array.size // 2] = change(array.reshape(-1)[array.size // 2])
        return array

    return changed


def poison_both(pair: Pair) -> Pair:
    """Give the reference itself a NaN, which then reaches JAX too."""

    def module() -> nn.Module:
        poisoned = pair.module()
        with torch.no_grad():
            next(poisoned.parameters()).view(-1)[0] = torch.nan
        return poisoned

    return replace(pair, module=module)


def unmap(pair: Pair) -> Pair:
    """Leave one tensor out of the layout."""
    layout = dict(pair.layout)
    del layout[find_tensor(pair, 1)]
    return replace(pair, layout=layout)


def only_transpose_after_flatten(pair: Pair) -> Pair:
    """Leave the rows of the linear weight behind the flatten in PyTorch's order."""
    name = find_weight_after_flatten(pair)
    leaf = pair.layout[name]._replace(to_jax=np.transpose, to_torch=np.transpose)
    return replace(pair, layout={**pair.layout, name: leaf})


def change_initialisation(change: Callable[[jax.Array, Leaves], Leaves]) -> Plant:
    """Start JAX from change(key, the leaves that the pair draws from it)."""

    def plant(pair: Pair) -> Pair:
        draw = require(pair.jax_init, pair, "initialisation in JAX")
        return replace(pair, jax_init=lambda key: pair.to_tree(change(key, pair.leaves_of(draw(key)))))

    return plant


def zero_biases(key: jax.Array, leaves: Leaves) -> Leaves:
    """Set biases to zero."""
    return {name: jnp.zeros_like(leaf) if name.endswith("bias") else leaf for name, leaf in leaves.items()}


def lecun_normal(key: jax.Array, leaves: Leaves) -> Leaves:
    """Draw weights as Flax does by default: LeCun normal, and biases of zero."""
    draw = jax.nn.initializers.lecun_normal()
    keys = jax.random.split(key, len(leaves))
    return {
        name: draw(key, leaf.shape) if leaf.ndim > 1 else jnp.zeros_like(leaf)
        for key, (name, leaf) in zip(keys, leaves.items(), strict=True)
    }


# --- Stages ---


def change_stage(find: Find, change: Callable[[jax.Array, jax.Array, dict[str, jax.Array]], jax.Array]) -> Plant:
    """Replace a stage's output by change(its input, its right output, its own tensors by the last part of the name)."""

    def plant(pair: Pair) -> Pair:
        stage = find(pair)
        previous = stage_before(pair, stage)

        def apply(tree: Any, inputs: jax.Array, tap: Tap) -> jax.Array:
            outputs: dict[str | None, jax.Array] = {None: inputs}
            tensors = {name.rpartition("."): leaf for name, leaf in pair.leaves_of(tree).items()}
            own = {last: leaf for (module, _, last), leaf in tensors.items() if module == stage}

            def faulty_tap(name: str, value: jax.Array) -> jax.Array:
                outputs[name] = tap(name, change(outputs[previous], value, own) if name == stage else value)
                return outputs[name]

            return pair.apply(tree, inputs, faulty_tap)

        return replace(pair, apply=apply, training_apply=None)

    return plant


def one_sided_conv(inputs: jax.Array, _: jax.Array, own: dict[str, jax.Array]) -> jax.Array:
    """Pad below and to the right only, as a 'SAME' that was meant for an even kernel does."""
    dimensions = ("NHWC", "HWIO", "NHWC")
    padding = [(0, size - 1) for size in own["weight"].shape[:2]]
    return lax.conv_general_dilated(inputs, own["weight"], (1, 1), padding, dimension_numbers=dimensions) + own["bias"]


def windows(inputs: jax.Array) -> jax.Array:
    """Turn [batch, 2 rows, 2 columns, channel] into [batch, rows, 2, columns, 2, channel]."""
    batch, height, width, channels = inputs.shape
    return inputs.reshape(batch, height // 2, 2, width // 2, 2, channels)


def flip_one_gradient(find: Find) -> Plant:
    """Flip the sign of the largest entry of one tensor's gradient; the outputs stay as they are."""

    @jax.custom_vjp
    def identity(leaf: jax.Array) -> jax.Array:
        return leaf

    def flip(_: None, grad: jax.Array) -> tuple[jax.Array]:
        return (grad.at[jnp.unravel_index(jnp.abs(grad).argmax(), grad.shape)].multiply(-1),)

    identity.defvjp(lambda leaf: (leaf, None), flip)

    def plant(pair: Pair) -> Pair:
        name = find(pair)

        def apply(tree: Any, inputs: jax.Array, tap: Tap) -> jax.Array:
            leaves = pair.leaves_of(tree)
            return pair.apply(pair.to_tree(leaves | {name: identity(leaves[name])}), inputs, tap)

        return replace(pair, apply=apply, training_apply=None)

    return plant


# --- Loss and optimizer ---


def mean_over(size: int) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Return a mean loss that always divides by this batch size."""
    return lambda logits, labels: cross_entropy(logits, labels).sum() / size


def adam_without_bias_correction(config: AdamConfig) -> optax.GradientTransformation:
    """Return Adam that uses both moments as they are, which makes the first steps too large."""
    adam = optax.scale_by_adam(config.b1, config.b2, config.eps)

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        _, state = adam.update(grads, state, params)
        step = jax.tree.map(lambda mu, nu: -config.learning_rate * mu / (jnp.sqrt(nu) + config.eps), state.mu, state.nu)
        return step, state

    return optax.GradientTransformation(adam.init, update)


def adam_one_step_ahead(config: AdamConfig) -> optax.GradientTransformation:
    """Return Adam that corrects the moments as if one more step had been taken."""
    adam = optax.scale_by_adam(config.b1, config.b2, config.eps)

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        ahead = state._replace(count=state.count + 1)
        step, after = adam.update(grads, ahead, params)
        return jax.tree.map(lambda part: -config.learning_rate * part, step), after._replace(count=state.count + 1)

    return optax.GradientTransformation(adam.init, update)


# --- Data ---


def change_batches(change: Callable[[Batch], Batch]) -> Plant:
    """Change every batch of JAX's pipeline."""

    def plant(pair: Pair) -> Pair:
        batches = require(pair.jax_batches, pair, "data pipeline in JAX")
        return replace(pair, jax_batches=lambda seed, epoch: map(change, batches(seed, epoch)))

    return plant


def drop_remainder(pair: Pair) -> Pair:
    """Let JAX train on full batches only."""
    batches = require(pair.jax_batches, pair, "data pipeline in JAX")

    def full_batches(seed: int, epoch: int) -> Iterator[Batch]:
        size = 0
        for batch in batches(seed, epoch):
            size = size or len(batch.labels)
            if len(batch.labels) == size:
                yield batch

    return replace(pair, jax_batches=full_batches)


def repeat_the_first_order(pair: Pair) -> Pair:
    """Let PyTorch visit the images of every epoch in the order of the first."""
    batches = require(pair.torch_batches, pair, "data pipeline in PyTorch")
    return replace(pair, torch_batches=lambda seed, _: batches(seed, 0))

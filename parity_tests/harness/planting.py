"""How bugs are planted in a pair: tools for `faults.py`, and for faults of your own.

Nothing here knows a particular network. A place is found by what is there: a convolution's weight has four axes, a
stage is a ReLU if the reference's module is one.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import optax
import torch
from jax import lax
from jax import numpy as jnp
from torch import nn

from jax_cnn.config import AdamConfig
from jax_cnn.torch_layout import Layout, TorchDict
from jax_cnn.train import cross_entropy
from parity_tests.harness.pair import Batch, Pair, Tap

Find = Callable[[Pair], str]
Plant = Callable[[Pair], Pair]


def find_tensor(pair: Pair, ndim: int, which: int = 0) -> str:
    """The name of a tensor with so many axes, in the order of the layout."""
    names = [name for name, leaf in pair.layout.items() if len(leaf.shape) == ndim]
    if not names:
        raise LookupError(f"{pair.name} has no tensor with {ndim} axes")
    return names[which]


def find_stage(pair: Pair, kind: type[nn.Module]) -> str:
    """The name of the first stage of this kind."""
    for stage, module in pair.module().named_children():
        if isinstance(module, kind):
            return stage
    raise LookupError(f"{pair.name} has no stage {kind.__name__}")


def module_of(tensor: str) -> str:
    """The stage that a tensor belongs to."""
    return tensor.rpartition(".")[0]


def before(pair: Pair, stage: str) -> str:
    """The stage in front of this one."""
    stages = [name for name, _ in pair.module().named_children()]
    return stages[stages.index(stage) - 1]


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


def change_stage(find: Find, change: Callable[[jax.Array, jax.Array, dict[str, jax.Array]], jax.Array]) -> Plant:
    """Compute a stage anew, as change(the stage's input, its sound output, its weights by their last name)."""

    def plant(pair: Pair) -> Pair:
        stage = find(pair)
        stages = [name for name, _ in pair.module().named_children()]
        before = stages[stages.index(stage) - 1] if stages.index(stage) else None

        def apply(tree: Any, inputs: jax.Array, tap: Tap) -> jax.Array:
            flowing: dict[str | None, jax.Array] = {None: inputs}
            own = {
                name.rpartition(".")[2]: leaf for name, leaf in pair.leaves_of(tree).items() if module_of(name) == stage
            }

            def faulty_tap(name: str, value: jax.Array) -> jax.Array:
                flowing[name] = tap(name, change(flowing[before], value, own) if name == stage else value)
                return flowing[name]

            return pair.apply(tree, inputs, faulty_tap)

        return replace(pair, apply=apply)

    return plant


def change_batches(change: Callable[[Batch], Batch]) -> Plant:
    """Change every batch that JAX's pipeline serves."""

    def plant(pair: Pair) -> Pair:
        sound = pair.jax_batches
        return replace(pair, jax_batches=sound and (lambda seed, epoch: map(change, sound(seed, epoch))))

    return plant


def change_optimizer(make: Callable[[AdamConfig], optax.GradientTransformation]) -> Plant:
    """Train JAX with another optimizer."""
    return lambda pair: replace(pair, jax_optimizer=make)


def change_loss(loss: Callable[[jax.Array, jax.Array], jax.Array]) -> Plant:
    """Train JAX on another loss."""
    return lambda pair: replace(pair, jax_loss=loss)


def flip_one_gradient(find: Find) -> Plant:
    """Flip the sign of one entry of one tensor's gradient; the outputs stay as they are."""

    @jax.custom_vjp
    def pass_on(leaf: jax.Array) -> jax.Array:
        return leaf

    def flip(_: None, grad: jax.Array) -> tuple[jax.Array]:
        return (grad.at[jnp.unravel_index(jnp.abs(grad).argmax(), grad.shape)].multiply(-1),)

    pass_on.defvjp(lambda leaf: (leaf, None), flip)

    def plant(pair: Pair) -> Pair:
        name = find(pair)

        def apply(tree: Any, inputs: jax.Array, tap: Tap) -> jax.Array:
            leaves = pair.leaves_of(tree)
            return pair.apply(pair.to_tree(leaves | {name: pass_on(leaves[name])}), inputs, tap)

        return replace(pair, apply=apply)

    return plant


def poison_both(pair: Pair) -> Pair:
    """Give the reference itself a NaN, which then reaches JAX too."""

    def module() -> nn.Module:
        poisoned = pair.module()
        with torch.no_grad():
            next(poisoned.parameters()).view(-1)[0] = torch.nan
        return poisoned

    return replace(pair, module=module)


def one_sided_conv(inputs: jax.Array, _: jax.Array, own: dict[str, jax.Array]) -> jax.Array:
    """Pad below and to the right only, as a 'SAME' that was meant for an even kernel does."""
    dimensions = ("NHWC", "HWIO", "NHWC")
    padding = [(0, size - 1) for size in own["weight"].shape[:2]]
    return lax.conv_general_dilated(inputs, own["weight"], (1, 1), padding, dimension_numbers=dimensions) + own["bias"]


def windows(inputs: jax.Array) -> jax.Array:
    """[batch, 2 rows, 2 columns, channel] to [batch, rows, 2, columns, 2, channel]."""
    batch, height, width, channels = inputs.shape
    return inputs.reshape(batch, height // 2, 2, width // 2, 2, channels)


def adam_without_bias_correction(config: AdamConfig) -> optax.GradientTransformation:
    """Both moments as they are, which makes the first steps too large."""
    sound = optax.scale_by_adam(config.b1, config.b2, config.eps)

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        _, state = sound.update(grads, state, params)
        step = jax.tree.map(lambda mu, nu: -config.learning_rate * mu / (jnp.sqrt(nu) + config.eps), state.mu, state.nu)
        return step, state

    return optax.GradientTransformation(sound.init, update)


def adam_one_step_ahead(config: AdamConfig) -> optax.GradientTransformation:
    """Correct the moments as if one more step had been taken."""
    sound = optax.scale_by_adam(config.b1, config.b2, config.eps)

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        ahead = state._replace(count=state.count + 1)
        step, after = sound.update(grads, ahead, params)
        return jax.tree.map(lambda part: -config.learning_rate * part, step), after._replace(count=state.count + 1)

    return optax.GradientTransformation(sound.init, update)


def drop_remainder(pair: Pair) -> Pair:
    """Serve full batches only."""

    def full_batches(seed: int, epoch: int) -> Iterator[Batch]:
        sizes: set[int] = set()
        for batch in pair.jax_batches(seed, epoch):  # type: ignore[misc]  # not None where planted
            sizes.add(len(batch.labels))
            if len(sizes) == 1:
                yield batch

    return replace(pair, jax_batches=full_batches)


def repeat_the_first_order(pair: Pair) -> Pair:
    """Let PyTorch visit the images of every epoch in the order of the first."""
    batches = pair.torch_batches
    assert batches is not None
    return replace(pair, torch_batches=lambda seed, _: batches(seed, 0))


def zero_biases(pair: Pair) -> Pair:
    """Start with biases at zero, as Flax does by default."""

    def init(key: jax.Array) -> Any:
        leaves = pair.leaves_of(pair.jax_init(key))  # type: ignore[misc]  # not None where planted
        return pair.to_tree({n: jnp.zeros_like(leaf) if n.endswith("bias") else leaf for n, leaf in leaves.items()})

    return replace(pair, jax_init=init)


def lecun_normal(pair: Pair) -> Pair:
    """Start as Flax does by default: LeCun normal and zero biases."""

    def init(key: jax.Array) -> Any:
        leaves = pair.leaves_of(pair.jax_init(key))  # type: ignore[misc]  # not None where planted
        draw = jax.nn.initializers.lecun_normal()
        keys = jax.random.split(key, len(leaves))
        return pair.to_tree(
            {
                name: draw(key, leaf.shape) if leaf.ndim > 1 else jnp.zeros_like(leaf)
                for key, (name, leaf) in zip(keys, leaves.items(), strict=True)
            }
        )

    return replace(pair, jax_init=init)


def unmap(pair: Pair) -> Pair:
    """Forget one tensor in the layout."""
    layout = dict(pair.layout)
    del layout[find_tensor(pair, 1)]
    return replace(pair, layout=layout)


def after_flatten(pair: Pair) -> str:
    """The linear weight whose rows must be permuted: carrying it is more than a transpose."""
    for name, leaf in pair.layout.items():
        if len(leaf.shape) == 2:
            probe = np.arange(np.prod(leaf.shape)).reshape(leaf.shape)
            if not np.array_equal(leaf.to_jax(probe), probe.T):
                return name
    raise LookupError(f"{pair.name} has no linear layer behind a flatten of several channels")


def carry_as_if_never_flattened(pair: Pair) -> Pair:
    """Transpose the linear weight behind the flatten and leave its rows in PyTorch's order."""
    name = after_flatten(pair)
    leaf = pair.layout[name]._replace(to_jax=np.transpose, to_torch=np.transpose)
    return replace(pair, layout={**pair.layout, name: leaf})


def nudge(array: np.ndarray) -> np.ndarray:
    """Change one value, in the middle, by 1e-6."""
    array.reshape(-1)[array.size // 2] += 1e-6
    return array


def poison(array: np.ndarray) -> np.ndarray:
    """Make one value, in the middle, NaN."""
    array.reshape(-1)[array.size // 2] = np.nan
    return array


def mean_over(size: int) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """A mean that always divides by the size of a full batch."""
    return lambda logits, labels: cross_entropy(logits, labels).sum() / size

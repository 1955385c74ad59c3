"""Faults in optimizers: what is decayed, divided, clipped and trained."""

from collections.abc import Iterator, Sequence
from typing import Any

import equinox as eqx
import jax
import optax
import torch
from flax import linen, nnx
from torch import nn

from parity_tests.harness.pair import Pair
from parity_tests.parity.ports.registry import linear, nested, network, port, values

LEARNING_RATE = 1e-2


@port("P11", ("optimizer", "fc.weight"))
def eps_in_the_root(sound: bool) -> Pair:
    """RMSprop's eps stands behind the root in PyTorch, and inside it by default in optax (optax#532)."""

    def net(variables: Any, x: jax.Array) -> jax.Array:
        return linear(variables["fc"], x)

    return Pair(
        network(fc=nn.Linear(5, 3)),
        net,
        values(2, 5),
        nested,
        torch_optimizer=lambda module: torch.optim.RMSprop(module.parameters(), lr=LEARNING_RATE, alpha=0.9, eps=0.01),
        jax_optimizer=optax.rmsprop(LEARNING_RATE, decay=0.9, eps=0.01, eps_in_sqrt=not sound),
    )


@port("P12", ("optimizer", "fc1.weight"))
def coupled_decay(sound: bool) -> Pair:
    """PyTorch's Adam adds the decay to the gradient; optax.adamw adds it to the step (optax#417)."""

    class Net(eqx.Module):
        fc1: eqx.nn.Linear
        fc2: eqx.nn.Linear

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.fc2(jax.nn.relu(self.fc1(x)))

    keys = jax.random.split(jax.random.key(0))
    return Pair(
        network(fc1=nn.Linear(5, 6), relu=nn.ReLU(), fc2=nn.Linear(6, 3)),
        Net(eqx.nn.Linear(5, 6, key=keys[0]), eqx.nn.Linear(6, 3, key=keys[1])),
        values(2, 5),
        torch_optimizer=lambda module: torch.optim.Adam(module.parameters(), lr=LEARNING_RATE, weight_decay=0.1),
        jax_optimizer=optax.chain(optax.add_decayed_weights(0.1), optax.adam(LEARNING_RATE))
        if sound
        else optax.adamw(LEARNING_RATE, weight_decay=0.1),
    )


class NormedMLP(linen.Module):
    """Two dense layers and a norm between them."""

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Compute [batch, 3] from [batch, 5]."""
        x = linen.LayerNorm(epsilon=1e-5, name="norm")(linen.Dense(6, name="fc1")(x))
        return linen.Dense(3, name="fc2")(linen.relu(x))


def normed_mlp() -> nn.Module:
    """Return the same network in PyTorch."""
    return network(fc1=nn.Linear(5, 6), norm=nn.LayerNorm(6), relu=nn.ReLU(), fc2=nn.Linear(6, 3))


@port("P13", ("optimizer", "fc1.weight"), ("optimizer", "fc1.bias"))
def mask_the_wrong_way(sound: bool) -> Pair:
    """Biases and norms are decayed in place of all others (huggingface/transformers#11936, jax-ml/jax#31256)."""

    def torch_optimizer(module: nn.Module) -> torch.optim.Optimizer:
        decayed = [parameter for parameter in module.parameters() if parameter.ndim > 1]
        others = [parameter for parameter in module.parameters() if parameter.ndim == 1]
        groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
        return torch.optim.AdamW(groups, lr=LEARNING_RATE)

    def mask(params: Any) -> Any:
        return jax.tree.map(lambda leaf: (leaf.ndim > 1) == sound, params)

    return Pair(
        normed_mlp(),
        NormedMLP(),
        values(2, 5),
        torch_optimizer=torch_optimizer,
        jax_optimizer=optax.adamw(LEARNING_RATE, weight_decay=0.1, mask=mask),
    )


@port("P14", ("optimizer", "step 1, "))
def steps_of_micro_batches(sound: bool) -> Pair:
    """One clipped step with the sum of four gradients, and four steps with one each (jenkspt/gpt-jax#2)."""

    def torch_step(module: nn.Module, optimizer: torch.optim.Optimizer, losses: Iterator[torch.Tensor]) -> None:
        for loss in losses:
            loss.backward()
        nn.utils.clip_grad_value_(module.parameters(), 0.1)
        optimizer.step()

    def jax_step(optimizer: Any, gradients: Sequence[Any], opt_state: Any, params: Any) -> tuple[Any, Any]:
        sums = [jax.tree.map(lambda *leaves: sum(leaves), *gradients)] if sound else gradients
        for gradient in sums:
            updates, opt_state = optimizer.update(gradient, opt_state, params)
            params = optax.apply_updates(params, updates)
        return params, opt_state

    return Pair(
        normed_mlp(),
        NormedMLP(),
        values(2, 5),
        torch_optimizer=lambda module: torch.optim.Adam(module.parameters(), lr=LEARNING_RATE),
        jax_optimizer=optax.chain(optax.clip(0.1), optax.adam(LEARNING_RATE)),
        torch_step=torch_step,
        jax_step=jax_step,
        micro_batches=4,
    )


@port("P23-frozen", ("optimizer", "fc1.weight"))
def frozen(sound: bool) -> Pair:
    """A parameter with requires_grad=False that JAX trains (keras#22104)."""

    class Net(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.fc1, self.fc2 = nnx.Linear(5, 6, rngs=rngs), nnx.Linear(6, 3, rngs=rngs)

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.fc2(jax.nn.relu(self.fc1(x)))

    def labels(params: Any) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, _: "frozen" if "fc1" in jax.tree_util.keystr(path) and "kernel" in str(path) else "trained",
            params,
        )

    fc1 = nn.Linear(5, 6)
    fc1.weight.requires_grad = False
    adam = optax.adam(LEARNING_RATE)
    partly = optax.multi_transform({"trained": adam, "frozen": optax.set_to_zero()}, labels)
    return Pair(
        network(fc1=fc1, relu=nn.ReLU(), fc2=nn.Linear(6, 3)),
        Net(nnx.Rngs(0)),
        values(2, 5),
        torch_optimizer=lambda module: torch.optim.Adam(module.parameters(), lr=LEARNING_RATE),
        jax_optimizer=partly if sound else adam,
    )

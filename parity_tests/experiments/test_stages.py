"""The stages that the benchmark times one by one: together they are a step, and every turn of each has work to do."""

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from experiments.speed.jax_steps import STAGES, Loop, backward, make_loops, repeat, select_weights
from jax_cnn.model import Params, apply, init_params

# In units of each tensor's largest value, float32. Worst seen: 0, over 10 seeds; but XLA may fuse the two differently.
STAGE_BOUND = 1e-6


def test_the_chain_of_all_stages_is_the_network_forward_and_backward(jax_weights: Params, images: np.ndarray) -> None:
    def chain(params: Params, value: jax.Array, grad: jax.Array) -> tuple[jax.Array, Params]:
        inputs, grads = [], {layer: dict[str, jax.Array]() for layer in params}
        for stage in STAGES:
            inputs.append(value)
            value = stage.forward(select_weights(stage, params), value)
        for stage, stage_input in zip(reversed(STAGES), reversed(inputs), strict=True):
            weights_grad, *input_grad = backward(stage, select_weights(stage, params), stage_input, grad)
            grads[stage.layer] |= weights_grad
            grad = input_grad[0] if input_grad else grad
        return value, grads

    def network(params: Params, images: jax.Array, grad: jax.Array) -> tuple[jax.Array, Params]:
        logits, pull_back = jax.vjp(lambda params: apply(params, images), params)
        return logits, pull_back(grad)[0]

    grad = np.ones((len(images), 10), np.float32)
    actual, expected = (jax.jit(function)(jax_weights, images, grad) for function in (chain, network))
    assert actual[1].keys() == expected[1].keys()
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert one.shape == other.shape
        assert float(np.abs(one - other).max()) <= STAGE_BOUND * float(np.abs(other).max())


@pytest.fixture(scope="module")
def loops() -> dict[str, Loop]:
    """Return the loops of a step for a batch of two."""
    pixels = jnp.arange(2 * 28 * 28, dtype=jnp.uint8).reshape(2, 28, 28)
    return make_loops(init_params(jax.random.key(0)), pixels, jnp.array([3, 4], jnp.uint8))


def test_every_stage_is_timed_forward_and_backward_and_all_else_of_a_step(loops: dict[str, Loop]) -> None:
    passes = [f"{stage.name}, {part}" for stage in STAGES for part in ("forward", "backward")]
    assert list(loops) == ["scaling, forward", *passes, "loss, forward", "loss, backward", "Adam, update"]


def test_each_turn_writes_a_number_of_its_result_into_every_input_but_biases() -> None:
    """XLA moves what is the same in all turns out of a loop, so every turn must have something new to compute."""
    weights = {"kernel": jnp.full((2, 2), 5.0), "bias": jnp.full(2, 7.0)}
    loop = repeat(lambda weights, value: value @ weights["kernel"] / 40, weights, jnp.ones((3, 2)))
    (weights, value), result = loop.turn(loop.first)
    assert result[0, 0] == pytest.approx(10 / 40)
    assert weights["kernel"][0, 0] == value[0, 0] == result[0, 0]
    assert (weights["kernel"].ravel()[1:] == 5).all()
    assert (weights["bias"] == 7).all()
    assert not np.array_equal(loop.turn(((weights, value), result))[1], result)


def test_each_turn_of_adam_changes_weights_moments_and_gradients(loops: dict[str, Loop]) -> None:
    turn = jax.jit(loops["Adam, update"].turn)
    first = turn(loops["Adam, update"].first)
    pairs = zip(jax.tree.leaves(first), jax.tree.leaves(turn(first)), strict=True)
    changed = [not np.array_equal(one, other) for one, other in pairs]
    assert sum(changed) > len(changed) / 2  # the gradients of biases stay

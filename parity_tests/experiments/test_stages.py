"""The stages that the speed benchmark times one by one: together they are a training step, and each has work to do."""

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from experiments.speed import stages
from jax_cnn.model import Params, apply, init_params

# In units of each tensor's largest value, float32. Worst seen: 0, over 10 seeds; but XLA may fuse the two differently.
STAGE_BOUND = 1e-6


def test_the_stages_one_after_the_other_are_the_network(jax_weights: Params, images: np.ndarray) -> None:
    """Forward and backward."""

    def chained(params: Params, value: jax.Array, grad: jax.Array) -> tuple[jax.Array, Params]:
        inputs, grads = [], {layer: dict[str, jax.Array]() for layer in params}
        for stage in stages.STAGES:
            inputs.append(value)
            value = stage.forward(stages.weights_of(stage, params), value)
        for stage, given in zip(reversed(stages.STAGES), reversed(inputs), strict=True):
            weights_grad, *rest = stages.backward(stage, stages.weights_of(stage, params), given, grad)
            grads[stage.layer] |= weights_grad
            grad = rest[0] if rest else grad
        return value, grads

    def whole(params: Params, images: jax.Array, grad: jax.Array) -> tuple[jax.Array, Params]:
        logits, pull_back = jax.vjp(lambda params: apply(params, images), params)
        return logits, pull_back(grad)[0]

    grad = np.ones((len(images), 10), np.float32)
    actual, expected = (jax.jit(function)(jax_weights, images, grad) for function in (chained, whole))
    assert actual[1].keys() == expected[1].keys()
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert one.shape == other.shape
        assert float(np.abs(one - other).max()) <= STAGE_BOUND * float(np.abs(other).max())


def test_every_stage_is_timed_forward_and_backward_and_all_else_of_a_step(step_loops: dict[str, stages.Loop]) -> None:
    passes = [f"{stage.name}, {part}" for stage in stages.STAGES for part in ("forward", "backward")]
    assert list(step_loops) == ["scaling, forward", *passes, "loss, forward", "loss, backward", "Adam, update"]


@pytest.fixture(scope="module")
def step_loops() -> dict[str, stages.Loop]:
    """Every loop of the stage section, for a batch of two."""
    pixels = jnp.arange(2 * 28 * 28, dtype=jnp.uint8).reshape(2, 28, 28)
    return stages.loops(init_params(jax.random.key(0)), pixels, jnp.array([3, 4], jnp.uint8))


def test_a_turn_writes_a_number_of_its_result_into_all_that_it_was_given_but_biases() -> None:
    """So that the next turn has something to compute: XLA takes what is alike in all turns out of a loop."""
    weights = {"kernel": jnp.full((2, 2), 5.0), "bias": jnp.full(2, 7.0)}
    loop = stages.repeated(lambda weights, value: value @ weights["kernel"] / 40, weights, jnp.ones((3, 2)))
    (weights, value), result = loop.turn(loop.first)
    assert result[0, 0] == pytest.approx(10 / 40)
    assert weights["kernel"][0, 0] == value[0, 0] == result[0, 0]
    assert (weights["kernel"].ravel()[1:] == 5).all()
    assert (weights["bias"] == 7).all()
    assert not np.array_equal(loop.turn(((weights, value), result))[1], result)


@pytest.mark.parametrize("name", ["scaling, forward", "Adam, update"])
def test_the_loops_of_another_kind_find_something_new_at_every_turn_too(
    step_loops: dict[str, stages.Loop], name: str
) -> None:
    turn = jax.jit(step_loops[name].turn)
    first = turn(step_loops[name].first)
    pairs = zip(jax.tree.leaves(first), jax.tree.leaves(turn(first)), strict=True)
    changed = [not np.array_equal(one, other) for one, other in pairs]
    assert all(changed) if name.startswith("scaling") else sum(changed) > len(changed) / 2  # gradients of biases stay

"""The two frameworks do the same thing: in float64 to rounding, in float32 as well as PyTorch itself does."""

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from functools import cache
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from jax import lax
from jax import numpy as jnp

from jax_cnn import ops
from jax_cnn.checkpoint import AdamState
from jax_cnn.config import Dialect, Network
from jax_cnn.data import FashionMNIST
from jax_cnn.model import no_tap
from parity_tests.harness import checks, float32, trajectory
from parity_tests.harness.capture import exact_arithmetic
from parity_tests.harness.checks import CHECKS
from parity_tests.harness.compare import Divergence
from parity_tests.harness.pair import Pair, Tap, channels_first
from parity_tests.harness.product_pairs import BATCH_SIZE, feed_forward, product_pair, simple_cnn

SHORT = 3 * BATCH_SIZE + 8  # three full batches and a remainder
LOCKSTEP_STEPS = 200
SHARED = ("transfer", "initialisation", "data", "optimizer")  # checks that run no network
DRIFT_STEPS = 150


@pytest.fixture(scope="module")
def cnn(data_dir: Path) -> Pair:
    """SimpleCNN on a few real batches."""
    return simple_cnn(data_dir, SHORT)


@pytest.fixture(scope="module")
def mlp() -> Pair:
    """The feed-forward network."""
    return feed_forward()


def hold(divergences: Iterator[Divergence]) -> None:
    """Fail with every difference, the first of them first."""
    found = list(divergences)
    assert not found, "\n".join(map(str, found))


@pytest.fixture(scope="module", params=["cnn", "mlp", "linear"])
def network(request: pytest.FixtureRequest) -> Network:
    """Each of the networks."""
    return Network(request.param)


@cache  # one object, for which three checks share their captures
def real_pair(network: Network, dialect: Dialect, data_dir: Path) -> Pair:
    """It, in this dialect, on a few real batches."""
    return product_pair(network, dialect, data_dir, SHORT)


@pytest.mark.parametrize("check", CHECKS)
def test_the_pair_passes(network: Network, check: str, data_dir: Path) -> None:
    hold(CHECKS[check](real_pair(network, "linen", data_dir), 0))


@pytest.mark.parametrize("check", [name for name in CHECKS if name not in SHARED])
@pytest.mark.parametrize("dialect", ["nnx", "plain"])
def test_the_other_dialects_pass(network: Network, dialect: Dialect, check: str, data_dir: Path) -> None:
    """What the left-out checks look at, all dialects share."""
    hold(CHECKS[check](real_pair(network, dialect, data_dir), 0))


def test_two_hundred_float64_steps_on_real_batches_stay_together(data_dir: Path) -> None:
    pair = simple_cnn(data_dir, 64 * BATCH_SIZE + 32)  # 65 steps an epoch: three epochs and a little
    for step, our_run, their_run in trajectory.lockstep(pair, 0, LOCKSTEP_STEPS):
        if step <= 10 or step % 10 == 0:
            ours, theirs = our_run.state(), their_run.state()
            hold(trajectory.compare_states("trajectory", ours, theirs, trajectory.TRAJECTORY_BOUND, f"step {step}"))
    assert float32.distance(ours.weights, theirs.weights) <= 1e-14


def test_a_state_is_handed_over_in_mid_training(data_dir: Path) -> None:
    hold(trajectory.handover(simple_cnn(data_dir, 20 * BATCH_SIZE), 0, before=10, after=10))


def test_a_state_that_was_read_does_not_train_on(mlp: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's tensors, and NumPy's views of them, change with the next step: what is compared has to be a copy."""
    batch = mlp.synthetic_batch(0, 8)

    def changes_after_reading(side: type[trajectory.JaxRun] | type[trajectory.TorchRun]) -> bool:
        run = side(mlp, trajectory.start(mlp, 0))
        run.step(batch)
        read = run.state()
        kept = deepcopy(read)
        run.step(batch)
        return any(not np.array_equal(read.weights[name], kept.weights[name]) for name in kept.weights)

    assert not changes_after_reading(trajectory.JaxRun)
    assert not changes_after_reading(trajectory.TorchRun)
    monkeypatch.setattr(trajectory, "to_numpy", lambda tensors, _: {name: t.numpy() for name, t in tensors.items()})
    assert changes_after_reading(trajectory.TorchRun)  # the check can fail


@pytest.mark.slow
@pytest.mark.parametrize("epochs", [1, 5])
def test_whole_float64_epochs_stay_together(data_dir: Path, data: FashionMNIST, epochs: int) -> None:
    """Every weight and both moments after every tenth of 938 steps an epoch, and then all 10,000 test predictions.

    `-s` shows the furthest distances.
    """
    pair = simple_cnn(data_dir)
    furthest = dict.fromkeys(("weights", "first_moment", "second_moment"), 0.0)
    for step, our_run, their_run in trajectory.lockstep(pair, 0, 938 * epochs):
        if step % 10 == 0 or step == 938 * epochs:
            ours, theirs = our_run.state(), their_run.state()
            hold(trajectory.compare_states("trajectory", ours, theirs, trajectory.TRAJECTORY_BOUND, f"step {step}"))
            for part in furthest:
                one, other = getattr(ours, part), getattr(theirs, part)
                furthest[part] = max(furthest[part], *(float(np.abs(one[name] - other[name]).max()) for name in other))
    print(f"{epochs} epochs, {step} steps: {furthest}")
    images = channels_first(data.test_images[..., None] / 255)
    assert np.array_equal(jax_predictions(pair, ours, images), torch_predictions(pair, theirs, images))


def jax_predictions(pair: Pair, state: AdamState, images: np.ndarray) -> np.ndarray:
    """The likeliest class of each image, in float64."""
    with exact_arithmetic("float64"):
        tree = pair.to_tree(pair.to_leaves(state.weights))
        classify = jax.jit(lambda part: pair.apply(tree, part, no_tap).argmax(axis=1))
        parts = [jnp.asarray(pair.input_layout.to_jax(part)) for part in np.split(images, 40)]
        return np.concatenate([np.asarray(classify(part)) for part in parts])


def torch_predictions(pair: Pair, state: AdamState, images: np.ndarray) -> np.ndarray:
    """Likewise, by the reference."""
    module = pair.reference("float64", state.weights)
    with torch.no_grad():
        return np.concatenate([module(torch.from_numpy(part)).argmax(1).numpy() for part in np.split(images, 40)])


def test_float32_is_as_near_the_truth_as_pytorchs(network: Network, data_dir: Path) -> None:
    """In one dialect: the others give the same bits (`test_dialects.py`)."""
    hold(float32.precision(real_pair(network, "linen", data_dir), range(4)))


def test_optax_s_float32_bias_correction_is_what_sets_its_updates_apart(cnn: Pair) -> None:
    """With optax's own correction early updates miss the budget; with the exact one they are as good as PyTorch's."""
    exact = replace(cnn, jax_optimizer=float32.adam_with_exact_bias_correction)
    name = "update of fc1.weight"
    plain, corrected = (float32.update_errors(pair, 1, range(2))[name] for pair in (cnn, exact))
    assert plain[0] > float32.budget(plain)
    assert corrected[0] <= 1.5 * corrected[1]


def test_float32_runs_end_as_far_apart_as_one_ulp_sends_them(cnn: Pair) -> None:
    """When a run takes off is chance, where it arrives is not. Worst ratio seen over 4 seeds: 1.7.

    That float64 runs stay together, `test_two_hundred_float64_steps_on_real_batches_stay_together` shows.
    """
    curves = float32.drift(cnn, 0, at=[DRIFT_STEPS], nudges=1, with_truth=False)
    ((apart,), *itself) = [
        curves[f"float32: {whose}"]
        for whose in ("JAX from PyTorch", "JAX from itself, one ULP", "PyTorch from itself, one ULP")
    ]
    assert 0 < apart <= 4 * max(distance for (distance,) in itself)


def relu_and_bias_after_the_pool(tree: dict[str, dict[str, jax.Array]], images: jax.Array, tap: Tap) -> jax.Array:
    """The same function: bias and ReLU keep the order of values, so they may follow the pool."""
    x = images
    for conv, pool in (("conv1", "pool1"), ("conv2", "pool2")):
        x = ops.max_pool2x2(ops.conv3x3(x, tree[conv]["kernel"]))
        x = tap(pool, jax.nn.relu(x + tree[conv]["bias"]))
    x = jax.nn.relu(tap("fc1", x.reshape(len(x), -1) @ tree["fc1"]["kernel"] + tree["fc1"]["bias"]))
    return tap("fc2", x @ tree["fc2"]["kernel"] + tree["fc2"]["bias"])


def convolution_by_im2col(tree: dict[str, dict[str, jax.Array]], images: jax.Array, tap: Tap) -> jax.Array:
    """The same function: a convolution is a matrix product over the patches."""
    x = images
    for number in (1, 2):
        layer = tree[f"conv{number}"]
        patches = lax.conv_general_dilated_patches(
            x, (3, 3), (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        kernel = layer["kernel"].transpose(2, 0, 1, 3).reshape(-1, layer["kernel"].shape[-1])
        x = tap(f"relu{number}", jax.nn.relu(tap(f"conv{number}", patches @ kernel + layer["bias"])))
        x = tap(f"pool{number}", ops.max_pool2x2(x))
    x = jax.nn.relu(x.reshape(len(x), -1) @ tree["fc1"]["kernel"] + tree["fc1"]["bias"])
    return tap("fc2", x @ tree["fc2"]["kernel"] + tree["fc2"]["bias"])


@pytest.mark.parametrize("rewriting", [None, relu_and_bias_after_the_pool, convolution_by_im2col])
def test_no_false_alarm_over_twenty_seeds(cnn: Pair, rewriting: Callable[..., jax.Array] | None) -> None:
    pair = replace(cnn, apply=rewriting) if rewriting else cnn
    for seed in range(20):
        for check in (checks.shapes, checks.transfer, checks.outputs, checks.loss, checks.gradients):
            hold(check(pair, seed))


def test_tf32_and_reduced_precision_are_off_while_comparing() -> None:
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    with exact_arithmetic("float32"):
        assert torch.get_float32_matmul_precision() == "highest"
        assert not torch.backends.cudnn.allow_tf32
        text = jax.jit(jnp.dot).lower(jnp.ones((4, 4)), jnp.ones((4, 4))).as_text()
        assert "HIGHEST" in text
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == before

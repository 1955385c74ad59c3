"""Both frameworks compute the same: in float64 up to rounding, in float32 as exactly as PyTorch itself.

The first test is the lesson: what "the same" means, without the harness. The other tests use the harness, which asks
the same questions of every stage, of other networks and of other ports.
"""

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from jax import lax
from jax import numpy as jnp

from experiments.answers import compute_logits
from jax_cnn import ops
from jax_cnn.config import AdamConfig, Dialect, Network
from jax_cnn.data import FashionMNIST
from jax_cnn.dialects import make_apply
from jax_cnn.model import SimpleCNN, Tap
from jax_cnn.torch_layout import to_flax, to_torch
from jax_cnn.train import init_state, loss_fn, make_optimizer, train_step
from parity_tests.harness import float32, trajectory
from parity_tests.harness.capture import exact_arithmetic
from parity_tests.harness.checks import CHECKS, Case
from parity_tests.harness.compare import Divergence
from parity_tests.harness.pair import Pair
from parity_tests.harness.product_pairs import (
    BATCH_SIZE,
    feed_forward,
    product_pair,
    simple_cnn,
    with_torch_stages,
)
from torch_ref.model import SimpleCNN as TorchCNN

SHORT = 3 * BATCH_SIZE + 8  # three full batches and a remainder
WITHOUT_NETWORK = ("transfer", "initialisation", "data", "optimizer")  # checks that do not run the network
DRIFT_STEPS = 150


def test_a_network_written_twice_computes_the_same_logits_loss_gradient_and_adam_step() -> None:
    def assert_same(actual: Any, expected: Any) -> None:
        np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), rtol=0, atol=1e-12)

    images = np.random.default_rng(0).random((8, 1, 28, 28))  # float64, and so is everything that follows
    labels = np.arange(8)
    with jax.enable_x64(True):
        # The same weights: PyTorch draws them, and `to_flax` carries them into JAX's names and layouts.
        torch.manual_seed(0)
        torch_cnn = TorchCNN().double()
        params = jax.tree.map(jnp.array, to_flax({name: w.numpy() for name, w in torch_cnn.state_dict().items()}))

        # The same logits. PyTorch's images are [batch, channel, row, column], JAX's [batch, row, column, channel].
        jax_images, jax_labels = jnp.array(images.transpose(0, 2, 3, 1)), jnp.array(labels.astype(np.uint8))
        logits = SimpleCNN().apply({"params": params}, jax_images)
        torch_logits = torch_cnn(torch.from_numpy(images))
        assert_same(logits, torch_logits.detach())

        # The same loss: the mean cross-entropy of the batch.
        loss, gradient = jax.value_and_grad(loss_fn)(params, jax_images, jax_labels)
        torch_loss = torch.nn.functional.cross_entropy(torch_logits, torch.from_numpy(labels))
        assert_same(loss, torch_loss.detach())

        # The same gradient by every weight.
        torch_loss.backward()
        for name, array in to_torch(gradient).items():
            assert_same(array, torch_cnn.get_parameter(name).grad)

        # The same weights after one step of Adam.
        optimizer = make_optimizer(AdamConfig())
        state, _ = train_step(init_state(params, optimizer), jax_images, jax_labels, optimizer)
        torch.optim.Adam(torch_cnn.parameters(), lr=1e-3).step()
        for name, array in to_torch(state.params).items():
            assert_same(array, torch_cnn.get_parameter(name).detach())

        # A mistake shows at once: here the rows and columns of JAX's first kernel are swapped.
        params["conv1"]["kernel"] = params["conv1"]["kernel"].swapaxes(0, 1)
        logits = SimpleCNN().apply({"params": params}, jax_images)
        with pytest.raises(AssertionError, match="Mismatched elements: 80 / 80"):
            assert_same(logits, torch_logits.detach())


def assert_none(divergences: Iterator[Divergence]) -> None:
    """Fail with every difference, the first one first."""
    differences = list(divergences)
    assert not differences, "\n".join(map(str, differences))


@pytest.fixture(scope="module")
def cnn(data_dir: Path) -> Pair:
    """Return the pair of SimpleCNN on a few batches of FashionMNIST."""
    return simple_cnn(data_dir, SHORT)


@pytest.fixture(scope="module", params=["cnn", "mlp", "linear"])
def network(request: pytest.FixtureRequest) -> Network:
    """Return each of the networks."""
    return Network(request.param)


@cache  # the checks of a case share its captures
def make_case(network: Network, dialect: Dialect, data_dir: Path) -> Case:
    """Return the case of a network in a dialect on a few batches of FashionMNIST."""
    return Case(product_pair(network, dialect, data_dir, SHORT))


@pytest.mark.parametrize("check", [name for name in CHECKS if name != "precision"])
def test_the_pair_passes(network: Network, check: str, data_dir: Path) -> None:
    assert_none(CHECKS[check](make_case(network, "linen", data_dir)))


def test_float32_is_as_near_the_truth_as_pytorchs(network: Network, data_dir: Path) -> None:
    assert_none(float32.precision(make_case(network, "linen", data_dir).pair, range(4)))


@pytest.mark.parametrize("check", [name for name in CHECKS if name not in (*WITHOUT_NETWORK, "precision")])
@pytest.mark.parametrize("dialect", ["nnx", "plain"])
def test_the_other_dialects_pass(network: Network, dialect: Dialect, check: str, data_dir: Path) -> None:
    """In float32 the dialects compute the same bits (`test_dialects.py`), so that `precision` is checked in one."""
    assert_none(CHECKS[check](make_case(network, dialect, data_dir)))


@pytest.mark.parametrize(
    ("limit", "steps"),
    [
        (64 * BATCH_SIZE + 32, 200),  # 65 steps an epoch: three epochs and a little
        pytest.param(None, 938, marks=pytest.mark.slow),  # one epoch
        pytest.param(None, 5 * 938, marks=pytest.mark.slow),
    ],
)
def test_float64_training_stays_together_and_ends_with_the_same_predictions(
    data_dir: Path, data: FashionMNIST, limit: int | None, steps: int
) -> None:
    """Compare weights and both moments after every tenth step. `-s` shows the largest distances."""
    largest = dict.fromkeys(("weights", "first_moment", "second_moment"), 0.0)
    for step, actual, expected in trajectory.lockstep_states(simple_cnn(data_dir, limit), 0, steps):
        bound = trajectory.TRAJECTORY_BOUND
        assert_none(trajectory.compare_states("trajectory", actual, expected, bound, f"step {step}"))
        for part in largest:
            one, other = getattr(actual, part), getattr(expected, part)
            largest[part] = max(largest[part], *(float(np.abs(one[name] - other[name]).max()) for name in other))
    print(f"{steps} steps: {largest}")
    assert float32.distance(actual.weights, expected.weights) <= 1e-14 * steps / 200
    predictions = compute_logits("jax", actual.weights, data.test_images).argmax(axis=1)
    assert np.array_equal(predictions, compute_logits("torch", expected.weights, data.test_images).argmax(axis=1))


def test_a_state_is_handed_over_in_mid_training(data_dir: Path) -> None:
    assert_none(trajectory.handover(simple_cnn(data_dir, 20 * BATCH_SIZE), 0, before=10, after=10))


def test_a_state_that_was_read_does_not_train_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's tensors, and NumPy's views of them, change with the next step: what is compared has to be a copy."""
    pair = feed_forward()
    batch = pair.synthetic_batch(0, 8)

    def changes_after_reading(side: type[trajectory.JaxRun] | type[trajectory.TorchRun]) -> bool:
        run = side(pair, trajectory.initial_state(pair, 0))
        run.step(batch)
        weights = run.state().weights
        copies = deepcopy(weights)
        run.step(batch)
        return any(not np.array_equal(weights[name], copies[name]) for name in copies)

    assert not changes_after_reading(trajectory.JaxRun)
    assert not changes_after_reading(trajectory.TorchRun)
    monkeypatch.setattr(trajectory, "to_numpy", lambda tensors, _: {name: t.numpy() for name, t in tensors.items()})
    assert changes_after_reading(trajectory.TorchRun)  # this test can fail


def test_optax_s_float32_bias_correction_is_what_sets_its_updates_apart(cnn: Pair) -> None:
    """With optax's own correction early updates miss the budget; with the exact one they are as good as PyTorch's."""
    exact = replace(cnn, jax_optimizer=float32.adam_with_exact_bias_correction)
    in_jax, in_torch = float32.update_errors(cnn, 1, range(2))["update of fc1.weight"]
    assert in_jax > float32.budget((in_jax, in_torch))
    in_jax, in_torch = float32.update_errors(exact, 1, range(2))["update of fc1.weight"]
    assert in_jax <= 1.5 * in_torch


def test_float32_runs_end_as_far_apart_as_one_ulp_sends_them(cnn: Pair) -> None:
    """When a run leaves the others is chance, where it ends is not. Largest ratio seen over 4 seeds: 1.7."""
    curves = float32.drift(cnn, 0, [DRIFT_STEPS], nudges=1, with_truth=False)
    (apart,) = curves["float32: JAX from PyTorch"]
    itself = [distance for name, (distance,) in curves.items() if name.endswith("one ULP")]
    assert 0 < apart <= 4 * max(itself)


def relu_and_bias_after_the_pool(tree: dict[str, dict[str, jax.Array]], images: jax.Array, tap: Tap) -> jax.Array:
    """Compute the same function: bias and ReLU keep the order of values, so that they may follow the pool."""
    x = images
    for conv, pool in (("conv1", "pool1"), ("conv2", "pool2")):
        x = ops.max_pool2x2(ops.conv3x3(x, tree[conv]["kernel"]))
        x = tap(pool, jax.nn.relu(x + tree[conv]["bias"]))
    x = jax.nn.relu(tap("fc1", x.reshape(len(x), -1) @ tree["fc1"]["kernel"] + tree["fc1"]["bias"]))
    return tap("fc2", x @ tree["fc2"]["kernel"] + tree["fc2"]["bias"])


def convolution_by_im2col(tree: dict[str, dict[str, jax.Array]], images: jax.Array, tap: Tap) -> jax.Array:
    """Compute the same function: a convolution is a matrix product over the patches."""
    x = images
    layout = ("NHWC", "HWIO", "NHWC")
    for number in (1, 2):
        layer = tree[f"conv{number}"]
        patches = lax.conv_general_dilated_patches(x, (3, 3), (1, 1), "SAME", dimension_numbers=layout)
        kernel = layer["kernel"].transpose(2, 0, 1, 3).reshape(-1, layer["kernel"].shape[-1])
        x = tap(f"relu{number}", jax.nn.relu(tap(f"conv{number}", patches @ kernel + layer["bias"])))
        x = tap(f"pool{number}", ops.max_pool2x2(x))
    x = jax.nn.relu(x.reshape(len(x), -1) @ tree["fc1"]["kernel"] + tree["fc1"]["bias"])
    return tap("fc2", x @ tree["fc2"]["kernel"] + tree["fc2"]["bias"])


@pytest.mark.parametrize(
    "rewriting",
    [None, with_torch_stages(make_apply()), relu_and_bias_after_the_pool, convolution_by_im2col],
    ids=["stage by stage", "as it trains", "ReLU and bias after the pool", "convolution by im2col"],
)
def test_no_false_alarm_over_twenty_seeds(cnn: Pair, rewriting: Callable[..., jax.Array] | None) -> None:
    pair = replace(cnn, apply=rewriting) if rewriting else cnn
    for seed in range(20):
        case = Case(pair, seed)
        for check in ("shapes", "transfer", "outputs", "loss", "gradients"):
            assert_none(CHECKS[check](case))


def test_tf32_and_reduced_precision_are_off_while_comparing() -> None:
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    with exact_arithmetic("float32"):
        assert torch.get_float32_matmul_precision() == "highest"
        assert not torch.backends.cudnn.allow_tf32
        text = jax.jit(jnp.dot).lower(jnp.ones((4, 4)), jnp.ones((4, 4))).as_text()
        assert "HIGHEST" in text
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == before

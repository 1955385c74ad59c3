"""The network is the same network: names, shapes, numbers, and the data that it sees."""

import math
from collections.abc import Callable

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from experiments.answers import FRAMEWORKS, compute_stages
from jax_cnn import torch_layout
from jax_cnn.data import FashionMNIST
from jax_cnn.model import init_params
from jax_cnn.torch_layout import SIMPLE_CNN, TorchDict, to_torch
from jax_cnn.train import to_images


def test_every_stage_has_the_reference_shape(torch_weights: TorchDict, data: FashionMNIST) -> None:
    image = data.test_images[0]
    ours, theirs = (compute_stages(framework, torch_weights, image) for framework in FRAMEWORKS)
    assert list(ours) == list(theirs) == ["conv1", "relu1", "pool1", "conv2", "relu2", "pool2", "fc1", "relu3", "fc2"]
    assert ours["pool2"].shape == (64, 7, 7)
    for stage, expected in theirs.items():
        assert ours[stage].shape == expected.shape
        assert np.abs(ours[stage] - expected).max() <= 1e-6


def test_the_layout_map_goes_both_ways_bit_by_bit(torch_weights: TorchDict) -> None:
    back = torch_layout.to_torch(torch_layout.to_flax(torch_weights))
    assert back.keys() == torch_weights.keys()
    assert all(np.array_equal(back[name], torch_weights[name]) for name in back)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda tensors: tensors.pop("conv2.bias"), "conv2.bias is missing"),
        (lambda tensors: tensors.update({"fc3.bias": np.zeros(10)}), "fc3.bias is unknown"),
        (lambda tensors: tensors.update({"fc2.bias": np.zeros(1)}), r"fc2.bias has shape \(1,\), not \(10,\)"),
    ],
)
def test_the_layout_map_refuses_what_it_does_not_know(
    torch_weights: TorchDict, change: Callable[[TorchDict], object], complaint: str
) -> None:
    change(torch_weights)
    with pytest.raises(ValueError, match=complaint):
        torch_layout.to_flax(torch_weights)


def test_pixels_are_scaled_as_to_tensor_does_to_the_last_bit() -> None:
    every_value = np.resize(np.arange(256, dtype=np.uint8), (1, 28, 28))
    ours = np.asarray(jax.jit(to_images, static_argnums=1)(jnp.asarray(every_value), jnp.dtype(jnp.float32)))[..., 0]
    assert np.array_equal(ours, every_value.astype(np.float32) / np.float32(255))


# Initial weights


def draw(seed: int) -> TorchDict:
    """Return JAX's initial weights under PyTorch's names."""
    return to_torch(jax.device_get(init_params(jax.random.key(seed))))


def test_values_are_uniform_within_one_over_root_fan_in() -> None:
    """Compare range and first four moments of every tensor with the uniform distribution's, at 5 standard errors."""
    draws = [draw(seed) for seed in range(10)]
    for name in SIMPLE_CNN:
        fan_in = math.prod(SIMPLE_CNN[name.replace("bias", "weight")].shape[1:])
        values = np.concatenate([weights[name].ravel() for weights in draws]).astype(np.float64) * math.sqrt(fan_in)
        assert np.abs(values).max() <= 1 + 1e-6, name
        for power in (1, 2, 3, 4):
            expected = 0.0 if power % 2 else 1 / (power + 1)
            standard_error = math.sqrt((1 / (2 * power + 1) - expected**2) / len(values))
            assert abs((values**power).mean() - expected) <= 5 * standard_error, f"{name}: moment {power}"


def test_every_seed_draws_other_weights_and_keeps_them() -> None:
    first, again, other = (draw(seed)["fc1.weight"] for seed in (0, 0, 1))
    assert np.array_equal(first, again)
    assert np.mean(first == other) < 0.01

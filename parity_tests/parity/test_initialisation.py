"""JAX draws its initial weights from PyTorch's distributions."""

import jax
import numpy as np
import pytest
import torch

from jax_cnn import torch_layout
from jax_cnn.model import init_params
from jax_cnn.torch_layout import SIMPLE_CNN, TorchDict
from torch_ref.model import SimpleCNN

SEEDS = range(10)
FAN_IN = {"conv1": 9, "conv2": 288, "fc1": 3136, "fc2": 512}


def draw(framework: str, seed: int) -> TorchDict:
    """One initialisation, under PyTorch's names."""
    if framework == "jax":
        return torch_layout.to_torch(jax.device_get(init_params(jax.random.key(seed))))
    torch.manual_seed(seed)
    return {name: tensor.numpy() for name, tensor in SimpleCNN().state_dict().items()}


@pytest.fixture(scope="module")
def draws() -> dict[str, dict[str, np.ndarray]]:
    """Per framework and tensor, the values of all seeds, in units of PyTorch's bound 1 / sqrt(fan_in)."""
    samples: dict[str, dict[str, np.ndarray]] = {}
    for framework in ("jax", "torch"):
        tensors = [draw(framework, seed) for seed in SEEDS]
        samples[framework] = {
            name: np.concatenate([tensor[name].ravel() for tensor in tensors]) * FAN_IN[name.split(".")[0]] ** 0.5
            for name in SIMPLE_CNN
        }
    return samples


@pytest.mark.parametrize("framework", ["jax", "torch"])
@pytest.mark.parametrize("name", SIMPLE_CNN)
def test_values_are_uniform_within_one_over_root_fan_in(
    draws: dict[str, dict[str, np.ndarray]], framework: str, name: str
) -> None:
    """Both frameworks are held to the uniform distribution's bounds and first four moments, at 5 standard errors."""
    values = draws[framework][name].astype(np.float64)
    assert np.abs(values).max() <= 1 + 1e-6
    for power in (1, 2, 3, 4):
        expected = 0.0 if power % 2 else 1 / (power + 1)
        standard_error = ((1 / (2 * power + 1) - expected**2) / len(values)) ** 0.5
        assert abs((values**power).mean() - expected) <= 5 * standard_error, f"{framework} {name}: moment {power}"


def test_every_seed_draws_other_weights_and_keeps_them() -> None:
    first, again, other = (draw("jax", seed)["fc1.weight"] for seed in (0, 0, 1))
    assert np.array_equal(first, again)
    assert np.mean(first == other) < 0.01

"""JAX draws its initial weights as PyTorch does by default: uniformly within 1 / sqrt(fan_in).

The check `initialisation` of the harness compares them with those that PyTorch draws.
"""

import math

import jax
import numpy as np

from jax_cnn.model import init_params
from jax_cnn.torch_layout import SIMPLE_CNN, TorchDict, to_torch


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

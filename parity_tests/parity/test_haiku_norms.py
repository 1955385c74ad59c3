"""Haiku's own networks: their norms make statistics in training mode alone, and keep them in modules of their own."""

from dataclasses import replace

import haiku as hk
import jax
import numpy as np
from torch import nn

from parity_tests.harness import Pair, examine
from parity_tests.harness.capture import Case, Comparison


def forward(images: jax.Array, is_training: bool) -> jax.Array:
    images = hk.Conv2D(4, 3, padding="VALID", name="conv")(images)
    images = hk.BatchNorm(True, True, 0.9, name="norm")(images, is_training)
    images = hk.max_pool(jax.nn.relu(images), (1, 3, 3, 1), (1, 2, 2, 1), "SAME")
    return hk.Linear(3, name="out")(images.mean((1, 2)))


class Network(nn.Module):
    """The same in PyTorch."""

    def __init__(self, padding: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)
        self.pool, self.out = nn.MaxPool2d(3, 2, padding), nn.Linear(4, 3)

    def forward(self, images):  # type: ignore[no-untyped-def]
        """Compute the outputs [batch, 3] of images [batch, 2, row, column]."""
        return self.out(self.pool(self.norm(self.conv(images)).relu()).mean((2, 3)))


def comparison(padding: int, size: int) -> Comparison:
    images = np.random.default_rng(0).normal(size=(3, 2, size, size))
    pair = Pair(lambda: Network(padding), hk.transform_with_state(forward), images, training=False, batch_sizes=(3,))
    return Case(pair).comparisons[0]


def test_norm_and_pool_are_stages_of_a_network_in_haiku() -> None:
    found = comparison(1, 9)
    assert found.stages["norm"].jax == "norm"
    assert {"conv", "norm", "out"} <= found.stages.keys()
    assert not any(difference.problem for difference in found.inherited.outputs.values())


def test_averages_that_start_with_the_first_batch_are_no_tables_and_their_correction_is_named() -> None:
    images = np.random.default_rng(0).normal(size=(3, 2, 9, 9))
    pair = Pair(lambda: Network(1), hk.transform_with_state(forward), images, batch_sizes=(3,))
    pair = replace(pair, jax_kwargs={"is_training": False}, jax_training_kwargs={"is_training": True})
    result = examine(pair, names=("parameters", "tables", "statistics"))
    assert "tables" in result.passed
    assert any("JAX makes them of its first batch" in note for note in result.notes)
    assert {divergence.check for divergence in result.divergences} == {"statistics"}
    assert any("corrects for a start at 0" in divergence.cause for divergence in result.divergences)


def test_padding_of_a_pool_is_found_at_the_pool() -> None:
    found = comparison(1, 10)
    wrong = [name for name, difference in found.local.values.items() if difference.problem]
    assert wrong == ["pool"]

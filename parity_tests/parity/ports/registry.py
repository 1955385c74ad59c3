"""The list of ports: what each one is, and what the harness must say of its faulty twin."""

from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from flax.traverse_util import unflatten_dict
from torch import nn

from parity_tests.harness.pair import Pair


class Finding(NamedTuple):
    """A difference that the harness must report: the check, and a part of the place that it names."""

    check: str
    where: str


class Port(NamedTuple):
    """A port of a small PyTorch network to JAX.

    Attributes:
        make: returns the sound port for True, and the faulty one for False.
        findings: what must be reported of the faulty one; empty if there is no faulty one, because the fault that
            people met was a false alarm, or one that float64 cannot show.
    """

    make: Callable[[bool], Pair]
    findings: tuple[Finding, ...]


PORTS: dict[str, Port] = {}


def port(name: str, *findings: tuple[str, str]) -> Callable[[Callable[[bool], Pair]], Callable[[bool], Pair]]:
    """Add a function that makes both twins to the list, under this name."""

    def add(make: Callable[[bool], Pair]) -> Callable[[bool], Pair]:
        PORTS[name] = Port(make, tuple(Finding(*finding) for finding in findings))
        return make

    return add


def network(**layers: nn.Module) -> nn.Sequential:
    """Return a chain of named layers."""
    return nn.Sequential(OrderedDict(layers))


def values(*shape: int) -> np.ndarray:
    """Return normal random values, float32."""
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


def tokens(batch: int, length: int, vocabulary: int) -> np.ndarray:
    """Return random token ids, int64 [batch, length]."""
    return np.random.default_rng(0).integers(vocabulary, size=(batch, length))


# For functions that take PyTorch's tensors as they are: "fc.weight" becomes ["fc"]["weight"].
nested: Callable[[dict[str, Any]], Any] = partial(unflatten_dict, sep=".")


def linear(layer: Any, x: Any) -> Any:
    """Apply a linear layer that is stored as PyTorch stores it, weight [outputs, inputs]."""
    return x @ layer["weight"].T + layer["bias"]

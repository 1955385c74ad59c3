"""`--precision bfloat16` computes in bfloat16, keeps in float32 what adds up over steps, and learns as float32 does."""

import re
from collections.abc import Iterator
from typing import Any

import jax
import optax
import pytest
from jax import numpy as jnp

from jax_cnn import aot
from jax_cnn.config import AdamConfig
from jax_cnn.devices import make_mesh
from jax_cnn.programs import Program
from jax_cnn.train import make_optimizer

BATCH = 64
STEPS = 40
MATRIX_PRODUCTS = (11, 12)  # 3 for each of 4 layers, but for the gradient by conv1's images, which JAX or XLA drops


@pytest.fixture(autouse=True)
def _without_float64() -> Iterator[None]:
    """As a run at float32 or bfloat16 sets it."""
    with jax.enable_x64(False):
        yield


def training_program(precision: str) -> Program:
    """That of a run at this precision, on one device."""
    return aot.training_program(make_mesh(jax.devices("cpu")[:1]), BATCH, precision)


def kept(program: Program) -> dict[str, set[str]]:
    """The dtypes of the weights and of both moments that a program hands on."""
    state, _ = jax.eval_shape(program.function, *program.arguments)
    moments = {name: optax.tree_utils.tree_get(state.opt_state, name) for name in ("mu", "nu")}
    trees = {"weights": state.params} | moments
    return {name: {leaf.dtype.name for leaf in jax.tree.leaves(tree)} for name, tree in trees.items()}


def matrix_products(program: Program) -> list[str]:
    """The element types of every convolution's and matrix product's operands and result, as `bf16 bf16 bf16`."""
    lines = re.findall(r"stablehlo\.(?:dot_general|convolution).* : (\(.*)", program.lower().as_text())
    return [" ".join(re.findall(r"x([a-z]+\d+)>", line)) for line in lines]


def test_products_are_bfloat16_and_what_adds_up_is_float32() -> None:
    for precision, short in (("float32", "f32"), ("bfloat16", "bf16")):
        program = training_program(precision)
        assert kept(program) == {name: {"float32"} for name in ("weights", "mu", "nu")}
        products = matrix_products(program)
        assert set(products) == {f"{short} {short} {short}"}
        assert len(products) in MATRIX_PRODUCTS


@pytest.mark.parametrize("moment", ["mu", "nu"])
def test_a_moment_in_bfloat16_is_noticed(moment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def make_faulty(config: AdamConfig) -> optax.GradientTransformation:
        sound = make_optimizer(config)

        def narrow(state: optax.OptState) -> optax.OptState:
            narrowed = jax.tree.map(jnp.bfloat16, optax.tree_utils.tree_get(state, moment))
            return optax.tree_utils.tree_set(state, **{moment: narrowed})

        def update(updates: optax.Updates, state: optax.OptState, params: Any = None) -> Any:
            updates, state = sound.update(updates, state, params)
            return updates, narrow(state)

        return optax.GradientTransformation(lambda params: narrow(sound.init(params)), update)

    monkeypatch.setattr(aot, "make_optimizer", make_faulty)
    assert kept(training_program("bfloat16"))[moment] == {"bfloat16"}

"""The three dialects write one network: the same tree, the same bits, and a fault in the text of one is found.

`test_parity.py` runs the parity checks on each of them.
"""

import inspect
import re
from dataclasses import replace
from functools import partial
from types import ModuleType
from typing import Any, get_args

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from jax_cnn import model, train
from jax_cnn.config import CNN, AdamConfig, Dialect, Model, Network, TrainConfig
from jax_cnn.data import FashionMNIST
from jax_cnn.dialects import make_apply, nnx, plain
from jax_cnn.trainer import JaxTrainer
from parity_tests.harness import examine
from parity_tests.product import product_pair

SOURCES: dict[Dialect, ModuleType] = {"linen": model, "nnx": nnx, "plain": plain}  # the text of each dialect

every_model = pytest.mark.parametrize("name", get_args(Model))


def train_four_steps(data: FashionMNIST, name: Model, dialect: Dialect) -> list[Any]:
    """Return every array of the state, the scores and the losses after four steps of `JaxTrainer`."""
    config = TrainConfig(model=name, limit_train=4 * 64, limit_test=100)
    trainer = JaxTrainer(config, data, jax.devices("cpu")[:1], dialect=dialect)
    losses = [losses for _, losses in trainer.train_epoch(0)]
    return jax.tree.leaves((trainer.state(), trainer.evaluate(), losses))


@pytest.mark.extended
@every_model
def test_training_gives_the_same_bits_in_every_dialect(data: FashionMNIST, name: Model) -> None:
    """Weights, moments, losses and scores are equal, so that `--resume` may change the dialect."""
    expected = train_four_steps(data, name, "linen")
    for dialect in ("nnx", "plain"):
        actual = train_four_steps(data, name, dialect)
        assert all(np.array_equal(one, other) for one, other in zip(actual, expected, strict=True)), dialect


@every_model
def test_linen_and_nnx_make_the_same_program(name: Model) -> None:
    """Not only the same numbers: NNX costs nothing once it is traced."""
    optimizer = train.make_optimizer(AdamConfig())
    state = jax.eval_shape(
        lambda: train.init_state(model.init_params(jax.random.key(0), network=Network(name)), optimizer)
    )
    images, labels = jax.ShapeDtypeStruct((8, 28, 28, 1), jnp.float32), jax.ShapeDtypeStruct((8,), jnp.uint8)

    def program(dialect: Dialect) -> str:
        loss_fn = partial(train.loss_fn, network=make_apply(Network(name), dialect))
        step = jax.jit(partial(train.train_step, optimizer=optimizer, loss_fn=loss_fn))
        return step.lower(state, images, labels).as_text()

    assert program("linen") == program("nnx")


def test_the_width_of_the_hidden_layer_is_the_one_asked_for(images: np.ndarray) -> None:
    params = model.init_params(jax.random.key(0), network=Network("mlp", 20))
    assert (params["fc1"]["kernel"].shape, params["fc1"]["bias"].shape) == ((784, 20), (20,))
    logits = [make_apply(Network("mlp", 20), dialect)(params, jnp.asarray(images)) for dialect in SOURCES]
    assert all(np.array_equal(logits[0], other) for other in logits)


# A pattern that occurs once in each dialect's source, what to put in its place, and the place of the difference.
FAULTS = {
    "flatten order": (r"pool2\.reshape", "pool2.transpose(0, 3, 1, 2).reshape", "output of fc1"),
    "missing bias": (
        r"(kernel\S*), (\S*bias\S*), (self\.fused\)|fused\)  # 28 -> 14)",
        r"\1, 0 * \2, \3",
        "output of conv1",
    ),
    "missing ReLU": (r"relu3 = \S*relu\(fc1\)", "relu3 = fc1", "output of relu3"),
}


def with_a_fault(dialect: Dialect, right: str, wrong: str) -> Any:
    """Return the dialect's SimpleCNN, stage by stage, with one place of its source exchanged."""
    source, count = re.subn(right, wrong, inspect.getsource(SOURCES[dialect]))
    assert count == 1, f"{right} occurs {count} times in {dialect}"
    faulty = ModuleType(f"faulty_{dialect}")
    exec(compile(source, faulty.__name__, "exec"), faulty.__dict__)
    make = faulty.make_apply if dialect == "plain" else faulty.make_module
    return make(CNN, fused=False)


@pytest.mark.extended
@pytest.mark.parametrize(
    ("dialect", "fault"),
    [
        pytest.param(dialect, fault, marks=() if number == place else pytest.mark.slow)
        for number, dialect in enumerate(SOURCES)
        for place, fault in enumerate(FAULTS)
    ],
)
def test_a_fault_in_the_text_of_a_dialect_is_found_there(dialect: Dialect, fault: str) -> None:
    right, wrong, where = FAULTS[fault]
    pair = replace(product_pair(CNN, dialect), jax_model=with_a_fault(dialect, right, wrong), batch_sizes=(2,))
    divergences = examine(pair, names=("parameters", "outputs")).divergences
    assert (divergences[0].check, divergences[0].where) == ("outputs", where)

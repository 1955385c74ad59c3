"""The harness compares any port: the example in the README, and parts of networks that SimpleCNN does not have."""

import re
import sys
from collections import OrderedDict
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import haiku as hk
import jax
import numpy as np
import optax
import pytest
import torch
from flax import linen
from flax.traverse_util import unflatten_dict
from jax import lax
from jax import numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from rich.console import Console
from torch import nn
from torch.nn import functional

from jax_cnn.config import UserError
from parity_tests.command import ReportConfig, load_pair, plant
from parity_tests.harness import Inputs, Pair, Result, examine
from parity_tests.harness.capture import Case, Comparison
from parity_tests.harness.compare import Refused
from parity_tests.harness.report import BORN, INHERITED, SAME_LOCALLY, stage_rows
from parity_tests.harness.weights import unused
from parity_tests.support import ROOT, run_command

LONGEST_EXAMPLE = 25  # lines that declare a pair, with both networks


def test_the_readmes_example_works_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    assert len([line for line in example.splitlines() if line.strip()]) <= LONGEST_EXAMPLE
    (tmp_path / "my_port.py").write_text(example, encoding="utf-8")
    faulty = run_command("parity_report", "my_port:pair", "--fault=relu-leaky", "--steps=3", cwd=tmp_path)
    assert "outputs: output of " in faulty.stdout, faulty.stdout + faulty.stderr
    assert faulty.returncode == 1
    assert (tmp_path / "runs/parity/drift.png").stat().st_size > 10_000
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    pair = load_pair(ReportConfig(which="my_port:pair"), Console())
    assert not examine(pair, names=("parameters", "outputs", "gradients", "trajectory")).divergences
    with pytest.raises(UserError, match="--fault fixed-order cannot be planted: "):
        plant(pair, "fixed-order")


def test_two_pairs_at_once_are_refused() -> None:
    with pytest.raises(UserError, match="one:pair and --pair other:pair"):
        ReportConfig(which="one:pair", pair="other:pair")


def test_a_port_that_returns_more_than_the_reference_is_refused() -> None:
    pair = Pair(nn.Linear(3, 2), lambda tree, x: (x @ tree["weight"].T + tree["bias"], x), np.ones((2, 3)), dict)
    with pytest.raises(Refused, match="PyTorch returns 1 array, JAX "):
        examine(pair, names=("outputs",))


def test_keyword_arguments_keep_their_order() -> None:
    example = Inputs(tokens=np.ones((4, 3), int), mask=np.ones((4, 3), int))
    assert list(Pair(nn.Identity, None, example).draw_inputs(0, 8).map(np.asarray).kwargs) == ["tokens", "mask"]


def module() -> nn.Module:
    """Return a network with a strided convolution, batch normalisation, average pooling and dropout."""
    layers = OrderedDict[str, nn.Module](
        conv=nn.Conv2d(1, 6, 3, stride=2, padding=1),
        norm=nn.BatchNorm2d(6),
        relu=nn.ReLU(),
        pool=nn.AvgPool2d(8),
        drop=nn.Dropout(0.5),
        flatten=nn.Flatten(),
        out=nn.Linear(6, 10),
    )
    return nn.Sequential(layers)


def apply(tree: Any, images: jax.Array, eps: float = 1e-5) -> jax.Array:
    """Compute the same in JAX, in evaluation mode, where dropout does nothing. The normalisation has a name."""
    layout = ("NHWC", "HWIO", "NHWC")
    conv, norm, out = tree["conv"], tree["norm"], tree["out"]
    x = lax.conv_general_dilated(images, conv["kernel"], (2, 2), ((1, 1), (1, 1)), dimension_numbers=layout)
    x = x + conv["bias"]
    mean, variance = lax.stop_gradient((norm["mean"], norm["var"]))
    x = (x - mean) * lax.rsqrt(variance + eps) * norm["scale"] + norm["bias"]
    x = checkpoint_name(x, "normalised")
    x = jax.nn.relu(x).mean(axis=(1, 2))
    return x @ out["kernel"] + out["bias"]


def apply_with_another_eps(tree: Any, images: jax.Array) -> jax.Array:
    """Compute it with Keras's eps; Flax's default is PyTorch's 1e-5."""
    return apply(tree, images, eps=1e-3)


def to_tree(tensors: dict[str, Any]) -> dict[str, Any]:
    """Return JAX's weights and statistics."""
    norm = {"scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
    return {
        "conv": {"kernel": tensors["conv.weight"].transpose(2, 3, 1, 0), "bias": tensors["conv.bias"]},
        "norm": {name: tensors[f"norm.{theirs}"] for name, theirs in norm.items()},
        "out": {"kernel": tensors["out.weight"].T, "bias": tensors["out.bias"]},
    }


def port(function: Any) -> Pair:
    """Return the pair of both."""
    return Pair(module, function, np.ones((8, 1, 16, 16), np.float32), to_tree, {"norm": "normalised"}, training=False)


STAGE_CHECKS = ("parameters", "transfer", "outputs", "gradients")


def test_stride_average_pool_dropout_and_batch_normalisation_are_compared() -> None:
    names = (*STAGE_CHECKS, "trajectory")  # without training mode, with the same statistics at each step
    result = examine(port(apply), names=names)
    assert (result.divergences, result.passed) == ([], list(names))


def test_a_wrong_eps_in_the_normalisation_is_found_there() -> None:
    divergences = examine(port(apply_with_another_eps), names=STAGE_CHECKS).divergences
    assert ("outputs", "output of norm") in [(divergence.check, divergence.where) for divergence in divergences]


class Configured(nn.Sequential):
    """Three convolutions of a library that lets nobody ask a module for its settings."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 1), nn.Conv2d(6, 2, 1))

    @property
    def dropout(self) -> float:
        """Raise an error if dropout is used."""
        raise RuntimeError("ask the configuration")


def turning(tree: Any, images: jax.Array) -> jax.Array:
    """Compute the same with images that it turns itself, and a fault in the second convolution."""
    x = images.transpose(0, 2, 3, 1)
    for number, factor in enumerate((1.0, 1.01, 1.0)):
        x = x @ tree[f"{number}.weight"][:, :, 0, 0].T * factor + tree[f"{number}.bias"]
        x = checkpoint_name(x, f"conv{number}")
    return x.transpose(0, 3, 1, 2)


def test_a_port_may_turn_its_images_itself() -> None:
    images = np.ones((8, 3, 6, 6), np.float32)  # inside, 6 channels of 6 x 6 could be laid out in any way
    pair = Pair(Configured, turning, images, dict, {"{i}": "conv{i}"}, jax_inputs="same", batch_sizes=(8,))
    result = examine(pair, names=("parameters", "outputs"))
    assert [divergence.where for divergence in result.divergences] == ["output of 1"]
    assert result.comparisons[0].local.values.keys() == {"0", "1", "2"}


def embed(tree: Any, tokens: jax.Array) -> jax.Array:
    """Look the tokens up, the padding too."""
    return tree["weight"][tokens]


def test_a_row_of_padding_that_only_jax_trains_is_named() -> None:
    tokens = np.arange(8).reshape(2, 4) % 5
    reference = nn.Sequential(nn.Embedding(5, 3, padding_idx=2))
    pair = Pair(reference, embed, tokens, lambda tensors: {"weight": tensors["0.weight"]}, batch_sizes=(2,))
    (found,) = examine(pair, names=("parameters", "outputs", "gradients")).divergences
    assert found.cause == "PyTorch's padding_idx=2 gives this row no gradient"


class Demanding(linen.Module):
    """A model that takes JAX's arrays alone."""

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return what it was given."""
        assert isinstance(x, jax.Array)
        return x + self.param("bias", linen.initializers.zeros, ())


def test_a_model_makes_its_variables_with_arrays_of_jax() -> None:
    case = Case(Pair(nn.Identity(), Demanding(), np.ones((8, 4), np.float32)))
    assert case.own_variables is not None


class Timed(nn.Module):
    """Adds a vector of 4 numbers for each of 8 moments to 4 channels: 8 values are no image of 4 channels here."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.time = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(8, 4)

    def forward(self, images: torch.Tensor, moments: torch.Tensor) -> torch.Tensor:
        """Return the channels."""
        return self.conv(images).mean((2, 3)) + self.time(moments)


class TimedPort(linen.Module):
    """The same in Linen, but for a factor."""

    @linen.compact
    def __call__(self, images: jax.Array, moments: jax.Array) -> jax.Array:
        """Return the channels."""
        return linen.Conv(4, (3, 3))(images).mean((1, 2)) + 1.5 * linen.Dense(4)(moments)


def test_a_layer_is_taken_to_be_behind_a_flatten_only_if_it_gets_as_many_values_as_an_image_has() -> None:
    """The outputs of a faulty port would not decide it."""
    inputs = np.ones((2, 3, 6, 6), np.float32), np.ones((2, 8), np.float32)
    assert not Case(Pair(Timed(), TimedPort(), inputs, batch_sizes=(2,))).proposal.ambiguous


class Bucketed(nn.Module):
    """Adds the logarithms of whole numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the sum."""
        return self.fc(x) + torch.log(torch.arange(1, 5) / 3)


class BucketedPort(linen.Module):
    """The same in Linen, where whole numbers of 32 bits give logarithms of 32 bits."""

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return the sum."""
        return linen.Dense(4)(x) + jnp.log(jnp.arange(1, 5, dtype="int32") / 3)


def test_whole_numbers_of_32_bits_are_divided_in_float64() -> None:
    pair = Pair(Bucketed(), BucketedPort(), np.ones((2, 4), np.float32), batch_sizes=(2,))
    result = examine(pair, names=("parameters", "outputs"))
    assert not result.divergences
    assert {"div", "log", "add"} <= result.comparisons[0].functions.keys()


class BothWays(nn.Module):
    """Reads a sequence in both directions."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(3, 2, bidirectional=True, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the states of both directions."""
        return self.rnn(x)[0]


class BothWaysPort(linen.Module):
    """The same in Linen, but for a factor; the names of its cells say nothing of their directions."""

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return the states of both directions."""
        forward, backward = (linen.RNN(linen.OptimizedLSTMCell(2)) for _ in range(2))
        return 1.5 * jnp.asarray(linen.Bidirectional(forward, backward)(x))


def test_the_directions_of_a_recurrent_layer_keep_their_order_where_outputs_do_not_decide() -> None:
    case = Case(Pair(BothWays(), BothWaysPort(), np.ones((2, 4, 3), np.float32), batch_sizes=(2,)))
    assert not case.proposal.ambiguous
    assert all(("Cell_1/" in row.jax) == ("reverse" in row.torch) for row in case.proposal.rows)


class Masking(nn.Module):
    """Hides what is negative, with the smallest number that there is."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the inputs with the smallest number in the place of negative ones."""
        return x.masked_fill(x < 0, torch.finfo(x.dtype).min)


class Masked(nn.Module):
    """A softmax of masked values."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.mask, self.out = nn.Linear(4, 4), Masking(), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute [batch, 2] from [batch, 4]."""
        x = self.inner(x)
        return self.out(self.mask(x).softmax(-1) + x)


class FlaxMasking(linen.Module):
    """The same with the smallest float32."""

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return the inputs with the smallest number in the place of negative ones."""
        return jnp.where(x < 0, jnp.finfo(jnp.float32).min, x)


class FlaxMasked(linen.Module):
    """The same, with a small fault in its first layer."""

    factor: float = 1.0

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Compute [batch, 2]."""
        x = linen.Dense(4, name="inner")(x * self.factor)
        return linen.Dense(2, name="out")(linen.softmax(FlaxMasking(name="mask")(x)) + x)


def test_the_constant_of_a_mask_hides_no_fault_and_is_none() -> None:
    pair = Pair(Masked, FlaxMasked(1 + 1e-6), np.ones((8, 4), np.float32), batch_sizes=(8,))
    result = examine(pair, names=("parameters", "outputs"))
    assert [divergence.where for divergence in result.divergences] == ["output of inner"]
    assert "mask" in result.comparisons[0].stages


def test_a_less_exact_formula_is_no_difference() -> None:
    inputs = 1e3 + np.random.default_rng(0).normal(size=(8, 16)).astype(np.float32)
    fast = linen.LayerNorm(epsilon=1e-5, use_fast_variance=True)  # the mean square minus the square of the mean
    pair = Pair(lambda: nn.LayerNorm(16), fast, inputs, batch_sizes=(8,))
    assert not examine(pair, names=STAGE_CHECKS).divergences


@pytest.mark.parametrize(
    ("module", "function", "is_sound"),
    [
        (nn.LeakyReLU(0.2), lambda x: jax.nn.leaky_relu(x, 0.2), True),  # its slope at 0 is 1, PyTorch's is 0.2
        (nn.LeakyReLU(0.2), lambda x: jnp.maximum(x, 0.2 * x), False),  # and here 0.6, which is the slope of no side
        (nn.Hardsigmoid(), lambda x: jnp.clip(x / 6 + 0.5, 0, 1), True),  # PyTorch's 1/6 is that of float32
    ],
)
def test_either_slope_at_a_kink_is_right_and_so_is_a_more_exact_one(module: Any, function: Any, is_sound: bool) -> None:
    """Test a function without modules: JAX has no stage with the same value, so only the weights show the slope."""

    def net(tree: Any, x: jax.Array) -> jax.Array:
        return function(x @ tree["0.weight"].T + tree["0.bias"]) @ tree["2.weight"].T

    reference = nn.Sequential(nn.Linear(5, 8), module, nn.Linear(8, 3, bias=False))
    nn.init.zeros_(reference[0].bias)  # type: ignore[arg-type]
    pair = Pair(reference, net, np.ones((8, 5), np.float32), dict, batch_sizes=(8,))
    result = examine(pair, names=("parameters", "outputs", "gradients", "trajectory"))
    assert ({"gradients", "trajectory"} <= set(result.passed)) == is_sound, result.divergences


LINEAR: Any = nn.Linear(3, 2)
DENSE, ROWS = linen.Dense(2), np.ones((2, 3), np.float32)


@pytest.mark.parametrize(
    ("pair", "words"),
    [
        (Pair(cast(Any, DENSE), LINEAR, ROWS), "the first field is a Dense, not a torch.nn.Module"),
        (Pair(cast(Any, dict), DENSE, ROWS), "makes a dict, not a torch.nn.Module"),
        (Pair(LINEAR, linen.Dense, ROWS), r"is the class Dense: give a model, Dense\(...\)"),
        (Pair(LINEAR, DENSE, None), "inputs= is None"),
        (Pair(LINEAR, DENSE, ROWS, {"": ROWS}), "weights: '' leads to a ndarray: give the path of a JAX module"),
        (
            Pair(LINEAR, DENSE, ROWS, torch_optimizer=cast(Any, torch.optim.SGD)),
            "PyTorch's optimizer alone: give jax_optimizer= too",
        ),
        (Pair(LINEAR, DENSE, ROWS, torch_optimizer=1, jax_optimizer=1), "give a function that makes one for a module"),  # type: ignore[arg-type]
        (Pair(LINEAR, DENSE, ROWS, jax_inputs="nhwc"), "jax_inputs='nhwc' is unknown"),
        (Pair(LINEAR, DENSE, ROWS, batch_sizes=8), "batch_sizes=8 is no tuple of sizes"),  # type: ignore[arg-type]
    ],
)
def test_a_slip_in_a_declaration_is_told_in_words(pair: Pair, words: str) -> None:
    with pytest.raises(Refused, match=words):
        examine(pair, names=("parameters",))


@pytest.mark.parametrize("sign", [1, -1])
def test_complex_parameters_are_real_ones_with_a_last_axis_of_2(sign: int) -> None:
    """A port that conjugates one, as a formula with another convention does, differs in outputs."""

    class Modes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.modes, self.mix = nn.Parameter(torch.randn(4, dtype=torch.cfloat)), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.mix((torch.exp(-self.modes) * x).imag)

    def port(tree: Any, x: jax.Array) -> jax.Array:
        modes = tree["re"] + sign * 1j * tree["im"]
        return (jnp.exp(-modes) * x).imag @ tree["w"].T + tree["b"]

    def weights(state: Any) -> Any:
        real, imaginary = state["modes"][..., 0], state["modes"][..., 1]
        return {"re": real, "im": imaginary, "w": state["mix.weight"], "b": state["mix.bias"]}

    result = examine(Pair(Modes, port, np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32), weights))
    assert {found.check for found in result.divergences} == (set() if sign == 1 else {"outputs"})


@pytest.mark.parametrize("epsilon", [1e-12, 1e-9])
def test_a_constant_that_float32_does_not_see_is_no_fault(epsilon: float) -> None:
    """Flax's WeightNorm adds 1e-12 to a square, which PyTorch does not."""

    class Port(linen.Module):
        @linen.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return linen.WeightNorm(linen.Dense(2), epsilon=epsilon)(x)

    def reference() -> nn.Module:
        return nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))

    result = examine(Pair(reference, Port(), np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)))
    assert {found.check for found in result.divergences} == (set() if epsilon < 1e-10 else {"outputs"})
    assert ("constants of 1e-10" in " ".join(result.notes)) == (epsilon < 1e-10)


def test_inputs_of_booleans_and_losses_with_constants_of_float32_are_taken() -> None:
    """Such a loss has a buffer, the weights of the classes, and one that does not promote its float targets."""

    def mean(tree: Any, x: jax.Array, keep: jax.Array) -> jax.Array:
        return (x * keep) @ tree["fc.weight"].T + tree["fc.bias"]

    class Keeping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def forward(self, x: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
            return self.fc(x * keep)

    inputs = np.ones((4, 3), np.float32), np.eye(4, 3, dtype=bool)
    weighted, rates = nn.CrossEntropyLoss(torch.tensor([0.25, 1.0])), jnp.array([0.25, 1.0])

    def jax_loss(outputs: jax.Array, labels: jax.Array) -> jax.Array:
        losses = -jnp.take_along_axis(jax.nn.log_softmax(outputs), labels[:, None], -1)[:, 0]
        return (losses * rates[labels]).sum() / rates[labels].sum()

    def huber(outputs: jax.Array, targets: jax.Array) -> jax.Array:
        error = jnp.abs(outputs - targets)
        return jnp.where(error < 1, error**2 / 2, error - 0.5).mean()

    labels, numbers = np.array([0, 1, 1, 0]), np.arange(8, dtype=np.float32).reshape(4, 2) / 3
    declared = Pair(Keeping(), mean, inputs, dict)
    for pair in (
        replace(declared, targets=labels, torch_loss=weighted, jax_loss=jax_loss),
        replace(declared, targets=numbers, torch_loss=nn.HuberLoss(), jax_loss=huber),
    ):
        assert examine(pair, names=("parameters", "loss")).passed == ["parameters", "loss"]


class Cubic(nn.Module):
    """Returns a score of every head, query and key, as many of each, and trains no part of one of its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.pixels, self.frozen = nn.Conv2d(3, 3, 1), nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute [batch, 3, 3, 3] from [batch, 3, row, column]."""
        x = self.pixels(x).flatten(2)
        return x[:, :, :, None] * self.frozen(x).detach()[:, :, None]


class CubicPort(linen.Module):
    """The same in Linen, whose layers see one pixel at a time."""

    detached: bool

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Compute [batch, 3, 3, 3] from [batch, row, column, 3]."""
        x = linen.Dense(3, name="pixels")(x).reshape(len(x), 3, 3).swapaxes(1, 2)
        other = linen.Dense(3, name="frozen")(x)
        return x[:, :, :, None] * (lax.stop_gradient(other) if self.detached else other)[:, :, None]


@pytest.mark.parametrize("detached", [False, True])
def test_a_gradient_that_pytorch_does_not_have_at_all_is_0(detached: bool) -> None:
    """Also, a dense layer may be a convolution of 1 x 1, and outputs of four axes need not be images."""
    pair = Pair(Cubic(), CubicPort(detached), np.ones((2, 3, 1, 3), np.float32), batch_sizes=(2,))
    result = examine(pair, names=("parameters", "outputs", "gradients"))
    expected = ["gradient by the output of pixels", "gradient by frozen.weight", "gradient by frozen.bias"]
    if detached:
        expected = []
    assert [divergence.where for divergence in result.divergences] == expected


class Flattening(linen.Module):
    """A port of a convolution and a layer behind a flatten, with an activation that the reference does not have."""

    turned: bool

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Compute [batch, 2]."""
        x = jnp.abs(linen.Conv(3, (3, 3), padding=1)(x))
        return linen.Dense(2)((x.transpose(0, 3, 1, 2) if self.turned else x).reshape(len(x), -1))


@pytest.mark.parametrize("turned", [False, True])
def test_how_a_faulty_port_flattens_is_asked_only_if_it_turns_its_images(turned: bool) -> None:
    """Its outputs fit neither way."""
    reference = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2))
    proposal = Case(Pair(reference, Flattening(turned), np.ones((2, 1, 2, 2), np.float32), batch_sizes=(2,))).proposal
    assert bool(proposal.ambiguous) == turned
    if not turned:
        assert "flatten=(3, 2, 2)" in proposal.python


class Twice(nn.Module):
    """A network that uses one ReLU for two stages."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.relu, self.second = nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the outputs [batch, 10] of inputs [batch, 4]."""
        return self.second(self.relu(self.relu(self.first(x)) - 0.1))


def test_a_module_that_is_used_twice_is_compared_at_each_use() -> None:
    def compare(shift: float) -> Result:
        def twice(tree: Any, x: jax.Array) -> jax.Array:
            x = jax.nn.relu(x @ tree["first.weight"].T + tree["first.bias"])
            x = jax.nn.relu(x - shift)
            return x @ tree["second.weight"].T + tree["second.bias"]

        return examine(Pair(Twice, twice, np.ones((8, 4), np.float32), dict), names=("parameters", "outputs"))

    sound = compare(0.1)
    assert not sound.divergences
    assert {"relu", "relu#2"} <= sound.comparisons[0].stages.keys()
    assert [divergence.where for divergence in compare(0.2).divergences] == ["output of sub"]


MODULES = {
    "unreadable": "def (",
    "stops": "import sys\nsys.exit(0)",
    "lacking": "import nowhere_to_be_found",
    "sound": "number = 5\ndef needy(argument): ...\ndef failing(): raise RuntimeError('no such weights')",
}


@pytest.mark.parametrize(
    ("pair", "reason"),
    [
        ("nothing", "or your own as module:name"),
        (":name", "or your own as module:name"),
        (".relative:name", "or your own as module:name"),
        ("absent:name", "run from the folder that holds absent.py"),
        ("unreadable:name", "SyntaxError"),
        ("stops:name", "SystemExit"),
        ("lacking:name", "No module named 'nowhere_to_be_found' (lacking.py, line 1)"),
        ("sound:name", "AttributeError"),
        ("sound:needy", "TypeError"),
        ("sound:failing", "RuntimeError: no such weights (sound.py, line 3)"),
        ("sound:number", "is int, not a parity_tests.harness.Pair"),
    ],
)
def test_a_pair_that_cannot_be_made_is_refused_with_the_reason(
    pair: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module, text in MODULES.items():
        (tmp_path / f"{module}.py").write_text(text, encoding="utf-8")
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(UserError) as refusal:
        load_pair(ReportConfig(pair=pair), Console())
    assert reason in str(refusal.value)
    assert len(str(refusal.value).splitlines()) == 1


class LongWay(nn.Module):
    """A network that uses the value of a function twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the outputs [batch, 3] of inputs [batch, 6]."""
        x = functional.gelu(self.first(x))
        return self.head(x + self.second(x))


class LongWayPort(linen.Module):
    """The same in Linen, with faults."""

    approximate: bool = False
    shift: float = 0.0

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Compute the outputs [batch, 3] of inputs [batch, 6]."""
        x = linen.gelu(linen.Dense(6, name="first")(x), self.approximate)
        return linen.Dense(3, name="head")(x + linen.Dense(6, name="second")(x)) + self.shift


def test_a_fault_in_front_of_a_sum_is_named_once_and_a_second_fault_behind_it_too() -> None:
    for shift, places in ((0.0, ["gelu"]), (0.1, ["gelu", "the network"])):
        pair = Pair(LongWay, LongWayPort(True, shift), np.ones((4, 6), np.float32), batch_sizes=(4,))
        result = examine(pair, names=("outputs",))
        assert [found.where for found in result.divergences] == [f"output of {place}" for place in places]
        rows = {row.stage: row.verdict for row in stage_rows(result.comparisons[0])}
        assert (rows["gelu"], rows["second"], rows["add"]) == (BORN, INHERITED, SAME_LOCALLY)


class Strided(nn.Module):
    """A pool and a convolution with a stride."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, stride=2, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the outputs [batch, 4] of images."""
        x = functional.max_pool2d(torch.relu(self.conv1(x)), 3, 2, 1)
        return torch.relu(self.conv2(x)).mean((2, 3))


@pytest.mark.parametrize("faulty", ["pool", "conv"])
def test_another_padding_in_a_function_is_told_where_it_lies(faulty: str) -> None:
    def conv(layer: Any, x: jax.Array, stride: int, padding: Any) -> jax.Array:
        layout = ("NHWC", "HWIO", "NHWC")
        kernel = layer["weight"].transpose(2, 3, 1, 0)
        return lax.conv_general_dilated(x, kernel, (stride, stride), padding, dimension_numbers=layout) + layer["bias"]

    def apply(tree: Any, x: jax.Array) -> jax.Array:
        around = ((1, 1), (1, 1))
        x = jax.nn.relu(conv(tree["conv1"], x, 1, around))
        padding = "SAME" if faulty == "pool" else ((0, 0), *around, (0, 0))
        x = lax.reduce_window(x, -jnp.inf, lax.max, (1, 3, 3, 1), (1, 2, 2, 1), padding)
        x = jax.nn.relu(conv(tree["conv2"], x, 2, "SAME" if faulty == "conv" else around))
        return x.mean((1, 2))

    images = np.random.default_rng(0).normal(size=(4, 3, 16, 16)).astype(np.float32)
    pair = Pair(Strided, apply, images, lambda state: unflatten_dict(state, sep="."), batch_sizes=(4,))
    (found,) = examine(pair, names=("outputs",)).divergences
    assert found.where == ("output of max_pool2d" if faulty == "pool" else "output of conv2")
    assert "; or in" not in found.problem


class Gated(nn.Module):
    """A product of two branches: its activation is called before the other branch, and used behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.act, self.up, self.down = nn.Linear(4, 6), nn.SiLU(), nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the outputs [batch, 4]."""
        return self.down(self.act(self.gate(x)) * self.up(x))


@pytest.mark.parametrize(
    ("act", "where", "unnamed"),
    [
        (linen.silu, "", False),
        (lambda x: linen.silu(1.702 * x), "output of act", False),
        (linen.gelu, "output of act", True),  # JAX has no silu
    ],
    ids=["sound", "scaled", "another"],
)
def test_the_activation_of_a_gate_is_named(act: Any, where: str, unnamed: bool) -> None:
    class Port(linen.Module):
        @linen.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            gate, up = linen.Dense(6, name="gate")(x), linen.Dense(6, name="up")(x)
            return linen.Dense(4, name="down")(act(gate) * up)

    images = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    result = examine(Pair(Gated, Port(), images, batch_sizes=(5,)), names=("outputs",))
    assert [divergence.where for divergence in result.divergences] == [where] * bool(where)
    assert "or in" not in str(result.divergences)
    assert ("act" in result.comparisons[0].stages) != unnamed


def test_a_layer_whose_value_has_another_size_in_jax_is_named() -> None:
    class Port(linen.Module):
        @linen.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return linen.Conv(2, (3, 3), padding="VALID", name="0")(x).mean((1, 2))

    network = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    pair = Pair(network, Port(), np.ones((4, 1, 6, 6), np.float32), batch_sizes=(4,))
    (found,) = examine(pair, names=("outputs",)).divergences
    assert found.where == "output of 0"
    assert "JAX's shape is [4, 2, 4, 4], PyTorch's [4, 2, 6, 6]" in found.problem


def test_the_sizes_of_what_is_not_carried_are_told() -> None:
    pair = Pair(nn.Linear(4, 2), linen.Dense(3), np.ones((4, 4), np.float32), batch_sizes=(4,))
    found = {divergence.where: divergence.problem for divergence in examine(pair, names=("parameters",)).divergences}
    assert "PyTorch has it, 2x4, and nothing" in found["weight"]
    assert "JAX has it, 4x3, and no tensor" in found["kernel"]


class Blocks(nn.Module):
    """Two residual blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4)) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the sums [batch, 4]."""
        for block in self.blocks:
            x = x + block(x)
        return x


class BlockPort(linen.Module):
    """One of them for a scan, with another activation."""

    @linen.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        """Return the sum."""
        return x + linen.Dense(4, name="second")(jax.nn.silu(linen.Dense(6, name="first")(x))), None


class BlocksPort(linen.Module):
    """Both, with their weights stacked."""

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return the sums [batch, 4]."""
        scan = linen.scan(BlockPort, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        return scan(name="blocks")(x, None)[0]


def test_layers_that_jax_stacks_and_scans_are_compared_one_by_one() -> None:
    result = examine(Pair(Blocks, BlocksPort(), np.ones((4, 4), np.float32), batch_sizes=(4,)), names=("outputs",))
    assert [found.where for found in result.divergences] == [f"output of blocks.{number}.1" for number in range(2)]


class Cell(nn.Module):
    """One step of a GRU."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.head = nn.GRUCell(3, 4), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        """Return [batch, 2]."""
        return self.head(self.cell(x, state))


class CellPort(linen.Module):
    """The same, with gates of another kind."""

    @linen.compact
    def __call__(self, x: jax.Array, state: jax.Array) -> jax.Array:
        """Return [batch, 2]."""
        cell = linen.GRUCell(4, gate_fn=jax.nn.hard_sigmoid, name="cell")
        return linen.Dense(2, name="head")(cell(state, x)[1])


def test_a_fault_in_a_cell_is_found_there() -> None:
    inputs = np.ones((4, 3), np.float32), np.ones((4, 4), np.float32)
    result = examine(Pair(Cell, CellPort(), inputs, batch_sizes=(4,)), names=("outputs",))
    assert [found.where for found in result.divergences] == ["output of cell"]


class Scaled(nn.Module):
    """A residual block with a factor of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.gamma = nn.Linear(4, 4), nn.Parameter(torch.rand(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the sum [batch, 4]."""
        return x + self.gamma * self.fc(x)


class FactorPort(linen.Module):
    """Multiply by a factor, which is a module of its own in this port."""

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return the product [batch, 4]."""
        return x * self.param("gamma", linen.initializers.ones, (4,))


class ScaledPort(linen.Module):
    """The same block, whose factor is a module."""

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return the sum [batch, 4]."""
        return x + FactorPort(name="scale")(linen.Dense(4, name="fc")(x))


def test_a_module_is_not_the_one_that_holds_its_factor_alone() -> None:
    port = linen.Sequential([ScaledPort(), linen.Dense(2)])
    network = nn.Sequential(Scaled(), nn.Linear(4, 2))
    result = examine(Pair(network, port, np.ones((4, 4), np.float32), batch_sizes=(4,)), names=("outputs",))
    assert not result.divergences
    assert result.comparisons[0].stages["0"].jax == "layers_0"


class IdlePort(linen.Module):
    """A port with a fault, which calls a norm once in vain."""

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return [batch, 2]."""
        norm = linen.LayerNorm(epsilon=1e-5, name="1")
        x = linen.Dense(4, name="0")(x).at[:, 0].add(0.1)
        norm(x)
        return linen.Dense(2, name="2")(norm(x))


def test_a_call_in_vain_gets_no_gradient() -> None:
    network = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    pair = Pair(network, IdlePort(), np.ones((4, 4), np.float32), batch_sizes=(4,))
    assert [found.where for found in examine(pair, names=("outputs", "gradients")).divergences] == ["output of 1"]


def test_a_loader_may_return_lists_and_tuples() -> None:
    def apply(params: Any, x: jax.Array) -> jax.Array:
        ((kernel, bias),) = params
        return x @ kernel + bias

    def load(state: dict[str, Any]) -> Any:
        return [(state["weight"].T, state["bias"])]

    pair = Pair(nn.Linear(4, 2), apply, np.ones((4, 4), np.float32), load, batch_sizes=(4,))
    assert not examine(pair, names=("parameters", "outputs", "optimizer")).divergences


# Haiku's norms make statistics in training mode alone, and keep them in modules of their own


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


def test_a_fault_of_the_schedule_is_not_told_again_by_the_optimizer() -> None:
    def rate(step: int) -> float:
        return 1e-2 * 0.5 ** (step // 3)

    def pair(decay: float) -> Pair:
        schedule = optax.exponential_decay(1e-2, 3, 0.5)  # without a staircase
        return Pair(
            nn.Linear(3, 2),
            lambda tree, x: x @ tree["weight"].T + tree["bias"],
            np.ones((2, 3), np.float32),
            dict,
            torch_optimizer=lambda module: torch.optim.SGD(module.parameters(), lr=1e-2, momentum=0.9),
            jax_optimizer=optax.sgd(schedule, decay),
            torch_schedule=rate,
            jax_schedule=schedule,
            schedule_steps=10,
        )

    found = [{each.check for each in examine(pair(decay)).divergences} for decay in (0.9, 0.8)]
    assert found == [{"schedule"}, {"schedule", "optimizer"}]


class Shift(nn.Module):
    """A number that is added to everything. Before a norm, its gradient is 0 but for rounding."""

    def __init__(self) -> None:
        super().__init__()
        self.by = nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Add it."""
        return x + self.by


def test_neither_a_scale_of_0_nor_rounding_hides_that_either_slope_at_a_kink_is_right() -> None:
    """Test a channel that is 0 everywhere, because the norm before the activation has a scale and a bias of 0."""

    def net(tree: Any, x: jax.Array) -> jax.Array:
        x = x @ tree["0.0.weight"].T + tree["0.1.by"]
        x = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return jax.nn.leaky_relu(x * tree["1.weight"] + tree["1.bias"], 0.2) @ tree["3.weight"].T

    bare = (nn.Linear(5, 8, bias=False), nn.Linear(8, 3, bias=False))
    reference = nn.Sequential(nn.Sequential(bare[0], Shift()), nn.LayerNorm(8), nn.LeakyReLU(0.2), bare[1])
    pair = Pair(reference, net, np.arange(-20.0, 20.0, dtype=np.float32).reshape(8, 5), dict, batch_sizes=(32,))
    assert not examine(pair, names=("parameters", "outputs", "gradients")).divergences


class Shifted(nn.Module):
    """A layer with a shift that is always 0, and which the port leaves out."""

    shift: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 4, bias=False)
        self.register_buffer("shift", torch.zeros(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute [batch, 4]."""
        return self.fc(x[:, :3]) + self.shift


def test_what_a_port_does_not_need_is_told_in_one_line_for_all_layers_and_keeps_its_own_values() -> None:
    def net(tree: Any, x: jax.Array) -> jax.Array:
        return jnp.tanh(x[:, :3] @ tree["0.fc.weight"].T)[:, :3] @ tree["2.fc.weight"].T

    own = {f"{i}.fc.weight": np.ones((4, 3)) for i in (0, 2)}
    reference = nn.Sequential(Shifted(), nn.Tanh(), Shifted())
    pair = Pair(reference, (own, net), np.ones((4, 3), np.float32))
    found = examine(pair, names=("parameters",)).divergences
    assert [each.where for each in found] == ["0.shift", "2.shift"]
    assert all("weights={'{i}.shift': unused()}" in str(each) for each in found)
    result = examine(replace(pair, weights={"{i}.shift": unused()}), names=("parameters", "outputs", "trajectory"))
    assert not result.divergences, "\n".join(map(str, result.divergences))


class Features(nn.Module):
    """A layer that scales its inputs by a table, and turns them by one drawn at random."""

    deviation: torch.Tensor
    turn: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("deviation", torch.tensor([0.229, 0.224, 0.225]))
        self.register_buffer("turn", torch.randn(3, 3))
        self.fc, self.slopes = nn.Linear(3, 4), nn.PReLU(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute [batch, 4] from [batch, 3]."""
        return self.slopes(self.fc(torch.tanh(x / self.deviation) @ self.turn))


def features(one_slope: bool = False) -> Pair:
    """Return its pair with a port that computes the first table itself, and may have one slope for all features."""

    def net(tree: Any, x: jax.Array) -> jax.Array:
        x = jnp.tanh(x / jnp.array([0.229, 0.224, 0.225])) @ lax.stop_gradient(tree["turn"])
        x = x @ tree["fc"]["weight"].T + tree["fc"]["bias"]
        slopes = tree["slopes"]["weight"]
        return jnp.where(x > 0, x, x * (slopes.mean() if one_slope else slopes))

    own = {
        "turn": jnp.ones((3, 3)),
        "fc": {"weight": jnp.ones((4, 3)), "bias": jnp.zeros(4)},
        "slopes": {"weight": jnp.full(4, 0.25)},
    }
    return Pair(Features, net, np.ones((4, 3), np.float32), {"deviation": unused()}, jax_init=lambda key: own)


def test_a_random_buffer_is_no_table_and_one_that_a_port_computes_may_be_more_exact() -> None:
    result = examine(features(), names=("parameters", "tables", "outputs", "trajectory"))
    assert not result.divergences, "\n".join(map(str, result.divergences))
    assert "tables: not tried for turn: PyTorch draws them at random" in result.notes


def test_a_parameter_of_one_value_is_drawn_away_from_it() -> None:
    result = examine(features(one_slope=True), names=("outputs",))
    assert [each.where for each in result.divergences] == ["output of slopes"]


class Grouped(nn.Module):
    """Two layers with an activation and a norm between them, which are modules."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.act, self.norm, self.fc2 = nn.Linear(3, 8), nn.Mish(), nn.GroupNorm(4, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute [batch, 4] from [batch, 3]."""
        return self.fc2(self.norm(self.act(self.fc1(x))))


@pytest.mark.parametrize("place", ["fc1", "act", "norm", "fc2"])
def test_a_fault_in_a_port_without_names_is_found_in_its_operation(place: str) -> None:
    def net(tree: Any, x: jax.Array) -> jax.Array:
        x = x @ tree["fc1"]["weight"].T + tree["fc1"]["bias"] * (2 if place == "fc1" else 1)
        x = x * jnp.tanh(jnp.log1p(jnp.exp(x)) * (0.9 if place == "act" else 1))
        groups = x.reshape(-1, 4, 2) if place != "norm" else x.reshape(-1, 2, 4).swapaxes(1, 2)
        groups = (groups - groups.mean(-1, keepdims=True)) * lax.rsqrt(groups.var(-1, keepdims=True) + 1e-5)
        x = (groups if place != "norm" else groups.swapaxes(1, 2)).reshape(x.shape)
        x = x * tree["norm"]["weight"] + tree["norm"]["bias"]
        return x @ tree["fc2"]["weight"].T + tree["fc2"]["bias"] * (2 if place == "fc2" else 1)

    nested = partial(unflatten_dict, sep=".")
    pair = Pair(Grouped, net, np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32), nested, batch_sizes=(5,))
    found = examine(pair, names=("outputs",)).divergences
    assert [each.where for each in found] == [f"output of {place}"]
    assert "; or in" not in found[0].problem


class Shuffled(nn.Module):
    """A pool, and channels that become rows and columns."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.pool = nn.Conv2d(2, 8, 3), nn.MaxPool2d(2, ceil_mode=True)
        self.shuffle, self.out = nn.PixelShuffle(2), nn.Conv2d(2, 3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute [batch, 3] from images."""
        return self.out(self.shuffle(self.pool(self.conv(x)))).amax((2, 3))


@pytest.mark.parametrize("place", ["pool", "shuffle"])
def test_a_value_of_another_size_or_order_is_found_where_it_arises(place: str) -> None:
    class Port(linen.Module):
        @linen.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            x = linen.Conv(8, (3, 3), padding="VALID", name="conv")(x)
            x = linen.max_pool(x, (2, 2), (2, 2), "VALID" if place == "pool" else "SAME")
            batch, rows, columns, _ = x.shape
            parts = (batch, rows, columns, 2, 2, 2)
            x = x.reshape(parts).transpose((0, 1, 4, 2, 5, 3) if place == "pool" else (0, 1, 3, 2, 4, 5))
            return linen.Conv(3, (1, 1), name="out")(x.reshape(batch, 2 * rows, 2 * columns, 2)).max((1, 2))

    images = np.random.default_rng(0).normal(size=(4, 2, 9, 9)).astype(np.float32)
    found = examine(Pair(Shuffled, Port(), images, batch_sizes=(4,)), names=("outputs",)).divergences
    assert [each.where for each in found] == [f"output of {place}"]

"""The harness compares any port: the example in the README, and parts of networks that SimpleCNN does not have."""

import contextlib
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast
from unittest.mock import Mock

import equinox as eqx
import haiku as hk
import jax
import numpy as np
import optax
import pytest
import torch
from flax import linen, nnx
from jax import lax
from jax import numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from rich.console import Console
from torch import nn
from torch.nn import functional

from jax_cnn.config import UserError
from parity_tests import command
from parity_tests.command import ReportConfig, find_users_frame, load_pair, plant
from parity_tests.harness import Batch, Inputs, Pair, Result, examine
from parity_tests.harness.capture import Case, has_training_mode
from parity_tests.harness.compare import Refused, order_between
from parity_tests.harness.explain import MOST_OF_TWO, Inside, compare_batches
from parity_tests.harness.report import BORN, INHERITED, SAME_LOCALLY, stage_rows
from parity_tests.harness.weights import unused
from parity_tests.parity.networks import LinenNet, NnxNet, TorchNet, linear, nested, network, values
from parity_tests.support import ROOT, run_command

LONGEST_EXAMPLE = 25  # lines that declare a pair, with both networks


@pytest.fixture(autouse=True)
def _same_weights() -> None:
    torch.manual_seed(0)


def places(pair: Pair, *checks: str) -> list[str]:
    """Return where these checks find a difference; without names, the check of the outputs."""
    return [divergence.where for divergence in examine(pair, names=checks or ("outputs",)).divergences]


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


def test_a_table_of_numpy_takes_an_index_that_is_traced() -> None:
    tree = {"weight": np.ones((5, 3), np.float32), "order": np.arange(5)}
    pair = Pair(
        nn.Embedding(5, 3), (tree, lambda tree, i: tree["weight"][tree["order"][i]]), np.array([[1, 4], [0, 2]])
    )
    assert not examine(pair, names=("outputs", "trajectory")).divergences


def test_flags_among_the_inputs_and_of_the_reference_stay_what_they_are_in_training() -> None:
    def forward(net: Any, x: torch.Tensor, relu: bool, halve: bool) -> torch.Tensor:
        y = net.fc(x).relu() if relu is True else net.fc(x)
        return y if halve is False else y / 2

    def port(tree: Any, x: jax.Array, relu: bool) -> jax.Array:
        return jax.nn.relu(linear(tree["fc"], x)) if relu is True else linear(tree["fc"], x)

    reference = TorchNet(forward, fc=nn.Linear(3, 2))
    pair = Pair(reference, port, Inputs(values(4, 3), True), nested, torch_kwargs={"halve": False})
    assert examine(pair, names=("outputs", "trajectory")).passed == ["outputs", "trajectory"]


def test_a_port_that_returns_more_than_the_reference_is_refused() -> None:
    pair = Pair(nn.Linear(3, 2), lambda tree, x: (x @ tree["weight"].T + tree["bias"], x), np.ones((2, 3)), dict)
    with pytest.raises(Refused, match="PyTorch returns 1 array, JAX "):
        examine(pair, names=("outputs",))


def test_targets_are_rows_of_the_example_the_same_of_all() -> None:
    """A loss may take no others: probabilities, and labels as long as another target says."""
    shares = np.random.default_rng(0).dirichlet(np.ones(3), 8)
    lengths = np.arange(8)
    targets = Pair(nn.Identity, None, np.ones((8, 3)), targets=(shares, lengths)).draw_targets(0, 11)
    np.testing.assert_array_equal(targets[0], shares[targets[1]])
    assert sorted(set(targets[1])) == list(range(8))
    placeholder = Pair(nn.Identity, None, np.ones((8, 3)), targets=np.zeros((8, 1))).draw_targets(0, 11)
    assert placeholder.shape == (11, 1)
    assert placeholder.std() > 0.1


class Slope(nn.Module):
    """The derivative of a network by its input, as a Hamiltonian or a physics-informed network has it."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the derivatives [batch, 3]."""
        x = x.requires_grad_(True)
        (slope,) = torch.autograd.grad(torch.tanh(self.fc(x)).sum(), x, create_graph=True)
        return slope


def slope(tree: Any, x: jax.Array) -> jax.Array:
    """Compute the same."""
    return jax.grad(lambda x: jnp.tanh(x @ tree["fc.weight"].T + tree["fc.bias"]).sum())(x)


def test_a_forward_that_needs_gradients_of_its_own_is_compared() -> None:
    pair = Pair(Slope, slope, np.ones((4, 3), np.float32), dict, targets=np.ones((4, 3), np.float32))
    result = examine(pair, names=("parameters", "outputs", "loss", "gradients", "trajectory"))
    assert not result.divergences
    assert len(result.passed) == 5
    assert not any("keeps its float32" in note for note in result.notes)


class Penalty(nn.Module):
    """A score, and the penalty of a Wasserstein GAN: of the derivative of another score, which is not used itself."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """Return one number for each example [batch]."""
        x = x.requires_grad_(True)
        (slope,) = torch.autograd.grad(self.net(x).sum(), x, create_graph=True)
        return cast(torch.Tensor, self.net(y)[:, 0]) + (slope.norm(dim=1) - 1) ** 2


class Score(linen.Module):
    """The network, under the same name."""

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return [batch, 1]."""
        return linen.Dense(1)(jnp.tanh(linen.Dense(4)(x)))


class PenaltyPort(linen.Module):
    """The same, with the squared length of the derivative."""

    def setup(self) -> None:
        """Make the network."""
        self.net = Score()

    def __call__(self, x: jax.Array, y: jax.Array) -> jax.Array:
        """Return one number for each example [batch]."""
        if self.is_initializing():  # Flax makes no weights while it differentiates
            return self.net(y)[:, 0]
        slope = jax.vjp(self.net, x)[1](jnp.ones((len(x), 1)))[0]
        return self.net(y)[:, 0] + (jnp.square(slope).sum(1) - 1) ** 2


def test_a_call_that_is_only_differentiated_does_not_shift_the_others() -> None:
    inputs = (np.ones((4, 3), np.float32), np.ones((4, 3), np.float32))
    result = examine(Pair(Penalty, PenaltyPort(), inputs, batch_sizes=(4,)), names=("outputs",))
    assert [divergence.where for divergence in result.divergences] == ["output of norm"]


class Noisy(nn.Module):
    """A linear layer with noise, in training alone or always."""

    def __init__(self, always: bool) -> None:
        super().__init__()
        self.fc, self.always = nn.Linear(3, 2), always

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return [batch, 2]."""
        y = cast(torch.Tensor, self.fc(x))
        return y + torch.randn_like(y) if self.training or self.always else y


def test_noise_that_the_reference_draws_is_named() -> None:
    pair = Pair(partial(Noisy, always=False), linen.Dense(2), np.ones((4, 3), np.float32))
    result = examine(pair, names=("outputs", "trajectory"), steps=2)
    assert result.passed == ["outputs"]
    assert "make them an input of both sides, or declare training=False" in result.not_checked["trajectory"]
    with pytest.raises(Refused, match=r"the reference draws random numbers, .* make them an input of both sides"):
        examine(replace(pair, torch_module=partial(Noisy, always=True)), names=("outputs",))


def test_an_optimizer_that_computes_losses_itself_is_not_compared() -> None:
    optimizers = {"torch_optimizer": lambda module: torch.optim.LBFGS(module.parameters()), "jax_optimizer": optax.sgd}
    pair = Pair(partial(nn.Linear, 3, 2), linen.Dense(2), np.ones((4, 3), np.float32), **optimizers)
    result = examine(pair, names=("outputs", "optimizer", "trajectory"), steps=2)
    assert result.passed == ["outputs"]
    assert "LBFGS computes the loss several times a step" in result.not_checked["optimizer"]


class Buffers(nn.Module):
    """A product with a mask and a sum with zeros, both of which are buffers, and running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.norm = nn.Linear(4, 3), nn.BatchNorm1d(3, affine=False)
        self.mask: torch.Tensor
        self.offset: torch.Tensor
        self.register_buffer("mask", torch.tril(torch.ones(3, 3)))
        self.register_buffer("offset", torch.zeros(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return [batch, 3]."""
        return cast(torch.Tensor, self.norm(self.fc(x) @ self.mask)) + self.offset


@pytest.mark.parametrize("upper", [False, True])
def test_buffers_that_a_port_computes_itself_are_no_gap_but_statistics_are(upper: bool) -> None:
    def port(tree: Any, x: jax.Array) -> jax.Array:
        mask = jnp.triu(jnp.ones((3, 3))) if upper else jnp.tril(jnp.ones((3, 3)))
        return (x @ tree["fc"]["kernel"] + tree["fc"]["bias"]) @ mask / np.sqrt(1 + 1e-5)

    tree = {"fc": {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)}}
    pair = Pair(Buffers, (tree, port), np.ones((8, 4), np.float32), training=False)
    found = examine(pair, names=("parameters",))
    assert {divergence.where for divergence in found.divergences} == {"norm", "offset"}
    declared = replace(pair, weights={"norm": unused(), "offset": unused()})
    result = examine(declared, names=("parameters", "outputs"))
    assert [divergence.where for divergence in result.divergences][:1] == (["output of matmul"] if upper else [])
    assert any("only in PyTorch, taken for what JAX computes itself: mask" in note for note in result.notes)


def frozen_rates() -> nn.Module:
    """Return a layer behind rates that are a frozen parameter, as rotary embeddings have, and an empty buffer."""
    rates = nn.Parameter(torch.tensor([1.0, 0.5, 0.25]), requires_grad=False)
    return TorchNet(
        lambda net, x: net.fc(x * net.rates), rates=rates, nothing=nn.Buffer(torch.zeros(0)), fc=nn.Linear(3, 4)
    )


def test_a_frozen_parameter_that_a_port_computes_itself_is_no_gap_but_weights_that_a_user_froze_may_be_one() -> None:
    def port(tree: Any, x: jax.Array) -> jax.Array:
        return linear(tree["fc"], x * 0.5 ** jnp.arange(3))

    own = {"fc": {"weight": jnp.ones((4, 3)), "bias": jnp.ones(4)}}
    pair = Pair(frozen_rates, (own, port), values(4, 3))
    result = examine(pair, names=("parameters", "outputs", "optimizer"))
    assert result.passed == ["parameters", "outputs", "optimizer"]
    assert any("only in PyTorch, taken for what JAX computes itself: rates" in note for note in result.notes)
    (gap,) = examine(replace(pair, torch_module=frozen_rates()), names=("parameters",)).divergences
    assert gap.where == "rates"


class Cosine(nn.Module):
    """Rows of length 1 times a matrix that starts as the identity: a row of zeros would be NaN."""

    def __init__(self) -> None:
        super().__init__()
        self.turn = nn.Parameter(torch.eye(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return [batch, 3]."""
        return x / x.norm(dim=1, keepdim=True) @ self.turn


@pytest.mark.parametrize("transposed", [False, True])
def test_a_row_of_zeros_that_would_be_nan_is_left_out_and_the_identity_is_told_from_its_transpose(
    transposed: bool,
) -> None:
    def port(tree: Any, x: jax.Array) -> jax.Array:
        turn = tree["turn"].T if transposed else tree["turn"]
        return x / jnp.linalg.norm(x, axis=1, keepdims=True) @ turn

    pair = Pair(Cosine, ({"turn": jnp.eye(3)}, port), np.ones((4, 3), np.float32))
    result = examine(pair, names=("parameters", "outputs", "gradients"))
    assert not result.divergences
    assert "no row of the inputs is zero, because PyTorch gives NaN for it" in result.notes


def test_a_gradient_that_is_nan_in_jax_alone_is_explained() -> None:
    def port(x: jax.Array) -> jax.Array:
        x = linen.Dense(3, use_bias=False, name="fc")(x)
        return x / jnp.maximum(jnp.linalg.norm(x, axis=1, keepdims=True), 1e-12)

    reference = TorchNet(lambda net, x: nn.functional.normalize(net.fc(x)), fc=nn.Linear(4, 3, bias=False))
    (fault,) = examine(Pair(reference, LinenNet(port), np.ones((4, 4), np.float32)), names=("gradients",)).divergences
    assert fault.problem.startswith("JAX has nan at [0, 0]")
    assert fault.cause.startswith("Where a norm or a root is taken of 0")


def test_a_jax_optimizer_that_takes_more_than_gradients_is_refused_in_words() -> None:
    optimizers = {
        "torch_optimizer": lambda module: torch.optim.SGD(module.parameters(), 0.1),
        "jax_optimizer": optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau()),
    }
    pair = Pair(partial(nn.Linear, 3, 2), linen.Dense(2), np.ones((4, 3), np.float32), **optimizers)
    with pytest.raises(Refused, match=r"takes more than gradients \(.* 'value'\): give jax_step="):
        examine(pair, names=("optimizer",))


class Euler(nn.Module):
    """Three steps of Euler's method."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.out = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return [batch, 2]."""
        for _ in range(3):
            x = x + 0.1 * torch.tanh(self.fc(x))
        return cast(torch.Tensor, self.out(x))


def test_a_fault_in_a_loop_is_found_in_its_operation() -> None:
    def port(tree: Any, x: jax.Array) -> jax.Array:
        def step(_: Any, x: jax.Array) -> jax.Array:
            return x + 0.2 * jnp.tanh(x @ tree["fc.weight"].T + tree["fc.bias"])

        return lax.fori_loop(0, 3, step, x) @ tree["out.weight"].T + tree["out.bias"]

    result = examine(Pair(Euler, port, np.ones((4, 3), np.float32), dict), names=("outputs",))
    assert [divergence.where for divergence in result.divergences] == ["output of mul"]


def test_an_instance_norm_with_statistics_has_a_training_mode() -> None:
    assert has_training_mode(nn.InstanceNorm1d(3, track_running_stats=True))
    assert not has_training_mode(nn.InstanceNorm1d(3))


def test_sequences_are_turned_where_the_pair_says_so() -> None:
    pair = Pair(partial(nn.Conv1d, 2, 4, 3), linen.Conv(4, (3,), padding="VALID"), np.ones((4, 2, 9), np.float32))
    assert not examine(replace(pair, jax_inputs="channels_last"), names=("parameters", "outputs")).divergences


def test_a_mask_that_is_added_keeps_its_infinities() -> None:
    mask = np.where(np.tri(4), 0, -np.inf).astype(np.float32)
    np.testing.assert_array_equal(Pair(nn.Identity, None, (values(4, 3), mask)).draw_inputs(0, 4).args[1], mask)


def test_a_mask_that_is_the_same_everywhere_masks_something() -> None:
    drawn = Pair(nn.Identity, None, Inputs(values(4, 3), pad_mask=np.ones((4, 3), bool))).draw_inputs(0, 4)
    assert drawn.kwargs["pad_mask"].tolist() == [[True] * 3] * 3 + [[True, True, False]]


def test_a_maximum_over_many_points_is_often_the_first_or_the_last_one() -> None:
    points = Pair(nn.Identity, None, values(4, 1000, 3)).draw_inputs(0, 8).args[0]
    largest = (points @ np.random.default_rng(0).normal(size=(3, 64))).argmax(1)
    assert {0, 999} <= {*largest[3]}


def test_keyword_arguments_keep_their_order() -> None:
    example = Inputs(tokens=np.ones((4, 3), int), mask=np.ones((4, 3), int))
    assert list(Pair(nn.Identity, None, example).draw_inputs(0, 8).map(np.asarray).kwargs) == ["tokens", "mask"]


def module() -> nn.Module:
    """Return a network with a strided convolution, batch normalisation, average pooling and dropout."""
    return network(
        conv=nn.Conv2d(1, 6, 3, stride=2, padding=1),
        norm=nn.BatchNorm2d(6),
        relu=nn.ReLU(),
        pool=nn.AvgPool2d(8),
        drop=nn.Dropout(0.5),
        flatten=nn.Flatten(),
        out=nn.Linear(6, 10),
    )


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
    pair = port(lambda tree, images: apply(tree, images, eps=1e-3))  # Keras's eps; Flax's default is PyTorch's 1e-5
    (found,) = examine(pair, names=STAGE_CHECKS).divergences
    assert found.where == "output of norm"
    assert "equal with 0.001 in the place of 1e-05" in found.problem


def test_a_wrong_eps_before_an_attention_is_found_in_a_function_without_names() -> None:
    def apply(tree: Any, x: jax.Array) -> jax.Array:
        x = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-6)
        x = x * tree["norm.weight"] + tree["norm.bias"]
        q, k, v = jnp.split(x @ tree["att.in_proj_weight"].T + tree["att.in_proj_bias"], 3, -1)
        x = jax.nn.softmax(q @ k.swapaxes(1, 2) / 2) @ v
        return jnp.tanh(x @ tree["att.out_proj.weight"].T + tree["att.out_proj.bias"])

    layers = {"norm": nn.LayerNorm(4), "att": nn.MultiheadAttention(4, 1, batch_first=True)}
    reference = TorchNet(lambda net, x: torch.tanh(net.att(*[net.norm(x)] * 3)[0]), **layers)
    (found,) = examine(Pair(reference, apply, values(4, 5, 4), dict), names=("outputs",)).divergences
    assert found.where == "output of norm"
    assert "equal with 1e-06 in the place of 1e-05" in found.problem


def test_copies_of_a_value_are_tried_once_for_the_terms_of_a_sum() -> None:
    value = values(2, 3)
    inside = Inside([value, value.copy(), value.T.copy(), 2 * value], channels_last=False)
    assert len([*inside.of_shape((2, 3))]) == 2


def test_values_just_before_a_wrong_one_are_tried_for_two_arguments() -> None:
    """Behind many layers, all values would be too many."""
    layers = [np.full((2, 3), float(number)) for number in range(MOST_OF_TWO + 6)]
    tried = Inside(layers, channels_last=False).nearest((2, 3), layers[-3])
    assert [int(value[0, 0]) for value in tried] == [*range(3, MOST_OF_TWO + 3)]


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


def test_a_row_of_padding_that_only_jax_trains_is_named() -> None:
    tokens = np.arange(8).reshape(2, 4) % 5
    reference = nn.Sequential(nn.Embedding(5, 3, padding_idx=2))
    pair = Pair(reference, lambda tree, tokens: tree["0.weight"][tokens], tokens, dict, batch_sizes=(2,))
    (found,) = examine(pair, names=("parameters", "outputs", "gradients")).divergences
    assert found.cause == "PyTorch's padding_idx=2 gives this row no gradient"


@pytest.mark.parametrize(
    ("module", "residual", "found"),
    [(nn.Tanh(), True, ["act"]), (nn.Sigmoid(), False, ["add"]), (nn.Hardsigmoid(), True, [])],
)
def test_a_gradient_of_padding_that_is_stopped_behind_the_embedding_is_not_told_beside_a_fault(
    module: nn.Module, residual: bool, found: list[str]
) -> None:
    """Nor does it hide that PyTorch's own gradient of hardsigmoid is off by more than rounding."""

    def forward(net: Any, tokens: torch.Tensor) -> torch.Tensor:
        x = net.embed(tokens)
        return x + net.act(net.fc(x))

    def port(tree: Any, tokens: jax.Array) -> jax.Array:
        x = tree["embed.weight"][tokens]
        x = jnp.where((tokens == 2)[..., None], lax.stop_gradient(x), x)
        y = linear({"weight": tree["fc.weight"], "bias": tree["fc.bias"]}, x)
        return x + jnp.clip(y / 6 + 0.5, 0, 1) if residual else jax.nn.sigmoid(y)

    layers = {"embed": nn.Embedding(5, 3, padding_idx=2), "fc": nn.Linear(3, 3), "act": module}
    pair = Pair(TorchNet(forward, **layers), port, np.arange(8).reshape(2, 4) % 5, dict, batch_sizes=(2,))
    assert places(pair, "outputs", "gradients") == [f"output of {name}" for name in found]


def test_a_model_makes_its_variables_with_arrays_of_jax() -> None:
    def demanding(x: Any) -> Any:
        assert isinstance(x, jax.Array)
        return linen.Dense(4)(x)

    case = Case(Pair(nn.Linear(4, 4), LinenNet(demanding), np.ones((8, 4), np.float32)))
    assert case.own_variables is not None


def test_a_layer_is_taken_to_be_behind_a_flatten_only_if_it_gets_as_many_values_as_an_image_has() -> None:
    """Here, the 8 values of `time` are no image of 4 channels. The outputs of a faulty port would not decide it."""
    reference = TorchNet(
        lambda net, images, times: net.conv(images).mean((2, 3)) + net.time(times),
        conv=nn.Conv2d(3, 4, 3, padding=1),
        time=nn.Linear(8, 4),
    )
    port = LinenNet(lambda images, times: linen.Conv(4, (3, 3))(images).mean((1, 2)) + 1.5 * linen.Dense(4)(times))
    inputs = np.ones((2, 3, 6, 6), np.float32), np.ones((2, 8), np.float32)
    assert not Case(Pair(reference, port, inputs, batch_sizes=(2,))).proposal.ambiguous


def test_whole_numbers_of_32_bits_are_divided_in_float64() -> None:
    reference = TorchNet(lambda net, x: net.fc(x) + torch.log(torch.arange(1, 5) / 3), fc=nn.Linear(4, 4))
    port = LinenNet(lambda x: linen.Dense(4)(x) + jnp.log(jnp.arange(1, 5, dtype="int32") / 3))
    result = examine(Pair(reference, port, np.ones((2, 4), np.float32), batch_sizes=(2,)), names=("outputs",))
    assert not result.divergences
    assert {"div", "log", "add"} <= result.comparisons[0].functions.keys()


def test_the_directions_of_a_recurrent_layer_keep_their_order_where_outputs_do_not_decide() -> None:
    """The names of JAX's cells say nothing of their directions, and a factor makes the outputs differ."""

    def port(x: jax.Array) -> jax.Array:
        forward, backward = (linen.RNN(linen.OptimizedLSTMCell(2)) for _ in range(2))
        return 1.5 * jnp.asarray(linen.Bidirectional(forward, backward)(x))

    reference = TorchNet(lambda net, x: net.rnn(x)[0], rnn=nn.LSTM(3, 2, bidirectional=True, batch_first=True))
    case = Case(Pair(reference, LinenNet(port), np.ones((2, 4, 3), np.float32), batch_sizes=(2,)))
    assert not case.proposal.ambiguous
    assert all(("Cell_1/" in row.jax) == ("reverse" in row.torch) for row in case.proposal.rows)


def test_the_constant_of_a_mask_hides_no_fault_and_is_none() -> None:
    """Each side hides what is negative with the smallest number of its dtype; the fault is small and comes before."""

    def forward(net: Any, x: torch.Tensor) -> torch.Tensor:
        x = net.inner(x)
        return net.out(net.mask(x).softmax(-1) + x)

    def port(x: jax.Array) -> jax.Array:
        x = linen.Dense(4, name="inner")(x * (1 + 1e-6))
        masked = LinenNet(lambda x: jnp.where(x < 0, jnp.finfo(jnp.float32).min, x), name="mask")(x)
        return linen.Dense(2, name="out")(linen.softmax(masked) + x)

    mask = TorchNet(lambda net, x: x.masked_fill(x < 0, torch.finfo(x.dtype).min))
    reference = TorchNet(forward, inner=nn.Linear(4, 4), mask=mask, out=nn.Linear(4, 2))
    pair = Pair(reference, LinenNet(port), np.ones((8, 4), np.float32), batch_sizes=(8,))
    result = examine(pair, names=("parameters", "outputs"))
    assert [divergence.where for divergence in result.divergences] == ["output of inner"]
    assert "mask" in result.comparisons[0].stages


def test_a_less_exact_formula_is_no_difference() -> None:
    inputs = 1e3 + np.random.default_rng(0).normal(size=(8, 16)).astype(np.float32)
    fast = linen.LayerNorm(epsilon=1e-5, use_fast_variance=True)  # the mean square minus the square of the mean
    pair = Pair(lambda: nn.LayerNorm(16), fast, inputs, batch_sizes=(8,))
    assert not examine(pair, names=STAGE_CHECKS).divergences


def test_a_softplus_without_pytorchs_threshold_is_no_difference() -> None:
    reference = nn.Sequential(nn.Linear(4, 5), nn.Softplus())
    net = LinenNet(lambda x: linen.softplus(linen.Dense(5)(x)))
    pair = Pair(reference, net, 10 * values(8, 4), batch_sizes=(64,))
    result = examine(pair, names=("outputs", "gradients", "trajectory"))
    assert len(result.passed) == 3
    assert any("its input above 20" in note for note in result.notes)


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
FIELDS: dict[str, Any] = {"torch_module": LINEAR, "jax_model": DENSE, "inputs": ROWS}
OPTIMIZERS: dict[str, Any] = {"torch_optimizer": lambda module: torch.optim.SGD(module.parameters(), 0.1)}
OF_ANOTHER = torch.optim.SGD(LINEAR.parameters(), 0.1)


def first_of(outputs: Any, targets: Any = None) -> Any:
    """Return a number of the outputs."""
    return outputs[0, 0]


def batches_of(*batches: Any) -> dict[str, Any]:
    """Return the fields of a pair whose pipelines give these batches."""
    return dict.fromkeys(("torch_batches", "jax_batches"), lambda seed, epoch: iter(batches))


SLIPS: list[tuple[dict[str, Any], str]] = [
    ({"torch_module": lambda size: LINEAR}, "torch_module= fails: TypeError"),
    ({"torch_module": nn.LazyLinear(2)}, "weights without values"),
    ({"torch_module": nn.ReLU()}, "the PyTorch module has no weights"),
    ({"jax_model": lambda x: x}, "the JAX side has no variables: give the module itself"),
    ({"jax_model": LINEAR}, "the JAX model is PyTorch's Linear: give the port"),
    ({"jax_model": Mock(spec=["stateless_call"])}, r"the JAX model is Keras's Mock: give \(variables, function\)"),
    ({"jax_model": linen.Dense(2, dtype=jnp.bfloat16)}, "JAX returns bfloat16"),
    ({"jax_model": Mock(spec=["module"], module=DENSE)}, "which holds a Linen module: give model.module, or"),
    ({"inputs": ROWS.tolist()}, "inputs= is a list without rows: give an array"),
    ({"inputs": ROWS.T}, r"on inputs like the example \(batch first: float32 \[5, 2\]\), fails: RuntimeError"),
    ({"inputs": ROWS * np.array([1, 1, np.nan], np.float32)}, "inputs= holds NaN or infinities"),
    ({"inputs": lambda rng, size: np.ones((size, 3), np.float32)}, "the same number everywhere, which shows nothing"),
    (
        {"torch_module": TorchNet(lambda net, x: (-1 - net.fc(x) ** 2).log(), fc=LINEAR)},
        "NaN for inputs like the example",
    ),
    ({"jax_inputs": lambda inputs: ROWS}, "jax_inputs= gives a ndarray"),
    ({"jax_kwargs": {"train": 1}}, "the JAX model fails: TypeError: Dense.__call__"),
    (
        {"jax_model": LinenNet(lambda x: linen.Dense(2)(x) + jnp.ones((2, 4, 2))), "inputs": values(8, 2, 4, 3)},
        'with channels last: declare jax_inputs="same"',
    ),
    ({"jax_init": {}}, 'jax_init= is a dict: give "model"'),
    ({"weights": ["weight"]}, "weights= is a list: give a mapping of names"),
    ({"stages": ["weight"]}, "stages= is a list: give a mapping"),
    ({"targets": [0, 1]}, "targets= is a list: give an array"),
    ({"batch_sizes": (0,)}, r"batch_sizes=\(0,\) is no tuple of sizes"),
    ({"micro_batches": 0}, "micro_batches=0: give a whole number"),
    ({"precision_factor": "4"}, "precision_factor='4' is no number"),
    ({"torch_loss": nn.MSELoss, "jax_loss": first_of}, "torch_loss= is the class MSELoss: give"),
    ({"torch_loss": lambda outputs: outputs, "jax_loss": first_of}, "torch_loss= fails: TypeError"),
    ({"torch_loss": first_of, "jax_loss": lambda *of: of[0]}, r"jax_loss= gives values of the shape \[8, 2\]"),
    ({"torch_loss": first_of, "jax_loss": lambda *of: of}, "jax_loss= gives a tuple"),
    ({"torch_loss": lambda *of: torch.ones(()), "jax_loss": first_of}, "does not depend on the outputs"),
    ({"torch_loss": lambda *of: first_of(*of) * torch.nan, "jax_loss": first_of}, "torch_loss= gives NaN"),
    ({"training": "yes"}, "training='yes': give True, False or None"),
    ({"jax_optimizer": optax.sgd(0.1)}, "one of torch_optimizer= and jax_optimizer= only: give both"),
    ({"jax_optimizer": 0.1}, "jax_optimizer= is a float: give an optax"),
    (OPTIMIZERS | {"jax_optimizer": optax.sgd}, r"jax_optimizer= fails: TypeError: sgd\(\) missing"),
    (OPTIMIZERS | {"jax_optimizer": optax.adamw(0.1, mask={"kernel": True})}, "jax_optimizer= fails: ValueError"),
    (
        {"torch_optimizer": lambda module: OF_ANOTHER, "jax_optimizer": optax.sgd(0.1)},
        "torch_optimizer= makes one of other parameters",
    ),
    ({"torch_step": lambda module: None}, "torch_step= fails: TypeError"),
    ({"jax_step": lambda *of: (of[2], of[3])}, "jax_step= gives something else than"),
    ({"torch_schedule": lambda step: [], "jax_schedule": lambda step: 0.1}, "torch_schedule= .* TypeError"),
    ({"torch_batches": [ROWS]}, "torch_batches= is a list: give a function of"),
    (batches_of(), "gives no batch in epoch 0"),
    (batches_of((ROWS, None)), r"a pipeline gives a tuple: give .*Batch\("),
]


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
            "one of torch_optimizer= and jax_optimizer= only: give both",
        ),
        (Pair(LINEAR, DENSE, ROWS, torch_optimizer=1, jax_optimizer=1), "give a function that makes one for a module"),  # type: ignore[arg-type]
        (
            Pair(LINEAR, DENSE, ROWS, torch_optimizer=lambda module: (1, 2), jax_optimizer=optax.sgd(0.1)),  # type: ignore[arg-type, return-value]
            "torch_optimizer= makes a tuple, not one optimizer: give one with a group",
        ),
        (Pair(LINEAR, DENSE, ROWS, jax_inputs="nhwc"), "jax_inputs='nhwc' is unknown"),
        (Pair(LINEAR, DENSE, ROWS, torch_schedule=0.1), "torch_schedule= is a float: give a function from the step"),  # type: ignore[arg-type]
        (Pair(LINEAR, DENSE, ROWS, batch_sizes=8), "batch_sizes=8 is no tuple of sizes"),  # type: ignore[arg-type]
        *((Pair(**FIELDS | fields), words) for fields, words in SLIPS),
    ],
)
def test_a_slip_in_a_declaration_is_told_in_words(pair: Pair, words: str) -> None:
    with pytest.raises(Refused, match=words):
        examine(pair, names=("parameters", "data", "outputs", "loss", "schedule", "optimizer", "trajectory"))


@pytest.mark.parametrize("shuffled", [True, False])
def test_batches_without_targets_tell_by_their_inputs_whether_the_order_is_another(shuffled: bool) -> None:
    def batches(seed: int, epoch: int) -> Any:
        yield Batch(np.full((4, 3), epoch * shuffled, np.float32))

    pair = Pair(LINEAR, DENSE, ROWS, torch_batches=batches, jax_batches=batches)
    assert [found.check for found in examine(pair, names=("data",)).divergences] == ["data"] * (not shuffled)


@pytest.mark.parametrize(("order", "found"), [([2, 0, 1, 3], set()), ([2, 0, 3, 1], {"outputs"})])
def test_whole_numbers_in_a_model_are_no_weights_and_a_wrong_one_shows_in_outputs(order: Any, found: set[str]) -> None:
    def function(tree: Any, x: jax.Array) -> jax.Array:
        return (x @ tree["weight"] + tree["bias"])[:, tree["order"]]

    reference = TorchNet(lambda net, x: net.fc(x)[:, [2, 0, 1, 3]], fc=nn.Linear(3, 4))
    tree = {"weight": jnp.zeros((3, 4)), "bias": jnp.zeros(4), "order": jnp.array(order)}
    pair = Pair(reference, (tree, function), values(8, 3), {"fc": ""})
    result = examine(pair, names=("parameters", "outputs", "optimizer"))
    assert {divergence.check for divergence in result.divergences} == found, result.divergences


class MadeByItself(LinenNet):
    """A module whose `init` takes a key alone."""

    def init(self, key: jax.Array) -> Any:  # type: ignore[override]
        """Return its variables."""
        return super().init(key, jnp.zeros((1, 3)))


def test_a_linen_module_may_have_an_init_of_its_own() -> None:
    net = MadeByItself(lambda x: linen.Dense(4)(x))
    assert not examine(Pair(nn.Linear(3, 4), net, values(8, 3)), names=("outputs",)).divergences


def test_an_array_of_an_nnx_model_that_is_no_variable_is_no_weight() -> None:
    """Neither does it take the place of a parameter with as many values."""

    def reference() -> nn.Module:
        token = nn.Parameter(torch.randn(9))
        return TorchNet(lambda net, x: net.fc(x.cumsum(-1)) + net.token[:4], token=token, fc=nn.Linear(3, 4))

    def port(net: Any, x: jax.Array) -> jax.Array:
        return net.fc(x @ net.mask.T) + net.token[0, :4]

    parts = {"mask": jnp.tril(jnp.ones((3, 3))), "token": nnx.Param(jnp.zeros((1, 9)))}
    net = NnxNet(port, fc=nnx.Linear(3, 4, rngs=nnx.Rngs(0)), **parts)
    assert not examine(Pair(reference, net, values(8, 3)), steps=2).divergences


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("is_complex", [False, True])
def test_complex_parameters_are_real_ones_with_a_last_axis_of_2(sign: int, is_complex: bool) -> None:
    """A port that conjugates one, as a formula with another convention does, differs in outputs."""

    def reference() -> nn.Module:
        modes = nn.Parameter(torch.randn(4, dtype=torch.cfloat))
        return TorchNet(lambda net, x: net.mix((torch.exp(-net.modes) * x).imag), modes=modes, mix=nn.Linear(4, 2))

    def port(tree: Any, x: jax.Array) -> jax.Array:
        modes = tree["modes"] if is_complex else tree["re"] + 1j * tree["im"]
        return linear(tree["mix"], (jnp.exp(-modes if sign == 1 else -jnp.conj(modes)) * x).imag)

    modes = {"modes": jnp.ones(4, complex)} if is_complex else {"re": jnp.ones(4), "im": jnp.ones(4)}
    own = {**modes, "mix": {"weight": jnp.ones((2, 4)), "bias": jnp.ones(2)}}
    pair = Pair(reference, (own, port), values(8, 4))
    result = examine(pair, steps=2)
    assert {found.check for found in result.divergences} == (set() if sign == 1 else {"outputs"})
    assert ("JAX's weights are complex" in result.not_checked.get("optimizer", "")) == is_complex


@pytest.mark.parametrize("epsilon", [1e-12, 1e-9])
def test_a_constant_that_float32_does_not_see_is_no_fault(epsilon: float) -> None:
    """Flax's WeightNorm adds 1e-12 to a square, which PyTorch does not."""

    def reference() -> nn.Module:
        return nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))

    port = LinenNet(lambda x: linen.WeightNorm(linen.Dense(2), epsilon=epsilon)(x))
    result = examine(Pair(reference, port, values(8, 3)))
    assert {found.check for found in result.divergences} == (set() if epsilon < 1e-10 else {"outputs"})
    assert ("constants of 1e-10" in " ".join(result.notes)) == (epsilon < 1e-10)


def test_inputs_of_booleans_and_losses_with_constants_of_float32_are_taken() -> None:
    """Such a loss has a buffer, the weights of the classes, and one that does not promote its float targets."""

    def port(tree: Any, x: jax.Array, keep: jax.Array) -> jax.Array:
        return linear(tree["fc"], x * keep)

    inputs = np.ones((4, 3), np.float32), np.eye(4, 3, dtype=bool)
    weighted, rates = nn.CrossEntropyLoss(torch.tensor([0.25, 1.0])), jnp.array([0.25, 1.0])

    def jax_loss(outputs: jax.Array, labels: jax.Array) -> jax.Array:
        losses = -jnp.take_along_axis(jax.nn.log_softmax(outputs), labels[:, None], -1)[:, 0]
        return (losses * rates[labels]).sum() / rates[labels].sum()

    def huber(outputs: jax.Array, targets: jax.Array) -> jax.Array:
        error = lax.abs(lax.mul(outputs - targets, ones[: len(targets)]))  # functions of jax.lax do not promote
        return jnp.where(error < 1, error**2 / 2, error - 0.5).mean()

    labels, numbers = np.array([0, 1, 1, 0]), np.arange(8, dtype=np.float32).reshape(4, 2) / 3
    ones = jnp.ones((8, 2))
    reference = TorchNet(lambda net, x, keep: net.fc(x * keep), fc=nn.Linear(3, 2))
    declared = Pair(reference, port, inputs, nested)
    for pair in (
        replace(declared, targets=labels, torch_loss=weighted, jax_loss=jax_loss),
        replace(declared, targets=numbers, torch_loss=nn.HuberLoss(), jax_loss=huber),
    ):
        assert examine(pair, names=("parameters", "loss")).passed == ["parameters", "loss"]


@pytest.mark.parametrize("detached", [False, True])
def test_a_gradient_that_pytorch_does_not_have_at_all_is_0(detached: bool) -> None:
    """Also, a dense layer may be a convolution of 1 x 1, and outputs of four axes need not be images."""

    def forward(net: Any, x: torch.Tensor) -> torch.Tensor:
        x = net.pixels(x).flatten(2)
        return x[:, :, :, None] * net.frozen(x).detach()[:, :, None]

    def port(x: jax.Array) -> jax.Array:
        x = linen.Dense(3, name="pixels")(x).reshape(len(x), 3, 3).swapaxes(1, 2)
        other = linen.Dense(3, name="frozen")(x)
        return x[:, :, :, None] * (lax.stop_gradient(other) if detached else other)[:, :, None]

    reference = TorchNet(forward, pixels=nn.Conv2d(3, 3, 1), frozen=nn.Linear(3, 3))
    pair = Pair(reference, LinenNet(port), np.ones((2, 3, 1, 3), np.float32), batch_sizes=(2,))
    expected = ["gradient by the output of pixels", "gradient by frozen.weight", "gradient by frozen.bias"]
    assert places(pair, "parameters", "outputs", "gradients") == ([] if detached else expected)


@pytest.mark.parametrize(
    ("axes", "rule"),
    [
        ((0, 1, 2, 3), "linear('Dense_0', flatten=(3, 2, 2))"),
        ((0, 3, 1, 2), "'fc': 'Dense_0'"),
        ((0, 2, 1, 3), ""),
    ],
)
def test_how_a_faulty_port_flattens_is_read_from_its_program_or_asked(axes: tuple[int, ...], rule: str) -> None:
    """Its outputs fit neither way: it has an activation that the reference does not have."""

    def port(x: jax.Array) -> jax.Array:
        x = jnp.abs(linen.Conv(3, (3, 3), padding=1)(x))
        return linen.Dense(2)(x.transpose(axes).reshape(len(x), -1))

    reference = network(conv=nn.Conv2d(1, 3, 3, padding=1), relu=nn.ReLU(), flatten=nn.Flatten(), fc=nn.Linear(12, 2))
    proposal = Case(Pair(reference, LinenNet(port), np.ones((2, 1, 2, 2), np.float32), batch_sizes=(2,))).proposal
    assert bool(proposal.ambiguous) == (not rule)
    assert rule in proposal.python


def test_branches_that_are_put_together_are_flattened_with_all_their_channels() -> None:
    def forward(net: Any, x: torch.Tensor) -> torch.Tensor:
        return net.fc(torch.cat([net.left(x), net.right(x)], 1).flatten(1))

    def port(x: jax.Array) -> jax.Array:
        branches = [linen.Conv(2, (3, 3), padding=1, name=name)(x) for name in ("left", "right")]
        return linen.Dense(3, name="fc")(jnp.concatenate(branches, -1).reshape(len(x), -1))

    branches = {name: nn.Conv2d(1, 2, 3, padding=1) for name in ("left", "right")}
    pair = Pair(TorchNet(forward, **branches, fc=nn.Linear(36, 3)), LinenNet(port), values(5, 1, 3, 3))
    assert not places(pair, "parameters", "outputs")


def test_a_pool_that_equinox_turns_for_itself_leaves_no_question_of_the_flatten() -> None:
    keys = jax.random.split(jax.random.key(0))
    conv, fc = eqx.nn.Conv2d(1, 3, 3, padding=1, key=keys[0]), eqx.nn.Linear(12, 2, key=keys[1])
    rest = (eqx.nn.Lambda(jnp.abs), eqx.nn.AvgPool2d(2, 2), eqx.nn.Lambda(jnp.ravel), fc)
    layers = {"conv": nn.Conv2d(1, 3, 3, padding=1), "relu": nn.ReLU(), "pool": nn.AvgPool2d(2, 2)}
    reference = network(**layers, flatten=nn.Flatten(), fc=nn.Linear(12, 2))
    assert places(Pair(reference, eqx.nn.Sequential([conv, *rest]), values(2, 1, 4, 4))) == ["output of relu"]


def test_a_module_that_is_used_twice_is_compared_at_each_use() -> None:
    layers = {"first": nn.Linear(4, 4), "relu": nn.ReLU(), "second": nn.Linear(4, 10)}
    reference = TorchNet(lambda net, x: net.second(net.relu(net.relu(net.first(x)) - 0.1)), **layers)

    def compare(shift: float) -> Result:
        def twice(tree: Any, x: jax.Array) -> jax.Array:
            return linear(tree["second"], jax.nn.relu(jax.nn.relu(linear(tree["first"], x)) - shift))

        return examine(Pair(reference, twice, np.ones((8, 4), np.float32), nested), names=("outputs",))

    sound = compare(0.1)
    assert not sound.divergences
    assert {"relu", "relu#2"} <= sound.comparisons[0].stages.keys()
    assert [divergence.where for divergence in compare(0.2).divergences] == ["output of sub"]


MODULES = {
    "unreadable": "def (",
    "stops": "import sys\nsys.exit(0)",
    "folder/other": "from parity_tests.harness import Pair\nmine = Pair(None, None, None)",
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
        ("sound:name", "sound has no name"),
        ("folder/other.py:name", "other has no name; its pairs are mine"),
        ("sound:needy", "TypeError"),
        ("sound:failing", "RuntimeError: no such weights (sound.py, line 3)"),
        ("sound:number", "is int, not a parity_tests.harness.Pair"),
    ],
)
def test_a_pair_that_cannot_be_made_is_refused_with_the_reason(
    pair: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module, text in MODULES.items():
        (tmp_path / f"{module}.py").parent.mkdir(exist_ok=True)
        (tmp_path / f"{module}.py").write_text(text, encoding="utf-8")
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(UserError) as refusal:
        load_pair(ReportConfig(pair=pair), Console())
    assert reason in str(refusal.value)
    assert len(str(refusal.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("file", "place"),
    [
        ("/home/me/port.py", "port.py, line 1"),
        ("/lib/site-packages/transformers/bart/port.py", "port.py, line 1"),
        ("/lib/site-packages/flax/core.py", None),
        (f"{Path(command.__file__).parent}/harness/taps.py", None),
        (contextlib.__file__, None),
    ],
)
def test_an_error_in_a_port_of_any_folder_is_told_in_a_line(file: str, place: str | None) -> None:
    with pytest.raises(ZeroDivisionError) as error:
        exec(compile("1 / 0", file, "exec"))
    assert find_users_frame(error.value) == place


@pytest.mark.parametrize(("shift", "where"), [(0.0, ["gelu"]), (0.1, ["gelu", "the network"])])
def test_a_fault_in_front_of_a_sum_is_named_once_and_a_second_fault_behind_it_too(
    shift: float, where: list[str]
) -> None:
    def forward(net: Any, x: torch.Tensor) -> torch.Tensor:
        x = functional.gelu(net.first(x))
        return net.head(x + net.second(x))

    def port(x: jax.Array) -> jax.Array:
        x = linen.gelu(linen.Dense(6, name="first")(x))  # the approximation
        return linen.Dense(3, name="head")(x + linen.Dense(6, name="second")(x)) + shift

    reference = TorchNet(forward, first=nn.Linear(6, 6), second=nn.Linear(6, 6), head=nn.Linear(6, 3))
    result = examine(Pair(reference, LinenNet(port), np.ones((4, 6), np.float32), batch_sizes=(4,)), names=("outputs",))
    assert [found.where for found in result.divergences] == [f"output of {place}" for place in where]
    rows = {row.stage: row.verdict for row in stage_rows(result.comparisons[0])}
    assert (rows["gelu"], rows["second"], rows["add"]) == (BORN, INHERITED, SAME_LOCALLY)


def routed(net: Any, x: torch.Tensor) -> torch.Tensor:
    """Return the mean of the two experts that a gate without a bias chooses."""
    chosen = functional.one_hot(net.gate(x).topk(2).indices, 4).to(x.dtype).mean(1)
    return torch.stack([expert(x) for expert in net.experts], -1) @ chosen[..., None]


def test_which_of_equal_values_a_top_k_chooses_is_no_fault() -> None:
    def port(x: jax.Array) -> jax.Array:
        chosen = jax.nn.one_hot(lax.top_k(linen.Dense(4, use_bias=False, name="gate")(x), 2)[1], 4).mean(1)
        return jnp.stack([linen.Dense(3, name=f"experts_{i}")(x) for i in range(4)], -1) @ chosen[..., None]

    layers = {"gate": nn.Linear(6, 4, bias=False), "experts": nn.ModuleList([nn.Linear(6, 3) for _ in range(4)])}
    result = examine(Pair(TorchNet(routed, **layers), LinenNet(port), values(4, 6)), names=("outputs",))
    assert not result.divergences, "\n".join(map(str, result.divergences))
    assert any("PyTorch chooses there" in note for note in result.notes)


@pytest.mark.parametrize("stopped", [False, True])
def test_which_of_two_slopes_a_derivative_in_a_forward_has_is_no_fault(stopped: bool) -> None:
    """As in the gradient penalty of a WGAN: at the row of zeros, a bias of 0 leaves leaky ReLU at its kink."""

    def penalty(net: Any, x: torch.Tensor) -> torch.Tensor:
        x = x.requires_grad_()
        score = net.score(functional.leaky_relu(net.fc(x), 0.2))
        return (torch.autograd.grad(score.sum(), x, create_graph=True)[0].norm(2, dim=1) - 1) ** 2

    def port(variables: Any, x: jax.Array) -> jax.Array:
        def score(x: jax.Array) -> jax.Array:
            hidden = jax.nn.leaky_relu(x @ variables["fc.weight"].T + variables["fc.bias"], 0.2)
            return (hidden @ variables["score.weight"].T + variables["score.bias"]).sum()

        slope = jax.grad(score)(x)
        return (jnp.linalg.norm(lax.stop_gradient(slope) if stopped else slope, axis=1) - 1) ** 2

    reference = TorchNet(penalty, fc=nn.Linear(6, 8), score=nn.Linear(8, 1))
    result = examine(Pair(reference, port, values(8, 6), dict), names=("outputs", "gradients"))
    assert bool(result.divergences) == stopped, "\n".join(map(str, result.divergences))


@pytest.mark.parametrize("stopped", [False, True])
def test_how_a_maximum_over_an_axis_shares_its_gradient_among_equal_values_is_no_fault(stopped: bool) -> None:
    """As in a PointNet: the probe has a channel whose scale is 0."""

    def port(x: jax.Array) -> jax.Array:
        x = linen.Dense(8, name="fc")(x)
        x = linen.LayerNorm(epsilon=1e-5, name="norm")(lax.stop_gradient(x) if stopped else x).max(1)
        return linen.Dense(3, name="head")(x)

    layers = {"fc": nn.Linear(6, 8), "norm": nn.LayerNorm(8), "head": nn.Linear(8, 3)}
    reference = TorchNet(lambda net, x: net.head(net.norm(net.fc(x)).max(1)[0]), **layers)
    result = examine(Pair(reference, LinenNet(port), values(4, 5, 6)), names=("outputs", "gradients"))
    assert bool(result.divergences) == stopped, "\n".join(map(str, result.divergences))


def turned_in_pairs() -> nn.Module:
    """Return a layer behind which pairs turn by a table of complex numbers of length 1, as rotary embeddings do."""
    turns = torch.polar(torch.ones(2), torch.tensor([0.5, 2.0]))
    return TorchNet(
        lambda net, x: torch.view_as_real(torch.view_as_complex(net.fc(x).unflatten(1, (2, 2))) * net.turns).flatten(1),
        fc=nn.Linear(3, 4),
        turns=nn.Buffer(turns, persistent=False),
    )


@pytest.mark.parametrize("reference", [turned_in_pairs, turned_in_pairs()], ids=["function", "module"])
def test_complex_buffers_keep_their_imaginary_part(reference: Any) -> None:
    def port(tree: Any, x: jax.Array) -> jax.Array:
        parts = linear(tree["fc"], x).reshape(len(x), 2, 2)
        turned = (parts[..., 0] + 1j * parts[..., 1]) * jnp.exp(1j * jnp.array([0.5, 2.0]))
        return jnp.stack([turned.real, turned.imag], -1).reshape(len(x), 4)

    tree = {"fc": {"weight": jnp.ones((4, 3)), "bias": jnp.ones(4)}}
    result = examine(Pair(reference, (tree, port), values(4, 3)), names=("parameters", "outputs", "trajectory"))
    assert result.passed == ["parameters", "outputs", "trajectory"], result.divergences


def test_complex_inputs_that_vary_in_one_part_only_are_compared() -> None:
    reference = TorchNet(lambda net, z: net.fc(z.imag), fc=nn.Linear(4, 3))

    def port(variables: Any, z: jax.Array) -> jax.Array:
        return z.imag @ variables["fc.weight"].T + variables["fc.bias"]

    inputs = (1 + 1j * values(4, 4)).astype(np.complex64)
    assert examine(Pair(reference, port, inputs, dict), names=("outputs",)).passed == ["outputs"]


def test_the_layout_of_outputs_is_found_for_each_size_of_batch() -> None:
    """Outputs with the time first, of as many steps as the larger batch has examples."""
    reference = TorchNet(lambda net, x: net.fc(x).transpose(0, 1), fc=nn.Linear(3, 5))
    port = LinenNet(lambda x: linen.Dense(5, name="fc")(x).swapaxes(0, 1))
    losses: dict[str, Any] = dict.fromkeys(("torch_loss", "jax_loss"), lambda outputs, _: (outputs[0] ** 2).sum())
    assert examine(Pair(reference, port, values(4, 8, 3), **losses), names=("loss",)).passed == ["loss"]


@pytest.mark.parametrize("tiny", [0.0, 1e-12])
def test_the_tiny_constant_in_pytorchs_loss_of_cosines_is_no_fault(tiny: float) -> None:
    def jax_loss(outputs: tuple[jax.Array, jax.Array], same: jax.Array) -> jax.Array:
        one, other = outputs
        squares = [(rows * rows).sum(-1) + tiny for rows in outputs]
        cosines = (one * other).sum(-1) / jnp.sqrt(squares[0] * squares[1])
        return jnp.where(same == 1, 1 - cosines, jnp.maximum(0, cosines - 0.1)).mean()

    def torch_loss(outputs: tuple[torch.Tensor, torch.Tensor], same: torch.Tensor) -> torch.Tensor:
        return nn.functional.cosine_embedding_loss(*outputs, same, margin=0.1)

    reference = TorchNet(lambda net, x, y: (net.fc(x), net.fc(y)), fc=nn.Linear(3, 4))
    port = LinenNet(lambda x, y: tuple(map(linen.Dense(4, name="fc"), (x, y))))
    inputs, targets = (values(4, 3), 1e-2 * values(4, 3)), np.array([1, -1, 1, -1])
    pair = Pair(reference, port, inputs, targets=targets, torch_loss=torch_loss, jax_loss=jax_loss)
    assert examine(pair, names=("loss",)).passed == ["loss"]


@pytest.mark.parametrize("pre", [True, False])
def test_a_norm_in_another_place_is_told_once_and_not_again_where_it_is_used(pre: bool) -> None:
    """PyTorch's TransformerEncoderLayer has its norms behind the residual sums by default."""

    def forward(net: Any, x: torch.Tensor) -> torch.Tensor:
        for layer, norm in ((net.one, net.norm1), (net.two, net.norm2)):
            x = x + layer(norm(x)).tanh() if pre else norm(x + layer(x).tanh())
        return net.head(x)

    def port(x: jax.Array) -> jax.Array:
        for name, number in (("one", 1), ("two", 2)):
            layer, norm = linen.Dense(6, name=name), linen.LayerNorm(epsilon=1e-5, name=f"norm{number}")
            x = norm(x + jnp.tanh(layer(x))) if pre else x + jnp.tanh(layer(norm(x)))
        return linen.Dense(3, name="head")(x)

    layers = {"one": nn.Linear(6, 6), "two": nn.Linear(6, 6), "norm1": nn.LayerNorm(6), "norm2": nn.LayerNorm(6)}
    reference = TorchNet(forward, **layers, head=nn.Linear(6, 3))
    found = examine(Pair(reference, LinenNet(port), values(4, 6)), names=("outputs", "gradients")).divergences
    assert [each.where for each in found] == ["output of norm1", "output of norm2"]
    assert ("JAX computes it behind one" if pre else "JAX computes one from it") in found[0].problem


def test_a_layer_of_16_bits_is_told_once_and_not_where_its_value_is_used() -> None:
    def port(x: jax.Array) -> jax.Array:
        y = jnp.tanh(linen.Dense(6, name="one", dtype=jnp.bfloat16)(x))
        return linen.Dense(3, name="head")(linen.LayerNorm(epsilon=1e-5, name="norm")(x + y))

    reference = TorchNet(
        lambda net, x: net.head(net.norm(x + net.one(x).tanh())),
        **{"one": nn.Linear(6, 6), "norm": nn.LayerNorm(6), "head": nn.Linear(6, 3)},
    )
    (found,) = examine(Pair(reference, LinenNet(port), values(4, 6)), names=("outputs", "gradients")).divergences
    assert found.where == "output of one"
    assert found.problem.startswith("JAX's dtype is bfloat16, PyTorch's float64; what follows from it is rounded too")


@pytest.mark.parametrize("by", ["modules", "functions"])
def test_two_operations_in_the_other_order_are_told_once(by: str) -> None:
    def port(x: jax.Array) -> jax.Array:
        x = linen.LayerNorm(epsilon=1e-5, name="norm")(jnp.tanh(linen.Dense(6, name="fc")(x)))
        return linen.Dense(3, name="head")(x)

    def function(state: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        x = jnp.tanh(state["scale"] * (x @ state["fc.weight"].T + state["fc.bias"]))
        return x @ state["head.weight"].T + state["head.bias"]

    layers = {"fc": nn.Linear(4, 6), "norm": nn.LayerNorm(6), "act": nn.Tanh(), "head": nn.Linear(6, 3)}
    pair, expected = Pair(network(**layers), LinenNet(port), values(4, 4)), ("norm", "act")
    if by == "functions":
        scaled = TorchNet(
            lambda net, x: net.head(torch.tanh(net.fc(x)) * net.scale),
            fc=layers["fc"],
            head=layers["head"],
            scale=nn.Parameter(torch.rand(6)),
        )
        pair, expected = Pair(scaled, function, values(4, 4), lambda state: state), ("tanh", "mul")
    (found,) = examine(pair, names=("outputs", "gradients")).divergences
    assert found.where == f"output of {expected[0]}"
    assert f"JAX computes {expected[1]} before it" in found.problem


@pytest.mark.parametrize("of", ["parts", "skip"])
def test_two_operations_that_take_each_others_values_are_told_once(of: str) -> None:
    def forward(net: Any, x: torch.Tensor) -> torch.Tensor:
        x = net.emb(x)
        scale, shift = net.fc(net.norm(x)).chunk(2, -1)
        return net.head(x + scale if of == "skip" else x * torch.tanh(scale) + shift)

    def port(x: jax.Array) -> jax.Array:
        x = linen.Dense(6, name="emb")(x)
        normed = linen.LayerNorm(epsilon=1e-5, name="norm")(x)
        shift, scale = jnp.split(linen.Dense(12, name="fc")(x if of == "skip" else normed), 2, -1)
        return linen.Dense(3, name="head")(normed + shift if of == "skip" else x * jnp.tanh(scale) + shift)

    layers = {"emb": nn.Linear(4, 6), "norm": nn.LayerNorm(6), "fc": nn.Sequential(nn.Linear(6, 12))}
    layers["head"] = nn.Linear(6, 3)
    (found,) = examine(Pair(TorchNet(forward, **layers), LinenNet(port), values(4, 4)), names=("outputs",)).divergences
    place, words = ("fc.0", "emb in the place of norm")
    if of == "parts":
        place, words = ("tanh", "what add takes in the place of what tanh takes")
    assert found.where == f"output of {place}"
    assert f"JAX takes {words}, and the other way round in add" in found.problem


def test_a_term_that_is_left_out_is_told_at_the_sum_although_jax_has_zeros_somewhere() -> None:
    def forward(net: Any, x: torch.Tensor) -> torch.Tensor:
        x = net.first(x)
        x = x + torch.tanh(x)
        return net.head(x + net.out(torch.sigmoid(x)))

    def port(x: jax.Array) -> jax.Array:
        x = linen.Dense(6, name="first")(x)
        x = x + jnp.tanh(x)
        y = linen.Dense(6, name="out")(jax.nn.sigmoid(x))
        return linen.Dense(3, name="head")(jnp.maximum(y, jnp.zeros_like(x) - 1e9))

    reference = TorchNet(forward, first=nn.Linear(4, 6), out=nn.Linear(6, 6), head=nn.Linear(6, 3))
    assert places(Pair(reference, LinenNet(port), values(8, 4), batch_sizes=(8,))) == ["output of add#2"]


def test_a_sum_that_is_left_out_at_the_end_of_a_block_is_told_once_although_two_operations_take_its_value() -> None:
    def forward(net: Any, x: torch.Tensor) -> torch.Tensor:
        x = x + torch.tanh(net.mix(net.norm(x)))
        return x + net.fc(torch.sigmoid(x))

    def block(number: int, x: jax.Array) -> jax.Array:
        x = x + jnp.tanh(linen.Dense(4, name="mix")(linen.LayerNorm(epsilon=1e-5, name="norm")(x)))
        y = linen.Dense(4, name="fc")(jax.nn.sigmoid(x))
        return x + y if number else y

    def port(x: jax.Array) -> jax.Array:
        for number in range(2):
            x = LinenNet(partial(block, number), name=f"block_{number}")(x)
        return linen.Dense(3, name="head")(x)

    layers = ({"mix": nn.Linear(4, 4), "norm": nn.LayerNorm(4), "fc": nn.Linear(4, 4)} for _ in range(2))
    reference = nn.Sequential(*(TorchNet(forward, **block) for block in layers), nn.Linear(4, 3))
    assert places(Pair(reference, LinenNet(port), values(4, 4), batch_sizes=(4,))) == ["output of 0.add#2"]


@pytest.mark.parametrize("copies", [1, 2])
def test_a_wrong_table_is_told_once_where_it_is_made_and_not_in_each_layer_that_takes_it(copies: int) -> None:
    """JAX has a mask once, and PyTorch for each example."""

    def forward(net: Any, x: torch.Tensor) -> torch.Tensor:
        mask = torch.full((5, 5), -torch.inf).triu(1)
        mask = mask if copies == 1 else mask.repeat(len(x), 1, 1)
        for layer in net.layers:
            x = x + (layer(x) @ x.mT + mask).softmax(-1) @ x
        return net.head(x)

    def port(x: jax.Array) -> jax.Array:
        mask = jnp.where(jnp.tri(5, k=1), 0, -jnp.inf)  # shows the next value
        for number in range(2):
            x = x + jax.nn.softmax(linen.Dense(4, name=f"layers_{number}")(x) @ x.mT + mask) @ x
        return linen.Dense(2, name="head")(x)

    layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
    reference = TorchNet(forward, layers=layers, head=nn.Linear(4, 2))
    assert places(Pair(reference, LinenNet(port), values(4, 5, 4), batch_sizes=(4,))) == ["output of triu"]


def test_a_formula_written_otherwise_is_not_told_beside_a_fault() -> None:
    """JAX turns pairs of numbers in one step, and leaves out a bias behind them."""

    def forward(net: Any, x: torch.Tensor) -> torch.Tensor:
        x = net.fc(x)
        one, other = x.chunk(2, -1)
        x = x * 0.6 + torch.cat([-other, one], -1) * 0.9
        return net.out((x @ x.mT + net.bias).softmax(-1) @ x)

    def port(state: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        one, other = jnp.split(x @ state["fc.weight"].T + state["fc.bias"], 2, -1)
        x = jnp.concatenate([one * 0.6 - other * 0.9, other * 0.6 + one * 0.9], -1)
        return jax.nn.softmax(jnp.matmul(x, x.mT)) @ x @ state["out.weight"].T + state["out.bias"]

    bias = nn.Parameter(torch.randn(5, 5))
    reference = TorchNet(forward, fc=nn.Linear(4, 6), out=nn.Linear(6, 3), bias=bias)
    assert places(Pair(reference, port, values(2, 5, 4), lambda state: state)) == ["output of add#2"]


@pytest.mark.parametrize("faulty", ["pool", "conv"])
def test_another_padding_in_a_function_is_told_where_it_lies(faulty: str) -> None:
    def forward(net: Any, x: torch.Tensor) -> torch.Tensor:
        x = functional.max_pool2d(torch.relu(net.conv1(x)), 3, 2, 1)
        return torch.relu(net.conv2(x)).mean((2, 3))

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

    reference = TorchNet(forward, conv1=nn.Conv2d(3, 4, 3, padding=1), conv2=nn.Conv2d(4, 4, 3, stride=2, padding=1))
    pair = Pair(reference, apply, values(4, 3, 16, 16), nested, batch_sizes=(4,))
    (found,) = examine(pair, names=("outputs",)).divergences
    assert found.where == ("output of max_pool2d" if faulty == "pool" else "output of conv2")
    assert "; or in" not in found.problem


def gated() -> nn.Module:
    """Return a product of two branches: its activation is called before the other branch, and used behind it."""
    return TorchNet(
        lambda net, x: net.down(net.act(net.gate(x)) * net.up(x)),
        gate=nn.Linear(4, 6),
        act=nn.SiLU(),
        up=nn.Linear(4, 6),
        down=nn.Linear(6, 4),
    )


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
    def port(x: jax.Array) -> jax.Array:
        gate, up = linen.Dense(6, name="gate")(x), linen.Dense(6, name="up")(x)
        return linen.Dense(4, name="down")(act(gate) * up)

    result = examine(Pair(gated, LinenNet(port), values(5, 4), batch_sizes=(5,)), names=("outputs",))
    assert [divergence.where for divergence in result.divergences] == [where] * bool(where)
    assert "or in" not in str(result.divergences)
    assert ("act" in result.comparisons[0].stages) != unnamed


def test_a_layer_whose_value_has_another_size_in_jax_is_named() -> None:
    port = LinenNet(lambda x: linen.Conv(2, (3, 3), padding="VALID", name="0")(x).mean((1, 2)))
    reference = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    pair = Pair(reference, port, np.ones((4, 1, 6, 6), np.float32), batch_sizes=(4,))
    (found,) = examine(pair, names=("outputs",)).divergences
    assert found.where == "output of 0"
    assert "JAX's shape is [4, 2, 4, 4], PyTorch's [4, 2, 6, 6]" in found.problem
    port = LinenNet(lambda x: linen.max_pool(linen.Conv(2, (3, 3), padding=1, name="0")(x), (2, 2), (2, 2)))
    reference = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.MaxPool2d(2, ceil_mode=True))
    pair = Pair(reference, port, np.ones((4, 1, 5, 5), np.float32), batch_sizes=(4,))
    (found,) = examine(pair, names=("outputs",)).divergences
    assert "JAX's shape is" in found.problem
    assert not found.cause


def test_the_sizes_of_what_is_not_carried_are_told() -> None:
    pair = Pair(nn.Linear(4, 2), linen.Dense(3), np.ones((4, 4), np.float32), batch_sizes=(4,))
    found = {divergence.where: divergence.problem for divergence in examine(pair, names=("parameters",)).divergences}
    assert "PyTorch has it, 2x4, and nothing" in found["weight"]
    assert "JAX has it, 4x3, and no tensor" in found["kernel"]


@pytest.mark.parametrize(("in_torch", "in_jax", "where"), [(3, 2, "2"), (2, 3, "block_2")])
def test_a_block_without_a_partner_is_told_once(in_torch: int, in_jax: int, where: str) -> None:
    def block(x: jax.Array) -> jax.Array:
        return linen.LayerNorm(name="norm")(linen.Dense(4, name="fc")(x))

    def port(x: jax.Array) -> jax.Array:
        for number in range(in_jax):
            x = LinenNet(block, name=f"block_{number}")(x)
        return x

    reference = nn.Sequential(*(network(fc=nn.Linear(4, 4), norm=nn.LayerNorm(4)) for _ in range(in_torch)))
    assert places(Pair(reference, LinenNet(port), values(4, 4)), "parameters") == [where]


def test_layers_that_jax_stacks_and_scans_are_compared_one_by_one() -> None:
    def block(x: jax.Array, _: None) -> tuple[jax.Array, None]:
        return x + linen.Dense(4, name="second")(jax.nn.silu(linen.Dense(6, name="first")(x))), None

    def port(x: jax.Array) -> jax.Array:
        scan = linen.scan(LinenNet, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
        return scan(block, name="blocks")(x, None)[0]

    def forward(net: Any, x: torch.Tensor) -> torch.Tensor:
        for layers in net.blocks:
            x = x + layers(x)
        return x

    blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4)) for _ in range(2))
    pair = Pair(TorchNet(forward, blocks=blocks), LinenNet(port), np.ones((4, 4), np.float32), batch_sizes=(4,))
    assert places(pair) == [f"output of blocks.{number}.1" for number in range(2)]


def test_layers_that_a_stack_leaves_out_are_named() -> None:
    def port(params: Any, x: jax.Array) -> jax.Array:
        rows, _ = jax.lax.scan(lambda x, layer: (x + jnp.tanh(x @ layer["w"]), None), x, {"w": params["layers"][1:]})
        return rows

    def forward(net: Any, x: torch.Tensor) -> torch.Tensor:
        for layer in net.layers:
            x = x + torch.tanh(layer(x))
        return x

    layers = nn.ModuleList(nn.Linear(4, 4, bias=False) for _ in range(3))
    pair = Pair(
        TorchNet(forward, layers=layers),
        port,
        np.ones((4, 4), np.float32),
        lambda state: {"layers": np.stack([state[f"layers.{number}.weight"].T for number in range(3)])},
        batch_sizes=(4,),
    )
    (fault,) = examine(pair, names=("outputs",)).divergences
    assert fault.cause == "JAX's outputs do not depend on layers.0.weight"


def test_a_fault_in_a_loop_is_not_told_of_the_layer_behind_it() -> None:
    def port(params: Any, x: jax.Array) -> jax.Array:
        def step(state: jax.Array, x: jax.Array) -> tuple[jax.Array, None]:
            return 1.01 * jnp.tanh(x @ params["u"] + state @ params["v"] + params["b"]), None

        state, _ = jax.lax.scan(step, jnp.zeros((len(x), 4), x.dtype), jnp.swapaxes(x, 0, 1))
        return state @ params["w"] + params["c"]

    def load(state: dict[str, Any]) -> Any:
        matrices = {"u": "rnn.weight_ih_l0", "v": "rnn.weight_hh_l0", "w": "head.weight"}
        biases = {"b": state["rnn.bias_ih_l0"] + state["rnn.bias_hh_l0"], "c": state["head.bias"]}
        return {name: state[key].T for name, key in matrices.items()} | biases

    layers = {"rnn": nn.RNN(3, 4, batch_first=True), "head": nn.Linear(4, 2)}
    reference = TorchNet(lambda net, x: net.head(net.rnn(x)[0][:, -1]), **layers)
    pair = Pair(reference, port, np.ones((4, 5, 3), np.float32), load, batch_sizes=(4,))
    assert places(pair) == ["output of rnn[0]"]


def test_a_fault_in_front_of_a_cell_is_not_told_of_its_weights() -> None:
    """Flax's cell returns its state twice, as the carry and as the output: the port uses the other one."""

    def forward(net: Any, x: torch.Tensor) -> torch.Tensor:
        state = torch.zeros(len(x), 4, dtype=x.dtype)
        for number in range(2):
            state = net.cell(torch.cat([x[:, number], state], 1), state)
        return net.head(state)

    def port(x: jax.Array) -> jax.Array:
        state, cell = jnp.zeros((len(x), 4), x.dtype), linen.GRUCell(4, name="cell")
        for number in range(2):
            state, _ = cell(state, jnp.concatenate([state, x[:, number]], 1))
        return linen.Dense(2, name="head")(state)

    reference = TorchNet(forward, cell=nn.GRUCell(7, 4), head=nn.Linear(4, 2))
    pair = Pair(reference, LinenNet(port), values(4, 2, 3), batch_sizes=(4,))
    assert places(pair, "outputs", "gradients") == ["output of cat", "output of cat#2"]


def test_a_fault_in_a_cell_is_found_there() -> None:
    def port(x: jax.Array, state: jax.Array) -> jax.Array:
        cell = linen.GRUCell(4, gate_fn=jax.nn.hard_sigmoid, name="cell")
        return linen.Dense(2, name="head")(cell(state, x)[1])

    reference = TorchNet(
        lambda net, x, state: net.head(net.cell(x, state)), cell=nn.GRUCell(3, 4), head=nn.Linear(4, 2)
    )
    inputs = np.ones((4, 3), np.float32), np.ones((4, 4), np.float32)
    assert places(Pair(reference, LinenNet(port), inputs, batch_sizes=(4,))) == ["output of cell"]


def test_a_module_is_not_the_one_that_holds_its_factor_alone() -> None:
    class Factor(linen.Module):
        @linen.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return x * self.param("gamma", linen.initializers.ones, (4,))

    scaled = TorchNet(lambda net, x: x + net.gamma * net.fc(x), fc=nn.Linear(4, 4), gamma=nn.Parameter(torch.rand(4)))
    scaled_port = LinenNet(lambda x: x + Factor(name="scale")(linen.Dense(4, name="fc")(x)))
    port = linen.Sequential([scaled_port, linen.Dense(2)])
    pair = Pair(nn.Sequential(scaled, nn.Linear(4, 2)), port, np.ones((4, 4), np.float32), batch_sizes=(4,))
    result = examine(pair, names=("outputs",))
    assert not result.divergences
    assert result.comparisons[0].stages["0"].jax == "layers_0"


def test_a_block_that_holds_the_slope_of_its_activation_is_not_the_activation() -> None:
    class Block(linen.Module):
        @linen.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            y = linen.Dense(4, name="fc1")(x)
            y = jnp.where(y >= 0, y, self.param("act", linen.initializers.ones, (4,)) * y)
            return x + linen.Dense(4, name="fc2")(y)

    def block() -> nn.Module:
        layers = {"fc1": nn.Linear(4, 4), "act": nn.PReLU(4), "fc2": nn.Linear(4, 4)}
        return TorchNet(lambda net, x: x + net.fc2(net.act(net.fc1(x))), **layers)

    port = LinenNet(lambda x: 2 * linen.Dense(2, name="out")(Block(name="b2")(Block(name="b1")(x))))
    reference = TorchNet(lambda net, x: net.out(net.b2(net.b1(x))), b1=block(), b2=block(), out=nn.Linear(4, 2))
    assert places(Pair(reference, port, np.ones((8, 4), np.float32))) == ["output of the network"]


class Scaled(linen.Module):
    """A module with a weight of its own, whose gradient comes through a norm inside it."""

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Scale and normalise the rows."""
        scales = self.param("scales", linen.initializers.ones, (4,))
        return linen.LayerNorm(epsilon=1e-2, name="norm")(x * scales)


def test_a_fault_in_a_module_is_not_told_of_the_gradients_that_come_through_it() -> None:
    scaled = TorchNet(lambda net, x: net.norm(x * net.scales), scales=nn.Parameter(torch.rand(4)), norm=nn.LayerNorm(4))
    reference = nn.Sequential(nn.Linear(4, 4), scaled, nn.Linear(4, 2))
    port = linen.Sequential([linen.Dense(4), Scaled(), linen.Dense(2)])
    pair = Pair(reference, port, np.ones((4, 4), np.float32))
    assert places(pair, "outputs", "gradients") == ["output of 1.norm"]


def test_a_call_in_vain_gets_no_gradient() -> None:
    def port(x: jax.Array) -> jax.Array:
        norm = linen.LayerNorm(epsilon=1e-5, name="1")
        x = linen.Dense(4, name="0")(x).at[:, 0].add(0.1)  # the fault
        norm(x)
        return linen.Dense(2, name="2")(norm(x))

    reference = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    pair = Pair(reference, LinenNet(port), np.ones((4, 4), np.float32), batch_sizes=(4,))
    assert places(pair, "outputs", "gradients") == ["output of 1"]


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


def reference() -> nn.Module:
    """Return the same in PyTorch."""
    return TorchNet(
        lambda net, images: net.out(net.pool(net.norm(net.conv(images)).relu()).mean((2, 3))),
        conv=nn.Conv2d(2, 4, 3),
        norm=nn.BatchNorm2d(4),
        pool=nn.MaxPool2d(3, 2, 1),
        out=nn.Linear(4, 3),
    )


def haiku_pair(size: int, **fields: Any) -> Pair:
    """Return the pair for images of this size."""
    images = np.random.default_rng(0).normal(size=(3, 2, size, size))
    return Pair(reference, hk.transform_with_state(forward), images, batch_sizes=(3,), **fields)


def test_norm_and_pool_are_stages_of_a_network_in_haiku() -> None:
    found = compare_batches(Case(haiku_pair(9, training=False)))[0]
    assert found.stages["norm"].jax == "norm"
    assert {"conv", "norm", "out"} <= found.stages.keys()
    assert not any(difference.problem for difference in found.inherited.outputs.values())


def test_averages_that_start_with_the_first_batch_are_no_tables_and_their_correction_is_named() -> None:
    pair = haiku_pair(9, jax_kwargs={"is_training": False}, jax_training_kwargs={"is_training": True})
    result = examine(pair, names=("parameters", "tables", "statistics"))
    assert "tables" in result.passed
    assert any("JAX makes them of its first batch" in note for note in result.notes)
    assert {divergence.check for divergence in result.divergences} == {"statistics"}
    assert any("corrects for a start at 0" in divergence.cause for divergence in result.divergences)


def test_padding_of_a_pool_is_found_at_the_pool() -> None:
    found = compare_batches(Case(haiku_pair(10, training=False)))[0]
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


def shift() -> nn.Module:
    """Return a number that is added to everything. Before a norm, its gradient is 0 but for rounding."""
    return TorchNet(lambda net, x: x + net.by, by=nn.Parameter(torch.ones(1)))


def test_neither_a_scale_of_0_nor_rounding_hides_that_either_slope_at_a_kink_is_right() -> None:
    """Test a channel that is 0 everywhere, because the norm before the activation has a scale and a bias of 0."""

    def net(tree: Any, x: jax.Array) -> jax.Array:
        x = x @ tree["0.0.weight"].T + tree["0.1.by"]
        x = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return jax.nn.leaky_relu(x * tree["1.weight"] + tree["1.bias"], 0.2) @ tree["3.weight"].T

    bare = (nn.Linear(5, 8, bias=False), nn.Linear(8, 3, bias=False))
    reference = nn.Sequential(nn.Sequential(bare[0], shift()), nn.LayerNorm(8), nn.LeakyReLU(0.2), bare[1])
    pair = Pair(reference, net, np.arange(-20.0, 20.0, dtype=np.float32).reshape(8, 5), dict, batch_sizes=(32,))
    assert not examine(pair, names=("parameters", "outputs", "gradients")).divergences


def test_the_slope_that_rounding_chooses_in_a_row_of_zeros_is_no_fault() -> None:
    """The norm of a channel that is the same everywhere is 0 but for rounding, and every second bias behind it is 0."""

    def conv(tree: Any, name: str, x: jax.Array) -> jax.Array:
        return jnp.einsum("nihw,oi->nohw", x, tree[f"{name}.weight"][..., 0, 0]) + tree[f"{name}.bias"][:, None, None]

    def net(tree: Any, x: jax.Array) -> jax.Array:
        x = conv(tree, "0", x)
        mean, square = x.mean((2, 3), keepdims=True), jnp.square(x).mean((2, 3), keepdims=True)
        return jax.nn.selu(conv(tree, "2", (x - mean) * lax.rsqrt(square - mean**2 + 1e-5)))

    layers = nn.Conv2d(3, 4, 1), nn.InstanceNorm2d(4), nn.Conv2d(4, 4, 1), nn.SELU()
    pair = Pair(nn.Sequential(*layers), net, values(8, 3, 5, 7), dict, jax_inputs="same", batch_sizes=(8,))
    assert not places(pair, "outputs", "gradients", "trajectory")


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


def test_what_one_side_does_not_need_is_told_in_one_line_for_all_layers_and_keeps_its_own_values() -> None:
    def net(tree: Any, x: jax.Array) -> jax.Array:
        return jnp.tanh(x[:, :3] @ tree["0.fc.weight"].T)[:, :3] @ tree["2.fc.weight"].T

    own = {f"{i}.fc.weight": np.ones((4, 3)) for i in (0, 2)} | {"spare": np.ones(2)}
    reference = nn.Sequential(Shifted(), nn.Tanh(), Shifted())
    pair = Pair(reference, (own, net), np.ones((4, 3), np.float32))
    found = examine(pair, names=("parameters",)).divergences
    assert [each.where for each in found] == ["0.shift", "2.shift", "spare"]
    assert ["weights={'{i}.shift': unused()}" in str(each) for each in found] == [True, True, False]
    declared = replace(pair, weights={"{i}.shift": unused(), "spare": unused()})
    result = examine(declared, names=("parameters", "outputs", "optimizer", "trajectory"))
    assert not result.divergences, "\n".join(map(str, result.divergences))


def features_of() -> nn.Module:
    """Return a layer that shifts and scales its inputs by tables, and turns them by one drawn at random."""
    return TorchNet(
        lambda net, x: net.slopes(net.fc(torch.tanh((x - net.mean) / net.deviation) @ net.turn)),
        mean=nn.Buffer(torch.tensor(1 + 2**-13)),  # fills more bits of float32 than a small whole number
        deviation=nn.Buffer(torch.tensor([0.229, 0.224, 0.225])),
        turn=nn.Buffer(torch.randn(3, 3)),
        fc=nn.Linear(3, 4),
        slopes=nn.PReLU(4),
    )


def features(one_slope: bool = False) -> Pair:
    """Return its pair with a port that computes the first tables itself, and may have one slope for all features."""

    def net(tree: Any, x: jax.Array) -> jax.Array:
        x = jnp.tanh((x - 1 - 2**-13) / jnp.array([0.229, 0.224, 0.225]))
        x = linear(tree["fc"], x @ lax.stop_gradient(tree["turn"]))
        slopes = tree["slopes"]["weight"]
        return jnp.where(x > 0, x, x * (slopes.mean() if one_slope else slopes))

    own = {
        "turn": jnp.ones((3, 3)),
        "fc": {"weight": jnp.ones((4, 3)), "bias": jnp.zeros(4)},
        "slopes": {"weight": jnp.full(4, 0.25)},
    }
    weights = {"mean": unused(), "deviation": unused()}
    return Pair(features_of, net, np.ones((4, 3), np.float32), weights, jax_init=lambda key: own)


def test_a_random_buffer_is_no_table_and_one_that_a_port_computes_may_be_more_exact() -> None:
    result = examine(features(), names=("parameters", "tables", "outputs", "trajectory"))
    assert not result.divergences, "\n".join(map(str, result.divergences))
    assert "tables: not tried for turn: PyTorch draws them at random" in result.notes


def test_a_parameter_of_one_value_is_drawn_away_from_it() -> None:
    assert places(features(one_slope=True)) == ["output of slopes"]


@pytest.mark.parametrize(
    ("act", "port", "sound"),
    [
        (nn.ReLU6(), jax.nn.relu, jax.nn.relu6),
        (nn.Hardtanh(-20, 2), lambda x: jnp.clip(x, -5, 2), lambda x: jnp.clip(x, -20, 2)),
    ],
)
@pytest.mark.parametrize("norm", [True, False])
def test_values_reach_the_limits_of_an_activation(act: nn.Module, port: Any, sound: Any, norm: bool) -> None:
    reference = network(
        fc1=nn.Linear(3, 8), **({"norm": nn.BatchNorm1d(8)} if norm else {}), act=act, fc2=nn.Linear(8, 4)
    )

    def net(tree: Any, x: jax.Array, act: Any) -> jax.Array:
        x = linear(tree["fc1"], x)
        if norm:
            part = tree["norm"]
            x = (x - part["running_mean"]) * lax.rsqrt(part["running_var"] + 1e-5) * part["weight"] + part["bias"]
        return linear(tree["fc2"], act(x))

    pair = Pair(lambda: reference, None, 0.1 * values(4, 3), nested, training=False)
    assert not places(replace(pair, jax_model=partial(net, act=sound)))
    assert places(replace(pair, jax_model=partial(net, act=port))) == ["output of act"]


class Strided(nn.Module):
    """Two strided layers, and a mean over what is left of the image."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.pool, self.out = nn.Conv2d(1, 6, 3, 2, 1), nn.MaxPool2d(2), nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return scores, float [batch, 3]."""
        return self.out(self.pool(self.conv(x)).mean((2, 3)))


class StridedPort(linen.Module):
    """Its port, with paddings that may be right for some sizes only, or made for one size."""

    conv: Any = 1
    pool: str = "VALID"
    size: int | None = None

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Return scores, float [batch, 3]."""
        x = linen.Conv(6, (3, 3), 2, padding=self.conv, name="conv")(x)
        x = linen.max_pool(x, (2, 2), (2, 2), self.pool)
        x = x.reshape(x.shape[0], self.size**2 if self.size else -1, 6).mean(1)
        return linen.Dense(3, name="out")(x)


@pytest.mark.parametrize(
    ("size", "port", "expected"),
    [
        (17, StridedPort(conv="SAME"), "output of conv: error"),
        (16, StridedPort(pool="SAME"), "output of pool: JAX's shape is [5, 6, 4, 4], PyTorch's [5, 6, 3, 3]"),
        (16, StridedPort(), ""),
        (16, StridedPort(size=4), ""),
    ],
)
def test_a_padding_that_is_right_for_images_of_some_sizes_only_is_found(size: int, port: Any, expected: str) -> None:
    result = examine(Pair(Strided, port, values(4, 1, size, size)), names=("parameters", "outputs"))
    assert [expected in f"{found.where}: {found.problem}" for found in result.divergences] == [True] * bool(expected)
    remarks = [
        note
        for note in result.notes
        if "JAX does not take inputs of another size, with axes of 13 in the place of 16" in note
    ]
    assert len(remarks) == (port.size is not None)


def test_a_limit_that_no_value_reaches_is_remarked() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(2.6))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.scale.clamp(max=4.6).exp()

    pair = Pair(Scaled, lambda tree, x: x * jnp.exp(tree["scale"]), values(4, 3), dict)
    result = examine(pair, names=("outputs",))
    assert "no value reaches the limit of 4.6 in the module: another one in JAX would not show" in result.notes
    assert not result.divergences


def grouped() -> nn.Module:
    """Return two layers with an activation and a norm between them, which are modules."""
    return network(fc1=nn.Linear(3, 8), act=nn.Mish(), norm=nn.GroupNorm(4, 8), fc2=nn.Linear(8, 4))


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

    pair = Pair(grouped, net, values(4, 3), nested, batch_sizes=(5,))
    (found,) = examine(pair, names=("outputs",)).divergences
    assert found.where == f"output of {place}"
    assert "; or in" not in found.problem


def attending() -> nn.Module:
    """Return an attention of 4 heads with 2 heads of keys, in front of it a token and positions, behind it a norm."""

    def forward(net: Any, x: torch.Tensor) -> torch.Tensor:
        x = torch.cat([net.start.expand(len(x), -1, -1), net.fc(x)], 1) + net.table
        query, keys = (layer(x).unflatten(-1, (-1, 2)).transpose(1, 2) for layer in (net.query, net.keys))
        keys = keys.repeat_interleave(2, 1)
        heads = (query @ keys.mT).softmax(-1) @ keys
        return net.head(x + net.norm(net.out(heads.transpose(1, 2).flatten(2))))

    sizes = {"fc": (3, 8), "query": (8, 8), "keys": (8, 4), "out": (8, 8), "head": (8, 2)}
    tables = {"start": nn.Parameter(torch.randn(1, 1, 8)), "table": nn.Parameter(torch.randn(5, 8))}
    return TorchNet(forward, **{name: nn.Linear(*size) for name, size in sizes.items()}, norm=nn.LayerNorm(8), **tables)


@pytest.mark.parametrize("faults", [set(), {"add", "softmax"}, {"repeat_interleave", "norm"}])
def test_faults_between_the_layers_of_a_function_are_told_once_each_in_their_operations(faults: set[str]) -> None:
    def port(state: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        def layer(name: str, x: jax.Array) -> jax.Array:
            return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

        def norm(x: jax.Array) -> jax.Array:
            x = (x - x.mean(-1, keepdims=True)) * lax.rsqrt(x.var(-1, keepdims=True) + 1e-5)
            return x * state["norm.weight"] + state["norm.bias"]

        rows, table = layer("fc", x), state["table"] if "add" not in faults else state["table"].at[0].set(0)
        start = jnp.broadcast_to(state["start"], (len(x), 1, 8))
        x = jnp.concatenate([start + table[:1], rows + table[1:]], 1)
        query, keys = (layer(name, x).reshape(*x.shape[:2], -1, 2) for name in ("query", "keys"))
        keys = jnp.tile(keys, (1, 1, 2, 1)) if "repeat_interleave" in faults else jnp.repeat(keys, 2, 2)
        weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", query, keys), -1)
        weights = weights.mT if "softmax" in faults else weights
        rows = layer("out", jnp.einsum("bhqk,bkhd->bqhd", weights, keys).reshape(x.shape))
        return layer("head", norm(x + rows) if "norm" in faults else x + norm(rows))

    found = places(Pair(attending, port, values(4, 4, 3), lambda state: state, batch_sizes=(5,)))
    order = ("add", "repeat_interleave", "softmax", "norm")
    assert found == [f"output of {place}" for place in order if place in faults]


def paired() -> nn.Module:
    """Return what pairs of rows give: an activation, a matrix and a sum with factors."""

    def forward(net: Any, x: torch.Tensor) -> torch.Tensor:
        x = net.fc(x)
        pairs = functional.silu(torch.cat([x[:, [1, 0, 3]], x[:, [2, 3, 0]]], -1)) @ net.mix
        return net.out((pairs * net.shares).sum(1))

    tables = {"mix": nn.Parameter(torch.randn(12, 5)), "shares": nn.Parameter(torch.randn(3, 5))}
    return TorchNet(forward, fc=nn.Linear(3, 6), out=nn.Linear(5, 2), **tables)


@pytest.mark.parametrize("place", ["cat", "silu", "sum"])
def test_a_fault_is_told_of_no_operation_that_is_right_but_gets_another_value(place: str) -> None:
    def port(state: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        x = x @ state["fc.weight"].T + state["fc.bias"]
        rows, others = (np.array([1, 0, 3]), np.array([2, 3, 0]))[:: -1 if place == "cat" else 1]
        pairs = jnp.concatenate([x[:, rows], x[:, others]], -1)
        mixed = (jax.nn.gelu if place == "silu" else jax.nn.silu)(pairs) @ state["mix"]
        total = jnp.einsum("bpf,pf->bf", mixed, state["shares"])
        return (total / 3 if place == "sum" else total) @ state["out.weight"].T + state["out.bias"]

    assert places(Pair(paired, port, values(4, 4, 3), lambda state: state, batch_sizes=(5,))) == [f"output of {place}"]


def test_a_layer_that_jax_computes_in_vain_is_not_told_beside_the_one_that_leaves_it_out() -> None:
    def port(state: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        x @ state["fc.weight"].T + state["fc.bias"]
        return x @ state["out.weight"].T + state["out.bias"]

    pair = Pair(network(fc=nn.Linear(4, 4), out=nn.Linear(4, 2)), port, values(4, 4), lambda state: state)
    assert places(replace(pair, batch_sizes=(5,))) == ["output of out"]


def scaled_and_normed() -> nn.Module:
    """Return a layer that scales its inputs by a table, and a batch normalisation behind it."""
    return TorchNet(
        lambda net, x: net.fc2(net.norm(net.fc1(x * net.scales)).relu()),
        scales=nn.Buffer(torch.linspace(0.5, 2, 6)),
        fc1=nn.Linear(6, 8),
        norm=nn.BatchNorm1d(8),
        fc2=nn.Linear(8, 3),
    )


def test_a_function_over_a_flat_state_dict_trains_no_buffer() -> None:
    def net(flat: Any, x: jax.Array, train: bool = False) -> Any:
        x = (x * flat["scales"]) @ flat["fc1.weight"].T + flat["fc1.bias"]
        mean, var = (x.mean(0), x.var(0)) if train else (flat["norm.running_mean"], flat["norm.running_var"])
        of_all = {"norm.running_mean": mean, "norm.running_var": var * len(x) / (len(x) - 1)}
        kept = {name: 0.9 * flat[name] + 0.1 * new for name, new in of_all.items()}
        x = (x - mean) / jnp.sqrt(var + 1e-5) * flat["norm.weight"] + flat["norm.bias"]
        x = jax.nn.relu(x) @ flat["fc2.weight"].T + flat["fc2.bias"]
        return (x, flat | kept) if train else x

    result = examine(Pair(scaled_and_normed, net, values(8, 6), dict), names=("outputs", "statistics", "optimizer"))
    assert not result.divergences, "\n".join(map(str, result.divergences))
    assert any("norm.running_mean, norm.running_var, scales not trained" in note for note in result.notes)


class RootMeanSquareNorm(nn.Module):
    """A norm as models write it themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise [batch, 8]."""
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5)


def explained() -> nn.Module:
    """Return a network with the operations that a port likes to take for others."""
    layers = {f"fc{number}": nn.Linear(8, 8) for number in (1, 2, 3)}
    return TorchNet(
        lambda net, x: net.fc3(net.rms(functional.gelu(net.fc2(net.norm(net.fc1(x)).softmax(1))))) * 0.5,
        **layers,
        norm=nn.LayerNorm(8),
        rms=RootMeanSquareNorm(),
    )


@pytest.mark.parametrize(("eps", "words"), [(1e-6, "1e-06"), (8, "8")])
def test_another_eps_the_other_gelu_a_factor_and_another_axis_are_named(eps: float, words: str) -> None:
    """Flax's first argument is the eps: `LayerNorm(8)`."""

    def port(x: jax.Array) -> jax.Array:
        x = linen.LayerNorm(eps, name="norm")(linen.Dense(8, name="fc1")(x))
        x = linen.RMSNorm(name="rms")(linen.gelu(linen.Dense(8, name="fc2")(jax.nn.softmax(x, axis=0))))
        return linen.Dense(8, name="fc3")(x)

    pair = Pair(explained, LinenNet(port), values(4, 8), batch_sizes=(5,))
    found = {found.where: found.problem for found in examine(pair, names=("outputs",)).divergences}
    assert found.keys() == {f"output of {place}" for place in ("norm", "gelu", "rms", "mul", "softmax")}
    for place, cause in (
        ("norm", f"equal with {words} in the place of 1e-05"),
        ("gelu", "equal with the approximation of GELU by tanh"),
        ("rms", "equal with 1e-06 in the place of 1e-05"),
        ("mul", "JAX's is 2 times PyTorch's"),
        ("softmax", "equal with the softmax over axis 0"),
    ):
        assert cause in found[f"output of {place}"], found


@pytest.mark.parametrize(
    ("activation", "words"),
    [(jax.nn.relu, "relu in"), (jax.nn.hard_sigmoid, "hardsigmoid in"), (lambda x: x, "nothing in"), (jnp.sin, "")],
)
def test_another_activation_is_named(activation: Callable[[jax.Array], jax.Array], words: str) -> None:
    reference = nn.Sequential(nn.Linear(3, 4), nn.SiLU(), nn.Linear(4, 2))
    port = LinenNet(lambda x: linen.Dense(2, name="2")(activation(linen.Dense(4, name="0")(x))))
    (found,) = examine(Pair(reference, port, values(4, 3), batch_sizes=(5,)), names=("outputs",)).divergences
    assert found.where == "output of 1"
    assert ("its place" in found.problem) == bool(words)
    assert f"equal with {words}" * bool(words) in found.problem


class LinenMeanSquareNorm(linen.Module):
    """The same norm as `RootMeanSquareNorm`, with one product."""

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalise [batch, 8]."""
        weight = self.param("weight", linen.initializers.ones, (8,))
        return weight * (x / jnp.sqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-5))


def test_a_factor_that_a_port_leaves_out_is_told_once_although_a_norm_behind_it_has_a_product_too() -> None:
    def scaled(net: Any, x: torch.Tensor) -> torch.Tensor:
        x = net.fc1(x) * 4
        return x + net.fc2(net.rms(x))

    def port(x: jax.Array) -> jax.Array:
        x = linen.Dense(8, name="fc1")(x)
        return x + linen.Dense(8, name="fc2")(LinenMeanSquareNorm(name="rms")(x))

    layers = {"fc1": nn.Linear(8, 8), "fc2": nn.Linear(8, 8), "rms": RootMeanSquareNorm()}
    model = TorchNet(lambda net, x: net.out(net.model(x)), model=TorchNet(scaled, **layers), out=nn.Linear(8, 3))
    net = LinenNet(lambda x: linen.Dense(3, name="out")(LinenNet(port, name="model")(x)))
    (found,) = examine(Pair(model, net, values(4, 8), batch_sizes=(5,)), names=("outputs",)).divergences
    assert found.where == "output of model.mul"
    assert "JAX's is 0.25 times PyTorch's" in found.problem


@pytest.mark.parametrize(
    ("move", "words"),
    [
        (lambda y: y, "in the order 5, 4, 3, 2, 1, 0 of axis 1"),
        (lambda y: y.swapaxes(1, 2)[:, :, ::-1], "with axes 1 and 2 exchanged"),
        (lambda y: jnp.pad(y, ((0, 0), (0, 0), (1, 0)))[:, :, :-1][:, ::-1], "one place further along axis 2"),
        (lambda y: y.transpose(1, 0, 2).reshape(y.shape)[:, ::-1], "PyTorch's in another order"),
    ],
)
def test_another_order_of_the_same_values_is_named(move: Callable[[jax.Array], jax.Array], words: str) -> None:
    def port(x: jax.Array) -> jax.Array:
        return linen.Dense(2, name="fc2")(move(linen.Dense(6, name="fc1")(x)))

    def reference() -> nn.Module:
        return TorchNet(lambda net, x: net.fc2(net.fc1(x).flip(1)), fc1=nn.Linear(3, 6), fc2=nn.Linear(6, 2))

    (found,) = examine(Pair(reference, LinenNet(port), values(4, 6, 3)), names=("outputs",)).divergences
    assert found.where == "output of flip"
    assert words in found.problem
    assert not order_between(np.arange(3.0) + 1e-12, np.arange(3.0))


def gated_twice() -> nn.Module:
    """Return a layer that is called twice, with halves of which one is the gate of the other."""

    def forward(net: Any, x: torch.Tensor) -> torch.Tensor:
        part, gate = net.fc(x).chunk(2, -1)
        return part.tanh() * gate.sigmoid()

    block = TorchNet(forward, fc=nn.Linear(4, 8))
    return TorchNet(lambda net, x: net.out(net.block(net.block(x))), block=block, out=nn.Linear(4, 2))


@pytest.mark.parametrize("order", ["exchanged", "interleaved"])
def test_halves_in_another_order_are_told_once_in_a_layer_that_is_called_twice(order: str) -> None:
    def port(x: jax.Array) -> jax.Array:
        layer = linen.Dense(8, name="fc")
        for _ in range(2):
            x = layer(x)
            part, gate = jnp.split(x, 2, -1)[::-1] if order == "exchanged" else (x[:, ::2], x[:, 1::2])
            x = jnp.tanh(part) * jax.nn.sigmoid(gate)
        return linen.Dense(2, name="out")(x)

    (found,) = examine(Pair(gated_twice, LinenNet(port), values(4, 4)), names=("outputs",)).divergences
    assert found.where == "output of block.tanh"
    assert "JAX takes other parts of block.fc, or in another order" in found.problem


class WithoutMode(linen.Module):
    """A norm that is in evaluation mode, whatever its model is told."""

    @linen.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Return [batch, 3]."""
        x = linen.BatchNorm(use_running_average=True, name="1")(linen.Dense(8, name="0")(x))
        return linen.Dense(3, name="2")(x)


def test_a_norm_that_does_not_learn_of_the_mode_is_explained() -> None:
    reference = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    pair = Pair(reference, WithoutMode(), values(4, 4), batch_sizes=(5,))
    (found,) = examine(pair, names=("outputs",)).divergences
    assert found.where == "output of 1, in training mode"
    assert "equal with the statistics of evaluation mode" in found.problem


def summed() -> nn.Module:
    """Return sums along the features, of which the last one is left out."""
    return TorchNet(
        lambda net, x: net.fc2(net.fc1(x).cumsum(1)[:, :-1].tanh() * 2),
        fc1=nn.Linear(3, 8),
        fc2=nn.Linear(7, 4),
    )


def test_an_operation_is_named_of_whose_value_a_part_is_used() -> None:
    def net(tree: Any, x: jax.Array) -> jax.Array:
        sums = linear(tree["fc1"], x) @ (1.1 * jnp.triu(jnp.ones((8, 8))))[:, :-1]
        return linear(tree["fc2"], 2 * jnp.tanh(sums))

    (found,) = examine(Pair(summed, net, values(4, 3), nested, batch_sizes=(5,)), names=("outputs",)).divergences
    assert "cumsum" in str(found), found


def attending_at_once() -> nn.Module:
    """Return an attention with fused queries, keys and values."""

    def forward(net: Any, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in net.qkv(x).chunk(3, -1))
        return net.out(functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    return TorchNet(forward, qkv=nn.Linear(8, 24), out=nn.Linear(8, 8))


def test_an_attention_without_a_scale_is_told_in_the_attention_and_not_in_the_layers_around_it() -> None:
    def port(x: jax.Array) -> jax.Array:
        q, k, v = (linen.DenseGeneral((2, 4), name=name)(x) for name in ("query", "key", "value"))
        shares = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k))
        return linen.DenseGeneral(8, axis=(-2, -1), name="out")(jnp.einsum("bhqk,bkhd->bqhd", shares, v))

    pair = Pair(attending_at_once, LinenNet(port), values(4, 5, 8), batch_sizes=(3,))
    (found,) = examine(pair, names=("outputs",)).divergences
    assert found.where == "output of scaled_dot_product_attention"
    assert "; or in" not in found.problem


def test_queries_and_keys_the_other_way_round_are_told_at_their_product_although_jax_scales_behind_it() -> None:
    def forward(net: Any, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in net.qkv(x).chunk(3, -1))
        return net.out(((q * 0.5 @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(2))

    def port(x: jax.Array) -> jax.Array:
        q, k, v = (part.reshape(*x.shape[:2], 2, 4) for part in jnp.split(linen.Dense(24, name="qkv")(x), 3, -1))
        shares = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", k, q) * 0.5)
        return linen.Dense(8, name="out")(jnp.einsum("bhqk,bkhd->bqhd", shares, v).reshape(x.shape))

    pair = Pair(TorchNet(forward, qkv=nn.Linear(8, 24), out=nn.Linear(8, 8)), LinenNet(port), values(4, 5, 8))
    (found,) = examine(replace(pair, batch_sizes=(3,)), names=("outputs",)).divergences
    assert found.where == "output of matmul"
    assert "PyTorch's with axes 2 and 3 exchanged" in found.problem


def shuffled() -> nn.Module:
    """Return a pool, and channels that become rows and columns."""
    return TorchNet(
        lambda net, x: net.out(net.shuffle(net.pool(net.conv(x)))).amax((2, 3)),
        conv=nn.Conv2d(2, 8, 3),
        pool=nn.MaxPool2d(2, ceil_mode=True),
        shuffle=nn.PixelShuffle(2),
        out=nn.Conv2d(2, 3, 1),
    )


@pytest.mark.parametrize("place", ["pool", "shuffle"])
def test_a_value_of_another_size_or_order_is_found_where_it_arises(place: str) -> None:
    def port(x: jax.Array) -> jax.Array:
        x = linen.Conv(8, (3, 3), padding="VALID", name="conv")(x)
        x = linen.max_pool(x, (2, 2), (2, 2), "VALID" if place == "pool" else "SAME")
        batch, rows, columns, _ = x.shape
        parts = (batch, rows, columns, 2, 2, 2)
        x = x.reshape(parts).transpose((0, 1, 4, 2, 5, 3) if place == "pool" else (0, 1, 3, 2, 4, 5))
        return linen.Conv(3, (1, 1), name="out")(x.reshape(batch, 2 * rows, 2 * columns, 2)).max((1, 2))

    assert places(Pair(shuffled, LinenNet(port), values(4, 2, 9, 9), batch_sizes=(4,))) == [f"output of {place}"]


class Dropping(linen.Module):
    """Two layers with dropout between them."""

    rate: float

    @linen.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Compute [batch, 2]."""
        return linen.Dense(2)(linen.Dropout(self.rate)(linen.Dense(8)(x), deterministic=not train))


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.0])
@pytest.mark.parametrize("library", ["linen", "nnx", "equinox"])
def test_another_rate_of_dropout_is_a_fault_and_none_at_all_is_remarked(library: str, rate: float) -> None:
    one, two, rngs = *jax.random.split(jax.random.key(0)), nnx.Rngs(0)
    ports: dict[str, Callable[[], Any]] = {
        "linen": lambda: Dropping(rate),
        "nnx": lambda: nnx.Sequential(
            nnx.Linear(3, 8, rngs=rngs), nnx.Dropout(rate, rngs=rngs), nnx.Linear(8, 2, rngs=rngs)
        ),
        "equinox": lambda: eqx.nn.Sequential(
            [eqx.nn.Linear(3, 8, key=one), eqx.nn.Dropout(rate), eqx.nn.Linear(8, 2, key=two)]
        ),
    }
    reference = nn.Sequential(nn.Linear(3, 8), nn.Dropout(torch.linspace(0, 0.1, 2)[1].item()), nn.Linear(8, 2))
    result = examine(Pair(reference, ports[library](), values(4, 3)), names=("parameters", "trajectory"))
    found = "\n".join(map(str, result.divergences))
    words = "trajectory: dropout 1: the rates of dropout in training are 0.5 in JAX, and 0.1 in PyTorch"
    assert found == (words if rate == 0.5 else "")
    assert any("dropout in training are none in JAX" in note for note in result.notes) == (rate == 0)


@pytest.mark.parametrize("library", ["linen", "nnx", "equinox"])
def test_rates_of_two_dropouts_the_other_way_round_are_told(library: str) -> None:
    keys, rngs = jax.random.split(jax.random.key(0)), nnx.Rngs(0)

    class Port(linen.Module):
        @linen.compact
        def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
            x = linen.Dropout(0.3)(linen.Dense(4)(x), deterministic=not train)
            return linen.Dropout(0.1)(linen.Dense(2)(x), deterministic=not train)

    def equinox() -> Any:
        first, second = (eqx.nn.Linear(*size, key=key) for size, key in zip(((3, 4), (4, 2)), keys, strict=True))
        return eqx.nn.Sequential([first, eqx.nn.Dropout(0.3), second, eqx.nn.Dropout(0.1)])

    ports: dict[str, Callable[[], Any]] = {
        "linen": Port,
        "nnx": lambda: nnx.Sequential(
            nnx.Linear(3, 4, rngs=rngs),
            nnx.Dropout(0.3, rngs=rngs),
            nnx.Linear(4, 2, rngs=rngs),
            nnx.Dropout(0.1, rngs=rngs),
        ),
        "equinox": equinox,
    }
    reference = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.1), nn.Linear(4, 2), nn.Dropout(0.3))
    (found,) = examine(Pair(reference, ports[library](), values(4, 3)), names=("parameters", "trajectory")).divergences
    words = (
        "trajectory: dropout 1, 3: the rates of dropout in training are, in this order, 0.3, 0.1 in JAX, and 0.1, 0.3"
    )
    assert str(found).startswith(words)


def test_another_rate_of_one_of_two_dropouts_is_told_at_its_layer() -> None:
    rngs = nnx.Rngs(0)
    port = nnx.Sequential(nnx.Linear(3, 2, rngs=rngs), nnx.Dropout(0.1, rngs=rngs), nnx.Dropout(0.5, rngs=rngs))
    reference = nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.1), nn.Dropout(0.3))
    (found,) = examine(Pair(reference, port, values(4, 3)), names=("parameters", "trajectory")).divergences
    assert str(found).startswith("trajectory: dropout 2: the rates of dropout in training are 0.1, 0.5 in JAX")

"""Watching a PyTorch module shows all its values and changes none."""

import copy
import gc
import itertools
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from parity_tests import harness
from parity_tests.harness.compare import Refused
from parity_tests.harness.pair import Inputs
from parity_tests.harness.torch_side import Rounded, TorchCapture, capture_torch, flat, gradient_error, reference_error
from parity_tests.parity.networks import TorchNet, linear, nested


def draw(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape)


def wave(outputs: Any) -> torch.Tensor:
    """Return an objective that every floating-point output moves."""
    tensors = [leaf for leaf in flat(outputs).values() if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()]
    return sum((tensor.cos().sum() for tensor in tensors), torch.zeros(()))


def watch(model: nn.Module, *inputs: Any, training: bool = False, **options: Any) -> TorchCapture:
    """Return the values of a module on these inputs, and the gradients of that objective."""
    return capture_torch(model, Inputs(*inputs), wave, training=training, **options)


def in_place() -> nn.Module:
    """Return a residual block that changes tensors in place, as torchvision writes it."""

    def forward(net: Any, images: torch.Tensor) -> torch.Tensor:
        stem = net.relu(net.conv(images))
        branch = net.norm(stem)
        branch += stem
        return net.relu(branch)

    return TorchNet(forward, conv=nn.Conv2d(3, 3, 3, padding=1), norm=nn.BatchNorm2d(3), relu=nn.ReLU(inplace=True))


def handed_through() -> nn.Module:
    """Return a network with a submodule that returns its input, which is used beside it as well."""

    def forward(net: Any, images: torch.Tensor) -> torch.Tensor:
        features = net.conv(images)
        return features * 2 + net.identity(features).sin() * net.rest(features)

    return TorchNet(forward, conv=nn.Conv2d(3, 3, 1), identity=nn.Identity(), rest=nn.Sequential(nn.Dropout(0.5)))


def uses_pair() -> nn.Module:
    """Return a network with a submodule that returns one tensor in two places, and what is computed from it."""

    def pair(net: Any, x: torch.Tensor) -> dict[str, Any]:
        hidden = net.linear(x)
        return {"hidden": hidden, "all": (hidden, hidden.exp()), "size": 4, "nothing": None}

    def forward(net: Any, x: torch.Tensor) -> torch.Tensor:
        outputs = net.pair(x)
        return outputs["hidden"].sin() + outputs["all"][0] * outputs["all"][1]

    return TorchNet(forward, pair=TorchNet(pair, linear=nn.Linear(4, 4)))


def stack(use: Callable[[nn.Module, torch.Tensor], torch.Tensor] = lambda block, x: block(x)) -> nn.Module:
    """Return a block of attention and a GELU, twice under two names, and a layer whose `forward` is called directly."""

    def forward_block(net: Any, x: torch.Tensor) -> torch.Tensor:
        query, key, value = net.qkv(x).chunk(3, -1)
        weights = F.dropout((query @ key.transpose(1, 2) / 8**0.5).softmax(-1), 0.5, net.training)
        x = x + net.drop(net.out(weights @ value))
        x = x + F.gelu(x)
        return 1.0 - F.scaled_dot_product_attention(x, x, x, dropout_p=0.5 if net.training else 0.0)

    block = TorchNet(forward_block, qkv=nn.Linear(8, 24), out=nn.Linear(8, 8), drop=nn.Dropout(0.3))
    return TorchNet(
        lambda net, x: net.head.forward(use(net.tied, use(net.block, x))),
        block=block,
        head=nn.Linear(8, 8),
        unused=nn.Linear(2, 2),
        tied=block,
    )


def slope_by_replacing(
    model: nn.Module, name: str, place: str, call: int, x: torch.Tensor, move: torch.Tensor
) -> float:
    """Return the slope of the objective as one output of a submodule moves, from differences of the whole run."""

    def objective_at(step: float) -> float:
        moved, calls = copy.deepcopy(model), 0

        def hook(_: nn.Module, args: Any, outputs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls != call:
                return None
            if place == "":
                return outputs + step * move
            first, second = outputs["all"]
            changed = {
                ".hidden": {"hidden": outputs["hidden"] + step * move},
                ".all[0]": {"all": (first + step * move, second)},
                ".all[1]": {"all": (first, second + step * move)},
            }
            return outputs | changed[place]

        moved.get_submodule(name).register_forward_hook(hook)
        with torch.no_grad():
            return float(wave(moved(x.clone())))

    return (objective_at(1e-6) - objective_at(-1e-6)) / 2e-6


@pytest.mark.parametrize(
    ("make", "shape"),
    [(in_place, (2, 3, 4, 4)), (handed_through, (2, 3, 4, 4)), (uses_pair, (2, 4)), (stack, (2, 5, 8))],
)
def test_gradients_of_submodules_are_those_of_finite_differences(
    make: Callable[[], nn.Module], shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)  # a finite difference across a kink is none
    model = make()
    capture = watch(model, draw(*shape))
    checked = 0
    for name, gradient in capture.gradients.items():
        stage, place = (
            name.split("#")[0],
            name[len("pair") :] if name.startswith("pair.") and name[5:8] != "lin" else "",
        )
        stage = stage.removesuffix(place)
        if capture.kinds[name] == "function" or name == "":
            continue
        move = torch.tensor(draw(*gradient.shape))
        call = int(name.split("#")[1]) if "#" in name else 1
        model64 = copy.deepcopy(model).double().eval()
        slope = slope_by_replacing(model64, stage, place, call, torch.tensor(draw(*shape)), move)
        assert (gradient * move.numpy()).sum() == pytest.approx(slope, rel=1e-5, abs=1e-6), name
        checked += 1
    assert checked >= 3
    assert set(capture.gradients) == set(capture.values)


def test_a_gradient_that_autograd_gives_in_part_is_left_out() -> None:
    """A view that is changed in place after it was used gets a part of its gradient."""

    def forward(net: Any, images: torch.Tensor) -> torch.Tensor:
        features = net.conv(images)
        row = net.flatten(features)
        before = row * 3
        row += 1
        return features.sin() + before.view_as(features)

    capture = watch(TorchNet(forward, conv=nn.Conv2d(3, 3, 1), flatten=nn.Flatten()), draw(2, 3, 4, 4))
    assert "flatten" in capture.values
    assert "flatten" not in capture.gradients
    assert any("changed in place): add, flatten" in note for note in capture.notes)
    assert "conv" in capture.gradients


def test_the_gradient_by_what_is_made_in_place_counts_its_other_name() -> None:
    def forward(net: Any, x: torch.Tensor) -> torch.Tensor:
        hidden = net.linear(x)
        return net.relu(hidden) + 2 * hidden  # `hidden` is what ReLU made of it

    model = TorchNet(forward, linear=nn.Linear(4, 4), relu=nn.ReLU(inplace=True))
    capture = capture_torch(model, Inputs(draw(2, 4)), draw(2, 4), training=False)
    np.testing.assert_array_equal(capture.gradients["relu"], 3 * draw(2, 4))


def test_functions_are_named_by_scope_and_calls_are_counted() -> None:
    capture = watch(stack(), draw(2, 5, 8), training=True)
    first = ["qkv", "matmul", "div", "softmax", "matmul#2", "out", "drop", "add", "gelu", "add#2"]
    first += ["scaled_dot_product_attention", "sub"]
    second = ["qkv#2", "matmul#3", "div#2", "softmax#2", "matmul#4", "out#2", "drop#2", "add#3", "gelu#2", "add#4"]
    second += ["scaled_dot_product_attention#2", "sub#2"]
    names = [f"block.{name}" for name in first] + ["block"] + [f"block.{name}" for name in second] + ["block#2"]
    assert list(capture.values) == [*names, "linear", ""]
    assert capture.kinds["block#2"] == "TorchNet"
    assert capture.kinds["block.gelu"] == "function"
    assert any("without being called" in note and note.endswith(": head") for note in capture.notes)
    assert "unused.weight" not in capture.weight_gradients
    without = watch(stack(), draw(2, 5, 8), training=True, functions=False)
    assert "function" not in without.kinds.values()


def test_the_gradient_by_a_function_is_the_one_by_a_module_that_does_the_same() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)).double()
    functional = TorchNet(lambda net, x: net.second(F.gelu(net.first(x))), first=model[0], second=model[2])
    with_module, with_function = (watch(net, draw(2, 8), training=True) for net in (model, functional))
    np.testing.assert_array_equal(with_module.values["1"], with_function.values["gelu"])


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_checkpoint_is_recorded_once(reentrant: bool) -> None:
    plain = watch(stack(), draw(2, 5, 8), training=True)
    torch.manual_seed(0)
    model = stack(lambda block, x: checkpoint(block, x, use_reentrant=reentrant))
    capture = watch(model, draw(2, 5, 8), training=True)
    assert list(capture.values) == list(plain.values)
    if reentrant:  # the forward pass computes no gradient
        assert set(capture.gradients) == {"linear", ""}
        assert any("computed without a gradient" in note for note in capture.notes)
    else:
        assert set(capture.gradients) == set(plain.gradients)


@pytest.mark.parametrize(
    ("model", "names"),
    [
        (nn.LSTM(8, 4, 2, batch_first=True, dropout=0.5), ["[0]", "[1][0]", "[1][1]"]),
        (nn.GRU(8, 4, batch_first=True), ["[0]", "[1]"]),
        (nn.TransformerEncoderLayer(8, 2, 16, 0.5, batch_first=True), ["self_attn[0]", "linear1", "relu", "norm2", ""]),
        (nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5)), ["0", "1", ""]),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
@pytest.mark.parametrize("training", [True, False])
def test_training_mode_has_no_dropout(model: nn.Module, names: list[str], training: bool) -> None:
    capture = watch(model, draw(2, 5, 8), training=training)
    assert set(names) <= set(capture.values)
    assert set(capture.gradients) == set(capture.values)
    expected = flat(copy.deepcopy(model).double().eval()(torch.tensor(draw(2, 5, 8))))
    for name, leaf in flat(capture.outputs).items():
        np.testing.assert_allclose(leaf, expected[name].detach().numpy(), rtol=1e-12, atol=1e-14)
    assert "the reference draws random numbers" not in capture.notes


class Forgetful(nn.Linear):
    """Drops values in evaluation mode too: its author forgot to say `training=self.training`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the product with some values dropped."""
        return nn.functional.dropout(super().forward(x), 0.5)


def test_a_function_of_dropout_that_is_never_switched_off_drops_nothing() -> None:
    model = Forgetful(8, 4).double()
    capture = capture_torch(model, Inputs(draw(2, 8)), wave, training=False)
    expected = nn.functional.linear(torch.tensor(draw(2, 8)), model.weight, model.bias)
    np.testing.assert_allclose(capture.outputs, expected.detach().numpy(), rtol=1e-12)


def test_attention_takes_keywords_and_says_that_its_projection_is_not_seen() -> None:
    model = nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True)
    inputs = Inputs(draw(2, 5, 8), key=draw(2, 5, 8), value=draw(2, 5, 8), key_padding_mask=np.eye(5)[:2] > 0)
    capture = capture_torch(model, inputs, wave, training=True)
    assert list(capture.values) == ["[0]", "[1]"]
    assert any(note.endswith(": out_proj") for note in capture.notes)
    assert set(capture.weight_gradients) == {name for name, _ in model.named_parameters()}


@dataclass
class Output:
    """An output as a model may return it."""

    hidden: Any
    pooled: Any = None


def language() -> Any:
    """Return a network that takes token ids and returns a dataclass; its table is frozen and tied."""

    def forward(net: Any, ids: torch.Tensor, *, mask: torch.Tensor) -> Output:
        assert ids.dtype == torch.int64
        hidden = net.norm(net.embed(ids).transpose(1, 2)).transpose(1, 2) * mask[..., None] @ torch.diag(net.scale)
        return Output((hidden, net.head(hidden)), hidden.mean(1))

    embed, head = nn.Embedding(11, 8), nn.Linear(8, 11, bias=False)
    head.weight = embed.weight.requires_grad_(False)
    return TorchNet(forward, embed=embed, norm=nn.BatchNorm1d(8), head=head, scale=torch.ones(8))  # no buffer


def test_integers_keywords_dataclasses_and_frozen_weights() -> None:
    model = language()
    before = copy.deepcopy(model.state_dict())
    ids = np.random.default_rng(0).integers(0, 11, (3, 5))
    capture = capture_torch(model, Inputs(ids, mask=np.ones((3, 5), np.float32)), wave, training=True)
    assert list(flat(capture.outputs)) == [".hidden[0]", ".hidden[1]", ".pooled"]
    assert {array.dtype for array in flat(capture.outputs).values()} == {np.dtype(np.float64)}
    assert set(capture.weight_gradients) == {"norm.weight", "norm.bias"}
    assert capture.buffers["norm.num_batches_tracked"] == 1
    assert np.abs(capture.buffers["norm.running_mean"]).max() > 0
    for name, tensor in model.state_dict().items():
        assert tensor.equal(before[name]), f"{name} of the module given was changed"
    assert model.norm.weight.grad is None


def test_cotangents_weigh_the_outputs() -> None:
    ids = np.random.default_rng(0).integers(0, 11, (3, 5))
    inputs = Inputs(ids, mask=np.ones((3, 5)))
    cotangents = Output((draw(3, 5, 8), draw(3, 5, 11)))
    capture = capture_torch(language(), inputs, cotangents, training=False)
    np.testing.assert_array_equal(capture.gradients["head"], cotangents.hidden[1])
    products = [(cotangents.hidden[i] * capture.outputs.hidden[i]).sum() for i in range(2)]
    assert capture.loss == pytest.approx(sum(products), rel=1e-12)
    with pytest.raises(Refused, match="fits no output"):
        capture_torch(language(), inputs, Output(draw(3, 5, 8)), training=False)


def test_a_module_that_holds_a_computed_weight_can_be_copied() -> None:
    with pytest.warns(FutureWarning):
        layer = nn.utils.weight_norm(nn.Linear(4, 3))
    capture = watch(nn.Sequential(layer), draw(2, 4))
    assert capture.weight_gradients.keys() == {"0.bias", "0.weight_g", "0.weight_v"}


CALLS = itertools.count()


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (
            TorchNet(lambda net, x: x * next(CALLS)),
            "other results each time it runs, first: output of the module",
        ),
        (
            TorchNet(lambda net, x: x * (2 if net._forward_hooks else 1)),
            "other results when its submodules are watched",
        ),
        (nn.Linear(5, 5), "does not run on these inputs in torch.float64: RuntimeError: mat1 and mat2"),
    ],
    ids=["counting", "aware", "narrow"],
)
def test_a_module_that_cannot_be_watched_is_refused(model: nn.Module, message: str) -> None:
    with pytest.raises(Refused, match=message):
        watch(model, draw(2, 4))


def test_float32_and_an_unverified_run() -> None:
    capture = watch(handed_through(), draw(2, 3, 4, 4), training=True, dtype="float32", verify=False)
    assert {value.dtype for value in (capture.values | capture.gradients).values()} == {np.dtype(np.float32)}
    with pytest.raises(Refused, match="the objective gives 96 values"):
        capture_torch(handed_through(), Inputs(draw(2, 3, 4, 4)), lambda outputs: outputs, training=True)


def test_no_run_is_kept_after_it_was_recorded() -> None:
    """A graph of autograd that is kept holds all weights: 0.1 GiB for each run of ResNet-18."""
    weights: list[weakref.ref[torch.Tensor]] = []

    def forward(net: Any, x: torch.Tensor) -> torch.Tensor:
        weights.append(weakref.ref(net.fc.weight))
        return net.fc(x).relu()

    watch(TorchNet(forward, fc=nn.Linear(3, 2)), np.ones((2, 3), np.float32))
    gc.collect()
    assert [weight() for weight in weights] == [None, None]


def test_settings_are_as_before() -> None:
    model = nn.Linear(4, 4)
    state = torch.get_rng_state()
    watch(model, draw(2, 4))
    assert torch.get_default_dtype() is torch.float32
    assert torch.backends.mha.get_fastpath_enabled()
    assert torch.get_rng_state().equal(state)


def test_flat_names_the_parts_of_nests_of_any_framework() -> None:
    class Point(NamedTuple):
        x: Any
        y: Any

    nest = {"a": [jnp.ones(2), None, "text"], "b": Output(Point(np.ones(3), 4), torch.ones(5)), 3: (True,)}
    assert list(flat(nest)) == [".a[0]", ".b.hidden.x", ".b.hidden.y", ".b.pooled", "[3][0]"]
    assert list(flat(np.ones(2))) == [""]


def test_float32_inside_the_reference_is_float64_in_a_float64_run() -> None:
    def asks_for_float32(net: Any, x: torch.Tensor) -> torch.Tensor:
        """Ask for float32 in all ways, and for the eps of the dtype."""
        table = torch.arange(4, dtype=torch.float32).div(7) + torch.tensor(np.ones(4, np.float32) / 3).type_as(x)
        y = F.softmax(x.float(), -1, dtype=torch.float32) + F.rms_norm(x.to(torch.float32), (4,))
        return y.type(torch.float32) + table.to("cpu", torch.float32) * (1 + torch.finfo(x.dtype).eps)

    x, finfo, model = draw(2, 4), torch.finfo, TorchNet(asks_for_float32)
    capture = watch(model, x)
    exponentials, eps = np.exp(x), np.finfo(np.float32).eps
    table = np.arange(4) / 7 + np.float32(1) / np.float32(3)
    expected = exponentials / exponentials.sum(-1, keepdims=True) + table * (1 + eps)
    expected += x / np.sqrt(np.mean(x**2, -1, keepdims=True) + eps)
    np.testing.assert_allclose(capture.outputs, expected, rtol=1e-14)
    assert capture.notes == (
        "PyTorch's float32 (arange, finfo, float, rms_norm, softmax, to and 1 more) is float64 in the float64 run",
    )
    assert torch.finfo is finfo
    single = watch(model, x, dtype="float32")
    assert single.outputs.dtype == np.float32
    assert not single.notes


@pytest.mark.parametrize("insists", [False, True])
@pytest.mark.parametrize("factor", [1.0, 1 + 1e-9])
def test_float32_inside_the_reference_hides_no_fault(insists: bool, factor: float) -> None:
    """The softmax is behind a checkpoint, and may insist on float32."""

    def normalise(logits: torch.Tensor) -> torch.Tensor:
        chances = torch.softmax(logits.float(), -1)
        assert chances.dtype is torch.float32 or not insists
        return chances.type_as(logits)

    def reference() -> nn.Module:
        return TorchNet(lambda net, x: checkpoint(normalise, net.fc(x), use_reentrant=False), fc=nn.Linear(3, 4))

    def port(variables: Any, x: jax.Array) -> jax.Array:
        return factor * jax.nn.softmax(linear(variables["fc"], x))

    checks = ("outputs", "gradients") if insists else ("outputs", "gradients", "trajectory")
    result = harness.examine(harness.Pair(reference, port, draw(2, 3), nested), names=checks)
    own = any("judged by its own error" in note for note in result.notes)
    if insists:  # it does not run otherwise, and is judged by its own error
        assert (not result.divergences, own) == (True, True)
    else:
        found = {divergence.check for divergence in result.divergences}
        assert (found, own) == (set() if factor == 1 else {"outputs"}, False), result.divergences


def test_a_table_that_the_reference_builds_is_exact_in_a_float64_run() -> None:
    """The table is not among the weights."""

    def reference() -> nn.Module:
        waves = nn.Buffer(torch.sin(torch.arange(4.0) / 7), persistent=False)
        return TorchNet(lambda net, x: net.fc(x) * net.waves, fc=nn.Linear(3, 4), waves=waves)

    def port(variables: Any, x: jax.Array) -> jax.Array:
        return linear(variables["fc"], x) * jnp.sin(jnp.arange(4.0) / 7)

    pair = harness.Pair(reference, port, draw(2, 3), nested)
    assert not harness.examine(pair, names=("outputs", "gradients")).divergences


def keeping_float32() -> nn.Module:
    """Return a softmax in float32, and an activation whose gradient PyTorch computes with a float32 factor."""

    def forward(net: Any, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        y = net.relu(net.act(net.first(x)) + net.embed(ids))
        return torch.softmax(y, -1, dtype=torch.float32).to(y.dtype).sqrt() * y.sign()

    layers = {"first": nn.Linear(8, 8), "act": nn.Hardsigmoid(), "embed": nn.Embedding(5, 8), "relu": nn.ReLU()}
    return TorchNet(forward, **layers, keeps_float32=True)  # as the harness says of a module that insists on float32


class KeepsFloat32(nn.Module):
    """A softmax in float32, and an activation whose gradient PyTorch computes with a float32 factor."""

    keeps_float32 = True  # as the harness says of a module that insists on float32

    def __init__(self) -> None:
        super().__init__()
        self.first, self.act, self.embed, self.relu = nn.Linear(8, 8), nn.Hardsigmoid(), nn.Embedding(5, 8), nn.ReLU()

    def forward(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Return roots of the softmax."""
        y = self.relu(self.act(self.first(x)) + self.embed(ids))
        return torch.softmax(y, -1, dtype=torch.float32).to(y.dtype).sqrt() * y.sign()


def test_the_own_error_of_the_reference_is_found_where_it_is_born() -> None:
    inputs = Inputs(draw(2, 5, 8), np.arange(10).reshape(2, 5) % 5)

    def measure(model: nn.Module, inputs: Inputs) -> Any:
        capture: TorchCapture = capture_torch(model, inputs, wave, training=False)
        names = [name for name in capture.values if name]
        return reference_error(model, inputs, wave, capture, backward_of=names)

    error = measure(keeping_float32(), inputs)
    assert error.born == {"softmax"}
    assert "softmax" in error.born_gradients
    assert "first" not in error.born_gradients  # the activation's own float64 gradient follows
    assert set(error.values) == {"softmax", "sqrt", "mul", ""}
    assert set(error.weight_gradients) == {"first.weight", "first.bias", "embed.weight"}
    assert all(1e-9 < value < 1e-6 for value in error.values.values())
    assert set(error.backward) == {"act"}
    sound = measure(nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.LayerNorm(8), nn.ReLU()), Inputs(draw(2, 5, 8)))
    assert not any(sound)


def test_other_rounding_shows_what_can_cancel_in_a_gradient() -> None:
    """The gradient of a softmax that is nearly 1 at one place is the small difference of two large terms."""
    inputs = Inputs(np.array([1000.0, 0.0]), np.zeros(2))

    def gradient(move: float = 0.0, seed: int | None = None) -> np.ndarray:
        scores = nn.Parameter(torch.tensor([0.0, -30.0], dtype=torch.float64) * (1 + move))
        model = TorchNet(lambda net, x, mask: (torch.softmax(net.scores + mask, 0) * x).sum(), scores=scores)
        with nullcontext() if seed is None else Rounded(seed):
            capture = capture_torch(model, inputs, torch.Tensor.sum, training=False, verify=False)
        return capture.weight_gradients["scores"]

    plain = gradient()
    assert np.abs(gradient(move=1e-15) / plain - 1).max() < 1e-9
    assert max(np.abs(gradient(seed=seed) / plain - 1).max() for seed in range(4)) > 1e-4
    x = torch.tensor([1.5, 2.5], dtype=torch.float64, requires_grad=True)
    with Rounded(0):
        x.amax().backward()  # its gradient goes to what equals the maximum, which must not be moved
    assert x.grad is not None
    assert x.grad.tolist() == [0, 1]


@pytest.mark.parametrize("function", [F.hardswish, F.relu, F.relu6, F.gelu, F.silu, F.logsigmoid, F.mish, torch.erf])
def test_the_gradient_of_a_sound_function_agrees_with_a_finite_difference(function: Callable[..., Any]) -> None:
    error = gradient_error(function, (torch.tensor(draw(200) * 3),), {})
    assert error is not None
    assert error < 1e-10

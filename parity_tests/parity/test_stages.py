"""Which stage of a JAX model belongs to which of a PyTorch module, and how a value is carried between the two."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from parity_tests.harness.adapters import adapt
from parity_tests.harness.compare import Refused
from parity_tests.harness.pair import Inputs
from parity_tests.harness.stages import Match, Stage, candidates, carry, jax_stages, match, torch_stages
from parity_tests.harness.taps import trace
from parity_tests.harness.torch_side import capture_torch
from parity_tests.parity.networks import LinenNet, TorchNet
from parity_tests.parity.test_propose import ResNet18


class Tap(NamedTuple):
    """The facts about one value in JAX."""

    shape: tuple[int, ...]
    kind: str
    steps: int | None = None


def stages_of_torch(module: nn.Module, *arrays: np.ndarray) -> dict[str, Stage]:
    capture = capture_torch(module, Inputs(*arrays), lambda outputs: outputs.sum(), training=False)
    shapes = {name: value.shape for name, value in capture.values.items()}
    return torch_stages(capture.kinds, shapes, [name for name, _ in module.named_modules()])


def stages_of_jax(model: linen.Module, *arrays: np.ndarray) -> dict[str, Stage]:
    adapted = adapt(model)
    init: Any = adapted.init
    traced = trace(
        lambda variables, *arrays: adapted.apply(variables, Inputs(*arrays), False)[0],
        jax.eval_shape(lambda key: init(key, Inputs(*arrays)), jax.random.key(0)),
        *arrays,
        context=adapted.context,
        verify=False,
    )
    return jax_stages(traced.taps)


def partners(matches: Mapping[str, Match]) -> dict[str, str]:
    return {name: found.jax for name, found in matches.items()}


def test_a_resnet_whose_shortcut_comes_first_is_matched_whole() -> None:
    images = np.zeros((1, 3, 32, 32), np.float32)
    torch_side = stages_of_torch(torchvision.models.resnet18(num_classes=10), images)
    jax_side = stages_of_jax(ResNet18(shortcut_first=True), images.transpose(0, 2, 3, 1))
    owners = {"conv1": "Conv_0", "bn1": "BatchNorm_0", "fc": "Dense_0"}
    expected = {"": "", "relu": "relu", "maxpool": "max_pool", "avgpool": "mean"}
    for number in range(8):
        name, path = f"layer{number // 2 + 1}.{number % 2}", f"Basic_{number}"
        shortcut = number in (2, 4, 6)
        for part in (1, 2):
            owners[f"{name}.conv{part}"] = f"{path}/Conv_{part - 1 + shortcut}"
            owners[f"{name}.bn{part}"] = f"{path}/BatchNorm_{part - 1 + shortcut}"
        if shortcut:
            owners |= {f"{name}.downsample.0": f"{path}/Conv_0", f"{name}.downsample.1": f"{path}/BatchNorm_0"}
        expected |= {name: path, f"{name}.relu": f"{path}.relu", f"{name}.relu#2": f"{path}.relu#2"}
        expected[f"{name}.add"] = f"{path}.add"
    matches = match(torch_side, jax_side, owners)
    assert partners(matches) == owners | expected
    assert {name for name, found in matches.items() if found.sure} == {*owners, ""}
    # Nothing in JAX returns these.
    alone = {"layer1", "layer2", "layer3", "layer4", *(f"layer{layer}.0.downsample" for layer in (2, 3, 4))}
    assert set(torch_side) - set(matches) == alone


def torch_block(net: Any, x: torch.Tensor) -> torch.Tensor:
    """Compute a block of GPT with queries, keys and values in one layer."""
    parts = net.c_attn(net.ln_1(x)).chunk(3, -1)
    query, key, value = (part.unflatten(-1, (2, 4)).transpose(1, 2) for part in parts)
    weights = torch.softmax(query @ key.transpose(-1, -2) / 2.0, -1)
    x = x + net.c_proj((weights @ value).transpose(1, 2).flatten(2))
    return x + net.mlp(net.ln_2(x))


def torch_gpt(net: Any, ids: torch.Tensor) -> torch.Tensor:
    """Compute the logits of two blocks."""
    x = net.wte(ids)
    for block in net.h:
        x = block(x)
    return net.head(x)


def new_torch_block() -> nn.Module:
    """Return a block of GPT."""
    layers = {"ln_1": nn.LayerNorm(8), "c_attn": nn.Linear(8, 24), "c_proj": nn.Linear(8, 8), "ln_2": nn.LayerNorm(8)}
    return TorchNet(torch_block, **layers, mlp=nn.Sequential(nn.Linear(8, 32), nn.GELU("tanh"), nn.Linear(32, 8)))


def jax_attention(x: jax.Array) -> jax.Array:
    """Compute attention with queries, keys and values apart."""
    layers = [linen.Dense(8, name=name)(x) for name in ("query", "key", "value")]
    query, key, value = (layer.reshape(*x.shape[:2], 2, 4) for layer in layers)
    weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", query, key) / 2.0)
    return linen.Dense(8, name="out")(jnp.einsum("bhqk,bkhd->bqhd", weights, value).reshape(x.shape))


def jax_block(x: jax.Array) -> jax.Array:
    """Compute a block of GPT whose feed-forward part has no module of its own."""
    x = x + LinenNet(jax_attention, name="attention")(linen.LayerNorm(name="norm1")(x))
    hidden = jax.nn.gelu(linen.Dense(32, name="up")(linen.LayerNorm(name="norm2")(x)))
    return x + linen.Dense(8, name="down")(hidden)


def jax_gpt(ids: jax.Array) -> jax.Array:
    """Compute the logits of two blocks."""
    x = linen.Embed(11, 8, name="embed")(ids)
    for number in range(2):
        x = LinenNet(jax_block, name=f"blocks_{number}")(x)
    return linen.Dense(11, name="head")(x)


def test_blocks_of_a_gpt_with_query_key_and_value_apart() -> None:
    ids = np.zeros((2, 5), np.int32)
    blocks = nn.ModuleList(new_torch_block() for _ in range(2))
    torch_side = stages_of_torch(TorchNet(torch_gpt, wte=nn.Embedding(11, 8), h=blocks, head=nn.Linear(8, 11)), ids)
    jax_side = stages_of_jax(LinenNet(jax_gpt), ids)
    owners = {"wte": "embed", "head": "head"}
    expected: dict[str, str] = {}
    for layer in range(2):
        owners |= {f"h.{layer}.ln_1": f"blocks_{layer}/norm1", f"h.{layer}.ln_2": f"blocks_{layer}/norm2"}
        owners |= {f"h.{layer}.c_proj": f"blocks_{layer}/attention/out"}
        owners |= {f"h.{layer}.mlp.0": f"blocks_{layer}/up", f"h.{layer}.mlp.2": f"blocks_{layer}/down"}
    matches = match(torch_side, jax_side, owners)
    for layer in range(2):
        block, attention = f"blocks_{layer}", f"blocks_{layer}/attention"
        expected |= {f"h.{layer}": block, f"h.{layer}.add": f"{block}.add", f"h.{layer}.add#2": f"{block}.add#2"}
        expected |= {f"h.{layer}.mlp.1": f"{block}.gelu", f"h.{layer}.softmax": f"{attention}.softmax"}
        expected |= {f"h.{layer}.matmul": f"{attention}.einsum", f"h.{layer}.matmul#2": f"{attention}.einsum#2"}
        expected |= {f"h.{layer}.div": f"{attention}.div"}
    found = partners(matches)
    found.pop("", None)
    assert found == owners | expected
    assert {name for name in matches if matches[name].sure} - {""} == set(owners)


def stages(torch_side: Mapping[str, tuple[tuple[int, ...], str]], *modules: str) -> dict[str, Stage]:
    kinds = {name: kind for name, (_, kind) in torch_side.items()}
    return torch_stages(kinds, {name: shape for name, (shape, _) in torch_side.items()}, ["", *modules])


def taps(jax_side: Mapping[str, tuple[tuple[int, ...], str]]) -> dict[str, Stage]:
    return jax_stages({name: Tap(*tap) for name, tap in jax_side.items()})


def test_a_sequential_is_matched_with_functions_between_layers() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 8, 3), nn.SiLU(), nn.AdaptiveAvgPool2d(1)
    )
    model.extend([nn.Flatten(), nn.Dropout(0.5), nn.Linear(8, 3), nn.Softmax(-1)])

    def port(x: jax.Array) -> jax.Array:
        x = linen.max_pool(linen.relu(linen.Conv(4, (3, 3), padding="VALID")(x)), (2, 2), (2, 2))
        x = linen.silu(linen.Conv(8, (3, 3), padding="VALID")(x))
        return jax.nn.softmax(linen.Dense(3)(jnp.mean(x, axis=(1, 2))))

    images = np.zeros((2, 1, 12, 12), np.float32)
    owners = {"0": "Conv_0", "3": "Conv_1", "8": "Dense_0"}
    matches = match(stages_of_torch(model, images), stages_of_jax(LinenNet(port), images.transpose(0, 2, 3, 1)), owners)
    between = {"1": "relu", "2": "max_pool", "4": "silu", "5": "mean", "9": "softmax"}
    assert partners(matches) == owners | between | {"": ""}


ANCHORS = {"a": "x", "b": "y"}


@pytest.mark.parametrize(
    ("inside", "jax_inside", "expected"),
    [
        ({"r": ((2, 8), "ReLU")}, {"relu": ((2, 8), "function")}, {"r": "relu"}),
        ({"r": ((2, 8), "ReLU")}, {"relu": ((2, 9), "function")}, {}),  # another size
        ({"r": ((2, 3, 4), "ReLU")}, {"relu": ((2, 4, 3), "function")}, {"r": "relu"}),  # channels last
        ({"r": ((3, 2, 4), "ReLU")}, {"relu": ((2, 3, 4), "function")}, {}),  # another batch axis
        ({"r": ((2, 8), "ReLU")}, {"gelu": ((2, 8), "function")}, {}),  # another kind
        ({"add": ((2, 8), "function")}, {"add": ((2, 8), "function"), "add#2": ((2, 8), "function")}, {}),  # which?
        (
            {"add": ((2, 8), "function"), "r": ((2, 8), "ReLU"), "add#2": ((2, 8), "function")},
            {"add": ((2, 8), "function"), "relu": ((2, 8), "function"), "add#2": ((2, 8), "function")},
            {"add": "add", "r": "relu", "add#2": "add#2"},
        ),
    ],
)
def test_what_has_no_weights_is_matched_by_kind_size_and_number(
    inside: dict[str, Any], jax_inside: dict[str, Any], expected: dict[str, str]
) -> None:
    torch_side = stages({"a": ((2, 5), "Linear"), **inside, "b": ((2, 6), "Linear")}, "a", "b", "r")
    jax_side = taps({"x": ((2, 5), "Dense"), **jax_inside, "y": ((2, 6), "Dense")})
    matches = match(torch_side, jax_side, ANCHORS)
    assert partners(matches) == ANCHORS | expected
    assert not any(matches[name].sure for name in expected)


def test_calls_are_matched_in_order_if_both_sides_have_equally_many() -> None:
    twice = stages({"a": ((2, 5), "Linear"), "a#2": ((2, 5), "Linear")}, "a")
    both = taps({"x": ((2, 5), "Dense"), "x#2": ((2, 5), "Dense")})
    assert partners(match(twice, both, {"a": "x"})) == {"a": "x", "a#2": "x#2"}
    assert match(twice, taps({"x": ((2, 5), "Dense")}), {"a": "x"}) == {}


def test_parts_of_nests_are_matched_by_size() -> None:
    torch_side = stages({"rnn[0]": ((2, 5, 8), "LSTM"), "rnn[1][0]": ((1, 2, 8), "LSTM")}, "rnn")
    both = taps({"rnn/cell": ((5, 2, 8), "LSTMCell"), "rnn": ((2, 5, 8), "RNN")})
    assert partners(match(torch_side, both, {"rnn": "rnn"})) == {"rnn[0]": "rnn"}
    torch_side = stages(
        {"attn[0]": ((2, 5, 8), "MultiheadAttention"), "attn[1]": ((2, 5, 5), "MultiheadAttention")}, "attn"
    )
    assert partners(match(torch_side, taps({"mha": ((2, 5, 8), "MHA")}), {"attn": "mha"})) == {"attn[0]": "mha"}
    alike = stages({"pair[0]": ((2, 8), "Pair"), "pair[1]": ((2, 8), "Pair")}, "pair")
    assert match(alike, taps({"pair": ((2, 8), "Pair")}), {"pair": "pair"}) == {}  # either of the two


def test_a_container_that_ends_otherwise_is_not_matched() -> None:
    block = {"block.conv": ((2, 4), "Conv2d"), "block.relu": ((2, 4), "ReLU"), "block": ((2, 4), "Sequential")}
    torch_side = stages(block, "block", "block.conv", "block.relu")
    with_relu = {"unit/conv": ((2, 4), "Conv"), "unit.relu": ((2, 4), "function"), "unit": ((2, 4), "Unit")}
    outside = {"unit/conv": ((2, 4), "Conv"), "unit": ((2, 4), "Unit"), "relu": ((2, 4), "function")}
    owners = {"block.conv": "unit/conv"}
    assert partners(match(torch_side, taps(with_relu), owners))["block"] == "unit"
    assert "block" not in match(torch_side, taps(outside), owners)


def test_declared_stages_come_first_and_must_exist() -> None:
    torch_side = stages({"layer1.0": ((2, 4), "Block"), "layer2.0": ((2, 4), "Block")}, "layer1.0", "layer2.0")
    jax_side = taps({"stages_2/blocks_0": ((2, 4), "Block"), "stages_1/blocks_0": ((2, 4), "Block")})
    matches = match(torch_side, jax_side, {}, {"layer{i}.{j}": "stages_{i}/blocks_{j}"})
    assert partners(matches) == {"layer1.0": "stages_1/blocks_0", "layer2.0": "stages_2/blocks_0"}
    assert all(found.sure for found in matches.values())
    for declared, message in (
        ({"layer{i}.0": "stage_{i}"}, "JAX has no such stage"),
        ({"layer3.0": "stages_1/blocks_0"}, "PyTorch has no such stage"),
    ):
        with pytest.raises(Refused, match=message):
            match(torch_side, jax_side, {}, declared)
    with pytest.raises(Refused, match="do not fit"):
        match(torch_side, taps({"x": ((2, 5), "Block")}), {}, {"layer1.0": "x"})


@pytest.mark.parametrize(
    ("torch_shape", "jax_shape", "ways"),
    [
        ((2, 3, 4, 5), (2, 4, 5, 3), ["channels last"]),
        ((2, 3, 4, 5), (2, 3, 4, 5), ["as it is"]),
        ((2, 4, 4, 4), (2, 4, 4, 4), ["channels last", "as it is", "heads and positions exchanged"]),
        ((2, 3, 4, 5), (2, 20, 3), ["channels last, axes merged or split"]),
        ((2, 3, 1, 1), (2, 3), ["channels last, axes merged or split"]),
        ((2, 5, 8), (2, 5, 8), ["as it is"]),
        ((2, 5, 8), (2, 8, 5), ["channels last"]),
        ((2, 5, 8), (2, 5, 2, 4), ["as it is, axes merged or split"]),
        (
            (2, 2, 5, 4),
            (2, 5, 8),
            ["channels last, axes merged or split", "heads and positions exchanged, axes merged or split"],
        ),
        ((5, 2, 8), (2, 5, 8), []),
        ((2, 5), (2, 6), []),
        ((), (), ["as it is"]),
    ],
)
def test_values_are_carried_there_and_back(torch_shape: Any, jax_shape: Any, ways: list[str]) -> None:
    found = candidates(torch_shape, jax_shape)
    assert [way.how for way in found] == ways
    assert carry(torch_shape, jax_shape) == (found[0] if found else None)
    array = np.arange(np.prod(torch_shape, dtype=int)).reshape(torch_shape)
    for way in found:
        assert way.to_jax(array).shape == jax_shape
        np.testing.assert_array_equal(way.to_torch(way.to_jax(array)), array)
        np.testing.assert_array_equal(way.to_torch(way.to_jax(jnp.asarray(array))), array)


def test_channels_may_be_last_in_pytorch_and_first_in_jax() -> None:
    (way,) = candidates((2, 4, 5, 3), (2, 3, 4, 5), channels_last=False)
    assert (way.how, way.axes) == ("channels first", (0, 3, 1, 2))


def test_a_flattened_image_is_carried_if_its_shape_is_known() -> None:
    images = np.random.default_rng(0).normal(size=(2, 3, 4, 5))
    way = candidates((2, 60), (2, 60), image=(3, 4, 5))[1]
    np.testing.assert_array_equal(way.to_jax(images.reshape(2, 60)), images.transpose(0, 2, 3, 1).reshape(2, 60))
    np.testing.assert_array_equal(way.to_torch(way.to_jax(images.reshape(2, 60))), images.reshape(2, 60))

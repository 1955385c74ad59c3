"""Models of every library: all their modules are seen, under their own paths, and seeing them changes nothing."""

# ruff: noqa: D101, D102 - the small models here say by their names what they are

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import equinox as eqx
import haiku as hk
import jax
import numpy as np
import pytest
import torch
from flax import linen as nn
from flax import nnx
from haiku import dropout
from jax import Array, lax
from jax import numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from torchvision.ops import StochasticDepth

from parity_tests.harness import Pair, examine
from parity_tests.harness.adapters import Model, adapt, without_dropout
from parity_tests.harness.compare import Refused
from parity_tests.harness.taps import Sweep, Traced, in_float64, name_leaves
from parity_tests.parity.networks import LinenNet, NnxNet, network
from parity_tests.parity.watched_runs import draw_variables, watch_model

WIDTH = 6
ROWS = np.random.default_rng(0).normal(size=(4, WIDTH))
KEY = jax.random.PRNGKey(0)


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def modules_of(traced: Traced) -> list[str]:
    """Return the names of the taps that are no functions."""
    return [name for name, info in traced.taps.items() if info.kind != "function"]


def check_mean(model: Model, name: str, trained: Sweep, batch: Array) -> None:
    """Check that a moving mean goes a tenth of the way to that of the batch in training alone, and is no weight."""
    variables = draw_variables(model, ROWS)
    before = model.leaves(variables)[name]
    np.testing.assert_allclose(trained.outputs[1][name], 0.9 * before + 0.1 * np.mean(batch, 0), rtol=1e-12)
    _, evaluated = watch_model(model, ROWS)
    np.testing.assert_array_equal(evaluated.outputs[1][name], before)
    assert name not in model.trainable(variables)


# Flax Linen


class LinenBlock(nn.Module):
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, rows: Array) -> Array:
        hidden = nn.LayerNorm(epsilon=self.epsilon, name="ln")(rows)
        hidden = nn.Dense(8, name="fc1", param_dtype=jnp.float64)(hidden)
        return rows + nn.Dense(WIDTH, name="fc2", param_dtype=jnp.float64)(nn.gelu(hidden))


BLOCK = ["ln", "fc1", "fc2"]


def in_block(path: str) -> list[str]:
    """Return the taps of a block, and the block itself."""
    return [*(f"{path}/{name}" for name in BLOCK), path]


def linen_compact(rows: Array) -> dict[str, Any]:
    for index in range(2):
        rows = LinenBlock(name=f"b{index}")(rows)
    return {"x": rows, "pair": (rows.sum(), nn.Dense(2)(rows))}


class LinenSetup(nn.Module):
    def setup(self) -> None:
        self.blocks = [LinenBlock() for _ in range(2)]
        self.heads = {"out": nn.Dense(WIDTH)}

    def head(self, rows: Array) -> Array:
        return self.heads["out"](rows)

    @nn.nowrap
    def double(self, rows: Array) -> Array:
        return rows * 2

    def __call__(self, rows: Array) -> Array:
        for block in self.blocks:
            rows = block(rows)
        return self.double(self.head(rows))


def linen_repeated(rows: Array) -> Array:
    block = LinenBlock(name="b")
    return block(block(rows))


def linen_step(carry: Array, _: None) -> tuple[Array, Array]:
    return LinenBlock(name="inner")(carry), carry.sum()


def linen_scan(step: Any) -> nn.Module:
    layers = nn.scan(step, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
    return LinenNet(lambda rows: layers(linen_step, name="s")(rows, None)[0])


def linen_lifted(lift: Callable[..., Any]) -> nn.Module:
    def function(rows: Array) -> Array:
        lifted = lift(LinenBlock)
        first = lifted(name="b1")
        return lifted(name="b2")(first(first(rows)))

    return LinenNet(function)


def linen_vmap(rows: Array) -> Array:
    ensemble = nn.vmap(
        LinenBlock, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=None, out_axes=1, axis_size=2
    )
    return ensemble(name="b")(rows).sum(1)


class LinenNorm(nn.Module):
    @nn.compact
    def __call__(self, rows: Array, train: bool) -> Array:
        rows = nn.BatchNorm(use_running_average=not train, momentum=0.9, name="bn")(nn.Dense(WIDTH, name="fc")(rows))
        rows = nn.Dropout(0.3, deterministic=not train, name="drop")(rows)
        attention = nn.MultiHeadDotProductAttention(2, dropout_rate=0.3, name="mha")
        return attention(rows, rows, deterministic=not train)


def linen_recurrent(rows: Array) -> Array:
    forward = nn.RNN(nn.LSTMCell(4, param_dtype=jnp.float64))
    backward = nn.RNN(nn.GRUCell(4, param_dtype=jnp.float64))
    return nn.Bidirectional(forward, backward)(rows[None])[0]


class LinenTied(nn.Module):
    def setup(self) -> None:
        self.embed = nn.Embed(5, WIDTH)

    def __call__(self, rows: Array) -> Array:
        return self.embed.attend(self.embed(jnp.array([0, 1, 2, 4])) + rows)


class LinenControl(nn.Module):
    control: Callable[[Any, Array], Array]

    @nn.compact
    def __call__(self, rows: Array) -> Array:
        block = LinenBlock(name="b")
        return block(rows) if self.is_initializing() else self.control(block, rows)


def linen_custom_vjp(block: Any, rows: Array) -> Array:
    def backward(pull_back: Any, arriving: Array) -> tuple[Any, Any]:
        params, inputs = pull_back(arriving)
        return jax.tree.map(jnp.sign, params), inputs

    return nn.custom_vjp(
        lambda module, rows: module(rows),
        forward_fn=lambda module, rows: nn.vjp(lambda module, rows: module(rows), module, rows),
        backward_fn=backward,
    )(block, rows)


class LinenShared(nn.Module):
    def setup(self) -> None:
        self.b = LinenBlock()
        self.s = LinenUser(self.b)
        self.t = LinenUser(LinenBlock())

    def __call__(self, rows: Array) -> Array:
        return self.s(rows) + self.t(rows) + self.b(rows)


class LinenUser(nn.Module):
    inner: nn.Module

    @nn.compact
    def __call__(self, rows: Array) -> Array:
        return self.inner(rows)


LSTM = [f"LSTMCell_0/{gate}" for gate in ("hi", "hf", "hg", "ho", "ii", "if", "ig", "io")]
LINEN: dict[str, tuple[nn.Module, list[str]]] = {
    "compact": (LinenNet(linen_compact), [*in_block("b0"), *in_block("b1"), "Dense_0", ".pair[0]", ".pair[1]", ".x"]),
    "setup": (LinenSetup(), [*in_block("blocks_0"), *in_block("blocks_1"), "heads_out", "head", ""]),
    "repeated": (LinenNet(linen_repeated), [*in_block("b"), *(f"{name}#2" for name in in_block("b")), ""]),
    "scan": (linen_scan(LinenNet), [*in_block("s/inner"), "s[0]", "s[1]", ""]),
    "scan of remat": (linen_scan(nn.remat(LinenNet)), [*in_block("s/inner"), "s[0]", "s[1]", ""]),
    "remat": (
        linen_lifted(nn.remat),
        [*in_block("b1"), *(f"{name}#2" for name in in_block("b1")), *in_block("b2"), ""],
    ),
    "jit": (linen_lifted(nn.jit), [*in_block("b1"), *(f"{name}#2" for name in in_block("b1")), *in_block("b2"), ""]),
    "vmap": (LinenNet(linen_vmap), [*in_block("b"), ""]),
    "cond": (
        LinenControl(lambda b, x: nn.cond(x.sum() > -100, lambda m, x: m(x), lambda m, x: m(x) * 2, b, x)),
        [*in_block("b"), ""],
    ),
    "custom_vjp": (LinenControl(linen_custom_vjp), [*in_block("b"), ""]),
    "sequential": (
        nn.Sequential([nn.Dense(4), nn.gelu, lambda rows: rows * 2, nn.Dense(WIDTH)]),
        ["layers_0", "layers_3", ""],
    ),
    "tied": (LinenTied(), ["embed", "embed.attend", ""]),
    "shared": (
        LinenShared(),
        [*in_block("b"), "s", *in_block("t/inner"), "t", *(f"{name}#2" for name in in_block("b")), ""],
    ),
}


@cache
def watch_linen(name: str) -> Traced:
    """Return the program of a module in Linen."""
    return watch_model(adapt(LINEN[name][0]), ROWS)[0]


@pytest.mark.parametrize("name", LINEN)
def test_linen_modules_are_seen_under_their_paths(name: str) -> None:
    assert modules_of(watch_linen(name)) == LINEN[name][1]


def test_linens_recurrent_cells_are_seen_by_step() -> None:
    traced, _ = watch_model(adapt(LinenNet(linen_recurrent)), ROWS)
    assert {*LSTM} <= {*modules_of(traced)}
    assert {traced.taps[name].steps for name in LSTM} == {4}
    assert {"LSTMCell_0.sigmoid", "RNN_0[0][1]", "RNN_1[1]", "Bidirectional_0"} <= traced.taps.keys()


def test_linens_batch_norm_and_dropout_in_both_modes() -> None:
    model = adapt(LinenNorm())
    traced, trained = watch_model(model, ROWS, training=True)
    assert [name for name in modules_of(traced) if "mha" not in name] == ["fc", "bn", "drop", ""]
    np.testing.assert_array_equal(trained.values["drop"], trained.values["bn"])
    check_mean(model, "bn/mean", trained, trained.values["fc"])
    assert "bn/scale" in model.trainable(draw_variables(model, ROWS))


class LinenMerged(nn.Module):
    """A module whose mode is given when it is made or when it is called, but not twice."""

    deterministic: bool | None = None

    @nn.compact
    def __call__(self, rows: jax.Array, deterministic: bool | None = None) -> jax.Array:
        """Return the rows, with dropout."""
        return nn.Dropout(0.5)(rows, nn.merge_param("deterministic", self.deterministic, deterministic))


@pytest.mark.parametrize("module", [LinenMerged(), LinenMerged(deterministic=True)])
def test_a_mode_that_a_linen_module_was_made_with_is_not_given_again(module: nn.Module) -> None:
    assert set(watch_model(adapt(module), ROWS, training=True)[0].taps) == {"Dropout_0", ""}


@pytest.mark.parametrize("attend", [nn.dot_product_attention, nnx.dot_product_attention])
def test_attention_that_a_model_calls_as_a_function_has_no_dropout(attend: Any) -> None:
    rows = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 2, 4)))
    with without_dropout():
        kept = attend(rows, rows, rows, dropout_rng=jax.random.key(0), dropout_rate=0.3, deterministic=False)
    plain = attend(rows, rows, rows, deterministic=True)  # for NNX a function of JAX's own, which rounds to float32
    np.testing.assert_allclose(kept, plain, rtol=0, atol=1e-6)
    dropped = attend(rows, rows, rows, dropout_rng=jax.random.key(0), dropout_rate=0.3, deterministic=False)
    assert np.abs(kept - dropped).max() > 0.1


def test_functions_between_linen_modules_have_the_scope_of_the_module() -> None:
    functions = [name for name, info in watch_linen("compact").taps.items() if info.kind == "function"]
    assert functions == ["b0.gelu", "b0.add", "b1.gelu", "b1.add", "sum"]


# Flax NNX


class NnxBlock(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.ln = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.fc1 = nnx.Linear(WIDTH, 8, rngs=rngs)
        self.fc2 = nnx.Linear(8, WIDTH, rngs=rngs)

    def __call__(self, rows: Array) -> Array:
        return rows + self.fc2(nnx.gelu(self.fc1(self.ln(rows))))


def nnx_blocks(rngs: nnx.Rngs) -> nnx.List[NnxBlock]:
    return nnx.List([NnxBlock(rngs) for _ in range(2)])


def nnx_parts(rngs: nnx.Rngs) -> nnx.Module:
    def function(net: Any, rows: Array) -> dict[str, Any]:
        for block in net.blocks:
            rows = block(rows)
        return {"x": rows, "y": (net.heads["u"](rows), rows.sum())}

    return NnxNet(function, blocks=nnx_blocks(rngs), heads=nnx.Dict(u=nnx.Linear(WIDTH, 3, rngs=rngs)))


def nnx_tied(rngs: nnx.Rngs) -> nnx.Module:
    first, last = NnxBlock(rngs), NnxBlock(rngs)
    last.fc1.kernel = first.fc1.kernel
    return NnxNet(lambda net, rows: net.b3(net.b2(net.b1(rows))), b1=first, b2=first, b3=last)


run_block = nnx.jit(lambda block, rows: block(rows))


def nnx_jit(rngs: nnx.Rngs) -> nnx.Module:
    def function(net: Any, rows: Array) -> Array:
        for block in net.blocks:
            rows = run_block(block, rows)
        return rows

    return NnxNet(function, blocks=nnx_blocks(rngs))


class NnxJitMethod(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.bn = nnx.BatchNorm(WIDTH, rngs=rngs)
        self.fc = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

    @nnx.jit
    def __call__(self, rows: Array) -> Array:
        return self.bn(self.fc(rows))


def nnx_jitted_methods(rngs: nnx.Rngs) -> nnx.Module:
    return NnxNet(lambda net, rows: net.y(net.x(rows)), x=NnxJitMethod(rngs), y=NnxJitMethod(rngs))


def nnx_scan(rngs: nnx.Rngs) -> nnx.Module:
    def function(net: Any, rows: Array) -> Array:
        scan = nnx.scan(lambda rows, block: block(rows), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        return scan(rows, net.layers)

    return NnxNet(function, layers=nnx.split_rngs(splits=3)(nnx.vmap(NnxBlock, in_axes=(0,), out_axes=0))(rngs))


def nnx_user(rngs: nnx.Rngs, use: Callable[..., Array]) -> nnx.Module:
    return NnxNet(lambda net, rows: use(net.b, rows), b=NnxBlock(rngs))


def nnx_over_axis_one(block: Any, rows: Array) -> Array:
    return nnx.vmap(lambda block, rows: block(rows), in_axes=(None, 0), out_axes=1)(block, rows)


def nnx_closures(block: Any, rows: Array) -> Array:
    return jax.jit(lambda rows: block(rows))(rows) + jax.checkpoint(lambda rows: block(rows))(rows)


def nnx_sequential(rngs: nnx.Rngs) -> nnx.Module:
    layers = nnx.Sequential(
        nnx.Linear(WIDTH, 4, rngs=rngs),
        nnx.relu,
        nnx.BatchNorm(4, momentum=0.9, rngs=rngs),
        nnx.Dropout(0.3, rngs=rngs),
        lambda rows: rows * 2,
        nnx.Linear(4, WIDTH, rngs=rngs),
    )
    return NnxNet(lambda net, rows: net.s(rows), s=layers)


class NnxScaled(nnx.Linear):
    def __call__(self, inputs: Array, out_sharding: Any = None) -> Array:
        return super().__call__(inputs) * 2


def nnx_inherits(rngs: nnx.Rngs) -> nnx.Module:
    scaled, embed = NnxScaled(WIDTH, WIDTH, rngs=rngs), nnx.Embed(5, WIDTH, rngs=rngs)
    return NnxNet(lambda net, rows: net.s(rows) + net.e.attend(rows).sum(), s=scaled, e=embed)


def nnx_library(rngs: nnx.Rngs) -> nnx.Module:
    attention = nnx.MultiHeadAttention(2, WIDTH, dropout_rate=0.2, decode=False, rngs=rngs)
    rnn = nnx.RNN(nnx.LSTMCell(WIDTH, WIDTH, param_dtype=jnp.float64, rngs=rngs))
    return NnxNet(lambda net, rows: net.rnn(net.mha(rows)[None])[0], mha=attention, rnn=rnn)


class NnxVae(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.enc, self.dec = NnxBlock(rngs), NnxBlock(rngs)

    def encode(self, rows: Array) -> Array:
        return self.enc(rows)

    @nnx.jit
    def decode(self, rows: Array) -> Array:
        return self.dec(rows)


def nnx_branches(model: Any, rows: Array) -> Array:
    return nnx.cond(
        rows.sum() > -100, lambda a, b, rows: a(rows), lambda a, b, rows: b(rows), model.enc, model.dec, rows
    )


RNN_CELL = [f"rnn/cell/{gate}" for gate in ("ii", "if_", "ig", "io", "hi", "hf", "hg", "ho")]
NNX: dict[str, tuple[Callable[[nnx.Rngs], Any], list[str]]] = {
    "parts": (nnx_parts, [*in_block("blocks/0"), *in_block("blocks/1"), "heads/u", ".x", ".y[0]", ".y[1]"]),
    "tied": (nnx_tied, [*in_block("b1"), *(f"{name}#2" for name in in_block("b1")), *in_block("b3"), ""]),
    "jit": (nnx_jit, [*in_block("blocks/0"), *in_block("blocks/1"), ""]),
    "jitted method": (nnx_jitted_methods, ["x/fc", "x/bn", "x", "y/fc", "y/bn", "y", ""]),
    "scan": (nnx_scan, [*in_block("layers"), ""]),
    "vmap": (lambda rngs: nnx_user(rngs, nnx_over_axis_one), [*in_block("b"), ""]),
    "remat": (lambda rngs: nnx_user(rngs, nnx.remat(lambda block, rows: block(rows))), [*in_block("b"), ""]),
    "closures": (
        lambda rngs: nnx_user(rngs, nnx_closures),
        [*in_block("b"), *(f"{name}#2" for name in in_block("b")), ""],
    ),
    "sequential": (nnx_sequential, ["s/layers/0", "s/layers/2", "s/layers/3", "s/layers/5", "s", ""]),
    "inherits": (nnx_inherits, ["s", "e.attend", ""]),
    "branches": (lambda rngs: (NnxVae(rngs), nnx_branches), [*in_block("dec"), *in_block("enc")]),
    "methods": (
        lambda rngs: (NnxVae(rngs), lambda model, rows: model.decode(model.encode(rows))),
        [*in_block("enc"), "encode", *in_block("dec"), "decode"],
    ),
}


@cache
def watch_nnx(name: str) -> tuple[Any, Traced, Sweep]:
    """Return what is given to the adapter of NNX, its program, and what its run gives."""
    given = NNX[name][0](nnx.Rngs(0))
    return given, *watch_model(adapt(given), ROWS)


@pytest.mark.parametrize("name", NNX)
def test_nnx_modules_are_seen_under_their_paths(name: str) -> None:
    given, traced, _ = watch_nnx(name)
    assert modules_of(traced) == NNX[name][1]
    module = given[0] if isinstance(given, tuple) else given
    assert not any("tap_path" in vars(part) for _, part in nnx.iter_modules(module))


def test_nnxs_attention_and_recurrent_cells_are_seen() -> None:
    traced, _ = watch_model(adapt(nnx_library(nnx.Rngs(0))), ROWS)
    assert {"mha/query", "mha/out", "mha", *RNN_CELL, "rnn", ""} <= {*modules_of(traced)}
    assert "mha.softmax" in traced.taps


@pytest.mark.parametrize("name", ["parts", "tied", "jit", "sequential", "inherits"])
def test_what_is_seen_in_an_nnx_model_is_what_nnx_captures_itself(name: str) -> None:
    module, _, result = watch_nnx(name)
    double = nnx.merge(nnx.graphdef(module), draw_variables(adapt(module), ROWS), copy=True)
    double.eval()
    _, captured = in_float64(nnx.capture(double, nnx.Intermediate, method_outputs=nnx.Intermediate))(ROWS)
    expected: dict[str, Any] = {}
    for place, variable in nnx.to_flat_state(captured):
        path = "/".join(map(str, place[:-1])) + (".attend" if place[0] == "e" else "")
        for count, output in enumerate(variable.get_value(), start=1):
            repeated = f"#{count}" if count > 1 else ""
            expected.update({path + repeated + part: leaf for part, leaf in name_leaves(output).items()})
    for tap, output in expected.items():
        np.testing.assert_allclose(result.values[tap], output, rtol=1e-13, atol=1e-14)


def test_nnxs_batch_norm_and_dropout_in_training_mode() -> None:
    model = adapt(nnx_sequential(nnx.Rngs(0)))
    _, trained = watch_model(model, ROWS, training=True)
    np.testing.assert_array_equal(trained.values["s/layers/3"], trained.values["s/layers/2"])
    check_mean(model, "s/layers/2/mean", trained, jax.nn.relu(trained.values["s/layers/0"]))
    variables = draw_variables(model, ROWS)
    doubled = jax.tree.map(lambda leaf: leaf * 2, model.params(variables))
    after = model.leaves(model.with_params(variables, doubled))
    np.testing.assert_array_equal(after["s/layers/0/kernel"], 2 * model.leaves(variables)["s/layers/0/kernel"])
    np.testing.assert_array_equal(after["s/layers/2/var"], model.leaves(variables)["s/layers/2/var"])


# Equinox


class EqxBlock(eqx.Module):
    ln: eqx.nn.LayerNorm
    fc1: eqx.nn.Linear
    fc2: eqx.nn.Linear
    act: Callable[[Array], Array]

    def __init__(self, key: Array) -> None:
        self.ln = eqx.nn.LayerNorm(WIDTH)
        self.fc1 = eqx.nn.Linear(WIDTH, 8, key=key)
        self.fc2 = eqx.nn.Linear(8, WIDTH, key=key)
        self.act = jax.nn.gelu

    def __call__(self, row: Array) -> Array:
        return row + self.fc2(self.act(self.fc1(self.ln(row))))


class EqxParts(eqx.Module):
    layers: list[Any]
    heads: dict[str, Any]
    pair: tuple[Any, None]

    def __init__(self, key: Array) -> None:
        self.layers = [EqxBlock(key), EqxBlock(key), lambda row: row * 2]
        self.heads = {"u": eqx.nn.Linear(WIDTH, 3, key=key)}
        self.pair = (EqxBlock(key), None)

    def __call__(self, row: Array) -> dict[str, Any]:
        for layer in self.layers:
            row = layer(row)
        return {"x": row, "y": (self.heads["u"](row), self.pair[0](row))}


class EqxDoubled(EqxBlock):
    def __init__(self, key: Array) -> None:
        super().__init__(key)

    def __call__(self, row: Array) -> Array:
        return super().__call__(row) * 2


class EqxJit(eqx.Module):
    layers: list[EqxDoubled]

    def __init__(self, key: Array) -> None:
        self.layers = [EqxDoubled(key), EqxDoubled(key)]

    def __call__(self, row: Array) -> Array:
        for layer in self.layers:
            row = eqx.filter_jit(layer)(row)
        return eqx.filter_checkpoint(self.layers[0])(row)


class EqxScan(eqx.Module):
    layers: EqxBlock

    def __init__(self, key: Array) -> None:
        self.layers = eqx.filter_vmap(EqxBlock)(jax.random.split(key, 3))

    def __call__(self, row: Array) -> Array:
        arrays, rest = eqx.partition(self.layers, eqx.is_array)
        return lax.scan(lambda row, layer: (eqx.combine(layer, rest)(row), None), row, arrays)[0]


class EqxLibrary(eqx.Module):
    s: eqx.nn.Sequential
    mha: eqx.nn.MultiheadAttention
    lstm: eqx.nn.LSTMCell

    def __init__(self, key: Array) -> None:
        parts: list[Any] = [eqx.nn.Linear(WIDTH, WIDTH, key=key), eqx.nn.Lambda(jax.nn.relu), eqx.nn.Dropout(0.3)]
        self.s = eqx.nn.Sequential(parts)
        self.mha = eqx.nn.MultiheadAttention(2, WIDTH, dropout_p=0.2, key=key)
        self.lstm = eqx.nn.LSTMCell(WIDTH, 4, key=key)

    def __call__(self, row: Array, *, key: Array | None = None) -> Any:
        row = self.s(row, key=key)
        rows = row * jnp.arange(1.0, 4)[:, None]
        return self.lstm(self.mha(rows, rows, rows, key=key)[0], (jnp.zeros(4), jnp.ones(4)))


class EqxTied(eqx.Module):
    shared: eqx.nn.Shared

    def __init__(self, key: Array) -> None:
        embed, linear = eqx.nn.Embedding(7, WIDTH, key=key), eqx.nn.Linear(WIDTH, 7, use_bias=False, key=key)
        self.shared = eqx.nn.Shared((embed, linear), where=lambda pair: pair[1].weight, get=lambda pair: pair[0].weight)

    def __call__(self, row: Array) -> Array:
        embed, linear = self.shared()
        return linear(embed(jnp.array(2)) + row)


class EqxStrict(eqx.Module, strict=True):
    fc: eqx.nn.Linear

    def __init__(self, key: Array) -> None:
        self.fc = eqx.nn.Linear(WIDTH, 8, key=key)

    def __call__(self, row: Array) -> Array:
        return self.fc(row)


class EqxVae(eqx.Module):
    enc: EqxBlock
    dec: EqxBlock

    def __init__(self, key: Array) -> None:
        self.enc, self.dec = EqxBlock(key), EqxBlock(key)

    def encode(self, row: Array) -> Array:
        return self.enc(row)

    def decode(self, row: Array) -> Array:
        return self.dec(row)


def eqx_decode(model: Any, rows: Array) -> Array:
    return jax.vmap(lambda row: model.decode(eqx.filter_jit(model.encode)(row)))(rows)


EQX: dict[str, tuple[Callable[[Array], Any], list[str]]] = {
    "parts": (
        EqxParts,
        [*in_block("layers/0"), *in_block("layers/1"), "heads/u", *in_block("pair/0"), ".x", ".y[0]", ".y[1]"],
    ),
    "jit": (
        EqxJit,
        [*in_block("layers/0"), *in_block("layers/1"), *(f"{name}#2" for name in in_block("layers/0")), ""],
    ),
    "scan": (EqxScan, [*in_block("layers"), ""]),
    "strict": (EqxStrict, ["fc", ""]),
    "tied": (EqxTied, ["shared/pytree/0", "shared/pytree/1", ""]),
    "methods": (
        lambda key: (EqxVae(key), eqx_decode),
        [*in_block("enc"), "encode", *in_block("dec"), "decode"],
    ),
    "function": (
        lambda key: (EqxStrict(key), lambda model, rows: jnp.sin(jax.vmap(model)(rows))),
        ["fc", ""],
    ),
}


@pytest.mark.parametrize("name", EQX)
def test_equinox_modules_are_seen_under_their_paths_and_single_examples_are_mapped(name: str) -> None:
    make, names = EQX[name]
    model = adapt(make(KEY))
    assert model.library == "Equinox"
    traced, result = watch_model(model, ROWS)
    assert modules_of(traced) == names
    assert jax.tree.leaves(result.outputs)[0].shape[0] == len(ROWS)


@pytest.mark.parametrize("training", [False, True])
def test_equinoxs_own_layers_are_seen_in_both_modes(training: bool) -> None:
    traced, _ = watch_model(adapt(EqxLibrary(KEY)), ROWS, training=training)
    names = {"s/layers/0", "s/layers/1", "s/layers/2", "s", "mha/query_proj", "mha/dropout", "mha", "lstm[0]", "[1]"}
    assert names <= {*modules_of(traced)}


class EqxNorm(eqx.Module):
    s: eqx.nn.Sequential
    fc: eqx.nn.Linear

    def __init__(self, key: Array) -> None:
        norm = eqx.nn.BatchNorm(WIDTH, "rows", mode="ema", momentum=0.9)
        self.s = eqx.nn.Sequential([eqx.nn.Linear(WIDTH, WIDTH, key=key), norm, eqx.nn.Lambda(jax.nn.relu)])
        self.fc = eqx.nn.Linear(WIDTH, 3, key=key)

    def __call__(self, row: Array, state: eqx.nn.State) -> tuple[Array, eqx.nn.State]:
        row, state = self.s(row, state)
        return self.fc(row), state


def eqx_with_state(variables: Any, rows: Array) -> Any:
    model, state = variables
    return jax.vmap(model, axis_name="rows", in_axes=(0, None), out_axes=(0, None))(rows, state)


def eqx_with_variables(variables: Any, rows: Array) -> Any:
    outputs, state = eqx_with_state(variables, rows)
    return outputs, (variables[0], state)


@pytest.mark.parametrize("function", [None, eqx_with_state, eqx_with_variables])
def test_equinoxs_batch_norm_has_its_state_among_the_leaves(function: Any) -> None:
    made = eqx.nn.make_with_state(EqxNorm)(KEY)
    model = adapt(made if function is None else (made, function))
    traced, trained = watch_model(model, ROWS, training=True)
    assert modules_of(traced) == ["s/layers/0", "s/layers/1", "s/layers/2", "s", "fc", ""]
    check_mean(model, "s/layers/1/ema_state_index/0", trained, trained.values["s/layers/0"])
    doubled = jax.tree.map(lambda leaf: leaf * 2, model.params(made))
    after = model.leaves(model.with_params(made, doubled))
    np.testing.assert_array_equal(after["fc/weight"], 2 * model.leaves(made)["fc/weight"])


class EqxBatches(eqx.Module):
    norm: eqx.nn.BatchNorm

    def __call__(self, row: Array, state: eqx.nn.State) -> tuple[Array, eqx.nn.State]:
        return self.norm(row, state)


def test_equinoxs_batch_norm_that_counts_its_batches_is_that_of_pytorch_but_for_the_variance() -> None:
    made = eqx.nn.make_with_state(lambda: EqxBatches(eqx.nn.BatchNorm(WIDTH, "rows", mode="batch", momentum=0.9)))()
    pair = Pair(network(norm=torch.nn.BatchNorm1d(WIDTH)), made, ROWS, {"norm": "norm"}, batch_sizes=(8,))
    result = examine(pair, names=("parameters", "tables", "outputs", "statistics"))
    assert {"tables", "outputs"} <= set(result.passed), result.divergences
    (found,) = result.divergences
    assert (found.check, found.where.partition(" ")[0]) == ("statistics", "norm.running_var")


class EqxOwnNorm(eqx.Module):
    """A layer and a user's own batch norm, which keeps its statistics in float32."""

    fc: eqx.nn.Linear
    statistics: eqx.nn.StateIndex[Any]
    inference: bool = False

    def __call__(self, row: Array, state: eqx.nn.State) -> tuple[Array, eqx.nn.State]:
        row, (mean, variance), size = self.fc(row), state.get(self.statistics), len(ROWS)
        if not self.inference:
            kept, mean = (mean, variance), lax.pmean(row, "batch")
            variance = lax.pmean((row - mean) ** 2, "batch")
            new = mean, variance * size / (size - 1)
            after = [(0.9 * old + 0.1 * own).astype(jnp.float32) for old, own in zip(kept, new, strict=True)]
            state = state.set(self.statistics, tuple(after))
        return (row - mean) / jnp.sqrt(variance + 1e-5), state


def test_a_state_of_a_users_own_in_float32_is_taken_in_training() -> None:
    statistics = eqx.nn.StateIndex((jnp.zeros(WIDTH, jnp.float32), jnp.ones(WIDTH, jnp.float32)))
    made = eqx.nn.make_with_state(lambda: EqxOwnNorm(eqx.nn.Linear(WIDTH, WIDTH, key=KEY), statistics))()
    reference = network(fc=torch.nn.Linear(WIDTH, WIDTH), norm=torch.nn.BatchNorm1d(WIDTH, affine=False))
    pair = Pair(reference, made, ROWS, batch_sizes=(len(ROWS),))
    assert not examine(pair, names=("parameters", "outputs", "trajectory")).divergences


class EqxKeyed(eqx.Module):
    """A model whose call needs a key and its mode."""

    fc: eqx.nn.Linear
    drop: eqx.nn.Dropout

    def __init__(self) -> None:
        self.fc, self.drop = eqx.nn.Linear(WIDTH, WIDTH, key=KEY), eqx.nn.Dropout(0.5)

    def __call__(self, row: Array, *, key: Array, inference: bool) -> Array:
        return self.drop(self.fc(row), key=key, inference=inference)


class EqxJitted(EqxKeyed):
    """A model that is compiled by JAX itself."""

    def __init__(self) -> None:
        super().__init__()

    @jax.jit
    def __call__(self, row: Array, *, key: Array) -> Array:
        return self.drop(self.fc(row), key=key, inference=True)


@pytest.mark.parametrize("model", [EqxKeyed(), EqxJitted()])
def test_an_equinox_model_gets_the_keyword_arguments_that_it_takes_while_it_is_watched(model: eqx.Module) -> None:
    assert modules_of(watch_model(adapt(model), ROWS)[0]) == ["fc", "drop", ""]


def test_an_equinox_model_is_seen_in_a_plain_function_that_makes_it() -> None:
    module = EqxParts(KEY)
    arrays, rest = eqx.partition(module, eqx.is_array)
    leaves = jax.tree.leaves(arrays)

    def function(variables: Any, rows: Array) -> Any:
        return jax.vmap(eqx.combine(jax.tree.unflatten(jax.tree.structure(arrays), variables), rest))(rows)

    model = adapt((leaves, function))
    assert model.library == "function"
    traced, _ = watch_model(model, ROWS)
    assert modules_of(traced) == EQX["parts"][1]


# Haiku


class HkBlock(hk.Module):
    def __call__(self, rows: Array) -> Array:
        hidden = hk.Linear(8, name="fc1")(hk.LayerNorm(-1, True, True, name="ln")(rows))
        return rows + hk.Linear(WIDTH, name="fc2")(jax.nn.gelu(hidden))


class HkReuse(hk.Module):
    def __init__(self, name: str | None = None) -> None:
        super().__init__(name)
        self.b = HkBlock(name="b")

    def encode(self, rows: Array) -> Array:
        return self.b(rows)

    def __call__(self, rows: Array) -> Array:
        return self.b(self.encode(rows))


def hk_once(transform: Callable[..., Array]) -> Callable[[Array], Array]:
    """Return a function that calls a block in a transformation, but plainly while its weights are made."""

    def function(rows: Array) -> Array:
        block = HkBlock(name="b")
        return block(rows) if hk.running_init() else transform(block, rows)

    return function


def hk_branches(rows: Array) -> Array:
    low, high = HkBlock(name="low"), HkBlock(name="high")
    if hk.running_init():
        return low(rows) + high(rows)
    return hk.cond(rows.sum() > -100, low, high, rows)


def hk_norm(rows: Array, is_training: bool) -> Array:
    rows = hk.BatchNorm(True, True, 0.9, name="bn")(hk.Linear(WIDTH, name="fc")(rows), is_training)
    return dropout(hk.next_rng_key(), 0.3 * is_training, hk.dropout(hk.next_rng_key(), 0.3 * is_training, rows))


HAIKU: dict[str, tuple[Callable[..., Any], list[str]]] = {
    "repeated": (
        lambda rows: (HkBlock()(rows), HkBlock()(rows)),
        [*in_block("hk_block"), *in_block("hk_block_1")],
    ),
    "reuse": (
        lambda rows: HkReuse(name="r")(rows),
        [*in_block("r/~/b"), "r.encode", *(f"{name}#2" for name in in_block("r/~/b")), "r"],
    ),
    "remat": (lambda rows: hk.remat(HkBlock(name="b"))(rows), in_block("b")),
    "jit": (hk_once(lambda block, rows: jax.jit(block)(rows)), in_block("b")),
    "scan": (
        hk_once(lambda block, rows: hk.scan(lambda c, _: (block(c), None), rows, None, length=3)[0]),
        in_block("b"),
    ),
    "fori_loop": (hk_once(lambda block, rows: hk.fori_loop(0, 3, lambda i, c: block(c), rows)), in_block("b")),
    "layer_stack": (
        lambda rows: hk.experimental.layer_stack(3)(lambda rows: HkBlock(name="b")(rows))(rows),
        in_block("b"),
    ),
    "vmap": (lambda rows: hk.vmap(lambda row: HkBlock(name="b")(row), split_rng=False)(rows), in_block("b")),
    "cond": (hk_branches, [*in_block("high"), *in_block("low")]),
    "sequential": (
        lambda rows: hk.Sequential([hk.Linear(4), jax.nn.relu, hk.Flatten()])(rows),
        ["linear", "flatten", "sequential"],
    ),
}


@pytest.mark.parametrize("name", HAIKU)
def test_haiku_modules_are_seen_under_their_paths(name: str) -> None:
    function, names = HAIKU[name]
    model = adapt(hk.transform(function))
    traced, _ = watch_model(model, ROWS)
    assert modules_of(traced) == names


def test_haikus_batch_norm_and_dropout_in_both_modes() -> None:
    model = adapt(hk.transform_with_state(hk_norm))
    traced, trained = watch_model(model, ROWS, training=True)
    assert modules_of(traced) == ["fc", "bn"]
    np.testing.assert_array_equal(trained.outputs[0], trained.values["bn"])
    check_mean(model, "bn/~/mean_ema/hidden", trained, trained.values["fc"])
    assert model.trainable(draw_variables(model, ROWS)) == {"fc/w", "fc/b", "bn/scale", "bn/offset"}


def test_haikus_attention_and_recurrence_are_seen() -> None:
    def function(rows: Array) -> Array:
        initial = hk.initializers.VarianceScaling()
        rows = hk.MultiHeadAttention(2, 3, w_init=initial, name="mha")(rows[None], rows[None], rows[None])[0]
        lstm = hk.LSTM(WIDTH, name="lstm")
        return hk.dynamic_unroll(lstm, rows[:, None], lstm.initial_state(1))[0]

    traced, _ = watch_model(adapt(hk.without_apply_rng(hk.transform(function))), ROWS)
    assert {"mha/query", "mha", "lstm/linear", "lstm[0]"} <= {*modules_of(traced)}
    assert traced.taps["lstm/linear"].steps == 4


# Plain functions


def plain(variables: Any, rows: Array, train: bool = False) -> Any:
    hidden = checkpoint_name(rows @ variables["layers"][0]["w"] + variables["layers"][0]["b"], "hidden")
    return jnp.tanh(hidden) * (2.0 if train else 1.0)


def test_a_plain_function_has_the_nest_that_the_paths_build_and_its_named_values_as_taps() -> None:
    model = adapt(plain)
    leaves = {"layers/0/w": np.eye(WIDTH), "layers/0/b": np.ones(WIDTH)}
    variables = model.with_leaves(None, leaves)
    assert isinstance(variables["layers"], list)
    assert model.leaves(variables).keys() == model.trainable(variables) == leaves.keys()
    model = model._replace(variables=variables)
    traced, trained = watch_model(model, ROWS, training=True)
    assert {name: info.kind for name, info in traced.taps.items()} == {
        "matmul": "function",
        "add": "function",
        "hidden": "checkpoint_name",
        "tanh": "function",
        "mul": "function",
    }
    drawn = model.leaves(draw_variables(model, ROWS))
    expected = 2 * np.tanh(ROWS @ drawn["layers/0/w"] + drawn["layers/0/b"])
    np.testing.assert_allclose(trained.outputs[0], expected, rtol=1e-12)


def test_a_linen_model_inside_a_function_is_seen_and_its_collections_are_known() -> None:
    module = LinenNorm()
    variables = draw_variables(adapt(module), ROWS)

    def function(variables: Any, rows: Array, train: bool) -> Any:
        if not train:
            return module.apply(variables, rows, False)
        outputs, updates = module.apply(variables, rows, True, mutable=["batch_stats"])
        return outputs, {**variables, **updates}

    model = adapt(function)._replace(variables=variables)
    traced, trained = watch_model(model, ROWS, training=True)
    assert "bn" in traced.taps
    assert np.abs(trained.outputs[1]["bn/mean"] - variables["batch_stats"]["bn"]["mean"]).max() > 0.01
    assert "bn/mean" not in model.trainable(variables)


def test_a_cell_whose_carry_changes_its_dtype_is_refused_by_its_own_library() -> None:
    with pytest.raises(TypeError, match="carry"):
        watch_model(adapt(LinenNet(lambda rows: nn.RNN(nn.LSTMCell(4))(rows[None])[0])), ROWS)


def haiku_linear(rows: Array) -> Array:
    return hk.Linear(WIDTH)(rows)


def initialised(transformed: Any) -> tuple[Any, Any]:
    return transformed.init(KEY, ROWS), transformed


IN_TWO_PARTS: dict[str, Callable[[], Any]] = {
    "linen": lambda: (nn.Dense(WIDTH).init(KEY, ROWS), nn.Dense(WIDTH)),
    "linen's parameters": lambda: (nn.Dense(WIDTH).init(KEY, ROWS)["params"], nn.Dense(WIDTH)),
    "nnx": lambda: nnx.split(nnx.Linear(WIDTH, WIDTH, rngs=nnx.Rngs(0))),
    "equinox": lambda: eqx.partition(eqx.nn.Linear(WIDTH, WIDTH, key=KEY), eqx.is_array),
    "haiku": lambda: initialised(hk.transform(haiku_linear)),
    "haiku with state": lambda: initialised(hk.transform_with_state(haiku_linear)),
}


@pytest.mark.parametrize("library", IN_TWO_PARTS)
def test_a_model_in_two_parts_is_put_together(library: str) -> None:
    pair = Pair(torch.nn.Linear(WIDTH, WIDTH), IN_TWO_PARTS[library](), ROWS)
    assert not examine(pair, names=("outputs",)).divergences


def test_what_is_no_model_or_no_leaf_is_refused() -> None:
    with pytest.raises(Refused, match="the JAX model is a dict"):
        adapt({"w": ROWS})
    with pytest.raises(Refused, match="variables hold PyTorch's tensors: give arrays"):
        adapt(({"w": torch.ones(2)}, lambda tree, rows: rows @ tree["w"]))
    model = adapt(EqxStrict(KEY))
    with pytest.raises(Refused, match="no leaf fc/kernal"):
        model.with_leaves(model.variables, {"fc/kernal": ROWS})


# Paths that are dropped, in layers of a port's own


def keep(key: Array, rows: Array, rate: float) -> Array:
    return rows * jax.random.bernoulli(key, 1 - rate, (len(rows), 1)) / (1 - rate)


class LinenDropPath(nn.Module):
    rate: float = 0.5

    @nn.compact
    def __call__(self, rows: Array, train: bool) -> Array:
        key = self.make_rng("droppath")  # a stream of any name, asked for where nothing is drawn too
        return nn.Dense(WIDTH, name="fc")(keep(key, rows, self.rate) if train else rows)


class NnxDropPath(nnx.Module):
    def __init__(self) -> None:
        self.drop_prob, self.rngs = 0.5, nnx.Rngs(0)
        self.fc = nnx.Linear(WIDTH, WIDTH, rngs=self.rngs)

    def __call__(self, rows: Array, train: bool) -> Array:
        return self.fc(keep(self.rngs.drop(), rows, self.drop_prob) if train else rows)


class EqxDropPath(eqx.Module):
    p: float = eqx.field(static=True, default=0.5)

    def __call__(self, row: Array, key: Array, train: bool) -> Array:
        return row * jax.random.bernoulli(key, 1 - self.p) / (1 - self.p) if train else row


class EqxPath(eqx.Module):
    fc: eqx.nn.Linear
    path: EqxDropPath

    def __call__(self, row: Array, *, key: Array, train: bool) -> Array:
        return self.fc(self.path(row, key, train))


@pytest.mark.parametrize(
    "port", [LinenDropPath(), NnxDropPath(), EqxPath(eqx.nn.Linear(WIDTH, WIDTH, key=KEY), EqxDropPath())]
)
def test_a_path_that_a_port_drops_by_a_layer_of_its_own_is_kept_in_training(port: Any) -> None:
    reference = torch.nn.Sequential(StochasticDepth(0.5, "row"), torch.nn.Linear(WIDTH, WIDTH))
    result = examine(Pair(reference, port, ROWS, training=True, batch_sizes=(4,)), names=("parameters", "outputs"))
    assert result.passed == ["parameters", "outputs"]
    assert [comparison.training for comparison in result.comparisons] == [False, True]

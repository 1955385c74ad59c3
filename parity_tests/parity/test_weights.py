"""Each layer's rule gives equal outputs on both sides, and maps are complete, differentiable and reversible."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import equinox as eqx
import haiku as hk
import jax
import numpy as np
import pytest
import torch
from flax import linen, nnx
from flax.traverse_util import unflatten_dict
from jax import lax
from jax import numpy as jnp
from torch import nn

from experiments.large_ports import Conv1D
from parity_tests.harness import Pair, examine
from parity_tests.harness.capture import Case, distance, exact_arithmetic
from parity_tests.harness.pair import load_tensors
from parity_tests.harness.weights import (
    CannotCarry,
    Entry,
    Layer,
    NoInverse,
    Rule,
    WeightMap,
    check_complete,
    conv_transpose,
    declare,
    from_function,
    joined,
    linear,
    lstm,
    qkv,
    unused,
)
from parity_tests.parity.networks import LinenNet, TorchNet, network, tokens, values

KEY = jax.random.key(0)
FEATURES, HIDDEN, TIME = 3, 4, 5
SAME = 1e-12  # relative distance of the outputs in float64


# Nested dictionaries of leaves given by path.
nest: Callable[[Mapping[str, Any]], dict[str, Any]] = partial(unflatten_dict, sep="/")


def flatten(tree: Any) -> dict[str, Any]:
    """Return the leaves of a tree by path."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        "/".join(str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", k)))) for k in path): leaf
        for path, leaf in leaves
    }


def tensors_of(module: nn.Module) -> dict[str, np.ndarray]:
    """Return the state dict as NumPy arrays."""
    return {name: value.detach().numpy().copy() for name, value in module.state_dict().items()}


def error_of(case: Case, weights: WeightMap | None = None) -> float:
    """Return how far the outputs of both sides are apart in float64 with this map, relative to their size."""
    with exact_arithmetic("float64"):
        return distance(case, weights or case.weight_map)


# One layer called `layer` in each library.


def first_output(net: Any, *inputs: torch.Tensor) -> torch.Tensor:
    """Compute the first output of the network's only layer."""
    outputs = net.layer(*inputs)
    return outputs[0] if isinstance(outputs, tuple) else outputs


def pair(layer: nn.Module, jax_model: Any, inputs: Any, rule: Rule | str = "layer") -> Pair:
    """Return the pair of a layer of PyTorch's and a model, on random inputs of a shape or like these inputs."""
    example = values(*inputs) if isinstance(inputs[0], int) else inputs
    return Pair(TorchNet(first_output, layer=layer), jax_model, example, {"layer": rule}, batch_sizes=(2,))


def in_linen(make: Callable[..., Any], *sizes: Any, **options: Any) -> linen.Module:
    """Return a layer of Linen with these sizes and options."""
    return LinenNet(lambda *inputs: make(*sizes, **options, name="layer")(*inputs))


def in_nnx(make: Callable[..., Any], *sizes: Any, **options: Any) -> Any:
    """Return a layer of NNX with these sizes and options, and how it is called."""
    net = nnx.Dict(layer=make(*sizes, **options, rngs=nnx.Rngs(0)))
    return net, lambda net, *inputs: net["layer"](*inputs)


def in_equinox(layer: Any) -> Any:
    """Return a layer of Equinox, which takes one example at a time, and how it is called."""
    return {"layer": layer}, lambda net, *inputs: jax.vmap(net["layer"])(*inputs)


def in_haiku(make: Callable[..., Any], *sizes: Any, **options: Any) -> Any:
    """Return a layer of Haiku with these sizes and options."""
    return hk.transform(lambda *inputs: make(*sizes, **options, name="layer")(*inputs))


def batch_norm_in_haiku() -> Pair:
    def function(x: Any, is_training: bool) -> Any:
        return hk.BatchNorm(True, True, 0.9, name="layer")(x, is_training)

    return pair(nn.BatchNorm2d(4), hk.transform_with_state(function), (2, 4, 5, 6))


def depthwise_as_in_keras() -> tuple[Any, Any]:
    """Return a convolution of each channel alone, whose kernel is [row, column, in, out / in]."""

    def run(tree: Any, x: Any) -> Any:
        kernel, axes = tree["layer"]["kernel"].reshape(3, 3, 1, 8), ("NHWC", "HWIO", "NHWC")
        y = lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=axes, feature_group_count=4)
        return y + tree["layer"]["bias"]

    return {"layer": {"kernel": jnp.zeros((3, 3, 4, 2)), "bias": jnp.zeros(8)}}, run


# Recurrent layers over [batch, time, feature]


def recurrent(kind: Callable[..., nn.Module], jax_model: Any, rule: Rule | str = "layer", **options: Any) -> Pair:
    """Return the pair of a recurrent layer."""
    return pair(kind(FEATURES, HIDDEN, batch_first=True, **options), jax_model, (2, TIME, FEATURES), rule)


def linen_rnn(cell: Any) -> linen.Module:
    """Return what runs a cell of Linen over a sequence."""
    return LinenNet(lambda x: linen.RNN(cell(HIDDEN, name="layer"))(x))


def nnx_rnn(cell: Any) -> Any:
    """Return what runs a cell of NNX over a sequence."""
    net = nnx.Dict(layer=cell(FEATURES, HIDDEN, rngs=nnx.Rngs(0)))
    return net, lambda net, x: nnx.RNN(net["layer"], rngs=nnx.Rngs(0))(x)


def equinox_rnn(cell: Any, states: int) -> Any:
    """Return what runs a cell of Equinox, which has one or two states, over a sequence."""

    def run(net: Any, x: Any) -> Any:
        def step(state: Any, frame: Any) -> Any:
            state = jax.vmap(net["layer"])(frame, state)
            return state, state[0] if states == 2 else state

        zeros = jnp.zeros((len(x), HIDDEN), x.dtype)
        outputs = jax.lax.scan(step, (zeros, zeros) if states == 2 else zeros, jnp.swapaxes(x, 0, 1))[1]
        return jnp.swapaxes(outputs, 0, 1)

    return {"layer": cell(FEATURES, HIDDEN, key=KEY)}, run


def haiku_rnn(cell: Any) -> Any:
    """Return what runs a cell of Haiku over a sequence."""

    def function(x: Any) -> Any:
        core = cell(HIDDEN, name="layer")
        return hk.dynamic_unroll(core, x, core.initial_state(len(x)), time_major=False)[0]

    return hk.transform(function)


def lstm_with_a_projection() -> Pair:
    """Return a port whose cell packs its gates, beside a layer behind it."""

    def run(tree: Any, xs: Any) -> Any:
        cell, project = tree["cell"], tree["proj"]["kernel"]

        def step(carry: Any, x: Any) -> Any:
            state, memory = carry
            i, f, g, o = jnp.split(x @ cell["w_ih"] + state @ cell["w_hh"] + cell["bias"], 4, -1)
            memory = jax.nn.sigmoid(f) * memory + jax.nn.sigmoid(i) * jnp.tanh(g)
            state = (jax.nn.sigmoid(o) * jnp.tanh(memory)) @ project
            return (state, memory), state

        start = jnp.zeros((len(xs), 2), xs.dtype), jnp.zeros((len(xs), HIDDEN), xs.dtype)
        return jnp.swapaxes(lax.scan(step, start, jnp.swapaxes(xs, 0, 1))[1], 0, 1)

    sizes = {"w_ih": (FEATURES, 4 * HIDDEN), "w_hh": (2, 4 * HIDDEN), "bias": (4 * HIDDEN,)}
    tree = {"cell": {name: jnp.zeros(size) for name, size in sizes.items()}, "proj": {"kernel": jnp.zeros((HIDDEN, 2))}}
    return replace(recurrent(nn.LSTM, (tree, run), proj_size=2), weights=None)


def lstm_of_two_layers_and_directions_in_linen() -> Pair:
    def layers(x: Any) -> Any:
        for layer in range(2):
            names = f"forward_{layer}", f"backward_{layer}"
            forward, backward = (linen.RNN(linen.OptimizedLSTMCell(HIDDEN, name=name)) for name in names)
            x = jnp.asarray(linen.Bidirectional(forward, backward)(x))
        return x

    return recurrent(nn.LSTM, LinenNet(layers), "", num_layers=2, bidirectional=True)


def lstm_with_another_order_of_gates() -> Pair:
    def run(leaves: Any, x: Any) -> Any:
        def step(state: Any, frame: Any) -> Any:
            h, c = state
            gates = frame @ leaves["w_ih"] + h @ leaves["w_hh"] + leaves["b_ih"] + leaves["b_hh"]
            i, f, o, g = jnp.split(gates, 4, axis=-1)
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            h = jax.nn.sigmoid(o) * jnp.tanh(c)
            return (h, c), h

        zeros = jnp.zeros((len(x), HIDDEN), x.dtype)
        return jnp.swapaxes(jax.lax.scan(step, (zeros, zeros), jnp.swapaxes(x, 0, 1))[1], 0, 1)

    shapes = {
        "w_ih": (FEATURES, 4 * HIDDEN),
        "w_hh": (HIDDEN, 4 * HIDDEN),
        "b_ih": (4 * HIDDEN,),
        "b_hh": (4 * HIDDEN,),
    }
    model = {name: jnp.zeros(shape) for name, shape in shapes.items()}, run
    return recurrent(nn.LSTM, model, Rule(lstm("x", order="ifog").carry, ("",)))


def attention(jax_model: Any) -> Pair:
    """Return the pair of attention with two heads."""
    return pair(nn.MultiheadAttention(6, 2, batch_first=True), jax_model, (values(2, TIME, 6),) * 3)


def attention_with_other_sizes_of_keys_and_values_in_linen() -> Pair:
    inputs = values(2, TIME, 6), values(2, 4, 3), values(2, 4, 5)
    port = in_linen(linen.MultiHeadDotProductAttention, 2, out_features=6, qkv_features=6)
    return pair(nn.MultiheadAttention(6, 2, kdim=3, vdim=5, batch_first=True), port, inputs)


def three_layers(*sizes: Any) -> linen.Module:
    """Return three dense layers beside each other in Linen, of these features, their outputs joined."""

    def three(x: Any) -> Any:
        layers = [linen.DenseGeneral(size, name=name)(x) for name, size in zip("qkv", sizes, strict=True)]
        return jnp.concatenate([layer.reshape(len(x), -1) for layer in layers], axis=-1)

    return LinenNet(three)


class Stack(linen.Module):
    """Three kernels in one leaf [3, in, out, …], the outputs joined."""

    shape: tuple[int, ...]

    @linen.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Compute the outputs."""
        kernel = self.param("kernel", linen.initializers.zeros, self.shape)
        bias = self.param("bias", linen.initializers.zeros, (3, *self.shape[2:]))
        return (jnp.einsum("bi,pi...->bp...", x, kernel) + bias).reshape(len(x), -1)


def three_torch_layers() -> nn.Module:
    """Return three linear layers whose outputs are joined."""
    layers = {name: nn.Linear(6, 4) for name in "qkv"}
    return TorchNet(lambda net, x: torch.cat([net.q(x), net.k(x), net.v(x)], dim=-1), **layers)


def head_by_head(outputs: Any) -> Any:
    """Return queries, keys and values [batch, 3, head, feature], flat, with the heads first."""
    return outputs.reshape(len(outputs), 3, 2, -1).swapaxes(1, 2).reshape(len(outputs), -1)


def layers_stacked_by_a_scan() -> Pair:
    def block(x: Any, _: None) -> Any:
        return linen.tanh(linen.Dense(6, name="fc")(linen.LayerNorm(epsilon=1e-5, name="norm")(x))), None

    def scanned(x: Any) -> Any:
        scan = linen.scan(LinenNet, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return scan(block, name="layers")(x, None)[0]

    blocks = [network(norm=nn.LayerNorm(6), fc=nn.Linear(6, 6), tanh=nn.Tanh()) for _ in range(3)]
    return Pair(nn.Sequential(*blocks), LinenNet(scanned), values(2, 6), {"{i}": "layers"}, batch_sizes=(2,))


def linear_behind_a_flatten() -> Pair:
    port = LinenNet(lambda x: linen.Dense(7, name="layer")(x.reshape(len(x), -1)))
    reference = nn.Sequential(nn.Flatten(), nn.Linear(60, 7))
    return Pair(reference, port, values(2, 3, 4, 5), {"1": linear("layer", flatten=(3, 4, 5))}, batch_sizes=(2,))


UP = {"kernel_size": (3, 3), "strides": (2, 2), "padding": "VALID"}  # of a transposed convolution in Linen
BIASES = dict.fromkeys(("use_query_bias", "use_key_bias", "use_value_bias", "use_output_bias"), True)

LAYERS: dict[str, Callable[[], Pair]] = {
    # Linear layers
    "linear_in_linen": lambda: pair(nn.Linear(6, 4), in_linen(linen.Dense, 4), (2, 6)),
    "linear_without_bias_in_nnx": lambda: pair(
        nn.Linear(6, 4, bias=False), in_nnx(nnx.Linear, 6, 4, use_bias=False), (2, 6)
    ),
    "linear_to_heads_in_linen": lambda: pair(nn.Linear(6, 8), in_linen(linen.DenseGeneral, (2, 4)), (2, 6)),
    "linear_from_heads_in_linen": lambda: pair(
        nn.Linear(6, 4),
        LinenNet(lambda x: linen.DenseGeneral(4, axis=(-2, -1), name="layer")(x.reshape(len(x), 2, 3))),
        (2, 6),
    ),
    "linear_in_equinox": lambda: pair(nn.Linear(4, 4), in_equinox(eqx.nn.Linear(4, 4, key=KEY)), (2, 4)),
    "linear_in_haiku": lambda: pair(nn.Linear(4, 4), in_haiku(hk.Linear, 4), (2, 4)),
    "linear_behind_a_flatten": linear_behind_a_flatten,
    "conv1d_of_hugging_face": lambda: pair(Conv1D(4, 4), in_linen(linen.Dense, 4), (2, 4)),
    # Convolutions
    "convolution_of_rank_1_in_linen": lambda: pair(
        nn.Conv1d(4, 6, 3),
        LinenNet(lambda x: linen.Conv(6, 3, padding="VALID", name="layer")(x.swapaxes(1, 2)).swapaxes(1, 2)),
        (2, 4, 8),
    ),
    "convolution_of_rank_2_grouped_in_linen": lambda: pair(
        nn.Conv2d(4, 6, 3, groups=2),
        in_linen(linen.Conv, 6, (3, 3), padding="VALID", feature_group_count=2),
        (2, 4, 8, 9),
    ),
    "convolution_of_rank_3_in_nnx": lambda: pair(
        nn.Conv3d(4, 6, 3), in_nnx(nnx.Conv, 4, 6, (3, 3, 3), padding="VALID"), (2, 4, 4, 5, 6)
    ),
    "convolution_depthwise_in_haiku": lambda: pair(
        nn.Conv2d(4, 8, 3, groups=4), in_haiku(hk.DepthwiseConv2D, 2, 3, padding="VALID"), (2, 4, 7, 8)
    ),
    "convolution_depthwise_as_in_keras": lambda: pair(
        nn.Conv2d(4, 8, 3, groups=4), depthwise_as_in_keras(), (2, 4, 7, 8)
    ),
    "convolution_grouped_in_equinox": lambda: pair(
        nn.Conv2d(4, 6, 3, groups=2), in_equinox(eqx.nn.Conv2d(4, 6, 3, groups=2, key=KEY)), (2, 4, 7, 8)
    ),
    # Transposed convolutions of stride 2, from four channels to four, where shapes do not tell the layout, or to others
    "transposed_convolution_in_linen": lambda: pair(
        nn.ConvTranspose2d(4, 4, 3, stride=2), in_linen(linen.ConvTranspose, 4, **UP), (2, 4, 5, 6)
    ),
    "transposed_convolution_with_transposed_kernel_in_linen": lambda: pair(
        nn.ConvTranspose2d(4, 4, 3, stride=2),
        in_linen(linen.ConvTranspose, 4, transpose_kernel=True, **UP),
        (2, 4, 5, 6),
        conv_transpose("layer", flipped=False),
    ),
    "transposed_convolution_with_transposed_kernel_of_two_sizes_in_linen": lambda: pair(
        nn.ConvTranspose2d(4, 3, 3, stride=2),
        in_linen(linen.ConvTranspose, 3, transpose_kernel=True, **UP),
        (2, 4, 5, 6),
    ),
    "transposed_convolution_in_haiku": lambda: pair(
        nn.ConvTranspose2d(4, 4, 3, stride=2), in_haiku(hk.Conv2DTranspose, 4, 3, 2, padding="VALID"), (2, 4, 5, 6)
    ),
    "transposed_convolution_grouped_in_equinox": lambda: pair(
        nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2),
        in_equinox(eqx.nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2, key=KEY)),
        (2, 4, 5, 6),
    ),
    # Norms
    "batch_norm_in_linen": lambda: pair(
        nn.BatchNorm2d(4), in_linen(linen.BatchNorm, use_running_average=True), (2, 4, 5, 6)
    ),
    "batch_norm_in_haiku": batch_norm_in_haiku,
    "layer_norm_in_haiku": lambda: pair(nn.LayerNorm(4), in_haiku(hk.LayerNorm, -1, True, True), (2, 4)),
    "layer_norm_in_equinox": lambda: pair(nn.LayerNorm(4), in_equinox(eqx.nn.LayerNorm(4)), (2, 4)),
    "layer_norm_over_images_in_linen": lambda: pair(
        nn.LayerNorm((3, 4, 5)),
        in_linen(linen.LayerNorm, epsilon=1e-5, reduction_axes=(1, 2, 3), feature_axes=(1, 2, 3)),
        (2, 3, 4, 5),
    ),
    "group_norm_in_linen": lambda: pair(nn.GroupNorm(2, 4), in_linen(linen.GroupNorm, 2, epsilon=1e-5), (2, 4, 5, 6)),
    # Embeddings
    "embedding_in_linen": lambda: pair(nn.Embedding(6, 4), in_linen(linen.Embed, 6, 4), tokens(2, 2, 6)),
    "embedding_in_haiku": lambda: pair(nn.Embedding(6, 4), in_haiku(hk.Embed, 6, 4), tokens(2, 2, 6)),
    # Recurrent layers
    "lstm_in_linen": lambda: recurrent(nn.LSTM, linen_rnn(linen.OptimizedLSTMCell)),
    "lstm_with_kernels_apart_in_nnx": lambda: recurrent(nn.LSTM, nnx_rnn(nnx.LSTMCell)),
    "lstm_with_packed_kernels_in_nnx": lambda: recurrent(nn.LSTM, nnx_rnn(nnx.OptimizedLSTMCell)),
    "lstm_with_a_projection": lstm_with_a_projection,
    "lstm_in_equinox": lambda: recurrent(nn.LSTM, equinox_rnn(eqx.nn.LSTMCell, 2)),
    "lstm_in_haiku": lambda: recurrent(nn.LSTM, haiku_rnn(hk.LSTM)),
    "lstm_of_two_layers_and_directions_in_linen": lstm_of_two_layers_and_directions_in_linen,
    "lstm_with_another_order_of_gates": lstm_with_another_order_of_gates,
    "gru_in_linen": lambda: recurrent(nn.GRU, linen_rnn(linen.GRUCell)),
    "gru_in_equinox": lambda: recurrent(nn.GRU, equinox_rnn(eqx.nn.GRUCell, 1)),
    # Attention
    "attention_in_linen": lambda: attention(in_linen(linen.MultiHeadDotProductAttention, 2)),
    "attention_in_nnx": lambda: attention(in_nnx(nnx.MultiHeadAttention, 2, 6, decode=False)),
    "attention_in_equinox": lambda: attention(in_equinox(eqx.nn.MultiheadAttention(2, 6, **BIASES, key=KEY))),
    "attention_in_haiku": lambda: attention(in_haiku(hk.MultiHeadAttention, 2, 3, w_init=jnp.zeros)),
    "attention_with_other_sizes_of_keys_and_values_in_linen": attention_with_other_sizes_of_keys_and_values_in_linen,
    # One layer for three, three for one, and layers stacked in one
    "fused_queries_keys_and_values_to_three_layers": lambda: pair(
        nn.Linear(6, 18), three_layers((2, 3), 6, 6), (2, 6), qkv("q", "k", "v")
    ),
    "fused_projection_with_fewer_keys_than_queries": lambda: pair(
        nn.Linear(6, 12), three_layers(6, 3, 3), (2, 6), qkv("q", "k", "v")
    ),
    "fused_projection_head_by_head": lambda: pair(
        nn.Linear(6, 18),
        LinenNet(lambda x: head_by_head(three_layers(6, 6, 6).function(x))),
        (2, 6),
        qkv("q", "k", "v", heads=2),
    ),
    "three_layers_joined_in_one": lambda: pair(
        three_torch_layers(), in_linen(linen.Dense, 12), (2, 6), joined("layer", "q", "k", "v")
    ),
    "three_layers_in_a_stack_of_kernels": lambda: pair(
        three_torch_layers(), in_linen(Stack, (3, 6, 2, 2)), (2, 6), joined("layer", "q", "k", "v")
    ),
    "a_fused_layer_in_a_stack_of_kernels": lambda: pair(nn.Linear(6, 18), in_linen(Stack, (3, 6, 6)), (2, 6)),
    "three_layers_joined_head_by_head": lambda: pair(
        three_torch_layers(),
        LinenNet(lambda x: linen.DenseGeneral((2, 3, 2), name="layer")(x).swapaxes(1, 2)),
        (2, 6),
        joined("layer", "q", "k", "v", heads=2),
    ),
    "layers_stacked_by_a_scan": layers_stacked_by_a_scan,
}


@pytest.mark.parametrize("name", LAYERS)
def test_layer_gives_equal_outputs_with_carried_weights(name: str) -> None:
    case = Case(LAYERS[name]())
    assert error_of(case) < SAME
    assert case.proposal.gaps[:3] == ((), (), ())
    check_the_way_back(name, case)


def check_the_way_back(name: str, case: Case) -> None:
    """Check that what is only moved comes back exactly, and that sums of biases are refused."""
    weights = case.weight_map
    computed = {path for path in weights.tensors if "bias_" in path and "another_order" not in name}
    assert weights.rearranges == weights.tensors.keys() - computed
    leaves = weights.to_leaves(case.tensors)
    if computed:
        with pytest.raises(NoInverse, match=min(computed)):
            weights.to_torch(leaves)
    else:
        back = weights.to_torch(leaves)
        assert back.keys() == weights.tensors.keys()
        assert all(np.array_equal(value, case.tensors[path]) for path, value in back.items())


def change(case: Case, name: str, rows: slice, value: float) -> None:
    """Give some rows of one of PyTorch's tensors another value."""
    case.tensors[name][rows] = value
    load_tensors(case.module, case.tensors)


def test_gru_in_nnx_gets_all_but_the_second_bias_of_the_new_gate() -> None:
    case = Case(recurrent(nn.GRU, nnx_rnn(nnx.GRUCell)))
    assert error_of(case) > 1e-3
    change(case, "layer.bias_hh_l0", slice(2 * HIDDEN, None), 0)
    assert error_of(case) < SAME
    assert case.proposal.gaps.torch == ("layer.bias_hh_l0",)


def test_gru_in_haiku_is_equal_where_the_reset_gate_is_open() -> None:
    """Haiku multiplies the state by the reset gate, and PyTorch the product of the state with its weights."""
    case = Case(recurrent(nn.GRU, haiku_rnn(hk.GRU)))
    change(case, "layer.bias_ih_l0", slice(HIDDEN), 100)
    change(case, "layer.bias_hh_l0", slice(2 * HIDDEN, None), 0)
    assert error_of(case) < SAME


@pytest.mark.parametrize(
    "name", ["lstm_in_linen", "lstm_in_haiku", "gru_in_equinox", "attention_in_linen", "layers_stacked_by_a_scan"]
)
def test_gradients_through_the_map_are_pytorchs(name: str) -> None:
    assert examine(LAYERS[name](), names=("gradients",)).passed == ["gradients"]


def test_large_numbers_and_double_precision_pass_through_a_map() -> None:
    module = nn.Linear(3, 2)
    weights = declare({"": "fc"}, module, {"fc/kernel": jnp.zeros((3, 2)), "fc/bias": jnp.zeros(2)})
    tensors = {"weight": np.arange(6.0).reshape(2, 3) / 3, "bias": np.full(2, 1e300)}
    with jax.enable_x64(True):
        leaves = weights.to_leaves(tensors)
        assert {leaf.dtype for leaf in leaves.values()} == {jnp.dtype("float64")}
        assert all(np.array_equal(value, tensors[name]) for name, value in weights.to_torch(leaves).items())


# Names and patterns


class Blocks(nn.Module):
    """Two stages of two blocks, a token, and a head that is tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.token = nn.Parameter(torch.randn(1, 1, 4))
        for stage in (1, 2):
            blocks = [nn.ModuleDict({"fc": nn.Linear(4, 4), "norm": nn.BatchNorm1d(4)}) for _ in range(2)]
            self.add_module(f"layer{stage}", nn.ModuleList(blocks))
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight


def shape(*sizes: int) -> jax.ShapeDtypeStruct:
    """Return the shape of a leaf."""
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


BLOCK = {
    "fc/kernel": shape(4, 4),
    "fc/bias": shape(4),
    **{f"norm/{name}": shape(4) for name in ("scale", "bias", "mean", "var")},
}
LEAVES = {
    "tok/embedding": shape(7, 4),
    "cls": shape(4),
    **{f"block_{number}/{path}": leaf for number in range(4) for path, leaf in BLOCK.items()},
}
NAMES: dict[str, str | Rule] = {"embed": "tok", "token": "cls", "layer{i}.{j}": "block_{2*i+j-2}"}


def test_patterns_may_calculate_and_what_is_inside_goes_by_its_names() -> None:
    weights = declare(NAMES, Blocks(), LEAVES)
    assert check_complete(weights, list(weights.tensors), list(LEAVES))[:4] == ((), (), (), {})
    carried = {entry.torch: entry.jax for entry in weights.entries}
    assert carried[("layer2.1.fc.weight",)] == ("block_3/fc/kernel",)
    assert carried[("layer1.1.norm.running_var",)] == ("block_1/norm/var",)
    assert carried[("token",)] == ("cls",)
    tensors = tensors_of(Blocks())
    assert np.array_equal(weights.to_leaves(tensors)["block_2/fc/kernel"], tensors["layer2.0.fc.weight"].T)


def test_layers_that_do_not_have_the_same_tensors_cannot_be_stacked() -> None:
    module = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3, bias=False)])
    with pytest.raises(CannotCarry, match="have not all the same tensors"):
        declare({"{i}": "fc"}, module, {"fc/kernel": shape(2, 3, 3), "fc/bias": shape(2, 3)})


def test_a_part_of_an_attention_may_be_named_alone() -> None:
    both = {"layer.out_proj": "layer/out", "layer": "layer"}
    case = Case(replace(attention(in_linen(linen.MultiHeadDotProductAttention, 2)), weights=both))
    assert error_of(case) < SAME
    weights = declare({"layer.out_proj": "layer/out"}, case.module, case.model.leaves(case.own_variables))
    assert [entry.jax for entry in weights.entries] == [("layer/out/kernel",), ("layer/out/bias",)]


def test_longer_names_win_over_shorter_ones() -> None:
    own = {"layer1.0.fc": linear("block_0/fc", transposed=False)}
    weights = declare(NAMES | own, Blocks(), LEAVES)
    tensors = tensors_of(Blocks())
    leaves = weights.to_leaves(tensors)
    assert np.array_equal(leaves["block_0/fc/kernel"], tensors["layer1.0.fc.weight"])
    assert np.array_equal(leaves["block_1/fc/kernel"], tensors["layer1.1.fc.weight"].T)


def test_a_tensor_that_jax_holds_three_times_comes_back_with_the_same_bits() -> None:
    table = np.random.default_rng(0).normal(size=(50, 7)).astype(np.float32)
    entries = tuple(Entry(("table",), (path,), lambda table: (table,), "same()") for path in ("a", "b", "c"))
    weights = WeightMap(entries, {"table": table.shape}, dict.fromkeys("abc", table.shape), frozenset({"table"}))
    assert np.array_equal(weights.to_torch(dict.fromkeys("abc", table))["table"], table)
    back = weights.to_torch({"a": table, "b": 2 * table, "c": 6 * table})["table"]
    np.testing.assert_allclose(back, 3 * table, rtol=1e-6)


def test_a_tied_head_that_jax_does_not_tie_is_named() -> None:
    leaves = LEAVES | {"head/kernel": shape(4, 7)}
    weights = declare(NAMES | {"head": "head"}, Blocks(), leaves)
    gaps = check_complete(weights, list(weights.tensors), list(leaves))
    assert gaps.untied == {"embed.weight": ("tok/embedding", "head/kernel")}
    assert gaps.jax_parameters - gaps.torch_parameters == 28
    tensors = tensors_of(Blocks())
    carried = weights.to_leaves(tensors)
    assert np.array_equal(weights.to_torch(carried)["embed.weight"], tensors["embed.weight"])
    moved = carried | {"head/kernel": carried["head/kernel"] + 1}
    back, expected = weights.to_torch(moved)["embed.weight"], tensors["embed.weight"] + 0.5
    assert np.abs(back - expected).max() < 1e-6 * np.abs(expected).max()  # a value near -0.5 cancels


def test_tensors_that_nothing_maps_are_named_on_both_sides() -> None:
    leaves = LEAVES | {"extra/scale": shape(4)}
    weights = declare({"embed": "tok", "layer{i}.{j}": "block_{2*i+j-2}"}, Blocks(), leaves)
    gaps = check_complete(weights, list(weights.tensors), list(leaves))
    assert (gaps.torch, gaps.jax) == (("token",), ("cls", "extra/scale"))
    weights = declare(NAMES | {"layer1.{i}.norm": unused()}, Blocks(), LEAVES)
    gaps = check_complete(weights, list(weights.tensors), list(LEAVES))
    assert gaps.torch == ()
    assert len(gaps.jax) == 8


def test_a_rule_of_ones_own_is_taken() -> None:
    def carry(layer: Layer) -> list[Entry]:
        return [Entry((layer.tensor("weight"),), (layer.paths[0],), lambda weight: (2 * weight,), "double")]

    weights = declare({"embed": Rule(carry, ("tok/embedding",))}, Blocks(), LEAVES)
    tensors = tensors_of(Blocks())
    assert np.array_equal(weights.to_leaves(tensors)["tok/embedding"], 2 * tensors["embed.weight"])
    assert weights.rearranges == frozenset()


@pytest.mark.parametrize(
    ("mapping", "reason"),
    [
        ({"layers{i}.0": "block_{i}"}, "names no module and no tensor of PyTorch; close are layer2.0, layer1.0"),
        ({"layer{i}.0": "block{i}"}, "'block1' is no module and no leaf of JAX; close are block_1"),
        ({"layer{i}.0": "block_{k}"}, "has 'k' in it, and the numbers are ['i']"),
        ({"layer{i}.0": "block_{i**2}"}, "has 'i ** 2' in it"),
        ({"layer{i}.0": "block_{i+}"}, "{i+} in a path is no calculation"),
        ({"layer1.0.fc": "tok"}, "there is no leaf for the weight"),
        ({"layer1.0.fc": linear("block_0/fc", flatten=(3, 2, 1))}, "6 values, and the layer takes 4"),
        ({"layer1.0.fc": "block_0/norm"}, "there is no leaf for the weight"),
        ({"layer1.0.norm": "tok"}, "no tensor of the one fits a leaf of the other"),
        ({"layer1.0.norm.weight": "tok/embedding"}, "cannot fill tok/embedding (7, 4)"),
        (
            {"layer1.0.fc": "block_0/fc", "layer1.1.fc": "block_0/fc"},
            "both layer1.0.fc.weight and layer1.1.fc.weight go",
        ),
    ],
)
def test_a_mapping_that_cannot_be_is_refused_with_the_reason(mapping: dict[str, Any], reason: str) -> None:
    with pytest.raises(CannotCarry) as refusal:
        declare(mapping, Blocks(), LEAVES)
    assert reason in str(refusal.value)
    assert "\n" not in str(refusal.value)


# A user's own function


def from_loader(load: Callable[[dict[str, Any]], Any], leaves: Mapping[str, Any] | None = None) -> WeightMap:
    """Return the map of a loader for the network `Blocks`."""
    return from_function(load, flatten, Blocks(), LEAVES if leaves is None else leaves)


def numpy_loader(state: dict[str, Any]) -> Any:
    """Build the tree of `Blocks` with NumPy, as loaders of checkpoints do."""
    tree: dict[str, Any] = {
        "tok": {"embedding": np.asarray(state["head.weight"])},
        "cls": np.asarray(state["token"])[0, 0],
    }
    for number in range(4):
        front = f"layer{number // 2 + 1}.{number % 2}"
        names = {"scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
        tree[f"block_{number}"] = {
            "fc": {"kernel": np.asarray(state[f"{front}.fc.weight"]).T, "bias": np.array(state[f"{front}.fc.bias"])},
            "norm": {name: np.asarray(state[f"{front}.norm.{torch_name}"]) for name, torch_name in names.items()},
        }
    return tree


def test_a_numpy_loader_is_read_as_moves_and_can_be_differentiated() -> None:
    weights, declared = from_loader(numpy_loader), declare(NAMES, Blocks(), LEAVES)
    tensors = tensors_of(Blocks())
    expected, actual = declared.to_leaves(tensors), weights.to_leaves(tensors)
    assert actual.keys() == expected.keys()
    assert all(np.array_equal(actual[path], expected[path]) for path in expected)
    assert weights.rearranges == declared.rearranges == weights.tensors.keys()
    gradient = jax.grad(lambda given: weights.to_leaves(given)["block_0/fc/kernel"][0, 1])(
        {name: value for name, value in tensors.items() if value.dtype == np.float32}
    )
    assert np.flatnonzero(gradient["layer1.0.fc.weight"]).tolist() == [4]
    assert sum(np.count_nonzero(value) for value in gradient.values()) == 1


def test_tensors_that_a_loader_skips_are_named() -> None:
    def load(state: dict[str, Any]) -> Any:
        tree = numpy_loader(state)
        tree["block_1"]["norm"]["mean"] = np.zeros(4)  # as a fresh norm has it
        tree["cls"] = np.concatenate([tree["cls"][:3], [0]])
        return tree

    weights = from_loader(load)
    gaps = check_complete(weights, list(weights.tensors), list(LEAVES))
    assert gaps.torch == ("token", "layer1.1.norm.running_mean")
    assert gaps.jax == ("block_1/norm/mean",)
    assert "token" not in weights.rearranges


def test_a_loader_says_what_the_port_does_not_need_by_taking_it_out() -> None:
    def load(state: dict[str, Any]) -> Any:
        tree = numpy_loader(state)
        tree["block_0"]["norm"]["mean"] = np.zeros(4)
        del state["layer1.0.norm.running_mean"], state["token"]  # the second is carried all the same
        return tree

    weights = from_loader(load)
    assert weights.unused == {"layer1.0.norm.running_mean"}
    assert check_complete(weights, list(weights.tensors), list(LEAVES)).torch == ()


MOVES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "transposed": lambda x: x.T,
    "flipped": lambda x: x[::-1, ::-2],
    "split": lambda x: np.split(x, 3, axis=1)[1],
    "strided": lambda x: x[1::2, 2:7],
    "flattened": lambda x: x.reshape(4, 3, 2, 6).transpose(2, 1, 3, 0).reshape(12, 12),
    "stacked": lambda x: np.stack([x, x.T[:, ::-1].T]) if x.shape[0] == x.shape[1] else np.stack([x, x]),
    "joined": lambda x: np.concatenate([x[:3], x[9:]], axis=0),
    "padded": lambda x: np.pad(x, ((0, 3), (0, 0))),
    "shuffled": lambda x: x[np.array([3, 1, 2, 0, 3])][:, np.random.default_rng(0).permutation(12)],
    "one number": lambda x: x[2, 3],
}


@pytest.mark.parametrize("name", MOVES)
def test_any_moves_in_numpy_are_read(name: str) -> None:
    module = nn.Linear(12, 12, bias=False)
    load = lambda state: {"w": MOVES[name](np.asarray(state["weight"]))}  # noqa: E731
    expected = load(tensors_of(module))
    weights = from_function(load, flatten, module, expected)
    actual = jax.jit(weights.to_leaves)(tensors_of(module))["w"]
    assert np.array_equal(actual, expected["w"])


def test_small_values_that_a_loader_computes_are_no_constants() -> None:
    module = nn.Linear(3, 2)
    weights = from_function(lambda state: {"w": state["weight"] / 1e3, "c": np.full(2, 0.5)}, flatten, module)
    assert [entry.jax for entry in weights.entries] == [("w",)]
    actual = weights.to_leaves(tensors_of(module))["w"]
    rounding = float(np.finfo(np.float32).eps)  # of a product instead of a quotient
    np.testing.assert_allclose(actual, tensors_of(module)["weight"] / 1e3, rtol=rounding)


def test_a_loader_in_jax_numpy_may_compute_and_is_carried_leaf_by_leaf() -> None:
    module = nn.ModuleDict({"rnn": nn.LSTM(3, 4), "fc": nn.Linear(4, 2)})

    def load(state: dict[str, Any]) -> Any:
        bias = state["rnn.bias_ih_l0"] + state["rnn.bias_hh_l0"]
        norm = jnp.exp(state["fc.weight"])
        return {"w": state["rnn.weight_ih_l0"].T, "b": bias, "v": norm.T, "u": norm[0]}

    expected = load({name: jnp.asarray(value) for name, value in tensors_of(module).items()})
    weights = from_function(load, flatten, module, expected)
    assert sorted(entry.torch for entry in weights.entries) == [
        ("fc.weight",),
        ("rnn.bias_ih_l0", "rnn.bias_hh_l0"),
        ("rnn.weight_ih_l0",),
    ]
    actual = weights.to_leaves(tensors_of(module))
    assert all(np.array_equal(actual[path], expected[path]) for path in expected)
    assert weights.rearranges == {"rnn.weight_ih_l0"}
    with jax.enable_x64(True):
        double = weights.to_leaves({name: value.astype(np.float64) for name, value in tensors_of(module).items()})
    assert {leaf.dtype for leaf in double.values()} == {np.dtype("float64")}


@pytest.mark.parametrize(
    ("load", "reason"),
    [
        (
            lambda state: {"cls": np.asarray(state["token"])[0, 0] * 2},
            "leaf cls holds values that are computed, not moved",
        ),
        (lambda state: {"cls": np.asarray(state["token"]).mean(0)[0] + 1}, "leaf cls holds values that are computed"),
        (lambda state: {"cls": state["tokens"]}, "KeyError: 'tokens'"),
        (lambda state: {"class": np.asarray(state["token"])[0, 0]}, "gives class, which is no leaf of the JAX model"),
        (lambda state: {"cls": np.asarray(state["token"])}, "gives cls of shape (1, 1, 4), and the JAX model has (4,)"),
    ],
)
def test_a_loader_that_cannot_be_read_is_refused_with_the_reason(load: Any, reason: str) -> None:
    with pytest.raises(CannotCarry) as refusal:
        from_loader(load)
    assert reason in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_more_values_than_float32_counts_are_read() -> None:
    module = nn.Embedding(2**12, 2**12 + 1)
    load = lambda state: {"w": np.asarray(state["weight"], dtype=np.float32).T}  # noqa: E731
    (entry,) = from_function(load, flatten, module, {"w": shape(2**12 + 1, 2**12)}).entries
    assert "gather" not in str(jax.make_jaxpr(entry.convert)(shape(2**12, 2**12 + 1)))

"""Each layer's rule gives equal outputs on both sides, and maps are complete, differentiable and reversible."""

import itertools
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

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

KEY = jax.random.key(0)
FEATURES, HIDDEN, TIME = 3, 4, 5


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


def randomise(module: nn.Module) -> nn.Module:
    """Draw all parameters and statistics away from 0 and 1, and return the module in evaluation mode."""
    generator = torch.Generator().manual_seed(0)
    for name, value in module.state_dict().items():
        if value.is_floating_point():
            drawn = torch.rand(value.shape, generator=generator) - 0.3
            fan_in = value.numel() / len(value) if value.ndim > 1 else 1.0
            value.copy_(drawn + 1 if name.endswith("running_var") else 3 * (drawn - 0.1) / fan_in**0.5)
    return module.eval()


class Side(NamedTuple):
    """The JAX side of a case: shapes of the leaves, and what computes the outputs from leaves."""

    leaves: Mapping[str, Any]
    run: Callable[[Mapping[str, Any]], Any]


def in_linen(module: linen.Module, *inputs: Any, **options: Any) -> Side:
    """Return a Linen module that is run on these inputs."""
    variables = jax.eval_shape(lambda: module.init(KEY, *inputs, **options))
    leaves = {path: leaf for part in variables.values() for path, leaf in flatten(part).items()}

    def run(values: Mapping[str, Any]) -> Any:
        parts = {
            name: jax.tree.unflatten(jax.tree.structure(part), [values[path] for path in flatten(part)])
            for name, part in variables.items()
        }
        return module.apply(parts, *inputs, **options)

    return Side(leaves, run)


def in_nnx(make: Callable[[nnx.Rngs], Any], run: Callable[[Any], Any]) -> Side:
    """Return an NNX module that a function runs."""
    graph, params, rest = nnx.split(make(nnx.Rngs(0)), nnx.Param, ...)  # type: ignore[misc]  # flax's own overload

    def call(values: Mapping[str, Any]) -> Any:
        filled = jax.tree.map(lambda leaf: leaf, params)
        nnx.replace_by_pure_dict(filled, nest(values))
        return run(nnx.merge(graph, filled, rest, copy=True))

    return Side(flatten(nnx.to_pure_dict(params)), call)


def in_equinox(model: Any, run: Callable[[Any], Any]) -> Side:
    """Return an Equinox module that a function runs."""
    arrays, static = eqx.partition(model, eqx.is_array)
    leaves = flatten(arrays)

    def call(values: Mapping[str, Any]) -> Any:
        filled = jax.tree.unflatten(jax.tree.structure(arrays), [values[path] for path in leaves])
        return run(eqx.combine(filled, static))

    return Side(leaves, call)


def in_haiku(function: Callable[..., Any], *inputs: Any) -> Side:
    """Return a Haiku function that is run on these inputs."""
    transformed = hk.transform_with_state(function)
    parts: Any = jax.eval_shape(transformed.init, KEY, *inputs)  # parameters and state
    leaves = {
        f"{module}/{name}": leaf for part in parts for module, values in part.items() for name, leaf in values.items()
    }

    def run(values: Mapping[str, Any]) -> Any:
        def fill(part: Any) -> dict[str, dict[str, Any]]:
            return {
                module: {name: values.get(f"{module}/{name}", 0) for name in inner} for module, inner in part.items()
            }

        return transformed.apply(*map(fill, parts), None, *inputs)[0]

    return Side({path: leaf for path, leaf in leaves.items() if not path.endswith("counter")}, run)


def draw(*shape: int) -> np.ndarray:
    """Return random numbers of this shape, float32."""
    return np.random.default_rng(shape).normal(size=shape).astype(np.float32)


def last(array: np.ndarray) -> np.ndarray:
    """Return an array with its channels last."""
    return np.moveaxis(array, 1, -1)


class Case(NamedTuple):
    """A layer on both sides, and how it is declared. `back` undoes the place of the channels in JAX's outputs."""

    module: nn.Module
    inputs: tuple[np.ndarray, ...]
    side: Side
    mapping: Mapping[str, str | Rule]
    back: Callable[[Any], Any] = np.asarray


def channels_first(array: Any) -> np.ndarray:
    """Return outputs with their channels in the second place."""
    return np.moveaxis(np.asarray(array), -1, 1)


class Named(nn.Module):
    """A network of one layer called `layer`; its first output counts."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        """Compute the first output of the layer."""
        outputs = self.layer(*inputs)
        return outputs[0] if isinstance(outputs, tuple) else outputs


class Net(linen.Module):
    """A network of one layer called `layer` in Linen."""

    make: Callable[[], Any]

    @linen.compact
    def __call__(self, *inputs: Any) -> Any:
        """Compute the layer's output."""
        return self.make()(*inputs)


def flax_net(make: Callable[..., Any], *inputs: Any, **options: Any) -> Side:
    """Return the network of one Linen layer."""
    return in_linen(Net(lambda: make(**options, name="layer")), *inputs)


# One layer called `layer` in each library, run on what it gets.

MakeSide = Callable[[np.ndarray], Side]


def linen_layer(make: Callable[..., Any], **options: Any) -> MakeSide:
    """Return a layer of Linen with these options."""
    return lambda x: flax_net(make, x, **options)


def nnx_layer(make: Callable[..., Any], *sizes: Any, **options: Any) -> MakeSide:
    """Return a layer of NNX with these sizes and options."""
    return lambda x: in_nnx(
        lambda rngs: nnx.Dict(layer=make(*sizes, **options, rngs=rngs)), lambda net: net["layer"](x)
    )


def equinox_layer(layer: Any) -> MakeSide:
    """Return a layer of Equinox, which takes one example at a time."""
    return lambda x: in_equinox({"layer": layer}, lambda net: jax.vmap(net["layer"])(x))


def haiku_layer(make: Callable[..., Any], *sizes: Any, **options: Any) -> MakeSide:
    """Return a layer of Haiku with these sizes and options."""
    return lambda x: in_haiku(lambda x: make(*sizes, **options, name="layer")(x), x)


def on_values(
    module: nn.Module,
    shape: tuple[int, ...],
    side: MakeSide,
    rule: Rule | str = "layer",
    back: Callable[[Any], Any] = np.asarray,
) -> Case:
    """Return a layer on random values of this shape."""
    x = draw(*shape)
    return Case(Named(module), (x,), side(x), {"layer": rule}, back)


def on_images(module: nn.Module, shape: tuple[int, ...], side: MakeSide, rule: Rule | str = "layer") -> Case:
    """Return a layer on random images of this shape, whose channels come last in JAX."""
    x = draw(*shape)
    return Case(Named(module), (x,), side(last(x)), {"layer": rule}, channels_first)


def keras_depthwise(x: Any) -> Side:
    """Return a convolution of each channel alone, whose kernel is [row, column, in, out / in]."""

    def run(leaves: Mapping[str, Any]) -> Any:
        kernel = leaves["layer/kernel"].reshape(3, 3, 1, 8)
        axes = ("NHWC", "HWIO", "NHWC")
        y = lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=axes, feature_group_count=4)
        return y + leaves["layer/bias"]

    return Side({"layer/kernel": shape(3, 3, 4, 2), "layer/bias": shape(8)}, run)


def on_ids(module: nn.Module, side: MakeSide) -> Case:
    """Return a layer on token ids."""
    ids = np.array([[1, 5], [0, 2]])
    return Case(Named(module), (ids,), side(ids), {"layer": "layer"})


def linear_behind_a_flatten() -> Case:
    images = draw(2, 3, 4, 5)
    module = nn.Sequential(nn.Flatten(), nn.Linear(60, 7))
    side = flax_net(linen.Dense, last(images).reshape(2, -1), features=7)
    return Case(module, (images,), side, {"1": linear("layer", flatten=(3, 4, 5))})


def batch_norm_in_haiku() -> Case:
    images = draw(2, 4, 5, 6)
    # The first call makes the statistics, which takes the training mode.
    calls = itertools.count()
    norm = lambda x: hk.BatchNorm(True, True, 0.9, name="layer")(x, is_training=next(calls) == 0)  # noqa: E731
    side = in_haiku(norm, last(images))
    return Case(Named(nn.BatchNorm2d(4)), (images,), side, {"layer": "layer"}, channels_first)


def recurrent(module: nn.Module, side: MakeSide, rule: Rule | str = "layer") -> Case:
    """Return a recurrent layer over [batch, time, feature]."""
    return on_values(module, (2, TIME, FEATURES), side, rule)


def linen_rnn(cell: Any) -> Callable[[np.ndarray], Side]:
    """Return what runs a cell of Linen over a sequence."""
    return lambda x: flax_net(lambda name: linen.RNN(cell(HIDDEN, name=name)), x)


def nnx_rnn(cell: Any) -> Callable[[np.ndarray], Side]:
    """Return what runs a cell of NNX over a sequence."""
    return lambda x: in_nnx(
        lambda rngs: nnx.Dict(layer=cell(FEATURES, HIDDEN, rngs=rngs)),
        lambda net: nnx.RNN(net["layer"], rngs=nnx.Rngs(0))(jnp.asarray(x)),
    )


def equinox_rnn(cell: Any, states: int) -> Callable[[np.ndarray], Side]:
    """Return what runs a cell of Equinox, which has one or two states, over a sequence."""

    def side(x: np.ndarray) -> Side:
        def run(net: Any) -> Any:
            def step(state: Any, frame: Any) -> Any:
                state = jax.vmap(net["layer"])(frame, state)
                return state, state[0] if states == 2 else state

            zeros = jnp.zeros((2, HIDDEN))
            outputs = jax.lax.scan(step, (zeros, zeros) if states == 2 else zeros, jnp.swapaxes(x, 0, 1))[1]
            return jnp.swapaxes(outputs, 0, 1)

        return in_equinox({"layer": cell(FEATURES, HIDDEN, key=KEY)}, run)

    return side


def haiku_rnn(cell: Any) -> Callable[[np.ndarray], Side]:
    """Return what runs a cell of Haiku over a sequence."""

    def function(x: Any) -> Any:
        core = cell(HIDDEN, name="layer")
        return hk.dynamic_unroll(core, x, core.initial_state(2), time_major=False)[0]

    return lambda x: in_haiku(function, x)


def lstm_of_two_layers_and_directions_in_linen() -> Case:
    class Layers(linen.Module):
        @linen.compact
        def __call__(self, x: Any) -> Any:
            for layer in range(2):
                cells = [
                    linen.RNN(linen.OptimizedLSTMCell(HIDDEN, name=f"{way}_{layer}")) for way in ("forward", "backward")
                ]
                x = linen.Bidirectional(cells[0], cells[1])(x)
            return x

    module = nn.LSTM(FEATURES, HIDDEN, num_layers=2, bidirectional=True, batch_first=True)
    return recurrent(module, lambda x: in_linen(Layers(), x), "")


def lstm_with_another_order_of_gates() -> Case:
    def side(x: np.ndarray) -> Side:
        def run(leaves: Mapping[str, Any]) -> Any:
            def step(state: Any, frame: Any) -> Any:
                h, c = state
                gates = frame @ leaves["w_ih"] + h @ leaves["w_hh"] + leaves["b_ih"] + leaves["b_hh"]
                i, f, o, g = jnp.split(gates, 4, axis=-1)
                c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
                h = jax.nn.sigmoid(o) * jnp.tanh(c)
                return (h, c), h

            zeros = jnp.zeros((2, HIDDEN))
            return jnp.swapaxes(jax.lax.scan(step, (zeros, zeros), jnp.swapaxes(x, 0, 1))[1], 0, 1)

        shapes = {
            "w_ih": (FEATURES, 4 * HIDDEN),
            "w_hh": (HIDDEN, 4 * HIDDEN),
            "b_ih": (4 * HIDDEN,),
            "b_hh": (4 * HIDDEN,),
        }
        return Side({name: jnp.zeros(shape) for name, shape in shapes.items()}, run)

    return recurrent(nn.LSTM(FEATURES, HIDDEN, batch_first=True), side, Rule(lstm("x", order="ifog").carry, ("",)))


def attention_case(side: Callable[[np.ndarray], Side], **options: Any) -> Case:
    """Return self-attention with two heads."""
    x = draw(2, TIME, 6)
    module = nn.MultiheadAttention(6, 2, batch_first=True, **options)
    return Case(Named(module), (x, x, x), side(x), {"layer": "layer"})


def attention_with_other_sizes_of_keys_and_values_in_linen() -> Case:
    q, k, v = draw(2, TIME, 6), draw(2, 4, 3), draw(2, 4, 5)
    side = flax_net(
        lambda name: linen.MultiHeadDotProductAttention(2, name=name, out_features=6, qkv_features=6), q, k, v
    )
    return Case(
        Named(nn.MultiheadAttention(6, 2, kdim=3, vdim=5, batch_first=True)), (q, k, v), side, {"layer": "layer"}
    )


def three_layers(x: np.ndarray, sizes: tuple[Any, Any, Any]) -> Side:
    """Return three dense layers beside each other in Linen, of these features, their outputs joined."""

    class Three(linen.Module):
        @linen.compact
        def __call__(self, x: Any) -> Any:
            layers = [linen.DenseGeneral(size, name=name)(x) for name, size in zip("qkv", sizes, strict=True)]
            return jnp.concatenate([layer.reshape(len(x), -1) for layer in layers], axis=-1)

    return in_linen(Three(), x)


class Apart(nn.Module):
    """Three linear layers whose outputs are joined."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(6, 4), nn.Linear(6, 4), nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute [batch, 12]."""
        return torch.cat([self.q(x), self.k(x), self.v(x)], dim=-1)


def layers_stacked_by_a_scan() -> Case:
    class Block(linen.Module):
        @linen.compact
        def __call__(self, x: Any, _: None) -> Any:
            return linen.tanh(linen.Dense(6, name="fc")(linen.LayerNorm(epsilon=1e-5, name="norm")(x))), None

    class Scanned(linen.Module):
        @linen.compact
        def __call__(self, x: Any) -> Any:
            scan = linen.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
            return scan(name="layers")(x, None)[0]

    class TorchBlock(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.fc = nn.LayerNorm(6), nn.Linear(6, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.tanh(self.fc(self.norm(x)))

    x = draw(2, 6)
    return Case(nn.Sequential(*(TorchBlock() for _ in range(3))), (x,), in_linen(Scanned(), x), {"{i}": "layers"})


def torch_lstm() -> nn.LSTM:
    return nn.LSTM(FEATURES, HIDDEN, batch_first=True)


def torch_gru() -> nn.GRU:
    return nn.GRU(FEATURES, HIDDEN, batch_first=True)


UP = {"kernel_size": (3, 3), "strides": (2, 2), "padding": "VALID"}  # of a transposed convolution in Linen
BIASES = dict.fromkeys(("use_query_bias", "use_key_bias", "use_value_bias", "use_output_bias"), True)

LAYERS: dict[str, Callable[[], Case]] = {
    # Linear layers
    "linear_in_linen": lambda: on_values(nn.Linear(6, 4), (2, 6), linen_layer(linen.Dense, features=4)),
    "linear_without_bias_in_nnx": lambda: on_values(
        nn.Linear(6, 4, bias=False), (2, 6), nnx_layer(nnx.Linear, 6, 4, use_bias=False)
    ),
    "linear_to_heads_in_linen": lambda: on_values(
        nn.Linear(6, 8), (2, 6), linen_layer(linen.DenseGeneral, features=(2, 4)), back=lambda y: y.reshape(2, 8)
    ),
    "linear_from_heads_in_linen": lambda: on_values(
        nn.Linear(6, 4),
        (2, 6),
        lambda x: flax_net(linen.DenseGeneral, x.reshape(2, 2, 3), features=4, axis=(-2, -1)),
    ),
    "linear_in_equinox": lambda: on_values(nn.Linear(4, 4), (2, 4), equinox_layer(eqx.nn.Linear(4, 4, key=KEY))),
    "linear_in_haiku": lambda: on_values(nn.Linear(4, 4), (2, 4), haiku_layer(hk.Linear, 4)),
    "linear_behind_a_flatten": linear_behind_a_flatten,
    "conv1d_of_hugging_face": lambda: on_values(Conv1D(4, 4), (2, 4), linen_layer(linen.Dense, features=4)),
    # Convolutions
    "convolution_of_rank_1_in_linen": lambda: on_images(
        nn.Conv1d(4, 6, 3), (2, 4, 8), linen_layer(linen.Conv, features=6, kernel_size=3, padding="VALID")
    ),
    "convolution_of_rank_2_grouped_in_linen": lambda: on_images(
        nn.Conv2d(4, 6, 3, groups=2),
        (2, 4, 8, 9),
        linen_layer(linen.Conv, features=6, kernel_size=(3, 3), padding="VALID", feature_group_count=2),
    ),
    "convolution_of_rank_3_in_nnx": lambda: on_images(
        nn.Conv3d(4, 6, 3), (2, 4, 4, 5, 6), nnx_layer(nnx.Conv, 4, 6, (3, 3, 3), padding="VALID")
    ),
    "convolution_depthwise_in_haiku": lambda: on_images(
        nn.Conv2d(4, 8, 3, groups=4), (2, 4, 7, 8), haiku_layer(hk.DepthwiseConv2D, 2, 3, padding="VALID")
    ),
    "convolution_depthwise_as_in_keras": lambda: on_images(nn.Conv2d(4, 8, 3, groups=4), (2, 4, 7, 8), keras_depthwise),
    "convolution_grouped_in_equinox": lambda: on_values(
        nn.Conv2d(4, 6, 3, groups=2), (2, 4, 7, 8), equinox_layer(eqx.nn.Conv2d(4, 6, 3, groups=2, key=KEY))
    ),
    # Transposed convolutions of stride 2, from four channels to four, where shapes do not tell the layout, or to others
    "transposed_convolution_in_linen": lambda: on_images(
        nn.ConvTranspose2d(4, 4, 3, stride=2), (2, 4, 5, 6), linen_layer(linen.ConvTranspose, features=4, **UP)
    ),
    "transposed_convolution_with_transposed_kernel_in_linen": lambda: on_images(
        nn.ConvTranspose2d(4, 4, 3, stride=2),
        (2, 4, 5, 6),
        linen_layer(linen.ConvTranspose, features=4, transpose_kernel=True, **UP),
        conv_transpose("layer", flipped=False),
    ),
    "transposed_convolution_with_transposed_kernel_of_two_sizes_in_linen": lambda: on_images(
        nn.ConvTranspose2d(4, 3, 3, stride=2),
        (2, 4, 5, 6),
        linen_layer(linen.ConvTranspose, features=3, transpose_kernel=True, **UP),
    ),
    "transposed_convolution_in_haiku": lambda: on_images(
        nn.ConvTranspose2d(4, 4, 3, stride=2), (2, 4, 5, 6), haiku_layer(hk.Conv2DTranspose, 4, 3, 2, padding="VALID")
    ),
    "transposed_convolution_grouped_in_equinox": lambda: on_values(
        nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2),
        (2, 4, 5, 6),
        equinox_layer(eqx.nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2, key=KEY)),
    ),
    # Norms
    "batch_norm_in_linen": lambda: on_images(
        nn.BatchNorm2d(4), (2, 4, 5, 6), linen_layer(linen.BatchNorm, use_running_average=True)
    ),
    "batch_norm_in_haiku": batch_norm_in_haiku,
    "layer_norm_in_haiku": lambda: on_values(nn.LayerNorm(4), (2, 4), haiku_layer(hk.LayerNorm, -1, True, True)),
    "layer_norm_in_equinox": lambda: on_values(nn.LayerNorm(4), (2, 4), equinox_layer(eqx.nn.LayerNorm(4))),
    "layer_norm_over_images_in_linen": lambda: on_images(
        nn.LayerNorm((3, 4, 5)),
        (2, 3, 4, 5),
        linen_layer(linen.LayerNorm, epsilon=1e-5, reduction_axes=(1, 2, 3), feature_axes=(1, 2, 3)),
    ),
    "group_norm_in_linen": lambda: on_images(
        nn.GroupNorm(2, 4), (2, 4, 5, 6), linen_layer(linen.GroupNorm, num_groups=2, epsilon=1e-5)
    ),
    # Embeddings
    "embedding_in_linen": lambda: on_ids(nn.Embedding(6, 4), linen_layer(linen.Embed, num_embeddings=6, features=4)),
    "embedding_in_haiku": lambda: on_ids(nn.Embedding(6, 4), haiku_layer(hk.Embed, 6, 4)),
    # Recurrent layers
    "lstm_in_linen": lambda: recurrent(torch_lstm(), linen_rnn(linen.OptimizedLSTMCell)),
    "lstm_with_kernels_apart_in_nnx": lambda: recurrent(torch_lstm(), nnx_rnn(nnx.LSTMCell)),
    "lstm_with_packed_kernels_in_nnx": lambda: recurrent(torch_lstm(), nnx_rnn(nnx.OptimizedLSTMCell)),
    "lstm_in_equinox": lambda: recurrent(torch_lstm(), equinox_rnn(eqx.nn.LSTMCell, 2)),
    "lstm_in_haiku": lambda: recurrent(torch_lstm(), haiku_rnn(hk.LSTM)),
    "lstm_of_two_layers_and_directions_in_linen": lstm_of_two_layers_and_directions_in_linen,
    "lstm_with_another_order_of_gates": lstm_with_another_order_of_gates,
    "gru_in_linen": lambda: recurrent(torch_gru(), linen_rnn(linen.GRUCell)),
    "gru_in_equinox": lambda: recurrent(torch_gru(), equinox_rnn(eqx.nn.GRUCell, 1)),
    # Attention
    "attention_in_linen": lambda: attention_case(
        lambda x: flax_net(linen.MultiHeadDotProductAttention, x, x, num_heads=2)
    ),
    "attention_in_nnx": lambda: attention_case(nnx_layer(nnx.MultiHeadAttention, 2, 6, decode=False)),
    "attention_in_equinox": lambda: attention_case(
        lambda x: in_equinox(
            {"layer": eqx.nn.MultiheadAttention(2, 6, **BIASES, key=KEY)},
            lambda net: jax.vmap(net["layer"])(x, x, x),
        )
    ),
    "attention_in_haiku": lambda: attention_case(
        lambda x: in_haiku(lambda x: hk.MultiHeadAttention(2, 3, w_init=jnp.zeros, name="layer")(x, x, x), x)
    ),
    "attention_with_other_sizes_of_keys_and_values_in_linen": attention_with_other_sizes_of_keys_and_values_in_linen,
    # One layer for three, three for one, and layers stacked in one
    "fused_queries_keys_and_values_to_three_layers": lambda: on_values(
        nn.Linear(6, 18), (2, 6), lambda x: three_layers(x, ((2, 3), 6, 6)), qkv("q", "k", "v")
    ),
    "fused_projection_with_fewer_keys_than_queries": lambda: on_values(
        nn.Linear(6, 12), (2, 6), lambda x: three_layers(x, (6, 3, 3)), qkv("q", "k", "v")
    ),
    "fused_projection_head_by_head": lambda: on_values(
        nn.Linear(6, 18),
        (2, 6),
        lambda x: three_layers(x, (6, 6, 6)),
        qkv("q", "k", "v", heads=2),
        back=lambda y: np.asarray(y).reshape(2, 3, 2, 3).swapaxes(1, 2).reshape(2, 18),
    ),
    "three_layers_joined_in_one": lambda: on_values(
        Apart(), (2, 6), linen_layer(linen.Dense, features=12), joined("layer", "q", "k", "v")
    ),
    "three_layers_joined_head_by_head": lambda: on_values(
        Apart(),
        (2, 6),
        linen_layer(linen.DenseGeneral, features=(2, 3, 2)),
        joined("layer", "q", "k", "v", heads=2),
        back=lambda y: np.asarray(y).swapaxes(1, 2).reshape(2, 12),
    ),
    "layers_stacked_by_a_scan": layers_stacked_by_a_scan,
}


def compute_both(one: Case, weights: WeightMap) -> tuple[np.ndarray, np.ndarray]:
    """Return JAX's outputs on weights that the map carried, and PyTorch's."""
    with torch.no_grad():
        expected = one.module(*(torch.from_numpy(value) for value in one.inputs)).numpy()
    leaves = weights.to_leaves(tensors_of(one.module))
    for path, leaf in leaves.items():
        assert leaf.shape == one.side.leaves[path].shape, path
    return np.asarray(one.back(jax.jit(one.side.run)(leaves))), expected


def declare_case(one: Case) -> WeightMap:
    """Return the map of a case, with random weights in the module."""
    randomise(one.module)
    return declare(one.mapping, one.module, one.side.leaves)


@pytest.mark.parametrize("name", LAYERS)
def test_layer_gives_equal_outputs_with_carried_weights(name: str) -> None:
    one = LAYERS[name]()
    weights = declare_case(one)
    actual, expected = compute_both(one, weights)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=2e-6)
    gaps = check_complete(weights, list(weights.tensors), list(weights.leaves))
    assert gaps[:3] == ((), (), ())
    check_the_way_back(name, one, weights)


def check_the_way_back(name: str, one: Case, weights: WeightMap) -> None:
    """Check that what is only moved comes back exactly, and that sums of biases are refused."""
    tensors = tensors_of(one.module)
    computed = {path for path in weights.tensors if "bias_" in path and "another_order" not in name}
    assert weights.rearranges == weights.tensors.keys() - computed
    leaves = weights.to_leaves(tensors)
    if computed:
        with pytest.raises(NoInverse, match=min(computed)):
            weights.to_torch(leaves)
    else:
        back = weights.to_torch(leaves)
        assert back.keys() == weights.tensors.keys()
        assert all(np.array_equal(value, tensors[path]) for path, value in back.items())


def test_gru_in_nnx_gets_all_but_the_second_bias_of_the_new_gate() -> None:
    one = recurrent(nn.GRU(FEATURES, HIDDEN, batch_first=True), nnx_rnn(nnx.GRUCell))
    weights = declare_case(one)
    actual, expected = compute_both(one, weights)
    assert np.abs(actual - expected).max() > 1e-3
    state = one.module.state_dict()  # shares its memory with the module
    state["layer.bias_hh_l0"][2 * HIDDEN :] = 0
    np.testing.assert_allclose(*compute_both(one, weights), rtol=1e-4, atol=1e-6)
    assert check_complete(weights, list(weights.tensors), list(weights.leaves)).torch == ("layer.bias_hh_l0",)


def test_gru_in_haiku_is_equal_where_the_reset_gate_is_open() -> None:
    """Haiku multiplies the state by the reset gate, and PyTorch the product of the state with its weights."""
    one = recurrent(nn.GRU(FEATURES, HIDDEN, batch_first=True), haiku_rnn(hk.GRU))
    weights = declare_case(one)
    state = one.module.state_dict()  # shares its memory with the module
    state["layer.bias_ih_l0"][:HIDDEN] = 100
    state["layer.bias_hh_l0"][2 * HIDDEN :] = 0
    np.testing.assert_allclose(*compute_both(one, weights), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "name", ["lstm_in_linen", "lstm_in_haiku", "gru_in_equinox", "attention_in_linen", "layers_stacked_by_a_scan"]
)
def test_gradients_through_the_map_are_pytorchs(name: str) -> None:
    one = LAYERS[name]()
    weights = declare_case(one)
    outputs = one.module(*(torch.from_numpy(value) for value in one.inputs))
    outputs.square().sum().backward()
    expected = {name: value.grad.numpy() for name, value in one.module.named_parameters() if value.grad is not None}
    loss = lambda tensors: jnp.square(one.side.run(weights.to_leaves(tensors))).sum()  # noqa: E731
    actual = jax.jit(jax.grad(loss))(tensors_of(one.module))
    for parameter, gradient in expected.items():
        np.testing.assert_allclose(actual[parameter], gradient, rtol=2e-3, atol=2e-5, err_msg=parameter)


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


def block_leaves(path: str, norm: str = "norm") -> dict[str, Any]:
    """Return the shapes of a block's leaves."""
    names = {
        "fc/kernel": (4, 4),
        "fc/bias": (4,),
        **{f"{norm}/{name}": (4,) for name in ("scale", "bias", "mean", "var")},
    }
    return {f"{path}/{name}": jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in names.items()}


def shape(*sizes: int) -> jax.ShapeDtypeStruct:
    """Return the shape of a leaf."""
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


BLOCKS = {f"block_{number}": block_leaves(f"block_{number}") for number in range(4)}
LEAVES = {
    "tok/embedding": shape(7, 4),
    "cls": shape(4),
    **{path: leaf for leaves in BLOCKS.values() for path, leaf in leaves.items()},
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
    one = attention_case(lambda x: flax_net(linen.MultiHeadDotProductAttention, x, x, num_heads=2))
    weights = declare({"layer.out_proj": "layer/out"}, one.module, one.side.leaves)
    assert [entry.jax for entry in weights.entries] == [("layer/out/kernel",), ("layer/out/bias",)]
    both = declare({"layer.out_proj": "layer/out", "layer": "layer"}, randomise(one.module), one.side.leaves)
    np.testing.assert_allclose(*compute_both(one, both), rtol=1e-4, atol=2e-6)


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

"""The map of weights is proposed with its evidence, gives itself again as Python, and asks where two maps fit."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache, partial
from typing import Any

import equinox as eqx
import haiku as hk
import jax
import numpy as np
import pytest
import torch
import torchvision
from flax import linen
from jax import lax
from jax import numpy as jnp
from torch import nn

from experiments.large_ports import GPT2, Sizes
from jax_cnn.model import SimpleCNN as JaxSimpleCNN
from parity_tests.harness import Pair
from parity_tests.harness import weights as rules
from parity_tests.harness.capture import Case, exact_arithmetic, jax_order, torch_order
from parity_tests.harness.checks import examine, parameters
from parity_tests.harness.compare import Refused
from parity_tests.harness.propose import Proposal, propose
from parity_tests.harness.weights import declare, linear
from parity_tests.parity.networks import LinenNet, TorchNet, network, values
from parity_tests.parity.test_weights import KEY, LAYERS, error_of, nest, shape
from torch_ref.model import SimpleCNN

RIGHT = 1e-9  # relative distance of the outputs in float64: rounding in a deep network; a wrong map is near 1


@pytest.fixture(autouse=True)
def _same_weights() -> None:
    torch.manual_seed(0)


@cache
def case_of(make: Callable[[], Pair]) -> Case:
    """Return the case of a pair; several tests look at one ResNet."""
    return Case(make())


def ask(case: Case, declared: Mapping[str, Any] | None = None) -> Proposal:
    """Return the map that is proposed without a look at the outputs."""
    own = case.own_variables
    with exact_arithmetic("float64"):
        calls = torch_order(case)[0], jax_order(case, own)[0]
        return checked(case, propose(case.module, case.model.leaves(own), declared, *calls))


def decide(case: Case) -> Proposal:
    """Return the map that the outputs decide; it must leave nothing open and be right."""
    decided = checked(case, case.proposal)
    assert decided.ambiguous == ()
    assert decided.gaps[:4] == ((), (), (), {})
    assert error_of(case) < RIGHT
    return decided


def checked(case: Case, proposal: Proposal) -> Proposal:
    """Return a proposal whose Python gives the same map."""
    again = declare(read(proposal.python), case.module, case.model.leaves(case.own_variables))
    assert {(entry.torch, entry.jax) for entry in again.entries} == {(e.torch, e.jax) for e in proposal.map.entries}
    first, second = proposal.map.to_leaves(case.tensors), again.to_leaves(case.tensors)
    assert all(np.array_equal(first[path], second[path]) for path in first), proposal.python
    return proposal


def read(python: str) -> dict[str, Any]:
    """Return the mapping that Python text gives."""
    return eval(f"dict({python})", vars(rules) | {"__builtins__": {"dict": dict}})["weights"]


def port(reference: nn.Module, jax_model: Any, inputs: np.ndarray) -> Pair:
    """Return a pair of which nothing is declared."""
    return Pair(reference, jax_model, inputs, batch_sizes=(2,))


def in_functions(shapes: Mapping[str, tuple[int, ...]], function: Callable[[Any, Any], Any]) -> Any:
    """Return a JAX model that is a function, with leaves of these shapes."""
    return nest({path: jnp.zeros(size) for path, size in shapes.items()}), function


# Networks


def simple_cnn() -> Pair:
    return port(SimpleCNN(), JaxSimpleCNN(fused=False), values(2, 1, 28, 28))


class Basic(linen.Module):
    """ResNet's block with Flax's own names; the shortcut may come first."""

    width: int
    stride: int
    shortcut_first: bool = False

    @linen.compact
    def __call__(self, x: Any) -> Any:
        """Compute the block."""
        conv = partial(linen.Conv, self.width, use_bias=False)
        norm = partial(linen.BatchNorm, use_running_average=True)
        changes = self.stride > 1 or x.shape[-1] != self.width
        identity = x
        if changes and self.shortcut_first:
            identity = norm()(conv(kernel_size=(1, 1), strides=self.stride)(x))
        y = linen.relu(norm()(conv(kernel_size=(3, 3), strides=self.stride, padding=1)(x)))
        y = norm()(conv(kernel_size=(3, 3), padding=1)(y))
        if changes and not self.shortcut_first:
            identity = norm()(conv(kernel_size=(1, 1), strides=self.stride)(x))
        return linen.relu(y + identity)


class ResNet18(linen.Module):
    """ResNet-18 with Flax's own names."""

    shortcut_first: bool = False

    @linen.compact
    def __call__(self, x: Any) -> Any:
        """Compute the logits."""
        x = linen.Conv(64, (7, 7), strides=2, padding=3, use_bias=False)(x)
        x = linen.relu(linen.BatchNorm(use_running_average=True)(x))
        x = linen.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        for stage in range(4):
            for index in range(2):
                x = Basic(64 * 2**stage, 2 if stage and not index else 1, self.shortcut_first)(x)
        return linen.Dense(10)(x.mean((1, 2)))


def resnet18(shortcut_first: bool = False) -> Pair:
    model = ResNet18(shortcut_first)
    shapes = jax.eval_shape(model.init, KEY, np.zeros((2, 32, 32, 3), np.float32))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)  # to draw them takes seconds
    pair = port(torchvision.models.resnet18(num_classes=10), model, values(2, 3, 32, 32))
    return replace(pair, jax_init=lambda key: zeros)


def resnet18_shortcut_first() -> Pair:
    return resnet18(shortcut_first=True)


def plain_norm(p: Any, x: Any) -> Any:
    """Normalise over the last axis."""
    return (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5) * p["g"] + p["b"]


def attend(q: Any, k: Any, v: Any) -> Any:
    """Attend to what came before, with two heads; [batch, time, 8] or [batch, time, 2, 4] each."""
    q, k, v = (part.reshape(*part.shape[:2], 2, 4) for part in (q, k, v))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / 2
    scores = jnp.where(jnp.tril(jnp.ones(scores.shape[-2:], bool)), scores, -jnp.inf)
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v).reshape(*q.shape[:2], 8)


def plain_gpt2(p: Any, ids: Any) -> Any:
    """Compute GPT-2 from a tree, as picoGPT does."""
    x = p["wte"][ids] + p["wpe"][: ids.shape[1]]
    dense = lambda p, x: x @ p["w"] + p["b"]  # noqa: E731
    for block in p["blocks"].values():
        qkv = jnp.split(dense(block["attn"]["c_attn"], plain_norm(block["ln_1"], x)), 3, axis=-1)
        x = x + dense(block["attn"]["c_proj"], attend(*qkv))
        x = x + dense(block["mlp"]["c_proj"], jax.nn.gelu(dense(block["mlp"]["c_fc"], plain_norm(block["ln_2"], x))))
    return plain_norm(p["ln_f"], x) @ p["wte"].T


IDS = np.array([[1, 5, 2, 7], [3, 3, 0, 10]])
SIZES = Sizes(layers=3, heads=2, features=8, vocabulary=11, positions=6)


def gpt2_in_functions() -> Pair:
    shapes = {"wte": (11, 8), "wpe": (6, 8), "ln_f/g": (8,), "ln_f/b": (8,)}
    layers = {"attn/c_attn": (8, 24), "attn/c_proj": (8, 8), "mlp/c_fc": (8, 32), "mlp/c_proj": (32, 8)}
    for block in (f"blocks/{index}" for index in range(3)):
        for name, (inputs, outputs) in layers.items():
            shapes |= {f"{block}/{name}/w": (inputs, outputs), f"{block}/{name}/b": (outputs,)}
        shapes |= {f"{block}/{name}/{leaf}": (8,) for name in ("ln_1", "ln_2") for leaf in "gb"}
    return port(GPT2(SIZES), in_functions(shapes, plain_gpt2), IDS)


def flax_block(x: Any, _: None = None, heads: bool = False) -> Any:
    """Compute a block of GPT-2 whose queries, keys and values are apart, with Flax's own names."""
    y = linen.LayerNorm(epsilon=1e-5)(x)
    size = (2, 4) if heads else 8
    x = x + linen.Dense(8)(attend(*(linen.DenseGeneral(size)(y) for _ in range(3))))
    return x + linen.Dense(8)(linen.gelu(linen.Dense(32)(linen.LayerNorm(epsilon=1e-5)(x)))), None


def in_turn(x: Any, heads: bool) -> Any:
    """Compute three blocks of GPT-2."""
    for _ in range(3):
        x, _ = LinenNet(partial(flax_block, heads=heads))(x)
    return x


def in_a_scan(x: Any) -> Any:
    """Compute three blocks of GPT-2, whose weights are stacked."""
    scan = linen.scan(LinenNet, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
    return scan(flax_block)(x, None)[0]


def flax_gpt2(blocks: Callable[[Any], Any]) -> Pair:
    """Return GPT-2 in Flax with these blocks."""

    def logits(ids: Any) -> Any:
        tokens = linen.Embed(11, 8)
        x = tokens(ids) + linen.Embed(6, 8)(jnp.arange(ids.shape[1]))
        return tokens.attend(linen.LayerNorm(epsilon=1e-5)(blocks(x)))

    return port(GPT2(SIZES), LinenNet(logits), IDS)


def bert_attention(net: Any, x: torch.Tensor) -> torch.Tensor:
    """Compute BERT's attention, [batch, time, 8]."""
    q, k, v = (layer(x).unflatten(-1, (2, 4)).transpose(1, 2) for layer in net.self.values())
    y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)
    return net.output.LayerNorm(x + net.output.dense(y))


def bert_layer(net: Any, x: torch.Tensor) -> torch.Tensor:
    """Compute a layer of BERT, [batch, time, 8]."""
    x = net.attention(x)
    return net.output.LayerNorm(x + net.output.dense(nn.functional.gelu(net.intermediate.dense(x))))


def bert_logits(net: Any, ids: torch.Tensor) -> torch.Tensor:
    """Compute BERT's logits."""
    e = net.embeddings
    words, positions = e.word_embeddings(ids), e.position_embeddings(torch.arange(ids.shape[1]))
    x = e.LayerNorm(words + positions + e.token_type_embeddings(0 * ids))
    for layer in net.encoder.layer:
        x = layer(x)
    return net.cls.decoder(net.cls.LayerNorm(nn.functional.gelu(net.cls.dense(x))))


def torch_bert() -> nn.Module:
    """Return BERT with Hugging Face's names, and a decoder that is tied but for its bias."""

    def dense_and_norm(inputs: int, eps: float = 1e-12) -> nn.ModuleDict:
        return nn.ModuleDict({"dense": nn.Linear(inputs, 8), "LayerNorm": nn.LayerNorm(8, eps=eps)})

    def layer() -> nn.Module:
        projections = nn.ModuleDict({name: nn.Linear(8, 8) for name in ("query", "key", "value")})
        return TorchNet(
            bert_layer,
            attention=TorchNet(bert_attention, self=projections, output=dense_and_norm(8)),
            intermediate=nn.ModuleDict({"dense": nn.Linear(8, 32)}),
            output=dense_and_norm(32),
        )

    names = {"word_embeddings": 11, "position_embeddings": 6, "token_type_embeddings": 2}
    embeddings = {name: nn.Embedding(size, 8) for name, size in names.items()}
    decoder = nn.Linear(8, 11)
    decoder.weight = embeddings["word_embeddings"].weight
    return TorchNet(
        bert_logits,
        embeddings=nn.ModuleDict({**embeddings, "LayerNorm": nn.LayerNorm(8, eps=1e-12)}),
        encoder=nn.ModuleDict({"layer": nn.ModuleList(layer() for _ in range(2))}),
        cls=nn.ModuleDict({**dense_and_norm(8, 1e-5), "decoder": decoder}),
    )


def flax_bert_layer(x: Any) -> Any:
    """Compute a layer of BERT, with other names."""
    y = linen.MultiHeadDotProductAttention(2, name="self_attention")(x, x)
    x = linen.LayerNorm(epsilon=1e-12, name="attention_norm")(x + y)
    y = linen.gelu(linen.Dense(32, name="intermediate")(x), approximate=False)
    return linen.LayerNorm(epsilon=1e-12, name="output_norm")(x + linen.Dense(8, name="output")(y))


class FlaxBert(linen.Module):
    """BERT in Flax."""

    @linen.compact
    def __call__(self, ids: Any) -> Any:
        """Compute the logits."""
        words = linen.Embed(11, 8, name="word_embeddings")
        x = words(ids) + linen.Embed(6, 8, name="position_embeddings")(jnp.arange(ids.shape[1]))
        x = linen.LayerNorm(epsilon=1e-12, name="embeddings_norm")(
            x + linen.Embed(2, 8, name="type_embeddings")(0 * ids)
        )
        for index in range(2):
            x = LinenNet(flax_bert_layer, name=f"layer_{index}")(x)
        x = linen.gelu(linen.Dense(8, name="transform")(x), approximate=False)
        x = linen.LayerNorm(epsilon=1e-5, name="transform_norm")(x)
        return words.attend(x) + self.param("decoder_bias", linen.initializers.zeros, (11,))


def bert() -> Pair:
    return port(torch_bert(), FlaxBert(), IDS)


def torch_recurrent(kind: Any, layers: int = 2) -> nn.Module:
    """Return recurrent layers and a linear one."""
    rnn = kind(3, 4, batch_first=True, num_layers=layers)
    return TorchNet(lambda net, x: net.fc(net.rnn(x)[0]), rnn=rnn, fc=nn.Linear(4, 2))


def flax_recurrent(cell: Any) -> linen.Module:
    """Return two recurrent layers and a linear one."""

    def function(x: Any) -> Any:
        for _ in range(2):
            x = linen.RNN(cell(4))(x)
        return linen.Dense(2)(x)

    return LinenNet(function)


def lstm_in_flax() -> Pair:
    return port(torch_recurrent(nn.LSTM), flax_recurrent(linen.OptimizedLSTMCell), values(2, 5, 3))


def gru_in_flax() -> Pair:
    return port(torch_recurrent(nn.GRU), flax_recurrent(linen.GRUCell), values(2, 5, 3))


def lstm_in_haiku() -> Pair:
    def function(x: Any) -> Any:
        for _ in range(2):
            core = hk.LSTM(4)
            x = hk.dynamic_unroll(core, x, core.initial_state(len(x)), time_major=False)[0]
        return hk.Linear(2)(x)

    return port(torch_recurrent(nn.LSTM), hk.transform(function), values(2, 5, 3))


def attention() -> Pair:
    def forward(net: Any, x: torch.Tensor) -> torch.Tensor:
        x = net.norm(x)
        return net.out(net.attn(x, x, x)[0])

    def jax_side(x: Any) -> Any:
        x = linen.LayerNorm(epsilon=1e-5)(x)
        return linen.Dense(8)(linen.MultiHeadDotProductAttention(2)(x, x))

    attn = nn.MultiheadAttention(8, 2, batch_first=True)
    module = TorchNet(forward, norm=nn.LayerNorm(8), attn=attn, out=nn.Linear(8, 8))
    return port(module, LinenNet(jax_side), values(2, 5, 8))


def attention_in_a_stack() -> Pair:
    """Return a port that makes its layers with vmap, and scans through them, of a reference with packed projections."""

    class Layer(eqx.Module):
        attn: eqx.nn.MultiheadAttention
        fc: eqx.nn.Linear

        def __init__(self, key: jax.Array) -> None:
            bias = {f"use_{part}_bias": True for part in ("query", "key", "value", "output")}
            self.attn = eqx.nn.MultiheadAttention(2, 8, **bias, key=key)
            self.fc = eqx.nn.Linear(8, 8, key=key)

        def __call__(self, x: jax.Array) -> jax.Array:
            x = x + self.attn(x, x, x)
            return x + jax.nn.tanh(jax.vmap(self.fc)(x))

    class Net(eqx.Module):
        layers: Layer

        def __call__(self, x: jax.Array) -> jax.Array:
            arrays, rest = eqx.partition(self.layers, eqx.is_array)
            return jax.lax.scan(lambda x, layer: (eqx.combine(layer, rest)(x), None), x, arrays)[0]

    def forward(net: Any, x: torch.Tensor) -> torch.Tensor:
        x = x + net.self_attn(x, x, x)[0]
        return x + torch.tanh(net.linear(x))

    def layer() -> nn.Module:
        return TorchNet(forward, self_attn=nn.MultiheadAttention(8, 2, batch_first=True), linear=nn.Linear(8, 8))

    net = Net(eqx.filter_vmap(Layer)(jax.random.split(jax.random.key(0), 3)))
    return port(network(layers=nn.Sequential(layer(), layer(), layer())), net, values(2, 5, 8))


def mobile() -> Pair:
    """Return a depthwise convolution, batch norm, a pointwise and a transposed convolution."""

    def jax_side(x: Any) -> Any:
        x = linen.Conv(4, (3, 3), padding="VALID", feature_group_count=4)(x)
        x = linen.relu(linen.BatchNorm(use_running_average=True)(x))
        return linen.ConvTranspose(4, (3, 3), (2, 2), "VALID")(linen.Conv(6, (1, 1))(x))

    first = [nn.Conv2d(4, 4, 3, groups=4), nn.BatchNorm2d(4), nn.ReLU()]
    module = nn.Sequential(*first, nn.Conv2d(4, 6, 1), nn.ConvTranspose2d(6, 4, 3, 2))
    return port(module, LinenNet(jax_side), values(2, 4, 8, 8))


def mixing(first: bool) -> nn.Module:
    """Return a block with parameters of its own; the first one begins with a norm."""

    def forward(net: Any, x: torch.Tensor) -> torch.Tensor:
        x = net.before(x) if first else x
        return x + net.fc(x * net.mix_key) @ net.fc.weight * net.mix_value

    own = {name: nn.Parameter(torch.rand(1, 1, 8)) for name in ("mix_key", "mix_value")}
    norm = {"before": nn.LayerNorm(8)} if first else {}
    return TorchNet(forward, **norm, fc=nn.Linear(8, 6, bias=False), **own)


def mixing_in_a_stack() -> Pair:
    def run(tree: Any, x: Any) -> Any:
        x = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-5)
        x = x * tree["norm"]["weight"] + tree["norm"]["bias"]
        for number in range(3):
            block = jax.tree.map(lambda leaf, number=number: leaf[number], tree["blocks"])
            x = x + (x * block["mix_k"] @ block["fc"]["weight"].T) @ block["fc"]["weight"] * block["mix_v"]
        return x

    shapes = {"blocks/fc/weight": (3, 6, 8), "blocks/mix_k": (3, 8), "blocks/mix_v": (3, 8)}
    shapes |= {"norm/weight": (8,), "norm/bias": (8,)}
    module = network(h=nn.Sequential(*(mixing(number == 0) for number in range(3))))
    return port(module, in_functions(shapes, run), values(2, 5, 8))


def critics_in_a_stack() -> Pair:
    """Return a port that stacks two networks, whose number is a part of their names in PyTorch."""

    def critic(x: jax.Array) -> jax.Array:
        return linen.Dense(1)(linen.Dense(4)(linen.tanh(linen.Dense(4)(x))))

    def critics(x: jax.Array) -> jax.Array:
        both = linen.vmap(LinenNet, {"params": 0}, {"params": True}, in_axes=None, axis_size=2)
        return both(critic)(x)

    def layers() -> nn.Module:
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 1))

    reference = TorchNet(lambda net, x: torch.stack([net.qf0(x), net.qf1(x)]), qf0=layers(), qf1=layers())
    return port(reference, LinenNet(critics), values(2, 3))


def layers_that_add_up() -> Pair:
    """Return a port whose first two layers have as many values as the third, and keep their names."""

    def wide(x: jax.Array) -> jax.Array:
        x = linen.Dense(4, name="dense")(linen.Dense(12, name="qkv")(x)[..., :4])
        return linen.Dense(16, name="expand")(x)

    layers = {"qkv": nn.Linear(4, 12), "dense": nn.Linear(4, 4), "h_to_4h": nn.Linear(4, 16)}
    reference = TorchNet(lambda net, x: net.h_to_4h(net.dense(net.qkv(x)[..., :4])), **layers)
    return port(reference, LinenNet(wide), values(2, 4))


def normalised_weights() -> Pair:
    """Return a port whose weights are directions and lengths: of convolutions, one of them transposed, and a layer."""

    def normalised(x: jax.Array) -> jax.Array:
        up = linen.ConvTranspose(6, (2,), (2,), transpose_kernel=True)
        for layer in (up, linen.Conv(4, (3,)), linen.Dense(5)):
            x = linen.WeightNorm(layer)(x)
        return x

    with pytest.warns(FutureWarning):
        up = nn.utils.weight_norm(nn.ConvTranspose1d(3, 6, 2, 2))
    down = nn.utils.parametrizations.weight_norm(nn.Conv1d(6, 4, 3, padding=1))
    fc = nn.utils.parametrizations.weight_norm(nn.Linear(4, 5))
    reference = TorchNet(lambda net, x: net.fc(net.down(net.up(x.mT)).mT), up=up, down=down, fc=fc)
    return port(reference, LinenNet(normalised), values(2, 7, 3))


def names_of_keras() -> Pair:
    """Return a norm with statistics and an attention, with the names and the shapes that Keras gives their leaves."""

    def run(tree: Any, x: Any) -> Any:
        norm, layer = tree["bn"], tree["att"]
        x = (x - norm["moving_mean"]) / jnp.sqrt(norm["moving_variance"] + 1e-5) * norm["gamma"] + norm["beta"]
        parts = (layer[role] for role in ("query", "key", "value"))
        q, k, v = (jnp.einsum("btd,dhf->bthf", x, part["kernel"]) + part["bias"] for part in parts)
        weights = jax.nn.softmax(jnp.einsum("bqhf,bkhf->bhqk", q, k) / jnp.sqrt(3.0))
        found, out = jnp.einsum("bhqk,bkhf->bqhf", weights, v), layer["attention_output"]
        return jnp.einsum("bqhf,hfd->bqd", found, out["kernel"]) + out["bias"]

    sizes: dict[str, tuple[int, ...]] = {"att/attention_output/kernel": (2, 3, 6), "att/attention_output/bias": (6,)}
    sizes |= {f"bn/{name}": (6,) for name in ("gamma", "beta", "moving_mean", "moving_variance")}
    for role in ("query", "key", "value"):
        sizes |= {f"att/{role}/kernel": (6, 2, 3), f"att/{role}/bias": (2, 3)}
    layers = {"bn": nn.BatchNorm1d(6), "att": nn.MultiheadAttention(6, 2, batch_first=True)}
    reference = TorchNet(lambda net, x: net.att(*[net.bn(x.mT).mT] * 3)[0], **layers)
    return port(reference, in_functions(sizes, run), values(2, 5, 6))


class Scaled(linen.Module):
    """A layer with a factor of its own beside it, as ConvNeXt's blocks have one."""

    @linen.compact
    def __call__(self, x: Any) -> Any:
        """Compute [batch, 6]."""
        return x + self.param("layer_scale", linen.initializers.ones, (6,)) * linen.Dense(6)(x)


def factor_before_a_norm() -> Pair:
    """Return a port whose norm comes behind a factor of as many values as the norm's scale has."""
    own = {"fc": nn.Linear(6, 6), "layer_scale": nn.Parameter(torch.ones(6))}
    block = TorchNet(lambda net, x: x + net.layer_scale * net.fc(x), **own)
    jax_side = LinenNet(lambda x: linen.Dense(4)(linen.LayerNorm(epsilon=1e-5)(Scaled()(x))))
    return port(nn.Sequential(block, nn.LayerNorm(6), nn.Linear(6, 4)), jax_side, values(2, 6))


SURE: dict[str, Callable[[], Pair]] = {
    function.__name__: function
    for function in (
        resnet18,
        resnet18_shortcut_first,
        gpt2_in_functions,
        mixing_in_a_stack,
        critics_in_a_stack,
        layers_that_add_up,
        bert,
        normalised_weights,
        lstm_in_flax,
        gru_in_flax,
        lstm_in_haiku,
        attention,
        attention_in_a_stack,
        mobile,
        names_of_keras,
        factor_before_a_norm,
    )
}


# What is sure


@pytest.mark.parametrize("name", SURE)
def test_map_is_found_without_a_question(name: str) -> None:
    case = case_of(SURE[name])
    proposal = ask(case)
    assert proposal.ambiguous == ()
    assert proposal.gaps[:4] == ((), (), (), {})
    assert error_of(case, proposal.map) < RIGHT
    assert {row.torch for row in proposal.rows} == {", ".join(entry.torch) for entry in proposal.map.entries}
    assert all(row.evidence for row in proposal.rows)


def test_python_is_folded_into_patterns() -> None:
    assert ask(case_of(resnet18)).python.splitlines() == [
        "weights={",
        "    'conv1': 'Conv_0',",
        "    'bn1': 'BatchNorm_0',",
        "    'layer{i}.{j}.conv{k}': 'Basic_{2*i+j-2}/Conv_{k-1}',",
        "    'layer{i}.{j}.bn{k}': 'Basic_{2*i+j-2}/BatchNorm_{k-1}',",
        "    'layer{i}.0.downsample.0': 'Basic_{2*i-2}/Conv_2',",
        "    'layer{i}.0.downsample.1': 'Basic_{2*i-2}/BatchNorm_2',",
        "    'fc': 'Dense_0',",
        "}",
    ]


def test_what_the_user_declares_is_taken_and_the_rest_proposed_inside() -> None:
    case = case_of(resnet18)
    proposal = ask(case, {"layer{i}.{j}": "Basic_{2*i+j-2}", "fc": linear("Dense_0")})
    assert error_of(case, proposal.map) < RIGHT
    assert {row.evidence for row in proposal.rows if row.torch.startswith("fc")} == {"declared"}
    wrong = {"layer{i}.{j}": "Basic_{8-2*i-j+1}"}  # the blocks backwards: most of them fit nowhere then
    assert "layer1.0.conv1.weight" in ask(case, wrong).gaps.torch


# What is asked


def two_heads(symmetric: bool) -> Pair:
    """Return two layers behind one flatten, for a policy and a value; their outputs are joined, or added."""

    def forward(net: Any, x: torch.Tensor) -> torch.Tensor:
        x = torch.flatten(torch.relu(net.conv(x)), 1)
        return net.policy(x) + net.value(x) if symmetric else torch.cat([net.policy(x), net.value(x)], -1)

    def jax_side(x: Any) -> Any:
        x = linen.relu(linen.Conv(3, (3, 3), padding="VALID")(x)).reshape(len(x), -1)
        heads = linen.Dense(2)(x), linen.Dense(2 if symmetric else 1)(x)
        return heads[0] + heads[1] if symmetric else jnp.concatenate(heads, -1)

    layers = {"conv": nn.Conv2d(1, 3, 3), "policy": nn.Linear(12, 2), "value": nn.Linear(12, 2 if symmetric else 1)}
    return port(TorchNet(forward, **layers), LinenNet(jax_side), values(2, 1, 4, 4))


def square(transposed: bool) -> Pair:
    """Return two square layers, whose weights a function may hold as PyTorch does."""

    def run(tree: Any, x: Any) -> Any:
        layers = tree if transposed else jax.tree.map(jnp.transpose, tree)
        hidden = jnp.tanh(x @ layers["first"]["w"] + layers["first"]["b"])
        return hidden @ layers["second"]["w"] + layers["second"]["b"]

    shapes = {"first/w": (5, 5), "first/b": (5,), "second/w": (5, 5), "second/b": (5,)}
    module = network(first=nn.Linear(5, 5), tanh=nn.Tanh(), second=nn.Linear(5, 5))
    return port(module, in_functions(shapes, run), values(3, 5))


def listed() -> Pair:
    """Return three square layers in a list, as tutorials write them; PyTorch's are numbers 0, 2 and 4."""

    def run(layers: Any, x: Any) -> Any:
        *hidden, (kernel, bias) = layers
        for w, b in hidden:
            x = jnp.tanh(x @ w + b)
        return x @ kernel + bias

    reference = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5))
    return port(reference, ([(jnp.zeros((5, 5)), jnp.zeros(5)) for _ in range(3)], run), values(3, 5))


def turned_kernel() -> Pair:
    """Return a square transposed convolution of a function that turns the kernel itself; all leaves at the root."""

    def run(tree: Any, images: Any) -> Any:
        inside = jnp.tanh(images @ tree["mix"] + tree["mean"])
        return lax.conv_transpose(inside, tree["up"][::-1, ::-1], (2, 2), "SAME") + tree["shift"]

    sizes = {"mix": (2, 3), "mean": (3,), "up": (4, 4, 3, 3), "shift": (3,)}
    reference = nn.Sequential(nn.Conv2d(2, 3, 1), nn.Tanh(), nn.ConvTranspose2d(3, 3, 4, stride=2, padding=1))
    return port(reference, in_functions(sizes, run), values(2, 2, 6, 6))


def lstm_of_a_function() -> Pair:
    return replace(LAYERS["lstm_with_another_order_of_gates"](), weights=None)


def gru_with_both_biases_in_one_leaf() -> Pair:
    """Return a cell as Keras has it: update, reset and new gate, and two rows of biases."""

    def run(tree: Any, xs: Any) -> Any:
        def step(state: Any, x: Any) -> Any:
            parts = x @ tree["kernel"] + tree["bias"][0], state @ tree["recurrent_kernel"] + tree["bias"][1]
            (z, r, n), (z_state, r_state, n_state) = (jnp.split(part, 3, -1) for part in parts)
            z = jax.nn.sigmoid(z + z_state)
            state = z * state + (1 - z) * jnp.tanh(n + jax.nn.sigmoid(r + r_state) * n_state)
            return state, state

        return lax.scan(step, jnp.zeros((len(xs), 4), xs.dtype), xs.swapaxes(0, 1))[1].swapaxes(0, 1)

    gru = nn.GRU(3, 4, batch_first=True)
    sizes = {"kernel": (3, 12), "recurrent_kernel": (4, 12), "bias": (2, 12)}
    return port(TorchNet(lambda net, x: net.gru(x)[0], gru=gru), in_functions(sizes, run), values(2, 5, 3))


class FlaxProjection(linen.Module):
    """A matrix that is no layer's, and may be the other way round."""

    transposed: bool

    @linen.compact
    def __call__(self, x: Any) -> Any:
        """Compute [batch, 4]."""
        matrix = self.param("matrix", linen.initializers.normal(), (4, 4))
        return linen.LayerNorm(epsilon=1e-5, name="norm")(x) @ (matrix.T if self.transposed else matrix)


def projection(transposed: bool) -> Pair:
    matrix = nn.Parameter(torch.zeros(4, 4))
    module = TorchNet(lambda net, x: net.norm(x) @ net.matrix, norm=nn.LayerNorm(4), matrix=matrix)
    return port(module, FlaxProjection(transposed), values(2, 4))


def neighbours(gates_first: bool = False, symmetric: bool = False, fault: float = 0.0) -> Pair:
    """Return two layers of one shape beside each other; Flax may call the gates first."""

    def join(values: Any, gates: Any, sigmoid: Any) -> Any:
        return values + gates if symmetric else values * sigmoid(gates)

    def jax_side(x: Any) -> Any:
        one, other = linen.Dense(3)(x), linen.Dense(3)(x)
        return fault + (join(other, one, linen.sigmoid) if gates_first else join(one, other, linen.sigmoid))

    layers = {"values": nn.Linear(4, 3), "gates": nn.Linear(4, 3)}
    module = TorchNet(lambda net, x: join(net.values(x), net.gates(x), torch.sigmoid), **layers)
    return port(module, LinenNet(jax_side), values(2, 4))


HEADS = ["policy: linear('Dense_0'), or policy: linear(", "value: linear('Dense_1'), or value: linear("]
SQUARE = ["first and 1 more: linear('first'), or first and 1 more: linear('first', transposed=False)"]
MATRIX = ["the module itself: same(''), or the module itself: same('', transposed=True)"]
NEIGHBOURS = ["values and gates -> Dense_0 and Dense_1, or values and gates -> Dense_1 and Dense_0"]
# Ports with questions that their outputs answer: the first words of each question, and a part of the answer as Python.
ASKED: dict[str, tuple[Callable[[], Pair], list[str], str]] = {
    "a linear layer behind a flatten": (
        simple_cnn,
        ["fc1: linear('fc1'), or fc1: linear('fc1', flatten=(64, 7, 7))"],
        "'fc1': linear('fc1', flatten=(64, 7, 7)),",
    ),
    "two layers behind one flatten": (
        partial(two_heads, symmetric=False),
        HEADS,
        "'value': linear('Dense_1', flatten=(3, 2, 2)),",
    ),
    "square layers of a function": (partial(square, transposed=True), SQUARE, "'second': 'second',"),
    "square layers, as PyTorch has them": (partial(square, transposed=False), SQUARE, "transposed=False"),
    "square layers in a list": (listed, ["0 and 2 more: linear('0')"], "'4': '2',"),
    "a square kernel that the port turns": (
        turned_kernel,
        ["2.weight: conv_transpose('up')"],
        "conv_transpose('up', flipped=False, transposed=False)",
    ),
    "the order of the gates of a function": (
        lstm_of_a_function,
        ["layer: lstm(''), or layer: lstm('', order='igfo')"],
        "'layer': lstm('', order='ifog'),",
    ),
    "two biases in one leaf": (
        gru_with_both_biases_in_one_leaf,
        ["gru: gru('kernel', 'recurrent_kernel', 'bias')"],
        "'gru': gru('kernel', 'recurrent_kernel', 'bias', order='zrn'),",
    ),
    "a square matrix that is no layer's": (partial(projection, transposed=False), MATRIX, "'': '',"),
    "a square matrix, transposed": (partial(projection, transposed=True), MATRIX, "same('', transposed=True)"),
    "equal neighbours": (neighbours, NEIGHBOURS, "'values': 'Dense_0',"),
    "equal neighbours, exchanged": (partial(neighbours, gates_first=True), NEIGHBOURS, "'values': 'Dense_1',"),
}


@pytest.mark.parametrize("name", ASKED)
def test_what_fits_in_two_ways_is_asked_for_and_the_outputs_decide_it(name: str) -> None:
    make, questions, answer = ASKED[name]
    case = Case(make())
    for asked, question in zip(ask(case).ambiguous, questions, strict=True):
        assert asked.startswith(question)
    decided = decide(case)
    assert answer in decided.python
    assert any(row.evidence.startswith("outputs: ") for row in decided.rows)


@pytest.mark.parametrize(
    ("path", "sizes"), [("{}.weight", lambda *size: size), ("blocks/{}/weight", lambda *size: (2, *size[::-1]))]
)
def test_layers_of_other_shapes_show_the_layout_of_square_ones(path: str, sizes: Any) -> None:
    """Test names with dots as PyTorch's, and layers that are stacked and turned; an embedding says nothing."""
    widths = {"up": (4, 8), "down": (8, 4), "out": (4, 4)}

    def layers() -> nn.ModuleDict:
        linears = {name: nn.Linear(*size, bias=False) for name, size in widths.items()}
        return nn.ModuleDict({**linears, "embed": nn.Embedding(5, 4)})

    stacked = path.startswith("blocks")
    module = nn.ModuleList([layers(), layers()]) if stacked else layers()
    leaves = {path.format(name): shape(*sizes(*size[::-1])) for name, size in widths.items()}
    leaves[path.format("embed")] = shape(2, 5, 4) if stacked else shape(5, 4)
    proposal = propose(module, leaves)
    assert proposal.ambiguous == ()
    tensors = {name: tensor.numpy() for name, tensor in module.state_dict().items()}
    square = np.asarray(proposal.map.to_leaves(tensors)[path.format("out")])
    expected = np.stack([tensors[f"{i}.out.weight"].T for i in (0, 1)]) if stacked else tensors["out.weight"]
    np.testing.assert_array_equal(square, expected)


@pytest.mark.parametrize(
    ("layer", "leaves"),
    [
        (nn.LSTM, {"i2h/w": (4, 24), "i2h/b": (24,), "h2h/w": (6, 24), "h2h/b": (24,)}),
        (
            nn.GRU,
            {
                "cell/hh_0/kernel": (6, 18),
                "cell/hh_0/bias": (18,),
                "cell/ih_0/kernel": (4, 18),
                "cell/ih_0/bias": (18,),
            },
        ),
        (nn.RNN, {"i/kernel": (4, 6), "i/bias": (6,), "h/kernel": (6, 6)}),
    ],
)
def test_a_cell_of_two_layers_is_carried_and_two_biases_become_one(layer: Any, leaves: dict[str, Any]) -> None:
    proposal = propose(layer(4, 6), {path: shape(*size) for path, size in leaves.items()})
    assert not proposal.gaps.torch
    assert not proposal.gaps.jax


def test_leaves_with_more_axes_are_tried_first_in_the_layout_of_the_others() -> None:
    """The outputs decide, but those of a faulty port cannot."""
    widths = {"up": (4, 8), "down": (8, 4), "out": (4, 4)}
    module = nn.ModuleDict({name: nn.Linear(*size, bias=False) for name, size in widths.items()})
    sizes = {"up.weights": (8, 4), "down.weights": (4, 8), "out.weights": (2, 2, 4)}
    (question,) = propose(module, {path: shape(*size) for path, size in sizes.items()}).ambiguous
    assert question.startswith("out.weight: linear('out.weights', transposed=False), or"), question


class OwnLinear(eqx.Module):
    """A layer of a user's own with the name of a library's, which holds [in, out]."""

    weight: jax.Array
    bias: jax.Array

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return the product of the weight and a row [in], as [out]."""
        return x @ self.weight + self.bias


OwnLinear.__name__ = "Linear"


def test_a_users_own_layer_is_not_taken_for_a_librarys_of_the_same_name() -> None:
    reference = nn.Linear(4, 4)
    case = Case(Pair(reference, OwnLinear(jnp.ones((4, 4)), jnp.ones(4)), np.ones((8, 4), np.float32)))
    tensors = {name: tensor.numpy() for name, tensor in reference.state_dict().items()}
    np.testing.assert_array_equal(case.weight_map.to_leaves(tensors)["weight"], tensors["weight"].T)


def test_the_kernel_of_a_users_own_convolution_is_carried_as_a_convolutions() -> None:
    sizes = {"weight": (4, 2, 3, 3), "bias": (4,)}
    own = TorchNet(lambda net, x: x, **{name: nn.Parameter(torch.randn(*size)) for name, size in sizes.items()})
    proposal = propose(nn.ModuleDict({"conv": own}), {"Conv_0/kernel": shape(3, 3, 2, 4), "Conv_0/bias": shape(4)})
    tensors = {name: tensor.numpy() for name, tensor in own.state_dict(prefix="conv.").items()}
    kernel = np.asarray(proposal.map.to_leaves(tensors)["Conv_0/kernel"])
    np.testing.assert_array_equal(kernel, tensors["conv.weight"].transpose(2, 3, 1, 0))


@pytest.mark.parametrize(
    "blocks", [partial(in_turn, heads=False), partial(in_turn, heads=True), in_a_scan], ids=["flat", "heads", "stacked"]
)
def test_fused_queries_keys_and_values_are_asked_for_where_names_do_not_tell(blocks: Callable[[Any], Any]) -> None:
    case = Case(flax_gpt2(blocks))
    (question,) = ask(case).ambiguous
    assert question.count("DenseGeneral_2'") >= 6  # orders
    decide(case)


@pytest.mark.parametrize(
    ("names", "question"),
    [
        (("dense_0", "dense_1"), None),  # as many numbers as in PyTorch, in this order
        (("q", "p"), "fc1 and fc2 -> p and q, or fc1 and fc2 -> q and p"),
        (
            ("dense_1", "dense_2", "dense_0"),
            "fc1 and fc2 -> dense_0 and dense_1, or fc1 and fc2 -> dense_1 and dense_0",
        ),
    ],
)
def test_layers_of_a_function_are_told_apart_by_their_numbers_or_asked_for(
    names: tuple[str, ...], question: str
) -> None:
    module = network(fc1=nn.Linear(4, 3), fc2=nn.Linear(4, 3))
    leaves = {f"{name}/{leaf}": size for name in names for leaf, size in (("w", shape(4, 3)), ("b", shape(3)))}
    proposal = propose(module, leaves)
    assert proposal.ambiguous == ((question,) if question else ())
    if not question:
        assert proposal.python.splitlines()[1:-1] == ["    'fc{i}': 'dense_{i-1}',"]


@pytest.mark.parametrize(
    ("make", "names"), [(neighbours, "Dense_1 and Dense_0"), (two_heads, "policy and value -> Dense_1 and Dense_0")]
)
def test_neighbours_whose_outputs_are_the_same_either_way_stay_open(make: Callable[..., Pair], names: str) -> None:
    (question,) = Case(make(symmetric=True)).proposal.ambiguous
    assert f"{names} (distances of the outputs 1.0e-06, 1.0e-06)" in question


def test_what_is_declared_is_no_question() -> None:
    decide(Case(replace(neighbours(symmetric=True), weights={"values": "Dense_0"})))
    flatten = {"fc1": linear("fc1", flatten=(64, 7, 7))}
    assert ask(Case(simple_cnn()), flatten).ambiguous == ()


def test_a_weight_that_the_port_lacks_is_told_before_what_is_open() -> None:
    pair = neighbours(symmetric=True)
    module = pair.new_module()
    module.add_module("norm", nn.LayerNorm(3))
    case = Case(replace(pair, torch_module=module))
    assert case.proposal.ambiguous
    assert [divergence.where for divergence in parameters(case)] == [
        "norm"
    ]  # in one line, because all of it is missing


def test_a_port_with_a_large_fault_is_compared_by_names_and_order_and_the_report_says_so() -> None:
    result = examine(neighbours(fault=100.0), names=("outputs",))
    assert "no map of the weights makes the outputs agree" in result.notes[0]
    assert result.notes[0].endswith("values and gates -> Dense_0 and Dense_1")
    assert [divergence.where for divergence in result.divergences] == ["output of the network"]


@pytest.mark.parametrize("kind", ["one", "three"])
def test_three_square_kernels_in_one_leaf_are_carried_in_pytorchs_layout(kind: str) -> None:
    """Neither the shape [3, 8, 8] nor the name tells it, but the outputs do."""

    def attend(net: Any, x: torch.Tensor) -> torch.Tensor:
        return net.out_proj(nn.functional.scaled_dot_product_attention(net.q(x), net.k(x), net.v(x)))

    def run(tree: Any, x: Any) -> Any:
        q, k, v = (x @ tree["attn"]["W"][i].T + tree["attn"]["b"][i] for i in range(3))
        x = jax.nn.softmax(q @ k.swapaxes(1, 2) / 8**0.5) @ v
        return x @ tree["attn"]["out"]["kernel"] + tree["attn"]["out"]["bias"]

    shapes = {"attn/W": (3, 8, 8), "attn/b": (3, 8), "attn/out/kernel": (8, 8), "attn/out/bias": (8,)}
    apart = TorchNet(attend, **{name: nn.Linear(8, 8) for name in ("q", "k", "v", "out_proj")})
    packed = TorchNet(lambda net, x: net.attn(x, x, x)[0], attn=nn.MultiheadAttention(8, 1, batch_first=True))
    decide(Case(port(packed if kind == "one" else apart, in_functions(shapes, run), values(2, 5, 8))))


def short_names(kind: str, slope: float = 1.0) -> Pair:
    """Return a recurrent network with its leaves in one dictionary, under short names; many are of one shape."""

    def lstm_step(tree: Any, carry: Any, x: Any) -> Any:
        state, cell = carry
        i, f, o, g = jnp.split(x @ tree["u"] + state @ tree["v"] + tree["w"], 4, -1)
        cell = jax.nn.sigmoid(f) * cell + jax.nn.sigmoid(i) * jnp.tanh(g)
        return jax.nn.sigmoid(o) * jnp.tanh(cell), cell

    def lstm_by_gates(tree: Any, carry: Any, x: Any) -> Any:
        state, cell = carry
        i, f, g, o = (x @ tree[f"W{gate}"] + state @ tree[f"U{gate}"] + tree[f"b{gate}"] for gate in "ifco")
        cell = jax.nn.sigmoid(f) * cell + jax.nn.sigmoid(i) * jnp.tanh(g)
        return jax.nn.sigmoid(o) * jnp.tanh(cell), cell

    def run(tree: Any, xs: Any) -> Any:
        step = lstm_step if kind == "packed" else lstm_by_gates
        zeros = jnp.zeros((len(xs), 4), xs.dtype)
        carry, _ = lax.scan(lambda carry, x: (step(tree, carry, x), None), (zeros, zeros), jnp.swapaxes(xs, 0, 1))
        x = carry[0] - carry[0].mean(-1, keepdims=True)
        x = x / jnp.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * tree["z"] + tree["a"]
        return slope * (jnp.tanh(x @ tree["k"] + tree["d"]) @ tree["j"] + tree["c"])

    packed = {"u": (4, 16), "v": (4, 16), "w": (16,)}
    apart = {f"{name}{gate}": size for gate in "ifco" for name, size in (("W", (3, 4)), ("U", (4, 4)), ("b", (4,)))}
    sizes = {"z": (4,), "a": (4,), "k": (4, 4), "d": (4,), "j": (4, 4), "c": (4,)}
    lstm = nn.LSTM(4 if kind == "packed" else 3, 4, batch_first=True)
    module = TorchNet(
        lambda net, x: net.two(torch.tanh(net.one(net.norm(net.lstm(x)[0][:, -1])))),
        two=nn.Linear(4, 4),
        one=nn.Linear(4, 4),
        norm=nn.LayerNorm(4),
        lstm=lstm,
    )
    leaves = sizes | (packed if kind == "packed" else apart)
    return port(module, in_functions(leaves, run), values(2, 5, lstm.input_size))


@pytest.mark.parametrize(
    ("kind", "cell"),
    [
        ("packed", "lstm('u', 'v', 'w', order='ifog')"),
        ("apart", "lstm('Wi', 'Wf', 'Wc', 'Wo', 'Ui', 'Uf', 'Uc', 'Uo', 'bi', 'bf', 'bc', 'bo')"),
    ],
)
def test_leaves_under_short_names_are_matched_by_the_order_of_their_use(kind: str, cell: str) -> None:
    decided = decide(Case(short_names(kind)))
    assert f"'lstm': {cell}," in decided.python
    faulty = Case(short_names(kind, slope=1.1)).proposal
    carried = {entry.jax: entry.torch for entry in faulty.map.entries}
    assert {"two.weight": ("j",), "norm.weight": ("z",), "norm.bias": ("a",)}.items() <= {
        torch: jax for jax, (torch, *_) in carried.items()
    }.items()


def test_four_layers_of_one_shape_are_told_apart_in_whatever_order_they_are_used() -> None:
    def attend(tree: Any, x: Any) -> Any:
        keys, values, queries = (x @ tree[name] for name in ("m1", "m2", "m3"))
        return jax.nn.softmax(queries @ keys.mT, -1) @ values @ tree["m4"]

    names = ("queries", "keys", "values", "out")
    module = TorchNet(
        lambda net, x: net.out((net.queries(x) @ net.keys(x).mT).softmax(-1) @ net.values(x)),
        **{name: nn.Linear(4, 4, bias=False) for name in names},
    )
    pair = port(module, in_functions({f"m{number}": (4, 4) for number in (1, 2, 3, 4)}, attend), values(2, 5, 4))
    carried = {entry.torch: entry.jax for entry in decide(Case(pair)).map.entries}
    assert carried == {(f"{name}.weight",): (leaf,) for name, leaf in zip(names, ("m3", "m1", "m2", "m4"), strict=True)}


def test_many_square_weights_under_short_names_are_carried_in_one_layout() -> None:
    def run(tree: Any, x: Any) -> Any:
        for number in range(30):
            x = jnp.tanh(x @ tree[f"w{number}"].T)
        return x

    layers = [layer for _ in range(30) for layer in (nn.Linear(3, 3, bias=False), nn.Tanh())]
    pair = port(nn.Sequential(*layers), in_functions({f"w{number}": (3, 3) for number in range(30)}, run), values(2, 3))
    decide(Case(pair))


def test_layers_and_directions_under_short_names_are_told_apart_by_sizes_and_outputs() -> None:
    def both_ways(x: Any) -> Any:
        for layer in range(2):
            cells = [linen.GRUCell(4, name=f"{side}{layer}") for side in "fb"]
            states: list[Any] = [linen.RNN(cell, reverse=cell is cells[1], keep_order=True)(x) for cell in cells]
            x = jnp.concatenate(states, -1)
        return x

    gru = nn.GRU(3, 4, 2, bidirectional=True, batch_first=True)
    decide(Case(port(TorchNet(lambda net, x: net.gru(x)[0], gru=gru), LinenNet(both_ways), values(2, 5, 3))))


class EquinoxNeighbours(eqx.Module):
    """The sum of both in Equinox."""

    one: eqx.nn.Linear
    other: eqx.nn.Linear

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return the sum [3] of what both layers compute."""
        return self.one(x) + self.other(x)


def test_values_of_a_pair_whose_port_was_filled_before_are_evidence() -> None:
    module = neighbours(symmetric=True).new_module()
    one, other = (
        eqx.tree_at(
            lambda new: (new.weight, new.bias),
            eqx.nn.Linear(4, 3, key=KEY),
            tuple(jnp.asarray(leaf.detach().numpy()) for leaf in module.get_submodule(name).parameters()),
        )
        for name in ("gates", "values")
    )
    proposal = Case(Pair(module, EquinoxNeighbours(one, other), values(2, 4))).proposal
    assert proposal.ambiguous == ()
    assert {(row.torch, row.jax, row.evidence) for row in proposal.rows if "weight" in row.torch} == {
        ("gates.weight", "one/weight", "values"),
        ("values.weight", "other/weight", "values"),
    }


def test_values_decide_the_layout_of_a_square_layer() -> None:
    pair = square(transposed=False)
    held = {name: jnp.asarray(tensor.numpy()) for name, tensor in pair.new_module().state_dict().items()}
    tree = {name: {"w": held[f"{name}.weight"], "b": held[f"{name}.bias"]} for name in ("first", "second")}
    decided = decide(Case(replace(pair, jax_model=(tree, pair.jax_model[1]))))
    assert {row.evidence for row in decided.rows} == {"values"}


# What is left out


def test_tensors_that_a_layers_rule_does_not_know_go_by_their_names() -> None:
    with pytest.warns(FutureWarning):
        fc = nn.utils.weight_norm(nn.Linear(5, 4))
    norm = type("RMSNorm", (nn.Module,), {})()
    norm.gamma = nn.Parameter(torch.ones(4))
    leaves = {"fc/weight_g": shape(4, 1), "fc/weight_v": shape(4, 5), "fc/bias": shape(4), "norm/scale": shape(4)}
    assert propose(network(fc=fc, norm=norm), leaves).gaps[:2] == ((), ())


def test_tensors_that_nothing_maps_are_named() -> None:
    jax_model = flax_recurrent(linen.GRUCell)
    gaps = ask(Case(port(torch_recurrent(nn.GRU, 1), jax_model, values(2, 5, 3)))).gaps
    assert gaps.torch == ()
    assert {path.partition("/")[0] for path in gaps.jax} == {"GRUCell_1"}
    gaps = Case(port(torch_recurrent(nn.GRU, 3), jax_model, values(2, 5, 3))).proposal.gaps
    assert gaps.torch == ("rnn.weight_ih_l2", "rnn.weight_hh_l2", "rnn.bias_ih_l2", "rnn.bias_hh_l2")
    assert gaps.jax == ()


def tied() -> Pair:
    """Return embeddings and a head that is tied to them in PyTorch alone."""

    def untied(ids: Any) -> Any:
        x = linen.Dense(6, name="fc")(linen.Embed(11, 6, name="embed")(ids))
        return linen.Dense(11, use_bias=False, name="head")(x)

    embed, head = nn.Embedding(11, 6), nn.Linear(6, 11, bias=False)
    head.weight = embed.weight
    return port(network(embed=embed, fc=nn.Linear(6, 6), head=head), LinenNet(untied), IDS)


def test_a_head_that_only_pytorch_ties_is_carried_twice_and_named() -> None:
    case = Case(tied())
    assert error_of(case) < RIGHT
    assert case.proposal.gaps.untied == {"embed.weight": ("embed/embedding", "head/kernel")}
    assert case.proposal.gaps.jax == ()


def test_what_the_user_declares_wrongly_is_refused() -> None:
    with pytest.raises(Refused, match="'haed' is no module and no leaf of JAX; close are head"):
        _ = Case(replace(tied(), weights={"head": "haed"})).proposal

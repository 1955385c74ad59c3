"""The map of weights is proposed with its evidence, gives itself again as Python, and asks where two maps fit."""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import haiku as hk
import jax
import numpy as np
import pytest
import torch
import torchvision
from flax import linen
from jax import numpy as jnp
from torch import nn

from experiments.large_ports import GPT2, Sizes
from jax_cnn.model import SimpleCNN as JaxSimpleCNN
from parity_tests.harness import Pair
from parity_tests.harness import weights as rules
from parity_tests.harness.capture import Case
from parity_tests.harness.propose import Judge, Proposal, propose
from parity_tests.harness.weights import CannotCarry, WeightMap, declare, linear
from parity_tests.parity.test_weights import (
    KEY,
    LAYERS,
    Side,
    draw,
    in_haiku,
    in_linen,
    last,
    nest,
    randomise,
    shape,
    tensors_of,
)
from torch_ref.model import SimpleCNN

Order = list[tuple[str, str]]


class Port(NamedTuple):
    """Both sides of a port, the inputs of the reference, and the order of JAX's calls."""

    module: nn.Module
    inputs: tuple[np.ndarray, ...]
    side: Side
    jax_order: Order


def torch_order(port: Port) -> Order:
    """Return PyTorch's modules in the order of their calls."""
    order: Order = []
    hooks = [
        inner.register_forward_pre_hook(
            partial(lambda name, inner, inputs: order.append((name, type(inner).__name__)), name)
        )
        for name, inner in port.module.named_modules()
    ]
    with torch.no_grad():
        port.module(*map(torch.from_numpy, port.inputs))
    for hook in hooks:
        hook.remove()
    return order


def linen_order(module: linen.Module, *inputs: Any) -> Order:
    """Return the modules of a Linen model in the order of their calls."""
    order: Order = []

    def intercept(run: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        if context.method_name == "__call__":
            order.append(("/".join(context.module.path), type(context.module).__name__))
        return run(*args, **kwargs)

    with linen.intercept_methods(intercept):
        jax.eval_shape(module.init, KEY, *inputs)
    return order


def linen_port(module: nn.Module, jax_module: linen.Module, inputs: np.ndarray, jax_inputs: Any = None) -> Port:
    """Return a port to Linen."""
    given = inputs if jax_inputs is None else jax_inputs
    return Port(randomise(module), (inputs,), in_linen(jax_module, given), linen_order(jax_module, given))


def judge_of(port: Port) -> Judge:
    """Return the distance of both sides' outputs with a map."""
    with torch.no_grad():
        expected = port.module(*map(torch.from_numpy, port.inputs)).numpy()
    run = jax.jit(port.side.run)
    return lambda weights: float(
        np.abs(run(weights.to_leaves(tensors_of(port.module))) - expected).max() / expected.std()
    )


def propose_for(
    port: Port, declared: Mapping[str, Any] | None = None, judged: bool = False, leaves: Any = None
) -> Proposal:
    """Propose the map of a port, and check that its Python gives the same map."""
    judge = judge_of(port) if judged else None
    leaves = port.side.leaves if leaves is None else leaves
    proposal = propose(port.module, leaves, declared, torch_order(port), port.jax_order, judge)
    again = declare(read(proposal.python), port.module, port.side.leaves)
    assert {(entry.torch, entry.jax) for entry in again.entries} == {(e.torch, e.jax) for e in proposal.map.entries}
    tensors = tensors_of(port.module)
    first, second = proposal.map.to_leaves(tensors), again.to_leaves(tensors)
    assert all(np.array_equal(first[path], second[path]) for path in first), proposal.python
    return proposal


def read(python: str) -> dict[str, Any]:
    """Return the mapping that Python text gives."""
    return eval(f"dict({python})", vars(rules) | {"__builtins__": {"dict": dict}})["weights"]


def is_right(port: Port, weights: WeightMap) -> bool:
    """Say whether both sides give equal outputs with this map."""
    return judge_of(port)(weights) < 1e-4


# Networks


def simple_cnn() -> Port:
    images = draw(2, 1, 28, 28)
    return linen_port(SimpleCNN(), JaxSimpleCNN(fused=False), images, jnp.asarray(last(images)))


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


def resnet18(shortcut_first: bool = False) -> Port:
    images = draw(2, 3, 32, 32)
    module = torchvision.models.resnet18(num_classes=10)
    return linen_port(module, ResNet18(shortcut_first), images, last(images))


def resnet18_shortcut_first() -> Port:
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


def plain_leaves(blocks: int) -> dict[str, Any]:
    """Return the shapes of that tree."""
    leaves = {"wte": shape(11, 8), "wpe": shape(6, 8), "ln_f/g": shape(8), "ln_f/b": shape(8)}
    for index in range(blocks):
        sizes = {"attn/c_attn": (8, 24), "attn/c_proj": (8, 8), "mlp/c_fc": (8, 32), "mlp/c_proj": (32, 8)}
        for name, (inputs, outputs) in sizes.items():
            leaves |= {f"blocks/{index}/{name}/w": shape(inputs, outputs), f"blocks/{index}/{name}/b": shape(outputs)}
        leaves |= {f"blocks/{index}/{name}/{leaf}": shape(8) for name in ("ln_1", "ln_2") for leaf in "gb"}
    return leaves


IDS = np.array([[1, 5, 2, 7], [3, 3, 0, 10]])
SIZES = Sizes(layers=3, heads=2, features=8, vocabulary=11, positions=6)


def gpt2_in_functions() -> Port:
    run = lambda leaves: plain_gpt2(nest(leaves), IDS)  # noqa: E731
    return Port(randomise(GPT2(SIZES)), (IDS,), Side(plain_leaves(3), run), [])


class FlaxBlock(linen.Module):
    """A block of GPT-2 whose queries, keys and values are apart, with Flax's own names."""

    heads: bool = False

    @linen.compact
    def __call__(self, x: Any) -> Any:
        """Compute [batch, time, 8]."""
        y = linen.LayerNorm(epsilon=1e-5)(x)
        size = (2, 4) if self.heads else 8
        x = x + linen.Dense(8)(attend(*(linen.DenseGeneral(size)(y) for _ in range(3))))
        return x + linen.Dense(8)(linen.gelu(linen.Dense(32)(linen.LayerNorm(epsilon=1e-5)(x))))


class FlaxGPT2(linen.Module):
    """GPT-2 in Flax."""

    heads: bool = False

    @linen.compact
    def __call__(self, ids: Any) -> Any:
        """Compute the logits."""
        tokens = linen.Embed(11, 8)
        x = tokens(ids) + linen.Embed(6, 8)(jnp.arange(ids.shape[1]))
        for _ in range(3):
            x = FlaxBlock(self.heads)(x)
        return tokens.attend(linen.LayerNorm(epsilon=1e-5)(x))


def gpt2_in_flax(heads: bool = False) -> Port:
    return linen_port(GPT2(SIZES), FlaxGPT2(heads), IDS)


class BertAttention(nn.Module):
    """BERT's attention, with Hugging Face's names."""

    def __init__(self) -> None:
        super().__init__()
        self.self = nn.ModuleDict({name: nn.Linear(8, 8) for name in ("query", "key", "value")})
        self.output = nn.ModuleDict({"dense": nn.Linear(8, 8), "LayerNorm": nn.LayerNorm(8, eps=1e-12)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute [batch, time, 8]."""
        q, k, v = (layer(x).unflatten(-1, (2, 4)).transpose(1, 2) for layer in self.self.values())
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2)
        return self.output["LayerNorm"](x + self.output["dense"](y))


class BertLayer(nn.Module):
    """A layer of BERT."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = BertAttention()
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(8, 32)})
        self.output = nn.ModuleDict({"dense": nn.Linear(32, 8), "LayerNorm": nn.LayerNorm(8, eps=1e-12)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute [batch, time, 8]."""
        x = self.attention(x)
        hidden = nn.functional.gelu(self.intermediate["dense"](x))
        return self.output["LayerNorm"](x + self.output["dense"](hidden))


class Bert(nn.Module):
    """BERT with Hugging Face's names, and a decoder that is tied but for its bias."""

    def __init__(self) -> None:
        super().__init__()
        names = {"word_embeddings": 11, "position_embeddings": 6, "token_type_embeddings": 2}
        embeddings = {name: nn.Embedding(size, 8) for name, size in names.items()}
        self.embeddings = nn.ModuleDict({**embeddings, "LayerNorm": nn.LayerNorm(8, eps=1e-12)})
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(BertLayer() for _ in range(2))})
        self.cls = nn.ModuleDict({"dense": nn.Linear(8, 8), "LayerNorm": nn.LayerNorm(8), "decoder": nn.Linear(8, 11)})
        self.cls["decoder"].weight = embeddings["word_embeddings"].weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Compute the logits."""
        e = self.embeddings
        x = (
            e["word_embeddings"](ids)
            + e["position_embeddings"](torch.arange(ids.shape[1]))
            + e["token_type_embeddings"](0 * ids)
        )
        x = e["LayerNorm"](x)
        for layer in self.encoder["layer"].children():
            x = layer(x)
        return self.cls["decoder"](self.cls["LayerNorm"](nn.functional.gelu(self.cls["dense"](x))))


class FlaxBertLayer(linen.Module):
    """A layer of BERT with other names."""

    @linen.compact
    def __call__(self, x: Any) -> Any:
        """Compute [batch, time, 8]."""
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
            x = FlaxBertLayer(name=f"layer_{index}")(x)
        x = linen.gelu(linen.Dense(8, name="transform")(x), approximate=False)
        x = linen.LayerNorm(epsilon=1e-5, name="transform_norm")(x)
        return words.attend(x) + self.param("decoder_bias", linen.initializers.zeros, (11,))


def bert() -> Port:
    return linen_port(Bert(), FlaxBert(), IDS)


class TorchRecurrent(nn.Module):
    """Two recurrent layers and a linear one."""

    def __init__(self, kind: Any, **options: Any) -> None:
        super().__init__()
        self.rnn, self.fc = kind(3, 4, batch_first=True, **options), nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute [batch, time, 2]."""
        return self.fc(self.rnn(x)[0])


class FlaxRecurrent(linen.Module):
    """The same in Flax."""

    cell: Any

    @linen.compact
    def __call__(self, x: Any) -> Any:
        """Compute [batch, time, 2]."""
        for _ in range(2):
            x = linen.RNN(self.cell(4))(x)
        return linen.Dense(2)(x)


def lstm_in_flax() -> Port:
    x = draw(2, 5, 3)
    return linen_port(TorchRecurrent(nn.LSTM, num_layers=2), FlaxRecurrent(linen.OptimizedLSTMCell), x)


def gru_in_flax() -> Port:
    return linen_port(TorchRecurrent(nn.GRU, num_layers=2), FlaxRecurrent(linen.GRUCell), draw(2, 5, 3))


def lstm_in_haiku() -> Port:
    def function(x: Any) -> Any:
        for _ in range(2):
            core = hk.LSTM(4)
            x = hk.dynamic_unroll(core, x, core.initial_state(2), time_major=False)[0]
        return hk.Linear(2)(x)

    x = draw(2, 5, 3)
    order = [
        ("lstm", "LSTM"),
        ("lstm/linear", "Linear"),
        ("lstm_1", "LSTM"),
        ("lstm_1/linear", "Linear"),
        ("linear", "Linear"),
    ]
    return Port(randomise(TorchRecurrent(nn.LSTM, num_layers=2)), (x,), in_haiku(function, x), order)


class SelfAttention(nn.Module):
    """Norm, attention and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attn, self.out = nn.LayerNorm(8), nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute [batch, time, 8]."""
        x = self.norm(x)
        return self.out(self.attn(x, x, x)[0])


class FlaxSelfAttention(linen.Module):
    """The same in Flax."""

    @linen.compact
    def __call__(self, x: Any) -> Any:
        """Compute [batch, time, 8]."""
        x = linen.LayerNorm(epsilon=1e-5)(x)
        return linen.Dense(8)(linen.MultiHeadDotProductAttention(2)(x, x))


def attention() -> Port:
    return linen_port(SelfAttention(), FlaxSelfAttention(), draw(2, 5, 8))


class Mobile(linen.Module):
    """A depthwise convolution, batch norm, a pointwise and a transposed convolution."""

    @linen.compact
    def __call__(self, x: Any) -> Any:
        """Compute [batch, row, column, 4]."""
        x = linen.Conv(4, (3, 3), padding="VALID", feature_group_count=4)(x)
        x = linen.relu(linen.BatchNorm(use_running_average=True)(x))
        return linen.ConvTranspose(4, (3, 3), (2, 2), "VALID")(linen.Conv(6, (1, 1))(x))


def mobile() -> Port:
    layers = [
        nn.Conv2d(4, 4, 3, groups=4),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 6, 1),
        nn.ConvTranspose2d(6, 4, 3, 2),
    ]
    images = draw(2, 4, 8, 8)
    port = linen_port(nn.Sequential(*layers), Mobile(), images, last(images))
    return port._replace(side=Side(port.side.leaves, lambda leaves: jnp.moveaxis(port.side.run(leaves), -1, 1)))


class ScannedBlock(linen.Module):
    """A block of GPT-2 for a scan."""

    @linen.compact
    def __call__(self, x: Any, _: None) -> Any:
        """Compute [batch, time, 8]."""
        return FlaxBlock()(x), None


class ScannedGPT2(linen.Module):
    """GPT-2 whose blocks are stacked."""

    @linen.compact
    def __call__(self, ids: Any) -> Any:
        """Compute the logits."""
        tokens = linen.Embed(11, 8)
        x = tokens(ids) + linen.Embed(6, 8)(jnp.arange(ids.shape[1]))
        scan = linen.scan(ScannedBlock, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return tokens.attend(linen.LayerNorm(epsilon=1e-5)(scan()(x, None)[0]))


def gpt2_in_a_scan() -> Port:
    return linen_port(GPT2(SIZES), ScannedGPT2(), IDS)


class Mixing(nn.Module):
    """A block with parameters of its own; the first one begins with a norm."""

    def __init__(self, first: bool) -> None:
        super().__init__()
        if first:
            self.before = nn.LayerNorm(8)
        self.fc = nn.Linear(8, 6, bias=False)
        self.mix_key, self.mix_value = (nn.Parameter(torch.rand(1, 1, 8)) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute [batch, time, 8] from the same."""
        x = self.before(x) if hasattr(self, "before") else x
        return x + self.fc(x * self.mix_key) @ self.fc.weight * self.mix_value


def mixing_in_a_stack() -> Port:
    def run(leaves: Mapping[str, Any]) -> Any:
        tree = nest(leaves)
        x = (inputs - inputs.mean(-1, keepdims=True)) / np.sqrt(inputs.var(-1, keepdims=True) + 1e-5)
        x = x * tree["norm"]["weight"] + tree["norm"]["bias"]
        for number in range(3):
            block = jax.tree.map(lambda leaf, number=number: leaf[number], tree["blocks"])
            x = x + (x * block["mix_k"] @ block["fc"]["weight"].T) @ block["fc"]["weight"] * block["mix_v"]
        return x

    inputs = draw(2, 5, 8)
    shapes = {"fc/weight": (3, 6, 8), "mix_k": (3, 8), "mix_v": (3, 8)}
    leaves = {f"blocks/{path}": shape(*size) for path, size in shapes.items()}
    leaves |= {"norm/weight": shape(8), "norm/bias": shape(8)}
    module = nn.Sequential(OrderedDict(h=nn.Sequential(*(Mixing(number == 0) for number in range(3)))))
    return Port(randomise(module), (inputs,), Side(leaves, run), [])


def critics_in_a_stack() -> Port:
    """Return a port that stacks two networks, whose number is a part of their names in PyTorch."""

    class Critic(linen.Module):
        @linen.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            return linen.Dense(1)(linen.Dense(4)(linen.tanh(linen.Dense(4)(x))))

    class Critics(linen.Module):
        @linen.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            both = linen.vmap(Critic, {"params": 0}, {"params": True}, in_axes=None, axis_size=2)
            return both()(x)

    class Reference(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for number in range(2):
                layers = nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 1)
                self.add_module(f"qf{number}", nn.Sequential(*layers))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.stack([network(x) for network in self.children()])

    return linen_port(Reference(), Critics(), draw(2, 3))


def layers_that_add_up() -> Port:
    """Return a port whose first two layers have as many values as the third, and keep their names."""

    class Wide(linen.Module):
        @linen.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            x = linen.Dense(4, name="dense")(linen.Dense(12, name="qkv")(x)[..., :4])
            return linen.Dense(16, name="expand")(x)

    class Reference(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.dense, self.h_to_4h = nn.Linear(4, 12), nn.Linear(4, 4), nn.Linear(4, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.h_to_4h(self.dense(self.qkv(x)[..., :4]))

    return linen_port(Reference(), Wide(), draw(2, 4))


def normalised_weights() -> Port:
    """Return a port whose weights are directions and lengths: of convolutions, one of them transposed, and a layer."""

    class Normalised(linen.Module):
        @linen.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            for layer in (
                linen.ConvTranspose(6, (2,), (2,), transpose_kernel=True),
                linen.Conv(4, (3,)),
                linen.Dense(5),
            ):
                x = linen.WeightNorm(layer)(x)
            return x

    class Reference(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            with pytest.warns(FutureWarning):
                self.up = nn.utils.weight_norm(nn.ConvTranspose1d(3, 6, 2, 2))
            self.down = nn.utils.parametrizations.weight_norm(nn.Conv1d(6, 4, 3, padding=1))
            self.fc = nn.utils.parametrizations.weight_norm(nn.Linear(4, 5))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(self.down(self.up(x.mT)).mT)

    return linen_port(Reference(), Normalised(), draw(2, 7, 3))


SURE: dict[str, Callable[[], Port]] = {
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
        mobile,
    )
}


# What is sure


@pytest.mark.parametrize("name", SURE)
def test_map_is_found_without_a_question(name: str) -> None:
    port = SURE[name]()
    proposal = propose_for(port)
    assert proposal.ambiguous == ()
    assert proposal.gaps[:4] == ((), (), (), {})
    assert is_right(port, proposal.map)
    assert {row.torch for row in proposal.rows} == {", ".join(entry.torch) for entry in proposal.map.entries}
    assert all(row.evidence for row in proposal.rows)


def test_python_is_folded_into_patterns() -> None:
    assert propose_for(resnet18()).python.splitlines() == [
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
    declared = {"layer{i}.{j}": "Basic_{2*i+j-2}", "fc": linear("Dense_0")}
    port = resnet18()
    proposal = propose_for(port, declared)
    assert is_right(port, proposal.map)
    assert {row.evidence for row in proposal.rows if row.torch.startswith("fc")} == {"declared"}
    wrong = {"layer{i}.{j}": "Basic_{8-2*i-j+1}"}  # the blocks backwards: most of them fit nowhere then
    assert "layer1.0.conv1.weight" in propose_for(port, wrong).gaps.torch


# What is asked


def test_a_linear_layer_behind_a_flatten_is_asked_for() -> None:
    port = simple_cnn()
    proposal = propose_for(port)
    assert proposal.ambiguous == ("fc1: linear('fc1'), or fc1: linear('fc1', flatten=(64, 7, 7))",)
    decided = propose_for(port, judged=True)
    assert decided.ambiguous == ()
    assert is_right(port, decided.map)
    assert "'fc1': linear('fc1', flatten=(64, 7, 7))," in decided.python
    (row,) = (row for row in decided.rows if row.torch == "fc1.weight")
    assert row.evidence.startswith("outputs: ")
    assert propose_for(port, {"fc1": linear("fc1", flatten=(64, 7, 7))}).ambiguous == ()


class Heads(nn.Module):
    """Two layers behind one flatten, for a policy and a value."""

    def __init__(self, symmetric: bool) -> None:
        super().__init__()
        self.conv, self.symmetric = nn.Conv2d(1, 3, 3), symmetric
        self.policy, self.value = nn.Linear(12, 2), nn.Linear(12, 2 if symmetric else 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute [batch, 3], or the sum of both."""
        x = torch.flatten(torch.relu(self.conv(x)), 1)
        return self.policy(x) + self.value(x) if self.symmetric else torch.cat([self.policy(x), self.value(x)], -1)


class FlaxHeads(linen.Module):
    """The same in Flax."""

    symmetric: bool

    @linen.compact
    def __call__(self, x: Any) -> Any:
        """Compute [batch, 3], or the sum of both."""
        x = linen.relu(linen.Conv(3, (3, 3), padding="VALID")(x)).reshape(len(x), -1)
        heads = linen.Dense(2)(x), linen.Dense(2 if self.symmetric else 1)(x)
        return heads[0] + heads[1] if self.symmetric else jnp.concatenate(heads, -1)


@pytest.mark.parametrize("symmetric", [False, True])
def test_two_layers_behind_one_flatten_are_asked_for(symmetric: bool) -> None:
    images = draw(2, 1, 4, 4)
    port = linen_port(Heads(symmetric), FlaxHeads(symmetric), images, jnp.asarray(last(images)))
    decided = propose_for(port, judged=True)
    assert is_right(port, decided.map)
    if symmetric:
        (question,) = decided.ambiguous
        assert "policy and value -> Dense_1 and Dense_0 (distances of the outputs 1.0e-06, 1.0e-06)" in question
    else:
        assert decided.ambiguous == ()
        assert "'value': linear('Dense_1', flatten=(3, 2, 2))," in decided.python


@pytest.mark.parametrize("make", [gpt2_in_flax, partial(gpt2_in_flax, heads=True), gpt2_in_a_scan])
def test_fused_queries_keys_and_values_are_asked_for_where_names_do_not_tell(make: Callable[[], Port]) -> None:
    port = make()
    (question,) = propose_for(port).ambiguous
    assert question.count("DenseGeneral_2'") >= 6  # orders
    decided = propose_for(port, judged=True)
    assert decided.ambiguous == ()
    assert decided.gaps[:4] == ((), (), (), {})
    assert is_right(port, decided.map)


class Square(nn.Module):
    """Two square layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 5), nn.Linear(5, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute [batch, 5]."""
        return self.second(torch.tanh(self.first(x)))


def square(transposed: bool) -> Port:
    x = draw(3, 5)

    def run(leaves: Mapping[str, Any]) -> Any:
        turn = (lambda w: w) if transposed else jnp.transpose
        hidden = jnp.tanh(x @ turn(leaves["first/w"]) + leaves["first/b"])
        return hidden @ turn(leaves["second/w"]) + leaves["second/b"]

    leaves = {
        f"{name}/{leaf}": shape(*sizes) for name in ("first", "second") for leaf, sizes in (("w", (5, 5)), ("b", (5,)))
    }
    return Port(randomise(Square()), (x,), Side(leaves, run), [])


@pytest.mark.parametrize("transposed", [True, False])
def test_square_layers_of_a_function_are_asked_for(transposed: bool) -> None:
    port = square(transposed)
    (question,) = propose_for(port).ambiguous
    assert question == "first and 1 more: linear('first'), or first and 1 more: linear('first', transposed=False)"
    decided = propose_for(port, judged=True)
    assert decided.ambiguous == ()
    assert is_right(port, decided.map)


def test_the_order_of_the_gates_of_a_function_is_asked_for() -> None:
    one = LAYERS["lstm_with_another_order_of_gates"]()
    port = Port(randomise(one.module), one.inputs, one.side, [])
    (question,) = propose_for(port).ambiguous
    assert question.startswith("layer: lstm(''), or layer: lstm('', order='igfo')")
    decided = propose_for(port, judged=True)
    assert decided.ambiguous == ()
    assert is_right(port, decided.map)
    assert "'layer': lstm('', order='ifog')," in decided.python


@pytest.mark.parametrize(
    ("path", "sizes"), [("{}.weight", lambda *size: size), ("blocks/{}/weight", lambda *size: (2, *size[::-1]))]
)
def test_layers_of_other_shapes_show_the_layout_of_square_ones(path: str, sizes: Any) -> None:
    """Test leaves under PyTorch's names, with dots, and layers that are stacked and turned."""
    widths = {"up": (4, 8), "down": (8, 4), "out": (4, 4)}

    def layers() -> nn.ModuleDict:
        return nn.ModuleDict({name: nn.Linear(*size, bias=False) for name, size in widths.items()})

    stacked = path.startswith("blocks")
    module = nn.ModuleList([layers(), layers()]) if stacked else layers()
    leaves = {path.format(name): shape(*sizes(*size[::-1])) for name, size in widths.items()}
    proposal = propose(randomise(module), leaves)
    assert proposal.ambiguous == ()
    tensors = tensors_of(module)
    square = np.asarray(proposal.map.to_leaves(tensors)[path.format("out")])
    expected = np.stack([tensors[f"{i}.out.weight"].T for i in (0, 1)]) if stacked else tensors["out.weight"]
    np.testing.assert_array_equal(square, expected)


class OwnLinear(eqx.Module):
    """A layer of a user's own with the name of a library's, which holds [in, out]."""

    weight: jax.Array
    bias: jax.Array

    def __call__(self, x: jax.Array) -> jax.Array:
        """Compute [out]."""
        return x @ self.weight + self.bias


OwnLinear.__name__ = "Linear"


def test_a_users_own_layer_is_not_taken_for_a_librarys_of_the_same_name() -> None:
    reference = nn.Linear(4, 4)
    case = Case(Pair(reference, OwnLinear(jnp.ones((4, 4)), jnp.ones(4)), np.ones((8, 4), np.float32)))
    tensors = tensors_of(reference)
    np.testing.assert_array_equal(case.weight_map.to_leaves(tensors)["weight"], tensors["weight"].T)


class Projection(nn.Module):
    """A matrix that is no layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.matrix = nn.LayerNorm(4), nn.Parameter(torch.zeros(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute [batch, 4]."""
        return self.norm(x) @ self.matrix


class FlaxProjection(linen.Module):
    """The same in Flax, where the matrix may be the other way round."""

    transposed: bool

    @linen.compact
    def __call__(self, x: Any) -> Any:
        """Compute [batch, 4]."""
        matrix = self.param("matrix", linen.initializers.normal(), (4, 4))
        return linen.LayerNorm(epsilon=1e-5, name="norm")(x) @ (matrix.T if self.transposed else matrix)


@pytest.mark.parametrize("transposed", [True, False])
def test_a_square_matrix_that_is_no_layers_is_asked_for(transposed: bool) -> None:
    port = linen_port(Projection(), FlaxProjection(transposed), draw(2, 4))
    assert len(propose_for(port).ambiguous) == 1
    decided = propose_for(port, judged=True)
    assert decided.ambiguous == ()
    assert is_right(port, decided.map)


class Neighbours(nn.Module):
    """Two layers of one shape beside each other."""

    def __init__(self, symmetric: bool = False) -> None:
        super().__init__()
        self.values, self.gates, self.symmetric = nn.Linear(4, 3), nn.Linear(4, 3), symmetric

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Compute [batch, 3]."""
        values, gates = self.values(x), self.gates(x)
        return values + gates if self.symmetric else values * torch.sigmoid(gates)


class FlaxNeighbours(linen.Module):
    """The same in Flax, which may call the gates first."""

    gates_first: bool
    symmetric: bool = False

    @linen.compact
    def __call__(self, x: Any) -> Any:
        """Compute [batch, 3]."""
        one, other = linen.Dense(3)(x), linen.Dense(3)(x)
        values, gates = (other, one) if self.gates_first else (one, other)
        return values + gates if self.symmetric else values * linen.sigmoid(gates)


@pytest.mark.parametrize("gates_first", [True, False])
def test_equal_neighbours_are_asked_for(gates_first: bool) -> None:
    port = linen_port(Neighbours(), FlaxNeighbours(gates_first), draw(2, 4))
    (question,) = propose_for(port).ambiguous
    assert question == "values and gates -> Dense_0 and Dense_1, or values and gates -> Dense_1 and Dense_0"
    decided = propose_for(port, judged=True)
    assert decided.ambiguous == ()
    assert is_right(port, decided.map)


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
    module = nn.Sequential(OrderedDict(fc1=nn.Linear(4, 3), fc2=nn.Linear(4, 3)))
    leaves = {f"{name}/{leaf}": size for name in names for leaf, size in (("w", shape(4, 3)), ("b", shape(3)))}
    proposal = propose(module, leaves)
    assert proposal.ambiguous == ((question,) if question else ())
    if not question:
        assert proposal.python.splitlines()[1:-1] == ["    'fc{i}': 'dense_{i-1}',"]


def test_neighbours_whose_outputs_are_the_same_either_way_stay_open() -> None:
    port = linen_port(Neighbours(symmetric=True), FlaxNeighbours(False, symmetric=True), draw(2, 4))
    (question,) = propose_for(port, judged=True).ambiguous
    assert "Dense_1 and Dense_0 (distances of the outputs 1.0e-06, 1.0e-06)" in question
    declared = propose_for(port, {"values": "Dense_0"}, judged=True)
    assert declared.ambiguous == ()


def test_a_port_with_a_large_fault_leaves_open_what_values_cannot_decide() -> None:
    port = linen_port(Neighbours(), FlaxNeighbours(gates_first=False), draw(2, 4))
    faulty = port._replace(side=Side(port.side.leaves, lambda leaves: 100 + port.side.run(leaves)))
    assert len(propose_for(faulty, judged=True).ambiguous) == 1


def test_values_that_the_port_carried_itself_are_evidence() -> None:
    port = linen_port(Neighbours(), FlaxNeighbours(gates_first=True), draw(2, 4))
    mapping = {"values": "Dense_1", "gates": "Dense_0"}
    leaves = declare(mapping, port.module, port.side.leaves).to_leaves(tensors_of(port.module))
    proposal = propose_for(port, leaves=leaves)
    assert proposal.ambiguous == ()
    assert {row.evidence for row in proposal.rows} == {"values"}
    assert is_right(port, proposal.map)
    fresh = {path: jnp.zeros_like(leaf) for path, leaf in leaves.items()}
    assert len(propose_for(port, leaves=fresh).ambiguous) == 1


class EquinoxNeighbours(eqx.Module):
    """The sum of both in Equinox."""

    one: eqx.nn.Linear
    other: eqx.nn.Linear

    def __call__(self, x: jax.Array) -> jax.Array:
        """Return the sum [3] of what both layers compute."""
        return self.one(x) + self.other(x)


def test_values_of_a_pair_whose_port_was_filled_before_are_evidence() -> None:
    module = Neighbours(symmetric=True)
    one, other = (
        eqx.tree_at(lambda new: (new.weight, new.bias), eqx.nn.Linear(4, 3, key=KEY), tuple(map(jnp.asarray, values)))
        for values in (
            [leaf.detach().numpy() for leaf in layer.parameters()] for layer in (module.gates, module.values)
        )
    )
    proposal = Case(Pair(module, EquinoxNeighbours(one, other), draw(2, 4))).proposal
    assert proposal.ambiguous == ()
    assert {(row.torch, row.jax, row.evidence) for row in proposal.rows if "weight" in row.torch} == {
        ("gates.weight", "one/weight", "values"),
        ("values.weight", "other/weight", "values"),
    }


def test_values_decide_the_layout_of_a_square_layer() -> None:
    port = square(transposed=False)
    tensors = tensors_of(port.module)
    leaves = {f"{name}/w": tensors[f"{name}.weight"] for name in ("first", "second")}
    leaves |= {f"{name}/b": tensors[f"{name}.bias"] for name in ("first", "second")}
    proposal = propose_for(port, leaves=leaves)
    assert proposal.ambiguous == ()
    assert is_right(port, proposal.map)


# What is left out


def test_tensors_that_a_layers_rule_does_not_know_go_by_their_names() -> None:
    layer = nn.Module()
    with pytest.warns(FutureWarning):
        layer.fc = nn.utils.weight_norm(nn.Linear(5, 4))
    norm = type("RMSNorm", (nn.Module,), {})()
    norm.gamma = nn.Parameter(torch.ones(4))
    layer.norm = norm
    leaves = {"fc/weight_g": shape(4, 1), "fc/weight_v": shape(4, 5), "fc/bias": shape(4), "norm/scale": shape(4)}
    assert propose(layer, leaves).gaps[:2] == ((), ())


def test_tensors_that_nothing_maps_are_named() -> None:
    port = linen_port(TorchRecurrent(nn.GRU), FlaxRecurrent(linen.GRUCell), draw(2, 5, 3))
    gaps = propose_for(port).gaps
    assert gaps.torch == ()
    assert {path.partition("/")[0] for path in gaps.jax} == {"GRUCell_1"}
    port = linen_port(TorchRecurrent(nn.GRU, num_layers=3), FlaxRecurrent(linen.GRUCell), draw(2, 5, 3))
    gaps = propose(port.module, port.side.leaves, None, torch_order(port), port.jax_order).gaps
    assert gaps.torch == ("rnn.weight_ih_l2", "rnn.weight_hh_l2", "rnn.bias_ih_l2", "rnn.bias_hh_l2")
    assert gaps.jax == ()


class Untied(linen.Module):
    """Embeddings, and a head that is not tied to them."""

    @linen.compact
    def __call__(self, ids: Any) -> Any:
        """Compute the logits."""
        return linen.Dense(11, use_bias=False, name="head")(
            linen.Dense(6, name="fc")(linen.Embed(11, 6, name="embed")(ids))
        )


class Tied(nn.Module):
    """Embeddings, and a head that is tied to them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.fc, self.head = nn.Embedding(11, 6), nn.Linear(6, 6), nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Compute the logits."""
        return self.head(self.fc(self.embed(ids)))


def test_a_head_that_only_pytorch_ties_is_carried_twice_and_named() -> None:
    port = linen_port(Tied(), Untied(), IDS)
    proposal = propose_for(port)
    assert is_right(port, proposal.map)
    assert proposal.gaps.untied == {"embed.weight": ("embed/embedding", "head/kernel")}
    assert proposal.gaps.jax == ()


def test_what_the_user_declares_wrongly_is_refused() -> None:
    port = linen_port(Tied(), Untied(), IDS)
    with pytest.raises(CannotCarry, match="'haed' is no module and no leaf of JAX; close are head"):
        propose(port.module, port.side.leaves, {"head": "haed"})

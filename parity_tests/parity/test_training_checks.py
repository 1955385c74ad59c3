"""The checks of training, each on small networks: the port that is right is let pass, and each fault is named.

The faults are those that people met when they carried a training to JAX.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
import optax
import pytest
import torch
from flax import linen
from jax import numpy as jnp
from torch import nn

from parity_tests.harness import checks, examine, training
from parity_tests.harness.capture import Case
from parity_tests.harness.checks import setup_of
from parity_tests.harness.compare import Divergence, Wrong
from parity_tests.harness.pair import Pair
from parity_tests.harness.runs import BatchPair, JaxRun, Setup, TorchRun, tensors_of
from parity_tests.harness.training import Sides, drift, precision
from parity_tests.harness.weights import Entry, WeightMap, unused
from parity_tests.parity.networks import LinenNet, TorchNet, nested

Tree = dict[str, Any]
SEEDS = range(3)
INPUTS = np.ones((8, 6), np.float32)


def normed_module() -> nn.Module:
    """Return two linear layers with batch normalisation between them, and no scale or bias of 0 or 1."""
    layers = {"fc1": nn.Linear(6, 8), "norm": nn.BatchNorm1d(8), "fc2": nn.Linear(8, 3)}
    for parameter in (parameter for layer in layers.values() for parameter in layer.parameters()):
        if parameter.ndim == 1:
            nn.init.uniform_(parameter, 0.5, 1.5)
    return TorchNet(lambda net, inputs: net.fc2(torch.relu(net.norm(net.fc1(inputs)))), **layers)


def normed(variables: Tree, inputs: Any, train: bool = False, keep: float = 0.9, biased: bool = False) -> Any:
    """Compute the same; `keep` is how much of the old statistics stays, `biased` divides the variance by n."""
    params, old = variables["params"], variables["stats"]
    hidden = inputs @ params["fc1"]["kernel"] + params["fc1"]["bias"]
    size = len(hidden)
    mean, var = (hidden.mean(0), hidden.var(0)) if train else (old["norm"]["mean"], old["norm"]["var"])
    kept_var = var * (1 if biased else size / (size - 1))
    new = {
        "mean": keep * old["norm"]["mean"] + (1 - keep) * mean,
        "var": keep * old["norm"]["var"] + (1 - keep) * kept_var,
    }
    hidden = (hidden - mean) / jnp.sqrt(var + 1e-5) * params["norm"]["scale"] + params["norm"]["bias"]
    logits = jax.nn.relu(hidden) @ params["fc2"]["kernel"] + params["fc2"]["bias"]
    return logits, {"params": params, "stats": {"norm": new}}


def load_normed(state: Tree) -> Tree:
    """Return its variables."""
    tree = nested(state)
    norm = tree["norm"]
    params = {name: {"kernel": tree[name]["weight"].T, "bias": tree[name]["bias"]} for name in ("fc1", "fc2")}
    params["norm"] = {"scale": norm["weight"], "bias": norm["bias"]}
    return {"params": params, "stats": {"norm": {"mean": norm["running_mean"], "var": norm["running_var"]}}}


def same(array: Any) -> tuple[Any, ...]:
    """Carry a tensor as it is."""
    return (array,)


def same_map(tensors: Mapping[str, np.ndarray]) -> WeightMap:
    """Return the map that carries these tensors as they are, under their own names."""
    shapes = {name: array.shape for name, array in tensors.items()}
    return WeightMap(tuple(Entry((name,), (name,), same, "same()") for name in tensors), shapes, shapes)


def build(
    reference: nn.Module | Callable[[], nn.Module],
    jax_model: Any,
    weights: Any,
    inputs: Any = INPUTS,
    **fields: Any,
) -> Setup:
    """Set up the training of a pair, by default with inputs [batch, 6], and with the cross-entropy of 3 classes."""
    return setup_of(Case(Pair(reference, jax_model, inputs, weights, targets=np.arange(8) % 3, **fields)))


def build_normed(function: Callable[..., Any] = normed, **fields: Any) -> Setup:
    """Set up the training of the network above."""
    return build(normed_module, function, load_normed, **fields)


def as_batch(inputs: np.ndarray, targets: np.ndarray) -> BatchPair:
    """Return a batch that is the same for both sides."""
    batch = {"args": (inputs,), "kwargs": {}, "targets": targets}
    return batch, batch


def draw_batches(sizes: Sequence[int], seed: int = 0) -> list[BatchPair]:
    """Return batches of random inputs [batch, 6] and classes."""
    rng = np.random.default_rng(seed)
    return [as_batch(rng.normal(size=(size, 6)), rng.integers(0, 3, size)) for size in sizes]


def messages(found: Iterator[Divergence]) -> str:
    """Return what a check says, a line for each difference."""
    return "\n".join(map(str, found))


def test_training_takes_no_row_that_is_zero_or_nearly_constant() -> None:
    inputs = np.random.default_rng(0).standard_normal((8, 6)).astype(np.float32)
    case = Case(Pair(normed_module, normed, inputs, load_normed, targets=np.arange(8) % 3))
    assert case.pair.draw_inputs(0, 8).args[0].std(axis=1).min() == 0  # stage by stage such a row shows most
    ((_, batch),) = checks.training_batches(case, 1, [8])
    assert batch["args"][0].std(axis=1).min() > 0.1


# --- Optimizers as people use them ---


class Lion(torch.optim.Optimizer):
    """Lion, which PyTorch does not have."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Take one step."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    average = self.state[parameter].setdefault("average", torch.zeros_like(parameter))
                    parameter -= group["lr"] * torch.sign(0.9 * average + 0.1 * parameter.grad)
                    average.mul_(0.99).add_(parameter.grad, alpha=0.01)


class GroupAdam(torch.optim.Optimizer):
    """Adam that counts the steps of a group of parameters, not of each one, as timm and others do."""

    def __init__(self, parameters: Any, lr: float, counter: str = "step") -> None:
        super().__init__(parameters, {"lr": lr, counter: 0})
        self.counter = counter

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Take one step."""
        for group in self.param_groups:
            group[self.counter] += 1
            corrections = [1 - decay ** group[self.counter] for decay in (0.9, 0.999)]
            for parameter in group["params"]:
                state = self.state[parameter]
                first = state.setdefault("exp_avg", torch.zeros_like(parameter))
                second = state.setdefault("exp_avg_sq", torch.zeros_like(parameter))
                first.lerp_(parameter.grad, 0.1)
                second.lerp_(parameter.grad.square(), 0.001)
                root = (second / corrections[1]).sqrt() + 1e-8
                parameter -= group["lr"] * first / corrections[0] / root


def of_all(optimizer: Callable[..., torch.optim.Optimizer], rate: float, **options: Any) -> Callable[..., Any]:
    """Return a function that makes an optimizer of all parameters."""
    return lambda module: optimizer(module.parameters(), rate, **options)


def decay_matrices(module: nn.Module) -> torch.optim.Optimizer:
    """Decay weights, and neither biases nor norms."""
    parameters = list(module.parameters())
    return torch.optim.AdamW(
        [
            {"params": [parameter for parameter in parameters if parameter.ndim > 1], "weight_decay": 0.1},
            {"params": [parameter for parameter in parameters if parameter.ndim == 1], "weight_decay": 0.0},
        ],
        1e-3,
    )


def freeze_first(module: nn.Module) -> torch.optim.Optimizer:
    """Train all but the first layer."""
    module.fc1.requires_grad_(False)
    return torch.optim.Adam([parameter for parameter in module.parameters() if parameter.requires_grad], 1e-3)


def label(params: Any) -> Any:
    """Label the leaves of the first layer as frozen."""
    return jax.tree_util.tree_map_with_path(lambda path, _: "frozen" if path[0].key == "fc1" else "trained", params)


is_matrix = partial(jax.tree.map, lambda leaf: leaf.ndim > 1)
is_vector = partial(jax.tree.map, lambda leaf: leaf.ndim == 1)


def step(
    count: int = 1, norm: float | None = None, value: float | None = None, total: bool = False
) -> Callable[..., None]:
    """Return a step that accumulates the gradients of some micro-batches, and may clip them."""

    def take(module: nn.Module, optimizer: torch.optim.Optimizer, losses: Iterator[torch.Tensor]) -> None:
        for loss in losses:
            (loss if total else loss / count).backward()
        if norm is not None:
            nn.utils.clip_grad_norm_(module.parameters(), norm)
        if value is not None:
            nn.utils.clip_grad_value_(module.parameters(), value)
        optimizer.step()

    return take


def sum_and_clip(optimizer: Any, gradients: Sequence[Any], state: Any, params: Any) -> tuple[Any, Any]:
    """Take one step with the sum of the gradients of all micro-batches."""
    updates, state = optimizer.update(jax.tree.map(lambda *leaves: sum(leaves), *gradients), state, params)
    return optax.apply_updates(params, updates), state


def both(torch_optimizer: Any, jax_optimizer: Any, **options: Any) -> Tree:
    """Return what a pair declares of its optimizers."""
    return {"torch_optimizer": torch_optimizer, "jax_optimizer": jax_optimizer, **options}


ADAM = of_all(torch.optim.Adam, 1e-3)
SGD = of_all(torch.optim.SGD, 1e-2)
MOMENTUM = of_all(torch.optim.SGD, 1e-2, momentum=0.9)
ADAM_WITH_DECAY = of_all(torch.optim.Adam, 1e-3, weight_decay=0.1)
CLIPPED = optax.chain(optax.clip_by_global_norm(0.5), optax.adam(1e-3))
FROZEN = optax.multi_transform({"frozen": optax.set_to_zero(), "trained": optax.adam(1e-3)}, label)
WARM_UP = {"torch_schedule": lambda step: 1e-3 * min(step / 10, 1.0)}
SUM_OF_FOUR = {"micro_batches": 4, "torch_step": step(4, norm=0.5, total=True)}

SOUND: dict[str, Tree] = {
    "Adam": {},  # the default
    "AdamW": both(of_all(torch.optim.AdamW, 1e-3, weight_decay=0.1), optax.adamw(1e-3, weight_decay=0.1)),
    "Adam, decay in the gradient": both(ADAM_WITH_DECAY, optax.chain(optax.add_decayed_weights(0.1), optax.adam(1e-3))),
    "SGD": both(SGD, optax.sgd(1e-2)),
    "momentum": both(MOMENTUM, optax.sgd(1e-2, 0.9)),
    "momentum after the rate": both(MOMENTUM, optax.chain(optax.scale(-1e-2), optax.trace(0.9))),
    "Nesterov": both(
        of_all(torch.optim.SGD, 1e-2, momentum=0.9, nesterov=True, weight_decay=0.1),
        optax.chain(optax.add_decayed_weights(0.1), optax.sgd(1e-2, 0.9, nesterov=True)),
    ),
    "RMSprop": both(of_all(torch.optim.RMSprop, 1e-2, alpha=0.9), optax.rmsprop(1e-2, 0.9, eps_in_sqrt=False)),
    "RMSprop, centered, momentum": both(
        of_all(torch.optim.RMSprop, 1e-2, alpha=0.9, eps=1e-2, centered=True, momentum=0.9),
        optax.rmsprop(1e-2, 0.9, 1e-2, centered=True, momentum=0.9, eps_in_sqrt=False),
    ),
    "Adagrad": both(
        of_all(torch.optim.Adagrad, 1e-2, eps=0.0, initial_accumulator_value=0.1), optax.adagrad(1e-2, 0.1, eps=0.0)
    ),
    "Lion": both(of_all(Lion, 1e-3), optax.lion(1e-3, weight_decay=0.0)),
    "Adam that counts in its group": both(of_all(GroupAdam, 1e-3), optax.adam(1e-3)),
    "Adam that counts by another name": both(of_all(GroupAdam, 1e-3, counter="t"), optax.adam(1e-3)),
    "Adadelta": both(of_all(torch.optim.Adadelta, 1e-2, eps=1e-6), optax.adadelta(1e-2, 0.9, 1e-6)),
    "groups": both(decay_matrices, optax.adamw(1e-3, weight_decay=0.1, mask=is_matrix)),
    "frozen": both(freeze_first, FROZEN),
    "masked": both(
        freeze_first,
        optax.chain(
            optax.masked(optax.adam(1e-3), lambda params: jax.tree.map(lambda text: text == "trained", label(params))),
            optax.masked(
                optax.set_to_zero(), lambda params: jax.tree.map(lambda text: text == "frozen", label(params))
            ),
        ),
    ),
    "clipped by norm": both(ADAM, CLIPPED, torch_step=step(norm=0.5)),
    "clipped by value": both(ADAM, optax.chain(optax.clip(0.1), optax.adam(1e-3)), torch_step=step(value=0.1)),
    "accumulated": both(ADAM, optax.MultiSteps(optax.adam(1e-3), 4), micro_batches=4, torch_step=step(4)),
    "accumulated by three": both(ADAM, optax.MultiSteps(optax.adam(1e-3), 3), micro_batches=3, torch_step=step(3)),
    "summed and clipped": both(ADAM, CLIPPED, jax_step=sum_and_clip, **SUM_OF_FOUR),
    "injected": both(ADAM, optax.inject_hyperparams(optax.adam)(learning_rate=1e-3)),
    "schedule": both(ADAM, optax.adam(optax.linear_schedule(0.0, 1e-3, 10)), **WARM_UP),
}
FAULTS: dict[str, tuple[Tree, list[str]]] = {
    "eps of RMSprop in the root": (
        both(of_all(torch.optim.RMSprop, 1e-2, alpha=0.9, eps=0.01), optax.rmsprop(1e-2, 0.9, eps=0.01)),
        ["from the start, step 1, weights fc1.bias", "nothing else differs", "eps"],
    ),
    "decay beside the gradient": (
        both(ADAM_WITH_DECAY, optax.adamw(1e-3, weight_decay=0.1)),
        ["first moment", "0.01 times the weight; weight decay is a part of the gradient in PyTorch alone"],
    ),
    "decay masked the wrong way": (
        both(decay_matrices, optax.adamw(1e-3, weight_decay=0.1, mask=is_vector)),
        [
            "fc1.weight, fc2.weight decayed in PyTorch alone",
            "fc1.bias, fc2.bias, norm.bias, norm.weight decayed in JAX",
        ],
    ),
    "a step for each micro-batch": (
        both(ADAM, CLIPPED, **SUM_OF_FOUR),
        ["JAX's optimizer has counted 4 steps, PyTorch's 1", "weights"],
    ),
    "sum for mean": (
        both(
            ADAM,
            optax.MultiSteps(optax.adam(1e-3), 4, use_grad_mean=False),
            micro_batches=4,
            torch_step=step(4),
        ),
        ["first moment", "JAX's are 4 times PyTorch's"],
    ),
    "trained though frozen": (
        both(freeze_first, optax.adam(1e-3)),
        ["weights fc1.bias, fc1.weight: ", "moved in JAX, frozen in PyTorch"],
    ),
    "frozen though trained": (
        both(ADAM, FROZEN),
        ["weights fc1.bias, fc1.weight: ", "moved in PyTorch, frozen in JAX"],
    ),
    "not clipped": (
        both(SGD, optax.sgd(1e-2), torch_step=step(norm=0.5)),
        ["JAX's step is", "times PyTorch's"],
    ),
    "clipped at another norm": (
        both(SGD, optax.chain(optax.clip_by_global_norm(0.501), optax.sgd(1e-2)), torch_step=step(norm=0.5)),
        ["JAX's step is 1.002 times PyTorch's"],
    ),
    "warm-up of another length": (
        both(ADAM, optax.adam(optax.linear_schedule(0.0, 1e-3, 11)), **WARM_UP),
        ["step 2", "JAX's step is 0.9091 times PyTorch's"],
    ),
    "Nesterov left out": (
        both(of_all(torch.optim.SGD, 1e-2, momentum=0.9, nesterov=True), optax.sgd(1e-2, 0.9)),
        ["weights", "JAX's step is 0.5263 times PyTorch's"],
    ),
}


@pytest.mark.parametrize("name", SOUND)
def test_an_optimizer_and_its_equal_in_optax_agree(name: str) -> None:
    setup, notes = build_normed(**SOUND[name]), list[str]()
    for seed in SEEDS:
        assert not messages(training.optimizer(setup, seed, notes))
    known = name not in ("Lion", "Adadelta", "Adam that counts by another name")
    assert known != any("not tried from a later state" in note for note in notes), notes


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_of_the_optimizer_is_named(name: str) -> None:
    declared, expected = FAULTS[name]
    found = messages(training.optimizer(build_normed(**declared), 0, []))
    for text in expected:
        assert text in found, found


def test_the_epsilon_of_clipping_is_not_told_beside_another_fault() -> None:
    decayed = optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(1e-3, weight_decay=0.1))
    (found,) = training.optimizer(build_normed(**both(ADAM, decayed, torch_step=step(norm=0.5))), 0, [])
    assert "weights" in found.where
    assert "times the weight" in str(found)


# --- Steps in lockstep, and a change of framework ---

IN_TRAINING = (
    *("Adam", "Adam that counts in its group", "RMSprop, centered, momentum", "Lion"),
    *("clipped by norm", "accumulated", "frozen"),
)


@pytest.mark.parametrize("name", IN_TRAINING)
def test_training_and_a_change_of_framework_agree(name: str) -> None:
    setup, notes = build_normed(**SOUND[name]), list[str]()
    for seed in SEEDS if name == "Adam" else SEEDS[:1]:
        batches = draw_batches((8, 8, 5, 5) * 3 if setup.micro_batches > 1 else (8, 5, 8, 5, 8, 5), seed)
        assert not messages(training.trajectory(setup, batches, notes, training=True))
        assert not messages(training.handover(setup, batches, notes, training=True))
    if name == "Adam":
        assert not messages(training.trajectory(setup, draw_batches((8, 5, 8)), notes))  # in evaluation mode
    # The bias in front of a batch normalisation has no influence.
    assert "trajectory: not tried for fc1.bias: the gradient is 0 but for rounding" in notes or name == "frozen"
    assert (name == "Lion") == any("handover: not tried" in note for note in notes), notes


def test_a_loss_divided_by_the_usual_batch_size_shows_on_the_smaller_batch() -> None:
    def divided_by_eight(logits: Any, labels: Any) -> Any:
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).sum() / 8

    setup = build_normed(torch_loss=nn.functional.cross_entropy, jax_loss=divided_by_eight)
    found = messages(training.trajectory(setup, draw_batches((8, 5)), []))
    assert "step 2, loss: JAX" in found
    assert "JAX / PyTorch = 0.625" in found


@jax.custom_vjp
def drop_small(array: jax.Array) -> jax.Array:
    """Return the array; small entries of the gradient by it are lost."""
    return array


drop_small.defvjp(lambda array: (array, None), lambda _, grad: (jnp.where(jnp.abs(grad) < 1e-6, 0.0, grad),))


@pytest.mark.parametrize(("change", "expected"), [(lambda kernel: kernel, ""), (drop_small, "weights layers.2.weight")])
def test_a_fault_of_small_gradients_alone_is_seen(change: Callable[[Any], Any], expected: str) -> None:
    """Train weights of scales 1, 1e-3 and 1e-6, whose outputs are scaled in the same way."""
    scales = (1.0, 1e-3, 1e-6)

    def forward(net: Any, inputs: torch.Tensor) -> Any:
        return sum(scale * layer(inputs) for scale, layer in zip(scales, net.layers, strict=True))

    def function(variables: Tree, inputs: Any) -> Any:
        kernels = [change(variables["params"][f"w{number}"]) for number in range(3)]
        return sum(scale * inputs @ kernel for scale, kernel in zip(scales, kernels, strict=True))

    def reference() -> nn.Module:
        layers = nn.ModuleList(nn.Linear(6, 3, bias=False) for _ in scales)
        for scale, parameter in zip(scales, layers.parameters(), strict=True):
            parameter.data *= scale
        return TorchNet(forward, layers=layers)

    def load(state: Tree) -> Tree:
        return {"params": {f"w{number}": state[f"layers.{number}.weight"].T for number in range(3)}}

    setup = build(reference, function, load, **SOUND["SGD"])
    found = messages(training.trajectory(setup, draw_batches((8, 5)), []))
    assert expected in found if expected else not found


def build_tied(leaves: int = 1, constant: bool = False) -> Setup:
    """Set up the training of an embedding that is the output layer too; JAX may hold its table once or twice."""

    def tied(variables: Tree, tokens: Any) -> Any:
        params = variables["params"]
        return params["embed"][tokens].mean(1) @ params.get("head", params["embed"].T)

    def reference() -> nn.Module:
        embed, head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
        head.weight = embed.weight
        if constant:
            nn.init.zeros_(embed.weight)
        return TorchNet(lambda net, tokens: net.head(net.embed(tokens).mean(1)), embed=embed, head=head)

    def load(state: Tree) -> Tree:
        once = {"embed": state["embed.weight"]}
        return {"params": once if leaves == 1 else {**once, "head": state["head.weight"].T}}

    return build(reference, tied, load, np.arange(40).reshape(8, 5) % 7)


@pytest.mark.parametrize("constant", [False, True])
def test_a_tied_tensor_starts_from_the_same_values_under_all_its_names(constant: bool) -> None:
    assert not messages(training.optimizer(build_tied(constant=constant), 0, []))


@pytest.mark.parametrize("leaves", [1, 2])
def test_two_leaves_for_one_tied_tensor_train_otherwise(leaves: int) -> None:
    setup, rng, notes = build_tied(leaves), np.random.default_rng(0), list[str]()
    batches = [as_batch(tokens := rng.integers(0, 7, (size, 5)), tokens[:, 0]) for size in (8, 5)]
    assert not messages(training.optimizer(setup, 0, notes))
    found = messages(training.trajectory(setup, batches, notes))
    assert ("first moment embed.weight" in found) == (leaves == 2), found
    assert len(found.splitlines()) == leaves - 1


@pytest.mark.parametrize("name", ["Adam", "AdamW", "momentum"])
def test_a_leaf_that_is_the_sum_of_two_biases_is_left_out_and_said_so(name: str) -> None:
    """PyTorch's recurrent cells have two biases."""

    def one_bias(variables: Tree, inputs: Any) -> Any:
        return inputs @ variables["params"]["kernel"] + variables["params"]["bias"]

    def reference() -> nn.Module:
        second = nn.Parameter(torch.ones(3))
        return TorchNet(lambda net, inputs: net.fc(inputs) + net.second, fc=nn.Linear(6, 3), second=second)

    def load(state: Tree) -> Tree:
        return {"params": {"kernel": state["fc.weight"].T, "bias": state["fc.bias"] + state["second"]}}

    setup = build(reference, one_bias, load, **SOUND[name])
    notes: list[str] = []
    assert not messages(training.optimizer(setup, 0, notes))
    assert not messages(training.trajectory(setup, draw_batches((8, 5, 8)), notes))
    assert not messages(training.handover(setup, draw_batches((8, 5, 8)), notes))
    assert [note for note in notes if "not tried for fc.bias, second" in note] == notes


@pytest.mark.parametrize("fault", [1.0, 1.01])
def test_a_fused_leaf_names_the_tensor_that_is_wrong(fault: float) -> None:
    def fused(variables: Tree, inputs: Any) -> Any:
        both = inputs @ variables["params"]["both"]
        right = fault * both[:, 3:] + (1 - fault) * jax.lax.stop_gradient(both[:, 3:])
        return both[:, :3] * right

    def reference() -> nn.Module:
        layers = {name: nn.Linear(6, 3, bias=False) for name in ("left", "right")}
        return TorchNet(lambda net, inputs: net.left(inputs) * net.right(inputs), **layers)

    def load(state: Tree) -> Tree:
        return {"params": {"both": np.concatenate([state["left.weight"], state["right.weight"]]).T}}

    setup, notes = build(reference, fused, load, **SOUND["SGD"]), list[str]()
    found = messages(training.trajectory(setup, draw_batches((8, 5)), notes))
    if fault == 1:
        assert not found
        assert not messages(training.handover(setup, draw_batches((8, 5, 8)), notes))
    else:
        assert "weights right.weight: " in found
        assert "JAX's step is 1.01 times" in found
    assert not notes


def test_differences_as_large_as_the_references_own_noise_are_no_alarm() -> None:
    """Steps of 10 in every direction: PyTorch's own run is another one if its weights move by rounding."""
    declared = both(of_all(torch.optim.Adam, 10.0, eps=1e-15), optax.adam(10.0, eps=1e-15))
    setup, notes = build_normed(**declared), list[str]()
    batches = draw_batches((8, 5) * 6)
    jax_run, torch_run = JaxRun(setup, training=True), TorchRun(setup, training=True)
    for jax_batch, torch_batch in batches:
        jax_run.step([jax_batch])
        torch_run.step([torch_batch])
    assert training.differences(jax_run, torch_run, training.TRAJECTORY_BOUND)
    assert not messages(training.trajectory(setup, batches, notes, training=True))
    assert any("not tried beyond step" in note for note in notes)


def test_the_rounding_of_a_saturated_activation_is_no_alarm() -> None:
    """Its inputs may move without moving it, but each framework rounds it otherwise: the tanh of a policy."""

    def port(variables: Tree, inputs: Any) -> Any:
        return jnp.log(1 - jnp.tanh(9 * inputs @ variables["params"]["kernel"]) ** 2 + 1e-12)

    def reference() -> nn.Module:
        layer = nn.Linear(6, 3, bias=False)
        return TorchNet(lambda net, inputs: torch.log(1 - torch.tanh(9 * net.fc(inputs)) ** 2 + 1e-12), fc=layer)

    def load(state: Tree) -> Tree:
        return {"params": {"kernel": state["fc.weight"].T}}

    setup, notes = build(reference, port, load, **SOUND["SGD"]), list[str]()
    assert not messages(training.trajectory(setup, draw_batches((8, 5)), notes))


@pytest.mark.parametrize(
    ("errors", "runs", "kept"),
    [((7.0,), 1, 0), ((20.0,), 3, 0), ((999.0,), 5, 1), ((1001.0,), 1, 1), ((20.0, 1001.0), 1, 2), ((math.nan,), 1, 1)],
)
def test_more_runs_of_the_reference_tell_what_is_rounding_only_in_a_case_of_doubt(
    errors: tuple[float, ...], runs: int, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The noise that the runs show grows from 1 to 5; `runs` of them are asked for."""
    asked: list[int] = []

    def measure_noise(*_: Any) -> Iterator[dict[tuple[str, str], float]]:
        for noise in range(1, training.MOST_NUDGES):
            asked.append(noise)
            yield {("weights", str(number)): float(noise) for number in range(len(errors))}

    monkeypatch.setattr(training, "measure_noise", measure_noise)
    wrong = [Wrong("weights", str(number), error, "") for number, error in enumerate(errors)]
    found = training.above_noise(wrong, build_normed(), draw_batches((8,)), [], False, 2.0**-53)
    assert (len(asked), len(found)) == (runs, kept)


def test_the_noise_of_more_runs_is_not_smaller() -> None:
    batches = [batch for _, batch in draw_batches((8,))]
    noises = list(training.measure_noise(build_normed(), batches, False, 2.0**-53))
    assert len(noises) == training.MOST_NUDGES - 1
    for noise, more in itertools.pairwise(noises):
        assert noise.keys() == more.keys()
        assert all(more[key] >= noise[key] for key in noise)
    assert noises[0] != noises[-1]


def test_the_rounding_that_an_optimizer_amplifies_in_one_tensor_excuses_as_much_in_the_others() -> None:
    setup, batches = build_normed(), [batch for _, batch in draw_batches((8,))]
    noise, run = next(training.measure_noise(setup, batches, False, 2.0**-53)), TorchRun(setup)
    run.step(batches)
    start = setup.start
    moves = {name: np.abs(array - start[name]).max() for name, array in tensors_of(run.module).items()}
    shares = [noise["weights", name] / move for name, move in moves.items() if move]
    shares = [share for share in shares if share < training.MOSTLY_ROUNDING]
    assert len(shares) > 2
    assert min(shares) == pytest.approx(max(shares))


# --- Statistics ---


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, []),
        ({"keep": 0.1}, ["JAX keeps 0.1 of the old value, PyTorch 0.9: the momentum is meant in the other sense"]),
        ({"keep": 1.0}, ["JAX keeps 1 of the old value, PyTorch 0.9: a JAX function returns new statistics as"]),
        (
            {"keep": 0.2, "biased": True},
            [
                "JAX keeps 0.2 of the old value, PyTorch 0.9",
                "norm.running_var takes the biased variance of the batch too",
            ],
        ),
        ({"biased": True}, ["norm.running_var after step 1, batch of 8: ", "the biased variance of the batch; 7/8 of"]),
    ],
    ids=["sound", "momentum", "not returned", "momentum and biased", "biased"],
)
def test_statistics_are_compared_and_explained(options: dict[str, Any], expected: list[str]) -> None:
    def function(variables: Tree, inputs: Any, train: bool = False) -> Any:
        return normed(variables, inputs, train, **options)

    setup = build_normed(function)
    for seed in SEEDS if not expected else SEEDS[:1]:
        batches = [draw_batches((size,) * 3, seed) for size in (8, 5)]
        found = messages(training.statistics(setup, batches, seed))
        assert all(text in found for text in expected) if expected else not found, found


class NormedTwice(nn.Module):
    """Batch normalisation of sequences, and then of their means: of 4 times as many values, and of one an example."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm1d(6, affine=False), nn.BatchNorm1d(6, affine=False)
        self.scale = nn.Parameter(torch.ones(6))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return the normalised means [batch, 6]."""
        sequences = torch.stack([inputs * number for number in range(4)], 2)
        return self.norm2(self.norm1(sequences).square().mean(2)) * self.scale


def normed_twice(variables: Tree, inputs: Any, train: bool = False, keep: float = 0.9) -> Any:
    """Compute the same, with the biased variance of each batch, and another momentum of the second norm."""
    old = variables["stats"]
    new: Tree = {}

    def norm(name: str, values: Any, axes: tuple[int, ...], shape: tuple[int, ...]) -> Any:
        batch = {"mean": values.mean(axes), "var": values.var(axes)}
        old_share = keep if name == "norm2" else 0.9
        new[name] = {kind: old_share * old[name][kind] + (1 - old_share) * batch[kind] for kind in batch}
        mean, var = (used.reshape(shape) for used in (batch if train else old[name]).values())
        return (values - mean) / jnp.sqrt(var + 1e-5)

    sequences = jnp.stack([inputs * number for number in range(4)], 2)
    means = jnp.square(norm("norm1", sequences, (0, 2), (6, 1))).mean(2)
    outputs = norm("norm2", means, (0,), (6,)) * variables["params"]["scale"]
    return outputs, {"params": variables["params"], "stats": new}


@pytest.mark.parametrize(
    ("keep", "words"),
    [
        (0.9, "norm1.running_var 31/32 of PyTorch's; norm2.running_var 7/8 of PyTorch's"),
        (0.99, "norm2.running_mean, norm2.running_var after step 1, batch of 8: "),
    ],
)
def test_what_each_of_several_norms_makes_of_its_batch_is_explained(keep: float, words: str) -> None:
    def load(state: Tree) -> Tree:
        kinds = ("mean", "var")
        stats = {f"norm{n}": {kind: state[f"norm{n}.running_{kind}"] for kind in kinds} for n in (1, 2)}
        return {"params": {"scale": state["scale"]}, "stats": stats}

    setup = build(NormedTwice, partial(normed_twice, keep=keep), load)
    found = messages(training.statistics(setup, [draw_batches((8,) * 3)], 0))
    assert words in found, found
    assert ("JAX keeps 0.99 of the old value, PyTorch 0.9" in found) == ("running_mean" in found) == (keep == 0.99)


# --- How training starts ---


def draw_tensors(
    seed: int, *, scale: float = 1.0, truncated: bool = False, orthogonal: bool = False, padding: float = 0.0
) -> dict[str, np.ndarray]:
    """Draw a normal matrix, a small uniform bias, a constant scale, and a table whose first row is constant."""
    rng = np.random.default_rng(seed)
    values = rng.normal(size=4_000)
    if orthogonal:
        values = np.sqrt(80) * np.linalg.qr(values.reshape(80, 50))[0].T.ravel()
    if truncated:
        values = rng.normal(size=40_000)
        values = values[np.abs(values) < 2][:4_000] / 0.87962566  # of variance 1 again
    table = rng.normal(size=(10, 4))
    table[0] = padding
    return {
        "weight": values.reshape(50, 80).astype(np.float32),
        "bias": rng.uniform(-1, 1, 3).astype(np.float32),
        "norm.weight": np.full(5, scale, np.float32),
        "table": table.astype(np.float32),
    }


INITIAL_MAP = same_map(draw_tensors(0))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ""),
        ({"scale": 0.0}, "norm.weight: PyTorch's values are all 1, JAX's go from 0 to 0"),
        ({"truncated": True}, "weight: "),
        ({"orthogonal": True}, "weight: singular values differ"),
        ({"padding": 0.1}, "table: PyTorch's values are all 0, JAX's go from 0.1 to 0.1"),
    ],
    ids=["sound", "norm of zeros", "truncated", "orthogonal", "padding"],
)
def test_initial_weights_are_compared(options: dict[str, Any], expected: str) -> None:
    for first in range(0, 400, 40) if not expected else (0,):
        found = messages(
            checks.compare_distributions(
                INITIAL_MAP,
                lambda seed: draw_tensors(seed),
                lambda seed: draw_tensors(seed + 10_000, **options),
                range(first, first + 20),
                [],
            )
        )
        assert expected in found if expected else not found, found


def test_a_truncated_normal_shows_by_its_extremes_with_two_seeds() -> None:
    def draw(seed: int) -> dict[str, np.ndarray]:
        return draw_tensors(seed + 10_000, truncated=True)

    found = messages(checks.compare_distributions(INITIAL_MAP, draw_tensors, draw, range(2), []))
    assert "weight: largest value differs" in found or "weight: smallest value differs" in found, found


def rotary(dtype: Any, base: float = 10_000.0, power: bool = True) -> np.ndarray:
    """Return the cosines of a rotary table [position, frequency], with frequencies computed in one of two ways."""
    exponents = np.arange(8, dtype=dtype) / dtype(8)
    frequencies = dtype(base) ** -exponents if power else np.exp(-exponents * np.log(dtype(base)))
    return np.cos(np.arange(500, dtype=dtype)[:, None] * frequencies).astype(dtype)


def test_tables_that_the_port_builds_are_compared_as_it_builds_them() -> None:
    index = np.arange(12).reshape(3, 4)
    mask = np.where(np.tri(4, dtype=bool), 0, -np.inf).astype(np.float32)
    buffers: dict[str, np.ndarray] = {"index": index, "mask": mask, "rotary": rotary(np.float32)}
    weight_map, exact = same_map(buffers), {"rotary": rotary(np.float64)}
    exact = {"rotary": rotary(np.float64)}
    port = buffers | {"rotary": rotary(np.float32, power=False)}
    assert not messages(checks.compare_tables(weight_map, buffers, port, exact))
    faults: dict[str, np.ndarray] = {"index": index[::-1], "mask": mask.T, "rotary": rotary(np.float32, base=10_010.0)}
    for name, table in faults.items():
        found = messages(checks.compare_tables(weight_map, buffers, port | {name: table}, exact))
        assert found.startswith(f"tables: {name}: ")
        assert "\n" not in found


def test_tables_of_the_same_kind_are_told_in_one_line() -> None:
    buffers = {f"norm{number}.running_var": np.ones(2, np.float32) for number in range(3)}
    (found,) = checks.compare_tables(same_map(buffers), buffers, {name: 0 * array for name, array in buffers.items()})
    assert found.where == "norm0.running_var, norm1.running_var, norm2.running_var"
    assert found.problem.startswith("JAX builds the first of them, norm0.running_var otherwise than PyTorch: error 1.0")


def table(of: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype | None, persistent: bool) -> nn.Buffer:
    """Return sines or cosines of 500 positions as PyTorch computes them, [position, frequency]."""
    frequencies = 10_000.0 ** -(torch.arange(8, dtype=dtype) / 8)
    return nn.Buffer(of(torch.arange(500)[:, None] * frequencies), persistent=persistent)


@pytest.mark.parametrize(("base", "dtype"), [(10_000.0, "float32"), (10_000.0, "float64"), (10_001.0, "float32")])
def test_a_constant_of_float32_in_jax_is_judged_by_its_own_rounding(base: float, dtype: str) -> None:
    """PyTorch's table is no part of its state dict. NumPy makes JAX's, which is rounded to float32."""

    def reference() -> nn.Module:
        sines = table(torch.sin, None, persistent=False)
        return TorchNet(lambda net, x: net.fc(x + net.sines[-1]), fc=nn.Linear(8, 8), sines=sines)

    def port(x: jax.Array) -> jax.Array:
        sines = np.sin(np.arange(500)[:, None] * base ** -(np.arange(8) / 8)).astype(np.float32)
        return linen.Dense(8, name="fc")(x + jnp.asarray(sines.astype(dtype))[-1])

    names = ("parameters", "outputs", "gradients", "trajectory")
    result = examine(Pair(reference, LinenNet(port), np.ones((2, 8), np.float32), batch_sizes=(2,)), names=names)
    if base == 10_000:
        assert not result.divergences
        assert "JAX keeps 1 of its own constants in float32: judged by their rounding" in result.notes
    else:
        assert result.divergences[0].check == "outputs"


@pytest.mark.parametrize(("numpy", "base"), [(False, 10_000.0), (True, 10_000.0), (True, 10_001.0)])
def test_a_table_in_the_state_dict_may_be_one_that_jax_computes(numpy: bool, base: float) -> None:
    """A table that comes from NumPy is one of float32 in a float64 run too."""

    def reference() -> nn.Module:
        rates = 10_000.0 ** -(torch.arange(8) / 8)
        rates = torch.FloatTensor(10_000.0 ** -(np.arange(8) / 8)) if numpy else rates
        waves = TorchNet(lambda net, x: x + torch.sin(500 * net.rates), rates=nn.Buffer(rates))
        return nn.Sequential(nn.Linear(8, 8), waves)

    port = LinenNet(lambda x: linen.Dense(8, name="0")(x) + jnp.sin(500 * base ** -(jnp.arange(8) / 8)))
    pair = Pair(reference, port, np.ones((2, 8), np.float32), {"1": unused()}, batch_sizes=(2,))
    result = examine(pair, names=("parameters", "outputs"))
    assert bool(result.divergences) == (base != 10_000)
    noted = any("PyTorch keeps 1.rates in float32" in note for note in result.notes)
    assert noted == (numpy and not result.divergences)


@pytest.mark.parametrize("base", [10_000.0, 10_010.0])
def test_a_table_may_be_exacter_than_pytorchs(base: float) -> None:
    class Port(linen.Module):
        @linen.compact
        def __call__(self, x: jax.Array) -> jax.Array:
            cos = self.variable("tables", "cos", lambda: rotary(np.float64, base).astype(np.float32))
            return linen.Dense(8, name="fc")(x) * cos.value[-1]

    def reference() -> nn.Module:
        cos = table(torch.cos, torch.float32, persistent=True)
        return TorchNet(lambda net, x: net.fc(x) * net.cos[-1], fc=nn.Linear(8, 8), cos=cos)

    found = messages(checks.tables(Case(Pair(reference, Port(), np.ones((2, 8), np.float32)))))
    assert found.startswith("tables: cos: ") if base != 10_000 else not found


# --- Schedules ---


def warm_up_and_cosine(step: int) -> float:
    """Rise for 10 steps, fall as a cosine until step 100."""
    return 1e-3 * step / 10 if step < 10 else 1e-3 * 0.5 * (1 + np.cos(np.pi * min((step - 10) / 90, 1)))


OF_OPTAX = optax.warmup_cosine_decay_schedule(0.0, 1e-3, 10, 100)


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (OF_OPTAX, ""),
        (lambda step: OF_OPTAX(step + 1), "JAX is one step ahead of PyTorch"),
        (lambda step: OF_OPTAX(jnp.maximum(step - 1, 0)), "JAX is one step behind PyTorch"),
        (lambda step: 2 * OF_OPTAX(step), "JAX's is 2 times PyTorch's"),
        (optax.warmup_cosine_decay_schedule(0.0, 1e-3, 10, 100, 1e-5), "step 11: "),
        (lambda step: jnp.where(step == 100, 1e-3, OF_OPTAX(step)), "step 100: "),
    ],
    ids=["sound", "ahead", "behind", "twice", "another end", "the last step alone"],
)
def test_schedules_are_compared_as_functions(schedule: Callable[[Any], Any], expected: str) -> None:
    notes: list[str] = []
    rates = [warm_up_and_cosine(step) for step in range(101)]  # as a scheduler of PyTorch's gave them, and no more
    found = messages(training.schedule(rates.__getitem__, schedule, 100, notes))
    assert expected in found if expected else not found, found
    assert expected or "float32" in notes[0]


def test_a_change_of_the_rate_is_looked_at_from_both_sides() -> None:
    def drop_at(boundary: int) -> Callable[[Any], Any]:
        return lambda step: jnp.where(step < boundary, 1e-3, 1e-4)

    def reference(step: int) -> float:
        return 1e-3 if step < 3_333 else 1e-4

    assert not messages(training.schedule(reference, drop_at(3_333), 10_000, []))
    found = messages(training.schedule(reference, drop_at(3_334), 10_000, []))
    assert found.startswith("schedule: step 3333: JAX 0.001, PyTorch 0.0001")


# --- float32 ---


def run_sides(seed: int, dtype: str, fault: Callable[[np.ndarray], np.ndarray] = np.asarray) -> Sides:
    """Multiply two matrices, and let JAX round as the fault says."""
    rng = np.random.default_rng(seed)
    one, two = rng.normal(size=(2, 20, 20)).astype(np.float32).astype(dtype)
    values = {"output of product": one @ two}
    return Sides({name: fault(array) for name, array in values.items()}, values)


def to_bfloat16(array: np.ndarray) -> np.ndarray:
    """Round to 8 significant bits."""
    return np.asarray(jnp.asarray(array, jnp.bfloat16)).astype(array.dtype)


@pytest.mark.parametrize("name", ["Adam", "momentum after the rate"])
def test_float32_is_judged_by_float64(name: str) -> None:
    setup, notes = build_normed(**SOUND[name]), list[str]()
    assert not messages(precision(run_sides, SEEDS, notes, setup=setup))
    assert not notes


def test_values_and_updates_rounded_more_than_float32_does_are_found() -> None:
    def faulty(seed: int, dtype: str) -> Sides:
        return run_sides(seed, dtype, to_bfloat16)

    assert "precision: output of product: JAX is 1." in messages(precision(faulty, SEEDS, []))
    # Where JAX's stages chose otherwise, the steered run is what counts.
    sound = lambda seed: run_sides(seed, "float32").jax  # noqa: E731  # one use
    assert not messages(precision(faulty, SEEDS, [], steered=sound))
    rounded = optax.chain(
        optax.adam(1e-3),
        optax.stateless(lambda updates, _: jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), updates)),
    )
    found = messages(precision(run_sides, SEEDS, [], setup=build_normed(**both(ADAM, rounded))))
    assert "update of fc1.weight after 10 steps" in found, found


def test_drift_is_recorded_between_the_frameworks_and_their_own_runs() -> None:
    curves = drift(build_normed(), draw_batches((8, 5, 8)), (1, 3), training=True)
    assert len(curves) == 6
    assert all(len(curve) == 2 for curve in curves.values())
    assert max(curves["float64: JAX from PyTorch"]) < 1e-9 < min(curves["float32: JAX from float64"])

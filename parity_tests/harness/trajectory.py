"""Training of both sides: the optimizers alone, many steps on the same batches, and a change of framework midway."""

import itertools
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import jax
import numpy as np
import optax
import torch
from jax import numpy as jnp

from jax_cnn import train
from jax_cnn.checkpoint import AdamState
from jax_cnn.torch_layout import TorchDict
from parity_tests.harness.capture import dtype_of, exact_arithmetic
from parity_tests.harness.compare import EXACT, Bound, Divergence, compare
from parity_tests.harness.pair import Batch, Pair, to_numpy

# Absolute bounds on weights and moments.
TRAJECTORY_BOUND = Bound(
    1e-10, "float64 rounding, amplified over the steps; worst seen over an epoch 5.0e-14", relative=False
)
OPTIMIZER_BOUND = Bound(1e-13, "float64 rounding; worst seen over 20 seeds 1.8e-15", relative=False)

OPTIMIZER_STEPS = 5
GRADIENT_SCALES = (1e-10, 1e-8, 1e-4, 1.0)  # around Adam's eps, where its place in the formula matters, and far from it


def initial_state(pair: Pair, seed: int, dtype: str = "float64") -> AdamState:
    """Return the state before the first step: the reference's initial weights, and moments of zero."""
    weights = pair.draw(seed, dtype)
    zeros = {name: np.zeros_like(weights[name]) for name in pair.trainable()}
    return AdamState(weights, zeros, {name: array.copy() for name, array in zeros.items()}, 0)


class TorchRun:
    """The reference in training, from a given state."""

    def __init__(self, pair: Pair, state: AdamState) -> None:
        self._pair = pair
        self._dtype = dtype_of(state.weights)
        self._module = pair.reference(self._dtype, state.weights)
        self._parameters = dict(self._module.named_parameters())
        adam = pair.adam
        self._optimizer = pair.torch_optimizer(
            self._parameters.values(), lr=adam.learning_rate, betas=(adam.b1, adam.b2), eps=adam.eps
        )
        for name, parameter in self._parameters.items():
            self._optimizer.state[parameter] = {
                "step": torch.tensor(float(state.step)),
                "exp_avg": torch.from_numpy(state.first_moment[name].copy()),
                "exp_avg_sq": torch.from_numpy(state.second_moment[name].copy()),
            }

    def step(self, batch: Batch) -> None:
        """Train on one batch."""
        with exact_arithmetic(self._dtype):
            self._optimizer.zero_grad()
            logits = self._module(torch.from_numpy(batch.inputs.astype(self._dtype)))
            loss = self._pair.torch_loss(logits, torch.from_numpy(batch.labels.astype(np.int64)))
            loss.backward()
            self._optimizer.step()

    def apply_gradients(self, grads: TorchDict) -> None:
        """Take one step of the optimizer with these gradients."""
        for name, parameter in self._parameters.items():
            parameter.grad = torch.from_numpy(grads[name].copy())
        self._optimizer.step()

    def state(self) -> AdamState:
        """Return a copy of the state."""
        states = {name: self._optimizer.state[parameter] for name, parameter in self._parameters.items()}
        return AdamState(
            to_numpy(self._module.state_dict(), self._dtype),
            to_numpy({name: state["exp_avg"] for name, state in states.items()}, self._dtype),
            to_numpy({name: state["exp_avg_sq"] for name, state in states.items()}, self._dtype),
            int(next(iter(states.values()))["step"]),
        )


class JaxRun:
    """The JAX side in training, from a given state, by the `train_step` of `jax_cnn`."""

    def __init__(self, pair: Pair, state: AdamState) -> None:
        self._pair = pair
        self._dtype = dtype_of(state.weights)
        self._optimizer = pair.jax_optimizer(pair.adam)
        with exact_arithmetic(self._dtype):
            leaves = pair.to_leaves(state.weights)
            params = {name: leaves.pop(name) for name in pair.trainable()}
            self._frozen = leaves  # buffers, which the optimizer does not change
            opt_state = optax.tree_utils.tree_set(
                self._optimizer.init(params),
                mu=self._to_jax(state.first_moment),
                nu=self._to_jax(state.second_moment),
                count=jnp.asarray(state.step, jnp.int32),
            )
            self._state = train.TrainState(params, opt_state)
        self._step = jax.jit(partial(train.train_step, optimizer=self._optimizer, loss_fn=self._loss))
        self._apply = jax.jit(self._apply_gradients)

    def step(self, batch: Batch) -> None:
        """Train on one batch."""
        with exact_arithmetic(self._dtype):
            inputs = jnp.asarray(self._pair.input_layout.to_jax(batch.inputs.astype(self._dtype)))
            self._state, _ = self._step(self._state, inputs, jnp.asarray(batch.labels.astype(np.uint8)))

    def apply_gradients(self, grads: TorchDict) -> None:
        """Take one step of the optimizer with these gradients."""
        with exact_arithmetic(self._dtype):
            self._state = self._apply(self._state, self._to_jax(grads))

    def state(self) -> AdamState:
        """Return a copy of the state."""
        params, opt_state = self._state
        carry = self._pair.to_weights
        return AdamState(
            carry({name: (params | self._frozen)[name] for name in self._pair.layout}),
            carry(optax.tree_utils.tree_get(opt_state, "mu")),
            carry(optax.tree_utils.tree_get(opt_state, "nu")),
            int(optax.tree_utils.tree_get(opt_state, "count")),
        )

    def _loss(self, params: Mapping[str, jax.Array], inputs: jax.Array, labels: jax.Array) -> jax.Array:
        logits = self._pair.training_logits(self._pair.to_tree({**self._frozen, **params}), inputs)
        return self._pair.jax_loss(logits, labels)

    def _apply_gradients(self, state: train.TrainState, grads: Any) -> train.TrainState:
        updates, opt_state = self._optimizer.update(grads, state.opt_state, state.params)
        return train.TrainState(optax.apply_updates(state.params, updates), opt_state)

    def _to_jax(self, arrays: TorchDict) -> dict[str, jax.Array]:
        """Carry moments or gradients to JAX; each has the layout of its tensor."""
        return {name: jnp.asarray(self._pair.layout[name].to_jax(array)) for name, array in arrays.items()}


def optimizer(pair: Pair, seed: int) -> Iterator[Divergence]:
    """Compare the optimizers alone on the same gradients: from the start, and from step 7 with moments other than 0."""
    rng = np.random.default_rng(seed)
    fresh = initial_state(pair, seed)

    def noise() -> TorchDict:
        shapes = {name: fresh.weights[name].shape for name in pair.trainable()}
        return {name: rng.normal(size=shape) * np.resize(GRADIENT_SCALES, shape) for name, shape in shapes.items()}

    squares = {name: array**2 for name, array in noise().items()}
    for label, state in (("from the start", fresh), ("from step 7", AdamState(fresh.weights, noise(), squares, 7))):
        jax_run, torch_run = JaxRun(pair, state), TorchRun(pair, state)
        for step in range(1, OPTIMIZER_STEPS + 1):
            grads = noise()
            jax_run.apply_gradients(grads)
            torch_run.apply_gradients(grads)
            when = f"{label}, step {step}"
            differences = list(compare_states("optimizer", jax_run.state(), torch_run.state(), OPTIMIZER_BOUND, when))
            if differences:
                yield from differences
                return


def batch_pairs(pair: Pair, seed: int) -> Iterator[tuple[Batch, Batch]]:
    """Yield JAX's and PyTorch's batches without end, epoch after epoch; random inputs for a pair without data."""
    for epoch in itertools.count():
        if pair.jax_batches is None or pair.torch_batches is None:
            batch = pair.synthetic_batch(seed * 1_000_003 + epoch, 64)
            yield batch, batch
        else:
            yield from zip(pair.jax_batches(seed, epoch), pair.torch_batches(seed, epoch), strict=True)


def lockstep(pair: Pair, seed: int, steps: int, dtype: str = "float64") -> Iterator[tuple[int, JaxRun, TorchRun]]:
    """Train each side on its own batches from the same weights; yield both after every step, counted from 1."""
    state = initial_state(pair, seed, dtype)
    jax_run, torch_run = JaxRun(pair, state), TorchRun(pair, state)
    batches = itertools.islice(batch_pairs(pair, seed), steps)
    for step, (jax_batch, torch_batch) in enumerate(batches, start=1):
        jax_run.step(jax_batch)
        torch_run.step(torch_batch)
        yield step, jax_run, torch_run


def lockstep_states(pair: Pair, seed: int, steps: int) -> Iterator[tuple[int, AdamState, AdamState]]:
    """Train in lockstep; yield JAX's and PyTorch's state after the first ten steps, every tenth, and the last."""
    for step, jax_run, torch_run in lockstep(pair, seed, steps):
        if step <= 10 or step % 10 == 0 or step == steps:
            yield step, jax_run.state(), torch_run.state()


def trajectory(pair: Pair, seed: int, steps: int) -> Iterator[Divergence]:
    """Compare weights, both moments and the step count in training; stop at the first step where they differ."""
    for step, jax_state, torch_state in lockstep_states(pair, seed, steps):
        differences = list(compare_states("trajectory", jax_state, torch_state, TRAJECTORY_BOUND, f"step {step}"))
        if differences:
            yield from differences
            return


def compare_states(check: str, actual: AdamState, expected: AdamState, bound: Bound, when: str) -> Iterator[Divergence]:
    """Compare two states of training: the step count exactly, the tensors within the bound."""
    actual_step, expected_step = {"step count": np.array(actual.step)}, {"step count": np.array(expected.step)}
    yield from compare(check, actual_step, expected_step, EXACT, f"{when}, {{}}")
    for part in ("first_moment", "second_moment", "weights"):
        label = f"{when}, {part.replace('_', ' ')} {{}}"
        yield from compare(check, getattr(actual, part), getattr(expected, part), bound, label)


def handover(pair: Pair, seed: int, before: int, after: int) -> Iterator[Divergence]:
    """Train on one side, carry the whole state to the other and go on; compare with PyTorch's uninterrupted run."""
    batches = [torch_batch for _, torch_batch in itertools.islice(batch_pairs(pair, seed), before + after)]
    uninterrupted = run_steps(TorchRun(pair, initial_state(pair, seed)), batches)
    for first, second, label in ((TorchRun, JaxRun, "PyTorch, then JAX"), (JaxRun, TorchRun, "JAX, then PyTorch")):
        middle = run_steps(first(pair, initial_state(pair, seed)), batches[:before])
        end = run_steps(second(pair, middle), batches[before:])
        yield from compare_states("handover", end, uninterrupted, TRAJECTORY_BOUND, label)


def run_steps(run: JaxRun | TorchRun, batches: list[Batch]) -> AdamState:
    """Train on these batches and return the state after them."""
    for batch in batches:
        run.step(batch)
    return run.state()

"""float32 measured against float64: how exact each framework is, and whether they drift apart by rounding alone.

The truth is what the reference computes in float64. The other checks show that JAX computes the same in float64.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import optax
from jax import numpy as jnp

from jax_cnn import train
from jax_cnn.checkpoint import AdamState
from jax_cnn.config import AdamConfig
from jax_cnn.torch_layout import TorchDict
from parity_tests.harness.capture import Capture, capture_jax, capture_torch
from parity_tests.harness.compare import Divergence
from parity_tests.harness.pair import Pair
from parity_tests.harness.trajectory import JaxRun, TorchRun, batch_pairs, initial_state

FACTOR = 4.0  # JAX's distance from the truth may be this many times PyTorch's
HALF_ULP = 2.0**-24  # no result in float32 can be expected to be closer to the truth
STATES_AFTER = (0, 1, 10, 1000)  # steps that the optimizer has taken; its bias correction matters for the early ones
FEWEST_VALUES = 16  # distances of fewer values, over all seeds, say more about chance than about the arithmetic

Arrays = dict[str, np.ndarray]
Errors = dict[str, tuple[float, float]]  # name -> JAX's and PyTorch's distance from the truth, relative


def precision(pair: Pair, seeds: Sequence[int]) -> Iterator[Divergence]:
    """Yield float32 outputs, gradients and updates where JAX is further from the truth than PyTorch, times FACTOR.

    Two causes other than rounding are taken away, and nothing else. A ReLU or a pool can choose differently between
    nearly equal values: gradients beyond the budget are measured again with the truth's choices. optax computes
    Adam's bias correction in float32: updates are measured with an exact one.
    """
    errors, steered_errors = step_errors(pair, seeds)
    for name, steered in steered_errors.items():
        if errors[name][0] > budget(errors[name]):
            errors[f"{name}, with the truth's choices"] = steered
            del errors[name]
    corrected = replace(pair, jax_optimizer=exact_optimizer(pair))
    for after in STATES_AFTER:
        updates = update_errors(corrected, after, seeds)
        errors |= {f"{name} after {after} steps": error for name, error in updates.items()}
    for name, error in errors.items():
        if not error[0] <= budget(error):
            problem = (
                f"JAX is {error[0]:.1e} from the float64 truth, more than {budget(error):.1e} (bound: {FACTOR:g} times "
                f"PyTorch's own distance {error[1]:.1e}, root mean square over {len(seeds)} seeds)"
            )
            yield Divergence("precision", name, problem)


def budget(error: tuple[float, float]) -> float:
    """Return how far JAX may be from the truth, given how far PyTorch is."""
    return FACTOR * max(error[1], HALF_ULP)


def step_errors(pair: Pair, seeds: Sequence[int]) -> tuple[Errors, Errors]:
    """Measure one forward and backward pass in float32.

    Returns:
        The errors of all outputs and gradients, and those of the gradients when JAX's ReLUs and pools make the truth's
        choices.
    """
    free, steered = [], []
    for seed in seeds:
        weights, batch = pair.draw(seed, "float32"), next(batch_pairs(pair, seed))[1]
        truth = capture_torch(pair, cast(weights, np.float64), batch)
        choices = truth._replace(outputs=cast(truth.outputs, np.float32))
        in_jax, in_torch = capture_jax(pair, weights, batch), capture_torch(pair, weights, batch)
        free.append(tuple(named_outputs(side) | named_gradients(side) for side in (in_jax, in_torch, truth)))
        in_jax = capture_jax(pair, weights, batch, steer=choices)
        steered.append(tuple(named_gradients(side) for side in (in_jax, in_torch, truth)))
    return pool(free), pool(steered)


def cast(arrays: Arrays, dtype: type[np.floating[Any]]) -> Arrays:
    """Return the same values in another dtype."""
    return {name: array.astype(dtype) for name, array in arrays.items()}


def named_outputs(capture: Capture) -> Arrays:
    """Return the outputs of all stages under the names that a report shows."""
    return {f"output of {stage}": array for stage, array in capture.outputs.items()}


def named_gradients(capture: Capture) -> Arrays:
    """Return all gradients under the names that a report shows."""
    by_outputs = {f"gradient by the output of {stage}": array for stage, array in capture.output_grads.items()}
    return by_outputs | {f"gradient by {name}": array for name, array in capture.weight_grads.items()}


def update_errors(pair: Pair, after: int, seeds: Sequence[int]) -> Errors:
    """Measure what one float32 step of the optimizer adds to every weight when it has taken `after` steps before."""
    runs = []
    for seed in seeds:
        state, grads = later_state(pair, seed, after)
        weights, first, second = (cast(part, np.float64) for part in state[:3])
        exact = AdamState(weights, first, second, after)
        in_jax, in_torch = update(JaxRun(pair, state), grads), update(TorchRun(pair, state), grads)
        runs.append((in_jax, in_torch, update(TorchRun(pair, exact), cast(grads, np.float64))))
    return pool(runs)


def update(run: JaxRun | TorchRun, grads: TorchDict) -> Arrays:
    """Return what one step of the optimizer adds to the weights, in float64."""
    before = run.state().weights
    run.apply_gradients(grads)
    after = run.state().weights
    return {f"update of {name}": after[name].astype(np.float64) - before[name] for name in grads}


def later_state(pair: Pair, seed: int, after: int) -> tuple[AdamState, TorchDict]:
    """Return a float32 state with moments as large as after so many steps of noise, and the next gradient."""
    fresh = initial_state(pair, seed, "float32")
    rng = np.random.default_rng((seed, after))

    def noise() -> TorchDict:
        return {
            name: (1e-3 * rng.normal(size=fresh.weights[name].shape)).astype(np.float32) for name in pair.trainable()
        }

    b1, b2 = pair.adam.b1, pair.adam.b2
    first = {name: np.float32((1 - b1**after) * 0.2) * array for name, array in noise().items()}
    second = {name: np.float32(1 - b2**after) * array**2 for name, array in noise().items()}
    return AdamState(fresh.weights, first, second, after), noise()


def pool(runs: Sequence[tuple[Arrays, ...]]) -> Errors:
    """Return the errors over all runs of (JAX, PyTorch, truth): root mean squares, relative to that of the truth."""

    def rms(values: Iterator[np.ndarray]) -> float:
        return float(np.sqrt(np.mean([np.mean(np.square(value)) for value in values])))

    errors = {}
    for name, array in runs[0][0].items():  # JAX may have fewer stages than PyTorch
        if array.size * len(runs) < FEWEST_VALUES:
            continue
        scale = rms(truth[name] for _, _, truth in runs) or 1.0
        jax_error = rms(in_jax[name] - truth[name] for in_jax, _, truth in runs)
        torch_error = rms(in_torch[name] - truth[name] for _, in_torch, truth in runs)
        errors[name] = (jax_error / scale, torch_error / scale)
    return errors


def exact_optimizer(pair: Pair) -> Callable[[AdamConfig], optax.GradientTransformation]:
    """Return the pair's optimizer; if it is the Adam of `jax_cnn`, with an exact bias correction."""
    return adam_with_exact_bias_correction if pair.jax_optimizer is train.make_optimizer else pair.jax_optimizer


def adam_with_exact_bias_correction(config: AdamConfig) -> optax.GradientTransformation:
    """Return optax's Adam with 1 - b**t from a table in float64, where optax computes it in float32."""
    adam = optax.scale_by_adam(config.b1, config.b2, config.eps)
    steps = np.arange(1, 2_000)
    corrections = [1 - decay**steps for decay in (config.b1, config.b2)]

    def step(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        _, state = adam.update(grads, state, params)

        def update_of(mu: jax.Array, nu: jax.Array) -> jax.Array:
            first, second = (jnp.asarray(table, mu.dtype)[state.count - 1] for table in corrections)
            return -config.learning_rate * (mu / first) / (jnp.sqrt(nu / second) + config.eps)

        return jax.tree.map(update_of, state.mu, state.nu), state

    return optax.GradientTransformation(adam.init, step)


def drift(
    pair: Pair, seed: int, steps: Sequence[int], nudges: int = 2, *, with_truth: bool = True
) -> dict[str, list[float]]:
    """Train many runs from the same weights and record how far apart they are after each of these steps.

    Returns:
        Distances (root mean square) by what they are between: the frameworks in float32; and each framework in float32
        and itself, the furthest of `nudges` runs that start with every weight moved by one unit in the last place
        (ULP), up or down at random. With the truth also: the frameworks in float64, and each framework's float32 and
        its own float64.
    """
    start = initial_state(pair, seed, "float32")
    sides: dict[str, type[JaxRun] | type[TorchRun]] = {"JAX": JaxRun, "PyTorch": TorchRun}
    runs: dict[tuple[str, str], JaxRun | TorchRun] = {}
    for side, make_run in sides.items():
        runs[side, "float32"] = make_run(pair, start)
        if with_truth:
            runs[side, "float64"] = make_run(pair, initial_state(pair, seed, "float64"))
        for nudge in range(nudges):
            runs[side, f"nudge {nudge}"] = make_run(pair, start._replace(weights=one_ulp(start.weights, nudge)))
    curves: dict[str, list[float]] = {}
    for step, (jax_batch, torch_batch) in enumerate(batch_pairs(pair, seed), start=1):
        for (side, _), run in runs.items():
            run.step(jax_batch if side == "JAX" else torch_batch)
        if step in steps:
            for name, value in distances({key: run.state().weights for key, run in runs.items()}).items():
                curves.setdefault(name, []).append(value)
        if step >= max(steps):
            break
    return curves


def distances(weights: dict[tuple[str, str], TorchDict]) -> dict[str, float]:
    """Return every distance that `drift` records, from the weights of all runs."""
    with_truth = ("JAX", "float64") in weights
    apart = {
        f"{dtype}: JAX from PyTorch": distance(weights["JAX", dtype], weights["PyTorch", dtype])
        for dtype in (["float64"] if with_truth else []) + ["float32"]
    }
    for side in ("JAX", "PyTorch"):
        single = weights[side, "float32"]
        if with_truth:
            apart[f"float32: {side} from float64"] = distance(single, weights[side, "float64"])
        nudged = [tensors for (name, run), tensors in weights.items() if name == side and "nudge" in run]
        apart[f"float32: {side} from itself, one ULP"] = max(distance(single, other) for other in nudged)
    return apart


def one_ulp(weights: TorchDict, seed: int) -> TorchDict:
    """Move every weight to a neighbouring float, up or down at random."""
    rng = np.random.default_rng(seed)
    return {
        name: np.nextafter(array, np.where(rng.random(array.shape) < 0.5, -np.inf, np.inf).astype(array.dtype))
        for name, array in weights.items()
    }


def distance(one: TorchDict, other: TorchDict) -> float:
    """Return the root mean square difference over all weights; the largest one depends on a single weight's luck."""
    squares = sum(float(np.square(one[name].astype(np.float64) - other[name]).sum()) for name in one)
    return float(np.sqrt(squares / sum(array.size for array in one.values())))

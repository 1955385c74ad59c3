"""float32, judged by float64: how far each framework is from the truth, and whether they drift apart by rounding alone.

The truth is the reference in float64, which `checks.py` holds to JAX in float64.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import optax
from jax import numpy as jnp

from jax_cnn.checkpoint import AdamState
from jax_cnn.config import AdamConfig
from jax_cnn.torch_layout import TorchDict
from parity_tests.harness.capture import Capture, capture_jax, capture_torch
from parity_tests.harness.compare import Divergence
from parity_tests.harness.pair import Pair
from parity_tests.harness.trajectory import JaxRun, TorchRun, batch_pairs, start

FACTOR = 4.0  # JAX may be this many times as far from the truth as PyTorch is
HALF_ULP = 2.0**-24  # nobody can be asked to be closer to the truth than float32 is
SEEDS = range(8)
STATES_AFTER = (0, 1, 10, 1000)  # steps that the optimizer has taken; its bias correction matters for the early ones

Arrays = dict[str, np.ndarray]
Errors = dict[str, tuple[float, float]]  # name -> JAX's and PyTorch's distance from the truth, relative


def step_errors(pair: Pair, seeds: Sequence[int] = SEEDS, *, steered: bool = False) -> Errors:
    """Distances of every output and gradient of one float32 pass, root mean square over values and seeds.

    With `steered`, JAX's ReLUs and pools make the choices that the truth makes, and only gradients are told.
    """
    runs: list[tuple[Arrays, Arrays, Arrays]] = []
    for seed in seeds:
        weights, batch = pair.draw(seed, "float32"), next(batch_pairs(pair, seed))[1]
        truth = capture_torch(pair, cast(weights, np.float64), batch)
        choices = truth._replace(outputs=cast(truth.outputs, np.float32)) if steered else None
        ours, theirs = capture_jax(pair, weights, batch, steer=choices), capture_torch(pair, weights, batch)
        runs.append((named(ours, steered), named(theirs, steered), named(truth, steered)))
    return pooled(runs)


def cast(arrays: Arrays, dtype: type[np.floating[Any]]) -> Arrays:
    """The same values in another dtype."""
    return {name: array.astype(dtype) for name, array in arrays.items()}


def named(capture: Capture, steered: bool) -> Arrays:
    """A capture, or its gradients alone, by the names that the tables use."""
    outputs = {} if steered else {f"output of {stage}": array for stage, array in capture.outputs.items()}
    return (
        outputs
        | {f"gradient by the output of {stage}": array for stage, array in capture.output_grads.items()}
        | {f"gradient by {name}": array for name, array in capture.weight_grads.items()}
    )


def update_errors(pair: Pair, after: int, seeds: Sequence[int] = SEEDS) -> Errors:
    """Distances of what one float32 optimizer step adds to every weight, from a state that is `after` steps old."""
    runs = []
    for seed in seeds:
        state, grads = old_state(pair, seed, after)
        weights, first, second = (cast(part, np.float64) for part in state[:3])
        exact = AdamState(weights, first, second, after)
        ours, theirs = update(JaxRun, pair, state, grads), update(TorchRun, pair, state, grads)
        runs.append((ours, theirs, update(TorchRun, pair, exact, cast(grads, np.float64))))
    return pooled(runs)


def update(side: type[JaxRun] | type[TorchRun], pair: Pair, state: AdamState, grads: TorchDict) -> Arrays:
    """What one step of the optimizer adds to the weights, in float64."""
    run = side(pair, state)
    run.apply_gradients(grads)
    after = run.state().weights
    return {f"update of {name}": after[name].astype(np.float64) - state.weights[name] for name in grads}


def old_state(pair: Pair, seed: int, after: int) -> tuple[AdamState, TorchDict]:
    """A float32 state with moments as they are after so many steps of noise, and one more gradient."""
    fresh = start(pair, seed, "float32")
    rng = np.random.default_rng((seed, after))

    def noise() -> TorchDict:
        return {
            name: (1e-3 * rng.normal(size=fresh.weights[name].shape)).astype(np.float32) for name in pair.trainable()
        }

    b1, b2 = pair.adam.b1, pair.adam.b2
    first = {name: np.float32((1 - b1**after) * 0.2) * array for name, array in noise().items()}
    second = {name: np.float32(1 - b2**after) * array**2 for name, array in noise().items()}
    return AdamState(fresh.weights, first, second, after), noise()


def pooled(runs: Sequence[tuple[Arrays, Arrays, Arrays]]) -> Errors:
    """Root mean square errors over all runs, relative to the root mean square of the truth."""

    def rms(values: Iterator[np.ndarray]) -> float:
        return float(np.sqrt(np.mean([np.mean(np.square(value)) for value in values])))

    errors = {}
    for name in runs[0][2]:
        scale = rms(truth[name] for _, _, truth in runs)
        ours = rms(jax_side[name] - truth[name] for jax_side, _, truth in runs)
        theirs = rms(torch_side[name] - truth[name] for _, torch_side, truth in runs)
        errors[name] = (ours / scale, theirs / scale)
    return errors


def adam_with_exact_bias_correction(config: AdamConfig) -> optax.GradientTransformation:
    """Optax's Adam, but for 1 - b**t: from a table computed in float64, where optax computes it in float32."""
    sound = optax.scale_by_adam(config.b1, config.b2, config.eps)
    steps = np.arange(1, 2_000)
    corrections = [1 - decay**steps for decay in (config.b1, config.b2)]

    def step(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        _, state = sound.update(grads, state, params)

        def one(mu: jax.Array, nu: jax.Array) -> jax.Array:
            first, second = (jnp.asarray(table, mu.dtype)[state.count - 1] for table in corrections)
            return -config.learning_rate * (mu / first) / (jnp.sqrt(nu / second) + config.eps)

        return jax.tree.map(one, state.mu, state.nu), state

    return optax.GradientTransformation(sound.init, step)


def precision(pair: Pair, seeds: Sequence[int] = SEEDS) -> Iterator[Divergence]:
    """JAX's float32 is no further from the truth than FACTOR times PyTorch's, in every output, gradient and update.

    Two systematic exceptions are shown to be what they are, by taking away their cause and nothing else. A ReLU and a
    pool choose, and nearly equal values can be chosen between differently: gradients are held to the budget with the
    truth's choices. optax computes Adam's bias correction in float32: updates are held to it with the exact one.
    """
    errors = step_errors(pair, seeds)
    for name, steered in step_errors(pair, seeds, steered=True).items():
        if errors[name][0] > budget(errors[name]):
            errors[f"{name}, with the truth's choices"] = steered
            del errors[name]
    for after in STATES_AFTER:
        exact = replace(pair, jax_optimizer=adam_with_exact_bias_correction) if uses_optax_adam(pair) else pair
        errors |= {f"{name} after {after} steps": error for name, error in update_errors(exact, after, seeds).items()}
    for name, error in errors.items():
        if not error[0] <= budget(error):
            problem = (
                f"JAX is {error[0]:.1e} from the float64 truth, more than {budget(error):.1e} (bound: {FACTOR:g} times "
                f"PyTorch's own distance {error[1]:.1e}, root mean square over {len(seeds)} seeds)"
            )
            yield Divergence("precision", name, problem)


def budget(error: tuple[float, float]) -> float:
    """How far JAX may be from the truth, given how far PyTorch is."""
    return FACTOR * max(error[1], HALF_ULP)


def uses_optax_adam(pair: Pair) -> bool:
    """Whether the pair trains with the product's Adam, whose correction can be exchanged."""
    return pair.jax_optimizer is Pair.jax_optimizer


def drift(
    pair: Pair, seed: int, at: Sequence[int], nudges: int = 2, *, with_truth: bool = True
) -> dict[str, list[float]]:
    """Train freely and record how far apart weights are (root mean square) after the steps `at`.

    Returns:
        One list for each distance: between the frameworks in float32, of each framework's float32 from itself: the
        furthest of `nudges` runs whose first weights are all moved by one unit in the last place (ULP), up or down at
        random; and with the truth between the frameworks in float64, and of each framework's float32 from it.
    """
    state32 = start(pair, seed, "float32")
    sides: dict[str, type[JaxRun] | type[TorchRun]] = {"JAX": JaxRun, "PyTorch": TorchRun}
    runs: dict[tuple[str, str], JaxRun | TorchRun] = {}
    for side, make in sides.items():
        runs[side, "float32"] = make(pair, state32)
        if with_truth:
            runs[side, "float64"] = make(pair, start(pair, seed, "float64"))
        for nudge in range(nudges):
            runs[side, f"nudge {nudge}"] = make(pair, state32._replace(weights=one_ulp(state32.weights, nudge)))
    curves: dict[str, list[float]] = {}
    for step, (ours, theirs) in enumerate(batch_pairs(pair, seed), start=1):
        for (side, _), run in runs.items():
            run.step(ours if side == "JAX" else theirs)
        if step in at:
            for name, apart in distances({key: run.state().weights for key, run in runs.items()}).items():
                curves.setdefault(name, []).append(apart)
        if step >= max(at):
            break
    return curves


def distances(weights: dict[tuple[str, str], TorchDict]) -> dict[str, float]:
    """Every distance that `drift` tells, from the weights of all runs."""
    with_truth = ("JAX", "float64") in weights
    found = {
        f"{dtype}: JAX from PyTorch": distance(weights["JAX", dtype], weights["PyTorch", dtype])
        for dtype in (["float64"] if with_truth else []) + ["float32"]
    }
    for side in ("JAX", "PyTorch"):
        single = weights[side, "float32"]
        if with_truth:
            found[f"float32: {side} from float64"] = distance(single, weights[side, "float64"])
        nudged = [tensors for (whose, which), tensors in weights.items() if whose == side and "nudge" in which]
        found[f"float32: {side} from itself, one ULP"] = max(distance(single, other) for other in nudged)
    return found


def one_ulp(weights: TorchDict, seed: int) -> TorchDict:
    """Every weight moved to a neighbouring float, up or down at random."""
    rng = np.random.default_rng(seed)
    return {
        name: np.nextafter(array, np.where(rng.random(array.shape) < 0.5, -np.inf, np.inf).astype(array.dtype))
        for name, array in weights.items()
    }


def distance(one: TorchDict, other: TorchDict) -> float:
    """Root mean square over all weights: the largest distance is the luck of a single weight."""
    squares = sum(float(np.square(one[name].astype(np.float64) - other[name]).sum()) for name in one)
    return float(np.sqrt(squares / sum(array.size for array in one.values())))

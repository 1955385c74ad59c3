"""Watch a function, which must compute what it computes alone: the tests of taps and of adapters share this."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp

from parity_tests.harness.adapters import Model
from parity_tests.harness.taps import Context, Sweep, Traced, make_sweep, name_leaves, trace

ULPS = 16  # of the largest value: XLA fuses other operations once an inner value is an output


def call(*args: Any, **kwargs: Any) -> SimpleNamespace:
    """Return the inputs of one call of a model."""
    return SimpleNamespace(args=args, kwargs=kwargs)


def assert_close(actual: Any, expected: Any, what: str) -> None:
    """Hold two nests of arrays to a few units in the last place of the largest value of each array."""
    assert name_leaves(actual).keys() == name_leaves(expected).keys(), what
    for place, value in name_leaves(expected).items():
        scale = float(np.max(np.abs(value), initial=0.0))
        limit = ULPS * float(np.finfo(value.dtype).eps) * scale if jnp.issubdtype(value.dtype, jnp.inexact) else 0
        error = float(np.max(np.abs(np.asarray(name_leaves(actual)[place]) - np.asarray(value)), initial=0.0))
        assert error <= limit, f"{what}{place}: {error:.1e} > {limit:.1e}"


def is_float(leaf: Any) -> bool:
    """Say whether a leaf can be differentiated."""
    return bool(jnp.issubdtype(leaf.dtype, jnp.inexact))


def draw_cotangents(outputs: Any) -> dict[str, np.ndarray]:
    """Draw a gradient for every float output, by its place."""
    rng = np.random.default_rng(0)
    leaves = {place: leaf for place, leaf in name_leaves(outputs).items() if is_float(leaf)}
    return {place: rng.normal(size=leaf.shape).astype(leaf.dtype) for place, leaf in leaves.items()}


def differentiate(fn: Callable[..., Any], tensors: Mapping[str, Any], inputs: Any) -> tuple[Any, dict[str, Any], Any]:
    """Return outputs, drawn cotangents and gradients by the float tensors, of the plain jitted function."""
    floats = {name: tensor for name, tensor in tensors.items() if is_float(tensor)}
    cotangents = draw_cotangents(jax.eval_shape(fn, tensors, inputs))

    def differentiated(floats: dict[str, Any]) -> tuple[dict[str, Any], Any]:
        outputs = fn({**tensors, **floats}, inputs)
        named = name_leaves(outputs)
        return {place: named[place] for place in cotangents}, outputs

    @jax.jit
    def run(floats: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        _, pull_back, outputs = jax.vjp(differentiated, floats, has_aux=True)
        return outputs, pull_back(cotangents)[0]

    outputs, gradients = run(floats)
    return outputs, cotangents, gradients


def watch_run(
    fn: Callable[..., Any],
    tensors: Mapping[str, Any],
    inputs: Any,
    context: Context = nullcontext,
) -> tuple[Traced, Sweep]:
    """Watch a function that ran before, and check every value and gradient that the plain function has as well.

    The run steered by its own values and gradients is checked too: each tap must give the same again.
    """
    outputs, cotangents, gradients = differentiate(fn, tensors, inputs)
    traced = trace(fn, tensors, inputs, context=context, verify=False)
    sweep = make_sweep(traced)
    result = sweep(tensors, inputs, cotangents)
    assert_close(result.outputs, outputs, "output")
    assert_close(result.weight_gradients, gradients, "gradient by ")
    assert result.values.keys() == traced.taps.keys()
    for name, info in traced.taps.items():
        assert result.values[name].shape == info.shape, name
        assert result.values[name].dtype == info.dtype, name
    every = dict.fromkeys(traced.taps, True)
    local = sweep(tensors, inputs, cotangents, result.values, result.gradients, every, every)
    assert_close(local.values, result.values, "local value of ")
    assert_close(local.gradients, result.gradients, "local gradient by ")
    assert_close(local.weight_gradients, gradients, "local gradient by ")
    return traced, result


def watch_model(model: Model, *args: Any, training: bool = False) -> tuple[Traced, Sweep]:
    """Watch a model with drawn float64 weights."""
    variables = draw_variables(model, *args)
    leaves = model.leaves(variables)
    return watch_run(lambda tensors, args: run(model, variables, tensors, args, training), leaves, args, model.context)


def draw_variables(model: Model, *args: Any) -> Any:
    """Return variables of a model in which every float is drawn anew, in float64; the same ones in every call."""
    made = model.variables
    if model.init is not None:
        made = jax.eval_shape(lambda key: model.init(key, call(*args)), jax.random.key(0))  # type: ignore[misc]
    rng = np.random.default_rng(0)
    drawn = {
        path: rng.normal(size=leaf.shape) / 3
        if leaf.ndim > 1 and "var" not in path
        else rng.uniform(0.5, 1.5, leaf.shape)
        for path, leaf in model.leaves(made).items()
        if is_float(leaf)
    }
    return jax.tree.map(fill, model.with_leaves(made, drawn))


def fill(leaf: Any) -> Any:
    """Return zeros for what has a shape only, such as a counter."""
    return jnp.zeros(leaf.shape, leaf.dtype) if isinstance(leaf, jax.ShapeDtypeStruct) else leaf


def run(model: Model, variables: Any, tensors: Mapping[str, Any], args: tuple[Any, ...], training: bool) -> Any:
    """Return the outputs of a model with these leaves, and its leaves after the run."""
    outputs, after = model.apply(model.with_leaves(variables, tensors), call(*args), training)
    return outputs, model.leaves(after)

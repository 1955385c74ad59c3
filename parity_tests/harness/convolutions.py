"""Compute float64 convolutions on the CPU in forms for which XLA has fast code.

XLA runs two kinds of float64 convolution in naive loops on the CPU, 10 to 200 times slower than needed: those with a
dilated input (the gradient by the input of a strided convolution), and those whose kernel is larger than their input.
They are replaced after differentiation, so that custom derivatives stay as they are. The results differ by rounding
alone, at most 2e-15 of the largest value.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax import Array, lax
from jax import numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var

# A convolution: its input, its kernel, and its parameters as `lax.conv_general_dilated` has them in a jaxpr.
Form = Callable[[Array, Array, Mapping[str, Any]], Array]

# A dilated input with fewer output channels than this stays: XLA's own loops are faster there (an image's gradient).
FEW_CHANNELS = 8

INLINED = {"jit", "pjit", "closed_call"}


def rewrite(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function with its slow convolutions in another form; on other devices than the CPU, the function."""

    def rewritten(*args: Any) -> Any:
        if jax.default_backend() != "cpu":
            return fn(*args)
        closed, shape = jax.make_jaxpr(fn, return_shape=True)(*args)
        outputs = evaluate(closed.jaxpr, closed.consts, jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(shape), outputs)

    return rewritten


def evaluate(jaxpr: Jaxpr, constants: Sequence[Any], arguments: Sequence[Any]) -> list[Any]:
    """Evaluate a jaxpr, each slow convolution in its other form, also in the jitted functions that it calls."""
    values: dict[Var, Any] = dict(zip(jaxpr.constvars, constants, strict=True))
    values.update(zip(jaxpr.invars, arguments, strict=True))

    def read(variable: Var | Literal) -> Any:
        return variable.val if isinstance(variable, Literal) else values[variable]

    for equation in jaxpr.eqns:
        inputs = [read(variable) for variable in equation.invars]
        form = choose(equation)
        if form:
            outputs = [form(inputs[0], inputs[1], equation.params)]
        elif equation.primitive.name in INLINED and holds_slow(equation):
            inner = inner_jaxpr(equation)
            outputs = evaluate(inner.jaxpr, inner.consts, inputs)
        else:
            outputs = bind(equation, inputs)
        values.update(zip(equation.outvars, outputs, strict=True))
    return [read(variable) for variable in jaxpr.outvars]


def bind(equation: JaxprEqn, inputs: Sequence[Any]) -> list[Any]:
    """Evaluate one equation as it is."""
    parameters: Any = equation.primitive.get_bind_params(equation.params)
    # Up to JAX 0.9 the functions of a custom derivative come apart from the parameters.
    functions, options = parameters if isinstance(parameters, tuple) else ((), parameters)
    primitive: Any = equation.primitive
    with equation.ctx.manager:
        outputs = primitive.bind(*functions, *inputs, **options)
    return list(outputs) if primitive.multiple_results else [outputs]


def inner_jaxpr(equation: JaxprEqn) -> ClosedJaxpr:
    """Return the jaxpr that an equation calls."""
    return equation.params["jaxpr"] if "jaxpr" in equation.params else equation.params["call_jaxpr"]


def holds_slow(equation: JaxprEqn) -> bool:
    """Say whether the jaxpr that an equation calls holds a convolution to replace."""
    return any(
        choose(inner) or (inner.primitive.name in INLINED and holds_slow(inner))
        for inner in inner_jaxpr(equation).jaxpr.eqns
    )


def shapes_of(variables: Sequence[Any]) -> list[Any]:
    """Return the shape and dtype of each variable."""
    return [variable.aval for variable in variables]


def choose(equation: JaxprEqn) -> Form | None:
    """Return the form that is faster than XLA's own, or None where the equation stays as it is."""
    if equation.primitive.name != "conv_general_dilated":
        return None
    image, kernel = shapes_of(equation.invars)
    parameters = equation.params
    if image.dtype != jnp.float64 or image.ndim not in (3, 4) or parameters["batch_group_count"] != 1:
        return None
    numbers, groups = parameters["dimension_numbers"], parameters["feature_group_count"]
    channels = kernel.shape[numbers.rhs_spec[0]]
    if max(parameters["lhs_dilation"]) > 1:
        if groups > 1 and groups < channels:
            return None  # grouped, not depthwise: written out, it is 4 times slower
        if channels < FEW_CHANNELS:
            return None
        if groups == 1 and max(*parameters["window_strides"], *parameters["rhs_dilation"], 1) == 1:
            return by_phases
        return with_padding
    sizes = [image.shape[axis] for axis in numbers.lhs_spec[2:]]
    reaches = [
        (kernel.shape[axis] - 1) * dilation + 1
        for axis, dilation in zip(numbers.rhs_spec[2:], parameters["rhs_dilation"], strict=True)
    ]
    return with_padding if any(size < reach for size, reach in zip(sizes, reaches, strict=True)) else None


def channels_last(image: Array, kernel: Array, numbers: Any) -> tuple[Array, Array, tuple[int, ...]]:
    """Return the input as [batch, space, channels], the kernel as [space, in, out], and the way back for the output."""
    image = lax.transpose(image, (numbers.lhs_spec[0], *numbers.lhs_spec[2:], numbers.lhs_spec[1]))
    kernel = lax.transpose(kernel, (*numbers.rhs_spec[2:], numbers.rhs_spec[1], numbers.rhs_spec[0]))
    back = [0] * image.ndim
    back[numbers.out_spec[1]] = image.ndim - 1
    for place, axis in enumerate(numbers.out_spec[2:]):
        back[axis] = 1 + place
    return image, kernel, tuple(back)


def convolve(
    image: Array, kernel: Array, strides: Sequence[int] = (), dilation: Sequence[int] = (), groups: int = 1
) -> Array:
    """Convolve without padding, channels last."""
    rank = image.ndim - 2
    letters = "DHW"[-rank:]
    return lax.conv_general_dilated(
        image,
        kernel,
        strides or (1,) * rank,
        [(0, 0)] * rank,
        rhs_dilation=dilation or (1,) * rank,
        dimension_numbers=(f"N{letters}C", f"{letters}IO", f"N{letters}C"),
        feature_group_count=groups,
    )


def pad(image: Array, space: Sequence[tuple[int, int, int]]) -> Array:
    """Pad the axes between the first and the last by (before, after, between)."""
    return lax.pad(image, jnp.zeros((), image.dtype), [(0, 0, 0), *space, (0, 0, 0)])


def with_padding(image: Array, kernel: Array, parameters: Mapping[str, Any]) -> Array:
    """Write padding and dilation of the input out; a barrier keeps XLA from putting them back."""
    image, kernel, back = channels_last(image, kernel, parameters["dimension_numbers"])
    space = [
        (before, after, dilation - 1)
        for (before, after), dilation in zip(parameters["padding"], parameters["lhs_dilation"], strict=True)
    ]
    padded = lax.optimization_barrier(pad(image, space))
    strides, dilation = parameters["window_strides"], parameters["rhs_dilation"]
    return lax.transpose(convolve(padded, kernel, strides, dilation, parameters["feature_group_count"]), back)


def by_phases(image: Array, kernel: Array, parameters: Mapping[str, Any]) -> Array:
    """Compute each phase of the output on its own.

    With an input dilated by d, every d-th output along an axis meets the same d-th part of the kernel: a plain
    convolution of the undilated input. The d phases of each axis are then interleaved.
    """
    image, kernel, back = channels_last(image, kernel, parameters["dimension_numbers"])
    dilations, padding = parameters["lhs_dilation"], parameters["padding"]
    rank = image.ndim - 2
    sizes = [
        (size - 1) * dilation + 1 + before + after - reach + 1
        for size, dilation, (before, after), reach in zip(
            image.shape[1:-1], dilations, padding, kernel.shape[:rank], strict=True
        )
    ]
    longest = [math.ceil(size / dilation) for size, dilation in zip(sizes, dilations, strict=True)]
    phases = []
    for phase in itertools.product(*map(range, dilations)):
        starts, space, counts = [], [], []
        for axis, offset in enumerate(phase):
            dilation, before = dilations[axis], padding[axis][0]
            start = (before - offset) % dilation  # the first row of the kernel that meets data
            rows = len(range(start, kernel.shape[axis], dilation))
            count = len(range(offset, sizes[axis], dilation))
            first = (offset + start - before) // dilation  # the row of the input under it
            starts.append(start)
            counts.append(count if rows else 0)
            space.append((-first, first + count + rows - 1 - image.shape[1 + axis], 0))
        phases.append(one_phase(image, kernel, dilations, starts, space, counts, longest))
    stacked = jnp.stack(phases).reshape(*dilations, *phases[0].shape)
    order = [rank, *itertools.chain(*[(rank + 1 + axis, axis) for axis in range(rank)]), 2 * rank + 1]
    merged = [count * dilation for count, dilation in zip(longest, dilations, strict=True)]
    output = lax.transpose(stacked, order).reshape(image.shape[0], *merged, kernel.shape[-1])
    return lax.transpose(output[(slice(None), *map(slice, sizes))], back)


def one_phase(
    image: Array,
    kernel: Array,
    dilations: Sequence[int],
    starts: Sequence[int],
    space: Sequence[tuple[int, int, int]],
    counts: Sequence[int],
    longest: Sequence[int],
) -> Array:
    """Convolve with every d-th row of the kernel, and fill up with zeros to the longest phase's size."""
    if 0 in counts:
        return jnp.zeros((image.shape[0], *longest, kernel.shape[-1]), image.dtype)
    part = kernel[tuple(slice(start, None, dilation) for start, dilation in zip(starts, dilations, strict=True))]
    padded = pad(image, space)
    if math.prod(part.shape[:-2]) == 1:
        output = padded @ part.reshape(part.shape[-2:])
    else:
        output = convolve(lax.optimization_barrier(padded), part)
    return pad(output, [(0, total - count, 0) for total, count in zip(longest, counts, strict=True)])

"""Measure where the reference itself is less exact than float64, so that float64 cannot judge a port of it.

Two kinds are found. Some stages compute in float32 inside a float64 run (a softmax, a time embedding): all their
values then fit float32, though weights and inputs were moved so that no exact result would. Some stages have a gradient
that is off by more than rounding (a factor of 1/6 that was rounded to float32): a finite difference shows it.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from parity_tests.harness.nests import flat, map_leaves
from parity_tests.harness.torch_side import Call, Run, TorchCapture, fresh_copy, run, to_input
from parity_tests.harness.watch import Watch

MOVE = 1e-7  # relative change of weights and inputs: a few units in the last place of float32
NOISE = 1e-12  # relative: above what rounding in float64 gives
UNIT = 2.0**-24  # the largest relative error of rounding to float32


class ReferenceError(NamedTuple):
    """The reference's own errors. Each is relative to the largest value of its array.

    Attributes:
        values: how far the values of stages move by rounding inside the reference, by the names of `TorchCapture`.
        gradients: likewise, the gradients by the values of stages.
        weight_gradients: likewise, the gradients by parameters.
        born: the stages in `values` that keep float32 themselves. The others follow after one.
        born_gradients: likewise, in `gradients`.
        backward: the error of a stage's backward pass, for the stages that were asked for. It shows in the gradients
            by what goes into the stage.
    """

    values: dict[str, float]
    gradients: dict[str, float]
    weight_gradients: dict[str, float]
    born: frozenset[str]
    born_gradients: frozenset[str]
    backward: dict[str, float]


def reference_error(
    module: nn.Module,
    inputs: Call,
    objective: Any,
    capture: TorchCapture,
    *,
    training: bool = False,
    backward_of: Collection[str] = (),
) -> ReferenceError:
    """Return how far the reference's own stages move between two ways to compute them.

    The reference runs with all weights and inputs moved by some 1e-7 in both directions. What is smooth cancels in the
    second difference, and what is left is rounding. Nothing more is run if no stage keeps float32.

    Args:
        module: the reference.
        inputs: what `capture` was made with.
        objective: likewise.
        capture: the unmoved run in float64, which gives the names.
        training: likewise.
        backward_of: names of stages whose gradient is compared with a finite difference.
    """
    backward = backward_errors(module, inputs, objective, training, backward_of) if backward_of else {}
    up, watch = run_moved(module, inputs, objective, training, +1)
    born = frozenset(name for name, value in watch.values.items() if keeps_float32(value))
    born_gradients = frozenset(name for name, value in watch.gradients.items() if keeps_float32(value))
    if not born and not born_gradients:
        return ReferenceError({}, {}, {}, born, born_gradients, backward)
    down, other = run_moved(module, inputs, objective, training, -1)
    return ReferenceError(
        second_differences(capture.values, watch.values, other.values, born),
        second_differences(capture.gradients, watch.gradients, other.gradients, born_gradients),
        second_differences(capture.weight_gradients, up.weight_gradients, down.weight_gradients, frozenset()),
        born,
        born_gradients,
        backward,
    )


def run_moved(module: nn.Module, inputs: Call, objective: Any, training: bool, sign: int) -> tuple[Run, Watch]:
    """Run the reference with weights, buffers and inputs moved, the same way for the same sign."""
    generator = torch.Generator().manual_seed(0)

    def move(tensor: torch.Tensor) -> torch.Tensor:
        change = torch.rand(tensor.shape, generator=generator, dtype=torch.float64) * 2 - 1
        return tensor * (1 + sign * MOVE * change) if tensor.is_floating_point() else tensor

    class Moved(NamedTuple):
        args: tuple[Any, ...]
        kwargs: Mapping[str, Any]

    model = fresh_copy(module, training, torch.float64)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.copy_(move(tensor))
        args, kwargs = (
            map_leaves(
                lambda _, leaf: move(to_input(leaf, torch.float64).detach()) if hasattr(leaf, "shape") else leaf, nest
            )
            for nest in (inputs.args, inputs.kwargs)
        )
    watch = Watch()
    with watch.attach(model):
        return run(model, Moved(args, kwargs), objective, training, torch.float64, watch), watch


def keeps_float32(array: np.ndarray) -> bool:
    """Return whether all values fit float32, and some fill it (small whole numbers, 0 and 1 do not)."""
    if array.dtype.kind != "f" or not array.size:
        return False
    finite = array[np.isfinite(array)].astype(np.float64)
    with np.errstate(over="ignore"):
        if not np.array_equal(finite.astype(np.float32), finite):
            return False
    fractions, _ = np.frexp(finite)
    return bool((fractions * 2.0**12 % 1 != 0).any())


def second_differences(
    middle: Mapping[str, np.ndarray],
    up: Mapping[str, np.ndarray],
    down: Mapping[str, np.ndarray],
    born: frozenset[str],
) -> dict[str, float]:
    """Return the relative size of the rounding in each array that moves by more than float64 explains."""
    errors = {}
    for name, value in middle.items():
        arrays = (value, up.get(name), down.get(name))
        if value.dtype.kind != "f" or any(array is None or array.shape != value.shape for array in arrays):
            continue
        scale = float(np.abs(value).max(initial=0.0))
        if not 0 < scale < np.inf:
            continue
        difference = np.abs(up[name].astype(np.float64) - 2.0 * value + down[name]).max()
        # The rounding of three runs is in the difference, once of them twice.
        error = max(float(difference) / 2 / scale, UNIT if name in born else 0.0)
        if error > NOISE:
            errors[name] = error
    return errors


# Gradients against finite differences


def backward_errors(
    module: nn.Module, inputs: Call, objective: Any, training: bool, names: Collection[str]
) -> dict[str, float]:
    """Return the relative error of each stage's gradient by its inputs, where it is more than 1e-9.

    An error of more than 1e-5 is left out: that is no rounding but a gradient by intention (straight through).
    """
    stages = {name.split("[")[0] for name in names}
    watch = Watch(calls_of=stages)
    model = fresh_copy(module, training, torch.float64)
    with watch.attach(model):
        run(model, inputs, objective, training, torch.float64, watch)
    errors = {}
    for name in names:
        if (call := watch.kept_calls.get(name.split("[")[0])) is None:
            continue
        error = gradient_error(*call)
        if error is not None and 1e-9 < error < 1e-5:
            errors[name] = error
    return errors


def gradient_error(function: Callable[..., Any], args: Any, kwargs: Any) -> float | None:
    """Return the relative difference between a function's gradient and a finite difference, the median of a few.

    Returns:
        None if it has no gradient, or if every direction that was tried passes a kink.
    """
    generator = torch.Generator().manual_seed(0)
    points = [leaf for leaf in flat((args, kwargs)).values() if is_movable(leaf)]

    def outputs_at(moves: list[torch.Tensor]) -> list[torch.Tensor]:
        moved = iter(moves)
        new_args, new_kwargs = map_leaves(
            lambda _, leaf: leaf + next(moved) if is_movable(leaf) else leaf, (args, kwargs)
        )
        return [leaf for leaf in flat(function(*new_args, **new_kwargs)).values() if is_movable(leaf)]

    zeros = [torch.zeros_like(point).requires_grad_() for point in points]
    outputs = outputs_at(zeros)
    cotangents = [torch.rand(leaf.shape, generator=generator, dtype=torch.float64) + 0.5 for leaf in outputs]
    total = sum(((c * leaf).sum() for c, leaf in zip(cotangents, outputs, strict=True)), torch.zeros(()))
    if not points or not total.requires_grad:
        return None
    gradients = torch.autograd.grad(total, zeros, allow_unused=True)
    slopes = [torch.zeros_like(p) if g is None else g for p, g in zip(points, gradients, strict=True)]
    errors = []
    for _ in range(8):
        direction = [sparse_direction(point, generator) for point in points]
        products = [slope * part for slope, part in zip(slopes, direction, strict=True)]
        scale = sum(float(product.abs().sum()) for product in products)
        differences = [finite_difference(outputs_at, direction, cotangents, step, scale) for step in (1e-4, 7e-5)]
        if scale and None not in differences:
            slope = sum(float(product.sum()) for product in products)
            errors.append(min(abs(difference - slope) / scale for difference in differences if difference is not None))
    return float(np.median(errors)) if errors else None


def is_movable(leaf: Any) -> bool:
    """Return whether a part of a nest is a floating-point tensor with values."""
    return isinstance(leaf, torch.Tensor) and leaf.is_floating_point() and leaf.numel() > 0


def sparse_direction(point: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Return a direction in which a few elements move, so that few pass a kink, by the size of the point."""
    direction = torch.zeros_like(point).flatten()
    places = torch.randint(direction.numel(), (8,), generator=generator)
    size = float(point[point.isfinite()].abs().max()) if point.isfinite().any() else 1.0
    direction[places] = (torch.rand(8, generator=generator, dtype=torch.float64).to(point.dtype) + 0.5) * (size or 1.0)
    return direction.view_as(point)


@torch.no_grad()
def finite_difference(
    outputs_at: Callable[[list[torch.Tensor]], list[torch.Tensor]],
    direction: list[torch.Tensor],
    cotangents: list[torch.Tensor],
    step: float,
    scale: float,
) -> float | None:
    """Return the slope in a direction from differences of fourth order (Richardson), or None at a kink.

    Where the function is smooth, the difference between its right and its left slope is proportional to the step.
    Outputs are subtracted before they are summed, so that those that do not move leave no rounding.
    """

    def difference(start: float, end: float) -> float:
        ends = (outputs_at([h * part for part in direction]) for h in (end, start))
        return sum(float((c * (b - a)).sum()) for c, b, a in zip(cotangents, *ends, strict=True)) / step

    right, left = difference(0.0, step), difference(-step, 0.0)
    near_right, near_left = 2 * difference(0.0, step / 2), 2 * difference(-step / 2, 0.0)
    if abs(2 * (near_right - near_left) - (right - left)) > 1e-9 * scale:
        return None
    return (2 * (near_right + near_left) - (right + left) / 2) / 3

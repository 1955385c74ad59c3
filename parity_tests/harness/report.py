"""Examine a pair, and show the result: a table of the stages, and a figure of how far weights drift apart."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.box import SIMPLE
from rich.table import Table

from jax_cnn.run.charts import BLACK, BLUE, GREEN, PURPLE, VERMILION
from parity_tests.harness.capture import Capture, capture_jax, capture_torch
from parity_tests.harness.checks import (
    BATCH_SIZES,
    CHECKS,
    STAGE_BOUND,
    first_divergence,
    impossible_checks,
    probing_weights,
)
from parity_tests.harness.compare import find_difference, relative_error
from parity_tests.harness.float32 import cast, drift
from parity_tests.harness.pair import Pair

Json = dict[str, Any]

DRIFT_POINTS = 40  # steps at which weights are compared, evenly spaced on a logarithmic axis
DRIFT_LINES = {  # each curve has a line style of its own too, for readers who cannot tell the colours apart
    "float64: JAX from PyTorch": (BLUE, "-"),
    "float32: JAX from PyTorch": (VERMILION, "-"),
    "float32: JAX from float64": (PURPLE, "--"),
    "float32: PyTorch from float64": (GREEN, "--"),
    "float32: JAX from itself, one ULP": (BLACK, ":"),
    "float32: PyTorch from itself, one ULP": (BLACK, "-."),
}


def examine(pair: Pair, seed: int, steps: int, progress: Callable[[str], None] = lambda name: None) -> Json:
    """Run the checks up to the first that finds a difference, compare stage by stage, and record the drift.

    If the shapes differ, there are no stages to compare and no drift.

    Args:
        pair: what is compared.
        seed: of the weights and the inputs.
        steps: training steps of the drift; 0 leaves it out.
        progress: called with the name of each part before it starts.

    Returns:
        What JSON can hold: `first_divergence` (a sentence, or None), `passed` and `not_checked` (names of checks),
        `stages` (rows of `compare_stages`), and `drift` (`steps`, and a list of distances for each of `DRIFT_LINES`).

    Raises:
        Refused: the pair cannot be compared.
    """
    divergence = first_divergence(pair, seed, progress=progress)
    names, not_checked = list(CHECKS), impossible_checks(pair)
    passed = [name for name in names if name not in not_checked]
    if divergence:
        passed = [name for name in passed if names.index(name) < names.index(divergence.check)]
    result: Json = {
        "first_divergence": str(divergence) if divergence else None,
        "passed": passed,
        "not_checked": not_checked,
        "stages": [],
        "drift": {"steps": []},
    }
    if "shapes" in passed:
        progress("stage by stage")
        result["stages"] = compare_stages(pair, seed)
    if "shapes" in passed and steps:
        progress(f"drift over {steps} steps")
        compared = sorted({round(step) for step in np.geomspace(1, steps, DRIFT_POINTS)})
        result["drift"] = {"steps": compared, **drift(pair, seed, compared)}
    return result


def compare_stages(pair: Pair, seed: int) -> list[Json]:
    """Return a row for each stage that both sides have, in the reference's order.

    `local` errors are those of JAX on the reference's own input, `inherited` ones those of JAX from end to end. Errors
    are in units of the tensor's largest value; in float64 unless the name says float32. The shapes must be the same.
    """
    weights, batch = probing_weights(pair, seed), pair.synthetic_batch(seed, BATCH_SIZES[0])
    reference = capture_torch(pair, weights, batch)
    local, inherited = capture_jax(pair, weights, batch, reference), capture_jax(pair, weights, batch)
    weights32 = cast(weights, np.float32)
    torch32, jax32 = capture_torch(pair, weights32, batch), capture_jax(pair, weights32, batch)
    return [
        {
            "stage": stage,
            "shape": list(reference.outputs[stage].shape[1:]),
            "local_error": relative_error(local.outputs[stage], reference.outputs[stage]),
            "inherited_error": relative_error(inherited.outputs[stage], reference.outputs[stage]),
            "gradient_error": relative_error(local.output_grads[stage], reference.output_grads[stage]),
            "inherited_gradient_error": relative_error(inherited.output_grads[stage], reference.output_grads[stage]),
            "torch_float32_error": relative_error(torch32.outputs[stage], reference.outputs[stage]),
            "jax_float32_error": relative_error(jax32.outputs[stage], reference.outputs[stage]),
            "verdict": describe_stage(stage, local, inherited, reference),
        }
        for stage in reference.outputs
        if stage in local.outputs
    ]


def describe_stage(stage: str, local: Capture, inherited: Capture, reference: Capture) -> str:
    """Say whether a difference begins in this stage, is inherited from another one, or is not there."""
    for part, alone, end_to_end, expected in (
        ("output", local.outputs, inherited.outputs, reference.outputs),
        ("gradient", local.output_grads, inherited.output_grads, reference.output_grads),
    ):
        if find_difference(alone[stage], expected[stage], STAGE_BOUND):
            return f"{part} differs: born {'here' if part == 'output' else 'in the next stage'}"
        if find_difference(end_to_end[stage], expected[stage], STAGE_BOUND):
            return f"{part} differs: inherited"
    return "same"


def stage_table(rows: Sequence[Json]) -> Table:
    """Return the rows of `compare_stages` as a table for a terminal of 80 columns, without the inherited gradients."""
    columns = {
        "local_error": "local\nerror",
        "inherited_error": "inherited\nerror",
        "gradient_error": "gradient\nerror",
        "torch_float32_error": "PyTorch\nfloat32",
        "jax_float32_error": "JAX\nfloat32",
    }
    table = Table(box=SIMPLE, padding=(0, 1, 0, 0), caption="Errors divided by each tensor's largest value")
    table.add_column("stage", no_wrap=True)
    table.add_column("shape", no_wrap=True)
    for heading in columns.values():
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("verdict")
    for row in rows:
        numbers = (f"{row[name]:.1e}" if row[name] else "0" for name in columns)
        table.add_row(row["stage"], "x".join(map(str, row["shape"])), *numbers, row["verdict"])
    return table


def plot_drift(steps: Sequence[int], curves: Mapping[str, Sequence[float]], title: str, path: Path) -> None:
    """Draw how far weights are apart over the steps into a PNG."""
    figure = Figure(figsize=(8, 5.6), layout="constrained")
    axes = figure.subplots()
    draw_drift(axes, steps, curves)
    envelope = np.max([curves[name] for name in curves if name.endswith("one ULP")], axis=0)
    axes.fill_between(
        steps, envelope, envelope.min() / 1e3, color=BLACK, alpha=0.06, label="inside the one-ULP envelope"
    )
    axes.set(title=title)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, fontsize="small")  # inside it would hide a curve
    figure.savefig(path, dpi=150)


def draw_drift(
    axes: Axes,
    steps: Sequence[int],
    curves: Mapping[str, Sequence[float]],
    colours: Mapping[str, str] | None = None,
) -> None:
    """Draw how far weights are apart over the steps on these axes, which become logarithmic.

    Args:
        axes: where to draw.
        steps: the training steps after which weights were compared.
        curves: distances at these steps, under the names of `DRIFT_LINES`.
        colours: by the same names; those of `DRIFT_LINES` if None.
    """
    for name, distances in curves.items():
        colour, line = DRIFT_LINES[name]
        label = name.replace(", one ULP", ", moved by one ULP")
        axes.loglog(steps, distances, line, color=colours[name] if colours else colour, label=label)
    axes.set(xlabel="training steps", ylabel="distance of the weights (root mean square)")

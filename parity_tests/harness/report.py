"""What a person sees: the table by stage, the first divergence in a sentence, the drift as a figure."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from rich.box import SIMPLE
from rich.table import Table

from parity_tests.harness.capture import Capture, capture_jax, capture_torch
from parity_tests.harness.checks import BATCH_SIZES, STAGE_BOUND, probing_weights
from parity_tests.harness.compare import difference, relative_error
from parity_tests.harness.float32 import cast
from parity_tests.harness.pair import Pair

# Okabe & Ito's palette, and another line style for each: colour-blind readers tell them apart.
CURVE_STYLES = {
    "float64: JAX from PyTorch": ("#0072B2", "-"),
    "float32: JAX from PyTorch": ("#D55E00", "-"),
    "float32: JAX from float64": ("#CC79A7", "--"),
    "float32: PyTorch from float64": ("#009E73", "--"),
    "float32: JAX from itself, one ULP": ("#000000", ":"),
    "float32: PyTorch from itself, one ULP": ("#000000", "-."),
}


class Row(NamedTuple):
    """One stage. Errors are in units of the largest value of the tensor; in float64 unless said otherwise."""

    stage: str
    shape: list[int]
    local_error: float
    inherited_error: float
    gradient_error: float
    inherited_gradient_error: float
    torch_float32_error: float
    jax_float32_error: float
    verdict: str


def stage_rows(pair: Pair, seed: int) -> list[Row]:
    """Compare every stage that both sides have, on the reference's own input (local) and end to end (inherited)."""
    weights, batch = probing_weights(pair, seed), pair.synthetic_batch(seed, BATCH_SIZES[0])
    theirs = capture_torch(pair, weights, batch)
    local, inherited = capture_jax(pair, weights, batch, theirs), capture_jax(pair, weights, batch)
    narrow = cast(weights, np.float32)
    torch32, jax32 = capture_torch(pair, narrow, batch), capture_jax(pair, narrow, batch)
    return [
        Row(
            stage,
            list(theirs.outputs[stage].shape[1:]),
            error(local.outputs, theirs.outputs, stage),
            error(inherited.outputs, theirs.outputs, stage),
            error(local.output_grads, theirs.output_grads, stage),
            error(inherited.output_grads, theirs.output_grads, stage),
            error(torch32.outputs, theirs.outputs, stage),
            error(jax32.outputs, theirs.outputs, stage),
            verdict(stage, local, inherited, theirs),
        )
        for stage in theirs.outputs
        if stage in local.outputs
    ]


def error(actual: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray], stage: str) -> float:
    """The relative error of one stage; NaN where shapes differ."""
    one, other = actual[stage], expected[stage]
    return relative_error(one, other) if one.shape == other.shape else float("nan")


def verdict(stage: str, local: Capture, inherited: Capture, theirs: Capture) -> str:
    """Whether a difference is born in this stage, passes through it, or is not there."""
    for what, born, passed, expected in (
        ("output", local.outputs, inherited.outputs, theirs.outputs),
        ("gradient", local.output_grads, inherited.output_grads, theirs.output_grads),
    ):
        if difference(born[stage], expected[stage], STAGE_BOUND):
            return f"{what} differs: born {'here' if what == 'output' else 'in the next stage'}"
        if difference(passed[stage], expected[stage], STAGE_BOUND):
            return f"{what} differs: inherited"
    return "same"


def stage_table(rows: Sequence[Row]) -> Table:
    """The rows for a terminal of 80 columns; the file has the rest of them."""
    caption = "float64, in units of each tensor's largest value"
    table = Table(box=SIMPLE, padding=(0, 1, 0, 0), caption=caption)
    table.add_column("stage", no_wrap=True)
    table.add_column("shape", no_wrap=True)
    for heading in ("local\nerror", "inherited\nerror", "gradient\nerror", "PyTorch\nfloat32", "JAX\nfloat32"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("verdict")
    for row in rows:
        errors = (
            row.local_error,
            row.inherited_error,
            row.gradient_error,
            row.torch_float32_error,
            row.jax_float32_error,
        )
        numbers = (f"{number:.1e}" if number else "0" for number in errors)
        table.add_row(row.stage, "x".join(map(str, row.shape)), *numbers, row.verdict)
    return table


def plot_drift(at: Sequence[int], curves: Mapping[str, Sequence[float]], title: str, path: Path) -> None:
    """Draw how far weights are apart over the steps, on logarithmic axes, into a PNG."""
    figure = Figure(figsize=(8, 5.6), layout="constrained")
    axes = figure.subplots()
    for name, values in curves.items():
        colour, style = CURVE_STYLES[name]
        axes.loglog(at, values, style, color=colour, label=name)
    envelope = np.max([curves[name] for name in curves if name.endswith("one ULP")], axis=0)
    axes.fill_between(
        at, envelope, envelope.min() / 1e3, color="black", alpha=0.06, label="inside the one-ULP envelope"
    )
    axes.set(title=title, xlabel="training steps", ylabel="distance of the weights (root mean square)")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, fontsize="small")  # inside it would hide a curve
    figure.savefig(path, dpi=150)


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows for a file."""
    return [row._asdict() for row in rows]

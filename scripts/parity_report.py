"""Compare JAX and PyTorch stage by stage, say where they first differ, and draw how they drift apart in training."""

import importlib
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from jax_cnn.config import Dialect, UserError
from jax_cnn.data import prepare_fashion_mnist
from jax_cnn.files import write_atomically
from jax_cnn.run import command_line
from jax_cnn.run.folder import check_out_dir
from jax_cnn.run.provenance import provenance

PACKAGES = ("jax", "jaxlib", "flax", "optax", "torch", "numpy")


@dataclass(frozen=True)
class ReportConfig:
    """What to compare."""

    pair: str = "simple_cnn"
    """simple_cnn, feed_forward, softmax_regression, or your own as module:name (a Pair, or what returns one)."""
    dialect: Dialect = "linen"
    """In which the first three are written."""
    fault: str = "none"
    """Plant this fault first, to see what it looks like; `list` tells which there are."""
    seed: int = 0
    """Of the weights and the inputs."""
    steps: int = 100
    """Training steps of the drift figure; 0 leaves it out."""
    data_dir: Path = Path("data")
    """Where the data set is, or is put."""
    out_dir: Path = Path("runs/parity")
    """Where report.json and drift.png are written."""

    def __post_init__(self) -> None:
        if self.steps < 0 or self.seed < 0:
            raise UserError("--steps and --seed must be 0 or more")


def main() -> None:
    """Read the command line, compare, show."""
    config = command_line.parse(ReportConfig(), __doc__)
    check_out_dir(config.out_dir)
    console = Console()

    # Only now: a slip should not wait for two frameworks.
    from parity_tests.harness import report
    from parity_tests.harness.capture import Refused
    from parity_tests.harness.faults import FAULTS

    if config.fault == "list":
        for fault in FAULTS:
            console.print(f"{fault.name}: {fault.what} ({fault.side})", highlight=False)
        return
    pair = load_pair(config, console)
    if config.fault != "none":
        known = {fault.name: fault for fault in FAULTS}
        if config.fault not in known:
            raise UserError(f"--fault {config.fault}: there is no such fault; --fault list names them")
        pair = plant(pair, known[config.fault])
    try:
        comparison = report.examine(pair, config.seed, config.steps)
    except Refused as reason:
        raise UserError(f"--pair {config.pair} cannot be compared: {reason}") from None

    first = comparison["first_divergence"]
    if comparison["stages"]:
        console.print(report.stage_table(comparison["stages"]))
    sentence = f"First divergence: {first}" if first else f"No divergence: {', '.join(comparison['passed'])} all agree."
    console.print(sentence, highlight=False, soft_wrap=True, markup=False)
    curves = dict(comparison["drift"])
    steps = curves.pop("steps")
    if curves:
        title = "float64 stays together; float32 drifts as one ULP sends it"
        report.plot_drift(steps, curves, title, config.out_dir / "drift.png")
    result = provenance(PACKAGES) | {"pair": pair.name, "fault": config.fault, "seed": config.seed} | comparison
    write_atomically(config.out_dir / "report.json", (json.dumps(result, indent=1) + "\n").encode())
    console.print(f"Results are in {config.out_dir}", highlight=False, soft_wrap=True)
    if first:
        sys.exit(1)


def load_pair(config: ReportConfig, console: Console) -> Any:
    """One of the project's pairs, or one that the user has declared."""
    from parity_tests.harness import product_pairs
    from parity_tests.harness.pair import Pair

    ours = {
        "simple_cnn": product_pairs.simple_cnn,
        "feed_forward": product_pairs.feed_forward,
        "softmax_regression": product_pairs.softmax_regression,
    }
    if config.pair in ours:
        prepare_fashion_mnist(config.data_dir, console.print)
        return ours[config.pair](config.data_dir, 40 * 64 + 32, config.dialect)
    module, colon, name = config.pair.partition(":")
    if not colon:
        raise UserError(f"--pair {config.pair}: give {', '.join(ours)}, or your own as module:name")
    sys.path.insert(0, str(Path.cwd()))
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"--pair {config.pair}: {error}; run from the folder that holds {module}.py") from None
    pair = found() if callable(found) else found
    if not isinstance(pair, Pair):
        raise UserError(f"--pair {config.pair}: is {type(pair).__name__}, not a parity_tests.harness.pair.Pair")
    return pair


def plant(pair: Any, fault: Any) -> Any:
    """The pair with the fault in it."""
    try:
        faulty = fault.plant(pair)
        fault.where(pair)
    except LookupError as reason:
        raise UserError(f"--fault {fault.name} cannot be planted: {reason}") from None
    return replace(faulty, name=f"{pair.name} with {fault.name}")


if __name__ == "__main__":
    command_line.run(main)

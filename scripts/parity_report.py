"""Compare JAX and PyTorch stage by stage, say where they first differ, and draw how they drift apart in training."""

import importlib
import sys
import traceback
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from jax_cnn.config import Dialect, FolderConfig, SeedConfig, UserError, check_limits
from jax_cnn.data import prepare_fashion_mnist
from jax_cnn.files import write_json, writing
from jax_cnn.run import command_line
from jax_cnn.run.display import ProgressBar
from jax_cnn.run.folder import check_out_dir
from jax_cnn.run.provenance import provenance

if TYPE_CHECKING:  # the harness loads both frameworks, and a wrong flag should not wait for them
    from parity_tests.harness.pair import Pair

PACKAGES = ("jax", "jaxlib", "flax", "optax", "torch", "numpy")


@dataclass(frozen=True)
class ReportConfig(FolderConfig, SeedConfig):
    """The flags of this command."""

    pair: str = "simple_cnn"
    """simple_cnn, feed_forward, softmax_regression, or module:name of your own Pair or of a function returning one."""
    dialect: Dialect = "linen"
    """How the JAX side of the first three is written."""
    fault: str = "none"
    """Plant this fault first, to see how it looks in the report; `list` prints all faults."""
    steps: int = 100
    """Training steps of the drift figure; 0 leaves it out."""
    out_dir: Path = Path("runs/parity")
    """The folder for report.json and drift.png."""

    def __post_init__(self) -> None:
        check_limits(self)
        if self.steps < 0:
            raise UserError(f"--steps must be 0 or more, not {self.steps}")


def main() -> None:
    """Read the command line, compare, and show the result; end with status 1 if the sides differ."""
    config = command_line.parse(ReportConfig(), __doc__)
    check_out_dir(config.out_dir)
    console = Console()

    from parity_tests.harness import report
    from parity_tests.harness.capture import Refused
    from parity_tests.harness.faults import FAULTS

    if config.fault == "list":
        for fault in FAULTS:
            console.print(f"{fault.name}: {fault.what} ({fault.side})", highlight=False)
        return
    pair = load_pair(config, console)
    if config.fault != "none":
        pair = plant(pair, config.fault)
    try:
        with ProgressBar(console) as bar:
            comparison = report.examine(pair, config.seed, config.steps, bar.announce)
    except Refused as reason:
        raise UserError(f"--pair {config.pair} cannot be compared: {reason}") from None

    first = comparison["first_divergence"]
    if comparison["stages"]:
        console.print(report.stage_table(comparison["stages"]))
    sentence = f"First divergence: {first}" if first else f"No divergence: {', '.join(comparison['passed'])} all agree."
    if comparison["not_checked"]:
        sentence += f" Not checked, because the pair declares none: {', '.join(comparison['not_checked'])}."
    console.print(sentence, highlight=False, soft_wrap=True, markup=False)
    curves = dict(comparison["drift"])
    steps = curves.pop("steps")
    if curves:
        report.plot_drift(steps, curves, f"{pair.name}: how far apart weights drift", config.out_dir / "drift.png")
    result = provenance(PACKAGES) | {"pair": pair.name, "fault": config.fault, "seed": config.seed} | comparison
    with writing(config.out_dir):
        write_json(config.out_dir / "report.json", result)
    console.print(f"Results are in {config.out_dir}", highlight=False, soft_wrap=True)
    if first:
        sys.exit(1)


def load_pair(config: ReportConfig, console: Console) -> "Pair":
    """Return one of the project's pairs, or one that the user has declared.

    Raises:
        UserError: there is no such pair.
    """
    from parity_tests.harness import product_pairs
    from parity_tests.harness.pair import Pair

    makers = {
        "simple_cnn": product_pairs.simple_cnn,
        "feed_forward": product_pairs.feed_forward,
        "softmax_regression": product_pairs.softmax_regression,
    }
    if config.pair in makers:
        prepare_fashion_mnist(config.data_dir, console.print)
        return makers[config.pair](config.data_dir, product_pairs.REPORT_IMAGES, config.dialect)
    module, _, name = config.pair.partition(":")
    if not all(part.isidentifier() for part in (*module.split("."), name)):
        raise UserError(f"--pair {config.pair}: give {', '.join(makers)}, or your own as module:name")
    sys.path.insert(0, str(Path.cwd()))
    try:
        declared = getattr(importlib.import_module(module), name)
        pair = declared() if callable(declared) else declared
    except (Exception, SystemExit) as error:  # the user's own code may raise anything
        if isinstance(error, ModuleNotFoundError) and error.name == module:
            raise UserError(f"--pair {config.pair}: {error}; run from the folder that holds {module}.py") from None
        place = traceback.extract_tb(error.__traceback__)[-1]
        reason = f"{type(error).__name__}: {error} ({Path(place.filename).name}, line {place.lineno})"
        raise UserError(f"--pair {config.pair} cannot be made: {reason}") from None
    if not isinstance(pair, Pair):
        raise UserError(f"--pair {config.pair}: is {type(pair).__name__}, not a parity_tests.harness.pair.Pair")
    return pair


def plant(pair: "Pair", name: str) -> "Pair":
    """Return the pair with the fault of this name in it.

    Raises:
        UserError: there is no such fault, or the pair has no place for it.
    """
    from parity_tests.harness.faults import FAULTS

    faults = {fault.name: fault for fault in FAULTS}
    if name not in faults:
        raise UserError(f"--fault {name}: there is no such fault; --fault list prints all")
    try:
        faults[name].where(pair)
        faulty = faults[name].plant(pair)
    except LookupError as reason:
        raise UserError(f"--fault {name} cannot be planted: {reason}") from None
    return replace(faulty, name=f"{pair.name} with {name}")


if __name__ == "__main__":
    command_line.run(main)

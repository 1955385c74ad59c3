"""Compare a JAX port with its PyTorch reference in all that training consists of, and say where each fault is born.

Exit status: 0 the same, 1 different, 2 cannot be compared.
"""

import importlib
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import tyro
from rich.console import Console

from jax_cnn.config import Dialect, FolderConfig, SeedConfig, UserError, check_limits
from jax_cnn.files import check_out_dir, write_json, writing
from jax_cnn.run import command_line
from jax_cnn.run.display import ProgressBar, show_table
from jax_cnn.run.provenance import provenance, warn_of_two_cudas

if TYPE_CHECKING:  # the harness loads both frameworks, and a wrong flag should not wait for them
    from parity_tests.harness.checks import Result
    from parity_tests.harness.pair import Pair
    from parity_tests.harness.propose import Proposal

PACKAGES = ("jax", "jaxlib", "flax", "equinox", "dm-haiku", "optax", "torch", "numpy")
LIBRARIES = {"parity_tests", "jax_cnn", "jax", "jaxlib", "flax", "equinox", "haiku", "optax", "torch", "numpy", "scipy"}
PRODUCT_PAIRS = ("simple_cnn", "feed_forward", "softmax_regression")


@dataclass(frozen=True)
class ReportConfig(FolderConfig, SeedConfig):
    """The flags of this command."""

    which: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="PAIR")] = ""
    """The pair to compare; --pair takes the same."""
    pair: str = ""
    """module:name or path/file.py:name of your own Pair, or of a function that returns one. Without it the pair is
    simple_cnn; feed_forward and softmax_regression come with the project too."""
    dialect: Dialect = "linen"
    """How the JAX side of the project's own pairs is written."""
    fault: str = "none"
    """Plant this fault first, to see how it looks in the report; `list` prints all faults."""
    propose: bool = False
    """Print the map of the weights, as a table and as Python to paste into your pair, and compare nothing."""
    all: bool = False
    """Show every stage and tensor in the table, also where all is the same."""
    steps: int = 100
    """Training steps of the drift figure; 0 leaves it out."""
    out_dir: Path = Path("runs/parity")
    """The folder for report.json and the pictures."""

    def __post_init__(self) -> None:
        check_limits(self)
        if self.steps < 0:
            raise UserError(f"--steps must be 0 or more, not {self.steps}")
        if self.which and self.pair and self.which != self.pair:
            raise UserError(f"two pairs are given, {self.which} and --pair {self.pair}; give one")

    @property
    def name(self) -> str:
        """The pair that is asked for."""
        return self.pair or self.which or PRODUCT_PAIRS[0]


def main_entry() -> NoReturn:
    """Run the command `parity-report`."""
    command_line.run(main)


def main() -> None:
    """Read the command line, compare, and show the result; end with status 1 if the sides differ."""
    config = command_line.parse(ReportConfig(), __doc__)
    console = Console()
    if config.fault == "list":
        list_faults(console)
        return
    if not config.propose:
        check_out_dir(config.out_dir)
    from jax_cnn.devices import find_devices, fix_settings  # only now: an error should not wait for JAX to load

    warn_of_two_cudas("auto", console.print)
    fix_settings()
    find_devices("auto")  # which reports on one line that JAX cannot start
    pair = load_pair(config, console)
    if config.fault != "none":
        pair = plant(pair, config.fault)
    if config.propose:
        propose(config, pair, console)
        return
    result = examine(config, pair, console)
    show(config, result, console)
    if result.divergences:
        sys.exit(1)


def examine(config: ReportConfig, pair: "Pair", console: Console) -> "Result":
    """Run every check of a pair.

    Raises:
        UserError: the pair cannot be compared.
    """
    from parity_tests import harness

    with ProgressBar(console) as bar, refusals(config):
        return harness.examine(pair, seed=config.seed, steps=config.steps, progress=bar.announce)


def show(config: ReportConfig, result: "Result", console: Console) -> None:
    """Print the report of a result, and write report.json and the pictures.

    Raises:
        UserError: the folder cannot be written.
    """
    from parity_tests.harness import report

    if result.header:
        console.print(report.show_header(result.header))
    if result.comparisons:
        show_table(console, report.tree(result, config.all))
    console.print(report.sentences(result), highlight=False, soft_wrap=True, markup=False)
    curves = dict(result.drift)
    steps = curves.pop("steps", [])
    with writing(config.out_dir):
        if result.comparisons:
            report.plot_errors(result, config.out_dir / "errors.png")
        if curves:
            title = f"{result.pair}: how far apart weights drift"
            report.plot_drift([int(step) for step in steps], curves, title, config.out_dir / "drift.png")
        write_json(
            config.out_dir / "report.json", provenance(PACKAGES) | {"fault": config.fault} | report.to_json(result)
        )
    console.print(f"Results are in {config.out_dir}", highlight=False, soft_wrap=True)


def propose(config: ReportConfig, pair: "Pair", console: Console) -> None:
    """Print the map of the weights as a table and as Python, with what is ambiguous and what is left over.

    Raises:
        UserError: the pair cannot be compared, or two maps fit equally.
    """
    from parity_tests.harness.capture import Case

    with ProgressBar(console) as bar, refusals(config):
        proposal: Proposal = Case(pair, config.seed, bar.announce).proposal
    for line in proposal_lines(proposal):
        console.print(line, highlight=False, soft_wrap=True, markup=False)
    if proposal.ambiguous:
        raise UserError(
            f"--pair {config.name}: {len(proposal.ambiguous)} places have two maps that fit equally, see above; say "
            "which in weights="
        )


def proposal_lines(proposal: "Proposal") -> list[Any]:
    """Return what to print of a proposal: a table, the Python, and a line for each question and each gap."""
    from rich.box import SIMPLE
    from rich.table import Table

    parts: list[Any] = []
    if proposal.rows:
        table = Table("PyTorch", "shape", "JAX", "shape", "rule", "evidence", box=SIMPLE)
        for row in proposal.rows:
            table.add_row(*row)
        parts.append(table)
    if proposal.python:
        parts.append(proposal.python)
    parts += [f"Two maps fit equally: {question}" for question in proposal.ambiguous]
    parts += [f"No map makes the outputs agree; taken by names and order: {answer}" for answer in proposal.assumed]
    parts += [f"PyTorch has {name} and nothing carries it to JAX" for name in proposal.gaps.torch]
    parts += [f"JAX has {path} and no tensor of PyTorch's fills it" for path in proposal.gaps.jax]
    return parts or ["The pair gives its own map, and nothing is proposed."]


@contextmanager
def refusals(config: ReportConfig) -> Iterator[None]:
    """Turn a refusal, or an error of the pair's own models, into one line for the user.

    Raises:
        UserError: the pair cannot be compared.
    """
    from parity_tests.harness.compare import Refused

    try:
        yield
    except Refused as reason:
        place = find_users_frame(reason.__cause__) if reason.__cause__ else None
        where = f" ({place})" if place and place not in str(reason) else ""
        raise UserError(f"--pair {config.name} cannot be compared: {reason}{where}") from None
    except Exception as error:
        place = find_users_frame(error)
        if place is None:
            traceback.print_exc()  # not the pair's fault: all of it is needed to mend it
            raise UserError(f"--pair {config.name} cannot be compared: {describe(error)}") from None
        message = str(error).partition("\n")[0]
        raise UserError(
            f"--pair {config.name} cannot be compared: {type(error).__name__}: {message} ({place})"
        ) from None


def find_users_frame(error: BaseException) -> str | None:
    """Return the innermost line of the pair's own files that an error went through, or None if there is none.

    The files of an installed port count as the pair's own, those of this project and of its libraries do not.
    """
    own, python = Path(__file__).parents[1], Path(os.__file__).parent
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path, (_, installed, rest) = Path(frame.filename), frame.filename.rpartition("site-packages/")
        if installed and rest.partition("/")[0] in LIBRARIES:
            continue
        if installed or (path.suffix == ".py" and not path.is_relative_to(own) and not path.is_relative_to(python)):
            return f"{path.name}, line {frame.lineno}"
    return None


def list_faults(console: Console) -> None:
    """Print every fault that `--fault` can plant."""
    from parity_tests.faults import FAULTS

    for fault in FAULTS:
        console.print(f"{fault.name}: {fault.what} ({fault.side})", highlight=False)


def load_pair(config: ReportConfig, console: Console) -> "Pair":
    """Return one of the project's pairs, or one that the user has declared.

    Raises:
        UserError: there is no such pair, or it cannot be made.
    """
    from parity_tests.harness.pair import Pair

    if config.name in PRODUCT_PAIRS:
        return load_product_pair(config, console)
    module, _, name = config.name.rpartition(":")
    folder, parts = Path.cwd(), [*module.split("."), name]
    if module.endswith(".py"):  # a file, in any folder
        folder, module, parts = Path(module).resolve().parent, Path(module).stem, [name]
    if not all(part.isidentifier() for part in parts):
        raise UserError(f"--pair {config.name}: give {', '.join(PRODUCT_PAIRS)}, or your own as module:name")
    sys.path.insert(0, str(folder))
    try:
        imported = importlib.import_module(module)
        if not hasattr(imported, name):
            pairs = [attribute for attribute, value in vars(imported).items() if isinstance(value, Pair)]
            has = f"; its pairs are {', '.join(pairs)}" if pairs else ""
            raise UserError(f"--pair {config.name}: {module} has no {name}{has}")
        declared = getattr(imported, name)
        pair = declared() if callable(declared) else declared
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # the user's own code may raise anything
        if isinstance(error, ModuleNotFoundError) and error.name == module:
            raise UserError(f"--pair {config.name}: {error}; run from the folder that holds {module}.py") from None
        raise UserError(f"--pair {config.name} cannot be made: {describe(error)}") from None
    if not isinstance(pair, Pair):
        raise UserError(f"--pair {config.name}: is {type(pair).__name__}, not a parity_tests.harness.Pair")
    return pair


def load_product_pair(config: ReportConfig, console: Console) -> "Pair":
    """Return a pair that comes with the project.

    Raises:
        UserError: what only the project's own networks need is not installed, or there is no data set.
    """
    try:
        from jax_cnn.data import prepare_fashion_mnist
        from parity_tests import product
    except ModuleNotFoundError as error:
        raise UserError(
            f"--pair {config.name} needs {error.name}: pip install 'jax-cnn-parity[train]', or give your own pair as "
            "module:name"
        ) from None
    root = prepare_fashion_mnist(config.data_dir, console.print)
    makers = {
        "simple_cnn": product.simple_cnn,
        "feed_forward": product.feed_forward,
        "softmax_regression": product.softmax_regression,
    }
    return makers[config.name](root, product.REPORT_IMAGES, config.dialect)


def plant(pair: "Pair", name: str) -> "Pair":
    """Return the pair with the fault of this name in it.

    Raises:
        UserError: there is no such fault, or the pair has no place for it.
    """
    from parity_tests.faults import FAULTS

    faults = {fault.name: fault for fault in FAULTS}
    if name not in faults:
        raise UserError(f"--fault {name}: there is no such fault; --fault list prints all")
    try:
        faults[name].where(pair)
        faulty = faults[name].plant(pair)
    except LookupError as reason:
        raise UserError(f"--fault {name} cannot be planted: {reason}") from None
    return replace(faulty, name=f"{pair.title()} with {name}")


def describe(error: BaseException) -> str:
    """Return the kind and the message of an error on one line, and its place in the user's files."""
    place = find_users_frame(error)
    message = str(error).partition("\n")[0]
    return f"{type(error).__name__}: {message}{f' ({place})' if place else ''}"

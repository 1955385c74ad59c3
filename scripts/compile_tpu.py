"""Compile the training program for TPUs that are not here, and show the compiler's figures."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from jax_cnn.config import TRAIN_SIZE, TpuPrecision, UserError
from jax_cnn.files import check_out_dir, write_json, writing
from jax_cnn.run import command_line
from jax_cnn.run.display import show_table
from jax_cnn.run.provenance import provenance

if TYPE_CHECKING:
    from experiments.tpu import Collective, Compilation

PACKAGES = ("jax", "jaxlib", "libtpu", "flax", "optax")
RESULTS = "compilations.json"


@dataclass(frozen=True)
class CompileConfig:
    """The chips to compile for."""

    topologies: tuple[str, ...] = ("v5e:1x1", "v5e:2x2", "v5e:16x16")
    """TPUs to compile for: generation, and rows x columns of chips that share each batch."""
    batch_per_chip: int = 64
    """Number of images of each batch on a chip."""
    precisions: tuple[TpuPrecision, ...] = ("float32", "bfloat16")
    """Dtypes to compute in. Weights and Adam's moments are float32 with both."""
    cpu_operations: bool = False
    """Compute the convolutions and pools as on a CPU, to compare them with XLA's own, which a TPU gets."""
    out_dir: Path = Path("runs/tpu")
    """Folder for compilations.json."""

    def __post_init__(self) -> None:
        if not 1 <= self.batch_per_chip <= TRAIN_SIZE:
            raise UserError(f"--batch-per-chip must be between 1 and {TRAIN_SIZE:,}, not {self.batch_per_chip}")


def main() -> None:
    """Read the command line, compile, and show the figures."""
    config = command_line.parse(CompileConfig(), __doc__)
    check_out_dir(config.out_dir)
    console = Console()

    from experiments import tpu  # only now: an error should not wait for JAX to load

    sizes = {topology: len(tpu.find_chips(topology)) for topology in config.topologies}
    compilations = []
    for precision in config.precisions:
        for topology, chips in sizes.items():
            console.print(f"compiling for {topology} in {precision}", highlight=False)
            batch_size = chips * config.batch_per_chip
            compilations.append(tpu.compile_training(topology, batch_size, precision, config.cpu_operations))
    show_table(console, compilation_table(compilations))
    result = provenance(PACKAGES) | {"compilations": [asdict(compilation) for compilation in compilations]}
    with writing(config.out_dir):
        write_json(config.out_dir / RESULTS, result)
    console.print(f"Compiled, not run. Results are in {config.out_dir}", highlight=False, soft_wrap=True)


def describe_exchange(exchange: "Collective") -> str:
    """Return the name and the size of an exchange: `all-reduce 6.6 MB`."""
    size = f"{exchange.bytes / 1e6:.1f} MB" if exchange.bytes >= 1e5 else f"{exchange.bytes} bytes"
    return f"{exchange.operation} {size}"


def compilation_table(compilations: "Sequence[Compilation]") -> Table:
    """Return a table with one compilation in each row."""
    caption = (
        "Per chip: MFLOP, the compiler's estimate of 1,000 cycles, and exchange of a step; MB of\n"
        "arguments, of outputs that do not replace arguments, of temporaries and of code.\n"
        "s: seconds to compile"
    )
    table = Table(box=SIMPLE, padding=0, caption=caption)
    for heading in ("TPU", "precision"):
        table.add_column(heading, no_wrap=True)
    for heading in ("batch", "MFLOP", "kcycles", "in", "out", "temp", "code"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("exchange")
    table.add_column("s", justify="right", no_wrap=True)
    for compilation in compilations:
        memory = (compilation.arguments, compilation.outputs, compilation.temporaries, compilation.code)
        table.add_row(
            compilation.topology,
            compilation.precision,
            f"{compilation.batch_size:,}",
            f"{compilation.flops / 1e6:,.0f}",
            f"{compilation.cycles / 1e3:,.0f}",
            *(f"{size / 1e6:.1f}" for size in memory),
            ", ".join(map(describe_exchange, compilation.collectives)) or "none",
            f"{compilation.compile_seconds:.0f}",
        )
    return table


if __name__ == "__main__":
    command_line.run(main)

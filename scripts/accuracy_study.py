"""Train SimpleCNN with many seeds in both frameworks, and test whether the two are equally accurate.

Interrupted, it goes on where it stopped when started again. Exit status 1: all is done, and equivalence is not shown.
"""

import sys
from statistics import median

from rich.console import Console
from rich.table import Table

from experiments.studies import accuracy, runs
from experiments.studies.progress import train_missing
from experiments.studies.runs import Run, StudyConfig
from jax_cnn.config import TRAIN_SIZE
from jax_cnn.run import command_line
from jax_cnn.run.folder import check_out_dir


def main() -> None:
    """Train what is missing, judge, write, show."""
    config = command_line.parse(StudyConfig(), __doc__)
    check_out_dir(config.out_dir)
    console = Console()
    train_missing(runs.planned_runs(config), console, images)
    result = accuracy.conclude(config)
    accuracy.write(result, config.results)
    for setting in ("short", "full"):
        console.print(seed_table(result[setting], f"{setting} training"))
    console.print(f"{accuracy.sentence(result)}\nWritten to {config.results}.", highlight=False, soft_wrap=True)
    if not result["full"]["equivalence"]["equivalent"]:
        sys.exit(1)


def images(run: Run) -> int:
    """How many images a run trains on: the measure of its time."""
    return run.config.epochs * (run.config.limit_train or TRAIN_SIZE)


def seed_table(result: accuracy.Json, title: str) -> Table:
    """One setting's pairs, one to a row."""
    table = Table(title=title, caption="Test accuracy in %, test loss, median seconds of training per epoch")
    for heading in ("seed", "JAX %", "torch %", "diff.", "JAX loss", "torch loss", "JAX s", "torch s"):
        table.add_column(heading, justify="right")
    for seed in result["seeds"]:
        observed = accuracy.observations(seed)
        table.add_row(
            str(seed["seed"]),
            f"{observed['jax accuracy']:.2f}",
            f"{observed['torch accuracy']:.2f}",
            f"{observed['accuracy difference']:+.2f}",
            f"{observed['jax loss']:.4f}",
            f"{observed['torch loss']:.4f}",
            *(f"{median(seed[framework]['train_seconds']):.1f}" for framework in ("jax", "torch")),
        )
    return table


if __name__ == "__main__":
    command_line.run(main)

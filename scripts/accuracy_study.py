"""Train SimpleCNN with many seeds in both frameworks, and test whether the two are equally accurate.

Interrupted, it goes on where it stopped when started again. Exit status 1: all is done, and equivalence is not shown.
"""

import sys
import time
from statistics import median

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from jax_cnn.config import TRAIN_SIZE
from jax_cnn.shell import command_line
from jax_cnn.shell.run_folder import check_out_dir
from parity_tests.harness import study, study_runs
from parity_tests.harness.study_runs import Run, StudyConfig


def main() -> None:
    """Train what is missing, judge, write, show."""
    config = command_line.parse(StudyConfig(), __doc__)
    check_out_dir(config.out_dir)
    console = Console()
    train_missing(study_runs.planned_runs(config), console)
    result = study.conclude(config)
    study.write(result, config.results)
    for setting in ("short", "full"):
        console.print(seed_table(result[setting], f"{setting} training"))
    console.print(f"{study.sentence(result)}\nWritten to {config.results}.", highlight=False, soft_wrap=True)
    if not result["full"]["equivalence"]["equivalent"]:
        sys.exit(1)


def train_missing(runs: list[Run], console: Console) -> None:
    """Run the training commands whose results are not there yet; a bar on a terminal, a line for each in a pipe."""
    missing = [run for run in runs if not study_runs.is_finished(run)]
    console.print(f"{len(runs)} runs: {len(runs) - len(missing)} are there, {len(missing)} to do", highlight=False)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[left]}  {task.fields[line]}"))
    work_left = sum(images(run) for run in missing)
    work_done, started = 0, time.perf_counter()
    with Progress(*columns, console=console, transient=True, disable=not (console.is_terminal and missing)) as bar:
        task = bar.add_task("", total=work_left, left="", line="")
        for run in missing:
            bar.update(task, description=str(run), line="")
            study_runs.train(run, lambda line: bar.update(task, line=line[:60]) if line.startswith("epoch") else None)
            work_done, work_left = work_done + images(run), work_left - images(run)
            left = f"{(time.perf_counter() - started) / work_done * work_left / 60:.0f} min left"
            bar.update(task, completed=work_done, left=left)
            accuracy = study_runs.read_metrics(run.config.out_dir)[-1]["test_accuracy"]
            console.print(f"{run}: {accuracy:.2%}; {left}", highlight=False)


def images(run: Run) -> int:
    """How many images a run trains on: the measure of its time."""
    return run.config.epochs * (run.config.limit_train or TRAIN_SIZE)


def seed_table(result: study.Json, title: str) -> Table:
    """One setting's pairs, one to a row."""
    table = Table(title=title, caption="Test accuracy in %, test loss, median seconds of training per epoch")
    for heading in ("seed", "JAX %", "torch %", "diff.", "JAX loss", "torch loss", "JAX s", "torch s"):
        table.add_column(heading, justify="right")
    for seed in result["seeds"]:
        observed = study.observations(seed)
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

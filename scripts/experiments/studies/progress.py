"""How a study runs its trainings: those that are missing, one after the other, with the time that is left."""

import time
from collections.abc import Callable, Sequence

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from experiments.studies import runs
from experiments.studies.runs import Run, is_finished, read_metrics


def train_missing(
    runs: Sequence[Run],
    console: Console,
    cost: Callable[[Run], float],
    train: Callable[[Run, Callable[[str], None]], None] = runs.train,
) -> None:
    """Do the trainings whose results are not there yet; a bar on a terminal, a line for each in a pipe.

    Args:
        runs: all of them.
        console: where a person looks.
        cost: a run's share of the time, in whatever unit.
        train: does it, and shows lines of text meanwhile.

    Raises:
        UserError: a training failed.
    """
    missing = [run for run in runs if not is_finished(run)]
    console.print(f"{len(runs)} runs: {len(runs) - len(missing)} are there, {len(missing)} to do", highlight=False)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[left]}  {task.fields[line]}"))
    work_left = sum(cost(run) for run in missing)
    work_done, started = 0.0, time.perf_counter()
    with Progress(*columns, console=console, transient=True, disable=not (console.is_terminal and missing)) as bar:
        task = bar.add_task("", total=work_left, left="", line="")
        for run in missing:
            bar.update(task, description=str(run), line="")
            train(run, lambda line: bar.update(task, line=line[:60]) if "epoch" in line else None)
            work_done, work_left = work_done + cost(run), work_left - cost(run)
            left = f"{(time.perf_counter() - started) / work_done * work_left / 60:.0f} min left"
            bar.update(task, completed=work_done, left=left)
            accuracy = read_metrics(run.config.out_dir)[-1]["test_accuracy"]
            console.print(f"{run}: {accuracy:.2%}; {left}", highlight=False)

"""The parts that both studies share: their flags, their training runs, and the answers of the trained networks.

Every run is the training command in a process of its own, so a study judges what a user gets. Each framework draws its
own initial weights from its own generator. Both visit the same images in the same order.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool
from rich.console import Console
from scipy import ndimage

from experiments import records
from experiments.answers import Framework, compute_logits
from experiments.records import ENVIRONMENT, PACKAGES, Json
from jax_cnn.config import FolderConfig, LimitConfig, TrainConfig, UserError, check_limits
from jax_cnn.data import load_fashion_mnist
from jax_cnn.files import write_json, writing
from jax_cnn.run.display import ProgressBar
from jax_cnn.run.folder import WEIGHTS
from jax_cnn.run.provenance import provenance
from jax_cnn.weights import load_weights

Correct = Bool[np.ndarray, " images"]

load_data = cache(load_fashion_mnist)  # once for all runs


@dataclass(frozen=True)
class StudyConfig(FolderConfig, LimitConfig):
    """The flags that both studies have."""

    seeds: int = 10
    """Number of runs of each training in each framework, with the seeds 0, 1, …"""

    def __post_init__(self) -> None:
        if self.seeds < 2:
            raise UserError(f"--seeds must be at least 2, not {self.seeds}: a study measures the spread over seeds")
        check_limits(self)


class Run(NamedTuple):
    """One training run of a study."""

    name: str
    framework: Framework
    config: TrainConfig

    def __str__(self) -> str:
        return f"{self.framework}, {self.name}, seed {self.config.seed}"


def make_run(study: StudyConfig, name: str, framework: Framework, seed: int, **changes: Any) -> Run:
    """Return a run of the study. `changes` are fields of `TrainConfig` that differ from the study's."""
    config = TrainConfig(
        epochs=study.epochs,
        seed=seed,
        data_dir=study.data_dir,
        out_dir=study.out_dir / name.replace(", ", "-").replace(" ", "-") / f"{framework}-{seed}",
        limit_train=study.limit_train,
        limit_test=study.limit_test,
    )
    return Run(name, framework, replace(config, **changes))


def is_finished(run: Run) -> bool:
    """Return whether the run's folder holds this run, complete, from this machine and the installed versions."""
    return records.explain_mismatch(run.config.out_dir, run.framework, run.config) is None


def train_missing(runs: Sequence[Run], console: Console, cost: Callable[[Run], float]) -> None:
    """Train the runs that are not finished yet, one after the other, and show the time that is left.

    `cost` estimates the time of a run, in any unit.
    """
    missing = [run for run in runs if not is_finished(run)]
    console.print(f"{len(runs)} runs: {len(runs) - len(missing)} are there, {len(missing)} to do", highlight=False)
    total, completed, started = sum(map(cost, missing)), 0.0, time.perf_counter()
    with ProgressBar(console) as bar:
        for run in missing:
            bar.begin(str(run), completed, total)
            records.train(run.framework, run.config, lambda line: bar.report(line.split(", ")[0]))
            completed += cost(run)
            minutes = (time.perf_counter() - started) / completed * (total - completed) / 60
            accuracy = records.read_metrics(run.config.out_dir)[-1]["test_accuracy"]
            bar.say(f"{run}: {accuracy:.2%}; {minutes:.0f} min left")


def mark_answers(run: Run, rows: int = 0, columns: int = 0) -> Correct:
    """Return for every test image whether the trained network classifies it correctly.

    Every image is first moved down and to the right by so many pixels. Empty pixels become black.
    """
    config, data = run.config, load_data(run.config.data_dir)
    pixels, labels = data.test_images[: config.limit_test], data.test_labels[: config.limit_test]
    weights = load_weights(config.out_dir / WEIGHTS, "float32", config.network)
    shifted = ndimage.shift(pixels, (0, rows, columns), order=0)
    correct = np.asarray(compute_logits(run.framework, weights, shifted).argmax(axis=1) == labels)
    if rows == columns == 0:
        records.check_accuracy(config.out_dir, correct)
    return correct


def describe_origin(runs: Sequence[Run]) -> Json:
    """Return the beginning of a results file: when, on what and with which versions the runs were trained."""
    origins = [records.read_record(run.config.out_dir) for run in runs]
    times = sorted(origin["started"] for origin in origins)
    return {
        "provenance": provenance((*PACKAGES, "scipy")),
        "environment": ENVIRONMENT,
        "trained": {"first": times[0], "last": times[-1]},
        "devices": {origin["framework"]: origin["device"] for origin in origins},
    }


def write_results(result: Json, path: Path, flag: str) -> None:
    """Write the results file, complete or not at all. `flag` is the one that chose its place."""
    with writing(path, flag):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, result)

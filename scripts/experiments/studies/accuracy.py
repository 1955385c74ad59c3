"""The accuracy study: many seeds in both frameworks, and the tests that tell whether both are equally accurate."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
from rich.console import Console
from rich.table import Table

from experiments.answers import FRAMEWORKS
from experiments.records import NO_INFLUENCE, Json, as_json, read_metrics
from experiments.studies.runs import (
    Run,
    StudyConfig,
    describe_origin,
    make_run,
    mark_answers,
    train_missing,
    write_results,
)
from experiments.studies.statistics import (
    count_correct,
    equivalence,
    mcnemar_p_value,
    mean_and_deviation,
    prediction_interval,
)
from jax_cnn.config import LIMITS, TRAIN_SIZE, UserError, check_limits
from jax_cnn.run.display import show_table

MARGIN = 0.5  # percentage points of test accuracy
FALSE_ALARM = 1e-4  # probability that a value of one more seed lies outside its interval although nothing has changed


@dataclass(frozen=True)
class AccuracyConfig(StudyConfig):
    """Train SimpleCNN with many seeds in both frameworks, and test whether the two are equally accurate.

    Started again after an interruption, it goes on where it stopped. Exit status 1: equivalence is not shown.
    """

    out_dir: Path = Path("runs/accuracy_study")
    results: Path | None = None
    """The results file; by default accuracy.json in out-dir."""
    short_train: int = 12_800
    """Images of a shortened training of one epoch, which the default tests repeat with one more seed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_limits(self, {"short_train": LIMITS["limit_train"]})


def run_study(study: AccuracyConfig, console: Console) -> bool:
    """Train what is missing, judge, write and show the results; return whether the frameworks are equivalent."""
    runs = plan_runs(study)
    train_missing(runs, console, lambda run: run.config.epochs * (run.config.limit_train or TRAIN_SIZE))
    result, path = conclude(runs), study.results or study.out_dir / "accuracy.json"
    write_results(result, path, "--results" if study.results else "--out-dir")
    for setting in ("short", "full"):
        show_table(console, seed_table(result[setting], f"{setting} training"))
    console.print(f"{sentence(result)}\nWritten to {path}.", highlight=False, soft_wrap=True)
    return bool(result["full"]["equivalence"]["equivalent"])


def plan_runs(study: AccuracyConfig) -> list[Run]:
    """Return all runs in order. The frameworks alternate, so that a busy hour of the machine slows both."""
    settings = {"short": {"epochs": 1, "limit_train": study.short_train}, "full": {}}
    return [
        make_run(study, setting, framework, seed, **changes)
        for seed in range(study.seeds)
        for setting, changes in settings.items()
        for framework in FRAMEWORKS
    ]


def conclude(runs: Sequence[Run]) -> Json:
    """Score and judge the finished runs; return the content of the results file.

    Raises:
        UserError: a run's weights contradict its metrics, or the runs are too few or too similar to be judged.
    """
    result = describe_origin(runs)
    for setting in ("full", "short"):
        of_setting = [run for run in runs if run.name == setting]
        seeds = [describe_pair(*pair) for pair in zip(of_setting[::2], of_setting[1::2], strict=True)]
        config = as_json(of_setting[0].config)
        described = {name: value for name, value in config.items() if name not in NO_INFLUENCE | {"seed"}}
        try:
            result[setting] = {"config": described, "seeds": seeds} | judge(seeds)
        except ValueError as error:
            raise UserError(f"{setting} training: no verdict ({error}); take more seeds or images") from None
    return result


def describe_pair(jax_run: Run, torch_run: Run) -> Json:
    """Return the metrics of one seed, and on how many test images which framework is right."""
    return {
        "seed": jax_run.config.seed,
        "jax": describe_run(jax_run),
        "torch": describe_run(torch_run),
        "table": count_correct(mark_answers(jax_run), mark_answers(torch_run)),
    }


def describe_run(run: Run) -> Json:
    """Return the metrics of a run, rounded."""
    epochs = read_metrics(run.config.out_dir)
    return {
        "test_accuracy": [round(epoch["test_accuracy"], 6) for epoch in epochs],
        "test_loss": round(epochs[-1]["test_loss"], 6),
        "train_seconds": [round(epoch["train_seconds"], 2) for epoch in epochs],
        "compile_seconds": round(epochs[0]["compile_seconds"], 2),
    }


def judge(seeds: Sequence[Json]) -> Json:
    """Return the verdict on one setting, which follows from the figures of its seeds alone.

    Raises:
        ValueError: the seeds are too few, or too similar to come from independent runs.
    """
    rows = [observations(seed) for seed in seeds]
    columns = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    pooled = {cell: sum(seed["table"][cell] for seed in seeds) for cell in seeds[0]["table"]}
    return {
        "equivalence": equivalence(columns["accuracy difference"], MARGIN),
        "mcnemar": pooled | {"p_value": mcnemar_p_value(pooled["only_a"], pooled["only_b"])},
        "spread": {name: describe_spread(column) for name, column in columns.items()},
    }


def observations(seed: Json) -> dict[str, float]:
    """Return what is compared: accuracies in percent, losses in nats per image, differences as JAX - PyTorch."""
    accuracies = [100 * seed[framework]["test_accuracy"][-1] for framework in FRAMEWORKS]
    losses = [seed[framework]["test_loss"] for framework in FRAMEWORKS]
    return {
        "jax accuracy": accuracies[0],
        "torch accuracy": accuracies[1],
        "accuracy difference": accuracies[0] - accuracies[1],
        "jax loss": losses[0],
        "torch loss": losses[1],
        "loss difference": losses[0] - losses[1],
    }


def describe_spread(values: np.ndarray) -> dict[str, float]:
    """Return mean, sample standard deviation, and the interval in which the value of one more seed is expected."""
    mean, deviation = mean_and_deviation(values)
    low, high = prediction_interval(values, FALSE_ALARM)
    return {"mean": mean, "deviation": deviation, "low": low, "high": high}


def seed_table(result: Json, title: str) -> Table:
    """Return one setting's seeds as a table with one seed in each row."""
    table = Table(title=title, caption="Test accuracy in %, test loss, median seconds of training per epoch")
    for heading in ("seed", "JAX %", "torch %", "diff.", "JAX loss", "torch loss", "JAX s", "torch s"):
        table.add_column(heading, justify="right", no_wrap=True)
    for seed in result["seeds"]:
        observed = observations(seed)
        table.add_row(
            str(seed["seed"]),
            f"{observed['jax accuracy']:.2f}",
            f"{observed['torch accuracy']:.2f}",
            f"{observed['accuracy difference']:+.2f}",
            f"{observed['jax loss']:.4f}",
            f"{observed['torch loss']:.4f}",
            *(f"{median(seed[framework]['train_seconds']):.1f}" for framework in FRAMEWORKS),
        )
    return table


def sentence(result: Json) -> str:
    """Return the verdict on the full training in words."""
    verdict, pooled = result["full"]["equivalence"], result["full"]["mcnemar"]
    shown = "Equivalent" if verdict["equivalent"] else "NOT shown to be equivalent"
    return (
        f"{shown} within {verdict['margin']} points: over {verdict['n']} seeds JAX's test accuracy differs from "
        f"PyTorch's by {verdict['mean']:+.3f} points on average (90 % confidence interval {verdict['low']:+.3f} … "
        f"{verdict['high']:+.3f}, TOST p = {verdict['p_value']:.2g}). JAX alone is right on {pooled['only_a']:,} "
        f"predictions, PyTorch alone on {pooled['only_b']:,} (McNemar p = {pooled['p_value']:.2g})."
    )

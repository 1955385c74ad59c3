"""The accuracy study: many seeds in both frameworks, and the tests that tell whether both are equally accurate."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from rich.console import Console
from rich.table import Table
from scipy import stats

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
from jax_cnn.config import LIMITS, TRAIN_SIZE, UserError, check_limits
from jax_cnn.run.display import show_table

MARGIN = 0.5  # percentage points of test accuracy
FALSE_ALARM = 1e-4  # probability that a value of one more seed lies outside its interval although nothing has changed
SIGNIFICANCE = 0.05  # of each of the two one-sided tests, which corresponds to a 90 % confidence interval
ROUNDING = 1e-9  # values that differ by less, relative to the largest, are equal up to rounding


@dataclass(frozen=True)
class AccuracyConfig(StudyConfig):
    """Train SimpleCNN with many seeds in both frameworks, and test whether the two are equally accurate.

    Started again after an interruption, it goes on where it stopped. Exit status 1: equivalence is not shown.
    """

    out_dir: Path = Path("runs/accuracy_study")
    """Folder for the runs and the results. Finished runs in it are taken; earlier results are replaced."""
    results: Path | None = None
    """The results file; by default accuracy.json in out-dir."""
    short_train: int = 12_800
    """Images of a shortened training of one epoch, which the tests repeat with one more seed (-m slow)."""

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


def describe_spread(values: Float[np.ndarray, " n"], false_alarm: float = FALSE_ALARM) -> dict[str, float]:
    """Return mean, sample standard deviation, and the interval in which the value of one more seed is expected.

    A value of the same normal distribution leaves the interval with the probability `false_alarm`. It is mean ± t · s ·
    sqrt(1 + 1/n), where t is Student's quantile for n - 1 degrees of freedom. Source: G. A. Whitmore, Prediction limits
    for a univariate normal observation, The American Statistician 40 (1986) 141-143.

    Raises:
        ValueError: the values are unusable (see `mean_and_deviation`).
    """
    mean, deviation = mean_and_deviation(values)
    n = len(values)
    low, high = stats.t(n - 1, mean, deviation * math.sqrt(1 + 1 / n)).interval(1 - false_alarm)
    return {"mean": mean, "deviation": deviation, "low": float(low), "high": float(high)}


def equivalence(differences: Float[np.ndarray, " n"], margin: float) -> dict[str, Any]:
    """Test whether the mean of paired differences lies within ±margin: two one-sided paired t-tests (TOST).

    A test that finds no difference proves nothing: few or noisy data find none either. This test assumes a difference
    of at least the margin, and only enough data with little noise reject that.

    Source: D. J. Schuirmann, A comparison of the two one-sided tests procedure and the power approach for assessing the
    equivalence of average bioavailability, J. Pharmacokinet. Biopharm. 15 (1987) 657-680. Like every t-test it takes
    the differences to be independent and roughly normal.

    Raises:
        ValueError: the differences allow no test (see `mean_and_deviation`).
    """
    mean, deviation = mean_and_deviation(differences)
    n = len(differences)
    low, high = stats.ttest_1samp(differences, 0).confidence_interval(1 - 2 * SIGNIFICANCE)
    p_low = float(stats.ttest_1samp(differences, -margin, alternative="greater").pvalue)  # if it were -margin or less
    p_high = float(stats.ttest_1samp(differences, margin, alternative="less").pvalue)  # if it were margin or more
    return {
        "margin": margin,
        "n": n,
        "mean": mean,
        "standard_error": deviation / math.sqrt(n),
        "low": float(low),
        "high": float(high),
        "p_low": p_low,
        "p_high": p_high,
        "equivalent": max(p_low, p_high) < SIGNIFICANCE,
        "p_value": max(p_low, p_high),
        "smallest_margin": float(max(-low, high)),  # any wider margin passes the test, any narrower one fails it
    }


def count_correct(correct_a: Bool[np.ndarray, " items"], correct_b: Bool[np.ndarray, " items"]) -> dict[str, int]:
    """Count on how many items both classifiers are right, only the first, only the second, and neither."""
    cells = {
        "both": correct_a & correct_b,
        "only_a": correct_a & ~correct_b,
        "only_b": ~correct_a & correct_b,
        "neither": ~correct_a & ~correct_b,
    }
    return {name: int(np.count_nonzero(cell)) for name, cell in cells.items()}


def mcnemar_p_value(only_a: int, only_b: int) -> float:
    """Return the exact two-sided p-value of McNemar's test: is each classifier equally often the only right one?

    Source: Q. McNemar, Note on the sampling error of the difference between correlated proportions or percentages,
    Psychometrika 12 (1947) 153-157, with the binomial distribution instead of its approximation by chi-square.

    It takes items to be independent. Pooled over seeds they are not, because the images of a seed share two networks.
    The p-value then speaks of these networks on these images; as evidence about two ways of training it is too small
    (T. G. Dietterich, Approximate statistical tests for comparing supervised classification learning algorithms, Neural
    Computation 10 (1998) 1895-1923). For that question `equivalence` takes a seed as one item.

    Raises:
        ValueError: both are right on the very same items, so that there is nothing to test.
    """
    if only_a + only_b == 0:
        raise ValueError("both are right on the very same items: is one classifier compared with itself?")
    return float(stats.binomtest(only_a, only_a + only_b, 0.5).pvalue)


def mean_and_deviation(values: Float[np.ndarray, " n"]) -> tuple[float, float]:
    """Return mean and sample standard deviation (n - 1) of values from independent runs.

    Raises:
        ValueError: the values are fewer than two, not finite, or all equal, which independent runs never are.
    """
    if len(values) < 2 or not np.isfinite(values).all():
        raise ValueError(f"two or more finite values are needed, not {values.tolist()}")
    if np.ptp(values) <= ROUNDING * np.abs(values).max():
        raise ValueError(f"all {len(values)} values are {values[0]}: is one run compared with itself?")
    return float(values.mean()), float(values.std(ddof=1))


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

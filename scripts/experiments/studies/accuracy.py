"""The accuracy study's judgement: score every trained network, compare the pairs, write one file.

Each framework scores its own networks, on images that its own loader prepares.
"""

import json
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool

from experiments.studies.runs import (
    ENVIRONMENT,
    PLACES,
    Run,
    StudyConfig,
    as_json,
    planned_runs,
    read_metrics,
    read_record,
)
from experiments.studies.statistics import McNemar, equivalence, mcnemar, mean_and_deviation, prediction_interval
from jax_cnn.config import UserError
from jax_cnn.data import load_fashion_mnist
from jax_cnn.run.folder import WEIGHTS
from jax_cnn.run.provenance import provenance
from jax_cnn.torch_layout import load_weights, to_flax

Json = dict[str, Any]
Correct = Bool[np.ndarray, " images"]

MARGIN = 0.5  # percentage points of test accuracy
FALSE_ALARM = 1e-4  # that one observation of a new seed falls outside its interval though nothing has changed
SCORING_BATCH = 250
SCORING_SLACK = 1  # images: a tie within rounding may fall differently in a batch of another size. Worst seen: 0
PACKAGES = ("jax", "jaxlib", "flax", "optax", "torch", "torchvision", "numpy", "scipy")


def conclude(study: StudyConfig) -> Json:
    """Score and judge the finished runs.

    Returns:
        What the results file holds.

    Raises:
        UserError: a run is not what its files say, or the runs are too few or too alike to be judged.
    """
    runs = planned_runs(study)
    records = [read_record(run.config.out_dir) for run in runs]
    started = sorted(record["started"] for record in records)
    result: Json = {
        "provenance": provenance(PACKAGES),
        "environment": ENVIRONMENT,
        "trained": {"first": started[0], "last": started[-1]},
        "devices": {record["framework"]: record["device"] for record in records},
    }
    for setting in ("full", "short"):
        pairs = [run for run in runs if run.setting == setting]
        seeds = [describe_pair(*pair) for pair in zip(pairs[::2], pairs[1::2], strict=True)]
        config = {name: value for name, value in as_json(pairs[0].config).items() if name not in PLACES | {"seed"}}
        try:
            result[setting] = {"config": config, "seeds": seeds} | judge(seeds)
        except ValueError as error:
            raise UserError(f"{study.out_dir / setting}: no verdict ({error}); take more seeds or images") from None
    return result


def describe_pair(jax_run: Run, torch_run: Run) -> Json:
    """One seed's figures: those of each framework, and on how many test images which of them is right."""
    table = mcnemar(score(jax_run), score(torch_run))
    return {
        "seed": jax_run.config.seed,
        "jax": describe_run(jax_run),
        "torch": describe_run(torch_run),
        "table": table._asdict(),
    }


def describe_run(run: Run) -> Json:
    """What metrics.jsonl says of a run, rounded."""
    epochs = read_metrics(run.config.out_dir)
    return {
        "test_accuracy": [round(epoch["test_accuracy"], 6) for epoch in epochs],
        "test_loss": round(epochs[-1]["test_loss"], 6),
        "train_seconds": [round(epoch["train_seconds"], 2) for epoch in epochs],
        "compile_seconds": round(epochs[0]["compile_seconds"], 2),
    }


def score(run: Run) -> Correct:
    """Whether the run's final network is right, for each test image that the run was scored on.

    Raises:
        UserError: the weights are unusable, or not as accurate as metrics.jsonl says.
    """
    scorers = {"jax": score_jax, "torch": score_torch}
    correct = scorers[run.framework](run.config.out_dir / WEIGHTS, run.config.data_dir, run.config.limit_test)
    claimed = round(read_metrics(run.config.out_dir)[-1]["test_accuracy"] * len(correct))
    if abs(claimed - int(correct.sum())) > SCORING_SLACK:
        raise UserError(
            f"{run.config.out_dir}: its weights classify {correct.sum()} of {len(correct)} images rightly, its "
            f"metrics.jsonl says {claimed}; delete the folder and run the study again"
        )
    return correct


def score_jax(weights: Path, data_dir: Path, limit: int | None) -> Correct:
    """By `jax_cnn`, from the network to the images."""
    data = load_fashion_mnist(data_dir)
    pixels, labels = data.test_images[:limit], data.test_labels[:limit]
    params, classify = to_flax(load_weights(weights, "float32")), jax_classifier()
    starts = range(0, len(pixels), SCORING_BATCH)
    classes = [np.asarray(classify(params, pixels[at : at + SCORING_BATCH])) for at in starts]
    return np.asarray(np.concatenate(classes) == labels)


@cache
def jax_classifier() -> Callable[..., Any]:
    """Weights and pixels to classes: one function for all runs, so that it compiles once."""
    import jax
    from jax import numpy as jnp

    from jax_cnn.model import apply
    from jax_cnn.train import to_images

    return jax.jit(lambda params, pixels: apply(params, to_images(pixels, jnp.dtype("float32"))).argmax(axis=1))


def score_torch(weights: Path, data_dir: Path, limit: int | None) -> Correct:
    """By `torch_ref`, from the network to the images."""
    import torch

    from torch_ref.data import load_batches, load_dataset
    from torch_ref.model import SimpleCNN

    model = SimpleCNN().to(torch.float32).eval()
    model.load_state_dict({name: torch.from_numpy(array) for name, array in load_weights(weights, "float32").items()})
    batches = load_batches(load_dataset(data_dir, train=False, limit=limit), SCORING_BATCH)
    with torch.no_grad():
        correct = [(model(images).argmax(dim=1) == labels).numpy() for images, labels in batches]
    return np.concatenate(correct)


def judge(seeds: Sequence[Json]) -> Json:
    """The verdict on one setting, from the figures of its seeds alone: anyone can repeat it from the file.

    Raises:
        ValueError: the seeds are too few, or too alike to be those of independent runs.
    """
    rows = [observations(seed) for seed in seeds]
    columns = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    verdict = equivalence(columns["accuracy difference"], MARGIN)
    pooled = McNemar(*(sum(seed["table"][cell] for seed in seeds) for cell in McNemar._fields))
    return {
        "equivalence": verdict._asdict()
        | {"equivalent": verdict.equivalent, "p_value": verdict.p_value, "smallest_margin": verdict.smallest_margin},
        "mcnemar": pooled._asdict() | {"p_value": pooled.p_value},
        "spread": {name: describe_spread(column) for name, column in columns.items()},
    }


def observations(seed: Json) -> dict[str, float]:
    """What is measured of a pair: accuracies in points of 100, losses in nats per image, differences as JAX - torch."""
    jax_accuracy, torch_accuracy = (100 * seed[framework]["test_accuracy"][-1] for framework in ("jax", "torch"))
    jax_loss, torch_loss = (seed[framework]["test_loss"] for framework in ("jax", "torch"))
    return {
        "jax accuracy": jax_accuracy,
        "torch accuracy": torch_accuracy,
        "accuracy difference": jax_accuracy - torch_accuracy,
        "jax loss": jax_loss,
        "torch loss": torch_loss,
        "loss difference": jax_loss - torch_loss,
    }


def describe_spread(values: np.ndarray) -> dict[str, float]:
    """Mean, sample standard deviation, and the interval in which another seed's value falls but for `FALSE_ALARM`."""
    mean, deviation = mean_and_deviation(values)
    low, high = prediction_interval(values, FALSE_ALARM)
    return {"mean": mean, "deviation": deviation, "low": low, "high": high}


def outliers(observed: dict[str, float], spread: dict[str, dict[str, float]]) -> list[str]:
    """Name what falls outside of the study's spread, each with its value and the interval; NaN falls outside."""
    return [
        f"{name} {value:.4f} is outside {spread[name]['low']:.4f} … {spread[name]['high']:.4f}"
        for name, value in observed.items()
        if not spread[name]["low"] <= value <= spread[name]["high"]
    ]


def sentence(result: Json) -> str:
    """The verdict on the full training, for a person."""
    verdict, pooled = result["full"]["equivalence"], result["full"]["mcnemar"]
    shown = "Equivalent" if verdict["equivalent"] else "NOT shown to be equivalent"
    return (
        f"{shown} within {verdict['margin']} points: over {verdict['n']} seeds JAX's test accuracy differs from "
        f"PyTorch's by {verdict['mean']:+.3f} points on average (90 % confidence interval {verdict['low']:+.3f} … "
        f"{verdict['high']:+.3f}, TOST p = {verdict['p_value']:.2g}). JAX alone is right on {pooled['only_a']:,} "
        f"predictions, PyTorch alone on {pooled['only_b']:,} (McNemar p = {pooled['p_value']:.2g})."
    )


def write(result: Json, path: Path) -> None:
    """Write the file whole or not at all.

    Raises:
        UserError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text(json.dumps(result, indent=1) + "\n")
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"--results {path}: cannot write there ({error.strerror}); choose another file") from None

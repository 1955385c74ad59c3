"""Does convolution pay? The judgement: score every trained network on shifted test images, and tell mean and spread.

Each framework scores its own networks.
"""

import json
import statistics
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8

from experiments.studies.accuracy import PACKAGES, SCORING_SLACK
from experiments.studies.convolution_runs import ENTRIES, FRAMEWORKS, ConvolutionConfig, Entry, Pace, planned_runs
from experiments.studies.runs import ENVIRONMENT, Run, read_metrics, read_record
from jax_cnn.config import CNN, Network, UserError
from jax_cnn.data import load_fashion_mnist
from jax_cnn.files import write_atomically
from jax_cnn.run.folder import WEIGHTS
from jax_cnn.run.provenance import provenance
from jax_cnn.torch_layout import TorchDict, layout_of, load_weights, to_flax

Json = dict[str, Any]
Pixels = UInt8[np.ndarray, "size 28 28"]
Classifier = Callable[[Pixels], Int[np.ndarray, " size"]]

SHIFTS = (0, 1, 2)  # pixels
DIRECTIONS = tuple((rows, columns) for rows in (-1, 0, 1) for columns in (-1, 0, 1) if (rows, columns) != (0, 0))
BATCH = 500
SCORES = "shifts.json"  # beside a run's own files


def shift(pixels: Pixels, rows: int, columns: int) -> Pixels:
    """Move every image down and to the right, or up and to the left; what comes in is black."""
    height, width = pixels.shape[1:]
    padded = np.pad(pixels, ((0, 0), (abs(rows),) * 2, (abs(columns),) * 2))
    top, left = abs(rows) - rows, abs(columns) - columns
    return padded[:, top : top + height, left : left + width]


def score(run: Run) -> dict[str, float]:
    """The accuracy of a finished run's network by pixels of shift, the mean over the eight directions.

    Kept in the run's folder, so that it is scored once.

    Raises:
        UserError: the weights are unusable, or not as accurate as metrics.jsonl says.
    """
    kept = run.config.out_dir / SCORES
    if kept.exists() and kept.stat().st_mtime >= (run.config.out_dir / WEIGHTS).stat().st_mtime:
        loaded: dict[str, float] = json.loads(kept.read_text())
        return loaded
    data = load_fashion_mnist(run.config.data_dir)
    pixels, labels = data.test_images[: run.config.limit_test], data.test_labels[: run.config.limit_test]
    classifiers = {"jax": jax_classifier, "torch": torch_classifier}
    weights = load_weights(run.config.out_dir / WEIGHTS, "float32", run.config.network)
    classify = classifiers[run.framework](weights, run.config.network)

    def accuracy(distance: int) -> float:
        moves = {(distance * rows, distance * columns) for rows, columns in DIRECTIONS}
        return statistics.fmean(float((classify(shift(pixels, *move)) == labels).mean()) for move in sorted(moves))

    scores = {str(distance): accuracy(distance) for distance in SHIFTS}
    claimed = read_metrics(run.config.out_dir)[-1]["test_accuracy"]
    if abs(claimed - scores["0"]) * len(labels) > SCORING_SLACK + 0.5:
        raise UserError(
            f"{run.config.out_dir}: its weights are right on {scores['0']:.2%} of the images, its metrics.jsonl says "
            f"{claimed:.2%}; delete the folder and run the study again"
        )
    write_atomically(kept, json.dumps(scores).encode())
    return scores


def jax_classifier(weights: TorchDict, network: Network) -> Classifier:
    """The network as `jax_cnn` runs it."""
    params, predict = to_flax(weights, layout_of(network)), compiled(network)
    return lambda pixels: np.concatenate([np.asarray(predict(params, part)) for part in parts_of(pixels)])


@cache
def compiled(network: Network) -> Callable[..., Any]:
    """Weights and pixels to classes: one function for all seeds, so that it compiles once."""
    import jax
    from jax import numpy as jnp

    from jax_cnn import model
    from jax_cnn.train import to_images

    apply = model.network(network.model, hidden=network.hidden)
    return jax.jit(lambda params, pixels: apply(params, to_images(pixels, jnp.dtype("float32"))).argmax(axis=1))


def torch_classifier(weights: TorchDict, network: Network) -> Classifier:
    """The network as `torch_ref` runs it."""
    import torch

    from torch_ref.model import make_model

    model = make_model(*network).to(torch.float32).eval()
    model.load_state_dict({name: torch.from_numpy(array) for name, array in weights.items()})

    @torch.no_grad()
    def classify(pixels: Pixels) -> Int[np.ndarray, " size"]:
        parts = (torch.tensor(part)[:, None].float() / 255 for part in parts_of(pixels))
        return np.concatenate([model(part).argmax(dim=1).numpy() for part in parts])

    return classify


def parts_of(pixels: Pixels) -> list[Pixels]:
    """Batches."""
    return [np.ascontiguousarray(pixels[at : at + BATCH]) for at in range(0, len(pixels), BATCH)]


def conclude(study: ConvolutionConfig, pace: Pace) -> Json:
    """Gather the finished and scored runs.

    Returns:
        What the results file holds.

    Raises:
        UserError: a run is not what its files say.
    """
    runs = planned_runs(study, pace)
    started = sorted(read_record(run.config.out_dir)["started"] for run in runs)
    return {
        "provenance": provenance(PACKAGES),
        "environment": ENVIRONMENT,
        "trained": {"first": started[0], "last": started[-1]},
        "pace": {
            framework: {name: round(seconds, 6) for name, seconds in paces.items()} for framework, paces in pace.items()
        },
        "limits": {"train": study.limit_train, "test": study.limit_test},
        "entries": [describe_entry(entry, [run for run in runs if run.setting == entry.name]) for entry in ENTRIES],
    }


def describe_entry(entry: Entry, runs: Sequence[Run]) -> Json:
    """One network's figures in both frameworks, seed by seed."""
    return {
        "name": entry.name,
        "network": str(entry.network),
        "parameters": parameters(entry.network),
        **{framework: describe_runs([run for run in runs if run.framework == framework]) for framework in FRAMEWORKS},
    }


def describe_runs(runs: Sequence[Run]) -> Json:
    """One framework's runs of an entry. Accuracies are from 0 to 1; by pixels of shift, and by epoch without one."""
    scores = [score(run) for run in runs]
    epochs = [read_metrics(run.config.out_dir) for run in runs]
    return {
        "epochs": runs[0].config.epochs,
        "seeds": [run.config.seed for run in runs],
        "shifted": {str(distance): [round(each[str(distance)], 6) for each in scores] for distance in SHIFTS},
        "best_epoch": [round(max(row["test_accuracy"] for row in rows), 6) for rows in epochs],
        "train_loss": [round(rows[-1]["train_loss"], 4) for rows in epochs],
        "test_loss": [round(rows[-1]["test_loss"], 4) for rows in epochs],
    }


def parameters(network: Network) -> int:
    """How many numbers it learns."""
    return sum(int(np.prod(leaf.shape)) for leaf in layout_of(network).values())


def accuracies(result: Json, name: str, distance: int = 0) -> list[float]:
    """All accuracies of an entry in percent, of both frameworks' seeds."""
    (entry,) = (entry for entry in result["entries"] if entry["name"] == name)
    return [100 * value for framework in FRAMEWORKS for value in entry[framework]["shifted"][str(distance)]]


def spread(values: Sequence[float]) -> str:
    """Mean ± standard deviation (n - 1)."""
    return f"{statistics.fmean(values):.2f} ± {statistics.stdev(values):.2f}"


def sentences(result: Json) -> list[str]:
    """The answer, from the results alone."""
    cnn = statistics.fmean(accuracies(result, "SimpleCNN"))
    others = [entry["name"] for entry in result["entries"] if entry["network"] != str(CNN)]
    gains = [f"{cnn - statistics.fmean(accuracies(result, name)):+.1f} on {name}" for name in others]
    falls = {
        name: statistics.fmean(accuracies(result, name, 2)) - statistics.fmean(accuracies(result, name))
        for name in (*others, "SimpleCNN")
    }
    return [
        f"SimpleCNN reaches {spread(accuracies(result, 'SimpleCNN'))} % (mean and standard deviation over "
        f"{len(accuracies(result, 'SimpleCNN'))} runs); points gained: {', '.join(gains)}.",
        "A shift of the test images by two pixels changes accuracy, in points: "
        + ", ".join(f"{name} {fall:+.1f}" for name, fall in falls.items())
        + ".",
    ]


def write(result: Json, folder: Path) -> None:
    """Write convolution.json, whole or not at all."""
    write_atomically(folder / "convolution.json", (json.dumps(result, indent=1) + "\n").encode())

"""The convolution study: networks with and without convolution, on equal terms and on shifted test images.

The terms are equal epochs, equal parameters and equal time. The time is that of the training commands.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median, stdev
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from experiments.answers import FRAMEWORKS, Framework
from experiments.records import Json, read_metrics
from experiments.studies.runs import (
    Run,
    StudyConfig,
    describe_origin,
    make_run,
    mark_answers,
    train_missing,
    write_results,
)
from jax_cnn.config import CNN, LIMITS, TRAIN_SIZE, Network, check_limits
from jax_cnn.run.display import (
    BLACK,
    FRAMEWORK_COLOURS,
    FRAMEWORK_MARKERS,
    GREEN,
    ORANGE,
    PURPLE,
    save_figure,
    show_table,
)
from jax_cnn.torch_layout import layout_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SAME_PARAMETERS = 2050  # hidden units: the feed-forward network then has 1,629,760 parameters, SimpleCNN 1,630,090
PACE_EPOCHS = 3  # epochs whose median time is a network's pace
PACE_TEST = 100  # test images of a timed run, whose scoring is not timed
SHIFTS = (0, 1, 2)  # pixels
DIRECTIONS = tuple((rows, columns) for rows in (-1, 0, 1) for columns in (-1, 0, 1) if (rows, columns) != (0, 0))

# Markers and lines differ as well as colours, so that the picture can be read in grey.
OFFSETS = {"jax": -0.12, "torch": 0.12}  # distances from the middle of a row
LINES = {
    "softmax regression": (GREEN, "^", ":"),
    "feed-forward": (PURPLE, "v", "-."),
    "feed-forward, equal parameters": (ORANGE, "D", "--"),
    "SimpleCNN": (BLACK, "o", "-"),
}

Pace = Mapping[Framework, Mapping[str, float]]  # seconds for an epoch of each model


@dataclass(frozen=True)
class ConvolutionConfig(StudyConfig):
    """Measure what convolution gains: softmax regression, a feed-forward network and SimpleCNN, in both frameworks.

    They train for equal epochs, with equal parameters and for equal time, and are also scored on shifted test images.
    Started again after an interruption, the study goes on where it stopped.
    """

    seeds: int = 3
    out_dir: Path = Path("runs/convolution")
    """Folder for the runs and the results. Finished runs in it are taken; earlier results are replaced."""
    pace_train: int = 19_200
    """Images in each epoch of the short runs whose time decides how many epochs are equal time."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_limits(self, {"pace_train": LIMITS["limit_train"]})


class Entry(NamedTuple):
    """A network of the study. It trains for as many epochs as SimpleCNN, or for as much time."""

    name: str
    network: Network
    equal_time: bool = False


ENTRIES = (
    Entry("softmax regression", Network("linear")),
    Entry("softmax regression, equal time", Network("linear"), equal_time=True),
    Entry("feed-forward", Network("mlp")),
    Entry("feed-forward, equal time", Network("mlp"), equal_time=True),
    Entry("feed-forward, equal parameters", Network("mlp", SAME_PARAMETERS)),
    Entry("SimpleCNN", CNN),  # the last, with which the others are compared
)


def run_study(study: ConvolutionConfig, console: Console) -> None:
    """Measure the pace, train what is missing, score, write and show the results."""
    console.print("How long does an epoch take? Leave the machine alone for this.")
    pace_runs = plan_pace_runs(study)
    train_missing(pace_runs, console, lambda run: 1.0)  # most of their time is the start of the command
    pace = read_pace(study, pace_runs)
    for framework, paces in pace.items():
        listing = ", ".join(f"{model} {seconds:.2f} s" for model, seconds in paces.items())
        console.print(f"{framework}, an epoch: {listing}", highlight=False)

    runs = plan_runs(study, pace)
    train_missing(runs, console, lambda run: run.config.epochs * pace[run.framework][run.config.model])
    result = conclude(study, runs, pace)
    write_results(result, study.out_dir / "convolution.json", "--out-dir")
    draw(result, study.out_dir / "convolution.png")
    show_table(console, accuracy_table(result))
    for sentence in sentences(result):
        console.print(sentence, highlight=False, soft_wrap=True)
    console.print(f"Results are in {study.out_dir}: convolution.json, convolution.png", highlight=False, soft_wrap=True)


def plan_pace_runs(study: ConvolutionConfig) -> list[Run]:
    """Return the short runs that are timed, the frameworks in turns."""
    size = min(study.pace_train, study.limit_train or study.pace_train)
    changes = {"epochs": PACE_EPOCHS, "limit_train": size, "limit_test": PACE_TEST}
    return [
        make_run(study, f"pace {model}", framework, seed=0, model=model, **changes)
        for model in ("linear", "mlp", "cnn")
        for framework in FRAMEWORKS
    ]


def read_pace(study: ConvolutionConfig, pace_runs: Sequence[Run]) -> Pace:
    """Return the seconds that an epoch of the study takes, scaled from the median epoch of the timed runs."""
    pace: dict[Framework, dict[str, float]] = {framework: {} for framework in FRAMEWORKS}
    size = study.limit_train or TRAIN_SIZE
    for run in pace_runs:
        seconds = median(epoch["train_seconds"] for epoch in read_metrics(run.config.out_dir))
        pace[run.framework][run.config.model] = seconds * size / (run.config.limit_train or size)
    return pace


def plan_runs(study: ConvolutionConfig, pace: Pace) -> list[Run]:
    """Return all runs in order. The frameworks alternate, so that a busy hour of the machine slows both."""
    runs = []
    for seed, entry, framework in itertools.product(range(study.seeds), ENTRIES, FRAMEWORKS):
        seconds = pace[framework]
        share = seconds[CNN.model] / seconds[entry.network.model] if entry.equal_time else 1
        changes = {"epochs": max(1, round(study.epochs * share))} | entry.network._asdict()
        runs.append(make_run(study, entry.name, framework, seed, **changes))
    return runs


def conclude(study: ConvolutionConfig, runs: Sequence[Run], pace: Pace) -> Json:
    """Score the finished runs; return the content of the results file."""
    entries = []
    for entry in ENTRIES:
        figures: Json = {"name": entry.name, "network": str(entry.network)}
        figures["parameters"] = count_parameters(entry.network)
        for framework in FRAMEWORKS:
            own_runs = [run for run in runs if (run.name, run.framework) == (entry.name, framework)]
            figures[framework] = describe_runs(own_runs)
        entries.append(figures)
    return describe_origin(runs) | {
        "pace": {name: {model: round(seconds, 6) for model, seconds in paces.items()} for name, paces in pace.items()},
        "limits": {"train": study.limit_train, "test": study.limit_test},
        "entries": entries,
    }


def count_parameters(network: Network) -> int:
    """Return how many numbers the network learns."""
    return sum(int(np.prod(leaf.shape)) for leaf in layout_of(network).values())


def describe_runs(runs: Sequence[Run]) -> Json:
    """Return one framework's figures of a network, by seed. Accuracies are from 0 to 1."""
    epochs = [read_metrics(run.config.out_dir) for run in runs]
    return {
        "epochs": runs[0].config.epochs,
        "seeds": [run.config.seed for run in runs],
        "shifted": {str(distance): [score_shifted(run, distance) for run in runs] for distance in SHIFTS},
        "best_epoch": [round(max(row["test_accuracy"] for row in rows), 6) for rows in epochs],
        "train_loss": [round(rows[-1]["train_loss"], 4) for rows in epochs],
        "test_loss": [round(rows[-1]["test_loss"], 4) for rows in epochs],
    }


def score_shifted(run: Run, distance: int) -> float:
    """Return the accuracy on test images shifted by so many pixels, the mean over the eight directions."""
    shifts = {(distance * rows, distance * columns) for rows, columns in DIRECTIONS}
    return round(float(np.mean([mark_answers(run, *shift) for shift in sorted(shifts)])), 6)


def accuracies(entry: Json, distance: int = 0, frameworks: Iterable[Framework] = FRAMEWORKS) -> list[float]:
    """Return the accuracies of a network in percent, on shifted images, of all seeds in these frameworks."""
    return [100 * value for framework in frameworks for value in entry[framework]["shifted"][str(distance)]]


def mean_text(values: Sequence[float]) -> str:
    """Return mean ± standard deviation (n - 1) as text."""
    return f"{mean(values):.2f} ± {stdev(values):.2f}"


def epochs_text(entry: Json) -> str:
    """Return the number of epochs; JAX's / PyTorch's where they differ."""
    return " / ".join(dict.fromkeys(str(entry[framework]["epochs"]) for framework in FRAMEWORKS))


def accuracy_table(result: Json) -> Table:
    """Return a table for a terminal of 80 columns. Accuracies on shifted images are those of both frameworks."""
    seeds = len(result["entries"][0]["jax"]["seeds"])
    caption = f"Test accuracy in %: mean ± standard deviation over {seeds} seeds; of both, on shifted images"
    table = Table(box=SIMPLE, show_edge=False, padding=0, caption=caption)
    table.add_column("network", no_wrap=True)
    for heading in ("parameters", "epochs", "JAX", "PyTorch", "by 1 px", "by 2 px"):
        table.add_column(heading, justify="right", no_wrap=True)
    for entry in result["entries"]:
        table.add_row(
            entry["name"].replace(", ", "\n  "),
            f"{entry['parameters']:,}",
            epochs_text(entry),
            *(mean_text(accuracies(entry, frameworks=[framework])) for framework in FRAMEWORKS),
            *(f"{mean(accuracies(entry, distance)):.1f}" for distance in SHIFTS[1:]),
        )
    return table


def sentences(result: Json) -> list[str]:
    """Return the answer in words, from the results alone."""
    *others, cnn = result["entries"]
    best = accuracies(cnn)
    gains = [f"{mean(best) - mean(accuracies(entry)):+.1f} on {entry['name']}" for entry in others]
    changes = [
        f"{entry['name']} {mean(accuracies(entry, 2)) - mean(accuracies(entry)):+.1f}" for entry in (*others, cnn)
    ]
    return [
        f"SimpleCNN reaches {mean_text(best)} % (mean and standard deviation over {len(best)} runs); "
        f"points gained: {', '.join(gains)}.",
        f"A shift of the test images by two pixels changes accuracy, in points: {', '.join(changes)}.",
    ]


def draw(result: Json, path: Path) -> None:
    """Draw the accuracy of every network, and how it falls on shifted test images, into a PNG."""
    from matplotlib.figure import Figure  # only now: an error should not wait for matplotlib

    *others, cnn = [mean(accuracies(entry)) for entry in result["entries"]]
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    draw_accuracies(result, left)
    draw_shifts(result, right)
    figure.suptitle(
        f"SimpleCNN classifies {cnn:.1f} % correctly, the best network without convolution {max(others):.1f} %"
    )
    save_figure(figure, path)


def draw_accuracies(result: Json, axes: "Axes") -> None:
    """Draw a row for each network, with a dot for each seed and framework."""
    for row, entry in enumerate(result["entries"]):
        for framework, name in FRAMEWORKS.items():
            values = accuracies(entry, frameworks=[framework])
            axes.plot(
                values,
                [row + OFFSETS[framework]] * len(values),
                FRAMEWORK_MARKERS[framework],
                color=FRAMEWORK_COLOURS[framework],
                alpha=0.75,
                label=name if row == 0 else None,
            )
    labels = [
        f"{entry['name'].replace(', ', chr(10))}\n{entry['parameters']:,} parameters\n{epochs_text(entry)} epochs"
        for entry in result["entries"]
    ]
    axes.set_yticks(range(len(labels)), labels, fontsize="x-small")
    axes.invert_yaxis()
    axes.set(title="Each dot is a network of its own seed (epochs: JAX / PyTorch)", xlabel="test accuracy, %")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")


def draw_shifts(result: Json, axes: "Axes") -> None:
    """Draw a line for each network, with the deviation over seeds and frameworks."""
    entries = {entry["name"]: entry for entry in result["entries"]}
    for name, (colour, marker, line) in LINES.items():
        columns = [accuracies(entries[name], distance) for distance in SHIFTS]
        means, deviations = [mean(column) for column in columns], [stdev(column) for column in columns]
        axes.errorbar(SHIFTS, means, deviations, color=colour, marker=marker, linestyle=line, capsize=3, label=name)
    axes.set(title="On shifted images: mean ± deviation", xlabel="shift, pixels", ylabel="test accuracy, %")
    axes.set_xticks(SHIFTS)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")

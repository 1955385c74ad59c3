"""Does convolution pay? The training runs that tell: networks with and without it, on equal terms.

Equal terms are three: as many passes over the images, as many parameters, as much training time. The time is that of
the training commands, each in a process of its own.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Literal, NamedTuple

from experiments.studies.runs import Framework, Run, read_metrics
from jax_cnn.config import CNN, LIMITS, Network, TrainConfig, UserError

FRAMEWORKS: tuple[Framework, ...] = ("jax", "torch")
SAME_PARAMETERS = 2050  # hidden units: the mlp then has 1,629,760 parameters, and SimpleCNN 1,630,090
PACE_EPOCHS = 3  # whose median time is a network's pace
PACE_TEST = 100  # images that are scored, which the pace leaves out

Pace = Mapping[Framework, Mapping[str, float]]  # seconds that each kind of network takes for an epoch


@dataclass(frozen=True)
class ConvolutionConfig:
    """What the study is asked to do."""

    seeds: int = 3
    """Runs of each network in each framework, with the seeds 0, 1, …"""
    epochs: int = TrainConfig.epochs
    """Passes over the training set, of those on equal epochs."""
    out_dir: Path = Path("runs/convolution")
    """Where the results are written and the runs are kept. A run that is there, complete, is not repeated."""
    data_dir: Path = TrainConfig.data_dir
    """Where the data set is, or is put."""
    limit_train: int | None = None
    """Train on the first N images only."""
    limit_test: int | None = None
    """Score the first N test images only."""
    pace_train: int = 19_200
    """Images in each of the three passes whose time tells how many epochs are equal time."""

    def __post_init__(self) -> None:
        if self.seeds < 2:
            raise UserError(f"--seeds must be at least 2, not {self.seeds}: the study tells the spread over seeds")
        least, most = LIMITS["limit_train"]
        if not least <= self.pace_train <= most:
            raise UserError(f"--pace-train must be between {least} and {most:,}, not {self.pace_train}")
        base_config(self)  # which checks the rest


class Entry(NamedTuple):
    """A network, and what it has as much of as SimpleCNN."""

    name: str
    network: Network
    equal: Literal["epochs", "time"]


ENTRIES = (
    Entry("softmax regression", Network("linear"), "epochs"),
    Entry("softmax regression, equal time", Network("linear"), "time"),
    Entry("feed-forward", Network("mlp"), "epochs"),
    Entry("feed-forward, equal time", Network("mlp"), "time"),
    Entry("feed-forward, equal parameters", Network("mlp", SAME_PARAMETERS), "epochs"),
    Entry("SimpleCNN", CNN, "epochs"),
)
TIMED = tuple({entry.network.model: entry.network for entry in ENTRIES if entry.network.hidden == CNN.hidden}.values())


def base_config(study: ConvolutionConfig) -> TrainConfig:
    """What all trainings have in common."""
    return TrainConfig(
        epochs=study.epochs, data_dir=study.data_dir, limit_train=study.limit_train, limit_test=study.limit_test
    )


def pace_runs(study: ConvolutionConfig) -> list[Run]:
    """Short trainings that are there to be timed, the frameworks in turns."""
    size = min(study.pace_train, study.limit_train or study.pace_train)
    base = replace(base_config(study), epochs=PACE_EPOCHS, limit_train=size, limit_test=PACE_TEST)
    return [
        Run("pace", framework, configured(base, network, study.out_dir / "pace" / f"{framework}-{network.model}"))
        for network in TIMED
        for framework in FRAMEWORKS
    ]


def configured(base: TrainConfig, network: Network, out_dir: Path, seed: int = 0) -> TrainConfig:
    """The training of this network."""
    return replace(base, model=network.model, hidden=network.hidden, out_dir=out_dir, seed=seed)


def read_pace(study: ConvolutionConfig) -> Pace:
    """The paces, from the finished `pace_runs`: the median over their epochs, for an epoch of the study."""
    pace: dict[Framework, dict[str, float]] = {framework: {} for framework in FRAMEWORKS}
    size = study.limit_train or LIMITS["limit_train"][1]
    for run in pace_runs(study):
        seconds = median(epoch["train_seconds"] for epoch in read_metrics(run.config.out_dir))
        pace[run.framework][run.config.model] = seconds * size / (run.config.limit_train or size)
    return pace


def epochs_of(entry: Entry, study: ConvolutionConfig, pace: Mapping[str, float]) -> int:
    """How many epochs an entry trains, given one framework's pace."""
    share = pace[CNN.model] / pace[entry.network.model] if entry.equal == "time" else 1
    return max(1, round(study.epochs * share))


def planned_runs(study: ConvolutionConfig, pace: Pace) -> list[Run]:
    """Every run, in order. The frameworks alternate, so that a busy hour of the machine slows both."""
    return [
        Run(
            entry.name,
            framework,
            replace(
                configured(base_config(study), entry.network, run_folder(study, entry, framework, seed), seed),
                epochs=epochs_of(entry, study, pace[framework]),
            ),
        )
        for seed in range(study.seeds)
        for entry in ENTRIES
        for framework in FRAMEWORKS
    ]


def run_folder(study: ConvolutionConfig, entry: Entry, framework: Framework, seed: int) -> Path:
    """Where a run is kept."""
    return study.out_dir / entry.name.replace(", ", "-").replace(" ", "-") / f"{framework}-{seed}"

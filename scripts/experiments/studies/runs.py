"""The accuracy study's training runs: which there are, which are done, and how the others come about.

Every run is the real command in a process of its own, so what is judged is what a user gets: each framework draws its
own initial weights from its own generator, and both visit the same images in the same order. A pair shares a seed.
"""

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from experiments import processes
from jax_cnn.config import HIDDEN, LIMITS, JaxTrainConfig, TrainConfig, UserError
from jax_cnn.run.folder import CONFIG, METRICS, WEIGHTS
from jax_cnn.run.provenance import provenance

Framework = Literal["jax", "torch"]
Setting = str  # of the accuracy study: full or short

# Torch's threads yield while they wait for each other. Spinning, they take four times as long on two cores that others
# use too (251 images/s against 801). No figure depends on it; whoever sets the variable has the last word.
ENVIRONMENT = {"OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE")}
PLACES = {"data_dir", "out_dir"}  # the parts of a configuration that change no figure


@dataclass(frozen=True)
class StudyConfig:
    """What the study is asked to do."""

    seeds: int = 10
    """Pairs of runs, with the seeds 0, 1, …"""
    epochs: int = TrainConfig.epochs
    """Passes over the training set."""
    out_dir: Path = Path("runs/accuracy_study")
    """Where the runs are kept. One that is there already, complete and as asked for, is not repeated."""
    data_dir: Path = TrainConfig.data_dir
    """Where the data set is, or is put."""
    results: Path = Path("docs/results/accuracy/accuracy.json")
    """The file to write."""
    limit_train: int | None = None
    """Train on the first N images only."""
    limit_test: int | None = None
    """Score the first N test images only."""
    short_train: int = 12_800
    """Images of the shortened training of one epoch, which the default tests repeat."""

    def __post_init__(self) -> None:
        if self.seeds < 2:
            raise UserError(f"--seeds must be at least 2, not {self.seeds}: the study judges the spread over seeds")
        least, most = LIMITS["limit_train"]
        if not least <= self.short_train <= most:
            raise UserError(f"--short-train must be between {least} and {most:,}, not {self.short_train}")
        full_config(self)  # which checks the rest


class Run(NamedTuple):
    """One training run."""

    setting: Setting
    framework: Framework
    config: TrainConfig

    def __str__(self) -> str:
        """For the progress display."""
        return f"{self.framework}, {self.setting} training, seed {self.config.seed}"


def full_config(study: StudyConfig) -> TrainConfig:
    """The training whose accuracy is judged; the seed and the folder are still to be filled in."""
    return TrainConfig(
        epochs=study.epochs, data_dir=study.data_dir, limit_train=study.limit_train, limit_test=study.limit_test
    )


def short_config(study: StudyConfig) -> TrainConfig:
    """The shortened training; the seed and the folder are still to be filled in."""
    return replace(full_config(study), epochs=1, limit_train=study.short_train)


def planned_runs(study: StudyConfig) -> list[Run]:
    """Every run, in order. The frameworks alternate, so that a busy hour of the machine slows both."""
    configs: dict[Setting, TrainConfig] = {"short": short_config(study), "full": full_config(study)}
    frameworks: tuple[Framework, ...] = ("jax", "torch")
    return [
        Run(setting, framework, replace(config, seed=seed, out_dir=study.out_dir / setting / f"{framework}-{seed}"))
        for seed in range(study.seeds)
        for setting, config in configs.items()
        for framework in frameworks
    ]


def is_finished(run: Run) -> bool:
    """Whether the folder holds this very run, whole, made on this machine with the installed versions.

    A change to the training code goes unnoticed: after one, start with another `out_dir`.
    """
    folder = run.config.out_dir
    try:
        record, metrics = read_record(folder), read_metrics(folder)
    except (OSError, ValueError):
        return False
    here = provenance(name for name in record.get("versions", ()) if name != "python")
    wanted = {"framework": run.framework, "machine": here["machine"], "versions": here["versions"]}
    return (
        (folder / WEIGHTS).exists()
        and len(metrics) == run.config.epochs
        and without_places(record.get("config", {})) == without_places(as_json(as_asked(run)))
        and {name: record.get(name) for name in wanted} == wanted
    )


def as_asked(run: Run) -> TrainConfig:
    """The configuration that the framework's command makes of `flags`: JAX's has more, at their defaults."""
    kinds: dict[Framework, type[TrainConfig]] = {"jax": JaxTrainConfig, "torch": TrainConfig}
    return kinds[run.framework](**vars(run.config))


def train(run: Run, show: Callable[[str], None], extra_flags: tuple[str, ...] = ()) -> None:
    """Run the framework's training command to its end.

    Args:
        run: what to train.
        show: takes every line that the command prints, as it comes.
        extra_flags: more of the command's flags: a planted fault.

    Raises:
        UserError: the command failed.
    """
    processes.run(f"train_{run.framework}", [*flags(run.config), *extra_flags], show, ENVIRONMENT)


def flags(config: TrainConfig) -> list[str]:
    """The command line of a run; what is not said stays at the command's default, and config.json tells it."""
    said = {
        "--model": config.model,
        "--hidden": config.hidden if config.hidden != HIDDEN else None,
        "--epochs": config.epochs,
        "--seed": config.seed,
        "--data-dir": config.data_dir,
        "--out-dir": config.out_dir,
        "--limit-train": config.limit_train,
        "--limit-test": config.limit_test,
    }
    return [word for flag, value in said.items() if value is not None for word in (flag, str(value))]


def read_record(folder: Path) -> dict[str, Any]:
    """A run's config.json.

    Raises:
        OSError: it is not there.
        ValueError: it is not JSON, or not an object.
    """
    record = json.loads((folder / CONFIG).read_text())
    if not isinstance(record, dict):
        raise ValueError(f"{folder / CONFIG} holds no JSON object")
    return record


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """A run's epochs, in order.

    Raises:
        OSError: metrics.jsonl is not there.
        ValueError: a line is not JSON.
    """
    return [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]


def as_json(config: TrainConfig) -> dict[str, Any]:
    """A configuration as config.json holds it."""
    loaded: dict[str, Any] = json.loads(json.dumps(asdict(config), default=str))
    return loaded


def without_places(config: Mapping[str, Any]) -> dict[str, Any]:
    """All of a configuration that a figure depends on."""
    return {name: value for name, value in config.items() if name not in PLACES}

"""The settings of a comparison, and its two training runs.

A finished run that fits is taken. Otherwise the real command trains.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments import records
from experiments.answers import Framework
from experiments.records import NO_INFLUENCE, ROOT, Json
from jax_cnn.config import Device, FolderConfig, LimitConfig, SeedConfig, TrainConfig, UserError, check_limits
from jax_cnn.files import write_json, writing
from jax_cnn.run.display import ProgressBar
from jax_cnn.run.folder import CHECKPOINTS, CONFIG, FILES, set_aside
from jax_cnn.torch_layout import TorchDict
from jax_cnn.weights import load_weights, save_weights

COMMITTED_BENCHMARK = ROOT / "docs" / "results" / "benchmark" / "benchmark.json"
MOST_PICTURES = 200  # in each of the two grids, because the page holds every picture
PROCESS = "process.json"  # the peak memory of the command that trained, and when it started
MAY_DIFFER = NO_INFLUENCE | {"device", "init_weights"}  # `starts_from` checks the initial weights themselves


@dataclass(frozen=True)
class CompareConfig(FolderConfig, SeedConfig, LimitConfig):
    """The settings of a comparison: what to train, which finished runs to take, and how much to show."""

    any_data: bool = False
    """Train on files of the same format with other contents: own labels, MNIST, KMNIST. The page has their SHA-256."""
    layers: bool = False
    """Train nothing: only print the layers of both networks, with the shapes of their outputs and their parameters."""
    device: Device = "cpu"
    """Device to train on."""
    jax_run: Path | None = None
    """Take this finished run of train_jax.py instead of training. It must fit the other flags."""
    torch_run: Path | None = None
    """Take this finished run of train_torch.py instead of training. It must fit the other flags."""
    retrain: bool = False
    """Train again even if the output folder holds finished runs with the same configuration."""
    drift_steps: int = 300
    """Number of training steps in the drift figure."""
    parity_report: Path | None = None
    """Take the parity table and the drift from this report.json of scripts/parity_report.py instead of measuring."""
    benchmark: Path | None = None
    """The benchmark.json for the speed table. Without this flag it is the one that comes with the project."""
    run_benchmark: bool = False
    """Measure the speed table now with scripts/benchmark.py --quick, which takes minutes."""
    images: int = 24
    """Number of test images in the grid of predictions."""
    disagreements: int = 24
    """Show at most this number of the test images on which the two frameworks disagree."""
    out_dir: Path = Path("runs/compare")
    """Folder for the page, its figures and the two runs. An earlier page in it is moved aside, not overwritten."""

    def __post_init__(self) -> None:
        pictures = (1, MOST_PICTURES)
        check_limits(self, {"drift_steps": (1, 1_000), "images": pictures, "disagreements": pictures})
        if self.run_benchmark and self.benchmark is not None:
            raise UserError(
                "--run-benchmark measures again and --benchmark FILE takes earlier results: give one of them"
            )
        if self.retrain and (self.jax_run or self.torch_run):
            raise UserError("--retrain trains both and --jax-run or --torch-run takes a finished run: give one of them")
        self.training("jax")  # which checks the other fields

    @property
    def initial_weights(self) -> Path:
        """The file of the weights from which both frameworks start."""
        return self.out_dir / f"initial-{self.seed}.safetensors"

    def training(self, framework: Framework) -> TrainConfig:
        """Return the configuration of one framework's training run."""
        return TrainConfig(
            epochs=self.epochs,
            seed=self.seed,
            data_dir=self.data_dir,
            out_dir=self.out_dir / framework,
            any_data=self.any_data,
            device=self.device,
            init_weights=self.initial_weights,
            limit_train=self.limit_train,
            limit_test=self.limit_test,
        )

    def named_run(self, framework: Framework) -> Path | None:
        """Return the folder of the finished run that the command line names for this framework."""
        return self.jax_run if framework == "jax" else self.torch_run


class Run(NamedTuple):
    """A finished training run."""

    folder: Path
    record: Json
    """The content of config.json."""
    epochs: list[Json]
    """The lines of metrics.jsonl."""
    peak_bytes: int | None
    """Peak memory of the training command. None if another program started it."""
    reused: bool


def save_initial_weights(config: CompareConfig) -> TorchDict:
    """Draw PyTorch's initial weights, save them for both frameworks, and return them as float32.

    Raises:
        UserError: the folder cannot be written.
    """
    import torch  # only now: an error in the command line should not wait for a framework

    from torch_ref.model import SimpleCNN

    torch.manual_seed(config.seed)
    weights = {name: tensor.detach().numpy() for name, tensor in SimpleCNN().state_dict().items()}
    with writing(config.out_dir):
        save_weights(config.initial_weights, weights)
    return weights


def obtain_run(framework: Framework, config: CompareConfig, initial: TorchDict, progress: ProgressBar) -> Run:
    """Take the run that the command line names or the one in the output folder, or train.

    Raises:
        UserError: the named run starts from other weights, or training fails.
    """
    if folder := config.named_run(framework):
        if not starts_from(initial, framework, folder):
            raise UserError(
                f"--{framework}-run {folder}: it did not start from PyTorch's weights of seed {config.seed}, or its "
                f"initial weights are gone; train with --init-weights {config.initial_weights}, which exists now"
            )
        return read_run(folder, reused=True)
    training = config.training(framework)
    folder = training.out_dir
    reason = records.explain_mismatch(folder, framework, training, ignored=MAY_DIFFER)
    if config.retrain:
        reason = "--retrain"
    elif not reason and not starts_from(initial, framework, folder):
        reason = "it started from other weights"
    if not reason:
        progress.say(f"{folder} holds this run already: it is taken")
        return read_run(folder, reused=True)
    if (folder / CONFIG).exists():
        progress.say(f"{folder} is trained again: {reason}")
    set_aside(folder, [*FILES, PROCESS, *(file.name for file in folder.glob(CHECKPOINTS))], progress.say)
    peak_bytes = records.train(framework, training, progress.report).peak_bytes
    with writing(folder):
        write_json(folder / PROCESS, {"started": records.read_record(folder)["started"], "peak_bytes": peak_bytes})
    return read_run(folder, reused=False)


def starts_from(initial: TorchDict, framework: Framework, folder: Path) -> bool:
    """Return whether a run started from these weights. Without --init-weights PyTorch draws them from the seed."""
    file = records.read_record(folder)["config"].get("init_weights")
    if file is None:
        return framework == "torch"
    try:
        weights = load_weights(Path(file), "float32")
    except UserError:
        return False
    return all(np.array_equal(weights[name], array) for name, array in initial.items())


def read_run(folder: Path, *, reused: bool) -> Run:
    """Read the files of a finished run."""
    record = records.read_record(folder)
    record["command"] = records.shorten_command(record["command"])
    try:
        process = json.loads((folder / PROCESS).read_text(encoding="utf-8"))
        same_run = process["started"] == record["started"]
        peak_bytes = process["peak_bytes"] if same_run else None  # the file may be of an earlier run in this folder
    except (OSError, ValueError, KeyError, TypeError):
        peak_bytes = None
    return Run(folder, record, records.read_metrics(folder), peak_bytes, reused)

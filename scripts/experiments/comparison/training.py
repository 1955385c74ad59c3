"""The two runs: which finished one can be taken, and the real command for one that cannot."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from experiments import processes
from experiments.comparison.earlier import read_benchmark, read_parity
from experiments.comparison.settings import ROOT, CompareConfig
from experiments.records import ENVIRONMENT, as_json, flags, read_metrics, read_record
from jax_cnn.config import TrainConfig, UserError
from jax_cnn.files import writing
from jax_cnn.run.folder import CHECKPOINTS, FILES, WEIGHTS, set_aside
from jax_cnn.run.provenance import provenance
from jax_cnn.torch_layout import TorchDict, load_weights, save_weights

Json = dict[str, Any]
Framework = Literal["jax", "torch"]
Show = Callable[[str], None]

FRAMEWORKS: tuple[Framework, ...] = ("jax", "torch")
PROCESS = "process.json"  # what the operating system says of the command that made a run
FREE = {"data_dir", "out_dir", "device", "init_weights", "resume", "checkpoint_seconds"}  # may differ: see `same_start`


class Run(NamedTuple):
    """A finished run."""

    framework: Framework
    folder: Path
    record: Json
    """Its config.json."""
    epochs: list[Json]
    peak_bytes: int | None
    """Peak memory of its command; None if another program started that."""
    reused: bool

    @property
    def weights(self) -> Path:
        """The trained network."""
        return self.folder / WEIGHTS

    def as_json(self) -> Json:
        """The run for the report."""
        return self._asdict() | {"folder": str(self.folder)}


def initial_weights(config: CompareConfig) -> TorchDict:
    """PyTorch's own initial weights, float32, in a file from which both start.

    Raises:
        UserError: the folder cannot be written.
    """
    import torch  # only now: a slip should not wait for a framework

    from torch_ref.model import SimpleCNN

    torch.manual_seed(config.seed)
    weights = {name: tensor.detach().numpy() for name, tensor in SimpleCNN().state_dict().items()}
    with writing(config.out_dir):
        save_weights(config.initial_weights, weights)
    return weights


def given_run(framework: Framework, config: CompareConfig) -> Path | None:
    """The finished run that the command line names."""
    return config.jax_run if framework == "jax" else config.torch_run


def check_given(config: CompareConfig) -> None:
    """Look at the files and the runs that the command line names, before any work is done.

    Raises:
        UserError: one is not what it should be, a run is not finished, or not of the configuration asked for.
    """
    if config.benchmark is not None:
        read_benchmark(config.benchmark)
    if config.parity_report is not None:
        read_parity(config.parity_report)
    for framework in FRAMEWORKS:
        folder = given_run(framework, config)
        reason = folder and why_not(framework, folder, config.training(framework))
        if reason:
            raise UserError(
                f"--{framework}-run {folder}: {reason}; give a run that fits, or leave it out and it is trained"
            )


def obtain(framework: Framework, config: CompareConfig, initial: TorchDict, show: Show, say: Show) -> Run:
    """The run that the command line names, or the one in the output folder, or a new one.

    Raises:
        UserError: the run named does not start from the same weights, or training fails.
    """
    given, training = given_run(framework, config), config.training(framework)
    if given is not None:
        if not same_start(framework, given, initial):
            raise UserError(
                f"--{framework}-run {given}: it did not start from PyTorch's weights of seed {config.seed}, or that "
                f"cannot be told; train with --init-weights {config.initial_weights}, which is there now"
            )
        return read_run(framework, given, reused=True)
    folder = training.out_dir
    reason = "--retrain" if config.retrain else why_not(framework, folder, training, here=True)
    if not reason and not same_start(framework, folder, initial):
        reason = "it started from other weights"
    if not reason:
        say(f"{folder} holds this very run: it is taken")
        return read_run(framework, folder, reused=True)
    if (folder / FILES[0]).exists():
        say(f"{folder} is trained anew: {reason}")
    train(framework, training, show, say)
    return read_run(framework, folder, reused=False)


def why_not(framework: str, folder: Path, wanted: TrainConfig, *, here: bool = False) -> str | None:
    """What keeps a folder from being this run, finished; `here`: on this machine, with the installed versions."""
    try:
        record, epochs = read_record(folder), read_metrics(folder)
    except (OSError, ValueError) as error:
        return f"no run is there ({error.strerror if isinstance(error, OSError) else error})"
    if record.get("framework") != framework:
        return f"it is a run of {record.get('framework')}"
    held, asked, default = record.get("config", {}), as_json(wanted), as_json(TrainConfig())
    for name in sorted(asked.keys() - FREE):
        if held.get(name, default[name]) != asked[name]:
            return f"its {name.replace('_', ' ')}: {held.get(name)}, not {asked[name]}"
    if held.get("seeds", 1) != 1:
        return f"it is one of {held['seeds']} networks trained at once"
    if len(epochs) != wanted.epochs or not (folder / WEIGHTS).exists():
        return f"it is not finished ({len(epochs)} of {wanted.epochs} epochs)"
    now = provenance(name for name in record.get("versions", ()) if name != "python")
    if here and any(record.get(name) != now[name] for name in ("machine", "versions")):
        return "it was made on another machine or with other versions"
    return None


def same_start(framework: Framework, folder: Path, initial: TorchDict) -> bool:
    """Whether a run started from these weights; PyTorch's with the same seed draws them itself."""
    file = read_record(folder)["config"].get("init_weights")
    if file is None:
        return framework == "torch"
    try:
        held = load_weights(Path(file), "float32")
    except UserError:
        return False
    return all(np.array_equal(held[name], array) for name, array in initial.items())


def train(framework: Framework, training: TrainConfig, show: Show, say: Show) -> None:
    """Run the framework's training command to its end, and keep what the system says of its memory.

    Raises:
        UserError: the command failed.
    """
    folder = training.out_dir
    set_aside(folder, [*FILES, PROCESS, *(file.name for file in folder.glob(CHECKPOINTS))], say)
    more = ["--device", training.device, "--init-weights", str(training.init_weights)]
    finished = processes.run(
        f"train_{framework}",
        [*flags(training), *more],
        lambda line: show(line) if line.startswith("epoch") else None,
        ENVIRONMENT,
    )
    kept = {"started": read_record(folder)["started"], "peak_bytes": finished.peak_bytes}
    with writing(folder):
        (folder / PROCESS).write_text(json.dumps(kept) + "\n")


def read_run(framework: Framework, folder: Path, *, reused: bool) -> Run:
    """A finished run's files."""
    record = read_record(folder)
    record["command"] = record["command"].replace(f"{ROOT}/", "")  # as a person would type it
    try:
        kept = json.loads((folder / PROCESS).read_text())
        peak = int(kept["peak_bytes"]) if kept["started"] == record["started"] else None  # or of a run before this one
    except (OSError, ValueError, KeyError, TypeError):
        peak = None
    return Run(framework, folder, record, read_metrics(folder), peak, reused)

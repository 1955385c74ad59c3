"""The two training runs that the page compares: take a finished one that fits, or train with the real command."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments import records
from experiments.answers import Framework
from experiments.comparison.config import CompareConfig
from experiments.records import NO_INFLUENCE, Json
from jax_cnn.config import UserError
from jax_cnn.files import write_json, writing
from jax_cnn.run.display import ProgressBar
from jax_cnn.run.folder import CHECKPOINTS, CONFIG, FILES, set_aside
from jax_cnn.torch_layout import TorchDict, load_weights, save_weights

PROCESS = "process.json"  # the peak memory of the command that trained, and when it started
MAY_DIFFER = NO_INFLUENCE | {"device", "init_weights"}  # `starts_from` checks the initial weights themselves


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

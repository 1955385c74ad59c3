"""The checkpoints of a run: write them in the background, find them again, and compare them with the new flags."""

import json
import re
import shlex
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jax_cnn.checkpoint import Checkpoint, Unusable, load_checkpoint, save_checkpoint
from jax_cnn.config import TrainConfig, UserError
from jax_cnn.data import other_files
from jax_cnn.files import writing
from jax_cnn.run.folder import CHECKPOINTS

KEPT = 2  # checkpoints in a folder: the newest, and one before it in case the newest is damaged
# Settings that may change when a run is resumed: they change no bit of the weights of the epochs that are done.
MAY_CHANGE = {
    "epochs",
    "data_dir",
    "out_dir",
    "resume",
    "checkpoint_seconds",
    "dialect",
    "coordinator",
    "num_processes",
    "process_id",
}
ROUNDING = {"device", "devices", "cpu"}  # settings that may change too, but may change the last bits of the weights

Record = dict[str, Any]


class CheckpointWriter:
    """A writer of one checkpoint at a time, in a thread of its own, so that training goes on meanwhile."""

    def __init__(self, folder: Path, interval: float) -> None:
        """Write into this folder. A checkpoint is due `interval` seconds after the one before."""
        self._folder = folder
        self._interval = interval
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._last = time.monotonic()

    @property
    def due(self) -> bool:
        """Return whether it is time for the next checkpoint."""
        return time.monotonic() - self._last >= self._interval

    def write(self, checkpoint: Checkpoint) -> None:
        """Begin to write a checkpoint, as soon as the one before is on disk.

        Raises:
            UserError: the one before could not be written.
        """
        self.wait()
        self._last = time.monotonic()
        self._pending = self._thread.submit(self._write, checkpoint)

    def wait(self) -> None:
        """Return when everything is on disk.

        Raises:
            UserError: the checkpoint could not be written. Earlier ones are still there.
        """
        if self._pending is not None:
            pending, self._pending = self._pending, None
            with writing(self._folder):
                pending.result()

    def _write(self, checkpoint: Checkpoint) -> None:
        step = checkpoint.state.step
        save_checkpoint(self._folder / f"checkpoint-{step:09}.safetensors", checkpoint)
        older = [path for other, path in checkpoint_files(self._folder) if other < step]
        for path in older[KEPT - 1 :]:
            path.unlink(missing_ok=True)


def checkpoint_files(folder: Path) -> list[tuple[int, Path]]:
    """Return the step and the path of each checkpoint in the folder, the newest first."""
    names = ((re.fullmatch(r"checkpoint-(\d{9,})\.safetensors", path.name), path) for path in folder.glob(CHECKPOINTS))
    return sorted(((int(match[1]), path) for match, path in names if match), reverse=True)


def find_checkpoint(config: TrainConfig, framework: str, say: Callable[[str], None]) -> Checkpoint | None:
    """Return the newest good checkpoint in the run's folder, or None without --resume.

    It needs neither framework, so a mistake is reported before anything is loaded or compiled.

    Raises:
        UserError: there is no good checkpoint, it belongs to another run, or it has gone further than is asked for.
    """
    if not config.resume:
        return None
    checkpoint = newest_checkpoint(config.out_dir, say)
    now = settings(run_record(config, {"framework": framework}))
    defaults = settings(run_record(type(config)(), {"framework": framework}))
    before = defaults | settings(checkpoint.run)  # a field that is newer than the checkpoint had its default
    changed = differences(before, now, now.keys() - MAY_CHANGE - ROUNDING)
    if changed:
        raise UserError(
            f"--resume: {config.out_dir} holds another run: {'; '.join(changed)}; give the same flags as before, or "
            "choose another --out-dir"
        )
    if config.any_data and checkpoint.run.get("data", {}) != other_files(config.data_dir):
        raise UserError(f"--resume: the run in {config.out_dir} was trained on other data; give the same --data-dir")
    if checkpoint.progress.epoch > config.epochs:
        raise UserError(
            f"--resume: the run in {config.out_dir} has finished {checkpoint.progress.epoch} epochs, more than "
            f"--epochs {config.epochs}; ask for as many or more"
        )
    return checkpoint


def newest_checkpoint(folder: Path, say: Callable[[str], None]) -> Checkpoint:
    """Return the newest checkpoint that is not damaged.

    Raises:
        UserError: there is none.
    """
    for _, path in checkpoint_files(folder):
        try:
            return load_checkpoint(path)
        except Unusable as reason:
            say(f"passing over {path}: {reason}")
    raise UserError(f"--resume: no usable checkpoint in {folder}; leave --resume out to start anew, or check --out-dir")


def rounding_changes(checkpoint: Checkpoint, record: Record) -> list[str]:
    """Return descriptions of the changes that may change the last bits of the weights: device, processor, versions."""
    before, now = settings(checkpoint.run), settings(record)
    return differences(before, now, {*ROUNDING, *record["versions"]})


def run_record(config: TrainConfig, origin: Record) -> Record:
    """Return what a checkpoint stores about its run, as it will be read from JSON.

    `origin` holds the framework, the device and the provenance.
    """
    record: Record = json.loads(json.dumps({"config": asdict(config)} | origin, default=str))
    return record


def settings(record: Record) -> Record:
    """Return a run's record as a flat dictionary: the fields of the configuration, and what computes the run.

    Raises:
        UserError: the record is not complete.
    """
    try:
        config = dict(record["config"])
        adam = dict(config.pop("adam"))
        machine, versions = dict(record.get("machine", {})), dict(record.get("versions", {}))
        return config | adam | versions | {"framework": record["framework"], "cpu": machine.get("cpu")}
    except (KeyError, TypeError, ValueError):
        raise UserError(
            "--resume: the checkpoint does not say what run it belongs to; start without --resume"
        ) from None


def differences(before: Record, now: Record, names: set[str]) -> list[str]:
    """Return a description of each of the named settings that has changed."""
    return [
        f"{name.replace('_', '-')} was {before.get(name)}, not {now.get(name)}"
        for name in sorted(names)
        if before.get(name) != now.get(name)
    ]


def how_to_resume() -> str:
    """Return the command that resumes the run of this process."""
    flags = [word for word in sys.argv[1:] if word != "--resume"]
    return shlex.join(["python", sys.argv[0], *flags, "--resume"])

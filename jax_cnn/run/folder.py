"""The files of a run. The files of an earlier run are never overwritten: they are moved aside first."""

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from jax_cnn.config import TrainConfig, UserError
from jax_cnn.files import TEMPORARY, check_out_dir, write_atomically, write_json, writing
from jax_cnn.run.display import plot_curves
from jax_cnn.weights import save_weights

CONFIG = "config.json"
METRICS = "metrics.jsonl"
WEIGHTS = "weights.safetensors"
CURVES = "curves.png"
FILES = (CONFIG, METRICS, WEIGHTS, CURVES)
CHECKPOINTS = "checkpoint-*.safetensors"
LOCK = ".lock"


class RunFolder:
    """The folder that a run writes into. It is locked against other runs until the block ends."""

    def __init__(self, path: Path, say: Callable[[str], None], resume: bool = False) -> None:
        """Lock the folder. Without `resume`, move the files of an earlier run to `earlier-1`, `earlier-2`, … inside it.

        Raises:
            UserError: the folder cannot be made or written, or another process writes into it.
        """
        self.path = path
        check_out_dir(path)
        self._lock = FileLock(path / LOCK)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise UserError(f"--out-dir {path}: another run is writing there; wait, or choose another folder") from None
        for name in (*FILES, CHECKPOINTS):
            for unfinished in path.glob(f"{name}{TEMPORARY}"):  # the process that wrote it was killed
                unfinished.unlink()
        if not resume:
            set_aside(path, [*FILES, *(file.name for file in path.glob(CHECKPOINTS))], say)

    def __enter__(self) -> "RunFolder":
        """Keep the lock until the block ends."""
        return self

    def __exit__(self, *error: object) -> None:
        """Release the lock."""
        self._lock.release()

    def write_config(self, config: TrainConfig, provenance: dict[str, Any]) -> None:
        """Write config.json: the configuration, the command, the machine and the versions."""
        with writing(self.path):
            write_json(self.path / CONFIG, {"config": asdict(config)} | provenance)

    def write_metrics(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write metrics.jsonl, one line for each epoch. It is always written whole, so no line is cut or repeated."""
        lines = "".join(f"{json.dumps(row, allow_nan=False)}\n" for row in rows)
        with writing(self.path):
            write_atomically(self.path / METRICS, lines.encode())

    def write_weights(self, tensors: Mapping[str, np.ndarray]) -> None:
        """Write weights.safetensors."""
        with writing(self.path):
            save_weights(self.path / WEIGHTS, tensors)

    def write_curves(self, rows: Sequence[Mapping[str, Any]], title: str) -> None:
        """Draw curves.png."""
        with writing(self.path):
            plot_curves(rows, title, self.path / CURVES)


def set_aside(path: Path, names: Sequence[str], say: Callable[[str], None]) -> None:
    """Move the files with these names, where they exist, to `earlier-1`, `earlier-2`, … in the folder, and say so.

    Raises:
        UserError: the folder cannot be written.
    """
    present = [name for name in names if (path / name).exists()]
    if present:
        aside = next(free for n in itertools.count(1) if not (free := path / f"earlier-{n}").exists())
        with writing(path):
            aside.mkdir()
            for name in present:
                (path / name).rename(aside / name)
        say(f"{path} held an earlier run: it is now in {aside}")

"""The files of a run. A valid run's files are never overwritten: an earlier run is moved aside first."""

import itertools
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from filelock import FileLock, Timeout

from jax_cnn.config import TrainConfig, UserError
from jax_cnn.files import write_atomically
from jax_cnn.torch_layout import save_weights

CONFIG = "config.json"
METRICS = "metrics.jsonl"
WEIGHTS = "weights.safetensors"
CURVES = "curves.png"
FILES = (CONFIG, METRICS, WEIGHTS, CURVES)
CHECKPOINTS = "checkpoint-*.safetensors"
LOCK = ".lock"


class RunFolder:
    """Where one run writes, and nobody else meanwhile; made when the run has all it needs to start."""

    def __init__(self, path: Path, say: Callable[[str], None], resume: bool = False) -> None:
        """Take the folder. Unless the run in it is to go on, its files go to `earlier-1`, `earlier-2`, … inside it.

        Raises:
            UserError: the folder cannot be made or written, or another process writes there.
        """
        self.path = path
        check_out_dir(path)
        self._lock = FileLock(path / LOCK)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise UserError(f"--out-dir {path}: another run is writing there; wait, or choose another folder") from None
        if not resume:
            set_aside(path, [*FILES, *(file.name for file in path.glob(CHECKPOINTS))], say)

    def __enter__(self) -> "RunFolder":
        """Hold the folder until the block ends."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Let others write there."""
        self._lock.release()

    def write_config(self, config: TrainConfig, provenance: dict[str, Any]) -> None:
        """Write config.json: what was asked for, by which command, on which machine, with which versions."""
        self._write(CONFIG, json.dumps({"config": asdict(config)} | provenance, indent=2, default=str))

    def write_metrics(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write metrics.jsonl, a line to an epoch; all of it each time, so that no line is ever cut or repeated."""
        self._write(METRICS, "\n".join(json.dumps(row, allow_nan=False) for row in rows))

    def write_weights(self, tensors: Mapping[str, np.ndarray]) -> None:
        """Write weights.safetensors."""
        with writing(self.path):
            save_weights(self.path / WEIGHTS, tensors)

    def write_curves(self, rows: Sequence[Mapping[str, Any]], title: str) -> None:
        """Draw curves.png."""
        # It would tell on stderr that it makes its list of fonts, or finds no place to keep it: nothing for the user.
        logging.getLogger("matplotlib").setLevel(logging.ERROR)
        from jax_cnn.run.charts import plot_curves  # only now: no slip and no --help should wait for matplotlib

        with writing(self.path):
            plot_curves(rows, title, self.path / CURVES)

    def _write(self, name: str, text: str) -> None:
        with writing(self.path):
            write_atomically(self.path / name, f"{text}\n".encode())


def set_aside(path: Path, names: Sequence[str], say: Callable[[str], None]) -> None:
    """Move those of the files that are in the folder to `earlier-1`, `earlier-2`, … inside it, and say so.

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


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a failed write into one line for the user."""
    try:
        yield
    except OSError as error:
        raise UserError(f"--out-dir {path}: cannot write there ({error.strerror}); choose another folder") from None


def check_out_dir(path: Path) -> None:
    """Make the folder if need be and try a file in it, before any work is done.

    Raises:
        UserError: it cannot be made or written.
    """
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()

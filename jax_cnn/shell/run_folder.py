"""The files of a run. A valid run's files are never overwritten: an earlier run is moved aside first."""

import itertools
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from jax_cnn.config import TrainConfig
from jax_cnn.errors import UserError
from jax_cnn.weights import save_weights

CONFIG = "config.json"
METRICS = "metrics.jsonl"
WEIGHTS = "weights.safetensors"
CURVES = "curves.png"
FILES = (CONFIG, METRICS, WEIGHTS, CURVES)


class RunFolder:
    """Where one run writes; made when the run has all it needs to start."""

    def __init__(self, path: Path, say: Callable[[str], None]) -> None:
        """Make the folder; results of an earlier run in it go to `earlier-1`, `earlier-2`, … inside it.

        Raises:
            UserError: the folder cannot be made or written.
        """
        self.path = path
        check_out_dir(path)
        present = [name for name in FILES if (path / name).exists()]
        if present:
            aside = next(free for n in itertools.count(1) if not (free := path / f"earlier-{n}").exists())
            with writing(path):
                aside.mkdir()
                for name in present:
                    (path / name).rename(aside / name)
            say(f"{path} held an earlier run: it is now in {aside}")

    def write_config(self, config: TrainConfig, provenance: dict[str, Any]) -> None:
        """Write config.json: what was asked for, by which command, on which machine, with which versions."""
        record = {"config": asdict(config)} | provenance
        with writing(self.path):
            (self.path / CONFIG).write_text(json.dumps(record, indent=2, default=str) + "\n")

    def add_epoch(self, row: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl."""
        with writing(self.path), (self.path / METRICS).open("a") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")

    def write_weights(self, tensors: Mapping[str, np.ndarray]) -> None:
        """Write weights.safetensors."""
        with writing(self.path):
            save_weights(self.path / WEIGHTS, tensors)

    def write_curves(self, rows: Sequence[Mapping[str, Any]], title: str) -> None:
        """Draw curves.png."""
        from jax_cnn.shell.curves import plot_curves  # only now: no slip and no --help should wait for matplotlib

        with writing(self.path):
            plot_curves(rows, title, self.path / CURVES)


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

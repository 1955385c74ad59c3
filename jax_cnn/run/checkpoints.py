"""A run's checkpoints in its folder: written in the background, the last two kept, the newest good one found again."""

import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from jax_cnn.checkpoint import Checkpoint, Unusable, load_checkpoint, save_checkpoint
from jax_cnn.config import UserError
from jax_cnn.run.folder import CHECKPOINTS

KEPT = 2


def checkpoint_name(step: int) -> str:
    """The file's name says after how many steps of the whole run it was written."""
    return f"checkpoint-{step:09}.safetensors"


def checkpoint_files(folder: Path) -> Iterator[tuple[int, Path]]:
    """Steps and paths of what the folder holds, newest first."""
    found = ((re.fullmatch(r"checkpoint-(\d{9,})\.safetensors", path.name), path) for path in folder.glob(CHECKPOINTS))
    return iter(sorted(((int(match[1]), path) for match, path in found if match), reverse=True))


def newest_checkpoint(folder: Path, say: Callable[[str], None]) -> Checkpoint:
    """Read the newest checkpoint that verifies; one that does not is named and passed over.

    Raises:
        UserError: there is none.
    """
    for _, path in checkpoint_files(folder):
        try:
            return load_checkpoint(path)
        except Unusable as reason:
            say(f"passing over {path}: {reason}")
    raise UserError(f"--resume: no usable checkpoint in {folder}; leave --resume out to start anew, or check --out-dir")


class CheckpointWriter:
    """Writes one checkpoint at a time in a thread of its own, so that training goes on meanwhile."""

    def __init__(self, folder: Path, interval: float) -> None:
        """Write into this folder; one is due when the last is `interval` seconds old."""
        self._folder = folder
        self._interval = interval
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._writing: Future[None] | None = None
        self._last = time.monotonic()

    @property
    def due(self) -> bool:
        """Whether it is time for the next one."""
        return time.monotonic() - self._last >= self._interval

    def write(self, checkpoint: Checkpoint) -> None:
        """Write it, once the one before is done.

        Raises:
            OSError: the one before could not be written.
        """
        self.wait()
        self._last = time.monotonic()
        self._writing = self._thread.submit(self._write, checkpoint)

    def wait(self) -> None:
        """Return when all is on disk.

        Raises:
            OSError: it could not be written. Those from before are still there.
        """
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.result()

    def _write(self, checkpoint: Checkpoint) -> None:
        step = checkpoint.state.step
        save_checkpoint(self._folder / checkpoint_name(step), checkpoint)
        older = [path for other, path in checkpoint_files(self._folder) if other < step]
        for path in older[KEPT - 1 :]:
            path.unlink(missing_ok=True)

"""A run's whole state in one file that either framework reads: safetensors, nothing that executes. NumPy alone.

The tensors carry PyTorch's names and layouts: `fc1.weight`, `first_moment.fc1.weight`, `second_moment.fc1.weight`. All
else is JSON in the file's metadata, with a SHA-256 over both.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from jax_cnn.files import write_atomically
from jax_cnn.torch_layout import TorchDict, check_shapes, layout_of, recognise

FORMAT = "1"
MOMENTS = ("first_moment", "second_moment")
MAX_BYTES = 2**28  # the largest network (--hidden 8192) in float64 has 156 MB; what is larger than this is not read


class AdamState(NamedTuple):
    """The whole state of a training run, in PyTorch's names and layouts; moments of the trainable tensors only."""

    weights: TorchDict
    first_moment: TorchDict
    second_moment: TorchDict
    step: int


@dataclass(frozen=True)
class Progress:
    """Where a run is: what has to be known to go on as if nothing had happened."""

    epoch: int
    """The epoch that is under way, counted from 0."""
    steps: int
    """Steps of it that are done."""
    loss_sum: float
    """Sum of the losses of its images so far."""
    seconds: float
    """Time it has taken so far."""
    rows: list[dict[str, Any]]
    """The finished epochs' lines of metrics.jsonl."""

    def __post_init__(self) -> None:
        whole = (self.epoch, self.steps)
        numbers = (self.loss_sum, self.seconds)
        if not (
            all(type(number) is int and number >= 0 for number in whole)
            and all(type(number) in (int, float) and math.isfinite(number) for number in numbers)
            and isinstance(self.rows, list)
            and all(isinstance(row, dict) for row in self.rows)
            and len(self.rows) == self.epoch
        ):
            raise ValueError("its progress is not a run's")


@dataclass(frozen=True)
class Checkpoint:
    """All of it."""

    state: AdamState
    progress: Progress
    run: dict[str, Any]
    """The run's record: framework, device, configuration, versions."""


class Unusable(Exception):
    """A file that is no checkpoint, or no longer one, with the reason."""


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write the file whole or not at all.

    Raises:
        OSError: the disk is full, the folder cannot be written, or is gone.
    """
    tensors = flatten(checkpoint.state)
    content = {
        "format": FORMAT,
        "step": checkpoint.state.step,
        "progress": vars(checkpoint.progress),
        "run": checkpoint.run,
    }
    text = json.dumps(content, sort_keys=True)
    metadata = {"checkpoint": text, "sha256": checksum(text, tensors)}
    write_atomically(path, save(tensors, metadata))


def load_checkpoint(path: Path) -> Checkpoint:
    """Read and verify a file.

    Raises:
        Unusable: it is missing, damaged, of another format, or its numbers are not finite.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise Unusable(f"it has more than {MAX_BYTES:,} bytes")
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a dictionary
    except OSError as error:
        raise Unusable(error.strerror or str(error)) from None
    except (SafetensorError, AttributeError, KeyError, ValueError, TypeError) as error:  # also a dtype that NumPy lacks
        raise Unusable(f"not a readable safetensors file ({error})") from None
    text = metadata.get("checkpoint")
    if text is None:
        raise Unusable("it holds weights alone, no checkpoint")
    if metadata.get("sha256") != checksum(text, tensors):
        raise Unusable("its contents do not match its checksum")
    return interpret(text, tensors)


def interpret(text: str, tensors: TorchDict) -> Checkpoint:
    """Make a checkpoint of what was read.

    Raises:
        Unusable: it does not say what a checkpoint says.
    """
    try:
        content = json.loads(text)
        if content["format"] != FORMAT:
            raise Unusable(f"it has format {content['format']!r}, and this version reads {FORMAT!r}")
        state = unflatten(tensors, int(content["step"]))
        progress = Progress(**content["progress"])
        return Checkpoint(state, progress, dict(content["run"]))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Unusable(f"its contents are not a checkpoint's ({type(error).__name__}: {error})") from None


def flatten(state: AdamState) -> TorchDict:
    """One dictionary for the file."""
    moments = {f"{moment}.{name}": array for moment in MOMENTS for name, array in getattr(state, moment).items()}
    return {name: np.ascontiguousarray(array) for name, array in (state.weights | moments).items()}


def unflatten(tensors: Mapping[str, np.ndarray], step: int) -> AdamState:
    """The state, out of the file's tensors.

    Raises:
        ValueError: a tensor is missing, unknown, misshapen, of another dtype than the others, or not finite.
    """
    parts: dict[str, TorchDict] = {"weights": {}, **{moment: {} for moment in MOMENTS}}
    for full_name, array in tensors.items():
        head, _, tail = full_name.partition(".")
        part, name = (head, tail) if head in MOMENTS else ("weights", full_name)
        parts[part][name] = array
    layout = layout_of(recognise(parts["weights"]))
    for named in parts.values():
        check_shapes(named, layout)
    dtypes = {array.dtype for array in tensors.values()}
    if len(dtypes) != 1 or not np.issubdtype(min(dtypes, key=str), np.floating):
        raise ValueError(f"tensors of {', '.join(sorted(map(str, dtypes)))}")
    for name, array in tensors.items():
        if not np.isfinite(array).all():
            raise ValueError(f"tensor {name} holds NaN or infinity")
    return AdamState(parts["weights"], parts["first_moment"], parts["second_moment"], step)


def checksum(text: str, tensors: Mapping[str, np.ndarray]) -> str:
    """SHA-256 over the text and every tensor's name, dtype, shape and bytes."""
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        array = np.ascontiguousarray(tensors[name])
        digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
        digest.update(array.data if array.size else b"")
    return digest.hexdigest()

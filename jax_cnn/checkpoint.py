"""The whole state of a run in one safetensors file that either framework reads. Reading it executes nothing.

The tensors have PyTorch's names and layouts: `fc1.weight`, `first_moment.fc1.weight`, `second_moment.fc1.weight`.
Everything else is JSON in the file's metadata, with a SHA-256 over both.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from jax_cnn.files import write_atomically
from jax_cnn.torch_layout import TorchDict, check_shapes, layout_of
from jax_cnn.weights import MOMENTS, checksum, recognise

FORMAT = "1"
MAX_BYTES = 2**28  # larger files are refused; the largest network (--hidden 8192) in float64 takes 156 MB


class AdamState(NamedTuple):
    """The state of a training run under PyTorch's names and layouts: weights, Adam's moments, and steps so far."""

    weights: TorchDict
    first_moment: TorchDict
    second_moment: TorchDict
    step: int


@dataclass
class Progress:
    """How far a run is, and what it has measured so far."""

    epoch: int = 0
    """The epoch under way, counted from 0."""
    steps: int = 0
    """Steps of this epoch that are done."""
    loss_sum: float = 0.0
    """Sum of the losses of this epoch's images so far."""
    seconds: float = 0.0
    """Training time of this epoch so far."""
    rows: list[dict[str, Any]] = field(default_factory=list)
    """The lines of metrics.jsonl, one for each finished epoch."""

    def __post_init__(self) -> None:
        counts, sums = (self.epoch, self.steps), (self.loss_sum, self.seconds)
        if not (
            all(type(number) is int and number >= 0 for number in counts)
            and all(type(number) in (int, float) and math.isfinite(number) for number in sums)
            and isinstance(self.rows, list)
            and all(isinstance(row, dict) for row in self.rows)
            and len(self.rows) == self.epoch
        ):
            raise ValueError("the progress of the run is not valid")


@dataclass(frozen=True)
class Checkpoint:
    """Everything that is needed to continue a run as if it had not stopped."""

    state: AdamState
    progress: Progress
    run: dict[str, Any]
    """The run's record: framework, device, configuration, versions."""


class Unusable(Exception):
    """A file is not a checkpoint, or is damaged. The message says why."""


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint atomically.

    Raises:
        OSError: the disk is full, or the folder cannot be written or does not exist.
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
    """Read and verify a checkpoint.

    Raises:
        Unusable: the file is missing, damaged, or of another format, or a number in it is not finite.
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
        raise Unusable("it holds weights only, not a checkpoint")
    if metadata.get("sha256") != checksum(text, tensors):
        raise Unusable("its contents do not match its checksum")
    return interpret(text, tensors)


def interpret(text: str, tensors: TorchDict) -> Checkpoint:
    """Build the checkpoint from the JSON text of the metadata and the tensors.

    Raises:
        Unusable: the text or the tensors are not those of a checkpoint.
    """
    try:
        content = json.loads(text)
        if content["format"] != FORMAT:
            raise Unusable(f"it has format {content['format']!r}, and this version reads {FORMAT!r}")
        state = unflatten(tensors, int(content["step"]))
        progress = Progress(**content["progress"])
        return Checkpoint(state, progress, dict(content["run"]))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Unusable(f"its contents are not valid ({type(error).__name__}: {error})") from None


def flatten(state: AdamState) -> TorchDict:
    """Return all arrays of a state in one dictionary, the moments under prefixed names."""
    moments = {f"{moment}.{name}": array for moment in MOMENTS for name, array in getattr(state, moment).items()}
    return {name: np.ascontiguousarray(array) for name, array in (state.weights | moments).items()}


def unflatten(tensors: Mapping[str, np.ndarray], step: int) -> AdamState:
    """Return the state that `flatten` made these tensors from.

    Raises:
        ValueError: a tensor is missing, unknown, misshapen, of another dtype than the others, or not finite.
    """
    parts: dict[str, TorchDict] = {"weights": {}, **{moment: {} for moment in MOMENTS}}
    for full_name, array in tensors.items():
        head, _, tail = full_name.partition(".")
        part, name = (head, tail) if head in MOMENTS else ("weights", full_name)
        parts[part][name] = array
    layout = layout_of(recognise(parts["weights"]))
    for part_tensors in parts.values():
        check_shapes(part_tensors, layout)
    dtypes = {array.dtype for array in tensors.values()}
    if len(dtypes) != 1 or not np.issubdtype(min(dtypes, key=str), np.floating):
        raise ValueError(f"tensors have the dtypes {', '.join(sorted(map(str, dtypes)))}")
    for name, array in tensors.items():
        if not np.isfinite(array).all():
            raise ValueError(f"tensor {name} holds NaN or infinity")
    return AdamState(parts["weights"], parts["first_moment"], parts["second_moment"], step)

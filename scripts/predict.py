"""Classify pictures with a trained network: print the three likeliest classes of each, and how it was prepared.

Takes PNG, JPEG and other common files of any size, and folders of them. The exit status is 2 if a file could not be
read; the others are classified all the same.
"""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro
from jaxtyping import Float

from experiments.answers import Framework, compute_logits, softmax
from experiments.records import read_record
from jax_cnn.config import UserError
from jax_cnn.data import CLASS_NAMES, CLASS_NUMBERS, print_to_stderr
from jax_cnn.pictures.likeness import find_oddities
from jax_cnn.pictures.prepare import Invert, Prepared, prepare_picture
from jax_cnn.pictures.read import list_pictures, printable, read_picture
from jax_cnn.run import command_line
from jax_cnn.run.folder import WEIGHTS
from jax_cnn.weights import load_weights
from torch_ref.weights import read_tensors


@dataclass(frozen=True)
class PredictConfig:
    """The pictures to classify, and the network that does it."""

    images: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE…")] = ()
    """Files with pictures, or folders: all pictures in a folder are classified, in the order of their names."""
    weights: Path | None = None
    """The trained network: a run's folder, a weights file, or PyTorch's .pth; by default runs/jax or runs/torch."""
    framework: Framework = "jax"
    """The framework that computes; both give the same answer."""
    invert: Invert = "auto"
    """Swap light and dark, as the network expects light on black; auto swaps a picture that is dark on light."""
    json: bool = False
    """Print one JSON object per picture instead, with the probabilities of all classes."""


def main() -> None:
    """Read the command line, the weights and the pictures; compute the probabilities; print them."""
    config = command_line.parse(PredictConfig(), __doc__)
    if not config.images:
        raise UserError("there is no picture to look at: give one or more files or folders (--help lists every flag)")
    weights_file = find_weights(config)
    weights = load_weights(weights_file, "float32", None, read_tensors, print_to_stderr)
    prepared, all_read = prepare_all(config)
    if prepared:
        os.environ["JAX_PLATFORMS"] = "cpu"  # where `compute_logits` computes: JAX need not start a GPU
        pixels = np.stack([picture.pixels for _, picture in prepared])
        logits = compute_logits(config.framework, weights, pixels)
        if not np.isfinite(logits).all():
            raise UserError(f"weights file {weights_file}: its numbers are too large to compute with; train again")
        show = as_json if config.json else as_text
        other_data = has_other_data(weights_file)
        for (path, picture), row in zip(prepared, softmax(logits), strict=True):
            print(show(path, picture, row, other_data))
    if not all_read:
        sys.exit(2)


def find_weights(config: PredictConfig) -> Path:
    """Return the weights file that was asked for, or the one that the framework's training command writes.

    Raises:
        UserError: none was asked for, and nothing has been trained.
    """
    default = Path("runs", config.framework, WEIGHTS)
    if config.weights is None and not default.exists():
        train = f"python scripts/train_{config.framework}.py"
        raise UserError(f"there is no trained network in {default}: train one first ({train}), or give --weights FILE")
    return config.weights or default


def has_other_data(weights: Path) -> bool:
    """Return whether the record beside the weights says that they were trained on other data than FashionMNIST."""
    try:
        return bool(read_record(weights if weights.is_dir() else weights.parent).get("data"))
    except (OSError, ValueError):
        return False  # no record lies there


def prepare_all(config: PredictConfig) -> tuple[list[tuple[Path, Prepared]], bool]:
    """Prepare every file that can be read; print one line to stderr for each of the others.

    Returns:
        The pictures, and whether every file could be read.
    """
    prepared, all_read = [], True
    for path in config.images:
        try:
            files = list_pictures(path) if os.path.isdir(path) else [path]  # `Path.is_dir` fails for a long name
        except UserError as error:
            files, all_read = [], False
            print(f"error: {error}", file=sys.stderr)
        for file in files:
            try:
                prepared.append((file, prepare_picture(read_picture(file), config.invert)))
            except UserError as error:
                all_read = False
                print(f"error: {error}", file=sys.stderr)
    return prepared, all_read


def as_text(path: Path, picture: Prepared, probabilities: Float[np.ndarray, "10"], other_data: bool) -> str:
    """Return a line with the classes, a line on how the picture was prepared, and a warning if it looks odd.

    After training on other data, classes have numbers, and nothing is known of how a picture should look.
    """
    names = CLASS_NUMBERS if other_data else CLASS_NAMES
    likeliest = np.argsort(-probabilities, kind="stable")[:3]
    classes = ", ".join(f"{names[label]} {probabilities[label]:.2%}" for label in likeliest)
    lines = [f"{printable(str(path))}: {classes}", f"  {picture.summary}"]
    if not other_data and (oddities := find_oddities(picture)):
        lines.append(f"  looks nothing like the training images: {oddities}")
    return "\n".join(lines)


def as_json(path: Path, picture: Prepared, probabilities: Float[np.ndarray, "10"], other_data: bool) -> str:
    """Return the same as one JSON object, with the probabilities of all ten classes."""
    answer = {
        "file": str(path),
        "probabilities": dict(zip(CLASS_NUMBERS if other_data else CLASS_NAMES, probabilities.tolist(), strict=True)),
        "prepared": picture.summary,
        "unlike_training": None if other_data else find_oddities(picture),
    }
    return json.dumps(answer)


if __name__ == "__main__":
    command_line.run(main)

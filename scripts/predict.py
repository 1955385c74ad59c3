"""Tell what a trained network sees in pictures: the three likeliest classes of each, and how it was prepared.

Takes PNG, JPEG and other common files of any size. Exit status 2: one could not be read; the others are done.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro
from jaxtyping import Float, UInt8

from jax_cnn.config import UserError
from jax_cnn.data import CLASS_NAMES
from jax_cnn.pictures import likeness
from jax_cnn.pictures.prepare import Invert, Prepared, prepare_picture
from jax_cnn.pictures.read import printable, read_picture
from jax_cnn.run import command_line
from jax_cnn.run.folder import WEIGHTS
from jax_cnn.torch_layout import TorchDict, layout_of, load_weights, recognise, to_flax

BATCH = 100  # pictures that go through the network at once


@dataclass(frozen=True)
class PredictConfig:
    """What to look at, with which network."""

    images: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="IMAGE…")] = ()
    """Files with pictures."""
    weights: Path | None = None
    """The trained network, from either framework; by default runs/jax/weights.safetensors or the same in runs/torch."""
    framework: Literal["jax", "torch"] = "jax"
    """Which of the two computes: they give the same answer."""
    invert: Invert = "auto"
    """Swap light and dark, as the network knows light on black only; auto does where a picture is dark on light."""
    json: bool = False
    """Print a JSON object per picture instead, with the probabilities of all classes."""


def main() -> None:
    """Read the command line, the network and the pictures; predict; show."""
    config = command_line.parse(PredictConfig(), __doc__)
    if not config.images:
        raise UserError("there is no picture to look at: give one or more files (--help lists every flag)")
    file = weights_file(config)
    weights = load_weights(file, "float32", None)
    prepared = prepare_all(config)
    if prepared:
        pixels = np.stack([picture.pixels for _, picture in prepared])
        probabilities = (jax_probabilities if config.framework == "jax" else torch_probabilities)(weights, pixels)
        if not np.isfinite(probabilities).all():
            raise UserError(f"weights file {file}: its numbers are too large to compute with; train again")
        show = as_json if config.json else as_text
        for (path, picture), row in zip(prepared, probabilities, strict=True):
            print(show(path, picture, row))
    if len(prepared) < len(config.images):
        sys.exit(2)


def weights_file(config: PredictConfig) -> Path:
    """The file asked for, or where the training command of that framework writes it.

    Raises:
        UserError: none was asked for, and none is there.
    """
    default = Path("runs", config.framework, WEIGHTS)
    if config.weights is None and not default.exists():
        train = f"python scripts/train_{config.framework}.py"
        raise UserError(f"there is no trained network in {default}: train one first ({train}), or give --weights FILE")
    return config.weights or default


def prepare_all(config: PredictConfig) -> list[tuple[Path, Prepared]]:
    """Prepare every file that can be read; the others get a line on stderr each."""
    prepared = []
    for path in config.images:
        try:
            prepared.append((path, prepare_picture(read_picture(path), config.invert)))
        except UserError as slip:
            print(f"error: {slip}", file=sys.stderr)
    return prepared


def jax_probabilities(weights: TorchDict, pixels: UInt8[np.ndarray, "size 28 28"]) -> Float[np.ndarray, "size 10"]:
    """Compute softmax probabilities with JAX, on the CPU: a GPU may round its float32 products to fewer bits."""
    import jax  # only now: no slip should wait for a framework to load

    jax.config.update("jax_platforms", "cpu")

    from jax_cnn.model import network
    from jax_cnn.train import to_images

    kind = recognise(weights)
    apply = network(kind.model, hidden=kind.hidden)
    params = jax.tree.map(jax.numpy.asarray, to_flax(weights, layout_of(kind)))
    predict = jax.jit(lambda batch: jax.nn.softmax(apply(params, to_images(batch, jax.numpy.float32))))
    return np.concatenate([predict(pixels[start : start + BATCH]) for start in range(0, len(pixels), BATCH)])


def torch_probabilities(weights: TorchDict, pixels: UInt8[np.ndarray, "size 28 28"]) -> Float[np.ndarray, "size 10"]:
    """Compute softmax probabilities with PyTorch, on the CPU."""
    import torch

    from torch_ref.model import make_model

    model = make_model(*recognise(weights))
    model.load_state_dict({name: torch.from_numpy(array) for name, array in weights.items()})
    images = torch.from_numpy(pixels)[:, None].float() / 255
    with torch.no_grad():
        return torch.cat([model(batch).softmax(dim=1) for batch in images.split(BATCH)]).numpy()


def as_text(path: Path, picture: Prepared, row: Float[np.ndarray, "10"]) -> str:
    """Name and classes on one line, then how the picture was prepared, then a warning where it is due."""
    likeliest = ", ".join(f"{CLASS_NAMES[label]} {row[label]:.2%}" for label in np.argsort(-row, kind="stable")[:3])
    lines = [f"{printable(str(path))}: {likeliest}", f"  {picture.how}"]
    if strange := likeness.oddity(picture):
        lines.append(f"  looks nothing like the training images: {strange}")
    return "\n".join(lines)


def as_json(path: Path, picture: Prepared, row: Float[np.ndarray, "10"]) -> str:
    """The same as one JSON object, with all ten probabilities."""
    return json.dumps(
        {
            "file": str(path),
            "probabilities": dict(zip(CLASS_NAMES, row.tolist(), strict=True)),
            "prepared": picture.how,
            "unlike_training": likeness.oddity(picture),
        }
    )


if __name__ == "__main__":
    command_line.run(main)

"""Pictures for tests: made from pixels, written to files, read back."""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from PIL import Image

from jax_cnn.pictures.read import Picture, read_picture

PORTRAIT = Path(matplotlib.get_data_path(), "sample_data", "grace_hopper.jpg")  # a photograph before a flag


def save_png(pixels: np.ndarray, path: Path) -> Path:
    """Write grey pixels as a PNG, and return its path."""
    Image.fromarray(pixels).save(path)
    return path


def plain(grey: np.ndarray) -> Picture:
    """Return grey pixels as if they had been read from a file."""
    return Picture(grey, None, (f"{grey.shape[1]}x{grey.shape[0]} L",))


def read_back(image: Image.Image, path: Path, **options: Any) -> Picture:
    """Write an image to a file and read that file."""
    image.save(path, **options)
    return read_picture(path)

"""Pictures for tests: made from pixels, written to files, read back."""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from PIL import Image

from jax_cnn.pictures.read import Picture, read_picture


def save_png(pixels: np.ndarray, path: Path) -> Path:
    """Write grey pixels, uint8 or uint16, as a PNG."""
    Image.fromarray(pixels).save(path)
    return path


def plain(grey: np.ndarray) -> Picture:
    """Grey pixels as a picture that was read from a file."""
    return Picture(grey, None, (f"{grey.shape[1]}x{grey.shape[0]} L",))


def read_back(image: Image.Image, path: Path, **options: Any) -> Picture:
    """Write an image to a file and read that."""
    image.save(path, **options)
    return read_picture(path)


def portrait() -> Path:
    """The photograph that comes with matplotlib."""
    return Path(matplotlib.get_data_path(), "sample_data", "grace_hopper.jpg")

"""Arrays and pictures inside a JSON file: exact, and a line each."""

import base64
import io
from typing import Any

import numpy as np
from PIL import Image

Json = dict[str, Any]


def pack(array: np.ndarray) -> Json:
    """An array as text: its dtype, its shape, and its bytes in row-major order."""
    content = np.ascontiguousarray(array)
    return {
        "dtype": str(content.dtype),
        "shape": list(content.shape),
        "base64": base64.b64encode(content.tobytes()).decode(),
    }


def unpack(packed: Json) -> np.ndarray:
    """The array again."""
    content = base64.b64decode(packed["base64"])
    return np.frombuffer(content, packed["dtype"]).reshape(packed["shape"])


def png(pixels: np.ndarray) -> str:
    """A grey picture [row, column] of bytes as a PNG, in base64."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def pixels(encoded: str) -> np.ndarray:
    """The picture's pixels again."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(encoded))))

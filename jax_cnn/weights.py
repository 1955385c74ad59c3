"""Weights on disk: safetensors under PyTorch's names and layouts. Either framework loads them, and nothing executes."""

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from jax_cnn.errors import UserError
from jax_cnn.torch_layout import TorchDict, check_shapes


def save_weights(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write the file whole or not at all: under a temporary name, flushed to disk, then renamed.

    Raises:
        OSError: the disk is full or the folder cannot be written.
    """
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(save(dict(tensors)))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def load_weights(path: Path, dtype: str) -> TorchDict:
    """Read SimpleCNN's weights as arrays of this dtype.

    Raises:
        UserError: the file is missing or not safetensors, or a tensor is missing, unknown, misshapen, not of a floating
            dtype, or not finite.
    """
    try:
        tensors = load(path.read_bytes())
        check_shapes(tensors)
    except OSError as error:
        raise UserError(f"weights file {path}: {error.strerror}") from None
    except SafetensorError as error:
        raise UserError(f"weights file {path}: not a readable safetensors file ({error})") from None
    except (ValueError, KeyError) as error:
        raise UserError(f"weights file {path}: {error}") from None
    for name, array in tensors.items():
        if not np.issubdtype(array.dtype, np.floating):
            raise UserError(f"weights file {path}: tensor {name} has dtype {array.dtype}, not a floating one")
        if not np.isfinite(array).all():
            raise UserError(f"weights file {path}: tensor {name} holds NaN or infinity")
    return {name: array.astype(dtype) for name, array in tensors.items()}

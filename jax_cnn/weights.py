"""Weights on disk: safetensors under PyTorch's names and layouts. Either framework loads them, and nothing executes."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from jax_cnn.config import CNN, Network
from jax_cnn.errors import UserError
from jax_cnn.files import write_atomically
from jax_cnn.torch_layout import TorchDict, check_shapes, layout_of, recognise


def save_weights(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write the file whole or not at all.

    Raises:
        OSError: the disk is full or the folder cannot be written.
    """
    write_atomically(path, save(dict(tensors)))


def load_weights(path: Path, dtype: str, network: Network | None = CNN) -> TorchDict:
    """Read a network's weights.

    Args:
        path: of the file.
        dtype: of the arrays to make of it.
        network: whose weights they have to be; None takes any network's (`torch_layout.recognise` tells whose).

    Raises:
        UserError: the file is missing or not safetensors, or of another network, or a tensor is missing, unknown,
            misshapen, not of a floating dtype, or not finite.
    """

    def wrong(what: str) -> UserError:
        return UserError(f"weights file {path}: {what}; give a file that train_jax.py or train_torch.py wrote")

    try:
        tensors = load(path.read_bytes())
        found = recognise(tensors)
        if network not in (None, found) and fits(tensors, found):
            raise wrong(f"it is of {found}, not of {network}")
        check_shapes(tensors, layout_of(network or found))
    except OSError as error:
        raise wrong(error.strerror or str(error)) from None
    except SafetensorError as error:
        raise wrong(f"not a readable safetensors file ({error})") from None
    except KeyError as error:
        raise wrong(f"a tensor has dtype {error.args[0]}, which NumPy lacks") from None
    except ValueError as error:
        raise wrong(str(error)) from None
    for name, array in tensors.items():
        if not np.issubdtype(array.dtype, np.floating):
            raise wrong(f"tensor {name} has dtype {array.dtype}, not a floating one")
    with np.errstate(over="ignore"):  # what overflows is infinite, and refused as such
        converted = {name: array.astype(dtype) for name, array in tensors.items()}
    for name, array in converted.items():
        if not np.isfinite(array).all():
            raise wrong(f"tensor {name} holds NaN, infinity or a number beyond {dtype}")
    return converted


def fits(tensors: Mapping[str, np.ndarray], network: Network) -> bool:
    """Whether these are all of this network's tensors, and no others."""
    try:
        check_shapes(tensors, layout_of(network))
    except ValueError:
        return False
    return True

"""Reading the tensors of a PyTorch file. Nothing in the file is executed."""

import argparse
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

STATE_DICTS = ("state_dict", "model_state_dict", "model")  # the usual names of a state dict inside a checkpoint
DEPTH = 4  # of dictionaries in dictionaries: a damaged file may hold one that holds itself


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """Return the tensors of a state dict by name, on the CPU; floating ones in float32, or float64 if they are wider.

    The file holds a state dict, or a dictionary with one in it, as training scripts save checkpoints.

    Raises:
        ValueError: it holds something else, or cannot be read.
    """
    import torch  # only now: other files should not wait for PyTorch

    try:
        with torch.serialization.safe_globals([*harmless_types()]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns of kinds of files that it then refuses
            content = torch.load(path, map_location="cpu", weights_only=True)
        state_dict = find_state_dict(content, (torch.Tensor, np.ndarray))
        return {str(name): as_array(tensor) for name, tensor in state_dict.items()}
    except Exception as error:  # a damaged file may raise anything
        raise ValueError(explain(str(error)) or type(error).__name__) from None


def explain(message: str) -> str:
    """Return on one line what PyTorch says of a file, without its advice to execute what is in it."""
    if match := re.search(r"GLOBAL ([\w.]+)", message):
        return f"it holds {match[1]} beside tensors, which would be executed: save model.state_dict() alone"
    if "TorchScript" in message:
        return "it is a TorchScript archive, which is a program: save model.state_dict() alone"
    if "weights_only" in message:
        return "it holds more than tensors: save model.state_dict() alone"
    if "not in a subdirectory" in message:
        return "it is a zip archive of another program"
    return message.partition("\n")[0]


def harmless_types() -> Iterator[Any]:
    """Yield what PyTorch would refuse in a file, although it is harmless and many training scripts save it.

    These are numbers and arrays of NumPy, such as the best accuracy, and the flags of the script. NumPy 1 had other
    names for its functions.
    """
    yield argparse.Namespace
    yield from (np.dtype, np.ndarray, *{type(np.dtype(code)) for code in "?bhilqBHILQefd"})
    for value in (np.float64(0), np.zeros(1)):
        function: Any = value.__reduce__()[0]
        for module in ("numpy._core.multiarray", "numpy.core.multiarray"):
            yield function, f"{module}.{function.__name__}"


def as_array(tensor: Any) -> np.ndarray:
    """Return a tensor as a NumPy array, which knows no bfloat16. An array stays as it is."""
    import torch

    if isinstance(tensor, np.ndarray):
        return tensor
    if tensor.is_floating_point() and tensor.dtype != torch.float64:
        tensor = tensor.float()
    array: np.ndarray = tensor.numpy(force=True)
    return array


def find_state_dict(content: Any, kinds: tuple[type, ...]) -> Mapping[Any, Any]:
    """Return the dictionary whose values are all of some kinds: the content, or the one in it or in its dictionaries.

    If there is none, the values of these kinds in the content itself are returned.

    Raises:
        ValueError: there is none, or there are several and none has a usual name.
    """
    if not isinstance(content, Mapping):
        raise ValueError(f"it holds one {type(content).__name__}, not a state dict")

    def is_state_dict(value: Any) -> bool:
        return isinstance(value, Mapping) and len(value) > 0 and all(isinstance(item, kinds) for item in value.values())

    if is_state_dict(content):
        return content
    level, inner = [content], []
    for _ in range(DEPTH):
        inner = [item for entries in level for item in entries.items() if is_state_dict(item[1])]
        for usual in (*STATE_DICTS, None):
            candidates = [value for name, value in inner if usual in (name, None) and isinstance(name, str)]
            if len(candidates) == 1:
                return candidates[0]
        if inner:
            break
        level = [value for entries in level for value in entries.values() if isinstance(value, Mapping)]
    if not inner and (tensors := {name: value for name, value in content.items() if isinstance(value, kinds)}):
        return tensors
    names = ", ".join(map(str, list(content)[:5]))
    raise ValueError(f"it holds {len(inner)} state dicts, not one; its first entries are {names or 'none'}")

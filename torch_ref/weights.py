"""Reading the tensors of a PyTorch file. Nothing in the file is executed."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

STATE_DICTS = ("state_dict", "model_state_dict", "model")  # the usual names of a state dict inside a checkpoint


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """Return the tensors of a state dict by name, on the CPU; floating ones in float32, or float64 if they are wider.

    The file holds a state dict, or a dictionary with one in it, as training scripts save checkpoints.

    Raises:
        ValueError: it holds something else, or cannot be read.
    """
    import torch  # only now: other files should not wait for PyTorch

    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        return {str(name): as_array(tensor) for name, tensor in find_state_dict(content, torch.Tensor).items()}
    except Exception as error:  # a damaged file may raise anything
        if found := re.search(r"GLOBAL ([\w.]+)", str(error)):
            reason = f"it holds {found[1]} beside tensors, which would be executed: save model.state_dict() alone"
            raise ValueError(reason) from None
        raise ValueError(str(error).partition("\n")[0] or type(error).__name__) from None


def as_array(tensor: Any) -> np.ndarray:
    """Return a tensor as a NumPy array, which knows no bfloat16."""
    import torch

    if tensor.is_floating_point() and tensor.dtype != torch.float64:
        tensor = tensor.float()
    array: np.ndarray = tensor.numpy(force=True)
    return array


def find_state_dict(content: Any, kind: type) -> Mapping[Any, Any]:
    """Return the dictionary whose values are all of a kind: the content itself, or the one inside it.

    Raises:
        ValueError: there is none, or there are several and none has a usual name.
    """
    if not isinstance(content, Mapping):
        raise ValueError(f"it holds one {type(content).__name__}, not a state dict")

    def is_state_dict(value: Any) -> bool:
        return isinstance(value, Mapping) and len(value) > 0 and all(isinstance(item, kind) for item in value.values())

    if is_state_dict(content):
        return content
    inner = {name: value for name, value in content.items() if is_state_dict(value)}
    for name in STATE_DICTS:
        if name in inner:
            return inner[name]
    if len(inner) != 1:
        names = ", ".join(map(str, list(content)[:5]))
        raise ValueError(f"it holds {len(inner)} state dicts, not one; its first entries are {names or 'none'}")
    return next(iter(inner.values()))

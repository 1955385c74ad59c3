"""The one map between PyTorch's tensors and the Flax tree, and the weights files. NumPy alone.

The map carries weights, gradients and both Adam moments:

| torch | Flax | what moves |
|---|---|---|
| convolution weight [out, in, row, column] | kernel [row, column, in, out] | axes |
| linear weight [out, in] | kernel [in, out] | axes |
| linear weight after a flatten [out, channel x row x column] | kernel [row x column x channel, out] | axes, row order |
| bias [out] | bias [out] | nothing |

A weights file is a safetensors file under PyTorch's names and layouts.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from jax_cnn.config import CNN, HIDDEN, Model, Network, UserError
from jax_cnn.files import write_atomically

TorchDict = dict[str, np.ndarray]  # arrays by the names of PyTorch's tensors
Tree = dict[str, Any]  # nested dictionaries of arrays


class Leaf(NamedTuple):
    """Where one torch tensor stands in the JAX tree, its shape in torch, and the conversion in both directions."""

    path: tuple[str, ...]
    shape: tuple[int, ...]
    to_jax: Callable[[np.ndarray], np.ndarray]
    to_torch: Callable[[np.ndarray], np.ndarray]


Layout = dict[str, Leaf]  # the leaf of every torch tensor, by the tensor's name


# The map


def conv(name: str, inputs: int, outputs: int, size: int = 3) -> Layout:
    """Map a convolution: [out, in, row, column] is [row, column, in, out] in Flax."""
    return layer(
        name,
        (outputs, inputs, size, size),
        lambda weight: weight.transpose(2, 3, 1, 0),
        lambda kernel: kernel.transpose(3, 2, 0, 1),
    )


def dense(name: str, inputs: int, outputs: int) -> Layout:
    """Map a linear layer: [out, in] is [in, out] in Flax."""
    return layer(name, (outputs, inputs), np.transpose, np.transpose)


def dense_after_flatten(name: str, chw: tuple[int, int, int], outputs: int) -> Layout:
    """Map a linear layer behind a flatten: PyTorch flattens channel, row, column; Flax row, column, channel."""
    channels, rows, columns = chw
    inputs = math.prod(chw)

    def to_jax(weight: np.ndarray) -> np.ndarray:
        return weight.reshape(outputs, channels, rows, columns).transpose(2, 3, 1, 0).reshape(inputs, outputs)

    def to_torch(kernel: np.ndarray) -> np.ndarray:
        return kernel.reshape(rows, columns, channels, outputs).transpose(3, 2, 0, 1).reshape(outputs, inputs)

    return layer(name, (outputs, inputs), to_jax, to_torch)


def layer(
    name: str,
    shape: tuple[int, ...],
    to_jax: Callable[[np.ndarray], np.ndarray],
    to_torch: Callable[[np.ndarray], np.ndarray],
) -> Layout:
    """Map a layer: its weight, of this shape in PyTorch, by the two functions, and its bias as it is."""
    return {
        f"{name}.weight": Leaf((name, "kernel"), shape, to_jax, to_torch),
        f"{name}.bias": Leaf((name, "bias"), shape[:1], same, same),
    }


def same(array: np.ndarray) -> np.ndarray:
    """Return a bias, or any array that needs no change, as it is."""
    return array


SIMPLE_CNN: Layout = {
    **conv("conv1", 1, 32),
    **conv("conv2", 32, 64),
    **dense_after_flatten("fc1", (64, 7, 7), 512),
    **dense("fc2", 512, 10),
}


def layout_of(network: Network) -> Layout:
    """Return the layout of this network."""
    layouts: dict[Model, Layout] = {
        "cnn": SIMPLE_CNN,
        "mlp": dense("fc1", 784, network.hidden) | dense("fc2", network.hidden, 10),  # one channel: no order to change
        "linear": dense("fc", 784, 10),
    }
    return layouts[network.model]


# Torch-named arrays to the Flax tree and back


def to_flax(tensors: Mapping[str, np.ndarray], layout: Layout = SIMPLE_CNN) -> Tree:
    """Convert torch-named arrays to the Flax tree.

    Raises:
        ValueError: a tensor is missing or unknown or has another shape.
    """
    check_shapes(tensors, layout)
    tree: Tree = {}
    for name, leaf in layout.items():
        *modules, last = leaf.path
        branch = tree
        for module in modules:
            branch = branch.setdefault(module, {})
        branch[last] = np.ascontiguousarray(leaf.to_jax(tensors[name]))
    return tree


def to_torch(tree: Mapping[str, Any], layout: Layout = SIMPLE_CNN) -> TorchDict:
    """Convert the Flax tree, of arrays that NumPy can read, to torch-named arrays.

    Raises:
        ValueError: a leaf is missing or unknown or has another shape.
    """
    leaves = dict(walk(tree))
    known = {leaf.path for leaf in layout.values()}
    if known != leaves.keys():
        missing, unknown = sorted(known - leaves.keys()), sorted(leaves.keys() - known)
        raise ValueError(f"leaves missing: {missing}, unknown: {unknown}")
    tensors = {
        name: np.ascontiguousarray(leaf.to_torch(np.asarray(leaves[leaf.path]))) for name, leaf in layout.items()
    }
    check_shapes(tensors, layout)
    return tensors


def walk(tree: Mapping[str, Any], path: tuple[str, ...] = ()) -> list[tuple[tuple[str, ...], Any]]:
    """Return every leaf of nested dictionaries with its path."""
    leaves = []
    for name, value in tree.items():
        leaves += walk(value, (*path, name)) if isinstance(value, Mapping) else [((*path, name), value)]
    return leaves


def check_shapes(tensors: Mapping[str, np.ndarray], layout: Layout = SIMPLE_CNN) -> None:
    """Compare the names and shapes of torch-named arrays with a layout.

    Raises:
        ValueError: names the first tensor that is missing or unknown or has another shape.
    """
    for name in [*layout, *(tensors.keys() - layout.keys())]:
        if name not in tensors:
            raise ValueError(f"tensor {name} is missing")
        if name not in layout:
            raise ValueError(f"tensor {name} is unknown; the network has {', '.join(layout)}")
        if tensors[name].shape != layout[name].shape:
            raise ValueError(f"tensor {name} has shape {tensors[name].shape}, not {layout[name].shape}")


# Weights files


def save_weights(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write a weights file, whole or not at all.

    Raises:
        OSError: the disk is full or the folder cannot be written to.
    """
    write_atomically(path, save(dict(tensors)))


def load_weights(path: Path, dtype: str, network: Network | None = CNN) -> TorchDict:
    """Read a weights file and convert its arrays to `dtype`.

    With a network, the weights have to be that network's; with None they may be any network's (see `recognise`).

    Raises:
        UserError: the file is missing or not safetensors, or holds another network, or a tensor is missing or unknown,
            has another shape or no floating dtype, or is not finite.
    """

    def user_error(problem: str) -> UserError:
        return UserError(f"weights file {path}: {problem}; give a file that train_jax.py or train_torch.py wrote")

    try:
        tensors = load(path.read_bytes())
        recognised = recognise(tensors)
        if network not in (None, recognised) and fits(tensors, recognised):
            raise user_error(f"it is of {recognised}, not of {network}")
        check_shapes(tensors, layout_of(network or recognised))
    except OSError as error:
        raise user_error(error.strerror or str(error)) from None
    except SafetensorError as error:
        raise user_error(f"not a readable safetensors file ({error})") from None
    except KeyError as error:
        raise user_error(f"a tensor has dtype {error.args[0]}, which NumPy lacks") from None
    except ValueError as error:
        raise user_error(str(error)) from None
    for name, array in tensors.items():
        if not np.issubdtype(array.dtype, np.floating):
            raise user_error(f"tensor {name} has dtype {array.dtype}, not a floating one")
    with np.errstate(over="ignore"):  # what overflows becomes infinite, and is refused below
        converted = {name: array.astype(dtype) for name, array in tensors.items()}
    for name, array in converted.items():
        if not np.isfinite(array).all():
            raise user_error(f"tensor {name} holds NaN, infinity or a number beyond {dtype}")
    return converted


def recognise(tensors: Mapping[str, np.ndarray]) -> Network:
    """Return the network whose tensors' names are most like these; the cnn if several are equally like them."""

    def similarity(model: Model) -> float:
        names = layout_of(Network(model)).keys()
        return len(names & tensors.keys()) / len(names | tensors.keys())

    models: tuple[Model, ...] = ("cnn", "mlp", "linear")  # max takes the first of equals
    model = max(models, key=similarity)
    shape = tensors["fc1.weight"].shape if model == "mlp" and "fc1.weight" in tensors else ()
    return Network(model, shape[0] if shape and shape[0] else HIDDEN)


def fits(tensors: Mapping[str, np.ndarray], network: Network) -> bool:
    """Return whether these are the tensors of this network, in names and shapes."""
    try:
        check_shapes(tensors, layout_of(network))
    except ValueError:
        return False
    return True

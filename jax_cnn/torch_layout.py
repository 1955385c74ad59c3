"""The one map between PyTorch's tensors and the Flax tree: weights, gradients and both Adam moments. NumPy alone.

| torch | Flax | what moves |
|---|---|---|
| convolution weight [out, in, row, column] | kernel [row, column, in, out] | axes |
| linear weight [out, in] | kernel [in, out] | axes |
| linear weight after a flatten [out, channel x row x column] | kernel [row x column x channel, out] | axes, row order |
| bias [out] | bias [out] | nothing |
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

TorchDict = dict[str, np.ndarray]
Tree = dict[str, Any]  # nested dictionaries of arrays


class Leaf(NamedTuple):
    """Where one torch tensor stands in the JAX tree, its torch shape, and the way there and back."""

    path: tuple[str, ...]
    shape: tuple[int, ...]
    to_jax: Callable[[np.ndarray], np.ndarray]
    to_torch: Callable[[np.ndarray], np.ndarray]


Layout = Mapping[str, Leaf]


def same(array: np.ndarray) -> np.ndarray:
    """Leave biases, and whatever needs no change, as they are."""
    return array


def conv(name: str, inputs: int, outputs: int, size: int = 3) -> Layout:
    """Map a convolution: [out, in, row, column] is [row, column, in, out] in Flax."""
    return {
        f"{name}.weight": Leaf(
            (name, "kernel"),
            (outputs, inputs, size, size),
            lambda weight: weight.transpose(2, 3, 1, 0),
            lambda kernel: kernel.transpose(3, 2, 0, 1),
        ),
        f"{name}.bias": Leaf((name, "bias"), (outputs,), same, same),
    }


def dense(name: str, inputs: int, outputs: int) -> Layout:
    """Map a linear layer: [out, in] is [in, out] in Flax."""
    return {
        f"{name}.weight": Leaf((name, "kernel"), (outputs, inputs), np.transpose, np.transpose),
        f"{name}.bias": Leaf((name, "bias"), (outputs,), same, same),
    }


def dense_after_flatten(name: str, chw: tuple[int, int, int], outputs: int) -> Layout:
    """Map a linear layer behind a flatten: PyTorch flattens channel, row, column; Flax row, column, channel."""
    channels, rows, columns = chw
    inputs = math.prod(chw)

    def to_jax(weight: np.ndarray) -> np.ndarray:
        return weight.reshape(outputs, channels, rows, columns).transpose(2, 3, 1, 0).reshape(inputs, outputs)

    def to_torch(kernel: np.ndarray) -> np.ndarray:
        return kernel.reshape(rows, columns, channels, outputs).transpose(3, 2, 0, 1).reshape(outputs, inputs)

    return {
        f"{name}.weight": Leaf((name, "kernel"), (outputs, inputs), to_jax, to_torch),
        f"{name}.bias": Leaf((name, "bias"), (outputs,), same, same),
    }


SOFTMAX_REGRESSION: Layout = dense("fc", 784, 10)


def feed_forward(hidden: int = HIDDEN) -> Layout:
    """Map the mlp. Its flatten has one channel, which leaves nothing to reorder."""
    return {**dense("fc1", 784, hidden), **dense("fc2", hidden, 10)}


SIMPLE_CNN: Layout = {
    **conv("conv1", 1, 32),
    **conv("conv2", 32, 64),
    **dense_after_flatten("fc1", (64, 7, 7), 512),
    **dense("fc2", 512, 10),
}


# PyTorch's names of the stages inside SimpleCNN's blocks, by the names that `jax_cnn.model` gives them.
TORCH_STAGES = {
    **{f"conv1.{stage}": f"{stage}1" for stage in ("conv", "relu", "pool")},
    **{f"conv2.{stage}": f"{stage}2" for stage in ("conv", "relu", "pool")},
}


def layout_of(network: Network) -> Layout:
    """The layout of this network."""
    layouts = {"linear": SOFTMAX_REGRESSION, "mlp": feed_forward(network.hidden), "cnn": SIMPLE_CNN}
    return layouts[network.model]


def recognise(tensors: Mapping[str, np.ndarray]) -> Network:
    """The network that these torch-named arrays are of, or are most likely meant for: the cnn where nothing tells."""

    def likeness(model: Model) -> float:
        names = layout_of(Network(model)).keys()
        return len(names & tensors.keys()) / len(names | tensors.keys())

    models: tuple[Model, ...] = ("cnn", "mlp", "linear")  # of equals, max takes the first
    model = max(models, key=likeness)
    width = tensors["fc1.weight"].shape[:1] if model == "mlp" and "fc1.weight" in tensors else ()
    return Network(model, width[0] if any(width) else HIDDEN)


def to_flax(tensors: Mapping[str, np.ndarray], layout: Layout = SIMPLE_CNN) -> Tree:
    """Turn torch-named arrays into the Flax tree.

    Raises:
        ValueError: a tensor is missing, unknown or misshapen.
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
    """Turn the Flax tree, of arrays that NumPy can read, into torch-named arrays.

    Raises:
        ValueError: a leaf is missing, unknown or misshapen.
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
    """Every leaf of nested dictionaries, with its path."""
    leaves = []
    for name, value in tree.items():
        leaves += walk(value, (*path, name)) if isinstance(value, Mapping) else [((*path, name), value)]
    return leaves


def check_shapes(tensors: Mapping[str, np.ndarray], layout: Layout = SIMPLE_CNN) -> None:
    """Hold torch-named arrays to a layout's names and shapes.

    Raises:
        ValueError: names the first tensor that is missing, unknown or misshapen.
    """
    for name in [*layout, *(tensors.keys() - layout.keys())]:
        if name not in tensors:
            raise ValueError(f"tensor {name} is missing")
        if name not in layout:
            raise ValueError(f"tensor {name} is unknown; the network has {', '.join(layout)}")
        if tensors[name].shape != layout[name].shape:
            raise ValueError(f"tensor {name} has shape {tensors[name].shape}, not {layout[name].shape}")


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

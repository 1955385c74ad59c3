"""The one map between PyTorch's tensors and the Flax tree, and the weights files. NumPy alone.

The map carries weights, gradients and both Adam moments:

| torch | Flax | what moves |
|---|---|---|
| convolution weight [out, in, row, column] | kernel [row, column, in, out] | axes |
| linear weight [out, in] | kernel [in, out] | axes |
| linear weight after a flatten [out, channel x row x column] | kernel [row x column x channel, out] | axes, row order |
| bias [out] | bias [out] | nothing |
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from jax_cnn.config import Model, Network

TorchDict = dict[str, np.ndarray]  # arrays by the names of PyTorch's tensors
Tree = dict[str, dict[str, Any]]  # arrays by layer, and by kernel or bias


class Leaf(NamedTuple):
    """Where one torch tensor stands in the JAX tree, its shape in torch, and the conversion in both directions."""

    path: tuple[str, str]
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
        module, parameter = leaf.path
        tree.setdefault(module, {})[parameter] = np.ascontiguousarray(leaf.to_jax(tensors[name]))
    return tree


def to_torch(tree: Mapping[str, Any], layout: Layout = SIMPLE_CNN) -> TorchDict:
    """Convert the Flax tree, of arrays that NumPy can read, to torch-named arrays.

    Raises:
        ValueError: a leaf is missing or unknown or has another shape.
    """
    leaves = {(module, name): leaf for module, branch in tree.items() for name, leaf in branch.items()}
    known = {leaf.path for leaf in layout.values()}
    if known != leaves.keys():
        missing, unknown = sorted(known - leaves.keys()), sorted(leaves.keys() - known)
        raise ValueError(f"leaves missing: {missing}, unknown: {unknown}")
    tensors = {
        name: np.ascontiguousarray(leaf.to_torch(np.asarray(leaves[leaf.path]))) for name, leaf in layout.items()
    }
    check_shapes(tensors, layout)
    return tensors


def check_shapes(tensors: Mapping[str, np.ndarray], layout: Layout = SIMPLE_CNN) -> None:
    """Compare the names and shapes of torch-named arrays with a layout.

    Raises:
        ValueError: names the first tensor that is missing or unknown or has another shape.
    """
    for name in [*layout, *sorted(tensors.keys() - layout.keys())]:
        if name not in tensors:
            raise ValueError(f"tensor {name} is missing")
        if name not in layout:
            raise ValueError(f"tensor {name} is unknown; the network has {', '.join(layout)}")
        if tensors[name].shape != layout[name].shape:
            raise ValueError(f"tensor {name} has shape {tensors[name].shape}, not {layout[name].shape}")

"""How one value is laid out in PyTorch and in JAX, and how it is carried between the two."""

from collections.abc import Sequence
from itertools import accumulate
from math import prod
from operator import mul
from typing import Any, NamedTuple

import numpy as np

Shape = tuple[int, ...]


class Carry(NamedTuple):
    """One way to carry a value: its axes are moved, then merged or split.

    Attributes:
        how: the way in words.
        axes: PyTorch's axes in JAX's order.
        torch_shape: the shape in PyTorch.
        jax_shape: the shape in JAX.
        image: channels, rows and columns where PyTorch's last axis is a flattened image whose channels JAX has last.
    """

    how: str
    axes: tuple[int, ...]
    torch_shape: Shape
    jax_shape: Shape
    image: Shape = ()

    def to_jax(self, array: Any) -> Any:
        """Return PyTorch's array as JAX lays it out. Takes NumPy and JAX arrays."""
        return array.reshape(self.split()).transpose(self.axes).reshape(self.jax_shape)

    def to_torch(self, array: Any) -> Any:
        """Return JAX's array as PyTorch lays it out. Takes NumPy and JAX arrays."""
        moved = array.reshape([self.split()[axis] for axis in self.axes])
        return moved.transpose(np.argsort(self.axes).tolist()).reshape(self.torch_shape)

    def split(self) -> Shape:
        """Return PyTorch's shape before its axes are moved."""
        return (*self.torch_shape[:-1], *self.image) if self.image else self.torch_shape


def candidates(
    torch_shape: Sequence[int], jax_shape: Sequence[int], channels_last: bool = True, image: Shape = ()
) -> list[Carry]:
    """Return the ways in which a value of one shape can be carried to another, the likeliest first.

    These are known: the axes as they are, channels last, and the axes of heads and positions exchanged, each with
    neighbouring axes merged or split afterwards. A batch that is not first and the steps of a scan are not guessed.

    Args:
        torch_shape: PyTorch's shape, batch first.
        jax_shape: JAX's shape.
        channels_last: images have their channels last in JAX.
        image: channels, rows and columns of an image that PyTorch flattened, if its values may be in the last axis.
    """
    torch_shape, jax_shape = tuple(torch_shape), tuple(jax_shape)
    if prod(torch_shape) != prod(jax_shape):
        return []
    rank = len(torch_shape)
    same = ("as it is", tuple(range(rank)))
    ways = [same]
    if rank > 2:
        last = ("channels last", (0, *range(2, rank), 1))
        ways = [last, same] if channels_last and rank > 3 else [same, last]
    if rank == 4:
        ways.append(("heads and positions exchanged", (0, 2, 1, 3)))
    found: dict[tuple[int, ...], Carry] = {}
    for how, axes in ways:
        moved = tuple(torch_shape[axis] for axis in axes)
        if can_reshape(moved, jax_shape):
            # Axes of length 1 make no difference: of two ways that do the same, the first stays.
            key = tuple(axis for axis in axes if torch_shape[axis] > 1)
            reshaped = "" if moved == jax_shape else ", axes merged or split"
            found.setdefault(key, Carry(how + reshaped, axes, torch_shape, jax_shape))
    carries = list(found.values())
    if channels_last and image and torch_shape == jax_shape and prod(image) == torch_shape[-1]:
        lead = rank - 1
        axes = (*range(lead), *range(lead + 1, lead + len(image)), lead)
        carries.append(Carry("flattened with channels last", axes, torch_shape, jax_shape, tuple(image)))
    return carries


def can_reshape(one: Shape, other: Shape) -> bool:
    """Return whether one shape is the other with neighbouring axes merged."""
    if prod(one) == 0:
        return one == other
    ends = [set(accumulate(shape, mul)) | {1} for shape in (one, other)]
    return prod(one) == prod(other) and (ends[0] <= ends[1] or ends[1] <= ends[0])


def carry(torch_shape: Sequence[int], jax_shape: Sequence[int], channels_last: bool = True) -> Carry | None:
    """Return the likeliest way to carry a value, or None if there is none."""
    return next(iter(candidates(torch_shape, jax_shape, channels_last)), None)

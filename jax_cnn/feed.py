"""The data set's way to the devices: chunks of training batches as they are needed, the test set once.

The images stay in the host's memory as they are on disk, one byte a pixel. A chunk of 64 batches of 64 is 3 MB, which
is gathered while the devices compute the one before; each process gathers only what its own devices get.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Int, UInt8

from jax_cnn.data import epoch_order, split_batches
from jax_cnn.devices import place_batches
from jax_cnn.train import PADDING

CHUNK_STEPS = 64  # steps a call: about half a second of work on two CPU cores, so that progress shows
EVALUATION_BATCH = 250  # 200 to 400 are equally fast on a CPU, 100 takes 5 % longer

HostPixels = UInt8[np.ndarray, "size 28 28"]
HostLabels = UInt8[np.ndarray, " size"]


class Chunk(NamedTuple):
    """Batches on the devices. There is room for more of them than the first `steps`, which alone are meant."""

    pixels: UInt8[Array, "networks room batch 28 28"]
    labels: UInt8[Array, "networks room batch"]
    steps: int


class Feed:
    """The training set, seen by each network in the order of its own seed."""

    def __init__(
        self, mesh: Mesh, pixels: HostPixels, labels: HostLabels, seeds: Sequence[int], batch_size: int
    ) -> None:
        """Take the images that train; nothing is sent yet."""
        self._mesh = mesh
        self._arrays = pixels, labels
        self._seeds = seeds
        self._batch_size = batch_size
        self.size = len(labels)

    @property
    def shapes(self) -> list[tuple[int, int, int]]:
        """The shapes of chunks, [networks, room, batch]."""
        return chunk_shapes(len(self._seeds), self.size, self._batch_size)

    def chunks(self, epoch: int, start: int = 0) -> Iterator[Chunk]:
        """An epoch's batches from step `start` on; the smaller last batch is a chunk of its own."""
        orders = [split_batches(epoch_order(seed, epoch, self.size), self._batch_size) for seed in self._seeds]
        full, rest = (np.stack(part) for part in zip(*orders, strict=True))
        for at in range(start, full.shape[1], CHUNK_STEPS):
            yield self._send(full[:, at : at + CHUNK_STEPS])
        if rest.size and start <= full.shape[1]:
            yield self._send(rest[:, None])

    def _send(self, order: Int[np.ndarray, "networks steps batch"]) -> Chunk:
        """Gather a chunk's images. Room that a shorter chunk leaves is filled with some image, which nobody reads."""
        networks, steps, batch = order.shape
        room = next(shape[1] for shape in self.shapes if shape[2] == batch)
        order = np.concatenate([order, np.zeros((networks, room - steps, batch), order.dtype)], axis=1)

        def place(array: np.ndarray) -> jax.Array:
            return place_batches(self._mesh, (*order.shape, *array.shape[1:]), lambda share: array[order[share[:3]]])

        pixels, labels = self._arrays
        return Chunk(place(pixels), place(labels), steps)


def chunk_shapes(networks: int, size: int, batch_size: int) -> list[tuple[int, int, int]]:
    """The shapes of chunks, [networks, room, batch]: of full batches, and of the remainder if there is one."""
    full, rest = divmod(size, batch_size)
    shapes = [(min(full, CHUNK_STEPS), batch_size), (1, rest)]
    return [(networks, room, batch) for room, batch in shapes if room and batch]


def send_test_set(mesh: Mesh, pixels: HostPixels, labels: HostLabels) -> tuple[jax.Array, jax.Array]:
    """Send all test images in batches [1, batches, batch, …] that the devices can share, the last filled up.

    What fills up has the label `PADDING`.
    """
    batch = math.ceil(EVALUATION_BATCH / mesh.size) * mesh.size
    missing = -len(labels) % batch

    def place(array: np.ndarray, fill: int) -> jax.Array:
        padding = np.full((missing, *array.shape[1:]), fill, array.dtype)
        batches = np.concatenate([array, padding]).reshape(1, -1, batch, *array.shape[1:])
        return place_batches(mesh, batches.shape, lambda share: batches[share])

    return place(pixels, 0), place(labels, PADDING)

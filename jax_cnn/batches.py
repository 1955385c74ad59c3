"""Which images, in which order. NumPy alone, so that both frameworks can train on the very same batches."""

import numpy as np
from jaxtyping import Int


def epoch_order(seed: int, epoch: int, size: int) -> Int[np.ndarray, " size"]:
    """The order in which an epoch visits the training set: a new permutation for every seed and epoch.

    Args:
        seed: of the run, 0 or more.
        epoch: counted from 0.
        size: number of training images.

    Returns:
        int64 indices, each of 0 … size - 1 once.
    """
    return np.random.default_rng((seed, epoch)).permutation(size)


def split_batches(
    order: Int[np.ndarray, " size"], batch_size: int
) -> tuple[Int[np.ndarray, "steps batch"], Int[np.ndarray, " remainder"]]:
    """Cut an order into full batches, one per row, and the images left over, which train too.

    Args:
        order: indices of the images of one epoch.
        batch_size: 1 or more.

    Returns:
        Full batches [size // batch_size, batch_size] and the remainder [size % batch_size], possibly empty.
    """
    full = len(order) - len(order) % batch_size
    return order[:full].reshape(-1, batch_size), order[full:]

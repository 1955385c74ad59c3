"""Both frameworks train on the same images in the same order, and on all of them."""

from pathlib import Path

import numpy as np
import pytest

from jax_cnn.config import TRAIN_SIZE
from jax_cnn.data import epoch_order, split_batches
from torch_ref.data import load_batches, load_dataset


def test_an_epoch_visits_every_image_once() -> None:
    order = epoch_order(seed=0, epoch=0, size=TRAIN_SIZE)
    assert np.array_equal(np.sort(order), np.arange(TRAIN_SIZE))


def test_every_seed_and_every_epoch_has_an_order_of_its_own_and_keeps_it() -> None:
    orders = [epoch_order(seed, epoch, 1000) for seed in range(3) for epoch in range(3)]
    assert len({order.tobytes() for order in orders}) == 9
    assert np.array_equal(epoch_order(2, 1, 1000), orders[7])


@pytest.mark.parametrize(("size", "steps", "remainder"), [(TRAIN_SIZE, 937, 32), (128, 2, 0)])
def test_the_batches_of_an_epoch_hold_every_image_in_order(size: int, steps: int, remainder: int) -> None:
    order = epoch_order(0, 0, size)
    full, rest = split_batches(order, 64)
    assert (full.shape, rest.shape) == ((steps, 64), (remainder,))
    assert np.array_equal(np.concatenate([full.ravel(), rest]), order)


def test_torchs_loader_serves_the_same_batches(data_dir: Path) -> None:
    limit = 200  # three full batches and one of 8
    order = epoch_order(5, 1, limit)
    loader = load_batches(load_dataset(data_dir, train=True, limit=limit), 64, order.tolist())
    dataset = load_dataset(data_dir, train=True)
    full, rest = split_batches(order, 64)
    for (images, labels), indices in zip(loader, [*full, rest], strict=True):
        assert labels.tolist() == [dataset[int(index)][1] for index in indices]
        assert all(image.equal(dataset[int(index)][0]) for image, index in zip(images, indices, strict=True))

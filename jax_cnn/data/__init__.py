"""Fashion-MNIST (Xiao, Rasul and Vollgraf, 2017, arXiv:1708.07747) as NumPy arrays, and the order of its images."""

import atexit
import hashlib
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, UInt8

from jax_cnn.data.files import FILES, Say, find_files, raw_folder, read_or_fetch
from jax_cnn.data.sources import SOURCES, Source

CLASS_NAMES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")

CLASS_NUMBERS = tuple(f"class {label}" for label in range(10))  # the names where other data have other classes


class FashionMNIST(NamedTuple):
    """The data set. The arrays are read-only: JAX on the CPU may share their memory instead of copying it."""

    train_images: UInt8[np.ndarray, "60000 28 28"]
    train_labels: UInt8[np.ndarray, "60000"]
    test_images: UInt8[np.ndarray, "10000 28 28"]
    test_labels: UInt8[np.ndarray, "10000"]


def print_to_stderr(line: str) -> None:
    """Print one line to stderr."""
    print(line, file=sys.stderr)


# Loading


def load_fashion_mnist(
    data_dir: Path, say: Say = print_to_stderr, sources: Sequence[Source] = SOURCES, any_data: bool = False
) -> FashionMNIST:
    """Read the data set, after fetching what is missing or damaged.

    Args:
        data_dir: the data folder.
        say: shows a message to the user.
        sources: where to fetch from, in order of preference, after the data folder itself.
        any_data: take files of the same format with other contents.

    Raises:
        UserError: no source has a file that is missing; or the data folder cannot be written to; or the contents of a
            file are not the published ones.
    """
    files = read_or_fetch(data_dir, say, sources, any_data)
    return FashionMNIST(*(decode_idx(files[name].content) for name in FILES))


def prepare_fashion_mnist(
    data_dir: Path, say: Say, sources: Sequence[Source] = SOURCES, any_data: bool = False
) -> Path:
    """Return a folder that torchvision reads the data set from, its `root`.

    It is the data folder, if the files lie there as torchvision keeps them. Otherwise it is a temporary folder with
    links to them, which is removed when the process ends. Arguments and errors are those of `load_fashion_mnist`.
    """
    files = read_or_fetch(data_dir, say, sources, any_data)
    if all(file.path == raw_folder(data_dir) / name and not file.packed for name, file in files.items()):
        return data_dir
    root = Path(tempfile.mkdtemp(prefix=".fashion_mnist-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    raw_folder(root).mkdir(parents=True)
    for name, file in files.items():
        link = raw_folder(root) / name
        if file.packed:
            link.write_bytes(file.content)
        else:
            link.symlink_to(file.path.absolute())
    return root


def other_files(data_dir: Path) -> dict[str, str]:
    """Return the SHA-256 of each file in the data folder that has other contents than the published one, by name."""
    files, _ = find_files(data_dir, FILES, any_data=True)
    digests = {name: hashlib.sha256(file.content).hexdigest() for name, file in files.items()}
    return {name: digest for name, digest in digests.items() if digest != FILES[name]}


def decode_idx(content: bytes) -> UInt8[np.ndarray, "..."]:
    """Decode an IDX file: two zeros, the type, the number of axes, the length of each axis, then the values.

    Returns:
        A read-only view of `content`, uint8, in the shape that the header states.

    Raises:
        ValueError: the values are not unsigned bytes, or their number does not match the shape.
    """
    if content[:3] != b"\0\0\x08" or len(content) < 4:  # 8 is the code for uint8
        raise ValueError(f"not an IDX file of unsigned bytes: it begins with {content[:4].hex(' ')}")
    start = 4 + 4 * content[3]
    shape = np.frombuffer(content[4:start], ">u4").astype(int)
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


# The order of training


def epoch_order(seed: int, epoch: int, size: int) -> Int[np.ndarray, " size"]:
    """Return the order in which an epoch (counted from 0) visits the training images: 0 … size - 1, int64.

    Every seed and every epoch has its own permutation.
    """
    return np.random.default_rng((seed, epoch)).permutation(size)


def split_batches(
    order: Int[np.ndarray, " size"], batch_size: int
) -> tuple[Int[np.ndarray, "steps batch"], Int[np.ndarray, " remainder"]]:
    """Split the order of an epoch into full batches, one per row, and the remainder, which trains too.

    Returns:
        Indices of shape [size // batch_size, batch_size] and [size % batch_size].
    """
    full = len(order) - len(order) % batch_size
    return order[:full].reshape(-1, batch_size), order[full:]

"""Fashion-MNIST (Xiao, Rasul and Vollgraf, 2017, arXiv:1708.07747) as NumPy arrays.

The four files lie unpacked in ``data_dir/FashionMNIST/raw``, where torchvision keeps them too. Those that are not there
are fetched from the first of `SOURCES` that has them. Whatever the source, and at every load, the very bytes that are
returned are compared with the SHA-256 of the published files: nobody trains on damaged data.
"""

import gzip
import hashlib
import os
import shutil
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from filelock import FileLock, Timeout
from jaxtyping import Int, UInt8

from jax_cnn.config import UserError
from jax_cnn.data_sources import SOURCES, Source, SourceFailed

CLASS_NAMES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")

# SHA-256 of the unpacked files, in the order of the fields of `FashionMNIST`. Every packer makes another .gz of them.
FILES = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
SIZES = {  # in bytes, with the header: a magic number and the length of each axis, four bytes each
    "train-images-idx3-ubyte": 16 + 60_000 * 28 * 28,
    "train-labels-idx1-ubyte": 8 + 60_000,
    "t10k-images-idx3-ubyte": 16 + 10_000 * 28 * 28,
    "t10k-labels-idx1-ubyte": 8 + 10_000,
}
MISSING = "missing"


class FashionMNIST(NamedTuple):
    """The data set. The arrays are read-only: JAX on the CPU may share their memory instead of copying it."""

    train_images: UInt8[np.ndarray, "60000 28 28"]
    train_labels: UInt8[np.ndarray, "60000"]
    test_images: UInt8[np.ndarray, "10000 28 28"]
    test_labels: UInt8[np.ndarray, "10000"]


class UnusableFile(Exception):
    """A file that is not, byte for byte, the published one; the message says what is wrong in a word or two."""


def load_fashion_mnist(
    data_dir: Path,
    say: Callable[[str], None] = lambda line: print(line, file=sys.stderr),
    sources: Sequence[Source] = SOURCES,
) -> FashionMNIST:
    """Reads the data set, and fetches first what is missing or damaged.

    Args:
        data_dir: the data folder, torchvision's ``root``.
        say: takes one line of text at a time, about anything that had to be fetched.
        sources: where to fetch from, in order of preference, after the data folder itself.

    Returns:
        Images of shape [60000, 28, 28] and [10000, 28, 28] and labels of shape [60000] and [10000], uint8, read-only.

    Raises:
        UserError: a file is missing or damaged and no source has it, or the data folder cannot be written to.
    """
    contents = _verified_contents(data_dir, say, sources)
    return FashionMNIST(*(decode_idx(contents[name]) for name in FILES))


def prepare_fashion_mnist(data_dir: Path, say: Callable[[str], None], sources: Sequence[Source] = SOURCES) -> Path:
    """Makes sure that the four files lie in the data folder, unpacked and sound.

    Args:
        data_dir: the data folder, torchvision's ``root``.
        say: takes one line of text at a time, about anything that had to be fetched.
        sources: where to fetch from, in order of preference, after the data folder itself.

    Returns:
        The folder with the files, ``data_dir/FashionMNIST/raw``.

    Raises:
        UserError: a file is missing or damaged and no source has it, or the data folder cannot be written to.
    """
    _verified_contents(data_dir, say, sources)
    return _raw_folder(data_dir)


def decode_idx(content: bytes) -> UInt8[np.ndarray, "..."]:
    """Decodes an IDX file of bytes: two zeros, the type, the number of axes, their lengths, then the values.

    Args:
        content: the whole file.

    Returns:
        A uint8 array of the shape that the file states, a read-only view of ``content``.

    Raises:
        ValueError: it is not an IDX file of unsigned bytes, or its length does not match its shape.
    """
    if content[:3] != b"\0\0\x08" or len(content) < 4:  # 8 is the code for uint8
        raise ValueError(f"not an IDX file of unsigned bytes: it begins with {content[:4].hex(' ')}")
    start = 4 + 4 * content[3]
    shape = np.frombuffer(content[4:start], ">u4").astype(int)
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


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


def _raw_folder(data_dir: Path) -> Path:
    return data_dir / "FashionMNIST" / "raw"


def _verified_contents(data_dir: Path, say: Callable[[str], None], sources: Sequence[Source]) -> dict[str, bytes]:
    """The published bytes of the four files, which then lie in the data folder too."""
    if data_dir.exists() and not data_dir.is_dir():
        raise UserError(
            f"--data-dir {data_dir}: the data folder is a file; give a folder that holds the data, or shall"
        )
    raw = _raw_folder(data_dir)
    contents, problems = _read_files(raw, FILES)
    if not problems:
        return contents
    try:
        raw.mkdir(parents=True, exist_ok=True)
        with _lock(data_dir / ".fashion_mnist.lock", say):
            # Another process may have put them in place while this one waited for the lock.
            repaired, problems = _read_files(raw, problems)
            if problems:
                repaired |= _fetch(problems, raw, data_dir / ".fashion_mnist.partial", say, sources)
            return contents | repaired
    except OSError as error:
        raise UserError(
            f"Fashion-MNIST is not in {raw} ({_listing(problems)}) and cannot be put there ({error}): "
            "give a data folder that can be written to, or one that holds the four files"
        ) from error


def _fetch(
    problems: dict[str, str], raw: Path, workdir: Path, say: Callable[[str], None], sources: Sequence[Source]
) -> dict[str, bytes]:
    """Puts each of the files with a problem in place, from the first source that has it."""
    say(f"Fashion-MNIST: fetching what {raw} lacks, which can take minutes ({_listing(problems)})")
    contents: dict[str, bytes] = {}
    remaining = problems
    failures: list[str] = []
    for source in (Source(f"the data folder {raw}", lambda names, workdir: raw), *sources):
        if not remaining:
            break
        with _private_folder(workdir):
            try:
                found, faults = _read_files(source.fetch(list(remaining), workdir), remaining, (".gz", ""))
            except SourceFailed as error:
                failures.append(f"{source.name}: {error}")
                continue
        for name, content in found.items():
            _write_atomically(raw / name, content)
        if found:
            say(f"Fashion-MNIST: {', '.join(found)} taken from {source.name}")
        if faults:
            failures.append(f"{source.name}: {_listing(faults)}")
        contents |= found
        remaining = faults
    if remaining:
        raise UserError(_nothing_worked(raw, {name: problems[name] for name in remaining}, failures))
    return contents


def _read_files(
    folder: Path, names: Iterable[str], suffixes: Sequence[str] = ("",)
) -> tuple[dict[str, bytes], dict[str, str]]:
    """The verified contents of those files in a folder that are sound, and what is wrong with the others."""
    contents: dict[str, bytes] = {}
    problems: dict[str, str] = {}
    for name in names:
        reasons = []
        for suffix in suffixes:
            try:
                contents[name] = _read_verified(folder / f"{name}{suffix}", name)
                break
            except UnusableFile as error:
                reasons.append(str(error))
        else:
            problems[name] = next((reason for reason in reasons if reason != MISSING), MISSING)
    return contents, problems


def _read_verified(path: Path, name: str) -> bytes:
    """The unpacked contents of a file, if they are those published under this name; else raises `UnusableFile`."""
    size = SIZES[name]
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            content = file.read(size + 1)  # and no more: a small .gz can unpack to any size
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UnusableFile(MISSING) from error
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise UnusableFile(f"damaged (not a sound .gz file: {error})") from error
    except OSError as error:
        raise UnusableFile(f"unreadable ({error.strerror})") from error
    if len(content) != size:
        length = "more" if len(content) > size else f"{len(content)}"
        raise UnusableFile(f"damaged ({length} bytes, not {size})")
    digest = hashlib.sha256(content).hexdigest()
    if digest != FILES[name]:
        raise UnusableFile(f"damaged (its SHA-256 begins with {digest[:12]}, not {FILES[name][:12]})")
    return content


def _write_atomically(path: Path, content: bytes) -> None:
    """Under the final name there is always the whole file, or what was there before: even if the power fails."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def _lock(path: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Held by one process at a time; the system releases it when that process dies, however it dies."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say(f"Fashion-MNIST: waiting for another process to fetch it (it holds {path})")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _private_folder(path: Path) -> Iterator[None]:
    """An empty folder, gone afterwards. Its name is fixed so that the next run clears what a killed one left."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(mode=0o700)
    try:
        yield
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _listing(problems: dict[str, str]) -> str:
    names = {problem: [name for name in problems if problems[name] == problem] for problem in problems.values()}
    return "; ".join(f"{problem}: {', '.join(names[problem])}" for problem in names)


def _nothing_worked(raw: Path, problems: dict[str, str], failures: Sequence[str]) -> str:
    tried = "\n".join(f"  {number}. {failure}" for number, failure in enumerate(failures, start=1))
    return (
        f"Fashion-MNIST is not in {raw} ({_listing(problems)}).\nTried:\n{tried}\n"
        f"To supply the data by hand, put these four files, each as it is or as .gz, in {raw.absolute()}:\n"
        f"  {', '.join(FILES)}"
    )

"""Fashion-MNIST (Xiao, Rasul and Vollgraf, 2017, arXiv:1708.07747) as NumPy arrays, and the order of its images.

The four files lie unpacked in `data_dir/FashionMNIST/raw`, as torchvision keeps them. A missing or damaged file is
fetched from the first of `SOURCES` that has it. Every load compares the bytes with the SHA-256 of the published files,
so nobody trains on damaged data.
"""

import gzip
import hashlib
import shutil
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from filelock import FileLock, Timeout
from jaxtyping import Int, UInt8

from jax_cnn.config import UserError
from jax_cnn.data_sources import SOURCES, Source, SourceFailed
from jax_cnn.files import write_atomically

CLASS_NAMES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")

# SHA-256 of the unpacked files, in the order of the fields of `FashionMNIST`. Packed files differ by packer.
FILES = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
SIZES = {  # in bytes; the header has four for a magic number and four for the length of each axis
    "train-images-idx3-ubyte": 16 + 60_000 * 28 * 28,
    "train-labels-idx1-ubyte": 8 + 60_000,
    "t10k-images-idx3-ubyte": 16 + 10_000 * 28 * 28,
    "t10k-labels-idx1-ubyte": 8 + 10_000,
}
MISSING = "missing"

Say = Callable[[str], None]  # shows one line of text to the user


class FashionMNIST(NamedTuple):
    """The data set. The arrays are read-only: JAX on the CPU may share their memory instead of copying it."""

    train_images: UInt8[np.ndarray, "60000 28 28"]
    train_labels: UInt8[np.ndarray, "60000"]
    test_images: UInt8[np.ndarray, "10000 28 28"]
    test_labels: UInt8[np.ndarray, "10000"]


class UnusableFile(Exception):
    """A file is not the published one. The message says how, in a few words."""


def print_to_stderr(line: str) -> None:
    """Print one line to stderr."""
    print(line, file=sys.stderr)


# Loading


def load_fashion_mnist(data_dir: Path, say: Say = print_to_stderr, sources: Sequence[Source] = SOURCES) -> FashionMNIST:
    """Read the data set, after fetching what is missing or damaged.

    Args:
        data_dir: the data folder, torchvision's `root`.
        say: shows a message about fetching to the user.
        sources: where to fetch from, in order of preference, after the data folder itself.

    Raises:
        UserError: no source has a file that is needed, or the data folder cannot be written to.
    """
    contents = read_or_fetch(data_dir, say, sources)
    return FashionMNIST(*(decode_idx(contents[name]) for name in FILES))


def prepare_fashion_mnist(data_dir: Path, say: Say, sources: Sequence[Source] = SOURCES) -> Path:
    """Put what is missing or damaged into the data folder, and return the folder that holds the four files.

    Arguments and errors are those of `load_fashion_mnist`.
    """
    read_or_fetch(data_dir, say, sources)
    return raw_folder(data_dir)


def raw_folder(data_dir: Path) -> Path:
    """Return the folder of the four files, where torchvision looks for them."""
    return data_dir / "FashionMNIST" / "raw"


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


# Reading, verifying and fetching the files


def read_or_fetch(data_dir: Path, say: Say, sources: Sequence[Source]) -> dict[str, bytes]:
    """Return the published contents of the four files by name, after putting what is missing into the data folder."""
    if data_dir.exists() and not data_dir.is_dir():
        raise UserError(f"--data-dir {data_dir}: the data folder is a file; give the folder of the data, or a new one")
    raw = raw_folder(data_dir)
    contents, problems = read_files(raw, FILES)
    if not problems:
        return contents
    try:
        raw.mkdir(parents=True, exist_ok=True)
        with take_lock(data_dir / ".fashion_mnist.lock", say):
            # Another process may have fetched the files while this one waited for the lock.
            repaired, problems = read_files(raw, problems)
            if problems:
                repaired |= fetch(problems, raw, data_dir / ".fashion_mnist.partial", say, sources)
            return contents | repaired
    except OSError as error:
        raise UserError(
            f"Fashion-MNIST is not in {raw} ({list_problems(problems)}) and cannot be put there ({error}): "
            "give a data folder that can be written to, or one that holds the four files"
        ) from error


def fetch(problems: dict[str, str], raw: Path, workdir: Path, say: Say, sources: Sequence[Source]) -> dict[str, bytes]:
    """Fetch each file from the first source that has it, write it to the folder `raw`, and return the contents.

    Args:
        problems: the files to fetch, each with what is wrong with it.
        raw: the folder to write to. It is also the first source: a person may have put .gz files there.
        workdir: a folder that the sources may use; it is empty for each of them and removed afterwards.
        say: shows a message to the user.
        sources: where to fetch from, in order of preference.
    """
    say(f"Fashion-MNIST: fetching what {raw} lacks, which can take minutes ({list_problems(problems)})")
    contents: dict[str, bytes] = {}
    remaining = problems
    failures: list[str] = []
    for source in (Source(f"the data folder {raw}", lambda names, workdir: raw), *sources):
        if not remaining:
            break
        with temporary_folder(workdir):
            try:
                folder = source.fetch(list(remaining), workdir)
            except SourceFailed as error:
                failures.append(f"{source.name}: {error}")
                continue
            fetched, remaining = read_files(folder, remaining, suffixes=(".gz", ""))
        for name, content in fetched.items():
            write_atomically(raw / name, content)
        if fetched:
            say(f"Fashion-MNIST: {', '.join(fetched)} taken from {source.name}")
        if remaining:
            failures.append(f"{source.name}: {list_problems(remaining)}")
        contents |= fetched
    if remaining:
        raise UserError(describe_failure(raw, {name: problems[name] for name in remaining}, failures))
    return contents


def read_files(
    folder: Path, names: Iterable[str], suffixes: Sequence[str] = ("",)
) -> tuple[dict[str, bytes], dict[str, str]]:
    """Return the contents of the undamaged files in a folder by name, and what is wrong with the others by name.

    A file may lie there with any of the suffixes; the first undamaged one is taken.
    """
    contents: dict[str, bytes] = {}
    problems: dict[str, str] = {}
    for name in names:
        reasons = []
        for suffix in suffixes:
            try:
                contents[name] = read_verified(folder / f"{name}{suffix}", name)
                break
            except UnusableFile as error:
                reasons.append(str(error))
        else:
            problems[name] = next((reason for reason in reasons if reason != MISSING), MISSING)
    return contents, problems


def read_verified(path: Path, name: str) -> bytes:
    """Return the unpacked contents of a file.

    Raises:
        UnusableFile: they are not those that were published under this name.
    """
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


def take_lock(path: Path, say: Say) -> AbstractContextManager[object]:
    """Wait for a lock that one process at a time holds. The system releases it when that process dies."""
    lock = FileLock(path)
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        say(f"Fashion-MNIST: waiting for another process to fetch it (it holds {path})")
        return lock.acquire()


@contextmanager
def temporary_folder(path: Path) -> Iterator[None]:
    """Make an empty folder and remove it afterwards. Its name is fixed: the next run clears what a killed one left."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(mode=0o700)
    try:
        yield
    finally:
        shutil.rmtree(path, ignore_errors=True)


def list_problems(problems: dict[str, str]) -> str:
    """Return one line that lists the files by their problem: `missing: a, b; damaged: c`."""
    names: dict[str, list[str]] = {}
    for name, problem in problems.items():
        names.setdefault(problem, []).append(name)
    return "; ".join(f"{problem}: {', '.join(names[problem])}" for problem in names)


def describe_failure(raw: Path, problems: dict[str, str], failures: Sequence[str]) -> str:
    """Return a message that says what is wrong, which sources were tried, and how to supply the files by hand."""
    tried = "\n".join(f"  {number}. {failure}" for number, failure in enumerate(failures, start=1))
    return (
        f"Fashion-MNIST is not in {raw} ({list_problems(problems)}).\nTried:\n{tried}\n"
        f"To supply the data by hand, put these four files, each as it is or as .gz, in {raw.absolute()}:\n"
        f"  {', '.join(FILES)}"
    )

"""The four files of Fashion-MNIST: find them in the data folder, verify them, fetch what is missing.

The files lie in one of `PLACES` below the data folder, unpacked or packed, and are read where they lie. A missing
or damaged file is fetched from the first of `SOURCES` that has it. Every load compares the bytes with the SHA-256 of
the published files, so nobody trains on damaged data, or on other data without knowing it.
"""

import gzip
import hashlib
import itertools
import math
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
from filelock import FileLock, Timeout

from jax_cnn.config import UserError
from jax_cnn.data.sources import Source, SourceFailed
from jax_cnn.files import write_atomically

CLASSES = 10

# SHA-256 of the unpacked files, in the order of the fields of `FashionMNIST`. Packed files differ by packer.
FILES = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
SHAPES = {
    "train-images-idx3-ubyte": (60_000, 28, 28),
    "train-labels-idx1-ubyte": (60_000,),
    "t10k-images-idx3-ubyte": (10_000, 28, 28),
    "t10k-labels-idx1-ubyte": (10_000,),
}
# In bytes. The header has four for a magic number and four for the length of each axis.
SIZES = {name: 4 + 4 * len(shape) + math.prod(shape) for name, shape in SHAPES.items()}
# In the data folder; torchvision keeps its files in the first.
PLACES = ("FashionMNIST/raw", "raw", ".", "FashionMNIST")
MISSING = "missing"
GZIP = b"\x1f\x8b"  # how a packed file begins, whatever its name: browsers unpack a .gz and keep the name

Say = Callable[[str], None]  # shows one line of text to the user


class UnusableFile(Exception):
    """A file is not the published one. The message says how, in a few words."""


class OtherContents(UnusableFile):
    """A file has the format of the published one, and other contents: somebody's own labels, MNIST, or a wrong bit."""


class OtherFormat(OtherContents):
    """A file is somebody's own, and `--any-data` cannot use it: it has other labels, or not as many images."""


class Found(NamedTuple):
    """A file that can be used: its path and its unpacked contents."""

    path: Path
    content: bytes

    @property
    def packed(self) -> bool:
        """Return whether the file is smaller than its contents."""
        return self.path.stat().st_size != len(self.content)


def read_or_fetch(data_dir: Path, say: Say, sources: Sequence[Source], any_data: bool) -> dict[str, Found]:
    """Return the four files by name, after putting what is missing into the data folder."""
    if data_dir.exists() and not data_dir.is_dir():
        raise UserError(f"--data-dir {data_dir}: the data folder is a file; give the folder of the data, or a new one")
    files, problems = find_files(data_dir, FILES, any_data)
    if not problems:
        return files
    raw = raw_folder(data_dir)
    try:
        raw.mkdir(parents=True, exist_ok=True)
        with take_lock(data_dir / ".fashion_mnist.lock", say):
            # Another process may have fetched the files while this one waited for the lock.
            repaired, problems = find_files(data_dir, problems, any_data)
            if problems:
                repaired |= fetch(problems, raw, data_dir / ".fashion_mnist.partial", say, sources)
            return files | repaired
    except OSError as error:
        raise UserError(
            f"Fashion-MNIST is not in {raw} ({list_problems(problems)}) and cannot be put there ({error}): "
            "give a data folder that can be written to, or one that holds the four files"
        ) from error


def raw_folder(data_dir: Path) -> Path:
    """Return the folder of the four files, where torchvision looks for them."""
    return data_dir / "FashionMNIST" / "raw"


def find_files(data_dir: Path, names: Iterable[str], any_data: bool) -> tuple[dict[str, Found], dict[str, str]]:
    """Return the good files below the data folder by name, and what is wrong with the others by name.

    Raises:
        UserError: a file has other contents than the published one, and `any_data` is false or it cannot be used.
    """
    files: dict[str, Found] = {}
    problems: dict[str, str] = {}
    for name in names:
        reasons = []
        dotted = name.replace("-idx", ".idx")  # as Kaggle names the files of MNIST
        spellings = (name, f"{name}.gz", dotted, f"{dotted}.gz")
        for path in (data_dir / place / spelling for place in PLACES for spelling in spellings):
            try:
                files[name] = Found(path, read_verified(path, name, any_data))
                break
            except OtherContents as error:
                knowingly = ", or add --any-data to train_jax.py, train_torch.py or compare.py to train on it"
                raise UserError(
                    f"{path} is {error}: move it away to get the published file"
                    f"{'' if isinstance(error, OtherFormat) else knowingly}"
                ) from None
            except UnusableFile as error:
                reasons.append(str(error))
        else:
            problems[name] = next((reason for reason in reasons if reason != MISSING), MISSING)
    return files, problems


def fetch(problems: dict[str, str], raw: Path, workdir: Path, say: Say, sources: Sequence[Source]) -> dict[str, Found]:
    """Fetch each file from the first source that has it, write it to the folder `raw`, and return the files by name.

    A damaged file in `raw` is moved aside.

    Args:
        problems: the files to fetch, each with what is wrong with it.
        raw: the folder to write to.
        workdir: a folder that the sources may use; it is empty for each of them and removed afterwards.
        say: shows a message to the user.
        sources: where to fetch from, in order of preference.
    """
    say(f"Fashion-MNIST: fetching what {raw} lacks, which can take minutes ({list_problems(problems)})")
    files: dict[str, Found] = {}
    remaining = problems
    failures: list[str] = []
    for source in sources:
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
            set_aside(raw / name, say)
            write_atomically(raw / name, content)
            files[name] = Found(raw / name, content)
        if fetched:
            say(f"Fashion-MNIST: {', '.join(fetched)} taken from {source.name}")
        if remaining:
            failures.append(f"{source.name}: {list_problems(remaining)}")
    if remaining:
        raise UserError(describe_failure(raw, {name: problems[name] for name in remaining}, failures))
    return files


def set_aside(path: Path, say: Say) -> None:
    """Rename a file that is there to `<name>.damaged`, `<name>.damaged-2`, …, and say so."""
    if path.exists() or path.is_symlink():
        names = itertools.chain([f"{path.name}.damaged"], (f"{path.name}.damaged-{n}" for n in itertools.count(2)))
        aside = next(free for name in names if not (free := path.with_name(name)).exists())
        path.rename(aside)
        say(f"Fashion-MNIST: the damaged file is now {aside}")


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


def stated_shape(content: bytes) -> tuple[int, ...]:
    """Return the shape in the header of an IDX file of unsigned bytes; () if this is none."""
    if content[:3] != b"\0\0\x08" or len(content) < 4 or len(content) < 4 + 4 * content[3]:
        return ()
    return tuple(np.frombuffer(content[4 : 4 + 4 * content[3]], ">u4").tolist())


def read_verified(path: Path, name: str, any_data: bool = False) -> bytes:
    """Return the unpacked contents of a file.

    Raises:
        UnusableFile: the contents are not the published ones, or with `any_data` not of the published format.
    """
    size = SIZES[name]
    try:
        with path.open("rb") as file:
            packed = file.peek(len(GZIP)).startswith(GZIP)
            # Read no more than this: a small packed file can unpack to any size.
            content = (gzip.GzipFile(fileobj=file) if packed else file).read(size + 1)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UnusableFile(MISSING) from error
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise UnusableFile(f"damaged (not a sound .gz file: {error})") from error
    except OSError as error:
        raise UnusableFile(f"unreadable ({error.strerror})") from error
    shape, stated = SHAPES[name], stated_shape(content)
    header = b"\0\0\x08" + bytes([len(shape)]) + np.array(shape, ">u4").tobytes()
    if len(content) != size:
        own_size = len(header) + math.prod(stated)  # of a larger file, `content` is the beginning
        if len(stated) == len(shape) and (len(content) == own_size or own_size > size < len(content)):
            raise OtherFormat(f"of another data set: it holds {stated}, and --any-data takes {shape}")
        length = "more" if len(content) > size else f"{len(content)}"
        raise UnusableFile(f"damaged ({length} bytes, not {size})")
    digest = hashlib.sha256(content).hexdigest()
    if digest == FILES[name]:
        return content
    if not content.startswith(header):
        raise UnusableFile("damaged (the header is not that of such a file)")
    if not any_data:
        raise OtherContents(f"not the published file (its SHA-256 begins with {digest[:12]}, not {FILES[name][:12]})")
    if "labels" in name and (highest := max(content[len(header) :])) >= CLASSES:
        raise OtherFormat(f"not usable with --any-data (it has the label {highest}, and the classes are 0 to 9)")
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

"""Writing files so that a crash leaves the old file or the new one, and a failure is one line for the user."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jax_cnn.config import UserError

TEMPORARY = ".tmp"  # ends the name of a file while it is written


def write_atomically(path: Path, content: bytes) -> None:
    """Write under a temporary name, flush to disk, rename, and flush the folder.

    Raises:
        OSError: the disk is full, or the folder cannot be written or does not exist. The old file stays.
    """
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    flush_folder(path.parent)


def write_json(path: Path, content: object) -> None:
    """Write indented JSON atomically. Paths, dtypes and other values that JSON lacks are written as text.

    Where the locale is not UTF-8, Python keeps the bytes of a file name that it cannot decode as lone surrogates, which
    no file in UTF-8 can hold. They are written as the characters that they are in UTF-8, or as �.

    Raises:
        OSError: as `write_atomically`.
        ValueError: a number is NaN or infinite.
    """
    text = json.dumps(content, indent=1, default=str, allow_nan=False, ensure_ascii=False)
    readable = text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    write_atomically(path, f"{readable}\n".encode())


def flush_folder(folder: Path) -> None:
    """Make a rename permanent. Windows has no such call and needs none."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def writing(path: Path, flag: str = "--out-dir") -> Iterator[None]:
    """Turn an OSError inside the block into one line for the user, which names the flag and its value, `path`.

    Raises:
        UserError: the block raised an OSError.
    """
    try:
        yield
    except OSError as error:
        raise UserError(f"{flag} {path}: cannot write there ({error.strerror}); choose another folder") from None


def check_out_dir(path: Path) -> None:
    """Make the folder if it does not exist, and try to write a file into it, before any work is done.

    Raises:
        UserError: it cannot be made or written.
    """
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()

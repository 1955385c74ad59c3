"""Where the files of Fashion-MNIST can come from, when the data folder does not hold them.

A source is asked for some of the files and answers with a folder that holds them, each as it is or as ``.gz``, or
raises `SourceFailed` with its reason. It verifies nothing: `jax_cnn.data` does that for all of them.
"""

import contextlib
import http.client
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

DEBIAN_PACKAGE = "dataset-fashion-mnist"
MIRROR_TIMEOUT = 20.0  # seconds without a byte from a mirror
APT_TIMEOUT = 300.0  # seconds for one run of apt-get or dpkg-deb

# Everything apt writes stays in the folder it runs in. The machine's own hooks are cleared: as root they would note an
# update of the system, or tidy a cache, that this is not.
APT_CONFIG = f"""\
#clear APT::Update;
#clear DPkg;
Dir::State::Lists "./lists";
Dir::Cache "./cache";
Acquire::Languages "none";
Acquire::http::Timeout "{MIRROR_TIMEOUT:.0f}";
Acquire::https::Timeout "{MIRROR_TIMEOUT:.0f}";
"""


class SourceFailed(Exception):
    """Why a source could not give the files, in one line."""


class Source(NamedTuple):
    """A place to get files from.

    Attributes:
        name: what a person calls it.
        fetch: takes the names of the wanted files and an empty private folder to work in; returns the folder in which
            the files lie, each under its name or its name and ``.gz``; raises `SourceFailed`.
    """

    name: str
    fetch: Callable[[Sequence[str], Path], Path]


def installed_package(names: Sequence[str], workdir: Path) -> Path:
    """Finds the files of the Debian or Ubuntu package, where it is installed.

    Args:
        names: the wanted files.
        workdir: not used, for nothing has to be unpacked.

    Returns:
        The folder of the package that holds the files.

    Raises:
        SourceFailed: there is no dpkg here, or the package is not installed, or it holds none of the files.
    """
    wanted = {f"{name}.gz" for name in names}
    for line in _run(["dpkg", "-L", DEBIAN_PACKAGE]).splitlines():
        if Path(line).name in wanted:
            return Path(line).parent
    raise SourceFailed(f"the package {DEBIAN_PACKAGE} holds none of the files")


def torchvision_download(names: Sequence[str], workdir: Path, timeout: float = MIRROR_TIMEOUT) -> Path:
    """Lets torchvision download the data set, all of it, whatever is wanted.

    Args:
        names: the wanted files (not used).
        workdir: torchvision's root for this download.
        timeout: seconds after which a mirror that sends nothing is given up.

    Returns:
        The folder in which torchvision has unpacked the files.

    Raises:
        SourceFailed: torchvision cannot be imported, or no mirror gave sound files.
    """
    try:
        from torchvision.datasets import FashionMNIST
    except (ImportError, OSError, RuntimeError) as error:  # OSError: a shared library; RuntimeError: another torch's
        raise SourceFailed(f"torchvision cannot be imported: {_one_line(error)}") from error
    # torchvision passes no timeout to urllib, so this global is the only way to keep a silent network from hanging us.
    previous_timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(timeout)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # standard output belongs to the program that called us
            return Path(FashionMNIST(root=workdir, download=True).raw_folder)
    except (RuntimeError, OSError, EOFError, http.client.HTTPException) as error:
        raise SourceFailed(_one_line(error)) from error
    finally:
        socket.setdefaulttimeout(previous_timeout)


def downloaded_package(names: Sequence[str], workdir: Path) -> Path:
    """Downloads the Debian or Ubuntu package with apt-get, without root and without installing it.

    Args:
        names: the wanted files.
        workdir: holds apt's lists, its cache, the package and what is unpacked from it: nothing else is written to.

    Returns:
        The folder that holds the wanted files.

    Raises:
        SourceFailed: there is no apt-get here, or its repositories do not give the package.
    """
    for folder in ("lists/partial", "cache/archives/partial"):  # apt-get makes neither
        (workdir / folder).mkdir(parents=True)
    (workdir / "apt.conf").write_text(APT_CONFIG)
    apt_get = ["apt-get", "-qq", "-c", "./apt.conf"]
    failures: list[str] = []
    try:
        _run([*apt_get, "update"], workdir)
    except SourceFailed as error:  # one repository of many may be out of order, and not the one that has the package
        failures.append(str(error))
    try:
        _run([*apt_get, "download", DEBIAN_PACKAGE], workdir)
    except SourceFailed as error:
        failures.append(str(error))
        raise SourceFailed("; then ".join(dict.fromkeys(failures))) from error
    for package in workdir.glob("*.deb"):
        return unpack_package(package, names, workdir)
    raise SourceFailed("apt-get download left no package behind")


def unpack_package(package: Path, names: Sequence[str], workdir: Path) -> Path:
    """Unpacks a package, without installing it, and picks the wanted files out of it.

    Args:
        package: the ``.deb`` file.
        names: the wanted files.
        workdir: the folder to unpack in.

    Returns:
        A folder that holds those of the wanted files that the package has: regular files only, since a symbolic link
        could lead anywhere.

    Raises:
        SourceFailed: the package cannot be unpacked.
    """
    unpacked, picked = workdir / "unpacked", workdir / "picked"
    _run(["dpkg-deb", "-x", str(package.absolute()), str(unpacked.absolute())])
    picked.mkdir()
    wanted = {f"{name}.gz" for name in names}
    for path in unpacked.rglob("*.gz"):  # rglob does not walk through linked folders
        if path.name in wanted and path.is_file() and not path.is_symlink():
            path.rename(picked / path.name)
    return picked


def _run(command: Sequence[str], cwd: Path | None = None, timeout: float = APT_TIMEOUT) -> str:
    """Runs a program without a word on the terminal.

    Args:
        command: the program and its arguments.
        cwd: the folder to run it in.
        timeout: seconds after which it is killed.

    Returns:
        What it wrote to standard output.

    Raises:
        SourceFailed: it is not on this machine, or it failed, or it took too long.
    """
    program = command[0]
    if shutil.which(program) is None:
        raise SourceFailed(f"there is no {program} on this machine")
    # Files and not pipes: a grandchild that outlives the timeout would hold a pipe open, and with it this call.
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        try:
            status = subprocess.run(
                command,
                cwd=cwd,
                env={**os.environ, "LC_ALL": "C"},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=errors,
                timeout=timeout,
                check=False,
            ).returncode
        except subprocess.TimeoutExpired as error:
            raise SourceFailed(f"{program} took more than {timeout:g} s") from error
        except OSError as error:
            raise SourceFailed(f"{program} could not be run: {error.strerror}") from error
        output.seek(0)
        errors.seek(0)
        if status != 0:
            complaints = errors.read().decode(errors="replace").splitlines() or [f"exit status {status}"]
            worst = next((line for line in complaints if line.startswith("E:")), complaints[0])  # apt's E: after its W:
            raise SourceFailed(f"{program} failed: {worst.strip()}")
        return output.read().decode(errors="replace")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


SOURCES: tuple[Source, ...] = (
    Source(f"the installed package {DEBIAN_PACKAGE}", installed_package),
    Source("torchvision's download", torchvision_download),
    Source(f"the package {DEBIAN_PACKAGE} fetched by apt-get", downloaded_package),
)

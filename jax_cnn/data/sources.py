"""Sources of the files of Fashion-MNIST: an installed package, torchvision's mirrors, a package from apt-get.

The sources verify nothing: `jax_cnn.data.files` checks every file that they give.
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

# With this, apt writes only to the folder that it runs in. The machine's own hooks are cleared: run by root, they would
# record an update of the system, or tidy its cache.
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
    """A source could not give the files. The message says why, on one line."""


class Source(NamedTuple):
    """A place to get files from."""

    name: str
    """The name that the user sees."""
    fetch: Callable[[Sequence[str], Path], Path]
    """Takes the names of the wanted files and an empty folder to work in. Returns the folder in which the files lie,
    each under its name or its name and `.gz`. Raises `SourceFailed`."""


def installed_package(names: Sequence[str], workdir: Path) -> Path:
    """Find the files of the Debian or Ubuntu package, if it is installed."""
    wanted = {f"{name}.gz" for name in names}
    for line in run_program(["dpkg", "-L", DEBIAN_PACKAGE]).splitlines():
        if Path(line).name in wanted:
            return Path(line).parent
    raise SourceFailed(f"the package {DEBIAN_PACKAGE} holds none of the files")


def torchvision_download(names: Sequence[str], workdir: Path, timeout: float = MIRROR_TIMEOUT) -> Path:
    """Download all four files with torchvision, which gives up a mirror after `timeout` seconds of silence."""
    try:
        from torchvision.datasets import FashionMNIST
    except (ImportError, OSError, RuntimeError) as error:  # a shared library is missing, or torch has another version
        raise SourceFailed(f"torchvision cannot be imported: {one_line(error)}") from error
    # torchvision passes no timeout to urllib, so only this global one keeps a silent mirror from blocking forever.
    previous_timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(timeout)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # stdout belongs to the program that called us
            return Path(FashionMNIST(root=workdir, download=True).raw_folder)
    except (RuntimeError, OSError, EOFError, http.client.HTTPException) as error:
        raise SourceFailed(one_line(error)) from error
    finally:
        socket.setdefaulttimeout(previous_timeout)


def downloaded_package(names: Sequence[str], workdir: Path) -> Path:
    """Download the Debian or Ubuntu package with apt-get, as any user, and unpack it in `workdir` alone."""
    for folder in ("lists/partial", "cache/archives/partial"):  # apt-get makes neither
        (workdir / folder).mkdir(parents=True)
    (workdir / "apt.conf").write_text(APT_CONFIG, encoding="utf-8")
    apt_get = ["apt-get", "-qq", "-c", "./apt.conf"]
    failures: list[str] = []
    try:
        run_program([*apt_get, "update"], workdir)
    except SourceFailed as error:  # a broken repository need not be the one that has the package
        failures.append(str(error))
    try:
        run_program([*apt_get, "download", DEBIAN_PACKAGE], workdir)
    except SourceFailed as error:
        failures.append(str(error))
        raise SourceFailed("; then ".join(dict.fromkeys(failures))) from error
    for package in workdir.glob("*.deb"):
        return unpack_package(package, names, workdir)
    raise SourceFailed("apt-get download left no package behind")


def unpack_package(package: Path, names: Sequence[str], workdir: Path) -> Path:
    """Unpack a `.deb` file in `workdir` and return a folder with the wanted files that it has.

    Only regular files are taken, because a symbolic link could lead anywhere.
    """
    unpacked, picked = workdir / "unpacked", workdir / "picked"
    run_program(["dpkg-deb", "-x", str(package.absolute()), str(unpacked.absolute())])
    picked.mkdir()
    wanted = {f"{name}.gz" for name in names}
    for path in unpacked.rglob("*.gz"):  # rglob does not walk through linked folders
        if path.name in wanted and path.is_file() and not path.is_symlink():
            path.rename(picked / path.name)
    return picked


def run_program(command: Sequence[str], cwd: Path | None = None, timeout: float = APT_TIMEOUT) -> str:
    """Run a program that shows nothing on the terminal, and return its stdout.

    Raises:
        SourceFailed: it is not on this machine, or it failed, or it took more than `timeout` seconds.
    """
    program = command[0]
    if shutil.which(program) is None:
        raise SourceFailed(f"there is no {program} on this machine")
    # Files and not pipes: a grandchild that outlives the timeout would hold a pipe open, and this call would wait.
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
            lines = errors.read().decode(errors="replace").splitlines() or [f"exit status {status}"]
            worst = next((line for line in lines if line.startswith("E:")), lines[0])  # apt prints warnings (W:) first
            raise SourceFailed(f"{program} failed: {worst.strip()}")
        return output.read().decode(errors="replace")


def one_line(error: BaseException) -> str:
    """Return the message of an error on one line, or its type if it has no message."""
    return " ".join(str(error).split()) or type(error).__name__


SOURCES: tuple[Source, ...] = (
    Source(f"the installed package {DEBIAN_PACKAGE}", installed_package),
    Source("torchvision's download", torchvision_download),
    Source(f"the package {DEBIAN_PACKAGE} fetched by apt-get", downloaded_package),
)

"""Fetching the data set: from real packages, sockets and programs; and in processes at once, killed, on a full disk."""

import contextlib
import gzip
import io
import os
import shutil
import signal
import socket
import subprocess
import tarfile
import time
import urllib.request
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

from jax_cnn.data import load_fashion_mnist, prepare_fashion_mnist, sources
from jax_cnn.data.files import FILES
from jax_cnn.data.sources import Source, SourceFailed
from parity_tests.support import COMPLETE, IMAGES, LABELS, listing, start_python, wait_until

needs_dpkg = pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="not a Debian")
needs_apt = pytest.mark.skipif(shutil.which("apt-get") is None, reason="not a Debian")
needs_shell = pytest.mark.skipif(os.name != "posix", reason="needs a POSIX shell")

BROKEN_REPOSITORY = "deb file:/nowhere/at/all nowhere main\n"


# Packages


@needs_dpkg
def test_the_installed_package_is_found(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    database = tmp_path / "dpkg"
    monkeypatch.setenv("DPKG_ADMINDIR", str(database))
    (database / "info").mkdir(parents=True)
    (database / "updates").mkdir()
    (database / "status").write_text("")
    with pytest.raises(SourceFailed, match="'dataset-fashion-mnist' is not installed"):
        sources.installed_package([LABELS], tmp_path)

    packed = tmp_path / "usr share" / "datasets" / f"{LABELS}.gz"
    packed.parent.mkdir(parents=True)
    packed.write_bytes(gzip.compress((good / LABELS).read_bytes()))
    (database / "status").write_text(
        "Package: dataset-fashion-mnist\nStatus: install ok installed\nMaintainer: nobody\n"
        "Architecture: all\nVersion: 1\nDescription: none\n"
    )
    folders = [path for path in reversed(packed.parents) if path != Path("/")]
    paths = "".join(f"{path}\n" for path in ["/.", *folders, packed])
    (database / "info" / "dataset-fashion-mnist.list").write_text(paths)
    assert sources.installed_package([IMAGES, LABELS], tmp_path) == packed.parent
    with pytest.raises(SourceFailed, match="none of the files"):
        sources.installed_package([IMAGES], tmp_path)


def write_package(path: Path, files: Iterable[tuple[str, bytes | Path]]) -> None:
    """Write a `.deb` file by hand, since dpkg-deb packs no bad names; a path in place of bytes makes a link to it."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        for name, value in files:
            member = tarfile.TarInfo(name)
            if isinstance(value, Path):
                member.type, member.linkname = tarfile.SYMTYPE, str(value)
                tar.addfile(member)
            else:
                member.size = len(value)
                tar.addfile(member, io.BytesIO(value))
    content = b"!<arch>\n"
    for name, part in (("debian-binary", b"2.0\n"), ("control.tar", b""), ("data.tar", data.getvalue())):
        content += f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(part):<10}`\n".encode() + part
    path.write_bytes(content)


@pytest.fixture
def workdir(tmp_path: Path) -> Path:
    """Return an empty folder for a source to work in, with room above it for a package to escape to."""
    folder = tmp_path / "above" / "deep" / "work"
    folder.mkdir(parents=True)
    return folder


@needs_dpkg
def test_links_in_a_package_are_left_out(good: Path, tmp_path: Path, workdir: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    for name in FILES:
        (outside / f"{name}.gz").write_text("not from the package")
    package = tmp_path / "linked.deb"
    sound = gzip.compress((good / LABELS).read_bytes())
    link, folder_link = (f"{IMAGES}.gz", outside / f"{IMAGES}.gz"), ("usr/share/linked", outside)
    write_package(package, [(f"usr/share/{LABELS}.gz", sound), link, folder_link])
    assert listing(sources.unpack_package(package, list(FILES), workdir)) == [f"{LABELS}.gz"]
    assert {path.read_text() for path in outside.iterdir()} == {"not from the package"}


@needs_dpkg
@pytest.mark.parametrize("name", ["../../escaped.gz", "usr/../../../escaped.gz", "{above}/escaped.gz"])
def test_a_package_cannot_write_outside_its_folder(tmp_path: Path, workdir: Path, name: str) -> None:
    package = tmp_path / "climbing.deb"
    write_package(package, [(name.format(above=tmp_path / "above"), b"not from here")])
    with contextlib.suppress(SourceFailed):
        assert listing(sources.unpack_package(package, list(FILES), workdir)) == []
    assert not [path for path in tmp_path.rglob("escaped.gz") if workdir not in path.parents]


@needs_dpkg
def test_a_file_that_is_no_package_is_a_reason(good: Path, workdir: Path) -> None:
    with pytest.raises(SourceFailed, match=r"dpkg-deb failed: .*not a Debian format archive"):
        sources.unpack_package(good / LABELS, list(FILES), workdir)


# torchvision


def test_torchvision_that_has_the_files_gives_their_folder(
    data_dir: Path, good: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert sources.torchvision_download(list(FILES), data_dir) == good
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize(("silent", "reason"), [(True, "timed out"), (False, "refused")])
def test_a_dead_mirror_fails_soon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], silent: bool, reason: str
) -> None:
    """The mirror is behind a proxy that accepts and sends nothing, or behind one that is not there."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.delenv("NO_PROXY", raising=False)
        monkeypatch.setattr(urllib.request, "_opener", None)  # urllib reads the proxies once in a process
        if not silent:
            server.close()
        start = time.monotonic()
        with pytest.raises(SourceFailed, match=reason) as caught:
            sources.torchvision_download(list(FILES), tmp_path, timeout=0.3)
    assert time.monotonic() - start < 5
    assert "\n" not in str(caught.value)
    assert socket.getdefaulttimeout() is None
    assert capfd.readouterr().out == ""


# Programs, and apt-get


@needs_shell
@pytest.mark.parametrize(
    ("command", "reason"),
    [
        (["sh", "-c", "printf 'W: first\\nE: second\\n' >&2; exit 100"], "sh failed: E: second"),
        (["sh", "-c", "exit 3"], "sh failed: exit status 3"),
        (["apt-got", "update"], "there is no apt-got on this machine"),
    ],
    ids=["complains", "fails", "is not there"],
)
def test_a_program_that_does_not_succeed_is_a_reason(command: list[str], reason: str) -> None:
    with pytest.raises(SourceFailed, match=reason):
        sources.run_program(command)


@needs_shell
def test_a_program_that_hangs_is_given_up_though_its_child_holds_the_output_open() -> None:
    start = time.monotonic()
    with pytest.raises(SourceFailed, match=r"sh took more than 0\.2 s"):
        sources.run_program(["sh", "-c", "sleep 5 & wait"], timeout=0.2)
    assert time.monotonic() - start < 3


@needs_apt
def test_apt_get_without_a_sound_repository_is_a_reason(
    tmp_path: Path, workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source_list = tmp_path / "sources.list"
    source_list.write_text(BROKEN_REPOSITORY)
    (tmp_path / "apt.conf").write_text(f'Dir::Etc::sourcelist "{source_list}";\nDir::Etc::sourceparts "/dev/null";\n')
    monkeypatch.setenv("APT_CONFIG", str(tmp_path / "apt.conf"))
    missing = "Unable to locate package|Can't find a source"  # the second where the package is installed
    with pytest.raises(SourceFailed, match=rf"does not have a Release file.*; then .*({missing})"):
        sources.downloaded_package([LABELS], workdir)


@pytest.mark.network
@needs_apt
@pytest.mark.extended
def test_apt_get_fetches_the_package_and_changes_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A broken repository beside the machine's own, a hook of the machine, and a folder with an awkward name."""
    own_sources = Path("/etc/apt/sources.list")
    source_list = tmp_path / "sources.list"
    source_list.write_text(
        (own_sources.read_text(encoding="utf-8") if own_sources.exists() else "") + "\n" + BROKEN_REPOSITORY
    )
    hook = tmp_path / "the hook ran"
    (tmp_path / "apt.conf").write_text(
        f'Dir::Etc::sourcelist "{source_list}";\nAPT::Update::Post-Invoke {{ "touch \'{hook}\'"; }};\n'
    )
    monkeypatch.setenv("APT_CONFIG", str(tmp_path / "apt.conf"))
    system = [Path("/var/lib/apt/lists"), Path("/var/lib/apt/lists/partial"), Path("/var/cache/apt/archives")]
    before = [folder.stat().st_mtime_ns for folder in system]

    messages: list[str] = []
    data_dir = tmp_path / 'a "data" folder, really'
    data = load_fashion_mnist(data_dir, messages.append, [Source("apt", sources.downloaded_package)])
    assert messages[1:] == [f"Fashion-MNIST: {', '.join(FILES)} taken from apt"]
    assert listing(data_dir) == COMPLETE
    assert np.bincount(data.train_labels).tolist() == [6_000] * 10
    assert capfd.readouterr() == ("", "")
    assert not hook.exists()
    assert [folder.stat().st_mtime_ns for folder in system] == before


# In processes of their own: fetching at the same time, and being killed


def output_of(process: subprocess.Popen[str]) -> str:
    """Wait for a process to succeed, and return its output."""
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    return output


# Arguments: the data folder, the good files, a file that the source makes when it is asked, a file that it waits for,
# and what the kernel does after a million bytes of a file: "kill" the process, "refuse" the rest, or "nothing".
PREPARE = """if True:
    import resource, shutil, signal, sys, time
    from pathlib import Path
    from jax_cnn.config import UserError
    from jax_cnn.data import prepare_fashion_mnist
    from jax_cnn.data.sources import Source

    data_dir, good, asked, go_on = map(Path, sys.argv[1:5])
    if sys.argv[5] != "nothing":
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL if sys.argv[5] == "kill" else signal.SIG_IGN)

    def fetch(names, workdir):
        shutil.copy(good / names[-1], workdir)
        with asked.open("a") as file:
            file.write("asked\\n")
        while not go_on.exists():
            time.sleep(0.01)
        for name in names[:-1]:
            (workdir / name).symlink_to(good / name)
        return workdir

    try:
        prepare_fashion_mnist(data_dir, lambda line: print(line, flush=True), [Source("the slow one", fetch)])
    except UserError as error:
        print(error)
"""


def test_one_of_two_processes_fetches_and_the_other_waits(good: Path, tmp_path: Path) -> None:
    data_dir, asked, go_on = tmp_path / "data", tmp_path / "asked", tmp_path / "go on"
    first = start_python(PREPARE, data_dir, good, asked, go_on, "nothing")
    wait_until(asked.exists)
    second = start_python(PREPARE, data_dir, good, asked, go_on, "nothing")
    assert second.stdout is not None
    assert "waiting for another process" in second.stdout.readline()
    go_on.touch()
    assert output_of(first).endswith(f"Fashion-MNIST: {', '.join(FILES)} taken from the slow one\n")
    assert output_of(second) == ""
    assert asked.read_text() == "asked\n"
    assert listing(data_dir) == COMPLETE


def test_a_process_killed_while_it_fetches_leaves_no_lock_and_no_half_file(good: Path, tmp_path: Path) -> None:
    data_dir, asked = tmp_path / "data", tmp_path / "asked"
    process = start_python(PREPARE, data_dir, good, asked, tmp_path / "never", "nothing")
    wait_until(asked.exists)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert listing(data_dir / "FashionMNIST" / "raw") == []
    assert (data_dir / ".fashion_mnist.partial").exists(), "nothing was left for the next run to clear"
    load_fashion_mnist(data_dir, lambda line: None, [Source("the shelf", lambda names, workdir: good)])
    assert listing(data_dir) == COMPLETE


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="no limit on file sizes here")
@pytest.mark.parametrize("reaction", ["kill", "refuse"])
def test_a_write_cut_short_leaves_no_half_file(good: Path, tmp_path: Path, reaction: str) -> None:
    """After a million bytes of a file the kernel kills the process, or refuses the rest as it does on a full disk."""
    data_dir = tmp_path / "data"
    process = start_python(PREPARE, data_dir, good, tmp_path / "asked", tmp_path, reaction)
    output, errors = process.communicate(timeout=60)
    files = listing(data_dir / "FashionMNIST" / "raw")
    if reaction == "kill":
        assert process.returncode == -signal.SIGXFSZ, errors
        assert len(files) == 1
        assert not set(files) & set(FILES)
    else:
        assert "cannot be put there" in output, errors
        assert "File too large" in output
        assert files == []
    prepare_fashion_mnist(data_dir, lambda line: None, [Source("the shelf", lambda names, workdir: good)])
    assert listing(data_dir) == COMPLETE

"""Where Fashion-MNIST comes from: a package, torchvision, apt; dead mirrors, and packages that want out of a folder.

Everything here is real: a real dpkg database, real packages, sockets and programs.
"""

import contextlib
import gzip
import io
import os
import shutil
import socket
import subprocess
import tarfile
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from jax_cnn import data_sources
from jax_cnn.data import FILES, load_fashion_mnist
from jax_cnn.data_sources import SOURCES, Source, SourceFailed
from parity_tests.data.data_files import IMAGES, LABELS, SETTLED, listing


def test_the_sources_are_tried_from_the_nearest_to_the_farthest() -> None:
    """What is on the machine first; what needs apt last."""
    assert [source.fetch for source in SOURCES] == [
        data_sources.installed_package,
        data_sources.torchvision_download,
        data_sources.downloaded_package,
    ]


@pytest.mark.skipif(shutil.which("dpkg") is None, reason="not a Debian")
def test_the_installed_package_is_found(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a real dpkg, in a database of our own."""
    monkeypatch.setenv("DPKG_ADMINDIR", str(tmp_path / "dpkg"))
    (tmp_path / "dpkg" / "info").mkdir(parents=True)
    (tmp_path / "dpkg" / "updates").mkdir()
    (tmp_path / "dpkg" / "status").write_text("")
    with pytest.raises(SourceFailed, match="'dataset-fashion-mnist' is not installed"):
        data_sources.installed_package([LABELS], tmp_path)

    packed = tmp_path / "usr share" / "datasets" / f"{LABELS}.gz"
    packed.parent.mkdir(parents=True)
    packed.write_bytes(gzip.compress((good / LABELS).read_bytes()))
    (tmp_path / "dpkg" / "status").write_text(
        "Package: dataset-fashion-mnist\nStatus: install ok installed\nMaintainer: nobody\n"
        "Architecture: all\nVersion: 1\nDescription: none\n"
    )
    owned = [path for path in reversed(packed.parents) if path != Path("/")]
    owned_list = tmp_path / "dpkg" / "info" / "dataset-fashion-mnist.list"
    owned_list.write_text("".join(f"{path}\n" for path in ["/.", *owned, packed]))
    assert data_sources.installed_package([IMAGES, LABELS], tmp_path) == packed.parent
    with pytest.raises(SourceFailed, match="none of the files"):
        data_sources.installed_package([IMAGES], tmp_path)


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="not a Debian")
def test_a_package_cannot_lead_out_of_the_folder(good: Path, tmp_path: Path) -> None:
    """A link to a file and a link to a folder, in a real package, next to a sound file."""
    outside = tmp_path / "outside"
    outside.mkdir()
    for name in FILES:
        (outside / f"{name}.gz").write_text("not from the package")
    tree, workdir = tmp_path / "tree", tmp_path / "work"
    folder = tree / "usr" / "share" / "datasets"
    folder.mkdir(parents=True)
    workdir.mkdir()
    (folder / f"{LABELS}.gz").write_bytes(gzip.compress((good / LABELS).read_bytes()))
    (folder / f"{IMAGES}.gz").symlink_to(outside / f"{IMAGES}.gz")
    (folder / "linked").symlink_to(outside)
    (tree / "DEBIAN").mkdir()
    (tree / "DEBIAN" / "control").write_text(
        "Package: linked\nVersion: 1\nArchitecture: all\nMaintainer: nobody <nobody@localhost>\nDescription: none\n"
    )
    package = tmp_path / "linked.deb"
    subprocess.run(["dpkg-deb", "-b", tree, package], check=True, capture_output=True)
    picked = data_sources.unpack_package(package, list(FILES), workdir)
    assert listing(picked) == [f"{LABELS}.gz"]
    assert {path.read_text() for path in outside.iterdir()} == {"not from the package"}
    with pytest.raises(SourceFailed, match=r"dpkg-deb failed: .*not a Debian format archive"):
        data_sources.unpack_package(good / LABELS, list(FILES), workdir)


def archive(kind: str, name: str, content: bytes) -> bytes:
    """A tar of one file with this name, whatever it is, as a member `kind` of an ar archive."""
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as file:
        member = tarfile.TarInfo(name)
        member.size = len(content)
        file.addfile(member, io.BytesIO(content))
    return f"{kind:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(tar.getvalue()):<10}`\n".encode() + tar.getvalue()


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="not a Debian")
@pytest.mark.parametrize("way_out", ["../../escaped.gz", "usr/../../../escaped.gz", "{outside}/escaped.gz"])
def test_a_package_cannot_write_outside_its_folder(tmp_path: Path, way_out: str) -> None:
    """Whose files are named after places elsewhere; dpkg-deb makes none such."""
    outside, workdir = tmp_path / "outside", tmp_path / "outside" / "deep" / "work"
    workdir.mkdir(parents=True)
    package = tmp_path / "climbing.deb"
    package.write_bytes(
        b"!<arch>\n"
        + f"{'debian-binary':<16}{0:<12}{0:<6}{0:<6}{100644:<8}{4:<10}`\n2.0\n".encode()
        + archive("control.tar", "./control", b"Package: climbing\nVersion: 1\n")
        + archive("data.tar", way_out.format(outside=outside), b"not from here")
    )
    with contextlib.suppress(SourceFailed):
        assert listing(data_sources.unpack_package(package, list(FILES), workdir)) == []
    escaped = [path for path in tmp_path.rglob("escaped.gz") if workdir not in path.parents]
    assert not escaped


def test_torchvision_that_has_the_files_gives_their_folder(
    data_dir: Path, good: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The end of a download that succeeded, without the network."""
    assert data_sources.torchvision_download(list(FILES), data_dir) == good
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("silent", [True, False])
def test_a_dead_mirror_fails_soon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], silent: bool
) -> None:
    """A proxy that accepts and says nothing, and one that is not there: real sockets, refused by no network."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.delenv("NO_PROXY", raising=False)
        # urllib reads the proxies once in a process: forget what an earlier test's download has read, and then this.
        monkeypatch.setattr(urllib.request, "_opener", None)
        if not silent:
            server.close()
        start = time.monotonic()
        with pytest.raises(SourceFailed, match="timed out" if silent else "refused") as caught:
            data_sources.torchvision_download(list(FILES), tmp_path, timeout=0.3)
    assert time.monotonic() - start < 5
    assert "\n" not in str(caught.value)
    assert socket.getdefaulttimeout() is None
    assert capfd.readouterr().out == ""


@pytest.mark.skipif(os.name != "posix", reason="needs a POSIX shell")
def test_a_program_that_hangs_or_fails_or_is_not_there_is_a_reason(tmp_path: Path) -> None:
    """Even if it leaves a child behind that holds its output open."""
    start = time.monotonic()
    with pytest.raises(SourceFailed, match=r"sh took more than 0\.2 s"):
        data_sources._run(["sh", "-c", "sleep 5 & wait"], timeout=0.2)
    assert time.monotonic() - start < 3
    with pytest.raises(SourceFailed, match="sh failed: E: second"):
        data_sources._run(["sh", "-c", "printf 'W: first\\nE: second\\n' >&2; exit 100"])
    with pytest.raises(SourceFailed, match="sh failed: exit status 3"):
        data_sources._run(["sh", "-c", "exit 3"])
    with pytest.raises(SourceFailed, match="there is no apt-got on this machine"):
        data_sources._run(["apt-got", "update"])


@pytest.mark.skipif(shutil.which("apt-get") is None, reason="not a Debian")
def test_apt_get_without_a_repository_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real apt-get that is told of no repository but a broken one."""
    sources = tmp_path / "sources.list"
    sources.write_text("deb file:/nowhere/at/all nowhere main\n")
    (tmp_path / "apt.conf").write_text(f'Dir::Etc::sourcelist "{sources}";\nDir::Etc::sourceparts "/dev/null";\n')
    monkeypatch.setenv("APT_CONFIG", str(tmp_path / "apt.conf"))
    workdir = tmp_path / "work"
    workdir.mkdir()
    with pytest.raises(SourceFailed, match=r"does not have a Release file.*; then .*Unable to locate package"):
        data_sources.downloaded_package([LABELS], workdir)


@pytest.mark.network
@pytest.mark.skipif(shutil.which("apt-get") is None, reason="not a Debian")
def test_the_package_is_fetched_by_apt_get(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """From the machine's repositories, one of them broken, into a folder with an awkward name; nothing else moves."""
    own_sources = Path("/etc/apt/sources.list")
    sources = tmp_path / "sources.list"
    broken = "deb file:/nowhere/at/all nowhere main\n"
    sources.write_text((own_sources.read_text() if own_sources.exists() else "") + "\n" + broken)
    hook = tmp_path / "the hook ran"
    (tmp_path / "apt.conf").write_text(
        f'Dir::Etc::sourcelist "{sources}";\nAPT::Update::Post-Invoke {{ "touch \'{hook}\'"; }};\n'
    )
    monkeypatch.setenv("APT_CONFIG", str(tmp_path / "apt.conf"))
    system = [Path("/var/lib/apt/lists"), Path("/var/lib/apt/lists/partial"), Path("/var/cache/apt/archives")]
    before = [folder.stat().st_mtime_ns for folder in system]

    said: list[str] = []
    data_dir = tmp_path / 'a "data" folder, really'
    data = load_fashion_mnist(data_dir, said.append, [Source("apt", data_sources.downloaded_package)])
    assert said[1:] == [f"Fashion-MNIST: {', '.join(FILES)} taken from apt"]
    assert listing(data_dir) == sorted(SETTLED)
    assert np.bincount(data.train_labels).tolist() == [6_000] * 10
    assert capfd.readouterr() == ("", "")
    assert not hook.exists()
    assert [folder.stat().st_mtime_ns for folder in system] == before

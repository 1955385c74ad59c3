"""Fashion-MNIST: the very arrays that torchvision gives, from any source, through damage, bombs, races and kills.

Everything here is real: real files, and real processes that are really killed.
"""

import gzip
import os
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from jax_cnn.config import UserError
from jax_cnn.data import CLASS_NAMES, FILES, _read_files, decode_idx, load_fashion_mnist, prepare_fashion_mnist
from jax_cnn.data_sources import Source, SourceFailed
from parity_tests.data.data_files import IMAGES, LABELS, SETTLED, listing
from parity_tests.support import ROOT


@pytest.fixture
def shelf(good: Path) -> Source:
    """A source that always works."""
    return Source("the shelf", lambda names, workdir: good)


@pytest.fixture
def raw(good: Path, tmp_path: Path) -> Path:
    """The raw folder of the data folder ``tmp_path / 'data'``, with hard links to the four real files."""
    folder = tmp_path / "data" / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    for name in FILES:
        try:
            os.link(good / name, folder / name)
        except OSError:  # the temporary folder lies on another disk
            shutil.copyfile(good / name, folder / name)
    return folder


def replace(path: Path, content: bytes) -> None:
    """Writes a file anew: writing into a hard link would damage the real one."""
    path.unlink(missing_ok=True)
    path.write_bytes(content)


def python(code: str, *arguments: object) -> subprocess.Popen[str]:
    """Starts a Python of its own, in the repository."""
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def output_of(process: subprocess.Popen[str]) -> str:
    """What a process printed, once it has ended well."""
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    return output


def wait_for(path: Path) -> None:
    """Returns as soon as the path exists."""
    deadline = time.monotonic() + 30
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} never came"
        time.sleep(0.01)


def never(names: Sequence[str], workdir: Path) -> Path:
    """A source that must not be asked."""
    raise AssertionError(f"asked for {names}")


# What is loaded


def test_arrays_are_torchvisions(data_dir: Path) -> None:
    """Pixel for pixel and label for label, in the same order."""
    from torchvision.datasets import FashionMNIST

    data = load_fashion_mnist(data_dir, sources=[Source("none", never)])
    for train, images, labels in (
        (True, data.train_images, data.train_labels),
        (False, data.test_images, data.test_labels),
    ):
        theirs = FashionMNIST(root=data_dir, train=train, download=False)
        assert images.dtype == labels.dtype == np.uint8
        assert images.shape == ((60_000 if train else 10_000), 28, 28)
        np.testing.assert_array_equal(images, theirs.data.numpy(), strict=True)
        np.testing.assert_array_equal(labels, theirs.targets.numpy())  # theirs are int64
        assert not images.flags.writeable
        assert tuple(theirs.classes) == CLASS_NAMES


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"\0\0\x0d\x01\0\0\0\x01\0\0\0\0", "not an IDX file of unsigned bytes"),
        (b"", "not an IDX file"),
        (b"\0\0\x08\x01\0\0\0\x05abc", "reshape"),
    ],
    ids=["float32", "empty", "short"],
)
def test_idx_reader_refuses_what_it_cannot_read(content: bytes, complaint: str) -> None:
    """Another type would be misread as bytes, a short file as another shape."""
    with pytest.raises(ValueError, match=complaint):
        decode_idx(content)


def test_importing_and_loading_stay_light(data_dir: Path) -> None:
    """Neither torch nor JAX is loaded to read four files that are there."""
    code = """if True:
        import sys
        from pathlib import Path
        from jax_cnn.data import CLASS_NAMES, _read_files, decode_idx, load_fashion_mnist, prepare_fashion_mnist
        heavy = {"torch", "torchvision", "jax", "jaxlib"}
        assert not heavy & set(sys.modules), "by the import"
        data = load_fashion_mnist(Path(sys.argv[1]))
        assert not heavy & set(sys.modules), "by load"
        print(len(data.train_labels))
    """
    assert output_of(python(code, data_dir)) == "60000\n"


# What is on disk


def test_gzip_files_in_the_data_folder_are_unpacked(raw: Path, good: Path) -> None:
    """As a person puts them there; their own files stay."""
    (raw / LABELS).unlink()
    (raw / f"{LABELS}.gz").write_bytes(gzip.compress((good / LABELS).read_bytes()))
    said: list[str] = []
    data = load_fashion_mnist(raw.parents[1], said.append, sources=[Source("none", never)])
    assert said[-1] == f"Fashion-MNIST: {LABELS} taken from the data folder {raw}"
    assert (raw / LABELS).read_bytes() == (good / LABELS).read_bytes()
    assert (raw / LABELS).read_bytes().endswith(data.test_labels.tobytes())
    assert (raw / f"{LABELS}.gz").exists()


def damages(sound: bytes) -> dict[str, bytes]:
    """Ways for a file to go wrong."""
    middle = len(sound) // 2
    return {
        "one flipped bit": sound[:middle] + bytes([sound[middle] ^ 1]) + sound[middle + 1 :],
        "truncated": sound[:-1],
        "longer": sound + b"\0",
        "empty": b"",
    }


@pytest.mark.parametrize("damage", damages(b"any"))
@pytest.mark.parametrize("name", [IMAGES, LABELS])
def test_a_damaged_file_is_named_and_replaced(raw: Path, good: Path, shelf: Source, name: str, damage: str) -> None:
    """From the first source that has a sound one; the sound files are left alone."""
    sound = (good / name).read_bytes()
    replace(raw / name, damages(sound)[damage])
    before = {other: (raw / other).stat().st_ino for other in FILES if other != name}
    broken = Source("a source of the same damage", lambda names, workdir: raw)
    said: list[str] = []
    data = load_fashion_mnist(raw.parents[1], said.append, sources=[broken, shelf, Source("none", never)])
    assert len(said) == 2
    assert f"fetching what {raw} lacks, which can take minutes (damaged" in said[0]
    assert said[0].endswith(f": {name})")
    assert said[1] == f"Fashion-MNIST: {name} taken from the shelf"
    assert sound.endswith((data.test_images if name == IMAGES else data.test_labels).tobytes())
    assert (raw / name).read_bytes() == sound
    assert {other: (raw / other).stat().st_ino for other in before} == before
    assert listing(raw.parents[1]) == sorted(SETTLED)


def test_each_missing_file_comes_from_the_first_source_that_has_it(good: Path, tmp_path: Path) -> None:
    """Two sources with half of the files each, one of them packed."""
    names = list(FILES)
    halves = [tmp_path / "images", tmp_path / "labels"]
    for half, half_of_names in zip(halves, (names[0::2], names[1::2]), strict=True):
        half.mkdir()
        for name in half_of_names:
            (half / name).symlink_to(good / name)
    packed = halves[1] / f"{LABELS}.gz"
    packed.write_bytes(gzip.compress((halves[1] / LABELS).read_bytes()))
    (halves[1] / LABELS).unlink()
    asked: list[Sequence[str]] = []

    def labels(names: Sequence[str], workdir: Path) -> Path:
        asked.append(names)
        return halves[1]

    said: list[str] = []
    sources = [Source("images", lambda names, workdir: halves[0]), Source("labels", labels), Source("none", never)]
    assert prepare_fashion_mnist(tmp_path / "data", said.append, sources) == tmp_path / "data" / "FashionMNIST" / "raw"
    assert asked == [names[1::2]]
    assert [line.split(" taken from ")[1] for line in said[1:]] == ["images", "labels"]
    assert listing(tmp_path / "data") == sorted(SETTLED)


def test_without_a_source_the_error_says_all_of_it(raw: Path, good: Path) -> None:
    """What is wrong, each source and its reason, and how to put the files there by hand."""
    replace(raw / LABELS, (good / LABELS).read_bytes()[:-1])
    (raw / IMAGES).unlink()

    def fails(names: Sequence[str], workdir: Path) -> Path:
        raise SourceFailed("the well is dry")

    sources = [Source("the well", fails), Source("the ditch", lambda names, workdir: workdir)]
    with pytest.raises(UserError) as caught:
        load_fashion_mnist(raw.parents[1], lambda line: None, sources)
    wrong = f"missing: {IMAGES}; damaged (10007 bytes, not 10008): {LABELS}"
    assert str(caught.value).splitlines() == [
        f"Fashion-MNIST is not in {raw} ({wrong}).",
        "Tried:",
        f"  1. the data folder {raw}: {wrong}",
        "  2. the well: the well is dry",
        f"  3. the ditch: missing: {IMAGES}, {LABELS}",
        f"To supply the data by hand, put these four files, each as it is or as .gz, in {raw}:",
        f"  {', '.join(FILES)}",
    ]


def test_a_gzip_bomb_fills_neither_memory_nor_disk(raw: Path) -> None:
    """4 GiB of zeros in 4 MB: the reader stops one byte after the size that the file should have."""
    (raw / LABELS).unlink()
    (raw / f"{LABELS}.gz").write_bytes(gzip.compress(bytes(2**24)) * 256)
    bomb = Source("the bomb", lambda names, workdir: raw)
    tracemalloc.start()
    try:
        contents, problems = _read_files(raw, [LABELS], [".gz"])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (contents, problems) == ({}, {LABELS: "damaged (more bytes, not 10008)"})
    assert peak < 2**20, f"{peak} bytes to refuse a file of 10,008"
    with pytest.raises(UserError, match="damaged"):
        prepare_fashion_mnist(raw.parents[1], lambda line: None, [bomb])
    assert not (raw / LABELS).exists()


@pytest.mark.parametrize("ending", [b"", b"garbage", b"\0" * 8], ids=["truncated", "not gzip", "bad checksum"])
def test_a_broken_gzip_file_is_damage_and_no_crash(raw: Path, good: Path, ending: bytes) -> None:
    """Whatever the gzip reader raises for it."""
    packed = gzip.compress((good / LABELS).read_bytes())
    content = ending if ending == b"garbage" else packed[:-8] + ending
    (raw / f"{LABELS}.gz").write_bytes(content)
    assert "not a sound .gz file" in _read_files(raw, [LABELS], [".gz"])[1][LABELS]


# Folders that cannot be written to


def test_a_complete_folder_is_only_read(raw: Path) -> None:
    """So a read-only one will do: no lock, no temporary file, nothing touched."""
    data_dir = raw.parents[1]
    folders = (data_dir, raw.parent, raw)
    before = listing(data_dir), [folder.stat().st_mtime_ns for folder in folders]
    prepare_fashion_mnist(data_dir, pytest.fail)
    load_fashion_mnist(data_dir, pytest.fail)
    assert (listing(data_dir), [folder.stat().st_mtime_ns for folder in folders]) == before


AS_NOBODY = """if True:
    import os, sys
    from pathlib import Path
    from jax_cnn.data import CLASS_NAMES, _read_files, decode_idx, load_fashion_mnist, prepare_fashion_mnist
    from jax_cnn.config import UserError
    os.chdir(sys.argv[1])
    if os.geteuid() == 0:  # root may write anywhere
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
    try:
        prepare_fashion_mnist(Path("data"), print, [])
        print("done")
    except UserError as error:
        print(error)
"""


@pytest.mark.skipif(os.name != "posix", reason="POSIX permissions")
def test_a_read_only_folder_works_when_complete_and_is_named_when_not(raw: Path, tmp_path: Path) -> None:
    """In a process without root's powers."""
    tmp_path.chmod(0o755)
    folders = (raw, raw.parent, raw.parents[1])
    try:
        for folder in folders:
            folder.chmod(0o555)
        assert output_of(python(AS_NOBODY, tmp_path)) == "done\n"
        raw.chmod(0o755)
        (raw / LABELS).unlink()
        raw.chmod(0o555)
        (message,) = output_of(python(AS_NOBODY, tmp_path)).splitlines()
    finally:
        for folder in folders:
            folder.chmod(0o755)
    assert f"Fashion-MNIST is not in data/FashionMNIST/raw (missing: {LABELS})" in message
    assert "Permission denied" in message
    assert "give a data folder that can be written to" in message


def test_a_data_folder_that_is_a_file_is_one_line(tmp_path: Path, shelf: Source) -> None:
    """And the file stays what it was."""
    path = tmp_path / "data"
    path.write_text("a file")
    with pytest.raises(UserError) as caught:
        prepare_fashion_mnist(path, pytest.fail, [shelf])
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    assert path.read_text() == "a file"


# Races and deaths

# Its arguments: the data folder, the good files, the file that it makes when it is asked, the file that lets it go on.
SLOW_SOURCE = """if True:
    import resource, shutil, signal, sys, time
    from pathlib import Path
    from jax_cnn.data import CLASS_NAMES, _read_files, decode_idx, load_fashion_mnist, prepare_fashion_mnist
    from jax_cnn.data_sources import Source

    data_dir, good, asked, go_on = map(Path, sys.argv[1:5])

    def slow(names, workdir):
        shutil.copy(good / names[-1], workdir)
        with asked.open("a") as file:
            file.write("asked\\n")
        while not go_on.exists():
            time.sleep(0.01)
        for name in names[:-1]:
            (workdir / name).symlink_to(good / name)
        return workdir

    def prepare():
        prepare_fashion_mnist(data_dir, lambda line: print(line, flush=True), [Source("the slow one", slow)])
"""


def test_two_processes_at_once_fetch_it_once(good: Path, tmp_path: Path) -> None:
    """The second waits, says so, and finds the files there."""
    data_dir, asked, go_on = tmp_path / "data", tmp_path / "asked", tmp_path / "go on"
    first = python(SLOW_SOURCE + "    prepare()", data_dir, good, asked, go_on)
    wait_for(asked)
    second = python(SLOW_SOURCE + "    prepare()", data_dir, good, asked, go_on)
    assert second.stdout is not None
    assert "waiting for another process" in second.stdout.readline()
    go_on.touch()
    assert output_of(first).endswith(f"Fashion-MNIST: {', '.join(FILES)} taken from the slow one\n")
    assert output_of(second) == ""
    assert asked.read_text() == "asked\n"
    assert listing(data_dir) == sorted(SETTLED)


def test_a_process_killed_while_it_fetches_leaves_no_half_file(good: Path, shelf: Source, tmp_path: Path) -> None:
    """And the lock dies with it: the next run succeeds at once and clears what was left."""
    data_dir, asked = tmp_path / "data", tmp_path / "asked"
    process = python(SLOW_SOURCE + "    prepare()", data_dir, good, asked, tmp_path / "never")
    wait_for(asked)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert listing(data_dir / "FashionMNIST" / "raw") == []
    assert (data_dir / ".fashion_mnist.partial").exists(), "nothing was left to clear: the test is too kind"
    load_fashion_mnist(data_dir, lambda line: None, [shelf])
    assert listing(data_dir) == sorted(SETTLED)


LIMITED = """
    from jax_cnn.config import UserError
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL if sys.argv[5] == "deadly" else signal.SIG_IGN)
    try:
        prepare()
    except UserError as error:
        print(error)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="no limit on file sizes here")
@pytest.mark.parametrize("deadly", [True, False], ids=["killed", "refused"])
def test_a_write_cut_short_leaves_no_half_file(good: Path, shelf: Source, tmp_path: Path, deadly: bool) -> None:
    """At its millionth byte the kernel kills the process, or refuses the rest as it does on a full disk."""
    data_dir = tmp_path / "data"
    raw = data_dir / "FashionMNIST" / "raw"
    how = "deadly" if deadly else "refused"
    process = python(SLOW_SOURCE + LIMITED, data_dir, good, tmp_path / "asked", tmp_path, how)
    output, errors = process.communicate(timeout=60)
    if deadly:
        assert process.returncode == -signal.SIGXFSZ, errors
        assert listing(raw) == [".train-images-idx3-ubyte.partial"]
    else:
        assert "cannot be put there" in output, errors
        assert "File too large" in output
        assert listing(raw) == []
    prepare_fashion_mnist(data_dir, lambda line: None, [shelf])
    assert listing(data_dir) == sorted(SETTLED)

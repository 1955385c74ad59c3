"""Loading Fashion-MNIST: the same arrays as torchvision's, from any source, and never from a damaged file."""

import gzip
import hashlib
import os
import re
import shutil
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from torchvision import datasets

from jax_cnn.config import TRAIN_SIZE, UserError
from jax_cnn.data import (
    CLASS_NAMES,
    decode_idx,
    epoch_order,
    load_fashion_mnist,
    other_files,
    prepare_fashion_mnist,
    split_batches,
)
from jax_cnn.data.files import FILES, read_files
from jax_cnn.data.sources import Source, SourceFailed
from parity_tests.support import COMPLETE, IMAGES, LABELS, listing

UNASKED = Source("unasked", lambda names, workdir: pytest.fail(f"asked for {names}"))


@pytest.fixture
def raw(good: Path, tmp_path: Path) -> Path:
    """Return the raw folder of the data folder `tmp_path / "data"`, with hard links to the four real files."""
    folder = tmp_path / "data" / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    for name in FILES:
        try:
            os.link(good / name, folder / name)
        except OSError:  # the temporary folder lies on another disk
            shutil.copyfile(good / name, folder / name)
    return folder


# What is loaded


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"\0\0\x0d\x01\0\0\0\x01\0\0\0\0", "not an IDX file of unsigned bytes"),
        (b"", "not an IDX file"),
        (b"\0\0\x08\x01\0\0\0\x05abc", "reshape"),
    ],
    ids=["float32", "empty", "short"],
)
def test_decode_idx_refuses_another_type_or_length(content: bytes, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        decode_idx(content)


# Where it is loaded from


@pytest.mark.parametrize("place", ["FashionMNIST/raw", "raw", "FashionMNIST", "."])
def test_files_are_read_where_they_lie_packed_or_not_and_torchvision_reads_them_too(
    raw: Path, good: Path, tmp_path: Path, place: str
) -> None:
    folder = tmp_path / "data of a course" / place
    folder.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(raw, folder, copy_function=os.link, dirs_exist_ok=True)
    (folder / LABELS).unlink()
    (folder / f"{LABELS}.gz").write_bytes(gzip.compress((good / LABELS).read_bytes()))
    (folder / IMAGES).rename(folder / "t10k-images.idx3-ubyte.gz")  # which a browser has unpacked
    replace(folder / "train-labels-idx1-ubyte", gzip.compress((good / "train-labels-idx1-ubyte").read_bytes()))
    folders = [path for path in (tmp_path, *tmp_path.rglob("*")) if path.is_dir()]
    before = listing(tmp_path), [path.stat().st_mtime_ns for path in folders]
    data = load_fashion_mnist(tmp_path / "data of a course", pytest.fail, [UNASKED])
    assert (good / LABELS).read_bytes().endswith(data.test_labels.tobytes())
    root = prepare_fashion_mnist(tmp_path / "data of a course", pytest.fail, [UNASKED])
    for train, images, labels in (
        (True, data.train_images, data.train_labels),
        (False, data.test_images, data.test_labels),
    ):
        of_torchvision = datasets.FashionMNIST(root, train=train)
        np.testing.assert_array_equal(images, of_torchvision.data.numpy(), strict=True)  # uint8
        np.testing.assert_array_equal(labels, of_torchvision.targets.numpy())  # these are int64
        assert labels.dtype == np.uint8
        assert not images.flags.writeable
        assert tuple(of_torchvision.classes) == CLASS_NAMES
    assert (listing(tmp_path), [path.stat().st_mtime_ns for path in folders]) == before  # it was only read


def test_each_missing_file_comes_from_the_first_source_that_has_it(good: Path, tmp_path: Path) -> None:
    for kind in ("images", "labels"):
        (tmp_path / kind).mkdir()
    for name in FILES:
        if "images" in name:
            (tmp_path / "images" / name).symlink_to(good / name)
        else:
            (tmp_path / "labels" / f"{name}.gz").write_bytes(gzip.compress((good / name).read_bytes()))
    images = Source("images", lambda names, workdir: tmp_path / "images")
    labels = Source("labels", lambda names, workdir: tmp_path / "labels")
    messages: list[str] = []
    assert prepare_fashion_mnist(tmp_path / "data", messages.append, [images, labels, UNASKED]) == tmp_path / "data"
    for kind, message in zip(("images", "labels"), messages[1:], strict=True):
        names = ", ".join(name for name in FILES if kind in name)
        assert message == f"Fashion-MNIST: {names} taken from {kind}"
    assert listing(tmp_path / "data") == COMPLETE


# What is damaged, or nowhere


def replace(path: Path, content: bytes) -> None:
    """Write a file anew, because writing into a hard link would damage the real one."""
    path.unlink(missing_ok=True)
    path.write_bytes(content)


Damage = Callable[[bytes], bytes]
DAMAGES: dict[str, Damage] = {
    "one flipped bit in the header": lambda content: bytes([content[0] ^ 1]) + content[1:],
    "truncated": lambda content: content[:-1],
    "longer": lambda content: content + b"\0",
    "empty": lambda content: b"",
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("name", [IMAGES, LABELS])
def test_a_damaged_file_is_named_moved_aside_and_replaced(raw: Path, good: Path, name: str, damage: Damage) -> None:
    sound = (good / name).read_bytes()
    replace(raw / name, damage(sound))
    before = {other: (raw / other).stat().st_ino for other in FILES if other != name}
    shelf = Source("the shelf", lambda names, workdir: good)
    broken = Source("a source of the same damage", lambda names, workdir: raw)
    messages: list[str] = []
    data = load_fashion_mnist(raw.parents[1], messages.append, sources=[broken, shelf, UNASKED])
    start, aside, end = messages
    assert aside == f"Fashion-MNIST: the damaged file is now {raw / name}.damaged"
    assert (raw / f"{name}.damaged").read_bytes() == damage(sound)
    assert f"fetching what {raw} lacks, which can take minutes (damaged" in start
    assert start.endswith(f": {name})")
    assert end == f"Fashion-MNIST: {name} taken from the shelf"
    assert sound.endswith((data.test_images if name == IMAGES else data.test_labels).tobytes())
    assert (raw / name).read_bytes() == sound
    assert {other: (raw / other).stat().st_ino for other in before} == before
    assert listing(raw.parents[1]) == sorted([*COMPLETE, f"FashionMNIST/raw/{name}.damaged"])


def own_labels(good: Path) -> bytes:
    """Return a file of labels in which two are exchanged."""
    content = bytearray((good / LABELS).read_bytes())
    content[8:10] = content[9], content[8]
    return bytes(content)


@pytest.mark.parametrize("packed", [False, True])
def test_a_file_with_other_contents_is_refused_and_stays_or_is_taken_knowingly(
    raw: Path, good: Path, packed: bool
) -> None:
    own = own_labels(good)
    file = raw / (f"{LABELS}.gz" if packed else LABELS)
    replace(file, gzip.compress(own) if packed else own)
    if packed:
        (raw / LABELS).unlink()
    before = listing(raw), file.read_bytes()
    with pytest.raises(UserError, match=r"^\S+ is not the published file .* --any-data") as caught:
        load_fashion_mnist(raw.parents[1], pytest.fail, [UNASKED])
    assert str(caught.value).isprintable()
    data = load_fashion_mnist(raw.parents[1], pytest.fail, [UNASKED], any_data=True)
    assert own.endswith(data.test_labels.tobytes())
    assert other_files(raw.parents[1]) == {LABELS: hashlib.sha256(own).hexdigest()}
    assert (listing(raw), file.read_bytes()) == before


OTHER_SETS: dict[str, tuple[str, Damage, str]] = {
    "more classes": (
        LABELS,
        lambda content: content[:-1] + bytes([10]),
        "it has the label 10, and the classes are 0 to 9",
    ),
    "fewer labels": (
        LABELS,
        lambda content: content[:4] + (100).to_bytes(4) + content[8:108],
        "it holds (100,), and --any-data takes (10000,)",
    ),
    "more images": (
        IMAGES,
        lambda content: content[:4] + (20_000).to_bytes(4) + content[8:] + content[16:],
        "it holds (20000, 28, 28), and --any-data takes (10000, 28, 28)",
    ),
}


@pytest.mark.parametrize(("name", "change", "words"), OTHER_SETS.values(), ids=OTHER_SETS)
def test_a_sound_file_of_another_data_set_is_refused_and_stays(
    raw: Path, good: Path, name: str, change: Damage, words: str
) -> None:
    replace(raw / name, change((good / name).read_bytes()))
    before = listing(raw), (raw / name).read_bytes()
    with pytest.raises(UserError, match=re.escape(words)) as caught:
        load_fashion_mnist(raw.parents[1], pytest.fail, [UNASKED], any_data=True)
    assert str(caught.value).endswith(": move it away to get the published file")
    assert (listing(raw), (raw / name).read_bytes()) == before


PACKED_DAMAGES: dict[str, tuple[Damage, str]] = {
    "truncated": (lambda packed: packed[:-8], "damaged (not a sound .gz file"),
    "bad checksum": (lambda packed: packed[:-8] + bytes(8), "damaged (not a sound .gz file"),
    "not gzip": (lambda packed: b"garbage", "damaged (7 bytes, not 10008)"),
    "bomb of 4 GiB": (lambda packed: gzip.compress(bytes(2**24)) * 256, "damaged (more bytes, not 10008)"),
}


@pytest.mark.parametrize(("damage", "problem"), PACKED_DAMAGES.values(), ids=PACKED_DAMAGES)
def test_a_damaged_packed_file_is_refused_within_a_megabyte(raw: Path, damage: Damage, problem: str) -> None:
    (raw / f"{LABELS}.gz").write_bytes(damage(gzip.compress((raw / LABELS).read_bytes())))
    (raw / LABELS).unlink()
    tracemalloc.start()
    try:
        contents, problems = read_files(raw, [LABELS], [".gz", ""])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert contents == {}
    assert problems[LABELS].startswith(problem)
    assert peak < 2**20, f"{peak} bytes to refuse a file of 10,008"
    with pytest.raises(UserError, match="damaged"):
        prepare_fashion_mnist(raw.parents[1], lambda line: None, [])
    assert not (raw / LABELS).exists()


def test_without_a_source_the_error_lists_problems_sources_and_what_to_do(raw: Path, good: Path) -> None:
    replace(raw / LABELS, (good / LABELS).read_bytes()[:-1])
    (raw / IMAGES).unlink()

    def fail(names: Sequence[str], workdir: Path) -> Path:
        raise SourceFailed("the well is dry")

    sources = [Source("the well", fail), Source("the ditch", lambda names, workdir: workdir)]
    with pytest.raises(UserError) as caught:
        load_fashion_mnist(raw.parents[1], lambda line: None, sources)
    problems = f"missing: {IMAGES}; damaged (10007 bytes, not 10008): {LABELS}"
    assert str(caught.value).splitlines() == [
        f"Fashion-MNIST is not in {raw} ({problems}).",
        "Tried:",
        "  1. the well: the well is dry",
        f"  2. the ditch: missing: {IMAGES}, {LABELS}",
        f"To supply the data by hand, put these four files, each as it is or as .gz, in {raw}:",
        f"  {', '.join(FILES)}",
    ]


# In which order


def test_an_epoch_visits_every_image_once() -> None:
    order = epoch_order(seed=0, epoch=0, size=TRAIN_SIZE)
    assert np.array_equal(np.sort(order), np.arange(TRAIN_SIZE))


def test_every_seed_and_every_epoch_has_an_order_of_its_own_and_keeps_it() -> None:
    orders = [epoch_order(seed, epoch, 1000) for seed in range(3) for epoch in range(3)]
    assert len({order.tobytes() for order in orders}) == 9
    assert np.array_equal(epoch_order(2, 1, 1000), orders[7])


@pytest.mark.parametrize(("size", "steps", "remainder"), [(TRAIN_SIZE, 937, 32), (128, 2, 0)])
def test_the_batches_of_an_epoch_hold_every_image_in_order(size: int, steps: int, remainder: int) -> None:
    order = epoch_order(0, 0, size)
    full, rest = split_batches(order, 64)
    assert (full.shape, rest.shape) == ((steps, 64), (remainder,))
    assert np.array_equal(np.concatenate([full.ravel(), rest]), order)

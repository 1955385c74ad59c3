"""A trained network on pictures: the same answers from either framework, of photographs and among bad files."""

import io
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import safetensors.torch
import torchvision
from PIL import Image

from jax_cnn import model, train
from jax_cnn.data import CLASS_NAMES, FashionMNIST
from jax_cnn.pictures import likeness, prepare
from jax_cnn.pictures.prepare import prepare_picture
from jax_cnn.pictures.read import Picture, decode_picture
from jax_cnn.torch_layout import load_weights, to_flax
from parity_tests.pictures.picture_files import portrait, save_png
from parity_tests.support import ROOT
from torch_ref.model import SimpleCNN

SCRIPT = ROOT / "scripts" / "predict.py"
TIMEOUT = 300.0  # seconds, on a machine that is busy with other things
FLOAT32 = np.dtype(np.float32)
WEIGHTS = Path("runs", "jax", "weights.safetensors")


@pytest.fixture(scope="module")
def trained(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder where a JAX network was trained for a few seconds, into the default place."""
    cwd = tmp_path_factory.mktemp("trained")
    size = ("--epochs", "1", "--limit-train", "12800", "--limit-test", "1000", "--device", "cpu")
    command = [sys.executable, str(ROOT / "scripts" / "train_jax.py"), "--data-dir", str(data_dir), *size]
    subprocess.run(command, cwd=cwd, capture_output=True, check=True, timeout=TIMEOUT)
    return cwd


@pytest.fixture(scope="module")
def network(trained: Path) -> Callable[[np.ndarray], np.ndarray]:
    """That network as a function: images, uint8 [size, 28, 28], to probabilities."""
    params = jax.tree.map(jax.numpy.asarray, to_flax(load_weights(trained / WEIGHTS, "float32")))
    probabilities = jax.jit(lambda images: jax.nn.softmax(model.apply(params, train.to_images(images, FLOAT32))))
    return lambda images: np.asarray(probabilities(images))


def predict(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run the command as a person does, with its output caught."""
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=TIMEOUT)


# The same answer from both frameworks, and from the network itself

COUNT = 250  # two full batches and a smaller one
# Worst difference of a probability seen between the two, over all 10,000 test images after five epochs: 7.2e-7.
AGREEMENT = 1e-6


@pytest.fixture(scope="module")
def test_pngs(data: FashionMNIST, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The first test images as PNG files."""
    folder = tmp_path_factory.mktemp("pngs")
    return [save_png(image, folder / f"{at:05}.png") for at, image in enumerate(data.test_images[:COUNT])]


def test_both_frameworks_say_of_test_images_what_the_network_says(
    data: FashionMNIST, trained: Path, network: Callable[[np.ndarray], np.ndarray], test_pngs: list[Path]
) -> None:
    """Through the real commands, from PNG files; the weights are JAX's, for both."""
    expected = network(data.test_images[:COUNT])
    assert (expected.argmax(axis=1) == data.test_labels[:COUNT]).mean() > 0.7, "the network has learnt nothing"
    for arguments in ((), ("--framework", "torch", "--weights", WEIGHTS)):
        done = predict("--json", *arguments, *test_pngs, cwd=trained)
        assert (done.returncode, done.stderr) == (0, "")
        answers = [json.loads(line) for line in done.stdout.splitlines()]
        assert [answer["file"] for answer in answers] == list(map(str, test_pngs))
        assert {answer["prepared"] for answer in answers} == {"28x28 L, as it is"}
        actual = np.array([[answer["probabilities"][name] for name in CLASS_NAMES] for answer in answers])
        assert_agreement(actual, expected)


def assert_agreement(actual: np.ndarray, expected: np.ndarray) -> None:
    """Hold probabilities together: the same likeliest class, and every number."""
    assert (actual.argmax(axis=-1) == expected.argmax(axis=-1)).all()
    worst = float(np.abs(actual - expected).max())
    assert worst <= AGREEMENT, f"{worst:.1e} > {AGREEMENT:.1e}"


def test_one_pixel_that_is_off_by_one_would_be_seen(
    data: FashionMNIST, network: Callable[[np.ndarray], np.ndarray]
) -> None:
    """The bound above is no wider than that."""
    pixels = data.test_images[:COUNT].copy()
    pixels[:, 14, 14] ^= 1
    with pytest.raises(AssertionError, match=r"> 1\.0e-06"):
        assert_agreement(network(pixels), network(data.test_images[:COUNT]))


def test_weights_that_torch_wrote_serve_jax_and_are_found_where_torch_puts_them(
    tmp_path: Path, data: FashionMNIST
) -> None:
    """Untrained here: what matters is the file."""
    file = tmp_path / "runs" / "torch" / "weights.safetensors"
    file.parent.mkdir(parents=True)
    safetensors.torch.save_file(SimpleCNN().state_dict(), file)
    save_png(data.test_images[0], tmp_path / "boot.png")
    outputs = []
    for arguments in (("--framework", "torch"), ("--weights", file)):
        done = predict("--json", "boot.png", *arguments, cwd=tmp_path)
        assert (done.returncode, done.stderr) == (0, "")
        outputs.append(list(json.loads(done.stdout)["probabilities"].values()))
    assert_agreement(*map(np.array, outputs))


def test_the_class_names_are_torchvisions() -> None:
    assert list(CLASS_NAMES) == torchvision.datasets.FashionMNIST.classes


PHOTOGRAPHS = 400
# Fewer photographs are recognised than the images that they are made of. With networks of seeds 0 to 4, trained like
# the one here, from 0.5 points more to 2.3 points less of the 400.
PHOTOGRAPH_LOSS = 0.05


def photograph(image: np.ndarray, seed: int, pale: bool) -> Picture:
    """A test image as a JPEG of a garment on a grey ground, with margins and noise; pale, or light on dark."""
    ground, garment = (180, 120) if pale else (60, 250)
    large = np.asarray(Image.fromarray(image).resize((224, 224), Image.Resampling.BICUBIC))
    grey = np.full((400, 340), ground, np.float64)
    grey[90:314, 60:284] += (garment - ground) * (large / 255)
    grey += np.random.default_rng(seed).normal(0, 5, grey.shape)
    file = io.BytesIO()
    Image.fromarray(grey.clip(0, 255).round().astype(np.uint8)).save(file, "JPEG", quality=90)
    return decode_picture(Image.open(file))


@pytest.fixture(scope="module")
def photographs(data: FashionMNIST) -> list[Picture]:
    """Of the first test images: half of them pale and dark on light, half light on dark."""
    return [photograph(image, at, pale=at % 2 == 0) for at, image in enumerate(data.test_images[:PHOTOGRAPHS])]


PREPARING_FAULTS: dict[str, tuple[str, Callable[..., Any]]] = {
    "nothing is inverted": ("relief", lambda grey, relief=prepare.relief: np.abs(relief(grey))),
    "contrast is not stretched": ("stretch", lambda pixels, history: pixels),
    "one speck keeps a row": ("blur", lambda grey: grey),
}


@pytest.mark.parametrize("fault", [None, *PREPARING_FAULTS])
def test_photographs_are_recognised_as_well_as_the_images_that_they_show(
    data: FashionMNIST,
    photographs: list[Picture],
    network: Callable[[np.ndarray], np.ndarray],
    monkeypatch: pytest.MonkeyPatch,
    fault: str | None,
) -> None:
    """And if one step of preparing is missing, they are not."""
    images, labels = data.test_images[:PHOTOGRAPHS], data.test_labels[:PHOTOGRAPHS]
    if fault:
        monkeypatch.setattr(prepare, *PREPARING_FAULTS[fault])
    prepared = [prepare_picture(picture) for picture in photographs]
    pixels = np.stack([picture.pixels for picture in prepared])
    right, best = ((network(batch).argmax(axis=1) == labels).mean() for batch in (pixels, images))
    if fault:
        assert right < best - PHOTOGRAPH_LOSS, f"{right:.1%} of {best:.1%} without it"
    else:
        assert right >= best - PHOTOGRAPH_LOSS, f"{right:.1%}, the images themselves {best:.1%}"
        assert not any(likeness.oddity(picture) for picture in prepared)


# Bad files


def png_of_nothing(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds no pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.fixture
def bad_files(data: FashionMNIST, tmp_path: Path) -> dict[str, str]:
    """Files that cannot be read, in `tmp_path`, each with what has to be said of it."""
    good = save_png(np.kron(data.test_images[0], np.ones((9, 9), np.uint8)), tmp_path / "good.png")
    Image.open(good).save(tmp_path / "good.jpg")
    (tmp_path / "folder.png").mkdir()
    contents = {
        "empty.png": b"",
        "text.png": b"a picture, honestly",
        "cut.png": good.read_bytes()[:900],
        "cut.jpg": (tmp_path / "good.jpg").read_bytes()[:900],
        "bomb.png": png_of_nothing(60_000, 60_000),  # Pillow refuses
        "large.png": png_of_nothing(10_000, 9_000),  # Pillow warns
        "absurd.png": png_of_nothing(2**31 - 1, 2**31 - 1),
        "nothing.png": png_of_nothing(30, 30),
        "line\nbreak.png": b"\x1b[31m",
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    Image.fromarray(np.zeros((9, 9), np.float32)).save(tmp_path / "floats.ppm", "PPM")
    os.mkfifo(tmp_path / "pipe.png")
    return {
        "missing.png": "missing.png: No such file",
        "good.png/more": "good.png/more: Not a directory",
        "folder.png": "folder.png: a folder",
        "pipe.png": "pipe.png: not a regular file",
        "empty.png": "empty.png: an empty file",
        "text.png": "text.png: no picture",
        "cut.png": "cut.png: cannot be decoded (image file is truncated",
        "cut.jpg": "cut.jpg: cannot be decoded (image file is truncated",
        "bomb.png": "bomb.png: more than 89,478,485 pixels",
        "large.png": "large.png: more than 89,478,485 pixels",
        "absurd.png": "absurd.png: more than 89,478,485 pixels",
        "nothing.png": "nothing.png: cannot be decoded (image file is truncated",
        "line\nbreak.png": r"line\nbreak.png: no picture",
        "floats.ppm": "floats.ppm: cannot be decoded (floating-point pixels",
        "x" * 300: "x" * 300 + ": File name too long",
    }


@pytest.mark.skipif(os.name != "posix", reason="makes a named pipe")
def test_bad_files_get_a_line_each_and_the_others_are_done(
    bad_files: dict[str, str], trained: Path, tmp_path: Path
) -> None:
    """Status 2; the good ones among them are answered, in their order."""
    names = [*bad_files, "good.jpg"]
    done = predict("good.png", *names, "--weights", trained / WEIGHTS, cwd=tmp_path)
    assert done.returncode == 2
    lines = done.stderr.splitlines()
    assert len(lines) == len(bad_files), done.stderr
    for line, expected in zip(lines, bad_files.values(), strict=True):
        assert line.startswith(f"error: {expected}"), line
        assert line.isprintable()
        assert re.search(r"\b(give|save|scale)\b", line), f"what to do? {line}"
    first, second = (line for line in done.stdout.splitlines() if not line.startswith("  "))
    assert first.startswith("good.png: Ankle boot ")
    assert second.startswith("good.jpg: Ankle boot ")


# Slips

WITHOUT_FRAMEWORKS = """if True:
    import importlib.abc, runpy, sys

    class Refuse(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path, target=None):
            if name in ("jax", "flax", "torch", "torchvision"):
                raise ImportError(f"{name} was asked for")

    sys.meta_path.insert(0, Refuse())
    script, *sys.argv[1:] = sys.argv[1:]
    runpy.run_path(script, run_name="__main__")
"""


def predict_without_frameworks(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run the command where it cannot load a framework."""
    command = [sys.executable, "-c", WITHOUT_FRAMEWORKS, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=TIMEOUT)


SLIPS: dict[str, tuple[tuple[str, ...], str]] = {
    "no picture": ((), "there is no picture to look at: give one or more files"),
    "no network": (
        ("boot.png",),
        "there is no trained network in runs/jax/weights.safetensors: train one first (python scripts/train_jax.py)",
    ),
    "no network of PyTorch's": (
        ("boot.png", "--framework", "torch"),
        "there is no trained network in runs/torch/weights.safetensors: "
        "train one first (python scripts/train_torch.py)",
    ),
    "no such weights": (("boot.png", "--weights", "w"), "weights file w: No such file or directory; give"),
    "damaged weights": (("boot.png", "--weights", "cut"), "weights file cut: not a readable safetensors file"),
    "an unknown framework": (("boot.png", "--framework", "numpy"), "--framework"),
    "an unknown way to invert": (("boot.png", "--invert", "maybe"), "--invert"),
    "an unknown flag": (("boot.png", "--weight", "w"), "--weight"),
    "only bad files": (("none.png", "--weights", "good"), "none.png: No such file or directory; give"),
}


@pytest.mark.parametrize(("arguments", "message"), SLIPS.values(), ids=SLIPS)
def test_a_slip_is_one_line_before_a_framework_loads(
    data: FashionMNIST, trained: Path, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    save_png(data.test_images[0], tmp_path / "boot.png")
    shutil.copy(trained / WEIGHTS, tmp_path / "good")
    (tmp_path / "cut").write_bytes((trained / WEIGHTS).read_bytes()[:-1])
    done = predict_without_frameworks(*arguments, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert message in line


def test_the_frameworks_are_really_out_of_reach_there(data: FashionMNIST, trained: Path, tmp_path: Path) -> None:
    """Without a slip the command fails for want of one."""
    image = save_png(data.test_images[0], tmp_path / "boot.png")
    done = predict_without_frameworks(image, cwd=trained)
    assert "ImportError: jax was asked for" in done.stderr


def test_weights_too_large_to_compute_with_are_one_line(data: FashionMNIST, trained: Path, tmp_path: Path) -> None:
    """Each is a finite number, as `load_weights` asks; what they make is none."""
    tensors = {name: array * 0 + 1e30 for name, array in safetensors.torch.load_file(trained / WEIGHTS).items()}
    safetensors.torch.save_file(tensors, tmp_path / "huge")
    save_png(data.test_images[0], tmp_path / "boot.png")
    done = predict("boot.png", "--weights", "huge", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: weights file huge: its numbers are too large to compute with; train again\n"


# What is printed


def test_a_person_gets_three_classes_how_it_was_prepared_and_a_warning(
    data: FashionMNIST, trained: Path, network: Callable[[np.ndarray], np.ndarray], tmp_path: Path
) -> None:
    """On plain lines; names of files cannot break out of theirs, even where the output cannot show them."""
    boot = data.test_images[0]
    save_png(boot, tmp_path / "boot \u2603\n.png")
    save_png(255 - boot, tmp_path / "negative.png")
    command = [sys.executable, str(SCRIPT), "boot \u2603\n.png", "negative.png", str(portrait()), "--invert", "no"]
    done = subprocess.run(
        [*command, "--weights", str(trained / WEIGHTS)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    row = network(boot[None])[0]
    best = np.argsort(-row)[:3]
    assert lines[0] == r"boot \u2603\n.png: " + ", ".join(f"{CLASS_NAMES[at]} {row[at]:.2%}" for at in best)
    assert lines[1] == "  28x28 L, as it is"
    assert re.fullmatch(r"negative\.png: (\w[\w/ -]* \d+\.\d\d%(, |$)){3}", lines[2])
    assert lines[3] == "  28x28 L: not inverted though dark on light (as asked)"
    assert lines[4] == (
        "  looks nothing like the training images: its ground is not black (two corners are at 255 of 255 or lighter)"
    )
    assert lines[6].startswith("  512x600 RGB: made grey, ")
    assert lines[7].startswith("  looks nothing like the training images: its ground is not even (")
    assert len(lines) == 8


@pytest.mark.skipif(os.name != "posix", reason="pipes are closed otherwise elsewhere")
def test_a_reader_that_has_had_enough_is_no_error(trained: Path, test_pngs: list[Path]) -> None:
    """As with `| head`."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, test_pngs)],
        cwd=trained,
        stdout=write_end,
        stderr=subprocess.PIPE,
        text=True,
        timeout=TIMEOUT,
    )
    os.close(write_end)
    assert (done.returncode, done.stderr) == (141, "")

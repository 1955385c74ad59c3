"""How a picture of any size and mode becomes 28x28 pixels as the training images are."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from jax_cnn.data import FashionMNIST
from jax_cnn.pictures import likeness, prepare
from jax_cnn.pictures.prepare import prepare_picture
from parity_tests.pictures.picture_files import plain, read_back


def as_palette(image: Image.Image) -> Image.Image:
    """The same greys as the entries of a palette."""
    coloured = image.copy()
    coloured.putpalette([level for level in range(256) for _ in range(3)])
    return coloured


MODES: dict[str, Callable[[np.ndarray], Image.Image]] = {
    "L": Image.fromarray,
    "LA": lambda pixels: Image.fromarray(pixels).convert("LA"),
    "P": lambda pixels: as_palette(Image.fromarray(pixels)),
    "RGB": lambda pixels: Image.fromarray(pixels).convert("RGB"),
    "RGBA": lambda pixels: Image.fromarray(pixels).convert("RGBA"),
    "I;16": lambda pixels: Image.fromarray(pixels.astype(np.uint16) * 257),
}


@pytest.mark.parametrize("mode", MODES)
def test_a_training_image_reaches_the_network_bit_by_bit(data: FashionMNIST, tmp_path: Path, mode: str) -> None:
    """In every mode of PNG that can hold it; the fiftieth is a bag that fills its image."""
    for image in data.test_images[:100]:
        picture = read_back(MODES[mode](image), tmp_path / "image.png")
        prepared = prepare_picture(picture)
        assert picture.history[0] == f"28x28 {mode}"
        assert np.array_equal(prepared.pixels, image)
        assert likeness.oddity(prepared) is None


def test_no_test_image_is_inverted_and_every_negative_is(data: FashionMNIST) -> None:
    """Both end up bit for bit as the image; the bags that fill theirs are among them."""
    for image in data.test_images[::4]:
        for picture, how in (
            (plain(image), "28x28 L, as it is"),
            (plain(255 - image), "28x28 L: inverted (dark on light)"),
        ):
            prepared = prepare_picture(picture)
            assert prepared.how == how
            assert np.array_equal(prepared.pixels, image)


def test_the_flag_overrules(data: FashionMNIST) -> None:
    """And the line says so."""
    image = data.test_images[0]
    assert np.array_equal(prepare_picture(plain(image), "yes").pixels, 255 - image)
    assert prepare_picture(plain(image), "yes").how == "28x28 L: inverted (as asked)"
    assert np.array_equal(prepare_picture(plain(255 - image), "no").pixels, 255 - image)
    assert prepare_picture(plain(255 - image), "no").how == "28x28 L: not inverted though dark on light (as asked)"


def coat(width: int, height: int, ground: int = 253, garment: int = 60) -> np.ndarray:
    """A photograph of 300x400: an even garment of this size, a little off the centre."""
    grey = np.full((400, 300), ground, np.uint8)
    grey[40 : 40 + height, 30 : 30 + width] = garment
    return grey


def assert_same_shape(actual: np.ndarray, expected: np.ndarray) -> None:
    """Hold two even garments together; the first and the last row may be blurred away."""
    assert np.array_equal(actual[1:-1] > 127, expected[1:-1] > 127)


@pytest.mark.parametrize(("ground", "garment"), [(253, 60), (253, 200), (128, 40), (100, 180), (0, 255)])
def test_proportions_stay_the_garment_is_centred_light_and_the_rest_black(ground: int, garment: int) -> None:
    """Whatever stands before whatever."""
    prepared = prepare_picture(plain(coat(100, 200, ground, garment)))
    expected = np.zeros((28, 28), np.uint8)
    expected[:, 7:21] = 255
    assert_same_shape(prepared.pixels, expected)
    assert prepared.pixels[1:-1, 8:20].min() >= 230
    assert prepared.pixels[:, [*range(7), *range(21, 28)]].max() <= 12
    assert prepared.how.startswith(
        "300x400 L: " + ("inverted (dark on light), " if ground > garment else "") + "trimmed to 10"
    )
    assert "scaled to 14x28, padded to 28x28" in prepared.how
    assert ("contrast stretched by" in prepared.how) == (abs(ground - garment) < 240)


def test_a_wide_a_thin_and_a_tiny_picture_keep_their_proportions() -> None:
    """Scaled up as well as down, and never to nothing."""
    assert "scaled to 28x14, padded" in prepare_picture(plain(coat(200, 100))).how
    assert (
        prepare_picture(plain(np.full((1, 30_000), 7, np.uint8))).how
        == "30000x1 L: reduced to 2000x1, scaled to 28x1, padded to 28x28"
    )
    assert prepare_picture(plain(np.array([[0, 9, 0], [0, 90, 0]], np.uint8))).pixels.shape == (28, 28)


def test_exif_turns_a_photograph_upright(tmp_path: Path) -> None:
    """All eight orientations of the same picture come out the same."""
    upright = Image.fromarray(coat(60, 280))
    stored = {
        1: upright,
        3: upright.rotate(180),
        6: upright.rotate(90, expand=True),
        8: upright.rotate(270, expand=True),
    }
    stored |= {2: Image.fromarray(coat(60, 280)[:, ::-1]), 4: Image.fromarray(coat(60, 280)[::-1])}
    stored |= {5: Image.fromarray(coat(60, 280).T), 7: Image.fromarray(coat(60, 280)[::-1, ::-1].T)}
    expected = prepare_picture(plain(coat(60, 280))).pixels
    for orientation, image in stored.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        prepared = prepare_picture(read_back(image, tmp_path / "turned.png", exif=exif))
        assert np.array_equal(prepared.pixels, expected), orientation
        assert ("turned upright (EXIF)" in prepared.how) == (orientation > 1)


def transparent(mode: str) -> tuple[Image.Image, dict[str, Any]]:
    """A dark garment without a ground, in this mode, and what to save it with; what is hidden is black or red."""
    grey = coat(100, 200, ground=0)
    cut_out = Image.fromarray(grey).convert("LA")
    cut_out.putalpha(Image.fromarray((grey > 0).astype(np.uint8) * 255))
    if mode == "P":
        return as_palette(Image.fromarray(grey)), {"transparency": b"\0" + b"\xff" * 255}
    if mode == "RGB":
        coloured = np.stack([np.where(grey > 0, grey, 255), grey, grey], axis=-1)
        return Image.fromarray(coloured), {"transparency": (255, 0, 0)}
    if mode == "I;16":
        return Image.fromarray(grey.astype(np.uint16) * 257), {"transparency": 0}
    return cut_out.convert(mode), {}


@pytest.mark.parametrize("mode", ["LA", "RGBA", "P", "RGB", "I;16"])
def test_transparent_parts_are_the_ground(tmp_path: Path, mode: str) -> None:
    """In each of the ways in which a PNG can say so."""
    image, options = transparent(mode)
    picture = read_back(image, tmp_path / "cut_out.png", **options)
    assert picture.history[0] == f"300x400 {mode}"
    prepared = prepare_picture(picture)
    assert "transparent parts made white, inverted (dark on light)" in prepared.how
    assert np.array_equal(prepared.pixels, prepare_picture(plain(coat(100, 200, ground=255))).pixels)
    as_they_are = prepare_picture(picture, "no")
    assert "transparent parts made black, trimmed" in as_they_are.how
    assert np.array_equal(as_they_are.pixels, prepare_picture(plain(coat(100, 200, ground=0)), "no").pixels)


def test_half_transparent_parts_are_mixed() -> None:
    """Linearly, to the nearest level."""
    grey, opacity = np.meshgrid(np.arange(256, dtype=np.uint8), np.arange(256, dtype=np.uint8))
    for ground in (0, 255):
        exact = (grey * (opacity / 255) + ground * (1 - opacity / 255)).round()
        assert np.abs(prepare.blend(grey, opacity, ground) - exact).max() <= 1
        assert np.array_equal(prepare.blend(grey, np.full_like(grey, 255), ground), grey)


def test_other_kinds_of_files_are_read_too(tmp_path: Path) -> None:
    """CMYK, one bit, a palette, WebP, BMP, PPM; of several frames, the first, and that is said."""
    image = Image.fromarray(coat(100, 200))
    expected = prepare_picture(plain(coat(100, 200))).pixels
    for converted, name, note in (
        (image.convert("CMYK"), "a.jpg", "CMYK: made grey"),
        (image.point(lambda level: 255 * (level > 99)).convert("1"), "a.png", "300x400 1: inverted"),
        (image.convert("P"), "a.gif", "P: made grey"),
        (image.convert("RGB"), "a.webp", "RGB: made grey"),
        (image, "a.bmp", "300x400 L: inverted"),
        (image, "a.ppm", "300x400 L: inverted"),
    ):
        prepared = prepare_picture(read_back(converted, tmp_path / name))
        assert note in prepared.how
        assert_same_shape(prepared.pixels, expected)
    others = [Image.fromarray(coat(100, 10)), Image.fromarray(coat(10, 10))]
    for name in ("frames.gif", "frames.png", "frames.webp"):
        moving = read_back(image, tmp_path / name, save_all=True, append_images=others)
        assert "first of 3 frames" in moving.history
        assert_same_shape(prepare_picture(moving).pixels, expected)


def test_a_huge_photograph_is_read_in_part(tmp_path: Path) -> None:
    """Fifty million pixels, in a file of a megabyte or two."""
    photograph = Image.fromarray(coat(100, 200)).resize((6_000, 8_000))
    picture = read_back(photograph, tmp_path / "large.jpg")
    assert picture.history[0] == "6000x8000 L"
    assert 2_000 <= max(picture.grey.shape) <= 4_000
    assert "reduced to 1" in prepare_picture(picture).how

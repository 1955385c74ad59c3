"""Damaged files and files that are no pictures are read, or refused in one line."""

import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jax_cnn.config import UserError
from jax_cnn.data import FashionMNIST
from jax_cnn.pictures.likeness import find_oddities
from jax_cnn.pictures.prepare import prepare_picture
from jax_cnn.pictures.read import FORMATS, read_picture
from parity_tests.pictures.picture_files import save_png


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read anything")
def test_a_file_without_permission_is_named(tmp_path: Path) -> None:
    file = save_png(np.zeros((28, 28), np.uint8), tmp_path / "secret.png")
    file.chmod(0)
    with pytest.raises(UserError, match=r"secret.png: Permission denied; give a file that can be read"):
        read_picture(file)


def encode(image: Image.Image, kind: str) -> bytes:
    """Return a file of this format, turned by EXIF where the format can say so."""
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    image.save(file, kind, exif=exif)
    return file.getvalue()


def damage(content: bytes, rng: np.random.Generator) -> bytes:
    """Cut a file short, or change four of its first bytes."""
    if rng.integers(3) == 0:
        return content[: rng.integers(1, len(content))]
    changed = bytearray(content)
    for place in rng.integers(0, min(len(changed), 300), 4):
        changed[place] = rng.choice([0, 127, 255, int(rng.integers(256))])
    return bytes(changed)


def test_a_thousand_damaged_files_are_read_or_refused_in_one_line_without_a_sound(
    data: FashionMNIST, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    image = Image.fromarray(data.test_images[0]).convert("RGB")
    sound = [encode(image, kind) for kind in FORMATS]
    sound += [encode(image.convert(mode), "PNG") for mode in ("1", "P", "LA", "RGBA")]
    sound.append(encode(image.convert("CMYK"), "JPEG"))
    rng = np.random.default_rng(0)
    refusals = []
    for number in range(1000):
        (tmp_path / "damaged").write_bytes(damage(sound[number % len(sound)], rng))
        try:
            find_oddities(prepare_picture(read_picture(tmp_path / "damaged")))
        except UserError as error:
            refusals.append(str(error))
    assert all(message.isprintable() for message in refusals)
    assert 300 < len(refusals) < 900, "the damage is too small, or too great, to prove anything"
    assert capfd.readouterr() == ("", "")

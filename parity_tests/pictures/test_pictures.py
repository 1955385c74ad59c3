"""Files that are no pictures, or damaged ones: read, or refused in one line."""

import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jax_cnn.config import UserError
from jax_cnn.data import FashionMNIST
from jax_cnn.pictures import likeness
from jax_cnn.pictures.prepare import prepare_picture
from jax_cnn.pictures.read import FORMATS, read_picture
from parity_tests.pictures.picture_files import save_png


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read anything")
def test_a_file_that_may_not_be_read_is_named(tmp_path: Path) -> None:
    file = save_png(np.zeros((28, 28), np.uint8), tmp_path / "secret.png")
    file.chmod(0)
    with pytest.raises(UserError, match=r"secret.png: Permission denied; give a file that can be read"):
        read_picture(file)


def is_refused(path: Path) -> bool:
    """Whether a file is no picture, which has to be told in one line."""
    try:
        likeness.oddity(prepare_picture(read_picture(path)))
    except UserError as slip:
        if not str(slip).isprintable():
            pytest.fail(f"not a line of plain text: {slip!r}")
        return True
    return False


def test_no_damage_is_more_than_one_line(data: FashionMNIST, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A thousand files cut short or with some bytes changed: read or refused, without a warning or a sound."""
    sound = []
    image = Image.fromarray(data.test_images[0]).convert("RGB")
    for converted, kind in (
        *((image, kind) for kind in FORMATS),
        *((image.convert(mode), "PNG") for mode in ("1", "P", "LA", "RGBA")),
        (image.convert("CMYK"), "JPEG"),
    ):
        exif = Image.Exif()
        exif[0x0112] = 6
        file = io.BytesIO()
        converted.save(file, kind, exif=exif)
        sound.append(file.getvalue())
    rng = np.random.default_rng(0)
    refused = 0
    for at in range(1000):
        content = bytearray(sound[at % len(sound)])
        if at % 3:
            for place in rng.integers(0, min(len(content), 300), 4):
                content[place] = rng.choice([0, 127, 255, int(rng.integers(256))])
        else:
            content = content[: rng.integers(1, len(content))]
        (tmp_path / "damaged").write_bytes(content)
        refused += is_refused(tmp_path / "damaged")
    assert 300 < refused < 900, "the damage is too small, or too great, to prove anything"
    assert capfd.readouterr() == ("", "")

"""Pictures from files, upright and in grey; what is wrong with a file is told in one line. NumPy and Pillow alone."""

import stat
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from jax_cnn.config import UserError

# Not all that Pillow reads: for EPS it would start another program, and libtiff writes to stderr by itself.
FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "PPM")
LARGE = 2000  # pixels: a JPEG with edges several times as long is decoded to a part of its size, to save time


class Picture(NamedTuple):
    """A picture as its file holds it, upright and in grey, and how it came to that."""

    grey: UInt8[np.ndarray, "height width"]
    opacity: UInt8[np.ndarray, "height width"] | None
    """0 is transparent; None is a picture without transparent parts."""
    history: tuple[str, ...]
    """First its size and mode, then every step, in words."""


def read_picture(path: Path) -> Picture:
    """Read the first frame of a picture, upright and in grey.

    Raises:
        UserError: the file is missing, is not a regular one, is empty, damaged or no picture, or holds too many pixels.
    """

    def wrong(what: str) -> UserError:
        return UserError(f"{printable(str(path))}: {what}")

    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise wrong("a folder, not a picture; give the files in it")
        if not stat.S_ISREG(status.st_mode):
            raise wrong("not a regular file; save the picture to one and give that")
        if status.st_size == 0:
            raise wrong("an empty file (0 bytes); save the picture anew")
        file = path.open("rb")
    except OSError as error:
        raise wrong(f"{error.strerror}; give a file that can be read") from None
    try:
        with file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what matters is in the history or an exception
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file, formats=FORMATS) as image:
                return decode_picture(image)
    except UnidentifiedImageError:
        raise wrong(f"no picture of a kind that is read ({', '.join(FORMATS)}); save it as PNG or JPEG") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise wrong(f"more than {Image.MAX_IMAGE_PIXELS:,} pixels; scale it down first") from None
    except Exception as error:  # in a damaged file Pillow's decoders raise whatever they run into
        reason = printable(str(error) or type(error).__name__)
        raise wrong(f"cannot be decoded ({reason}); save it anew as PNG or JPEG") from None


def printable(text: str) -> str:
    """A file's name, or what a library says of it, without line breaks and control codes."""
    return text if text.isprintable() else text.encode("unicode_escape").decode()


def decode_picture(image: Image.Image) -> Picture:
    """Decode the first frame: turn it as its EXIF data say, split off its opacity, make it grey.

    Raises:
        ValueError: it has no pixels, or pixels of an unknown range.
        Exception: whatever Pillow's decoders raise for a damaged file.
    """
    history = [f"{image.width}x{image.height} {image.mode}"]
    image.draft(None, (LARGE, LARGE))  # to a half, a quarter or an eighth, but no smaller than this
    frames = getattr(image, "n_frames", 1)
    if frames > 1:
        history.append(f"first of {frames} frames")
    upright = ImageOps.exif_transpose(image)
    if image.getexif().get(ExifTags.Base.Orientation) in range(2, 9):
        history.append("turned upright (EXIF)")
    if 0 in upright.size or upright.mode == "F":
        raise ValueError("no pixels" if 0 in upright.size else "floating-point pixels, whose range is unknown")
    if upright.mode.startswith("I"):
        grey, opacity = decode_16_bits(np.asarray(upright), upright.info.get("transparency"))
        history.append("reduced to 8 bits")
    else:
        coloured = upright if upright.mode == "L" else upright.convert("RGB")
        if upright.has_transparency_data:
            coloured = upright.convert("RGBA")
        opacity = np.asarray(coloured.getchannel("A")) if coloured.mode == "RGBA" else None
        grey = np.asarray(coloured.convert("L"))  # Rec. 601 luma, exact where red, green and blue are equal
        if upright.mode not in ("1", "L", "LA"):
            history.append("made grey")
    return Picture(grey, opacity if opacity is not None and opacity.min() < 255 else None, tuple(history))


def decode_16_bits(
    values: np.ndarray, transparent: int | None
) -> tuple[UInt8[np.ndarray, "height width"], UInt8[np.ndarray, "height width"] | None]:
    """Scale 0 … 65,535 to 0 … 255; one value may stand for transparency.

    Raises:
        ValueError: a value is beyond 16 bits.
    """
    wide = values.astype(np.int64)
    if wide.min() < 0 or wide.max() > 65_535:
        raise ValueError("pixels of more than 16 bits, whose range is unknown")
    opacity = None if transparent is None else np.where(wide == transparent, 0, 255).astype(np.uint8)
    return ((wide + 128) // 257).astype(np.uint8), opacity

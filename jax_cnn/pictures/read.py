"""Read pictures from files, upright and in grey. NumPy and Pillow alone."""

import stat
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from jax_cnn.config import UserError

# Pillow reads more formats, but for EPS it starts another program, and for TIFF libtiff writes to stderr by itself.
FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "PPM")
LARGE_EDGE = 2000  # pixels: to save time, a JPEG with much longer edges is decoded at a half, a quarter or an eighth


class Picture(NamedTuple):
    """A picture as its file holds it, upright and in grey."""

    grey: UInt8[np.ndarray, "height width"]
    opacity: UInt8[np.ndarray, "height width"] | None
    """0 is transparent; None if no part of the picture is."""
    history: tuple[str, ...]
    """Size and mode of the file, then each step of reading it, in words."""


def read_picture(path: Path) -> Picture:
    """Read the first frame of a picture.

    Raises:
        UserError: the file cannot be opened, is not a regular file, is empty, damaged or no picture, or has too many
            pixels.
    """

    def user_error(problem: str) -> UserError:
        return UserError(f"{printable(str(path))}: {problem}")

    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise user_error("a folder, not a picture; give the files in it")
        if not stat.S_ISREG(status.st_mode):
            raise user_error("not a regular file; save the picture to one and give that")
        if status.st_size == 0:
            raise user_error("an empty file (0 bytes); save the picture again")
        file = path.open("rb")
    except OSError as error:
        raise user_error(f"{error.strerror}; give a file that can be read") from None
    try:
        with file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a damaged file raises an exception or is read, and nothing else
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(file, formats=FORMATS) as image:
                return decode_picture(image)
    except UnidentifiedImageError:
        raise user_error(f"no picture of a kind that is read ({', '.join(FORMATS)}); save it as PNG or JPEG") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise user_error(f"more than {Image.MAX_IMAGE_PIXELS:,} pixels; scale it down first") from None
    except Exception as error:  # Pillow's decoders raise many types of errors for a damaged file
        reason = printable(str(error) or type(error).__name__)
        raise user_error(f"cannot be decoded ({reason}); save it again as PNG or JPEG") from None


def list_pictures(folder: Path) -> list[Path]:
    """Return the files in a folder whose names end as those of pictures do, in order. Hidden files are left out.

    Raises:
        UserError: there are none, or the folder cannot be read.
    """
    endings = {ending for ending, kind in Image.registered_extensions().items() if kind in FORMATS}
    try:
        files = sorted(path for path in folder.iterdir() if path.suffix.lower() in endings and path.is_file())
    except OSError as error:
        raise UserError(f"{printable(str(folder))}: {error.strerror}; give a folder that can be read") from None
    if files := [file for file in files if not file.name.startswith(".")]:
        return files
    raise UserError(f"{printable(str(folder))}: a folder without pictures; give one with files such as boot.png")


def printable(text: str) -> str:
    """Escape the text if it holds line breaks or control codes, as names of files and error messages may."""
    return text if text.isprintable() else text.encode("unicode_escape").decode()


def decode_picture(image: Image.Image) -> Picture:
    """Decode the first frame: turn it as its EXIF data say, separate its opacity, convert it to grey.

    Raises:
        ValueError: it has no pixels, or pixels of an unknown range.
        Exception: any error of Pillow's decoders, for a damaged file.
    """
    history = [f"{image.width}x{image.height} {image.mode}"]
    image.draft(None, (LARGE_EDGE, LARGE_EDGE))
    frames = getattr(image, "n_frames", 1)
    if frames > 1:
        history.append(f"first of {frames} frames")
    upright = ImageOps.exif_transpose(image)
    if image.getexif().get(ExifTags.Base.Orientation) in range(2, 9):
        history.append("turned upright (EXIF)")
    if 0 in upright.size:
        raise ValueError("no pixels")
    if upright.mode == "F":
        raise ValueError("floating-point pixels, whose range is unknown")
    if upright.mode.startswith("I"):
        grey, opacity = decode_16_bits(np.asarray(upright), upright.info.get("transparency"))
        history.append("reduced to 8 bits")
    else:
        grey, opacity = decode_8_bits(upright)
        if upright.mode not in ("1", "L", "LA"):
            history.append("made grey")
    if opacity is not None and opacity.min() == 255:
        opacity = None
    return Picture(grey, opacity, tuple(history))


def decode_8_bits(
    image: Image.Image,
) -> tuple[UInt8[np.ndarray, "height width"], UInt8[np.ndarray, "height width"] | None]:
    """Return grey pixels by the Rec. 601 luma, exact where red, green and blue are equal, and the opacity if any."""
    if image.has_transparency_data:
        coloured = image.convert("RGBA")
        return np.asarray(coloured.convert("L")), np.asarray(coloured.getchannel("A"))
    return np.asarray(image.convert("RGB").convert("L")), None


def decode_16_bits(
    values: np.ndarray, transparent: int | None
) -> tuple[UInt8[np.ndarray, "height width"], UInt8[np.ndarray, "height width"] | None]:
    """Scale 0 … 65,535 to 0 … 255, and return the opacity if one value stands for transparency.

    Raises:
        ValueError: a value needs more than 16 bits.
    """
    wide = values.astype(np.int64)
    if wide.min() < 0 or wide.max() > 65_535:
        raise ValueError("pixels of more than 16 bits, whose range is unknown")
    opacity = None if transparent is None else np.where(wide == transparent, 0, 255).astype(np.uint8)
    return ((wide + 128) // 257).astype(np.uint8), opacity

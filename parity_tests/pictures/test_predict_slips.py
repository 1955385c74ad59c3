"""The command that classifies pictures says in one line what is wrong with a file, a flag or the weights."""

import os
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
from PIL import Image

from parity_tests.support import assert_slip, run_command
from torch_ref.model import SimpleCNN


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """The weights of an untrained network."""
    safetensors.torch.save_file(SimpleCNN().state_dict(), tmp_path / "weights")
    return tmp_path / "weights"


# Bad files


def png_of_nothing(width: int, height: int) -> bytes:
    """Return a PNG that states a size and holds no pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.fixture
def bad_files(boot: Path, tmp_path: Path) -> dict[str, str]:
    """Files in the test's folder that cannot be read, each with the words that must be printed about it."""
    large_boot = Image.open(boot).resize((252, 252), Image.Resampling.NEAREST)
    large_boot.save(tmp_path / "good.png")
    large_boot.save(tmp_path / "good.jpg")
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    Image.fromarray(np.zeros((9, 9), np.float32)).save(tmp_path / "floats.ppm", "PPM")
    contents = {
        "empty.png": (b"", "an empty file"),
        "text.png": (b"a picture, honestly", "no picture"),
        "cut.png": ((tmp_path / "good.png").read_bytes()[:900], "cannot be decoded (image file is truncated"),
        "cut.jpg": ((tmp_path / "good.jpg").read_bytes()[:900], "cannot be decoded (image file is truncated"),
        "bomb.png": (png_of_nothing(60_000, 60_000), "more than 89,478,485 pixels"),  # Pillow refuses
        "large.png": (png_of_nothing(10_000, 9_000), "more than 89,478,485 pixels"),  # Pillow warns
        "absurd.png": (png_of_nothing(2**31 - 1, 2**31 - 1), "more than 89,478,485 pixels"),
        "nothing.png": (png_of_nothing(30, 30), "cannot be decoded (image file is truncated"),
        "line\nbreak.png": (b"\x1b[31m", "no picture"),
    }
    for name, (content, _) in contents.items():
        (tmp_path / name).write_bytes(content)
    return {name: problem for name, (_, problem) in contents.items()} | {
        "missing.png": "No such file",
        "good.png/more": "Not a directory",
        "folder.png": "a folder",
        "pipe.png": "not a regular file",
        "floats.ppm": "cannot be decoded (floating-point pixels",
        "x" * 300: "File name too long",
    }


@pytest.mark.skipif(os.name != "posix", reason="makes a named pipe")
def test_bad_files_get_a_line_each_and_the_others_are_classified(
    bad_files: dict[str, str], weights: Path, tmp_path: Path
) -> None:
    done = run_command("predict", "good.png", *bad_files, "good.jpg", "--weights", weights, cwd=tmp_path)
    assert done.returncode == 2
    for line, (name, problem) in zip(done.stderr.splitlines(), bad_files.items(), strict=True):
        assert line.startswith("error: " + name.replace("\n", r"\n") + f": {problem}"), line
        assert line.isprintable()
        assert re.search(r"\b(give|save|scale)\b", line), f"what to do? {line}"
    names = [line.partition(":")[0] for line in done.stdout.splitlines() if not line.startswith("  ")]
    assert names == ["good.png", "good.jpg"]


@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_weights_too_large_to_compute_with_are_one_line(tmp_path: Path, boot: Path, framework: str) -> None:
    """Every weight is finite, as `load_weights` demands; the logits are not."""
    tensors = {name: tensor * 0 + 1e30 for name, tensor in SimpleCNN().state_dict().items()}
    safetensors.torch.save_file(tensors, tmp_path / "huge")
    done = run_command("predict", boot, "--weights", "huge", "--framework", framework, cwd=tmp_path)
    assert_slip(done, "weights file huge: its numbers are too large to compute with; train again\n")
    assert done.stdout == ""

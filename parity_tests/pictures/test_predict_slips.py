"""The command that classifies pictures says in one line what is wrong with a file, a flag or the weights."""

import json
import os
import re
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import predict
from jax_cnn.config import UserError
from jax_cnn.files import write_json
from jax_cnn.pictures.prepare import Prepared
from jax_cnn.pictures.read import list_pictures, read_picture
from jax_cnn.torch_layout import TorchDict
from jax_cnn.weights import save_weights
from parity_tests.support import assert_slip, run_command
from predict import PredictConfig


def with_size(png: bytes, width: int, height: int) -> bytes:
    """Return a PNG whose header states another size than that of its pixels."""
    header = png[12:16] + struct.pack(">II", width, height) + png[24:29]
    return png[:12] + header + struct.pack(">I", zlib.crc32(header)) + png[33:]


@pytest.fixture
def bad_files(boot: Path, tmp_path: Path) -> dict[str, str]:
    """Return files in the test's folder that cannot be read, each with the words that must be printed about it."""
    large_boot = Image.open(boot).resize((252, 252), Image.Resampling.NEAREST)
    large_boot.save(tmp_path / "good.png")
    large_boot.save(tmp_path / "good.jpg")
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    Image.fromarray(np.zeros((9, 9), np.float32)).save(tmp_path / "floats.ppm", "PPM")
    png, jpeg = ((tmp_path / f"good.{kind}").read_bytes() for kind in ("png", "jpg"))
    contents = {
        "empty.png": (b"", "an empty file"),
        "text.png": (b"a picture, honestly", "no picture"),
        "cut.png": (png[:900], "cannot be decoded (image file is truncated"),
        "cut.jpg": (jpeg[:900], "cannot be decoded (image file is truncated"),
        "bomb.png": (with_size(png, 60_000, 60_000), "more than 89,478,485 pixels"),  # Pillow refuses
        "large.png": (with_size(png, 10_000, 9_000), "more than 89,478,485 pixels"),  # Pillow warns
        "absurd.png": (with_size(png, 2**31 - 1, 2**31 - 1), "more than 89,478,485 pixels"),
        "line\nbreak.png": (b"\x1b[31m", "no picture"),
    }
    for name, (content, _) in contents.items():
        (tmp_path / name).write_bytes(content)
    return {name: problem for name, (_, problem) in contents.items()} | {
        "missing.png": "No such file",
        "good.png/more": "Not a directory",
        "folder.png": "a folder without pictures",
        "pipe.png": "not a regular file",
        "floats.ppm": "cannot be decoded (floating-point pixels",
        "x" * 300: "File name too long",
    }


@pytest.mark.skipif(os.name != "posix", reason="makes a named pipe")
def test_bad_files_get_a_line_each_and_the_others_are_classified(
    bad_files: dict[str, str], torch_weights: TorchDict, tmp_path: Path
) -> None:
    save_weights(tmp_path / "weights", torch_weights)
    done = run_command("predict", "good.png", *bad_files, "good.jpg", "--weights", "weights", cwd=tmp_path)
    assert done.returncode == 2
    for line, (name, problem) in zip(done.stderr.splitlines(), bad_files.items(), strict=True):
        assert line.startswith("error: " + name.replace("\n", r"\n") + f": {problem}"), line
        assert line.isprintable()
        assert re.search(r"\b(give|save|scale)\b", line), f"what to do? {line}"
    names = [line.partition(":")[0] for line in done.stdout.splitlines() if not line.startswith("  ")]
    assert names == ["good.png", "good.jpg"]


def test_all_pictures_in_a_folder_are_read_and_nothing_else(boot: Path) -> None:
    """The dot of a hidden file, the name of a folder and the ending of a text do not make a picture."""
    folder = boot.parent / "folder.png"
    folder.mkdir()
    for name in ("b.PNG", "a.png", ".hidden.png", "notes.txt"):
        shutil.copy(boot, folder / name)
    (folder / "inner.png").mkdir()
    assert [file.name for file in list_pictures(folder)] == ["a.png", "b.PNG"]
    prepared, all_read = predict.prepare_all(PredictConfig((folder, boot)))
    assert [path for path, _ in prepared] == [folder / "a.png", folder / "b.PNG", boot]
    assert all_read
    (folder / "a.png").write_bytes(b"")
    prepared, all_read = predict.prepare_all(PredictConfig((folder, folder / "inner.png")))
    assert [path for path, _ in prepared] == [folder / "b.PNG"]
    assert not all_read


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read anything")
def test_a_file_without_permission_is_named(boot: Path) -> None:
    boot.chmod(0)
    with pytest.raises(UserError, match=r"boot.png: Permission denied; give a file that can be read"):
        read_picture(boot)


def test_after_training_on_other_data_classes_have_numbers_and_no_picture_is_odd(tmp_path: Path) -> None:
    answer = (tmp_path / "a.png", Prepared(np.full((28, 28), 255, np.uint8), "28x28 L, as it is", 1.0), np.eye(10)[9])
    assert not predict.has_other_data(tmp_path / "weights.safetensors")
    assert "Ankle boot 100.00%" in predict.as_text(*answer, False)
    assert "looks nothing like" in predict.as_text(*answer, False)
    write_json(tmp_path / "config.json", {"config": {}, "versions": {}, "data": {"train-labels-idx1-ubyte": "ab" * 32}})
    assert predict.has_other_data(tmp_path)
    assert predict.has_other_data(tmp_path / "weights.safetensors")
    assert predict.as_text(*answer, True).split(": ", 1)[1].startswith("class 9 100.00%, class 0 0.00%")
    assert "looks nothing like" not in predict.as_text(*answer, True)
    content = json.loads(predict.as_json(*answer, True))
    assert content["probabilities"]["class 9"] == 1
    assert content["unlike_training"] is None


@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_weights_too_large_to_compute_with_are_one_line(
    torch_weights: TorchDict, tmp_path: Path, boot: Path, framework: str
) -> None:
    """Every weight is finite, as `load_weights` demands; the logits are not."""
    save_weights(tmp_path / "huge", {name: np.full_like(array, 1e30) for name, array in torch_weights.items()})
    done = run_command("predict", boot, "--weights", "huge", "--framework", framework, cwd=tmp_path)
    assert_slip(done, "weights file huge: its numbers are too large to compute with; train again\n")
    assert done.stdout == ""

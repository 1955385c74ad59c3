"""Whatever a file holds, reading it gives the right answer or one clear error: no traceback, no endless loop, no flood.

10,000 damaged inputs, the same at every run (hypothesis, derandomised); `-m slow` tries ten times as many.
"""

import contextlib
import gzip
import io
import json
import struct
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.numpy import save

from experiments.records import explain_mismatch
from jax_cnn.checkpoint import Checkpoint, Unusable, interpret, load_checkpoint
from jax_cnn.config import TrainConfig, UserError
from jax_cnn.data import UnusableFile, _read_verified, decode_idx
from jax_cnn.pictures.prepare import prepare_picture
from jax_cnn.pictures.read import read_picture
from jax_cnn.torch_layout import SIMPLE_CNN, load_weights

MEMORY = 2**29  # bytes that reading may add to the process's peak: twice the largest file that is read
SCALES = (1, pytest.param(10, marks=pytest.mark.slow))
scales = pytest.mark.parametrize("scale", SCALES)


@st.composite
def damaged(draw: st.DrawFn, *originals: bytes) -> bytes:
    """One of the originals after a few accidents: cut, bits turned, bytes put in, zeroed, or a length made huge."""
    content = bytearray(draw(st.sampled_from(originals)))
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, max(len(content) - 1, 0)))
        match draw(st.integers(0, 4)):
            case 0:
                del content[at:]
            case 1 if content:
                content[at] ^= 1 << draw(st.integers(0, 7))
            case 2:
                content[at:at] = draw(st.binary(max_size=16))
            case 3:
                content[at : at + 64] = bytes(len(content[at : at + 64]))
            case 4:
                content[:8] = struct.pack(draw(st.sampled_from("<>")) + "Q", draw(st.integers(0, 2**64 - 1)))
    return bytes(content)


def hammer(read: Callable[[bytes], Any], inputs: st.SearchStrategy[bytes], count: int) -> None:
    """Read so many inputs, and hold the process's memory to its bound."""
    forget_peak()
    before = peak_memory()
    checks = [HealthCheck.too_slow, HealthCheck.large_base_example, HealthCheck.data_too_large]
    tried = 0

    def counted(content: bytes) -> None:
        nonlocal tried
        tried += 1
        read(content)

    run = settings(
        report_multiple_bugs=False,
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=checks,
    )
    run(given(inputs)(counted))()
    assert peak_memory() - before <= MEMORY
    assert tried >= count, f"{tried} inputs of {count}: there are no more of this kind"


def forget_peak() -> None:
    """Let Linux measure this process's peak anew: other tests have had theirs."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    """Bytes that this process has held at most since then."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


@pytest.fixture
def file(tmp_path: Path) -> Callable[[bytes], Path]:
    """Put an input where a file is expected."""

    def write(content: bytes) -> Path:
        path = tmp_path / "input"
        path.write_bytes(content)
        return path

    return write


def idx(shape: tuple[int, ...]) -> bytes:
    """A small sound IDX file."""
    header = b"\0\0\x08" + bytes([len(shape)]) + b"".join(struct.pack(">I", length) for length in shape)
    return header + bytes(range(int(np.prod(shape))))


@scales
def test_idx_files(scale: int) -> None:
    def read(content: bytes) -> None:
        try:
            array = decode_idx(content)
        except ValueError:
            return
        assert array.tobytes() == content[4 + 4 * content[3] :]

    hammer(read, damaged(idx((3, 4, 5)), idx((7,)), idx(())) | st.binary(max_size=64), 3000 * scale)


@scales
def test_packed_files(file: Callable[[bytes], Path], data_dir: Path, scale: int) -> None:
    """The published bytes, or `UnusableFile`; a bomb of a gigabyte among them."""
    name = "t10k-labels-idx1-ubyte"
    content = (data_dir / "FashionMNIST" / "raw" / name).read_bytes()
    bomb = gzip.compress(bytes(2**20)) * 1024

    def read(packed: bytes) -> None:
        path = file(packed).with_suffix(".gz")
        path.write_bytes(packed)
        with contextlib.suppress(UnusableFile):
            assert _read_verified(path, name) == content

    hammer(read, damaged(gzip.compress(content), gzip.compress(content[:100]), bomb), 1500 * scale)


def tensors(changes: dict[str, np.ndarray] | None = None) -> dict[str, np.ndarray]:
    """Weights of the right shapes, with some exchanged."""
    return {name: np.zeros(leaf.shape, np.float32) for name, leaf in SIMPLE_CNN.items()} | (changes or {})


def header(**entries: Any) -> bytes:
    """A safetensors file of a header alone."""
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + bytes(64)


HEADERS = (
    header(
        **{name: {"dtype": "F32", "shape": leaf.shape, "data_offsets": [0, 64]} for name, leaf in SIMPLE_CNN.items()}
    ),
    header(**{"fc2.bias": {"dtype": "F8_E4M3", "shape": [64], "data_offsets": [0, 64]}}),
    header(**{"fc2.bias": {"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 64]}}),
    header(__metadata__={"checkpoint": "{}", "sha256": ""}, a={"dtype": "I64", "shape": [8], "data_offsets": [0, 64]}),
    save({"conv1.bias": np.zeros(32, np.float32)}, {"checkpoint": "[]", "sha256": "0"}),
)


@scales
def test_weights_files(file: Callable[[bytes], Path], scale: int) -> None:
    def read(content: bytes) -> None:
        try:
            weights = load_weights(file(content), "float32")
        except UserError:
            return
        assert {name: array.shape for name, array in weights.items()} == {
            name: leaf.shape for name, leaf in SIMPLE_CNN.items()
        }
        assert all(np.isfinite(array).all() for array in weights.values())

    hammer(read, damaged(*HEADERS), 1500 * scale)
    hammer(read, damaged(save(tensors()), save(tensors({"fc2.bias": np.full(10, np.inf, np.float32)}))), 60 * scale)


@scales
def test_checkpoint_files(file: Callable[[bytes], Path], scale: int) -> None:
    def read(content: bytes) -> None:
        with pytest.raises(Unusable):
            load_checkpoint(file(content))

    hammer(read, damaged(*HEADERS), 1500 * scale)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@cache
def sound_content() -> dict[str, Any]:
    """What a checkpoint's metadata says."""
    progress = {"epoch": 1, "steps": 2, "loss_sum": 0.5, "seconds": 1.0, "rows": [{"epoch": 1}]}
    return {"format": "1", "step": 9, "progress": progress, "run": {"framework": "jax"}}


@st.composite
def contents(draw: st.DrawFn) -> bytes:
    """A checkpoint's metadata with a value exchanged or left out, or any JSON, as damaged text."""
    content: dict[str, Any] = json.loads(json.dumps(sound_content()))
    inside = draw(st.sampled_from([content, content["progress"], content["run"]]))
    key = draw(st.sampled_from(sorted(inside)))
    if draw(st.booleans()):
        inside[key] = draw(JSON)
    else:
        del inside[key]
    return draw(damaged(json.dumps(content).encode(), json.dumps(draw(JSON)).encode()))


@scales
def test_what_a_checkpoint_says(scale: int) -> None:
    moments = {
        f"{moment}.{name}": array for moment in ("first_moment", "second_moment") for name, array in TENSORS.items()
    }

    def read(text: bytes) -> None:
        try:
            found = interpret(text.decode(errors="replace"), TENSORS | moments)
        except Unusable:
            return
        assert isinstance(found, Checkpoint)
        assert len(found.progress.rows) == found.progress.epoch

    hammer(read, contents(), 1000 * scale)


TENSORS = tensors()


@scales
def test_a_finished_runs_files(tmp_path: Path, scale: int) -> None:
    """A study or a comparison does not reuse a run whose files are damaged."""
    (tmp_path / "weights.safetensors").write_bytes(b"")
    record = {"framework": "jax", "config": {"epochs": 1}, "versions": {"jax": "0"}, "machine": {"cpu": "x"}}
    rows = b'{"epoch": 1, "test_accuracy": 0.5}\n'

    def read(content: bytes) -> None:
        half = len(content) // 2
        (tmp_path / "config.json").write_bytes(content[:half] if content[:1] == b"{" else content)
        (tmp_path / "metrics.jsonl").write_bytes(rows if half % 2 else content)
        assert explain_mismatch(tmp_path, "jax", TrainConfig())

    texts = damaged(json.dumps(record).encode() * 2, json.dumps([record]).encode() * 2)
    hammer(read, texts | st.builds(lambda value: json.dumps(value).encode(), JSON), 1000 * scale)


def picture(mode: str, kind: str, **options: Any) -> bytes:
    """A small sound file."""
    content = io.BytesIO()
    Image.linear_gradient("L").resize((20, 30)).convert(mode).save(content, kind, **options)
    return content.getvalue()


@scales
def test_pictures(file: Callable[[bytes], Path], scale: int) -> None:
    """Whatever comes out goes into the network: 28x28 bytes."""

    def read(content: bytes) -> None:
        try:
            prepared = prepare_picture(read_picture(file(content)), "auto")
        except UserError as error:
            text = str(error)
        else:
            assert prepared.pixels.shape == (28, 28)
            assert prepared.pixels.dtype == np.uint8
            text = prepared.how
        assert "\n" not in text

    sound = (picture("L", "PNG"), picture("P", "PNG", transparency=0), picture("RGB", "JPEG"), picture("L", "GIF"))
    hammer(read, damaged(*sound, picture("CMYK", "JPEG"), picture("RGBA", "WEBP"), b""), 1500 * scale)


def test_the_checks_can_fail(file: Callable[[bytes], Path]) -> None:
    """A reader that trusts its input is found out."""

    def trusting(content: bytes) -> None:
        length = struct.unpack("<Q", content[:8])[0]
        json.loads(content[8 : 8 + length])

    with pytest.raises((struct.error, ValueError, RecursionError)):
        hammer(trusting, damaged(*HEADERS), 200)

    def greedy(_: bytes) -> None:
        np.ones(MEMORY // 4, np.float64)

    with pytest.raises((AssertionError, MemoryError)):
        hammer(greedy, st.binary(max_size=4), 2)

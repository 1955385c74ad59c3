"""Damaged files: reading one gives the right answer or one clear error, without a traceback, a hang or a flood.

There are 4,530 damaged inputs, the same at every run (hypothesis, derandomised). `-m slow` tries ten times as many.
"""

import contextlib
import gc
import gzip
import io
import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import ExifTags, Image
from safetensors.numpy import save

from experiments.records import explain_mismatch, read_peak_memory
from jax_cnn.checkpoint import Unusable, interpret, load_checkpoint
from jax_cnn.config import CNN, TrainConfig, UserError
from jax_cnn.data import decode_idx
from jax_cnn.data.files import UnusableFile, read_verified
from jax_cnn.pictures.likeness import find_oddities
from jax_cnn.pictures.prepare import prepare_picture
from jax_cnn.pictures.read import FORMATS, read_picture
from jax_cnn.torch_layout import SIMPLE_CNN
from jax_cnn.weights import load_weights
from parity_tests.support import zero_weights

pytestmark = pytest.mark.extended

MEMORY = 2**29  # bytes that reading may add to the peak of the process: twice the largest file that is read

Read = Callable[[bytes], None]
Hammer = Callable[[Read, st.SearchStrategy[bytes], int], None]


@st.composite
def damaged(draw: st.DrawFn, *originals: bytes) -> bytes:
    """Draw one of the originals and damage it up to three times."""
    content = bytearray(draw(st.sampled_from(originals)))
    for _ in range(draw(st.integers(0, 3))):
        place = draw(st.integers(0, max(len(content) - 1, 0)))
        match draw(st.integers(0, 4)):
            case 0:  # cut
                del content[place:]
            case 1 if content:  # flip a bit
                content[place] ^= 1 << draw(st.integers(0, 7))
            case 2:  # insert
                content[place:place] = draw(st.binary(max_size=16))
            case 3:  # zero
                content[place : place + 64] = bytes(len(content[place : place + 64]))
            case 4:  # a huge length at the start
                content[:8] = struct.pack(draw(st.sampled_from("<>")) + "Q", draw(st.integers(0, 2**64 - 1)))
    return bytes(content)


def read_all(read: Read, inputs: st.SearchStrategy[bytes], count: int) -> None:
    """Read so many inputs, and assert that the memory of the process stays within its bound."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # Linux then measures the peak anew
    before, tried = read_peak_memory(), 0

    def counted(content: bytes) -> None:
        nonlocal tried
        tried += 1
        read(content)

    repeatable = settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        report_multiple_bugs=False,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.large_base_example, HealthCheck.data_too_large],
    )
    repeatable(given(inputs)(counted))()
    assert read_peak_memory() - before <= MEMORY
    assert tried >= count, f"{tried} inputs of {count}: there are no more of this kind"


@pytest.fixture(params=[1, pytest.param(10, marks=pytest.mark.slow)])
def hammer(request: pytest.FixtureRequest) -> Iterator[Hammer]:
    """Return `read_all`, or in the slow tests one that reads ten times as many.

    Memory is measured, so cycles are collected as often as in the commands and not as rarely as in other tests.
    """
    rarely = gc.get_threshold()
    gc.collect()
    gc.set_threshold(700, 10, 10)
    yield lambda read, inputs, count: read_all(read, inputs, count * request.param)
    gc.set_threshold(*rarely)


def write(content: bytes, path: Path) -> Path:
    """Write an input where a file is expected, and return its path."""
    path.write_bytes(content)
    return path


# The data set


def idx(shape: tuple[int, ...]) -> bytes:
    """Return a small sound IDX file."""
    lengths = b"".join(struct.pack(">I", length) for length in shape)
    return b"\0\0\x08" + bytes([len(shape)]) + lengths + bytes(range(int(np.prod(shape))))


def test_damaged_idx_files_give_their_own_bytes_or_an_error(hammer: Hammer) -> None:
    def read(content: bytes) -> None:
        with contextlib.suppress(ValueError):
            assert decode_idx(content).tobytes() == content[4 + 4 * content[3] :]

    hammer(read, damaged(idx((3, 4, 5)), idx((7,)), idx(())) | st.binary(max_size=64), 1000)


def test_packed_files_give_the_published_bytes_or_an_error(hammer: Hammer, tmp_path: Path, data_dir: Path) -> None:
    """Among them is one that unpacks to a gigabyte."""
    name = "t10k-labels-idx1-ubyte"
    content = (data_dir / "FashionMNIST" / "raw" / name).read_bytes()
    bomb = gzip.compress(bytes(2**20)) * 1024

    def read(packed: bytes) -> None:
        (tmp_path / "input.gz").write_bytes(packed)
        with contextlib.suppress(UnusableFile):
            assert read_verified(tmp_path / "input.gz", name) == content

    hammer(read, damaged(gzip.compress(content), gzip.compress(content[:100]), bomb), 600)


# Weights and checkpoints


def header(**entries: Any) -> bytes:
    """Return a safetensors file with this header and 64 bytes of data."""
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + bytes(64)


def leaf_entry(dtype: str, shape: object) -> dict[str, Any]:
    """Return the header's entry for a tensor."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [0, 64]}


HEADERS = (
    header(**{name: leaf_entry("F32", leaf.shape) for name, leaf in SIMPLE_CNN.items()}),
    header(**{"fc2.bias": leaf_entry("F8_E4M3", [64])}),
    header(**{"fc2.bias": leaf_entry("F32", [2**40, 2**40])}),
    header(__metadata__={"checkpoint": "{}", "sha256": ""}, a=leaf_entry("I64", [8])),
    save({"conv1.bias": np.zeros(32, np.float32)}, {"checkpoint": "[]", "sha256": "0"}),
)


def test_damaged_weights_files_give_finite_weights_or_an_error(hammer: Hammer, tmp_path: Path) -> None:
    def read(content: bytes) -> None:
        try:
            weights = load_weights(write(content, tmp_path / "input"), "float32")
        except UserError:
            return
        assert {name: array.shape for name, array in weights.items()} == {
            name: leaf.shape for name, leaf in SIMPLE_CNN.items()
        }
        assert all(np.isfinite(array).all() for array in weights.values())

    infinite = {"fc2.bias": np.full(10, np.inf, np.float32)}
    hammer(read, damaged(*HEADERS), 700)
    hammer(read, damaged(save(zero_weights(CNN)), save(zero_weights(CNN) | infinite)), 30)


def test_damaged_checkpoint_files_are_refused(hammer: Hammer, tmp_path: Path) -> None:
    def read(content: bytes) -> None:
        with pytest.raises(Unusable):
            load_checkpoint(write(content, tmp_path / "input"))

    hammer(read, damaged(*HEADERS), 700)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def checkpoint_texts(draw: st.DrawFn) -> bytes:
    """Draw the JSON of a checkpoint with a value replaced or left out, or any JSON, as damaged text."""
    progress = {"epoch": 1, "steps": 2, "loss_sum": 0.5, "seconds": 1.0, "rows": [{"epoch": 1}]}
    content: dict[str, Any] = {"format": "1", "step": 9, "progress": progress, "run": {"framework": "jax"}}
    inside = draw(st.sampled_from([content, content["progress"], content["run"]]))
    key = draw(st.sampled_from(sorted(inside)))
    if draw(st.booleans()):
        inside[key] = draw(JSON)
    else:
        del inside[key]
    return draw(damaged(json.dumps(content).encode(), json.dumps(draw(JSON)).encode()))


def test_the_damaged_text_of_a_checkpoint_gives_a_row_for_each_epoch_or_an_error(hammer: Hammer) -> None:
    weights = zero_weights(CNN)
    moments = {f"{moment}.{name}": weights[name] for moment in ("first_moment", "second_moment") for name in weights}

    def read(text: bytes) -> None:
        with contextlib.suppress(Unusable):
            progress = interpret(text.decode(errors="replace"), weights | moments).progress
            assert len(progress.rows) == progress.epoch

    hammer(read, checkpoint_texts(), 400)


def test_an_incomplete_run_is_not_a_finished_one(hammer: Hammer, tmp_path: Path) -> None:
    """A study or a comparison would not train it again if it were taken for one."""
    (tmp_path / "weights.safetensors").write_bytes(b"")
    record = {"framework": "jax", "config": {"epochs": 1}, "versions": {"jax": "0"}, "machine": {"cpu": "x"}}
    rows = b'{"epoch": 1, "test_accuracy": 0.5}\n'

    def read(content: bytes) -> None:
        half = len(content) // 2
        (tmp_path / "config.json").write_bytes(content[:half] if content[:1] == b"{" else content)
        (tmp_path / "metrics.jsonl").write_bytes(rows if half % 2 else content)
        assert explain_mismatch(tmp_path, "jax", TrainConfig())

    texts = damaged(json.dumps(record).encode() * 2, json.dumps([record]).encode() * 2)
    hammer(read, texts | st.builds(lambda value: json.dumps(value).encode(), JSON), 400)


# Pictures


def picture(mode: str, kind: str) -> bytes:
    """Return a small sound picture file, turned by EXIF where the format can say so."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    content = io.BytesIO()
    Image.linear_gradient("L").resize((20, 30)).convert(mode).save(content, kind, exif=exif)
    return content.getvalue()


def test_damaged_pictures_give_28_by_28_bytes_or_one_line_and_print_nothing(
    hammer: Hammer, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    def read(content: bytes) -> None:
        try:
            prepared = prepare_picture(read_picture(write(content, tmp_path / "input")), "auto")
        except UserError as error:
            text = str(error)
        else:
            assert prepared.pixels.shape == (28, 28)
            assert prepared.pixels.dtype == np.uint8
            find_oddities(prepared)
            text = prepared.summary
        assert text.isprintable()

    modes = ("1", "L", "P", "LA", "RGBA")
    sound = [picture("RGB", kind) for kind in FORMATS] + [picture(mode, "PNG") for mode in modes]
    hammer(read, damaged(*sound, picture("CMYK", "JPEG"), b""), 700)
    assert capfd.readouterr() == ("", "")


# The checks can fail


def test_a_reader_that_trusts_a_length_or_takes_too_much_memory_is_noticed() -> None:
    def trusting(content: bytes) -> None:
        length = struct.unpack("<Q", content[:8])[0]
        json.loads(content[8 : 8 + length])

    with pytest.raises((struct.error, ValueError, RecursionError)):
        read_all(trusting, damaged(*HEADERS), 200)

    def greedy(_: bytes) -> None:
        np.ones(MEMORY // 4, np.float64)

    with pytest.raises((AssertionError, MemoryError)):
        read_all(greedy, st.binary(max_size=4), 2)

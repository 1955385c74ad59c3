"""The training program compiles for TPUs that are not here, as it should: one exchange a step, its share of work.

`pip install --editable '.[tpu,test]'` brings the compiler, `pytest parity_tests -m tpu` asks it.
"""

import importlib.util
import json
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from jax_cnn import aot
from jax_cnn.aot import Collective, Compilation
from jax_cnn.config import TpuPrecision, UserError
from parity_tests.support import ROOT

pytestmark = [
    pytest.mark.tpu,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="pip install --editable '.[tpu]' is missing"),
]

SHARE = 64  # images of a batch on each chip
CHIPS = {"v5e:1x1": 1, "v5e:2x2": 4, "v5e:16x16": 256}
PARAMETERS = 1_630_090
HBM = 16 * 2**30  # bytes of a v5e chip: https://docs.cloud.google.com/tpu/docs/v5e
FLOPS_BOUND = 0.05  # worst seen over these three in both precisions: 0.024


@cache
def compile_training(topology: str, precision: TpuPrecision = "float32") -> Compilation:
    """Each is compiled once; a share of 64 images to a chip."""
    return aot.compile_training(topology, SHARE * CHIPS[topology], precision)


def matrix_flops(images: int) -> int:
    """Of a step's matrix products and convolutions: forward, by weights, and by inputs but for the first layer's."""
    conv1, conv2 = 28 * 28 * 9 * 32, 14 * 14 * 9 * 32 * 64
    fc1, fc2 = 3136 * 512, 512 * 10
    return 2 * images * (2 * conv1 + 3 * (conv2 + fc1 + fc2))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("topology", CHIPS)
def test_every_chip_computes_its_share_and_gradients_are_exchanged_once(topology: str, precision: TpuPrecision) -> None:
    compilation = compile_training(topology, precision)
    assert compilation.chips == CHIPS[topology]
    assert abs(compilation.flops / matrix_flops(SHARE) - 1) <= FLOPS_BOUND
    gradients_and_loss = Collective("all-reduce", 4 * (PARAMETERS + 1))
    assert compilation.collectives == (() if compilation.chips == 1 else (gradients_and_loss,))
    state = 4 * 3 * PARAMETERS
    assert state < compilation.arguments < compilation.memory < HBM
    assert compilation.outputs < state  # the new state takes the old one's place


def test_a_batch_that_is_not_shared_is_noticed() -> None:
    """Four chips cannot share 66 images: each computes all of them."""
    flops = aot.compile_training("v5e:2x2", SHARE + 2, "float32").flops
    assert abs(flops / (matrix_flops(SHARE + 2) / 4) - 1) > FLOPS_BOUND
    assert abs(flops / matrix_flops(SHARE + 2) - 1) <= FLOPS_BOUND


def test_gradients_that_are_not_averaged_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jax.lax.pmean", lambda values, axis: values)
    assert aot.compile_training("v5e:2x2", 4 * SHARE, "float32").collectives == ()


def test_what_does_not_fit_into_a_chips_memory_is_refused() -> None:
    with pytest.raises(UserError, match="--topologies v5e:1x1: the program does not compile: RESOURCE_EXHAUSTED"):
        aot.compile_training("v5e:1x1", 60_000, "float32")


@pytest.mark.parametrize("topology", ["v5e:3x3", "v9x:2x2", "nowhere"])
def test_an_unknown_tpu_is_refused(topology: str) -> None:
    with pytest.raises(UserError, match=f"--topologies {topology}: the compiler knows no such TPU"):
        aot.find_chips(topology)


def test_the_command_shows_and_writes_what_was_compiled(tmp_path: Path) -> None:
    line = [sys.executable, str(ROOT / "scripts" / "compile_tpu.py"), "--out-dir", str(tmp_path)]
    flags = ["--topologies", "v5e:2x2", "--precisions", "bfloat16", "--batch-per-chip", "16"]
    done = subprocess.run([*line, *flags], capture_output=True, text=True, timeout=1200)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"v5e:2x2 +bfloat16 +64 ", done.stdout)
    assert "all-reduce 6.5 MB" in done.stdout
    (compilation,) = json.loads((tmp_path / "compilations.json").read_text())["compilations"]
    assert (compilation["chips"], compilation["batch_size"]) == (4, 64)
    assert compilation["flops"] < matrix_flops(SHARE) / 3

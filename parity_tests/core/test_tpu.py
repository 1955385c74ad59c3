"""The training program compiles for TPUs that are not here, as it should: one exchange a step, its share of the work.

`pip install --editable '.[tpu,test]'` installs the compiler, and `pytest parity_tests -m tpu` runs these tests.
"""

import importlib.util
import json
import re
from functools import cache
from pathlib import Path

import pytest

from experiments import tpu
from experiments.tpu import Collective, Compilation
from jax_cnn.config import TpuPrecision, UserError
from parity_tests.support import run_command

pytestmark = [
    pytest.mark.tpu,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="pip install --editable '.[tpu]' is missing"),
]

SHARE = 64  # images of a batch on each chip
CHIPS = {"v5e:1x1": 1, "v5e:2x2": 4, "v5e:16x16": 256}
PARAMETERS = 1_630_090
EXCHANGES = {  # the loss is float32 in both, and XLA combines exchanges of one dtype only
    "float32": (Collective("all-reduce", 4 * (PARAMETERS + 1)),),
    "bfloat16": (Collective("all-reduce", 4), Collective("all-reduce", 2 * PARAMETERS)),
}
HBM = 16 * 2**30  # bytes of a v5e chip: https://docs.cloud.google.com/tpu/docs/v5e
FLOPS_BOUND = 0.05  # worst seen over these three in both precisions: 0.029


@cache
def compile_training(topology: str, precision: TpuPrecision) -> Compilation:
    """Compile the training program once, with a share of 64 images for each chip."""
    return tpu.compile_training(topology, SHARE * CHIPS[topology], precision)


def matrix_flops(images: int) -> int:
    """Return the FLOP of a step's products: forward, by weights, and by inputs but for those of the first layer."""
    conv1, conv2 = 28 * 28 * 9 * 32, 14 * 14 * 9 * 32 * 64
    fc1, fc2 = 3136 * 512, 512 * 10
    return 2 * images * (2 * conv1 + 3 * (conv2 + fc1 + fc2))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("topology", CHIPS)
def test_every_chip_computes_its_share_and_gradients_are_exchanged_once(topology: str, precision: TpuPrecision) -> None:
    compilation = compile_training(topology, precision)
    assert compilation.chips == CHIPS[topology]
    assert abs(compilation.flops / matrix_flops(SHARE) - 1) <= FLOPS_BOUND
    assert compilation.collectives == (() if compilation.chips == 1 else EXCHANGES[precision])
    state = 4 * 3 * PARAMETERS
    assert state < compilation.arguments < compilation.memory < HBM
    assert compilation.outputs < state  # the new state takes the old one's place


def test_by_its_compiler_a_tpu_needs_fewer_cycles_with_its_own_operations() -> None:
    own = compile_training("v5e:1x1", "float32")
    assert own.cycles < tpu.compile_training("v5e:1x1", SHARE, "float32", cpu_operations=True).cycles


def test_a_batch_that_is_not_shared_is_noticed() -> None:
    """Four chips cannot share 66 images: each computes all of them, and there is nothing to exchange."""
    compilation = tpu.compile_training("v5e:2x2", SHARE + 2, "float32")
    assert abs(compilation.flops / (matrix_flops(SHARE + 2) / 4) - 1) > FLOPS_BOUND
    assert abs(compilation.flops / matrix_flops(SHARE + 2) - 1) <= FLOPS_BOUND
    assert compilation.collectives == ()


def test_a_program_that_does_not_fit_into_a_chips_memory_is_refused() -> None:
    with pytest.raises(UserError, match="--topologies v5e:1x1: the program does not compile: RESOURCE_EXHAUSTED"):
        tpu.compile_training("v5e:1x1", 60_000, "float32", cpu_operations=True)


@pytest.mark.parametrize("topology", ["v5e:3x3", "v9x:2x2", "nowhere"])
def test_an_unknown_tpu_is_refused(topology: str) -> None:
    with pytest.raises(UserError, match=f"--topologies {topology}: the compiler knows no such TPU"):
        tpu.find_chips(topology)


def test_the_command_shows_and_writes_what_was_compiled(tmp_path: Path) -> None:
    flags = ["--topologies", "v5e:2x2", "--precisions", "bfloat16", "--batch-per-chip", "16"]
    done = run_command("compile_tpu", *flags, "--out-dir", tmp_path, cwd=tmp_path, timeout=1200)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"v5e:2x2 +bfloat16 +64 ", done.stdout)
    assert "all-reduce 3.3 MB" in done.stdout
    (compilation,) = json.loads((tmp_path / "compilations.json").read_text(encoding="utf-8"))["compilations"]
    assert (compilation["chips"], compilation["batch_size"]) == (4, 64)
    assert compilation["flops"] < matrix_flops(SHARE) / 3

"""The training program goes to platforms that are not here: it lowers for each, shared among devices or not."""

import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest
from jax import export
from jax import numpy as jnp
from jax.sharding import AbstractMesh

from jax_cnn import aot, programs
from jax_cnn.aot import Collective
from jax_cnn.config import JaxTrainConfig
from jax_cnn.data import FashionMNIST
from jax_cnn.devices import AXIS, make_mesh
from jax_cnn.train import make_optimizer
from jax_cnn.trainer import JaxTrainer
from parity_tests.support import ROOT

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
BATCH = 64
TENSORS = 8  # kernels and biases of four layers

Updates = Any  # a tree like the weights


@pytest.fixture(autouse=True)
def _without_float64() -> Iterator[None]:
    """As a run at float32 or bfloat16 sets it."""
    with jax.enable_x64(False):
        yield


def export_training(devices: int = 1, precision: str = "float32") -> export.Exported:
    """The training program of a run on so many devices, lowered for all platforms at once."""
    program = aot.training_program(AbstractMesh((devices,), (AXIS,)), BATCH, precision)
    return export.export(program.function, platforms=PLATFORMS)(*program.arguments)


def kind(array: jax.core.ShapedArray) -> str:
    """Its dtype and shape."""
    return f"{array.dtype}{list(array.shape)}"


def count_all_reduces(exported: export.Exported) -> int:
    """Exchanges in the program, before XLA combines them."""
    return len(re.findall(r"stablehlo\.all_reduce", exported.mlir_module()))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("devices", [1, 8])
def test_the_training_program_lowers_for_every_platform(devices: int, precision: str) -> None:
    exported = export_training(devices, precision)
    assert (exported.platforms, exported.nr_devices) == (PLATFORMS, devices)
    text = exported.mlir_module()
    *state, pixels, labels, steps = exported.in_avals
    *new_state, losses = exported.out_avals
    assert sum(array.size for array in state) == 3 * 1_630_090 + 1  # weights, both moments, the number of steps
    assert [kind(array) for array in new_state] == [kind(array) for array in state]
    assert (kind(pixels), kind(labels)) == ("uint8[1, 64, 64, 28, 28]", "uint8[1, 64, 64]")
    assert (kind(steps), kind(losses)) == ("int32[]", "float32[1, 64]")
    share = f"tensor<{BATCH // devices}x28x28x32x{'bf16' if precision == 'bfloat16' else 'f32'}>"
    assert share in text  # the first stage's output on each device
    assert count_all_reduces(exported) == (TENSORS + 1 if devices > 1 else 0)  # every gradient, and the loss
    assert "f64" not in text


def test_gradients_that_are_not_averaged_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jax.lax.pmean", lambda values, axis: values)
    assert count_all_reduces(export_training(8)) == 0


def eigenvalue(gradient: jax.Array) -> jax.Array:
    """What a TPU cannot compute."""
    return gradient * jnp.linalg.eigvals(jnp.eye(2, dtype=gradient.dtype)).real[0]


def callback(gradient: jax.Array) -> jax.Array:
    """What only a device with a Python beside it can compute."""
    return jax.pure_callback(np.negative, gradient, gradient)


def library_call(gradient: jax.Array) -> jax.Array:
    """What only a machine with this library can compute."""
    return jax.ffi.ffi_call("library", jax.ShapeDtypeStruct(gradient.shape, gradient.dtype))(gradient)


@pytest.mark.parametrize(
    ("fault", "complaint"),
    [
        (eigenvalue, r"'eig' not found for platforms \['tpu'\]"),
        (callback, "require devices to be present"),
        (library_call, "@library"),
    ],
)
def test_what_some_platform_lacks_is_noticed(fault: Any, complaint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    planted = optax.stateless(lambda updates, params: jax.tree.map(fault, updates))
    monkeypatch.setattr(aot, "make_optimizer", lambda config: optax.chain(planted, make_optimizer(config)))
    with pytest.raises((NotImplementedError, ValueError), match=complaint):
        export_training()


class Lowered(Exception):
    """The text of a run's training program."""


def test_it_is_the_program_that_a_run_compiles(data: FashionMNIST, monkeypatch: pytest.MonkeyPatch) -> None:
    original = programs.training

    def intercept(*arguments: Any) -> None:
        raise Lowered(original(*arguments).lower().as_text())

    monkeypatch.setattr(programs, "training", intercept)
    devices = jax.devices("cpu")[:1]
    texts = []
    configs = (JaxTrainConfig(), JaxTrainConfig(precision="bfloat16"))
    for config in configs:
        with pytest.raises(Lowered) as run:
            JaxTrainer(config, data, devices)
        texts.append(run.value.args[0])
    monkeypatch.undo()
    abroad = [
        aot.training_program(make_mesh(devices), BATCH, each).lower().as_text() for each in ("float32", "bfloat16")
    ]
    assert texts == abroad
    assert texts[0] != texts[1]  # the check can fail


def test_exchanges_are_read_from_a_compiled_program() -> None:
    hlo = """
  %all-reduce.3 = (f32[3,3,1,32]{3,1,0,2:T(4,128)S(1)}, bf16[512]{0:T(512)S(1)}, /*index=2*/f32[]{:T(128)}) all-reduce(
  %get-tuple-element.9 = f32[]{:T(128)} get-tuple-element(%all-reduce.3), index=2
  %start = (f32[64]{0}, f32[256]{0}) all-gather-start(%shard), dimensions={0}
  %done = f32[256]{0} all-gather-done(%start)
  %collective-permute.1 = pred[7]{0} collective-permute(%flags), source_target_pairs={{0,1}}
  %fusion.1 = f32[64]{0} fusion(%all-reduce.3), calls=%fused
"""
    assert aot.find_collectives(hlo) == (
        Collective("all-reduce", 4 * 288 + 2 * 512 + 4),
        Collective("all-gather", 4 * (64 + 256)),
        Collective("collective-permute", 7),
    )


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        pytest.param(
            (),
            "the TPU compiler is not installed here; pip install --editable '.[tpu]' brings it (libtpu)",
            marks=pytest.mark.skipif(importlib.util.find_spec("libtpu") is not None, reason="it is installed here"),
        ),
        (("--precisions", "float64"), "invalid choice 'float64' for argument '--precisions'"),
        (("--batch-per-chip", "0"), "--batch-per-chip must be between 1 and 60,000, not 0"),
    ],
)
def test_a_slip_gets_one_line(flags: tuple[str, ...], complaint: str, tmp_path: Path) -> None:
    line = [sys.executable, str(ROOT / "scripts" / "compile_tpu.py"), *flags, "--out-dir", str(tmp_path)]
    done = subprocess.run(line, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith(f"error: {complaint}")

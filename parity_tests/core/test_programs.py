"""The training program lowers for platforms that are not here, and computes in the dtypes that were asked for.

`pip install --editable '.[tpu,test]'` installs the compiler for TPUs, and `pytest parity_tests -m tpu` runs the tests
that need it: one exchange a step, and to each chip its share of the work.
"""

import importlib.util
import json
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import pytest
from jax import export
from jax import numpy as jnp
from jax.sharding import AbstractMesh
from jax.stages import Lowered

from experiments import tpu
from experiments.tpu import Collective, Compilation
from jax_cnn import trainer
from jax_cnn.config import AdamConfig, JaxTrainConfig, TpuPrecision, UserError
from jax_cnn.data import FashionMNIST
from jax_cnn.devices import AXIS, make_mesh
from jax_cnn.train import make_optimizer
from jax_cnn.trainer import JaxTrainer
from parity_tests.support import run_command

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
BATCH = 64
MATRIX_PRODUCTS = (11, 12)  # 3 for each of 4 layers; JAX or XLA drops the gradient by the images, which nobody reads


@pytest.fixture(autouse=True)
def _without_float64() -> Iterator[None]:
    """Switch 64-bit numbers off, as a run at float32 or bfloat16 does."""
    with jax.enable_x64(False):
        yield


def export_training(devices: int = 1, precision: str = "float32") -> export.Exported:
    """Lower the training program of a run on this number of devices, for all platforms at once."""
    program, arguments = tpu.training_program(AbstractMesh((devices,), (AXIS,)), BATCH, precision)
    return export.export(program, platforms=PLATFORMS)(*arguments)


def lower_training(precision: str) -> Lowered:
    """Lower the training program of a run on one CPU device."""
    program, arguments = tpu.training_program(make_mesh(jax.devices("cpu")[:1]), BATCH, precision)
    return program.lower(*arguments)


def describe(array: jax.core.ShapedArray) -> str:
    """Return dtype and shape of an array: `float32[1, 64]`."""
    return f"{array.dtype}{list(array.shape)}"


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("devices", [1, 8])
def test_the_training_program_lowers_for_every_platform(devices: int, precision: str) -> None:
    exported = export_training(devices, precision)
    assert (exported.platforms, exported.nr_devices) == (PLATFORMS, devices)
    *state, pixels, labels, steps = exported.in_avals
    *new_state, losses = exported.out_avals
    assert sum(array.size for array in state) == 3 * 1_630_090 + 1  # weights, both moments, the number of steps
    assert [describe(array) for array in new_state] == [describe(array) for array in state]
    assert (describe(pixels), describe(labels)) == ("uint8[64, 64, 28, 28]", "uint8[64, 64]")
    assert (describe(steps), describe(losses)) == ("int32[]", "float32[64]")
    text = exported.mlir_module()
    assert f"tensor<{BATCH}x28x28x32x{'bf16' if precision == 'bfloat16' else 'f32'}>" in text  # conv1's output
    assert "f64" not in text


def find_eigenvalue(gradient: jax.Array) -> jax.Array:
    """Compute what a TPU cannot."""
    return gradient * jnp.linalg.eigvals(jnp.eye(2, dtype=gradient.dtype)).real[0]


def call_python(gradient: jax.Array) -> jax.Array:
    """Compute what only a device with a Python beside it can."""
    return jax.pure_callback(np.negative, gradient, gradient)


def call_library(gradient: jax.Array) -> jax.Array:
    """Compute what only a machine with this library can."""
    return jax.ffi.ffi_call("library", jax.ShapeDtypeStruct(gradient.shape, gradient.dtype))(gradient)


@pytest.mark.parametrize(
    ("fault", "complaint"),
    [
        (find_eigenvalue, r"'eig' not found for platforms \['tpu'\]"),
        (call_python, "require devices to be present"),
        (call_library, "@library"),
    ],
)
def test_an_operation_that_a_platform_lacks_is_noticed(
    fault: Any, complaint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted = optax.stateless(lambda updates, params: jax.tree.map(fault, updates))
    monkeypatch.setattr(tpu, "make_optimizer", lambda config: optax.chain(planted, make_optimizer(config)))
    with pytest.raises((NotImplementedError, ValueError), match=complaint):
        export_training()


class Recorded(Exception):
    """Ends the making of a trainer before it compiles."""


def test_the_program_is_the_one_that_a_run_compiles(data: FashionMNIST, monkeypatch: pytest.MonkeyPatch) -> None:
    texts: list[str] = []

    def record(*arguments: Any) -> tuple[Any, Any]:
        program, shapes = original(*arguments)
        texts.append(program.lower(*shapes).as_text())
        raise Recorded

    original = trainer.training_program
    monkeypatch.setattr(trainer, "training_program", record)
    for precision in ("float32", "bfloat16"):
        with pytest.raises(Recorded):
            JaxTrainer(JaxTrainConfig(precision=precision, limit_test=10), data, jax.devices("cpu")[:1])
    monkeypatch.undo()
    assert texts == [lower_training(precision).as_text() for precision in ("float32", "bfloat16")]
    assert texts[0] != texts[1]  # the check can fail


def kept_dtypes(precision: str) -> dict[str, set[str]]:
    """Return the dtypes of the weights and of both moments that the training program hands on."""
    program, arguments = tpu.training_program(make_mesh(jax.devices("cpu")[:1]), BATCH, precision)
    state, _ = jax.eval_shape(program, *arguments)
    trees = {"weights": state.params} | {
        name: optax.tree_utils.tree_get(state.opt_state, name) for name in ("mu", "nu")
    }
    return {name: {leaf.dtype.name for leaf in jax.tree.leaves(tree)} for name, tree in trees.items()}


def matrix_products(lowered: Lowered) -> list[str]:
    """Return the dtypes of the operands and result of every convolution and matrix product: `bf16 bf16 bf16`."""
    lines = re.findall(r"stablehlo\.(?:dot_general|convolution).* : (\(.*)", lowered.as_text())
    return [" ".join(re.findall(r"x([a-z]+\d+)>", line)) for line in lines]


@pytest.mark.parametrize(("precision", "short"), [("float32", "f32"), ("bfloat16", "bf16")])
def test_products_have_the_precision_asked_for_and_the_state_is_float32(precision: str, short: str) -> None:
    assert kept_dtypes(precision) == {name: {"float32"} for name in ("weights", "mu", "nu")}
    products = matrix_products(lower_training(precision))
    assert set(products) == {f"{short} {short} {short}"}
    assert len(products) in MATRIX_PRODUCTS


@pytest.mark.parametrize("moment", ["mu", "nu"])
def test_a_moment_in_bfloat16_is_noticed(moment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def make_faulty(config: AdamConfig) -> optax.GradientTransformation:
        sound = make_optimizer(config)

        def narrow(state: optax.OptState) -> optax.OptState:
            narrowed = jax.tree.map(jnp.bfloat16, optax.tree_utils.tree_get(state, moment))
            return optax.tree_utils.tree_set(state, **{moment: narrowed})

        def update(updates: optax.Updates, state: optax.OptState, params: Any = None) -> Any:
            updates, state = sound.update(updates, state, params)
            return updates, narrow(state)

        return optax.GradientTransformation(lambda params: narrow(sound.init(params)), update)

    monkeypatch.setattr(tpu, "make_optimizer", make_faulty)
    assert kept_dtypes("bfloat16")[moment] == {"bfloat16"}


def test_exchanges_are_read_from_a_compiled_program() -> None:
    hlo = """
  %all-reduce.3 = (f32[3,3,1,32]{3,1,0,2:T(4,128)S(1)}, bf16[512]{0:T(512)S(1)}, /*index=2*/f32[]{:T(128)}) all-reduce(
  %get-tuple-element.9 = f32[]{:T(128)} get-tuple-element(%all-reduce.3), index=2
  %start = (f32[64]{0}, f32[256]{0}) all-gather-start(%shard), dimensions={0}
  %done = f32[256]{0} all-gather-done(%start)
  %collective-permute.1 = pred[7]{0} collective-permute(%flags), source_target_pairs={{0,1}}
  %fusion.1 = f32[64]{0} fusion(%all-reduce.3), calls=%fused
"""
    assert tpu.find_collectives(hlo) == (
        Collective("all-reduce", 4 * 288 + 2 * 512 + 4),
        Collective("all-gather", 4 * (64 + 256)),
        Collective("collective-permute", 7),
    )


def test_the_cycles_of_a_step_are_those_of_the_loop() -> None:
    hlo = """
%body.1 (state: f32[]) -> f32[] {
  %copy.1 = f32[] copy(%state), backend_config={"estimated_cycles":"20"}
  ROOT %fusion.1 = f32[] fusion(%copy.1), calls=%fused, backend_config={"estimated_cycles":"3","x":[]}
}

%other.1 (state: f32[]) -> f32[] {
  ROOT %copy.2 = f32[] copy(%state), backend_config={"estimated_cycles":"400"}
}

ENTRY %main.1 (state: f32[]) -> f32[] {
  %copy.3 = f32[] copy(%state), backend_config={"estimated_cycles":"5000"}
  ROOT %while.1 = f32[] while(%copy.3), condition=%condition.1, body=%body.1
}
"""
    assert tpu.count_cycles(hlo) == 23


# Compiled for TPUs that are not here

LIBTPU = importlib.util.find_spec("libtpu")


def needs_compiler(test: Callable[..., None]) -> Any:
    """Mark a test that compiles for TPUs, and skip it where the compiler is not installed."""
    skip = pytest.mark.skipif(LIBTPU is None, reason="pip install --editable '.[tpu]' is missing")
    return pytest.mark.tpu(skip(test))


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


@needs_compiler
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


@needs_compiler
def test_by_its_compiler_a_tpu_needs_fewer_cycles_with_its_own_operations() -> None:
    own = compile_training("v5e:1x1", "float32")
    assert own.cycles < tpu.compile_training("v5e:1x1", SHARE, "float32", cpu_operations=True).cycles


@needs_compiler
def test_a_batch_that_is_not_shared_is_noticed() -> None:
    """Four chips cannot share 66 images: each computes all of them, and there is nothing to exchange."""
    compilation = tpu.compile_training("v5e:2x2", SHARE + 2, "float32")
    assert abs(compilation.flops / (matrix_flops(SHARE + 2) / 4) - 1) > FLOPS_BOUND
    assert abs(compilation.flops / matrix_flops(SHARE + 2) - 1) <= FLOPS_BOUND
    assert compilation.collectives == ()


@needs_compiler
def test_a_program_that_does_not_fit_into_a_chips_memory_is_refused() -> None:
    with pytest.raises(UserError, match="--topologies v5e:1x1: the program does not compile: RESOURCE_EXHAUSTED"):
        tpu.compile_training("v5e:1x1", 60_000, "float32", cpu_operations=True)


@needs_compiler
@pytest.mark.parametrize("topology", ["v5e:3x3", "v9x:2x2", "nowhere"])
def test_an_unknown_tpu_is_refused(topology: str) -> None:
    with pytest.raises(UserError, match=f"--topologies {topology}: the compiler knows no such TPU"):
        tpu.find_chips(topology)


@needs_compiler
def test_the_command_shows_and_writes_what_was_compiled(tmp_path: Path) -> None:
    flags = ["--topologies", "v5e:2x2", "--precisions", "bfloat16", "--batch-per-chip", "16"]
    done = run_command("compile_tpu", *flags, "--out-dir", tmp_path, cwd=tmp_path, timeout=1200)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"v5e:2x2 +bfloat16 +64 ", done.stdout)
    assert "all-reduce 3.3 MB" in done.stdout
    (compilation,) = json.loads((tmp_path / "compilations.json").read_text(encoding="utf-8"))["compilations"]
    assert (compilation["chips"], compilation["batch_size"]) == (4, 64)
    assert compilation["flops"] < matrix_flops(SHARE) / 3

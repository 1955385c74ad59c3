"""Compile the training program for TPUs that are not here, and read what their compiler says of it.

libtpu holds the TPU's compiler, and needs no TPU to compile (`jax.experimental.topologies`). What it makes is the
program that the TPUs would load: the same one that `JaxTrainer` runs. Nothing is run here, and no speed is known.
"""

import importlib.util
import math
import os
import re
import time
from dataclasses import dataclass
from typing import Any

import jax
from jax import numpy as jnp
from jax.experimental import topologies
from jax.stages import Wrapped

from jax_cnn import trainer
from jax_cnn.compiler import compiler_options
from jax_cnn.config import TRAIN_SIZE, AdamConfig, TpuPrecision, UserError
from jax_cnn.devices import AnyMesh, make_mesh, replicated
from jax_cnn.model import init_params
from jax_cnn.train import init_state, make_optimizer

# What libtpu would ask the machine about its TPU, and complain about on stderr where there is none; no log files, and
# leave to compile in two processes at once.
NO_TPU_HERE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_LOG_DIR": "disabled",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}

# In compiled HLO: `%name = shapes all-reduce(…`. Of an asynchronous one, `-start` is counted and `-done` is not.
COLLECTIVE = re.compile(
    r"= (?P<shapes>.*?) (?P<operation>all-reduce|all-gather|reduce-scatter|(ragged-)?all-to-all|"
    r"collective-(permute|broadcast)|send|recv)(-start)?\("
)
SHAPE = re.compile(r"\b[a-z]+(?P<bits>\d*)\w*\[(?P<sizes>[\d,]*)\]")  # f32[3,3,1,32], bf16[64], u8[], pred[10]


@dataclass(frozen=True)
class Collective:
    """One exchange between chips, in every training step."""

    operation: str
    bytes: int
    """What it leaves on each chip."""


@dataclass(frozen=True)
class Compilation:
    """What the compiler says of one training program. All figures are of one chip."""

    topology: str
    chips: int
    precision: str
    batch_size: int
    """Of all chips together."""
    flops: float
    """Of one training step."""
    arguments: int
    """Bytes: the state and a chunk of images."""
    outputs: int
    """Bytes that do not take the place of arguments."""
    temporaries: int
    """Bytes in the chip's main memory (HBM); what fits into faster memory is not counted."""
    code: int
    """Bytes of the program itself."""
    collectives: tuple[Collective, ...]
    compile_seconds: float

    @property
    def memory(self) -> int:
        """Bytes of HBM that the program needs."""
        return self.arguments + self.outputs + self.temporaries + self.code


def find_chips(topology: str) -> list[jax.Device]:
    """The chips of a TPU that need not exist, such as `v5e:2x2`, for a program to be compiled for.

    Raises:
        UserError: the TPU compiler is not installed, or knows no such TPU.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("the TPU compiler is not installed here; pip install --editable '.[tpu]' brings it (libtpu)")
    for name, answer in NO_TPU_HERE.items():
        os.environ.setdefault(name, answer)
    jax.config.update("jax_platforms", "cpu")  # a TPU that is here, or is busy, is of no concern
    # The chips of one host are 2x2 unless told otherwise.
    bounds = {"chips_per_host_bounds": (1, 1, 1)} if topology.endswith(":1x1") else {}
    try:
        return list(topologies.get_topology_desc(topology, platform="tpu", **bounds).devices)
    except (jax.errors.JaxRuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"--topologies {topology}: the compiler knows no such TPU ({reason}); try v5e:2x2") from None


def training_program(mesh: AnyMesh, batch_size: int, precision: str) -> tuple[Wrapped, tuple[Any, ...]]:
    """Return the training program of a run on all of FashionMNIST with this mesh, and the shapes to lower it with."""
    jax.config.update("jax_enable_x64", False)
    optimizer = make_optimizer(AdamConfig())
    state = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=replicated(mesh)),
        jax.eval_shape(lambda: init_state(init_params(jax.random.key(0)), optimizer)),
    )
    shape = trainer.chunk_shapes(TRAIN_SIZE, batch_size)[0]
    return trainer.training_program(mesh, state, shape, optimizer, jnp.dtype(precision))


def compile_training(topology: str, batch_size: int, precision: TpuPrecision) -> Compilation:
    """Compile the training program for all chips of a TPU that need not exist.

    Args:
        topology: `v5e:2x2` is four chips of a TPU v5e.
        batch_size: of all chips together, which share it evenly.
        precision: to compute in.

    Raises:
        UserError: the TPU compiler is not installed, or knows no such TPU; or the program does not fit into its memory.
    """
    chips = find_chips(topology)
    program, arguments = training_program(make_mesh(chips), batch_size, precision)
    lowered = program.lower(*arguments)
    started = time.perf_counter()
    try:
        compiled = lowered.compile(compiler_options("tpu"))
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"--topologies {topology}: the program does not compile: {reason}") from None
    seconds = time.perf_counter() - started
    memory, costs, text = compiled.memory_analysis(), compiled.cost_analysis(), compiled.as_text()
    assert memory is not None  # as of other compilers, which tell nothing
    assert costs is not None
    assert text is not None
    return Compilation(
        topology=topology,
        chips=len(chips),
        precision=precision,
        batch_size=batch_size,
        flops=costs["flops"],
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
        collectives=find_collectives(text),
        compile_seconds=seconds,
    )


def find_collectives(hlo: str) -> tuple[Collective, ...]:
    """The exchanges between chips in a compiled program's text."""
    return tuple(Collective(found["operation"], count_bytes(found["shapes"])) for found in COLLECTIVE.finditer(hlo))


def count_bytes(shapes: str) -> int:
    """Of one shape or a tuple of them, as HLO writes them; `pred` is a byte."""
    return sum(
        math.prod(int(size) for size in shape["sizes"].split(",") if size) * int(shape["bits"] or 8) // 8
        for shape in SHAPE.finditer(shapes)
    )

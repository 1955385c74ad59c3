"""Compile the training program for TPUs that are not here, and read its compiler's figures.

libtpu contains the TPU's compiler, which needs no TPU (`jax.experimental.topologies`). The program is the one that
`JaxTrainer` runs. Nothing runs here, so no speed is known.
"""

import importlib.util
import math
import os
import re
import time
from dataclasses import dataclass
from typing import Any
from unittest import mock

import jax
from jax import numpy as jnp
from jax.experimental import topologies
from jax.stages import Wrapped

from jax_cnn import ops, trainer
from jax_cnn.compiler import compiler_options
from jax_cnn.config import TRAIN_SIZE, AdamConfig, TpuPrecision, UserError
from jax_cnn.devices import AnyMesh, make_mesh, replicated
from jax_cnn.model import init_params
from jax_cnn.train import init_state, make_optimizer

# libtpu would ask the machine about its TPU and complain on stderr that there is none. It also writes no log files
# with these settings, and two processes can compile at once.
NO_TPU_HERE = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_LOG_DIR": "disabled",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}

# In compiled HLO: `%name = shapes all-reduce(…`. An asynchronous exchange is counted at its `-start`.
COLLECTIVE = re.compile(
    r"= (?P<shapes>.*?) (?P<operation>all-reduce|all-gather|reduce-scatter|(ragged-)?all-to-all|"
    r"collective-(permute|broadcast)|send|recv)(-start)?\("
)
BODY = re.compile(r"\bbody=%?([\w.-]+)")  # of a loop: `while(…), condition=%name, body=%name`
CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
SHAPE = re.compile(r"\b[a-z]+(?P<bits>\d*)\w*\[(?P<sizes>[\d,]*)\]")  # f32[3,3,1,32], bf16[64], u8[], pred[10]


@dataclass(frozen=True)
class Collective:
    """One exchange between chips, in every training step. `bytes` is the size of its result on each chip."""

    operation: str
    bytes: int


@dataclass(frozen=True)
class Compilation:
    """The compiler's figures for one training program: FLOP and cycles of a step, and bytes of memory, on one chip."""

    topology: str
    chips: int
    precision: str
    batch_size: int  # of all chips together
    cpu_operations: bool  # instead of XLA's own convolution and pool
    flops: float
    cycles: int  # the compiler's estimate for the operations of a step
    arguments: int  # the state and a chunk of images
    outputs: int  # without those that take the place of arguments
    temporaries: int  # in the chip's main memory (HBM)
    code: int
    collectives: tuple[Collective, ...]
    compile_seconds: float

    @property
    def memory(self) -> int:
        """Bytes of main memory that the program needs on a chip."""
        return self.arguments + self.outputs + self.temporaries + self.code


def find_chips(topology: str) -> list[jax.Device]:
    """Return the chips of a TPU such as `v5e:2x2`, which need not be here, as devices to compile for.

    Raises:
        UserError: the TPU compiler is not installed, or does not know this TPU.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise UserError("the TPU compiler is not installed here; pip install --editable '.[tpu]' brings it (libtpu)")
    for name, answer in NO_TPU_HERE.items():
        os.environ.setdefault(name, answer)
    jax.config.update("jax_platforms", "cpu")  # do not start a TPU that is here
    # By default a host has 2x2 chips.
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


def compile_training(
    topology: str, batch_size: int, precision: TpuPrecision, cpu_operations: bool = False
) -> Compilation:
    """Compile the training program for all chips of a TPU, which need not be here.

    Args:
        topology: `v5e:2x2` means four chips of a TPU v5e.
        batch_size: images in a batch, which all chips share evenly.
        precision: dtype to compute in.
        cpu_operations: compute the network's blocks as on a CPU, to compare.

    Raises:
        UserError: the TPU compiler is not installed or does not know this TPU, or the program does not fit its memory.
    """
    chips = find_chips(topology)
    program, arguments = training_program(make_mesh(chips), batch_size, precision)
    block = ops.cpu_conv_bias_relu_pool if cpu_operations else ops.plain_conv_bias_relu_pool
    with mock.patch.object(ops, "plain_conv_bias_relu_pool", block):
        lowered = program.lower(*arguments)
    started = time.perf_counter()
    try:
        compiled = lowered.compile(compiler_options("tpu"))
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise UserError(f"--topologies {topology}: the program does not compile: {reason}") from None
    seconds = time.perf_counter() - started
    memory, costs, text = compiled.memory_analysis(), compiled.cost_analysis(), compiled.as_text()
    assert memory is not None  # it is None for other compilers
    assert costs is not None
    assert text is not None
    return Compilation(
        topology=topology,
        chips=len(chips),
        precision=precision,
        batch_size=batch_size,
        cpu_operations=cpu_operations,
        flops=costs["flops"],
        cycles=count_cycles(text),
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
        collectives=find_collectives(text),
        compile_seconds=seconds,
    )


def count_cycles(hlo: str) -> int:
    """Return the sum of the compiler's estimates for all operations in the loop over the steps: those of one step."""
    bodies, cycles, inside = set(BODY.findall(hlo)), 0, False
    for line in hlo.splitlines():
        if not line.startswith(" "):  # a computation begins or ends
            inside = line.split(" ")[0].removeprefix("%") in bodies
        elif inside:
            cycles += sum(map(int, CYCLES.findall(line)))
    return cycles


def find_collectives(hlo: str) -> tuple[Collective, ...]:
    """Return the exchanges between chips in the text of a compiled program."""
    return tuple(Collective(match["operation"], count_bytes(match["shapes"])) for match in COLLECTIVE.finditer(hlo))


def count_bytes(shapes: str) -> int:
    """Return the bytes of one shape or of a tuple of shapes in HLO's notation. A `pred` is a byte."""
    return sum(
        math.prod(int(size) for size in shape["sizes"].split(",") if size) * int(shape["bits"] or 8) // 8
        for shape in SHAPE.finditer(shapes)
    )

"""JAX's settings, the devices and processes of a run, and the share of a batch that each of them gets.

Training is data-parallel: every device holds the whole state and an equal share of each batch. Several processes meet
through JAX's own runtime, `jax.distributed`.
"""

import math
import os
import sys
import threading
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from jax_cnn.config import CLUSTER, Device, JaxTrainConfig, UserError

AXIS = "devices"  # the mesh's only axis
JOIN_TIMEOUT = 30  # seconds to wait for the other processes

# JAX reads variables such as JAX_DEFAULT_PRNG_IMPL. These settings would change what a seed draws, or refuse what the
# programs do on purpose, so they are the same for everybody.
SETTINGS: dict[str, str | int | bool] = {
    "jax_default_prng_impl": "threefry2x32",
    "jax_threefry_partitionable": True,
    "jax_random_seed_offset": 0,
    "jax_numpy_rank_promotion": "allow",
    "jax_numpy_dtype_promotion": "standard",
    "jax_transfer_guard": "allow",
}

VARIABLES = ("JAX_PLATFORMS", "JAX_PLATFORM_NAME")  # name what JAX starts; the second is the older one

AnyMesh = Mesh | AbstractMesh  # an abstract mesh knows only the number of its devices
Share = tuple[slice, ...]


def fix_settings() -> None:
    """Give JAX the settings that the programs are written for, whatever the user's variables say."""
    for name, value in SETTINGS.items():
        jax.config.update(name, value)


def join_processes(config: JaxTrainConfig) -> None:
    """Connect to the run's other processes, if it has any. Call it before any other function of JAX.

    A process that is still alone after `JOIN_TIMEOUT` seconds ends with exit status 2.

    Raises:
        UserError: no cluster tells where the processes meet, or the connection fails at once.
    """
    if config.coordinator is None:
        return
    watch = threading.Timer(JOIN_TIMEOUT, give_up, [config.coordinator])
    watch.daemon = True
    watch.start()
    try:
        jax.distributed.initialize(
            coordinator_address=None if config.coordinator == CLUSTER else config.coordinator,
            num_processes=config.num_processes,
            process_id=config.process_id,
        )
    except (RuntimeError, ValueError) as error:
        no_cluster = (
            "no cluster's environment tells where the processes meet; give HOST:PORT, --num-processes, --process-id"
        )
        reason = no_cluster if config.coordinator == CLUSTER else str(error).partition("\n")[0]
        raise UserError(f"--coordinator {config.coordinator}: {reason}") from None
    finally:
        watch.cancel()


def give_up(coordinator: str) -> None:
    """End the process with one line. JAX's own time-out would abort it with a stack trace that cannot be caught."""
    print(
        f"error: --coordinator {coordinator}: the processes did not meet within {JOIN_TIMEOUT} s; check that all of "
        "them were started, and that each can reach the first at this address",
        file=sys.stderr,
        flush=True,
    )
    os._exit(2)


def pick_devices(config: JaxTrainConfig) -> list[jax.Device]:
    """Return the run's devices. `auto` is JAX's own choice: TPU, then GPU, then CPU.

    A CPU is one device, but JAX splits it if several are asked for, so that a laptop can rehearse a run on many.

    Raises:
        UserError: JAX sees no such device, or too few of them, or a batch cannot be shared among them.
    """
    processes, advice = config.num_processes or 1, "ask for fewer"
    if config.devices and config.device in ("auto", "cpu"):
        if config.devices % processes:
            raise UserError(f"--devices {config.devices} cannot be shared among {processes} processes")
        try:
            jax.config.update("jax_num_cpu_devices", config.devices // processes)
        except RuntimeError:
            advice = "JAX has started in this process and keeps their number: restart it (in a notebook, the kernel)"
    available = find_devices(config.device)
    count = config.devices or (len(available) if jax.process_count() > 1 else 1)
    if count > len(available):
        raise UserError(f"--devices {count}: JAX sees {len(available)} of kind {available[0].platform} here; {advice}")
    if config.batch_size % count:
        raise UserError(
            f"--batch-size {config.batch_size} cannot be shared among {count} devices; "
            f"use --batch-size {math.ceil(config.batch_size / count) * count}"
        )
    if count < len(available) and jax.process_count() > 1:
        raise UserError(f"--devices {count}: a run of several processes takes all of their {len(available)} devices")
    return available[:count]


def find_devices(kind: Device) -> list[jax.Device]:
    """Return all devices of a kind, over all processes. If a CPU is asked for, JAX starts nothing else.

    Raises:
        UserError: JAX sees none, or cannot start what one of `VARIABLES` names, or may compile nothing.
    """
    if jax.config.jax_disable_jit:  # type: ignore[attr-defined]  # declared at run time
        raise UserError("JAX_DISABLE_JIT is set, and this command needs compiled programs: unset the variable")
    if kind == "cpu":
        for setting in ("jax_platforms", "jax_platform_name"):
            jax.config.update(setting, "cpu")
    allowed = jax.config.jax_platforms  # type: ignore[attr-defined]  # declared at run time
    try:
        seen = jax.devices()
    except (RuntimeError, AssertionError) as error:  # an assertion where the plugin for CUDA is not installed
        reason = str(error).partition("\n")[0] or "it is not installed"
        variable = next((name for name in VARIABLES if os.environ.get(name)), VARIABLES[0])
        raise UserError(
            f"JAX cannot start {allowed or 'its devices'}: {reason}; unset {variable}, or use --device cpu"
        ) from None
    if kind == "auto":
        return seen
    try:
        return jax.devices(kind)
    except RuntimeError:
        advice = "use --device auto, or install JAX for it (README, Other hardware)"
        if allowed and allowed == os.environ.get("JAX_PLATFORMS"):
            advice = f"unset JAX_PLATFORMS, which is {allowed}"
        elif allowed:
            advice = f"JAX has started with {allowed} alone in this process: restart it (in a notebook, the kernel)"
        raise UserError(f"--device {kind}: JAX sees no {kind} here (it sees: {seen[0].platform}); {advice}") from None


def describe_devices(devices: Sequence[jax.Device]) -> str:
    """Return the number, the platform and the model of the devices: `4 x gpu (NVIDIA H100)`."""
    first = devices[0]
    name = first.platform if first.device_kind == first.platform else f"{first.platform} ({first.device_kind})"
    return name if len(devices) == 1 else f"{len(devices)} x {name}"


def make_mesh(devices: Sequence[jax.Device]) -> Mesh:
    """Return a mesh of the devices with one axis."""
    return Mesh(np.array(devices), (AXIS,))


def replicated(mesh: AnyMesh) -> NamedSharding:
    """Return the placement of what every device holds whole: the state."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: AnyMesh, batch: int) -> NamedSharding:
    """Return the placement of batches [steps, batch, …]: shared evenly, or whole on every device if that cannot be."""
    return replicated(mesh) if batch % mesh.size else NamedSharding(mesh, PartitionSpec(None, AXIS))


def place_batches(mesh: Mesh, shape: tuple[int, ...], read: Callable[[Share], np.ndarray]) -> jax.Array:
    """Put batches [steps, batch, …] on the devices; `read` is called for the shares of this process's devices only."""
    # JAX's type of `read` allows for shares that are None, which neither placement of `batch_sharding` has.
    return jax.make_array_from_callback(shape, batch_sharding(mesh, shape[1]), read)  # type: ignore[arg-type]

"""The programs of a run: the training core's functions, shared among the devices of a mesh.

The devices need not be here: `jax_cnn.aot` compiles for a TPU that is elsewhere.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax import numpy as jnp
from jax.sharding import NamedSharding
from jax.stages import Lowered, Wrapped

from jax_cnn.devices import AXIS, REPLICATED, AnyMesh, batch_spec
from jax_cnn.model import Apply, Params, apply
from jax_cnn.train import Scores, TrainState, evaluate, train_chunk


class Program(NamedTuple):
    """A function that is compiled as a whole, and what it is called with: arrays, or only their shapes and places."""

    function: Wrapped
    arguments: tuple[Any, ...]

    def lower(self) -> Lowered:
        """Bring it into the form that XLA compiles."""
        return self.function.lower(*self.arguments)


def training(
    mesh: AnyMesh,
    state: TrainState,
    shape: tuple[int, int, int],
    optimizer: optax.GradientTransformation,
    dtype: jnp.dtype,
    network: Apply = apply,
) -> Program:
    """`train_chunk`, of which each device gets its share of every batch.

    Args:
        mesh: the devices.
        state: of all networks, [networks, …]: arrays, or only their shapes and places. The program reuses its memory.
        shape: of a chunk, [networks, room, batch].
        optimizer: that made the state.
        dtype: to compute in.
        network: to train.
    """
    chunk = partial(train_chunk, optimizer=optimizer, dtype=dtype, axis=mean_axis(mesh), network=network)
    spec = batch_spec(mesh, shape[2])
    shared = jax.shard_map(
        over_networks(chunk, (0, 0, 0, None)),
        mesh=mesh,
        in_specs=(REPLICATED, spec, spec, REPLICATED),
        out_specs=REPLICATED,
        check_vma=False,
    )
    sharding = NamedSharding(mesh, spec)
    pixels = jax.ShapeDtypeStruct((*shape, 28, 28), np.uint8, sharding=sharding)
    labels = jax.ShapeDtypeStruct(shape, np.uint8, sharding=sharding)
    return Program(jax.jit(shared, donate_argnums=0), (state, pixels, labels, np.int32(0)))


def evaluation(
    mesh: AnyMesh,
    params: Params,
    test_set: tuple[jax.Array, jax.Array],
    dtype: jnp.dtype,
    network: Apply = apply,
) -> Program:
    """`evaluate` on the run's devices: the one test set, [1, batches, batch, …], for all networks [networks, …]."""

    def score(params: Params, pixels: jax.Array, labels: jax.Array) -> Scores:
        return evaluate(params, pixels[0], labels[0], dtype, mean_axis(mesh), network)

    shared = jax.shard_map(
        over_networks(score, (0, None, None)),
        mesh=mesh,
        in_specs=(REPLICATED, *(batch_spec(mesh, array.shape[2]) for array in test_set)),
        out_specs=REPLICATED,
        check_vma=False,
    )
    return Program(jax.jit(shared), (params, *test_set))


def mean_axis(mesh: AnyMesh) -> str | None:
    """The mesh's axis, if there is something to average along it."""
    return AXIS if mesh.size > 1 else None


def over_networks(program: Callable[..., Any], in_axes: tuple[int | None, ...]) -> Callable[..., Any]:
    """Map a program over its arguments' leading axis; where that is of length 1, run it as it is.

    A mapped convolution is a grouped one, and slow even when there is a single group.
    """

    def run(*args: Any) -> Any:
        if len(jax.tree.leaves(args[0])[0]) > 1:
            return jax.vmap(program, in_axes)(*args)
        only = [
            arg if axis is None else jax.tree.map(lambda leaf: leaf[0], arg)
            for arg, axis in zip(args, in_axes, strict=True)
        ]
        return jax.tree.map(lambda leaf: leaf[None], program(*only))

    return run

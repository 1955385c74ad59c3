"""JAX's half of a run: it places state and batches on the devices, compiles once, and trains chunk by chunk.

The images stay in the host's memory as they are on disk, one byte a pixel. A chunk of 64 batches of 64 is 3 MB, which
is gathered while the devices compute the chunk before it. With several processes each gathers only the shares of its
own devices.
"""

import math
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax import numpy as jnp
from jax.sharding import Mesh
from jax.stages import Compiled, Wrapped
from jaxtyping import Array, Float, Int, UInt8

from jax_cnn.checkpoint import AdamState
from jax_cnn.compiler import compiler_options
from jax_cnn.config import Dialect, TrainConfig
from jax_cnn.data import FashionMNIST, epoch_order, split_batches
from jax_cnn.devices import AnyMesh, batch_sharding, describe_devices, make_mesh, place_batches, replicated
from jax_cnn.dialects import make_apply
from jax_cnn.model import Apply, apply, init_params
from jax_cnn.torch_layout import TorchDict, layout_of, to_flax, to_torch
from jax_cnn.train import PADDING, TrainState, evaluate, init_state, make_optimizer, train_chunk

CHUNK_STEPS = 64  # the most steps in a chunk: about half a second of work on two CPU cores, so that progress shows
EVALUATION_BATCH = 250  # 200 to 400 are equally fast on a CPU, 100 takes 5 % longer


class Chunk(NamedTuple):
    """Batches on the devices. Training uses the first `steps`; the others fill up the shape of a compiled program."""

    pixels: UInt8[Array, "capacity batch 28 28"]
    labels: UInt8[Array, "capacity batch"]
    steps: int


class JaxTrainer:
    """A run in progress: the training state, and the compiled programs that advance it."""

    framework = "jax"
    packages: tuple[str, ...] = ("jax", "jaxlib", "flax", "optax", "numpy")

    def __init__(
        self,
        config: TrainConfig,
        data: FashionMNIST,
        devices: Sequence[jax.Device],
        initial: TorchDict | None = None,
        dialect: Dialect = "linen",
    ) -> None:
        """Place the initial state and the test set on the devices, and compile.

        Each device holds the whole state, and gets its share of every batch. The configuration says how many images of
        the data set are used. Without initial weights they are drawn from the seed.
        """
        jax.config.update("jax_enable_x64", config.precision == "float64")
        self._config = config
        self._layout = layout_of(config.network)
        self._mesh = make_mesh(devices)
        self.device_name = describe_devices(devices)
        self._pixels, self._labels = data.train_images[: config.limit_train], data.train_labels[: config.limit_train]
        self.train_size = len(self._labels)
        test_images, test_labels = data.test_images[: config.limit_test], data.test_labels[: config.limit_test]
        self._test_set = send_test_set(self._mesh, test_images, test_labels)
        self._test_size = len(test_labels)
        self._optimizer = make_optimizer(config.adam)
        self._state = self._initial_state(initial)
        started = time.perf_counter()
        self._train_programs, self._evaluate = self._compile(make_apply(config.network, dialect))
        self.compile_seconds = time.perf_counter() - started

    def train_epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[int, Float[np.ndarray, " steps"]]]:
        """Train on every image once, from step `start` on; after each chunk, yield its number of images and losses.

        The next chunk is sent to the devices while they compute this one.
        """
        chunks = self._chunks(epoch, start)
        chunk = next(chunks, None)
        while chunk is not None:
            batch = chunk.labels.shape[1]
            self._state, losses = self._train_programs[batch](
                self._state, chunk.pixels, chunk.labels, np.int32(chunk.steps)
            )
            following = next(chunks, None)  # sent before the wait for this chunk's losses
            yield chunk.steps * batch, np.asarray(losses)[: chunk.steps]
            chunk = following

    def evaluate(self) -> tuple[float, float]:
        """Return the mean loss and the accuracy (0 … 1) over the whole test set."""
        scores = self._evaluate(self._state.params, *self._test_set)
        return float(scores.loss_sum) / self._test_size, float(scores.correct) / self._test_size

    def weights(self) -> TorchDict:
        """Return the current weights under PyTorch's names and layouts."""
        return self._to_torch(self._state.params)

    def state(self) -> AdamState:
        """Return a copy of the whole state: the next step overwrites the original."""
        params, opt_state = jax.tree.map(np.array, self._state)
        mu, nu, count = (optax.tree_utils.tree_get(opt_state, name) for name in ("mu", "nu", "count"))
        return AdamState(self._to_torch(params), self._to_torch(mu), self._to_torch(nu), int(count))

    def restore(self, weights: TorchDict, first_moment: TorchDict, second_moment: TorchDict, step: int) -> None:
        """Continue from a state that `state` returned in this framework or in PyTorch."""
        params, mu, nu = (
            jax.tree.map(lambda leaf, old: leaf.astype(old.dtype), to_flax(part, self._layout), self._state.params)
            for part in (weights, first_moment, second_moment)
        )
        opt_state = optax.tree_utils.tree_set(
            jax.tree.map(np.asarray, self._state.opt_state), mu=mu, nu=nu, count=np.int32(step)
        )
        self._state = jax.device_put(TrainState(params, opt_state), replicated(self._mesh))

    def _to_torch(self, tree: Any) -> TorchDict:
        return to_torch(jax.tree.map(np.asarray, tree), self._layout)

    def _initial_state(self, initial: TorchDict | None) -> TrainState:
        """Draw or convert the weights, and put the state on every device."""
        config, dtype = self._config, jnp.dtype(self._config.weights_dtype)
        with jax.default_device(self._mesh.local_devices[0]):
            if initial is None:
                params = init_params(jax.random.key(config.seed), dtype, config.network)
            else:
                params = jax.tree.map(partial(jnp.asarray, dtype=dtype), to_flax(initial, self._layout))
            state = jax.tree.map(np.asarray, init_state(params, self._optimizer))
        return jax.device_put(state, replicated(self._mesh))

    def _compile(self, network: Apply) -> tuple[dict[int, Compiled], Compiled]:
        """Compile a training program for each size of batch, and the evaluation, side by side.

        Compiling ahead keeps compile time out of the first epoch's time.
        """
        shapes, dtype = chunk_shapes(self.train_size, self._config.batch_size), jnp.dtype(self._config.precision)
        lowered = []
        for shape in shapes:
            program, arguments = training_program(self._mesh, self._state, shape, self._optimizer, dtype, network)
            lowered.append(program.lower(*arguments))
        scoring = jax.jit(partial(evaluate, dtype=dtype, network=network), out_shardings=replicated(self._mesh))
        lowered.append(scoring.lower(self._state.params, *self._test_set))
        options = compiler_options(self._mesh.devices.flat[0].platform)
        with ThreadPoolExecutor() as pool:
            *training, evaluation = pool.map(lambda program: program.compile(options), lowered)
        return {batch: program for (_, batch), program in zip(shapes, training, strict=True)}, evaluation

    def _chunks(self, epoch: int, start: int) -> Iterator[Chunk]:
        """Send an epoch's batches from step `start` on; the smaller last batch is a chunk of its own."""
        order = epoch_order(self._config.seed, epoch, self.train_size)
        full, rest = split_batches(order, self._config.batch_size)
        for first in range(start, len(full), CHUNK_STEPS):
            yield self._send(full[first : first + CHUNK_STEPS], capacity=min(len(full), CHUNK_STEPS))
        if rest.size and start <= len(full):
            yield self._send(rest[None], capacity=1)

    def _send(self, indices: Int[np.ndarray, "steps batch"], capacity: int) -> Chunk:
        """Gather the images of a chunk, and fill it up to its capacity with copies of an image, which nobody reads."""
        steps, batch = indices.shape
        indices = np.concatenate([indices, np.zeros((capacity - steps, batch), indices.dtype)])

        def place(array: np.ndarray) -> jax.Array:
            shape = (*indices.shape, *array.shape[1:])
            return place_batches(self._mesh, shape, lambda share: array[indices[share[:2]]])

        return Chunk(place(self._pixels), place(self._labels), steps)


def training_program(
    mesh: AnyMesh,
    state: TrainState,
    shape: tuple[int, int],
    optimizer: optax.GradientTransformation,
    dtype: jnp.dtype,
    network: Apply = apply,
) -> tuple[Wrapped, tuple[Any, ...]]:
    """Return `train_chunk` as the jitted function that a run compiles, and the arguments to lower it with.

    The state is on every device and each batch is shared among them, so XLA adds the one exchange that a step needs:
    the sum of the gradients and losses over the devices.

    The devices need not be on this machine. The state consists of arrays, whose memory the program reuses, or of their
    shapes and placements. `shape` is the number of batches in a chunk, and of images in a batch.
    """
    chunk = partial(train_chunk, optimizer=optimizer, dtype=dtype, network=network)
    sharding = batch_sharding(mesh, shape[1])
    pixels = jax.ShapeDtypeStruct((*shape, 28, 28), np.uint8, sharding=sharding)
    labels = jax.ShapeDtypeStruct(shape, np.uint8, sharding=sharding)
    program = jax.jit(chunk, donate_argnums=0, out_shardings=replicated(mesh))
    return program, (state, pixels, labels, np.int32(0))


def chunk_shapes(size: int, batch_size: int) -> list[tuple[int, int]]:
    """Return the shapes [capacity, batch] of chunks: of full batches, and of the remainder if there is one."""
    full, rest = divmod(size, batch_size)
    shapes = [(min(full, CHUNK_STEPS), batch_size), (1, rest)]
    return [(capacity, batch) for capacity, batch in shapes if capacity and batch]


def send_test_set(
    mesh: Mesh, pixels: UInt8[np.ndarray, "size 28 28"], labels: UInt8[np.ndarray, " size"]
) -> tuple[jax.Array, jax.Array]:
    """Send all test images in batches [batches, batch, …] that the devices can share.

    The last batch is filled up with images whose label is `PADDING`.
    """
    batch = math.ceil(EVALUATION_BATCH / mesh.size) * mesh.size
    missing = -len(labels) % batch

    def place(array: np.ndarray, fill: int) -> jax.Array:
        padding = np.full((missing, *array.shape[1:]), fill, array.dtype)
        batches = np.concatenate([array, padding]).reshape(-1, batch, *array.shape[1:])
        return place_batches(mesh, batches.shape, lambda share: batches[share])

    return place(pixels, 0), place(labels, PADDING)

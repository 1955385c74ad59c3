"""JAX's half of a run: puts state and data on a device, compiles the core once, and feeds it chunk by chunk."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import jax
import numpy as np
from jax import numpy as jnp
from jax.stages import Compiled

from jax_cnn import torch_layout
from jax_cnn.batches import epoch_order, split_batches
from jax_cnn.compiler import compiler_options
from jax_cnn.config import Device, TrainConfig
from jax_cnn.errors import UserError
from jax_cnn.fashion_mnist import FashionMNIST
from jax_cnn.model import init_params
from jax_cnn.train import evaluate, init_state, make_optimizer, train_chunk

CHUNK_STEPS = 64  # steps a call: about a second of work on two CPU cores, so that progress shows

ChunkShape = tuple[int, int]  # steps, batch


class JaxTrainer:
    """A run in progress: the training state and the compiled programs that advance it."""

    framework = "jax"
    packages: tuple[str, ...] = ("jax", "jaxlib", "flax", "optax", "numpy")

    def __init__(
        self,
        config: TrainConfig,
        data: FashionMNIST,
        device: jax.Device,
        initial: torch_layout.TorchDict | None = None,
    ) -> None:
        """Place the data set and the initial state on the device, and compile.

        Args:
            config: of the run.
            data: the whole data set; the config's limits are applied here.
            device: where to train.
            initial: weights under PyTorch's names and layouts, or None to draw them from `config.seed`.
        """
        jax.config.update("jax_enable_x64", config.precision == "float64")
        self._config = config
        self._device = device
        self._optimizer = make_optimizer(config.adam)
        with jax.default_device(self._device):
            drawn = init_params(jax.random.key(config.seed), jnp.dtype(config.precision))
            params = drawn if initial is None else torch_layout.to_flax(initial)
            self._state = jax.device_put(init_state(jax.tree.map(jnp.asarray, params), self._optimizer), self._device)
        self._train_set = jax.device_put(
            (data.train_images[: config.limit_train], data.train_labels[: config.limit_train]), self._device
        )
        self._test_set = jax.device_put(
            (data.test_images[: config.limit_test], data.test_labels[: config.limit_test]), self._device
        )
        started = time.perf_counter()
        self._programs, self._evaluate = self._compile()
        self.compile_seconds = time.perf_counter() - started

    @property
    def train_size(self) -> int:
        """Images in an epoch."""
        return len(self._train_set[0])

    @property
    def device(self) -> str:
        """What the run computes on, for the record."""
        kind, platform = self._device.device_kind, self._device.platform
        return platform if kind == platform else f"{platform} ({kind})"

    def train_epoch(self, epoch: int) -> Iterator[tuple[int, float]]:
        """Train on every image once; after each chunk, yield how many images it held and their mean loss."""
        for chunk in self._chunks(epoch):
            order = jax.device_put(chunk.astype(np.int32), self._device)
            self._state, losses = self._programs[chunk.shape](self._state, *self._train_set, order)
            yield chunk.size, float(np.asarray(losses).mean())

    def evaluate(self) -> tuple[float, float]:
        """Mean loss and accuracy (0 … 1) over the whole test set."""
        scores = self._evaluate(self._state.params, *self._test_set)
        size = len(self._test_set[0])
        return float(scores.loss_sum) / size, int(scores.correct) / size

    def weights(self) -> torch_layout.TorchDict:
        """The current weights under PyTorch's names and layouts."""
        return torch_layout.to_torch(jax.device_get(self._state.params))

    def _chunks(self, epoch: int) -> list[np.ndarray]:
        """The epoch's batches, several to a chunk; the smaller last batch is a chunk of one."""
        order = epoch_order(self._config.seed, epoch, self.train_size)
        full, rest = split_batches(order, self._config.batch_size)
        chunks = [full[start : start + CHUNK_STEPS] for start in range(0, len(full), CHUNK_STEPS)]
        return chunks + ([rest[None]] if rest.size else [])

    def _compile(self) -> tuple[dict[ChunkShape, Compiled], Compiled]:
        """Compile one program for each shape of chunk and one for the evaluation, side by side.

        Compiling ahead keeps compile time out of the first epoch's time.
        """
        train = jax.jit(partial(train_chunk, optimizer=self._optimizer), donate_argnums=0)
        orders = {chunk.shape: jax.ShapeDtypeStruct(chunk.shape, jnp.int32) for chunk in self._chunks(0)}
        lowered = [train.lower(self._state, *self._train_set, order) for order in orders.values()]
        lowered.append(jax.jit(evaluate).lower(self._state.params, *self._test_set))
        options = compiler_options(self._device.platform)
        with ThreadPoolExecutor() as pool:
            *programs, evaluation = pool.map(lambda program: program.compile(options), lowered)
        return dict(zip(orders, programs, strict=True)), evaluation


def pick_device(name: Device) -> jax.Device:
    """The first device of that kind; `auto` is JAX's own choice: TPU, then GPU, then CPU.

    Raises:
        UserError: JAX sees no such device.
    """
    if name == "auto":
        return jax.devices()[0]
    try:
        return jax.devices(name)[0]
    except RuntimeError:
        seen = ", ".join(sorted({device.platform for device in jax.devices()}))
        raise UserError(
            f"--device {name}: JAX sees no {name} here (it sees: {seen}); "
            f"use --device auto, or install JAX for it (README, Other hardware)"
        ) from None

"""JAX's half of a run: puts the state on the devices, compiles the core once, and feeds it chunk by chunk."""

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import numpy as np
import optax
from jax import numpy as jnp
from jax.sharding import NamedSharding
from jax.stages import Compiled
from jaxtyping import Float

from jax_cnn import programs, torch_layout
from jax_cnn.checkpoint import AdamState
from jax_cnn.compiler import compiler_options
from jax_cnn.config import Dialect, TrainConfig
from jax_cnn.data import FashionMNIST
from jax_cnn.devices import REPLICATED, make_mesh
from jax_cnn.feed import Feed, send_test_set
from jax_cnn.model import init_params, network
from jax_cnn.torch_layout import TorchDict
from jax_cnn.train import TrainState, init_state, make_optimizer


class JaxTrainer:
    """A run in progress: the training state and the compiled programs that advance it.

    It trains one network or several at once: every array of its state has a leading axis, of networks.
    """

    framework = "jax"
    packages: tuple[str, ...] = ("jax", "jaxlib", "flax", "optax", "numpy")

    def __init__(
        self,
        config: TrainConfig,
        data: FashionMNIST,
        devices: Sequence[jax.Device],
        initial: TorchDict | None = None,
        networks: int = 1,
        dialect: Dialect = "linen",
    ) -> None:
        """Place the initial state and the test set on the devices, and compile.

        Args:
            config: of the run.
            data: the whole data set; the config's limits are applied here.
            devices: where to train: each holds the state and gets its share of every batch.
            initial: weights under PyTorch's names and layouts, or None to draw them from the seeds.
            networks: how many to train, with the seeds `config.seed`, `config.seed + 1`, …
            dialect: that the network is written in.
        """
        jax.config.update("jax_enable_x64", config.precision == "float64")
        self.seeds = range(config.seed, config.seed + networks)
        self._kind = config.network
        self._network = network(config.model, dialect, config.hidden)
        layout = torch_layout.layout_of(config.network)
        self._to_flax, self._to_torch = (
            partial(way, layout=layout) for way in (torch_layout.to_flax, torch_layout.to_torch)
        )
        self._precision = jnp.dtype(config.precision)
        self._mesh = make_mesh(devices)
        train_set = data.train_images[: config.limit_train], data.train_labels[: config.limit_train]
        test_set = data.test_images[: config.limit_test], data.test_labels[: config.limit_test]
        self._feed = Feed(self._mesh, *train_set, self.seeds, config.batch_size)
        self._test_set, self._test_size = send_test_set(self._mesh, *test_set), len(test_set[1])
        self._optimizer = make_optimizer(config.adam)
        self._state = self._initial_state(initial, jnp.dtype(config.weights_dtype))
        started = time.perf_counter()
        self._programs, self._evaluate = self._compile()
        self.compile_seconds = time.perf_counter() - started

    @property
    def train_size(self) -> int:
        """Images in an epoch."""
        return self._feed.size

    @property
    def device(self) -> str:
        """What the run computes on, for the record."""
        first = self._mesh.devices.flat[0]
        name = first.platform if first.device_kind == first.platform else f"{first.platform} ({first.device_kind})"
        return name if self._mesh.size == 1 else f"{self._mesh.size} x {name}"

    def train_epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[int, Float[np.ndarray, " steps"]]]:
        """Train on every image once, from step `start` on; after each chunk, yield its number of images and losses.

        The next chunk is on its way to the devices while they compute this one.
        """
        chunks = self._feed.chunks(epoch, start)
        chunk = next(chunks, None)
        while chunk is not None:
            pixels, labels, steps = chunk
            batch = labels.shape[-1]
            self._state, losses = self._programs[batch](self._state, pixels, labels, np.int32(steps))
            chunk = next(chunks, None)
            yield steps * batch, np.asarray(losses)[0, :steps]

    def evaluate(self) -> tuple[float, float]:
        """Return the mean loss and the accuracy (0 … 1) over the whole test set."""
        scores = self._evaluate(self._state.params, *self._test_set)
        loss_sum, correct = (float(np.asarray(total)[0]) for total in (scores.loss_sum, scores.correct))
        return loss_sum / self._test_size, correct / self._test_size

    def weights(self) -> TorchDict:
        """Return the current weights under PyTorch's names and layouts."""
        return self._to_torch(jax.tree.map(lambda leaf: np.asarray(leaf)[0], self._state.params))

    def state(self) -> AdamState:
        """The whole state of the first network, copied: the next step overwrites the original."""
        params, opt_state = self._state
        first = partial(jax.tree.map, lambda leaf: np.array(leaf[0]))
        mu, nu, count = (first(optax.tree_utils.tree_get(opt_state, name)) for name in ("mu", "nu", "count"))
        return AdamState(self._to_torch(first(params)), self._to_torch(mu), self._to_torch(nu), int(count))

    def restore(self, weights: TorchDict, first_moment: TorchDict, second_moment: TorchDict, step: int) -> None:
        """Go on from such a state."""
        params, mu, nu = (
            jax.tree.map(lambda leaf, old: leaf[None].astype(old.dtype), self._to_flax(part), self._state.params)
            for part in (weights, first_moment, second_moment)
        )
        opt_state = optax.tree_utils.tree_set(
            jax.tree.map(np.asarray, self._state.opt_state), mu=mu, nu=nu, count=np.array([step], np.int32)
        )
        self._state = jax.device_put(TrainState(params, opt_state), NamedSharding(self._mesh, REPLICATED))

    def _initial_state(self, initial: TorchDict | None, dtype: Any) -> TrainState:
        """One state of all networks, on every device."""

        def start(seed: int) -> TrainState:
            params = (
                init_params(jax.random.key(seed), dtype, *self._kind) if initial is None else self._to_flax(initial)
            )
            return init_state(jax.tree.map(partial(jnp.asarray, dtype=dtype), params), self._optimizer)

        with jax.default_device(self._mesh.local_devices[0]):
            state = jax.tree.map(lambda *leaves: np.stack(leaves), *map(start, self.seeds))
        return jax.device_put(state, NamedSharding(self._mesh, REPLICATED))

    def _compile(self) -> tuple[dict[int, Compiled], Compiled]:
        """Compile a training program for each size of batch, and the evaluation, side by side.

        Compiling ahead keeps compile time out of the first epoch's time.
        """
        training = {
            shape[2]: programs.training(self._mesh, self._state, shape, self._optimizer, self._precision, self._network)
            for shape in self._feed.shapes
        }
        evaluation = programs.evaluation(self._mesh, self._state.params, self._test_set, self._precision, self._network)
        lowered = [program.lower() for program in (*training.values(), evaluation)]
        options = compiler_options(self._mesh.devices.flat[0].platform)
        with ThreadPoolExecutor() as pool:
            *trained, evaluated = pool.map(lambda program: program.compile(options), lowered)
        return dict(zip(training, trained, strict=True)), evaluated

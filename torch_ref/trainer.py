"""PyTorch's half of a run: the model, its optimizer and its data, ready to train epoch by epoch."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

from torch_ref.model import make_model
from torch_ref.train import evaluate, load_batches, load_dataset, train_one_epoch

Arrays = dict[str, np.ndarray]

TEST_BATCH_SIZE = 1000


class TorchTrainer:
    """A run in progress: what the script of a course holds in global variables."""

    framework = "torch"
    packages: tuple[str, ...] = ("torch", "torchvision", "numpy")
    compile_seconds = 0.0  # eager mode compiles nothing

    def __init__(
        self,
        config: Any,
        *,
        epoch_order: Callable[[int, int], np.ndarray],
        device: torch.device,
        initial: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        """Draw or load the weights, and open the data set.

        Args:
            config: the settings of the run, as attributes: `model`, `hidden`, `precision`, `seed`, `adam` (with
                `learning_rate`, `b1`, `b2`, `eps`), `batch_size`, `data_dir`, `limit_train` and `limit_test`. They are
                those of `jax_cnn.config.TrainConfig`, which this package may not import. The precision becomes
                PyTorch's default dtype.
            epoch_order: returns the order in which an epoch visits the training set, integers [size], from the number
                of the epoch, counted from 0, and the size.
            device: where to train.
            initial: weights by name, or None for PyTorch's own random weights.
        """
        torch.set_default_dtype(getattr(torch, config.precision))  # ToTensor and the layers follow it
        torch.manual_seed(config.seed)
        self._model = make_model(config.model, config.hidden)
        if initial is not None:
            self._model.load_state_dict({name: torch.from_numpy(array) for name, array in initial.items()})
        self._model.to(device)
        adam = config.adam
        self._optimizer = torch.optim.Adam(
            self._model.parameters(), lr=adam.learning_rate, betas=(adam.b1, adam.b2), eps=adam.eps
        )
        self._device = device
        self.device_name = f"gpu ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else "cpu"
        self._batch_size = config.batch_size
        self._epoch_order = epoch_order
        self._train_set = load_dataset(config.data_dir, train=True, limit=config.limit_train)
        # torch's Dataset declares no __len__, but both kinds that `load_dataset` returns have it.
        self.train_size = len(self._train_set)  # type: ignore[arg-type]
        test_set = load_dataset(config.data_dir, train=False, limit=config.limit_test)
        self._test_batches = load_batches(test_set, TEST_BATCH_SIZE)

    def train_epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[int, float]]:
        """Train on every image once, from step `start` on. After each step, yield its number of images and its loss."""
        order = self._epoch_order(epoch, self.train_size)[start * self._batch_size :]
        batches = load_batches(self._train_set, self._batch_size, order.tolist())
        return train_one_epoch(self._model, batches, self._optimizer, self._device)

    def evaluate(self) -> tuple[float, float]:
        """Return the mean loss and the accuracy (0 … 1) over the whole test set."""
        return evaluate(self._model, self._test_batches, self._device)

    def weights(self) -> Arrays:
        """Return the current weights by name."""
        return {name: tensor.numpy(force=True) for name, tensor in self._model.state_dict().items()}

    def state(self) -> tuple[Arrays, Arrays, Arrays, int]:
        """Return copies of the weights and both of Adam's moments by name, and the number of steps so far."""
        parameters = dict(self._model.named_parameters())
        adam = {name: self._optimizer.state[parameter] for name, parameter in parameters.items()}  # empty before step 1

        def moment(key: str) -> Arrays:
            return {
                name: adam[name].get(key, torch.zeros_like(parameter)).numpy(force=True).copy()
                for name, parameter in parameters.items()
            }

        weights = {name: array.copy() for name, array in self.weights().items()}
        step = int(next(iter(adam.values())).get("step", 0))
        return weights, moment("exp_avg"), moment("exp_avg_sq"), step

    def restore(self, weights: Arrays, first_moment: Arrays, second_moment: Arrays, step: int) -> None:
        """Continue from a state that `state` returned in this framework or in JAX."""
        with torch.no_grad():
            for name, parameter in self._model.named_parameters():
                parameter.copy_(torch.from_numpy(weights[name]))
                self._optimizer.state[parameter] = {
                    "step": torch.tensor(float(step)),
                    "exp_avg": torch.from_numpy(first_moment[name]).to(parameter, copy=True),
                    "exp_avg_sq": torch.from_numpy(second_moment[name]).to(parameter, copy=True),
                }


def pick_device(name: str) -> torch.device:
    """Return the device of that kind. `auto` takes a GPU if there is one.

    Raises:
        ValueError: PyTorch sees no such device.
    """
    has_gpu = torch.cuda.is_available()
    if name == "cpu" or (name == "auto" and not has_gpu):
        return torch.device("cpu")
    if name == "tpu":
        raise ValueError("PyTorch needs torch_xla for a TPU, which this project does not use; use train_jax.py")
    if not has_gpu:
        raise ValueError("PyTorch sees no GPU here; use --device auto, or install PyTorch for it")
    return torch.device("cuda")

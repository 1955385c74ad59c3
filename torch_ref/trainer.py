"""PyTorch's half of a run: the model, its optimizer and its data, ready to train epoch by epoch."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from torch_ref.data import load_batches, load_dataset
from torch_ref.model import make_model
from torch_ref.train import evaluate, train_one_epoch

Arrays = dict[str, np.ndarray]
State = tuple[Arrays, Arrays, Arrays, int]


class TorchTrainer:
    """A run in progress: the model, the optimizer and the loaders, as a course's script holds them in globals."""

    framework = "torch"
    packages: tuple[str, ...] = ("torch", "torchvision", "numpy")
    compile_seconds = 0.0  # eager mode compiles nothing

    def __init__(
        self,
        *,
        data_dir: Path,
        epoch_order: Callable[[int, int], Sequence[int]],
        batch_size: int,
        learning_rate: float,
        betas: tuple[float, float],
        eps: float,
        seed: int,
        device: torch.device,
        model: str = "cnn",
        hidden: int = 512,
        dtype: torch.dtype = torch.float32,
        initial: Mapping[str, np.ndarray] | None = None,
        limit_train: int | None = None,
        limit_test: int | None = None,
    ) -> None:
        """Draw or load the weights and open the data set.

        Args:
            data_dir: folder that holds the data set in torchvision's layout.
            epoch_order: (epoch, size) -> the order in which that epoch visits the training set.
            batch_size: images in a step.
            learning_rate: Adam's step size.
            betas: Adam's decays.
            eps: added outside the square root.
            seed: of the initial weights.
            device: where to train.
            model: linear, mlp or cnn.
            hidden: width of the mlp's hidden layer.
            dtype: float32 or float64; becomes torch's default, which ToTensor and the layers follow.
            initial: weights by name, or None to draw PyTorch's own.
            limit_train: train on the first so many images only.
            limit_test: score the first so many only.
        """
        torch.set_default_dtype(dtype)
        torch.manual_seed(seed)
        self._model = make_model(model, hidden)
        if initial is not None:
            self._model.load_state_dict({name: torch.from_numpy(array) for name, array in initial.items()})
        self._device = device
        self._model.to(device)
        self._optimizer = torch.optim.Adam(self._model.parameters(), lr=learning_rate, betas=betas, eps=eps)
        self._epoch_order = epoch_order
        self._batch_size = batch_size
        self._train_set = load_dataset(data_dir, train=True, limit=limit_train)
        self._test_batches = load_batches(load_dataset(data_dir, train=False, limit=limit_test), batch_size=1000)

    @property
    def train_size(self) -> int:
        """Images in an epoch."""
        return len(self._train_set)  # type: ignore[arg-type]  # torch's Dataset declares no __len__; both of ours have it

    @property
    def device(self) -> str:
        """What the run computes on, for the record."""
        return f"gpu ({torch.cuda.get_device_name(self._device)})" if self._device.type == "cuda" else "cpu"

    def train_epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[int, float]]:
        """Train on every image once, from step `start` on; after each, yield how many images it held and their loss."""
        order = self._epoch_order(epoch, self.train_size)[start * self._batch_size :]
        batches = load_batches(self._train_set, self._batch_size, order)
        return train_one_epoch(self._model, batches, self._optimizer, self._device)

    def evaluate(self) -> tuple[float, float]:
        """Mean loss and accuracy (0 … 1) over the whole test set."""
        return evaluate(self._model, self._test_batches, self._device)

    def weights(self) -> list[dict[str, np.ndarray]]:
        """The current weights by name, of the one network that it trains."""
        return [{name: tensor.detach().cpu().numpy() for name, tensor in self._model.state_dict().items()}]

    def state(self) -> State:
        """The weights, both of Adam's moments, and its step count, copied: the next step overwrites the original."""
        named = dict(self._model.named_parameters())
        kept = {name: self._optimizer.state[parameter] for name, parameter in named.items()}
        step = int(next(iter(kept.values())).get("step", 0))

        def moment(key: str) -> dict[str, np.ndarray]:
            zeros = {name: torch.zeros_like(parameter) for name, parameter in named.items()}
            return {name: kept[name].get(key, zeros[name]).numpy(force=True).copy() for name in named}

        weights = {name: parameter.numpy(force=True).copy() for name, parameter in named.items()}
        return weights, moment("exp_avg"), moment("exp_avg_sq"), step

    def restore(
        self,
        weights: Mapping[str, np.ndarray],
        first_moment: Mapping[str, np.ndarray],
        second_moment: Mapping[str, np.ndarray],
        step: int,
    ) -> None:
        """Go on from such a state."""
        with torch.no_grad():
            for name, parameter in self._model.named_parameters():
                parameter.copy_(torch.from_numpy(weights[name]))
                self._optimizer.state[parameter] = {
                    "step": torch.tensor(float(step)),
                    "exp_avg": torch.from_numpy(first_moment[name]).to(parameter, copy=True),
                    "exp_avg_sq": torch.from_numpy(second_moment[name]).to(parameter, copy=True),
                }


def pick_device(name: str) -> torch.device:
    """The device of that kind; `auto` takes a GPU if there is one.

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

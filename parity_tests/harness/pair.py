"""What is compared: two implementations of one network, and all that it takes to hold them together."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
import torch
from jax import numpy as jnp
from torch import nn

from jax_cnn import train
from jax_cnn.config import AdamConfig
from jax_cnn.torch_layout import Layout, TorchDict, to_flax, walk

Tap = Callable[[str, jax.Array], jax.Array]


class Batch(NamedTuple):
    """Inputs as PyTorch takes them (float32; images are [batch, channel, row, column]) and classes [batch]."""

    inputs: np.ndarray
    labels: np.ndarray


class StageLayout(NamedTuple):
    """How one stage's output is carried between the frameworks: both ways, NumPy to NumPy."""

    to_jax: Callable[[np.ndarray], np.ndarray]
    to_torch: Callable[[np.ndarray], np.ndarray]


def channels_last(array: np.ndarray) -> np.ndarray:
    """[batch, channel, …] to [batch, …, channel], which is nothing to do for [batch, channel]."""
    return np.ascontiguousarray(np.moveaxis(array, 1, -1))


def channels_first(array: np.ndarray) -> np.ndarray:
    """[batch, …, channel] to [batch, channel, …]."""
    return np.ascontiguousarray(np.moveaxis(array, -1, 1))


CHANNELS_LAST = StageLayout(channels_last, channels_first)
UNCHANGED = StageLayout(np.ascontiguousarray, np.ascontiguousarray)


def flattened(chw: tuple[int, int, int]) -> StageLayout:
    """The output of a flatten: PyTorch's features are in the order channel, row, column; JAX's row, column, channel."""
    channels, rows, columns = chw

    def to_jax(array: np.ndarray) -> np.ndarray:
        return channels_last(array.reshape(-1, channels, rows, columns)).reshape(len(array), -1)

    def to_torch(array: np.ndarray) -> np.ndarray:
        return channels_first(array.reshape(-1, rows, columns, channels)).reshape(len(array), -1)

    return StageLayout(to_jax, to_torch)


def torch_mean_loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy, as torch.nn.CrossEntropyLoss computes it."""
    return nn.functional.cross_entropy(logits, labels)


def jax_mean_loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean cross-entropy, as the product's training computes it."""
    return train.cross_entropy(logits, labels).mean()


@dataclass(frozen=True, eq=False)
class Pair:
    """A PyTorch module and a pure JAX function that are meant to be the same network.

    The first five fields are all that a new pair must give. The rest is how both sides train; it has the product's
    defaults, and `faults.py` plants its bugs by replacing a field.
    """

    name: str
    module: Callable[[], nn.Module]
    """Makes the reference. Its stages are its direct children, each used once."""
    apply: Callable[[Any, jax.Array, Tap], jax.Array]
    """(tree, inputs, tap) -> logits. `tap(stage, value)` is called with each stage's output, and its result is used."""
    layout: Layout
    """Where each tensor of the module's state dict stands in the JAX tree."""
    input_shape: tuple[int, ...]
    """Of one input of the reference, for example (1, 28, 28)."""
    classes: int = 10
    stage_layouts: Mapping[str, StageLayout] = field(default_factory=dict)
    """For stages whose outputs differ by more than where the channel stands: a flatten."""
    input_layout: StageLayout = CHANNELS_LAST
    adam: AdamConfig = field(default_factory=AdamConfig)
    torch_loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = torch_mean_loss
    jax_loss: Callable[[jax.Array, jax.Array], jax.Array] = jax_mean_loss
    torch_optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.Adam
    jax_optimizer: Callable[[AdamConfig], optax.GradientTransformation] = train.make_optimizer
    torch_to_jax: Callable[[TorchDict, Layout], Any] = to_flax
    jax_init: Callable[[jax.Array], Any] | None = None
    """Draws JAX's own initial tree from a key; None where a port has no initialisation of its own."""
    torch_batches: Callable[[int, int], Iterator[Batch]] | None = None
    """(seed, epoch) -> the batches of PyTorch's data pipeline; None to make up inputs."""
    jax_batches: Callable[[int, int], Iterator[Batch]] | None = None
    """Likewise of JAX's, with inputs carried to PyTorch's layout."""

    def stage_layout(self, stage: str, ndim: int) -> StageLayout:
        """How to carry the output of this stage, which has `ndim` axes."""
        return self.stage_layouts.get(stage, CHANNELS_LAST if ndim > 2 else UNCHANGED)

    def reference(self, dtype: str, weights: TorchDict | None = None) -> nn.Module:
        """The reference in evaluation mode: dropout off, batch normalisation with its running statistics.

        Args:
            dtype: "float32" or "float64".
            weights: by name, or None for those that it draws itself.
        """
        module = self.module().to(getattr(torch, dtype)).eval()
        if weights is not None:
            state = {name: torch.from_numpy(np.array(array)) for name, array in weights.items()}
            module.load_state_dict(state, strict=False)  # `shapes` has held the names
        return module

    def draw(self, seed: int, dtype: str = "float64") -> TorchDict:
        """The reference's own initial weights and float buffers, by name; drawn in float32 whatever the dtype."""
        torch.manual_seed(seed)
        return to_numpy(self.module().state_dict(), dtype)

    def trainable(self) -> list[str]:
        """Names of the tensors that the optimizer changes; the rest are buffers, which stay as they are."""
        return [name for name, _ in self.module().named_parameters()]

    def to_leaves(self, weights: TorchDict) -> dict[str, jax.Array]:
        """Carry weights to JAX: the leaves of its tree, in its layout, under PyTorch's names."""
        return self.leaves_of(self.torch_to_jax(weights, self.layout))

    def leaves_of(self, tree: Any) -> dict[str, jax.Array]:
        """The leaves of a tree that `apply` takes, under PyTorch's names."""
        names = {leaf.path: name for name, leaf in self.layout.items()}
        return {names[path]: jnp.asarray(leaf) for path, leaf in walk(tree)}

    def to_tree(self, leaves: Mapping[str, jax.Array]) -> Any:
        """Put leaves where the layout says: the tree that `apply` takes."""
        tree: dict[str, Any] = {}
        for name, value in leaves.items():
            *modules, last = self.layout[name].path
            branch = tree
            for module in modules:
                branch = branch.setdefault(module, {})
            branch[last] = value
        return tree

    def to_weights(self, leaves: Mapping[str, jax.Array]) -> TorchDict:
        """Carry leaves (weights, gradients or moments) back to PyTorch's layouts."""
        return {
            name: np.ascontiguousarray(self.layout[name].to_torch(np.asarray(value))) for name, value in leaves.items()
        }

    def synthetic_batch(self, seed: int, size: int) -> Batch:
        """Values from 0 to 1, with a block of zeros (ties for a pool) and one input of zeros."""
        rng = np.random.default_rng((seed, size))
        inputs = rng.random((size, *self.input_shape), dtype=np.float32)
        inputs[..., : inputs.shape[-1] // 3] = 0
        inputs[0] = 0
        return Batch(inputs, rng.integers(self.classes, size=size))


def to_numpy(tensors: Mapping[str, torch.Tensor], dtype: str) -> TorchDict:
    """Copies of the floating tensors as arrays of this dtype; counters such as num_batches_tracked are left out."""
    return {
        name: tensor.detach().cpu().numpy().astype(dtype)
        for name, tensor in tensors.items()
        if tensor.is_floating_point()
    }

"""A pair: two implementations of one network, and everything that a comparison needs to know about them."""

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
from jax_cnn.model import Tap, no_tap
from jax_cnn.torch_layout import Layout, TorchDict, to_flax, walk


class Batch(NamedTuple):
    """Inputs as PyTorch takes them (float32; images are [batch, channel, row, column]) and classes [batch]."""

    inputs: np.ndarray
    labels: np.ndarray


Batches = Callable[[int, int], Iterator[Batch]]  # (seed, epoch) -> the batches of this epoch


class StageLayout(NamedTuple):
    """How one stage's output is carried from one framework to the other, both ways, as NumPy arrays."""

    to_jax: Callable[[np.ndarray], np.ndarray]
    to_torch: Callable[[np.ndarray], np.ndarray]


def channels_last(array: np.ndarray) -> np.ndarray:
    """Turn [batch, channel, …] into [batch, …, channel]; [batch, channel] stays as it is."""
    return np.ascontiguousarray(np.moveaxis(array, 1, -1))


def channels_first(array: np.ndarray) -> np.ndarray:
    """Turn [batch, …, channel] into [batch, channel, …]."""
    return np.ascontiguousarray(np.moveaxis(array, -1, 1))


CHANNELS_LAST = StageLayout(channels_last, channels_first)
UNCHANGED = StageLayout(np.ascontiguousarray, np.ascontiguousarray)


def flattened(chw: tuple[int, int, int]) -> StageLayout:
    """Return the layout of a flatten's output: channel, row, column in PyTorch, and row, column, channel in JAX."""
    channels, rows, columns = chw

    def to_jax(array: np.ndarray) -> np.ndarray:
        return channels_last(array.reshape(-1, channels, rows, columns)).reshape(len(array), -1)

    def to_torch(array: np.ndarray) -> np.ndarray:
        return channels_first(array.reshape(-1, rows, columns, channels)).reshape(len(array), -1)

    return StageLayout(to_jax, to_torch)


def jax_mean_loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Compute the mean cross-entropy as `jax_cnn` does in training."""
    return train.cross_entropy(logits, labels).mean()


@dataclass(frozen=True, eq=False)
class Pair:
    """A PyTorch module and a pure JAX function that are meant to be the same network. PyTorch is the reference.

    A new pair must give the first five fields. The others say how both sides train; their defaults are those of this
    project. `faults.py` plants its bugs by replacing a field.
    """

    name: str
    module: Callable[[], nn.Module]
    """Makes the reference. Its stages are its direct children, each used once."""
    apply: Callable[[Any, jax.Array, Tap], jax.Array]
    """(tree, inputs, tap) -> logits. Calls `tap(stage, value)` with each stage's output and goes on with its result."""
    layout: Layout
    """Where each tensor of the module's state dict stands in the JAX tree."""
    input_shape: tuple[int, ...]
    """The shape of one input of the reference, for example (1, 28, 28)."""
    training_apply: Callable[[Any, jax.Array], jax.Array] | None = None
    """(tree, inputs) -> logits: the program that trains, if it computes several stages of `apply` as one operation."""
    classes: int = 10
    stage_layouts: Mapping[str, StageLayout] = field(default_factory=dict)
    """For stages whose outputs differ by more than the place of the channel axis, such as a flatten."""
    input_layout: StageLayout = CHANNELS_LAST
    adam: AdamConfig = field(default_factory=AdamConfig)
    torch_loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = nn.functional.cross_entropy
    jax_loss: Callable[[jax.Array, jax.Array], jax.Array] = jax_mean_loss
    torch_optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.Adam
    jax_optimizer: Callable[[AdamConfig], optax.GradientTransformation] = train.make_optimizer
    torch_to_jax: Callable[[TorchDict, Layout], Any] = to_flax
    jax_init: Callable[[jax.Array], Any] | None = None
    """Draws JAX's own initial tree from a key; None if the JAX side has no initialisation of its own."""
    torch_batches: Batches | None = None
    """The batches of PyTorch's data pipeline; None if there is none: inputs are then random numbers."""
    jax_batches: Batches | None = None
    """The batches of JAX's data pipeline, with inputs in PyTorch's layout; None if there is none."""

    def training_logits(self, tree: Any, inputs: jax.Array) -> jax.Array:
        """Compute the logits with the program that trains."""
        return self.training_apply(tree, inputs) if self.training_apply else self.apply(tree, inputs, no_tap)

    def stage_layout(self, stage: str, ndim: int) -> StageLayout:
        """Return how to carry the output of this stage, which has `ndim` axes."""
        return self.stage_layouts.get(stage, CHANNELS_LAST if ndim > 2 else UNCHANGED)

    def reference(self, dtype: str, weights: TorchDict | None = None) -> nn.Module:
        """Return the reference in evaluation mode: dropout off, batch normalisation with its running statistics.

        Args:
            dtype: "float32" or "float64".
            weights: by name, or None for the initial weights that the module draws.
        """
        module = self.module().to(getattr(torch, dtype)).eval()
        if weights is not None:
            state = {name: torch.from_numpy(np.array(array)) for name, array in weights.items()}
            module.load_state_dict(state, strict=False)  # counters are missing; the check `shapes` has seen the names
        return module

    def draw(self, seed: int, dtype: str = "float64") -> TorchDict:
        """Return the reference's initial weights and float buffers, by name; drawn in float32 whatever the dtype."""
        torch.manual_seed(seed)
        return to_numpy(self.module().state_dict(), dtype)

    def trainable(self) -> list[str]:
        """Return the names of the tensors that the optimizer changes. The others are buffers, which stay."""
        return [name for name, _ in self.module().named_parameters()]

    def to_leaves(self, weights: TorchDict) -> dict[str, jax.Array]:
        """Carry weights to JAX: the leaves of its tree, in its layout, under PyTorch's names."""
        return self.leaves_of(self.torch_to_jax(weights, self.layout))

    def leaves_of(self, tree: Any) -> dict[str, jax.Array]:
        """Return the leaves of a tree that `apply` takes, under PyTorch's names."""
        names = {leaf.path: name for name, leaf in self.layout.items()}
        return {names[path]: jnp.asarray(leaf) for path, leaf in walk(tree)}

    def to_tree(self, leaves: Mapping[str, jax.Array]) -> Any:
        """Build the tree that `apply` takes from leaves under PyTorch's names."""
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
        """Return random values from 0 to 1, with a block of zeros (ties for a pool) and one input of zeros."""
        rng = np.random.default_rng((seed, size))
        inputs = rng.random((size, *self.input_shape), dtype=np.float32)
        inputs[..., : inputs.shape[-1] // 3] = 0
        inputs[0] = 0
        return Batch(inputs, rng.integers(self.classes, size=size))


def to_numpy(tensors: Mapping[str, torch.Tensor], dtype: str) -> TorchDict:
    """Copy the floating tensors into arrays of this dtype; leave out counters such as num_batches_tracked."""
    return {
        name: tensor.detach().cpu().numpy().astype(dtype)
        for name, tensor in tensors.items()
        if tensor.is_floating_point()
    }

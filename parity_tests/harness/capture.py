"""What each side computes on one batch: every stage's output, the loss, and the gradient of both and of every weight.

Everything comes back as NumPy arrays in PyTorch's names and layouts, so that nothing else sees two frameworks at once.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import numpy as np
import torch
from jax import lax
from jax import numpy as jnp

from jax_cnn.torch_layout import TorchDict
from parity_tests.harness.pair import Batch, Pair


class Capture(NamedTuple):
    """One forward and backward pass. Stages stand in the order in which the reference runs them."""

    outputs: dict[str, np.ndarray]
    output_grads: dict[str, np.ndarray]
    weight_grads: TorchDict
    loss: float


class Refused(Exception):
    """A pair that the harness cannot compare, with the reason."""


@contextmanager
def exact_arithmetic(dtype: str) -> Iterator[None]:
    """Compute in this dtype and in nothing less: no TF32, no bfloat16 passes, on any device. The one place for it."""
    torch_settings = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        with jax.enable_x64(dtype == "float64"), jax.default_matmul_precision("highest"):
            yield
    finally:
        torch.set_float32_matmul_precision(torch_settings[0])
        torch.backends.cudnn.allow_tf32 = torch_settings[1]


def capture_torch(pair: Pair, weights: TorchDict, batch: Batch) -> Capture:
    """Run the reference forward and backward, in the dtype of the weights.

    Raises:
        Refused: a stage runs twice, gives something other than one tensor, or does not reach the loss.
    """
    dtype = dtype_of(weights)
    module = pair.reference(dtype, weights)
    tensors: dict[str, torch.Tensor] = {}

    def keep(stage: str, output: Any) -> None:
        if stage in tensors:
            raise Refused(f"stage {stage} runs twice: give each use a module of its own, so that each can be compared")
        if not isinstance(output, torch.Tensor):
            raise Refused(f"stage {stage} gives {type(output).__name__}, not one tensor")
        output.retain_grad()
        tensors[stage] = output

    for stage, child in module.named_children():
        child.register_forward_hook(lambda _, __, output, stage=stage: keep(stage, output))
    with exact_arithmetic(dtype):
        logits = module(torch.from_numpy(batch.inputs.astype(dtype)).requires_grad_())
        loss = pair.torch_loss(logits, torch.from_numpy(batch.labels.astype(np.int64)))
        loss.backward()
    return Capture(
        {stage: tensor.detach().numpy() for stage, tensor in tensors.items()},
        {stage: gradient(f"output of {stage}", tensor) for stage, tensor in tensors.items()},
        {name: gradient(name, parameter) for name, parameter in module.named_parameters()},
        loss.item(),
    )


def capture_jax(
    pair: Pair, weights: TorchDict, batch: Batch, reference: Capture | None = None, *, steer: Capture | None = None
) -> Capture:
    """Run the JAX side forward and backward, in the dtype of the weights.

    With a reference, every stage is fed with the reference's own inputs, and every stage's gradient starts from the
    reference's own gradient of its output: what differs then is born in that stage. Without one, differences are
    inherited from stage to stage, as in use.

    Args:
        pair: what is compared.
        weights: by name, in one floating dtype.
        batch: the inputs.
        reference: `capture_torch` of the same weights and batch, or None.
        steer: let every stage's output have this capture's value and its own gradient: so each ReLU and each pool makes
            the choices of that capture, and what differs in the gradients is arithmetic alone.

    Returns:
        Stages that JAX has, in the reference's order where there is one.
    """
    with exact_arithmetic(dtype_of(weights)):
        leaves = pair.to_leaves(weights)
        inputs = jnp.asarray(pair.input_layout.to_jax(batch.inputs.astype(dtype_of(weights))))
        labels = jnp.asarray(batch.labels.astype(np.uint8))
        if reference is None:
            return _inherited(pair, leaves, inputs, labels, _constants(pair, steer.outputs) if steer else {})
        return _local(pair, leaves, inputs, labels, reference)


def _constants(pair: Pair, stages: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """A reference's values in JAX's layouts."""
    return {stage: jnp.asarray(pair.stage_layout(stage, value.ndim).to_jax(value)) for stage, value in stages.items()}


def _inherited(
    pair: Pair, leaves: dict[str, jax.Array], inputs: jax.Array, labels: jax.Array, steer: Mapping[str, jax.Array]
) -> Capture:
    """From end to end. Zeros added to every stage's output have that output's gradient."""

    def run(leaves: Any, zeros: Mapping[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
        outputs: dict[str, jax.Array] = {}

        def tap(stage: str, value: jax.Array) -> jax.Array:
            outputs[stage] = value
            if stage in steer:
                value = steer[stage] + (value - lax.stop_gradient(value))
            return value + zeros[stage] if stage in zeros else value

        return pair.jax_loss(pair.apply(pair.to_tree(leaves), inputs, tap), labels), outputs

    _, outputs = run(leaves, {})
    zeros = jax.tree.map(jnp.zeros_like, outputs)
    loss, (weight_grads, output_grads) = jax.value_and_grad(lambda *given: run(*given)[0], (0, 1))(leaves, zeros)
    return _to_torch(pair, outputs, output_grads, weight_grads, loss)


def _local(
    pair: Pair, leaves: dict[str, jax.Array], inputs: jax.Array, labels: jax.Array, reference: Capture
) -> Capture:
    """Stage by stage, on the reference's values.

    The objective is the loss plus, for every stage, its output times the reference's gradient of that output. A stage's
    input is a constant here, so the objective's derivative by it is what the stages behind it pass back, and no more.
    """
    constants, upstream = _constants(pair, reference.outputs), _constants(pair, reference.output_grads)

    def objective(leaves: Any, constants: Mapping[str, jax.Array]) -> tuple[jax.Array, Any]:
        outputs: dict[str, jax.Array] = {}

        def tap(stage: str, value: jax.Array) -> jax.Array:
            outputs[stage] = value
            return constants[stage] if value.shape == constants[stage].shape else value

        loss = pair.jax_loss(pair.apply(pair.to_tree(leaves), inputs, tap), labels)
        passed_back = sum(
            (value * upstream[stage]).sum() for stage, value in outputs.items() if value.shape == upstream[stage].shape
        )
        return loss + passed_back, (outputs, loss)

    gradients, (outputs, loss) = jax.grad(objective, (0, 1), has_aux=True)(leaves, constants)
    return _to_torch(pair, outputs, {stage: gradients[1][stage] for stage in outputs}, gradients[0], loss)


def _to_torch(
    pair: Pair,
    outputs: Mapping[str, jax.Array],
    output_grads: Mapping[str, jax.Array],
    weight_grads: Mapping[str, jax.Array],
    loss: jax.Array,
) -> Capture:
    trainable = pair.trainable()

    def carry(stages: Mapping[str, jax.Array]) -> dict[str, np.ndarray]:
        return {
            stage: pair.stage_layout(stage, value.ndim).to_torch(np.asarray(value)) for stage, value in stages.items()
        }

    return Capture(
        carry(outputs),
        carry(output_grads),
        pair.to_weights({name: weight_grads[name] for name in trainable}),
        float(loss),
    )


def gradient(name: str, tensor: torch.Tensor) -> np.ndarray:
    """A copy of a tensor's gradient.

    Raises:
        Refused: it has none.
    """
    if tensor.grad is None:
        raise Refused(f"{name} has no gradient: the loss does not depend on it")
    return tensor.grad.numpy().copy()


def dtype_of(weights: TorchDict) -> str:
    """The one dtype of all weights.

    Raises:
        Refused: they have several.
    """
    dtypes = {str(array.dtype) for array in weights.values()}
    if len(dtypes) != 1:
        raise Refused(f"weights have several dtypes: {', '.join(sorted(dtypes))}")
    return dtypes.pop()

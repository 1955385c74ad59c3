"""Record what each side computes on one batch: all stages' outputs, the loss, and the gradients by outputs and weights.

Everything is returned as NumPy arrays in PyTorch's names and layouts, so that other files see only one kind of array.
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
    """One forward and backward pass. Stages are in the order in which the reference runs them."""

    outputs: dict[str, np.ndarray]
    output_grads: dict[str, np.ndarray]
    weight_grads: TorchDict
    loss: float


class Refused(Exception):
    """The pair cannot be compared; the message says why."""


@contextmanager
def exact_arithmetic(dtype: str) -> Iterator[None]:
    """Let both frameworks compute in this dtype and with nothing less: no TF32 and no bfloat16 on any device."""
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
        Refused: a stage runs twice, returns something other than one tensor, or has no influence on the loss.
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

    With a reference, every stage gets the reference's own input, and the gradient of every stage starts from the
    reference's own gradient of its output, so that a difference shows in the stage where it begins (local). Without
    one, differences pass from stage to stage as they do in use (inherited).

    Args:
        pair: what is compared.
        weights: by name, all of one floating dtype.
        batch: the inputs.
        reference: `capture_torch` of the same weights and batch, or None.
        steer: give every stage's output the value of this capture, and let JAX compute the gradient. Each ReLU and each
            pool then makes the choices of that capture, and gradients differ by arithmetic alone.

    Returns:
        The stages that JAX has, in the reference's order if there is a reference.
    """
    with exact_arithmetic(dtype_of(weights)):
        leaves = pair.to_leaves(weights)
        inputs = jnp.asarray(pair.input_layout.to_jax(batch.inputs.astype(dtype_of(weights))))
        labels = jnp.asarray(batch.labels.astype(np.uint8))
        if reference is None:
            steering = to_constants(pair, steer.outputs) if steer else {}
            return capture_inherited(pair, leaves, inputs, labels, steering)
        return capture_local(pair, leaves, inputs, labels, reference)


def to_constants(pair: Pair, stages: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
    """Carry the reference's values of all stages into JAX's layouts."""
    return {stage: jnp.asarray(pair.stage_layout(stage, value.ndim).to_jax(value)) for stage, value in stages.items()}


def capture_inherited(
    pair: Pair,
    leaves: dict[str, jax.Array],
    inputs: jax.Array,
    labels: jax.Array,
    steering: Mapping[str, jax.Array],
) -> Capture:
    """Run from end to end. The gradient by a stage's output is the gradient by zeros that are added to it."""

    def run(leaves: Any, zeros: Mapping[str, jax.Array]) -> tuple[jax.Array, dict[str, jax.Array]]:
        outputs: dict[str, jax.Array] = {}

        def tap(stage: str, value: jax.Array) -> jax.Array:
            outputs[stage] = value
            if stage in steering:
                value = steering[stage] + (value - lax.stop_gradient(value))
            return value + zeros[stage] if stage in zeros else value

        return pair.jax_loss(pair.apply(pair.to_tree(leaves), inputs, tap), labels), outputs

    _, outputs = run(leaves, {})
    zeros = jax.tree.map(jnp.zeros_like, outputs)
    compute = jax.value_and_grad(lambda leaves, zeros: run(leaves, zeros)[0], argnums=(0, 1))
    loss, (weight_grads, output_grads) = compute(leaves, zeros)
    return to_capture(pair, outputs, output_grads, weight_grads, loss)


def capture_local(
    pair: Pair, leaves: dict[str, jax.Array], inputs: jax.Array, labels: jax.Array, reference: Capture
) -> Capture:
    """Run stage by stage, each on the reference's values.

    The objective is the loss plus, for every stage, its output times the reference's gradient by that output. As a
    stage's input is a constant here, the derivative of the objective by it is what the next stage passes back.
    """
    constants, upstream = to_constants(pair, reference.outputs), to_constants(pair, reference.output_grads)

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
    return to_capture(pair, outputs, {stage: gradients[1][stage] for stage in outputs}, gradients[0], loss)


def to_capture(
    pair: Pair,
    outputs: Mapping[str, jax.Array],
    output_grads: Mapping[str, jax.Array],
    weight_grads: Mapping[str, jax.Array],
    loss: jax.Array,
) -> Capture:
    """Carry what JAX computed into PyTorch's names and layouts."""

    def carry(stages: Mapping[str, jax.Array]) -> dict[str, np.ndarray]:
        return {
            stage: pair.stage_layout(stage, value.ndim).to_torch(np.asarray(value)) for stage, value in stages.items()
        }

    return Capture(
        carry(outputs),
        carry(output_grads),
        pair.to_weights({name: weight_grads[name] for name in pair.trainable()}),
        float(loss),
    )


def gradient(name: str, tensor: torch.Tensor) -> np.ndarray:
    """Return a copy of a tensor's gradient.

    Raises:
        Refused: it has none.
    """
    if tensor.grad is None:
        raise Refused(f"{name} has no gradient: the loss does not depend on it")
    return tensor.grad.numpy().copy()


def dtype_of(weights: TorchDict) -> str:
    """Return the one dtype of all weights.

    Raises:
        Refused: they have several.
    """
    dtypes = {str(array.dtype) for array in weights.values()}
    if len(dtypes) != 1:
        raise Refused(f"weights have several dtypes: {', '.join(sorted(dtypes))}")
    return dtypes.pop()

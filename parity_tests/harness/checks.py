"""The checks of one state: shapes, data, weights, outputs, loss, gradients. Each yields what differs, in order.

All compute in float64, where a difference is a bug. `trajectory.py` has the checks of training, `truth.py` of float32.
"""

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import lru_cache

import jax
import numpy as np
from jax import numpy as jnp

from jax_cnn.torch_layout import TorchDict
from parity_tests.harness import trajectory
from parity_tests.harness.capture import Capture, capture_jax, capture_torch
from parity_tests.harness.compare import EXACT, Bound, Divergence, compare
from parity_tests.harness.initialisation import initialisation
from parity_tests.harness.pair import Pair, to_numpy

# In units of the largest value of each tensor. Worst seen over 20 seeds of SimpleCNN, both batch sizes: 5.0e-15.
STAGE_BOUND = Bound(1e-12, "float64 rounding; worst seen over 20 seeds 5.0e-15 of the tensor's largest value")
LOSS_BOUND = Bound(1e-12, "float64 rounding; worst seen over 20 seeds 2.0e-16 of the loss")

BATCH_SIZES = (8, 5)  # a loss that divides by the wrong number shows on the second
EPOCHS_COMPARED = 2


def shapes(pair: Pair, seed: int) -> Iterator[Divergence]:
    """Names, shapes and dtypes of every tensor and every stage's output. Unmapped, missing or extra is an error."""
    weights = pair.draw(seed)
    yield from compare_names("tensor", weights.keys(), pair.layout.keys())
    for name in weights.keys() & pair.layout.keys():
        if weights[name].shape != pair.layout[name].shape:
            problem = f"the layout says {list(pair.layout[name].shape)}, PyTorch has {list(weights[name].shape)}"
            yield Divergence("shapes", name, problem)
    if weights.keys() != pair.layout.keys():
        return
    batch = pair.synthetic_batch(seed, BATCH_SIZES[0])
    theirs = capture_torch(pair, weights, batch)
    with jax.enable_x64(True):
        leaves = pair.to_leaves(weights)
        for name, leaf in leaves.items():
            if leaf.dtype != jnp.float64:
                yield Divergence("shapes", name, f"it is {leaf.dtype} in JAX in a float64 run")
        outputs: dict[str, jax.ShapeDtypeStruct] = {}

        def tap(stage: str, value: jax.Array) -> jax.Array:
            outputs[stage] = jax.ShapeDtypeStruct(value.shape, value.dtype)
            return value

        inputs = jnp.asarray(pair.input_layout.to_jax(batch.inputs.astype(np.float64)))
        jax.eval_shape(lambda leaves: pair.apply(pair.to_tree(leaves), inputs, tap), leaves)
    yield from compare_names("stage", theirs.outputs.keys(), outputs.keys(), subset=True)
    for stage in theirs.outputs.keys() & outputs.keys():
        ours = np.broadcast_to(np.zeros((), outputs[stage].dtype), outputs[stage].shape)
        carried = pair.stage_layout(stage, ours.ndim).to_torch(ours)
        if carried.shape != theirs.outputs[stage].shape or carried.dtype != theirs.outputs[stage].dtype:
            yield Divergence(
                "shapes",
                f"output of {stage}",
                f"JAX gives {list(carried.shape)} {carried.dtype} (in PyTorch's layout), "
                f"PyTorch {list(theirs.outputs[stage].shape)} {theirs.outputs[stage].dtype}",
            )


def data(pair: Pair, seed: int) -> Iterator[Divergence]:
    """Both pipelines serve the same images and labels, to the last bit, in the same batches, and every image."""
    if pair.torch_batches is None or pair.jax_batches is None:
        return
    first: list[np.ndarray] = []
    for epoch in range(EPOCHS_COMPARED):
        pipelines = itertools.zip_longest(pair.jax_batches(seed, epoch), pair.torch_batches(seed, epoch))
        for step, (ours, theirs) in enumerate(pipelines):
            where = f"epoch {epoch}, batch {step}"
            if ours is None or theirs is None:
                yield Divergence("data", where, f"{'JAX' if ours is None else 'PyTorch'} has no such batch")
                break
            if step == 0:
                first.append(theirs.labels)
            found = list(compare("data", ours._asdict(), theirs._asdict(), EXACT, f"{where}: {{}}"))
            if found:
                yield from found
                break
    if np.array_equal(first[0], first[1]):
        yield Divergence("data", "epochs 0 and 1", "both begin with the same batch: the order is not shuffled anew")


def transfer(pair: Pair, seed: int) -> Iterator[Divergence]:
    """Weights are carried to JAX and back, and from JAX to PyTorch and back, without a bit changed."""
    weights = pair.draw(seed, "float32")
    back = pair.to_weights(pair.to_leaves(weights))
    yield from compare("transfer", back, weights, EXACT)
    if pair.jax_init is not None:
        drawn = pair.leaves_of(pair.jax_init(jax.random.key(seed)))
        loaded = to_numpy(pair.reference("float32", pair.to_weights(drawn)).state_dict(), "float32")
        ours, theirs = jax.device_get(drawn), jax.device_get(pair.to_leaves(loaded))
        yield from compare("transfer", ours, theirs, EXACT, "{} (drawn by JAX)")


def outputs(pair: Pair, seed: int) -> Iterator[Divergence]:
    """Every stage's output, fed with the reference's own input first: the first difference is where it is born."""
    for ours, inherited, theirs in captures(pair, seed):
        expected = {stage: theirs.outputs[stage] for stage in theirs.outputs if stage in ours.outputs}
        yield from compare("outputs", ours.outputs, expected, STAGE_BOUND, "output of {}")
        yield from compare("outputs", inherited.outputs, expected, STAGE_BOUND, "output of {}, end to end")


def loss(pair: Pair, seed: int) -> Iterator[Divergence]:
    """The loss of a batch, from the same logits."""
    for ours, _, theirs in captures(pair, seed):
        size = len(next(iter(theirs.outputs.values())))
        name = f"batch of {size}"
        yield from compare("loss", {name: np.array(ours.loss)}, {name: np.array(theirs.loss)}, LOSS_BOUND)


def gradients(pair: Pair, seed: int) -> Iterator[Divergence]:
    """The loss's gradient by every stage's output, from the last stage back, and by every weight."""
    for ours, inherited, theirs in captures(pair, seed):
        stages = [stage for stage in reversed(theirs.output_grads) if stage in ours.output_grads]
        expected = {stage: theirs.output_grads[stage] for stage in stages}
        yield from compare("gradients", ours.output_grads, expected, STAGE_BOUND, "gradient by the output of {}")
        yield from compare("gradients", ours.weight_grads, theirs.weight_grads, STAGE_BOUND, "gradient by {}")
        yield from compare(
            "gradients", inherited.weight_grads, theirs.weight_grads, STAGE_BOUND, "gradient by {}, end to end"
        )


@lru_cache(maxsize=1)  # three checks ask for the same
def captures(pair: Pair, seed: int) -> list[tuple[Capture, Capture, Capture]]:
    """For each batch size: JAX on the reference's values, JAX end to end, and the reference."""
    weights = probing_weights(pair, seed)
    triples = []
    for size in BATCH_SIZES:
        batch = pair.synthetic_batch(seed, size)
        theirs = capture_torch(pair, weights, batch)
        triples.append((capture_jax(pair, weights, batch, theirs), capture_jax(pair, weights, batch), theirs))
    return triples


def probing_weights(pair: Pair, seed: int) -> TorchDict:
    """Initial weights with every other bias at 0: on zeros, a ReLU is then asked for its gradient at exactly 0."""
    weights = pair.draw(seed)
    for name, array in weights.items():
        if name.endswith("bias"):
            array[::2] = 0
    return weights


def compare_names(
    kind: str, theirs: Collection[str], ours: Collection[str], *, subset: bool = False
) -> Iterator[Divergence]:
    """Names that only one side has; with `subset`, PyTorch may have more, but not none in common."""
    for name in ours:
        if name not in theirs:
            yield Divergence("shapes", f"{kind} {name}", "JAX has it and PyTorch does not")
    for name in theirs:
        if name not in ours and not subset:
            yield Divergence("shapes", f"{kind} {name}", "PyTorch has it and the layout does not map it")
    if not set(ours) & set(theirs):
        yield Divergence("shapes", f"{kind}s", "the sides have none in common: there is nothing to compare")


Check = Callable[[Pair, int], Iterator[Divergence]]

TRAJECTORY_STEPS = 12
HANDOVER_STEPS = (3, 3)

CHECKS: Mapping[str, Check] = {
    "shapes": shapes,
    "transfer": transfer,
    "initialisation": initialisation,
    "data": data,
    "outputs": outputs,
    "loss": loss,
    "gradients": gradients,
    "optimizer": trajectory.optimizer,
    "trajectory": lambda pair, seed: trajectory.trajectory(pair, seed, TRAJECTORY_STEPS),
    "handover": lambda pair, seed: trajectory.handover(pair, seed, *HANDOVER_STEPS),
}


def first_divergence(pair: Pair, seed: int = 0, names: tuple[str, ...] = tuple(CHECKS)) -> Divergence | None:
    """Run the checks in order; the first difference, or None if the sides are the same."""
    for name in names:
        for divergence in CHECKS[name](pair, seed):
            return divergence
    return None

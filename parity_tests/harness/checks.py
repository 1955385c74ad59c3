"""The checks in the order in which they run. Each yields the differences that it finds, the first one first.

All but `precision` compute in float64, where a difference is a bug. The checks of training are in `trajectory.py`,
that of float32 is in `float32.py`.
"""

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import cached_property
from typing import NamedTuple

import jax
import numpy as np
from jax import numpy as jnp
from scipy import stats

from jax_cnn.torch_layout import TorchDict
from parity_tests.harness.capture import Capture, capture_jax, capture_torch
from parity_tests.harness.compare import EXACT, Bound, Divergence, compare
from parity_tests.harness.float32 import precision
from parity_tests.harness.pair import Pair, to_numpy
from parity_tests.harness.trajectory import handover, optimizer, trajectory

# In units of the largest value of each tensor; the loss in units of itself.
STAGE_BOUND = Bound(1e-12, "float64 rounding; worst seen over 20 seeds 5.0e-15 of the tensor's largest value")
LOSS_BOUND = Bound(1e-12, "float64 rounding; worst seen over 20 seeds 2.0e-16 of the loss")

BATCH_SIZES = (8, 5)  # a loss that divides by the wrong number shows on the second
EPOCHS_COMPARED = 2
TRAJECTORY_STEPS = 12
HANDOVER_STEPS = (3, 3)  # before and after
PRECISION_SEEDS = 2

INITIALISATION_SEEDS = 20
SAMPLE = 2_000  # values of a tensor and seed: 40,000 in all show a difference of 2 % between two distributions
FALSE_ALARMS = 1e-4  # how often the check may fail although the distributions are the same


class Captures(NamedTuple):
    """Both sides on one batch: JAX on the reference's values, JAX from end to end, and the reference."""

    local: Capture
    inherited: Capture
    reference: Capture


class Case:
    """A pair with the weights and inputs of one seed. The checks of one case share its captures."""

    def __init__(self, pair: Pair, seed: int = 0) -> None:
        self.pair = pair
        self.seed = seed

    @cached_property
    def captures(self) -> list[Captures]:
        """Both sides on a batch of each size in `BATCH_SIZES`."""
        weights = probing_weights(self.pair, self.seed)
        captures = []
        for size in BATCH_SIZES:
            batch = self.pair.synthetic_batch(self.seed, size)
            reference = capture_torch(self.pair, weights, batch)
            local = capture_jax(self.pair, weights, batch, reference)
            captures.append(Captures(local, capture_jax(self.pair, weights, batch), reference))
        return captures


def probing_weights(pair: Pair, seed: int) -> TorchDict:
    """Return initial weights with every second bias at 0: inputs of zeros then ask each ReLU for its gradient at 0."""
    weights = pair.draw(seed)
    for name, array in weights.items():
        if name.endswith("bias"):
            array[::2] = 0
    return weights


def shapes(case: Case) -> Iterator[Divergence]:
    """Compare names, shapes and dtypes of all tensors and of all stages' outputs."""
    pair, weights = case.pair, case.pair.draw(case.seed)
    yield from compare_names("tensor", weights.keys(), pair.layout.keys())
    for name in weights.keys() & pair.layout.keys():
        if weights[name].shape != pair.layout[name].shape:
            problem = f"the layout says {list(pair.layout[name].shape)}, PyTorch has {list(weights[name].shape)}"
            yield Divergence("shapes", name, problem)
    if weights.keys() != pair.layout.keys():
        return
    batch = pair.synthetic_batch(case.seed, BATCH_SIZES[0])
    expected = capture_torch(pair, weights, batch).outputs
    with jax.enable_x64(True):
        leaves = pair.to_leaves(weights)
        for name, leaf in leaves.items():
            if leaf.dtype != jnp.float64:
                yield Divergence("shapes", name, f"it is {leaf.dtype} in JAX in a float64 run")
        traced = trace_outputs(pair, leaves, batch.inputs)
    yield from compare_names("stage", expected.keys(), traced.keys(), subset=True)
    for stage in expected.keys() & traced.keys():
        placeholder = np.broadcast_to(np.zeros((), traced[stage].dtype), traced[stage].shape)
        actual = pair.stage_layout(stage, placeholder.ndim).to_torch(placeholder)
        if actual.shape != expected[stage].shape or actual.dtype != expected[stage].dtype:
            yield Divergence(
                "shapes",
                f"output of {stage}",
                f"JAX gives {list(actual.shape)} {actual.dtype} (in PyTorch's layout), "
                f"PyTorch {list(expected[stage].shape)} {expected[stage].dtype}",
            )


def trace_outputs(pair: Pair, leaves: Mapping[str, jax.Array], inputs: np.ndarray) -> dict[str, jax.ShapeDtypeStruct]:
    """Return shape and dtype of each stage's output in JAX, without computing it."""
    outputs: dict[str, jax.ShapeDtypeStruct] = {}

    def tap(stage: str, value: jax.Array) -> jax.Array:
        outputs[stage] = jax.ShapeDtypeStruct(value.shape, value.dtype)
        return value

    images = jnp.asarray(pair.input_layout.to_jax(inputs.astype(np.float64)))
    jax.eval_shape(lambda leaves: pair.apply(pair.to_tree(leaves), images, tap), leaves)
    return outputs


def compare_names(
    kind: str, expected: Collection[str], actual: Collection[str], *, subset: bool = False
) -> Iterator[Divergence]:
    """Yield names that only one side has. With `subset`, PyTorch may have more, but one must be in common."""
    for name in actual:
        if name not in expected:
            yield Divergence("shapes", f"{kind} {name}", "JAX has it and PyTorch does not")
    for name in expected:
        if name not in actual and not subset:
            yield Divergence("shapes", f"{kind} {name}", "PyTorch has it and the layout does not map it")
    if not set(actual) & set(expected):
        yield Divergence("shapes", f"{kind}s", "the sides have none in common: there is nothing to compare")


def transfer(case: Case) -> Iterator[Divergence]:
    """Carry weights to JAX and back, and JAX's own to PyTorch and back: no bit may change."""
    pair, weights = case.pair, case.pair.draw(case.seed, "float32")
    yield from compare("transfer", pair.to_weights(pair.to_leaves(weights)), weights, EXACT)
    if pair.jax_init is not None:
        drawn = pair.leaves_of(pair.jax_init(jax.random.key(case.seed)))
        loaded = to_numpy(pair.reference("float32", pair.to_weights(drawn)).state_dict(), "float32")
        actual, expected = jax.device_get(drawn), jax.device_get(pair.to_leaves(loaded))
        yield from compare("transfer", actual, expected, EXACT, "{} (drawn by JAX)")


def initialisation(case: Case) -> Iterator[Divergence]:
    """Compare the distributions of both sides' initial weights, tensor by tensor, by statistical tests.

    The tests are Kolmogorov-Smirnov's on the shape, and Welch's t on the mean and on the mean square. Each may fail by
    chance with probability FALSE_ALARMS / (number of tests): with this correction (Bonferroni), the check as a whole
    fails by chance with probability FALSE_ALARMS. A pair whose JAX side has no initialisation passes.
    """
    pair = case.pair
    if pair.jax_init is None:
        return
    seeds = [case.seed * INITIALISATION_SEEDS + offset for offset in range(INITIALISATION_SEEDS)]
    in_torch = sample([pair.draw(seed) for seed in seeds])
    in_jax = sample([pair.to_weights(pair.leaves_of(pair.jax_init(jax.random.key(seed)))) for seed in seeds])
    level = FALSE_ALARMS / (3 * len(in_torch))
    for name, expected in in_torch.items():
        problem = find_difference_of_distributions(in_jax[name], expected, level)
        if problem:
            yield Divergence("initialisation", name, problem)


def find_difference_of_distributions(actual: np.ndarray, expected: np.ndarray, level: float) -> str:
    """Return in what two samples differ if a test has a p-value below the level, or an empty string."""
    if np.ptp(actual) == 0 and np.ptp(expected) > 0:
        return f"JAX's values are all {actual[0]:g}, PyTorch's are not"
    if np.ptp(actual) == np.ptp(expected) == 0 and actual[0] == expected[0]:
        return ""  # constants, as in batch normalisation
    p_values = {
        "distribution (Kolmogorov-Smirnov)": stats.ks_2samp(actual, expected).pvalue,
        "mean (Welch's t)": stats.ttest_ind(actual, expected, equal_var=False).pvalue,
        "mean square (Welch's t)": stats.ttest_ind(actual**2, expected**2, equal_var=False).pvalue,
    }
    for test, p_value in p_values.items():
        if not p_value >= level:  # a NaN is a failure
            return (
                f"{test} differs: p = {p_value:.1e} < {level:.1e}; standard deviation {actual.std():.3g} in JAX, "
                f"{expected.std():.3g} in PyTorch, over {INITIALISATION_SEEDS} seeds"
            )
    return ""


def sample(draws: list[TorchDict]) -> dict[str, np.ndarray]:
    """Return up to SAMPLE values of each tensor and seed, evenly spread over the tensor, as float64."""
    names = draws[0].keys()
    return {
        name: np.concatenate([draw[name].ravel()[:: -(-draw[name].size // SAMPLE)] for draw in draws]).astype(float)
        for name in names
    }


def data(case: Case) -> Iterator[Divergence]:
    """Compare both pipelines' batches to the last bit; the second epoch must have another order than the first."""
    pair = case.pair
    if pair.torch_batches is None or pair.jax_batches is None:
        return
    first_labels: list[np.ndarray] = []
    for epoch in range(EPOCHS_COMPARED):
        batches = itertools.zip_longest(pair.jax_batches(case.seed, epoch), pair.torch_batches(case.seed, epoch))
        for step, (actual, expected) in enumerate(batches):
            where = f"epoch {epoch}, batch {step}"
            if actual is None or expected is None:
                yield Divergence("data", where, f"{'JAX' if actual is None else 'PyTorch'} has no such batch")
                break
            if step == 0:
                first_labels.append(expected.labels)
            differences = list(compare("data", actual._asdict(), expected._asdict(), EXACT, f"{where}: {{}}"))
            if differences:
                yield from differences
                break
    if len(first_labels) == EPOCHS_COMPARED and np.array_equal(first_labels[0], first_labels[1]):
        yield Divergence("data", "epochs 0 and 1", "both begin with the same batch: the order is not shuffled anew")


def outputs(case: Case) -> Iterator[Divergence]:
    """Compare every stage's output, local before inherited: the first difference is where it begins."""
    for local, inherited, reference in case.captures:
        expected = {stage: array for stage, array in reference.outputs.items() if stage in local.outputs}
        yield from compare("outputs", local.outputs, expected, STAGE_BOUND, "output of {}")
        yield from compare("outputs", inherited.outputs, expected, STAGE_BOUND, "output of {}, end to end")


def loss(case: Case) -> Iterator[Divergence]:
    """Compare the loss of a batch, computed from the same logits."""
    for local, _, reference in case.captures:
        name = f"batch of {len(next(iter(reference.outputs.values())))}"
        yield from compare("loss", {name: np.array(local.loss)}, {name: np.array(reference.loss)}, LOSS_BOUND)


def gradients(case: Case) -> Iterator[Divergence]:
    """Compare the gradient by every stage's output, from the last stage back, and then by every weight."""
    for local, inherited, reference in case.captures:
        stages = [stage for stage in reversed(reference.output_grads) if stage in local.output_grads]
        expected = {stage: reference.output_grads[stage] for stage in stages}
        yield from compare("gradients", local.output_grads, expected, STAGE_BOUND, "gradient by the output of {}")
        yield from compare("gradients", local.weight_grads, reference.weight_grads, STAGE_BOUND, "gradient by {}")
        yield from compare(
            "gradients", inherited.weight_grads, reference.weight_grads, STAGE_BOUND, "gradient by {}, end to end"
        )


CHECKS: Mapping[str, Callable[[Case], Iterator[Divergence]]] = {
    "shapes": shapes,
    "transfer": transfer,
    "initialisation": initialisation,
    "data": data,
    "outputs": outputs,
    "loss": loss,
    "gradients": gradients,
    "optimizer": lambda case: optimizer(case.pair, case.seed),
    "trajectory": lambda case: trajectory(case.pair, case.seed, TRAJECTORY_STEPS),
    "handover": lambda case: handover(case.pair, case.seed, *HANDOVER_STEPS),
    "precision": lambda case: precision(case.pair, range(case.seed, case.seed + PRECISION_SEEDS)),
}


def impossible_checks(pair: Pair) -> list[str]:
    """Return the checks that a pair declares nothing for: an initialisation in JAX, or the data pipelines."""
    possible = {"initialisation": pair.jax_init, "data": pair.torch_batches and pair.jax_batches}
    return [name for name, declared in possible.items() if declared is None]


def first_divergence(
    pair: Pair,
    seed: int = 0,
    names: Sequence[str] = tuple(CHECKS),
    progress: Callable[[str], None] = lambda name: None,
) -> Divergence | None:
    """Run the checks in order and return the first difference, or None if there is none.

    Args:
        pair: what is compared.
        seed: of the weights and the inputs.
        names: the checks to run.
        progress: called with the name of each check before it starts.
    """
    case = Case(pair, seed)
    for name in names:
        progress(name)
        for divergence in CHECKS[name](case):
            return divergence
    return None

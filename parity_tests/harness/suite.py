"""All checks in the order in which a difference would be born, and the first place where a pair differs."""

from collections.abc import Callable, Iterator, Mapping

from parity_tests.harness import checks, trajectory
from parity_tests.harness.compare import Divergence
from parity_tests.harness.initialisation import initialisation
from parity_tests.harness.pair import Pair

Check = Callable[[Pair, int], Iterator[Divergence]]

TRAJECTORY_STEPS = 12
HANDOVER_STEPS = (3, 3)

CHECKS: Mapping[str, Check] = {
    "shapes": checks.shapes,
    "transfer": checks.transfer,
    "initialisation": initialisation,
    "data": checks.data,
    "outputs": checks.outputs,
    "loss": checks.loss,
    "gradients": checks.gradients,
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

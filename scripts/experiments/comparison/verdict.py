"""Whether the two are the same, from the measured numbers alone: it can say no."""

import math
from typing import Any

Json = dict[str, Any]
ERRORS = 2.0  # standard errors that two accuracies may be apart


def judge(report: Json) -> Json:
    """The verdict in a sentence, and what it stands on."""
    accuracy = {side: report["runs"][side]["epochs"][-1]["test_accuracy"] for side in ("jax", "torch")}
    difference = accuracy["jax"] - accuracy["torch"]
    allowed = ERRORS * standard_error(accuracy["jax"], accuracy["torch"], report["scores"]["images"])
    reasons = []
    if divergence := report["parity"]["first_divergence"]:
        reasons.append(f"in float64 they differ by more than rounding ({divergence})")
    if not abs(difference) <= allowed:
        reasons.append(
            f"after {epochs(report)} they score {percent(accuracy['jax'])} and {percent(accuracy['torch'])}, "
            f"{100 * abs(difference):.2f} points apart, of which chance explains {100 * allowed:.2f}"
        )
    return {
        "same": not reasons,
        "reasons": reasons,
        "accuracy_difference": difference,
        "accuracy_allowed": allowed,
        "standard_errors": ERRORS,
        "sentence": different(reasons) if reasons else same(report, accuracy, allowed),
    }


def standard_error(one: float, other: float, images: int) -> float:
    """Of the difference of two accuracies, each on so many images: sqrt(p (1 - p) / n) for each, added in squares.

    On the same images the true one is smaller, and the chance of training adds to it: over ten seeds, full trainings of
    the two were 0.27 points apart (standard deviation), where this gives 0.39.
    """
    return math.sqrt(sum(accuracy * (1 - accuracy) / images for accuracy in (one, other)))


def same(report: Json, accuracy: dict[str, float], allowed: float) -> str:
    """Yes."""
    apart = 100 * abs(accuracy["jax"] - accuracy["torch"])
    return (
        f"JAX and PyTorch train the same network: in float64 all {len(report['parity']['checks'])} checks agree to "
        f"rounding, and after {epochs(report)} from the same weights on the same batches they score "
        f"{percent(accuracy['jax'])} and {percent(accuracy['torch'])}, {apart:.2f} points apart where chance alone "
        f"explains {100 * allowed:.2f}."
    )


def different(reasons: list[str]) -> str:
    """No."""
    return f"JAX and PyTorch do not train the same network: {'; and '.join(reasons)}."


def percent(share: float) -> str:
    """As the page writes it."""
    return f"{100 * share:.2f} %"


def epochs(report: Json) -> str:
    """How long they trained."""
    count = len(report["runs"]["jax"]["epochs"])
    return f"{count} epoch{'s' if count != 1 else ''}"

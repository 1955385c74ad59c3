"""The harness's checks, its table by stage and its drift, for the page: measured, or from a parity report's file."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from experiments.comparison.earlier import read_parity
from parity_tests.harness import checks, report
from parity_tests.harness.checks import STAGE_BOUND
from parity_tests.harness.pair import Pair
from parity_tests.harness.trajectory import TRAJECTORY_BOUND

Json = dict[str, Any]
IN_FLOAT64 = "float64: JAX from PyTorch"


def measure(pair: Pair, seed: int, drift_steps: int, show: Callable[[str], None]) -> Json:
    """Run the checks up to the first that finds a difference, compare the stages, and record the drift."""
    comparison = report.examine(pair, seed, drift_steps, show)
    curves = dict(comparison["drift"])
    steps = curves.pop("steps")
    return describe(comparison["passed"], comparison["first_divergence"], comparison["stages"], steps, curves)


def taken(file: Path) -> Json:
    """The same from the report.json of scripts/parity_report.py.

    Raises:
        UserError: it is none.
    """
    told = read_parity(file)
    passed = [] if told.first_divergence else list(checks.CHECKS)
    return describe(passed, told.first_divergence, told.stages, told.steps, told.curves) | {"source": told.source}


def describe(passed: list[str], first: str | None, rows: list[Json], at: list[int], curves: Mapping[str, Any]) -> Json:
    """What the page needs of it. Which checks had passed, a report with a divergence does not tell."""
    together = not first and bool(curves) and curves[IN_FLOAT64][-1] <= TRAJECTORY_BOUND.limit
    return {
        "checks": list(checks.CHECKS),
        "passed": passed,
        "first_divergence": first,
        "bound": STAGE_BOUND.limit,
        "stages": rows,
        "drift": {"steps": at, "curves": curves, "together": together},
        "source": None,
    }

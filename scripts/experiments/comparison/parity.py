"""The harness's checks, its table by stage and its drift, for the page: measured, or from a parity report's file."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from experiments.comparison.earlier import read_parity
from parity_tests.harness import checks, float32, report
from parity_tests.harness.checks import STAGE_BOUND
from parity_tests.harness.pair import Pair
from parity_tests.harness.trajectory import TRAJECTORY_BOUND

Json = dict[str, Any]
POINTS = 40  # of a drift curve
IN_FLOAT64 = "float64: JAX from PyTorch"


def measure(pair: Pair, seed: int, drift_steps: int, show: Callable[[str], None]) -> Json:
    """Run the checks up to the first that finds a difference, compare the stages, and record the drift."""
    passed: list[str] = []
    divergence = None
    for name, check in checks.CHECKS.items():
        show(name)
        divergence = next(check(pair, seed), None)
        if divergence:
            break
        passed.append(name)
    comparable = "shapes" in passed
    show("stage by stage")
    rows = report.compare_stages(pair, seed) if comparable else []
    at = sorted({round(step) for step in np.geomspace(1, drift_steps, POINTS)})
    show(f"drift over {drift_steps} steps")
    curves = float32.drift(pair, seed, at) if comparable else {}
    return describe(passed, str(divergence) if divergence else None, rows, at, curves)


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

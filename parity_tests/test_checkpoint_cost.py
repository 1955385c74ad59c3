"""What saving costs, as committed: `scripts/checkpoint_cost.py` wrote it. Measured anew only by that script."""

import json
from pathlib import Path
from typing import Any

import pytest

from parity_tests.speed.checkpoint_cost import BOUND, FRAMEWORKS, summary

RESULT = Path(__file__).parents[1] / "docs" / "results" / "robustness" / "checkpoint_cost.json"


@pytest.fixture
def report() -> dict[str, Any]:
    """The committed measurement."""
    loaded: dict[str, Any] = json.loads(RESULT.read_text())
    return loaded


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_saving_slows_a_training_by_less_than_one_percent(report: dict[str, Any], framework: str) -> None:
    measured = report[framework]
    assert len(measured["pairs"]) >= 20
    figures = summary(measured)
    assert {name: measured[name] for name in figures} == figures
    assert figures["slower_by"]["high"] <= BOUND
    assert "checkpoint_cost.py" in report["command"]
    assert report["machine"]["cpu"]
    slow = [pair | {"with": pair["with"] + 0.5} for pair in measured["pairs"]]
    assert summary(measured | {"pairs": slow})["slower_by"]["median"] > BOUND  # the check can fail

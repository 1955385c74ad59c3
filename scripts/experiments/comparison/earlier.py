"""What was measured before and is taken from its file: the benchmark and the parity report. No framework is loaded."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from experiments.comparison.settings import ROOT
from jax_cnn.config import UserError

Json = dict[str, Any]


def read_benchmark(file: Path) -> Json:
    """The speed table by configuration, and where it was measured.

    Raises:
        UserError: the file is missing or is no benchmark.json.
    """

    def wrong(what: str) -> UserError:
        return UserError(f"--benchmark {file}: {what}; give a benchmark.json that scripts/benchmark.py wrote")

    try:
        result = json.loads(file.read_text())
        contest = result["contest"]
        return {
            "file": str(file.relative_to(ROOT) if file.is_relative_to(ROOT) else file),
            "command": result["command"].replace(f"{ROOT}/", ""),  # as a person would type it
            **{name: result[name] for name in ("started", "machine", "versions")},
            "busy": result["load_before"],
            "batch_size": result["config"]["batch_size"],
            "best_torch": contest["contenders"][contest["best_torch"]]["title"],
            "rows": [row(name, line) for name, line in contest["contenders"].items() if "rounds" in line],
        }
    except OSError as error:
        raise wrong(error.strerror or str(error)) from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise wrong("not a benchmark's result") from None


def row(name: str, line: Json) -> Json:
    """One configuration."""
    return {
        "name": name,
        "title": line["title"],
        "ms_per_step": line["ms_per_step"],
        "images_per_second": line["images_per_second"],
        "speed_to_best_torch": line["speed_to_best_torch"],
        "times_floor": line["times_floor"],
        "peak_bytes": line["peak_bytes"],
    }


class Parity(NamedTuple):
    """What a parity report tells."""

    first_divergence: str | None
    stages: list[Json]
    steps: list[int]
    curves: dict[str, list[float]]
    source: Json


def read_parity(file: Path) -> Parity:
    """The report.json of scripts/parity_report.py.

    Raises:
        UserError: the file is missing, is no such report, or has no drift.
    """
    try:
        told = json.loads(file.read_text())
        curves = dict(told["drift"])
        steps = curves.pop("steps")
        source = {name: told[name] for name in ("command", "started", "machine", "versions")} | {"file": str(file)}
        found = Parity(told["first_divergence"], told["stages"], steps, curves, source)
        if not curves or any(len(curve) != len(steps) for curve in curves.values()):
            raise ValueError("no drift")
        return found
    except OSError as error:
        what = error.strerror or str(error)
    except (ValueError, KeyError, TypeError, AttributeError):
        what = "not a parity report with a drift"
    raise UserError(f"--parity-report {file}: {what}; give a report.json that scripts/parity_report.py wrote")

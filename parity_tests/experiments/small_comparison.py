"""A small comparison that several files of tests share: the real command, on 1,280 images."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from parity_tests.support import ROOT, read_json, run_successfully

if TYPE_CHECKING:  # conftest.py loads this file, also where no test runs
    from experiments.comparison.runs import CompareConfig

Json = dict[str, Any]

PARITY = ROOT / "docs" / "results" / "parity" / "report.json"


class Comparison(NamedTuple):
    """A finished comparison: its configuration, what the command printed, its report and its page."""

    config: "CompareConfig"
    output: str
    report: Json
    page: Path


@pytest.fixture(scope="session")
def comparison(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    """Run a small comparison in a folder that holds an earlier page; it trains with both commands."""
    from experiments.comparison import page
    from experiments.comparison.runs import CompareConfig

    out_dir = tmp_path_factory.mktemp("compare")
    (out_dir / page.PAGE).write_text("an earlier page", encoding="utf-8")
    changed: dict[str, Any] = {
        "epochs": 1,
        "limit_train": 1_280,
        "limit_test": 400,
        "images": 6,
        "disagreements": 6,
        "parity_report": PARITY,
        "data_dir": data_dir,
        "out_dir": out_dir,
    }
    flags = [word for name, value in changed.items() for word in (f"--{name.replace('_', '-')}", value)]
    output = run_successfully("compare", *flags, cwd=out_dir)
    return Comparison(CompareConfig(**changed), output, read_json(out_dir / page.REPORT), out_dir / page.PAGE)

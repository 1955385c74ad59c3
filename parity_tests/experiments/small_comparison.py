"""A small comparison, as the tests of the page make it once: the real command, on 3,000 images."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from experiments.comparison import publish
from experiments.comparison.settings import ROOT, CompareConfig
from experiments.processes import SCRIPTS

Json = dict[str, Any]

PARITY = ROOT / "docs" / "results" / "parity" / "report.json"
TIMEOUT = 300.0  # seconds for the small comparison, on a machine that is busy with other things
SMALL = CompareConfig(epochs=1, limit_train=3_000, limit_test=400, images=6, disagreements=6, parity_report=PARITY)
STYLING = ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "COLUMNS", "LINES")
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in STYLING}


class Made(NamedTuple):
    """A finished comparison: its configuration, what was printed, its report and its page."""

    config: CompareConfig
    output: str
    report: Json
    page: Path


def compare(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the command in a pipe."""
    command = [sys.executable, str(SCRIPTS / "compare.py"), *map(str, arguments)]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=TIMEOUT)


def flags(config: CompareConfig) -> list[str]:
    """The command line of a small comparison."""
    return [
        *("--epochs", str(config.epochs), "--limit-train", str(config.limit_train)),
        *("--limit-test", str(config.limit_test), "--images", str(config.images)),
        *("--disagreements", str(config.disagreements), "--parity-report", str(config.parity_report)),
        *("--data-dir", str(config.data_dir), "--out-dir", str(config.out_dir)),
    ]


def read_report(out_dir: Path) -> Json:
    """The report, from a file that any JSON reader takes: Python's own would let NaN pass."""

    def refuse(constant: str) -> NoReturn:
        raise AssertionError(f"{constant} is not JSON")

    told: Json = json.loads((out_dir / publish.REPORT).read_text(), parse_constant=refuse)
    return told


def make(config: CompareConfig) -> Made:
    """Run the command where an earlier page is."""
    (config.out_dir / publish.PAGE).write_text("an earlier page")
    done = compare(*flags(config))
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return Made(config, done.stdout, read_report(config.out_dir), config.out_dir / publish.PAGE)


def rendered(told: Json) -> str:
    """The page of a report, with one and the same small figure in every place."""
    drawn = publish.Drawn("data:,", "data:,", 1, 1)
    return publish.render(json.loads(json.dumps(told, default=str)), dict.fromkeys(publish.figures_of(told), drawn))

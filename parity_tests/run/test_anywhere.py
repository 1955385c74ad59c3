"""Training, resuming and predicting work where people run them, under all of these conditions at once.

A checkout whose path has spaces and letters beyond ASCII, and that cannot be written; a user without a home; LANG=C; no
terminal; one core.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from jax_cnn.run.folder import FILES
from parity_tests.support import ROOT

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="takes Linux's users, capabilities and cores")

SMALL = ("--limit-train", 200, "--batch-size", 50, "--limit-test", 100, "--device", "cpu")  # four steps
TIMEOUT = 300.0  # seconds, on a machine that is busy with other things
STRANGER = 54_321  # a user whom the system does not know: no name, no home

Launch = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the source that cannot be written."""
    copy = tmp_path_factory.mktemp("somewhere") / "ein Weg – mit Umläuten"
    for name in ("jax_cnn", "torch_ref", "scripts"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in (copy, *copy.rglob("*")):
        path.chmod(path.stat().st_mode & ~0o222)
    return copy


def as_stranger(line: Sequence[str]) -> list[str]:
    """The same command, by a user without a home who can write where all may, which root is not: root can anywhere.

    That the stranger can read anywhere is for a Python that lies in root's home.
    """
    if os.geteuid():
        return list(line)
    flags = [f"--{which}=-all,+dac_read_search" for which in ("inh-caps", "ambient-caps", "bounding-set")]
    return ["setpriv", f"--reuid={STRANGER}", f"--regid={STRANGER}", "--clear-groups", *flags, *line]


@pytest.fixture
def desk(tmp_path: Path) -> Path:
    """A folder that anybody can write, with room for temporary files, and no home in it."""
    folder = tmp_path / "Ergebnisse für später"
    for each in (folder, folder / "tmp"):
        each.mkdir()
        each.chmod(0o777)
    return folder


@pytest.fixture
def launch(checkout: Path, desk: Path) -> Launch:
    """Start a script of that checkout under all these conditions."""
    environment = {
        "PATH": os.defpath,
        "LANG": "C",
        "LC_ALL": "C",
        "PYTHONPATH": str(checkout),
        "TMPDIR": str(desk / "tmp"),
    }
    if os.geteuid():  # one who has a home
        environment["HOME"] = str(checkout / "none")
    core = max(os.sched_getaffinity(0))

    def run(script: str, *flags: object, cwd: Path = desk) -> subprocess.CompletedProcess[str]:
        line = as_stranger([sys.executable, str(checkout / "scripts" / f"{script}.py"), *map(str, flags)])
        options: dict[str, Any] = {"capture_output": True, "text": True, "timeout": TIMEOUT}
        return subprocess.run(
            ["taskset", "--cpu-list", str(core), *line],
            cwd=cwd,
            env=environment,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            **options,
        )

    return run


@pytest.fixture(autouse=True)
def _conditions(checkout: Path) -> None:
    """They hold, or there is nothing to test."""
    if not all(map(shutil.which, ("setpriv", "taskset"))):
        pytest.skip("needs setpriv and taskset (util-linux)")
    attempt = [sys.executable, "-c", "import os, pathlib; pathlib.Path('file').touch(); print(os.path.expanduser('~'))"]
    done = subprocess.run(as_stranger(attempt), cwd=checkout, capture_output=True, text=True, check=False)
    if "setpriv" in done.stderr:
        pytest.skip(f"cannot become another user here: {done.stderr.strip()}")
    assert "PermissionError" in done.stderr, "the checkout can be written"


@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_training_resuming_and_predicting_work(launch: Launch, data_dir: Path, desk: Path, framework: str) -> None:
    run = (*SMALL, "--data-dir", data_dir.resolve(), "--out-dir", "Läufe")
    Image.fromarray(np.zeros((28, 28), np.uint8)).save(desk / "schwarzes Bild.png")
    for flags in (("--epochs", 1), ("--epochs", 2, "--resume")):
        done = launch(f"train_{framework}", *run, *flags)
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert "going on after step 4" in done.stdout
    assert {*FILES} <= {path.name for path in (desk / "Läufe").iterdir()}
    done = launch("predict", "--framework", framework, "--weights", "Läufe/weights.safetensors", "schwarzes Bild.png")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("schwarzes Bild.png: ")
    left = [path.name for path in (desk / "tmp").iterdir() if not path.name.startswith("torchinductor")]
    assert not left


@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_results_into_a_folder_that_cannot_be_written_are_one_line(
    launch: Launch, checkout: Path, framework: str
) -> None:
    done = launch(f"train_{framework}", *SMALL, cwd=checkout)
    assert done.returncode == 2, done.stderr
    assert done.stderr == (
        f"error: --out-dir runs/{framework}: cannot write there (Permission denied); choose another folder\n"
    )

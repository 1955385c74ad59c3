"""Training, resuming and predicting work under bad conditions, all at once.

The checkout and the data cannot be written, and their paths have spaces and letters beyond ASCII. The data do not lie
as torchvision keeps them. The user has no home, LANG is C, there is no terminal, and one core. JAX's variables forbid
what training does, and name a platform that is not there.
"""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jax_cnn.run.folder import FILES
from parity_tests.support import ROOT, TIMEOUT, assert_slip

pytestmark = [
    pytest.mark.extended,
    pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's users, capabilities and cores"),
]

SMALL = ("--limit-train", 200, "--batch-size", 50, "--limit-test", 100, "--device", "cpu")  # four steps
STRANGER = 54_321  # a user that the system does not know: no name, no home

Launch = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the source that cannot be written."""
    copy = tmp_path_factory.mktemp("somewhere") / "ein Weg – mit Umläuten"
    for name in ("jax_cnn", "torch_ref", "scripts"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in (copy, *copy.rglob("*")):
        path.chmod(path.stat().st_mode & ~0o222)
    return copy


@pytest.fixture
def desk(tmp_path: Path) -> Path:
    """Return a folder that anybody can write, with a folder for temporary files and no home in it."""
    folder = tmp_path / "Ergebnisse für später"
    for path in (folder, folder / "tmp"):
        path.mkdir()
        path.chmod(0o777)
    return folder


@pytest.fixture
def launch(checkout: Path, desk: Path) -> Launch:
    """Return a function that starts a script of that checkout under all these conditions."""
    environment = {
        "PATH": os.defpath,
        "LANG": "C",
        "LC_ALL": "C",
        "JAX_PLATFORMS": "abacus",
        "JAX_NUMPY_RANK_PROMOTION": "raise",
        "JAX_NUMPY_DTYPE_PROMOTION": "strict",
        "JAX_TRANSFER_GUARD": "disallow",
        "PYTHONPATH": str(checkout),
        "TMPDIR": str(desk / "tmp"),
    }
    if os.geteuid():  # this user keeps the name, and so needs another home
        environment["HOME"] = str(checkout / "none")
    core = str(max(os.sched_getaffinity(0)))

    def run(script: str, *flags: object, cwd: Path = desk) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, str(checkout / "scripts" / f"{script}.py"), *map(str, flags)]
        return subprocess.run(
            ["taskset", "--cpu-list", core, *as_stranger(line)],
            cwd=cwd,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            start_new_session=True,
            text=True,
            timeout=TIMEOUT,
            check=False,
        )

    return run


def as_stranger(line: list[str]) -> list[str]:
    """Return the command that runs this one as a user without a home and, unlike root, without the right to write.

    The user keeps the right to read, because Python may be installed in root's home.
    """
    if os.geteuid():
        return line
    flags = [f"--{kind}=-all,+dac_read_search" for kind in ("inh-caps", "ambient-caps", "bounding-set")]
    return ["setpriv", f"--reuid={STRANGER}", f"--regid={STRANGER}", "--clear-groups", *flags, *line]


@pytest.fixture(autouse=True)
def _conditions(checkout: Path) -> None:
    """Skip where another user cannot be had, and assert that the checkout cannot be written."""
    if not all(map(shutil.which, ("setpriv", "taskset"))):
        pytest.skip("needs setpriv and taskset (util-linux)")
    attempt = as_stranger([sys.executable, "-c", "import pathlib; pathlib.Path('file').touch()"])
    done = subprocess.run(attempt, cwd=checkout, capture_output=True, text=True, check=False)
    if "setpriv" in done.stderr:
        pytest.skip(f"cannot become another user here: {done.stderr.strip()}")
    assert "PermissionError" in done.stderr, "the checkout can be written"


def test_training_resuming_and_predicting_work(launch: Launch, good: Path, desk: Path, framework: str) -> None:
    data = desk / "Daten zum Üben"
    data.mkdir()
    for file in good.iterdir():
        (data / file.name).symlink_to(file.resolve())
    data.chmod(0o555)
    flags = (*SMALL, "--data-dir", data.name, "--out-dir", "Läufe")
    Image.fromarray(np.zeros((28, 28), np.uint8)).save(desk / "schwarzes Bild.png")
    for more in (("--epochs", 1), ("--epochs", 2, "--resume")):
        done = launch(f"train_{framework}", *flags, *more)
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert "going on after step 4" in done.stdout
    assert {*FILES} <= {path.name for path in (desk / "Läufe").iterdir()}
    done = launch("predict", "--framework", framework, "--weights", "Läufe/weights.safetensors", "schwarzes Bild.png")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("schwarzes Bild.png: ")
    assert not [path.name for path in (desk / "tmp").iterdir() if not path.name.startswith("torchinductor")]


def test_a_folder_that_cannot_be_written_is_one_line(launch: Launch, checkout: Path, framework: str) -> None:
    done = launch(f"train_{framework}", *SMALL, cwd=checkout)
    assert done.returncode == 2, done.stderr
    assert done.stderr == (
        f"error: --out-dir runs/{framework}: cannot write there (Permission denied); choose another folder\n"
    )


def test_an_incomplete_data_folder_that_cannot_be_written_is_one_line(launch: Launch, checkout: Path) -> None:
    done = launch("train_torch", *SMALL, "--data-dir", checkout)
    assert_slip(done, f"Fashion-MNIST is not in {checkout}/FashionMNIST/raw (missing: ", "Permission denied")
    assert "give a data folder that can be written to" in done.stderr

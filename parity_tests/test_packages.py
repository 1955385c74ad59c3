"""The packages: who may import whom, what an import loads, and what the wheel is to somebody who has a port.

A porter installs the wheel beside their own libraries, and compares a pair of their own in their own folder.
"""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from parity_tests.support import (
    ENVIRONMENT,
    ROOT,
    TIMEOUT,
    assert_user_error,
    read_json,
    run_in_one_process,
    run_python,
)

MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in (ROOT / "jax_cnn").rglob("*.py")
)


def loaded_by(code: str) -> set[str]:
    """Return the packages that are loaded once this code has run in a process of its own."""
    done = run_python(f"{code}; import sys; print(*{{name.partition('.')[0] for name in sys.modules}})")
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_importing_all_of_jax_cnn_loads_no_torch() -> None:
    assert len(MODULES) > 10
    loaded = loaded_by(f"import {', '.join(MODULES)}")
    assert "jax" in loaded
    assert not loaded & {"torch", "torchvision", "torch_ref"}


def test_loading_the_data_loads_no_framework(data_dir: Path) -> None:
    code = f"import pathlib; from jax_cnn import data; data.load_fashion_mnist(pathlib.Path({str(data_dir)!r}))"
    assert not loaded_by(code) & {"torch", "torchvision", "jax", "jaxlib"}


def test_adapting_a_function_loads_no_library() -> None:
    code = "from parity_tests.harness.adapters import adapt; adapt(lambda variables, rows: rows)"
    assert not loaded_by(code) & {"flax", "equinox", "haiku"}


def test_import_linter_keeps_the_contracts() -> None:
    lint = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    result = run_python(lint, "--no-cache", env={**os.environ, "PYTHONPATH": "scripts"})
    assert result.returncode == 0, result.stdout + result.stderr


# --- The wheel ---

# What the project's own networks need, but not the harness: a porter may have none of it.
ONLY_FOR_TRAINING = ("flax", "torchvision", "jaxtyping", "safetensors", "platformdirs")

HIDE = f"""
import sys


class Hide:
    def find_spec(self, name, path=None, target=None):
        if name in {ONLY_FOR_TRAINING}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)


sys.meta_path.insert(0, Hide())
"""

PORT = """
import jax
import numpy as np
import torch
from torch import nn

from parity_tests.harness import Pair


class Reference(nn.Module):
    def __init__(self):
        super().__init__()
        self.hidden, self.out = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.out(torch.relu(self.hidden(x)))


def port(params, x):
    hidden = jax.nn.relu(x @ params["hidden"]["kernel"] + params["hidden"]["bias"])
    return hidden @ params["out"]["kernel"] + params["out"]["bias"]


def faulty_port(params, x):
    return port(params, x) + 0.01 * x[:, :1]


def broken_port(params, x):
    raise ValueError("nothing works yet")


def weights(tensors):
    layers = ("hidden", "out")
    return {name: {"kernel": tensors[f"{name}.weight"].T, "bias": tensors[f"{name}.bias"]} for name in layers}


def draw(key):
    shapes = {"hidden": (3, 4), "out": (4, 2)}
    return {
        name: {"kernel": jax.random.normal(key, shape), "bias": np.zeros(shape[1])} for name, shape in shapes.items()
    }


example = np.ones((2, 3), np.float32)
pair = Pair(Reference, port, example, weights)
faulty = Pair(Reference, faulty_port, example, weights)
proposed = Pair(Reference, port, example, jax_init=draw)
broken = Pair(Reference, broken_port, example, weights)
"""

TESTS = """
import pytest
from my_port import faulty, pair

from parity_tests.harness import check


def test_my_port():
    check(pair)


def test_one_check_of_my_port():
    check(pair, "gradients")


def test_my_faulty_port():
    check(faulty)
"""


PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")


def execute(*words: str | Path) -> str:
    """Run a command, assert that it succeeds, and return what it prints."""
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a wheel of this project, built from a copy, because building writes into the folder of the sources."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for package in ("jax_cnn", "torch_ref", "parity_tests"):
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    execute(*PIP, "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source)
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.mark.extended
def test_the_wheel_has_the_packages_and_no_tests(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {"parity_tests/command.py", "parity_tests/harness/checks.py", "jax_cnn/model.py"} <= set(names)
    assert not [name for name in names if "test_" in Path(name).name or "conftest" in name or "support" in name]


def script_of(environment: Path, name: str) -> Path:
    """Return the path of a command of a virtual environment."""
    return environment / ("Scripts" if os.name == "nt" else "bin") / name


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a fresh virtual environment with the wheel in it, and the libraries that a porter has anyway.

    It sees the installed packages, but not this checkout, and not what only training needs.
    """
    folder = tmp_path_factory.mktemp("porter") / "venv"
    execute(sys.executable, "-m", "venv", "--without-pip", folder)
    install = ("install", "--quiet", "--no-deps", "--no-index", "--ignore-installed", wheel)
    execute(*PIP, "--python", folder, *install)
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = Path(execute(script_of(folder, "python"), "-c", ask).strip())
    libraries = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (packages / "libraries.pth").write_text("\n".join(libraries), encoding="utf-8")  # their own .pth are not read
    (packages / "sitecustomize.py").write_text(HIDE, encoding="utf-8")
    return folder


# A difference, a port that raises an error, the map of the weights, and the project's own pair, which needs more.
COMMANDS = (
    "--pair=my_port:faulty --steps=0 --out-dir=faulty",
    "my_port:broken --steps=0",
    "my_port:proposed --propose",
    "",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a porter's folder, with a file that declares pairs and one with tests."""
    folder = tmp_path_factory.mktemp("repository")
    (folder / "my_port.py").write_text(PORT, encoding="utf-8")
    (folder / "test_my_port.py").write_text(TESTS, encoding="utf-8")
    return folder


# A porter's variables: nothing of this checkout, and no plugin of pytest's that happens to be installed.
VARIABLES = {name: value for name, value in ENVIRONMENT.items() if not name.startswith(("PYTEST", "PYTHONPATH"))}
VARIABLES["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"


def run(environment: Path, folder: Path, command: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command of the environment in a porter's folder."""
    line: list[str | Path] = [script_of(environment, command), *arguments]
    return subprocess.run(line, cwd=folder, env=VARIABLES, capture_output=True, text=True, timeout=TIMEOUT, check=False)


@pytest.mark.extended
def test_the_command_is_the_wheel_s_and_says_with_its_status_that_a_port_is_the_same(
    environment: Path, folder: Path
) -> None:
    done = run(environment, folder, "python", "-c", "import parity_tests; print(parity_tests.__file__)")
    assert Path(done.stdout.strip()).is_relative_to(environment), done.stderr
    done = run(environment, folder, "parity-report", "my_port:pair", "--steps=2", "--out-dir=sound")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Reference: no difference." in done.stdout
    report = read_json(folder / "sound" / "report.json")
    assert report["divergences"] == []
    assert {"outputs", "gradients", "optimizer", "trajectory"} <= set(report["passed"])


@pytest.mark.extended
def test_the_command_says_with_its_status_what_else_came_of_a_pair(environment: Path, folder: Path) -> None:
    """Run these commands in one process, because each would load both frameworks."""
    lines = [[str(script_of(environment, "parity-report")), *flags.split()] for flags in COMMANDS]
    python = script_of(environment, "python")
    different, broken, proposed, own = run_in_one_process(lines, folder, VARIABLES, python)
    assert different.returncode == 1, different.stdout + different.stderr
    assert "outputs: output of " in different.stdout
    assert read_json(folder / "faulty" / "report.json")["divergences"]
    words = "cannot be compared: the JAX model fails: ValueError: nothing works yet (my_port.py, line "
    assert_user_error(broken, f"--pair my_port:broken {words}")
    assert proposed.returncode in (None, 0), proposed.stdout + proposed.stderr
    for words in ("hidden.weight", "hidden/kernel", "linear("):
        assert words in proposed.stdout
    assert_user_error(own, "--pair simple_cnn needs", "jax-cnn-parity[train]")


@pytest.mark.extended
def test_a_port_is_checked_in_the_porter_s_own_tests(environment: Path, folder: Path) -> None:
    done = run(environment, folder, "python", "-m", "pytest", "-q", "-p", "no:cacheprovider")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "2 passed" in done.stdout
    assert "1 failed" in done.stdout
    assert "AssertionError: Reference differs in 1 place" in done.stdout
    assert "outputs: output of " in done.stdout

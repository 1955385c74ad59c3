"""The layout holds: who may import whom, and what an import loads."""

import os
from pathlib import Path

from parity_tests.support import ROOT, run_python

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

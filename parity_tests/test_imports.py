"""The layout holds: who may import whom, and what an import loads."""

import os
import subprocess
import sys

import pytest

from parity_tests.support import ROOT

MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in (ROOT / "jax_cnn").rglob("*.py")
)


def loaded_by(code: str) -> set[str]:
    """Return the packages that are loaded once this code has run in a process of its own."""
    look = f"{code}; import sys; print(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_all_of_jax_cnn_loads_no_torch() -> None:
    assert len(MODULES) > 10
    loaded = loaded_by(f"import {', '.join(MODULES)}")
    assert "jax" in loaded
    assert not loaded & {"torch", "torchvision", "torch_ref"}


def test_adapting_a_function_loads_no_library() -> None:
    code = "from parity_tests.harness.adapters import adapt; adapt(lambda variables, rows: rows)"
    assert not loaded_by(code) & {"flax", "equinox", "haiku"}


def test_import_linter_keeps_the_contracts() -> None:
    result = subprocess.run(
        [
            sys.executable,
            "-c",
            "from importlinter.cli import lint_imports_command; lint_imports_command()",
            "--no-cache",
        ],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": "scripts"},
        capture_output=True,
        text=True,
        check=False,
    )
    if result.returncode:
        pytest.fail(result.stdout + result.stderr)

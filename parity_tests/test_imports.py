"""The layout holds: who may import whom."""

import os
import subprocess
import sys

import pytest

from parity_tests.support import ROOT

MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in (ROOT / "jax_cnn").rglob("*.py")
)


def test_importing_all_of_jax_cnn_loads_no_torch() -> None:
    assert len(MODULES) > 10
    code = f"import sys, {', '.join(MODULES)}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "jax" in done.stdout.split()
    assert not {*done.stdout.split()} & {"torch", "torchvision", "torch_ref"}


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

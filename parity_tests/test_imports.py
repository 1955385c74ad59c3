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


def loaded_after(imports: str) -> set[str]:
    """The top-level modules that a fresh interpreter holds after these imports."""
    code = f"import sys; {imports}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_importing_all_of_jax_cnn_loads_no_torch() -> None:
    assert len(MODULES) > 10
    loaded = loaded_after("import " + ", ".join(MODULES))
    assert "jax" in loaded
    assert not loaded & {"torch", "torchvision", "torch_ref"}


def test_the_run_loop_loads_no_framework() -> None:
    run = [module for module in MODULES if module.startswith("jax_cnn.run")]
    assert not loaded_after("import " + ", ".join(run)) & {"jax", "flax", "torch"}


def test_importing_torch_ref_loads_no_jax() -> None:
    assert not loaded_after("import torch_ref.trainer") & {"jax", "flax", "jax_cnn"}


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

"""docs/differences.md tells the truth: its examples print what it says, and every difference is guarded by a test."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from parity_tests.docs import markdown_examples
from parity_tests.harness.faults import FAULTS
from parity_tests.support import ROOT

PAGE = (ROOT / "docs/differences.md").read_text()
SMALL = """# Small

| difference | size | guarded by |
|---|---|---|
| [Half of it](#half-of-it) | 0.5, or 1.5e-08 | [`test_one`](../parity_tests/test_some.py) |

```python
one = 1
```

### Half of it

```python
print(one / 2, f"{1.5e-8:.1e}")
```

```text
0.5 1.5e-08
```
"""


def refresh(path: Path) -> str:
    """The page with what its examples print now, in a process of their own, where every warning is an error."""
    command = [sys.executable, "-W", "error", "-m", "parity_tests.docs.markdown_examples", str(path)]
    cpu = {**os.environ, "JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(command, cwd=ROOT, env=cpu, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def known_tests() -> dict[str, set[str]]:
    """Every test of the default run by file; the planted faults are tests of their own."""
    found = markdown_examples.tests_by_file(ROOT / "parity_tests")
    found["parity/test_faults.py"] |= {fault.name for fault in FAULTS}
    return found


@pytest.mark.usefixtures("data_dir")
def test_every_example_prints_what_the_page_says() -> None:
    assert len(markdown_examples.examples(PAGE)) > 20
    problems = list(markdown_examples.wrong_outputs(PAGE, refresh(ROOT / "docs/differences.md")))
    assert not problems, "\n\n".join(problems)


def test_the_table_has_every_section_and_the_figures_that_its_examples_print() -> None:
    assert not list(markdown_examples.wrong_rows(PAGE))


def test_every_difference_is_guarded_by_a_test_that_exists() -> None:
    assert not list(markdown_examples.wrong_guards(PAGE, known_tests()))


@pytest.mark.parametrize(
    ("stated", "right"),
    [
        ("0.5 1.5e-08\n```", True),
        ("0.5 5.9e-08\n```", True),  # another processor's rounding
        ("0.5 6.1e-08\n```", False),
        ("0.5 0.0e+00\n```", False),
        ("0.5 -1.5e-08\n```", False),
        ("0.6 1.5e-08\n```", False),
        ("0.5\n```", False),
    ],
)
def test_a_wrong_output_is_found(stated: str, right: bool) -> None:
    planted = SMALL.replace("0.5 1.5e-08\n```", stated)
    assert bool(list(markdown_examples.wrong_outputs(planted, markdown_examples.refreshed(planted)))) is not right


def test_an_example_that_fails_or_has_no_output_is_found() -> None:
    failing = SMALL.replace("one / 2", "two / 2")
    assert "NameError" in next(markdown_examples.wrong_outputs(failing, markdown_examples.refreshed(failing)))
    silent = SMALL + "\n```python\nprint(one)\n```\n"
    assert "needs a text block" in next(markdown_examples.wrong_outputs(silent, markdown_examples.refreshed(silent)))


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("| 0.5, or", "| 0.6, or", "the table says 0.6"),
        ("or 1.5e-08 |", "or 1.6e-08 |", "the table says 1.6e-08"),
        ("(#half-of-it)", "(#half)", "the link goes to #half"),
        ("### Half of it", "### Half", "the sections are"),
    ],
)
def test_a_wrong_row_is_found(old: str, new: str, problem: str) -> None:
    assert not list(markdown_examples.wrong_rows(SMALL))
    assert problem in next(markdown_examples.wrong_rows(SMALL.replace(old, new)))


def test_a_missing_guard_is_found(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text("def test_one(): ...\n@pytest.mark.slow\ndef test_two(): ...\n")
    tests = markdown_examples.tests_by_file(tmp_path)
    assert not list(markdown_examples.wrong_guards(SMALL, tests))
    for name in ("test_three", "test_two"):  # not there; left out of the default run
        assert f"no test {name}" in next(markdown_examples.wrong_guards(SMALL.replace("test_one", name), tests))
    assert "no test guards it" in next(
        markdown_examples.wrong_guards(SMALL.replace("[`test_one`](../parity_tests/test_some.py)", "-"), tests)
    )

"""The examples of docs/differences.md print what the page says, and a test guards against every difference."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from parity_tests.docs.markdown_examples import check_guards, check_outputs, check_rows, find_default_tests, refresh
from parity_tests.faults import FAULTS
from parity_tests.support import ROOT

PATH = ROOT / "docs" / "differences.md"
PAGE = PATH.read_text(encoding="utf-8")
SMALL_PAGE = """# Small

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


@pytest.mark.usefixtures("data_dir")
def test_every_example_prints_what_the_page_says() -> None:
    assert PAGE.count("\n```text\n") > 20
    command = [sys.executable, "-W", "error", "-m", "parity_tests.docs.markdown_examples", str(PATH)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "", "PYTHONUTF8": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr
    problems = list(check_outputs(PAGE, done.stdout))
    assert not problems, "\n\n".join(problems)


def test_the_table_has_every_section_and_the_figures_that_its_examples_print() -> None:
    assert not list(check_rows(PAGE))


def test_every_difference_is_guarded_by_a_test_that_exists() -> None:
    tests = find_default_tests(ROOT / "parity_tests")
    tests["parity/test_faults.py"] |= {fault.name for fault in FAULTS}  # the page links to a fault by its name
    assert not list(check_guards(PAGE, tests))


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("{1.5e-8:", "{5.9e-8:", ""),  # another processor rounds differently
        ("{1.5e-8:", "{6.1e-8:", "but the page says"),
        ("{1.5e-8:", "{0:", "but the page says"),
        ("{1.5e-8:", "{-1.5e-8:", "but the page says"),
        ("one / 2", "0.6", "but the page says"),
        (', f"{1.5e-8:.1e}"', "", "but the page says"),
        ("one / 2", "two / 2", "NameError"),
        ("### Half", "```python\nprint(one)\n```\n\n### Half", "needs a text block"),
        ("| 0.5, or", "| 0.6, or", "the table says 0.6"),
        ("or 1.5e-08 |", "or 1.6e-08 |", "the table says 1.6e-08"),
        ("(#half-of-it)", "(#half)", "wrong link #half"),
        ("### Half of it", "### Half", "the page has the sections"),
        ("`test_one`", "`test_two`", "there is no test test_two"),
        ("[`test_one`](../parity_tests/test_some.py)", "-", "no test guards against it"),
    ],
)
def test_a_mistake_in_a_page_is_found(old: str, new: str, problem: str) -> None:
    page = SMALL_PAGE.replace(old, new)
    assert page != SMALL_PAGE
    tests = {"test_some.py": {"test_one"}}
    problems = "\n".join([*check_outputs(page, refresh(page)), *check_rows(page), *check_guards(page, tests)])
    assert problem in problems
    assert bool(problems) is bool(problem)


def test_a_slow_test_is_not_in_the_default_run(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text("def test_one(): ...\n@pytest.mark.slow\ndef test_two(): ...\n")
    assert find_default_tests(tmp_path) == {"test_some.py": {"test_one"}}

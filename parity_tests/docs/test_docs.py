"""The docs and the lesson print what they say.

The first Python block of docs/differences.md prepares what all its examples use. Every other Python block is an
example, and the text block after it is its output. The table has one row for each section of the third level: a link to
the section, the size of the effect, and links to the tests that guard against it.
`python -m parity_tests.docs.test_docs docs/differences.md` prints the page with new outputs.

The lesson runs from top to bottom, its solutions are right, and its committed outputs are from one full run.
"""

import ast
import contextlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Set
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from parity_tests.support import ROOT

FACTOR = 4.0  # allowed between two numbers with an exponent: another processor rounds differently

PYTHON = re.compile(r"^```python\n((?:(?!```).)*)^```$", re.MULTILINE | re.DOTALL)
EXAMPLE = re.compile(PYTHON.pattern + r"\n\n^```text\n((?:(?!```).)*)^```$", re.MULTILINE | re.DOTALL)  # code, output
SECTION = re.compile(r"^### (.+)\n((?:(?!^##).*\n?)*)", re.MULTILINE)
ROW = re.compile(r"^\| \[(.+?)\]\(#(.+?)\) \| (.+?) \| (.+?) \|$", re.MULTILINE)
GUARD = re.compile(r"\[`(.+?)`\]\(\.\./parity_tests/((?:\w+/)*test_\w+\.py)\)")
SCIENTIFIC = re.compile(r"\d\.\de[+-]\d\d")
FIGURE = re.compile(r"\d[\d.,]*(?:e[+-]\d+| %)?")


class Row(NamedTuple):
    """A row of the table. `guards` has (test, file) for each test."""

    title: str
    anchor: str
    size: str
    guards: list[tuple[str, str]]


def find_rows(page: str) -> list[Row]:
    """Return the rows of the table."""
    return [Row(title, anchor, size, GUARD.findall(guards)) for title, anchor, size, guards in ROW.findall(page)]


def refresh(page: str) -> str:
    """Run every example in its own namespace, and return the page with the new outputs."""
    prepared: dict[str, Any] = {}
    if preparation := PYTHON.search(page):
        exec(compile(preparation[1], "<preparation>", "exec"), prepared)

    def run(example: re.Match[str]) -> str:
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            try:
                exec(compile(example[1], "<example>", "exec"), dict(prepared))
            except Exception as error:  # becomes the output, so that the other examples are still compared
                print(f"{type(error).__name__}: {error}")
        return example[0].replace(f"```text\n{example[2]}", f"```text\n{output.getvalue()}")

    return EXAMPLE.sub(run, page)


def agrees(expected: str, actual: str) -> bool:
    """Return whether two outputs are equal. Numbers with an exponent may differ by a factor of up to `FACTOR`."""
    if SCIENTIFIC.sub("", expected) != SCIENTIFIC.sub("", actual):
        return False
    pairs = zip(map(float, SCIENTIFIC.findall(expected)), map(float, SCIENTIFIC.findall(actual)), strict=True)
    return all(max(pair) <= FACTOR * min(pair) for pair in pairs)


def check_outputs(page: str, refreshed: str) -> Iterator[str]:
    """Yield a message for each example whose output differs from the page."""
    examples, new_examples = EXAMPLE.findall(page), EXAMPLE.findall(refreshed)
    if len(examples) != len(PYTHON.findall(page)) - 1:
        yield "every Python block except the first needs a text block with its output after it"
    for (code, expected), (_, actual) in zip(examples, new_examples, strict=True):
        if not agrees(expected, actual):
            yield f"{code}\nprints\n\n{actual}\nbut the page says\n\n{expected}"


def check_rows(page: str) -> Iterator[str]:
    """Yield a message for each title, link or figure of the table that does not fit its section."""
    sections = dict(SECTION.findall(page))
    if (titles := [row.title for row in find_rows(page)]) != list(sections):
        yield f"the table has the rows {titles}, but the page has the sections {list(sections)}"
    for row in find_rows(page):
        if row.anchor != re.sub(r"[^\w -]", "", row.title.lower()).replace(" ", "-"):
            yield f"{row.title}: wrong link #{row.anchor}"
        outputs = [output for _, output in EXAMPLE.findall(sections.get(row.title, ""))]
        printed = FIGURE.findall("".join(outputs))
        for figure in FIGURE.findall(row.size):
            if figure.rstrip(".,") not in printed:
                yield f"{row.title}: the table says {figure}, but no example of the section prints it"


def check_guards(page: str, tests: Mapping[str, Set[str]]) -> Iterator[str]:
    """Yield a message for each row without a guard and for each guard that is not in `tests`, by file."""
    for row in find_rows(page):
        if not row.guards:
            yield f"{row.title}: no test guards against it"
        for test, file in row.guards:
            if test not in tests.get(file, ()):
                yield f"{row.title}: there is no test {test} in {file}"


LEFT_OUT = {f"pytest.mark.{mark}" for mark in ("extended", "slow", "tpu")}


def find_default_tests(folder: Path) -> dict[str, set[str]]:
    """Return the tests of the default run by file: all tests without the marks `extended`, `slow` and `tpu`."""
    tests = {}
    for path in folder.rglob("test_*.py"):
        statements = ast.parse(path.read_text(encoding="utf-8")).body
        functions = [statement for statement in statements if isinstance(statement, ast.FunctionDef)]
        tests[str(path.relative_to(folder))] = {
            function.name
            for function in functions
            if function.name.startswith("test_") and not LEFT_OUT & set(map(ast.unparse, function.decorator_list))
        }
    return tests


# The page

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


@pytest.mark.extended
@pytest.mark.usefixtures("data_dir")
def test_every_example_prints_what_the_page_says() -> None:
    assert PAGE.count("\n```text\n") > 20
    command = [sys.executable, "-W", "error", "-m", "parity_tests.docs.test_docs", str(PATH)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": "", "PYTHONUTF8": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, encoding="utf-8", check=False)
    assert done.returncode == 0, done.stderr
    problems = list(check_outputs(PAGE, done.stdout))
    assert not problems, "\n\n".join(problems)


def test_the_table_has_every_section_and_the_figures_that_its_examples_print() -> None:
    assert not list(check_rows(PAGE))


def test_every_difference_is_guarded_by_a_test_that_exists() -> None:
    from parity_tests.faults import FAULTS  # only now: the process that runs the examples need not load the harness

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


@pytest.mark.parametrize("mark", ["extended", "slow"])
def test_a_slow_test_is_not_in_the_default_run(tmp_path: Path, mark: str) -> None:
    (tmp_path / "test_some.py").write_text(f"def test_one(): ...\n@pytest.mark.{mark}\ndef test_two(): ...\n")
    assert find_default_tests(tmp_path) == {"test_some.py": {"test_one"}}


# --- The lesson ---

LESSON = ROOT / "notebooks" / "understanding_cnns.ipynb"
SOLUTION = re.compile(r"<details>.*```python\n(.*?)```\n\n```text\n(.*?)```\n\n</details>", re.DOTALL)
MAX_BYTES = 1_500_000

Cell = dict[str, Any]
Notebook = dict[str, Any]


def code_cell(name: str, source: str) -> Cell:
    """Return a code cell that has not run yet."""
    return {"cell_type": "code", "id": name, "metadata": {}, "execution_count": None, "outputs": [], "source": source}


def code_cells(notebook: Notebook) -> list[Cell]:
    """Return the code cells of a notebook."""
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def find_solution(cell: Cell) -> tuple[str, str] | None:
    """Return the code and the output of the solution in a text cell, or None if the cell has none."""
    match = SOLUTION.search("".join(cell["source"])) if cell["cell_type"] == "markdown" else None
    return (match[1], match[2]) if match else None


def add_solutions(notebook: Notebook) -> Notebook:
    """Add a code cell after each solution, and a first cell that turns warnings into errors."""
    cells = [code_cell("warnings", "import warnings\n\nwarnings.simplefilter('error')")]
    for number, cell in enumerate(notebook["cells"]):
        cells.append(cell)
        if solution := find_solution(cell):
            cells.append(code_cell(f"solution-{number}", solution[0]))
    return notebook | {"cells": cells}


def run_lesson(notebook: Notebook, folder: Path) -> tuple[Notebook, str]:
    """Run a notebook with `pytest --nbmake` and `LESSON=quick`. Return it with its outputs, and the error or ''."""
    path = folder / LESSON.name
    path.write_text(json.dumps(notebook), encoding="utf-8")
    shutil.copy(LESSON.parent / "drawing.py", folder)
    nbmake = ["--nbmake", "--overwrite", "--nbmake-timeout=300", "-p", "no:cacheprovider"]
    quick = os.environ | {"LESSON": "quick", "JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", *nbmake, path.name]
    done = subprocess.run(command, cwd=folder, env=quick, capture_output=True, text=True, check=False)
    return json.loads(path.read_text(encoding="utf-8")), done.stdout + done.stderr if done.returncode else ""


def printed(cell: Cell) -> str:
    """Return what a code cell has printed."""
    return "".join("".join(output["text"]) for output in cell["outputs"] if output.get("name") == "stdout")


def check_solutions(notebook: Notebook) -> list[str]:
    """Return a message for each solution that printed something else than its text says, or that was not needed."""
    problems = []
    exercise, expected = "", ""
    for cell in notebook["cells"]:
        if solution := find_solution(cell):
            expected = solution[1]
        elif cell["id"].startswith("solution-"):
            if printed(cell) != expected:
                problems.append(f"{cell['source']} printed {printed(cell)}, not {expected}")
            if exercise.startswith("True"):
                problems.append(f"the exercise prints True before it is solved: {cell['source']}")
        elif cell["cell_type"] == "code":
            exercise = printed(cell)
    return problems


def output_kinds(notebook: Notebook) -> list[set[str]]:
    """Return the kinds of outputs (MIME types, stdout, stderr) of each code cell of the lesson itself."""
    own = [cell for cell in code_cells(notebook) if not cell["id"].startswith(("solution-", "warnings"))]
    return [{kind for output in cell["outputs"] for kind in output.get("data", [output.get("name")])} for cell in own]


@pytest.fixture(scope="module")
def lesson() -> Notebook:
    """Return the lesson as it is in the repository."""
    notebook: Notebook = json.loads(LESSON.read_text(encoding="utf-8"))
    return notebook


@pytest.mark.extended
@pytest.mark.usefixtures("data_dir")
def test_the_lesson_runs_and_its_solutions_are_right(lesson: Notebook, tmp_path: Path) -> None:
    result, error = run_lesson(add_solutions(lesson), tmp_path)
    assert not error, error
    assert not check_solutions(result)
    assert output_kinds(result) == output_kinds(lesson)


def test_every_exercise_has_a_solution_that_runs(lesson: Notebook) -> None:
    texts = ["".join(cell["source"]) for cell in lesson["cells"] if cell["cell_type"] == "markdown"]
    exercises = re.findall(r"^\*\*\d+\. ", "\n".join(texts), re.MULTILINE)
    solutions = [cell for cell in lesson["cells"] if find_solution(cell)]
    assert len(exercises) == len(solutions) == sum("<details>" in text for text in texts) >= 6


def test_the_committed_outputs_are_from_one_full_run(lesson: Notebook) -> None:
    cells = code_cells(lesson)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"]
    assert sum("after 5 of 5 epochs" in printed(cell) for cell in cells) == 2  # one for each framework
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 15
    tables = ["".join(output.get("data", {}).get("text/plain", "")).splitlines() for output in outputs]
    (layers,) = (table for table in tables if table and table[0].startswith("stage | PyTorch [batch, channel, row"))
    assert "conv2 | (64, 64, 14, 14) | (64, 14, 14, 64) | 18,496" in layers
    assert sum("SimpleCNN Summary" in printed(cell) for cell in cells) == 1, "Flax's own table"


def test_the_committed_file_is_small_and_contains_no_path_of_the_machine(lesson: Notebook) -> None:
    assert LESSON.stat().st_size < MAX_BYTES
    text = re.sub(r'"image/png": ".*?"', "", json.dumps(lesson))
    assert not re.findall(r"/(?:home|root|tmp|usr|opt|Users)/\S*|site-packages", text)


@pytest.mark.extended
def test_a_wrong_solution_and_a_warning_are_found(lesson: Notebook, tmp_path: Path) -> None:
    cells = [code_cell("exercise", "print(False)")]
    for number, source in enumerate(("print(1 + 2)", "import warnings\nwarnings.warn('old')\nprint(2)")):
        solution = f"<details>\n\n```python\n{source}\n```\n\n```text\n2\n```\n\n</details>"
        cells.append({"cell_type": "markdown", "id": f"text-{number}", "metadata": {}, "source": [solution]})
    result, error = run_lesson(add_solutions(lesson | {"cells": cells}), tmp_path)
    assert "UserWarning" in error
    assert "printed 3" in check_solutions(result)[0]


if __name__ == "__main__":
    print(refresh(Path(sys.argv[1]).read_text(encoding="utf-8")), end="")

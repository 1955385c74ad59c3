"""The lesson runs from top to bottom, its solutions are right, and what is committed is the output of a full run."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from parity_tests.support import ROOT

LESSON = ROOT / "notebooks" / "understanding_cnns.ipynb"
SOLUTION = re.compile(r"<details>.*```python\n(.*?)```\n\n```text\n(.*?)```\n\n</details>", re.DOTALL)
WARNINGS = "import warnings\n\nwarnings.simplefilter('error')"
MOST_BYTES = 1_500_000

Cell = dict[str, Any]
Notebook = dict[str, Any]


def code_cell(name: str, source: str) -> Cell:
    """A cell that has not run yet."""
    return {
        "cell_type": "code",
        "id": name,
        "metadata": {},
        "execution_count": None,
        "outputs": [],
        "source": source.splitlines(keepends=True),
    }


def code_cells(notebook: Notebook) -> list[Cell]:
    """Those that run."""
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def solution(cell: Cell) -> tuple[str, str] | None:
    """The code that is folded up in a cell of text, and what it is said to print."""
    found = SOLUTION.search("".join(cell["source"])) if cell["cell_type"] == "markdown" else None
    return (found[1], found[2]) if found else None


def with_solutions(notebook: Notebook) -> Notebook:
    """The lesson with each solution as a cell that runs, and with warnings that are errors."""
    cells = [code_cell("warnings", WARNINGS)]
    for number, cell in enumerate(notebook["cells"]):
        solved = solution(cell)
        cells += [cell, code_cell(f"solution-{number}", solved[0])] if solved else [cell]
    return notebook | {"cells": cells}


def run(notebook: Notebook, folder: Path) -> tuple[Notebook, str]:
    """Run the quick setting as `pytest --nbmake` does; the notebook with its outputs, and the error if there is one."""
    path = folder / LESSON.name
    path.write_text(json.dumps(notebook))
    shutil.copy(LESSON.parent / "drawing.py", folder)
    nbmake = ["--nbmake", "--overwrite", "--nbmake-timeout=300", "-p", "no:cacheprovider"]
    quick = os.environ | {"LESSON": "quick", "JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", *nbmake, path.name]
    result = subprocess.run(command, cwd=folder, env=quick, capture_output=True, text=True, check=False)
    return json.loads(path.read_text()), result.stdout + result.stderr if result.returncode else ""


def printed(cell: Cell) -> str:
    """What a cell has printed."""
    return "".join("".join(output["text"]) for output in cell["outputs"] if output.get("name") == "stdout")


def wrong_solutions(notebook: Notebook) -> list[str]:
    """Solutions that did not print what stands beneath them, and exercises that were solved before."""
    wrong = []
    exercise, expected = "", ""
    for cell in notebook["cells"]:
        if cell["id"].startswith("solution-"):
            if printed(cell) != expected:
                wrong.append(f"{cell['source']} printed {printed(cell)}, not {expected}")
            if exercise.startswith("True"):
                wrong.append(f"it was solved before: {cell['source']}")
        elif cell["cell_type"] == "code":
            exercise = printed(cell)
        elif solved := solution(cell):
            expected = solved[1]
    return wrong


def kinds(notebook: Notebook) -> list[set[str]]:
    """What each of the lesson's own cells shows: the kinds of its outputs."""
    own = [cell for cell in code_cells(notebook) if not cell["id"].startswith(("solution-", "warnings"))]
    return [{kind for shown in cell["outputs"] for kind in shown.get("data", [shown.get("name")])} for cell in own]


@pytest.fixture(scope="module")
def committed() -> Notebook:
    """The lesson as it is in the repository."""
    notebook: Notebook = json.loads(LESSON.read_text())
    return notebook


@pytest.mark.usefixtures("data_dir")
def test_the_lesson_runs_and_its_solutions_are_right(committed: Notebook, tmp_path: Path) -> None:
    lesson = with_solutions(committed)
    assert len(code_cells(lesson)) >= len(code_cells(committed)) + 6
    outcome, error = run(lesson, tmp_path)
    assert not error, error
    assert not wrong_solutions(outcome)
    assert kinds(outcome) == kinds(committed)


def test_every_exercise_has_a_solution_that_runs(committed: Notebook) -> None:
    texts = ["".join(cell["source"]) for cell in committed["cells"] if cell["cell_type"] == "markdown"]
    exercises = [start for text in texts for start in re.findall(r"^\*\*\d+\. ", text, re.MULTILINE)]
    assert len(exercises) == sum("<details>" in text for text in texts)
    assert len(exercises) == sum(solution(cell) is not None for cell in committed["cells"])


def test_the_committed_outputs_are_of_one_full_run(committed: Notebook) -> None:
    cells = code_cells(committed)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"]
    assert sum("after 5 of 5 epochs" in printed(cell) for cell in cells) == 2  # one of each framework
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 15


def test_the_committed_file_is_small_and_tells_nothing_of_the_machine(committed: Notebook) -> None:
    assert LESSON.stat().st_size < MOST_BYTES
    shown = re.sub(r'"image/png": ".*?"', "", json.dumps(committed))
    assert not re.findall(r"/(?:home|root|tmp|usr|opt|Users)/\S*|site-packages", shown)


@pytest.mark.parametrize(
    ("source", "said", "problem"),
    [
        ("print(1 + 1)", "2\n", ""),
        ("print(1 + 2)", "2\n", "printed 3"),
        ("print(1 / 0)", "2\n", "ZeroDivisionError"),
        ("import warnings\nwarnings.warn('old')\nprint(2)", "2\n", "UserWarning"),
    ],
)
def test_a_wrong_solution_is_found(source: str, said: str, problem: str, committed: Notebook, tmp_path: Path) -> None:
    folded = f"<details>\n\n```python\n{source}\n```\n\n```text\n{said}```\n\n</details>"
    text = {"cell_type": "markdown", "id": "folded", "metadata": {}, "source": [folded]}
    outcome, error = run(with_solutions(committed | {"cells": [code_cell("exercise", "print(False)"), text]}), tmp_path)
    found = error + "".join(wrong_solutions(outcome))
    assert problem in found
    assert bool(found) is bool(problem)

"""The lesson runs from top to bottom, its solutions are right, and its committed outputs are from one full run."""

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


def run(notebook: Notebook, folder: Path) -> tuple[Notebook, str]:
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
    result, error = run(add_solutions(lesson), tmp_path)
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
    result, error = run(add_solutions(lesson | {"cells": cells}), tmp_path)
    assert "UserWarning" in error
    assert "printed 3" in check_solutions(result)[0]

"""Run the examples of a Markdown page, and check its outputs, its table and the tests that it names.

The first Python block of a page prepares what all examples use. Every other Python block is an example, and the text
block after it is its output. The table has one row for each section of the third level: a link to the section, the size
of the effect, and links to the tests that guard against it.

`python -m parity_tests.docs.markdown_examples docs/differences.md` prints the page with new outputs.
"""

import ast
import contextlib
import io
import re
import sys
from collections.abc import Iterator, Mapping, Set
from pathlib import Path
from typing import Any, NamedTuple

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


def find_default_tests(folder: Path) -> dict[str, set[str]]:
    """Return the tests of the default run by file: all tests without the marks `slow` and `tpu`."""
    tests = {}
    for path in folder.rglob("test_*.py"):
        statements = ast.parse(path.read_text(encoding="utf-8")).body
        functions = [statement for statement in statements if isinstance(statement, ast.FunctionDef)]
        tests[str(path.relative_to(folder))] = {
            function.name
            for function in functions
            if function.name.startswith("test_")
            and not re.search(r"mark\.(slow|tpu)", " ".join(map(ast.unparse, function.decorator_list)))
        }
    return tests


if __name__ == "__main__":
    print(refresh(Path(sys.argv[1]).read_text(encoding="utf-8")), end="")

"""A page whose examples are run: what it prints, the figures that it tells and the tests that it names stay true.

A page is Markdown. Its first block of Python prepares what all examples use. Every other one is an example, and the
text block behind it is what it prints. A table has a row for every section of the third level: a link to the section,
the size of the effect, and links to the tests that guard against it.

`python -m parity_tests.docs.markdown_examples docs/differences.md` prints the page with what its examples print now.
"""

import ast
import contextlib
import io
import re
import sys
from collections.abc import Iterator, Mapping, Set
from pathlib import Path
from typing import Any, NamedTuple

FACTOR = 4.0  # between a number with an exponent and the same on another processor: rounding errors and step sizes

PYTHON = re.compile(r"^```python\n((?:(?!```).)*)^```$", re.MULTILINE | re.DOTALL)
EXAMPLE = re.compile(PYTHON.pattern + r"\n\n^```text\n((?:(?!```).)*)^```$", re.MULTILINE | re.DOTALL)
SECTION = re.compile(r"^### (.+)\n((?:(?!^##).*\n?)*)", re.MULTILINE)
ROW = re.compile(r"^\| \[(.+?)\]\(#(.+?)\) \| (.+?) \| (.+?) \|$", re.MULTILINE)
GUARD = re.compile(r"\[`(.+?)`\]\(\.\./parity_tests/((?:\w+/)*test_\w+\.py)\)")
SCIENTIFIC = re.compile(r"\d\.\de[+-]\d\d")
FIGURE = re.compile(r"\d[\d.,]*(?:e[+-]\d+| %)?")


class Example(NamedTuple):
    """A block of code and what the page says that it prints."""

    code: str
    output: str


class Row(NamedTuple):
    """A line of the table: a section, the size of its effect, and (test, file) for each test that guards against it."""

    title: str
    anchor: str
    size: str
    guards: list[tuple[str, str]]


def examples(page: str) -> list[Example]:
    """Every example, in order."""
    return [Example(*match.groups()) for match in EXAMPLE.finditer(page)]


def rows(page: str) -> list[Row]:
    """The table."""
    return [Row(title, anchor, size, GUARD.findall(guards)) for title, anchor, size, guards in ROW.findall(page)]


def refreshed(page: str) -> str:
    """Run every example, each in a namespace of its own behind the preparation; the page with what they print now."""
    preparation = PYTHON.search(page)
    prepared: dict[str, Any] = {}
    if preparation:
        exec(compile(preparation[1], "<preparation>", "exec"), prepared)

    def rerun(match: re.Match[str]) -> str:
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            try:
                exec(compile(match[1], "<example>", "exec"), dict(prepared))
            except Exception as error:  # is what the example prints, then: the others can still be compared
                print(f"{type(error).__name__}: {error}")
        return match[0].replace(f"```text\n{match[2]}", f"```text\n{output.getvalue()}")

    return EXAMPLE.sub(rerun, page)


def wrong_outputs(page: str, fresh: str) -> Iterator[str]:
    """Examples that print something else than the page says."""
    if len(examples(page)) != len(PYTHON.findall(page)) - 1:
        yield "every block of Python but the first needs a text block behind it, with what it prints"
    for stated, printed in zip(examples(page), examples(fresh), strict=True):
        if not agrees(stated.output, printed.output):
            yield f"{stated.code}\nprints\n\n{printed.output}\nand the page says\n\n{stated.output}"


def agrees(stated: str, printed: str) -> bool:
    """Whether two outputs are the same to the letter, but for FACTOR between numbers with an exponent."""
    if SCIENTIFIC.sub("", stated) != SCIENTIFIC.sub("", printed):
        return False
    pairs = zip(map(float, SCIENTIFIC.findall(stated)), map(float, SCIENTIFIC.findall(printed)), strict=True)
    return all(max(pair) <= FACTOR * min(pair) for pair in pairs)


def wrong_rows(page: str) -> Iterator[str]:
    """Where the table and the sections disagree: titles, links, and figures that no example of the section prints."""
    sections = dict(SECTION.findall(page))
    if [row.title for row in rows(page)] != list(sections):
        yield f"the table has {[row.title for row in rows(page)]}, the sections are {list(sections)}"
    for row in rows(page):
        if row.anchor != re.sub(r"[^\w -]", "", row.title.lower()).replace(" ", "-"):
            yield f"{row.title}: the link goes to #{row.anchor}"
        printed = "".join(example.output for example in examples(sections.get(row.title, "")))
        for figure in FIGURE.findall(row.size):
            if figure.rstrip(".,") not in FIGURE.findall(printed):
                yield f"{row.title}: the table says {figure}, which the section's examples do not print"


def wrong_guards(page: str, tests: Mapping[str, Set[str]]) -> Iterator[str]:
    """Rows that no test guards, and tests that are not there."""
    for row in rows(page):
        if not row.guards:
            yield f"{row.title}: no test guards it"
        for test, file in row.guards:
            if test not in tests.get(file, ()):
                yield f"{row.title}: there is no test {test} in {file}"


def tests_by_file(folder: Path) -> dict[str, set[str]]:
    """The tests of the default run, by the file that they are in: those that no mark leaves out."""

    def runs(function: ast.FunctionDef) -> bool:
        marks = " ".join(map(ast.unparse, function.decorator_list))
        return function.name.startswith("test_") and not re.search(r"mark\.(slow|tpu)", marks)

    return {
        str(path.relative_to(folder)): {
            node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef) and runs(node)
        }
        for path in folder.rglob("test_*.py")
    }


if __name__ == "__main__":
    print(refreshed(Path(sys.argv[1]).read_text()), end="")

"""Pieces of this project's own files: found by name, cut out, and their lines of code counted."""

import ast
import io
import textwrap
import tokenize
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

from experiments.comparison.settings import ROOT

Json = dict[str, Any]


class Cut(NamedTuple):
    """A piece of a file: a top-level name, or `Class.method`; of its statements only those from `first` to `last`."""

    file: str
    name: str
    first: str = ""
    """How the first statement begins; all of the definition if empty."""
    last: str = ""
    """How the last statement begins; the first is the only one if empty."""


def listing(cut: Cut) -> Json:
    """The piece itself, without its indentation, and where it stands.

    Raises:
        LookupError: the file does not hold it.
    """
    first, last = find(cut)
    lines = read(cut.file).splitlines()[first - 1 : last]
    return {
        "file": cut.file,
        "name": cut.name,
        "first_line": first,
        "last_line": last,
        "code": textwrap.dedent("\n".join(lines)),
    }


def find(cut: Cut) -> tuple[int, int]:
    """The first and the last line of a piece.

    Raises:
        LookupError: the file does not hold it.
    """
    node: ast.AST = ast.parse(read(cut.file))
    for name in cut.name.split("."):
        node = next((child for child in getattr(node, "body", []) if name in names_of(child)), ast.Pass())
    statements = [node] if not cut.first else [*starting(node, cut.first), *starting(node, cut.last or cut.first)]
    if isinstance(node, ast.Pass) or len(statements) < (2 if cut.first else 1):
        raise LookupError(f"{cut.file} holds no {cut.name} {cut.first} {cut.last}".rstrip())
    lines = [(start_of(statement), statement.end_lineno) for statement in statements if isinstance(statement, ast.stmt)]
    return min(first for first, _ in lines), max(last or 0 for _, last in lines)


def names_of(node: ast.AST) -> list[str]:
    """What a statement defines."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return [node.name]
    if isinstance(node, ast.Assign):
        return [target.id for target in node.targets if isinstance(target, ast.Name)]
    return []


def starting(node: ast.AST, text: str) -> list[ast.stmt]:
    """The first of the statements inside that begin so."""
    inside = (each for each in ast.walk(node) if isinstance(each, ast.stmt) and each is not node)
    return [each for each in inside if ast.unparse(each).startswith(text)][:1]


def start_of(statement: ast.stmt) -> int:
    """Its first line, decorators counted."""
    return min([statement.lineno, *(each.lineno for each in getattr(statement, "decorator_list", []))])


def count_lines(listings: Sequence[Json]) -> int:
    """Lines of code: no blank ones, no comments, no docstrings; a line that two listings share counts once."""
    counted = set()
    for each in listings:
        code = code_lines(each["file"])
        counted |= {(each["file"], line) for line in range(each["first_line"], each["last_line"] + 1) if line in code}
    return len(counted)


@cache
def code_lines(file: str) -> frozenset[int]:
    """The numbers of the lines that hold code."""
    ignored = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    tokens = tokenize.generate_tokens(io.StringIO(read(file)).readline)
    lines = {line for token in tokens if token.type not in ignored for line in range(token.start[0], token.end[0] + 1)}
    for node in ast.walk(ast.parse(read(file))):
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and is_docstring(body[0]):
            lines -= set(range(body[0].lineno, body[0].end_lineno + 1))
    return frozenset(lines)


def is_docstring(node: ast.stmt) -> bool:
    """Whether a statement is a string and nothing else: a docstring, or what says what a field is."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


@cache
def read(file: str) -> str:
    """A file of this project."""
    return (ROOT / file).read_text()

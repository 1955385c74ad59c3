"""The two programs side by side: pieces of the project's own files, found by name, and their lines of code."""

import ast
import io
import textwrap
import tokenize
from collections.abc import Iterable
from functools import cache

from experiments.answers import FRAMEWORKS
from experiments.records import ROOT, Json

# What the page shows, by part of the program and by the way to write it. Each piece is a file and a definition in it
# (`Class.method` for a method). If only some of its statements are shown, two more words say how the first and the last
# of them begin.
PROGRAMS = {
    "Data": {
        "PyTorch": ["torch_ref/train.py load_dataset", "torch_ref/train.py load_batches"],
        "JAX": [
            "jax_cnn/trainer.py JaxTrainer._chunks",
            "jax_cnn/trainer.py JaxTrainer._send",
            "jax_cnn/train.py to_images",
        ],
    },
    "Model": {
        "PyTorch": ["torch_ref/model.py SimpleCNN"],
        "JAX with Flax Linen": [
            "jax_cnn/model.py SimpleCNN",
            "jax_cnn/model.py ConvReluPool",
            "jax_cnn/model.py conv_relu_pool",
        ],
        "JAX with Flax NNX": ["jax_cnn/dialects/nnx.py SimpleCNN", "jax_cnn/dialects/nnx.py ConvReluPool"],
        "JAX in plain functions": ["jax_cnn/dialects/plain.py simple_cnn", "jax_cnn/dialects/plain.py dense"],
    },
    "Loss": {
        "PyTorch": ["torch_ref/train.py criterion"],
        "JAX": ["jax_cnn/train.py cross_entropy", "jax_cnn/train.py loss_fn"],
    },
    "Step": {
        "PyTorch": [
            "torch_ref/trainer.py TorchTrainer.__init__ self._optimizer self._optimizer",
            "torch_ref/train.py train_one_epoch optimizer.zero_grad optimizer.step",
        ],
        "JAX": ["jax_cnn/train.py make_optimizer", "jax_cnn/train.py train_step"],
    },
    "Loop": {
        "PyTorch": ["torch_ref/train.py train_one_epoch", "torch_ref/trainer.py TorchTrainer.train_epoch"],
        "JAX": ["jax_cnn/train.py train_chunk", "jax_cnn/trainer.py JaxTrainer.train_epoch"],
    },
}
NOT_RUN = {"JAX with Flax NNX", "JAX in plain functions"}  # unless --dialect asks for them
OPERATIONS = "jax_cnn/ops.py"  # replaces calls of a library, so it is neither shown nor counted with the rest


def describe_parts() -> list[Json]:
    """Return every part of the program with the listings and the lines of code of each way to write it."""
    parts: list[Json] = []
    for title, programs in PROGRAMS.items():
        parts.append({"title": title, "programs": []})
        for label, places in programs.items():
            listings = [read_listing(*place.split()) for place in places]
            program = {"side": "torch" if label == "PyTorch" else "jax", "label": label, "ran": label not in NOT_RUN}
            parts[-1]["programs"].append(program | {"lines": count_lines(listings), "listings": listings})
    return parts


def total_lines(parts: Iterable[Json]) -> dict[str, int]:
    """Return each framework's lines of code in the programs that ran."""
    programs = [program for part in parts for program in part["programs"] if program["ran"]]
    return {
        side: count_lines(listing for program in programs if program["side"] == side for listing in program["listings"])
        for side in FRAMEWORKS
    }


def count_lines(listings: Iterable[Json]) -> int:
    """Return the number of lines of code. A line that two listings share counts once."""
    lines = {
        (listing["file"], line)
        for listing in listings
        for line in code_lines(listing["file"]) & set(range(listing["first_line"], listing["last_line"] + 1))
    }
    return len(lines)


def read_listing(file: str, name: str, first: str = "", last: str = "") -> Json:
    """Return the code of a definition without its indentation, and its place.

    Args:
        file: its path from the root of the project.
        name: the name of the definition, or `Class.method`.
        first: the beginning of the first statement to show. Empty for the whole definition.
        last: the beginning of the last statement to show.

    Raises:
        LookupError: the file does not hold it.
    """
    definition: ast.AST = ast.parse(read_source(file))
    for part in name.split("."):
        definition = next((node for node in getattr(definition, "body", []) if defines(node, part)), ast.Module([], []))
    # The walk begins with the definition itself, which is the one that an empty text takes.
    statements = [node for node in ast.walk(definition) if isinstance(node, ast.stmt)]
    begin, end = (
        next((node for node in statements if ast.unparse(node).startswith(text)), None) for text in (first, last)
    )
    if begin is None or end is None:
        raise LookupError(f"{file} holds no {name} {first} {last}".rstrip())
    first_line = min(node.lineno for node in (begin, *getattr(begin, "decorator_list", [])))
    last_line = end.end_lineno or end.lineno
    code = read_source(file).splitlines()[first_line - 1 : last_line]
    return {
        "file": file,
        "name": name,
        "first_line": first_line,
        "last_line": last_line,
        "code": textwrap.dedent("\n".join(code)),
    }


def defines(statement: ast.stmt, name: str) -> bool:
    """Return whether a statement defines a function, a class or a variable of this name."""
    if isinstance(statement, ast.Assign):
        return any(isinstance(target, ast.Name) and target.id == name for target in statement.targets)
    return isinstance(statement, ast.FunctionDef | ast.ClassDef) and statement.name == name


@cache
def code_lines(file: str) -> frozenset[int]:
    """Return the numbers of the lines that hold code: not blank, not a comment, not a docstring."""
    ignored = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    tokens = tokenize.generate_tokens(io.StringIO(read_source(file)).readline)
    lines = {line for token in tokens if token.type not in ignored for line in range(token.start[0], token.end[0] + 1)}
    for node in ast.walk(ast.parse(read_source(file))):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines -= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return frozenset(lines)


@cache
def read_source(file: str) -> str:
    """Return the text of a file of this project."""
    return (ROOT / file).read_text(encoding="utf-8")

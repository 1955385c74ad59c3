"""Show what `examine` found out: what was compared, a table of the stages, sentences, pictures and report.json."""

import math
import platform
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from rich.box import SIMPLE
from rich.table import Table
from rich.text import Text
from torch import nn

from parity_tests.harness.capture import STAGE_BOUND, Case, Comparison, Difference, describe_cuts, has_problem
from parity_tests.harness.compare import Divergence
from parity_tests.harness.compare import shorten as join_names

if TYPE_CHECKING:  # a test that compares draws nothing, and `checks` imports this file
    from matplotlib.axes import Axes

    from parity_tests.harness.checks import Result

Json = dict[str, Any]

# Okabe & Ito's palette, which colour-blind readers can tell apart (Color Universal Design, 2008).
BLUE, VERMILION, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
BLACK = "#000000"

DRIFT_LINES = {  # each curve has a line style of its own too, for readers who cannot tell the colours apart
    "float64: JAX from PyTorch": (BLUE, "-"),
    "float32: JAX from PyTorch": (VERMILION, "-"),
    "float32: JAX from float64": (PURPLE, "--"),
    "float32: PyTorch from float64": (GREEN, "--"),
    "float32: JAX from itself, one ULP": (BLACK, ":"),
    "float32: PyTorch from itself, one ULP": (BLACK, "-."),
}

NOT_SEEN, SAME, SAME_LOCALLY = "not seen in JAX", "same", "same on PyTorch's values"
ALONE, GRADIENT_ALONE = "differs, but no output does", "gradient differs, but no weight's does"
GRADIENT_INHERITED, INHERITED = "gradient differs: inherited", "differs: inherited"
GRADIENT_BORN, BORN = "gradient differs: born in the next stage", "differs: born here"
WEIGHT_BORN = "gradient differs: born here"
SEVERITY = (
    NOT_SEEN,
    SAME,
    SAME_LOCALLY,
    ALONE,
    GRADIENT_ALONE,
    GRADIENT_INHERITED,
    INHERITED,
    WEIGHT_BORN,
    GRADIENT_BORN,
)
IN_TRAINING = ", in training mode"

SMALL = 12  # stages: a network with no more is listed without folding
MOST_OF_A_KIND, MOST_NOTES, NOTE_LETTERS = 20, 6, 160  # in the sentences
STAGE_LETTERS = 21  # in the table, so that it fits 80 columns
NUMBER = re.compile(r"[-+]?\b\d([\d.,]*\d)?(e[-+]\d+)?")  # in the sentences
FIGURES_AND_CAUSE = re.compile(r"bound: [^()]*\); ")  # a problem that says more than how large the error is
RUN = 3  # folded modules of one verdict in a row become one line
NAMED_STAGES, NAMED_FAULTS = 25, 6  # in the picture
FAULT_LETTERS, AXIS_LETTERS, LEVEL_LETTERS = 48, 18, 60  # of one name, of one name, and of all names side by side


# --- What was compared ---


def header(case: Case) -> dict[str, str]:
    """Return what was compared and how: versions, devices, dtypes, and all that a default chose."""
    pair, model = case.pair, case.model
    count = sum(parameter.numel() for parameter in case.module.parameters())
    title = getattr(pair.jax_model, "__name__", type(pair.jax_model).__name__)
    device = jax.devices()[0]
    device_name = (
        device.platform if device.platform == device.device_kind else f"{device.platform} ({device.device_kind})"
    )
    return {
        "PyTorch": f"{type(case.module).__name__}, {count:,} parameters",
        "JAX": f"{title} ({model.library})",
        "versions": ", ".join(f"{name} {version}" for name, version in versions().items()),
        "devices": f"JAX on {device_name}, PyTorch on cpu",
        "arithmetic": "float64 on both sides, matrix products at the highest precision; float32 in the check precision",
        "batches": " and ".join(map(str, case.sizes)) + (describe_cuts(case.cuts) if len(case.sizes) > 1 else ""),
        "modes": describe_modes(case),
        "weights": describe_weights(case),
        "inputs": describe_inputs(case),
        "loss": describe_loss(case),
        "optimizer": describe_optimizer(case),
    }


def versions() -> dict[str, str]:
    """Return the versions of Python and of all libraries that are loaded and matter."""
    names = ("jax", "flax", "equinox", "haiku", "optax", "torch", "numpy")
    loaded = {name: str(getattr(sys.modules[name], "__version__", "?")) for name in names if name in sys.modules}
    return {"Python": platform.python_version(), **loaded}


def describe_modes(case: Case) -> str:
    """Return the modes that are compared, and what becomes of dropout."""
    modes = "evaluation and training" if True in case.modes else "evaluation"
    dropouts = [
        child
        for child in case.module.modules()
        if isinstance(child, nn.modules.dropout._DropoutNd) or isinstance(vars(child).get("dropout"), float)
    ]
    count = f"{len(dropouts)} module{'s' if len(dropouts) > 1 else ''}"
    return f"{modes}; dropout always at rate 0 (in {count})" if dropouts else modes


def describe_weights(case: Case) -> str:
    """Return how the map of the weights came about."""
    count, given = len(case.weight_map.entries), case.pair.weights
    evidences = Counter("declared" if row.evidence == "declared" else "proposed" for row in case.proposal.rows)
    if callable(given):
        way = "read from the function that the pair gives"
    elif evidences:
        way = " and ".join(f"{number if number < count else 'all'} {way}" for way, number in evidences.items())
    else:
        way = "declared" if given else "proposed"
    return f"{len(case.weight_map.tensors)} tensors carried by {count} entries: {way}"


def describe_inputs(case: Case) -> str:
    """Return what both sides are given."""
    inputs = case.pair.draw_inputs(case.seed, case.sizes[0])
    for_torch, for_jax = (
        ", ".join(f"{array.dtype} {list(array.shape)}" for array in side.arrays())
        for side in (inputs, case.jax_inputs(inputs))
    )
    way = case.pair.jax_inputs
    chosen = "by default" if way is None else "by the pair's function" if callable(way) else "declared"
    return for_torch + (f"; for JAX, {chosen}, {for_jax}" if for_jax != for_torch else "; the same for JAX")


def describe_loss(case: Case) -> str:
    """Return which loss is compared and trained."""
    if case.pair.torch_loss is not None:
        return "declared"
    targets = case.pair.draw_targets(case.seed, case.sizes[0])
    if targets is None:
        return "default: half the mean square of all float outputs, because no targets are declared"
    is_float = np.issubdtype(np.asarray(targets).dtype, np.floating)
    return "default: mean square error" if is_float else "default: mean cross-entropy of the integer targets"


def describe_optimizer(case: Case) -> str:
    """Return what trains each side."""
    pair = case.pair
    given = {"PyTorch": pair.torch_optimizer is not None, "JAX": pair.jax_optimizer is not None}
    if all(given.values()):
        return "declared"
    default = " and ".join(side for side, declared in given.items() if not declared)
    return f"default for {default}: Adam with a learning rate of 0.001"


def show_header(entries: Mapping[str, str]) -> Table:
    """Return the header as a table of two columns for a terminal."""
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True, style="bold")
    table.add_column()
    for name, text in entries.items():
        table.add_row(name, Text(text))
    return table


# --- Stage by stage ---


class StageRow(NamedTuple):
    """One value of PyTorch's and how far JAX's is from it.

    Attributes:
        stage: PyTorch's name; for a weight the name of its tensor, for an output its place in the nest.
        jax: JAX's name; "" if it is not known.
        kind: the class of the module, "function", "output" or "weight"; "" if it is not known.
        shape: in PyTorch, with the batch; () if it is not known.
        local_error: of the value where everything before is PyTorch's, in units of the tensor's largest value.
        inherited_error: of the value where JAX runs from end to end.
        gradient_error: of the gradient by the value where everything after is PyTorch's.
        inherited_gradient_error: of the gradient where JAX runs from end to end.
        verdict: whether it differs, and where that is born.
        problem: what differs, with numbers; empty where nothing does.
    """

    stage: str
    jax: str = ""
    kind: str = ""
    shape: tuple[int, ...] = ()
    local_error: float | None = None
    inherited_error: float | None = None
    gradient_error: float | None = None
    inherited_gradient_error: float | None = None
    verdict: str = NOT_SEEN
    problem: str = ""

    @property
    def born(self) -> bool:
        """Return whether a difference is born in this stage."""
        return self.verdict.startswith((BORN, GRADIENT_BORN, WEIGHT_BORN))


ERRORS = ("local_error", "inherited_error", "gradient_error", "inherited_gradient_error")
FLOAT32_ERRORS = ("jax_float32_error", "torch_float32_error")  # from float64, in report.json alone


def stage_rows(comparison: Comparison) -> list[StageRow]:
    """Return a row for each of PyTorch's values, in the order of its run."""
    rows = []
    problems = {origin.place: origin.problem for origin in comparison.origins.values()}
    for name in filter(None, comparison.order):  # without the last one, which is the network's output
        if name in comparison.stages:
            row = stage_row(comparison, name)
        elif name in comparison.functions:
            row = function_row(comparison, name, name in comparison.born and bool(comparison.functions[name].problem))
        else:
            row = StageRow(name, verdict=BORN, problem=problems[name]) if name in problems else StageRow(name)
        if name in comparison.origins and name not in problems and row.born:
            row = row._replace(verdict=INHERITED)
        rows.append(row)
    return rows


def stage_row(comparison: Comparison, name: str) -> StageRow:
    """Return the row of one stage."""
    stage, local, inherited = comparison.stages[name], comparison.local, comparison.inherited
    differences = [part.get(name) for part in (local.values, inherited.values, local.gradients, inherited.gradients)]
    value, late_value, gradient, late_gradient = (part is not None and part.problem for part in differences)
    verdict = SAME
    if value or late_value:
        verdict = ALONE if not has_problem(inherited.outputs) else BORN if value else INHERITED
    elif gradient or late_gradient:
        born = GRADIENT_BORN if gradient else GRADIENT_INHERITED
        verdict = born if has_problem(inherited.weights) else GRADIENT_ALONE
    one, two, three, four = (None if part is None else part.error for part in differences)
    problem = first_problem(differences)
    return StageRow(name, stage.jax, stage.kind, stage.shape, one, two, three, four, verdict, problem)


def function_row(comparison: Comparison, name: str, born: bool) -> StageRow:
    """Return the row of a value between modules; only its local error is known."""
    value, differs = comparison.functions[name], has_problem(comparison.inherited.outputs)
    if not value.problem:
        verdict = SAME_LOCALLY if differs else SAME
    else:
        verdict = ALONE if not differs else BORN if born else INHERITED
    return StageRow(name, kind="function", local_error=value.error, verdict=verdict, problem=value.problem)


def first_problem(differences: Sequence[Difference | None]) -> str:
    """Return what differs first, or an empty string."""
    return next((part.problem for part in differences if part is not None and part.problem), "")


def output_rows(comparison: Comparison) -> list[StageRow]:
    """Return a row for each output of the network."""
    rows = []
    for name, inherited in comparison.inherited.outputs.items():
        local = comparison.local.outputs[name]
        born = local.problem and name not in comparison.origins  # else it is in an operation before
        verdict = SAME if not inherited.problem else BORN if born else INHERITED
        problem = first_problem([local, inherited])
        rows.append(StageRow(name, "", "output", (), local.error, inherited.error, verdict=verdict, problem=problem))
    return rows


def weight_rows(comparison: Comparison) -> list[StageRow]:
    """Return a row for the gradient by each weight.

    If the output of a layer is wrong, a wrong gradient by its weight counts as a consequence of that output.
    """
    rows = []
    wrong_outputs = has_problem(comparison.inherited.outputs)
    for name, inherited in comparison.inherited.weights.items():
        local, owner = comparison.local.weights[name], comparison.local.values.get(name.rpartition(".")[0])
        follows = wrong_outputs and (owner is None or bool(owner.problem))
        verdict = SAME if not inherited.problem else GRADIENT_INHERITED if follows or not local.problem else WEIGHT_BORN
        row = StageRow(name, kind="weight", verdict=verdict, problem=first_problem([local, inherited]))
        rows.append(row._replace(gradient_error=local.error, inherited_gradient_error=inherited.error))
    return rows


def merge(result: "Result", rows_of: Callable[[Comparison], list[StageRow]]) -> list[StageRow]:
    """Return one row for each value: the largest errors and the gravest verdict over all batches and modes."""
    rows: dict[str, list[tuple[bool, StageRow]]] = defaultdict(list)
    for comparison in result.comparisons:
        for row in rows_of(comparison):
            rows[row.stage].append((comparison.training, row))
    return [merge_one(of_stage) for of_stage in rows.values()]


def merge_one(rows: Sequence[tuple[bool, StageRow]]) -> StageRow:
    """Merge the rows of one value. The flag beside each row says whether the row is of training mode."""
    training, gravest = max(rows, key=lambda row: severity(row[1].verdict))
    in_evaluation = [severity(row.verdict) for is_training, row in rows if not is_training]
    only_there = training and severity(gravest.verdict) > max(in_evaluation, default=len(SEVERITY))
    errors: dict[str, Any] = {name: largest(getattr(row, name) for _, row in rows) for name in ERRORS}
    return gravest._replace(verdict=gravest.verdict + (IN_TRAINING if only_there else ""), **errors)


def largest(errors: Iterator[float | None]) -> float | None:
    """Return the largest error; NaN counts as the largest, None if there is no error."""
    known = [error for error in errors if error is not None]
    return max(known, key=lambda error: math.inf if math.isnan(error) else error, default=None)


def severity(verdict: str) -> int:
    """Return how grave a verdict is."""
    return SEVERITY.index(verdict) if verdict in SEVERITY else len(SEVERITY)


# --- The table ---


class Node:
    """A module of PyTorch's in the tree of the stages.

    Attributes:
        row: of its own output, if there is one.
        parts: what is in it, by name, in the order of the run.
    """

    def __init__(self) -> None:
        self.row: StageRow | None = None
        self.parts: dict[str, Node] = {}

    def rows(self) -> list[StageRow]:
        """Return all rows of the module and of what is in it."""
        own = [self.row] if self.row else []
        return own + [row for part in self.parts.values() for row in part.rows()]


class Line(NamedTuple):
    """One line of the table: a stage, or several that are folded together."""

    label: str
    depth: int
    rows: list[StageRow]

    @property
    def folds(self) -> bool:
        """Return whether all stages of the line have one verdict, and none of them is where a difference is born."""
        return len({row.verdict for row in self.rows}) == 1 and not self.rows[0].born


def tree(result: "Result", every: bool = False) -> Table:
    """Return the stages by module depth as a table of 80 columns.

    A module in which every stage has the same verdict is folded into one line, with its largest errors.

    Args:
        result: of `examine`.
        every: list all values, folding nothing, with those that JAX has no mate for.
    """
    stages = merge(result, stage_rows)
    listed = stages if every else choose(stages)
    table = Table(box=SIMPLE, padding=(0, 1, 0, 0), width=80, caption=caption(stages, listed), caption_justify="left")
    table.add_column("stage", no_wrap=True)
    for heading in ("local\nerror", "inherited\nerror", "gradient\nerror"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("verdict", ratio=1)
    for line in lines(plant_tree(listed), unfold=every or is_small(stages)):
        table.add_row(*cells(line))
    table.add_section()
    for line in summary(result):
        table.add_row(*cells(line))
    return table


def is_small(stages: Sequence[StageRow]) -> bool:
    """Return whether a network has so few stages that all of them are listed."""
    return sum(row.verdict != NOT_SEEN and row.kind != "function" for row in stages) <= SMALL


def choose(stages: Sequence[StageRow]) -> list[StageRow]:
    """Return the stages to show: in a large network no value between modules, unless a difference is born there."""
    small = is_small(stages)
    return [row for row in stages if row.verdict != NOT_SEEN and (small or row.kind != "function" or row.born)]


def caption(stages: Sequence[StageRow], listed: Sequence[StageRow]) -> str:
    """Return what the numbers of the table mean, and how many values are not in it."""
    text = f"Errors are divided by each tensor's largest value; allowed: {STAGE_BOUND.limit:.0e}."
    if len(listed) == len(stages):
        return text
    if not is_small(stages):
        text += " A number\nin parentheses counts stages that are folded into one line."
    unseen = sum(row.verdict == NOT_SEEN for row in stages)
    unlisted = {"that JAX has no mate for": unseen, "between modules": len(stages) - len(listed) - unseen}
    counts = " and ".join(f"{count} value{'s' * (count > 1)} {what}" for what, count in unlisted.items() if count)
    return f"{text}\nNot listed: {counts} (--all lists them)."


def plant_tree(rows: Sequence[StageRow]) -> Node:
    """Return the root of the tree of these stages."""
    root = Node()
    for row in rows:
        node = root
        for name in re.split(r"(?<!\])\.", row.stage):  # "lstm[1].h" is one name
            node = node.parts.setdefault(name, Node())
        node.row = row
    return root


def lines(node: Node, unfold: bool, depth: int = 0) -> Iterator[Line]:
    """Yield the lines of what is in a module: folded where all stages have the same verdict."""
    parts = [(Line(name, depth, part.rows()), part) for name, part in chains(node)]
    long = not unfold and (depth > 0 or len(parts) > SMALL)
    for folds, group in groupby(parts, key=lambda part: part[0].folds and part[0].rows[0].verdict):
        members = list(group)
        if folds and long and len(members) >= RUN:
            label = f"{members[0][0].label} … {members[-1][0].label}"
            yield Line(label, depth, [row for line, _ in members for row in line.rows])
            continue
        for line, part in members:
            if not part.parts or (line.folds and not unfold):
                yield line
            else:
                yield Line(line.label, depth, [part.row] if part.row else [])
                yield from lines(part, unfold, depth + 1)


def chains(node: Node) -> Iterator[tuple[str, Node]]:
    """Yield what is in a module; where it holds a single part and nothing else, both names are joined."""
    for name, part in node.parts.items():
        while part.row is None and len(part.parts) == 1:
            ((last, part),) = part.parts.items()
            name = f"{name}.{last}"
        yield name, part


def summary(result: "Result") -> Iterator[Line]:
    """Yield the lines of the network's outputs and of the gradients by its weights."""
    for row in merge(result, output_rows):
        yield Line(f"output {row.stage}".strip(), 0, [row])
    weights = merge(result, weight_rows)
    born = [row for row in weights if row.born]
    for row in born[:MOST_OF_A_KIND]:
        yield Line(row.stage, 0, [row])
    rest = sorted([*born[MOST_OF_A_KIND:], *(row for row in weights if not row.born)], key=lambda row: row.verdict)
    for _, group in groupby(rest, key=lambda row: row.verdict):
        members = list(group)
        yield Line(f"{len(members)} weights" if len(members) > 1 else members[0].stage, 0, members)


def cells(line: Line) -> tuple[Text, ...]:
    """Return the five cells of a line."""
    of_weights = bool(line.rows) and line.rows[0].kind == "weight"
    count = f" ({len(line.rows)})" if len(line.rows) > 1 and not of_weights else ""
    label = " " * line.depth + shorten(line.label, STAGE_LETTERS - line.depth - len(count))
    names = ("local_error", "inherited_gradient_error" if of_weights else "inherited_error", "gradient_error")
    errors = (format_error(largest(getattr(row, name) for row in line.rows)) for name in names)
    verdict = line.rows[0].verdict if line.rows else ""
    style = "bold red" if line.rows and line.rows[0].born else "" if verdict in (SAME, SAME_LOCALLY) else "yellow"
    return Text(label + count), *map(Text, errors), Text(verdict, style=style)


def format_error(error: float | None) -> str:
    """Return an error in few letters."""
    return "" if error is None else f"{error:.1e}" if error else "0"


def shorten(name: str, letters: int) -> str:
    """Return a name with its middle left out if it is too long."""
    if len(name) <= letters:
        return name
    front = max(1, letters // 3)
    return f"{name[:front]}…{name[front + 1 - letters :]}"


# --- The sentences ---


def sentences(result: "Result") -> str:
    """Return what differs, a line for each fault, then what passed, what was not checked, and the notes."""
    parts = [*describe_divergences(result)]
    if result.passed:
        parts.append(f"Passed: {', '.join(result.passed)}.")
    reasons: dict[str, list[str]] = defaultdict(list)
    for name, reason in result.not_checked.items():
        reasons[reason].append(name)
    parts += [f"Not checked: {', '.join(names)}: {reason}." for reason, names in reasons.items()]
    parts += [f"Note: {cut(note, NOTE_LETTERS)}" for note in result.notes[:MOST_NOTES]]
    if len(result.notes) > MOST_NOTES:
        parts.append(f"There are {len(result.notes) - MOST_NOTES} more notes in report.json.")
    return "\n".join(parts)


def describe_divergences(result: "Result") -> Iterator[str]:
    """Yield a title, and a line for each difference; those alike share one, and many of one check are counted."""
    divergences = result.divergences
    if not divergences:
        yield f"{result.pair}: no difference."
        return
    yield f"{result.pair} differs in {len(divergences)} place{'s' if len(divergences) > 1 else ''}:"
    for check, group in groupby(divergences, key=lambda divergence: divergence.check):
        kinds = list(alike(group))
        for first, *others in kinds[:MOST_OF_A_KIND]:
            more = f"; alike in {join_names([other.where for other in others])}" if others else ""
            yield f"  {first}{more}"
        if left := sum(map(len, kinds[MOST_OF_A_KIND:])):
            yield f"  {check}: and {left} more, which are in report.json"


def alike(divergences: Iterable[Divergence]) -> Iterator[list[Divergence]]:
    """Yield the differences of one check in groups: three or more that differ only in numbers are one group.

    The names of their layers differ only in numbers too. Where a cause is known, only the last parts of the names are
    compared. Every other difference is a group of its own.
    """
    kinds: dict[tuple[str, ...], list[Divergence]] = defaultdict(list)
    for divergence in divergences:
        if divergence.cause or re.search(FIGURES_AND_CAUSE, divergence.problem):
            key = divergence._replace(where=divergence.where.rpartition(".")[2])
        else:
            key = divergence
        kinds[tuple(re.sub(NUMBER, "#", text) for text in key)].append(divergence)
    for kind in kinds.values():
        yield from [kind] if len(kind) > 2 else ([divergence] for divergence in kind)


def cut(text: str, letters: int) -> str:
    """Return a text with its end left out if it is too long."""
    return text if len(text) <= letters else f"{text[: letters - 1].rstrip()}…"


# --- report.json ---


def to_json(result: "Result") -> Json:
    """Return everything that JSON can hold of a result. A number that is not finite becomes None."""
    return {
        "pair": result.pair,
        "seed": result.seed,
        "header": result.header,
        "divergences": [divergence._asdict() for divergence in result.divergences],
        "passed": list(result.passed),
        "not_checked": dict(result.not_checked),
        "weights": [row._asdict() if hasattr(row, "_asdict") else str(row) for row in result.weights],
        "bound": STAGE_BOUND.limit,
        "stages": [
            row_to_json(row) | dict(zip(FLOAT32_ERRORS, result.float32.get(row.stage, (None, None)), strict=True))
            for row in merge(result, stage_rows)
        ],
        "comparisons": [
            {
                "batch_size": comparison.size,
                "mode": "training" if comparison.training else "evaluation",
                "outputs": [row_to_json(row) for row in output_rows(comparison)],
                "weights": [row_to_json(row) for row in weight_rows(comparison)],
                "stages": [row_to_json(row) for row in stage_rows(comparison)],
            }
            for comparison in result.comparisons
        ],
        "notes": list(result.notes),
        "drift": {"steps": [], **result.drift},
    }


def row_to_json(row: StageRow) -> Json:
    """Return a row as JSON can hold it."""
    values = row._asdict() | {"shape": list(row.shape)}
    return values | {name: values[name] if is_finite(values[name]) else None for name in ERRORS}


def is_finite(error: float | None) -> bool:
    """Return whether there is a finite error."""
    return error is not None and math.isfinite(error)


# --- Pictures ---


def plot_errors(result: "Result", path: Path) -> None:
    """Draw the errors of all stages, from the first to the last, into a PNG."""
    from matplotlib.figure import Figure

    rows = choose(merge(result, stage_rows))
    known = [error for row in rows for name in ERRORS if is_finite(error := getattr(row, name)) and error]
    floor = 10.0 ** (math.floor(math.log10(min([STAGE_BOUND.limit * 1e-4, *known]))) - 1)
    ceiling = 10 * max([STAGE_BOUND.limit * 100, *known])
    figure = Figure(figsize=(9, 7), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    draw_side(upper, rows, ("local_error", "inherited_error"), (floor, ceiling))
    draw_side(lower, rows, ("gradient_error", "inherited_gradient_error"), (floor, ceiling))
    born = [(x, row.local_error, row.stage) for x, row in enumerate(rows) if row.verdict.startswith(BORN)]
    mark(upper, len(rows), ceiling, born)
    mark(lower, len(rows), ceiling, gradient_faults(rows, merge(result, weight_rows)))
    upper.set(ylabel="error of the value", title=f"{result.pair}: how far JAX is from PyTorch, in float64")
    lower.set(ylabel="error of the gradient by it", xlabel="stages in the order of PyTorch's run")
    label_stages(lower, [row.stage for row in rows])
    legend = {
        label: line for axes in (upper, lower) for line, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(legend.values(), legend.keys(), loc="outside lower center", ncols=2, fontsize="small")
    figure.savefig(path, dpi=150)


def draw_side(axes: "Axes", rows: Sequence[StageRow], names: tuple[str, str], limits: tuple[float, float]) -> None:
    """Draw local and inherited errors on these axes; exact zeros stand on the lowest line."""
    floor, ceiling = limits
    many = len(rows) > NAMED_STAGES
    looks = (
        ("local, on PyTorch's own values", BLUE, "-", "o", 3.0),
        ("inherited, JAX from end to end", VERMILION, "--", "s", 5.0),
    )
    for name, (label, colour, line, marker, size) in reversed([*zip(names, looks, strict=True)]):  # local on top
        points = [(x, error) for x, row in enumerate(rows) if (error := getattr(row, name)) is not None]
        heights = [error or floor if math.isfinite(error) else ceiling for _, error in points]
        style: Json = {"marker": marker, "markersize": size * (0.6 if many else 1), "linewidth": 0.8 if many else 1.5}
        axes.plot([x for x, _ in points], heights, line, color=colour, label=label, **style)
    axes.axhline(STAGE_BOUND.limit, color=BLACK, linestyle=":", linewidth=1.2, label="bound: rounding stays below")
    axes.set(yscale="log", ylim=(floor / 5, ceiling * 1000))
    powers = range(round(math.log10(floor)) + 3, round(math.log10(ceiling)) + 2, 3)
    axes.set_yticks([floor, *(10.0**power for power in powers)], ["exactly 0", *(f"1e{power}" for power in powers)])
    axes.minorticks_off()
    axes.grid(alpha=0.3)


def gradient_faults(rows: Sequence[StageRow], weights: Sequence[StageRow]) -> list[tuple[int, float | None, str]]:
    """Return place, error and name of the faults of the gradients, but for those that follow from a wrong value."""
    faults = []
    for x, row in enumerate(rows):
        after = next((n for n in range(x + 1, len(rows)) if rows[n].kind != "function"), len(rows) - 1)
        if row.verdict.startswith(GRADIENT_BORN) and not any(
            row.verdict.startswith(BORN) for row in rows[x : after + 1]
        ):
            faults.append((x, row.gradient_error, f"after {row.stage}"))
    owners = {row.stage: x for x, row in enumerate(rows)}
    of_weights = [row for row in weights if row.born and row.stage.rpartition(".")[0] in owners]
    return faults + [(owners[row.stage.rpartition(".")[0]], row.gradient_error, row.stage) for row in of_weights]


def mark(axes: "Axes", count: int, ceiling: float, faults: Sequence[tuple[int, float | None, str]]) -> None:
    """Mark where differences are born, with names for the first of them; NaN and infinity stand at the ceiling."""
    places = [(x, error if error is not None and math.isfinite(error) else ceiling) for x, error, _ in faults]
    style: Json = {"color": PURPLE, "markeredgecolor": BLACK, "markersize": 13, "linestyle": ""}
    if places:
        axes.plot(*zip(*places, strict=True), "*", label="a difference is born", **style)
    for number, (place, fault) in enumerate(zip(places[:NAMED_FAULTS], faults, strict=False)):
        left = place[0] > count / 2
        offset = (-8 if left else 8, 9 + 11 * (number % 2))
        name = shorten(fault[2], FAULT_LETTERS) + ("" if is_finite(fault[1]) else ", not finite")
        axes.annotate(name, place, offset, textcoords="offset points", ha="right" if left else "left")


def label_stages(axes: "Axes", stages: Sequence[str]) -> None:
    """Name the stages below the axis: all of a small network, the first of each module of a large one."""
    starts = {stage: x for x, stage in enumerate(stages)}
    depth = max((stage.count(".") for stage in stages), default=0)
    while len(starts) > NAMED_STAGES and depth:
        starts = {}
        for x, stage in enumerate(stages):
            starts.setdefault(".".join(stage.split(".")[:depth]), x)
        depth -= 1
    names: dict[int, str] = {}
    for stage, x in starts.items():
        if not names or x - max(names) >= len(stages) / NAMED_STAGES:
            names[x] = shorten(".".join(stage.split(".")[-2:]), AXIS_LETTERS)
    turned: Json = {"rotation": 60, "ha": "right", "rotation_mode": "anchor"}
    axes.set_xticks([*names], [*names.values()], **(turned if sum(map(len, names.values())) > LEVEL_LETTERS else {}))


def plot_drift(steps: Sequence[int], curves: Mapping[str, Sequence[float]], title: str, path: Path) -> None:
    """Draw how far weights are apart over the steps into a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5.6), layout="constrained")
    axes = figure.subplots()
    draw_drift(axes, steps, curves)
    if moved := [curves[name] for name in curves if name.endswith("one ULP")]:
        envelope, label = np.max(moved, axis=0), "inside the one-ULP envelope"
        axes.fill_between(steps, envelope, envelope.min() / 1e3, color=BLACK, alpha=0.06, label=label)
    axes.set(title=title)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2, fontsize="small")  # inside it would hide a curve
    figure.savefig(path, dpi=150)


def draw_drift(
    axes: "Axes",
    steps: Sequence[int],
    curves: Mapping[str, Sequence[float]],
    colours: Mapping[str, str] | None = None,
) -> None:
    """Draw how far weights are apart over the steps on these axes, which become logarithmic.

    Args:
        axes: where to draw.
        steps: the training steps after which weights were compared.
        curves: distances at these steps, under the names of `DRIFT_LINES`.
        colours: by the same names; those of `DRIFT_LINES` if None.
    """
    for name, distances in curves.items():
        colour, line = DRIFT_LINES[name]
        label = name.replace(", one ULP", ", moved by one ULP")
        axes.loglog(steps, distances, line, color=colours[name] if colours else colour, label=label)
    axes.set(xlabel="training steps", ylabel="distance of the weights (root mean square)")

"""Match what is seen inside the PyTorch module with what is seen inside the JAX model.

The map of weights says which layers are the same, and the user may declare names. What has no weights is matched by its
kind, its size and its matched neighbours, and a module that holds others by what it holds. Only the first two are sure.
A stage without a partner makes the comparison coarser; a wrong partner would make it wrong, so doubt means no partner.
How a value is laid out in each framework, and carried between the two, stands at the end.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, pairwise
from math import prod
from operator import mul
from typing import Any, NamedTuple

import numpy as np

from parity_tests.harness.compare import Refused

FUNCTION = "function"
Shape = tuple[int, ...]


class Stage(NamedTuple):
    """One value inside a model.

    Attributes:
        name: as in the capture.
        kind: the class name of the module, or "function".
        shape: the shape of the value.
        owner: the module that returned the value, or in which the function was called.
        label: the function, or "" for a module.
        call: the number of the call, from 1.
        place: the place in the nest that was returned: "", "[0]", ".hidden".
        steps: whether the steps of a scan are its first axis.
        batch_first: of a recurrent module of PyTorch's.
    """

    name: str
    kind: str
    shape: Shape
    owner: str
    label: str
    call: int
    place: str
    steps: bool = False
    batch_first: bool | None = None


class Match(NamedTuple):
    """The JAX stage that belongs to a PyTorch stage.

    Attributes:
        jax: its name.
        how: why the two belong together.
        sure: whether that rests on weights or on what the user declared.
    """

    jax: str
    how: str
    sure: bool


def torch_stages(kinds: Mapping[str, str], shapes: Mapping[str, Shape], modules: Collection[str]) -> dict[str, Stage]:
    """Return the stages of a `TorchCapture`, in order.

    Args:
        kinds: class name or "function", by name.
        shapes: the shape of each value, by name.
        modules: the names of all submodules (`module.named_modules()`). They tell `a.b`, a submodule, from the field
            `b` of what `a` returned.
    """
    names = sorted(modules, key=len, reverse=True)
    stages = {}
    for name, kind in kinds.items():
        if kind == FUNCTION:
            stages[name] = parse_function(name, shapes[name])
            continue
        owner = next((m for m in names if name.startswith(m) and re.match(r"#|\[|\.|$", name[len(m) :])), "")
        stages[name] = parse_module(name, kind, shapes[name], owner)
    return stages


def jax_stages(taps: Mapping[str, Any]) -> dict[str, Stage]:
    """Return the stages of a JAX trace, in order, from its taps (`name`, `shape`, `kind` and `steps` are read)."""
    stages = {}
    for name, tap in taps.items():
        if tap.kind == FUNCTION:
            stages[name] = parse_function(name, tuple(tap.shape))
        else:
            scope, slash, last = name.rpartition("/")
            owner = scope + slash + re.split(r"[#\[.]", last)[0]
            stage = parse_module(name, tap.kind, tuple(tap.shape), owner)
            stages[name] = stage._replace(steps=tap.steps is not None)
    return stages


def parse_module(name: str, kind: str, shape: Shape, owner: str) -> Stage:
    """Return the stage of a module's output."""
    call, place = split_call(name[len(owner) :])
    return Stage(name, kind, shape, owner, "", call, place)


def parse_function(name: str, shape: Shape) -> Stage:
    """Return the stage of a function's output: `scope.label#2[0]`."""
    scope, slash, last = name.rpartition("/")
    head, bracket, place = last.partition("[")
    owner, _, label = head.rpartition(".")
    label, _, number = label.partition("#")
    return Stage(name, FUNCTION, shape, scope + slash + owner, label, int(number or 1), bracket + place)


def split_call(suffix: str) -> tuple[int, str]:
    """Return the number of the call and the place in the nest: "#2[1]" -> 2, "[1]"."""
    numbered = re.match(r"#(\d+)", suffix)
    return (int(numbered[1]), suffix[numbered.end() :]) if numbered else (1, suffix)


# Kinds

SAME_KIND = (
    ("relu", "relu"),
    ("relu6", "relu6"),
    ("gelu", "gelu newgelu newgeluactivation geluactivation"),
    ("silu", "silu swish siluactivation"),
    ("sigmoid", "sigmoid"),
    ("tanh", "tanh"),
    ("softmax", "softmax"),
    ("log_softmax", "logsoftmax"),
    ("leaky_relu", "leakyrelu"),
    ("hard_sigmoid", "hardsigmoid"),
    ("hard_silu", "hardswish hardsilu"),
    ("max_pool", "maxpool reducewindow reducewindowmax"),  # Haiku calls reduce_window itself
    ("mean", "avgpool adaptiveavgpool mean"),
    ("dropout", "dropout"),
    ("drop_path", "droppath stochasticdepth"),
    ("matmul", "matmul bmm mm einsum dot tensordot dotgeneral"),
    ("attention", "scaleddotproductattention dotproductattention"),
    ("concatenate", "cat concat concatenate"),
)
KINDS = {name: kind for kind, names in SAME_KIND for name in names.split()}


def kind_of(stage: Stage) -> str:
    """Return the kind of operation, the same word on both sides: "relu" for ReLU, F.relu and jax.nn.relu."""
    word = (stage.label or stage.kind).removesuffix("()").replace("_", "").lower()
    word = re.sub(r"[123]d$", "", word)
    return KINDS.get(word, word)


# Matching


# Modules that end with the operation in which their weights take part.
LAYERS = r"(Linear|Conv\dd|ConvTranspose\dd|Norm(\dd)?|Embedding)$"


class Matcher:
    """The matches found so far. Each stage has one partner at most, and partners can be carried into each other."""

    def __init__(self, torch: Mapping[str, Stage], jax: Mapping[str, Stage], channels_last: bool):
        self.torch, self.jax, self.channels_last = torch, jax, channels_last
        self.matches: dict[str, Match] = {}
        self.back: dict[str, str] = {}

    def fit(self, torch: Stage, jax: Stage) -> bool:
        """Return whether two stages without partners may be the same value."""
        free = torch.name not in self.matches and jax.name not in self.back
        return free and carry_stage(torch, jax, self.channels_last) is not None

    def add(self, torch: Stage, jax: Stage, how: str, sure: bool = False) -> bool:
        """Match two stages, if they may be."""
        if not self.fit(torch, jax):
            return False
        self.matches[torch.name] = Match(jax.name, how, sure)
        self.back[jax.name] = torch.name
        return True

    def add_nests(self, torch: list[Stage], jax: list[Stage], how: str, sure: bool) -> None:
        """Match the parts of two nests: in order if all fit, otherwise each that fits one part alone."""
        if len(torch) == len(jax) and all(self.fit(a, b) for a, b in zip(torch, jax, strict=True)):
            pairs = list(zip(torch, jax, strict=True))
        else:
            fits = [(a, b) for a in torch for b in jax if self.fit(a, b)]
            uses = Counter(a.name for a, _ in fits)
            returns = Counter(b.name for _, b in fits)
            pairs = [(a, b) for a, b in fits if uses[a.name] == 1 and returns[b.name] == 1]
        for a, b in pairs:
            self.add(a, b, how, sure)

    def left(self) -> tuple[list[Stage], list[Stage]]:
        """Return the stages without a partner."""
        return (
            [stage for stage in self.torch.values() if stage.name not in self.matches],
            [stage for stage in self.jax.values() if stage.name not in self.back],
        )


def match(
    torch: Mapping[str, Stage],
    jax: Mapping[str, Stage],
    owners: Mapping[str, str],
    declared: Mapping[str, str] | None = None,
    channels_last: bool = True,
    holders: Mapping[str, Collection[str]] | None = None,
    meetings: Mapping[str, Any] | None = None,
) -> dict[str, Match]:
    """Return the JAX stage for each PyTorch stage that has one.

    Args:
        torch: PyTorch's stages in the order of the run.
        jax: JAX's stages in the order of its run.
        owners: PyTorch module -> path of the JAX module that holds the same weights.
        declared: PyTorch stage or pattern -> JAX stage or pattern: `layer{i}.{j}` -> `stages_{i}/blocks_{j}`.
        channels_last: images have their channels last in JAX.
        holders: PyTorch module -> paths of all JAX modules that hold its weights.
        meetings: JAX stage -> the tensors that meet another value there, and all that the stage is made of.

    Raises:
        Refused: a declared stage does not exist, or has another number of values.
    """
    matcher = Matcher(torch, jax, channels_last)
    match_declared(matcher, declared or {})
    match_outputs(matcher)
    match_owners(matcher, owners)
    match_recurrent(matcher, holders or {})
    match_meetings(matcher, meetings or {})
    match_names(matcher)
    bare = Bare(matcher, owners)
    bare.match_between()
    match_containers(matcher)
    match_in_scopes(matcher, owners, bare)
    bare.match_between()
    match_containers(matcher)
    return {name: matcher.matches[name] for name in torch if name in matcher.matches}


def match_declared(matcher: Matcher, declared: Mapping[str, str]) -> None:
    """Match what the user declared.

    Raises:
        Refused: a declared stage does not exist, or has another number of values.
    """
    for pattern, target in declared.items():
        has_stage = False
        for stage in matcher.torch.values():
            if (values := fields_of(pattern, stage.name)) is None:
                continue
            has_stage = True
            name = target.format(**values)
            if name not in matcher.jax:
                raise Refused(f"stages: {stage.name} -> {name}: JAX has no such stage")
            if not matcher.add(stage, matcher.jax[name], "declared", sure=True):
                shapes = f"{list(stage.shape)} and {list(matcher.jax[name].shape)}"
                raise Refused(f"stages: {stage.name} -> {name}: shapes {shapes} do not fit, or one is matched twice")
        if not has_stage:
            raise Refused(f"stages: {pattern}: PyTorch has no such stage")


def fields_of(pattern: str, name: str) -> dict[str, str] | None:
    """Return what the fields of a pattern stand for in a name, or None if it does not fit: `layer{i}` in `layer2`."""
    parts = re.split(r"\{(\w+)\}", pattern)
    expression, seen = "", set()
    for index, part in enumerate(parts):
        if index % 2 == 0:
            expression += re.escape(part)
        else:
            expression += f"(?P={part})" if part in seen else rf"(?P<{part}>[^./#\[\]]+)"
            seen.add(part)
    fitted = re.fullmatch(expression, name)
    return fitted.groupdict() if fitted else None


def match_outputs(matcher: Matcher) -> None:
    """Match the outputs of the two models, by their places or in their order."""
    torch, jax = ([s for s in side.values() if not s.owner and not s.label] for side in (matcher.torch, matcher.jax))
    for stage in torch:
        for other in jax:
            if stage.place == other.place:
                matcher.add(stage, other, "output", sure=True)
    matcher.add_nests(
        [stage for stage in torch if stage.name not in matcher.matches],
        [stage for stage in jax if stage.name not in matcher.back],
        "output",
        sure=False,
    )


def match_owners(matcher: Matcher, owners: Mapping[str, str]) -> None:
    """Match the outputs of modules that hold the same weights, call by call, if both are called equally often.

    Where JAX stacks layers, its one module is called for all of them, one after the other.
    """
    torch, jax = group_calls(matcher.torch.values()), group_calls(matcher.jax.values())
    layers: dict[str, list[list[Stage]]] = defaultdict(list)  # the calls of all modules that share one in JAX
    for owner, path in owners.items():
        calls, other_calls = torch.get(owner, {}), jax.get(path, {})
        if any(stages[0].kind in ("GRUCell", "RNNCell") for stages in calls.values()):  # JAX's return the state twice
            other_calls = {
                number: [stage for stage in stages if stage.place == output_place(stage, matcher.jax)]
                for number, stages in other_calls.items()
            }
        layers[path] += calls.values()
        if calls.keys() == other_calls.keys():
            for number, stages in calls.items():
                matcher.add_nests(stages, other_calls[number], "weights", sure=True)
    for path, called in layers.items():
        others = list(jax.get(path, {}).values())
        if len(others) == len(called) > 1:
            for stages, theirs in zip(called, others, strict=True):
                matcher.add_nests(stages, theirs, "weights", sure=True)


def match_meetings(matcher: Matcher, meetings: Mapping[str, Any]) -> None:
    """Match the output of a layer with the value in which the last of its weights meets what the others have made.

    A plain function has no modules, and a module may use weights of its own.
    """
    for owner, calls in group_calls(matcher.torch.values()).items():
        first, *more = calls[min(calls)]
        if more or not re.search(LAYERS, first.kind):
            continue
        is_own = re.compile(rf"{re.escape(owner)}\.(\w+|parametrizations\.\w+\.\w+)").fullmatch
        own = {place: set(filter(is_own, meeting.met)) for place, meeting in meetings.items()}
        whole = set[str]().union(*own.values())
        places = [place for place in matcher.jax if own.get(place) and whole <= meetings[place].tensors]
        places = [place for place in places if matcher.fit(first, matcher.jax[place])]
        if len(places) == len(calls):
            for stages, place in zip(calls.values(), places, strict=True):
                matcher.add(stages[0], matcher.jax[place], "weights", sure=True)


def match_recurrent(matcher: Matcher, holders: Mapping[str, Collection[str]]) -> None:
    """Match the sequence that a recurrent module returns: with a module around the cells, or with what a cell returns.

    JAX's libraries have cells, which a scan calls for each step, and some have a module around them.
    """
    order = list(matcher.jax.values())
    for stage in matcher.torch.values():
        paths = holders.get(stage.owner, ())
        inside = [n for n, other in enumerate(order) if any(is_part(other.owner, path) for path in paths)]
        if stage.kind not in ("RNN", "LSTM", "GRU") or stage.place != "[0]" or not inside:
            continue
        others = {path for owner, held in holders.items() if owner != stage.owner for path in held}
        after = order[inside[-1] + 1 :]
        end = next((n for n, other in enumerate(after) if not other.label and other.owner in others), len(after))
        around = [
            other
            for other in after[:end]
            if other.kind in ("RNN", "Bidirectional") or any(is_part(path, other.owner) for path in paths)
            if not other.label and not other.steps
        ]
        path = order[inside[-1]].owner
        cells = [other for other in order if other.steps and is_part(path, other.owner)]
        cells = [other for other in cells if other.place == output_place(other, matcher.jax)]
        for other in [*around, *cells]:
            if matcher.add(stage, other, "weights", sure=True):
                break


def is_part(path: str, other: str) -> bool:
    """Return whether a JAX module is another one or a part of it. The model itself does not count as the other one."""
    return bool(other) and f"{path}/".startswith(f"{other}/")


def output_place(cell: Stage, stages: Collection[str]) -> str:
    """Return the place of a cell's output among the values that it returns: after the state in Flax, else in front."""
    if cell.kind in ("Dense", "DenseGeneral", "Linear", FUNCTION):
        return "no cell"
    if f"{cell.owner}[0]" not in stages or re.search("(GRU|Simple|MGU)Cell", cell.kind):
        return "[1]" if f"{cell.owner}[1]" in stages else ""
    return "[0]"


def match_names(matcher: Matcher) -> None:
    """Match modules whose whole names are the same, call by call if both are called equally often.

    JAX leaves out a call of which only the derivative is used.
    """
    plain = {stage.name.replace("/~/", "/").replace("/", "."): stage for stage in matcher.jax.values()}
    torch, jax = group_calls(matcher.torch.values()), group_calls(matcher.jax.values())
    for stage in matcher.torch.values():
        other = plain.get(stage.name)
        if other is None or stage.label or other.label:
            continue
        if len(torch[stage.owner]) == len(jax[other.owner]):
            matcher.add(stage, other, "name")


def group_calls(stages: Iterable[Stage]) -> dict[str, dict[int, list[Stage]]]:
    """Return the outputs of modules by module and call."""
    groups: dict[str, dict[int, list[Stage]]] = defaultdict(lambda: defaultdict(list))
    for stage in stages:
        if not stage.label:
            groups[stage.owner][stage.call].append(stage)
    return groups


class Bare:
    """Matches what has no weights: functions, and modules without weights and parts, between matched neighbours."""

    def __init__(self, matcher: Matcher, owners: Mapping[str, str]):
        self.matcher = matcher
        self.torch = {s.name for s in find_parts(matcher.torch.values()) if s.label or s.owner not in owners}
        paths = set(owners.values())
        self.jax = {s.name for s in find_parts(matcher.jax.values()) if s.label or s.owner not in paths}

    def match_between(self) -> None:
        """Match until nothing is added: each match is a neighbour for the next."""
        before = -1
        while len(self.matcher.matches) > before:
            before = len(self.matcher.matches)
            for torch, jax in list(self.segments()):
                self.match_segment(torch, jax)

    def segments(self) -> Iterator[tuple[list[Stage], list[Stage]]]:
        """Yield what lies between matched stages on both sides.

        Two orders of the same branches are common. Then the two sides have no such pair of neighbours, and the stages
        before the same matched stage, or behind it, are taken if all of them agree.
        """
        matcher = self.matcher
        anchors = [name for name, matched in matcher.matches.items() if self.is_anchor(name, matched.jax)]
        position = {name: index for index, name in enumerate(matcher.torch)}
        anchors.sort(key=position.__getitem__)
        torch = split_at(list(matcher.torch.values()), anchors, self.torch)
        jax = split_at(list(matcher.jax.values()), [matcher.matches[name].jax for name in anchors], self.jax)
        order = [None, *anchors, None]
        partner = {None: None} | {name: matcher.matches[name].jax for name in anchors}
        for before, after in pairwise(order):
            inside = torch[before, after]
            if not inside:
                continue
            key = (partner[before], partner[after])
            if key in jax:
                yield inside, jax[key]
                continue
            for end in (1, 0):
                for around, other in jax.items():
                    if around[end] == key[end] and summary(inside) == summary(other):
                        yield inside, other

    def is_anchor(self, torch: str, jax: str) -> bool:
        """Return whether a match stands for one operation, so that order means something."""
        matcher = self.matcher
        return matcher.matches[torch].how in ("weights", "between") or (torch in self.torch and jax in self.jax)

    def match_segment(self, torch: list[Stage], jax: list[Stage]) -> None:
        """Match stages of the same kind, in order, where both sides have equally many."""
        for kind in {kind_of(stage) for stage in torch}:
            ours = [stage for stage in torch if kind_of(stage) == kind]
            theirs = [stage for stage in jax if kind_of(stage) == kind]
            if len(ours) == len(theirs) and all(self.matcher.fit(a, b) for a, b in zip(ours, theirs, strict=True)):
                for a, b in zip(ours, theirs, strict=True):
                    self.matcher.add(a, b, "between")


def find_parts(stages: Collection[Stage]) -> list[Stage]:
    """Return the functions, and the outputs of modules that hold no other module."""
    holders = {""}
    for owner in {stage.owner for stage in stages}:
        holders |= {owner[: mark.start()] for mark in re.finditer(r"[./]", owner)}
    return [stage for stage in stages if stage.label or stage.owner not in holders]


def split_at(
    stages: list[Stage], anchors: Collection[str], bare: Collection[str]
) -> dict[tuple[str | None, str | None], list[Stage]]:
    """Return the bare stages between neighbouring anchors. None stands for the beginning and the end."""
    segments: dict[tuple[str | None, str | None], list[Stage]] = {}
    before: str | None = None
    inside: list[Stage] = []
    kept = set(anchors)
    for stage in stages:
        if stage.name in kept:
            segments[before, stage.name] = inside
            before, inside = stage.name, []
        elif stage.name in bare:
            inside.append(stage)
    segments[before, None] = inside
    return segments


def summary(stages: list[Stage]) -> list[tuple[str, int]]:
    """Return the kinds and sizes of stages in order."""
    return [(kind_of(stage), size(stage.shape)) for stage in stages]


def size(shape: Shape) -> int:
    """Return the number of values."""
    number = 1
    for length in shape:
        number *= length
    return number


# Modules that hold others


# What hands its input on, or lays it out anew, changes no value.
IDENTITIES = {"dropout", "drop_path", "identity", "flatten", "reshape", "transpose", "swapaxes", "moveaxis", "getitem"}


class Container(NamedTuple):
    """One output of a module that holds others, and the last operation before it."""

    stage: Stage
    last: Stage


def match_containers(matcher: Matcher) -> None:
    """Match modules that hold the same matched stages, end with the same operation and return values of the same size.

    Several modules may do so, one around another. Their values are then the same on each side, so the innermost of both
    sides are matched first.
    """
    torch = group_containers(matcher.torch, ".", {name: name for name in matcher.matches})
    jax = group_containers(matcher.jax, "/", matcher.back)
    for inside, ours in torch.items():
        for a in ours:
            for b in jax.get(inside, []):
                partner = matcher.matches.get(a.last.name)
                if partner is None:
                    same_end = b.last.name not in matcher.back and kind_of(a.last) == kind_of(b.last)
                else:
                    same_end = partner.jax == b.last.name
                same_place = a.stage.place == b.stage.place or (alone(a, ours) and alone(b, jax[inside]))
                if same_end and same_place:
                    matcher.add(a.stage, b.stage, "holds the same")


def alone(container: Container, others: Iterable[Container]) -> bool:
    """Return whether a call of a module has one output."""
    key = (container.stage.owner, container.stage.call)
    return sum((other.stage.owner, other.stage.call) == key for other in others) == 1


def group_containers(
    stages: Mapping[str, Stage], separator: str, matched: Mapping[str, str]
) -> dict[frozenset[str], list[Container]]:
    """Return the outputs of modules that hold matched stages, by the PyTorch names of those, the innermost first."""
    order = list(stages.values())
    parts = {stage.name for stage in find_parts(order)}
    ends: dict[str, int] = {}  # where the previous call of a module ended
    groups: dict[frozenset[str], list[Container]] = defaultdict(list)
    for index, stage in enumerate(order):
        if stage.label or not stage.owner:
            continue
        below = [s for s in order[ends.get(stage.owner, 0) : index] if is_below(s, stage.owner, separator)]
        below = [s for s in below if s.name in parts]
        if index + 1 == len(order) or (order[index + 1].owner, order[index + 1].call) != (stage.owner, stage.call):
            ends[stage.owner] = index + 1
        inside = frozenset(matched[s.name] for s in below if s.name in matched)
        if inside:
            last = next((s for s in reversed(below) if kind_of(s) not in IDENTITIES), below[-1])
            groups[inside].append(Container(stage, last))
    return groups


def is_below(stage: Stage, owner: str, separator: str) -> bool:
    """Return whether a stage belongs to a part of a module, or to a function that the module calls."""
    return stage.owner.startswith(owner + separator) or (bool(stage.label) and stage.owner == owner)


def match_in_scopes(matcher: Matcher, owners: Mapping[str, str], bare: Bare) -> None:
    """Match functions of the same kind in matched modules, in order, where both sides have equally many.

    A module without weights and parts counts as a function of the module around it: nn.SiLU is one, as F.silu is.
    """
    scopes = {"": ""} | dict(owners)
    for name, matched in matcher.matches.items():
        if not matcher.torch[name].label and not matcher.jax[matched.jax].label:
            scopes.setdefault(matcher.torch[name].owner, matcher.jax[matched.jax].owner)
    torch, jax = matcher.left()
    ours = group_functions((stage for stage in torch if stage.name in bare.torch), ".")
    theirs = group_functions((stage for stage in jax if stage.name in bare.jax), "/")
    for (scope, kind), stages in ours.items():
        others = theirs.get((scopes.get(scope, ""), kind), []) if scope in scopes else []
        if len(stages) == len(others) and all(matcher.fit(a, b) for a, b in zip(stages, others, strict=True)):
            for a, b in zip(stages, others, strict=True):
                matcher.add(a, b, "same function in the same module")


def group_functions(stages: Iterable[Stage], separator: str) -> dict[tuple[str, str], list[Stage]]:
    """Return functions and modules without weights by the module that calls them and their kind."""
    groups: dict[tuple[str, str], list[Stage]] = defaultdict(list)
    for stage in stages:
        scope = stage.owner if stage.label else stage.owner.rpartition(separator)[0]
        groups[scope, kind_of(stage)].append(stage)
    return groups


# How one value is laid out in PyTorch and in JAX, and how it is carried between the two.


class Carry(NamedTuple):
    """One way to carry a value: its axes are moved, then merged or split.

    Attributes:
        how: the way in words.
        axes: PyTorch's axes in JAX's order.
        torch_shape: the shape in PyTorch.
        jax_shape: the shape in JAX.
        image: channels, rows and columns where PyTorch's last axis is a flattened image whose channels JAX has last.
    """

    how: str
    axes: tuple[int, ...]
    torch_shape: Shape
    jax_shape: Shape
    image: Shape = ()

    def to_jax(self, array: Any) -> Any:
        """Return PyTorch's array as JAX lays it out. Takes NumPy and JAX arrays."""
        return array.reshape(self.split()).transpose(self.axes).reshape(self.jax_shape)

    def to_torch(self, array: Any) -> Any:
        """Return JAX's array as PyTorch lays it out. Takes NumPy and JAX arrays."""
        moved = array.reshape([self.split()[axis] for axis in self.axes])
        return moved.transpose(np.argsort(self.axes).tolist()).reshape(self.torch_shape)

    def split(self) -> Shape:
        """Return PyTorch's shape, with the last axis split into the axes of the image if PyTorch flattened one."""
        return (*self.torch_shape[:-1], *self.image) if self.image else self.torch_shape


def candidates(
    torch_shape: Sequence[int], jax_shape: Sequence[int], channels_last: bool = True, image: Shape = ()
) -> list[Carry]:
    """Return the ways in which a value of one shape can be carried to another, the likeliest first.

    These are known: the axes as they are, channels last, channels first where JAX has images so, and the axes of heads
    and positions exchanged, each with neighbouring axes merged or split afterwards. A batch that is not first and the
    steps of a scan are not guessed.

    Args:
        torch_shape: PyTorch's shape, batch first.
        jax_shape: JAX's shape.
        channels_last: images have their channels last in JAX.
        image: channels, rows and columns of an image that PyTorch flattened, if its values may be in the last axis.
    """
    torch_shape, jax_shape = tuple(torch_shape), tuple(jax_shape)
    if prod(torch_shape) != prod(jax_shape):
        return []
    rank = len(torch_shape)
    same = ("as it is", tuple(range(rank)))
    ways = [same]
    if rank > 2:
        last = ("channels last", (0, *range(2, rank), 1))
        ways = [last, same] if channels_last and rank > 3 else [same, last]
    if rank > 3 and not channels_last:
        ways.append(("channels first", (0, rank - 1, *range(1, rank - 1))))
    if rank == 4:
        ways.append(("heads and positions exchanged", (0, 2, 1, 3)))
    by_axes: dict[tuple[int, ...], Carry] = {}
    for how, axes in ways:
        moved = tuple(torch_shape[axis] for axis in axes)
        if can_reshape(moved, jax_shape):
            # Axes of length 1 make no difference: of two ways that do the same, the first stays.
            key = tuple(axis for axis in axes if torch_shape[axis] > 1)
            reshaped = "" if moved == jax_shape else ", axes merged or split"
            by_axes.setdefault(key, Carry(how + reshaped, axes, torch_shape, jax_shape))
    carries = list(by_axes.values())
    if channels_last and image and torch_shape == jax_shape and prod(image) == torch_shape[-1]:
        lead = rank - 1
        axes = (*range(lead), *range(lead + 1, lead + len(image)), lead)
        carries.append(Carry("flattened with channels last", axes, torch_shape, jax_shape, tuple(image)))
    return carries


def can_reshape(one: Shape, other: Shape) -> bool:
    """Return whether one shape is the other with neighbouring axes merged."""
    if prod(one) == 0:
        return one == other
    ends = [set(accumulate(shape, mul)) | {1} for shape in (one, other)]
    return prod(one) == prod(other) and (ends[0] <= ends[1] or ends[1] <= ends[0])


def carry(torch_shape: Sequence[int], jax_shape: Sequence[int], channels_last: bool = True) -> Carry | None:
    """Return the likeliest way to bring a value of PyTorch's shape into JAX's shape, or None if there is none."""
    return next(iter(candidates(torch_shape, jax_shape, channels_last)), None)


def carry_stage(torch: Stage, jax: Stage, channels_last: bool) -> Carry | None:
    """Return the likeliest way to bring PyTorch's value of a stage into JAX's shape, or None if there is none.

    In JAX, the steps of a scan may be the first axis.
    """
    if jax.steps and len(jax.shape) > 2 and torch.shape == (jax.shape[1], jax.shape[0], *jax.shape[2:]):
        swapped = Carry("steps first", (1, 0, *range(2, len(jax.shape))), torch.shape, jax.shape)
        if torch.shape != jax.shape or torch.batch_first:
            return swapped
        if torch.batch_first is None:
            return None  # either axis may be the batch
    return carry(torch.shape, jax.shape, channels_last)

"""Propose the map of weights: what is sure is said with its evidence, and what is not is asked.

Evidence, in this order: what the user declared, equal values, equal names, the order of the calls with the kinds and
shapes of the layers (in a plain function the order in which its leaves are used), what is left with one place alone,
the pattern of other layers, and the outputs of both sides.
"""

import dataclasses
import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from parity_tests.harness.weights import (
    AS_IT_IS,
    PARAMETRIZED,
    PROJECTED,
    CannotCarry,
    Entry,
    Gaps,
    Layer,
    Rule,
    Shape,
    TorchSide,
    WeightMap,
    attention,
    cells_below,
    check_complete,
    complex_parts,
    conv,
    conv1d,
    conv_transpose,
    declare,
    expression,
    groups,
    gru,
    join,
    joined,
    linear,
    lstm,
    module_paths,
    parent,
    qkv,
    rnn,
    rule_for,
    rule_for_tensor,
    same,
    same_names,
    size_of,
    stacked,
    torch_side,
)

Judge = Callable[[WeightMap], float]

SYNONYMS = {
    **dict.fromkeys(("convolution", "conv2d", "conv1d"), "conv"),
    **dict.fromkeys(("bn", "ln", "batchnorm", "layernorm", "groupnorm", "rmsnorm"), "norm"),
    **dict.fromkeys(("dense", "linear", "logits", "head", "classifier"), "fc"),
    **dict.fromkeys(("downsample", "shortcut", "proj"), "down"),
    **dict.fromkeys(("h", "layer", "layers", "blocks", "stage", "stages"), "block"),
    **dict.fromkeys(("att", "attention"), "attn"),
    **dict.fromkeys(("backward", "reversed", "bwd", "bw"), "reverse"),
    **dict.fromkeys(("feed", "ff", "ffn"), "mlp"),
    **{"src": "source", "dst": "target"},
    **dict.fromkeys(("query", "wq"), "q"),
    **dict.fromkeys(("key", "wk"), "k"),
    **dict.fromkeys(("value", "wv"), "v"),
    **dict.fromkeys(("kernel", "weight", "scale", "embedding", "gamma"), "w"),
    **dict.fromkeys(("bias", "offset", "beta"), "b"),
}
LAYERS_WITH_A_LAYOUT = {"Linear", "Dense", "DenseGeneral", "LinearGeneral", "Conv", "ConvTranspose", "Einsum"}
ORDERS = (("ifgo", "igfo", "ifog"), ("rzn", "zrn", "-zrn"))  # of the gates of LSTMs and GRUs, as libraries pack them
OTHER_LETTERS = {4: {"c": "g"}, 3: {"u": "z", "h": "n"}}  # of gates, by how many a cell has
OF_STATE = {
    "ih": "hh",
    "ii": "hh",
    "xh": "hh",
    "i2h": "h2h",
    "x2h": "h2h",
    "wx": "wh",
    "input": "hidden",
    "x": "h",
    "i": "h",
}
IMAGINARY = {"re": "im", "real": "imag", "r": "i"}  # words for the two parts of a complex leaf
MOST_LEAVES = 4  # of a cell whose gates are packed: two weights and two biases
CLOSE = 10.0  # one map must be this many times nearer than another to be preferred
MOST_ORDERED = 4  # layers of which every order is tried; of more, two neighbours are exchanged
MOST_QUESTIONS = 32  # more maps than that are not tried each: one question after the other
ROUNDING = 1e-6  # distances of outputs below this are all the same: rounding


class Row(NamedTuple):
    """A row of the table: tensors and leaves with their shapes, the rule between them, and the evidence."""

    torch: str
    torch_shape: str
    jax: str
    jax_shape: str
    rule: str
    evidence: str


class Proposal(NamedTuple):
    """A map and what speaks for it.

    Attributes:
        map: of what could be matched; where two fit, it holds the first.
        rows: the table, one row for each entry.
        ambiguous: what two maps fit equally well, one line each. The user has to say.
        python: a mapping to paste as `weights=`, which gives the same map again.
        gaps: what the map leaves out.
        assumed: what names and order say where no map makes the outputs agree, one line each.
    """

    map: WeightMap
    rows: tuple[Row, ...]
    ambiguous: tuple[str, ...]
    python: str
    gaps: Gaps
    assumed: tuple[str, ...] = ()


class Unit(NamedTuple):
    """A module of PyTorch, a cell of a recurrent one, a tensor, or layers that JAX stacks: it is carried as one.

    Attributes:
        name: in PyTorch; with `{i}` for the numbers of layers that JAX stacks.
        layers: one, or those that JAX stacks.
        make: makes the rule, from the path in JAX.
        position: its place in the order of the calls.
        scope: the number of the declared module that it is in, -1 for none.
        inside: its name inside of that module.
        tied: all its tensors are carried elsewhere too.
        title: the words of its name, to be compared with those of places.
        flatten: what a flatten before it may have had: channels, rows, columns.
    """

    name: str
    layers: tuple[Layer, ...]
    make: Callable[..., Rule]
    position: float
    scope: int
    inside: str
    tied: bool = False
    title: tuple[str, ...] = ()
    flatten: Shape | None = None


class Place(NamedTuple):
    """A place in JAX where a unit may go.

    Attributes:
        path: of the module or the leaf.
        leaves: the shapes of its leaves, by path.
        position: its place in the order of the calls.
        kind: the class of the module, "own Linear" if it is no library's; "" if it is not known.
        scope: the number of the declared module that it is in, -1 for none.
        inside: its name inside of that module.
        title: the words of its name, to be compared with those of units.
    """

    path: str
    leaves: Mapping[str, Shape]
    position: float
    kind: str
    scope: int
    inside: str
    title: tuple[str, ...] = ()

    @property
    def targets(self) -> tuple[str, ...]:
        """Return what a rule leads to: the module or the leaf, or the leaves of a cell that no module holds."""
        held = all(leaf == self.path or not self.path or leaf.startswith(f"{self.path}/") for leaf in self.leaves)
        return (self.path,) if held else tuple(self.leaves)


class Option(NamedTuple):
    """One way to carry a unit to a place."""

    rule: Rule
    entries: tuple[Entry, ...]


class Match(NamedTuple):
    """Units and places that belong together, the ways to carry the ones to the others, and the evidence.

    Attributes:
        units: one, or several that JAX joins.
        places: one, or several into which JAX splits it.
        options: ways that fit; the first is taken unless the values say otherwise.
        evidence: why these belong together.
    """

    units: tuple[Unit, ...]
    places: tuple[Place, ...]
    options: tuple[Option, ...]
    evidence: str


def propose(
    module: Any,
    leaves: Mapping[str, Any],
    declared: Mapping[str, str | Rule] | None = None,
    torch_order: Sequence[tuple[str, str]] = (),
    jax_order: Sequence[tuple[str, str]] = (),
    judge: Judge | None = None,
    flattened: Mapping[str, Shape] | None = None,
    channels_last: bool | None = None,
) -> Proposal:
    """Propose the map of weights from PyTorch to JAX.

    Args:
        module: the PyTorch module.
        leaves: JAX's leaves by path: shapes, or arrays. Where arrays hold carried values, these are evidence.
        declared: what the user says already; it is taken as it is.
        torch_order: names and classes of PyTorch's modules, in the order of the calls, and of tensors, without a class,
            in the order of their use.
        jax_order: paths and classes of JAX's modules, in the order of the calls; of a plain function the leaves and
            what holds them, without a class, in the order of their use.
        judge: runs both sides with a map and returns the distance of their outputs. It is asked where two maps fit.
        flattened: shapes of the images that modules may have been called with flattened. None: any may have been.
        channels_last: whether JAX flattens images with their channels last; None if that is not sure.

    Raises:
        CannotCarry: what the user declared does not fit.
    """
    used = first_places(jax_order)
    shapes = {path: tuple(leaves[path].shape) for path in sorted(leaves, key=lambda path: used.get(path, math.inf))}
    side, given = torch_side(module), declare(declared or {}, module, leaves)
    scopes = declared_modules(declared or {}, side)
    all_units = list_units(side, torch_order, scopes, dataclasses.replace(given, entries=()))
    flattens = flatten_sizes(all_units, flattened or {})
    if flattened is not None:
        for name in {name for name, _ in torch_order} - set(flattened):
            flattens.pop(name, None)
    units = [
        unit._replace(flatten=flattens.get(unit.layers[0].name))
        for unit in list_units(side, torch_order, scopes, given)
    ]
    places = list_places(shapes, jax_order, scopes, given, units)
    units = stack_units(units, places)
    values = Values.read(module, leaves)
    matches = match(units, places, values, bool(jax_order))
    rest = left_over(side, shapes, matches, given, scopes, first_places(torch_order))
    rest = stack_units(*rest), rest[1]
    matches = settle_layouts([*matches, *match(*rest, values, ordered=not used.keys().isdisjoint(shapes))], given)
    choices = open_choices([*units, *rest[0]], [*places, *rest[1]], matches)
    matches, ambiguous, assumed = decide(
        matches, choices, lambda chosen: assemble(given, chosen, side), judge, channels_last
    )
    result = assemble(given, matches, side)
    gaps = check_complete(result, list(side.shapes), list(shapes))
    python = write_python(declared or {}, matches)
    return Proposal(result, table(result, given, matches), ambiguous, python, gaps, assumed)


# What there is to match


def first_places(order: Sequence[tuple[str, str]]) -> dict[str, int]:
    """Return where each name first stands in an order of calls."""
    return {name: number for number, (name, _) in reversed([*enumerate(order)])}


def declared_modules(declared: Mapping[str, str | Rule], side: TorchSide) -> list[tuple[str, str]]:
    """Return the modules that the user put beside each other, the inner ones first: what is inside stays inside."""
    pairs = [
        (name, to[0])
        for key, value in declared.items()
        if isinstance(value, str)
        for stack, places in groups(key, (value,), side)
        for name, to in places
        if not stack and name in side.modules
    ]
    return sorted(pairs, key=lambda pair: -len(pair[0]))


def scope_of(name: str, fronts: Sequence[str], separator: str) -> tuple[int, str]:
    """Return the number of the innermost of these modules that a name is in (-1 for none), and its name inside."""
    around = [
        n for n, front in enumerate(fronts) if not front or f"{name}{separator}".startswith(f"{front}{separator}")
    ]
    scope = max(around, key=lambda number: len(fronts[number]), default=-1)
    return scope, name if scope < 0 else name[len(fronts[scope]) :].lstrip(separator)


def list_units(
    side: TorchSide,
    order: Sequence[tuple[str, str]],
    scopes: Sequence[tuple[str, str]],
    given: WeightMap,
) -> list[Unit]:
    """List what is to be carried, in the order of the calls; what is not called comes behind its neighbour."""
    carried = {name for entry in given.entries for name in entry.torch} | given.unused
    called = first_places(order)
    units: list[Unit] = []
    position = -1.0
    for owner in dict.fromkeys(side.owner(tensor) for tensor in side.alias):
        tensors = side.tensors_of(owner)
        full = {local: join(owner, ".", local) for local in tensors}
        tied = all(side.alias[name] != name or name in carried for name in full.values())
        tensors = {local: shape for local, shape in tensors.items() if tied or full[local] not in carried}
        if not tensors or (tied and all(side.alias[name] == name for name in full.values())):
            continue
        position = called.get(owner, position + 1e-3)
        module = side.modules[owner]
        suffixes = [name.removeprefix("weight_ih") for name in tensors if name.startswith("weight_ih")]
        for number, suffix in enumerate(suffixes or [""]):
            own = {name: shape for name, shape in tensors.items() if not suffix or name.endswith(suffix)}
            own = {name: shape for name, shape in own.items() if not name.startswith(PROJECTED)}
            layer = Layer(owner, own, (), {}, module).with_weight()
            name = owner if len(suffixes) < 2 else f"{owner}{CELL}{suffix[1:]}"
            scope = scope_of(name, [front for front, _ in scopes], ".")
            units.append(Unit(name, (layer,), rule_for(module), position + number * 1e-4, *scope, tied))
    return sorted(units, key=lambda unit: unit.position)


CELL = "#"  # between a recurrent module and the name of its layer


def list_places(
    leaves: Mapping[str, Shape],
    order: Sequence[tuple[str, str]],
    scopes: Sequence[tuple[str, str]],
    given: WeightMap,
    units: Sequence[Unit],
) -> list[Place]:
    """List the modules of JAX that hold leaves, in the order of the calls; cells and attention are one place each."""
    filled = {path for entry in given.entries for path in entry.jax}
    free = {path: shape for path, shape in leaves.items() if path not in filled}
    called = {path: (number, kind) for number, (path, kind) in reversed([*enumerate(order)])}
    fronts = [path for _, path in scopes]
    places: list[Place] = []

    def add(path: str, own: Mapping[str, Shape]) -> None:
        seen_as = re.sub("(^|/)__layer_stack[^/]*/", r"\1", path)  # the name of a module in Haiku's layer_stack
        last = (len(order) + len(places), "")
        number, kind = called.get(path) or called.get(seen_as) or called.get(next(iter(own)), last)
        places.append(Place(path, own, number, kind, *scope_of(path, fronts, "/")))

    for path, own in compound_places(free, units):
        add(path, own)
        free = {leaf: shape for leaf, shape in free.items() if leaf not in own}
    apart: dict[str, dict[str, Shape]] = {}
    for leaf, shape in sorted(free.items(), key=lambda item: natural(item[0])):
        apart.setdefault(re.sub("/~/(mean|var)_ema$", "", parent(leaf)), {})[leaf] = shape
    for path, own in apart.items():
        add(path, own)
    return sorted(places, key=lambda place: (place.position, natural(place.path)))


def compound_places(free: Mapping[str, Shape], units: Sequence[Unit]) -> Iterator[tuple[str, dict[str, Shape]]]:
    """Yield the cells and attentions that a recurrent module or an attention of PyTorch fits into."""
    stacks = [stack for families in families_of(units) for family, stack in families if stack and len(family) > 1]
    compound = [unit for unit in (*units, *stacks) if unit.make in (lstm, gru, rnn, attention)]
    has_cell = False
    paths = [path for path in module_paths(free) if any(unit.make is attention for unit in compound)]
    paths += cells_below(Layer("", {}, ("",), free)) if compound else []
    for path in paths:
        below = {leaf: shape for leaf, shape in free.items() if leaf.startswith(join(path, "/", "") if path else "")}
        for unit in compound:
            entries = carry(unit, unit.make(), below, (path,))
            own = {leaf: below[leaf] for entry in entries for leaf in entry.jax}
            whole = {layer.tensor(local) for layer in unit.layers for local in layer.tensors}
            if {name for entry in entries for name in entry.torch} == whole:
                has_cell = has_cell or unit.make is not attention
                yield path, own
                break
    left = dict(free)
    cells = [unit for unit in units if unit.make in (lstm, gru) and not has_cell]
    for own in (two_layers(unit, left) or loose_cell(unit, left) or gates_apart(unit, left) for unit in cells):
        left = {leaf: shape for leaf, shape in left.items() if leaf not in own}
        if own:
            yield ", ".join(own), own


def two_layers(unit: Unit, free: Mapping[str, Shape]) -> dict[str, Shape]:
    """Return the leaves of a cell that is two linear layers, one of the input and one of the state, by their names."""
    shapes = [shape for local, shape in unit.layers[0].tensors.items() if local.startswith(("weight_ih", "weight_hh"))]
    modules: dict[str, list[str]] = {}
    for leaf in free:
        modules.setdefault(parent(leaf), []).append(leaf)
    for path, (word, other) in itertools.product(modules, OF_STATE.items()):
        front, _, last = path.rpartition("/")
        state = join(front, "/", re.sub(f"(?<![a-z]){word}(?![a-z])", other, last, flags=re.IGNORECASE))
        both = [modules[path], modules.get(state, []) if state != path else []]
        weights = [[leaf for leaf in own if free[leaf] in (w, w[::-1])] for own, w in zip(both, shapes, strict=True)]
        if all(len(leaves) == 1 for leaves in weights):
            biases = [leaf for own in both for leaf in own if free[leaf] == shapes[0][:1]]
            return {leaf: free[leaf] for leaf in (*weights[0], *weights[1], *biases)}
    return {}


def loose_cell(unit: Unit, free: Mapping[str, Shape]) -> dict[str, Shape]:
    """Return the leaves that may be a cell under names of the port's own, by their shapes and the order of use."""
    shapes = [shape for local, shape in unit.layers[0].tensors.items() if local.startswith(("weight_ih", "weight_hh"))]
    leaves: dict[str, Shape] = {}
    for gates, features in shapes:
        fitting = [
            path
            for path, shape in free.items()
            if path not in leaves and shape in ((features, gates), (gates, features))
            if {parent(path)} >= {parent(other) for other in leaves}
        ]
        if not fitting:
            return {}
        leaves[fitting[0]] = free[fitting[0]]
    near = [path for path in free if parent(path) == parent(next(iter(leaves)))]
    gates, hidden = shapes[1]
    biases = {(gates,), (2, gates), (hidden,)} if unit.make is gru else {(gates,), (2, gates)}
    for path in near[min(map(near.index, leaves)) if len(near) > MOST_LEAVES else 0 :]:
        if path not in leaves and free[path] in biases and len(leaves) < MOST_LEAVES:
            leaves[path] = free[path]
        elif path not in leaves and len(near) > MOST_LEAVES:
            break
    return leaves


def gates_apart(unit: Unit, free: Mapping[str, Shape]) -> dict[str, Shape]:
    """Return the leaves that may be a cell with a leaf for each gate, named by its letter: W_xi, W_hi and b_i."""
    gates = "rzn" if unit.make is gru else "ifgo"
    tensors = unit.layers[0].tensors.items()
    (rows, inputs), (_, state) = (shape for name, shape in tensors if name.startswith(("weight_ih", "weight_hh")))
    hidden = rows // len(gates)
    families: dict[str, dict[str, str]] = {}
    for path in free:
        families.setdefault(path[:-1], {})[OTHER_LETTERS[len(gates)].get(path[-1].lower(), path[-1].lower())] = path
    whole = [[family[gate] for gate in gates] for family in families.values() if {*gates} <= {*family}]
    paths: list[str] = []
    for shape in ((inputs, hidden), (state, hidden), (hidden,), (hidden,)):
        fitting = (family for family in whole if family[0] not in paths and {free[path] for path in family} == {shape})
        paths += next(fitting, [])
    return {path: free[path] for path in paths} if len(paths) >= 2 * len(gates) else {}


def natural(path: str) -> list[tuple[int, str]]:
    """Return a key that sorts Conv_2 before Conv_10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split("([0-9]+)", path)]


def stack_units(units: list[Unit], places: Sequence[Place]) -> list[Unit]:
    """Put layers that JAX stacks in one leaf into one unit: `layers.0.fc` and `layers.1.fc` into `layers.{i}.fc`.

    The number may be a part of a name: `critic0.fc` and `critic1.fc` are `critic{i}.fc`.
    """
    result = list(units)
    for families in families_of(units):
        stacks: dict[str, Unit] = {}  # by the name of the first layer
        members: set[str] = set()
        apart, longest = 0, max(len(family) for family, _ in families)
        for family, stack in families:  # what only some of the layers have stands apart
            if len(family) == longest and stack:
                stacks[family[0].name] = stack
                members |= {unit.name for unit in family}
                apart += sum(bool(options(family[0], place)) for place in places) >= len(family)
        fitting = sum(any(options(unit, place) for place in places) for unit in stacks.values())
        if fitting > apart and fitting * 2 > len(stacks):
            result = [stacks.get(unit.name, unit) for unit in result if unit.name in stacks or unit.name not in members]
    return result


def families_of(units: Sequence[Unit]) -> list[list[tuple[list[Unit], Unit | None]]]:
    """Return, for each start of a name, the layers whose names differ only in the number after it.

    Beside them comes the unit that they form together, or None if their shapes differ.
    """
    lists: dict[str, dict[str, list[Unit]]] = {}  # front -> back -> the layers
    for unit in units:
        for digits in re.finditer(r"(?<![0-9])[0-9]+(?![^.])", unit.name):
            lists.setdefault(unit.name[: digits.start()], {}).setdefault(unit.name[digits.end() :], []).append(unit)

    def as_one(front: str, back: str, family: list[Unit]) -> Unit | None:
        if len({tuple(unit.layers[0].tensors.items()) for unit in family}) > 1:
            return None
        layers = tuple(unit.layers[0] for unit in family)
        inside = f"{family[0].inside.removesuffix(back)}{{i}}{back}"
        return family[0]._replace(name=f"{front}{{i}}{back}", layers=layers, inside=inside)

    return [
        [(family, as_one(front, back, family)) for back, family in families.items()]
        for front, families in lists.items()
    ]


# How a unit fits a place


def carry(unit: Unit, rule: Rule, leaves: Mapping[str, Shape], paths: tuple[str, ...]) -> tuple[Entry, ...]:
    """Return the entries of a unit by this rule at these paths; none if it does not fit."""
    layers = len(unit.layers)
    stack = "{" in unit.name
    seen = {path: shape[1:] for path, shape in leaves.items() if shape[:1] == (layers,)} if stack else leaves
    try:
        layer_entries = [rule.carry(layer._replace(paths=paths, leaves=seen)) for layer in unit.layers]
    except CannotCarry:
        return ()
    return tuple(stacked(entries) if stack else entries[0] for entries in zip(*layer_entries, strict=True))


def options(unit: Unit, place: Place) -> tuple[Option, ...]:
    """Return the ways to carry a unit to a place, the usual one first; none if it does not fit."""
    shape = next(iter(unit.layers[0].tensors.values()))
    size = math.prod(shape) * len(unit.layers)
    compound = unit.make in (lstm, gru, rnn, attention, complex_parts)
    if not compound and not any(math.prod(leaf) == size for leaf in place.leaves.values()):
        return ()
    if len(place.targets) > 1 and unit.make not in (lstm, gru, complex_parts):
        return ()
    rules = [unit.make(*place.targets), *other_rules(unit, place, shape)]
    ways: list[Option] = []
    for rule in rules:
        entries = carry(unit, rule, place.leaves, rule.to)
        used = [leaf for entry in entries for leaf in entry.jax]
        first = {layer.tensor(next(iter(layer.tensors))) for layer in unit.layers}
        covered = any(first <= set(entry.torch) for entry in entries) and 2 * len(used) > len(place.leaves)
        if covered and not any(equal(entries, other.entries, unit) for other in ways):
            ways.append(Option(rule, entries))
    return tuple(ways)


def is_whole(unit: Unit, option: Option) -> bool:
    """Return whether all tensors of a unit are carried: a norm's bias has no place where a single factor stands."""
    own = {layer.tensor(name) for layer in unit.layers for name in layer.tensors}
    leaves = [leaf for entry in option.entries for leaf in entry.jax]
    return own <= {name for entry in option.entries for name in entry.torch} and len({*leaves}) == len(leaves)


def other_rules(unit: Unit, place: Place, shape: Shape) -> list[Rule]:
    """Return the rules that may hold instead of the usual one, where neither shape nor name of a leaf decides."""
    known = place.kind in LAYERS_WITH_A_LAYOUT  # a layer of a library
    stacks = (leaf for leaf in place.leaves.values() if len(leaf) > 2)
    square = len(shape) == 2 and (shape[0] == shape[1] or any(leaf[1] == leaf[-1] == shape[1] for leaf in stacks))
    rules: list[Rule] = []
    if unit.make is linear and unit.flatten:
        rules.append(linear(place.path, flatten=unit.flatten))
    if unit.make in (linear, conv1d) and square and not known:
        rules += [unit.make(place.path, transposed=turned) for turned in (True, False)]
    if unit.make is attention:
        rules += [attention(place.path, transposed=turned) for turned in layouts_of([place])[1:]]
    if unit.make is same and any(len(size) == 2 and size[0] == size[1] for size in unit.layers[0].tensors.values()):
        rules.append(same(place.path, transposed=True))
    if unit.make is same and len(shape) > 2:  # the kernel of a user's own convolution
        rules.append(conv(place.path))
    if unit.make is conv_transpose and (not place.kind or shape[0] == shape[1]):
        rules += [conv_transpose(place.path, flipped=flipped) for flipped in (True, False)]
    if unit.make is conv_transpose and not place.kind and len(shape) > 1 and shape[0] == shape[1]:
        both = itertools.product((True, False), repeat=2)
        rules += [conv_transpose(place.path, flipped=flipped, transposed=turned) for flipped, turned in both]
    if unit.make in (lstm, gru) and not place.kind:  # a function may pack the gates as it likes
        first, *others = place.targets
        alike = 0 < len(others) < MOST_LEAVES and place.leaves[first] == place.leaves[others[0]]  # by input and state
        ways = [place.targets, (others[0], first, *others[1:])] if alike else [place.targets]
        rules += [unit.make(*to, order=order) for to in ways for order in (None, *ORDERS[unit.make is gru])]
    return rules


def layouts_of(places: Sequence[Place]) -> tuple[bool | None, ...]:
    """Return the layouts to try for these places: whether they hold [in, out], or None for the usual one.

    Both layouts are tried where shapes alone do not decide.
    """
    own = [place for place in places if place.kind not in LAYERS_WITH_A_LAYOUT]
    shapes = [
        shape
        for place in own
        for leaf, shape in place.leaves.items()
        if parent(leaf) == place.path or last_name(leaf) not in ("kernel", AS_IT_IS)  # of a library's layer inside
    ]
    return (None, True, False) if any(len(shape) > 1 and shape[-1] == shape[-2] for shape in shapes) else (None,)


def equal(some: Sequence[Entry], others: Sequence[Entry], unit: Unit) -> bool:
    """Say whether two ways to carry a unit do the same."""
    if [entry[:2] for entry in some] != [entry[:2] for entry in others]:
        return False
    shapes = {layer.tensor(local): shape for layer in unit.layers for local, shape in layer.tensors.items()}
    for one, other in zip(some, others, strict=True):
        labels = [np.arange(math.prod(shapes[name]), dtype=np.int32).reshape(shapes[name]) for name in one.torch]
        pairs = zip(one.convert(*labels), other.convert(*labels), strict=True)
        if not all(np.array_equal(left, right) for left, right in pairs):
            return False
    return True


def flatten_sizes(units: Sequence[Unit], images: Mapping[str, Shape]) -> dict[str, Shape]:
    """Return the size that a flatten before a linear layer may have had (channels, rows, columns), by its name.

    Several layers may follow one flatten, such as the heads for a policy and a value: they have inputs of one size.
    Images that were seen have other channels than the last convolution where several branches are put together.
    """
    sizes: dict[str, Shape] = {}
    channels, rank, inputs = 0, 0, 0
    for unit in units:
        shape = next(iter(unit.layers[0].tensors.values()))
        if unit.make in (conv, conv_transpose):
            channels, rank, inputs = shape[1 if unit.make is conv_transpose else 0], len(shape) - 2, 0
        elif unit.make in (linear, conv1d) and shape[-1] == (inputs or shape[-1]):
            inputs = shape[-1]
            image = images.get(unit.layers[0].name, ())
            if unit.make is linear and channels > 1 and len(image) == rank + 1 and image[0] != channels:
                sizes[unit.layers[0].name] = image
            elif unit.make is linear and channels > 1 and shape[-1] % channels == 0 and shape[-1] > channels:
                places = shape[-1] // channels
                side = round(places ** (1 / rank))
                # How the places are split among rows and columns makes no difference to the order of the values.
                size = (side,) * rank if side**rank == places else (places,)
                sizes[unit.layers[0].name] = (channels, *size)
    return sizes


class Values(NamedTuple):
    """The values on both sides, if JAX's leaves have values, and the sums of their absolute values."""

    torch: Mapping[str, np.ndarray]
    jax: Mapping[str, np.ndarray]
    sums: Mapping[str, float]

    @classmethod
    def read(cls, module: Any, leaves: Mapping[str, Any]) -> "Values":
        """Read the state dict, and the leaves that are arrays."""
        jax = {path: np.asarray(leaf) for path, leaf in leaves.items() if hasattr(leaf, "__array__")}
        torch = {name: value.detach().cpu().numpy() for name, value in module.state_dict().items()} if jax else {}
        sums = {f"torch {name}": float(np.abs(value).sum(dtype=np.float64)) for name, value in torch.items()}
        sums |= {f"jax {path}": float(np.abs(value).sum(dtype=np.float64)) for path, value in jax.items()}
        return cls(torch, jax, sums)

    def agree(self, option: Option) -> bool:
        """Say whether the leaves hold what an option carries to them. Constant values say nothing."""
        first = option.entries[0]
        if not all(path in self.jax for entry in option.entries for path in entry.jax):
            return False
        torch_sum = sum(self.sums[f"torch {name}"] for name in first.torch)
        if torch_sum == 0 or not math.isclose(
            torch_sum, sum(self.sums[f"jax {path}"] for path in first.jax), rel_tol=1e-6
        ):
            return False
        varied = False
        for entry in option.entries:
            values = entry.convert(*(self.torch[name] for name in entry.torch))
            for path, value in zip(entry.jax, values, strict=True):
                if not np.allclose(self.jax[path], value, rtol=1e-6, atol=1e-12):
                    return False
                varied = varied or value.min() != value.max()
        return varied


# Which unit belongs to which place

Fits = dict[tuple[int, int], tuple[Option, ...]]  # the ways to carry a unit to a place, by their numbers; where it fits


def match(units: Sequence[Unit], places: Sequence[Place], values: Values, ordered: bool) -> list[Match]:
    """Match units with places; each is in one match at most."""
    units, places = with_titles(units, places)
    fits: Fits = {}
    for number, unit in enumerate(units):
        for other, place in enumerate(places):
            if unit.scope == place.scope and (ways := options(unit, place)):
                fits[number, other] = ways
    agreeing = {pair: tuple(option for option in ways if values.agree(option)) for pair, ways in fits.items()}
    fits |= {pair: ways for pair, ways in agreeing.items() if ways}
    matches: list[Match] = []
    taken: tuple[set[int], set[int]] = set(), set()

    def take(pairs: Sequence[tuple[int, int]], evidence: str) -> None:
        for number, other in pairs:
            taken[0].add(number)
            taken[1].add(other)
            matches.append(Match((units[number],), (places[other],), fits[number, other], evidence))
            for pair in [pair for pair in fits if pair[0] == number or pair[1] == other]:
                del fits[pair]

    take(alone([pair for pair in fits if agreeing[pair]]), "values")
    named = equal_names(units, places)
    take(alone([pair for pair in fits if pair in named]), "names")
    if ordered:
        for some, others, ways in align(units, places, fits, taken):
            if len(some) == len(others) == 1:
                take([(some[0], others[0])], "order of the calls")
            else:
                matches.append(
                    Match(tuple(units[n] for n in some), tuple(places[n] for n in others), ways, "order of the calls")
                )
                for pair in [pair for pair in fits if pair[0] in some or pair[1] in others]:
                    del fits[pair]
    while only := alone(list(fits)):
        take(only, "the only one left that fits")
    while near := nearest(units, places, fits):
        take(near, "nearest names")
    for whole, parts, ways in fused(units, places, matches):
        matches.append(Match(whole, parts, ways, "the only ones left that fit"))
    while fits:
        take([min(fits)], "order of the names")
    return matches


def alone(pairs: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the pairs whose sides are in no other pair."""
    left, right = Counter(pair[0] for pair in pairs), Counter(pair[1] for pair in pairs)
    return [pair for pair in pairs if left[pair[0]] == right[pair[1]] == 1]


def equal_names(units: Sequence[Unit], places: Sequence[Place]) -> set[tuple[int, int]]:
    """Return the pairs of a unit and a place in the same scope whose names inside of that scope are equal."""
    pairs = set()
    for scope in {unit.scope for unit in units}:
        names = {unit.inside: number for number, unit in enumerate(units) if unit.scope == scope}
        paths = {place.inside: number for number, place in enumerate(places) if place.scope == scope}
        pairs |= {(names[name], paths[path]) for name, path in same_names(names, paths).items()}
    return pairs


def with_titles(units: Sequence[Unit], places: Sequence[Place]) -> tuple[list[Unit], list[Place]]:
    """Give units and places comparable names: one word for all that mean the same, and numbers counted from 0.

    Numbers behind a word say nothing if the two sides do not have equally many of them: fc1 and fc2 may be any of
    Dense_0, Dense_1 and Dense_2.
    """

    def spell(name: str) -> list[str]:
        known = re.sub("[A-Za-z]+", lambda word: SYNONYMS.get(word[0].lower(), word[0]), name)
        parts = re.findall("[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+", known)  # ResidualBlock is residual, block
        return [SYNONYMS.get(part.lower(), part.lower()) for part in parts]

    def count(sides: Sequence[Unit | Place]) -> dict[str, list[int]]:
        numbers: dict[str, set[int]] = {}
        for side in sides:
            for before, word in itertools.pairwise(["", *spell(side.inside)]):
                if word.isdigit():
                    numbers.setdefault(before, set()).add(int(word))
        return {word: sorted(values) for word, values in numbers.items()}

    torch_numbers, jax_numbers = count(units), count(places)

    def title(name: str, own: Mapping[str, list[int]]) -> tuple[str, ...]:
        parts = []
        for before, word in itertools.pairwise(["", *spell(name)]):
            if not word.isdigit():
                parts.append(word)
            elif len(torch_numbers.get(before, own.get(before, []))) == len(
                jax_numbers.get(before, own.get(before, []))
            ):
                parts.append(f"{before} {own[before].index(int(word))}")
        return tuple(parts)

    return (
        [unit._replace(title=title(unit.inside, torch_numbers)) for unit in units],
        [place._replace(title=title(place.inside, jax_numbers)) for place in places],
    )


def likeness(unit: Unit, place: Place) -> float:
    """Return how alike two names are, from 0 to 1."""
    left, right = Counter(unit.title), Counter(place.title)
    return 2 * (left & right).total() / max(1, left.total() + right.total())


def nearest(units: Sequence[Unit], places: Sequence[Place], fits: Fits) -> list[tuple[int, int]]:
    """Return the pairs whose names are more alike than those of any other pair with one of them."""
    pairs = []
    like = {pair: likeness(units[pair[0]], places[pair[1]]) for pair in fits}
    for pair, value in like.items():
        rivals = [like[other] for other in like if other != pair and (other[0] == pair[0] or other[1] == pair[1])]
        if value > max(rivals, default=0) + 0.05:
            pairs.append(pair)
    return pairs


def align(
    units: Sequence[Unit], places: Sequence[Place], fits: Fits, taken: tuple[Collection[int], Collection[int]]
) -> list[tuple[tuple[int, ...], tuple[int, ...], tuple[Option, ...]]]:
    """Align what is left in the order of the calls, as Needleman and Wunsch; several layers may be fused in one.

    Args:
        units: of PyTorch.
        places: in JAX.
        fits: the pairs that are left, with the ways to carry the ones to the others.
        taken: the numbers of the units and of the places that are matched already.

    Returns:
        Numbers of units, numbers of places, and the ways to carry the ones to the others.
    """
    rows, columns = sorted({pair[0] for pair in fits}), sorted({pair[1] for pair in fits})
    rows = [n for n, unit in enumerate(units) if n in rows or (not unit.tied and unit.make in (linear, conv1d))]
    rows = [n for n in rows if n not in taken[0]]
    columns = [n for n, place in enumerate(places) if n in columns or len(place.leaves) <= 2]
    columns = [n for n in columns if n not in taken[1]]
    best = np.zeros((len(rows) + 1, len(columns) + 1))
    steps: dict[tuple[int, int], tuple[int, int, tuple[Option, ...]]] = {}
    for i, j in itertools.product(range(len(rows) + 1), range(len(columns) + 1)):
        moves: list[tuple[float, int, int, tuple[Option, ...]]] = [(0.0, 0, 0, ())] if i == j == 0 else []
        moves += [(best[i - 1, j], 1, 0, ())] if i else []
        moves += [(best[i, j - 1], 0, 1, ())] if j else []
        if i and j:
            unit, place = units[rows[i - 1]], places[columns[j - 1]]
            if ways := fits.get((rows[i - 1], columns[j - 1]), ()):
                score = (1.0 if unit.tied else 3.0 if is_whole(unit, ways[0]) else 2.5) + likeness(unit, place)
                moves.append((best[i - 1, j - 1] + score, 1, 1, ways))
            for count in (2, 3):
                if j >= count and (ways := splits(unit, [places[n] for n in columns[j - count : j]])):
                    moves.append((best[i - 1, j - count] + 3.5, 1, count, ways))
                if i >= count and (ways := joins([units[n] for n in rows[i - count : i]], place)):
                    moves.append((best[i - count, j - 1] + 3.5, count, 1, ways))
        score, up, left, ways = max(moves, key=lambda move: move[0])
        best[i, j], steps[i, j] = score, (up, left, ways)
    i, j = len(rows), len(columns)
    aligned = []
    while i or j:
        up, left, ways = steps[i, j]
        if ways:
            aligned.append((tuple(rows[i - up : i]), tuple(columns[j - left : j]), ways))
        i, j = i - up, j - left
    return aligned[::-1]


def splits(unit: Unit, places: Sequence[Place]) -> tuple[Option, ...]:
    """Return the ways to split a linear layer into several of one module, such as queries, keys and values.

    Their names tell which is which, or the outputs have to: the order in which they are called says little.
    """
    if unit.make not in (linear, conv1d) or len({(parent(place.path), place.scope) for place in places}) > 1:
        return ()
    if places[0].scope != unit.scope:
        return ()
    leaves = {leaf: shape for place in places for leaf, shape in place.leaves.items()}
    total = sum(math.prod(shape) for layer in unit.layers for shape in layer.tensors.values())
    if sum(map(math.prod, leaves.values())) != total:
        return ()
    roles = ["".join(place.title[-1:]) for place in places]
    named = len({*roles}) == len(roles) and {*roles} <= {*"qkv"}
    ordered = sorted(places, key=lambda place: "qkv".index(place.title[-1])) if named else places
    heads = {shape[-2] for shape in leaves.values() if len(shape) - ("{" in unit.name) == 3}
    rules = [
        qkv(*(place.path for place in order), heads=number, transposed=turned)
        for order in ([ordered] if named else itertools.permutations(places))
        for number in (None, *(number for number in heads if number > 1))
        for turned in layouts_of(places)
    ]
    return different(unit, rules, leaves)


def joins(units: Sequence[Unit], place: Place) -> tuple[Option, ...]:
    """Return the ways to join several linear layers of one module into one."""
    fronts = {unit.name.rpartition(".")[0] for unit in units}
    if len(fronts) > 1 or any(unit.make is not linear or unit.scope != place.scope for unit in units):
        return ()
    total = sum(math.prod(shape) for unit in units for layer in unit.layers for shape in layer.tensors.values())
    if sum(map(math.prod, place.leaves.values())) != total:
        return ()
    names = [unit.name.rpartition(".")[2] for unit in units]
    rules = [joined(place.path, *names, transposed=turned) for turned in layouts_of([place])]
    (front,) = fronts
    layers = tuple(
        Layer(
            parts[0].name.rpartition(".")[0],
            {
                f"{part.name.rpartition('.')[2]}.{local}": shape
                for part in parts
                for local, shape in part.tensors.items()
            },
            (),
            {},
        )
        for parts in zip(*(unit.layers for unit in units), strict=True)
    )
    return different(units[0]._replace(name=front, layers=layers), rules, place.leaves)


def different(unit: Unit, rules: Sequence[Rule], leaves: Mapping[str, Shape]) -> tuple[Option, ...]:
    """Return the ways of these rules that fit and differ."""
    ways: list[Option] = []
    for rule in rules:
        entries = carry(unit, rule, leaves, rule.to)
        if entries and not any(equal(entries, other.entries, unit) for other in ways):
            ways.append(Option(rule, entries))
    return tuple(ways)


def fused(
    units: Sequence[Unit], places: Sequence[Place], matches: Sequence[Match]
) -> Iterator[tuple[tuple[Unit, ...], tuple[Place, ...], tuple[Option, ...]]]:
    """Yield each linear layer without a match, with the queries, keys and values of one module on the other side.

    The names of these three tell which is which.
    """
    taken = (
        {unit.name for one in matches for unit in one.units},
        {place.path for one in matches for place in one.places},
    )
    free = [unit for unit in units if unit.name not in taken[0]]
    apart = triples([place for place in places if place.path not in taken[1]])
    for unit in free:
        ways = [(triple, fit) for triple in apart if (fit := splits(unit, triple))]
        if len(ways) == 1:
            yield (unit,), ways[0][0], ways[0][1]
    for triple in triples(free):
        joins_of = [(place, fit) for place in places if place.path not in taken[1] and (fit := joins(triple, place))]
        if len(joins_of) == 1:
            yield triple, (joins_of[0][0],), joins_of[0][1]


def triples(sides: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Return the queries, keys and values among units or places, those of one module together and in this order."""
    modules: dict[Any, dict[str, Any]] = {}
    for side in sides:
        if (names := side.title) and names[-1] in ("q", "k", "v"):
            modules.setdefault((side.scope, names[:-1]), {})[names[-1]] = side
    return [tuple(module[role] for role in "qkv") for module in modules.values() if len(module) == 3]


def left_over(
    side: TorchSide,
    leaves: Mapping[str, Shape],
    matches: Sequence[Match],
    given: WeightMap,
    scopes: Sequence[tuple[str, str]],
    used: Mapping[str, int],
) -> tuple[list[Unit], list[Place]]:
    """Return each tensor and each leaf that no match carries yet as a unit and a place of its own.

    A tensor has the name of the place in JAX that other tensors of its module go to: its leaf is likely to be near.
    """
    entries = [*given.entries, *(entry for match in matches for entry in match.options[0].entries)]
    homes = {side.owner(name): parent(entry.jax[0]) for entry in reversed(entries) for name in entry.torch}
    carried = {name for entry in entries for name in entry.torch} | given.unused
    filled = {path for entry in entries for path in entry.jax}
    free = {path: shape for path, shape in leaves.items() if path not in filled}
    imaginary = dict(parts_apart(free))
    units, places = [], []
    for position, name in enumerate(sorted(side.shapes, key=lambda name: used.get(name, math.inf))):
        owner, shape = side.owner(name), side.shapes[name]
        make = rule_for_tensor(side.modules[owner], name.rpartition(".")[2])
        if shape[-1:] == (2,) and shape not in free.values() and shape[:-1] in map(free.get, imaginary):
            make = complex_parts
        make = same if make is rnn else make
        if name not in carried and make not in (lstm, gru, attention):
            local = name.removeprefix(f"{owner}.").removeprefix(PARAMETRIZED)
            local = "weight" if local.startswith(PROJECTED) else local
            layer = Layer(owner, {local: shape}, (), leaves, side.modules[owner], {local: name})
            around, inside = scope_of(name, [front for front, _ in scopes], ".")
            if home := owner and homes.get(owner):
                inside = f"{scope_of(home, [front for _, front in scopes], '/')[1]}/{local}"
            units.append(Unit(name, (layer,), make, position, around, inside))
    imaginary = imaginary if any(unit.make is complex_parts for unit in units) else {}
    for position, path in enumerate(path for path in free if path not in imaginary.values()):
        scope = scope_of(path, [front for _, front in scopes], "/")
        own = [path, imaginary[path]] if path in imaginary else [path]
        places.append(Place(path, {leaf: free[leaf] for leaf in own}, position, "", *scope))
    return units, places


def parts_apart(leaves: Mapping[str, Shape]) -> Iterator[tuple[str, str]]:
    """Yield the leaves that hold the real and the imaginary part of a complex tensor, by a word of their names."""
    for path, shape in leaves.items():
        for word in re.finditer("(?<![a-z])(re|real|r)(?![a-z])", path.lower()):
            other = path[: word.start()] + IMAGINARY[word[0]] + path[word.end() :]
            if leaves.get(other) == shape:
                yield path, other


# What shapes, names and order leave open


class Choice(NamedTuple):
    """A question with several answers, about matches that are all answered alike, such as those of all blocks.

    Attributes:
        groups: for each time that the question comes up, the numbers of the matches that it is about.
        answers: an order of the places of a group, and the number of the option that is taken.
        texts: the answers in words, for the first group.
    """

    groups: tuple[tuple[int, ...], ...]
    answers: tuple[tuple[tuple[int, ...], int], ...]
    texts: tuple[str, ...]


def apply(matches: Sequence[Match], choices: Sequence[Choice], setting: Sequence[int]) -> list[Match]:
    """Return the matches with these answers; the option chosen comes first."""
    chosen = list(matches)
    for choice, number in zip(choices, setting, strict=True):
        order, option = choice.answers[number]
        for group in choice.groups:
            places = [chosen[index].places for index in group]
            for index, place in zip(group, order, strict=True):
                if places[place] != chosen[index].places:
                    ways = options(chosen[index].units[0], places[place][0])
                    chosen[index] = chosen[index]._replace(places=places[place], options=ways)
                if option:
                    ways = chosen[index].options
                    chosen[index] = chosen[index]._replace(options=(ways[option], *ways[:option], *ways[option + 1 :]))
    return chosen


def open_choices(units: Sequence[Unit], places: Sequence[Place], matches: Sequence[Match]) -> list[Choice]:
    """Return what is open: equal neighbours that may be exchanged, then options that fit equally well."""
    families: dict[Any, list[tuple[int, ...]]] = {}
    for run in equal_neighbours(units, places, matches):
        key = tuple((skeleton(matches[n].units[0].name), skeleton(matches[n].places[0].path)) for n in run)
        families.setdefault(key, []).append(run)
    choices = []
    for runs in families.values():
        size = len(runs[0])
        tried = size <= MOST_ORDERED
        orders = list(itertools.permutations(range(size))) if tried else [tuple(range(size)), *swaps(size)]
        names = [matches[n].units[0].name for n in runs[0]]
        texts = [
            f"{' and '.join(names)} -> {' and '.join(matches[runs[0][place]].places[0].path for place in order)}"
            for order in (orders if size <= 3 else orders[:1])
        ]
        texts += [f"with {' and '.join(two)} exchanged" for two in itertools.pairwise(names) if size > 3]
        choices.append(Choice(tuple(runs), tuple((order, 0) for order in orders), tuple(texts)))
    layouts: dict[Any, list[int]] = {}
    for number, one in enumerate(matches):
        if len(one.options) > 1:
            places_of = [place.path for place in one.places]
            order = places_of if len(places_of) > 1 else one.options[0].rule.to
            labels = tuple((option.rule.how, *map(order.index, option.rule.to)) for option in one.options)
            behind_flatten = number if one.units[0].flatten else None  # each is asked for alone
            leaf = skeleton(one.options[0].entries[0].jax[0].rpartition("/")[2])
            layouts.setdefault((labels, leaf, behind_flatten), []).append(number)
    for numbers in layouts.values():
        first = matches[numbers[0]]
        more = f" and {len(numbers) - 1} more" if len(numbers) > 1 else ""
        front = (first.units[0].name or "the module itself") + more
        answers = tuple(((0,), option) for option in range(len(first.options)))
        words_for = tuple(f"{front}: {code(option.rule.to, option.rule.how)}" for option in first.options)
        choices.append(Choice(tuple((n,) for n in numbers), answers, words_for))
    return choices


def swaps(size: int) -> list[tuple[int, ...]]:
    """Return the orders in which two neighbours are exchanged."""
    orders = []
    for first in range(size - 1):
        order = list(range(size))
        order[first : first + 2] = [first + 1, first]
        orders.append(tuple(order))
    return orders


def skeleton(name: str) -> str:
    """Return a name with every number replaced by one sign."""
    return re.sub("[0-9]+", "#", name)


def equal_neighbours(units: Sequence[Unit], places: Sequence[Place], matches: Sequence[Match]) -> list[tuple[int, ...]]:
    """Return runs of matches that rest on order alone and may be exchanged: neither shapes nor names speak."""
    rank = {unit.name: number for number, unit in enumerate(unit for unit in units if not unit.tied)}
    place_rank = {place.path: number for number, place in enumerate(places)}
    runs: list[list[int]] = []
    single = [n for n, one in enumerate(matches) if len(one.units) == len(one.places) == 1 and not one.units[0].tied]
    for n in sorted(single, key=lambda n: rank.get(matches[n].units[0].name, 0)):
        before = matches[runs[-1][-1]] if runs else None
        if not matches[n].evidence.startswith("order"):
            continue
        if before is not None and exchangeable(before, matches[n], rank, place_rank):
            runs[-1].append(n)
        else:
            runs.append([n])
    return [tuple(run) for run in runs if len(run) > 1]


def exchangeable(one: Match, other: Match, rank: Mapping[str, int], place_rank: Mapping[str, int]) -> bool:
    """Say whether nothing but the order tells two matches apart."""
    (first,), (second,), (place,), (next_place,) = one.units, other.units, one.places, other.places
    if first.scope != second.scope or not options(first, next_place) or not options(second, place):
        return False
    steps = (
        rank.get(second.name, 0) - rank.get(first.name, 0),
        place_rank.get(next_place.path, 0) - place_rank.get(place.path, 0),
    )
    if other.evidence == "order of the calls" and steps != (1, 1):
        return False
    straight = likeness(first, place) + likeness(second, next_place)
    crossed = likeness(first, next_place) + likeness(second, place)
    # Auto-numbered names come in the order of the calls; Haiku's first has no number.
    bare = [re.sub("_#(?=/|$)", "", skeleton(path)) for path in (place.path, next_place.path)]
    numbered = other.evidence == "order of the calls" and skeleton(first.name) == skeleton(second.name)
    numbered = numbered and bare[0] == bare[1]
    return straight <= crossed + 0.05 and not numbered


def of_one_recurrent_module(matches: Sequence[Match]) -> bool:
    """Say whether all are layers or directions of one recurrent module, which has them in a fixed order."""
    names = {one.units[0].name.partition(CELL)[:2] for one in matches}
    return len(names) == 1 and names.pop()[1] == CELL


def settle_layouts(matches: Sequence[Match], given: WeightMap) -> list[Match]:
    """Give square weights the layout that the others show by their shapes, where all leaves of the same name agree.

    Leaves with another number of axes may have another layout: theirs is only tried first.
    """
    shown: dict[tuple[int, str], set[bool]] = {}
    entries = [entry for one in matches if len(one.options) == 1 for entry in one.options[0].entries]
    for entry in (*given.entries, *entries):
        shape, leaf = given.tensors.get(entry.torch[0], ()), given.leaves[entry.jax[0]]
        seen = leaf[1:] if is_stack(entry, leaf) else leaf
        is_table = entry.how.startswith("embedding")  # which is as it is in every layout
        if len(shape) == 2 and shape[0] != shape[1] and seen in (shape, shape[::-1]) and not is_table:
            shown.setdefault((len(leaf), last_name(entry.jax[0])), set()).add(seen != shape)
    settled = []
    for one in matches:
        path = one.options[0].entries[0].jax[0]
        known = shown.get((len(given.leaves[path]), last_name(path)), set())
        anywhere = {turn for (_, name), layouts in shown.items() if name == last_name(path) for turn in layouts}
        turns = [turns_of(option.entries[0], given) for option in one.options]
        kept = tuple(option for option, turn in zip(one.options, turns, strict=True) if turn is None or {turn} == known)
        if len(known) == 1 and 0 < len(kept) < len(one.options):
            one = one._replace(options=kept, evidence=f"{one.evidence}, layout of the other layers")
        elif not known and len(anywhere) == 1:
            unlike = [turn is not None and {turn} != anywhere for turn in turns]
            one = one._replace(options=tuple(one.options[n] for n in sorted(range(len(turns)), key=unlike.__getitem__)))
        settled.append(one)
    return settled


def last_name(path: str) -> str:
    """Return what a leaf is called in its module; a flat dictionary has PyTorch's names, with dots."""
    return re.split("[/.]", path)[-1]


def is_stack(entry: Entry, leaf: Shape) -> bool:
    """Say whether an entry puts several tensors into a leaf of this shape along its first axis."""
    return len(entry.torch) > 1 and leaf[:1] == (len(entry.torch),)


def turns_of(entry: Entry, given: WeightMap) -> bool | None:
    """Say whether an entry transposes a square weight; None if it does neither that nor nothing."""
    shape = given.tensors.get(entry.torch[0], ())
    stack = is_stack(entry, given.leaves[entry.jax[0]])
    if (len(entry.torch) > 1 and not stack) or len(shape) != 2 or shape[0] != shape[1] or shape[0] == 1:
        return None
    labels = np.arange(math.prod(shape), dtype=np.int32).reshape(shape)
    (leaf,) = entry.convert(*[labels] * len(entry.torch)) if len(entry.jax) == 1 else (np.zeros(1),)
    leaf = leaf[0] if stack else leaf
    equal_to = [np.array_equal(leaf.ravel(), other.ravel()) for other in (labels, labels.T)]
    return None if not any(equal_to) else equal_to[1]


def decide(
    matches: Sequence[Match],
    choices: Sequence[Choice],
    assembled: Callable[[Sequence[Match]], WeightMap],
    judge: Judge | None,
    channels_last: bool | None,
) -> tuple[list[Match], tuple[str, ...], tuple[str, ...]]:
    """Answer what is open by the outputs of both sides; return what stays open and what is assumed, in words.

    The outputs of a port with a fault before a flatten do not tell how it flattens, but the layout of its images does.
    Where no answer makes the outputs agree, the port has a fault, and names and order are taken at their word, unless
    not every order of the layers was tried.
    """
    if judge is None or not choices:
        return list(matches), tuple(", or ".join(choice.texts) for choice in choices), ()
    ask = judge
    known: dict[tuple[int, ...], float] = {}

    def distance(setting: tuple[int, ...]) -> float:
        if setting not in known:
            value = ask(assembled(apply(matches, choices, setting)))
            known[setting] = max(value, ROUNDING) if math.isfinite(value) else math.inf
        return known[setting]

    def others(setting: tuple[int, ...], number: int) -> list[tuple[int, ...]]:
        answers = range(len(choices[number].answers))
        return [(*setting[:number], k, *setting[number + 1 :]) for k in answers if k != setting[number]]

    best = (0,) * len(choices)
    if math.prod(len(choice.answers) for choice in choices) <= MOST_QUESTIONS:
        best = min(itertools.product(*(range(len(choice.answers)) for choice in choices)), key=distance)
    else:
        for number in [*range(len(choices)), *range(len(choices))]:
            best = min([best, *others(best, number)], key=distance)
    rivals = [min(distance(setting) for setting in others(best, number)) for number in range(len(choices))]
    open_still = [not rival >= CLOSE * distance(best) for rival in rivals]
    ordered = [
        len(choice.groups[0]) > 1 and of_one_recurrent_module([matches[n] for group in choice.groups for n in group])
        for choice in choices
    ]
    by_layout = [answer_by_layout(matches, choice, channels_last) for choice in choices]
    known_otherwise = [0 if o else answer for o, answer in zip(ordered, by_layout, strict=True)]
    assumed = [
        number
        for number, choice in enumerate(choices)
        if distance(best) > ROUNDING and open_still[number] and known_otherwise[number] is None
        if "flatten" not in "".join(choice.texts) and len(choice.groups[0]) <= MOST_ORDERED
        if distance((*best[:number], 0, *best[number + 1 :])) <= CLOSE * distance(best)
    ]
    known_otherwise = [0 if number in assumed else answer for number, answer in enumerate(known_otherwise)]
    best = tuple(
        other if u and other is not None else answer
        for answer, other, u in zip(best, known_otherwise, open_still, strict=True)
    )
    settled = apply(matches, choices, best)
    unsettled = []
    for number, (choice, rival) in enumerate(zip(choices, rivals, strict=True)):
        if open_still[number] and known_otherwise[number] is not None:
            continue
        if open_still[number]:
            unsettled.append(
                ", or ".join(choice.texts) + f" (distances of the outputs {distance(best):.1e}, {rival:.1e})"
            )
        for index in (index for group in choice.groups for index in group):
            evidence = f"outputs: {distance(best):.0e} against {rival:.0e}"
            settled[index] = settled[index]._replace(evidence=evidence)
    return settled, tuple(unsettled), tuple(choices[number].texts[0] for number in assumed)


def answer_by_layout(matches: Sequence[Match], choice: Choice, channels_last: bool | None) -> int | None:
    """Return the answer that the layout of the images gives to how a layer behind a flatten is carried, or None."""
    one = matches[choice.groups[0][0]]
    if len(choice.groups[0]) == 1 and one.places[0].kind.startswith("own ") and not one.units[0].flatten:
        return 0  # a user's own layer holds its weight in the usual way, unless the outputs say otherwise
    if channels_last is None or not one.units[0].flatten or len(choice.groups[0]) > 1:
        return None
    fits = [n for n, option in enumerate(one.options) if ("flatten" in option.rule.how) == channels_last]
    return fits[0] if len(fits) == 1 else None


# What comes out


def assemble(given: WeightMap, matches: Sequence[Match], side: TorchSide) -> WeightMap:
    """Return the map of what is declared and what is matched."""
    entries = list(given.entries)
    filled = {path for entry in entries for path in entry.jax}
    for one in matches:
        for entry in one.options[0].entries:
            if filled.isdisjoint(entry.jax):
                entries.append(entry._replace(torch=tuple(side.alias[name] for name in entry.torch)))
                filled.update(entry.jax)
    return dataclasses.replace(given, entries=tuple(entries))


def table(result: WeightMap, given: WeightMap, matches: Sequence[Match]) -> tuple[Row, ...]:
    """Return one row for each entry."""
    evidence = dict.fromkeys((entry.jax for entry in given.entries), "declared")
    evidence |= {entry.jax: one.evidence for one in matches for entry in one.options[0].entries}

    def shapes(names: Sequence[str], of: Mapping[str, Shape]) -> str:
        return ", ".join(size_of(of[name]) for name in names)

    return tuple(
        Row(
            ", ".join(entry.torch),
            shapes(entry.torch, result.tensors),
            ", ".join(entry.jax),
            shapes(entry.jax, result.leaves),
            entry.how,
            evidence[entry.jax],
        )
        for entry in result.entries
    )


def write_python(declared: Mapping[str, str | Rule], matches: Sequence[Match]) -> str:
    """Return the mapping that gives these matches again, with patterns for numbers."""
    lines: dict[str, tuple[tuple[str, ...], str]] = {}  # name -> paths, rule; "" for the rule of the class
    for one in matches:
        unit, option = one.units[0], one.options[0]
        name = unit.name
        usual = option.rule.how == unit.make().how and len(one.units) == len(option.rule.to) == 1
        if len(one.units) > 1:
            name = name.rpartition(".")[0]
        if CELL in name:  # layers of one recurrent module
            name = name.partition(CELL)[0]
            lines[name] = ((*lines.get(name, ((), ""))[0], *option.rule.to), option.rule.how)
            continue
        lines[name] = (option.rule.to, "" if usual else option.rule.how)
    text = [
        f"    {key!r}: {value!r}," if isinstance(value, str) else f"    {key!r}: {code(value.to, value.how)},"
        for key, value in declared.items()
    ]
    text += [f"    {name!r}: {code(paths, how)}," for name, paths, how in fold(lines)]
    return "\n".join(["weights={", *text, "}"])


def code(paths: Sequence[str], how: str) -> str:
    """Return the Python of a path, or of a rule with its paths."""
    if not how:
        return repr(paths[0])
    function, _, arguments = how.partition("(")
    return f"{function}({', '.join([*map(repr, paths), *([arguments[:-1]] if arguments != ')' else [])])})"


def fold(lines: Mapping[str, tuple[tuple[str, ...], str]]) -> list[tuple[str, tuple[str, ...], str]]:
    """Put names that differ by numbers into one pattern, where the numbers of the paths follow from theirs."""
    families: dict[Any, list[str]] = {}
    for name, (paths, how) in lines.items():
        families.setdefault((skeleton(name), tuple(map(skeleton, paths)), how), []).append(name)
    targets = {name: paths for name, (paths, _) in lines.items()}
    return [(*pattern, how) for (*_, how), names in families.items() for pattern in fold_names(names, targets)]


def fold_names(names: Sequence[str], paths: Mapping[str, tuple[str, ...]]) -> list[tuple[str, tuple[str, ...]]]:
    """Return patterns of names with the same words: one, or one for each value of some number."""
    if len(names) == 1:
        return [(names[0], paths[names[0]])]
    pattern = fold_family(names, [paths[name] for name in names])
    if pattern is not None and {name for name in paths if re.fullmatch(expression(pattern[0]), name)} == {*names}:
        return [pattern]
    numbers = {name: re.findall("[0-9]+", name) for name in names}
    ways = []
    for column in range(len(numbers[names[0]])):
        values = dict.fromkeys(numbers[name][column] for name in names)
        parts = [[name for name in names if numbers[name][column] == value] for value in values]
        if len(parts) > 1:
            ways.append([pattern for part in parts for pattern in fold_names(part, paths)])
    return min(ways, key=len)


def fold_family(names: Sequence[str], paths: Sequence[tuple[str, ...]]) -> tuple[str, tuple[str, ...]] | None:
    """Return the pattern of names with the same words, and those of their paths; None if the numbers do not follow."""
    numbers = np.array([[int(part) for part in re.findall("[0-9]+", name)] for name in names])
    varying = [column for column in range(numbers.shape[1]) if len({*numbers[:, column]}) > 1]
    letters = dict(zip(varying, (letter for letter in "ijklmn" if f"{{{letter}}}" not in names[0]), strict=False))
    if len(varying) > len(letters):
        return None
    left = iter(range(numbers.shape[1]))
    key = re.sub("[0-9]+", lambda digits: f"{{{letters[n]}}}" if (n := next(left)) in letters else digits[0], names[0])
    targets = []
    for position in range(len(paths[0])):
        values = np.array([[int(part) for part in re.findall("[0-9]+", path[position])] for path in paths])
        texts = []
        for column in range(values.shape[1] if values.ndim > 1 else 0):
            text = formula(numbers[:, varying], values[:, column], [letters[number] for number in varying])
            if text is None:
                return None
            texts.append(text)
        parts = re.split("[0-9]+", paths[0][position])
        targets.append("".join(itertools.chain(*itertools.zip_longest(parts, texts, fillvalue=""))))
    return key, tuple(targets)


def formula(numbers: np.ndarray, values: np.ndarray, letters: Sequence[str]) -> str | None:
    """Return the multiples and the constant that give these values, such as {2*i+j-2}; None if there are none."""
    table = np.column_stack([numbers, np.ones(len(numbers))])
    factors = np.rint(np.linalg.lstsq(table, values, rcond=None)[0]).astype(int)
    if not np.array_equal(table.astype(int) @ factors, values):
        return None
    terms = [(int(factor), letter) for factor, letter in zip(factors, letters, strict=False) if factor]
    if not terms:
        return str(factors[-1])
    texts = [f"{letter if abs(factor) == 1 else f'{abs(factor)}*{letter}'}" for factor, letter in terms]
    signed = [("-" if factor < 0 else "+") + text for (factor, _), text in zip(terms, texts, strict=True)]
    text = "".join(sorted(signed, key=lambda text: text[0] == "-")) + (f"{factors[-1]:+d}" if factors[-1] else "")
    return f"{{{text.removeprefix('+')}}}" if text.startswith("+") else None

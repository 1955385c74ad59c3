"""How two arrays, nests of arrays and trainings are compared, and how a difference is reported."""

import copy
import dataclasses
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import numpy as np


def is_leaf(value: Any) -> bool:
    """Return whether a part of a nest is an array or a number."""
    return (hasattr(value, "shape") and hasattr(value, "dtype")) or isinstance(value, bool | int | float | complex)


def parts_of(nest: Any) -> list[tuple[str, Any]] | None:
    """Return the parts of a nest with what each adds to the name, or None for what is no nest."""
    if isinstance(nest, tuple) and hasattr(nest, "_fields"):
        return [(f".{name}", part) for name, part in zip(nest._fields, nest, strict=True)]
    if isinstance(nest, tuple | list):
        return [(f"[{index}]", part) for index, part in enumerate(nest)]
    if isinstance(nest, Mapping):
        return [(f".{key}" if isinstance(key, str) else f"[{key!r}]", part) for key, part in nest.items()]
    if dataclasses.is_dataclass(nest) and not isinstance(nest, type):
        return [(f".{field.name}", getattr(nest, field.name, None)) for field in dataclasses.fields(nest)]
    return None


def flat(outputs: Any) -> dict[str, Any]:
    """Return the arrays and numbers of a nest by name.

    A tuple's or list's parts are `[0]`, a dictionary's, named tuple's or dataclass's `.name`; a single array is "".
    None, text and objects of other classes are left out. PyTorch, NumPy and JAX arrays are all taken.
    """
    leaves: dict[str, Any] = {}

    def keep(name: str, leaf: Any) -> Any:
        leaves[name] = leaf
        return leaf

    map_leaves(keep, outputs)
    return leaves


def map_leaves(function: Callable[[str, Any], Any], nest: Any, name: str = "") -> Any:
    """Return the nest with `function(name, leaf)` in the place of each leaf, or the nest itself if nothing changes."""
    if is_leaf(nest):
        return function(name, nest)
    parts = parts_of(nest)
    if parts is None:
        return nest
    new = [map_leaves(function, part, name + suffix) for suffix, part in parts]
    if all(after is before for after, (_, before) in zip(new, parts, strict=True)):
        return nest
    if isinstance(nest, tuple):
        return type(nest)(*new) if hasattr(nest, "_fields") else type(nest)(new)
    if isinstance(nest, list):
        return type(nest)(new)
    changed = copy.copy(nest)
    if isinstance(nest, Mapping):
        for key, part in zip(nest, new, strict=True):
            changed[key] = part
    else:
        for (suffix, _), part in zip(parts, new, strict=True):
            object.__setattr__(changed, suffix[1:], part)
    return changed


SLICE = 2**16  # values that are compared at once: they fit into the cache, and large tensors need no second copy


class Refused(Exception):
    """The two sides cannot be compared, and the message says in one line why and what to do."""


def describe(error: Exception) -> str:
    """Return the kind and the first line of an error."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


@contextmanager
def blame(what: str, hint: Callable[[], str] = str) -> Iterator[None]:
    """Say of an error inside in what of the user's it arose, and what may help; also a decorator.

    Raises:
        Refused: there was an error.
    """
    try:
        yield
    except Refused:
        raise
    except Exception as error:
        raise Refused(f"{what} fails: {describe(error)}{hint()}") from error


class Divergence(NamedTuple):
    """One place where the two sides differ by more than rounding can explain."""

    check: str
    where: str
    problem: str
    cause: str = ""  # what would explain the difference; empty where nothing is known

    def __str__(self) -> str:
        sentence = f"{self.check}: {self.where}: {self.problem}"
        return f"{sentence}. {self.cause}" if self.cause else sentence


class Bound(NamedTuple):
    """The largest error allowed, and where that number comes from.

    Attributes:
        limit: absolute, or in units of the largest expected value of the tensor if `relative`.
        source: the measurement behind the limit.
        relative: see `limit`.
        floor: if `relative`, the smallest value that counts as a tensor's largest one: below it, a tensor is zero but
            for rounding.
    """

    limit: float
    source: str
    relative: bool = True
    floor: float = 0.0


EXACT = Bound(0.0, "both sides hold the same bits", relative=False)


def compare(
    check: str,
    actual: Mapping[str, np.ndarray],
    expected: Mapping[str, np.ndarray],
    bound: Bound,
    label: str = "{}",
) -> Iterator[Divergence]:
    """Yield every difference, in the order of `expected`.

    Whatever the bound, these count as differences: a missing or an extra key, another shape or dtype (nothing is
    broadcast or cast), a NaN on either side or on both, an infinity that the other side does not have at the same
    place, and a comparison of nothing.

    Args:
        check: the name of the check that compares.
        actual: JAX's arrays, by name.
        expected: PyTorch's arrays, by name.
        bound: the largest error allowed.
        label: how a name is shown, with {} in its place: "gradient of {}".
    """
    if not expected:
        yield Divergence(check, label.format("anything"), "there is nothing to compare")
    for name in actual.keys() - expected.keys():
        yield Divergence(check, label.format(name), "JAX has it and PyTorch does not")
    for name, reference in expected.items():
        problem = (
            "PyTorch has it and JAX does not" if name not in actual else find_difference(actual[name], reference, bound)
        )
        if problem:
            yield Divergence(check, label.format(name), problem)


def find_difference(actual: np.ndarray, expected: np.ndarray, bound: Bound) -> str:
    """Return what is wrong with one array of JAX's, or an empty string."""
    if actual.shape != expected.shape:
        return f"JAX's shape is {list(actual.shape)}, PyTorch's {list(expected.shape)}"
    if actual.dtype != expected.dtype:
        return f"JAX's dtype is {actual.dtype}, PyTorch's {expected.dtype}"
    if actual.size == 0:
        return "it is empty on both sides"
    actual, expected = without_equal_infinities(actual, expected)
    for side, array in (("JAX", actual), ("PyTorch", expected)):
        if np.issubdtype(array.dtype, np.inexact) and not np.isfinite(array).all():
            index = first_index(~np.isfinite(array))
            return f"{side} has {array[index]} at {list(index)}"
    limit = bound.limit * (max(largest(expected), bound.floor) if bound.relative else 1.0)
    if largest_error(actual, expected) <= limit:
        return ""
    errors = np.abs(widened(actual) - widened(expected))
    index = first_index(errors == errors.max())
    relation = factor_between(actual, expected) or order_between(actual, expected)
    relation = relation and f"; JAX's is {relation}"
    return (
        f"error {errors.max():.1e} > {limit:.1e} at {list(index)} "
        f"(JAX {actual[index]:.9g}, PyTorch {expected[index]:.9g}; "
        f"{(errors > limit).sum():,} of {errors.size:,} values; bound: {bound.source}){relation}"
    )


def factor_between(actual: np.ndarray, expected: np.ndarray) -> str:
    """Return in words what JAX's values are, if they are PyTorch's times one number."""
    factor = None if np.iscomplexobj(expected) else slope(actual, expected)
    if factor is None or f"{factor:.6g}" == "1" or largest_error(actual, factor * expected) > 1e-9 * largest(actual):
        return ""
    return f"{factor:.6g} times PyTorch's"


def order_between(actual: np.ndarray, expected: np.ndarray) -> str:
    """Describe how JAX reorders PyTorch's values or moves them along an axis. Return "" if no such change is found."""
    if actual.shape != expected.shape or actual.dtype.kind not in "fiu" or actual.size > LARGEST_ORDERED:
        return ""
    actual, expected = widened(actual), widened(expected)
    small = 1e-9 * largest(actual)
    if not (np.isfinite(actual).all() and np.isfinite(expected).all()):  # a mask
        return ""

    def is_equal(one: np.ndarray, other: np.ndarray) -> bool:
        return largest_error(one, other) <= small

    if is_equal(actual, expected):
        return ""
    for first, second in itertools.combinations(range(actual.ndim), 2):
        if actual.shape[first] == actual.shape[second] and is_equal(actual, expected.swapaxes(first, second)):
            return f"PyTorch's with axes {first} and {second} exchanged"
    for axis, length in enumerate(actual.shape):
        there, here = np.moveaxis(expected, axis, 0), np.moveaxis(actual, axis, 0)
        weights = np.random.default_rng(0).normal(size=there.shape[1:])  # one number tells a slice from all others
        numbers = [np.tensordot(side, weights, weights.ndim) for side in (here, there)]
        order = np.argsort(numbers[1])[np.argsort(np.argsort(numbers[0]))]  # of the same rank
        if is_equal(here, there[order]):
            some = ", ".join(map(str, order[:ORDER_SHOWN])) + (", …" if length > ORDER_SHOWN else "")
            return f"PyTorch's in the order {some} of axis {axis}"
        if length > 2 and is_equal(here[1:], there[:-1]):
            return f"PyTorch's one place further along axis {axis}"
        if length > 2 and is_equal(here[:-1], there[1:]):
            return f"PyTorch's one place earlier along axis {axis}"
    if is_equal(np.sort(actual, axis=None), np.sort(expected, axis=None)):
        return "PyTorch's in another order"
    return ""


def without_equal_infinities(actual: np.ndarray, expected: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return both arrays with 0 where they have the same infinity, as masked logits do, unless nothing else is left."""
    if not np.issubdtype(expected.dtype, np.inexact):
        return actual, expected
    equal = np.isinf(expected) & (actual == expected)
    if not equal.any() or equal.all():
        return actual, expected
    return np.where(equal, 0, actual), np.where(equal, 0, expected)


def first_index(mask: np.ndarray) -> tuple[int, ...]:
    """Return the index of the first True."""
    return tuple(int(index) for index in np.unravel_index(int(mask.argmax()), mask.shape))


def widened(array: np.ndarray) -> np.ndarray:
    """Return the values in float64 or complex128, so that a difference does not overflow or round."""
    return array.astype(np.complex128 if np.iscomplexobj(array) else np.float64, copy=False)


def slices(array: np.ndarray) -> Iterator[tuple[slice, ...]]:
    """Yield slices of the longest axis that hold about `SLICE` values each.

    One of the two sides is often a transposed view. In either layout, the values of such a slice are
    close together in memory.
    """
    if array.ndim == 0 or array.size <= SLICE:
        yield ()
        return
    axis = int(np.argmax(array.shape))
    rows = max(1, SLICE * array.shape[axis] // array.size)
    for start in range(0, array.shape[axis], rows):
        yield (*[slice(None)] * axis, slice(start, start + rows))


def largest(array: np.ndarray) -> float:
    """Return the largest finite absolute value; 0 for an array without any."""
    sizes = [0.0]
    for part in slices(array):
        values = np.abs(array[part])
        size = values.max(initial=0)
        sizes.append(float(size if np.isfinite(size) else values.max(initial=0, where=np.isfinite(values))))
    return max(sizes)


def largest_error(actual: np.ndarray, expected: np.ndarray) -> float:
    """Return the largest absolute difference; NaN if a value is NaN."""
    with np.errstate(invalid="ignore"):  # infinity minus infinity
        errors = [np.abs(widened(actual[part]) - widened(expected[part])).max(initial=0) for part in slices(expected)]
    return float(np.max(errors))


def relative_error(actual: np.ndarray, expected: np.ndarray, floor: float = 0.0) -> float:
    """Return the largest error in units of the largest expected value; infinity if the shapes differ."""
    if actual.shape != expected.shape:
        return float("inf")
    actual, expected = without_equal_infinities(actual, expected)
    return largest_error(actual, expected) / (max(largest(expected), floor) or 1.0)


UNITS_IN_THE_LAST_PLACE = 64 * 2.0**-52  # what adding steps to a weight may cost, relative to the largest weight
NAMES_SHOWN = 6
ORDER_SHOWN = 8
LARGEST_ORDERED = 2**20  # values of a tensor whose order is compared: it takes several runs through all of them


class Wrong(NamedTuple):
    """One tensor that differs.

    Attributes:
        part: "weights", "statistics" or a kind of moments.
        name: in PyTorch.
        error: the largest one.
        problem: the figures.
        causes: what would explain it: (the same for all tensors that are wrong in the same way, what it says of one).
    """

    part: str
    name: str
    error: float
    problem: str
    causes: tuple[tuple[str, str], ...] = ()


def judge(actual: np.ndarray, expected: np.ndarray, limit: float, source: str) -> tuple[float, str]:
    """Return the largest error and the figures of a difference, or "" if there is none."""
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        sides = [f"{list(side.shape)} {side.dtype}" for side in (actual, expected)]
        return np.inf, f"JAX's is {sides[0]}, PyTorch's {sides[1]}"
    error = largest_error(actual, expected)
    if error <= limit:
        return error, ""
    errors = np.abs(widened(actual) - expected)
    worst = np.where(np.isnan(errors), np.inf, errors)
    index = tuple(int(place) for place in np.unravel_index(int(worst.argmax()), errors.shape))
    return error, (
        f"error {error:.1e} > {limit:.1e} at {list(index)} (JAX {actual[index]:.9g}, PyTorch {expected[index]:.9g}; "
        f"{int((~(errors <= limit)).sum()):,} of {errors.size:,} values; bound: {source})"
    )


def slope(values: np.ndarray, by: np.ndarray) -> float | None:
    """Return c if `values` are c times `by`, but for a thousandth."""
    values, by = (array.ravel().astype(np.float64, copy=False) for array in (values, by))
    square = float(by @ by)
    if not square or not np.isfinite(values).all():
        return None
    factor = float(values @ by) / square
    return factor if factor and np.linalg.norm(values - factor * by) <= 1e-3 * np.linalg.norm(values) else None


def explain_weights(actual: np.ndarray, expected: np.ndarray, start: np.ndarray) -> Iterator[tuple[str, str]]:
    """Yield what would explain a difference of weights that began equal."""
    rounding = UNITS_IN_THE_LAST_PLACE * largest(start)
    if largest_error(expected, start) <= rounding:
        yield "frozen on one side", "moved in JAX, frozen in PyTorch"
    elif largest_error(actual, start) <= rounding:
        yield "frozen on one side", "moved in PyTorch, frozen in JAX"
    if (decay := slope(actual - expected, start)) and start.size > 1:  # one number is a multiple of any other
        side = "JAX" if decay < 0 else "PyTorch"
        yield (
            f"the difference is {abs(decay):.2g} times the weight",
            f"decayed in {side} alone, or more than in the other",
        )
    if (factor := slope(actual - start, expected - start)) and abs(factor - 1) > 1e-3:
        yield f"JAX's step is {factor:.4g} times PyTorch's", ""


def explain_moments(actual: np.ndarray, expected: np.ndarray, start: np.ndarray) -> Iterator[tuple[str, str]]:
    """Yield what would explain a difference of moments."""
    if (decay := slope(actual - expected, start)) and start.size > 1:
        side = "JAX" if decay > 0 else "PyTorch"
        yield (
            f"the difference is {abs(decay):.2g} times the weight",
            f"weight decay is a part of the gradient in {side} alone",
        )
    if (factor := slope(actual, expected)) and abs(factor - 1) > 1e-3:
        yield f"JAX's are {factor:.4g} times PyTorch's", ""


def explain_nothing(actual: np.ndarray, expected: np.ndarray, start: np.ndarray) -> Iterator[tuple[str, str]]:
    """Yield nothing: a difference of statistics in mid-training comes from elsewhere."""
    yield from ()


def compare_tensor(
    part: str, name: str, actual: np.ndarray, values: Sequence[np.ndarray], bound: Bound
) -> Iterator[Wrong]:
    """Compare one tensor: weights relative to how far they have moved, others to their largest value.

    Args:
        part: "weights", "statistics" or a kind of moments.
        name: in PyTorch.
        actual: JAX's.
        values: PyTorch's, and the weights at the start.
        bound: relative to the largest value, or to how far a weight has moved.
    """
    expected, start = values
    if not np.issubdtype(expected.dtype, np.floating):
        return
    scale = largest(expected)
    allowed = bound.limit * (largest_error(expected, start) if part == "weights" else scale)
    if part in ("weights", "statistics"):
        allowed += UNITS_IN_THE_LAST_PLACE * scale
    error, problem = judge(actual, expected, allowed, bound.source)
    if problem:
        explain = {"weights": explain_weights, "statistics": explain_nothing}.get(part, explain_moments)
        yield Wrong(part, name, error, problem, tuple(explain(actual, expected, start)))


def with_counts(wrong: list[Wrong], actual: int | None, expected: int | None) -> list[Wrong]:
    """Add to differences that the optimizers have counted other numbers of steps. Alone, it is no difference."""
    if not wrong or actual is None or expected is None or actual == expected:
        return wrong
    return [
        *wrong,
        Wrong("step count", "", np.inf, f"JAX's optimizer has counted {actual} steps, PyTorch's {expected}"),
    ]


def report(check: str, label: str, wrong: Sequence[Wrong]) -> Iterator[Divergence]:
    """Yield one message for all tensors that are wrong in the same way.

    What follows from another one has none of its own: all from the loss, a weight from its moment.

    Args:
        check: its name.
        label: where that is, with {} in the place of the tensors: "step 3, {}".
        wrong: tensors.
    """
    counts = [item.problem for item in wrong if item.part == "step count"]
    wrong = [item for item in wrong if item.part != "step count"]
    causes = Counter((item.part, text) for item in wrong for text, _ in item.causes)
    tensors = Counter(item.part for item in wrong)
    groups: dict[tuple[str, str], list[tuple[Wrong, str]]] = {}
    for item in wrong:
        # A factor is the cause only if it is the same for all: small tensors fit many factors.
        fitting = [
            (causes[item.part, text], text, note)
            for text, note in item.causes
            if note or "times PyTorch's" not in text or causes[item.part, text] == tensors[item.part]
        ]
        _, text, note = max(fitting, default=(0, "", ""))
        groups.setdefault((item.part, text), []).append((item, note))
    messages: list[tuple[str, list[str], Divergence]] = []
    for (part, text), items in groups.items():
        by_note: dict[str, list[str]] = {}
        for item, note in items:
            names = by_note.setdefault(note, [])
            names += [] if item.name in names else [item.name]
        sides = [f"{shorten(names)} {note}" if len(by_note) > 1 and note else note for note, names in by_note.items()]
        worst = max((item for item, _ in items), key=lambda item: item.error).problem
        rest = "nothing else differs: look at the learning rate, eps and what else makes the step of the moments"
        cause = [*counts, text, *sides, rest if not text and not counts and tensors.keys() == {"weights"} else ""]
        names = [name for names in by_note.values() for name in names]
        tensors_named = f"{part} {shorten(names) if any(names) else ''}".strip()
        message = Divergence(check, label.format(tensors_named), worst, "; ".join(filter(None, cause)))
        before = ((n, kind, {*known}) for n, (kind, known, _) in enumerate(messages) if kind != part)
        if (number := next((n for n, kind, known in before if kind == "loss" or {*names} <= known), None)) is None:
            messages.append((part, names, message))
            continue
        other, known, first = messages[number]
        follows = f"{part if names == known else tensors_named} with it{f' ({text})' if text else ''}"
        messages[number] = (other, known, first._replace(cause="; ".join(filter(None, [first.cause, follows]))))
    yield from (message for *_, message in messages)


def shorten(names: Sequence[str]) -> str:
    """Join names; of many only the first ones."""
    more = len(names) - NAMES_SHOWN
    return ", ".join(names[:NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")


def add_note(notes: list[str], note: str) -> None:
    """Add a remark once."""
    if note not in notes:
        notes.append(note)


def keeps_float32(array: Any) -> bool:
    """Return whether all values fit float32, and some fill it (small whole numbers, 0 and 1 do not)."""
    array = np.asarray(array)
    if array.dtype.kind != "f" or not array.size:
        return False
    finite = array[np.isfinite(array)].astype(np.float64)
    with np.errstate(over="ignore"):
        if not np.array_equal(finite.astype(np.float32), finite):
            return False
    fractions, _ = np.frexp(finite)
    return bool((fractions * 2.0**12 % 1 != 0).any())


dropped: ContextVar[list[tuple[str, float]] | None] = ContextVar("dropped", default=None)


def note_rate(rate: Any, path: str = "") -> None:
    """Keep the rate of a dropout that is switched off, and its path in JAX, if somebody asks for the rates."""
    if (rates := dropped.get()) is not None and isinstance(rate, int | float) and rate > 0:
        rates.append((path, without_float32(rate)))


def without_float32(rate: float) -> float:
    """Return a rate as it was written: one of float32, as of `torch.linspace`, is no other one."""
    return float(f"{rate:.6g}")

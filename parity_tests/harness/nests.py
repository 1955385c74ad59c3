"""Nests of arrays, as models take and return them, and the names of their parts."""

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any


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

"""Record what happens inside a PyTorch module while it runs.

Forward hooks see what each submodule returns, and a `TorchFunctionMode` sees the functions that a forward method calls
between them. A tensor is recorded as a copy, because a later operation may change it in place. The gradient by it comes
from `Tensor.register_hook`, which stays with the value as it was when the hook was placed. A tensor that a module hands
through unchanged is returned as a view of itself: the view is a node of its own in the graph, so its gradient is the
part that flows through this module.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from parity_tests.harness.nests import flat, map_leaves

# Functions that compute nothing: they ask for a property, make a constant, or give the same numbers another form.
# Views need no name here, because they share memory with their source.
UNRECORDED = {"get", "set", "size", "stride", "dim", "numel", "type", "requires_grad", "retain_grad", "detach", "clone"}
UNRECORDED |= {"to", "type_as", "float", "double", "half", "bfloat16", "long", "int", "bool", "cpu", "cuda"}
UNRECORDED |= {"reshape", "flatten", "ravel", "contiguous", "tensor", "as_tensor", "multi_head_attention_forward"}
UNRECORDED |= {f"{what}_like" for what in ("zeros", "ones", "full", "empty", "rand", "randn")}
UNRECORDED |= {f"new_{what}" for what in ("zeros", "ones", "full", "empty", "tensor")}
# Operators and second names, by the name that is shown.
SYNONYMS = {
    **{f"{side}{name}": name for name in ("add", "sub", "mul", "matmul", "pow") for side in "ri"},
    **dict.fromkeys(("truediv", "rtruediv", "itruediv", "rdiv", "idiv", "divide", "true_divide"), "div"),
    **{"subtract": "sub", "multiply": "mul", "negative": "neg", "absolute": "abs"},
}

NO_GRADIENT = "computed without a gradient, or from nothing that has one"


class Scope(NamedTuple):
    """A module that is running, and the version of each tensor that it was given."""

    name: str
    given: dict[int, int]


class Watch(TorchFunctionMode):
    """Records what submodules and functions return while it is entered.

    Args:
        functions: record functions as well as submodules.
        views: return a view of what a submodule hands through, to tell its gradient from that of other uses.
        calls_of: names of stages whose calls are kept, with copies of their arguments.
    """

    def __init__(self, functions: bool = True, views: bool = True, calls_of: Collection[str] = ()):
        super().__init__()
        self.calls_of = calls_of
        self.kept_calls: dict[str, tuple[Callable[..., Any], Any, Any]] = {}
        self.functions, self.views = functions, views
        self.values: dict[str, np.ndarray] = {}
        self.gradients: dict[str, np.ndarray] = {}
        self.kinds: dict[str, str] = {}
        self.notes: list[str] = []
        self.called: set[str] = set()
        self.lost: dict[str, list[str]] = {}  # reason -> names without a gradient
        self.backward = False
        self.calls: Counter[str] = Counter()
        self.scopes: list[Scope] = []
        self.copies: dict[int, tuple[weakref.ref[torch.Tensor], np.ndarray, torch.Tensor]] = {}
        self.recorded_views: list[tuple[str, torch.Tensor, int]] = []
        self.busy = False

    @contextmanager
    def attach(self, model: nn.Module) -> Iterator[None]:
        """Place the hooks, and remove them afterwards."""
        self.names = {name for name, _ in model.named_modules()}
        self.closed = {name for name, part in model.named_modules() if is_closed(part, root=not name)}
        handles: list[Any] = []
        for name, part in model.named_modules():
            handles += [
                part.register_forward_pre_hook(self.make_before(name), with_kwargs=True),
                part.register_forward_hook(self.make_after(name), with_kwargs=True, always_call=True),
            ]
        yield
        for handle in handles:
            handle.remove()

    def make_before(self, name: str) -> Callable[..., None]:
        """Return the hook that runs before a module."""

        def before(part: nn.Module, args: Any, kwargs: Any) -> None:
            if not in_backward():
                self.scopes.append(Scope(name, self.versions((args, kwargs))))
                self.keep_call(name, part, args, kwargs)

        return before

    def make_after(self, name: str) -> Callable[..., Any]:
        """Return the hook that runs after a module."""

        def after(part: nn.Module, args: Any, kwargs: Any, outputs: Any) -> Any:
            if in_backward():  # torch.utils.checkpoint computes the forward again
                return None
            scope = self.scopes.pop()
            self.called.add(name)
            changed = self.record(name, type(part).__name__, outputs, scope.given)
            return None if changed is outputs else changed

        return after

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function, and record what it returns."""
        kwargs = kwargs or {}
        label = getattr(func, "__name__", "").strip("_")
        label = SYNONYMS.get(label, label)
        scope = self.scopes[-1].name if self.scopes else ""
        if self.busy or not self.functions or label in UNRECORDED or scope in self.closed or in_backward():
            return func(*args, **kwargs)
        given = self.versions((args, kwargs))
        name = f"{scope}.{label}".removeprefix(".")
        name += "()" if name in self.names else ""
        self.keep_call(name, func, args, kwargs)
        outputs = func(*args, **kwargs)
        if given:
            self.record_function(name, outputs, (args, kwargs), given)
        return outputs

    def keep_call(self, name: str, function: Callable[..., Any], args: Any, kwargs: Any) -> None:
        """Keep a call that was asked for, with copies of its arguments."""
        if not self.calls_of:
            return
        key = self.number(name, self.calls[name] + 1)
        if key in self.calls_of and key not in self.kept_calls:
            self.busy = True
            self.kept_calls[key] = (function, *map_leaves(lambda _, leaf: detached(leaf), (args, kwargs)))
            self.busy = False

    @staticmethod
    def number(name: str, call: int) -> str:
        """Return the name of a stage's n-th call."""
        return name if call == 1 else f"{name}#{call}"

    def record_function(self, name: str, outputs: Any, arguments: Any, given: dict[int, int]) -> None:
        """Record what a function returned, unless it is one of its arguments, unchanged, or a part of one."""
        tensors = [leaf for leaf in flat(outputs).values() if isinstance(leaf, torch.Tensor)]
        sources = {memory(leaf) for leaf in flat(arguments).values() if isinstance(leaf, torch.Tensor)}
        new = [t for t in tensors if (given[id(t)] != t._version if id(t) in given else memory(t) not in sources)]
        if new and len(new) == len(tensors):
            self.record(name, "function", outputs, given)

    def versions(self, arguments: Any) -> dict[int, int]:
        """Return how often each tensor among the arguments was changed in place, by its identity."""
        return {id(leaf): leaf._version for leaf in flat(arguments).values() if isinstance(leaf, torch.Tensor)}

    def record(self, name: str, kind: str, outputs: Any, given: dict[int, int]) -> Any:
        """Record the tensors of a nest, and return the nest with views of those that were handed through."""
        self.calls[name] += 1
        base = self.number(name, self.calls[name])
        tensors = [leaf for leaf in flat(outputs).values() if isinstance(leaf, torch.Tensor)]
        shared = find_shared(tensors) if len(tensors) > 1 else set()

        def record_leaf(place: str, tensor: Any) -> Any:
            if not isinstance(tensor, torch.Tensor):
                return tensor
            key = base + place
            try:
                self.values[key] = self.copy(tensor)
            except (RuntimeError, NotImplementedError, TypeError) as error:
                if kind != "function":
                    self.notes.append(f"{key or 'the output'} cannot be recorded: {describe(error)}")
                return tensor
            self.kinds[key] = kind
            if not (tensor.is_floating_point() or tensor.is_complex()):
                return tensor
            return self.record_gradient(key, tensor, given.get(id(tensor)), id(tensor) in shared, kind == "function")

        self.busy = True
        try:
            return map_leaves(record_leaf, outputs)
        finally:
            self.busy = False

    def record_gradient(
        self, key: str, tensor: torch.Tensor, version: int | None, shared: bool, function: bool
    ) -> torch.Tensor:
        """Ask for the gradient by a tensor, and return the tensor or a view of it that has a gradient of its own.

        Args:
            key: the name of the value.
            tensor: what a module or a function returned.
            version: how often the tensor had been changed in place when it was given to it; None if it was not given.
            shared: whether other outputs of the same call depend on it.
            function: whether a function returned it, whose result cannot be replaced.
        """
        if not tensor.requires_grad:
            self.lost.setdefault(NO_GRADIENT, []).append(key)
            return tensor
        changed = version is not None and version != tensor._version
        if changed and tensor._is_view():
            self.lost.setdefault("a view that was changed in place", []).append(key)
            return tensor
        node = tensor
        if (version is not None and not changed) or shared or tensor.is_leaf:
            if function or not self.views:
                self.lost.setdefault("its gradient cannot be told from that of other uses", []).append(key)
                return tensor
            node = tensor.view_as(tensor)
            if (known := self.copies.get(id(tensor))) is not None:
                self.copies[id(node)] = (weakref.ref(node), *known[1:])

        def add(gradient: torch.Tensor) -> None:
            if self.backward:  # not in a gradient that the forward itself computes
                array = to_numpy(gradient)
                self.gradients[key] = self.gradients[key] + array if key in self.gradients else array

        node.register_hook(add)
        if node._is_view():
            self.recorded_views.append((key, node, node._version))
        return node

    def copy(self, tensor: torch.Tensor) -> np.ndarray:
        """Return a copy of a tensor's values, the one made before if the tensor is unchanged since."""
        known = self.copies.get(id(tensor))
        if known is not None and known[0]() is tensor and torch.equal(tensor, known[2]):
            return known[1]
        kept = tensor.detach().clone()
        array = to_numpy(kept)
        self.copies[id(tensor)] = (weakref.ref(tensor), array, kept)
        return array

    def begin_backward(self) -> None:
        """End the recording of values. A view that was changed in place since would get a part of its gradient."""
        self.backward = True
        self.changed_views = {key for key, view, version in self.recorded_views if view._version != version}
        self.recorded_views.clear()
        self.copies.clear()

    def explain_missing(self) -> Iterator[str]:
        """Drop the gradients that are not whole, and yield why each gradient is missing."""
        for key in sorted(self.changed_views if self.backward else ()):
            self.gradients.pop(key, None)
            self.lost.setdefault("a view that was changed in place", []).append(key)
        explained = {key for keys in self.lost.values() for key in keys}
        constants = self.lost.pop(NO_GRADIENT, [])
        if constants := [key for key in constants if self.kinds[key] != "function"]:  # masks and tables
            self.lost[NO_GRADIENT] = constants
        floats = [key for key, value in self.values.items() if value.dtype.kind in "fc"]
        if unused := [key for key in floats if key not in self.gradients and key not in explained]:
            self.lost["the objective does not depend on it"] = unused
        for reason, keys in self.lost.items():
            yield f"no gradient ({reason}): {shorten(keys)}"


def detached(leaf: Any) -> Any:
    """Return a copy of a tensor that belongs to no graph, and a number as it is."""
    return leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf


def in_backward() -> bool:
    """Return whether a backward pass is running."""
    return torch._C._current_graph_task_id() != -1


def is_closed(part: nn.Module, root: bool) -> bool:
    """Return whether the functions inside a module are not recorded, because it is one operation.

    A leaf is one, unless it is a user's module that is the whole model or holds several matrices.
    """
    own = type(part).__module__.startswith("torch.nn.")
    if any(True for _ in part.children()):
        return isinstance(part, nn.MultiheadAttention)
    return own or not (root or sum(parameter.ndim > 1 for parameter in part.parameters(recurse=False)) > 1)


def memory(tensor: torch.Tensor) -> int:
    """Return the address of the memory that holds a tensor and its views."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # sparse and wrapped tensors
        return id(tensor)


def find_shared(tensors: list[torch.Tensor]) -> set[int]:
    """Return the identities of the tensors that another one of them is, or was computed from.

    A graph's node has a higher number than those it depends on, so the search ends at the oldest of the tensors.
    """
    shared = {id(t) for t, uses in ((t, sum(t is other for other in tensors)) for t in tensors) if uses > 1}
    producers = {(t.grad_fn, t.output_nr): id(t) for t in tensors if t.grad_fn is not None}
    if not producers:
        return shared
    oldest = min(node._sequence_nr() for node, _ in producers)
    seen: set[Any] = set()
    waiting = [node for node, _ in producers]
    while waiting:
        for edge in waiting.pop().next_functions:
            if edge in producers:
                shared.add(producers[edge])
            node = edge[0]
            if node is not None and node not in seen and node._sequence_nr() > oldest:
                seen.add(node)
                waiting.append(node)
    return shared


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """Return a tensor's values as an array, which shares memory with it where it can."""
    tensor = tensor.detach().cpu()
    if tensor.layout is not torch.strided:
        tensor = tensor.to_dense()
    if tensor.dtype in (torch.bfloat16, torch.float16):
        tensor = tensor.float()
    return tensor.resolve_conj().resolve_neg().numpy()


def describe(error: Exception) -> str:
    """Return the kind and the first line of an error."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def shorten(names: list[str]) -> str:
    """Return the first few names as text, and how many more there are."""
    return ", ".join(name or "the module itself" for name in names[:6]) + (
        f" and {len(names) - 6} more" if len(names) > 6 else ""
    )

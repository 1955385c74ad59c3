"""See inside a JAX program without changing it: record, replace and differentiate by any value that has a name.

While a program is traced, the adapter of a library lets the output of every module go through `tap`, a primitive that
does nothing. The traced program (a jaxpr) is then walked: each tap, and each value that a function between two modules
returns, is handed to a rule, which says what to record and what to hand on. Everything else is bound as it is. The
convolutions that XLA computes slowly in float64 are replaced at the end.
"""

import contextlib
import functools
import itertools
import math
import os
import sys
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import Array, lax
from jax import numpy as jnp
from jax._src import dtypes
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Primitive, Var
from jax.interpreters import ad, batching, mlir

from parity_tests.harness.compare import Refused, keeps_float32

# JAX keeps what it traced. A value of its own in this context lets it trace anew, and leaves the user's cache as it is.
session = jax.make_user_context(None)
widened = jax.make_user_context(False)

# Rounding that may differ because XLA fuses other operations once an inner value is an output, in units of the dtype's
# epsilon and of the largest value. The worst of 131 small models was 2.
ROUNDING = 256

# Most programs run a few times only, so that XLA's costly passes do not pay: without them it takes about half as long.
# With no optimisation at all, a convolution that pads takes six times as long to run.
QUICKLY = {"xla_backend_optimization_level": 1, "xla_llvm_disable_expensive_passes": True}
if jax.__version_info__ < (0, 10):  # XNNPACK takes weights that were updated in place for those that it packed before
    QUICKLY["xla_cpu_use_xnnpack"] = False


def compiled(fn: Callable[..., Any], **options: Any) -> Any:
    """Return the jitted function, compiled quickly on the CPU; `options` are those of `jax.jit`."""
    if jax.default_backend() != "cpu":
        return jax.jit(fn, **options)
    quickly = {} if jax.config.read("jax_disable_most_optimizations") else QUICKLY
    return jax.jit(fn, compiler_options=quickly | older_fusion(), **options)


@functools.cache
def older_fusion() -> dict[str, bool]:
    """Return the option for XLA's older way to write fused loops, which compiles faster; none where XLA has lost it."""
    option = {"xla_cpu_use_fusion_emitters": False}
    try:
        jax.jit(lambda: 0, compiler_options=option).lower().compile()
    except jax.errors.JaxRuntimeError:
        return {}
    return option


MOST_STEPS = 32  # of a loop whose values are kept, too
MOST_VALUES = 2**26  # numbers that are kept of one run: 0.5 GiB in float64

OTHER_DTYPES = "requires arguments to have the same dtypes"  # what jax.lax says of a float32 beside a float64

tap_p = Primitive("tap")
tap_p.def_impl(lambda value, **parameters: value)
tap_p.def_abstract_eval(lambda value, **parameters: value)
mlir.register_lowering(tap_p, lambda context, value, **parameters: [value])


def differentiate_tap(primals: Sequence[Any], tangents: Sequence[Any], **parameters: Any) -> tuple[Any, Any]:
    """Tap the value alone, so that the tangents need no rule for a transposition."""
    return tap_p.bind(primals[0], **parameters), tangents[0]


def batch_tap(values: Sequence[Any], axes: Sequence[int], **parameters: Any) -> tuple[Any, int]:
    """Put the batch axis in front: the recorded value has it there, wherever `vmap` had it."""
    return tap_p.bind(jnp.moveaxis(values[0], axes[0], 0), **parameters), 0


ad.primitive_jvps[tap_p] = differentiate_tap
batching.primitive_batchers[tap_p] = batch_tap


def tap(path: str, value: Any, kind: str = "", keep: Callable[[Any], bool] | None = None) -> Any:
    """Name every array of a nest after the path and its place in the nest: "lstm[1].h".

    What stands at several places, as the state and the output of a GRU's cell, is one value under several names.

    Args:
        path: of the module that returned the value.
        value: any nest. What is no array, and random keys, stay as they are.
        kind: the class name of the module.
        keep: whether a part of the nest is left alone with all that it holds, such as a module.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(value, is_leaf=keep)
    tapped: dict[int, Any] = {}
    for place, leaf in leaves:
        if is_array(leaf) and not (keep and keep(leaf)) and not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            array = jnp.asarray(tapped.get(id(leaf), leaf))
            tapped[id(leaf)] = tap_p.bind(array, path=path, place=name_place(place), kind=kind)
    return jax.tree.unflatten(structure, [tapped.get(id(leaf), leaf) for _, leaf in leaves])


def is_array(leaf: Any) -> bool:
    """Say whether a leaf is an array that a trace can take; Python's own numbers stay constants."""
    return isinstance(leaf, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct)


def name_place(place: Sequence[Any]) -> str:
    """Return the place of a leaf in its nest as it is written in Python: "[1].h"; keys of dicts come after a dot."""
    names = []
    for key in place:
        if hasattr(key, "idx"):
            names.append(f"[{key.idx}]")
        elif hasattr(key, "name"):
            names.append(f".{key.name}")
        else:
            names.append(f".{key.key}" if isinstance(key.key, str) else f"[{key.key}]")
    return "".join(names)


def name_leaves(nest: Any) -> dict[str, Any]:
    """Return the leaves of a nest by their places; a nest that is one array has the name ""."""
    return {name_place(place): leaf for place, leaf in jax.tree_util.tree_leaves_with_path(nest)}


class Module(NamedTuple):
    """A module that ran while a program was traced: the name of its class, and whether a library brought the class."""

    kind: str
    library: bool


class Modules(dict[str, Module]):
    """The modules that ran while a context was open, by path.

    Attributes:
        required: whether a trace in which none ran is refused.
        running: the path and the method of each call that has not returned yet.
        places_taps: False where the model has its own taps, with or without the context.
    """

    required = True
    places_taps = True

    def __init__(self) -> None:
        super().__init__()
        self.running: set[tuple[str, str]] = set()


def in_float64(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that in a float64 run computes in float64 wherever it asks for float32.

    Many models cast to float32 inside (a variance, a softmax) or have float32 as a setting, so that bfloat16 does no
    harm. In a float64 run such a cast would be the largest error of all, and hide everything below it.
    """

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with widen() if jax.config.read("jax_enable_x64") else nullcontext():
            try:
                return function(*args, **kwargs)
            except TypeError as error:
                if OTHER_DTYPES not in str(error):
                    raise
                with promoting():
                    return function(*args, **kwargs)

    return run


@contextlib.contextmanager
def promoting() -> Iterator[None]:
    """Let functions of jax.lax, which do not promote, take a constant that was made in float32 before.

    It is done only where it is needed, because it stands in the tracebacks that give operations their names.
    """
    bind = Primitive.bind

    def bind_wider(primitive: Primitive, *args: Any, **params: Any) -> Any:
        try:
            return bind(primitive, *args, **params)
        except TypeError as error:
            if OTHER_DTYPES not in str(error):
                raise
            wider = (arg.astype(np.float64) if arg.dtype == np.float32 else arg for arg in args)
            return bind(primitive, *wider, **params)

    Primitive.bind = bind_wider  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        Primitive.bind = bind  # type: ignore[method-assign]


@contextlib.contextmanager
def widen() -> Iterator[None]:
    """Let every function of JAX that is asked for float32 give float64.

    The constants of float64 itself become those of float32: a model whose eps is that of its dtype is used, and ported,
    with the one of float32.
    """
    canonical, finfo = dtypes.check_and_canonicalize_user_dtype, jnp.finfo
    inexact = dtypes.to_inexact_dtype

    def canonical_or_wider(dtype: Any, fun_name: Any = None) -> Any:
        canonical_dtype = canonical(dtype, fun_name)
        return np.dtype("float64") if canonical_dtype == np.float32 else canonical_dtype

    def finfo_of_float32(dtype: Any) -> Any:
        return finfo(np.float32 if jnp.result_type(dtype) == np.float64 else dtype)

    dtypes.check_and_canonicalize_user_dtype = canonical_or_wider

    def inexact_or_wider(dtype: Any) -> Any:  # whole numbers of 32 bits are divided in float32
        inexact_dtype = inexact(dtype)
        return np.dtype("float64") if inexact_dtype == np.float32 and np.dtype(dtype) != np.float32 else inexact_dtype

    jnp.finfo = finfo_of_float32  # type: ignore[assignment]
    dtypes.to_inexact_dtype = inexact_or_wider
    try:
        with widened(True):
            yield
    finally:
        dtypes.check_and_canonicalize_user_dtype, jnp.finfo = canonical, finfo
        dtypes.to_inexact_dtype = inexact


def scope(path: str) -> AbstractContextManager[Any]:
    """Mark the equations that are traced in it as those of a module, so that functions find their scope."""
    return jax.named_scope(f"⟦{path}⟧")


class TapInfo(NamedTuple):
    """The facts about a tap that are known before the program runs.

    Attributes:
        name: `block#2[1].h`: the path of a module, the number of its call from the second on, the place in its output.
        shape: with the steps of a scan in front.
        dtype: of the value.
        kind: the class name of the module, "function", or "checkpoint_name".
        steered: False where the value can only be recorded, because it is inside a function with a derivative of its
            own.
        steps: the length of the scan that stacks the values on the leading axis, or None.
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    kind: str
    steered: bool
    steps: int | None


class Made(NamedTuple):
    """The origin of a variable of a program: tensors alone, or also other values that met these tensors."""

    alone: bool
    tensors: frozenset[str]


UNSEEN = "no tap"  # stands for the operations that have none


class Meeting(NamedTuple):
    """The tensors that meet another value in an operation, and all that its result is made of."""

    met: frozenset[str]
    tensors: frozenset[str]


class Plan(NamedTuple):
    """The work of the walk in one jaxpr, at one place where it is called.

    Attributes:
        jaxpr: the program.
        taps: the index of an equation -> the name under which its output is visited.
        inner: the index of an equation -> the plans of the jaxprs in it that are walked.
    """

    jaxpr: Jaxpr
    taps: dict[int, str]
    inner: dict[int, list["Plan"]]

    def names(self) -> Iterator[str]:
        """Yield the names of all taps, those of inner plans included."""
        yield from self.taps.values()
        for plans in self.inner.values():
            for plan in plans:
                yield from plan.names()

    def adds_tiny(self) -> bool:
        """Say whether an equation of the walk takes a tiny constant."""
        taken = (variable for equation in self.jaxpr.eqns for variable in equation.invars)
        return any(map(is_tiny, taken)) or any(plan.adds_tiny() for plans in self.inner.values() for plan in plans)


TINY = 1e-10  # constants up to here only keep a divisor away from 0: float32 does not see them beside other values
TINY_CONSTANTS = -1  # stands for all of them, in place of the id of one


def is_tiny(variable: Any) -> bool:
    """Say whether a variable of a program is a tiny constant."""
    return isinstance(variable, Literal) and np.ndim(variable.val) == 0 and 0 < abs(variable.val) <= TINY


JITTED = {"jit", "pjit", "closed_call"}
INLINED = JITTED | {"core_closed_call", "core_call", "checkpoint", "remat", "remat2"}
CUSTOM = {"custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr", "custom_vmap_call"}
NAMED = {"name", "checkpoint_name3"}
IMAGE_AXES = 4  # batch, channel, row, column in some order
ROWS = 2  # axes of a batch of rows
NEW = -1  # an axis that an image did not have
# A value that is only rearranged says nothing new of where an error is born.
REARRANGING = {
    *("broadcast_in_dim", "convert_element_type", "copy", "dynamic_slice", "expand_dims", "iota", "reshape", "rev"),
    *("slice", "split", "squeeze", "stop_gradient", "transpose"),
}


def inner_jaxprs(equation: JaxprEqn) -> Iterator[Jaxpr]:
    """Yield the jaxprs among the parameters of an equation."""
    for parameter in equation.params.values():
        for part in parameter if isinstance(parameter, tuple | list) else (parameter,):
            if isinstance(part, ClosedJaxpr):
                yield part.jaxpr
            elif isinstance(part, Jaxpr):
                yield part


def flattened_orders(jaxpr: Jaxpr) -> set[tuple[int, ...]]:
    """Return in which orders of their first axes a program flattens images of four axes or more to rows.

    The order is what transposes, and convolutions that give another layout than they get, add up to. Where no array of
    so many axes becomes rows at once, it is sure only if none was turned; otherwise no order is returned.
    """
    flattened, turned = set[tuple[int, ...]](), set[tuple[int, ...]]()

    def axes_of(variable: Any) -> int:
        return int(variable.aval.ndim)

    def walk(jaxpr: Jaxpr, orders: dict[Any, tuple[int, ...]]) -> None:
        for equation in jaxpr.eqns:
            results: list[Any] = equation.outvars
            given: list[Any] = [variable for variable in equation.invars if isinstance(variable, Var)]
            images = [variable for variable in given if variable.aval.ndim >= IMAGE_AXES]
            if not images:
                continue
            image = max(images, key=lambda variable: variable.aval.size)
            order = orders.get(image, tuple(range(image.aval.ndim)))
            if equation.primitive.name == "transpose":
                order = tuple(order[axis] for axis in equation.params["permutation"])
            elif equation.primitive.name == "conv_general_dilated":
                layout = equation.params["dimension_numbers"]
                order = tuple(order[layout.lhs_spec[layout.out_spec.index(axis)]] for axis in range(len(order)))
            elif equation.primitive.name == "broadcast_in_dim":  # to a window of more axes, and back
                places = equation.params["broadcast_dimensions"]
                axes = range(len(equation.params["shape"]))
                order = tuple(order[places.index(axis)] if axis in places else NEW for axis in axes)
            elif equation.primitive.name == "squeeze":
                gone = equation.params["dimensions"]
                order = tuple(number for axis, number in enumerate(order) if axis not in gone)
            elif equation.primitive.name == "reshape" and results[0].aval.ndim == ROWS:
                own = [number for number in order if number != NEW]
                flattened.add(tuple(sorted(own).index(number) for number in own))
            turned.add(order)
            orders |= {variable: order for variable in results if variable.aval.ndim == len(order)}
            for inner in inner_jaxprs(equation):
                within: dict[Any, tuple[int, ...]] = {}
                if len(inner.invars) == len(equation.invars):
                    pairs = zip(inner.invars, equation.invars, strict=True)
                    known = [(one, orders[other]) for one, other in pairs if isinstance(other, Var) and other in orders]
                    within = {one: order[len(order) - axes_of(one) :] for one, order in known}  # a scan took one
                walk(inner, within)
                if len(inner.outvars) == len(equation.outvars):
                    ends = zip(equation.outvars, inner.outvars, strict=True)
                    known = [(one, within[other]) for one, other in ends if isinstance(other, Var) and other in within]
                    orders |= {one: (NEW,) * (axes_of(one) - len(order)) + order for one, order in known}

    walk(jaxpr, {})
    as_they_are = all(list(order) == sorted(order) for order in turned if NEW not in order)
    return flattened or ({tuple(range(IMAGE_AXES))} if as_they_are else set())


def first_uses(jaxpr: Jaxpr) -> dict[Var, tuple[int, ...]]:
    """Return where each argument of a program first meets another value: numbers of equations, the outer one first.

    What is computed of one argument alone, such as its transpose, counts as the argument.
    """
    sources: dict[Any, Var] = {variable: variable for variable in jaxpr.invars}
    uses: dict[Var, tuple[int, ...]] = {}
    for number, equation in enumerate(jaxpr.eqns):
        given = {variable for variable in equation.invars if isinstance(variable, Var)}
        made_of = {sources[variable] for variable in given if variable in sources}
        if given <= sources.keys() and len(made_of) == 1:
            sources |= dict.fromkeys(equation.outvars, made_of.pop())
            continue
        inner = [part for part in inner_jaxprs(equation) if len(part.invars) == len(equation.invars)]
        within = first_uses(inner[0]) if inner else {}
        places = [
            ((number, *(within.get(inner[0].invars[n], ()) if inner else ()), n), sources[variable])
            for n, variable in enumerate(equation.invars)
            if isinstance(variable, Var) and variable in sources
        ]
        for place, source in sorted(places, key=lambda pair: pair[0]):
            uses.setdefault(source, place)
    return uses


class Planner:
    """Number the taps of a traced program in the order of the walk, and name the functions between modules."""

    def __init__(self, modules: Mapping[str, Module], stacks: Collection[tuple[int, ...]] = ()) -> None:
        self.stacks = stacks
        self.constants: list[Any] = []  # of the jaxprs that are walked, but for the outermost
        self.counts: Counter[str] = Counter()
        self.taps: dict[str, TapInfo] = {}
        self.notes: dict[str, None] = {}
        self.calls: list[tuple[str, str]] = []
        self.first_places: dict[str, str] = {}
        self.meetings: dict[str, Meeting] = {}
        self.met_unseen: frozenset[str] = frozenset()
        self.holds: dict[int, bool] = {}
        parents = {path[:end] for path in modules for end in range(len(path)) if path[end] == "/"} | {""}
        self.libraries = {path for path, module in modules.items() if module.library}
        self.closed = self.libraries - parents

    def plan(
        self,
        jaxpr: Jaxpr,
        scope: str | None,
        steps: tuple[int, ...] = (),
        steered: bool = True,
        made: dict[Any, Made] | None = None,
    ) -> Plan:
        """Plan the walk through one jaxpr.

        Args:
            jaxpr: the program.
            scope: the path of the module that it is part of; None outside of the model.
            steps: the lengths of the scans around it.
            steered: whether values in it can be replaced.
            made: what its variables are made of; it is filled.
        """
        plan = Plan(jaxpr, {}, {})
        made = {} if made is None else made
        scopes = [find_scope(equation, scope) for equation in jaxpr.eqns]
        entered = [self.enters(equation, owner) for equation, owner in zip(jaxpr.eqns, scopes, strict=True)]
        functions, values = self.find_functions(jaxpr, scopes, entered)
        idle, meetings = find_idle_taps(jaxpr), list[tuple[int, Meeting]]()
        for index, (equation, owner) in enumerate(zip(jaxpr.eqns, scopes, strict=True)):
            parameters = equation.params
            met = meet(equation, made)
            if index in idle:
                continue
            if equation.primitive is tap_p:
                plan.taps[index] = self.add_module(equation, steps, steered)
            elif equation.primitive.name in NAMED and owner not in self.closed:
                name = join(owner or "", parameters["name"])
                plan.taps[index] = self.add(name, "", "checkpoint_name", equation, steps, steered)
            elif entered[index]:
                plan.inner[index] = self.plan_inner(equation, owner, steps, steered, made)
                continue
            elif index in functions:
                plan.taps[index] = self.add(functions[index], "", "function", equation, steps, steered)
            if met and index in values:
                meetings.append((values[index], Meeting(met, made[equation.outvars[0]].tensors)))
            else:  # as where nothing uses the value
                self.met_unseen |= met
        self.meetings |= {plan.taps[index]: meeting for index, meeting in meetings}
        return plan

    def enters(self, equation: JaxprEqn, scope: str | None) -> bool:
        """Say whether an equation is walked; note what holds taps and cannot be."""
        name = equation.primitive.name
        tapped = any(map(self.holds_taps, inner_jaxprs(equation)))
        if name in INLINED | {"scan", "cond"}:
            users = scope is not None and scope not in self.closed
            return tapped or (users and any(is_users(jaxpr, self.foreign) for jaxpr in inner_jaxprs(equation)))
        if name in CUSTOM:
            return tapped
        if tapped:
            self.notes[f"{name}{in_scope(scope)} is not entered: the values inside it are not seen"] = None
        return False

    def holds_taps(self, jaxpr: Jaxpr) -> bool:
        """Say whether a tap is anywhere in a jaxpr."""
        if id(jaxpr) not in self.holds:
            self.holds[id(jaxpr)] = any(
                equation.primitive is tap_p
                or equation.primitive.name in NAMED
                or any(map(self.holds_taps, inner_jaxprs(equation)))
                for equation in jaxpr.eqns
            )
        return self.holds[id(jaxpr)]

    def plan_inner(
        self,
        equation: JaxprEqn,
        scope: str | None,
        steps: tuple[int, ...],
        steered: bool,
        made: dict[Any, Made],
    ) -> list[Plan]:
        """Plan the walk through the jaxprs of one equation."""
        name, jaxprs = equation.primitive.name, list(inner_jaxprs(equation))
        for closed in jax.tree.leaves([*equation.params.values()], is_leaf=lambda part: isinstance(part, ClosedJaxpr)):
            self.constants += closed.consts if isinstance(closed, ClosedJaxpr) else []
        if name == "scan":
            length = equation.params["length"]
            if self.is_stack(equation):
                return [self.plan(jaxprs[0], scope, steps, steered) for _ in range(length)]
            return [self.plan(jaxprs[0], scope, (*steps, length), steered)]
        if (chosen := branch_of_platform(equation)) is not None:
            return [self.plan(jaxprs[chosen], scope, steps, steered)]
        if name == "cond":
            before, after, plans = self.counts.copy(), self.counts.copy(), []
            for jaxpr in jaxprs:  # the same module in two branches is one tap
                self.counts = before.copy()
                plans.append(self.plan(jaxpr, scope, steps, steered))
                after |= self.counts
            self.counts = after
            return plans
        if name in CUSTOM:
            self.notes[f"{name}{in_scope(scope)} has a rule of its own: the values inside it are recorded only"] = None
            return [self.plan(jaxprs[0], scope, steps, False)]
        given = zip(jaxprs[0].invars, equation.invars, strict=True)
        inside = {one: made[other] for one, other in given if isinstance(other, Var) and other in made}
        plan = self.plan(jaxprs[0], scope, steps, steered, inside)
        results = zip(jaxprs[0].outvars, equation.outvars, strict=True)
        made |= {other: inside[one] for one, other in results if isinstance(one, Var) and one in inside}
        return [plan]

    def is_stack(self, equation: JaxprEqn) -> bool:
        """Say whether a scan goes through stacked layers: all floats that it is given for each step are such leaves."""
        first = equation.params["num_consts"] + equation.params["num_carry"]
        shapes = [value.shape for value in shapes_of(equation.invars[first:]) if is_float(value)]
        return len(shapes) > 1 and {*shapes} <= {*self.stacks} and not equation.params["reverse"]

    def add_module(self, equation: JaxprEqn, steps: tuple[int, ...], steered: bool) -> str:
        """Add the tap of a module's output, and the call of the module if this is the first leaf of the output."""
        path, place, kind = (equation.params[key] for key in ("path", "place", "kind"))
        if self.first_places.setdefault(path, place) == place:
            self.calls.append((path, kind if path in self.libraries else f"own {kind}"))
        return self.add(path, place, kind, equation, steps, steered)

    def add(self, path: str, place: str, kind: str, equation: JaxprEqn, steps: tuple[int, ...], steered: bool) -> str:
        """Add one tap and return its name."""
        self.counts[path + place] += 1
        count = self.counts[path + place]
        name = f"{path}{f'#{count}' if count > 1 else ''}{place}"
        value: Any = equation.outvars[0].aval
        info = TapInfo(name, (*steps, *value.shape), value.dtype, kind, steered, steps[0] if steps else None)
        self.taps.setdefault(name, info)
        return name

    @functools.cached_property
    def foreign(self) -> tuple[str, ...]:
        """Return the paths of code that is not the user's: of JAX, its wrappers, the libraries and this harness."""
        return (*BEHIND_JAX, folder_of("jax"), *library_folders(), HARNESS)

    def find_functions(
        self, jaxpr: Jaxpr, scopes: Sequence[str | None], entered: Sequence[bool]
    ) -> tuple[dict[int, str], dict[int, int]]:
        """Return the index of the equation that gives a function's value -> the function's name.

        Neighbouring equations that come from one call in the user's source are one function. The second part says for
        each equation which one gives the value of its function.
        """
        groups: list[tuple[Any, list[int]]] = []
        for index, (equation, owner) in enumerate(zip(jaxpr.eqns, scopes, strict=True)):
            site = None
            if (
                owner is not None
                and owner not in self.closed
                and not entered[index]
                and equation.primitive is not tap_p
            ):
                site = find_site(equation, self.foreign if owner not in self.libraries else self.foreign[:3])
            if site is None:
                groups.append((None, []))
                continue
            repeated = groups and groups[-1][1] and repeats(equation, jaxpr.eqns[groups[-1][1][0]])
            if groups and groups[-1][0] == (owner, site) and not repeated:
                groups[-1][1].append(index)
            else:
                groups.append(((owner, site), [index]))
        last_uses = find_last_uses(jaxpr)
        functions, values = {}, dict[int, int]()
        for key, indices in groups:
            value = find_value(jaxpr, indices, last_uses)
            if value is not None:
                functions[value] = join(key[0], key[1].label)
                values |= dict.fromkeys(indices, value)
        return functions, values


def meet(equation: JaxprEqn, made: dict[Any, Made]) -> frozenset[str]:
    """Return the tensors that meet another value in an equation, or rows of them; note what it makes.

    A sum of two values, as at the end of a residual branch, is made of none of their tensors.
    """
    given = [made.get(one, Made(False, frozenset())) for one in equation.invars if isinstance(one, Var)]
    met = frozenset[str]().union(*(one.tensors for one in given if one.alone))
    others = {one.tensors for one in given if not one.alone}
    behind = next(iter(others)) if len(others) == 1 else frozenset[str]()
    made |= dict.fromkeys(equation.outvars, Made(not others, behind | met))
    return met if others or equation.primitive.name == "gather" else frozenset()


def join(scope: str, label: str) -> str:
    """Return the name of a value in a scope."""
    return f"{scope}.{label}" if scope else label


def in_scope(scope: str | None) -> str:
    """Return where something is, for a message."""
    return f" in {scope}" if scope else ""


def find_scope(equation: JaxprEqn, outer: str | None) -> str | None:
    """Return the path of the module that an equation is part of; that of the surrounding jaxpr if it has none."""
    for part in reversed(equation.source_info.name_stack.stack):
        name = getattr(part, "name", "")
        if name.startswith("⟦"):
            return name[1:-1]
    return outer


def folder_of(package: str) -> str:
    """Return the folder of a loaded package, with a separator at its end."""
    return os.path.dirname(sys.modules[package].__file__ or "") + os.sep


HARNESS = os.path.dirname(__file__) + os.sep
BEHIND_JAX = (contextlib.__file__, functools.__file__)


def library_folders() -> Iterator[str]:
    """Yield the folders of the libraries that are loaded."""
    for package in ("flax", "equinox", "haiku", "jaxtyping", "beartype"):
        if package in sys.modules:
            yield folder_of(package)


def is_users(jaxpr: Jaxpr, foreign: tuple[str, ...]) -> bool:
    """Say whether a jaxpr was traced from a function in the user's own source."""
    file_name = jaxpr.debug_info.func_filename or ""
    return bool(file_name) and not file_name.startswith(foreign)


class Site(NamedTuple):
    """One call in the source: the code object, the position in it, and the name of the function that is called."""

    code: Hashable
    position: int
    label: str


def find_site(equation: JaxprEqn, foreign: tuple[str, ...]) -> Site | None:
    """Return the call in the user's source that an equation comes from, or None."""
    if equation.source_info.traceback is None:
        return None
    codes, positions = equation.source_info.traceback.raw_frames()  # the innermost first
    for depth, code in enumerate(codes):
        if code.co_name == "bind_wider":
            continue
        if code.co_filename.startswith(HARNESS):
            return None
        if not code.co_filename.startswith(foreign):
            return Site(code, positions[depth], find_label(equation, [inner.co_name for inner in codes[:depth]][::-1]))
    return None


# Frames of JAX, and of `promoting`, that stand between a call and the function that it calls.
BETWEEN = {"op", "meth", "fn", "wrapper", "reraise_with_filtered_traceback", "deferring_binary_op", "<lambda>"}
BETWEEN |= {"bind_wider"}
OPERATORS = {"truediv": "div", "radd": "add", "rsub": "sub", "rmul": "mul", "rtruediv": "div", "rmatmul": "matmul"}


def find_label(equation: JaxprEqn, callees: Sequence[str]) -> str:
    """Return the name of the function that gave an equation, as a user would call it: "gelu", "add", "softmax".

    Args:
        equation: the equation.
        callees: the names of the functions between the user's line and the equation, the outermost first.
    """
    for callee in callees:
        if callee in BETWEEN:
            continue
        if callee.startswith("_operator_"):
            name = callee.removeprefix("_operator_")
            return OPERATORS.get(name, name)
        if callee in ("_mean", "_sum", "_max", "_min", "_std", "_var", "_prod", "_getitem"):
            return callee[1:]
        if not callee.startswith("_") and callee not in ("cache_miss", "bind", "bind_with_trace", "tree_map"):
            return callee
        break
    name = equation.primitive.name
    if name in CUSTOM:
        return inner_name(equation)
    if name in ("jit", "pjit"):
        return str(equation.params["name"])
    return {"dot_general": "matmul", "logistic": "sigmoid", "reduce_sum": "sum", "reduce_max": "max"}.get(name, name)


def inner_name(equation: JaxprEqn) -> str:
    """Return the name of the function that an equation with a derivative of its own calls."""
    return next(inner_jaxprs(equation)).debug_info.func_name


def repeats(equation: JaxprEqn, first: JaxprEqn) -> bool:
    """Say whether an equation begins the same call again, as in a Python loop."""
    traces: list[Any] = [equation.source_info.traceback, first.source_info.traceback]
    return equation.primitive is first.primitive and traces[0].raw_frames() == traces[1].raw_frames()


def find_last_uses(jaxpr: Jaxpr) -> dict[Var, int]:
    """Return the index of the last equation that uses each variable; the number of equations for an output."""
    uses = {}
    for index, equation in enumerate(jaxpr.eqns):
        uses.update({variable: index for variable in equation.invars if not isinstance(variable, Literal)})
    uses.update({variable: len(jaxpr.eqns) for variable in jaxpr.outvars if not isinstance(variable, Literal)})
    return uses


def find_idle_taps(jaxpr: Jaxpr) -> set[int]:
    """Return the indices of taps whose value no output needs, where another call of the same module gives one."""
    needed = {variable for variable in jaxpr.outvars if not isinstance(variable, Literal)}
    idle: dict[int, tuple[str, str]] = {}
    used: set[tuple[str, str]] = set()
    for index in reversed(range(len(jaxpr.eqns))):
        equation = jaxpr.eqns[index]
        place = (equation.params["path"], equation.params["place"]) if equation.primitive is tap_p else ("", "")
        if equation.effects or not needed.isdisjoint(equation.outvars):
            needed.update(variable for variable in equation.invars if not isinstance(variable, Literal))
            used.add(place)
        elif equation.primitive is tap_p:
            idle[index] = place
    return {index for index, place in idle.items() if place in used}


def find_value(jaxpr: Jaxpr, indices: Sequence[int], last_uses: Mapping[Var, int]) -> int | None:
    """Return the index of the equation whose output is the value of a function, or None if it only rearranges."""
    if all(jaxpr.eqns[index].primitive.name in REARRANGING for index in indices):
        return None
    for index in reversed(indices):
        outputs: list[Any] = jaxpr.eqns[index].outvars
        if len(outputs) == 1 and last_uses.get(outputs[0], -1) > indices[-1]:
            return index if is_float(outputs[0].aval) else None
    return None


# What is recorded of a value (or None), and what is handed on in its place. It gets the name, the value, and the slot.
Rule = Callable[[str, Array, Any], tuple[Any, Array]]


@dataclass
class Walk:
    """One run through a planned program.

    Attributes:
        rule: says what to record of each value and what to hand on.
        slots: name of a tap -> arrays for the rule; those of taps in a scan have the steps in front.
        steered: False where what the rule hands on is not used.
        records: what the rule recorded, in the order of the walk.
        moved: constants of the program, by their ids, and what takes their places; the factor of tiny ones.
    """

    rule: Rule
    slots: Mapping[str, Any]
    steered: bool = True
    records: dict[str, Any] = field(default_factory=dict)
    moved: Mapping[int, Any] = field(default_factory=dict)

    def run(self, plan: Plan, constants: Sequence[Any], arguments: Sequence[Any]) -> list[Any]:
        """Evaluate a jaxpr."""
        constants = [self.moved.get(id(constant), constant) for constant in constants]
        values: dict[Var, Any] = dict(zip(plan.jaxpr.constvars, constants, strict=True))
        values.update(zip(plan.jaxpr.invars, arguments, strict=True))
        share = self.moved.get(TINY_CONSTANTS, 1.0)

        def read(variable: Var | Literal) -> Any:
            if isinstance(variable, Literal):
                return variable.val * share if share != 1.0 and is_tiny(variable) else variable.val
            return values[variable]

        for index, equation in enumerate(plan.jaxpr.eqns):
            inputs = [read(variable) for variable in equation.invars]
            if equation.primitive is tap_p:
                outputs = inputs
            elif index in plan.inner:
                outputs = self.enter(equation, plan.inner[index], inputs)
            else:
                outputs = self.bind(equation, inputs)
            if index in plan.taps:
                outputs = [self.visit(plan.taps[index], outputs[0])]
            values.update(zip(equation.outvars, outputs, strict=True))
        return [read(variable) for variable in plan.jaxpr.outvars]

    def bind(self, equation: JaxprEqn, inputs: list[Any]) -> list[Any]:
        """Evaluate an equation that is not walked."""
        return bind(equation, inputs)

    def visit(self, name: str, value: Array) -> Array:
        """Record a value, and return what is handed on."""
        record, replaced = self.rule(name, value, self.slots.get(name))
        if record is not None:
            self.records[name] = record
        return replaced if self.steered else value

    def enter(self, equation: JaxprEqn, plans: Sequence[Plan], inputs: list[Any]) -> list[Any]:
        """Evaluate an equation whose jaxprs are walked."""
        name = equation.primitive.name
        if name == "scan":
            return self.scan(equation, plans, inputs)
        if (chosen := branch_of_platform(equation)) is not None:
            return self.run(plans[0], equation.params["branches"][chosen].consts, inputs[1:])
        if name == "cond":
            return self.switch(equation, plans, inputs)
        jaxpr = equation.params["jaxpr"] if "jaxpr" in equation.params else first_closed(equation)
        constants = jaxpr.consts if isinstance(jaxpr, ClosedJaxpr) else ()
        if name in CUSTOM:
            aside = Walk(self.rule, self.slots, False, self.records, self.moved)
            aside.run(plans[0], constants, [lax.stop_gradient(value) for value in inputs])
            return bind(equation, inputs)
        return self.run(plans[0], constants, inputs)

    def scan(self, equation: JaxprEqn, plans: Sequence[Plan], inputs: list[Any]) -> list[Any]:
        """Evaluate a scan: slots go in as one more input of each step, and records come out stacked.

        With a plan for each step, the steps are layers, which run one after the other.
        """
        parameters = equation.params
        first, second = parameters["num_consts"], parameters["num_consts"] + parameters["num_carry"]
        constants, carry, sequences = inputs[:first], inputs[first:second], inputs[second:]
        if len(plans) > 1:
            results = []
            for number, plan in enumerate(plans):
                layer = [sequence[number] for sequence in sequences]
                outputs = self.run(plan, parameters["jaxpr"].consts, [*constants, *carry, *layer])
                carry = outputs[: second - first]
                results.append(outputs[second - first :])
            return [*carry, *map(jnp.stack, zip(*results, strict=True))]
        (plan,) = plans
        slots = {name: self.slots[name] for name in plan.names() if name in self.slots}

        def step(carry: list[Any], inputs: tuple[list[Any], dict[str, Any]]) -> tuple[list[Any], Any]:
            walk = Walk(self.rule, inputs[1], self.steered, moved=self.moved)
            outputs = walk.run(plan, parameters["jaxpr"].consts, [*constants, *carry, *inputs[0]])
            return outputs[: second - first], (outputs[second - first :], walk.records)

        options = {name: parameters[name] for name in ("length", "reverse", "unroll")}
        carry, (stacked, records) = lax.scan(step, carry, (sequences, slots), **options)
        self.records.update(records)
        return [*carry, *stacked]

    def switch(self, equation: JaxprEqn, plans: Sequence[Plan], inputs: list[Any]) -> list[Any]:
        """Evaluate a cond: every branch returns the records of all, zeros where it did not run."""
        index, *arguments = inputs

        def branch(plan: Plan, constants: Sequence[Any]) -> Callable[..., tuple[list[Any], dict[str, Any]]]:
            def run(*arguments: Any) -> tuple[list[Any], dict[str, Any]]:
                walk = Walk(self.rule, self.slots, self.steered, moved=self.moved)
                return walk.run(plan, constants, arguments), walk.records

            return run

        closed = equation.params["branches"]
        branches = [branch(plan, jaxpr.consts) for plan, jaxpr in zip(plans, closed, strict=True)]
        shapes: dict[str, Any] = {}
        for run in branches:
            shapes.update(jax.eval_shape(run, *arguments)[1])

        def complete(run: Callable[..., Any]) -> Callable[..., Any]:
            def run_complete(*arguments: Any) -> tuple[list[Any], dict[str, Any]]:
                outputs, records = run(*arguments)
                absent = {name: shape for name, shape in shapes.items() if name not in records}
                return outputs, records | jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), absent)

            return run_complete

        outputs, records = lax.switch(index, [complete(run) for run in branches], *arguments)
        self.records.update({name: records[name] for name in shapes})
        return outputs


@dataclass
class Collector(Walk):
    """A walk that goes into every function and short loop, and keeps the values of all equations there."""

    kept: dict[int, Any] = field(default_factory=dict)  # by their ids

    def bind(self, equation: JaxprEqn, inputs: list[Any]) -> list[Any]:
        """Evaluate an equation, the inside of a function too."""
        outputs = None
        if equation.primitive.name == "scan":
            outputs = self.scan(equation, [Plan(equation.params["jaxpr"].jaxpr, {}, {})], inputs)
        elif equation.primitive.name in INLINED | CUSTOM:
            inner = first_closed(equation)
            jaxpr, constants = (inner.jaxpr, inner.consts) if isinstance(inner, ClosedJaxpr) else (inner, ())
            if len(jaxpr.invars) == len(inputs) and len(jaxpr.constvars) == len(constants):
                outputs = self.run(Plan(jaxpr, {}, {}), constants, inputs)
        if outputs is None:
            outputs = bind(equation, inputs)
        self.kept.update({id(output): output for output in outputs})
        return outputs

    def enter(self, equation: JaxprEqn, plans: Sequence[Plan], inputs: list[Any]) -> list[Any]:
        """Evaluate an equation whose jaxprs are walked; no gradient is asked for."""
        if equation.primitive.name not in CUSTOM:
            return super().enter(equation, plans, inputs)
        inner = first_closed(equation)
        return self.run(plans[0], inner.consts if isinstance(inner, ClosedJaxpr) else (), inputs)

    def scan(self, equation: JaxprEqn, plans: Sequence[Plan], inputs: list[Any]) -> list[Any]:
        """Evaluate a scan, a short one step by step: the values of each step are kept."""
        parameters = equation.params
        if not 0 < parameters["length"] <= MOST_STEPS:
            return super().scan(equation, plans, inputs)
        first, second = parameters["num_consts"], parameters["num_consts"] + parameters["num_carry"]
        constants, carry, sequences = inputs[:first], inputs[first:second], inputs[second:]
        results: dict[int, list[Any]] = {}
        for number in reversed(range(parameters["length"])) if parameters["reverse"] else range(parameters["length"]):
            plan = plans[number] if len(plans) > 1 else plans[0]
            slots = self.slots
            if len(plans) == 1:  # a slot has the steps in front
                slots = {name: slots[name][number] for name in plan.names() if name in slots}
            walk = Collector(self.rule, slots, self.steered, moved=self.moved, kept=self.kept)
            step = [sequence[number] for sequence in sequences]
            outputs = walk.run(plan, parameters["jaxpr"].consts, [*constants, *carry, *step])
            carry, results[number] = outputs[: second - first], outputs[second - first :]
        stacked = zip(*(results[number] for number in sorted(results)), strict=True)
        return [*carry, *map(jnp.stack, stacked)]

    def visit(self, name: str, value: Array) -> Array:
        """Keep what is handed on as well."""
        replaced = super().visit(name, value)
        self.kept[id(replaced)] = replaced
        return replaced


def values_inside(
    traced: "Traced", sizes: Collection[int], batch: int, given: Mapping[str, Any], *args: Any
) -> list[np.ndarray]:
    """Return all float values of these sizes, or of the batch and several axes, in a run that goes on with given ones.

    There are none if they would take too much memory.

    Args:
        traced: the program.
        sizes: of the values.
        batch: the first axis of values of other sizes.
        given: what is handed on at taps, by name.
        args: of the program.
    """

    def is_wanted(value: Any) -> bool:
        if not is_array(value) or not is_float(value):
            return False
        return value.size in sizes or (value.ndim > 2 and value.shape[0] == batch)

    def program(arrays: list[Any], slots: dict[str, Any]) -> list[Any]:
        walk = Collector(lambda name, value, slot: (None, value if slot is None else slot), slots, moved=traced.moved)
        walk.run(traced.plan, traced.constants, arrays)
        return [value for value in walk.kept.values() if is_wanted(value)]

    slots = {name: jnp.asarray(value, traced.taps[name].dtype) for name, value in given.items()}
    if sum(value.size for value in jax.eval_shape(program, arrays_of(args), slots)) > MOST_VALUES:
        return []
    return [np.asarray(value) for value in compiled(rewrite(program))(arrays_of(args), slots)]


def branch_of_platform(equation: JaxprEqn) -> int | None:
    """Return which branch of `lax.platform_dependent` runs on this platform, or None for every other equation."""
    platforms = equation.params.get("branches_platforms") if equation.primitive.name == "cond" else None
    if platforms is None:
        return None
    here = {jax.default_backend()}
    if here == {"gpu"}:
        here = {"rocm" if "rocm" in jax.devices()[0].client.platform_version.lower() else "cuda"}
    return next(index for index, names in enumerate(platforms) if names is None or here.intersection(names))


def first_closed(equation: JaxprEqn) -> ClosedJaxpr | Jaxpr:
    """Return the first jaxpr among the parameters of an equation."""
    return next(part for part in equation.params.values() if isinstance(part, ClosedJaxpr | Jaxpr))


def arrays_of(nest: Any) -> list[Any]:
    """Return the arrays of a nest; Python's numbers, strings and functions in it are constants."""
    return [leaf for leaf in jax.tree.leaves(nest) if is_array(leaf)]


@dataclass(frozen=True)
class Traced:
    """A function that was traced once with the taps of a library.

    Attributes:
        taps: what is known of each tap, in the order of the walk. Repeated calls are "block#2", "block#3".
        notes: what was not entered, or is recorded only, and why.
        calls: the path and the class name ("own Linear" if it is no library's) of each call of a module, in the order
            in which they return.
        plan: of the walk.
        constants: of the traced program.
        structure: of the outputs.
        shapes: of the arguments' arrays.
        plain: the function without taps, of the arguments' arrays; None if the model has taps of its own.
        inner_constants: of the jaxprs inside that are walked.
        moved: what takes the places of constants, by their ids; the factor of tiny ones.
        meetings: the tensors that meet other values at a tap, outside of a library's layers.
    """

    taps: dict[str, TapInfo]
    notes: tuple[str, ...]
    calls: list[tuple[str, str]]
    plan: Plan
    constants: list[Any]
    structure: Any
    shapes: list[tuple[int, ...]]
    plain: Callable[..., Any] | None
    inner_constants: list[Any] = field(default_factory=list)
    moved: Mapping[int, Any] = field(default_factory=dict)
    meetings: Mapping[str, Meeting] = field(default_factory=dict)

    @property
    def float32_constants(self) -> dict[int, Any]:
        """Return the constants that were rounded to float32 in any run, such as a table of sines, by their ids."""
        constants = {id(constant): constant for constant in [*self.constants, *self.inner_constants]}
        floats = {key: constant for key, constant in constants.items() if is_array(constant) and is_float(constant)}
        return {key: constant for key, constant in floats.items() if keeps_float32(constant)}

    @property
    def flattened_orders(self) -> set[tuple[int, ...]]:
        """Return in which orders of their first axes the program flattens images to rows; empty if that is not sure."""
        return flattened_orders(self.plan.jaxpr)

    @property
    def order_of_use(self) -> list[int]:
        """Return the numbers of the arguments' arrays in the order in which the program uses them first."""
        uses = first_uses(self.plan.jaxpr)
        numbers = {number: uses[variable] for number, variable in enumerate(self.plan.jaxpr.invars) if variable in uses}
        return sorted(numbers, key=numbers.__getitem__)

    @property
    def outputs(self) -> Any:
        """Return the shapes and dtypes of the outputs, in their nest."""
        return jax.tree.unflatten(self.structure, shapes_of(self.plan.jaxpr.outvars))

    def run(self, *args: Any, rule: Rule, slots: Mapping[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Run the program once more under a rule; arguments in the nest and the shapes that were traced.

        Args:
            args: the arguments of the traced function.
            rule: (name, value, slot) -> (record or None, what is handed on).
            slots: name -> arrays for the rule.

        Returns:
            The outputs of the function, and the records by name, in the order of the walk.

        Raises:
            Refused: the arguments have other shapes than those that were traced.
        """
        arrays = arrays_of(args)
        if [np.shape(array) for array in arrays] != self.shapes:
            raise Refused("the function was traced on arguments of other shapes")
        walk = Walk(rule, slots or {}, moved=self.moved)
        outputs = walk.run(self.plan, self.constants, arrays)
        return jax.tree.unflatten(self.structure, outputs), {
            name: walk.records[name] for name in self.taps if name in walk.records
        }

    def verify(self, *args: Any, outputs: Any = None) -> None:
        """Compare the function with and without taps, both jitted.

        Args:
            args: the arguments of the traced function.
            outputs: the outputs of a run with taps for another purpose. If they are the same, no other run is needed.

        Raises:
            Refused: the outputs differ by more than rounding.
        """
        if self.plain is None:
            return
        arrays = arrays_of(args)
        plain = compiled(self.plain)(*arrays)
        if outputs is None or find_other_output(outputs, plain) is not None:
            outputs, _ = compiled(functools.partial(self.run, rule=lambda name, value, slot: (value, value)))(*arrays)
        if (name := find_other_output(outputs, plain)) is not None:
            raise Refused(f"output{name} of the JAX model is not the same once its modules are watched")


Context = Callable[[], AbstractContextManager[Modules | None]]


def trace(
    fn: Callable[..., Any],
    *args: Any,
    context: Context = nullcontext,
    verify: bool = True,
    stacks: Collection[tuple[int, ...]] = (),
    tensors: Collection[str] = (),
) -> Traced:
    """Trace a function once, with the outputs of all modules tapped and the functions between them named.

    Args:
        fn: returns any nest of arrays.
        args: nests of arrays (or of shapes, with `verify` off). Other leaves are constants.
        context: opens the taps of a library; what it yields fills with the modules that ran. None for functions
            without a library, in which taps are placed by hand.
        verify: compare the function with and without taps (`Traced.verify`).
        stacks: the shapes of leaves that stack layers. A scan through them is run layer by layer.
        tensors: the names of the first arrays among the arguments.

    Raises:
        Refused: no module of a library ran, or the outputs differ by more than rounding.
    """
    leaves, structure = jax.tree.flatten(args)

    def on_arrays(*arrays: Any) -> Any:
        remaining = iter(arrays)
        return fn(*jax.tree.unflatten(structure, [next(remaining) if is_array(leaf) else leaf for leaf in leaves]))

    arrays = arrays_of(args)
    with session(object()), context() as modules:
        closed, shape = jax.make_jaxpr(lambda *arrays: on_arrays(*arrays), return_shape=True)(*arrays)
    planner = Planner(modules or {}, stacks)
    origins = dict.fromkeys(closed.jaxpr.constvars, Made(True, frozenset()))
    origins |= {one: Made(True, frozenset({name})) for one, name in zip(closed.jaxpr.invars, tensors, strict=False)}
    plan = planner.plan(closed.jaxpr, None, made=origins)
    if modules is not None and modules.required and not planner.calls:
        raise Refused("the JAX model ran without calling a module that can be seen: none of its values has a name")
    traced = Traced(
        planner.taps,
        tuple(planner.notes),
        planner.calls,
        plan,
        closed.consts,
        jax.tree.structure(shape),
        [np.shape(array) for array in arrays],
        on_arrays if modules is None or modules.places_taps else None,
        planner.constants,
        meetings={**planner.meetings, UNSEEN: Meeting(planner.met_unseen, frozenset())},
    )
    if verify:
        traced.verify(*args)
    return traced


def find_other_output(captured: Any, plain: Any) -> str | None:
    """Return the place of an output that is not the same with taps and without, or None.

    What is not finite without taps is not judged: the compiler may let a maximum swallow a NaN or not.
    """
    expected = name_leaves(plain)
    for name, value in name_leaves(captured).items():
        if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
            continue
        if not jnp.issubdtype(value.dtype, jnp.inexact):
            same = np.array_equal(value, expected[name])
        else:
            finite = np.isfinite(expected[name])
            right = np.where(finite, expected[name], 0)
            limit = ROUNDING * float(jnp.finfo(value.dtype).eps) * float(np.max(np.abs(right), initial=0.0))
            same = np.allclose(np.where(finite, value, 0), right, rtol=0.0, atol=limit)
        if not same:
            return name
    return None


# `swap(value, probe, given, gradient, forward, backward)` hands on the given value if `forward`. Its derivative is that
# of `hand`, whose transposition makes what arrives the gradient by the probe, and hands on the given gradient if
# `backward`. They are primitives, so that a value without a derivative stays without one behind the swap.
swap_p, hand_p = Primitive("swap"), Primitive("hand")
swap_p.def_abstract_eval(lambda value, *others: value)
hand_p.def_abstract_eval(lambda tangent, *others: tangent)
mlir.register_lowering(
    swap_p,
    mlir.lower_fun(
        lambda value, probe, given, gradient, forward, backward: jnp.where(forward, given, value),
        multiple_results=False,
    ),
)
mlir.register_lowering(
    hand_p, mlir.lower_fun(lambda tangent, probe, gradient, backward: tangent + probe, multiple_results=False)
)


def differentiate_swap(primals: Sequence[Any], tangents: Sequence[Any]) -> tuple[Any, Any]:
    """Return the value that is handed on, and its tangent: none if the value before the swap has none."""
    output = swap_p.bind(*primals)
    if isinstance(tangents[0], ad.Zero) or isinstance(tangents[1], ad.Zero):
        return output, tangents[0]
    return output, hand_p.bind(tangents[0], tangents[1], primals[3], primals[5])


def transpose_hand(arriving: Any, tangent: Any, probe: Any, gradient: Any, backward: Any) -> tuple[Any, ...]:
    """Return the gradient that is handed on, and the one that arrived as that by the probe."""
    if isinstance(arriving, ad.Zero):
        arriving = jnp.zeros(gradient.shape, gradient.dtype)
    return jnp.where(backward, gradient, arriving), arriving, None, None


ad.primitive_jvps[swap_p] = differentiate_swap
ad.primitive_transposes[hand_p] = transpose_hand


class Sweep(NamedTuple):
    """One forward and backward pass.

    Attributes:
        outputs: of the function, in its own nest.
        values: every tap's value, before it was replaced.
        gradients: the gradient that arrived at each tap that can be steered and holds floats.
        weight_gradients: by every float tensor of the function's first argument.
    """

    outputs: Any
    values: dict[str, Array]
    gradients: dict[str, Array]
    weight_gradients: dict[str, Array]


def make_sweep(traced: Traced, names: Collection[str] | None = None) -> Callable[..., Sweep]:
    """Return one compiled program that serves every comparison of a traced `fn(tensors, inputs)`.

    With `names`, only these taps are recorded and steered: the others cost nothing.

    It is called as `sweep(tensors, inputs, cotangents, values, gradients, forward, backward)`:

        tensors: name -> array; integers among them have no gradient.
        inputs: any nest.
        cotangents: place in the outputs ("", "[0]", ".logits") -> gradient of the objective by that output. An output
            that is left out does not count.
        values, gradients: name of a tap -> what is handed on there, forward and backward, where the flags say so.
            Those left out are zeros.
        forward, backward: name of a tap -> flag; False where left out. The flags are inputs of the compiled program.

    All False: inherited errors. All True: each tap's value is computed from the given values just before it, hence its
    local error. The same holds for the gradients. Forward alone: the gradients of a run through the given values.
    """
    seen = set(traced.taps if names is None else names)
    steered = [name for name, info in traced.taps.items() if info.steered and name in seen]
    differentiated = [name for name in steered if is_float(traced.taps[name])]

    def program(
        floats: dict[str, Array],
        others: dict[str, Array],
        inputs: Any,
        cotangents: dict[str, Array],
        values: dict[str, Array],
        gradients: dict[str, Array],
        forward: dict[str, Array],
        backward: dict[str, Array],
    ) -> Sweep:
        def run(floats: dict[str, Array], probes: dict[str, Array]) -> tuple[Any, Any]:
            def rule(name: str, value: Array, slot: Any) -> tuple[tuple[Array, Array] | None, Array]:
                if name not in seen:
                    return None, value
                if name in probes:
                    replaced = swap_p.bind(value, *slot, forward[name], backward[name])
                elif name in values:
                    replaced = jnp.where(forward[name], slot, value)
                else:
                    replaced = value
                return (value, replaced), replaced

            slots: dict[str, Any] = {name: values[name] for name in steered}
            slots |= {name: (probes[name], values[name], gradients[name]) for name in probes}
            outputs, records = traced.run(floats | others, inputs, rule=rule, slots=slots)
            named = name_leaves(outputs)
            handed = {name: records[name][1] for name in probes}
            watched = {name: value for name, (value, _) in records.items()}
            return ({name: named[name] for name in cotangents}, handed), (outputs, watched)

        probes = {name: jnp.zeros(traced.taps[name].shape, traced.taps[name].dtype) for name in differentiated}
        _, pull_back, (outputs, records) = jax.vjp(run, floats, probes, has_aux=True)
        # With a zero that arrives at every tap, the given gradient is handed on where the program has none.
        weight_gradients, tap_gradients = pull_back((cotangents, probes))
        return Sweep(outputs, records, tap_gradients, weight_gradients)

    run_program = compiled(rewrite(program))

    @functools.cache
    def zeros(shape: tuple[int, ...], dtype: np.dtype) -> Array:
        return jax.device_put(np.zeros(shape, dtype))  # jnp.zeros would compile a program for each shape

    def fill(given: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
        blank = {name: zeros(traced.taps[name].shape, traced.taps[name].dtype) for name in names if name not in given}
        # A model may keep its own dtype in a part of a float64 run.
        return blank | {name: jnp.asarray(given[name], traced.taps[name].dtype) for name in names if name in given}

    def flags(given: Mapping[str, bool]) -> dict[str, np.ndarray]:
        return {name: np.asarray(given.get(name, False)) for name in steered}

    def sweep(
        tensors: Mapping[str, Any],
        inputs: Any,
        cotangents: Mapping[str, Any],
        values: Mapping[str, Any] | None = None,
        gradients: Mapping[str, Any] | None = None,
        forward: Mapping[str, bool] | None = None,
        backward: Mapping[str, bool] | None = None,
    ) -> Sweep:
        floats = {name: tensor for name, tensor in tensors.items() if is_float(tensor)}
        others = {name: tensor for name, tensor in tensors.items() if not is_float(tensor)}
        result = run_program(
            floats,
            others,
            arrays_of(inputs),
            dict(cotangents),
            fill(values or {}, steered),
            fill(gradients or {}, differentiated),
            flags(forward or {}),
            flags(backward or {}),
        )
        in_order = {name: result.values[name] for name in traced.taps if name in result.values}
        return result._replace(
            values=in_order,
            gradients={name: result.gradients[name] for name in traced.taps if name in result.gradients},
            weight_gradients={name: result.weight_gradients[name] for name in floats},
        )

    return sweep


def is_float(value: Any) -> bool:
    """Say whether something with a dtype can be differentiated by."""
    return bool(jnp.issubdtype(value.dtype, jnp.inexact))


# Convolutions. XLA runs two kinds of float64 convolution in naive loops on the CPU, 10 to 200 times slower than needed:
# those with a dilated input (the gradient by the input of a strided convolution), and those whose kernel is larger than
# their input. They are replaced after differentiation, so that custom derivatives stay as they are. The results differ
# by rounding alone, at most 2e-15 of the largest value.

# A convolution: its input, its kernel, and its parameters as `lax.conv_general_dilated` has them in a jaxpr.
Form = Callable[[Array, Array, Mapping[str, Any]], Array]

# A dilated input with fewer output channels than this stays: XLA's own loops are faster there (an image's gradient).
FEW_CHANNELS = 8


def rewrite(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function with its slow convolutions in another form; on other devices than the CPU, the function."""

    def rewritten(*args: Any) -> Any:
        if jax.default_backend() != "cpu":
            return fn(*args)
        closed, shape = jax.make_jaxpr(fn, return_shape=True)(*args)
        outputs = evaluate(closed.jaxpr, closed.consts, jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(shape), outputs)

    return rewritten


def evaluate(jaxpr: Jaxpr, constants: Sequence[Any], arguments: Sequence[Any]) -> list[Any]:
    """Evaluate a jaxpr. Replace each slow convolution by its other form, also in the jitted functions that it calls."""
    values: dict[Var, Any] = dict(zip(jaxpr.constvars, constants, strict=True))
    values.update(zip(jaxpr.invars, arguments, strict=True))

    def read(variable: Var | Literal) -> Any:
        return variable.val if isinstance(variable, Literal) else values[variable]

    for equation in jaxpr.eqns:
        inputs = [read(variable) for variable in equation.invars]
        form = choose(equation)
        if form:
            outputs = [form(inputs[0], inputs[1], equation.params)]
        elif equation.primitive.name in JITTED and holds_slow(equation):
            inner = inner_jaxpr(equation)
            outputs = evaluate(inner.jaxpr, inner.consts, inputs)
        else:
            outputs = bind(equation, inputs)
        values.update(zip(equation.outvars, outputs, strict=True))
    return [read(variable) for variable in jaxpr.outvars]


def bind(equation: JaxprEqn, inputs: Sequence[Any]) -> list[Any]:
    """Evaluate one equation as it is."""
    parameters: Any = equation.primitive.get_bind_params(equation.params)
    # Up to JAX 0.9 the functions of a custom derivative come apart from the parameters.
    functions, options = parameters if isinstance(parameters, tuple) else ((), parameters)
    primitive: Any = equation.primitive
    with equation.ctx.manager:
        outputs = primitive.bind(*functions, *inputs, **options)
    return list(outputs) if primitive.multiple_results else [outputs]


def inner_jaxpr(equation: JaxprEqn) -> ClosedJaxpr:
    """Return the jaxpr that an equation calls."""
    return equation.params["jaxpr"] if "jaxpr" in equation.params else equation.params["call_jaxpr"]


def holds_slow(equation: JaxprEqn) -> bool:
    """Say whether the jaxpr that an equation calls holds a convolution to replace."""
    return any(
        choose(inner) or (inner.primitive.name in JITTED and holds_slow(inner))
        for inner in inner_jaxpr(equation).jaxpr.eqns
    )


def shapes_of(variables: Sequence[Any]) -> list[Any]:
    """Return the shape and dtype of each variable."""
    return [variable.aval for variable in variables]


def choose(equation: JaxprEqn) -> Form | None:
    """Return the form that is faster than XLA's own, or None where the equation stays as it is."""
    if equation.primitive.name != "conv_general_dilated":
        return None
    image, kernel = shapes_of(equation.invars)
    parameters = equation.params
    if image.dtype != jnp.float64 or image.ndim not in (3, 4) or parameters["batch_group_count"] != 1:
        return None
    numbers, groups = parameters["dimension_numbers"], parameters["feature_group_count"]
    channels = kernel.shape[numbers.rhs_spec[0]]
    if max(parameters["lhs_dilation"]) > 1:
        if groups > 1 and groups < channels:
            return None  # grouped, not depthwise: written out, it is 4 times slower
        if channels < FEW_CHANNELS:
            return None
        if groups == 1 and max(*parameters["window_strides"], *parameters["rhs_dilation"], 1) == 1:
            return by_phases
        return with_padding
    sizes = [image.shape[axis] for axis in numbers.lhs_spec[2:]]
    reaches = [
        (kernel.shape[axis] - 1) * dilation + 1
        for axis, dilation in zip(numbers.rhs_spec[2:], parameters["rhs_dilation"], strict=True)
    ]
    return with_padding if any(size < reach for size, reach in zip(sizes, reaches, strict=True)) else None


def channels_last(image: Array, kernel: Array, numbers: Any) -> tuple[Array, Array, tuple[int, ...]]:
    """Return the input as [batch, space, channels], the kernel as [space, in, out], and the way back for the output."""
    image = lax.transpose(image, (numbers.lhs_spec[0], *numbers.lhs_spec[2:], numbers.lhs_spec[1]))
    kernel = lax.transpose(kernel, (*numbers.rhs_spec[2:], numbers.rhs_spec[1], numbers.rhs_spec[0]))
    back = [0] * image.ndim
    back[numbers.out_spec[1]] = image.ndim - 1
    for place, axis in enumerate(numbers.out_spec[2:]):
        back[axis] = 1 + place
    return image, kernel, tuple(back)


def convolve(
    image: Array, kernel: Array, strides: Sequence[int] = (), dilation: Sequence[int] = (), groups: int = 1
) -> Array:
    """Convolve without padding, channels last."""
    rank = image.ndim - 2
    letters = "DHW"[-rank:]
    return lax.conv_general_dilated(
        image,
        kernel,
        strides or (1,) * rank,
        [(0, 0)] * rank,
        rhs_dilation=dilation or (1,) * rank,
        dimension_numbers=(f"N{letters}C", f"{letters}IO", f"N{letters}C"),
        feature_group_count=groups,
    )


def pad(image: Array, space: Sequence[tuple[int, int, int]]) -> Array:
    """Pad the axes between the first and the last by (before, after, between)."""
    return lax.pad(image, jnp.zeros((), image.dtype), [(0, 0, 0), *space, (0, 0, 0)])


def with_padding(image: Array, kernel: Array, parameters: Mapping[str, Any]) -> Array:
    """Write padding and dilation of the input out; a barrier keeps XLA from putting them back."""
    image, kernel, back = channels_last(image, kernel, parameters["dimension_numbers"])
    space = [
        (before, after, dilation - 1)
        for (before, after), dilation in zip(parameters["padding"], parameters["lhs_dilation"], strict=True)
    ]
    padded = lax.optimization_barrier(pad(image, space))
    strides, dilation = parameters["window_strides"], parameters["rhs_dilation"]
    return lax.transpose(convolve(padded, kernel, strides, dilation, parameters["feature_group_count"]), back)


def by_phases(image: Array, kernel: Array, parameters: Mapping[str, Any]) -> Array:
    """Compute each phase of the output on its own.

    With an input dilated by d, every d-th output along an axis meets the same d-th part of the kernel: a plain
    convolution of the undilated input. The d phases of each axis are then interleaved.
    """
    image, kernel, back = channels_last(image, kernel, parameters["dimension_numbers"])
    dilations, padding = parameters["lhs_dilation"], parameters["padding"]
    rank = image.ndim - 2
    sizes = [
        (size - 1) * dilation + 1 + before + after - reach + 1
        for size, dilation, (before, after), reach in zip(
            image.shape[1:-1], dilations, padding, kernel.shape[:rank], strict=True
        )
    ]
    longest = [math.ceil(size / dilation) for size, dilation in zip(sizes, dilations, strict=True)]
    phases = []
    for phase in itertools.product(*map(range, dilations)):
        starts, space, counts = [], [], []
        for axis, offset in enumerate(phase):
            dilation, before = dilations[axis], padding[axis][0]
            start = (before - offset) % dilation  # the first row of the kernel that meets data
            rows = len(range(start, kernel.shape[axis], dilation))
            count = len(range(offset, sizes[axis], dilation))
            first = (offset + start - before) // dilation  # the row of the input under it
            starts.append(start)
            counts.append(count if rows else 0)
            space.append((-first, first + count + rows - 1 - image.shape[1 + axis], 0))
        phases.append(one_phase(image, kernel, dilations, starts, space, counts, longest))
    stacked = jnp.stack(phases).reshape(*dilations, *phases[0].shape)
    order = [rank, *itertools.chain(*[(rank + 1 + axis, axis) for axis in range(rank)]), 2 * rank + 1]
    merged = [count * dilation for count, dilation in zip(longest, dilations, strict=True)]
    output = lax.transpose(stacked, order).reshape(image.shape[0], *merged, kernel.shape[-1])
    return lax.transpose(output[(slice(None), *map(slice, sizes))], back)


def one_phase(
    image: Array,
    kernel: Array,
    dilations: Sequence[int],
    starts: Sequence[int],
    space: Sequence[tuple[int, int, int]],
    counts: Sequence[int],
    longest: Sequence[int],
) -> Array:
    """Convolve with every d-th row of the kernel, and fill up with zeros to the longest phase's size."""
    if 0 in counts:
        return jnp.zeros((image.shape[0], *longest, kernel.shape[-1]), image.dtype)
    part = kernel[tuple(slice(start, None, dilation) for start, dilation in zip(starts, dilations, strict=True))]
    padded = pad(image, space)
    if math.prod(part.shape[:-2]) == 1:
        output = padded @ part.reshape(part.shape[-2:])
    else:
        output = convolve(lax.optimization_barrier(padded), part)
    return pad(output, [(0, total - count, 0) for total, count in zip(longest, counts, strict=True)])

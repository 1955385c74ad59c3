"""One function for each library: how a model is run, where its weights are, and how its modules are seen."""

import contextlib
import copy
import dataclasses
import functools
import inspect
import sys
import types
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
from jax import numpy as jnp

from parity_tests.harness.compare import Refused, note_rate
from parity_tests.harness.taps import Module, Modules, is_array, join, scope, tap


class Call(Protocol):
    """The inputs of one call of a model."""

    @property
    def args(self) -> tuple[Any, ...]:
        """Return the positional arguments."""

    @property
    def kwargs(self) -> Mapping[str, Any]:
        """Return the keyword arguments."""


class Model(NamedTuple):
    """A JAX model, whatever library it is written in.

    Attributes:
        library: "Flax Linen", "Flax NNX", "Equinox", "Haiku" or "function".
        variables: what the given object holds; None where `init` makes them, or where the map of weights builds them.
        init: (key, inputs) -> variables; None if the object holds its own, or is a plain function.
        apply: (variables, inputs, training) -> (outputs, variables). In training mode dropout has rate 0 and the
            variables returned hold the new statistics; in evaluation mode they are the same.
        leaves: variables -> the arrays in them by path, "conv1/kernel". Random keys and counters are left out.
        with_leaves: puts arrays back in, in their own dtype.
        trainable: the paths that an optimizer trains.
        params: the tree that the user's optimizer sees.
        with_params: puts that tree back in.
        context: while a program is traced inside, the outputs of all modules go through `tap`. It yields the modules
            that run.
        constants: the paths of arrays that are no variables of the library, such as a mask in an NNX module.
    """

    library: str
    variables: Any
    init: Callable[[jax.Array, Call], Any] | None
    apply: Callable[[Any, Call, bool], tuple[Any, Any]]
    leaves: Callable[[Any], dict[str, Any]]
    with_leaves: Callable[[Any, Mapping[str, Any]], Any]
    trainable: Callable[[Any], frozenset[str]]
    params: Callable[[Any], Any]
    with_params: Callable[[Any, Any], Any]
    context: Callable[[], AbstractContextManager[Modules]]
    constants: frozenset[str] = frozenset()


def adapt(
    jax_model: Any, jax_kwargs: Mapping[str, Any] | None = None, jax_training_kwargs: Mapping[str, Any] | None = None
) -> Model:
    """Return any JAX model as a `Model`.

    Args:
        jax_model: a Linen, NNX or Equinox module, what `hk.transform` or `hk.transform_with_state` returns, a function
            f(variables, *args, **kwargs), or (variables, function) with an Equinox or NNX model among the variables;
            also (variables, module) of Linen or Haiku, and what `eqx.partition` or `nnx.split` returns. A `Model`
            stays as it is.
        jax_kwargs: keyword arguments of the model in evaluation mode.
        jax_training_kwargs: those that are added or different in training mode.

    Raises:
        Refused: it is none of these.
    """
    if isinstance(jax_model, Model):
        return jax_model
    jax_model = merge_parts(jax_model)
    if type(jax_model) is tuple and len(jax_model) == 2:
        variables, module = jax_model
        if any(is_a(leaf, "torch", "Tensor") for leaf in jax.tree.leaves(variables)):
            raise Refused("the JAX model's variables hold PyTorch's tensors: give arrays, as of jnp.asarray(tensor)")
        if is_a(module, "flax.linen", "Module") or is_transformed(module):
            model = adapt(module, jax_kwargs, jax_training_kwargs)
            return model._replace(variables=collections_of(variables, is_transformed(module)))
    kwargs = Keywords(dict(jax_kwargs or {}), dict(jax_training_kwargs or {}))
    if is_transformed(jax_model):
        return adapt_haiku(jax_model, kwargs)
    variables, function = jax_model, None
    if type(jax_model) is tuple and len(jax_model) == 2 and is_function(jax_model[1]):
        variables, function = jax_model
    if is_a(variables, "flax.linen", "Module") and function is None:
        return adapt_linen(variables, kwargs)
    if is_a(variables, "flax.nnx", "Module"):
        return adapt_nnx(variables, function, kwargs)
    if "equinox" in sys.modules and holds_equinox(variables):
        return adapt_equinox(variables, function, kwargs)
    if function is not None:
        return adapt_function(function, kwargs)._replace(variables=variables)
    if hasattr(jax_model, "stateless_call"):
        raise Refused(
            f"the JAX model is Keras's {type(jax_model).__name__}: give (variables, function), such as "
            "({v.path: v.value for v in model.variables}, function), and let the function return "
            "model.stateless_call(...)[0]"
        )
    if is_a(getattr(jax_model, "module", None), "flax.linen", "Module"):  # as transformers' are
        raise Refused(
            f"the JAX model is a {type(jax_model).__name__}, which holds a Linen module: give model.module, or "
            "(model.params, function) and let the function return model(..., params=params)"
        )
    if is_a(jax_model, "torch.nn", "Module"):
        raise Refused(f"the JAX model is PyTorch's {type(jax_model).__name__}: give the port of it in JAX")
    if callable(jax_model):
        return adapt_function(jax_model, kwargs)
    raise Refused(f"the JAX model is a {type(jax_model).__name__}: give a module, a function, or (variables, function)")


def hold_real(model: Model) -> Model:
    """Return the model with every complex leaf as a real one with a last axis of 2, as PyTorch's are held."""

    def leaves(variables: Any) -> dict[str, Any]:
        return {path: parts_of_complex(leaf) for path, leaf in model.leaves(variables).items()}

    def with_leaves(variables: Any, leaves: Mapping[str, Any]) -> Any:
        own = {} if variables is None else model.leaves(variables)
        return model.with_leaves(
            variables,
            {
                path: jax.lax.complex(leaf[..., 0], leaf[..., 1]) if is_complex(own.get(path)) else leaf
                for path, leaf in leaves.items()
            },
        )

    return model._replace(leaves=leaves, with_leaves=with_leaves)


def is_complex(leaf: Any) -> bool:
    """Say whether a leaf is a complex array, or the shape of one."""
    return is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.complexfloating)


def parts_of_complex(leaf: Any) -> Any:
    """Return the real and the imaginary part of a complex leaf along a last axis of 2, and any other leaf as it is."""
    if not is_complex(leaf):
        return leaf
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.eval_shape(parts_of_complex, leaf)
    return jnp.stack([jnp.real(leaf), jnp.imag(leaf)], -1)


def is_a(model: Any, package: str, name: str) -> bool:
    """Say whether a model is of a library's type; a library that is not loaded has no models."""
    return package in sys.modules and isinstance(model, getattr(sys.modules[package], name))


def merge_parts(jax_model: Any) -> Any:
    """Return the model that `nnx.split` or `eqx.partition` took apart, and any other model as it is."""
    if type(jax_model) is not tuple:
        return jax_model
    graphs = [part for part in jax_model if is_a(part, "flax.nnx", "GraphDef")]
    if graphs:
        return sys.modules["flax.nnx"].merge(*graphs, *(part for part in jax_model if part is not graphs[0]))
    kinds = {type(part) for part in jax_model}
    if len(kinds) == 1 and is_a(jax_model[0], "equinox", "Module"):
        return sys.modules["equinox"].combine(*jax_model)
    return jax_model


def collections_of(variables: Any, haiku: bool) -> dict[str, Any]:
    """Return the variables of a module by collection; they may be its parameters alone, or Haiku's (params, state)."""
    if haiku:
        return dict(zip(("params", "state"), variables if type(variables) is tuple else (variables,), strict=False))
    return dict(variables) if "params" in variables else {"params": variables}


def is_transformed(part: Any) -> bool:
    """Say whether `hk.transform` or `hk.transform_with_state` returned it."""
    return is_a(part, "haiku", "Transformed") or is_a(part, "haiku", "TransformedWithState")


def is_function(part: Any) -> bool:
    """Say whether the second part of a pair is a function, and no module or state."""
    return callable(part) and not is_a(part, "equinox", "Module") and not is_a(part, "flax.nnx", "Module")


# Keyword arguments by which models are told the mode, and their values in training mode.
MODES = {
    "train": True,
    "training": True,
    "is_training": True,
    "deterministic": False,
    "use_running_average": False,
    "inference": False,
}
DROP_RATES = ("rate", "p", "drop_prob", "drop_rate")  # as layers that drop, also whole paths, call them


class Keywords(NamedTuple):
    """The keyword arguments that a user gave for evaluation mode, and for training mode."""

    evaluation: dict[str, Any]
    training: dict[str, Any]

    def of(self, function: Callable[..., Any], training: bool, fixed: Collection[str] = ()) -> dict[str, Any]:
        """Return the keyword arguments of a call: the mode by those names that the function takes, and the user's."""
        names = parameters_of(function).keys() - {*fixed}
        mode = {name: value == training for name, value in MODES.items() if name in names}
        return {**self.evaluation, **mode, **self.training} if training else {**mode, **self.evaluation}


def parameters_of(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """Return the parameters of a function; none where it does not tell."""
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):
        return {}


def path_of(place: tuple[Any, ...], boxed: bool = True) -> str:
    """Return the path of a leaf in a tree.

    With `boxed`, the path leaves out the attribute in which Flax's boxes hold their value.
    """
    names = [str(getattr(key, "name", getattr(key, "idx", getattr(key, "key", key)))) for key in place]
    boxed = boxed and bool(place) and hasattr(place[-1], "name") and names[-1] == "value"
    return "/".join(names[:-1] if boxed else names)


def is_weight(leaf: Any) -> bool:
    """Say whether a leaf is an array that a port carries: no random key, no counter, and not empty."""
    if not is_array(leaf) or not leaf.size or jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return False
    return bool(leaf.ndim > 0 or jnp.issubdtype(leaf.dtype, jnp.inexact))


def has_collections(variables: Any) -> bool:
    """Say whether variables are split as in Flax: the trained ones under "params", others beside them."""
    return isinstance(variables, Mapping) and "params" in variables and isinstance(variables["params"], Mapping)


def named_leaves(variables: Any) -> list[tuple[str, bool, Any]]:
    """Return of each leaf in the tree's order: the path ("" if it is no weight), whether it is trained, the leaf."""
    collections = has_collections(variables)
    leaves = []
    for place, leaf in jax.tree_util.tree_leaves_with_path(variables):
        full = path_of(place)
        first, _, rest = full.partition("/")
        trained = (first == "params" or not collections) and is_weight(leaf) and jnp.issubdtype(leaf.dtype, jnp.inexact)
        leaves.append((full, rest if collections else full, bool(trained), leaf))
    short = [name for _, name, _, leaf in leaves if is_weight(leaf)]
    return [
        ("" if not is_weight(leaf) else name if short.count(name) == 1 else full, trained, leaf)
        for full, name, trained, leaf in leaves
    ]


def leaves_of(variables: Any) -> dict[str, Any]:
    """Return the weights of a tree by path; the collection is in the path only where two would be the same."""
    return {name: leaf for name, _, leaf in named_leaves(variables) if name}


def with_leaves(variables: Any, leaves: Mapping[str, Any]) -> Any:
    """Return the tree with these leaves in their places; where there is no tree yet, a nest of dicts and lists.

    Raises:
        Refused: the tree has no leaf of such a path.
    """
    if variables is None:
        return build_nest(leaves)
    return put_back(variables, [(name, leaf) for name, _, leaf in named_leaves(variables)], leaves)


def put_back(tree: Any, named: Sequence[tuple[str, Any]], leaves: Mapping[str, Any]) -> Any:
    """Return a tree with some of its leaves, named in the tree's order, exchanged.

    Raises:
        Refused: the tree has no leaf of such a name.
    """
    unknown = leaves.keys() - {name for name, _ in named}
    if unknown:
        raise Refused(f"the JAX model has no leaf {min(unknown)}")
    return jax.tree.unflatten(jax.tree.structure(tree), [leaves.get(name, leaf) for name, leaf in named])


def build_nest(leaves: Mapping[str, Any]) -> Any:
    """Return a nest of dicts from paths; a dict whose keys are 0, 1, 2 … becomes a list."""
    nest: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, last = path.split("/")
        inner = nest
        for name in parents:
            inner = inner.setdefault(name, {})
        inner[last] = leaf
    return as_lists(nest)


def as_lists(nest: Any) -> Any:
    """Turn dicts whose keys are 0, 1, 2 … into lists."""
    if not isinstance(nest, dict):
        return nest
    parts = {name: as_lists(part) for name, part in nest.items()}
    if set(parts) == {str(index) for index in range(len(parts))}:
        return [parts[str(index)] for index in range(len(parts))]
    return parts


def trainable_of(variables: Any) -> frozenset[str]:
    """Return the paths of the weights that are trained."""
    return frozenset(name for name, trained, _ in named_leaves(variables) if trained)


def params_of(variables: Any) -> Any:
    """Return what an optimizer sees: the collection "params", or all that has a gradient."""
    if has_collections(variables):
        return variables["params"]
    return jax.tree.map(lambda leaf: leaf if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact) else None, variables)


def without_training(model: Model, paths: frozenset[str]) -> Model:
    """Return a model of a plain tree that does not train the leaves of these paths."""

    def params(variables: Any) -> Any:
        kept = [leaf if trained and name not in paths else None for name, trained, leaf in named_leaves(variables)]
        return jax.tree.unflatten(jax.tree.structure(variables), kept)

    return model._replace(trainable=lambda variables: model.trainable(variables) - paths, params=params)


def with_params(variables: Any, params: Any) -> Any:
    """Put back what `params_of` returned."""
    if has_collections(variables):
        return {**variables, "params": params}
    return jax.tree.map(
        lambda new, old: old if new is None else new, params, variables, is_leaf=lambda leaf: leaf is None
    )


def tree_model(
    library: str,
    apply: Callable[[Any, Call, bool], tuple[Any, Any]],
    init: Callable[[jax.Array, Call], Any] | None = None,
) -> Model:
    """Return a model whose variables are a plain tree."""

    def apply_to_arrays(variables: Any, inputs: Call, training: bool) -> tuple[Any, Any]:
        return apply(jax.tree.map(without_numpy, variables), inputs, training)

    context = watch if library != "function" else watch_function
    return Model(
        library, None, init, apply_to_arrays, leaves_of, with_leaves, trainable_of, params_of, with_params, context
    )


def without_numpy(leaf: Any) -> Any:
    """Return an array of numbers as JAX's: NumPy's takes no index that is traced. Masks stay, they may be static."""
    return jnp.asarray(leaf) if isinstance(leaf, np.ndarray) and leaf.dtype != bool else leaf


# Seeing modules

# The modules that are noted now; None while nothing is watched.
watched: ContextVar[Modules | None] = ContextVar("watched", default=None)


@contextlib.contextmanager
def watch(required: bool = True) -> Iterator[Modules]:
    """Tap the modules of every library that is loaded, so that one library may be used inside another."""
    modules = Modules()
    modules.required = required
    with contextlib.ExitStack() as stack:
        for package, watch_library in WATCHERS.items():
            if package in sys.modules:
                stack.enter_context(watch_library(modules))
        token = watched.set(modules)
        try:
            yield modules
        finally:
            watched.reset(token)


def watch_function() -> AbstractContextManager[Modules]:
    """Watch a plain function, which may call no module at all."""
    return watch(required=False)


def enter(modules: Modules, path: str, method: str, owner: Any, run: Callable[[], Any], keep: Any = None) -> Any:
    """Run a method of a module, with its equations marked as the module's and its output tapped.

    Args:
        modules: notes the module.
        path: of the module.
        method: is part of the tap's name, but for `__call__`.
        owner: the module.
        run: calls the method.
        keep: whether a part of the output is no value but a module or a state, which is left alone.
    """
    if (path, method) in modules.running:  # `super().__call__` is a part of the same call
        return run()
    kind = type(owner)
    modules[path] = Module(kind.__name__, kind.__module__.partition(".")[0] in ("flax", "equinox", "haiku"))
    modules.running.add((path, method))
    try:
        with scope(path):
            output = run()
    finally:
        modules.running.remove((path, method))
    return tap(path if method == "__call__" else join(path, method), output, kind.__name__, keep)


def all_subclasses(parent: type) -> list[type]:
    """Return a class and all that are derived from it."""
    classes = [parent]
    children: list[type] = type.__subclasses__(parent)
    for child in children:
        classes += [kind for kind in all_subclasses(child) if kind not in classes]
    return classes


def own_methods(kind: type, library: str) -> dict[str, Any]:
    """Return the methods that a class itself defines: `__call__`, `attend`, and other public ones of a user's class."""
    methods = {name: value for name, value in vars(kind).items() if name in ("__call__", "attend")}
    if kind.__module__.partition(".")[0] != library:
        for name, value in vars(kind).items():
            if not name.startswith("_") and is_method(value):
                methods[name] = value
    return methods


def is_method(value: Any) -> bool:
    """Say whether an attribute of a class is a method: a function, or a library's wrapper around one."""
    if isinstance(value, types.FunctionType):
        return True
    return type(value).__name__ in ("_wrap_method", "JitWrapped", "JitFn") and callable(getattr(value, "__get__", None))


@contextlib.contextmanager
def patched(attributes: Mapping[tuple[type, str], Any]) -> Iterator[None]:
    """Set attributes of classes for as long as the context is open."""
    before = {(kind, name): vars(kind)[name] for kind, name in attributes}
    for (kind, name), value in attributes.items():
        setattr(kind, name, value)
    try:
        yield
    finally:
        for (kind, name), value in before.items():
            setattr(kind, name, value)


# Plain functions


def adapt_function(function: Callable[..., Any], kwargs: Keywords) -> Model:
    """Adapt f(variables, *args, **kwargs), whose variables are any tree.

    A function with statistics returns (outputs, new variables); the second part is known by its tree.
    """

    def apply(variables: Any, inputs: Call, training: bool) -> tuple[Any, Any]:
        with scope(""), without_dropout() if training else contextlib.nullcontext():
            result = function(variables, *inputs.args, **{**kwargs.of(function, training), **inputs.kwargs})
        return split_variables(result, variables, training)

    return tree_model("function", apply)


def split_variables(result: Any, variables: Any, training: bool) -> tuple[Any, Any]:
    """Return (outputs, variables): the second part of the result if it is such a tree, else the variables as given."""
    if isinstance(result, tuple) and len(result) == 2 and not is_array(variables):
        structure: Any = jax.tree.structure(variables)
        if structure.num_leaves and structure == jax.tree.structure(result[1]):
            return result[0], result[1] if training else variables
    return result, variables


def rates_of(module: Any) -> dict[str, float]:
    """Return the rates of a layer that drops: of a library's dropout or attention, or of a port's own drop path."""
    kinds = " ".join(kind.__name__ for kind in type(module).__mro__).lower()
    names = DROP_RATES if "drop" in kinds else ("dropout_rate",) if "attention" in kinds else ()
    own = getattr(module, "__dict__", {}) if names else {}
    return {name: own[name] for name in names if isinstance(own.get(name), float)}


@contextlib.contextmanager
def without_dropout() -> Iterator[None]:
    """Set the rate of every library's dropout to 0."""
    with contextlib.ExitStack() as stack:
        for package, switch_off in DROPOUTS.items():
            if package in sys.modules:
                stack.enter_context(switch_off())
        yield


# Flax Linen


def adapt_linen(module: Any, kwargs: Keywords) -> Model:
    """Adapt a Linen module; its variables are {"params": …, "batch_stats": …, …}."""
    # `merge_param` refuses a mode that the module was made with and that its call gets too.
    optional = [field.name for field in dataclasses.fields(module) if field.default is None]
    fixed = [name for name in optional if getattr(module, name) is not None]

    def init(key: jax.Array, inputs: Call) -> Any:
        from flax import linen as nn

        keys = {"params": key, "dropout": jax.random.fold_in(key, 1)}
        options = {**kwargs.of(type(module).__call__, False, fixed), **inputs.kwargs}
        return nn.Module.init(module, keys, *inputs.args, **options)  # a port may have an `init` of its own, of a key

    def apply(variables: Any, inputs: Call, training: bool) -> tuple[Any, Any]:
        options = {**kwargs.of(type(module).__call__, training, fixed), **inputs.kwargs}
        keys = {"dropout": jax.random.key(0), "params": jax.random.key(1)}  # Flax takes the last for any other name
        if not training:  # a module may ask for a key that it does not use
            return module.apply(variables, *inputs.args, rngs=keys, **options), variables
        states = [name for name in variables if name != "params"]
        with without_dropout():
            result = module.apply(variables, *inputs.args, mutable=states or False, rngs=keys, **options)
        return (result[0], {**variables, **result[1]}) if states else (result, variables)

    return tree_model("Flax Linen", apply, init)


@contextlib.contextmanager
def watch_linen(modules: Modules) -> Iterator[None]:
    """Tap every method of every Linen module."""
    from flax import linen as nn

    def intercept(run: Callable[..., Any], args: Any, kwargs: Any, call: Any) -> Any:
        module, method = call.module, call.method_name
        # Lifted transformations call functions of their own, such as `<lambda>` and `scan_fn`.
        if method == "setup" or not hasattr(type(module), method) or module.scope is None:
            return run(*args, **kwargs)
        return enter(modules, "/".join(module.path), method, module, lambda: run(*args, **kwargs))

    with nn.intercept_methods(intercept), linen_jit_by_path():
        yield


@contextlib.contextmanager
def linen_jit_by_path() -> Iterator[None]:
    """Let `nn.jit` trace equal modules apart: it knows them by a hash, to which their path is added."""
    from flax.linen import transforms

    proxy = getattr(transforms, "_HashableProxy", None)
    if proxy is None:
        yield
        return
    original = proxy.__dict__["from_module"]

    def from_module(cls: Any, module: Any) -> Any:
        instance = original.__func__(cls, module)
        return cls(instance.module_ref, hash((instance.hash_key, module.path)))

    proxy.from_module = classmethod(from_module)
    try:
        yield
    finally:
        proxy.from_module = original


@contextlib.contextmanager
def linen_without_dropout() -> Iterator[None]:
    """Set the rates of dropout, of drop path and of attention's dropout to 0 while they run."""
    from flax import linen as nn

    def intercept(run: Callable[..., Any], args: Any, kwargs: Any, call: Any) -> Any:
        before, given = rates_of(call.module), kwargs.get("deterministic")
        if given is None and isinstance(call.module, nn.Dropout) and len(args) > 1:
            given = args[1]
        is_off = getattr(call.module, "deterministic", None) if given is None else given
        try:
            for name, rate in before.items():
                note_rate(0.0 if is_off else rate, "/".join(call.module.path))
                object.__setattr__(call.module, name, 0.0)
            return run(*args, **kwargs)
        finally:
            for name, rate in before.items():
                object.__setattr__(call.module, name, rate)

    with nn.intercept_methods(intercept):
        yield


# Flax NNX


def adapt_nnx(model: Any, function: Callable[..., Any] | None, kwargs: Keywords) -> Model:
    """Adapt an NNX model; its variables are its state, `nnx.state(model)`.

    Args:
        model: stays as it is; every run works on a copy.
        function: f(model, *args, **kwargs), or None to call the model.
        kwargs: of the function.
    """
    from flax import nnx

    call = function or type(model).__call__
    call_model = function or (lambda running, *args, **kwargs: running(*args, **kwargs))
    graph, initial = nnx.split(model)
    constants = leaves_of(initial).keys() - leaves_of(nnx.filter_state(initial, nnx.Variable)).keys()

    def apply(variables: Any, inputs: Call, training: bool) -> tuple[Any, Any]:
        # Without a copy, variables that are not differentiated could not be written to inside a gradient.
        running = nnx.merge(graph, variables, copy=True)
        nnx_in_dtype_of_weights(running)
        if watched.get() is not None:
            mark_nnx(running)
        running.train() if training else running.eval()
        if training:
            nnx_without_dropout(running)
        options = {**kwargs.of(call, training), **inputs.kwargs}
        with scope(""):
            outputs = call_model(running, *inputs.args, **options)
        if not training:
            return outputs, variables
        known = leaves_of(variables)
        after = {path: leaf for path, leaf in leaves_of(nnx.state(running)).items() if path in known}
        return outputs, with_leaves(variables, after)

    def trainable(variables: Any) -> frozenset[str]:
        return frozenset(leaves_of(nnx.filter_state(variables, nnx.Param)))

    def with_params(variables: Any, params: Any) -> Any:
        return with_leaves(variables, leaves_of(params))

    return Model(
        library="Flax NNX",
        variables=initial,
        init=None,
        apply=apply,
        leaves=leaves_of,
        with_leaves=with_leaves,
        trainable=trainable,
        params=lambda variables: nnx.filter_state(variables, nnx.Param),
        with_params=with_params,
        context=watch,
        constants=frozenset(constants),
    )


def is_instance(kind: type | tuple[type, ...], value: Any) -> bool:
    """Say whether a value is of a class, or of one of several."""
    return isinstance(value, kind)


def mark_nnx(model: Any) -> None:
    """Write the path of each module into it; the mark is part of its graph, so it survives every transformation."""
    from flax import nnx

    for place, module in nnx.iter_modules(model):
        if "tap_path" not in vars(module):
            object.__setattr__(module, "tap_path", "/".join(map(str, place)))


@contextlib.contextmanager
def watch_nnx(modules: Modules) -> Iterator[None]:
    """Tap the calls of every NNX module, and the public methods of the user's.

    A module without a mark that is entered first becomes the root of its paths.
    """
    from flax import nnx

    keep = functools.partial(is_instance, (nnx.Module, nnx.Variable, nnx.State, nnx.Rngs))

    def watch_method(kind: type, name: str, original: Any) -> Any:
        @functools.wraps(original)
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            method = original.__get__(self, type(self))
            if kind is not next(owner for owner in type(self).__mro__ if name in vars(owner)):
                return method(*args, **kwargs)  # called by super(): the method of the subclass has the tap
            if "tap_path" not in vars(self):
                mark_nnx(self)
            return enter(modules, self.tap_path, name, self, lambda: method(*args, **kwargs), keep)

        return call

    methods = {
        (kind, name): watch_method(kind, name, method)
        for kind in all_subclasses(nnx.Module)
        for name, method in own_methods(kind, "flax").items()
    }
    with patched(methods):
        yield


def nnx_in_dtype_of_weights(model: Any) -> None:
    """Let layers that compute in the dtype of the weights that they were made with do so with other weights too.

    An `nnx.Embed` keeps the dtype of its first weights, and would cast those of a float64 run to float32.
    """
    from flax import nnx

    modules: list[Any] = [module for _, module in nnx.iter_modules(model)]
    for module in modules:
        dtype = getattr(module, "dtype", None)
        weights = [value.dtype for value in vars(module).values() if isinstance(value, nnx.Param)]
        if weights and dtype is not None and dtype == getattr(module, "param_dtype", None) != weights[0]:
            module.dtype = weights[0]


def nnx_without_dropout(model: Any) -> None:
    """Set the rates of dropout, of drop path and of attention's dropout to 0."""
    from flax import nnx

    for place, module in nnx.iter_modules(model):
        for name, rate in rates_of(module).items():
            note_rate(rate, "/".join(map(str, place)))
            setattr(module, name, 0.0)


# Equinox


def holds_equinox(variables: Any) -> bool:
    """Say whether an Equinox module is in a tree."""
    import equinox as eqx

    is_module = functools.partial(is_instance, eqx.Module)
    return any(map(is_module, jax.tree.leaves(variables, is_leaf=is_module)))


def adapt_equinox(given: Any, function: Callable[..., Any] | None, kwargs: Keywords) -> Model:
    """Adapt an Equinox model, or a tree that holds one; the variables are that tree.

    Args:
        given: a module, or (module, state) as `eqx.nn.make_with_state` returns it, or any tree for a function.
        function: f(variables, *args, **kwargs) -> outputs, (outputs, state) or (outputs, variables). None: the module
            takes one example, and is mapped over the first axis of all arrays.
        kwargs: of the function or of the module.
    """
    import equinox as eqx

    def prepare(variables: Any, training: bool) -> Any:
        variables = eqx.nn.inference_mode(variables, value=not training)
        if training:
            variables = jax.tree_util.tree_map_with_path(
                equinox_without_dropout, variables, is_leaf=lambda part: bool(rates_of(part))
            )
        return tapped_copy(variables) if watched.get() is not None else variables

    def apply(variables: Any, inputs: Call, training: bool) -> tuple[Any, Any]:
        running = prepare(variables, training)
        with scope(""):
            if function is None:
                outputs = map_over_batch(running, inputs, kwargs, training)
            else:
                outputs = function(running, *inputs.args, **{**kwargs.of(function, training), **inputs.kwargs})
        if isinstance(variables, tuple) and isinstance(outputs, tuple) and isinstance(outputs[-1], eqx.nn.State):
            rest = outputs[0] if len(outputs) == 2 else outputs[:-1]
            return rest, (variables[0], outputs[-1]) if training else variables
        outputs, new = split_variables(outputs, running, training)
        if new is running:
            return outputs, variables
        return outputs, equinox_with_leaves(variables, {name: leaf for name, _, leaf in equinox_leaves(new) if name})

    def trainable(variables: Any) -> frozenset[str]:
        named = equinox_leaves(variables)
        return frozenset(name for name, state, leaf in named if name and not state and eqx.is_inexact_array(leaf))

    def params(variables: Any) -> Any:
        return eqx.filter(model_of(variables), eqx.is_inexact_array)

    def with_params(variables: Any, params: Any) -> Any:
        combined = eqx.combine(params, model_of(variables))
        return (combined, variables[1]) if model_of(variables) is not variables else combined

    return Model(
        library="Equinox",
        # A counter of a weak type would change its type when it counts in a float64 run, which Equinox does not allow.
        variables=jax.tree.map(lambda leaf: jnp.asarray(leaf, leaf.dtype) if is_weak(leaf) else leaf, given),
        init=None,
        apply=apply,
        leaves=lambda variables: {name: leaf for name, _, leaf in equinox_leaves(variables) if name},
        with_leaves=equinox_with_leaves,
        trainable=trainable,
        params=params,
        with_params=with_params,
        context=watch,
    )


def is_weak(leaf: Any) -> bool:
    """Say whether a leaf is an array of JAX's that takes the dtype of what it is combined with."""
    return bool(getattr(leaf, "weak_type", False))


def model_of(variables: Any) -> Any:
    """Return the model of (model, state); any other tree as it is."""
    import equinox as eqx

    stateful = isinstance(variables, tuple) and len(variables) == 2 and isinstance(variables[1], eqx.nn.State)
    return variables[0] if stateful else variables


def equinox_without_dropout(place: tuple[Any, ...], part: Any) -> Any:
    """Return a layer that drops with rates of 0, which may be static fields, and any other part as it is."""
    if rates := rates_of(part):
        part = copy.copy(part)
        for name, rate in rates.items():
            note_rate(rate, path_of(place, boxed=False))
            object.__setattr__(part, name, 0.0)
    return part


def map_over_batch(variables: Any, inputs: Call, kwargs: Keywords, training: bool) -> Any:
    """Call a model of single examples on a batch; its batch norms see the whole batch."""
    import equinox as eqx

    model = model_of(variables)
    signature = parameters_of(type(model).__call__)
    options = kwargs.of(type(model).__call__, training)
    key = signature.get("key")
    if key is not None and "key" not in options and (training or key.default is inspect.Parameter.empty):
        options["key"] = jax.random.PRNGKey(0)  # nothing is drawn from it: dropout has rate 0
    is_norm = functools.partial(is_instance, eqx.nn.BatchNorm)
    norms = [part for part in jax.tree.leaves(model, is_leaf=is_norm) if is_norm(part)]
    axis = norms[0].axis_name if norms else "batch"
    given = (inputs.args, dict(inputs.kwargs))
    axes = jax.tree.map(lambda leaf: 0 if is_array(leaf) and leaf.ndim else None, given)
    if model is variables:
        return jax.vmap(lambda args, named: model(*args, **named, **options), axes, axis_name=axis)(*given)
    state = variables[1]
    return jax.vmap(
        lambda args, named, state: model(*args, **{"state": state, **named, **options}),
        (*axes, None),
        (0, None),
        axis_name=axis,
    )(*given, state)


def equinox_leaves(variables: Any) -> list[tuple[str, bool, Any]]:
    """Return the path of each leaf ("" if it is no weight), whether it is a state, and the leaf, in the tree's order.

    A state has the path of the index by which its module finds it, "norm/ema_state_index/0".
    """
    import equinox as eqx

    variables, state = (variables[0], variables[1]) if model_of(variables) is not variables else (variables, None)
    named = []
    for place, leaf in jax.tree_util.tree_leaves_with_path(variables):
        named.append((path_of(place, boxed=False) if is_weight(leaf) else "", False, leaf))
    if state is None:
        return named
    is_index = functools.partial(is_instance, eqx.nn.StateIndex)
    indices = jax.tree_util.tree_leaves_with_path(variables, is_leaf=is_index)
    paths = {index.marker: path_of(place, boxed=False) for place, index in indices if is_index(index)}
    parts, markers = state.tree_flatten()
    for marker, part in zip(markers, parts, strict=True):
        for place, leaf in jax.tree_util.tree_leaves_with_path(part):
            path = "/".join(filter(None, (paths.get(marker, str(marker)), path_of(place, boxed=False))))
            named.append((path if is_weight(leaf) else "", True, leaf))
    return named


MANY_BATCHES = 1_000_000


def equinox_with_leaves(variables: Any, leaves: Mapping[str, Any]) -> Any:
    """Return the tree with these leaves in their places.

    A batch norm that gets its statistics has seen batches before: its next one is not the first, which it would take
    in the place of the mean of all, and it need not correct for a start at 0.

    Raises:
        Refused: the tree has no leaf of such a path.
    """
    import equinox as eqx

    whole = put_back(variables, [(name, leaf) for name, _, leaf in equinox_leaves(variables)], leaves)
    if model_of(whole) is whole or not any("_state_index" in path for path in leaves):
        return whole
    model, state = whole
    is_norm = functools.partial(is_instance, eqx.nn.BatchNorm)
    for norm in filter(is_norm, jax.tree.leaves(model, is_leaf=is_norm)):
        if getattr(norm, "ema_first_time_index", None) is not None:
            state = state.set(norm.ema_first_time_index, jnp.array(False))
        if (counter := getattr(norm, "batch_counter", None)) is not None:
            state = state.set(counter, jnp.full_like(state.get(counter), MANY_BATCHES))
    return model, state


# Each class of Equinox modules -> the class of the same name that holds a path and taps.
tapped_classes: dict[type, type] = {}


def tapped_class(kind: type) -> type:
    """Return a subclass with one more static field, the path, whose calls are tapped.

    The path is part of the tree's structure, so it survives flattening, `vmap`, `scan` and `filter_jit`.
    """
    import equinox as eqx

    if kind in tapped_classes:
        return tapped_classes[kind]

    def watch_method(name: str) -> Callable[..., Any]:
        @functools.wraps(getattr(kind, name))
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            modules = watched.get()
            if modules is None:
                return getattr(kind, name)(self, *args, **kwargs)
            return enter_equinox(modules, name, self, lambda: getattr(kind, name)(self, *args, **kwargs))

        return call

    names = {name for owner in kind.__mro__ if issubclass(owner, eqx.Module) for name in own_methods(owner, "equinox")}
    body = {
        "__annotations__": {"tap_path": str},
        "tap_path": eqx.field(static=True, default=""),
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        **{
            name: watch_method(name)
            for name in names
            if name == "__call__" or is_method(inspect.getattr_static(kind, name))
        },
    }
    tapped_classes[kind] = type(kind)(kind.__name__, (kind,), body)
    return tapped_classes[kind]


def enter_equinox(modules: Modules, name: str, module: Any, run: Callable[[], Any]) -> Any:
    """Tap what a module returns, but for the state that it may return beside it."""
    import equinox as eqx

    states: list[Any] = []

    def value() -> Any:
        output = run()
        if isinstance(output, tuple) and len(output) == 2 and isinstance(output[1], eqx.nn.State):
            states.append(output[1])
            return output[0]
        return output

    output = enter(modules, module.tap_path, name, module, value, is_equinox_object)
    return (output, *states) if states else output


def is_equinox_object(part: Any) -> bool:
    """Say whether a part of an output is a module that can be called, or a state."""
    import equinox as eqx

    return isinstance(part, eqx.nn.State | eqx.nn.StateIndex) or (isinstance(part, eqx.Module) and callable(part))


def tapped_copy(part: Any, path: str = "") -> Any:
    """Return a tree with each Equinox module made one of a tapped class that holds its path."""
    import equinox as eqx

    is_module = functools.partial(is_instance, eqx.Module)
    if not is_module(part):
        if model_of(part) is not part:
            return (tapped_copy(part[0], path), part[1])
        return jax.tree_util.tree_map_with_path(
            lambda place, leaf: tapped_copy(leaf, add_path(path, place)) if is_module(leaf) else leaf,
            part,
            is_leaf=is_module,
        )
    if isinstance(part, eqx.nn.StateIndex) or (type(part).__module__.startswith("equinox._") and not callable(part)):
        return part
    copy: Any = object.__new__(tapped_class(type(part)))
    for field in dataclasses.fields(part):
        if field.name in vars(part):
            value = vars(part)[field.name]
            if not field.metadata.get("static", False):
                value = tapped_copy(value, f"{path}/{field.name}".lstrip("/"))
            object.__setattr__(copy, field.name, value)
    object.__setattr__(copy, "tap_path", path)
    return copy


def add_path(path: str, place: tuple[Any, ...]) -> str:
    """Return the path of a part of a tree: the path of the tree, followed by the place of the part in it."""
    return "/".join(filter(None, (path, path_of(place, boxed=False))))


@contextlib.contextmanager
def watch_equinox(modules: Modules) -> Iterator[None]:
    """Let every Equinox module without a path that is entered become a tapped copy, and the root of its paths."""
    import equinox as eqx

    def watch_method(kind: type, name: str, original: Any) -> Any:
        @functools.wraps(getattr(kind, name))  # its signature tells which keyword arguments it takes
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            if hasattr(self, "tap_path") or type(self) is not kind:
                return original.__get__(self, type(self))(*args, **kwargs)
            return getattr(tapped_copy(self), name)(*args, **kwargs)

        return type(original)(call) if type(original).__name__ == "_wrap_method" else call

    tapped = set(tapped_classes.values())
    methods = {
        (kind, name): watch_method(kind, name, method)
        for kind in all_subclasses(eqx.Module)
        if kind not in tapped and not kind.__module__.startswith("equinox._")
        for name, method in own_methods(kind, "equinox").items()
    }
    with patched(methods):
        yield


# Haiku


def adapt_haiku(transformed: Any, kwargs: Keywords) -> Model:
    """Adapt what `hk.transform` or `hk.transform_with_state` returns; its variables are {"params": …, "state": …}."""
    stateful = is_a(transformed, "haiku", "TransformedWithState")
    keyed = "rng" in parameters_of(transformed.apply)

    def init(key: jax.Array, inputs: Call) -> Any:
        # Batch norms make their averages in training mode alone.
        options = {**kwargs.of(transformed.init, True), **inputs.kwargs}
        variables = transformed.init(key, *inputs.args, **options)
        return {"params": variables[0], "state": variables[1]} if stateful else {"params": variables}

    def apply(variables: Any, inputs: Call, training: bool) -> tuple[Any, Any]:
        options = {**kwargs.of(transformed.apply, training), **inputs.kwargs}
        state = (variables["state"],) if stateful else ()
        key = (jax.random.PRNGKey(0),) if keyed else ()
        with scope(""), without_dropout() if training else contextlib.nullcontext():
            result = transformed.apply(variables["params"], *state, *key, *inputs.args, **options)
        if not stateful:
            return result, variables
        return result[0], {**variables, "state": result[1]} if training else variables

    return tree_model("Haiku", apply, init)


@contextlib.contextmanager
def watch_haiku(modules: Modules) -> Iterator[None]:
    """Tap every method of every Haiku module, but for those that hold parameters or a moving average."""
    import haiku as hk

    holders = ("ExponentialMovingAverage", "EMAParamsTree", "LiftingModule")

    def intercept(run: Callable[..., Any], args: Any, kwargs: Any, call: Any) -> Any:
        module, method = call.module, call.method_name
        if method == "__init__" or type(module).__name__ in holders or not hasattr(module, "module_name"):
            return run(*args, **kwargs)
        return enter(modules, module.module_name, method, module, lambda: run(*args, **kwargs))

    with hk.intercept_methods(intercept):
        yield


@contextlib.contextmanager
def haiku_without_dropout() -> Iterator[None]:
    """Let `hk.dropout` return its input, also where a model imported the function itself."""
    import haiku as hk

    original = hk.dropout.__code__
    hk.dropout.__code__ = (lambda rng, rate, x, broadcast_dims=(): x).__code__
    try:
        yield
    finally:
        hk.dropout.__code__ = original


@contextlib.contextmanager
def attention_without_dropout(name: str) -> Iterator[None]:
    """Let Flax's functions of attention keep every weight, also where a model imported such a function itself.

    They divide what is kept by the probability to be kept: both are the same here.
    """
    attention: Any = sys.modules[name]
    original = attention.random

    def keep(key: Any, share: Any, shape: Sequence[int] = ()) -> jax.Array:
        note_rate(1 - share)
        return jnp.broadcast_to(share, shape)

    attention.random = types.SimpleNamespace(bernoulli=keep)
    try:
        yield
    finally:
        attention.random = original


WATCHERS = {"flax.linen": watch_linen, "flax.nnx": watch_nnx, "equinox": watch_equinox, "haiku": watch_haiku}
DROPOUTS: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "flax.linen": linen_without_dropout,
    "flax.linen.attention": functools.partial(attention_without_dropout, "flax.linen.attention"),
    "flax.nnx.nn.attention": functools.partial(attention_without_dropout, "flax.nnx.nn.attention"),
    "haiku": haiku_without_dropout,
}

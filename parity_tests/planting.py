"""Tools that plant faults in any pair: for `faults.py`, and for faults of your own.

A fault is planted by replacing fields of the pair. Nothing here knows a particular network: a place is found by its
kind, and a pair that has no such place raises a LookupError that says so. Faults inside of a JAX model need no access
to its source: the model is traced, an equation or a value of the traced program is changed, and the program runs on.
"""

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import numpy as np
import torch
from jax import Array
from jax import numpy as jnp
from torch import nn

from parity_tests.harness.capture import Case
from parity_tests.harness.compare import Refused
from parity_tests.harness.pair import Batch, Inputs, Pair
from parity_tests.harness.taps import arrays_of, trace
from parity_tests.harness.weights import Entry

Find = Callable[[Pair], str]  # the name of a layer or a tensor in PyTorch
Plant = Callable[[Pair], Pair]
Leaves = dict[str, Any]  # by path

NORMS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


class NoPlace(Refused, LookupError):
    """A pair has no place for a fault. It may show while the model runs, and is no error of the model's."""


def set_fields(**fields: Any) -> Plant:
    """Give the pair other values in these fields."""
    return lambda pair: dataclasses.replace(pair, **fields)


@lru_cache(maxsize=16)
def case_of(pair: Pair) -> Case:
    """Return the pair made ready, with the map of its weights."""
    case = Case(pair)
    assert case.weight_map  # is found now, and not inside of a trace
    return case


# --- Places, by PyTorch's names ---


def find_layer(*kinds: type[nn.Module], which: int = 0) -> Find:
    """Return how to find the layer of these kinds: the first one, or the one at index `which`."""

    def find(pair: Pair) -> str:
        names = [name for name, module in pair.new_module().named_modules() if isinstance(module, kinds)]
        if not names:
            raise LookupError(f"{pair.title()} has no {name_kinds(kinds)}")
        return names[which]

    return find


def name_kinds(kinds: Sequence[type[nn.Module]]) -> str:
    """Return the names of classes, for a message."""
    return " or ".join(kind.__name__.lstrip("_") for kind in kinds) or "layer"


def find_first(*finds: Find) -> Find:
    """Return how to find what the first of these ways finds that finds anything."""

    def find(pair: Pair) -> str:
        for way in finds[:-1]:
            with contextlib.suppress(LookupError):
                return way(pair)
        return finds[-1](pair)

    return find


def find_tensor(*kinds: type[nn.Module], name: str = "weight", which: int = 0) -> Find:
    """Return how to find a tensor with this name in layers of these kinds, or in any layer; of tied ones the first."""

    def find(pair: Pair) -> str:
        module = pair.new_module()
        names = [
            full
            for full, _ in module.named_parameters()
            if full.rpartition(".")[2].startswith(name)
            and (not kinds or isinstance(module.get_submodule(full.rpartition(".")[0]), kinds))
        ]
        if not names:
            raise LookupError(f"{pair.title()} has no {name} in a {name_kinds(kinds)}")
        return names[which]

    return find


def layer_of(find: Find) -> Find:
    """Return how to find the layer that holds the tensor."""
    return lambda pair: find(pair).rpartition(".")[0]


def layer_before(find: Find) -> Find:
    """Return how to find the layer that is declared in front of this one."""

    def before(pair: Pair) -> str:
        names = [name for name, module in pair.new_module().named_modules() if not list(module.children())]
        place = names.index(find(pair))
        if not place:
            raise LookupError(f"{pair.title()} has no layer in front of {names[0]}")
        return names[place - 1]

    return before


def find_weight_after_flatten(pair: Pair) -> str:
    """Return the name of the linear weight whose rows JAX has in another order: it is more than transposed."""
    weight_map = case_of(pair).weight_map
    for entry in weight_map.entries:
        shape = weight_map.tensors[entry.torch[0]]
        if len(entry.torch) == len(entry.jax) == 1 and len(shape) == 2:
            probe = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
            (leaf,) = entry.convert(probe)
            if leaf.shape == shape[::-1] and not np.array_equal(leaf, probe.T):
                return entry.torch[0]
    raise LookupError(f"{pair.title()} has no linear layer behind a flatten of several channels")


def find_after_flatten(pair: Pair) -> str:
    """Return the name of the layer behind the flatten."""
    find_weight_after_flatten(pair)
    names = [name for name, module in pair.new_module().named_modules() if not list(module.children())]
    kinds = [type(pair.new_module().get_submodule(name)) for name in names]
    return names[kinds.index(nn.Flatten) + 1]


def find_fused_projection(pair: Pair) -> str:
    """Return the name of the weight that projects to queries, keys and values at once."""
    for name, tensor in pair.new_module().named_parameters():
        if tensor.ndim == 2 and tensor.shape[0] == 3 * tensor.shape[1] and "_hh" not in name and "_ih" not in name:
            return name
    raise LookupError(f"{pair.title()} has no projection to queries, keys and values at once")


def find_attention(pair: Pair) -> str:
    """Return the name of the first layer of attention: the one that holds the projections."""
    module = pair.new_module()
    for name, layer in module.named_modules():
        if isinstance(layer, nn.MultiheadAttention) or any(hasattr(layer, part) for part in ("query", "q_proj", "q")):
            return name
    return find_fused_projection(pair).rpartition(".")[0].rpartition(".")[0]


def find_gated(pair: Pair, name: str = "weight_hh") -> str:
    """Return the name of a tensor of the first LSTM or GRU."""
    return find_tensor(nn.LSTM, nn.GRU, name=name)(pair)


def find_tied(pair: Pair) -> str:
    """Return the name of a parameter that has several names."""
    module = pair.new_module()
    first = {id(tensor): name for name, tensor in reversed(list(module.named_parameters(remove_duplicate=False)))}
    for name, tensor in module.named_parameters(remove_duplicate=False):
        if first[id(tensor)] != name:
            return first[id(tensor)]
    raise LookupError(f"{pair.title()} has no tied weights")


def require(pair: Pair, field: str) -> Any:
    """Return an optional field of the pair that a fault needs."""
    value = getattr(pair, field)
    if value is None:
        raise LookupError(f"{pair.title()} declares no {field}")
    return value


# --- Weights on their way to JAX ---


def change_entries(find: Find, change: Callable[[Entry, int], Entry | None]) -> Plant:
    """Replace the entries of the map that carry a tensor; the change gets the place of the tensor in the entry."""

    def plant(pair: Pair) -> Pair:
        name, weight_map = find(pair), case_of(pair).weight_map
        entries = [
            change(entry, entry.torch.index(name)) if name in entry.torch else entry for entry in weight_map.entries
        ]
        kept = tuple(entry for entry in entries if entry is not None)
        return dataclasses.replace(pair, weights=dataclasses.replace(weight_map, entries=kept))

    return plant


def change_tensor(find: Find, change: Callable[[Array], Array]) -> Plant:
    """Change one tensor, in PyTorch's layout, before it is carried to JAX."""

    def changed(entry: Entry, place: int) -> Entry:
        def convert(*tensors: Any) -> tuple[Any, ...]:
            return entry.convert(*tensors[:place], change(jnp.asarray(tensors[place])), *tensors[place + 1 :])

        return entry._replace(convert=convert, how=f"{entry.how} of a changed tensor")

    return change_entries(find, changed)


def change_leaves(find: Find, change: Callable[[Array], Array]) -> Plant:
    """Change the leaves that one tensor fills, in JAX's layout, once they are carried."""

    def changed(entry: Entry, place: int) -> Entry:
        return entry._replace(convert=lambda *tensors: tuple(change(leaf) for leaf in entry.convert(*tensors)))

    return change_entries(find, changed)


def drop_tensor(find: Find) -> Plant:
    """Leave a tensor out of the map."""
    return change_entries(find, lambda entry, place: None)


def only_transpose_after_flatten(pair: Pair) -> Pair:
    """Leave the rows of the linear weight behind the flatten in PyTorch's order."""

    def transposed(entry: Entry, place: int) -> Entry:
        return entry._replace(convert=lambda weight: (weight.T,), how="linear()")

    return change_entries(find_weight_after_flatten, transposed)(pair)


def swap_blocks(first: int, second: int, blocks: int) -> Callable[[Array], Array]:
    """Return a function that exchanges two of so many equal blocks of rows."""

    def swapped(array: Array) -> Array:
        parts = list(jnp.split(array, blocks))
        parts[first], parts[second] = parts[second], parts[first]
        return jnp.concatenate(parts)

    return swapped


def change_one(change: Callable[[Array], Any]) -> Callable[[Array], Array]:
    """Return a function that changes the last value of an array."""

    def changed(array: Array) -> Array:
        flat = jnp.asarray(array).reshape(-1)
        return flat.at[-1].set(change(flat[-1])).reshape(array.shape)

    return changed


def round_through(dtype: str) -> Callable[[Array], Array]:
    """Return a function that rounds an array to another dtype and casts it back. The gradient is not rounded."""
    info = jnp.finfo(dtype)

    def rounded(array: Array) -> Array:
        # A cast there and back may be left out by the compiler, reduce_precision may not.
        reduced = jax.lax.reduce_precision(array, exponent_bits=info.nexp, mantissa_bits=info.nmant)
        return array + jax.lax.stop_gradient(reduced - array)

    return rounded


# --- The JAX model ---


def with_model(pair: Pair, **parts: Any) -> Pair:
    """Replace parts of the adapted JAX model."""
    return dataclasses.replace(pair, jax_model=case_of(pair).model._replace(**parts))


def paths_of(pair: Pair, tensor: str) -> list[str]:
    """Return the paths of the leaves that are filled by this tensor alone."""
    entries = case_of(pair).weight_map.entries
    paths = [path for entry in entries if entry.torch == (tensor,) for path in entry.jax]
    if not paths:
        raise LookupError(f"{pair.title()} has no leaf in JAX for {tensor} alone")
    return paths


def change_in_use(find: Find, change: Callable[[Array], Array]) -> Plant:
    """Let the JAX model compute with a changed leaf, where its weights are the right ones."""

    def plant(pair: Pair) -> Pair:
        model, paths = case_of(pair).model, paths_of(pair, find(pair))

        def apply(variables: Any, inputs: Any, training: bool) -> tuple[Any, Any]:
            leaves = model.leaves(variables)
            changed = model.with_leaves(variables, {path: change(leaves[path]) for path in paths})
            outputs, after = model.apply(changed, inputs, training)
            return outputs, model.with_leaves(after, {path: leaves[path] for path in paths}) if training else variables

        return with_model(pair, apply=apply)

    return plant


def add_leaf(pair: Pair) -> Pair:
    """Give the JAX model a parameter that PyTorch does not have."""
    case, path = case_of(pair), "extra/scale"
    model, weight_map = case.model, case.weight_map
    planted = with_model(
        pair,
        variables=case.own_variables,
        leaves=lambda variables: {**model.leaves(variables), path: jnp.ones(3)},
        with_leaves=lambda variables, leaves: model.with_leaves(
            variables, {name: leaf for name, leaf in leaves.items() if name != path}
        ),
    )
    larger = dataclasses.replace(weight_map, leaves={**weight_map.leaves, path: (3,)})
    return dataclasses.replace(planted, weights=larger, jax_init=None)


def add_parameter(pair: Pair) -> Pair:
    """Give the PyTorch module a parameter that JAX does not have."""
    weight_map = case_of(pair).weight_map
    planted = change_module(lambda module: module.register_parameter("extra", nn.Parameter(torch.ones(3))))(pair)
    larger = dataclasses.replace(weight_map, tensors={**weight_map.tensors, "extra": (3,)})
    return dataclasses.replace(planted, weights=larger)


def ignore_mask(pair: Pair) -> Pair:
    """Let the JAX model take every position for a token."""
    model = case_of(pair).model
    if not any("mask" in name for name in pair.draw_inputs(0, 2).kwargs):
        raise LookupError(f"{pair.title()} has no mask among its inputs")

    def apply(variables: Any, inputs: Any, training: bool) -> tuple[Any, Any]:
        masks = {name: jnp.ones_like(mask) for name, mask in inputs.kwargs.items() if "mask" in name}
        return model.apply(variables, Inputs(*inputs.args, **{**inputs.kwargs, **masks}), training)

    return with_model(pair, apply=apply)


# --- Training mode ---


class Statistic(NamedTuple):
    """One running statistic.

    Attributes:
        path: of the leaf in JAX.
        is_variance: or a mean.
        momentum: the share of the batch.
        values: the number of values of one example that one statistic is made of.
    """

    path: str
    is_variance: bool
    momentum: float
    values: int


def find_statistics(pair: Pair) -> list[Statistic]:
    """Return all running statistics of batch normalisation.

    Raises:
        LookupError: the pair has none.
    """
    case, statistics = case_of(pair), []
    module = copy.deepcopy(case.module)
    inputs = case.torch_inputs(pair.draw_inputs(0, 1)).map(torch.from_numpy)
    sizes: dict[str, int] = {}
    layers = {name: layer for name, layer in module.named_modules() if isinstance(layer, NORMS[0])}
    for name, layer in layers.items():
        layer.register_forward_hook(lambda layer, _, output, name=name: sizes.update({name: output[0, 0].numel()}))
    module(*inputs.args, **inputs.kwargs)
    for name, layer in layers.items():
        for part in ("running_mean", "running_var"):
            (path,) = paths_of(pair, f"{name}.{part}")
            statistics.append(Statistic(path, part == "running_var", layer.momentum or 0.1, sizes[name]))
    if not statistics:
        raise LookupError(f"{pair.title()} has no running statistics")
    return statistics


def change_statistics(change: Callable[[Statistic, Array, Array, int], Array]) -> Plant:
    """Replace statistics by change(statistic, old value, new value, size of the batch)."""

    def plant(pair: Pair) -> Pair:
        model, statistics = case_of(pair).model, find_statistics(pair)

        def apply(variables: Any, inputs: Any, training: bool) -> tuple[Any, Any]:
            outputs, after = model.apply(variables, inputs, training)
            if not training:
                return outputs, after
            size = len(arrays_of((inputs.args, inputs.kwargs))[0])
            old, new = model.leaves(variables), model.leaves(after)
            changed = {item.path: change(item, old[item.path], new[item.path], size) for item in statistics}
            return outputs, model.with_leaves(after, changed)

        return with_model(pair, apply=apply)

    return plant


def keep_old(statistic: Statistic, old: Array, new: Array, size: int) -> Array:
    """Do not update a statistic."""
    return old


def exchange_momentum(statistic: Statistic, old: Array, new: Array, size: int) -> Array:
    """Give the old value and the batch each other's share."""
    share = statistic.momentum
    return share * old + (1 - share) * (new - (1 - share) * old) / share


def bias_variance(statistic: Statistic, old: Array, new: Array, size: int) -> Array:
    """Take the variance of the batch for that of the population."""
    kept, count = 1 - statistic.momentum, size * statistic.values
    return kept * old + (new - kept * old) * (count - 1) / count if statistic.is_variance else new


def normalise_by_running_statistics(pair: Pair) -> Pair:
    """Let the JAX model compute in training mode as in evaluation mode; its statistics are the right ones."""
    model = case_of(pair).model
    find_statistics(pair)

    def apply(variables: Any, inputs: Any, training: bool) -> tuple[Any, Any]:
        outputs, after = model.apply(variables, inputs, False)
        if not training:
            return outputs, after

        def run(variables: Any, args: Any, kwargs: Any) -> Any:
            return model.apply(variables, Inputs(*args, **kwargs), True)[1]

        call = variables, inputs.args, dict(inputs.kwargs)
        after, _ = trace(run, *call, verify=False).run(*call, rule=lambda name, value, slot: (None, value))
        return outputs, after  # the second run has no taps

    return with_model(pair, apply=apply)


# --- The PyTorch module ---


def change_module(change: Callable[[nn.Module], None]) -> Plant:
    """Change every new PyTorch module."""

    def plant(pair: Pair) -> Pair:
        given = pair.torch_module
        if isinstance(given, nn.Module):
            module = copy.deepcopy(given)
            change(module)
            return dataclasses.replace(pair, torch_module=module)

        def make() -> nn.Module:
            module = given()
            change(module)
            return module

        return dataclasses.replace(pair, torch_module=make)

    return plant


# --- Data and the start ---


def change_batches(change: Callable[[Batch], Batch]) -> Plant:
    """Change every batch of JAX's pipeline."""

    def plant(pair: Pair) -> Pair:
        batches = require(pair, "jax_batches")
        return dataclasses.replace(pair, jax_batches=lambda seed, epoch: map(change, batches(seed, epoch)))

    return plant


def change_initialisation(change: Callable[[Array, Leaves], Leaves]) -> Plant:
    """Start JAX from change(key, the leaves that it draws from this key)."""

    def plant(pair: Pair) -> Pair:
        case = case_of(pair)
        if not case.can_draw:
            raise LookupError(f"{pair.title()} draws no weights in JAX")

        def draw(key: Array) -> Any:
            variables = pair.jax_init(key) if callable(pair.jax_init) else case.draw_variables(0)
            return case.model.with_leaves(variables, change(key, case.model.leaves(variables)))

        return dataclasses.replace(pair, jax_init=draw)

    return plant

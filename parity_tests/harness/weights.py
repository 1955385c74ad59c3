"""The map of weights: which PyTorch tensors fill which JAX leaves, and how, one function for each layer type.

A map is a list of entries. One entry carries a few tensors to a few leaves, so that a large tree is carried leaf by
leaf. `jax.grad` passes through every entry; the gradients then come out under PyTorch's names.
"""

import ast
import difflib
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import numpy as jnp
from jax.extend.core import ClosedJaxpr, Var, jaxpr_as_fun

from parity_tests.harness.compare import Refused

Array = Any  # a NumPy array, a JAX array or a tracer: a conversion works on each
Shape = tuple[int, ...]

WEIGHT = ("kernel", "w", "weight", "W")
SCALE = ("scale", "weight", "gamma", "w", "g")
BIAS = ("bias", "b", "offset", "beta")
TABLE = ("embedding", "embeddings", "weight", "table", "w")
MEAN = ("mean", "running_mean", "moving_mean", "~/mean_ema/average")
VARIANCE = ("var", "running_var", "moving_variance", "~/var_ema/average")
INPUT_WEIGHT = ("dense_i/kernel", "weight_ih", "w_ih", "w_i", "i/kernel")
STATE_WEIGHT = ("dense_h/kernel", "weight_hh", "w_hh", "w_h", "h/kernel")
JOINT_WEIGHT = ("linear/w", "w_joint")  # [inputs + hidden, gates]; the first is Haiku's
ROLES = {
    "query": ("query", "q", "q_proj", "query_proj", "to_q"),
    "key": ("key", "k", "k_proj", "key_proj", "to_k"),
    "value": ("value", "v", "v_proj", "value_proj", "to_v"),
    "out": ("out", "out_proj", "output_proj", "o", "o_proj", "proj", "c_proj", "to_out", "linear", "attention_output"),
}
KNOWN = {*WEIGHT, *SCALE, *BIAS, *TABLE, *MEAN, *VARIANCE}
PARAMETRIZED = "parametrizations.weight."
STORED = (  # what torch.nn.utils keeps of a weight that it computes anew for each call, in the weight's own layout
    "weight_v",
    "weight_orig",
    f"{PARAMETRIZED}original1",
    f"{PARAMETRIZED}original",
)
PROJECTED = "weight_hr"  # of an LSTM with proj_size, a linear layer behind its output
AS_IT_IS = "weight"  # Equinox and plain ports of PyTorch keep its name and its layout; "kernel" and "w" turn it


class CannotCarry(Refused):
    """The weights cannot be carried from PyTorch to JAX; the message says which and why."""


class NoInverse(CannotCarry):
    """The weights cannot be carried back from JAX to PyTorch; the message says which and why."""


class Entry(NamedTuple):
    """How a few tensors become a few leaves.

    Attributes:
        torch: names in the state dict.
        jax: paths of leaves, such as "conv1/kernel".
        convert: PyTorch's tensors, in the order of `torch`, to the leaves, in the order of `jax`. It only uses what
            NumPy and JAX share or `jax.numpy`, so that it can be differentiated.
        how: the Python that makes the same rule, for example `linear(flatten=(64, 7, 7))`.
    """

    torch: tuple[str, ...]
    jax: tuple[str, ...]
    convert: Callable[..., tuple[Array, ...]]
    how: str

    def convert_back(self, shapes: Sequence[Shape], leaves: Sequence[Array]) -> Sequence[Array]:
        """Carry leaves back to tensors of these shapes, by the transposed map."""
        if len(shapes) == len(leaves) == 1 and not isinstance(leaves[0], jax.core.Tracer):
            leaf = np.asarray(leaves[0])
            tensor = np.zeros(shapes[0], leaf.dtype)
            (view,) = self.convert(tensor)
            if is_whole_view(view, tensor):
                view[...] = leaf  # JAX would compile a program for each shape
                return (tensor,)
        given = [jax.ShapeDtypeStruct(shape, leaves[0].dtype) for shape in shapes]
        back: Sequence[Array] = jax.linear_transpose(self.convert, *given)(tuple(map(jnp.asarray, leaves)))
        return back


class Layer(NamedTuple):
    """One PyTorch module and the place in JAX that a rule carries it to.

    Attributes:
        name: the module's name in PyTorch, "" for the whole network.
        tensors: shapes of all tensors below it that are to be carried, by their names inside of the module.
        paths: where to, in JAX: one path of a module or a leaf, or several where the rule takes several.
        leaves: shapes of all leaves of the JAX model, by path.
        module: the PyTorch module.
        called: the name in the state dict of a tensor that the user names alone, by the name that its rule knows.
    """

    name: str
    tensors: Mapping[str, Shape]
    paths: tuple[str, ...]
    leaves: Mapping[str, Shape]
    module: Any = None
    called: Mapping[str, str] = {}

    def tensor(self, name: str) -> str:
        """Return the name of this tensor in the state dict."""
        return self.called.get(name, join(self.name, ".", name))

    def find(self, names: Sequence[str], size: int, path: str | None = None) -> str | None:
        """Return the path of the leaf with one of these names and `size` values, or None.

        Where no name fits, the only leaf of that size that stands directly below the path and has a name of its own is
        taken: plain functions name leaves as they like.
        """
        path = self.paths[0] if path is None else path
        if path in self.leaves:
            return path
        for name in names:
            if (leaf := join(path, "/", name)) in self.leaves:
                return leaf
        below = [leaf for leaf in self.leaves if parent(leaf) == path and leaf.rpartition("/")[2] not in KNOWN]
        fitting = [leaf for leaf in below if math.prod(self.leaves[leaf]) == size]
        return fitting[0] if len(fitting) == 1 else None

    def find_name(self, names: Sequence[str]) -> str | None:
        """Return the path of the leaf with one of these names, or None."""
        return next((leaf for name in names if (leaf := join(self.paths[0], "/", name)) in self.leaves), None)

    def gate(self, gate: str, side: str, name: str) -> str | None:
        """Return the path of the kernel or bias of a gate in Flax: "ii", "hf"; NNX writes "if_"."""
        return self.find_name((f"{side}{gate}/{name}", f"{side}{gate}_/{name}"))

    def inside(self, names: Sequence[str]) -> str | None:
        """Return the path of the module with one of these names, or None."""
        candidates = (join(self.paths[0], "/", name) for name in names)
        return next((path for path in candidates if any(leaf.startswith(f"{path}/") for leaf in self.leaves)), None)

    def named(self, weight: str, bias: str) -> "Layer":
        """Return the layer that has these tensors as its weight and bias."""
        names = {"weight": weight, "bias": bias}
        return self._replace(
            tensors={name: self.tensors[own] for name, own in names.items() if own in self.tensors},
            called={name: self.tensor(own) for name, own in names.items()},
        )

    def with_weight(self) -> "Layer":
        """Return the layer; where its weight is normalised, what is stored of it in its layout is called the weight."""
        for name in STORED:
            if len(self.tensors.get(name, ())) > 1 and "weight" not in self.tensors:
                rest = {other: shape for other, shape in self.tensors.items() if other != name}
                called = {**self.called, "weight": self.tensor(name)}
                return self._replace(tensors={"weight": self.tensors[name], **rest}, called=called)
        return self

    def problem(self, words: str) -> CannotCarry:
        """Return an error that names both sides."""
        return CannotCarry(f"{self.name or 'the network'} -> {', '.join(self.paths) or 'the root'}: {words}")


@dataclass(frozen=True)
class Rule:
    """How one layer is carried. The functions below make rules; a user may write one.

    Attributes:
        carry: gives the entries of a layer, and raises CannotCarry where the rule does not fit it.
        to: the paths in JAX, or patterns of them. Empty: the name that it has in PyTorch.
        how: the Python that makes this rule, without the paths.
    """

    carry: Callable[[Layer], list[Entry]]
    to: tuple[str, ...] = ()
    how: str = "rule"


def join(front: str, separator: str, back: str) -> str:
    """Join two parts of a name; either may be empty."""
    return f"{front}{separator}{back}" if front and back else front or back


def size_of(shape: Shape) -> str:
    """Return a shape in words: "64x3x7x7"."""
    return "x".join(map(str, shape)) or "scalar"


def parent(path: str) -> str:
    """Return the path of the module that holds this leaf."""
    return path.rpartition("/")[0]


# The map


@dataclass(frozen=True, eq=False)
class WeightMap:
    """All entries of a pair.

    Attributes:
        entries: each leaf stands in one of them; a tensor that PyTorch ties may stand in several.
        tensors: the shapes of PyTorch's tensors, by name; a tied tensor has one name here.
        leaves: the shapes of JAX's leaves, by path.
        parameters: the names of the tensors that are parameters. The others are buffers.
        unused: the names of the tensors that the user leaves out.
    """

    entries: tuple[Entry, ...]
    tensors: Mapping[str, Shape]
    leaves: Mapping[str, Shape]
    parameters: frozenset[str] = frozenset()
    unused: frozenset[str] = frozenset()

    def to_leaves(self, tensors: Mapping[str, Array]) -> dict[str, Array]:
        """Carry PyTorch's tensors to JAX's leaves, by path. The dtype stays. Can be differentiated."""
        leaves: dict[str, Array] = {}
        for entry in self.entries:
            given = [tensors[name] for name in entry.torch]  # in NumPy as far as it goes: JAX compiles for each shape
            values = entry.convert(*(value if isinstance(value, jax.Array) else np.asarray(value) for value in given))
            leaves.update(zip(entry.jax, map(jnp.asarray, values), strict=True))
        return leaves

    def to_torch(self, leaves: Mapping[str, Array]) -> dict[str, Array]:
        """Carry JAX's leaves (weights, gradients or moments) back, by PyTorch's names.

        A tensor that fills several leaves gets their mean: the transposed map, divided by how often a value is used.

        Raises:
            NoInverse: an entry computes new values, such as the sum of two biases.
        """
        lost = sorted({name for entry in self.entries for name in entry.torch} - self.rearranges)
        if lost:
            raise NoInverse(f"there is no way back to {', '.join(lost)}: JAX does not hold every value as it is")
        result: dict[str, Array] = {}
        before: dict[str, np.ndarray] = {}
        for entry in self.entries:
            shapes = [self.tensors[name] for name in entry.torch]
            back = entry.convert_back(shapes, [leaves[path] for path in entry.jax])
            for name, value in zip(entry.torch, back, strict=True):
                if name in self.counts:  # the mean moves to each further value: equal ones leave it as it is
                    own = count_uses(entry, [self.tensors[other] for other in entry.torch])[name]
                    assert own is not None  # the map only rearranges
                    before[name] = before.get(name, np.zeros_like(own)) + own
                    share = (own / np.maximum(before[name], 1)).astype(value.dtype)
                    mean = result.get(name, jnp.zeros_like(value))
                    result[name] = mean + (value / np.maximum(own, 1).astype(value.dtype) - mean) * share
                else:
                    result[name] = result[name] + value if name in result else value
        return result

    @cached_property
    def uses(self) -> dict[str, np.ndarray | None]:
        """Return, for every tensor, how often each of its values stands in JAX, or None where JAX computes with it."""
        uses: dict[str, np.ndarray | None] = {}
        for entry in self.entries:
            for name, count in count_uses(entry, [self.tensors[name] for name in entry.torch]).items():
                if name in uses:  # only then: a sum is a whole array, a count one number
                    before = uses[name]
                    count = None if count is None or before is None else before + count
                uses[name] = count
        return uses

    @cached_property
    def lost(self) -> frozenset[str]:
        """Return the tensors with a value that has no influence on any leaf."""
        reached = {name: count > 0 for name, count in self.uses.items() if count is not None}
        for entry in self.entries:
            if not set(entry.torch) - reached.keys():
                continue
            rng = np.random.default_rng(0)
            given = [jnp.asarray(rng.normal(size=self.tensors[name])) for name in entry.torch]
            leaves, back = jax.vjp(
                lambda *tensors, entry=entry: tuple(map(jnp.asarray, entry.convert(*tensors))), *given
            )
            slopes = back(tuple(jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype) for leaf in leaves))
            for name, slope in zip(entry.torch, slopes, strict=True):
                if self.uses[name] is None:
                    reached[name] = reached.get(name, False) | (np.asarray(slope) != 0)
        return frozenset(name for name, values in reached.items() if not values.all())

    @cached_property
    def rearranges(self) -> frozenset[str]:
        """Return the tensors whose values all stand in JAX unchanged. The same map carries moments there and back."""
        return frozenset(name for name, count in self.uses.items() if count is not None and count.min(initial=1) > 0)

    @cached_property
    def counts(self) -> dict[str, np.ndarray]:
        """Return the counts of `uses` for the tensors with a value that stands in JAX more than once."""
        return {name: count for name, count in self.uses.items() if count is not None and count.max(initial=0) > 1}


def count_uses(entry: Entry, shapes: Sequence[Shape]) -> dict[str, np.ndarray | None]:
    """Count how often each value of a tensor stands in the leaves. None: new values are computed from a tensor."""
    if (whole := count_views(entry, shapes)) is not None:
        return dict(whole)
    try:
        index = read_gather(lambda tensors: entry.convert(*tensors), shapes)
    except NoInverse:
        return dict.fromkeys(entry.torch)
    starts = np.cumsum([0, *map(math.prod, shapes)])
    counts = np.bincount(np.concatenate([part.ravel() for part in index]) + 1, minlength=starts[-1] + 1)[1:]
    uses: dict[str, np.ndarray | None] = {}
    for name, shape, start, end in zip(entry.torch, shapes, starts[:-1], starts[1:], strict=True):
        part = counts[start:end].astype(np.int32)
        equal = part.size and part.min() == part.max()
        uses[name] = np.broadcast_to(part[0], shape) if equal else part.reshape(shape)
    return uses


def count_views(entry: Entry, shapes: Sequence[Shape]) -> dict[str, np.ndarray] | None:
    """Count how often a tensor stands in the leaves, if each leaf is one whole tensor with its axes in some order.

    This touches no value: NumPy tells by the memory of the leaves.
    """
    tensors = [np.zeros(shape, np.float32) for shape in shapes]
    counts = dict.fromkeys(entry.torch, 0)
    for leaf in entry.convert(*tensors):
        names = [name for name, own in zip(entry.torch, tensors, strict=True) if is_whole_view(leaf, own)]
        if len(names) != 1:
            return None
        counts[names[0]] += 1
    return {
        name: np.broadcast_to(np.int32(counts[name]), shape) for name, shape in zip(entry.torch, shapes, strict=True)
    }


def is_whole_view(leaf: Array, tensor: np.ndarray) -> bool:
    """Return whether a leaf is this tensor with its axes in some order, split or joined, by its memory."""
    if not isinstance(leaf, np.ndarray) or not (leaf is tensor or leaf.base is tensor) or leaf.size != tensor.size:
        return False
    step = leaf.itemsize
    for stride, length in sorted(zip(map(abs, leaf.strides), leaf.shape, strict=True)):
        if length > 1 and stride != step:
            return False
        step *= length
    return True


def read_gather(convert: Callable[[list[np.ndarray]], Sequence[Array]], shapes: Sequence[Shape]) -> list[np.ndarray]:
    """Run a conversion on distinct whole numbers, and read from the leaves where each value comes from.

    The numbers stay below 2^24, so that a conversion may cast them to float32; more values take several runs.

    Returns:
        For each leaf, the places of its values in all tensors laid end to end; -1 for a zero that is no tensor's.

    Raises:
        NoInverse: a leaf holds values that no tensor holds: they are computed. The message has its number.
    """

    def labels_of(leaf: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore"):  # what is no number is no label either
            return leaf.astype(np.int32)

    ends = np.cumsum([math.prod(shape) for shape in shapes])
    total = int(ends[-1])

    def run(labels: np.ndarray) -> list[np.ndarray]:
        parts = np.split(labels.astype(np.float32), ends[:-1])
        return [np.asarray(leaf) for leaf in convert([p.reshape(s) for p, s in zip(parts, shapes, strict=True)])]

    base = 2**23
    places = np.arange(1, total + 1, dtype=np.int32)
    first = run(places % base)
    index = [labels_of(leaf) for leaf in first]
    if total >= base:
        index = [low + base * labels_of(high) for low, high in zip(index, run(places // base), strict=True)]
    # A sum, a mean or a multiple of labels may be another label, but not twice.
    others = np.random.default_rng(0).integers(1, base, total + 1, dtype=np.int32)
    others[0] = 0
    for number, (place, leaf, again) in enumerate(zip(index, first, run(others[1:]), strict=True)):
        other = labels_of(again)
        is_fraction = ((again != other) & (leaf != again)).any()  # a constant may be one
        inside = not place.size or (place.min() >= 0 and place.max() <= total)
        if is_fraction or not inside or not np.array_equal(others[place], other):
            raise NoInverse(f"leaf {number} holds values that are computed, not moved")
    return [place - 1 for place in index]


class Gaps(NamedTuple):
    """Tensors and leaves that a map leaves out, and numbers of parameters.

    Attributes:
        torch: tensors that fill no leaf.
        jax: leaves that no tensor fills.
        twice: leaves that two entries fill.
        untied: for each parameter that is one tensor in PyTorch and several leaves in JAX, these leaves.
        torch_parameters: the number of values of PyTorch's tensors; tied ones count once.
        jax_parameters: the number of values of JAX's leaves.
    """

    torch: tuple[str, ...]
    jax: tuple[str, ...]
    twice: tuple[str, ...]
    untied: Mapping[str, tuple[str, ...]]
    torch_parameters: int
    jax_parameters: int


def check_complete(weights: WeightMap, torch_names: Sequence[str], jax_paths: Sequence[str]) -> Gaps:
    """Compare a map with the names of all tensors and the paths of all leaves.

    A tensor counts as left out if a part of it is carried nowhere.
    """
    filled = [path for entry in weights.entries for path in entry.jax]
    used = {name for entry in weights.entries for name in entry.torch}
    leaves_of = {
        name: tuple(path for entry in weights.entries if name in entry.torch for path in entry.jax)
        for name, count in weights.counts.items()
        if name in weights.parameters and count.min() > 1
    }
    untied = {name: paths for name, paths in leaves_of.items() if len(paths) > 1}
    return Gaps(
        tuple(
            name for name in torch_names if (name not in used or name in weights.lost) and name not in weights.unused
        ),
        tuple(path for path in jax_paths if path not in set(filled)),
        tuple(sorted({path for path in filled if filled.count(path) > 1})),
        untied,
        sum(math.prod(weights.tensors[name]) for name in torch_names),
        sum(math.prod(weights.leaves[path]) for path in jax_paths),
    )


# The layers


def linear(to: str | None = None, *, flatten: Shape | None = None, transposed: bool | None = None) -> Rule:
    """Carry a linear layer: [out, in] is [in, out] in Flax and Haiku, and stays in Equinox.

    Either side may be split over several axes, as in DenseGeneral.

    Args:
        to: the module in JAX.
        flatten: for a layer behind a flatten, its input in PyTorch: channels, rows, columns. JAX flattens rows first.
        transposed: whether JAX holds [in, out]. None: by the shapes, and for a square weight by the leaf's name.
    """

    def carry(layer: Layer) -> list[Entry]:
        return matrix(layer, how, layer.paths[0], flatten, transposed)

    how = call("linear", flatten=flatten, transposed=transposed)
    return Rule(carry, paths(to), how)


def conv1d(to: str | None = None, *, transposed: bool | None = None) -> Rule:
    """Carry Hugging Face's Conv1D, a linear layer whose weight is [in, out] in PyTorch already."""

    def carry(layer: Layer) -> list[Entry]:
        return matrix(layer, how, layer.paths[0], None, transposed, stored="in, out")

    how = call("conv1d", transposed=transposed)
    return Rule(carry, paths(to), how)


def matrix(
    layer: Layer,
    how: str,
    path: str,
    flatten: Shape | None = None,
    transposed: bool | None = None,
    stored: str = "out, in",
) -> list[Entry]:
    """Carry the weight and the bias of a linear layer."""
    entries = []
    if "weight" in layer.tensors:
        shape = layer.tensors["weight"]
        leaf = layer.find(WEIGHT, math.prod(shape), path)
        if leaf is None:
            raise layer.problem("there is no leaf for the weight")
        outputs, inputs = shape if stored == "out, in" else shape[::-1]
        target = layer.leaves[leaf]
        by_name = target[-1:] != (inputs,) or leaf.rpartition("/")[2] != AS_IT_IS
        parts = count_kernels(target, inputs, outputs) if (by_name if transposed is None else transposed) else 1
        turned = parts > 1 or is_transposed(layer, leaf, inputs, outputs, transposed)
        if flatten is not None and math.prod(flatten) != inputs:
            raise layer.problem(f"flatten={flatten} are {math.prod(flatten)} values, and the layer takes {inputs}")

        def convert(weight: Array) -> tuple[Array, ...]:
            weight = weight if stored == "out, in" else weight.T
            if flatten is not None:
                weight = np_moveaxis(weight.reshape(outputs, *flatten), 1, -1).reshape(outputs, inputs)
            weight = weight.reshape(parts, outputs // parts, inputs)
            return ((weight.swapaxes(1, 2) if turned else weight).reshape(target),)

        entries.append(Entry((layer.tensor("weight"),), (leaf,), convert, how))
    return entries + vector(layer, "bias", BIAS, how, path)


def splits_of(shape: Shape) -> list[tuple[int, int]]:
    """Return the numbers of rows and columns of the matrices that a shape can be."""
    return [(math.prod(shape[:axis]), math.prod(shape[axis:])) for axis in range(1, max(len(shape), 1))]


def count_kernels(shape: Shape, inputs: int, outputs: int) -> int:
    """Return how many kernels [in, …] a leaf stacks, such as [3, in, heads, features]; 1 if it is one kernel."""
    stacks = len(shape) > 2 and shape[1] == inputs and math.prod(shape) == inputs * outputs
    return shape[0] if stacks and (inputs, outputs) not in splits_of(shape) else 1


def is_transposed(layer: Layer, leaf: str, inputs: int, outputs: int, transposed: bool | None) -> bool:
    """Tell whether a leaf holds [in, out]; each may be several axes.

    Raises:
        CannotCarry: the leaf has neither shape, or not the one asked for.
    """
    shape = layer.leaves[leaf]
    splits = splits_of(shape)
    fits = {turned for turned, pair in ((True, (inputs, outputs)), (False, (outputs, inputs))) if pair in splits}
    if not fits or transposed not in {None, *fits}:
        raise layer.problem(f"a weight with {inputs} inputs and {outputs} outputs cannot fill {leaf} {shape}")
    by_name = leaf.rpartition("/")[2] != AS_IT_IS
    return transposed if transposed is not None else by_name if len(fits) == 2 else fits == {True}


def conv(to: str | None = None) -> Rule:
    """Carry a convolution of any rank, grouped or not: [out, in / groups, …] is […, in / groups, out] in Flax.

    Equinox keeps PyTorch's layout, with a bias [out, 1, …]. One of 1 x 1 may be a dense layer. One with a group for
    each channel is […, in, out / in] in Keras.
    """

    def carry(layer: Layer) -> list[Entry]:
        if "weight" not in layer.tensors:
            return vector(layer, "bias", BIAS, how)
        shape = layer.tensors["weight"]
        last = (*shape[2:], shape[1], shape[0])
        leaf = layer.find(WEIGHT, math.prod(shape))
        biases = vector(layer, "bias", BIAS, how)
        if leaf is not None and len(layer.leaves[leaf]) == len(shape[:2]) < len(shape) and math.prod(shape[2:]) == 1:
            turned = is_transposed(layer, leaf, shape[1], shape[0], None)  # a dense layer, which sees one pixel too
            as_matrix = Entry(
                (layer.tensor("weight"),),
                (leaf,),
                lambda weight: (weight.reshape(shape[:2]).T if turned else weight.reshape(shape[:2]),),
                how,
            )
            return [as_matrix, *biases]
        groups = getattr(layer.module, "groups", 1)
        apart = (*shape[2:], groups, shape[0] // groups)  # of Keras, for groups of one channel: its outputs apart
        if leaf is None or layer.leaves[leaf] not in (shape, last, apart if shape[1] == 1 else last):
            raise layer.problem(f"there is no leaf of shape {last}, nor {shape}, for the weight")
        stays = layer.leaves[leaf] == shape and (last != shape or leaf.rpartition("/")[2] == AS_IT_IS)

        def convert(weight: Array) -> tuple[Array, ...]:
            return (weight if stays else weight.transpose(*range(2, len(shape)), 1, 0).reshape(layer.leaves[leaf]),)

        return [Entry((layer.tensor("weight"),), (leaf,), convert, how), *biases]

    how = "conv()"
    return Rule(carry, paths(to), how)


def conv_transpose(to: str | None = None, *, flipped: bool | None = None, transposed: bool | None = None) -> Rule:
    """Carry a transposed convolution: [in, out / groups, …] is […, in, out] in Flax, with the kernel turned by 180°.

    Flax with `transpose_kernel=True` holds […, out, in] and turns the kernel itself. Haiku holds […, out, in] too, but
    turned. Equinox holds [out, in / groups, …], turned.

    Args:
        to: the module in JAX.
        flipped: whether JAX holds the kernel turned. None: by the shape and the name of the leaf, as above.
        transposed: whether JAX holds […, out, in], where there are as many of both. None: as in the library above.
    """

    def carry(layer: Layer) -> list[Entry]:
        if "weight" not in layer.tensors:
            return vector(layer, "bias", BIAS, how)
        inputs, outputs, *size = layer.tensors["weight"]
        groups = getattr(layer.module, "groups", 1)
        leaf = layer.find(WEIGHT, math.prod(layer.tensors["weight"]))
        shape = None if leaf is None else layer.leaves[leaf]
        layouts = {
            "in, out": (*size, inputs, outputs),
            "out, in": (*size, outputs, inputs),
            "first": (outputs * groups, inputs // groups, *size),
        }
        names = [name for name, layout in layouts.items() if layout == shape]
        if leaf is None or not names or (groups > 1 and "first" not in names):
            raise layer.problem(f"there is no leaf for a weight {layer.tensors['weight']} of {groups} groups")
        name = leaf.rpartition("/")[2]
        layout = "first" if name == AS_IT_IS and "first" in names else names[0]
        swapped = transposed if transposed is not None else name == "w" or flipped is False
        if "out, in" in names and swapped:
            layout = "out, in"
        turn = flipped if flipped is not None else not (layout == "out, in" and name == "kernel")
        axes = tuple(range(2, 2 + len(size)))

        def convert(weight: Array) -> tuple[Array, ...]:
            weight = weight[(..., *[slice(None, None, -1)] * len(size))] if turn else weight
            if layout == "first":
                grouped = weight.reshape(groups, inputs // groups, outputs, *size)
                return (grouped.swapaxes(1, 2).reshape(shape),)
            return (weight.transpose(*axes, *((0, 1) if layout == "in, out" else (1, 0))),)

        return [Entry((layer.tensor("weight"),), (leaf,), convert, how), *vector(layer, "bias", BIAS, how)]

    how = call("conv_transpose", flipped=flipped, transposed=transposed)
    return Rule(carry, paths(to), how)


def norm(to: str | None = None) -> Rule:
    """Carry a normalisation: scale and bias, and the running statistics where it has some.

    Haiku keeps each statistic twice, as `hidden` and as `average`; both get the running one.
    """

    def carry(layer: Layer) -> list[Entry]:
        own = [name for name in layer.tensors if "." not in name and not name.startswith("running_")]
        entries = [entry for name in own for entry in vector(layer, name, names_of(layer, name), how)]
        for name, names in (("running_mean", MEAN), ("running_var", VARIANCE)):
            for entry in vector(layer, name, names, how):
                hidden = re.sub("average$", "hidden", entry.jax[0])
                entries.append(entry if hidden == entry.jax[0] or hidden not in layer.leaves else both(entry, hidden))
        return entries

    def both(entry: Entry, hidden: str) -> Entry:
        return entry._replace(jax=(*entry.jax, hidden), convert=lambda value: entry.convert(value) * 2)

    how = "norm()"
    return Rule(carry, paths(to), how)


def names_of(layer: Layer, name: str) -> tuple[str, ...]:
    """Return the names that a scale or a bias may have in JAX: its own, and others that no other tensor has."""
    others = next((names for names in (SCALE, BIAS) if name in names), ())
    return (name, *(other for other in others if other not in layer.tensors))


def vector(layer: Layer, name: str, names: Sequence[str], how: str, path: str | None = None) -> list[Entry]:
    """Carry a tensor whose values keep their order, if both sides have it; for several axes see `place`."""
    if name not in layer.tensors:
        return []
    leaf = layer.find(names, math.prod(layer.tensors[name]), path)
    return [] if leaf is None else [place(layer, name, leaf, how)]


def place(layer: Layer, name: str, leaf: str, how: str) -> Entry:
    """Carry a tensor as it is, up to axes of length 1, or with its channels moved from the front to the back."""
    shape, target = layer.tensors[name], layer.leaves[leaf]

    def convert(value: Array) -> tuple[Array, ...]:
        return (value.reshape(target),)

    def move(value: Array) -> tuple[Array, ...]:
        return (np_moveaxis(value.reshape(squeezed(shape)), 0, -1).reshape(target),)

    front = squeezed(shape)
    if front == squeezed(target) or len(squeezed(target)) == 1 or len(front) == 1:
        if math.prod(shape) == math.prod(target):
            return Entry((layer.tensor(name),), (leaf,), convert, how)
    elif (*front[1:], front[0]) == squeezed(target):
        return Entry((layer.tensor(name),), (leaf,), move, how)
    raise layer.problem(f"{name} {shape} cannot fill {leaf} {target}")


def squeezed(sizes: Shape) -> Shape:
    """Return a shape without its axes of length 1."""
    return tuple(size for size in sizes if size != 1)


def embedding(to: str | None = None) -> Rule:
    """Carry an embedding, [tokens, features] everywhere."""

    def carry(layer: Layer) -> list[Entry]:
        return vector(layer, "weight", TABLE, how)

    how = "embedding()"
    return Rule(carry, paths(to), how)


def same(to: str | None = None, *, transposed: bool = False) -> Rule:
    """Carry each tensor of a module to the leaf of the same name, as it is: a class token, a scale of a layer.

    Args:
        to: the module in JAX.
        transposed: whether JAX holds square matrices the other way round; others show it by their shapes.
    """

    def carry(layer: Layer) -> list[Entry]:
        own = [name for name in layer.tensors if "." not in name]
        entries = [entry for name in own for entry in vector(layer, name, names_of(layer, name), how)]
        return [turn(entry) if transposed and is_square(layer, entry) else entry for entry in entries]

    def is_square(layer: Layer, entry: Entry) -> bool:
        shape = layer.leaves[entry.jax[0]]
        return len(shape) == 2 and shape[0] == shape[1]

    def turn(entry: Entry) -> Entry:
        return entry._replace(convert=lambda value: (value.T,))

    how = call("same", transposed=transposed or None)
    return Rule(carry, paths(to), how)


def complex_parts(*to: str) -> Rule:
    """Carry a complex tensor, which is seen with a last axis of 2, to two leaves: its real and its imaginary part."""

    def carry(layer: Layer) -> list[Entry]:
        name, shape = next(iter(layer.tensors.items()))
        if len(layer.paths) != 2 or shape[-1:] != (2,) or not layer.leaves.keys() >= {*layer.paths}:
            raise layer.problem(f"{name} {shape} has no real and imaginary part, or no two leaves for them")
        half = Layer(layer.name, {name: shape[:-1]}, layer.paths, layer.leaves)
        inner = [place(half, name, leaf, how) for leaf in layer.paths]
        return [split_entry(layer.tensor(name), inner, lambda value: [value[..., 0], value[..., 1]], how)]

    how = "complex_parts()"
    return Rule(carry, paths(*to), how)


def attention(to: str | None = None, *, transposed: bool | None = None) -> Rule:
    """Carry nn.MultiheadAttention: the packed projection to query, key and value, and the output's.

    Flax holds kernels [features, heads, features of a head], and [heads, features of a head, features] for the output.

    Args:
        to: the module in JAX.
        transposed: whether JAX holds [in, out], but for layers inside with a "kernel". None: as in `linear`.
    """

    def carry(layer: Layer) -> list[Entry]:
        places = {role: layer.inside(names) for role, names in ROLES.items()}
        packed = layer.inside(("in_proj", "qkv")) or layer.paths[0]
        entries: list[Entry] = []
        if "out_proj.weight" in layer.tensors and (out := places["out"]) is not None:
            way = None if join(out, "/", "kernel") in layer.leaves else transposed
            entries += matrix(layer.named("out_proj.weight", "out_proj.bias"), how, out, transposed=way)
        targets = [path for path in (places["query"], places["key"], places["value"]) if path is not None]
        inside = [path for path in (*targets, packed) if path != layer.paths[0]]
        way = None if any(join(path, "/", "kernel") in layer.leaves for path in inside) else transposed
        if len(targets) == 3 and "in_proj_weight" in layer.tensors:
            whole = layer.named("in_proj_weight", "in_proj_bias")
            return entries + split_outputs(whole, how, targets, transposed=way)
        if len(targets) == 3:  # keys or values of another size than the queries
            for role, path in zip("qkv", targets, strict=True):
                entries += matrix(layer.named(f"{role}_proj_weight", ""), how, path, transposed=way)
            return entries + split_outputs(layer.named("", "in_proj_bias"), how, targets)
        return entries + matrix(layer.named("in_proj_weight", "in_proj_bias"), how, packed, transposed=way)

    how = call("attention", transposed=transposed)
    return Rule(carry, paths(to), how)


def qkv(*to: str, heads: int | None = None, transposed: bool | None = None) -> Rule:
    """Carry one linear layer, or Hugging Face's Conv1D, to several: the fused queries, keys and values.

    Args:
        to: the modules in JAX, in the order of the outputs in PyTorch.
        heads: number of heads, where PyTorch holds query, key and value of the first head first, then of the next.
        transposed: whether JAX holds [in, out]. None: as in `linear`.
    """

    def carry(layer: Layer) -> list[Entry]:
        return split_outputs(layer, how, layer.paths, heads, "Conv1D" in classes(layer.module), transposed)

    how = call("qkv", heads=heads, transposed=transposed)
    return Rule(carry, paths(*to), how)


def split_outputs(
    layer: Layer,
    how: str,
    targets: Sequence[str],
    heads: int | None = None,
    turned: bool = False,
    transposed: bool | None = None,
) -> list[Entry]:
    """Carry each part of the outputs of a linear layer to a module of its own.

    The parts are as large as the leaves: there may be fewer keys and values than queries.
    """
    entries = []
    for name, names in (("weight", WEIGHT), ("bias", BIAS)):
        shape = layer.tensors.get(name, ())
        leaves = [layer.find(names, 0, path) for path in targets]
        if not shape or not any(leaves):
            continue
        axis = len(shape) - 1 if turned else 0
        others = math.prod(shape) // shape[axis]
        parts = [0 if leaf is None else math.prod(layer.leaves[leaf]) // others for leaf in leaves]
        if None in leaves or sum(parts) != shape[axis] or (heads and shape[axis] % (heads * len(parts))):
            raise layer.problem(f"{name} {shape} cannot be split into parts of {parts} outputs")
        cut = cutter(axis, parts, heads)
        inner: list[Entry] = []
        for path, part in zip(targets, parts, strict=True):
            own = (*shape[:axis], part, *shape[axis + 1 :])
            small = Layer(layer.name, {name: own}, (path,), layer.leaves, layer.module, layer.called)
            inner += matrix(small, how, path, None, transposed, "in, out" if turned else "out, in")
        entries.append(split_entry(layer.tensor(name), inner, cut, how))
    return entries


def cutter(axis: int, parts: Sequence[int], heads: int | None) -> Callable[[Array], list[Array]]:
    """Return the function that splits an axis into parts; with heads, each head has its share of every part."""

    def cut(value: Array) -> list[Array]:
        before, after = value.shape[:axis], value.shape[axis + 1 :]
        if heads:
            grouped = value.reshape(*before, heads, len(parts), -1, *after)
            chosen = [grouped[(*[slice(None)] * (axis + 1), number)] for number in range(len(parts))]
            return [part.reshape(*before, size, *after) for part, size in zip(chosen, parts, strict=True)]
        ends = np.cumsum(parts)
        return [value[(*[slice(None)] * axis, slice(end - size, end))] for end, size in zip(ends, parts, strict=True)]

    return cut


def split_entry(tensor: str, inner: Sequence[Entry], cut: Callable[[Array], list[Array]], how: str) -> Entry:
    """Return the entry that cuts a tensor and carries each part by an entry of its own."""

    def convert(value: Array) -> tuple[Array, ...]:
        return tuple(leaf for part, entry in zip(cut(value), inner, strict=True) for leaf in entry.convert(part))

    return Entry((tensor,), tuple(path for entry in inner for path in entry.jax), convert, how)


def joined(to: str, *names: str, heads: int | None = None, transposed: bool | None = None) -> Rule:
    """Carry several linear layers of a module to one, such as queries, keys and values that JAX fuses.

    Args:
        to: the linear layer in JAX.
        names: the layers inside of the PyTorch module, in the order of the outputs in JAX.
        heads: number of heads, where JAX holds query, key and value of the first head first, then of the next.
        transposed: whether JAX holds [in, out]. None: as in `linear`.
    """

    def carry(layer: Layer) -> list[Entry]:
        entries = []
        for last in ("weight", "bias"):
            tensors = [f"{name}.{last}" for name in names if f"{name}.{last}" in layer.tensors]
            if len(tensors) == len(names):
                shapes = [layer.tensors[name] for name in tensors]
                whole = (sum(shape[0] for shape in shapes), *shapes[0][1:])
                own = Layer(layer.name, {last: whole}, layer.paths, layer.leaves)
                for entry in matrix(own, how, layer.paths[0], transposed=transposed):
                    full = tuple(layer.tensor(name) for name in tensors)
                    entries.append(Entry(full, entry.jax, merge(entry, whole), how))
        return entries

    def merge(entry: Entry, whole: Shape) -> Callable[..., tuple[Array, ...]]:
        def convert(*values: Array) -> tuple[Array, ...]:
            if heads:
                values = tuple(value.reshape(heads, 1, -1, *value.shape[1:]) for value in values)
            return entry.convert(library_of(values).concatenate(values, 1 if heads else 0).reshape(whole))

        return convert

    how = call("joined", *names, heads=heads, transposed=transposed)
    return Rule(carry, paths(to), how)


def lstm(*to: str, order: str | None = None, forget_bias: float | None = None) -> Rule:
    """Carry nn.LSTM or nn.LSTMCell to cells of Flax, Equinox, Haiku or of one's own; two biases become one.

    Args:
        to: the cell in JAX; one for each layer and direction, forward first; or the module that holds them all; or the
            leaves of each cell: by the input, by the state, biases; one for all gates, or one for each gate.
        order: the gates as JAX packs them: input, forget, cell (g), output. None: "igfo" in Haiku, otherwise "ifgo" as
            in PyTorch.
        forget_bias: what the cell itself adds to the forget gate. None: 1 in Haiku, otherwise 0.
    """

    def carry(layer: Layer) -> list[Entry]:
        return recurrent(layer, how, "ifgo", order, forget_bias)

    how = call("lstm", order=order, forget_bias=forget_bias)
    return Rule(carry, paths(*to), how)


def gru(*to: str, order: str | None = None) -> Rule:
    """Carry nn.GRU or nn.GRUCell to cells of Flax, Equinox, Haiku or of one's own.

    The new gate has a second bias in PyTorch, inside of the product with the reset gate. Cells that have no place for
    it (NNX, Haiku) do not get it. Haiku also multiplies the state and not the product by the reset gate.

    Args:
        to: the cell in JAX; one for each layer and direction, forward first; or the module that holds them all; or the
            leaves of each cell: by the input, by the state, biases; one for all gates, or one for each gate.
        order: the gates as JAX packs them: reset, update (z), new. A "-" in front of a gate changes its sign. None:
            "-zrn" in Haiku, otherwise "rzn" as in PyTorch.
    """

    def carry(layer: Layer) -> list[Entry]:
        return recurrent(layer, how, "rzn", order, 0)

    how = call("gru", order=order)
    return Rule(carry, paths(*to), how)


def rnn(*to: str) -> Rule:
    """Carry nn.RNN or nn.RNNCell to cells of Flax, Equinox or of one's own; two biases become one.

    Args:
        to: the cell in JAX; one for each layer and direction, forward first; or the module that holds them all.
    """
    return Rule(lambda layer: recurrent(layer, call("rnn"), "h", None, 0), paths(*to), call("rnn"))


def recurrent(layer: Layer, how: str, gates: str, order: str | None, forget_bias: float | None) -> list[Entry]:
    """Carry every layer and direction of a recurrent module to its cell."""
    suffixes = [name.removeprefix("weight_ih") for name in layer.tensors if name.startswith("weight_ih")]
    if len(layer.paths) > len(suffixes) and all(path in layer.leaves for path in layer.paths):
        inside = with_cells(layer, suffixes, len(gates))
        own = dict(zip(inside.leaves, layer.paths, strict=True))
        entries = recurrent(inside, how, gates, order, forget_bias)
        return [entry._replace(jax=tuple(own[name] for name in entry.jax)) for entry in entries]
    cells = list(layer.paths) if len(layer.paths) == len(suffixes) > 1 else cells_below(layer)
    if len(cells) != len(suffixes):
        raise layer.problem(f"PyTorch has {len(suffixes)} cells, and JAX {len(cells)}: {', '.join(cells)}")
    entries = []
    for suffix, path in zip(suffixes, cells, strict=True):
        own = {name: f"{name}{suffix}" for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")}
        cell = Layer(
            layer.name,
            {name: layer.tensors[full] for name, full in own.items() if full in layer.tensors},
            (path,),
            layer.leaves,
            layer.module,
            {name: layer.tensor(full) for name, full in own.items()},
        )
        apart = cell.gate(gates[0], "i", "kernel") is not None
        entries += gate_by_gate(cell, how, gates) if apart else packed_gates(cell, how, gates, order, forget_bias)
    return entries


def with_cells(layer: Layer, suffixes: Sequence[str], gates: int) -> Layer:
    """Return the layer with its leaves in cells: those by the input, by the state, and biases, as `to` has them.

    The two weights may be joined in one, and a second bias may be that of the new gate alone.

    Raises:
        CannotCarry: there are not as many leaves as cells have.
    """
    count = len(layer.paths) // len(suffixes)
    sizes = [math.prod(layer.leaves[path]) for path in layer.paths[:count]]
    by_input, by_state = (layer.tensors[f"weight_{side}h{suffixes[0]}"] for side in "ih")
    if count < 2 * gates:
        names = ["w_joint"] if sizes[0] == math.prod(by_input) + math.prod(by_state) else ["w_ih", "w_hh"]
        two = ["b_ih", "b_hh"] if sizes[-1] == by_state[0] else ["bias", "bias_n"]
        names += ["bias"] if count == len(names) + 1 else two
    else:
        parts = (f"{side}{{}}/{part}" for part in ("kernel", "bias") for side in "ih")
        names = [part.format(gate) for part in parts for gate in ("ifgo" if gates == 4 else "rzn")]
    if len(layer.paths) != count * len(suffixes) or count > len(names):
        raise layer.problem(f"there are {len(layer.paths)} leaves for {len(suffixes)} cells")
    cells = tuple(f"cell{suffix}" for suffix in suffixes)
    paths = [f"{cell}/{name}" for cell in cells for name in names[:count]]
    leaves = {path: layer.leaves[own] for path, own in zip(paths, layer.paths, strict=True)}
    return layer._replace(paths=cells, leaves=leaves)


def cells_below(layer: Layer) -> list[str]:
    """Return the paths of all recurrent cells below a path, in order, each backward one behind the forward one."""
    cells = []
    for path in module_paths(layer.leaves):
        if not layer.paths[0] or path == layer.paths[0] or path.startswith(f"{layer.paths[0]}/"):
            place = layer._replace(paths=(path,))
            gate_kernels = place.gate("i", "i", "kernel"), place.gate("r", "i", "kernel")
            if any((*gate_kernels, place.find_name(INPUT_WEIGHT), place.find_name(JOINT_WEIGHT))):
                cells.append(path)

    def position(path: str) -> tuple[list[int], bool, str]:
        backward = any(word in path.lower() for word in ("backward", "reverse", "bwd"))
        return [int(digits) for digits in re.findall("[0-9]+", path)], backward, path

    return sorted(cells, key=position)


def gate_by_gate(cell: Layer, how: str, gates: str) -> list[Entry]:
    """Carry a cell to Flax's: a kernel for each gate by the input and by the state, and one or two biases."""
    entries = []
    for name, side in (("weight_ih", "i"), ("weight_hh", "h")):
        kernels = [cell.gate(gate, side, "kernel") for gate in gates]
        if None in kernels:
            raise cell.problem(f"there are not as many kernels as gates {gates!r}")
        rows, columns = cell.tensors[name]
        if {cell.leaves[path] for path in kernels if path} != {(columns, rows // len(gates))}:
            raise cell.problem(f"{cell.tensor(name)} has {columns} columns, and {kernels[0]} has another size")

        def convert(weight: Array) -> tuple[Array, ...]:
            return tuple(part.T for part in weight.reshape(len(gates), -1, weight.shape[1]))

        entries.append(Entry((cell.tensor(name),), tuple(path for path in kernels if path), convert, how))
    biases = [(gate, cell.gate(gate, "i", "bias"), cell.gate(gate, "h", "bias")) for gate in gates]
    leaves = tuple(path for _, *both in biases for path in both if path)
    if "bias_ih" not in cell.tensors or not leaves:
        return entries

    def convert_biases(inputs: Array, states: Array) -> tuple[Array, ...]:
        parts: list[Array] = []
        pairs = zip(biases, inputs.reshape(len(gates), -1), states.reshape(len(gates), -1), strict=True)
        for (gate, of_input, of_state), by_input, by_state in pairs:
            if of_input and of_state:
                parts += [by_input, by_state]
            elif of_input or of_state:
                parts.append(by_input if gate == "n" else by_input + by_state)
        return tuple(parts)

    return [*entries, Entry((cell.tensor("bias_ih"), cell.tensor("bias_hh")), leaves, convert_biases, how)]


def packed_gates(cell: Layer, how: str, gates: str, order: str | None, forget_bias: float | None) -> list[Entry]:
    """Carry a cell to one that packs all its gates in one kernel, or in one by the input and one by the state."""
    haiku = cell.find_name(("linear/w", "w_i")) is not None
    order = order or ({"ifgo": "igfo", "rzn": "-zrn"}.get(gates, gates) if haiku else gates)
    signs = re.findall("-?[a-z]", order)
    added = {"f": (1.0 if haiku and gates == "ifgo" else 0.0) if forget_bias is None else forget_bias}
    if sorted(sign[-1] for sign in signs) != sorted(gates):
        raise cell.problem(f"the gates {order!r} are not {gates!r}")

    def reorder(value: Array, chosen: Sequence[str] = signs) -> Array:
        parts = value.reshape(len(gates), -1, *value.shape[1:])
        turned = [-parts[gates.index(sign[-1])] if sign[0] == "-" else parts[gates.index(sign[-1])] for sign in chosen]
        return library_of([value]).concatenate(turned, 0)

    entries = []
    joint = cell.find_name(JOINT_WEIGHT)
    if joint is not None:

        def convert_both(by_input: Array, by_state: Array) -> tuple[Array, ...]:
            return (library_of([by_input]).concatenate([reorder(by_input).T, reorder(by_state).T], 0),)

        entries.append(Entry((cell.tensor("weight_ih"), cell.tensor("weight_hh")), (joint,), convert_both, how))
    for name, names in (("weight_ih", INPUT_WEIGHT), ("weight_hh", STATE_WEIGHT)):
        leaf, (outputs, inputs) = cell.find_name(names), cell.tensors[name]
        if joint is None and leaf is None:
            raise cell.problem(f"there is no leaf for {cell.tensor(name)}")
        if joint is None and leaf is not None:
            turned = is_transposed(cell, leaf, inputs, outputs, None)

            def convert(weight: Array, turned: bool = turned) -> tuple[Array, ...]:
                return (reorder(weight).T if turned else reorder(weight),)

            entries.append(Entry((cell.tensor(name),), (leaf,), convert, how))
    return entries + packed_biases(cell, how, gates, signs, reorder, added)


def packed_biases(
    cell: Layer, how: str, gates: str, signs: Sequence[str], reorder: Callable[..., Array], added: Mapping[str, float]
) -> list[Entry]:
    """Carry the two biases of each gate: to two leaves, to one that holds both, or their sum to one."""
    if "bias_ih" not in cell.tensors:
        return []
    tensors = cell.tensor("bias_ih"), cell.tensor("bias_hh")
    two = [cell.find_name(("bias_ih", "b_ih")), cell.find_name(("bias_hh", "b_hh"))]
    if two[0] is not None and two[1] is not None:
        return [
            Entry((tensor,), (leaf,), lambda bias: (reorder(bias),), how)
            for tensor, leaf in zip(tensors, two, strict=True)
            if leaf
        ]
    one, extra = (
        cell.find_name(("dense_h/bias", "dense_i/bias", "i/bias", "linear/b", *BIAS)),
        cell.find_name(("bias_n", "b_n")),
    )
    if one is None:
        return []
    size = cell.tensors["weight_hh"][0] // len(gates)
    place = cell.leaves[one]

    def stack(by_input: Array, by_state: Array) -> tuple[Array, ...]:
        return (library_of([by_input]).stack([reorder(by_input), reorder(by_state)]).reshape(place),)

    if math.prod(place) == 2 * len(gates) * size:
        return [Entry(tensors, (one,), stack, how)]

    def convert(by_input: Array, by_state: Array) -> tuple[Array, ...]:
        library = library_of([by_input])
        kept = library.concatenate(
            [
                0 * by_state[:size] if gate == "n" else by_state[start : start + size]
                for gate, start in zip(gates, range(0, len(gates) * size, size), strict=True)
            ]
        )
        total = reorder(by_input + kept)
        offsets = np.repeat([added.get(sign, 0.0) for sign in signs], size)
        total = total - offsets.astype(total.dtype) if offsets.any() else total
        return (total, by_state[2 * size :]) if extra else (total,)

    return [Entry(tensors, (one, extra) if extra else (one,), convert, how)]


def unused() -> Rule:
    """Carry a tensor nowhere, because the port makes it itself or has no use for it.

    As the value of a leaf's path, it leaves what JAX alone has as JAX made it.
    """
    return UNUSED


UNUSED = Rule(lambda layer: [], (), "unused()")


def paths(*to: str | None) -> tuple[str, ...]:
    """Return the paths that were given; "" is the whole model."""
    return tuple(path for path in to if path is not None)


def call(function: str, *to: str, **options: Any) -> str:
    """Return the Python that calls a function with the options that are given."""
    given = [f"{name}={value!r}" for name, value in options.items() if value is not None]
    return f"{function}({', '.join([*map(repr, to), *given])})"


def np_moveaxis(array: Array, source: int, target: int) -> Array:
    """Move an axis of a NumPy array, a JAX array or a tracer."""
    axes = list(range(array.ndim))
    axes.insert(target % array.ndim, axes.pop(source))
    return array.transpose(*axes)


# Names and patterns


class TorchSide(NamedTuple):
    """The tensors and modules of a PyTorch module, by name.

    Attributes:
        shapes: the tensors to carry, by name: parameters and buffers of floating dtype. A tied one has its first name.
        alias: the first name of every tensor, by each of its names.
        modules: all modules by each of their names, the network itself under "".
        parameters: the names of the parameters.
    """

    shapes: dict[str, Shape]
    alias: dict[str, str]
    modules: dict[str, Any]
    parameters: frozenset[str]

    def owner(self, tensor: str) -> str:
        """Return the name of the module whose rule carries a tensor: its own, or the attention around it."""
        parts = tensor.split(".")[:-1]
        if f"{'.'.join(parts[-2:])}." == PARAMETRIZED:
            parts = parts[:-2]
        names = [".".join(parts[:end]) for end in range(len(parts) + 1)]
        return next((name for name in names if "MultiheadAttention" in classes(self.modules.get(name))), names[-1])

    def tensors_of(self, name: str) -> dict[str, Shape]:
        """Return the shapes of the tensors that one rule carries for this module, by their names inside of it."""
        return {
            tensor: shape for tensor, shape in self.below(name).items() if self.owner(join(name, ".", tensor)) == name
        }

    def below(self, name: str) -> dict[str, Shape]:
        """Return the shapes of all tensors below a module, by their names inside of it."""
        front = f"{name}." if name else ""
        return {
            tensor[len(front) :]: self.shapes[first] for tensor, first in self.alias.items() if tensor.startswith(front)
        }


def torch_side(module: Any) -> TorchSide:
    """Read the names of a PyTorch module."""
    state = module.state_dict(keep_vars=True)
    first: dict[int, str] = {}
    floats = {name: value for name, value in state.items() if hasattr(value, "dtype") and value.is_floating_point()}
    alias = {name: first.setdefault(id(value), name) for name, value in floats.items()}
    shapes = {name: tuple(state[name].shape) for name in dict.fromkeys(alias.values())}
    parameters = {id(value) for value in module.parameters()}
    return TorchSide(
        shapes,
        alias,
        dict(module.named_modules(remove_duplicate=False)),
        frozenset(name for name in shapes if id(state[name]) in parameters),
    )


def classes(module: Any) -> set[str]:
    """Return the names of a module's class and of those that it is derived from."""
    return {cls.__name__ for cls in type(module).__mro__}


def rule_for(module: Any) -> Callable[..., Rule]:
    """Return the function that makes the rule for a PyTorch module, by its class."""
    names = classes(module)
    for name, rule in RULES.items():
        if name in names:
            return rule
    own = type(module).__name__.lower()
    if "norm" in own:
        return norm
    is_matrix = getattr(getattr(module, "weight", None), "ndim", 0) == 2
    return same if not is_matrix else embedding if "embed" in own else linear


def rule_for_tensor(module: Any, name: str) -> Callable[..., Rule]:
    """Return the same for one tensor of a module: a layer's own rule knows no others than these, such as weight_g."""
    rule = linear if name.startswith(PROJECTED) else rule_for(module)
    usual = name in ("weight", "bias") or rule not in (linear, conv1d, conv, conv_transpose, embedding)
    return rule if usual else same


RULES: dict[str, Callable[..., Rule]] = {
    "Conv1D": conv1d,
    "Linear": linear,
    "Embedding": embedding,
    "EmbeddingBag": embedding,
    "_ConvTransposeNd": conv_transpose,
    "_ConvNd": conv,
    "_NormBase": norm,
    "LSTM": lstm,
    "LSTMCell": lstm,
    "GRU": gru,
    "GRUCell": gru,
    "RNN": rnn,
    "RNNCell": rnn,
    "MultiheadAttention": attention,
}


def declare(mapping: Mapping[str, str | Rule], module: Any, leaves: Mapping[str, Any]) -> WeightMap:
    """Make the map that a user wrote down.

    A key is the name of a PyTorch module or tensor, with `{i}` for numbers; its value is the path of a JAX module or
    leaf, or a rule with that path. A path may calculate: "layer{i}.{j}" -> "blocks_{2*i+j-2}". Where a path leaves a
    number of the key out, JAX stacks these layers in one leaf along its first axis.

    Args:
        mapping: names or patterns to paths or rules. The longest name wins.
        module: the PyTorch module.
        leaves: arrays or shapes of JAX's leaves, by path.

    Raises:
        CannotCarry: a key or a path that does not exist, or a layer that its rule does not fit.
    """
    side, shapes = torch_side(module), {path: tuple(leaf.shape) for path, leaf in leaves.items()}
    entries: dict[tuple[str, ...], Entry] = {}
    claimed: set[str] = set()
    unused: set[str] = set()
    for key, value in sorted(mapping.items(), key=lambda item: (not item[0], -item[0].count("."), item[0].count("{"))):
        if not isinstance(value, str | Rule):
            kind = type(value).__name__
            raise CannotCarry(f"weights: {key!r} leads to a {kind}: give the path of a JAX module, or a rule")
        rule = None if isinstance(value, str) else value
        targets = (value,) if isinstance(value, str) else value.to or (key.replace(".", "/"),)
        for stack, places in groups(key, targets, side):
            seen = (
                {path: shape[1:] for path, shape in shapes.items() if shape[:1] == (len(places),)} if stack else shapes
            )
            by_layer = [[*carry_place(name, to, rule, side, seen, claimed)] for name, to in places]
            if len({len(layer_entries) for layer_entries in by_layer}) > 1:
                raise CannotCarry(f"weights: {key!r}: the layers that JAX stacks have not all the same tensors")
            layer = places[0][0]
            if rule is None and not any(by_layer) and (layer in side.alias or side.tensors_of(layer)):
                raise CannotCarry(
                    f"weights: {key!r} -> {places[0][1][0]!r}: no tensor of the one fits a leaf of the other"
                )
            for same_entries in zip(*by_layer, strict=True):
                entry = stacked(same_entries) if stack else same_entries[0]
                claimed.update(entry.torch)
                entry = entry._replace(torch=tuple(side.alias[name] for name in entry.torch))
                before = entries.setdefault(entry.jax, entry)
                if before.torch != entry.torch:  # tied names may go to one leaf
                    raise CannotCarry(f"weights: both {before.torch[0]} and {entry.torch[0]} go to {entry.jax[0]}")
            if rule == UNUSED:
                unused.update(
                    tensor for name, _ in places for tensor in side.alias if f"{tensor}.".startswith(f"{name}.")
                )
                claimed |= unused
    return WeightMap(tuple(entries.values()), side.shapes, shapes, side.parameters, frozenset(unused))


def closest(name: str, names: Sequence[str]) -> str:
    """Return what a message adds of the names that are like a wrong one."""
    close = difflib.get_close_matches(name, names, 3, 0.5)
    return f"; close are {', '.join(close)}" if close else ""


def groups(
    key: str, targets: tuple[str, ...], side: TorchSide
) -> Iterator[tuple[bool, list[tuple[str, tuple[str, ...]]]]]:
    """Yield the names that a key stands for, each with its paths. Names that JAX stacks in one leaf come together."""
    matches = [
        (name, {number: int(digits) for number, digits in match.groupdict().items()})
        for name in (*side.modules, *side.alias)
        if (match := re.fullmatch(expression(key), name))
    ]
    if not matches:
        close = closest(key, [*side.modules, *side.alias])
        raise CannotCarry(f"weights: {key!r} names no module and no tensor of PyTorch{close}")
    used = {name for target in targets for text in re.findall(r"\{([^{}]+)\}", target) for name in names_in(text)}
    grouped: dict[tuple[tuple[str, int], ...], list[tuple[str, tuple[str, ...]]]] = {}
    for name, numbers in sorted(matches, key=lambda match: tuple(match[1].values())):
        kept = tuple((number, value) for number, value in numbers.items() if number in used)
        grouped.setdefault(kept, []).append((name, tuple(fill(target, numbers) for target in targets)))
    for places in grouped.values():
        yield bool(matches[0][1].keys() - used), places


def expression(key: str) -> str:
    """Return the regular expression of a key with `{i}` for numbers."""
    text = ""
    for number, part in enumerate(re.split(r"\{(\w+)\}", key)):
        placeholder = f"(?P={part})" if f"(?P<{part}>" in text else f"(?P<{part}>[0-9]+)"
        text += placeholder if number % 2 else re.escape(part)
    return text


def calculation(text: str) -> ast.expr:
    """Return the syntax tree of a calculation.

    Raises:
        CannotCarry: it is none.
    """
    try:
        return ast.parse(text, mode="eval").body
    except SyntaxError:
        raise CannotCarry(f"weights: {{{text}}} in a path is no calculation such as {{2*i+j-2}}") from None


def names_in(text: str) -> set[str]:
    """Return the names in the text of a calculation."""
    return {node.id for node in ast.walk(calculation(text)) if isinstance(node, ast.Name)}


def fill(target: str, numbers: Mapping[str, int]) -> str:
    """Put numbers into a path: {i}, or whole numbers calculated from them.

    Raises:
        CannotCarry: the path names a number that the key does not have, or does more than add and multiply.
    """

    def value(node: ast.AST) -> int:
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Sub | ast.Mult):
            left, right = value(node.left), value(node.right)
            signed = -right if isinstance(node.op, ast.Sub) else right
            return left * right if isinstance(node.op, ast.Mult) else left + signed
        if isinstance(node, ast.Name) and node.id in numbers:
            return numbers[node.id]
        if isinstance(node, ast.Constant) and isinstance(node.value, int):
            return node.value
        raise CannotCarry(f"weights: {target!r} has {ast.unparse(node)!r} in it, and the numbers are {sorted(numbers)}")

    return re.sub(r"\{([^{}]+)\}", lambda match: str(value(calculation(match[1]))), target)


def carry_place(
    name: str, to: tuple[str, ...], rule: Rule | None, side: TorchSide, leaves: Mapping[str, Shape], claimed: set[str]
) -> Iterator[Entry]:
    """Yield the entries of a module or a tensor that the user names, and of the modules inside with the same names."""
    modules = module_paths(leaves)
    for path in to:
        if path not in modules and path not in leaves and rule != UNUSED:
            raise CannotCarry(f"weights: {path!r} is no module and no leaf of JAX{closest(path, [*modules, *leaves])}")

    def left(name: str, tensors: Mapping[str, Shape]) -> dict[str, Shape]:
        return {tensor: shape for tensor, shape in tensors.items() if join(name, ".", tensor) not in claimed}

    if name in side.alias:
        owner = side.owner(name)
        own = name.removeprefix(f"{owner}.")
        usual = "weight" if own in STORED or own.startswith(PROJECTED) else own.removeprefix(PARAMETRIZED)
        local = usual if rule is None or usual in ("weight", "bias") else "weight"
        layer = Layer(owner, {local: side.shapes[side.alias[name]]}, to, leaves, side.modules[owner], {local: name})
        yield from (rule or rule_for_tensor(layer.module, usual)()).carry(layer)
    elif rule is not None:
        yield from rule.carry(Layer(name, left(name, side.below(name)), to, leaves, side.modules[name]).with_weight())
    else:
        owners = dict.fromkeys(side.owner(join(name, ".", tensor)) for tensor in side.below(name))
        # A module inside of an attention, whose rule is the attention's, may be named alone.
        units = {owner[len(name) :].lstrip("."): owner if owner.startswith(name) else name for owner in owners}
        inside = [path.removeprefix(f"{to[0]}/") for path in modules if not to[0] or path.startswith(f"{to[0]}/")]
        for inner, place in {"": "", **same_names(filter(None, units), filter(None, inside))}.items():
            if (unit := units.get(inner)) is not None:
                paths = (join(to[0], "/", place),)
                tensors = left(unit, side.tensors_of(unit) or side.below(unit))
                layer = Layer(unit, tensors, paths, leaves, side.modules[unit]).with_weight()
                yield from rule_for(layer.module)().carry(layer)


def module_paths(leaves: Iterable[str]) -> list[str]:
    """Return every path above a leaf, the root "" first."""
    above: set[str] = {""}
    for leaf in leaves:
        parts = leaf.split("/")
        above.update("/".join(parts[:end]) for end in range(1, len(parts)))
    return sorted(above)


def same_names(names: Iterable[str], paths: Iterable[str]) -> dict[str, str]:
    """Return the path of each name that has the same words and numbers, whatever stands between them.

    Where as many have other numbers, these say nothing: conv1 and conv2 are not Conv_1 and Conv_2 in a model that has
    Conv_0 and Conv_1, nor is layer 2 of 0, 2 and 4 the last one of 0, 1 and 2.
    """

    def by_family(sides: Iterable[str]) -> dict[tuple[str, ...], dict[tuple[str, ...], list[str]]]:
        families: dict[tuple[str, ...], dict[tuple[str, ...], list[str]]] = {}
        for side in sides:
            parts = words(side)
            family = tuple("#" if part.isdigit() else part for part in parts)
            families.setdefault(family, {}).setdefault(parts, []).append(side)
        return families

    in_jax = by_family(path for path in paths if not path.endswith("~"))
    partners: dict[str, str] = {}
    for family, members in by_family(names).items():
        others = in_jax.get(family, {})
        alike = members.keys() == others.keys()
        for parts in members.keys() & others.keys() if alike or len(members) != len(others) else ():
            some, rest = members[parts], others[parts]
            same = {name: path for name in some if (path := name.replace(".", "/")) in rest}
            some, rest = (
                [name for name in some if name not in same],
                [path for path in rest if path not in same.values()],
            )
            partners |= same | (dict(zip(some, rest, strict=True)) if alike and len(some) == len(rest) == 1 else {})
    return partners


def words(name: str) -> tuple[str, ...]:
    """Return the words and numbers of a name or a path, in lower case: layer1.0 is layer, 1, 0."""
    return tuple(re.findall(r"[a-z]+|[0-9]+", name.lower()))


def stacked(entries: Sequence[Entry]) -> Entry:
    """Return the entry that stacks what each of these entries gives, along a new first axis."""

    def convert(*tensors: Array) -> tuple[Array, ...]:
        parts = iter(tensors)
        layers = [entry.convert(*(next(parts) for _ in entry.torch)) for entry in entries]
        return tuple(library_of(tensors).stack(layer) for layer in zip(*layers, strict=True))

    return Entry(tuple(name for entry in entries for name in entry.torch), entries[0].jax, convert, entries[0].how)


# A user's own function


def from_function(
    function: Callable[[dict[str, Array]], Any],
    leaves_of: Callable[[Any], Mapping[str, Array]],
    module: Any,
    leaves: Mapping[str, Any] | None = None,
) -> WeightMap:
    """Make a map of a function that takes PyTorch's state dict and returns JAX's variables.

    A function that only moves values is run on whole numbers and read: NumPy may do the work, and the map is exact in
    every dtype. Any other has to be written in `jax.numpy`, so that it can be differentiated.

    Args:
        function: state dict (with every name of a tied tensor) to variables. What it takes out of the state dict and
            carries nowhere, the port needs not.
        leaves_of: gives the leaves of the variables, by path.
        module: the PyTorch module.
        leaves: arrays or shapes of the leaves that the JAX model has; None if only the function knows.

    Raises:
        CannotCarry: the function fails, or computes new values with NumPy, or gives other leaves than the model has.
    """
    side = torch_side(module)
    names, sizes = list(side.shapes), list(side.shapes.values())
    given: dict[str, Shape] = {}
    taken_out: set[str] = set()
    # Whole numbers, such as num_batches_tracked, are there for the function to read; no leaf is made of them.
    counters = {name: value.numpy() for name, value in module.state_dict().items() if name not in side.alias}

    def run(tensors: Sequence[Array]) -> list[Array]:
        values = dict(zip(names, tensors, strict=True))
        state = {name: values[first] for name, first in side.alias.items()} | counters
        result = leaves_of(function(state))
        taken_out.update(side.alias[name] for name in side.alias.keys() - state.keys())
        given.clear()
        given.update((path, tuple(jnp.shape(leaf))) for path, leaf in result.items())
        return list(result.values())

    try:
        sources = read_gather(run, sizes)
        entries = [
            moved(path, source, names, sizes)
            for path, source in zip(given, sources, strict=True)
            if np.any(source >= 0)
        ]
    except Exception as moving:  # whatever a user's function raises
        try:
            entries = read_program(run, names, sizes, given)
        except Exception as tracing:
            reason = f"{type(moving).__name__}: {moving}"
            if isinstance(moving, NoInverse):
                reason = re.sub("leaf ([0-9]+)", lambda match: f"leaf {[*given][int(match[1])]}", str(moving))
                reason += f", and not by jax.numpy: {type(tracing).__name__}: {tracing}"
            raise CannotCarry(f"weights: the function cannot be read: {reason}".splitlines()[0]) from moving
    shapes = given if leaves is None else {path: tuple(leaf.shape) for path, leaf in leaves.items()}
    for path, shape in given.items():
        if path not in shapes:
            close = ", ".join(difflib.get_close_matches(path, shapes, 3, 0.5))
            raise CannotCarry(
                f"weights: the function gives {path}, which is no leaf of the JAX model; close are {close}"
            )
        if shapes[path] != shape:
            words = f"of shape {shape}, and the JAX model has {shapes[path]}"
            raise CannotCarry(f"weights: the function gives {path} {words}")
    unused = frozenset(taken_out - {name for entry in entries for name in entry.torch})
    return WeightMap(tuple(entries), side.shapes, dict(shapes), side.parameters, unused)


def moved(path: str, source: np.ndarray, names: Sequence[str], sizes: Sequence[Shape]) -> Entry:
    """Make the entry of a leaf from the place of each of its values in all tensors laid end to end."""
    ends = np.cumsum([math.prod(shape) for shape in sizes])
    first, last = np.searchsorted(ends, [source.min(), source.max()], side="right")
    owner = np.searchsorted(ends, source, side="right") if first != last or source.min() < 0 else np.full((), first)
    used = [number for number in range(first, last + 1) if np.any((owner == number) & (source >= 0))]
    starts = np.cumsum([0, *(math.prod(sizes[number]) for number in used)])
    index = np.full(source.shape, -1, source.dtype)
    for start, number in zip(starts, used, strict=False):
        index = np.where(
            (owner == number) & (source >= 0), source - (ends[number] - math.prod(sizes[number])) + start, index
        )
    take = pick(index, starts)

    def convert(*tensors: Array) -> tuple[Array, ...]:
        return (take(tensors),)

    return Entry(tuple(names[number] for number in used), (path,), convert, "your function")


Pick = Callable[[Sequence[Array]], Array]


def pick(index: np.ndarray, starts: np.ndarray) -> Pick:
    """Return the function that takes these values from tensors that are laid end to end.

    It slices, reshapes, transposes and concatenates where that does it: much faster than an index for each value.
    """
    first, last = (int(number) - 1 for number in np.searchsorted(starts, [index.min(), index.max()], side="right"))
    if first == last:
        if first < 0:
            return lambda tensors: library_of(tensors).zeros(index.shape, tensors[0].dtype)
        view = pick_view(index - starts[first], int(starts[first + 1] - starts[first]))
        if view is not None:
            return lambda tensors: view(tensors[first])
    owner = np.searchsorted(starts, index, side="right")
    for axis in range(index.ndim):
        along = owner[tuple(slice(None) if place == axis else 0 for place in range(index.ndim))]
        others = [1 if place != axis else -1 for place in range(index.ndim)]
        if along.min() != along.max() and np.all(owner == along.reshape(others)):
            cuts = np.flatnonzero(np.diff(along)) + 1
            parts = [pick(part, starts) for part in np.split(index, cuts, axis)]
            return lambda tensors: library_of(tensors).concatenate([part(tensors) for part in parts], axis)

    def gather(tensors: Sequence[Array]) -> Array:
        flat = [tensor.reshape(-1) for tensor in tensors]
        return library_of(tensors).concatenate([flat[0][:1] * 0, *flat])[index + 1]

    return gather


def pick_view(index: np.ndarray, size: int) -> Callable[[Array], Array] | None:
    """Return how to slice, reshape and transpose a tensor of this size so that these values stand so, or None."""
    axes: list[tuple[int, int]] = []
    offset = total = int(index.flat[0])
    whole = np.full((1,) * index.ndim, total)
    for axis in range(index.ndim):
        steps = index[tuple(slice(None) if place == axis else 0 for place in range(index.ndim))] - total
        parts = split_steps(steps)
        if parts is None:
            return None
        axes += parts
        whole = whole + steps.reshape([1 if place != axis else -1 for place in range(index.ndim)])
    strides = [abs(stride) for _, stride in axes]
    if not np.array_equal(whole, index) or len({*strides, 0}) <= len(strides):
        return None
    offset += sum(stride * (length - 1) for length, stride in axes if stride < 0)
    order = sorted(range(len(axes)), key=lambda number: -strides[number])
    nest: list[tuple[int, int, int]] = []  # rows, row length, first row
    block = size
    for number in order:
        row, offset = divmod(offset, strides[number])
        if block % strides[number] or row + axes[number][0] > block // strides[number]:
            return None
        nest.append((block // strides[number], strides[number], row))
        block = strides[number]

    def view(tensor: Array) -> Array:
        array, shape = tensor.reshape(-1), ()
        for number, (rows, stride, row) in zip(order, nest, strict=True):
            array = array.reshape(*shape, rows, stride)[..., row : row + axes[number][0], :]
            shape = array.shape[:-1]
        array = array[..., offset]
        array = array.transpose([order.index(number) for number in range(len(axes))])
        flips = tuple(slice(None, None, -1 if stride < 0 else 1) for _, stride in axes)
        return array[flips].reshape(index.shape)

    return view


def split_steps(steps: np.ndarray) -> list[tuple[int, int]] | None:
    """Write places along an axis, the first of them 0, as axes of even strides: (length, stride), the inmost last."""
    if len(steps) == 1:
        return []
    uneven = np.flatnonzero(np.diff(steps) != steps[1])
    length = int(uneven[0]) + 1 if len(uneven) else len(steps)
    if len(steps) % length:
        return None
    rows = steps.reshape(-1, length)
    outer = split_steps(rows[:, 0]) if len(rows) > 1 else []
    return None if outer is None or np.any(rows - rows[:, :1] != rows[0]) else [*outer, (length, int(steps[1]))]


def library_of(arrays: Sequence[Array]) -> Any:
    """Return NumPy where all arrays are NumPy's, and `jax.numpy` otherwise."""
    return np if all(isinstance(array, np.ndarray) for array in arrays) else jnp


def read_program(
    run: Callable[[Sequence[Array]], list[Array]],
    names: Sequence[str],
    sizes: Sequence[Shape],
    given: Mapping[str, Any],
) -> list[Entry]:
    """Make the entries of a function in `jax.numpy`: leaves that share no tensor are carried apart."""

    @cache
    def trace(dtype: Any) -> ClosedJaxpr:
        return jax.make_jaxpr(run)([jax.ShapeDtypeStruct(shape, dtype) for shape in sizes])

    def needs(program: ClosedJaxpr) -> list[set[int]]:
        depends: dict[Any, set[int]] = {variable: {number} for number, variable in enumerate(program.jaxpr.invars)}
        for equation in program.jaxpr.eqns:
            inputs = [depends.get(variable, set()) for variable in equation.invars if isinstance(variable, Var)]
            depends.update(dict.fromkeys(equation.outvars, set().union(*inputs)))
        return [depends.get(out, set()) if isinstance(out, Var) else set() for out in program.jaxpr.outvars]

    together: list[tuple[set[int], list[int]]] = []  # tensors, leaves
    for leaf, tensors in enumerate(needs(trace(jnp.float32))):
        if tensors:
            sharing = [part for part in together if part[0] & tensors]
            together = [part for part in together if not part[0] & tensors]
            leaves = sorted([leaf, *(number for part in sharing for number in part[1])])
            together.append((tensors.union(*(part[0] for part in sharing)), leaves))

    def entry(tensors: list[int], leaves: list[int]) -> Entry:
        @cache
        def program(dtype: Any) -> Callable[..., list[Array]]:
            return jaxpr_as_fun(prune(trace(dtype), leaves))

        def convert(*values: Array) -> tuple[Array, ...]:
            dtype = jnp.result_type(*values)
            given = {number: value.astype(dtype) for number, value in zip(tensors, values, strict=True)}
            return tuple(program(dtype)(*(given.get(number) for number in range(len(names)))))

        return Entry(
            tuple(names[number] for number in tensors),
            tuple([*given][number] for number in leaves),
            convert,
            "your function",
        )

    return [entry(sorted(tensors), leaves) for tensors, leaves in together]


def prune(program: ClosedJaxpr, leaves: Sequence[int]) -> ClosedJaxpr:
    """Return a program that computes only these outputs."""
    outputs = [program.jaxpr.outvars[number] for number in leaves]
    needed = {variable for variable in outputs if isinstance(variable, Var)}
    equations: list[Any] = []
    for equation in reversed(program.jaxpr.eqns):
        if needed.intersection(equation.outvars):
            equations.insert(0, equation)
            needed.update(variable for variable in equation.invars if isinstance(variable, Var))
    return ClosedJaxpr(program.jaxpr.replace(eqns=equations, outvars=outputs), program.consts)

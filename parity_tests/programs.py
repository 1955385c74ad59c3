"""Change what a JAX model computes, in any library, without its source: by its traced program.

The model is traced, one of its values or equations is changed, and the program runs on. Every value that the adapters
tapped stays tapped under the same name, so that the harness sees all stages of the changed model.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax import Array
from jax import numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var

from parity_tests.harness.capture import exact_arithmetic, find_holders, to_jnp
from parity_tests.harness.pair import Inputs, Pair
from parity_tests.harness.taps import Modules, Plan, TapInfo, Traced, arrays_of, tap_p, trace
from parity_tests.planting import Find, NoPlace, Plant, case_of, find_tied, paths_of, with_model

# Returns what a tap hands on, from the name of the tap, what is known of it, and the value.
Change = Callable[[str, TapInfo, Array], Array]
Edit = Callable[[Plan], Plan]


def keep(name: str, info: TapInfo, value: Array) -> Array:
    """Return the value as it is."""
    return value


@contextlib.contextmanager
def no_modules() -> Iterator[Modules]:
    """Watch no module: the model brings its own taps."""
    modules = Modules()
    modules.required = modules.places_taps = False
    yield modules


def change_program(
    pair: Pair, *, before: Change = keep, after: Change = keep, edit: Edit = lambda plan: plan, training: bool = True
) -> Pair:
    """Change the traced program of the JAX model. Every value that was tapped stays tapped, under the same name.

    Args:
        pair: whose JAX model is changed.
        before: changes a value in front of its tap, so that the difference shows there.
        after: changes a value behind its tap, so that a difference of the gradient shows there.
        edit: changes equations.
        training: whether training mode is changed too.

    Raises:
        NoPlace: `edit` found nothing to change.
    """
    model = case_of(pair).model
    programs: dict[Any, Traced] = {}  # by mode and shapes, because a trace takes longer than all else

    def apply(variables: Any, inputs: Any, mode: bool) -> tuple[Any, Any]:
        sound = mode and not training

        def run(variables: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
            return model.apply(variables, Inputs(*args, **kwargs), mode)

        call = variables, inputs.args, dict(inputs.kwargs)
        key = mode, *((array.shape, jnp.result_type(array)) for array in arrays_of(call))
        if key not in programs:
            traced = trace(run, *call, context=model.context, verify=False)
            programs[key] = traced if sound else dataclasses.replace(traced, plan=edit(traced.plan))
        traced = programs[key]
        parameters = parameters_of(traced.plan)

        def rule(name: str, value: Array, slot: Any) -> tuple[None, Array]:
            info = traced.taps[name]
            if not info.steered:
                return None, value
            names = parameters.get(name, {"path": name, "place": "", "kind": info.kind})
            tapped = tap_p.bind(value if sound else before(name, info, value), **names)
            return None, tapped if sound else after(name, info, tapped)

        return traced.run(*call, rule=rule)[0]

    planted = with_model(pair, apply=apply, context=no_modules)
    try_out(planted)
    return planted


def try_out(pair: Pair) -> None:
    """Trace the JAX model in evaluation mode: a fault that has no place in it raises `NoPlace` here."""
    case = case_of(pair)
    call = case.cast(case.jax_inputs(pair.draw_inputs(0, pair.sizes()[0])), "float64")
    with exact_arithmetic("float64"):
        variables = case.variables({name: jnp.asarray(array, jnp.float64) for name, array in case.tensors.items()})
        arguments = jax.tree.map(to_jnp, (call.args, call.kwargs))
        jax.eval_shape(
            lambda variables, call: case.model.apply(variables, Inputs(*call[0], **call[1]), False)[0],
            variables,
            arguments,
        )


def parameters_of(plan: Plan) -> dict[str, dict[str, Any]]:
    """Return the parameters of the taps that adapters placed, by name."""
    parameters = {
        name: dict(plan.jaxpr.eqns[index].params)
        for index, name in plan.taps.items()
        if plan.jaxpr.eqns[index].primitive is tap_p
    }
    for plans in plan.inner.values():
        for inner in plans:
            parameters |= parameters_of(inner)
    return parameters


def path_of(pair: Pair, layer: str) -> str:
    """Return the path of the JAX module that holds the weights of a layer."""
    paths = find_holders(case_of(pair).weight_map).get(layer, set())
    if len(paths) != 1:
        raise NoPlace(f"{pair.title()} has no one module in JAX that holds the weights of {layer}")
    return next(iter(paths))


def change_output(find: Find, change: Callable[[Array], Array], *, gradient: bool = False) -> Plant:
    """Change the output of the JAX module that holds the weights of a layer; `gradient`: behind its tap."""

    def plant(pair: Pair) -> Pair:
        path = path_of(pair, find(pair))

        def changed(name: str, info: TapInfo, value: Array) -> Array:
            return change(value) if name == path else value

        return change_program(pair, after=changed) if gradient else change_program(pair, before=changed)

    return plant


def change_kind(kinds: tuple[str, ...], change: Callable[[Array], Array], *, training: bool = True) -> Plant:
    """Change the outputs of all JAX modules whose class has one of these names."""

    def plant(pair: Pair) -> Pair:
        seen: list[str] = []

        def changed(name: str, info: TapInfo, value: Array) -> Array:
            if info.kind not in kinds:
                return value
            seen.append(name)
            return change(value)

        planted = change_program(pair, before=changed, training=training)
        if not seen:
            raise NoPlace(f"{pair.title()} runs no {' or '.join(kinds)} in JAX")
        return planted

    return plant


# --- Gradients alone ---


def change_gradient(change: Callable[[Array], Array]) -> Callable[[Array], Array]:
    """Return the identity with another gradient."""

    @jax.custom_vjp
    def identity(value: Array) -> Array:
        return value

    identity.defvjp(lambda value: (value, None), lambda _, gradient: (change(gradient),))
    return identity


def flip_largest(gradient: Array) -> Array:
    """Change the sign of the largest entry."""
    place = jnp.unravel_index(jnp.abs(gradient).argmax(), gradient.shape)
    return gradient.at[place].multiply(-1)


# --- Equations of the traced program ---

# Returns what replaces an equation, or None where it stays, from the equation, the name of its tap, and the program.
Choose = Callable[[JaxprEqn, str, Jaxpr], JaxprEqn | None]


def change_equation(what: str, choose: Choose) -> Plant:
    """Replace the first equation for which there is a replacement.

    Args:
        what: a name for such an equation, for the message if there is none.
        choose: returns the replacement.
    """

    def plant(pair: Pair) -> Pair:
        def edit(plan: Plan) -> Plan:
            editor = Editor(choose)
            changed = editor.edit_plan(plan)
            if not editor.done:
                raise NoPlace(f"{pair.title()} has no {what} in JAX")
            return changed

        return change_program(pair, edit=edit)

    return plant


class Editor:
    """Replaces the first equation of a program that fits, wherever it is nested."""

    def __init__(self, choose: Choose) -> None:
        self.choose, self.done = choose, False

    def edit_plan(self, plan: Plan) -> Plan:
        """Return the plan with the replacement. Equations keep their number, so the taps stay in place."""
        equations, inner = list(plan.jaxpr.eqns), dict(plan.inner)
        for index, equation in enumerate(equations):
            equations[index] = self.edit(equation, plan.taps.get(index, ""), plan.jaxpr, index not in inner)
            if index in inner and equations[index] is equation:
                inner[index] = [self.edit_plan(part) for part in inner[index]]
            elif index in inner:  # a scan with another body
                inner[index] = [inner[index][0]._replace(jaxpr=equations[index].params["jaxpr"].jaxpr)]
        return plan._replace(jaxpr=plan.jaxpr.replace(eqns=equations), inner=inner)

    def edit(self, equation: JaxprEqn, name: str, jaxpr: Jaxpr, enter: bool = True) -> JaxprEqn:
        """Return the replacement of an equation, or the equation with a replacement inside."""
        if self.done:
            return equation
        replacement = self.choose(equation, name, jaxpr)
        if replacement is not None:
            self.done = True
            return replacement
        if not enter or equation.primitive.name.startswith("custom_"):
            return equation
        params = {key: self.edit_parameter(value) for key, value in equation.params.items()}
        return equation.replace(params=params) if self.done else equation

    def edit_parameter(self, value: Any) -> Any:
        """Return a parameter of an equation, with the replacement if it is a program that holds the place."""
        if isinstance(value, ClosedJaxpr):
            return value.replace(jaxpr=self.edit_parameter(value.jaxpr))
        if isinstance(value, Jaxpr):
            return value.replace(eqns=[self.edit(equation, "", value) for equation in value.eqns])
        return tuple(map(self.edit_parameter, value)) if type(value) is tuple else value


def compute(equation: JaxprEqn, function: Callable[..., Array]) -> JaxprEqn:
    """Return an equation that computes function(*inputs) in the place of this one."""
    shapes = [jax.ShapeDtypeStruct(known(variable).shape, known(variable).dtype) for variable in equation.invars]
    (call,) = jax.make_jaxpr(jax.jit(function))(*shapes).jaxpr.eqns
    return call.replace(invars=equation.invars, outvars=equation.outvars, source_info=equation.source_info)


def known(variable: Any) -> Any:
    """Return the shape, the number of axes and the dtype of a variable."""
    return variable.aval


def scalar(operand: Any) -> float | None:
    """Return the value of an operand that is one constant number."""
    return float(operand.val) if isinstance(operand, Literal) and np.ndim(operand.val) == 0 else None


def producer(jaxpr: Jaxpr, variable: Any) -> JaxprEqn | None:
    """Return the equation that a variable comes from."""
    return next((equation for equation in jaxpr.eqns if variable in equation.outvars), None)


def users(jaxpr: Jaxpr, variable: Var) -> list[JaxprEqn]:
    """Return the equations that use a variable."""
    return [equation for equation in jaxpr.eqns if any(variable is operand for operand in equation.invars)]


def inner_equations(equation: JaxprEqn) -> Iterator[JaxprEqn]:
    """Yield an equation and all that are nested in it."""
    yield equation
    for value in equation.params.values():
        for part in value if isinstance(value, tuple) else (value,):
            if isinstance(part, ClosedJaxpr | Jaxpr):
                for inner in (part.jaxpr if isinstance(part, ClosedJaxpr) else part).eqns:
                    yield from inner_equations(inner)


def pad_one_sided(equation: JaxprEqn, name: str, jaxpr: Jaxpr) -> JaxprEqn | None:
    """Let a convolution pad below and to the right only."""
    padding = equation.params.get("padding", ())
    if equation.primitive.name != "conv_general_dilated" or not any(low and low == high for low, high in padding):
        return None
    return equation.replace(params={**equation.params, "padding": tuple((0, low + high) for low, high in padding)})


def replace_relu(function: Callable[[Array], Array]) -> Choose:
    """Return a function that replaces a ReLU by another function."""

    def choose(equation: JaxprEqn, name: str, jaxpr: Jaxpr) -> JaxprEqn | None:
        if equation.primitive.name != "custom_jvp_call" or len(equation.invars) != 1:
            return None
        inner = list(inner_equations(equation))
        is_relu = any(part.primitive.name == "max" and 0.0 in map(scalar, part.invars) for part in inner)
        return compute(equation, function) if is_relu else None

    return choose


def replace_pool(reduce: Callable[..., Array]) -> Choose:
    """Return a function that replaces a max-pool by another reduction over the first axis of its shifted inputs."""

    def choose(equation: JaxprEqn, name: str, jaxpr: Jaxpr) -> JaxprEqn | None:
        if equation.primitive.name not in ("reduce_window_max", "reduce_window"):
            return None
        window, strides = equation.params["window_dimensions"], equation.params["window_strides"]
        padding, shape = equation.params["padding"], known(equation.outvars[0]).shape

        def pool(inputs: Array, *rest: Array) -> Array:
            padded = jnp.pad(inputs, padding, constant_values=-jnp.inf) if np.any(padding) else inputs
            parts = [
                jax.lax.slice(
                    padded,
                    offset,
                    [start + stride * (n - 1) + 1 for start, stride, n in zip(offset, strides, shape, strict=True)],
                    strides,
                )
                for offset in np.ndindex(*window)
            ]
            return reduce(jnp.stack(parts), axis=0)

        return compute(equation, pool)

    return choose


def change_eps(equation: JaxprEqn, name: str, jaxpr: Jaxpr) -> JaxprEqn | None:
    """Let a norm add ten times its eps."""
    if equation.primitive.name != "add" or not any(0 < (scalar(part) or 0) < 1e-2 for part in equation.invars):
        return None
    if not {use.primitive.name for use in users(jaxpr, equation.outvars[0])} & {"rsqrt", "sqrt"}:
        return None
    first = scalar(equation.invars[0])
    return compute(equation, lambda one, other: 10 * one + other if first is not None else one + 10 * other)


def approximate_gelu(equation: JaxprEqn, name: str, jaxpr: Jaxpr) -> JaxprEqn | None:
    """Replace the error function of x / sqrt(2) by the hyperbolic tangent with which GELU is approximated."""
    kinds = {"erf": (0.0, 1.0), "erfc": (1.0, -1.0)}
    if equation.primitive.name not in kinds:
        return None
    constant, factor = kinds[equation.primitive.name]

    def approximate(z: Array) -> Array:
        x = z * 2**0.5
        return constant + factor * jnp.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3))

    return compute(equation, approximate)


def leave_out_scale(equation: JaxprEqn, name: str, jaxpr: Jaxpr) -> JaxprEqn | None:
    """Leave out the division of attention's scores by the root of the number of features."""
    constants = [scalar(operand) for operand in equation.invars]
    if equation.primitive.name not in ("div", "mul") or len([part for part in constants if part]) != 1:
        return None
    array = next(place for place, constant in enumerate(constants) if not constant)
    source = producer(jaxpr, equation.invars[array])
    if source is None or known(equation.outvars[0]).ndim < 3:
        return None
    products = [part.params["dimension_numbers"][1] for part in inner_equations(source) if is_product(part)]
    return compute(equation, lambda *operands: operands[array]) if any(batch[0] for batch in products) else None


def is_product(equation: JaxprEqn) -> bool:
    """Return whether an equation is a product of matrices."""
    return equation.primitive.name == "dot_general"


def shift_mask(equation: JaxprEqn, name: str, jaxpr: Jaxpr) -> JaxprEqn | None:
    """Let attention look one position further: the mask of the scores is shifted along the keys."""
    if equation.primitive.name != "select_n" or len(equation.invars) != 3:
        return None
    shape, dtype = known(equation.invars[0]).shape, known(equation.outvars[0]).dtype
    if len(shape) < 3 or shape[-1] != shape[-2] or not jnp.issubdtype(dtype, jnp.floating):
        return None

    def select(mask: Array, *cases: Array) -> Array:
        return jax.lax.select_n(jnp.concatenate([mask[..., :1], mask[..., :-1]], -1), *cases)

    return compute(equation, select)


def add_twice(equation: JaxprEqn, name: str, jaxpr: Jaxpr) -> JaxprEqn | None:
    """Add one branch of a residual sum twice."""
    if equation.primitive.name != "add" or not name.split("#")[0].endswith("add"):
        return None
    one, other = equation.invars
    sources = [producer(jaxpr, operand) for operand in (one, other)]
    constant = any(source is not None and source.primitive.name == "broadcast_in_dim" for source in sources)
    if constant or isinstance(one, Literal) or isinstance(other, Literal) or known(one).ndim < 2:
        return None
    return compute(equation, lambda one, other: one + 2 * other)


def forget_state(equation: JaxprEqn, name: str, jaxpr: Jaxpr) -> JaxprEqn | None:
    """Let every step of a scan start from the state of the first one."""
    if equation.primitive.name != "scan" or not equation.params["num_carry"]:
        return None
    closed, first = equation.params["jaxpr"], equation.params["num_consts"]
    outputs = list(closed.jaxpr.outvars)
    for place in range(equation.params["num_carry"]):
        variable = closed.jaxpr.invars[first + place]
        if jnp.issubdtype(known(variable).dtype, jnp.floating):
            outputs[place] = variable
    if outputs == list(closed.jaxpr.outvars):
        return None
    changed = closed.replace(jaxpr=closed.jaxpr.replace(outvars=outputs))
    return equation.replace(params={**equation.params, "jaxpr": changed})


# --- Tied weights ---


def untie(pair: Pair) -> Pair:
    """Give the last use of a tied weight a leaf of its own, which starts equal."""
    name, case = find_tied(pair), case_of(pair)
    model, own, weight_map = case.model, case.own_variables, case.weight_map
    (path,) = paths_of(pair, name)
    leaf = model.leaves(own)[path]
    places = [place for place, array in enumerate(arrays_of(own)) if array is leaf]
    if not places:
        raise NoPlace(f"{pair.title()} has no leaf {path} in JAX that can be followed")

    def edit(plan: Plan) -> Plan:
        own_leaf, variable = plan.jaxpr.invars[0], plan.jaxpr.invars[1 + places[0]]
        while len(uses := users(plan.jaxpr, variable)) == 1 and uses[0].primitive.name == "copy":
            variable = uses[0].outvars[0]
        if len(uses) < 2:
            raise NoPlace(f"{pair.title()} uses {path} once in JAX")
        operands = [own_leaf if operand is variable else operand for operand in uses[-1].invars]
        untied = uses[-1].replace(invars=operands)
        equations = [untied if equation is uses[-1] else equation for equation in plan.jaxpr.eqns]
        return plan._replace(jaxpr=plan.jaxpr.replace(eqns=equations))

    def apply(variables: Any, inputs: Any, training: bool) -> tuple[Any, Any]:
        outputs, after = model.apply(variables["model"], inputs, training)
        return outputs, {**variables, "model": after}

    def with_leaves(variables: Any, leaves: Mapping[str, Any]) -> Any:
        others = {name: leaf for name, leaf in leaves.items() if name != "untied"}
        return {
            "copy": leaves.get("untied", variables["copy"]),
            "model": model.with_leaves(variables["model"], others),
        }

    entries = [entry._replace(jax=("untied",)) for entry in weight_map.entries if entry.torch == (name,)]
    planted = with_model(
        pair,
        variables={"copy": leaf, "model": own},
        apply=apply,
        leaves=lambda variables: {**model.leaves(variables["model"]), "untied": variables["copy"]},
        with_leaves=with_leaves,
        trainable=lambda variables: model.trainable(variables["model"]) | {"untied"},
        params=lambda variables: {**variables, "model": model.params(variables["model"])},
        with_params=lambda variables, params: {
            **params,
            "model": model.with_params(variables["model"], params["model"]),
        },
    )
    larger = dataclasses.replace(
        weight_map,
        entries=(*weight_map.entries, *entries),
        leaves={**weight_map.leaves, "untied": weight_map.leaves[path]},
    )
    return change_program(dataclasses.replace(planted, weights=larger, jax_init=None), edit=edit)

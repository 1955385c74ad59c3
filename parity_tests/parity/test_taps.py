"""Values inside plain functions: they are seen through every transformation, and seeing them changes nothing."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import jax
import numpy as np
import pytest
from jax import Array, lax
from jax import numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

from parity_tests.harness.compare import Refused
from parity_tests.harness.taps import Module, Modules, Traced, in_float64, make_sweep, scope, tap, trace
from parity_tests.parity.watched_runs import assert_close, differentiate, watch_run

RNG = np.random.default_rng(0)
WEIGHTS = {"w": RNG.normal(size=(4, 5, 5)) / 3, "index": np.arange(3)}
ROWS = RNG.normal(size=(3, 5))


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def layer(kernel: Array, rows: Array, path: str) -> Array:
    """Return tanh of a product, tapped."""
    return tap(path, jnp.tanh(rows @ kernel), "Layer")


def scanned(kernels: Array, rows: Array) -> Array:
    return lax.scan(lambda carry, kernel: (layer(kernel, carry, "s"), carry.sum()), rows, kernels)[0]


def nested_scans(kernels: Array, rows: Array) -> Array:
    def twice(rows: Array, kernel: Array) -> Array:
        return lax.scan(lambda carry, _: (layer(kernel, carry, "s"), None), rows, None, length=2)[0]

    return lax.scan(lambda carry, kernel: (jax.jit(twice)(carry, kernel), None), rows, kernels, reverse=True)[0]


def branches(kernels: Array, rows: Array) -> Array:
    chosen = lax.cond(
        rows.sum() > -100,
        lambda rows: layer(kernels[0], layer(kernels[0], rows, "c"), "a"),
        lambda rows: layer(kernels[1], rows, "c"),
        rows,
    )
    return layer(kernels[1], chosen, "c")


def by_platform(kernels: Array, rows: Array) -> Array:
    return lax.platform_dependent(
        layer(kernels[1], rows, "b"),
        cuda=lambda rows: layer(kernels[0], rows, "c"),
        cpu=lambda rows: layer(kernels[0], layer(kernels[0], rows, "c"), "a"),
        default=lambda rows: layer(kernels[1], rows, "d"),
    )


@jax.custom_jvp
def with_jvp(kernel: Array, rows: Array) -> Array:
    return layer(kernel, rows, "inside")


with_jvp.defjvp(lambda primals, tangents: (with_jvp(*primals), 3.0 * tangents[1]))


@jax.custom_vjp
def with_vjp(kernel: Array, rows: Array) -> Array:
    return layer(kernel, rows, "inside")


with_vjp.defvjp(
    lambda kernel, rows: (with_vjp(kernel, rows), kernel), lambda kernel, arriving: (kernel * 2, arriving @ kernel.T)
)

batched = jax.custom_batching.custom_vmap(lambda rows: tap("inside", jnp.sin(rows)))
batched.def_vmap(lambda size, is_batched, rows: (jnp.sin(rows), True))


def rematerialised(policy: Any) -> Callable[[Array, Array], Array]:
    def run(kernels: Array, rows: Array) -> Array:
        hidden = checkpoint_name(layer(kernels[0], rows, "a"), "u")
        return layer(kernels[1], hidden, "b")

    return lambda kernels, rows: jax.checkpoint(run, policy=policy)(kernels, rows) * 2


def reference(kernels: Array, rows: Array) -> Array:
    cell = jax.new_ref(rows)
    cell[...] = layer(kernels[0], cell[...], "a")
    cell[0] = cell[1] * 2
    return tap("b", cell[...])


def own_gradient(kernels: Array, rows: Array) -> Array:
    slope = jax.grad(lambda rows: jnp.sum(layer(kernels[0], rows, "g")))(rows)
    return rows + slope + jax.jvp(lambda rows: layer(kernels[1], rows, "j"), (rows,), (rows,))[1]


POLICIES = jax.checkpoint_policies
# A function of kernels and rows, and the taps that the walk must find in it.
PROGRAMS: dict[str, tuple[Callable[[Array, Array], Any], list[str]]] = {
    "plain": (lambda w, x: layer(w[1], layer(w[0], x, "a"), "b"), ["a", "b"]),
    "jit": (lambda w, x: jax.jit(lambda w, x: layer(w[1], layer(w[0], x, "a"), "b"))(w, x) * 2, ["a", "b"]),
    "repeated": (lambda w, x: layer(w[2], layer(w[1], layer(w[0], x, "a"), "a"), "a"), ["a", "a#2", "a#3"]),
    "nest": (lambda w, x: tap("n", {"x": x @ w[0], "y": (x.sum(), [x * 2])}), ["n.x", "n.y[0]", "n.y[1][0]"]),
    "scan": (scanned, ["s"]),
    "nested scans": (nested_scans, ["s"]),
    "cond": (branches, ["c", "a", "c#2"]),
    "a choice by platform": (by_platform, ["b", "c", "a"]),
    "custom_jvp": (lambda w, x: layer(w[1], with_jvp(w[0], x), "b"), ["inside", "b"]),
    "custom_vjp": (lambda w, x: layer(w[1], with_vjp(w[0], x), "b"), ["inside", "b"]),
    "custom_vmap": (lambda w, x: batched(x) @ w[0] + tap("b", x), ["inside", "b"]),
    "fori_loop": (lambda w, x: lax.fori_loop(0, 4, lambda i, rows: layer(w[i], rows, "f"), x), ["f"]),
    "vmap": (lambda w, x: jax.vmap(lambda row: layer(w[0], row[None], "v")[0])(x), ["v"]),
    "map in batches": (lambda w, x: lax.map(lambda kernel: layer(kernel, x, "m"), w, batch_size=2), ["m"]),
    "associative_scan": (lambda w, x: lax.associative_scan(lambda a, b: tap("s", a * b), x) @ w[0], ["s", "s#2"]),
    "remat": (rematerialised(None), ["a", "u", "b"]),
    "remat by names": (rematerialised(POLICIES.save_only_these_names("u")), ["a", "u", "b"]),
    "remat of all but names": (rematerialised(POLICIES.save_anything_except_these_names("u")), ["a", "u", "b"]),
    "remat of dots": (rematerialised(POLICIES.dots_saveable), ["a", "u", "b"]),
    "remat of nothing": (rematerialised(POLICIES.everything_saveable), ["a", "u", "b"]),
    "checkpoint_name": (lambda w, x: checkpoint_name(jnp.sin(checkpoint_name(x @ w[0], "h")), "h"), ["h", "h#2"]),
    "reference": (reference, ["a", "b"]),
    "own gradient": (own_gradient, ["g", "j"]),
    "integers": (lambda w, x: layer(w[0], x, "a") * tap("i", jnp.argmax(x, -1))[:, None], ["a", "i"]),
    "empty": (lambda w, x: (layer(w[0], x, "a"), tap("e", x[:0])), ["a", "e"]),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_values_are_seen_through_a_transformation_which_stays_what_it_is(name: str) -> None:
    program, names = PROGRAMS[name]
    traced, result = watch_run(lambda tensors, rows: program(tensors["w"], rows), WEIGHTS, ROWS)
    assert [*traced.taps] == names
    for tap_name, info in traced.taps.items():
        assert info.steered == (tap_name != "inside"), tap_name
        floats = info.steered and np.issubdtype(info.dtype, np.floating)
        assert (tap_name in result.gradients) == floats, tap_name


def test_the_values_of_a_scan_come_out_by_step() -> None:
    traced, result = watch_run(lambda tensors, rows: scanned(tensors["w"], rows), WEIGHTS, ROWS)
    assert traced.taps["s"].steps == 4
    rows = ROWS
    for step, kernel in enumerate(WEIGHTS["w"]):
        rows = np.tanh(rows @ kernel)
        np.testing.assert_allclose(result.values["s"][step], rows, rtol=1e-12)


def test_a_batch_axis_of_vmap_comes_out_in_front_wherever_it_was() -> None:
    def program(tensors: Any, rows: Array) -> Array:
        return jax.vmap(lambda column: layer(tensors["w"][0], column[None], "v"), in_axes=1, out_axes=2)(rows.T)

    _, result = watch_run(program, WEIGHTS, ROWS)
    assert result.values["v"].shape == (3, 1, 5)
    np.testing.assert_allclose(result.values["v"][:, 0], np.tanh(ROWS @ WEIGHTS["w"][0]), rtol=1e-12)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 3, 1, 2)])
def test_the_order_in_which_images_are_flattened_is_known_behind_a_scan_through_them(order: tuple[int, ...]) -> None:
    def program(tensors: Any, images: Array) -> Array:  # [batch, time, row, column, channel]
        def step(state: Array, image: Array) -> tuple[Array, Array]:
            layouts = ("NHWC", "HWIO", "NHWC")
            state += lax.conv_general_dilated(image, kernel, (1, 1), "SAME", dimension_numbers=layouts)
            return state, state

        last = lax.scan(step, jnp.zeros_like(images[:, 0]), jnp.moveaxis(images, 1, 0))[1][-1]
        return last.transpose(order).reshape(len(images), -1)

    kernel = jnp.ones((3, 3, 2, 2))
    assert trace(program, WEIGHTS, np.ones((2, 3, 4, 5, 2)), verify=False).flattened_orders == {order}


def test_a_branch_that_does_not_run_gives_zeros() -> None:
    def program(tensors: Any, rows: Array) -> Array:
        return lax.cond(rows.sum() > 1e6, lambda rows: tap("high", rows * 2), lambda rows: tap("low", rows * 3), rows)

    _, result = watch_run(program, WEIGHTS, ROWS)
    np.testing.assert_array_equal(result.values["high"], 0)
    np.testing.assert_array_equal(result.values["low"], ROWS * 3)


def test_what_is_not_entered_is_said() -> None:
    def program(tensors: Any, rows: Array) -> Array:
        steps = (rows[0, 0] > -100).astype(int) + 2
        return lax.stop_gradient(lax.fori_loop(0, steps, lambda i, c: tap("w", jnp.tanh(c)), rows)) @ tensors["w"][0]

    traced, _ = watch_run(program, WEIGHTS, ROWS)
    assert not traced.taps
    assert traced.notes == ("while is not entered: the values inside it are not seen",)
    traced, _ = watch_run(lambda tensors, rows: with_vjp(tensors["w"][0], rows), WEIGHTS, ROWS)
    assert [note.partition(" ")[2] for note in traced.notes] == [
        "has a rule of its own: the values inside it are recorded only"
    ]


def test_effects_callbacks_and_kernels_stay_as_they_are(capfd: pytest.CaptureFixture[str]) -> None:
    from jax.experimental import pallas

    def double(source: Any, target: Any) -> None:
        target[...] = source[...] * 2

    def program(tensors: Any, rows: Array) -> Array:
        jax.debug.print("sum {}", rows.sum())
        shape = jax.ShapeDtypeStruct(rows.shape, rows.dtype)
        host = jax.pure_callback(lambda rows: np.sin(rows), shape, lax.stop_gradient(rows))
        kernel = pallas.pallas_call(double, out_shape=shape, interpret=True)(tap("a", host))
        return layer(tensors["w"][0], lax.stop_gradient(kernel), "b")

    traced, result = watch_run(program, WEIGHTS, ROWS)
    jax.effects_barrier()
    assert "sum" in capfd.readouterr().out
    assert [*traced.taps] == ["a", "b"]
    np.testing.assert_allclose(result.values["b"], np.tanh(2 * np.sin(ROWS) @ WEIGHTS["w"][0]), rtol=1e-12)


def test_a_sharded_program_is_bound_as_it_is_and_that_is_said() -> None:
    mesh = jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))

    def program(tensors: Any, rows: Array) -> Array:
        return jax.shard_map(
            lambda rows, kernel: tap("in", jnp.tanh(rows @ kernel)),
            mesh=mesh,
            in_specs=(PartitionSpec("d"), PartitionSpec()),
            out_specs=PartitionSpec("d"),
        )(tap("before", rows * 2), tensors["w"][0])

    traced, _ = watch_run(program, WEIGHTS, ROWS)
    assert [*traced.taps] == ["before"]
    assert traced.notes == ("shard_map is not entered: the values inside it are not seen",)


def watch_product(modules: Modules) -> Callable[..., Array]:
    """Return a jitted function that has a tap only while it is watched, as a library's module has."""

    @jax.jit
    def product(kernel: Array, rows: Array) -> Array:
        result = rows @ kernel
        if not modules.required:
            return result
        modules["product"] = Module("Product", False)
        with scope("product"):
            return tap("product", result * 1.0, "Product")

    return product


@contextmanager
def switched_on(modules: Modules) -> Iterator[Modules]:
    """Switch the taps of `watch_product` on."""
    modules.required = True
    yield modules
    modules.required = False


@pytest.fixture
def modules() -> Modules:
    """Return modules of a library whose taps are off."""
    modules = Modules()
    modules.required = False
    return modules


def test_a_function_that_was_jitted_and_ran_before_is_seen_and_its_own_cache_stays_clean(modules: Modules) -> None:
    product = watch_product(modules)
    expected = product(WEIGHTS["w"][0], ROWS)

    def program(tensors: Any, rows: Array) -> Array:
        return product(tensors["w"][0], rows)

    traced = trace(program, WEIGHTS, ROWS, context=lambda: switched_on(modules))
    assert [*traced.taps] == ["product.mul", "product"]
    assert traced.calls == [("product", "own Product")]
    assert "tap" not in str(jax.make_jaxpr(program)(WEIGHTS, ROWS))
    np.testing.assert_array_equal(product(WEIGHTS["w"][0], ROWS), expected)


def test_a_library_of_which_no_module_ran_is_refused() -> None:
    with pytest.raises(Refused, match="without calling a module"):
        trace(lambda tensors, rows: rows @ tensors["w"][0], WEIGHTS, ROWS, context=lambda: nullcontext(Modules()))


def test_outputs_that_change_under_the_watch_are_refused(modules: Modules) -> None:
    def program(tensors: Any, rows: Array) -> dict[str, Array]:
        modules["m"] = Module("M", False)
        return {"logits": tap("m", rows @ tensors["w"][0]) * (1.0 + 1e-9 * modules.required)}

    with pytest.raises(Refused, match=r"output\.logits of the JAX model is not the same once"):
        trace(program, WEIGHTS, ROWS, context=lambda: switched_on(modules))


def test_other_shapes_than_those_that_were_traced_are_refused() -> None:
    traced = trace(lambda tensors, rows: tap("a", rows * 2), WEIGHTS, ROWS)
    with pytest.raises(Refused, match="other shapes"):
        traced.run(WEIGHTS, ROWS[:2], rule=lambda name, value, slot: (value, value))


def functions(tensors: Any, rows: Array) -> Array:
    """Return something that many functions make, in a scope."""
    with scope("block"):
        hidden = jax.nn.gelu(rows @ tensors["w"][0])
        hidden = jax.nn.softmax(hidden, axis=-1) * jax.nn.relu(hidden) * jnp.exp(hidden)
        hidden = hidden - hidden.mean(0) + jnp.mean(hidden, 0)
        hidden += jax.nn.silu(hidden) / 2
        hidden = jnp.where(hidden > 0, hidden, 0.5)
        for _ in range(2):
            hidden = jnp.tanh(hidden)
        hidden = jnp.einsum("ij,kj->ik", hidden, hidden).reshape(-1, 3)
        return jnp.concatenate([hidden, -hidden * 3])[None].sum((0, 1))


def test_functions_between_modules_are_named_as_a_user_calls_them() -> None:
    for _ in range(2):  # the second time, JAX has the functions in its cache
        traced, _ = watch_run(functions, WEIGHTS, ROWS)
        assert [name.removeprefix("block.") for name in traced.taps] == [
            *("matmul", "gelu", "softmax", "relu", "mul", "exp", "mul#2", "mean", "sub", "mean#2", "add", "silu"),
            *("div", "add#2", "where", "tanh", "tanh#2", "einsum", "neg", "mul#3", "concatenate", "sum"),
        ]
        assert {info.kind for info in traced.taps.values()} == {"function"}


def test_functions_are_named_inside_transformations_of_the_users_own() -> None:
    def inner(tensors: Any, rows: Array) -> Array:
        return jnp.sin(rows @ tensors["w"][0])

    def program(tensors: Any, rows: Array) -> Array:
        with scope("block"):
            rows = jax.checkpoint(inner)(tensors, rows)
            return jax.jit(inner)(tensors, rows)

    traced, _ = watch_run(program, WEIGHTS, ROWS)
    assert [*traced.taps] == ["block.matmul", "block.sin", "block.matmul#2", "block.sin#2"]


def test_functions_inside_a_librarys_own_layer_are_not_stages() -> None:
    modules = Modules()

    def program(tensors: Any, rows: Array) -> Array:
        for path, library in (("dense", True), ("mine", False)):
            modules[path] = Module("Layer", library)
            with scope(path):
                rows = tap(path, jnp.sin(rows @ tensors["w"][0]), "Layer")
        return rows

    traced = trace(program, WEIGHTS, ROWS, context=lambda: nullcontext(modules))
    assert [*traced.taps] == ["dense", "mine.matmul", "mine.sin", "mine"]


def network(slope: float) -> Callable[..., Array]:
    """Return a network of three layers; the second may be off by a factor."""

    def run(tensors: Any, rows: Array) -> Array:
        hidden = layer(tensors["w"][0], rows, "a")
        hidden = tap("b", hidden @ tensors["w"][1] * slope)
        return layer(tensors["w"][2], hidden, "c")

    return run


def differences(actual: dict[str, Array], expected: dict[str, Array]) -> list[str]:
    """Return the names under which the values differ by more than rounding."""
    return [name for name in expected if not np.allclose(actual[name], expected[name], rtol=1e-12, atol=1e-14)]


def test_a_local_run_finds_a_fault_where_it_is_born_and_one_program_serves_every_run(
    caplog: pytest.LogCaptureFixture,
) -> None:
    fn = network(1.01)
    _, good = watch_run(network(1.0), WEIGHTS, ROWS)
    traced = trace(fn, WEIGHTS, ROWS)
    sweep = make_sweep(traced)
    _, cotangents, _ = differentiate(network(1.0), WEIGHTS, ROWS)
    every = dict.fromkeys(traced.taps, True)

    inherited = sweep(WEIGHTS, ROWS, cotangents)
    with jax.log_compiles():
        local = sweep(WEIGHTS, ROWS, cotangents, good.values, good.gradients, every, every)
        steered = sweep(WEIGHTS, ROWS, cotangents, good.values, forward=every)
        one = sweep(WEIGHTS, ROWS, cotangents, good.values, forward={"a": True, "b": True})
    assert differences(inherited.values, good.values) == ["b", "c"]
    assert differences(inherited.gradients, good.gradients) == ["a", "b"]
    assert differences(local.values, good.values) == ["b"]
    assert differences(local.gradients, good.gradients) == ["a"]
    assert differences(steered.gradients, good.gradients) == ["a"]
    np.testing.assert_array_equal(steered.outputs, good.values["c"])
    assert differences(one.values, good.values) == ["b"]
    assert not [record for record in caplog.records if "Compiling" in record.message]


def test_a_fault_in_one_step_of_a_scan_shows_in_that_step() -> None:
    def run(factors: np.ndarray) -> Callable[..., Array]:
        def step(carry: Array, given: tuple[Array, Array]) -> tuple[Array, None]:
            return tap("s", jnp.tanh(carry @ given[0]) * given[1]), None

        return lambda tensors, rows: lax.scan(step, rows, (tensors["w"], jnp.asarray(factors)))[0]

    _, good = watch_run(run(np.ones(4)), WEIGHTS, ROWS)
    traced = trace(run(np.array([1, 1, 1.01, 1])), WEIGHTS, ROWS)
    _, cotangents, _ = differentiate(run(np.ones(4)), WEIGHTS, ROWS)
    local = make_sweep(traced)(WEIGHTS, ROWS, cotangents, good.values, good.gradients, {"s": True}, {"s": True})
    errors = np.abs(local.values["s"] - good.values["s"]).max((1, 2))
    assert [bool(error > 1e-12) for error in errors] == [False, False, True, False]


def test_integers_weights_and_outputs_have_no_gradient_and_an_output_may_be_left_out() -> None:
    def program(tensors: Any, rows: Array) -> Any:
        hidden = layer(tensors["w"][0], rows, "a")
        return {"hidden": hidden, "best": jnp.argmax(hidden, -1), "aux": tap("b", hidden.sum())}

    traced = trace(program, WEIGHTS, ROWS)
    sweep = make_sweep(traced)
    result = sweep(WEIGHTS, ROWS, {".hidden": np.ones((3, 5))})
    assert result.weight_gradients.keys() == {"w"}
    np.testing.assert_array_equal(result.gradients["b"], 0)
    assert result.outputs["best"].dtype == np.int64
    nothing = sweep(WEIGHTS, ROWS, {})
    np.testing.assert_array_equal(nothing.weight_gradients["w"], 0)


def test_python_numbers_and_texts_among_the_inputs_stay_constants() -> None:
    def program(tensors: Any, inputs: Any) -> Array:
        rows, flag, times, mode = inputs
        assert flag is True
        assert mode == "sin"
        return tap("a", rows * times)

    traced: Traced = trace(program, WEIGHTS, (ROWS, True, 3, "sin"))
    result = make_sweep(traced)(WEIGHTS, (ROWS, True, 3, "sin"), {"": np.ones_like(ROWS)})
    assert_close(result.outputs, jnp.asarray(ROWS * 3), "output")


def test_a_key_among_the_constants_is_no_float() -> None:
    key, table = jax.random.key(0), jnp.asarray([0.1, 0.2], np.float32)
    traced = trace(lambda tensors, inputs: inputs + jax.random.uniform(key) + table[0], WEIGHTS, ROWS)
    assert [constant.dtype for constant in traced.float32_constants.values()] == [np.float32]


def test_casts_to_float32_inside_a_model_are_casts_to_float64_in_a_float64_run() -> None:
    @jax.jit
    def normalise(x: Array) -> Array:
        wide = x.astype(jnp.float32)
        steps = jnp.arange(3, dtype=jnp.float32) + jnp.zeros(3, "float32") + jnp.einsum("i,i", x, x)
        return wide * 0.1 * jax.lax.rsqrt(jnp.mean(wide**2) + 1e-5) + lax.convert_element_type(steps, np.float32)

    x = np.array([0.1, 0.2, 0.3])
    before = str(jax.make_jaxpr(normalise)(x))
    assert "f32" in before
    assert "f32" not in str(jax.make_jaxpr(in_float64(normalise))(x))
    assert in_float64(lambda: jnp.finfo(x.dtype).eps)() == np.finfo(np.float32).eps
    assert str(jax.make_jaxpr(normalise)(x)) == before
    with jax.enable_x64(False):
        assert in_float64(normalise)(x).dtype == jnp.float32

"""Slow float64 convolutions are computed in another form: the same numbers, and nothing else changes."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import pytest
from flax import linen
from jax import Array, lax
from jax import numpy as jnp
from torch import nn

from parity_tests.harness import Pair, examine, taps
from parity_tests.harness.taps import by_phases, choose, rewrite, with_padding

pytestmark = pytest.mark.extended

RNG = np.random.default_rng(0)
LAST, FIRST, ONE = ("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NCHW"), ("NWC", "WIO", "NWC")
ROUNDING = 1e-14  # of the largest value; the worst seen in every case here is 2e-15


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def convolution(strides: Any, padding: Any, layout: Any = LAST, **options: Any) -> Callable[[Array, Array], Array]:
    """Return a convolution of an image and a kernel."""
    return lambda image, kernel: lax.conv_general_dilated(
        image, kernel, strides, padding, dimension_numbers=layout, **options
    )


def gradients(fn: Callable[[Array, Array], Array]) -> Callable[[Array, Array], Any]:
    """Return the gradients by the image and the kernel, of a sum that weighs each output differently."""

    def objective(image: Array, kernel: Array) -> Array:
        output = fn(image, kernel)
        return jnp.sum(output * jnp.cos(jnp.arange(output.size)).reshape(output.shape))

    return jax.grad(objective, (0, 1))


def forms(fn: Callable[..., Any], *args: Any) -> set[Any]:
    """Return the forms that are chosen in a program, those in its jitted functions included."""

    def find(jaxpr: Any) -> set[Any]:
        inner = [find(equation.params["jaxpr"].jaxpr) for equation in jaxpr.eqns if equation.primitive.name == "jit"]
        return {choose(equation) for equation in jaxpr.eqns}.union(*inner) - {None}

    return find(jax.make_jaxpr(fn)(*args).jaxpr)


AROUND, WIDE = ((1, 1), (1, 1)), ((2, 1), (0, 2))
# A convolution, the shapes of image and kernel, and the form in which a part of its gradient is computed.
CASES: dict[str, tuple[Any, tuple[int, ...], tuple[int, ...], list[Any]]] = {
    "3x3 stride 2": (convolution((2, 2), AROUND), (2, 8, 8, 9), (3, 3, 9, 10), [by_phases]),
    "channels first": (convolution((2, 2), AROUND, FIRST), (2, 9, 8, 8), (10, 9, 3, 3), [by_phases]),
    "odd size": (convolution((2, 2), "SAME"), (2, 7, 9, 9), (3, 3, 9, 10), [by_phases]),
    "1x1 stride 2": (convolution((2, 2), "VALID"), (2, 8, 8, 9), (1, 1, 9, 10), [by_phases]),
    "5x5 stride 3": (convolution((3, 3), WIDE), (2, 11, 10, 9), (5, 5, 9, 8), [by_phases]),
    "uneven strides": (convolution((1, 2), "SAME"), (2, 6, 6, 9), (3, 3, 9, 8), [by_phases]),
    "stride 4, kernel 2": (convolution((4, 4), "VALID"), (2, 9, 9, 9), (2, 2, 9, 8), [by_phases]),
    "one dimension": (convolution((2,), "SAME", ONE), (2, 9, 9), (3, 9, 8), [by_phases]),
    "dilated kernel": (
        convolution((2, 2), "SAME", rhs_dilation=(2, 2)),
        (2, 9, 9, 9),
        (3, 3, 9, 8),
        [with_padding],
    ),
    "depthwise": (
        convolution((2, 2), "SAME", feature_group_count=9),
        (2, 8, 8, 9),
        (3, 3, 1, 9),
        [with_padding],
    ),
    "kernel beyond the image": (convolution((1, 1), AROUND), (2, 2, 2, 9), (3, 3, 9, 10), [with_padding]),
    "few input channels": (convolution((2, 2), "SAME"), (2, 9, 9, 3), (3, 3, 3, 8), []),
    "grouped": (convolution((2, 2), "SAME", feature_group_count=3), (2, 8, 8, 27), (3, 3, 9, 27), []),
    "unstrided": (convolution((1, 1), "SAME"), (2, 8, 8, 9), (3, 3, 9, 10), []),
}


@pytest.mark.parametrize("name", CASES)
def test_a_rewritten_convolution_gives_the_same_numbers(name: str) -> None:
    fn, image_shape, kernel_shape, form = CASES[name]
    image, kernel = RNG.normal(size=image_shape), RNG.normal(size=kernel_shape)
    for program in (fn, gradients(fn)):
        expected, actual = jax.jit(program)(image, kernel), jax.jit(rewrite(program))(image, kernel)
        for value, reference in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
            assert value.dtype == reference.dtype
            np.testing.assert_allclose(value, reference, rtol=0, atol=ROUNDING * float(np.abs(reference).max()))
    assert forms(gradients(fn), image, kernel) == set(form)
    assert forms(rewrite(gradients(fn)), image, kernel) == set()


def test_a_transposed_convolution_goes_by_phases_forward_too() -> None:
    image, kernel = RNG.normal(size=(2, 5, 5, 9)), RNG.normal(size=(4, 4, 9, 10))

    def fn(image: Array, kernel: Array) -> Array:
        return lax.conv_transpose(image, kernel, (2, 2), "SAME")

    np.testing.assert_allclose(jax.jit(rewrite(fn))(image, kernel), jax.jit(fn)(image, kernel), rtol=0, atol=1e-13)
    assert forms(fn, image, kernel) == {by_phases}


def test_float32_and_other_programs_stay_as_they_are() -> None:
    fn, image_shape, kernel_shape, _ = CASES["3x3 stride 2"]
    image, kernel = (RNG.normal(size=shape).astype(np.float32) for shape in (image_shape, kernel_shape))
    assert forms(gradients(fn), image, kernel) == set()
    assert str(jax.make_jaxpr(rewrite(jnp.sin))(image)) == str(jax.make_jaxpr(jnp.sin)(image))


def test_convolutions_inside_jitted_functions_are_found_and_a_custom_gradient_stays() -> None:
    fn, image_shape, kernel_shape, _ = CASES["3x3 stride 2"]
    image, kernel = RNG.normal(size=image_shape), RNG.normal(size=kernel_shape)

    def program(image: Array, kernel: Array) -> Array:
        return jax.jit(fn)(jax.nn.relu(image * 0.0), kernel)

    actual = jax.jit(rewrite(gradients(program)))(image, kernel)
    assert forms(gradients(program), image, kernel) == {by_phases}
    assert forms(rewrite(gradients(program)), image, kernel) == set()
    np.testing.assert_array_equal(actual[0], 0)  # relu's gradient at 0


@pytest.mark.parametrize(("form", "shapes"), [(by_phases, "3x3 stride 2"), (with_padding, "kernel beyond the image")])
def test_the_form_is_faster_where_it_is_chosen(form: Any, shapes: str) -> None:
    sizes = {
        "3x3 stride 2": ((4, 16, 16, 128), (3, 3, 128, 128)),
        "kernel beyond the image": ((4, 2, 2, 256), (3, 3, 256, 256)),
    }
    image, kernel = (RNG.normal(size=shape) for shape in sizes[shapes])
    program = gradients(CASES[shapes][0])
    programs = {name: jax.jit(fn) for name, fn in {"plain": program, "rewritten": rewrite(program)}.items()}
    times = {}
    for name, compiled in programs.items():
        jax.block_until_ready(compiled(image, kernel))
        rounds = []
        for _ in range(5):
            start = time.process_time()
            jax.block_until_ready(compiled(image, kernel))
            rounds.append(time.process_time() - start)
        times[name] = min(rounds)
    assert times["rewritten"] < times["plain"], times


def test_on_a_gpu_the_comparison_runs_with_the_networks_own_convolutions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Translate the programs for CUDA, and run them on the CPU as a GPU would get them: no GPU is needed."""
    texts = []

    def compiled(fn: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        jitted = jax.jit(fn, **options)

        def run(*args: Any) -> Any:
            texts.append(jitted.trace(*args).lower(lowering_platforms=("cuda",)).as_text())
            return jitted(*args)

        return run

    monkeypatch.setattr(taps, "compiled", compiled)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    port = linen.Sequential([linen.Conv(9, (1, 1)), linen.Conv(10, (3, 3), strides=2, padding=1)])
    images = RNG.normal(size=(3, 2, 8, 8)).astype(np.float32)
    pair = Pair(nn.Sequential(nn.Conv2d(2, 9, 1), nn.Conv2d(9, 10, 3, 2, 1)), port, images, batch_sizes=(3,))
    assert not examine(pair, names=("outputs", "gradients")).divergences
    assert any("stablehlo.convolution" in text and "lhs_dilate = [2, 2]" in text and "xf64>" in text for text in texts)

"""Where the time of a JAX step goes: every stage of it alone, in a compiled loop, at the shapes of the real step.

A stage is what the network computes between two of its taps, so it is the project's own code that is timed. The loop
must not be cleverer than the step: each turn writes one number of its result into each of its inputs, so that nothing
can be computed once for all turns, and carries the whole result, so that nothing can be left out.
"""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import jax
import optax
from jax import lax
from jax import numpy as jnp
from jaxtyping import Array, Float, UInt8

from jax_cnn import fashion_mnist
from jax_cnn.batches import epoch_order
from jax_cnn.compiler import compiler_options
from jax_cnn.config import AdamConfig
from jax_cnn.model import Params, apply, init_params
from jax_cnn.train import cross_entropy, init_state, make_optimizer, to_images
from parity_tests.speed.contenders import Task
from parity_tests.speed.jax_work import make_trainer
from parity_tests.speed.spread import turns

WHOLE = "whole step"


class Stage(NamedTuple):
    """A piece of the network: from one tap to another, with the layer whose weights it uses, if any."""

    name: str
    start: str
    end: str
    layer: str | None = None


IMAGES = "images"
STAGES = (
    Stage("conv1", IMAGES, "conv1", "conv1"),
    Stage("relu1, pool1", "conv1", "pool1"),
    Stage("conv2", "pool1", "conv2", "conv2"),
    Stage("relu2, pool2", "conv2", "pool2"),
    Stage("flatten, fc1", "pool2", "fc1", "fc1"),
    Stage("relu3, fc2", "fc1", "fc2", "fc2"),
)


class Loop(NamedTuple):
    """What is timed: `turn` is repeated on what it returns, starting with `first`."""

    turn: Callable[[Any], Any]
    first: Any


def between(stage: Stage, weights: Any, value: Array) -> Array:
    """The network from the stage's start, whose output is `value`, to its end.

    All before the start and behind the end is computed by nobody once this is compiled, for nothing reads it.
    """
    seen: dict[str, Array] = {}

    def tap(name: str, output: Array) -> Array:
        seen[name] = value if name == stage.start else output
        return seen[name]

    params: Params = jax.tree.map(jnp.zeros_like, jax.eval_shape(init_params, jax.random.key(0)))
    images = value if stage.start == IMAGES else jnp.zeros((len(value), 28, 28, 1), value.dtype)
    apply(params if stage.layer is None else params | {stage.layer: weights}, images, tap)
    return seen[stage.end]


def nudged(tree: Any, results: Any) -> Any:
    """The tree with one number of the results, kept within -1 and 1, in the first place of every array but the biases.

    What a bias is added to changes already; changing it too would make XLA spread it out over all pixels first.
    """
    firsts = [leaf[(0,) * leaf.ndim] for leaf in jax.tree.leaves(results)]
    number = jnp.clip(sum(firsts), -1, 1)
    return jax.tree.map(lambda leaf: leaf.at[(0,) * leaf.ndim].set(number) if leaf.ndim > 1 else leaf, tree)


def repeated(function: Callable[..., Any], *inputs: Any) -> Loop:
    """A loop over a function that does not return what it takes."""

    def turn(carry: tuple[Any, Any]) -> tuple[Any, Any]:
        inputs, _ = carry
        results = function(*inputs)
        return nudged(inputs, results), results

    shapes = jax.eval_shape(function, *inputs)
    return Loop(turn, (inputs, jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)))


def loops(params: Params, pixels: UInt8[Array, "batch 28 28"], labels: UInt8[Array, " batch"]) -> dict[str, Loop]:
    """Everything that a training step does, as "stage, pass", in its order."""
    images = to_images(pixels, jnp.dtype("float32"))
    found = {"scaling, forward": pixel_loop(pixels)}
    outputs = jax.jit(activations)(params, images)
    for stage in STAGES:
        weights, value = params.get(stage.layer or "", {}), outputs[stage.start]
        found[f"{stage.name}, forward"] = repeated(partial(between, stage), weights, value)
        found[f"{stage.name}, backward"] = repeated(partial(backward, stage), weights, value, outputs[stage.end])
    found["loss, forward"] = repeated(lambda logits: cross_entropy(logits, labels).mean(), outputs["fc2"])
    loss_gradient = jax.grad(lambda logits: cross_entropy(logits, labels).mean())
    found["loss, backward"] = repeated(loss_gradient, outputs["fc2"])
    found["Adam, update"] = adam_loop(params)
    return found


def activations(params: Params, images: Float[Array, "batch 28 28 1"]) -> dict[str, Array]:
    """What every tap sees, and the images."""
    outputs = {IMAGES: images}
    apply(params, images, lambda name, output: outputs.setdefault(name, output))
    return outputs


def backward(stage: Stage, weights: Any, value: Array, grad: Array) -> Any:
    """The gradient by the stage's weights and by its input; nothing trains on the gradient by the images."""
    if stage.start == IMAGES:
        return jax.vjp(lambda weights: between(stage, weights, value), weights)[1](grad)
    return jax.vjp(partial(between, stage), weights, value)[1](grad)


def pixel_loop(pixels: UInt8[Array, "batch 28 28"]) -> Loop:
    """Bytes to numbers between 0 and 1. A turn changes one pixel, so that the next has something to do."""

    def turn(carry: tuple[Array, Float[Array, "batch 28 28 1"]]) -> tuple[Array, Float[Array, "batch 28 28 1"]]:
        pixels, images = carry
        return pixels.at[0, 0, 0].add(1), to_images(pixels, images.dtype)

    return Loop(turn, (pixels, to_images(pixels, jnp.dtype("float32"))))


def adam_loop(params: Params) -> Loop:
    """Updates of the weights, in place as in training; only the gradients are made up."""
    optimizer = make_optimizer(AdamConfig())

    def turn(carry: Any) -> Any:
        grads, (params, opt_state) = carry
        updates, opt_state = optimizer.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        return nudged(grads, params), (params, opt_state)

    return Loop(turn, (jax.tree.map(lambda leaf: leaf * 1e-3, params), tuple(init_state(params, optimizer))))


class Stages:
    """All loops compiled, and the whole training next to them; a round times each of them once."""

    def __init__(self, task: Task) -> None:
        """Take a real batch and real activations; compile with the options that the training is compiled with."""
        data = fashion_mnist.load(task.data_dir)
        chosen = epoch_order(task.seed, 0, task.images)[: task.batch_size]
        batch = jnp.asarray(data.train_images[chosen]), jnp.asarray(data.train_labels[chosen])
        self._steps = task.images // task.batch_size
        self._trainer = make_trainer(task)
        started = time.perf_counter()
        self._programs = compile_loops(loops(init_params(jax.random.key(task.seed)), *batch), self._steps)
        self.compile_seconds = time.perf_counter() - started + self._trainer.compile_seconds

    def warm_up(self) -> None:
        """Run everything once."""
        self.round(0)

    def round(self, number: int) -> dict[str, Any]:
        """Time everything once, in turns; returns seconds a step by name."""
        names = [*self._programs, WHOLE]
        seconds = {}
        for name in turns(names, number + 1)[number]:
            started = time.perf_counter()
            if name == WHOLE:
                list(self._trainer.train_epoch(number))
            else:
                self._programs[name]()
            seconds[name] = (time.perf_counter() - started) / self._steps
        return {"seconds_a_step": {name: seconds[name] for name in names}}


def compile_loops(loops: dict[str, Loop], steps: int) -> dict[str, Callable[[], Any]]:
    """Compile each loop for so many turns. A call starts where the last one ended."""

    def compiled(loop: Loop) -> Callable[[], Any]:
        run = jax.jit(lambda carry: lax.fori_loop(0, steps, lambda _, carry: loop.turn(carry), carry), donate_argnums=0)
        program = run.lower(loop.first).compile(compiler_options("cpu"))
        state = [jax.tree.map(jnp.copy, loop.first)]  # of its own: the call takes its memory over

        def call() -> None:
            state[0] = jax.block_until_ready(program(state[0]))

        return call

    with ThreadPoolExecutor() as pool:
        return dict(zip(loops, pool.map(compiled, loops.values()), strict=True))


def make(task: Task) -> Stages:
    """The work that the task names."""
    return Stages(task)

"""Where the time of a JAX step goes: every stage of it alone, in a compiled loop, at the shapes of the real step.

A stage is what the step computes with one layer's weights, from the project's own operations; bias and ReLU stand with
the pool, as one operation does all three. A test holds the stages, one after the other, to the network. The loop
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

from experiments.speed.contenders import Task
from experiments.speed.jax_work import make_trainer
from experiments.spread import turns
from jax_cnn import ops
from jax_cnn.compiler import compiler_options
from jax_cnn.config import AdamConfig
from jax_cnn.data import epoch_order, load_fashion_mnist
from jax_cnn.model import Params, init_params
from jax_cnn.train import cross_entropy, init_state, make_optimizer, to_images

WHOLE = "whole step"


Layer = dict[str, Array]


class Stage(NamedTuple):
    """A piece of the network: what it computes from its layer's weights and the stage before it."""

    name: str
    layer: str
    weights: tuple[str, ...]
    forward: Callable[[Layer, Array], Array]


def conv(layer: Layer, value: Array) -> Array:
    """Convolve, without the bias."""
    return ops.conv3x3(value, layer["kernel"])


def pool(layer: Layer, value: Array) -> Array:
    """Add the bias, rectify and pool."""
    return ops.bias_relu_max_pool2x2(value, layer["bias"])


def fc1(layer: Layer, value: Array) -> Array:
    """Flatten, and multiply."""
    return value.reshape(len(value), -1) @ layer["kernel"] + layer["bias"]


def fc2(layer: Layer, value: Array) -> Array:
    """Rectify, and multiply."""
    return jax.nn.relu(value) @ layer["kernel"] + layer["bias"]


STAGES = (
    Stage("conv1", "conv1", ("kernel",), conv),
    Stage("bias, relu, pool 1", "conv1", ("bias",), pool),
    Stage("conv2", "conv2", ("kernel",), conv),
    Stage("bias, relu, pool 2", "conv2", ("bias",), pool),
    Stage("flatten, fc1", "fc1", ("kernel", "bias"), fc1),
    Stage("relu3, fc2", "fc2", ("kernel", "bias"), fc2),
)


class Loop(NamedTuple):
    """What is timed: `turn` is repeated on what it returns, starting with `first`."""

    turn: Callable[[Any], Any]
    first: Any


def weights_of(stage: Stage, params: Params) -> Layer:
    """Those weights of its layer that the stage uses."""
    return {name: params[stage.layer][name] for name in stage.weights}


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
    value = images
    for stage in STAGES:
        weights = weights_of(stage, params)
        output = jax.jit(stage.forward)(weights, value)
        found[f"{stage.name}, forward"] = repeated(stage.forward, weights, value)
        found[f"{stage.name}, backward"] = repeated(partial(backward, stage), weights, value, output)
        value = output
    found["loss, forward"] = repeated(lambda logits: cross_entropy(logits, labels).mean(), value)
    loss_gradient = jax.grad(lambda logits: cross_entropy(logits, labels).mean())
    found["loss, backward"] = repeated(loss_gradient, value)
    found["Adam, update"] = adam_loop(params)
    return found


def backward(stage: Stage, weights: Layer, value: Array, grad: Array) -> Any:
    """The gradient by the stage's weights and by its input; nothing trains on the gradient by the images."""
    if stage == STAGES[0]:
        return jax.vjp(lambda weights: stage.forward(weights, value), weights)[1](grad)
    return jax.vjp(stage.forward, weights, value)[1](grad)


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
        data = load_fashion_mnist(task.data_dir)
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

"""The work of JAX's workers: the training of train_jax.py, a large matrix product, and each stage of a step alone."""

import contextlib
import itertools
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import jax
import numpy as np
import optax
from jax import lax
from jax import numpy as jnp
from jaxtyping import Array, UInt8

from experiments.speed.config import CHECKPOINTS, STAGE_TIMES, Task
from experiments.speed.workers import DOTS_PER_ROUND, Point, Work, checkpointing, dot_factors, sweep, training
from jax_cnn import ops
from jax_cnn.compiler import compiler_options
from jax_cnn.config import AdamConfig
from jax_cnn.data import epoch_order, load_fashion_mnist
from jax_cnn.devices import make_mesh, replicated
from jax_cnn.model import Params, init_params
from jax_cnn.train import cross_entropy, init_state, make_optimizer, to_images
from jax_cnn.trainer import JaxTrainer, training_program

WHOLE = "whole step"  # the last point of those that `time_stages` times


def make(task: Task) -> Work:
    """Build and compile the work of a task."""
    if task.contender == "jax-dot":
        return dot(task.seed)
    if task.contender == STAGE_TIMES:
        return time_stages(task)
    if task.batch_sizes:
        return make_sweep(task)
    trainer = make_trainer(task)
    if task.contender == CHECKPOINTS["jax"]:
        return checkpointing(trainer)
    return training(trainer.train_epoch, trainer.compile_seconds)


def make_trainer(task: Task, **changes: Any) -> JaxTrainer:
    """Build what train_jax.py trains with, on one device. `changes` are fields of the task's configuration."""
    config = replace(task.config, **changes)
    return JaxTrainer(config, load_fashion_mnist(config.data_dir), jax.devices(task.device)[:1])


def whole_epochs(trainer: JaxTrainer) -> Callable[[], float]:
    """Return a function that trains the next epoch and returns its last loss."""
    epochs = itertools.count()
    return lambda: float(list(trainer.train_epoch(next(epochs)))[-1][1][-1])


def make_sweep(task: Task) -> Work:
    """Compile the training for every precision and batch size, and keep its images on the device."""
    make_point = follow_command if task.contender == "gpu-jax-command" else train_from_memory
    started = time.perf_counter()
    points = {}
    with contextlib.ExitStack() as patched:
        if task.contender == "gpu-jax-plain":
            patched.enter_context(mock.patch.object(ops, "conv_bias_relu_pool", ops.plain_conv_bias_relu_pool))
        for precision, size in task.points:
            with jax.default_matmul_precision("highest" if precision == "float32" else "default"):
                points[f"{precision}, {size}"] = make_point(task, precision, size)
    return sweep(points, time.perf_counter() - started)


def follow_command(task: Task, precision: str, size: int) -> Point:
    """Train as train_jax.py does: the CPU gathers the next chunk of images while the device computes."""
    steps = task.images // size
    dtype = "bfloat16" if precision == "bfloat16" else "float32"
    return Point(steps, whole_epochs(make_trainer(task, batch_size=size, limit_train=steps * size, precision=dtype)))


def train_from_memory(task: Task, precision: str, size: int) -> Point:
    """Train with the same program on images that stay on the device: all steps are one call."""
    steps, mesh = task.images // size, make_mesh(jax.devices(task.device)[:1])
    data, optimizer = load_fashion_mnist(task.config.data_dir), make_optimizer(AdamConfig())
    state = jax.device_put(init_state(init_params(jax.random.key(task.seed)), optimizer), replicated(mesh))
    dtype = jnp.dtype("bfloat16" if precision == "bfloat16" else "float32")
    program, arguments = training_program(mesh, state, (steps, size), optimizer, dtype)
    compiled = program.lower(*arguments).compile(compiler_options(task.device))
    pixels, labels = (
        jax.device_put(array[: steps * size].reshape(steps, size, *array.shape[1:]), shape.sharding)
        for array, shape in zip((data.train_images, data.train_labels), arguments[1:3], strict=True)
    )

    def train() -> float:
        nonlocal state
        state, losses = compiled(state, pixels, labels, np.int32(steps))
        return float(losses[-1])

    return Point(steps, train)


def dot(seed: int) -> Work:
    """Return work whose round multiplies large float32 matrices in one program, each with the result of the last.

    It is compiled with the same options as the training. No memory is allocated meanwhile.
    """
    factors = jax.device_put(dot_factors(seed))
    multiply = jax.jit(lambda left, right: lax.fori_loop(0, DOTS_PER_ROUND, lambda _, left: left @ right, left))
    started = time.perf_counter()
    program = multiply.lower(*factors).compile(compiler_options("cpu"))
    compile_seconds = time.perf_counter() - started

    def multiply_all(number: int) -> dict[str, Any]:
        program(*factors).block_until_ready()
        return {}

    return Work(multiply_all, compile_seconds)


# --- Where the time of a step goes ---

# A stage is what the step computes with some weights of one layer, by the project's own operations. Bias and ReLU
# belong to the pooling, because one operation does all three. A test compares the chain of all stages with the network.
#
# Each stage is timed in a compiled loop that XLA must not simplify. So each turn writes one number of its result into
# each of its inputs, or XLA would compute once what is the same in all turns. And it returns the whole result, or XLA
# would leave out the unused rest.

Layer = dict[str, Array]


class Stage(NamedTuple):
    """A part of the network: what it computes from some weights of its layer and from the stage before it."""

    name: str
    layer: str
    weights: tuple[str, ...]
    forward: Callable[[Layer, Array], Array]


def conv(layer: Layer, images: Array) -> Array:
    """Convolve without the bias."""
    return ops.conv3x3(images, layer["kernel"])


def pool(layer: Layer, maps: Array) -> Array:
    """Add the bias, apply ReLU and pool."""
    return ops.bias_relu_max_pool2x2(maps, layer["bias"])


def fc1(layer: Layer, maps: Array) -> Array:
    """Flatten, and apply the first linear layer."""
    return maps.reshape(len(maps), -1) @ layer["kernel"] + layer["bias"]


def fc2(layer: Layer, features: Array) -> Array:
    """Apply ReLU and the second linear layer."""
    return jax.nn.relu(features) @ layer["kernel"] + layer["bias"]


STAGES = (
    Stage("conv1", "conv1", ("kernel",), conv),
    Stage("bias, relu, pool 1", "conv1", ("bias",), pool),
    Stage("conv2", "conv2", ("kernel",), conv),
    Stage("bias, relu, pool 2", "conv2", ("bias",), pool),
    Stage("flatten, fc1", "fc1", ("kernel", "bias"), fc1),
    Stage("relu3, fc2", "fc2", ("kernel", "bias"), fc2),
)


class TimedLoop(NamedTuple):
    """A loop to time: `turn` computes the next state from the last one, starting with `first`."""

    turn: Callable[[Any], Any]
    first: Any


def select_weights(stage: Stage, params: Params) -> Layer:
    """Return the weights of the layer that the stage uses."""
    return {name: params[stage.layer][name] for name in stage.weights}


def backward(stage: Stage, weights: Layer, value: Array, grad: Array) -> Any:
    """Return the gradients by the weights and by the input. The first stage needs none by its input, the images."""
    if stage == STAGES[0]:
        return jax.vjp(lambda weights: stage.forward(weights, value), weights)[1](grad)
    return jax.vjp(stage.forward, weights, value)[1](grad)


def make_loops(
    params: Params, pixels: UInt8[Array, "batch 28 28"], labels: UInt8[Array, " batch"]
) -> dict[str, TimedLoop]:
    """Return a loop for everything that a training step does, by "stage, pass", in the order of the step."""

    def mean_loss(logits: Array) -> Array:
        return cross_entropy(logits, labels).mean()

    def scale(pixels: Array) -> Array:
        return to_images(pixels, jnp.dtype("float32"))

    loops = {"scaling, forward": repeat(scale, pixels)}
    value = scale(pixels)
    for stage in STAGES:
        weights = select_weights(stage, params)
        output = jax.jit(stage.forward)(weights, value)
        loops[f"{stage.name}, forward"] = repeat(stage.forward, weights, value)
        loops[f"{stage.name}, backward"] = repeat(partial(backward, stage), weights, value, output)
        value = output
    loops["loss, forward"] = repeat(mean_loss, value)
    loops["loss, backward"] = repeat(jax.grad(mean_loss), value)
    loops["Adam, update"] = adam_loop(params)
    return loops


def repeat(function: Callable[..., Any], *inputs: Any) -> TimedLoop:
    """Return a loop over a function whose result has other shapes than its inputs."""

    def turn(state: tuple[Any, Any]) -> tuple[Any, Any]:
        inputs, _ = state
        results = function(*inputs)
        return mix_in(inputs, results), results

    shapes = jax.eval_shape(function, *inputs)
    return TimedLoop(turn, (inputs, jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)))


def mix_in(inputs: Any, results: Any) -> Any:
    """Write one number from the results, limited to -1 … 1, into the first place of every input but the biases.

    The array that a bias is added to changes anyway. If the bias changed too, XLA would first copy it to all pixels.
    """
    number = jnp.clip(sum(leaf.ravel()[0] for leaf in jax.tree.leaves(results)), -1, 1)

    def replace_first(leaf: Array) -> Array:
        return leaf.at[(0,) * leaf.ndim].set(number.astype(leaf.dtype)) if leaf.ndim > 1 else leaf

    return jax.tree.map(replace_first, inputs)


def adam_loop(params: Params) -> TimedLoop:
    """Return a loop that updates the weights in place as training does, with invented gradients."""
    optimizer = make_optimizer(AdamConfig())

    def turn(state: Any) -> Any:
        grads, (params, opt_state) = state
        updates, opt_state = optimizer.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        return mix_in(grads, params), (params, opt_state)

    return TimedLoop(turn, (jax.tree.map(lambda leaf: leaf * 1e-3, params), tuple(init_state(params, optimizer))))


def time_stages(task: Task) -> Work:
    """Return work that times every loop on a real batch and its activations, and an epoch of the whole training."""
    data, steps = load_fashion_mnist(task.config.data_dir), task.images // task.batch_size
    chosen = epoch_order(task.seed, 0, task.images)[: task.batch_size]
    batch = jnp.asarray(data.train_images[chosen]), jnp.asarray(data.train_labels[chosen])
    trainer = make_trainer(task)
    started = time.perf_counter()
    loops = make_loops(init_params(jax.random.key(task.seed)), *batch)
    points = {name: Point(steps, compile_loop(loop, steps)) for name, loop in loops.items()}
    compile_seconds = time.perf_counter() - started + trainer.compile_seconds
    return sweep({**points, WHOLE: Point(steps, whole_epochs(trainer))}, compile_seconds)


def compile_loop(loop: TimedLoop, steps: int) -> Callable[[], None]:
    """Compile a loop of this number of turns. Every call goes on from the state of the last one."""
    run = jax.jit(lambda state: lax.fori_loop(0, steps, lambda _, state: loop.turn(state), state), donate_argnums=0)
    program = run.lower(loop.first).compile(compiler_options("cpu"))
    state = jax.tree.map(jnp.copy, loop.first)  # a copy, because the call frees the memory of its input

    def call() -> None:
        nonlocal state
        state = jax.block_until_ready(program(state))

    return call

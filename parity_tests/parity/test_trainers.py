"""The trainers of the two training commands do the same: what they are fed, what they compute, and how exactly.

They are compared as they train, not copies of their parts.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
import pytest
import torch
from jaxtyping import UInt8

import train_jax
import train_torch
from jax_cnn import train, trainer
from jax_cnn.checkpoint import AdamState
from jax_cnn.config import JaxTrainConfig
from jax_cnn.data import FashionMNIST, epoch_order
from jax_cnn.devices import pick_devices
from jax_cnn.torch_layout import TorchDict
from jax_cnn.trainer import CHUNK_STEPS, EVALUATION_BATCH, Chunk, JaxTrainer, chunk_shapes
from parity_tests.harness.compare import EXACT, Bound, Divergence, compare
from torch_ref.model import make_model
from torch_ref.train import criterion
from torch_ref.trainer import TorchTrainer

Trainer = JaxTrainer | TorchTrainer

FLOAT64 = Bound(1e-10, "float64 rounding, amplified over the steps", relative=False)
FACTOR = 4.0  # a float32 run may be this many times further from float64 than the measured noise
HALF_ULP = 2.0**-24  # no result in float32 can be expected to be closer
MOMENTS = ("first_moment", "second_moment")


class Batch(NamedTuple):
    """The images and labels of one step."""

    pixels: UInt8[np.ndarray, "batch 28 28"]
    labels: UInt8[np.ndarray, " batch"]


class Epoch(NamedTuple):
    """The report of a trainer about an epoch, and its state and scores after it."""

    sizes: list[int]  # images in each batch
    losses: np.ndarray  # of each batch
    state: AdamState
    scores: dict[str, np.ndarray]  # loss and accuracy over the test set


# Running the trainers


@contextmanager
def make_trainer(framework: str, config: JaxTrainConfig, start: TorchDict | None = None) -> Iterator[Trainer]:
    """Make a trainer as its command makes it, starting from these weights in the run's precision.

    A trainer sets PyTorch's default dtype, or whether JAX has float64, for its whole process. Both are put back at the
    end of the block, so that trainers of several precisions can follow each other.
    """
    torch_dtype, has_float64 = torch.get_default_dtype(), jax.config.read("jax_enable_x64")
    initial = None if start is None else {name: array.astype(config.weights_dtype) for name, array in start.items()}
    try:
        if framework == "jax":
            trainer = train_jax.make_trainer(config, pick_devices(config), initial, print)
        else:
            trainer = train_torch.make_trainer(config, initial, print)
        assert isinstance(trainer, JaxTrainer | TorchTrainer)
        yield trainer
    finally:
        torch.set_default_dtype(torch_dtype)
        jax.config.update("jax_enable_x64", has_float64)


def draw_weights(config: JaxTrainConfig) -> TorchDict:
    """Return PyTorch's own initial weights of the configured network, float32."""
    torch.manual_seed(config.seed)
    return {name: tensor.numpy().copy() for name, tensor in make_model(*config.network).state_dict().items()}


def train_epochs(framework: str, config: JaxTrainConfig, start: TorchDict) -> list[Epoch]:
    """Train every epoch of a run from these weights."""
    with make_trainer(framework, config, start) as trainer:
        return [train_epoch(trainer, epoch) for epoch in range(config.epochs)]


def train_epoch(trainer: Trainer, epoch: int) -> Epoch:
    """Train an epoch and evaluate. JAX reports a chunk of batches at a time, PyTorch each batch."""
    sizes: list[int] = []
    losses: list[np.ndarray] = []
    for count, reported in trainer.train_epoch(epoch):
        chunk = np.atleast_1d(np.asarray(reported))
        sizes += [count // len(chunk)] * len(chunk)
        losses.append(chunk)
    loss, accuracy = trainer.evaluate()
    scores = {"evaluation, loss": np.array(loss), "evaluation, accuracy": np.array(accuracy)}
    return Epoch(sizes, np.concatenate(losses), AdamState(*trainer.state()), scores)


def train_last_steps(trainer: Trainer, start: TorchDict, first: int) -> AdamState:
    """Train the first epoch's steps from number `first` on, starting from these weights and moments of zero."""
    first_moment, second_moment = ({name: np.zeros_like(array) for name, array in start.items()} for _ in MOMENTS)
    trainer.restore(start, first_moment, second_moment, 0)
    for _ in trainer.train_epoch(0, first):
        pass
    return AdamState(*trainer.state())


def train_nudged(trainer: Trainer, start: TorchDict, first: int, nudges: int) -> list[AdamState]:
    """Train from these weights, and again from the same with each moved by one unit in the last place (ULP)."""
    starts = [start, *(nudge(start, seed) for seed in range(nudges))]
    return [train_last_steps(trainer, weights, first) for weights in starts]


def nudge(weights: TorchDict, seed: int) -> TorchDict:
    """Move every weight to a neighbouring float, up or down at random."""
    rng = np.random.default_rng(seed)
    return {
        name: np.nextafter(array, np.where(rng.random(array.shape) < 0.5, -np.inf, np.inf).astype(array.dtype))
        for name, array in weights.items()
    }


# What the trainers are fed


def record_feed(framework: str, config: JaxTrainConfig) -> list[list[Batch]]:
    """Train every epoch of a run, and return the batches of each that reach the network and the loss."""
    served: list[Batch] = []
    feed = []
    with make_trainer(framework, config) as trainer, watch(trainer, served.append):
        for epoch in range(config.epochs):
            for _ in trainer.train_epoch(epoch):
                pass
            feed.append(served.copy())
            served.clear()
    return feed


@contextmanager
def watch(trainer: Trainer, note: Callable[[Batch], object]) -> Iterator[None]:
    """Note each batch that a trainer trains on: the arguments of JAX's programs, and of PyTorch's network and loss."""
    if isinstance(trainer, JaxTrainer):
        programs: dict[int, Any] = dict(trainer._train_programs)
        trainer._train_programs = {size: noting(program, note) for size, program in programs.items()}
        yield
        return
    images: list[torch.Tensor] = []

    def note_images(_: torch.nn.Module, inputs: tuple[torch.Tensor]) -> None:
        images.append(inputs[0])

    def note_labels(_: torch.nn.Module, inputs: tuple[torch.Tensor, torch.Tensor]) -> None:
        note(torch_batch(images.pop(), inputs[1]))

    with (
        trainer._model.register_forward_pre_hook(note_images),
        criterion.register_forward_pre_hook(note_labels),
    ):
        yield


def noting(program: Any, note: Callable[[Batch], object]) -> Any:
    """Return a training program that notes its batches before it trains on them."""

    def run(state: Any, pixels: jax.Array, labels: jax.Array, steps: np.int32) -> Any:
        for batch in zip(np.asarray(pixels)[:steps], np.asarray(labels)[:steps], strict=True):
            note(Batch(*batch))
        return program(state, pixels, labels, steps)

    return run


def torch_batch(images: torch.Tensor, labels: torch.Tensor) -> Batch:
    """Return PyTorch's batch [batch, 1, 28, 28] as the bytes that it was made from."""
    scaled = images[:, 0].numpy()
    pixels = np.rint(scaled * 255).astype(np.uint8)
    assert np.array_equal(pixels / np.array(255, scaled.dtype), scaled), "PyTorch is fed images other than pixels / 255"
    return Batch(pixels, labels.numpy().astype(np.uint8))


def compare_feeds(jax_feed: list[list[Batch]], torch_feed: list[list[Batch]], train_set: Batch) -> Iterator[Divergence]:
    """Yield where the trainers are fed other batches, an image more or less than once, or an earlier epoch's order."""
    whole = Counter(image_keys([train_set]))
    orders: dict[str, list[list[bytes]]] = {"JAX": [], "PyTorch": []}
    for epoch, (ours, theirs) in enumerate(zip(jax_feed, torch_feed, strict=True)):
        yield from compare_batches(ours, theirs, epoch)
        for side, batches in (("JAX", ours), ("PyTorch", theirs)):
            order = image_keys(batches)
            missing, again = whole - Counter(order), Counter(order) - whole
            if missing or again:
                problem = f"{side} leaves out {missing.total():,} images and is fed {again.total():,} once too often"
                yield Divergence("feed", f"epoch {epoch}, every image once", problem)
            if order in orders[side]:
                problem = f"{side} repeats the order of epoch {orders[side].index(order)}"
                yield Divergence("feed", f"epoch {epoch}, order", problem)
            orders[side].append(order)


def compare_batches(ours: list[Batch], theirs: list[Batch], epoch: int) -> Iterator[Divergence]:
    """Yield the first batch of an epoch that differs."""
    counted, expected_count = ({"number of batches": np.array(len(batches))} for batches in (ours, theirs))
    yield from compare("feed", counted, expected_count, EXACT, f"epoch {epoch}, {{}}")
    for index, (actual, expected) in enumerate(zip(ours, theirs, strict=False)):
        where = f"epoch {epoch}, batch {index}, {{}}"
        differences = list(compare("feed", actual._asdict(), expected._asdict(), EXACT, where))
        if differences:
            yield from differences
            return


def image_keys(batches: Sequence[Batch]) -> list[bytes]:
    """Return the bytes of each image with its label, in order."""
    pixels = np.concatenate([batch.pixels for batch in batches])
    labels = np.concatenate([batch.labels for batch in batches])
    return [row.tobytes() for row in np.column_stack([pixels.reshape(len(pixels), -1), labels])]


# What they compute in float64


def compare_epochs(jax_epochs: list[Epoch], torch_epochs: list[Epoch]) -> Iterator[Divergence]:
    """Yield the first loss that differs, or all that differs after an epoch; what follows from it is not repeated."""
    for epoch, (ours, theirs) in enumerate(zip(jax_epochs, torch_epochs, strict=True)):
        where = f"epoch {epoch}, {{}}"
        losses = compare("trainers", named_losses(ours), named_losses(theirs), FLOAT64, where)
        differences = [first] if (first := next(losses, None)) else list(compare_after(ours, theirs, where))
        if differences:
            yield from differences
            return


def named_losses(epoch: Epoch) -> dict[str, np.ndarray]:
    """Return the loss of each step under its name."""
    steps = enumerate(zip(epoch.sizes, epoch.losses, strict=True))
    return {f"step {step}, loss of {size} images": np.array(loss) for step, (size, loss) in steps}


def compare_after(ours: Epoch, theirs: Epoch, where: str) -> Iterator[Divergence]:
    """Compare the states and scores after an epoch."""
    steps, expected_steps = ({"number of steps": np.array(epoch.state.step)} for epoch in (ours, theirs))
    yield from compare("trainers", steps, expected_steps, EXACT, where)
    for part in (*MOMENTS, "weights"):
        label = where.format(f"{part.replace('_', ' ')} {{}}")
        yield from compare("trainers", getattr(ours.state, part), getattr(theirs.state, part), FLOAT64, label)
    yield from compare("trainers", ours.scores, theirs.scores, FLOAT64, where)


# How exact float32 is


def compare_rounding(
    in_jax: Sequence[AdamState], in_torch: Sequence[AdamState], truth: AdamState, steps: int
) -> Iterator[Divergence]:
    """Yield where a float32 run is further from the float64 run than `FACTOR` times the measured noise.

    The noise is how far runs with nudged weights end from the run without, the furthest of both frameworks. After one
    step moments are compared tensor by tensor. Otherwise all tensors are compared as a whole: it is chance where single
    ones end after many steps, and after one optax has moved single biases by 6 times the noise, because it computes its
    bias correction in float32.

    Args:
        in_jax: the states after JAX's float32 runs: the first from the weights as they are, the others nudged.
        in_torch: PyTorch's.
        truth: the state after the float64 run.
        steps: how many steps each run has trained.
    """
    tensors = list(truth.weights)
    moments: list[tuple[str, list[str]]] = [(part, tensors) for part in MOMENTS]
    if steps == 1:
        moments = [(part, [name]) for part in MOMENTS for name in tensors]
    for part, names in [*moments, ("weights", tensors)]:
        noise = max(distance(runs[0], other, part, names) for runs in (in_jax, in_torch) for other in runs[1:])
        noise = max(noise, HALF_ULP * size(truth, part, names))
        for side, runs in (("JAX", in_jax), ("PyTorch", in_torch)):
            error = distance(runs[0], truth, part, names)
            if not error <= FACTOR * noise:
                problem = f"{side} in float32 is {error:.1e} from float64, more than {FACTOR:g} x {noise:.1e}"
                where = f"after step {steps}, {part.replace('_', ' ')}" + (f" {names[0]}" if len(names) == 1 else "")
                yield Divergence("float32", where, problem)


def distance(one: AdamState, other: AdamState, part: str, names: Sequence[str]) -> float:
    """Return the root mean square difference over all values of these tensors."""
    ours, theirs = getattr(one, part), getattr(other, part)
    return root_mean_square([ours[name].astype(np.float64) - theirs[name] for name in names])


def size(state: AdamState, part: str, names: Sequence[str]) -> float:
    """Return the root mean square of all values of these tensors."""
    return root_mean_square([getattr(state, part)[name] for name in names])


def root_mean_square(arrays: Sequence[np.ndarray]) -> float:
    """Return the root mean square of all values of these arrays."""
    return float(np.sqrt(sum(np.square(array).sum() for array in arrays) / sum(array.size for array in arrays)))


# The tests


BATCH = 3
REMAINDER = 2
STEPS = CHUNK_STEPS + 2  # full batches in an epoch, in two chunks
LONG = 300  # steps after which rounding has driven apart any two runs, of the same framework too
LONG_BATCH = 8  # with smaller batches that takes longer


@pytest.fixture(scope="module")
def short(data_dir: Path) -> JaxTrainConfig:
    """Return two epochs of SimpleCNN in float64. Training and test set end with a smaller batch."""
    config = JaxTrainConfig(data_dir=data_dir, device="cpu", precision="float64", batch_size=BATCH, epochs=2)
    return replace(config, limit_train=STEPS * BATCH + REMAINDER, limit_test=EVALUATION_BATCH + 10)


def compare_training(config: JaxTrainConfig) -> list[str]:
    """Train both trainers, as they are now, from the same weights, and return what differs."""
    start = draw_weights(config)
    return list(map(str, compare_epochs(train_epochs("jax", config, start), train_epochs("torch", config, start))))


def test_both_trainers_end_two_epochs_with_the_same_weights_moments_and_scores(short: JaxTrainConfig) -> None:
    shapes = chunk_shapes(STEPS * BATCH + REMAINDER, BATCH)
    assert shapes == [(CHUNK_STEPS, BATCH), (1, REMAINDER)]
    assert not compare_training(short)


def test_a_remainder_s_loss_divided_by_a_full_batch_is_caught(
    short: JaxTrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    sound = train.loss_fn

    def faulty(params: Any, images: jax.Array, labels: jax.Array, network: Any) -> jax.Array:
        return sound(params, images, labels, network) * len(images) / BATCH

    monkeypatch.setattr(train, "loss_fn", faulty)
    (difference,) = compare_training(replace(short, model="linear"))  # all networks train with the same loss
    assert difference.startswith(f"trainers: epoch 0, step {STEPS}, loss of {REMAINDER} images: error ")


@pytest.fixture(scope="module")
def whole(data_dir: Path) -> JaxTrainConfig:
    """Return two epochs of all images, of the network that trains fastest: all are fed the same way."""
    return JaxTrainConfig(data_dir=data_dir, device="cpu", precision="float64", epochs=2, model="linear")


@pytest.fixture(scope="module")
def torch_feed(whole: JaxTrainConfig) -> list[list[Batch]]:
    """Return what PyTorch's trainer is fed."""
    return record_feed("torch", whole)


@pytest.fixture(scope="module")
def train_set(data: FashionMNIST) -> Batch:
    """Return all training images with their labels."""
    return Batch(data.train_images, data.train_labels)


def test_both_trainers_are_fed_every_image_once_in_the_same_batches(
    whole: JaxTrainConfig, torch_feed: list[list[Batch]], train_set: Batch
) -> None:
    assert [len(batches) for batches in torch_feed] == [938, 938]
    assert not list(compare_feeds(record_feed("jax", whole), torch_feed, train_set))


def test_a_chunk_that_is_fed_twice_is_caught(
    whole: JaxTrainConfig, torch_feed: list[list[Batch]], train_set: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    early, late = 1, 12
    sound = JaxTrainer._chunks

    def faulty(self: JaxTrainer, epoch: int, start: int) -> Iterator[Chunk]:
        chunks = list(sound(self, epoch, start))
        chunks[late] = chunks[early]
        yield from chunks

    monkeypatch.setattr(JaxTrainer, "_chunks", faulty)
    jax_feed = record_feed("jax", replace(whole, epochs=1))
    pixels, labels, once = map(str, compare_feeds(jax_feed, torch_feed[:1], train_set))
    assert pixels.startswith(f"feed: epoch 0, batch {late * CHUNK_STEPS}, pixels: error ")
    assert labels.startswith(f"feed: epoch 0, batch {late * CHUNK_STEPS}, labels: error ")
    assert once == ("feed: epoch 0, every image once: JAX leaves out 4,096 images and is fed 4,096 once too often")


@pytest.mark.parametrize("sides", ["JAX", "JAX and PyTorch"])
def test_a_feed_that_repeats_the_first_order_is_caught(
    sides: str, whole: JaxTrainConfig, train_set: Batch, monkeypatch: pytest.MonkeyPatch
) -> None:
    def first_order(seed: int, epoch: int, size: int) -> np.ndarray:
        return epoch_order(seed, 0, size)

    monkeypatch.setattr(trainer, "epoch_order", first_order)
    if sides == "JAX and PyTorch":
        monkeypatch.setattr(train_torch, "epoch_order", first_order)
    config, served = replace(whole, limit_train=200), Batch(*(array[:200] for array in train_set))
    differences = list(map(str, compare_feeds(record_feed("jax", config), record_feed("torch", config), served)))
    if sides == "JAX":
        assert differences[0].startswith("feed: epoch 1, batch 0, pixels: error ")
    assert "feed: epoch 1, order: JAX repeats the order of epoch 0" in differences
    assert ("feed: epoch 1, order: PyTorch repeats the order of epoch 0" in differences) == ("PyTorch" in sides)


NUDGES = {1: 2, LONG: 6}  # some nudged runs stay near the others for 300 steps, which says nothing of the noise


@pytest.fixture(scope="module")
def long(data_dir: Path) -> JaxTrainConfig:
    """Return an epoch of many steps in float32."""
    return JaxTrainConfig(
        data_dir=data_dir, device="cpu", batch_size=LONG_BATCH, limit_train=LONG * LONG_BATCH, limit_test=1
    )


def run_float32(framework: str, long: JaxTrainConfig, steps: int) -> list[AdamState]:
    """Return the states after the epoch's last steps in float32, without and with nudged weights."""
    start = draw_weights(long)
    with make_trainer(framework, long, start) as made:
        return train_nudged(made, start, LONG - steps, NUDGES[steps])


def run_float64(long: JaxTrainConfig, steps: int) -> AdamState:
    """Return the state after these steps in float64, which is the same in both frameworks."""
    start: TorchDict = {name: array.astype(np.float64) for name, array in draw_weights(long).items()}
    with make_trainer("torch", replace(long, precision="float64"), start) as made:
        return train_last_steps(made, start, LONG - steps)


@pytest.mark.parametrize("steps", [1, pytest.param(LONG, marks=pytest.mark.slow)])
def test_in_float32_both_trainers_are_as_near_float64_as_one_ulp_allows(long: JaxTrainConfig, steps: int) -> None:
    """Largest error over 3 seeds, in units of the noise: 1.5 after one step, 1.6 after 300."""
    jax_runs, torch_runs = (run_float32(framework, long, steps) for framework in ("jax", "torch"))
    assert not list(map(str, compare_rounding(jax_runs, torch_runs, run_float64(long, steps), steps)))


def test_gradients_rounded_to_bfloat16_are_caught(long: JaxTrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    sound = train.train_step

    def faulty(state: Any, images: Any, labels: Any, optimizer: optax.GradientTransformation, loss_fn: Any) -> Any:
        rounding = optax.stateless(lambda grads, _: jax.tree.map(to_bfloat16, grads))
        chained = optax.chain(rounding, optimizer)
        new_state, loss = sound(
            state._replace(opt_state=(optax.EmptyState(), state.opt_state)), images, labels, chained, loss_fn
        )
        return new_state._replace(opt_state=new_state.opt_state[1]), loss

    monkeypatch.setattr(train, "train_step", faulty)
    jax_runs, torch_runs = (run_float32(framework, long, 1) for framework in ("jax", "torch"))
    differences = list(map(str, compare_rounding(jax_runs, torch_runs, run_float64(long, 1), steps=1)))
    assert differences[0].startswith("float32: after step 1, first moment conv1.weight: JAX in float32 is ")


def to_bfloat16(gradient: jax.Array) -> jax.Array:
    """Round to bfloat16. XLA removes a cast there and back."""
    return jax.lax.reduce_precision(gradient, exponent_bits=8, mantissa_bits=7)

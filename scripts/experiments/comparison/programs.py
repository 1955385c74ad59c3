"""The two programs, part by part: which pieces of the real files the page shows beside one another."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from experiments.comparison.sources import Cut, code_lines, count_lines, listing

Json = dict[str, Any]


class Program(NamedTuple):
    """One part of the program as one side writes it."""

    side: str
    label: str
    cuts: Sequence[Cut]
    ran: bool = True
    """Whether the two commands run it by default: of the dialects, one does."""


class Stage(NamedTuple):
    """One part of the program, in each framework, and what to see in it."""

    title: str
    lesson: str
    programs: Sequence[Program]


def stage(title: str, lesson: str, torch: Sequence[Cut], jax: Sequence[Cut]) -> Stage:
    """A part that either side writes in one way."""
    return Stage(title, lesson, [Program("torch", "PyTorch", torch), Program("jax", "JAX", jax)])


DIALECTS = "jax_cnn/dialects"
OPERATIONS = "jax_cnn/ops.py"
STAGES = (
    stage(
        "Data",
        "PyTorch's loader fetches and converts one image at a time on the way to a batch. JAX gathers 64 batches of "
        "raw bytes at once and scales them on the device. The order of the images is one and the same.",
        [Cut("torch_ref/data.py", "load_dataset"), Cut("torch_ref/data.py", "load_batches")],
        [
            Cut("jax_cnn/feed.py", "Feed.chunks"),
            Cut("jax_cnn/feed.py", "Feed._send"),
            Cut("jax_cnn/train.py", "to_images"),
        ],
    ),
    Stage(
        "Model",
        "A PyTorch module owns its weights and is called; a batch is [image, channel, row, column]. In JAX a network "
        "is a function of the weights and the images [image, row, column, channel], and there are three ways to write "
        "it. Plain functions hide nothing. A Linen module is a description that declares its weights where it uses "
        "them and keeps none. An NNX module holds its weights, as PyTorch's does, and is taken apart for training. "
        "All three have the same weights, share `conv_bias_relu_pool` and give the same numbers; `tap` lets the tests "
        "look inside.",
        [
            Program("torch", "PyTorch", [Cut("torch_ref/model.py", "SimpleCNN")]),
            Program(
                "jax",
                "JAX with Flax Linen",
                [
                    Cut(f"{DIALECTS}/linen.py", "ConvReluPool"),
                    Cut(f"{DIALECTS}/linen.py", "SimpleCNN"),
                    Cut(f"{DIALECTS}/__init__.py", "conv_bias_relu_pool"),
                ],
            ),
            Program(
                "jax",
                "JAX with Flax NNX",
                [Cut(f"{DIALECTS}/nnx.py", "ConvReluPool"), Cut(f"{DIALECTS}/nnx.py", "SimpleCNN")],
                ran=False,
            ),
            Program(
                "jax",
                "JAX in plain functions",
                [Cut(f"{DIALECTS}/plain.py", name) for name in ("dense", "conv_relu_pool", "simple_cnn")],
                ran=False,
            ),
        ],
    ),
    stage(
        "Loss",
        "Cross-entropy from logits on both sides. In JAX it has to be a function of the weights, because that is what "
        "will be differentiated.",
        [Cut("torch_ref/train.py", "criterion")],
        [Cut("jax_cnn/train.py", "cross_entropy"), Cut("jax_cnn/train.py", "loss_fn")],
    ),
    stage(
        "Step",
        "PyTorch records the forward pass, fills in gradients where the weights are, and changes them in place. JAX "
        "turns the loss into a function that returns gradients, and a step into one from state to state.",
        [
            Cut("torch_ref/trainer.py", "TorchTrainer.__init__", "self._optimizer"),
            Cut("torch_ref/train.py", "train_one_epoch", "optimizer.zero_grad", "optimizer.step"),
        ],
        [Cut("jax_cnn/train.py", "make_optimizer"), Cut("jax_cnn/train.py", "train_step")],
    ),
    stage(
        "Loop",
        "PyTorch comes back to Python after every step. In JAX 64 steps are one compiled program, and Python only sees "
        "that the next batches are on their way.",
        [Cut("torch_ref/train.py", "train_one_epoch"), Cut("torch_ref/trainer.py", "TorchTrainer.train_epoch")],
        [Cut("jax_cnn/train.py", "train_chunk"), Cut("jax_cnn/trainer.py", "JaxTrainer.train_epoch")],
    ),
)


def stages() -> list[Json]:
    """Every stage with its listings, and how many lines of code each program takes for it."""
    return [
        {"title": each.title, "lesson": each.lesson, "programs": [describe(program) for program in each.programs]}
        for each in STAGES
    ]


def describe(program: Program) -> Json:
    """One program with its listings."""
    listings = [listing(cut) for cut in program.cuts]
    return {
        "side": program.side,
        "label": program.label,
        "ran": program.ran,
        "lines": count_lines(listings),
        "listings": listings,
    }


def operations() -> Json:
    """What JAX's network calls where PyTorch's calls its library: not shown, and not counted with the rest."""
    return {"file": OPERATIONS, "lines": len(code_lines(OPERATIONS))}


def total_lines(told: Sequence[Json]) -> dict[str, int]:
    """Lines of code of all that ran; what is shown twice counts once."""

    def ran(side: str) -> list[Json]:
        programs = [program for stage in told for program in stage["programs"]]
        return [each for one in programs if one["side"] == side and one["ran"] for each in one["listings"]]

    return {side: count_lines(ran(side)) for side in ("jax", "torch")}

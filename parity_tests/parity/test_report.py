"""The report of a result: what was compared, the table of the stages, the sentences, the picture and the JSON."""

import io
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from flax import linen
from jax import numpy as jnp
from PIL import Image
from rich.console import Console
from torch import nn

from parity_tests.harness import report
from parity_tests.harness.capture import Case
from parity_tests.harness.checks import Result, examine
from parity_tests.harness.compare import Divergence
from parity_tests.harness.pair import Pair
from parity_tests.parity.networks import LinenNet, TorchNet, network

STAGE_CHECKS = ("parameters", "outputs", "gradients")


def small() -> nn.Module:
    """Return four layers, one of them batch normalisation."""
    return TorchNet(
        lambda net, x: net.last(torch.tanh(net.middle(torch.relu(net.norm(net.first(x)))))),
        first=nn.Linear(3, 6),
        norm=nn.BatchNorm1d(6),
        middle=nn.Linear(6, 5),
        last=nn.Linear(5, 2),
    )


class SmallPort(linen.Module):
    """The same in Linen, with the faults that its fields switch on."""

    epsilon: float = 1e-5
    factor: float = 1.0
    stop: bool = False
    frozen: bool = False

    @linen.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Compute the outputs of a batch."""
        x = linen.Dense(6, name="first")(x)
        x = linen.BatchNorm(self.frozen or not train, momentum=0.9, epsilon=self.epsilon, name="norm")(x)
        x = jnp.tanh(linen.Dense(5, name="middle")(jax.nn.relu(x)))
        x = 0.5 * x + 0.5 * jax.lax.stop_gradient(x) if self.stop else x
        return linen.Dense(2, name="last")(x * self.factor)


def block(x: jax.Array, factor: float) -> jax.Array:
    """Compute a residual block of two layers; another factor than 1 is a fault."""
    return x + linen.Dense(4, name="down")(factor * jnp.tanh(linen.Dense(8, name="up")(x)))


def six_blocks(x: jax.Array) -> jax.Array:
    """Compute six blocks and a head; the fourth block is wrong."""
    for number in range(6):
        x = LinenNet(partial(block, factor=1.01 if number == 3 else 1.0), name=f"block_{number}")(x)
    return linen.Dense(2, name="head")(x)


def three_groups() -> nn.Module:
    """Return the same in PyTorch, in three groups of two blocks."""

    def new_block() -> nn.Module:
        return TorchNet(lambda net, x: x + net.down(torch.tanh(net.up(x))), up=nn.Linear(4, 8), down=nn.Linear(8, 4))

    groups = nn.Sequential(*(nn.Sequential(new_block(), new_block()) for _ in range(3)))
    return network(groups=groups, head=nn.Linear(4, 2))


def small_pair(**faults: Any) -> Pair:
    """Return the small network in both frameworks, with these faults in JAX."""
    names = {name: name for name in ("first", "norm", "middle", "last")}
    inputs, training = np.random.default_rng(0).standard_normal((6, 3)).astype(np.float32), "frozen" in faults
    pair = Pair(small, SmallPort(**faults), inputs, names, name="Small", batch_sizes=(6,))
    return replace(pair, training=training, targets=np.arange(6) % 2)


@pytest.fixture(scope="module")
def sound() -> Result:
    """Return the result of a small pair that is the same."""
    return examine(small_pair(), names=STAGE_CHECKS)


@pytest.fixture(scope="module")
def faulty() -> Result:
    """Return the result of a small pair with two faults."""
    return examine(small_pair(epsilon=1e-3, factor=1.01), names=STAGE_CHECKS)


@pytest.fixture(scope="module")
def deep() -> Result:
    """Return the result of a deep pair with a fault in its fourth block."""
    inputs = np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32)
    names = {"groups.{i}.{j}": "block_{2*i+j}", "head": "head"}
    return examine(Pair(three_groups, LinenNet(six_blocks), inputs, names, batch_sizes=(6,)), names=STAGE_CHECKS)


def show(result: Result, every: bool = False) -> list[str]:
    """Return the lines of the table of stages, as a terminal of 80 columns shows them."""
    text = io.StringIO()
    Console(file=text, width=80).print(report.tree(result, every))
    lines = text.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    return [line.strip() for line in lines]


def find_line(lines: list[str], start: str) -> str:
    """Return the only line that starts with these words."""
    (line,) = (line for line in lines if line.split("  ")[0] == start)
    return line


def test_a_small_network_that_is_the_same_is_listed_stage_by_stage(sound: Result) -> None:
    lines = show(sound)
    for stage in ("first", "norm", "middle", "last", "output", "8 weights"):
        assert find_line(lines, stage).endswith("same")
    assert not any("differs" in line for line in lines)
    assert report.sentences(sound).splitlines()[0] == "Small: no difference."


def test_each_of_two_faults_is_marked_where_it_is_born_and_what_is_inherited_is_not_repeated(faulty: Result) -> None:
    lines = show(faulty)
    assert find_line(lines, "norm").endswith("differs: born here")
    assert find_line(lines, "middle").endswith("differs: inherited")
    assert find_line(lines, "last").endswith("differs: born here")
    title, first, second, *others = report.sentences(faulty).splitlines()
    assert title == "Small differs in 2 places:"
    assert first.startswith("  outputs: output of norm: error ")
    assert second.startswith("  outputs: output of last: error ")
    assert not any("error" in other for other in others)


def test_what_is_the_same_in_a_deep_network_is_folded_and_what_differs_is_opened(deep: Result) -> None:
    lines = show(deep)
    assert len(lines) < 30
    assert find_line(lines, "2 (6)").endswith("differs: inherited")
    opened = lines.index(find_line(lines, "down"))
    assert lines[opened].endswith("differs: born here")
    assert lines[opened - 2].startswith("up "), "its line has a second one, which says that the next stage is wrong"
    everything = show(deep, every=True)
    assert len([line for line in everything if line.startswith("down ")]) == 6
    assert not any(line.startswith("2 (") for line in everything)


def test_values_without_a_mate_are_counted_and_listed_only_when_asked_for(faulty: Result) -> None:
    hidden = [row for row in report.stage_rows(faulty.comparisons[0]) if row.verdict == report.NOT_SEEN]
    counted = [line for line in show(faulty) if f"{len(hidden)} values that JAX has no mate for" in line]
    assert len(counted) == (1 if hidden else 0)
    assert sum("not seen in JAX" in line for line in show(faulty, every=True)) == len(hidden)


def test_a_wrong_gradient_is_said_to_be_born_in_the_next_stage() -> None:
    result = examine(small_pair(stop=True), names=STAGE_CHECKS)
    rows = {row.stage: row for row in report.stage_rows(result.comparisons[0])}
    assert rows["middle"].verdict == report.GRADIENT_BORN
    assert rows["first"].verdict == report.GRADIENT_INHERITED
    assert rows["last"].verdict == report.SAME
    seen = [row for row in rows.values() if row.verdict != report.NOT_SEEN]
    ((_, _, name),) = report.gradient_faults(seen, report.weight_rows(result.comparisons[0]))
    assert name == "after middle"


def test_a_fault_of_training_mode_alone_is_said_to_be_one() -> None:
    result = examine(small_pair(frozen=True), names=STAGE_CHECKS)
    rows = {row.stage: row for row in report.merge(result, report.stage_rows)}
    assert rows["norm"].verdict == "differs: born here, in training mode"
    assert rows["first"].verdict.endswith(report.IN_TRAINING)
    assert json.loads(json.dumps(report.to_json(result)))["comparisons"][0]["mode"] == "evaluation"


def test_the_header_says_what_was_compared_and_what_a_default_chose() -> None:
    convolution = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Dropout(0.5), nn.BatchNorm2d(2))

    class Port(linen.Module):
        @linen.compact
        def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
            x = linen.Conv(2, (3, 3), name="conv")(x)
            return linen.BatchNorm(not train, name="norm")(x)

    images = np.ones((4, 1, 5, 5), np.float32)
    header = report.header(Case(Pair(lambda: convolution, Port(), images, {"0": "conv", "2": "norm"})))
    assert header["PyTorch"] == "Sequential, 24 parameters"
    assert header["JAX"] == "Port (Flax Linen)"
    assert f"torch {torch.__version__.partition('+')[0]}" in header["versions"]
    assert header["batches"] == "8 and 5, with axes of 4 in the place of 5"
    assert header["modes"] == "evaluation and training; dropout always at rate 0 (in 1 module)"
    assert header["weights"].startswith("6 tensors carried by ")
    assert header["weights"].endswith("declared")
    assert header["inputs"] == "float32 [8, 1, 5, 5]; for JAX, by default, float32 [8, 5, 5, 1]"
    assert header["loss"].startswith("default: half the mean square")
    assert header["optimizer"] == "default for PyTorch and JAX: Adam with a learning rate of 0.001"
    assert report.describe_loss(Case(small_pair())) == "default: mean cross-entropy of the integer targets"


def test_what_is_alike_in_several_layers_is_one_line() -> None:
    result = Result("Net", 0)
    places = [
        ("1.norm", "error 1.3e-06 at [0, 1]"),
        ("2.norm", "error 2e-07 at [3, 0]"),
        ("11.norm", "error 1 at [2, 2]"),
    ]
    result.divergences = [Divergence("outputs", f"output of blocks.{name}", problem, "eps") for name, problem in places]
    result.divergences += [Divergence("outputs", "output of middle.norm", "error 2 at [0, 1]", "eps")]
    figures = "error 3e-4 > 6e-12 at [0, 1] (JAX 1, PyTorch 2; 7 of 8 values; bound: rounding)"
    result.divergences += [
        Divergence("outputs", f"output of {n}.gelu", f"{figures}; equal with tanh (batch of 4)")
        for n in ("a", "b.c", "")
    ]
    result.divergences += [Divergence("outputs", f"output of {n}.fc", figures) for n in ("a", "b.c", "d")]
    assert report.sentences(result).splitlines() == [
        "Net differs in 10 places:",
        "  outputs: output of blocks.1.norm: error 1.3e-06 at [0, 1]. eps; alike in output of blocks.2.norm, "
        "output of blocks.11.norm, output of middle.norm",
        f"  outputs: output of a.gelu: {figures}; equal with tanh (batch of 4); alike in output of b.c.gelu, "
        "output of .gelu",
        *(f"  outputs: output of {n}.fc: {figures}" for n in ("a", "b.c", "d")),
    ]


def test_many_differences_of_one_check_are_counted_and_reasons_are_said_once() -> None:
    result = Result("Net", 0, passed=["loss"])
    result.divergences = [
        Divergence("outputs", f"output of {letter}", "error") for letter in "abcdefghijklmnopqrstuvwxy"
    ]
    result.divergences += [Divergence("optimizer", "step 1", "error", "Epsilon is inside the root")]
    result.not_checked = {"data": "the pair declares none", "schedule": "the pair declares none"}
    result.notes = ["a very long note " * 30, *(f"note {n}" for n in range(8))]
    lines = report.sentences(result).splitlines()
    assert lines[0] == "Net differs in 26 places:"
    assert lines[20:22] == ["  outputs: output of t: error", "  outputs: and 5 more, which are in report.json"]
    assert lines[22] == "  optimizer: step 1: error. Epsilon is inside the root"
    assert lines[23:25] == ["Passed: loss.", "Not checked: data, schedule: the pair declares none."]
    assert len(lines[25]) < 170
    assert lines[-1] == "There are 3 more notes in report.json."


def test_json_holds_everything_but_numbers_that_are_not_finite(faulty: Result) -> None:
    text = json.dumps(report.to_json(faulty), allow_nan=False)
    content = json.loads(text)
    fields = {"check", "where", "problem", "cause"}
    assert all(divergence.keys() == fields for divergence in content["divergences"])
    stages = {row["stage"]: row for row in content["stages"]}
    assert stages["norm"]["local_error"] > content["bound"] > stages["middle"]["local_error"]
    assert stages["norm"]["shape"] == [6, 6]
    assert stages["norm"]["jax"] == "norm"
    endless = report.StageRow("x", local_error=float("inf"), gradient_error=float("nan"))
    row = report.row_to_json(endless)
    assert (row["local_error"], row["gradient_error"]) == (None, None)


def test_json_has_the_float32_errors_of_both_sides_where_they_were_measured(sound: Result) -> None:
    rows = {row["stage"]: row for row in report.to_json(replace(sound, float32={"norm": (2e-7, 1e-7)}))["stages"]}
    assert (rows["norm"]["jax_float32_error"], rows["norm"]["torch_float32_error"]) == (2e-7, 1e-7)
    assert (rows["last"]["jax_float32_error"], rows["last"]["torch_float32_error"]) == (None, None)


def test_the_drift_is_drawn_with_and_without_runs_that_were_moved_by_one_ulp(tmp_path: Path) -> None:
    curves = {name: [1e-9, 1e-7, 1e-6] for name in report.DRIFT_LINES}
    few = {name: curve for name, curve in curves.items() if "ULP" not in name}
    for number, drawn in enumerate((curves, few)):
        report.plot_drift([1, 10, 100], drawn, "Net", tmp_path / f"{number}.png")
        assert np.asarray(Image.open(tmp_path / f"{number}.png")).std() > 10


def test_the_picture_is_drawn_for_any_number_of_stages(
    sound: Result, faulty: Result, deep: Result, tmp_path: Path
) -> None:
    pictures = []
    for number, result in enumerate((Result("nothing", 0), sound, faulty, deep)):
        report.plot_errors(result, tmp_path / f"{number}.png")
        pictures.append(np.asarray(Image.open(tmp_path / f"{number}.png").convert("RGB"), np.int32))
    star = np.array([0xCC, 0x79, 0xA7])  # only where a difference is born
    marked = [int((np.abs(picture - star).sum(axis=-1) < 10).sum()) for picture in pictures]
    assert marked[:2] == [0, 0]
    assert marked[2] > marked[3] > 0, "two stars and one; the legend has one too"


def test_long_names_lose_their_middle() -> None:
    assert report.shorten("conv", 10) == "conv"
    assert report.shorten("transformer.h.11.attn.c_proj", 20) == "transf…1.attn.c_proj"
    assert len(report.shorten("transformer.h.11.attn.c_proj", 20)) == 20


def test_a_name_can_be_read_in_the_depth_of_a_network() -> None:
    label, *_ = report.cells(report.Line("normalization", 6, []))
    assert label.plain.strip() == "normalization"

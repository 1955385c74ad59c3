"""Endurance: train, kill, damage, resume, predict, again and again, and hold every result to an undisturbed run's.

Beside it one training of each framework lives from the first round to the last, saving all the time: what leaks in a
process shows in these two.
"""

import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from jax_cnn import fashion_mnist
from jax_cnn.config import TrainConfig
from jax_cnn.errors import UserError
from jax_cnn.files import write_atomically
from jax_cnn.shell.checkpoints import checkpoint_files
from jax_cnn.shell.provenance import provenance
from jax_cnn.shell.run_folder import WEIGHTS, set_aside
from parity_tests.harness.watched import Ended, Marathon, Process, finish, kill, marathon, start

FRAMEWORKS = ("jax", "torch")
SMALL = ("--epochs", 4, "--limit-train", 4256, "--limit-test", 200, "--device", "cpu", "--checkpoint-seconds", 0.2)
ENDLESS = ("--epochs", 10_000, "--limit-train", 640, "--limit-test", 100, "--device", "cpu", "--checkpoint-seconds", 0)
STEPS = 4 * 67
SLICE = 10.0  # seconds of a round that each of the endless trainings gets
PICTURE, REPORT = "picture.png", "report.json"
# That the highest of the last third may be of the highest of the first. Not the medians: what a run holds at most
# depends on how much of it was left after its kills, by a quarter; how many of a few rounds had much left is chance.
GROWTH = 1.1


@dataclass(frozen=True)
class SoakConfig:
    """How long, and where."""

    minutes: float = 60.0
    """Stop after the first round that ends later than this."""
    out_dir: Path = Path("runs/soak")
    """Where report.json is written, and the runs are meanwhile. An earlier report is moved aside."""
    data_dir: Path = TrainConfig.data_dir
    """Where the data set is, or is put."""
    seed: int = 0
    """Of when the kills come and which bytes are damaged."""


class Place(NamedTuple):
    """Folders."""

    runs: Path
    data: Path


class Expected(NamedTuple):
    """What a run that nobody disturbs ends with, and how long it takes."""

    weights: str
    prediction: str
    seconds: float


def by_framework() -> dict[str, list[int]]:
    """A list for each."""
    return {framework: [] for framework in FRAMEWORKS}


@dataclass
class Tally:
    """What happened."""

    rounds: int = 0
    """In each of which a run of each framework is killed, resumed, finished and asked for a prediction."""
    kills: int = 0
    damaged: int = 0
    """Checkpoints in which a bit was turned, and which the next run named and passed over."""
    other_results: int = 0
    """Runs that did not end with the undisturbed run's weights, bit by bit, and its prediction."""
    peak_bytes: dict[str, list[int]] = field(default_factory=by_framework)
    """Of the finished runs, one to a round."""
    open_files: dict[str, list[int]] = field(default_factory=by_framework)
    """Likewise, at most."""
    endless_bytes: dict[str, list[int]] = field(default_factory=by_framework)
    """Of the process that lives through all rounds, after each."""
    endless_files: dict[str, list[int]] = field(default_factory=by_framework)
    """Likewise."""
    endless_steps: dict[str, int] = field(default_factory=dict)
    """That it has trained when it was stopped; after each chunk of JAX's and each step of PyTorch's it saves."""

    def verdict(self) -> list[str]:
        """What is wrong, if anything."""
        wrong = [] if self.rounds else ["no round was finished"]
        if self.other_results:
            wrong.append(f"{self.other_results} runs ended with other weights or another prediction")
        for name, measured in (
            ("memory", self.peak_bytes),
            ("open files", self.open_files),
            ("memory in its endless run", self.endless_bytes),
            ("open files in its endless run", self.endless_files),
        ):
            for framework, values in measured.items():
                third = max(len(values) // 3, 1)
                if values and max(values[-third:]) > GROWTH * max(values[:third]):
                    wrong.append(f"{framework}'s {name} grew from {max(values[:third])} to {max(values[-third:])}")
        return wrong


def soak(config: SoakConfig, say: Callable[[str], None]) -> Tally:
    """Go on until the time is up.

    Args:
        config: how long, and where.
        say: takes a line after every round.

    Raises:
        UserError: a command failed that nobody had disturbed.
    """
    record = provenance(("jax", "jaxlib", "torch", "numpy"))
    chance, tally, started = np.random.default_rng(config.seed), Tally(), time.monotonic()
    place = Place(Path(tempfile.mkdtemp(prefix="runs-", dir=config.out_dir)), config.data_dir)
    draw_picture(place)
    expected = {framework: undisturbed(place, framework) for framework in FRAMEWORKS}
    with ExitStack() as stack:
        endless = {framework: stack.enter_context(endless_run(place, framework)) for framework in FRAMEWORKS}
        while time.monotonic() - started < 60 * config.minutes:
            for framework in FRAMEWORKS:
                disturb(place, framework, expected[framework], chance, tally)
                held = endless[framework].work(SLICE)
                tally.endless_bytes[framework].append(held.bytes)
                tally.endless_files[framework].append(held.open_files)
            tally.rounds += 1
            say(f"round {tally.rounds}: {describe(tally)}")
        for framework, process in endless.items():
            tally.endless_steps[framework] = end(place, framework, process)
    minutes = round((time.monotonic() - started) / 60, 1)
    report: dict[str, Any] = record | {"minutes": minutes, "wrong": tally.verdict()} | vars(tally)
    set_aside(config.out_dir, [REPORT], say)
    write_atomically(config.out_dir / REPORT, f"{json.dumps(report)}\n".encode())
    if not tally.other_results:
        shutil.rmtree(place.runs)
    return tally


def describe(tally: Tally) -> str:
    """What has happened so far, on a line."""
    return (
        f"{tally.kills} kills, {tally.damaged} damaged checkpoints passed over, "
        f"{2 * tally.rounds - tally.other_results} of {2 * tally.rounds} runs ended as if undisturbed"
    )


def undisturbed(place: Place, framework: str) -> Expected:
    """A run that nobody disturbs."""
    folder = place.runs / f"{framework}-undisturbed"
    ended = train(place, framework, folder)
    return Expected(digest(folder), predict(place, framework, folder), ended.seconds)


def disturb(place: Place, framework: str, expected: Expected, chance: np.random.Generator, tally: Tally) -> None:
    """One run, killed twice at any moment, now and then with its newest checkpoint damaged, then finished."""
    folder = place.runs / f"{framework}-{tally.rounds}"
    resume: tuple[str, ...] = ()
    for _ in range(2):
        process = start(f"train_{framework}", *flags(place, folder, SMALL), *resume)
        tally.kills += kill_somewhere(process, folder, expected.seconds, chance)
        if list(checkpoint_files(folder)):
            resume = ("--resume",)
    files = list(checkpoint_files(folder))
    if len(files) == 2 and chance.random() < 0.5:
        damage(files[0][1], chance)
    ended = train(place, framework, folder, *resume)
    tally.damaged += ended.output.count("passing over")
    tally.peak_bytes[framework].append(ended.peak_bytes)
    tally.open_files[framework].append(ended.open_files)
    if (digest(folder), predict(place, framework, folder)) == expected[:2]:
        shutil.rmtree(folder)  # an hour's would fill the disk; one with another result stays, to be looked at
    else:
        tally.other_results += 1


def kill_somewhere(process: Process, folder: Path, seconds: float, chance: np.random.Generator) -> bool:
    """Kill a run a while after it has saved a step of those that are left, or, in a quarter of cases, as it starts."""
    saved = newest_step(folder)
    if chance.random() < 0.25:
        return kill(process, lambda: True, chance.uniform(0, seconds / 2))
    target = chance.uniform(saved, STEPS)
    return kill(process, lambda: newest_step(folder) > target, chance.uniform(0, 0.3))


def newest_step(folder: Path) -> int:
    """That the folder holds a checkpoint of; 0 if there is none."""
    return next((step for step, _ in checkpoint_files(folder)), 0)


def train(place: Place, framework: str, folder: Path, *more: str) -> Ended:
    """A run to its end."""
    return finish(start(f"train_{framework}", *flags(place, folder, SMALL), *more))


def flags(place: Place, folder: Path, run: tuple[object, ...]) -> tuple[object, ...]:
    """What a training command takes."""
    return (*run, "--data-dir", place.data, "--out-dir", folder)


def draw_picture(place: Place) -> None:
    """Put the first test image into a file."""
    Image.fromarray(fashion_mnist.load(place.data).test_images[0]).save(place.runs / PICTURE)


def predict(place: Place, framework: str, folder: Path) -> str:
    """What the command prints of the picture, every probability to its last bit."""
    asked = ("--json", "--framework", framework, "--weights", folder / WEIGHTS, place.runs / PICTURE)
    return finish(start("predict", *asked)).output


@contextmanager
def endless_run(place: Place, framework: str) -> Iterator[Marathon]:
    """A training that does not come to its end; from its first checkpoint on, paused until it is let work."""
    folder = place.runs / f"{framework}-endless"
    with marathon(f"train_{framework}", *flags(place, folder, ENDLESS)) as process:
        while not list(checkpoint_files(folder)):
            process.work(1.0)
        yield process


def end(place: Place, framework: str, process: Marathon) -> int:
    """Ask an endless training to stop; the step that it saved.

    Raises:
        UserError: it did not stop as a run does that is asked to.
    """
    status = process.stop()
    files = list(checkpoint_files(place.runs / f"{framework}-endless"))
    if status != 143 or "stopped, and saved" not in process.said() or not files:
        raise UserError(f"an endless training that was asked to stop ended with {status}: {process.said()}")
    return files[0][0]


def damage(path: Path, chance: np.random.Generator) -> None:
    """Turn one bit."""
    content = bytearray(path.read_bytes())
    content[chance.integers(len(content))] ^= 1 << int(chance.integers(8))
    path.write_bytes(content)


def digest(folder: Path) -> str:
    """Of a run's weights."""
    return sha256((folder / WEIGHTS).read_bytes()).hexdigest()

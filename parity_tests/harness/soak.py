"""Endurance: train, kill, damage, resume, again and again, and hold every result to that of an undisturbed run."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from statistics import median
from typing import NamedTuple

import numpy as np

from jax_cnn.config import TrainConfig
from jax_cnn.errors import UserError
from jax_cnn.files import write_atomically
from jax_cnn.shell.checkpoints import checkpoint_files
from jax_cnn.shell.provenance import provenance
from jax_cnn.shell.run_folder import WEIGHTS

SCRIPTS = Path(__file__).parents[2] / "scripts"
SMALL = ("--epochs", "4", "--limit-train", "4256", "--limit-test", "200", "--device", "cpu")
OFTEN = ("--checkpoint-seconds", "0.2")
GROWTH = 1.1  # that the last runs' memory may be of the first runs'; it varies by a few percent from run to run


@dataclass(frozen=True)
class SoakConfig:
    """How long, and where."""

    minutes: float = 60.0
    """Stop after the first round that ends later than this."""
    out_dir: Path = Path("runs/soak")
    """Where the runs are, and report.json. What an earlier soak left there is moved aside by the runs themselves."""
    data_dir: Path = TrainConfig.data_dir
    """Where the data set is, or is put."""
    seed: int = 0
    """Of when the kills come and which bytes are damaged."""


class Ended(NamedTuple):
    """A command that has ended well."""

    output: str
    peak_bytes: int
    open_files: int


@dataclass
class Tally:
    """What happened."""

    rounds: int = 0
    kills: int = 0
    damaged: int = 0
    """Checkpoints in which a bit was turned, and which the next run named and passed over."""
    other_results: int = 0
    """Rounds that did not end with the undisturbed run's weights, bit by bit."""
    peak_bytes: dict[str, list[int]] = field(default_factory=lambda: {"jax": [], "torch": []})
    open_files: dict[str, list[int]] = field(default_factory=lambda: {"jax": [], "torch": []})

    def verdict(self) -> list[str]:
        """What is wrong, if anything."""
        wrong = [] if self.rounds else ["no round was finished"]
        if self.other_results:
            wrong.append(f"{self.other_results} rounds ended with other weights")
        for name, measured in (("memory", self.peak_bytes), ("open files", self.open_files)):
            for framework, values in measured.items():
                third = max(len(values) // 3, 1)
                if values and median(values[-third:]) > GROWTH * median(values[:third]):
                    wrong.append(
                        f"{framework}'s {name} grew from {median(values[:third])} to {median(values[-third:])}"
                    )
        return wrong


def soak(config: SoakConfig, say: Callable[[str], None]) -> Tally:
    """Go on until the time is up.

    Args:
        config: how long, and where.
        say: takes a line after every round.

    Raises:
        UserError: a command failed that nobody had disturbed.
    """
    chance, tally, ends = np.random.default_rng(config.seed), Tally(), time.monotonic() + 60 * config.minutes
    expected = {framework: undisturbed(config, framework) for framework in ("jax", "torch")}
    while time.monotonic() < ends:
        for framework in ("jax", "torch"):
            folder = config.out_dir / framework
            disturb(config, framework, folder, chance, tally)
            tally.other_results += digest(folder) != expected[framework]
        tally.rounds += 1
        say(f"round {tally.rounds}: {describe(tally)}")
    report = provenance(("jax", "torch")) | {"minutes": config.minutes} | vars(tally)
    write_atomically(config.out_dir / "report.json", f"{json.dumps(report, indent=1)}\n".encode())
    return tally


def describe(tally: Tally) -> str:
    """What has happened so far, on a line."""
    return (
        f"{tally.kills} kills, {tally.damaged} damaged checkpoints passed over, "
        f"{2 * tally.rounds - tally.other_results} of {2 * tally.rounds} runs ended as if undisturbed"
    )


def undisturbed(config: SoakConfig, framework: str) -> str:
    """The weights of a run that nobody disturbs."""
    folder = config.out_dir / f"{framework}-undisturbed"
    finish(start(config, framework, folder))
    return digest(folder)


def disturb(config: SoakConfig, framework: str, folder: Path, chance: np.random.Generator, tally: Tally) -> None:
    """One run, killed twice at any moment, now and then with its newest checkpoint damaged, then finished."""
    resume: tuple[str, ...] = ()
    for _ in range(2):
        tally.kills += kill(start(config, framework, folder, *resume), chance.uniform(1, 8))
        if list(checkpoint_files(folder)):
            resume = ("--resume",)
    files = list(checkpoint_files(folder))
    if len(files) == 2 and chance.random() < 0.5:
        damage(files[0][1], chance)
    ended = finish(start(config, framework, folder, *resume))
    tally.damaged += ended.output.count("passing over")
    tally.peak_bytes[framework].append(ended.peak_bytes)
    tally.open_files[framework].append(ended.open_files)


def start(config: SoakConfig, framework: str, folder: Path, *flags: str) -> subprocess.Popen[str]:
    """Start a training command."""
    line = [sys.executable, str(SCRIPTS / f"train_{framework}.py"), *SMALL, *OFTEN, *flags]
    line += ["--data-dir", str(config.data_dir), "--out-dir", str(folder)]
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def kill(process: subprocess.Popen[str], seconds: float) -> bool:
    """Let a command work for a while, and kill it; whether it was still there."""
    try:
        process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.communicate()
        return True
    return False


def finish(process: subprocess.Popen[str]) -> Ended:
    """Wait for a command, and see what it holds meanwhile.

    Raises:
        UserError: it failed.
    """
    peak, files = 0, 0
    while True:
        peak, files = max(peak, peak_memory(process.pid)), max(files, open_files(process.pid))
        try:
            output, _ = process.communicate(timeout=0.1)
            break
        except subprocess.TimeoutExpired:
            continue
    if process.returncode:
        raise UserError(f"a training that nobody disturbed ended with status {process.returncode}: {output[-300:]}")
    return Ended(output, peak, files)


def peak_memory(pid: int) -> int:
    """Bytes that a process has held at most; 0 where the system does not tell."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)


def open_files(pid: int) -> int:
    """How many files a process holds open; 0 where the system does not tell."""
    try:
        return len(os.listdir(f"/proc/{pid}/fd"))
    except OSError:
        return 0


def damage(path: Path, chance: np.random.Generator) -> None:
    """Turn one bit."""
    content = bytearray(path.read_bytes())
    content[chance.integers(len(content))] ^= 1 << int(chance.integers(8))
    path.write_bytes(content)


def digest(folder: Path) -> str:
    """Of a run's weights."""
    return sha256((folder / WEIGHTS).read_bytes()).hexdigest()

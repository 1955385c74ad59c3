"""Run the project's commands as a user does, and read the records of the training runs that they leave."""

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool

from experiments.answers import Framework
from jax_cnn.config import JaxTrainConfig, TrainConfig, UserError
from jax_cnn.data import other_files
from jax_cnn.run.folder import CONFIG, METRICS, WEIGHTS
from jax_cnn.run.provenance import provenance

Json = dict[str, Any]
Show = Callable[[str], None]  # is called with a line about what is under way

ROOT = Path(__file__).parents[2]
SCRIPTS = ROOT / "scripts"
PLAIN = {"PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8", "COLUMNS": "200"}  # whole lines, without delay

MIB = 2**20
RSS_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes in a unit of ru_maxrss

PACKAGES = ("jax", "jaxlib", "flax", "optax", "torch", "torchvision", "numpy")  # whose versions belong to every result
# PyTorch's threads then yield while they wait for each other. With active waiting they take four times as long on two
# cores that other programs use too (251 images/s against 801). No result depends on it, and a user's own value is kept.
ENVIRONMENT = {"OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE")}
NO_INFLUENCE = frozenset({"data_dir", "out_dir", "resume", "checkpoint_seconds"})  # fields that change no weight
SLACK = 1  # images: near a tie, rounding in a batch of another size may change the answer. Worst seen: 0


class Finished(NamedTuple):
    """The time and the memory of a command that has ended."""

    seconds: float
    """From before its process started to after its end."""
    peak_bytes: int
    """Peak memory. On Linux at least what this process held when it started the command."""


def run_command(
    script: str, arguments: Sequence[str], show: Show, environment: Mapping[str, str] | None = None
) -> Finished:
    """Run `scripts/<script>.py` to its end in a process of its own.

    `show` is called with every line that is not empty as soon as the command prints it, and `environment` is added to
    the variables of this process.

    Raises:
        UserError: the command failed; the message ends with the last line that it printed.
    """
    command = [sys.executable, str(SCRIPTS / f"{script}.py"), *arguments]
    last_line, started = "", time.perf_counter()
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        env={**os.environ, **PLAIN, **(environment or {})},
    ) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                if line.strip():
                    last_line = line.strip()
                    show(last_line)
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:  # Ctrl-C above all: no command may outlive this process
            process.terminate()
            raise
        process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.perf_counter() - started
    if process.returncode:
        raise UserError(f"{shlex.join(command)} ended with status {process.returncode}: {last_line}")
    return Finished(seconds, usage.ru_maxrss * RSS_UNIT)


def read_peak_memory() -> int:
    """Return the peak memory of this process in bytes.

    On Linux from /proc: the figure of getrusage begins with that of the process that started this one.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource  # only here: Windows has none, and predict.py reads records there too

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT


def flags(config: TrainConfig) -> list[str]:
    """Return the command line of a run: a flag for each setting that is not at its default."""
    words, defaults = [], vars(type(config)())
    for name, value in vars(config).items():
        if value != defaults[name]:
            words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
    return words


def train(
    framework: Framework, config: TrainConfig, show: Show, environment: Mapping[str, str] = ENVIRONMENT
) -> Finished:
    """Run the framework's training command to its end; return its time and its peak memory.

    `show` is called with every line about an epoch, and `environment` is added to the variables of this process.

    Raises:
        UserError: the command failed.
    """

    def show_epoch(line: str) -> None:
        if line.startswith("epoch"):
            show(line)

    return run_command(f"train_{framework}", flags(config), show_epoch, environment)


def shorten_command(command: str) -> str:
    """Return a recorded command line as a person would type it, with paths from the root of the project."""
    return command.replace(f"{ROOT}/", "")


def as_json(config: TrainConfig) -> Json:
    """Return a configuration as config.json holds it."""
    loaded: Json = json.loads(json.dumps(asdict(config), default=str))
    return loaded


def read_record(folder: Path) -> Json:
    """Read a run's config.json.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is not the record of a run.
    """
    record = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    if not isinstance(record, dict) or not all(isinstance(record.get(name), dict) for name in ("config", "versions")):
        raise ValueError(f"{folder / CONFIG} is not the record of a run")
    return record


def read_metrics(folder: Path) -> list[Json]:
    """Read a run's metrics.jsonl: one entry for each epoch, in order.

    Raises:
        OSError: the file cannot be read.
        ValueError: a line is not JSON.
    """
    return [json.loads(line) for line in (folder / METRICS).read_text(encoding="utf-8").splitlines()]


def check_accuracy(folder: Path, correct: Bool[np.ndarray, " images"]) -> None:
    """Check that a run's weights classify as many test images correctly as its metrics say.

    `correct` tells for each of these images whether the weights classify it correctly.

    Raises:
        UserError: they do not.
    """
    counted, recorded = int(correct.sum()), round(read_metrics(folder)[-1]["test_accuracy"] * len(correct))
    if abs(counted - recorded) > SLACK:
        raise UserError(
            f"{folder}: its weights classify {counted} of {len(correct)} images correctly, but its metrics.jsonl says "
            f"{recorded}; delete the folder and train again"
        )


def explain_mismatch(
    folder: Path,
    framework: Framework,
    wanted: TrainConfig,
    *,
    ignored: Collection[str] = NO_INFLUENCE,
    same_machine: bool = True,
) -> str | None:
    """Return why a folder does not hold the run that is asked for, or None if it holds that run, finished.

    A change of the training code is not noticed.

    Args:
        folder: the run's folder, whatever `out_dir` its configuration names.
        framework: the framework that is asked for.
        wanted: the configuration that is asked for. JAX's further fields have to be at their defaults. A field that the
            record does not know had its default.
        ignored: fields that may differ.
        same_machine: whether the run must come from this machine and from the installed versions.
    """
    try:
        record, epochs = read_record(folder), read_metrics(folder)
    except (OSError, ValueError) as error:
        return f"no run is there ({error.strerror if isinstance(error, OSError) else error})"
    if record.get("framework") != framework:
        return f"it is a run of {record.get('framework')}"
    defaults = as_json(JaxTrainConfig() if framework == "jax" else TrainConfig())
    recorded, asked = defaults | record["config"], defaults | as_json(wanted)
    for name in sorted(defaults.keys() - set(ignored)):
        if recorded[name] != asked[name]:
            return f"its {name.replace('_', ' ')}: {recorded[name]}, not {asked[name]}"
    if wanted.any_data and record.get("data", {}) != other_files(wanted.data_dir):
        return "it was trained on other data"
    if len(epochs) != wanted.epochs or not (folder / WEIGHTS).exists():
        return f"it is not finished ({len(epochs)} of {wanted.epochs} epochs)"
    here = provenance(name for name in record["versions"] if name != "python")
    if same_machine and any(record.get(name) != here[name] for name in ("machine", "versions")):
        return "it was made on another machine or with other versions"
    return None

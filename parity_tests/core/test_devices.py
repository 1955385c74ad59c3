"""Many devices, many processes, many networks at once: each trains what one of its kind trains alone."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from parity_tests.support import ROOT

TIMEOUT = 300.0  # seconds, on a machine that is busy with other things
BOUND = 1e-10  # absolute, on float64 weights after 12 steps
# Five batches of 16 and ten images left over, which eight devices cannot share; two evaluation batches, one not full.
SIZES = ("--batch-size", "16", "--limit-train", "90", "--limit-test", "260")
SMALL = ("--precision", "float64", "--epochs", "2", *SIZES, "--device", "cpu")

Train = Callable[..., Path]  # flags -> the folder of the results


def command(*flags: object) -> list[str]:
    """What a person types."""
    return [sys.executable, str(ROOT / "scripts" / "train_jax.py"), *map(str, flags)]


def free_address() -> str:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return f"localhost:{probe.getsockname()[1]}"


def start(*flags: object) -> subprocess.Popen[str]:
    """Start a command, its output caught."""
    return subprocess.Popen(command(*flags), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, subprocess.Popen[str]]]:
    """Both processes of a run of two, neither of which meets the other; they wait while other tests run."""
    one_of_two = ("--out-dir", tmp_path_factory.mktemp("alone"), "--num-processes", 2)
    waiting = {
        process_id: start(*one_of_two, "--coordinator", free_address(), "--process-id", process_id)
        for process_id in (0, 1)
    }
    yield waiting
    for process in waiting.values():
        process.kill()
        process.communicate()


@pytest.fixture(scope="module")
def train(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Train:
    """The training command with these flags; each run is made once and shared."""

    @cache
    def run(*flags: object) -> Path:
        results = tmp_path_factory.mktemp("run")
        line = command(*SMALL, "--data-dir", data_dir, "--out-dir", results, *flags)
        done = subprocess.run(line, capture_output=True, text=True, timeout=TIMEOUT)
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
        return results

    return run


def distance(ours: Path, theirs: Path) -> float:
    """How far the furthest weights of two runs are apart."""
    mine, other = (load_file(results / "weights.safetensors") for results in (ours, theirs))
    assert mine.keys() == other.keys()
    return max(float(np.abs(mine[name] - other[name]).max()) for name in mine)


def last_epoch(results: Path) -> dict[str, float]:
    """The last line of a run's metrics."""
    line: dict[str, float] = json.loads((results / "metrics.jsonl").read_text().splitlines()[-1])
    return line


@pytest.mark.usefixtures("alone")
def test_eight_devices_train_what_one_trains(train: Train) -> None:
    one, eight = train(), train("--devices", 8)
    assert distance(eight, one) <= BOUND
    for figure in ("train_loss", "test_loss", "test_accuracy"):
        assert last_epoch(eight)[figure] == pytest.approx(last_epoch(one)[figure], rel=1e-12)
    assert json.loads((eight / "config.json").read_text())["device"] == "8 x cpu"
    assert distance(one, train("--seed", 1)) > BOUND  # the check can fail


@pytest.mark.usefixtures("alone")
def test_two_processes_train_what_one_trains(train: Train, data_dir: Path, tmp_path: Path) -> None:
    meeting = ("--coordinator", free_address(), "--num-processes", 2, "--data-dir", data_dir)
    second = start(*SMALL, *meeting, "--process-id", 1, "--out-dir", tmp_path / "second")
    first = start(*SMALL, *meeting, "--process-id", 0, "--out-dir", tmp_path / "first")
    for process in (first, second):
        _, errors = process.communicate(timeout=TIMEOUT)
        assert process.returncode == 0, errors
    assert distance(tmp_path / "first", train()) <= BOUND
    assert not list((tmp_path / "second").iterdir())  # the first alone writes


def test_each_process_reads_its_own_share_only() -> None:
    code = (
        "import sys, numpy; from jax_cnn.config import JaxTrainConfig; from jax_cnn import sharding\n"
        "config = JaxTrainConfig(coordinator=sys.argv[1], num_processes=2, process_id=int(sys.argv[2]), devices=4)\n"
        "sharding.join_processes(config); mesh = sharding.make_mesh(sharding.pick_devices(config))\n"
        "read = lambda share: print(share[2]) or numpy.zeros((1, 2, 16))\n"
        "sharding.place_batches(mesh, (1, 2, 64), read)"
    )
    address = free_address()
    lines = [[sys.executable, "-c", code, address, process_id] for process_id in "01"]
    processes = [subprocess.Popen(line, stdout=subprocess.PIPE, text=True, cwd=ROOT) for line in lines]
    shares = [process.communicate(timeout=TIMEOUT)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    found = [[line for line in share.splitlines() if line.startswith("slice")] for share in shares]
    assert found[0] == ["slice(0, 16, None)", "slice(16, 32, None)"]
    assert found[1] == ["slice(32, 48, None)", "slice(48, 64, None)"]


@pytest.mark.usefixtures("alone")
def test_networks_that_train_at_once_are_those_that_train_alone(train: Train) -> None:
    both = train("--seeds", 2)
    for seed in (0, 1):
        alone = train() if seed == 0 else train("--seed", 1)
        assert distance(both / f"seed-{seed}", alone) <= BOUND
        assert last_epoch(both / f"seed-{seed}")["test_loss"] == pytest.approx(
            last_epoch(alone)["test_loss"], rel=1e-12
        )
        assert json.loads((both / f"seed-{seed}" / "config.json").read_text())["config"]["seed"] == seed
    assert distance(both / "seed-0", both / "seed-1") > BOUND


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (("--devices", 3), "--batch-size 64 cannot be shared among 3 devices; --batch-size 66 can"),
        (("--devices", 0), "--devices must be between 1 and 1,000,000, not 0"),
        (("--seeds", 0), "--seeds must be between 1 and 1,000, not 0"),
        (("--coordinator", "here"), "--coordinator must be HOST:PORT or cluster, not here"),
        (("--coordinator", "here:1"), "--coordinator here:1 needs --num-processes and --process-id as well"),
        (("--process-id", 1), "--num-processes and --process-id need --coordinator HOST:PORT"),
        (
            ("--coordinator", "here:1", "--num-processes", 2, "--process-id", 2),
            "--process-id must be between 0 and 1 (--num-processes - 1), not 2",
        ),
        (("--coordinator", "cluster"), "--coordinator cluster: no cluster's environment tells where"),
    ],
)
def test_a_slip_gets_one_line(flags: tuple[object, ...], complaint: str, tmp_path: Path) -> None:
    clusterless = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "OMPI", "PMI"))}
    line = command(*flags, "--out-dir", tmp_path)
    done = subprocess.run(line, capture_output=True, text=True, timeout=TIMEOUT, env=clusterless)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {complaint}"), done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("process_id", [0, 1])
def test_a_process_that_stays_alone_says_so_within_a_minute(
    alone: dict[int, subprocess.Popen[str]], process_id: int
) -> None:
    _, errors = alone[process_id].communicate(timeout=60)
    assert alone[process_id].returncode == 2
    assert "the processes did not meet within 30 s" in errors
    assert errors.count("\n") == 1, errors

"""Several devices and several processes train what one device trains alone."""

import json
import socket
import subprocess
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from jax_cnn.checkpoint import load_checkpoint
from jax_cnn.torch_layout import TorchDict
from parity_tests.support import (
    ENVIRONMENT,
    ROOT,
    TIMEOUT,
    command_line,
    read_metrics,
    run_command,
    run_python,
    start_python,
)

BOUND = 1e-10  # absolute, on float64 weights after 6 steps; worst seen on eight devices after 12: 3.5e-15
# Two batches of 16 and ten images left over, which eight devices cannot share; two evaluation batches, one not full.
SIZES = ("--batch-size", "16", "--limit-train", "42", "--limit-test", "260")
SMALL = ("--precision", "float64", "--epochs", "2", *SIZES, "--device", "cpu")
# How devices share batches and processes meet does not depend on the network, and this one compiles in a second.
NETWORK = ("--model", "mlp", "--hidden", 20)
PARTIAL_SUMS = 14 * 14 * 32 - 32 + 7 * 7 * 64 - 64  # two bias gradients are exchanged before their sum over the map

WITH_SCRIPTS = ENVIRONMENT | {"PYTHONPATH": str(ROOT / "scripts")}

Train = Callable[..., Path]  # flags -> the folder of the results


def free_address() -> str:
    """Return a port of this machine that no process listens on."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return f"localhost:{probe.getsockname()[1]}"


def start(*flags: object) -> subprocess.Popen[str]:
    """Start the training command with its output in pipes."""
    line = command_line("train_jax", *flags)
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture(scope="module")
def train(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Train:
    """Run the training command with these flags; each run is made once and shared."""

    @cache
    def run(*flags: object) -> Path:
        results = tmp_path_factory.mktemp("run")
        done = run_command("train_jax", *SMALL, "--data-dir", data_dir, "--out-dir", results, *flags, cwd=results)
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
        return results

    return run


def distance(run: Path, other_run: Path) -> float:
    """Return the largest difference between the weights of two runs."""
    return max_distance(*(load_file(results / "weights.safetensors") for results in (run, other_run)))


def max_distance(weights: TorchDict, other: TorchDict) -> float:
    """Return the largest difference between weights of the same names."""
    assert weights.keys() == other.keys()
    return max(float(np.abs(weights[name] - other[name]).max()) for name in weights)


@pytest.mark.extended
def test_eight_devices_train_what_one_trains(train: Train) -> None:
    one, eight = train(*NETWORK), train(*NETWORK, "--devices", 8)
    assert distance(eight, one) <= BOUND
    for figure in ("train_loss", "test_loss", "test_accuracy"):
        assert read_metrics(eight)[-1][figure] == pytest.approx(read_metrics(one)[-1][figure], rel=1e-12)
    assert json.loads((eight / "config.json").read_text(encoding="utf-8"))["device"] == "8 x cpu"
    weights = load_file(one / "weights.safetensors")
    before = load_checkpoint(one / "checkpoint-000000003.safetensors").state.weights
    assert max_distance(weights, before) > BOUND  # the check can fail


@pytest.mark.extended
def test_two_processes_train_what_one_trains(train: Train, data_dir: Path, tmp_path: Path) -> None:
    meeting = ("--coordinator", free_address(), "--num-processes", 2, "--data-dir", data_dir)
    second = start(*SMALL, *NETWORK, *meeting, "--process-id", 1, "--out-dir", tmp_path / "second")
    first = start(*SMALL, *NETWORK, *meeting, "--process-id", 0, "--out-dir", tmp_path / "first")
    for process in (first, second):
        _, errors = process.communicate(timeout=TIMEOUT)
        assert process.returncode == 0, errors
    assert distance(tmp_path / "first", train(*NETWORK)) <= BOUND
    assert not list((tmp_path / "second").iterdir())  # only the first writes


EXCHANGES = """
import sys, jax
jax.config.update("jax_num_cpu_devices", 8)
from experiments import tpu
from jax_cnn.devices import make_mesh
program, arguments = tpu.training_program(make_mesh(jax.devices()), int(sys.argv[1]), "float32")
for exchange in tpu.find_collectives(program.lower(*arguments).compile().as_text()):
    print(exchange.operation, exchange.bytes)
"""


@pytest.mark.extended
def test_eight_devices_exchange_their_gradients_and_loss_once_a_step() -> None:
    """The second batch cannot be shared among eight devices: each computes all of it. So the check can fail."""
    shared, whole = (run_python(EXCHANGES, batch, env=WITH_SCRIPTS).stdout for batch in (64, 66))
    assert shared.split() == ["all-reduce", str(4 * (1_630_090 + PARTIAL_SUMS + 1))]
    assert whole == ""


SHARES = """
import sys, numpy
from jax_cnn import devices
from jax_cnn.config import JaxTrainConfig
config = JaxTrainConfig(coordinator=sys.argv[1], num_processes=2, process_id=int(sys.argv[2]), devices=4)
devices.join_processes(config)
mesh = devices.make_mesh(devices.pick_devices(config))
devices.place_batches(mesh, (2, 64), lambda share: print(share[1]) or numpy.zeros((2, 16)))
"""


def test_each_process_reads_its_own_share_only() -> None:
    address = free_address()
    processes = [start_python(SHARES, address, process_id) for process_id in (0, 1)]
    shares = [process.communicate(timeout=TIMEOUT)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    slices = [[line for line in share.splitlines() if line.startswith("slice")] for share in shares]
    assert slices[0] == ["slice(0, 16, None)", "slice(16, 32, None)"]
    assert slices[1] == ["slice(32, 48, None)", "slice(48, 64, None)"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[int, subprocess.Popen[str]]]:
    """Start both processes of a run of two so that they never meet."""
    one_of_two = ("--out-dir", tmp_path_factory.mktemp("alone"), "--num-processes", 2)
    waiting = {
        process_id: start(*one_of_two, "--coordinator", free_address(), "--process-id", process_id)
        for process_id in (0, 1)
    }
    yield waiting
    for process in waiting.values():
        process.kill()
        process.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("process_id", [0, 1])
def test_a_process_that_stays_alone_says_so_within_a_minute(
    alone: dict[int, subprocess.Popen[str]], process_id: int
) -> None:
    _, errors = alone[process_id].communicate(timeout=60)
    assert alone[process_id].returncode == 2
    assert "the processes did not meet within 30 s" in errors
    assert errors.count("\n") == 1, errors

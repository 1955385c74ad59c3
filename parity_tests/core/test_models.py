"""The networks without convolution, as a person trains and uses them: flags, files, slips."""

import json
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jax_cnn.checkpoint import AdamState, Checkpoint, Progress, load_checkpoint, save_checkpoint
from jax_cnn.config import CNN, JaxTrainConfig, Network, TrainConfig, UserError
from jax_cnn.data import FashionMNIST
from jax_cnn.torch_layout import TorchDict, layout_of, load_weights, recognise, save_weights
from parity_tests.support import ROOT
from torch_ref.model import make_model

TIMEOUT = 120.0  # seconds for a small run, on a machine that is busy with other things
SMALL = ("--limit-train", "200", "--limit-test", "100", "--epochs", "1", "--device", "cpu")
MLP = ("--model", "mlp", "--hidden", "20")
NETWORKS = (CNN, Network("mlp"), Network("mlp", 20), Network("mlp", 2050), Network("linear"))


def run(script: str, *arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a command as a person does, with its output caught."""
    command = [sys.executable, str(ROOT / "scripts" / f"{script}.py"), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=TIMEOUT)


def succeed(script: str, *arguments: object, cwd: Path) -> str:
    """Run it well; what it printed."""
    done = run(script, *arguments, cwd=cwd)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def complaint(script: str, *arguments: object, cwd: Path) -> str:
    """Run it with a slip; the one line that it says."""
    done = run(script, *arguments, cwd=cwd)
    assert done.returncode == 2, done.stdout + done.stderr
    (line,) = done.stderr.splitlines()
    return line


@pytest.fixture(scope="module")
def trained(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a small mlp's run, by framework; a run is made once and shared."""

    @cache
    def train(framework: str) -> Path:
        cwd = tmp_path_factory.mktemp(framework)
        succeed(f"train_{framework}", *MLP, *SMALL, "--data-dir", data_dir, cwd=cwd)
        return cwd / "runs" / framework

    return train


def zeros(network: Network) -> TorchDict:
    """A network's weights, all 0."""
    return {name: np.zeros(leaf.shape, np.float32) for name, leaf in layout_of(network).items()}


# --- Layouts and files ---


@pytest.mark.parametrize("network", NETWORKS, ids=str)
def test_a_network_is_recognised_by_its_tensors(network: Network) -> None:
    assert {name: tuple(t.shape) for name, t in make_model(*network).state_dict().items()} == {
        name: leaf.shape for name, leaf in layout_of(network).items()
    }
    assert recognise(zeros(network)) == network


def test_a_damaged_cnn_is_still_taken_for_one(tmp_path: Path) -> None:
    for missing in layout_of(CNN):
        tensors = zeros(CNN)
        del tensors[missing]
        assert recognise(tensors) == CNN
        save_weights(tmp_path / "weights", tensors)
        with pytest.raises(UserError, match=f"{missing} is missing"):
            load_weights(tmp_path / "weights", "float32", None)
    assert recognise({}) == recognise({"x": np.zeros(1)}) == CNN


@pytest.mark.parametrize("shape", [(), (0, 784), (20,), (20, 1, 28, 28)])
def test_a_misshapen_mlp_is_refused(shape: tuple[int, ...], tmp_path: Path) -> None:
    save_weights(tmp_path / "weights", zeros(Network("mlp", 20)) | {"fc1.weight": np.zeros(shape, np.float32)})
    with pytest.raises(UserError, match="has shape"):
        load_weights(tmp_path / "weights", "float32", None)


@pytest.mark.parametrize("network", NETWORKS, ids=str)
def test_a_checkpoint_of_any_network_comes_back(network: Network, tmp_path: Path) -> None:
    state = AdamState(zeros(network), zeros(network), zeros(network), 3)
    save_checkpoint(tmp_path / "checkpoint", Checkpoint(state, Progress(0, 3, 1.0, 1.0, []), {}))
    back = load_checkpoint(tmp_path / "checkpoint").state
    assert back.step == 3
    assert all(np.array_equal(back.second_moment[name], array) for name, array in state.second_moment.items())


# --- Commands ---


@pytest.mark.parametrize("framework", ["jax", "torch"])
def test_the_network_is_in_the_record_and_in_the_weights(trained: Callable[[str], Path], framework: str) -> None:
    record = json.loads((trained(framework) / "config.json").read_text())["config"]
    assert (record["model"], record["hidden"]) == ("mlp", 20)
    weights = load_weights(trained(framework) / "weights.safetensors", "float32", None)
    assert recognise(weights) == Network("mlp", 20)


def test_each_framework_goes_on_from_the_others_weights(
    trained: Callable[[str], Path], data_dir: Path, tmp_path: Path
) -> None:
    start = trained("jax") / "weights.safetensors"
    again = ("--seed", 1, *MLP, *SMALL, "--data-dir", data_dir, "--init-weights", start)
    for framework in ("jax", "torch"):
        succeed(f"train_{framework}", *again, cwd=tmp_path)
    ours, theirs = (
        load_weights(tmp_path / "runs" / framework / "weights.safetensors", "float32", None)
        for framework in ("jax", "torch")
    )
    for name in ours:  # four steps later; Adam's are of 1e-3 each
        assert np.abs(ours[name] - theirs[name]).max() < 1e-4


def test_both_frameworks_predict_with_it(trained: Callable[[str], Path], data: FashionMNIST, tmp_path: Path) -> None:
    Image.fromarray(data.test_images[0]).save(tmp_path / "boot.png")
    weights = ("--weights", trained("jax") / "weights.safetensors", "--json")
    ours, theirs = (
        json.loads(succeed("predict", "boot.png", *weights, "--framework", framework, cwd=tmp_path))["probabilities"]
        for framework in ("jax", "torch")
    )
    assert ours == pytest.approx(theirs, abs=1e-6)


def test_a_run_goes_on_in_another_dialect_with_the_same_bits(data_dir: Path, tmp_path: Path) -> None:
    flags = ("--model", "linear", *SMALL, "--data-dir", data_dir)
    succeed("train_jax", *flags, "--epochs", 2, "--dialect", "nnx", "--out-dir", "whole", cwd=tmp_path)
    succeed("train_jax", *flags, "--out-dir", "parts", cwd=tmp_path)
    printed = succeed(
        *("train_jax", *flags, "--epochs", 2, "--dialect", "plain", "--out-dir", "parts", "--resume"), cwd=tmp_path
    )
    assert "going on after step 4" in printed
    assert "not as it was" not in printed
    files = [(tmp_path / part / "weights.safetensors").read_bytes() for part in ("whole", "parts")]
    assert files[0] == files[1]


def test_another_network_is_not_resumed(trained: Callable[[str], Path], data_dir: Path, tmp_path: Path) -> None:
    flags = (*SMALL, "--data-dir", data_dir, "--out-dir", trained("torch"), "--resume")
    said = complaint("train_torch", *flags, "--model", "linear", cwd=tmp_path)
    assert "hidden was 20, not 512; model was mlp, not linear" in said


def test_another_networks_weights_are_refused(trained: Callable[[str], Path], tmp_path: Path) -> None:
    weights = trained("jax") / "weights.safetensors"
    for framework, asked in (("jax", ()), ("torch", ("--model", "mlp"))):
        said = complaint(f"train_{framework}", "--init-weights", weights, *asked, cwd=tmp_path)
        assert f"{weights}: it is of --model mlp --hidden 20, not of --model" in said
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("script", "flags", "words"),
    [
        ("train_jax", ("--model", "resnet"), ("--model", "linear", "mlp", "cnn")),
        ("train_torch", ("--model", "resnet"), ("--model", "linear", "mlp", "cnn")),
        ("train_jax", ("--dialect", "haiku"), ("--dialect", "linen", "nnx", "plain")),
        ("train_torch", ("--dialect", "nnx"), ("--dialect",)),
    ],
)
def test_a_slip_on_the_command_line_is_one_line(
    script: str, flags: tuple[str, ...], words: tuple[str, ...], tmp_path: Path
) -> None:
    said = complaint(script, *flags, cwd=tmp_path)
    assert all(word in said for word in words), said


def test_a_width_is_the_mlps_alone_and_within_reason() -> None:
    for kind in (TrainConfig, JaxTrainConfig):
        with pytest.raises(UserError, match="--hidden 20 is the mlp's: add --model mlp"):
            kind(hidden=20)
        with pytest.raises(UserError, match="--hidden must be between 1 and 8,192, not 0"):
            kind(model="mlp", hidden=0)

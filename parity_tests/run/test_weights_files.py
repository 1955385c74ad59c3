"""Weights in the files that people have: of each network, of runs, of PyTorch. And in those that do not fit."""

import gzip
import io
import pickle
import zipfile
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch

from jax_cnn.checkpoint import AdamState, Checkpoint, Progress, save_checkpoint
from jax_cnn.config import CNN, Network, UserError
from jax_cnn.torch_layout import TorchDict, layout_of
from jax_cnn.weights import load_weights, recognise, save_weights
from parity_tests.support import TrainOnce, read_json, zero_weights
from torch_ref.model import SimpleCNN, make_model
from torch_ref.weights import read_tensors

pytestmark = pytest.mark.extended

LINEAR = Network("linear")


def draw(network: Network) -> TorchDict:
    """Return random weights of a network, exact in bfloat16."""
    rng = np.random.default_rng(0)
    return {name: rng.integers(-8, 8, leaf.shape).astype(np.float32) for name, leaf in layout_of(network).items()}


WEIGHTS = draw(LINEAR)
STATE: dict[str, Any] = {name: torch.from_numpy(array) for name, array in WEIGHTS.items()}


def saved(content: Any, **options: Any) -> bytes:
    """Return what torch.save writes."""
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def saved_on_a_gpu(content: Any) -> bytes:
    """Return what torch.save writes where the tensors are on a GPU."""
    with patch.object(torch.serialization, "location_tag", lambda storage: "cuda:0"):
        return saved(content)


def prefixed(prefix: str) -> dict[str, Any]:
    """Return the state dict with a prefix before every name."""
    return {prefix + name: tensor for name, tensor in STATE.items()}


def cast(dtype: torch.dtype) -> dict[str, Any]:
    """Return the state dict in another dtype."""
    return {name: tensor.to(dtype) for name, tensor in STATE.items()}


optimizer = torch.optim.Adam([torch.nn.Parameter(torch.ones(3))])

GOOD = {
    "a state dict": saved(STATE),
    "of old PyTorch": saved(STATE, _use_new_zipfile_serialization=False),
    "a checkpoint": saved({"epoch": 3, "state_dict": STATE, "optimizer": optimizer.state_dict(), "loss": 0.5}),
    "a checkpoint with a name of its own": saved({"net": STATE}),
    "a checkpoint in a checkpoint": saved(
        {"epoch": 3, "best": {"weights": STATE, "optimizer": optimizer.state_dict()}}
    ),
    "numbers of NumPy and flags beside it": saved(
        {"state_dict": STATE, "best": np.float64(0.9), "losses": np.ones(3, np.float32), "args": Namespace(lr=1e-3)}
    ),
    "DataParallel and torch.compile": saved(prefixed("module._orig_mod.")),
    "a module in a module": saved({"state_dict": prefixed("model.")}),
    "with a number among the tensors": saved({**STATE, "epoch": 3}),
    "of arrays": saved(WEIGHTS),
    "of a GPU": saved_on_a_gpu(STATE),
    "half precision": saved(cast(torch.float16)),
    "bfloat16": saved(cast(torch.bfloat16)),
    "float64": saved(cast(torch.float64)),
    "other names": saved({"layers.1.weight": STATE["fc.weight"], "layers.1.bias": STATE["fc.bias"]}),
    "safetensors in bfloat16": safetensors.torch.save(cast(torch.bfloat16)),
    "safetensors in half precision, of DataParallel": safetensors.torch.save(
        {f"module.{name}": tensor for name, tensor in cast(torch.float16).items()}
    ),
}


@pytest.mark.parametrize("network", [LINEAR, None], ids=["that is asked for", "of any network"])
@pytest.mark.parametrize("content", GOOD.values(), ids=GOOD)
def test_the_files_that_people_have_give_the_weights(tmp_path: Path, content: bytes, network: Network | None) -> None:
    (tmp_path / "file").write_bytes(content)
    weights = load_weights(tmp_path / "file", "float32", network, read_tensors)
    assert weights.keys() == WEIGHTS.keys()
    for name, array in weights.items():
        np.testing.assert_array_equal(array, WEIGHTS[name], strict=True)


def test_a_simple_cnn_with_other_names_is_taken_by_its_shapes_and_a_line_says_so(tmp_path: Path) -> None:
    named = SimpleCNN().state_dict()
    module = torch.nn.Sequential(*(layer for layer in SimpleCNN().children()))
    module.load_state_dict(dict(zip(module.state_dict(), named.values(), strict=True)))
    torch.save(
        {"model_state_dict": {f"module.{name}": tensor for name, tensor in module.state_dict().items()}},
        tmp_path / "student.pth",
    )
    messages: list[str] = []
    weights = load_weights(tmp_path / "student.pth", "float32", None, read_tensors, messages.append)
    assert all(np.array_equal(weights[name], tensor.numpy()) for name, tensor in named.items())
    (line,) = messages
    assert "took the prefix module. off" in line
    assert "0.weight as conv1.weight, 3.weight as conv2.weight, 7.weight as fc1.weight, 9.weight as fc2.weight" in line


def test_a_run_s_folder_gives_its_weights_or_else_its_newest_checkpoint(tmp_path: Path) -> None:
    for step in (9, 10):
        weights = {name: array + step for name, array in WEIGHTS.items()}
        zeros = zero_weights(LINEAR)
        save_checkpoint(
            tmp_path / f"checkpoint-{step:09}.safetensors",
            Checkpoint(AdamState(weights, zeros, zeros, step), Progress(), {}),
        )
    assert np.array_equal(load_weights(tmp_path, "float32", LINEAR)["fc.bias"], WEIGHTS["fc.bias"] + 10)
    newest = tmp_path / "checkpoint-000000010.safetensors"
    content = newest.read_bytes()
    newest.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))  # one wrong bit
    with pytest.raises(UserError, match="a checkpoint whose contents do not match its checksum"):
        load_weights(tmp_path, "float32", LINEAR)
    (tmp_path / "weights.safetensors").write_bytes(safetensors.numpy.save(WEIGHTS))
    assert np.array_equal(load_weights(tmp_path, "float32", LINEAR)["fc.bias"], WEIGHTS["fc.bias"])


def edited(**changes: np.ndarray | None) -> bytes:
    """Return a safetensors file of good weights with some replaced or added; None leaves one out."""
    return safetensors.numpy.save({name: array for name, array in (WEIGHTS | changes).items() if array is not None})


def archive(*names: str) -> bytes:
    """Return a zip archive with files of these names in one folder, or a single one in none."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as written:
        for name in names:
            written.writestr(f"archive/{name}" if len(names) > 1 else name, b"3\n")  # `version` is a number
    return file.getvalue()


class Executed:
    """An object that would write a file when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, str]]:
        return open, ("executed", "w")


BIAS = WEIGHTS["fc.bias"]
BAD = {
    "no file": (None, "No such file"),
    "nothing": (b"", "it is empty; give"),
    "no archive": (b"PK\3\4 and so on", "not a readable PyTorch file"),
    "cut short": (edited()[:-1], "not a readable safetensors file"),
    "a PyTorch file cut short": (saved(STATE)[:-200], "not a readable PyTorch file"),
    "code in a PyTorch file": (saved({"fc.weight": Executed()}), "save model.state_dict() alone"),
    "TorchScript": (
        archive("code/__torch__.py", "constants.pkl", "data.pkl", "version"),
        "it is a TorchScript archive, which is a program: save model.state_dict() alone",
    ),
    "arrays of NumPy": (archive("fc.weight.npy"), "it is a zip archive of another program"),
    "one array of NumPy": (b"\x93NUMPY\1\0", "it is an array of NumPy's; give"),
    "Keras": (b"\x89HDF\r\n\x1a\n", "it is an HDF5 file, as Keras writes it; give"),
    "packed": (gzip.compress(saved(STATE)), "it is packed (gzip): unpack it first; give"),
    "a pointer": (b"version https://git-lfs.github.com/spec/v1\n", "it is a pointer of Git LFS"),
    "a web page": (b"<!DOCTYPE html>", "it is a web page; give"),
    "a pickle of arrays": (pickle.dumps(WEIGHTS), "it holds more than tensors: save model.state_dict() alone"),
    "a whole module": (saved(torch.nn.Linear(784, 10)), "torch.nn.modules.linear.Linear beside tensors"),
    "one tensor": (saved(torch.zeros(3)), "it holds one Tensor, not a state dict"),
    "two state dicts": (saved({"a": STATE, "b": STATE}), "it holds 2 state dicts, not one"),
    "a tensor too few": (
        edited(**{"fc.bias": None}),
        "tensor fc.bias is missing (a safetensors file with fc.weight (10, 784);",
    ),
    "a tensor too many": (edited(**{"fc3.bias": BIAS}), "fc3.bias"),
    "a tensor transposed": (edited(**{"fc.weight": WEIGHTS["fc.weight"].T.copy()}), "(784, 10)"),
    "not a number": (edited(**{"fc.bias": BIAS * np.float32("nan")}), "fc.bias"),
    "beyond float32": (edited(**{"fc.bias": np.full(10, 1e300)}), "fc.bias"),
    "integers": (edited(**{"fc.bias": np.zeros(10, np.int64)}), "dtype int64"),
    "another network": (safetensors.numpy.save(zero_weights(CNN)), "of --model cnn, not of --model linear"),
    "other shapes": (
        saved({f"{name}{number}": torch.zeros(number) for name in "cab" for number in (2, 1)}),
        "(a PyTorch file with a1 (1,), a2 (2,), b1 (1,), b2 (2,) and 2 more; --model linear has fc.weight (10, 784),",
    ),
}


@pytest.mark.parametrize(("content", "words"), BAD.values(), ids=BAD)
def test_weights_that_do_not_fit_are_one_line_and_execute_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path("given").write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_weights(Path("given"), "float32", LINEAR, read_tensors)
    assert words in str(caught.value)
    assert str(caught.value).startswith("weights file given: ")
    assert str(caught.value).isprintable()
    assert not Path("executed").exists()


# Each network

SMALL = ("--limit-train", "200", "--limit-test", "100", "--epochs", "1", "--device", "cpu")
MLP = ("--model", "mlp", "--hidden", "20", *SMALL)
NETWORKS = (CNN, Network("mlp"), Network("mlp", 20), Network("mlp", 2050), Network("linear"))


@pytest.mark.parametrize("network", NETWORKS, ids=str)
def test_a_network_is_recognised_by_its_tensors(network: Network) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in make_model(*network).state_dict().items()}
    assert shapes == {name: leaf.shape for name, leaf in layout_of(network).items()}
    assert recognise(zero_weights(network)) == network


def test_a_damaged_cnn_is_still_recognised_as_one(tmp_path: Path) -> None:
    for missing in layout_of(CNN):
        tensors = zero_weights(CNN)
        del tensors[missing]
        assert recognise(tensors) == CNN
        save_weights(tmp_path / "weights", tensors)
        with pytest.raises(UserError, match=f"{missing} is missing"):
            load_weights(tmp_path / "weights", "float32", None)
    assert recognise({}) == recognise({"x": np.zeros(1)}) == CNN


@pytest.mark.parametrize("shape", [(), (0, 784), (20,), (20, 1, 28, 28)])
def test_a_misshapen_mlp_is_refused(shape: tuple[int, ...], tmp_path: Path) -> None:
    save_weights(tmp_path / "weights", zero_weights(Network("mlp", 20)) | {"fc1.weight": np.zeros(shape, np.float32)})
    with pytest.raises(UserError, match="has shape"):
        load_weights(tmp_path / "weights", "float32", None)


def test_the_network_is_in_the_record_and_in_the_weights(train_once: TrainOnce, framework: str) -> None:
    results = train_once(framework, *MLP).results
    config = read_json(results / "config.json")["config"]
    assert (config["model"], config["hidden"]) == ("mlp", 20)
    assert recognise(load_weights(results / "weights.safetensors", "float32", None)) == Network("mlp", 20)

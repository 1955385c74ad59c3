"""The networks without convolution, as a person trains and uses them: their layouts, files and commands."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jax_cnn.config import CNN, Network, UserError
from jax_cnn.data import FashionMNIST
from jax_cnn.torch_layout import layout_of
from jax_cnn.weights import load_weights, recognise, save_weights
from parity_tests.run.training import TrainOnce, zero_weights
from parity_tests.support import read_json, run_successfully
from torch_ref.model import make_model

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


def test_both_frameworks_predict_with_it(train_once: TrainOnce, data: FashionMNIST, tmp_path: Path) -> None:
    Image.fromarray(data.test_images[0]).save(tmp_path / "boot.png")
    flags = ("--weights", train_once("jax", *MLP).results / "weights.safetensors", "--json")
    from_jax, from_torch = (
        json.loads(run_successfully("predict", "boot.png", *flags, "--framework", framework, cwd=tmp_path))
        for framework in ("jax", "torch")
    )
    assert from_jax["probabilities"] == pytest.approx(from_torch["probabilities"], abs=1e-6)

"""The network is the same network: names, shapes, numbers, and the data that it sees."""

from collections.abc import Callable

import jax
import numpy as np
import pytest
import torch
from jax import numpy as jnp

from experiments.answers import FRAMEWORKS, compute_stages
from jax_cnn import torch_layout
from jax_cnn.data import FashionMNIST
from jax_cnn.model import Params, apply, init_params
from jax_cnn.torch_layout import TorchDict
from jax_cnn.train import to_images
from torch_ref.model import SimpleCNN

PARAMETERS = 1_630_090


def jax_logits(params: Params | torch_layout.Tree, images: np.ndarray) -> np.ndarray:
    """Compute JAX's logits of images [batch, 28, 28, 1]."""
    return np.asarray(apply(jax.tree.map(jnp.asarray, params), jnp.asarray(images)))


def torch_logits(weights: TorchDict, images: np.ndarray) -> np.ndarray:
    """Compute PyTorch's logits of images [batch, 28, 28, 1]."""
    network = SimpleCNN()
    network.load_state_dict({name: torch.from_numpy(array.copy()) for name, array in weights.items()})
    with torch.no_grad():
        return network(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()


def test_both_have_the_same_number_of_parameters(jax_weights: Params) -> None:
    assert sum(leaf.size for leaf in jax.tree.leaves(jax_weights)) == PARAMETERS
    assert sum(tensor.numel() for tensor in SimpleCNN().parameters()) == PARAMETERS


def test_the_layout_map_names_every_tensor_and_its_shape(torch_weights: TorchDict) -> None:
    shapes = {name: leaf.shape for name, leaf in torch_layout.SIMPLE_CNN.items()}
    assert {name: array.shape for name, array in torch_weights.items()} == shapes


def test_every_stage_has_the_reference_shape(torch_weights: TorchDict, data: FashionMNIST) -> None:
    image = data.test_images[0]
    ours, theirs = (compute_stages(framework, torch_weights, image) for framework in FRAMEWORKS)
    assert list(ours) == list(theirs) == ["conv1", "relu1", "pool1", "conv2", "relu2", "pool2", "fc1", "relu3", "fc2"]
    assert ours["pool2"].shape == (64, 7, 7)
    for stage, expected in theirs.items():
        assert ours[stage].shape == expected.shape
        assert np.abs(ours[stage] - expected).max() <= 1e-6


def test_torchs_weights_give_the_same_logits_in_jax(torch_weights: TorchDict, images: np.ndarray) -> None:
    ours = jax_logits(torch_layout.to_flax(torch_weights), images)
    assert_close(ours, torch_logits(torch_weights, images))


def test_jaxs_weights_give_the_same_logits_in_torch(jax_weights: Params, images: np.ndarray) -> None:
    ours = jax_logits(jax_weights, images)
    assert_close(ours, torch_logits(torch_layout.to_torch(jax.device_get(jax_weights)), images))


def assert_close(ours: np.ndarray, theirs: np.ndarray) -> None:
    """Compare logits in float32. The worst difference over 20 draws of weights was 7.3e-8, for logits up to 0.14."""
    assert ours.shape == theirs.shape
    error = float(np.abs(ours - theirs).max())
    assert error <= 1e-6, f"logits differ by {error:.1e}"


def test_a_wrong_flatten_order_is_noticed(torch_weights: TorchDict, images: np.ndarray) -> None:
    params = torch_layout.to_flax(torch_weights)
    params["fc1"]["kernel"] = np.ascontiguousarray(torch_weights["fc1.weight"].T)  # as if torch flattened like Flax
    with pytest.raises(AssertionError, match="logits differ"):
        assert_close(jax_logits(params, images), torch_logits(torch_weights, images))


def test_the_layout_map_goes_both_ways_bit_by_bit(torch_weights: TorchDict) -> None:
    back = torch_layout.to_torch(torch_layout.to_flax(torch_weights))
    assert back.keys() == torch_weights.keys()
    assert all(np.array_equal(back[name], torch_weights[name]) for name in back)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda tensors: tensors.pop("conv2.bias"), "conv2.bias is missing"),
        (lambda tensors: tensors.update({"fc3.bias": np.zeros(10)}), "fc3.bias is unknown"),
        (lambda tensors: tensors.update({"fc2.bias": np.zeros(1)}), r"fc2.bias has shape \(1,\), not \(10,\)"),
    ],
)
def test_the_layout_map_refuses_what_it_does_not_know(
    torch_weights: TorchDict, change: Callable[[TorchDict], object], complaint: str
) -> None:
    change(torch_weights)
    with pytest.raises(ValueError, match=complaint):
        torch_layout.to_flax(torch_weights)


def test_pixels_are_scaled_as_to_tensor_does_to_the_last_bit() -> None:
    every_value = np.resize(np.arange(256, dtype=np.uint8), (1, 28, 28))
    ours = np.asarray(jax.jit(to_images, static_argnums=1)(jnp.asarray(every_value), jnp.dtype(jnp.float32)))[..., 0]
    assert np.array_equal(ours, every_value.astype(np.float32) / np.float32(255))


def test_the_network_computes_in_the_dtype_of_its_weights(images: np.ndarray) -> None:
    with jax.enable_x64(True):
        params = init_params(jax.random.key(0), jnp.float64)
        assert apply(params, jnp.asarray(images, jnp.float64)).dtype == jnp.float64

"""What every test may ask for."""

import atexit
import os
import signal
import tempfile
from pathlib import Path

# Before torch loads: its threads then yield while they wait for each other. Spinning, they take four times as long on
# two cores that something else uses too.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Before JAX loads: programs compiled by these tests are kept for the commands that they start, not in a person's cache.
compiled_programs = tempfile.TemporaryDirectory(prefix="compiled-", ignore_cleanup_errors=True)
atexit.register(compiled_programs.cleanup)
os.environ["JAX_COMPILATION_CACHE_DIR"] = compiled_programs.name

# A shell starts what it puts in the background deaf to Ctrl-C, and so would be the commands that the tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

import jax
import numpy as np
import pytest
import torch
from jaxtyping import install_import_hook

# Shapes in signatures are checked at run time, in the tests only: training does not pay for it.
with install_import_hook("jax_cnn", "beartype.beartype"):
    from jax_cnn import (  # noqa: F401  imported here so that the hook sees them
        batches,
        dialects,
        fashion_mnist,
        likeness,
        model,
        ops,
        pictures,
        preparation,
        train,
    )
    from jax_cnn.dialects import linen, nnx, plain  # noqa: F401
    from jax_cnn.fashion_mnist import FashionMNIST
    from jax_cnn.torch_layout import TorchDict
from torch_ref.model import SimpleCNN

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The data folder, with the four files in it."""
    fashion_mnist.prepare(ROOT / "data", print)
    return ROOT / "data"


@pytest.fixture(scope="session")
def data(data_dir: Path) -> FashionMNIST:
    """The whole data set."""
    return fashion_mnist.load(data_dir, print)


@pytest.fixture
def torch_weights() -> TorchDict:
    """Weights that PyTorch drew, by name."""
    torch.manual_seed(0)
    return {name: tensor.numpy() for name, tensor in SimpleCNN().state_dict().items()}


@pytest.fixture
def jax_weights() -> model.Params:
    """Weights that JAX drew, as a Flax tree."""
    return model.init_params(jax.random.key(0))


@pytest.fixture
def images(data: FashionMNIST) -> np.ndarray:
    """Eight test images, float32 [8, 28, 28, 1] in 0 … 1."""
    return (data.test_images[:8, :, :, None] / 255).astype(np.float32)

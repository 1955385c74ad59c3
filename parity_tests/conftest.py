"""What every test may ask for."""

import atexit
import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# One worker of several keeps to its own cores, and so do the commands that it starts: on shared ones the threads of one
# would wait for those of the other. Before a framework loads, and counts cores.
if (worker := os.environ.get("PYTEST_XDIST_WORKER")) and hasattr(os, "sched_setaffinity"):
    workers = int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[int(worker.removeprefix("gw")) :: workers])

# Before torch loads: its threads then yield while they wait for each other. Spinning, they take four times as long on
# two cores that something else uses too.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Before JAX loads: what these tests, and the commands that they start, keep for later or put where temporary files go
# is in a folder of this session, not in a person's cache. Each of several workers has its own.
session_folder = tempfile.TemporaryDirectory(prefix="parity-tests-", ignore_cleanup_errors=True)
atexit.register(session_folder.cleanup)
for variable in ("JAX_COMPILATION_CACHE_DIR", "MPLCONFIGDIR", "TORCHINDUCTOR_CACHE_DIR"):
    os.environ[variable] = os.path.join(session_folder.name, variable)
# Even what took no time: outside of jit each operation is a program of its own, and every process that compares would
# compile hundreds of them again.
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["PYTEST_DEBUG_TEMPROOT"] = tempfile.gettempdir()  # where pytest keeps the last three sessions' tmp_path
temporary_files = Path(session_folder.name, "tmp")
temporary_files.mkdir()
os.environ["TMPDIR"] = tempfile.tempdir = str(temporary_files)

# A shell starts what it puts in the background deaf to Ctrl-C, and so would be the commands that the tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

import jax
import numpy as np
import pytest
import torch
from jaxtyping import install_import_hook
from platformdirs import user_cache_path
from xdist.scheduler import LoadFileScheduling

# Shapes in signatures are checked at run time, in the tests only: training does not pay for it.
install_import_hook("jax_cnn", "beartype.beartype")

from jax_cnn import model
from jax_cnn.data import FashionMNIST, load_fashion_mnist, prepare_fashion_mnist
from jax_cnn.torch_layout import TorchDict
from parity_tests.support import ROOT
from torch_ref.model import SimpleCNN

pytest_plugins = ["parity_tests.experiments.small_comparison"]

MOST_WORKERS = 4  # each holds both frameworks, some 3 GB
LONGEST = ("test_parity.py", "test_checkpoint.py", "test_devices.py", "test_notebook.py")  # one to three minutes


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declare the options of this project's tests."""
    parser.addoption(
        "--kills", type=int, default=6, help="how often `test_a_run_that_is_killed…` (slow) kills each training"
    )


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Side by side where there are cores for it and a folder to test; a single file in this process, to be debugged.

    Much of the time goes into starting the commands, on one core each.
    """
    folders = all(Path(argument).is_dir() for argument in config.args)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MOST_WORKERS) if folders and cores > 1 else 0


class Files(LoadFileScheduling):  # type: ignore[misc]  # xdist tells no types
    """A file's tests in one worker, and so those of the files that share the small comparison of half a minute."""

    def _split_scope(self, nodeid: str) -> str:
        return "small comparison" if "/test_comparison_" in nodeid else super()._split_scope(nodeid)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Files:
    """How tests are shared among workers."""
    return Files(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest files, so that no worker is alone with one at the end; the order stays random."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture(scope="session", autouse=True)
def _nothing_is_left_behind() -> Iterator[None]:
    """Neither where temporary files go, nor in the checkout, nor in a person's cache."""
    before = what_lies_about()
    yield
    left = sorted(map(str, what_lies_about() - before))
    assert not left, f"left behind by a test: {', '.join(left)}"


def what_lies_about() -> set[Path]:
    """What a test may have forgotten; not the hidden caches of tools, nor the data, which may be fetched now.

    Nor what is in `runs`, where a person may train meanwhile; but a `runs` that was not there is seen. Nor the logs
    that libtpu, where it is installed, writes whatever it is told.
    """
    folders = (ROOT, ROOT / "scripts", user_cache_path("jax-cnn-parity"), temporary_files)
    found = (path for folder in folders for path in folder.glob("[!.]*"))
    tools = {ROOT / "data", ROOT / "scripts" / "__pycache__", *temporary_files.glob("tpu_driver.*")}
    return set(found) - tools


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The data folder, with the four files in it."""
    prepare_fashion_mnist(ROOT / "data", print)
    return ROOT / "data"


@pytest.fixture(scope="session")
def good(data_dir: Path) -> Path:
    """The folder of those four."""
    return data_dir / "FashionMNIST" / "raw"


@pytest.fixture(scope="session")
def data(data_dir: Path) -> FashionMNIST:
    """The whole data set."""
    return load_fashion_mnist(data_dir, print)


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

"""Settings and fixtures that all tests share."""

import atexit
import gc
import os
import signal
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

# Each of several workers, and the commands that it starts, use cores of their own: on shared cores the threads of one
# worker would wait for those of another. This comes before the frameworks load, because they count the cores then.
if (worker := os.environ.get("PYTEST_XDIST_WORKER")) and hasattr(os, "sched_setaffinity"):
    workers = int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[int(worker.removeprefix("gw")) :: workers])

# PyTorch reads this when it loads: its threads then yield while they wait for each other. Threads that spin take four
# times as long on two cores that other work uses too.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Caches and temporary files of the tests, and of the commands that they start, go into a folder of this session and not
# into a person's cache. Each worker has its own. JAX reads these variables when it loads.
session_folder = tempfile.TemporaryDirectory(prefix="parity-tests-", ignore_cleanup_errors=True)
atexit.register(session_folder.cleanup)
for variable in ("JAX_COMPILATION_CACHE_DIR", "MPLCONFIGDIR", "TORCHINDUCTOR_CACHE_DIR"):
    os.environ[variable] = os.path.join(session_folder.name, variable)
# Keep even programs that compile at once: outside of jit each operation is a program, and every process that compares
# would compile hundreds of them again.
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
# A program says of each operation where it stands in the source. One line is enough: to write down the whole stack of
# calls takes a tenth of the time.
os.environ["JAX_INCLUDE_FULL_TRACEBACKS_IN_LOCATIONS"] = "0"
os.environ["PYTEST_DEBUG_TEMPROOT"] = tempfile.gettempdir()  # pytest keeps the `tmp_path` of three sessions
temporary_files = Path(session_folder.name, "tmp")
temporary_files.mkdir()
os.environ["TMPDIR"] = tempfile.tempdir = str(temporary_files)

# Tracing makes millions of small objects, and nearly all of them go without the collector of cycles: at Python's own
# threshold of 700 it takes a tenth of the time.
gc.set_threshold(100_000)

# A process that a shell starts in the background ignores Ctrl-C, and so would the commands that the tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

import numpy as np
import pytest
from jaxtyping import install_import_hook
from platformdirs import user_cache_path

# The tests check all types and shapes in the signatures of jax_cnn at run time.
install_import_hook("jax_cnn", "beartype.beartype")

from jax_cnn.data import FashionMNIST, load_fashion_mnist, prepare_fashion_mnist
from jax_cnn.torch_layout import TorchDict
from parity_tests.support import ROOT, TrainedRun, TrainOnce, run_successfully

MOST_WORKERS = 4  # each loads both frameworks, which takes about 3 GB
LONGEST = (  # a minute and more
    *("test_parity.py", "test_checkpoint.py", "test_faults.py", "test_adapters.py"),
    *("test_trainers.py", "test_devices.py", "test_comparison.py", "test_docs.py", "test_environment.py"),
)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declare the options of this project's tests."""
    parser.addoption("--kills", type=int, default=2, help="how often `test_a_run_that_is_killed…` kills each training")


def pytest_collection(session: pytest.Session) -> None:
    """Seed PyTorch as pytest-randomly seeds NumPy, so that `--randomly-seed` repeats a failed run."""
    if worker or not session.config.option.numprocesses:  # the process that only hands out the tests loads no framework
        import torch

        torch.manual_seed(session.config.getoption("randomly_seed", 0))


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Return the number of workers: one for each core to test folders, none for single files, to debug them."""
    folders = all(Path(argument).is_dir() for argument in config.args)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MOST_WORKERS) if folders and cores > 1 else 0


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start the longest files first, so that no worker is left with one at the end. The order is random otherwise."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture(scope="session", autouse=True)
def _nothing_is_left_behind() -> Iterator[None]:
    """Check that the tests leave no file in the checkout, in a person's cache, or among the temporary files."""
    before = list_files()
    yield
    left = sorted(map(str, list_files() - before))
    assert not left, f"left behind by a test: {', '.join(left)}"


def list_files() -> set[Path]:
    """List the files that a test could have left behind.

    Hidden files are caches of tools. The data set may be fetched during the tests, and a person may train into `runs`.
    libtpu writes logs wherever it is installed.
    """
    folders = (ROOT, ROOT / "scripts", user_cache_path("jax-cnn-parity"), temporary_files)
    files = {path for folder in folders for path in folder.glob("[!.]*")}
    tools = {ROOT / "data", ROOT / "scripts" / "__pycache__", *temporary_files.glob("tpu_driver.*")}
    return files - tools


AS_IT_TRAINS = ("test_convolutions.py", "test_dialects.py", "test_trainers.py")  # they ask what the compiler makes


@pytest.fixture(scope="module", autouse=True)
def _compile_quickly(request: pytest.FixtureRequest) -> Iterator[None]:
    """Let XLA optimise nothing in the harness's own tests: their programs are small, many, and do not run often."""
    import jax

    quickly = request.path.parent.name == "parity" and request.path.name not in AS_IT_TRAINS
    jax.config.update("jax_disable_most_optimizations", quickly)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Return the data folder, with the four files of FashionMNIST in it."""
    prepare_fashion_mnist(ROOT / "data", print)
    return ROOT / "data"


@pytest.fixture(scope="session")
def good(data_dir: Path) -> Path:
    """Return the folder that holds the four files."""
    return data_dir / "FashionMNIST" / "raw"


@pytest.fixture(scope="session")
def data(data_dir: Path) -> FashionMNIST:
    """Return the whole data set."""
    return load_fashion_mnist(data_dir, print)


@pytest.fixture
def torch_weights() -> TorchDict:
    """Return initial weights of PyTorch, by name."""
    import torch

    from torch_ref.model import SimpleCNN

    torch.manual_seed(0)
    return {name: tensor.numpy() for name, tensor in SimpleCNN().state_dict().items()}


@pytest.fixture
def images(data: FashionMNIST) -> np.ndarray:
    """Return eight test images, float32 [8, 28, 28, 1] in 0 … 1."""
    return (data.test_images[:8, :, :, None] / 255).astype(np.float32)


@pytest.fixture(params=["jax", "torch"])
def framework(request: pytest.FixtureRequest) -> str:
    """Return the framework that trains: a test that asks for it runs once with each."""
    return str(request.param)


@pytest.fixture(scope="session")
def train_once(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainOnce:
    """Return a function that trains in a new folder; the same call again returns the same run."""

    @cache
    def train(framework: str, *flags: str) -> TrainedRun:
        cwd = tmp_path_factory.mktemp(framework)
        arguments = ("--data-dir", str(data_dir), *flags)
        output = run_successfully(f"train_{framework}", *arguments, cwd=cwd)
        return TrainedRun(cwd, cwd / "runs" / framework, arguments, output)

    return train

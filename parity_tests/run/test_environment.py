"""Nothing in an environment breaks a run: CUDA, JAX's variables, a notebook's kernel, locales, folders, users."""

import io
import json
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from importlib.metadata import distributions, requires, version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from packaging.requirements import Requirement
from PIL import Image
from rich.console import Console
from rich.table import Table

import benchmark
import compare
import train_jax
import train_torch
from experiments.speed.config import Task
from experiments.speed.workers import PREALLOCATE, worker_environment
from jax_cnn.config import Device, JaxTrainConfig, Network, TrainConfig, UserError
from jax_cnn.devices import SETTINGS, VARIABLES, find_devices, fix_settings, pick_devices
from jax_cnn.files import write_json
from jax_cnn.model import init_params
from jax_cnn.run import command_line, loop, provenance, resume
from jax_cnn.run.display import epoch_table, show_table
from jax_cnn.run.folder import FILES
from jax_cnn.run.loop import chance, fit
from jax_cnn.run.provenance import cuda_versions, warn_of_two_cudas
from jax_cnn.run.resume import find_checkpoint
from parity_tests import command
from parity_tests.support import ROOT, TIMEOUT, assert_user_error, run_python, zero_weights

# One CUDA for both frameworks


def test_the_extras_bring_jax_the_cuda_that_the_installed_torch_has() -> None:
    """The libraries of two versions have the same paths, and pip lets one overwrite the other."""
    of_torch = cuda_versions(Requirement(line).name for line in requires("torch") or ())
    if not of_torch:
        pytest.skip("this torch is built without CUDA")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    fitting = {}
    for name, lines in extras.items():
        requirements = {line.name: line for line in map(Requirement, lines)}
        cudas = [
            extra.removeprefix("cuda") for extra in getattr(requirements.get("jax"), "extras", ()) if "cuda" in extra
        ]
        if cudas and ("torch" not in requirements or version("torch") in requirements["torch"].specifier):
            fitting[name] = cudas
    assert fitting, "no extra takes the installed torch"
    assert all(cudas == of_torch for cudas in fitting.values()), f"torch has CUDA {of_torch}, JAX {fitting}"


def test_no_two_versions_of_cuda_are_installed_here() -> None:
    assert len(cuda_versions(package.name for package in distributions())) <= 1


def test_two_versions_of_cuda_are_one_line_when_a_gpu_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["torch", "nvidia-cudnn-cu13", "nvidia-cublas", "jax-cuda12-plugin", "nvidia_nccl_cu12"]
    monkeypatch.setattr(provenance, "distributions", lambda: [SimpleNamespace(name=name) for name in names])
    messages: list[str] = []
    devices: tuple[Device, ...] = ("cpu", "gpu")
    for device in devices:
        warn_of_two_cudas(device, messages.append)
    (line,) = messages
    assert "CUDA 12 and 13" in line
    assert "'.[cuda]'" in line


@pytest.mark.parametrize("script", [train_jax, train_torch, compare, benchmark, command], ids=lambda it: it.__name__)
def test_every_command_that_may_use_a_gpu_looks_for_two_versions_of_cuda(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: Any
) -> None:
    def find(device: Device, say: Callable[[str], None]) -> None:
        raise UserError("looked for them")

    (tmp_path / "no folder").touch()
    flags = ["--data-dir", str(tmp_path / "no folder"), "--out-dir", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["command.py", *flags])
    monkeypatch.setattr(script, "warn_of_two_cudas", find)
    with pytest.raises(UserError, match="looked for them"):
        script.main()


def test_jax_leaves_memory_of_a_gpu_to_pytorch_where_both_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """JAX reads the variable when it starts, which the command of the harness does before it loads the harness."""
    look = f"import os, sys, parity_tests.command; print(os.environ[{PREALLOCATE!r}], 'jax' in sys.modules)"
    for value in ("false", "true"):  # a user's own value is kept
        env = {name: text for name, text in os.environ.items() if name != PREALLOCATE}
        env |= {PREALLOCATE: value} if value == "true" else {}
        done = run_python(look, env=env)
        assert done.stdout.split() == [value, "False"], done.stderr
    monkeypatch.delenv(PREALLOCATE, raising=False)
    contender = Task("gpu-jax", 64, 64, 1, 0, "data", device="gpu")
    assert worker_environment(contender, tmp_path)[PREALLOCATE] == "false"


# JAX's variables


@pytest.fixture
def _settings() -> Iterator[None]:
    """Restore JAX's settings after a test."""
    before = {name: getattr(jax.config, name) for name in SETTINGS}
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.mark.usefixtures("_settings")
@pytest.mark.parametrize("setting", [("jax_default_prng_impl", "rbg"), ("jax_threefry_partitionable", False)])
def test_a_seed_draws_the_same_weights_whatever_jax_s_variables_say(setting: tuple[str, Any]) -> None:
    fix_settings()

    def draw() -> np.ndarray:
        return np.asarray(init_params(jax.random.key(0), network=Network("linear"))["fc"]["kernel"])

    expected = draw()
    jax.config.update(*setting)
    assert not np.array_equal(draw(), expected)  # the check can fail
    fix_settings()
    assert np.array_equal(draw(), expected)


def test_the_variables_of_jax_and_xla_are_in_the_record(monkeypatch: pytest.MonkeyPatch) -> None:
    variables = {"JAX_ABACUS": "1", "XLA_ABACUS": "2"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert variables.items() <= provenance.provenance(())["environment"].items()


PLATFORMS = """
import jax
from jax_cnn.config import UserError
from jax_cnn.devices import find_devices
for kind in ("auto", "gpu", "cpu", "gpu"):
    try:
        print(find_devices(kind)[0].platform)
    except UserError as error:
        print(error)
"""


@pytest.mark.parametrize(("variable", "what"), [("JAX_PLATFORMS", "abacus"), ("JAX_PLATFORM_NAME", "its devices")])
def test_a_platform_that_jax_cannot_start_is_one_line_and_no_obstacle_for_the_cpu(variable: str, what: str) -> None:
    env = {name: value for name, value in os.environ.items() if name not in VARIABLES} | {variable: "abacus"}
    auto, gpu, cpu, second = run_python(PLATFORMS, env=env).stdout.splitlines()
    assert auto == gpu
    assert auto.startswith(f"JAX cannot start {what}: ")
    assert auto.endswith(f"; unset {variable}, or use --device cpu")
    assert cpu == "cpu"
    assert second.endswith("JAX has started with cpu alone in this process: restart it (in a notebook, the kernel)")


def test_a_variable_that_lets_nothing_compile_is_one_line() -> None:
    with jax.disable_jit(), pytest.raises(UserError, match=r"^JAX_DISABLE_JIT is set, .* unset the variable$"):
        find_devices("cpu")


def test_a_second_command_in_one_process_is_told_what_jax_reads_only_once() -> None:
    jax.devices()
    with pytest.raises(UserError, match=r"--devices 64: JAX sees .* restart it \(in a notebook, the kernel\)"):
        pick_devices(JaxTrainConfig(devices=64))


@pytest.mark.parametrize(
    ("library", "variable", "words"),
    [
        ("jax", "JAX_ENABLE_X64", "JAX cannot read its variables (invalid truth value 'abacus'"),
        (
            "matplotlib",
            "MPLBACKEND",
            "matplotlib cannot read its variables (Key backend: 'abacus' is not a valid value",
        ),
    ],
)
def test_a_variable_that_cannot_be_read_is_one_line(library: str, variable: str, words: str) -> None:
    load = f"from jax_cnn.run import command_line; command_line.run(lambda: __import__({library!r}))"
    done = run_python(load, env=os.environ | {variable: "abacus"})
    assert_user_error(done, words, "): unset or correct it")


# The command line


@pytest.mark.skipif(os.name != "posix", reason="a shell closes the output")
def test_a_command_whose_output_is_closed_works() -> None:
    line = ["sh", "-c", 'exec "$0" scripts/train_torch.py --help >&-', sys.executable]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_main_in_a_cell_does_not_read_the_kernel_s_own_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/ipykernel_launcher.py", "-f", "/tmp/kernel-1.json"])
    assert command_line.parse(TrainConfig(epochs=3), "") == TrainConfig(epochs=3)


def test_a_mistake_in_a_cell_is_one_line() -> None:
    """IPython calls this method instead of formatting a traceback."""
    assert UserError("--epochs must be 1 or more")._render_traceback_() == ["error: --epochs must be 1 or more"]


def test_a_tilde_is_the_home_in_every_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    config = command_line.parse(TrainConfig(), "", ["--out-dir=~/runs", "--init-weights", "~/w.pth", "--seed=3"])
    home = Path("/home/someone")
    assert config == TrainConfig(out_dir=home / "runs", init_weights=home / "w.pth", seed=3)


# What a run prints and writes


class Guesser:
    """A trainer that learns nothing."""

    framework, device_name, train_size, compile_seconds = "jax", "cpu", 64, 0.0
    packages: tuple[str, ...] = ()

    def __init__(self, accuracy: float) -> None:
        self._accuracy = accuracy
        self._weights = zero_weights(Network("linear"))

    def train_epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[int, float]]:
        """Train one batch."""
        yield 64, 2.3

    def evaluate(self) -> tuple[float, float]:
        """Return a loss and the accuracy."""
        return 2.3, self._accuracy

    def weights(self) -> dict[str, np.ndarray]:
        """Return the weights."""
        return self._weights

    def state(self) -> tuple[Any, ...]:
        """Return the weights as they are."""
        return self._weights, self._weights, self._weights, 1

    def restore(self, *state: Any) -> None:
        """Keep the weights, which a test never changes."""


@pytest.mark.parametrize(("accuracy", "warned"), [(0.1, True), (0.2, False)])
def test_a_run_that_ends_no_better_than_chance_says_so(tmp_path: Path, accuracy: float, warned: bool) -> None:
    console = Console(file=io.StringIO(), width=80)
    fit(TrainConfig(epochs=1, out_dir=tmp_path), Guesser(accuracy), console)
    output = console.file.getvalue()  # type: ignore[attr-defined]
    assert ("no better than chance: try another --learning-rate than 0.001" in output) == warned
    assert 0.1 < chance(10_000) < 0.11 < chance(100) < 0.2


def test_data_of_one_s_own_are_in_the_record_and_the_table_and_resuming_takes_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = {"t10k-labels-idx1-ubyte": "ab" * 32}
    monkeypatch.setattr(loop, "other_files", lambda data_dir: own)
    config = TrainConfig(epochs=1, out_dir=tmp_path, model="linear", any_data=True)
    console = Console(file=io.StringIO(), width=60)
    fit(config, Guesser(0.2), console)
    assert json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["data"] == own
    assert f"t10k-labels-idx1-ubyte: {'ab' * 32}" in " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]
    for data in (own, own | {"t10k-labels-idx1-ubyte": "cd" * 32}):
        monkeypatch.setattr(resume, "other_files", lambda data_dir, data=data: data)
        with (
            nullcontext() if data == own else pytest.raises(UserError, match=r"^--resume: .* was trained on other data")
        ):
            find_checkpoint(replace(config, resume=True), "jax", pytest.fail)


def test_a_narrow_terminal_and_a_fixed_width_cut_no_figure() -> None:
    row = {"epoch": 1, "train_loss": 123456.7, "test_loss": 2, "test_accuracy": 1, "train_seconds": 1e6}
    row |= {"eval_seconds": 1, "images_per_second": 1234567}
    fixed = Table("words on the left that may wrap", width=20)
    fixed.add_column("figure", justify="right", no_wrap=True)
    fixed.add_row("a name of some length", "1,234,567,890,123")
    for table, figures in ((epoch_table([row]), ("123456.7000", "1,234,567")), (fixed, ("1,234,567,890,123",))):
        console = Console(file=io.StringIO(), width=25)
        show_table(console, table)
        assert all(figure in console.file.getvalue() for figure in figures)  # type: ignore[attr-defined]


def test_a_name_that_the_locale_cannot_decode_is_written_as_utf_8(tmp_path: Path) -> None:
    name = "Läufe".encode().decode("ascii", "surrogateescape")  # as Python reads it from a command line
    write_json(tmp_path / "file", {"command": name, "latin": "\udce4"})
    assert json.loads((tmp_path / "file").read_text(encoding="utf-8")) == {"command": "Läufe", "latin": "�"}


# All bad conditions at once

# The checkout and the data cannot be written, and their paths have spaces and letters beyond ASCII. The data do not lie
# as torchvision keeps them. The user has no home, LANG is C, there is no terminal, and one core. JAX's variables forbid
# what training does, and name a platform that is not there.
SMALL = ("--limit-train", 200, "--batch-size", 50, "--limit-test", 100, "--device", "cpu")  # four steps
STRANGER = 54_321  # a user that the system does not know: no name, no home

Launch = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the source that cannot be written."""
    copy = tmp_path_factory.mktemp("somewhere") / "ein Weg – mit Umläuten"
    for name in ("jax_cnn", "torch_ref", "scripts"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in (copy, *copy.rglob("*")):
        path.chmod(path.stat().st_mode & ~0o222)
    return copy


@pytest.fixture
def desk(tmp_path: Path) -> Path:
    """Return a folder that anybody can write, with a folder for temporary files and no home in it."""
    folder = tmp_path / "Ergebnisse für später"
    for path in (folder, folder / "tmp"):
        path.mkdir()
        path.chmod(0o777)
    return folder


@pytest.fixture
def launch(checkout: Path, desk: Path) -> Launch:
    """Return a function that starts a script of that checkout under all these conditions."""
    environment = {
        "PATH": os.defpath,
        "LANG": "C",
        "LC_ALL": "C",
        "JAX_PLATFORMS": "abacus",
        "JAX_NUMPY_RANK_PROMOTION": "raise",
        "JAX_NUMPY_DTYPE_PROMOTION": "strict",
        "JAX_TRANSFER_GUARD": "disallow",
        "PYTHONPATH": str(checkout),
        "TMPDIR": str(desk / "tmp"),
    }
    if os.geteuid():  # this user keeps the name, and so needs another home
        environment["HOME"] = str(checkout / "none")
    core = str(max(os.sched_getaffinity(0)))

    def run(script: str, *flags: object, cwd: Path = desk) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, str(checkout / "scripts" / f"{script}.py"), *map(str, flags)]
        return subprocess.run(
            ["taskset", "--cpu-list", core, *as_stranger(line)],
            cwd=cwd,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            start_new_session=True,
            text=True,
            timeout=TIMEOUT,
            check=False,
        )

    return run


def as_stranger(line: list[str]) -> list[str]:
    """Return the command that runs this one as a user without a home and, unlike root, without the right to write.

    The user keeps the right to read, because Python may be installed in root's home.
    """
    if os.geteuid():
        return line
    flags = [f"--{kind}=-all,+dac_read_search" for kind in ("inh-caps", "ambient-caps", "bounding-set")]
    return ["setpriv", f"--reuid={STRANGER}", f"--regid={STRANGER}", "--clear-groups", *flags, *line]


@pytest.fixture
def _conditions(checkout: Path) -> None:
    """Skip where another user cannot be had, and assert that the checkout cannot be written."""
    if not all(map(shutil.which, ("setpriv", "taskset"))):
        pytest.skip("needs setpriv and taskset (util-linux)")
    attempt = as_stranger([sys.executable, "-c", "import pathlib; pathlib.Path('file').touch()"])
    done = subprocess.run(attempt, cwd=checkout, capture_output=True, text=True, check=False)
    if "setpriv" in done.stderr:
        pytest.skip(f"cannot become another user here: {done.stderr.strip()}")
    assert "PermissionError" in done.stderr, "the checkout can be written"


def anywhere(test: Callable[..., None]) -> Any:
    """Mark a test that runs the commands under all of these conditions."""
    linux = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's users, capabilities and cores")
    return pytest.mark.extended(linux(pytest.mark.usefixtures("_conditions")(test)))


@anywhere
def test_training_resuming_and_predicting_work(launch: Launch, good: Path, desk: Path, framework: str) -> None:
    data = desk / "Daten zum Üben"
    data.mkdir()
    for file in good.iterdir():
        (data / file.name).symlink_to(file.resolve())
    data.chmod(0o555)
    flags = (*SMALL, "--data-dir", data.name, "--out-dir", "Läufe")
    Image.fromarray(np.zeros((28, 28), np.uint8)).save(desk / "schwarzes Bild.png")
    for more in (("--epochs", 1), ("--epochs", 2, "--resume")):
        done = launch(f"train_{framework}", *flags, *more)
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert "going on after step 4" in done.stdout
    assert {*FILES} <= {path.name for path in (desk / "Läufe").iterdir()}
    done = launch("predict", "--framework", framework, "--weights", "Läufe/weights.safetensors", "schwarzes Bild.png")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("schwarzes Bild.png: ")
    assert not [path.name for path in (desk / "tmp").iterdir() if not path.name.startswith("torchinductor")]


@anywhere
def test_a_folder_that_cannot_be_written_is_one_line(launch: Launch, checkout: Path, framework: str) -> None:
    done = launch(f"train_{framework}", *SMALL, cwd=checkout)
    assert done.returncode == 2, done.stderr
    assert done.stderr == (
        f"error: --out-dir runs/{framework}: cannot write there (Permission denied); choose another folder\n"
    )


@anywhere
def test_an_incomplete_data_folder_that_cannot_be_written_is_one_line(launch: Launch, checkout: Path) -> None:
    done = launch("train_torch", *SMALL, "--data-dir", checkout)
    assert_user_error(done, f"Fashion-MNIST is not in {checkout}/FashionMNIST/raw (missing: ", "Permission denied")
    assert "give a data folder that can be written to" in done.stderr

"""Programs are compiled with options that this jaxlib knows; the next run finds them again, or compiles them anew."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import pytest

from jax_cnn import compiler
from parity_tests.support import run_command

pytestmark = pytest.mark.extended

SMALL = ("--model", "mlp", "--epochs", "1", "--limit-train", "128", "--limit-test", "100", "--device", "cpu")
WHERE = ("HOME", "XDG_CACHE_HOME", "JAX_COMPILATION_CACHE_DIR")  # what decides where programs are kept
UNKNOWN = "xla_cpu_option_of_another_version"


class Run(NamedTuple):
    """The weights and the messages of a training."""

    weights: bytes
    messages: str


Train = Callable[..., Run]


@pytest.fixture(scope="module")
def train(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Train:
    """Run the training command with these environment variables, and no others that say where programs are kept."""
    settings = tmp_path_factory.mktemp("matplotlib")

    def run(**variables: str) -> Run:
        environment = {name: value for name, value in os.environ.items() if name not in WHERE} | variables
        environment["MPLCONFIGDIR"] = str(settings)  # Matplotlib looks for a home, too
        results = tmp_path_factory.mktemp("run")
        flags = (*SMALL, "--data-dir", data_dir, "--out-dir", results)
        done = run_command("train_jax", *flags, cwd=results, env=environment)
        assert done.returncode == 0, done.stderr
        return Run((results / "weights.safetensors").read_bytes(), done.stderr)

    return run


@pytest.fixture(scope="module")
def first(train: Train, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Path]:
    """Return the first run of a user without a home, and the folder in which it kept its programs."""
    cache = tmp_path_factory.mktemp("cache")
    return train(XDG_CACHE_HOME=str(cache)), cache / "jax-cnn-parity" / "programs"


def large_programs(folder: Path) -> dict[str, int]:
    """Return the names of the kept programs that train and evaluate, and when they were written.

    All others compile in about 0.1 s, so whether JAX keeps them depends on how busy the machine is.
    """
    names = ("jit_train_chunk-", "jit_evaluate-")
    return {path.name: path.stat().st_mtime_ns for path in folder.iterdir() if path.name.startswith(names)}


def test_programs_are_kept_in_the_users_cache_and_found_there_by_the_next_run(
    train: Train, first: tuple[Run, Path]
) -> None:
    run, folder = first
    assert run.messages == ""
    kept = large_programs(folder)
    assert sorted(name.partition("-")[0] for name in kept) == ["jit_evaluate", "jit_train_chunk"]
    assert train(JAX_COMPILATION_CACHE_DIR=str(folder)) == run
    assert large_programs(folder) == kept  # neither was compiled and written again


def test_damaged_programs_are_compiled_anew(train: Train, first: tuple[Run, Path], tmp_path: Path) -> None:
    run, folder = first
    damaged = Path(shutil.copytree(folder, tmp_path / "damaged"))
    for number, path in enumerate(sorted(damaged.iterdir())):
        path.write_bytes((b"", path.read_bytes()[:1000], os.urandom(1000))[number % 3])
    assert train(JAX_COMPILATION_CACHE_DIR=str(damaged)) == run


def test_where_nothing_can_be_kept_all_is_compiled(train: Train, first: tuple[Run, Path], tmp_path: Path) -> None:
    run, _ = first
    (tmp_path / "file").touch()
    assert train(XDG_CACHE_HOME=str(tmp_path / "file")) == run  # no folder can be made in a file, not even by root
    assert (tmp_path / "file").read_bytes() == b""


@pytest.fixture
def configured(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], str | None]]:
    """Return a function that asks to keep programs and returns the folder that JAX is then set to use."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")

    def ask() -> str | None:
        jax.config.update("jax_compilation_cache_dir", None)
        compiler.keep_compiled_programs()
        folder: str | None = getattr(jax.config, names[0])  # mypy does not know its type
        return folder

    yield ask
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.mark.filterwarnings("default")  # asking sets filters of its own
def test_nothing_is_kept_without_a_home_or_by_a_jaxlib_that_would_warn(
    configured: Callable[[], str | None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert configured() == str(tmp_path / "jax-cnn-parity" / "programs")
    with monkeypatch.context() as older:
        older.setattr(jax, "__version_info__", (0, 10, 1))
        assert configured() is None
    monkeypatch.setattr(compiler, "user_cache_path", lambda name: Path("~/.cache") / name)
    assert configured() is None


def test_an_option_that_this_jaxlib_does_not_know_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(jax.errors.JaxRuntimeError, match=UNKNOWN):
        jax.jit(lambda: 0).lower().compile({UNKNOWN: True})  # it would be fatal
    known = compiler.compiler_options("cpu")
    assert known
    monkeypatch.setattr(compiler, "CPU_OPTIONS", {UNKNOWN: True} | compiler.CPU_OPTIONS)
    assert compiler.compiler_options("cpu") == known
    jax.jit(lambda: 0).lower().compile(known)
    assert compiler.compiler_options("tpu") == {}

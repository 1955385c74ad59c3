"""A run that is stopped and resumed, however often, ends as the run that was never stopped."""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from safetensors.numpy import load_file

from jax_cnn.checkpoint import AdamState, Checkpoint, Progress, Unusable, load_checkpoint, save_checkpoint
from jax_cnn.config import CNN, JaxTrainConfig, Network, UserError
from jax_cnn.run.command_line import parse
from jax_cnn.run.folder import RunFolder
from jax_cnn.run.resume import checkpoint_files, find_checkpoint
from jax_cnn.torch_layout import TorchDict, layout_of
from parity_tests.support import (
    ENVIRONMENT,
    TIMEOUT,
    TrainOnce,
    assert_user_error,
    command_line,
    contents,
    read_metrics,
    run_command,
    run_python,
    wait_until,
)

# 66 batches (JAX trains 64 of them in one call) and one of 8 images: three places to stop in an epoch.
SIZES = ("--batch-size", "16", "--limit-train", str(66 * 16 + 8), "--limit-test", "100")
SMALL = ("--epochs", "2", *SIZES, "--device", "cpu", "--model", "mlp")  # which compiles and trains fastest
SLOWER = ("--epochs", "2", *SIZES, "--device", "cpu")  # so slow that a signal comes before the end
OFTEN = ("--checkpoint-seconds", "0.1")
TIMES = {"train_seconds", "eval_seconds", "compile_seconds", "images_per_second"}

Flags = tuple[str, ...]
Resume = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Return the folder of the run that is stopped and resumed."""
    return tmp_path / "run"


@pytest.fixture
def flags(data_dir: Path, results: Path) -> Flags:
    """Return the flags of a small run into that folder."""
    return (*SMALL, "--data-dir", str(data_dir), "--out-dir", str(results))


@pytest.fixture
def slower_flags(data_dir: Path, results: Path) -> Flags:
    """Return the flags of a run of SimpleCNN into that folder."""
    return (*SLOWER, "--data-dir", str(data_dir), "--out-dir", str(results))


@pytest.fixture
def finished(train_once: TrainOnce, results: Path) -> Path:
    """Return that folder with a copy of a finished run of JAX."""
    return Path(shutil.copytree(train_once("jax", *SMALL).results, results))


@pytest.fixture
def resume(finished: Path, flags: Flags) -> Resume:
    """Return a function that resumes the finished run with more flags, or with the command of the other framework."""
    return lambda *more, framework="jax": run_command(f"train_{framework}", *flags, "--resume", *more, cwd=finished)


def finish(line: Sequence[str]) -> str:
    """Run a command, assert that it succeeds, and return what it prints."""
    done = subprocess.run(line, env=ENVIRONMENT, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def assert_same_run(results: Path, expected: Path) -> None:
    """Assert bit-identical weights, and the same metrics of each epoch but for the times."""
    weights, expected_weights = (load_file(folder / "weights.safetensors") for folder in (results, expected))
    assert weights.keys() == expected_weights.keys()
    for name, array in weights.items():
        assert np.array_equal(array, expected_weights[name]), f"{name} differs"
    assert metrics(results) == metrics(expected)
    assert not list(results.glob("*.tmp"))


def metrics(results: Path) -> list[dict[str, float]]:
    """Return the measurements of each epoch without the times."""
    return [{name: row[name] for name in row.keys() - TIMES} for row in read_metrics(results)]


def signal_a_run(
    line: Sequence[str], results: Path, number: int, pause: float, after_checkpoint: bool
) -> tuple[int, str]:
    """Start a command, send it a signal, and return its exit status and its output.

    The signal comes `pause` seconds after the start, or after the run's first new checkpoint. The command has its own
    folder for temporary files: a killed process cannot remove them.
    """
    before = set(checkpoint_files(results))
    with (
        tempfile.TemporaryDirectory() as own,
        subprocess.Popen(
            line, env=ENVIRONMENT | {"TMPDIR": own}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as process,
    ):
        if after_checkpoint:
            wait_until(lambda: process.poll() is not None or set(checkpoint_files(results)) - before)
        time.sleep(pause)
        process.send_signal(number)
        output, _ = process.communicate(timeout=TIMEOUT)
    return process.returncode, output


@pytest.mark.slow
def test_a_run_that_is_killed_at_random_moments_ends_as_the_undisturbed_run(
    train_once: TrainOnce, slower_flags: Flags, results: Path, pytestconfig: pytest.Config, framework: str
) -> None:
    """SIGKILL leaves no time to clean up. Every second one may come before the run has done or resumed anything."""
    undisturbed = train_once(framework, *SLOWER).results
    line = command_line(f"train_{framework}", *slower_flags, *OFTEN)
    chance = np.random.default_rng()

    def line_to_go_on() -> list[str]:
        return [*line, "--resume"] if checkpoint_files(results) else line

    for kill in range(pytestconfig.getoption("kills")):
        early = kill % 2 == 1
        pause = chance.uniform(0, 4 if early else 0.5)
        status, output = signal_a_run(line_to_go_on(), results, signal.SIGKILL, pause, after_checkpoint=not early)
        assert status in (-signal.SIGKILL, 0), output
        if status == 0:  # the run was faster than the signal
            assert_same_run(results, undisturbed)
            shutil.rmtree(results)
    finish(line_to_go_on())
    assert len(checkpoint_files(results)) == 2
    assert_same_run(results, undisturbed)


@pytest.mark.extended
@pytest.mark.parametrize(
    ("framework", "number"), [("jax", signal.SIGINT), pytest.param("torch", signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_a_run_that_is_asked_to_stop_saves_and_says_how_to_go_on(
    train_once: TrainOnce, slower_flags: Flags, results: Path, framework: str, number: int
) -> None:
    line = command_line(f"train_{framework}", *slower_flags, *OFTEN)
    status, output = signal_a_run(line, results, number, 0, after_checkpoint=True)
    assert status == 128 + number, output
    words = shlex.split(output.splitlines()[-1].partition("stopped, and saved. To go on: ")[2])
    assert words[0] == "python"
    assert words[-1] == "--resume"
    assert "going on after step" in finish([sys.executable, *words[1:]])
    assert_same_run(results, train_once(framework, *SLOWER).results)


def test_a_second_signal_ends_a_run_at_once() -> None:
    """The run ends even if its step never does."""
    code = (
        "import os, signal, time; from jax_cnn.run.command_line import postponed_interrupts\n"
        "with postponed_interrupts() as signal_received:\n"
        "    os.kill(os.getpid(), signal.SIGINT); print(signal_received(), flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGTERM); time.sleep(600)"
    )
    done = run_python(code)
    assert (done.returncode, done.stdout, done.stderr) == (128 + signal.SIGTERM, f"{signal.SIGINT:d}\n", "")


def damage_the_newest(results: Path) -> list[str]:
    """Flip a bit in the newest checkpoint; return what the command has to say about it."""
    (_, newest), (step, _) = checkpoint_files(results)
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    return [f"passing over {newest}: its contents do not match its checksum", f"going on after step {step}"]


def make_older(results: Path) -> list[str]:
    """Store the checkpoints as an earlier version did: without new flags, and with one that has gone since."""
    for _, path in checkpoint_files(results):
        checkpoint = load_checkpoint(path)
        for flag in ("hidden", "dialect"):
            del checkpoint.run["config"][flag]
        checkpoint.run["config"]["seeds"] = 1
        save_checkpoint(path, checkpoint)
    return ["going on after step 134"]


def move_to_another_machine(results: Path) -> list[str]:
    """Store the checkpoints as if another processor and another optax had made them."""
    for _, path in checkpoint_files(results):
        checkpoint = load_checkpoint(path)
        checkpoint.run["machine"]["cpu"] = "abacus"
        checkpoint.run["versions"]["optax"] = "0.0"
        save_checkpoint(path, checkpoint)
    return ["not as it was: cpu was abacus, not ", "optax was 0.0, not ", "may differ in their last bits"]


@pytest.mark.extended
@pytest.mark.parametrize("change", [damage_the_newest, make_older, move_to_another_machine])
def test_a_run_is_resumed_from_a_changed_checkpoint_and_says_what_matters(
    train_once: TrainOnce, finished: Path, resume: Resume, change: Callable[[Path], list[str]]
) -> None:
    messages = change(finished)
    done = resume()
    assert (done.returncode, done.stderr) == (0, "")
    assert all(message in done.stdout for message in messages), done.stdout
    assert ("not as it was" in done.stdout) == (change is move_to_another_machine)
    assert_same_run(finished, train_once("jax", *SMALL).results)


@pytest.mark.extended
def test_a_finished_run_continues_to_more_epochs_as_if_they_had_been_asked_for_at_once(
    train_once: TrainOnce, finished: Path, resume: Resume
) -> None:
    assert resume("--epochs", 3).returncode == 0
    assert_same_run(finished, train_once("jax", *SMALL, "--epochs", "3").results)


def test_another_run_is_refused_and_the_old_one_stays(finished: Path, flags: Flags, resume: Resume) -> None:
    before = contents(finished)
    done = resume(framework="torch")
    assert_user_error(done, "framework was jax, not torch")
    assert done.stdout == "", "refused after work was done"
    for more, message in (
        ("--batch-size 32", "batch-size was 16, not 32"),
        ("--learning-rate 2e-3 --seed 1", "learning-rate was 0.001, not 0.002; seed was 0, not 1"),
        ("--precision bfloat16", "precision was float32, not bfloat16"),
        ("--model mlp --hidden 20", "hidden was 512, not 20"),
        ("--model cnn", "model was mlp, not cnn"),
        ("--epochs 1", "has finished 2 epochs, more than --epochs 1"),
    ):
        config = parse(JaxTrainConfig(), "", [*flags, "--resume", *more.split()])
        with pytest.raises(UserError, match=message):
            find_checkpoint(config, "jax", pytest.fail)
    assert contents(finished) == before


def test_a_run_goes_on_in_another_dialect(finished: Path, flags: Flags) -> None:
    """All dialects compute the same bits (`test_dialects.py`)."""
    config = parse(JaxTrainConfig(), "", [*flags, "--resume", "--epochs", "3", "--dialect", "plain"])
    assert find_checkpoint(config, "jax", pytest.fail)


def test_two_runs_do_not_write_into_one_folder(finished: Path) -> None:
    before = contents(finished)
    with FileLock(finished / ".lock"):
        for resume in (False, True):
            with pytest.raises(UserError, match=f"--out-dir {finished}: another run is writing there; wait, or"):
                RunFolder(finished, print, resume=resume)
    assert contents(finished) == before


def test_a_full_disk_is_one_line_and_keeps_the_last_good_checkpoint(finished: Path, flags: Flags) -> None:
    """A limit on the size of files stands in for the disk: a checkpoint does not fit, metrics and weights do."""
    before = checkpoint_files(finished)
    limited = "import os, resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000))"
    line = command_line("train_jax", *flags, "--epochs", 3, "--resume")
    line = [sys.executable, "-c", f"{limited}; os.execv(sys.argv[1], sys.argv[1:])", *line]
    done = subprocess.run(line, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert_user_error(done, f"--out-dir {finished}: cannot write there (File too large); choose another folder")
    assert checkpoint_files(finished) == before
    assert all(load_checkpoint(path) for _, path in before)
    assert not list(finished.glob("*.tmp"))


def test_a_file_that_a_kill_left_unfinished_is_removed_by_the_next_run(tmp_path: Path) -> None:
    unfinished = [tmp_path / f"{name}.tmp" for name in ("checkpoint-000000004.safetensors", "weights.safetensors")]
    for path in (*unfinished, tmp_path / "notes.tmp"):
        path.touch()
    with RunFolder(tmp_path, print, resume=True):
        assert not any(path.exists() for path in unfinished)
    assert (tmp_path / "notes.tmp").exists()  # not a file of a run


@pytest.mark.extended
def test_a_folder_that_is_taken_away_is_one_line(flags: Flags, results: Path, tmp_path: Path) -> None:
    line = command_line("train_torch", *flags, *OFTEN)
    with subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        wait_until(lambda: process.poll() is not None or checkpoint_files(results))
        results.rename(tmp_path / "elsewhere")
        _, errors = process.communicate(timeout=TIMEOUT)
    done = subprocess.CompletedProcess(line, process.returncode, "", errors)
    assert_user_error(done, f"--out-dir {results}: cannot write there (No such file or directory)")
    assert any(load_checkpoint(path) for _, path in checkpoint_files(tmp_path / "elsewhere"))


@pytest.mark.extended
def test_a_loss_that_is_no_longer_a_number_stops_the_run_at_its_step(
    flags: Flags, results: Path, tmp_path: Path, framework: str
) -> None:
    done = run_command(f"train_{framework}", *flags, *OFTEN, "--learning-rate", "1e30", cwd=tmp_path)
    assert_user_error(done, "became", "step", "with --learning-rate 1e+30: try a smaller one")
    for _, path in checkpoint_files(results):
        load_checkpoint(path)  # which refuses numbers that are not finite


def example(weights: TorchDict) -> Checkpoint:
    """Return a checkpoint with these weights, after seven steps."""
    first, second = ({name: np.full_like(array, value) for name, array in weights.items()} for value in (1e-3, 1e-6))
    progress = Progress(epoch=1, steps=3, loss_sum=0.1 + 0.2, seconds=1.5, rows=[{"epoch": 1}])
    return Checkpoint(AdamState(weights, first, second, 7), progress, {"framework": "jax"})


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("network", [CNN, Network("mlp", 20), Network("mlp", 2050), Network("linear")], ids=str)
def test_a_checkpoint_comes_back_bit_by_bit(network: Network, dtype: str, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    weights = {name: generator.normal(size=leaf.shape).astype(dtype) for name, leaf in layout_of(network).items()}
    checkpoint = example(weights)
    save_checkpoint(tmp_path / "saved", checkpoint)
    loaded = load_checkpoint(tmp_path / "saved")
    assert (loaded.progress, loaded.run, loaded.state.step) == (checkpoint.progress, checkpoint.run, 7)
    for actual, expected in zip(loaded.state[:3], checkpoint.state[:3], strict=True):
        assert actual.keys() == expected.keys()
        assert all(actual[name].dtype == dtype and np.array_equal(actual[name], expected[name]) for name in actual)
    assert os.listdir(tmp_path) == ["saved"]


def test_a_checkpoint_with_nan_or_of_another_format_is_refused(
    torch_weights: TorchDict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = example(torch_weights)
    checkpoint.state.weights["fc2.bias"][3] = np.nan
    save_checkpoint(tmp_path / "nan", checkpoint)
    with pytest.raises(Unusable, match=r"tensor fc2\.bias holds NaN"):
        load_checkpoint(tmp_path / "nan")
    with monkeypatch.context() as patch:
        patch.setattr("jax_cnn.checkpoint.FORMAT", "0")
        save_checkpoint(tmp_path / "old", checkpoint)
    with pytest.raises(Unusable, match="it has format '0', and this version reads '1'"):
        load_checkpoint(tmp_path / "old")

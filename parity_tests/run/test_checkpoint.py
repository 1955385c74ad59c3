"""Nothing lost: a run that is stopped and resumed, as often as one likes, is the run that was never stopped."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock
from safetensors.numpy import load_file

from jax_cnn.checkpoint import AdamState, Checkpoint, Progress, Unusable, load_checkpoint, save_checkpoint
from jax_cnn.run.resume import checkpoint_files
from jax_cnn.torch_layout import TorchDict
from parity_tests.support import ROOT

SCRIPTS = ("jax", "torch")
TIMEOUT = 300.0  # seconds, on a machine that is busy with other things
# 66 batches, of which JAX does 64 in one call, and one of 32 images: three places to stop in an epoch.
SMALL = ("--epochs", "2", "--limit-train", str(66 * 64 + 32), "--limit-test", "100", "--device", "cpu")
OFTEN = ("--checkpoint-seconds", "0.1")
TIMES = {"train_seconds", "eval_seconds", "compile_seconds", "images_per_second"}

Train = Callable[[str], Path]  # by the name of the script -> the folder of an uninterrupted run

both_scripts = pytest.mark.parametrize("script", SCRIPTS)


def command(script: str, *flags: object) -> list[str]:
    """What a person types."""
    return [sys.executable, str(ROOT / "scripts" / f"train_{script}.py"), *map(str, flags)]


def finish(line: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, its output caught."""
    return subprocess.run(line, capture_output=True, text=True, timeout=TIMEOUT, **options)


@pytest.fixture(scope="module")
def uninterrupted(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Train:
    """A run without a stop; made once for each framework."""

    @cache
    def train(script: str) -> Path:
        results = tmp_path_factory.mktemp(script)
        done = finish(command(script, *SMALL, "--data-dir", data_dir, "--out-dir", results))
        assert (done.returncode, done.stderr) == (0, "")
        return results

    return train


def stop_after_a_checkpoint(line: list[str], results: Path, number: int, pause: float) -> tuple[int, str]:
    """Start a command, wait for a new checkpoint and then a little, and send it a signal.

    Its temporary files are cleared away after it: who is killed cannot, and torchvision 0.23 makes some when it loads.
    """
    before = {path for _, path in checkpoint_files(results)}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with (
        tempfile.TemporaryDirectory() as own,
        subprocess.Popen(line, env=os.environ | {"TMPDIR": own}, **pipes) as process,
    ):
        ends = time.monotonic() + TIMEOUT
        while time.monotonic() < ends and process.poll() is None:
            if {path for _, path in checkpoint_files(results)} - before:
                break
            time.sleep(0.002)
        time.sleep(pause)
        process.send_signal(number)
        output, _ = process.communicate(timeout=TIMEOUT)
    return process.returncode, output


def assert_same_run(results: Path, expected: Path) -> None:
    """Bit-identical weights, and the same metrics of each epoch once."""
    ours, theirs = (load_file(folder / "weights.safetensors") for folder in (results, expected))
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        assert np.array_equal(array, theirs[name]), f"{name} differs"
    assert metrics(results) == metrics(expected)
    assert not list(results.glob("*.tmp"))


def metrics(results: Path) -> list[dict[str, float]]:
    """What a run measured, without the times."""
    rows = [json.loads(line) for line in (results / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


@both_scripts
def test_a_run_that_is_killed_twice_ends_as_if_it_had_not_been(
    uninterrupted: Train, data_dir: Path, tmp_path: Path, script: str
) -> None:
    """SIGKILL leaves no time to clean up; when it comes is chance."""
    line = command(script, *SMALL, *OFTEN, "--data-dir", data_dir, "--out-dir", tmp_path)
    chance = np.random.default_rng()
    for resume in ([], ["--resume"]):
        status, output = stop_after_a_checkpoint([*line, *resume], tmp_path, signal.SIGKILL, chance.uniform(0, 0.2))
        assert status in (-signal.SIGKILL, 0), output
    done = finish([*line, "--resume"])
    assert (done.returncode, done.stderr) == (0, "")
    assert "going on after step" in done.stdout
    assert len(list(checkpoint_files(tmp_path))) == 2
    assert_same_run(tmp_path, uninterrupted(script))


@pytest.mark.parametrize(("script", "number"), [("jax", signal.SIGINT), ("torch", signal.SIGTERM)])
def test_a_run_that_is_asked_to_stop_saves_and_says_how_to_go_on(
    uninterrupted: Train, data_dir: Path, tmp_path: Path, script: str, number: int
) -> None:
    line = command(script, *SMALL, *OFTEN, "--data-dir", data_dir, "--out-dir", tmp_path)
    status, output = stop_after_a_checkpoint(line, tmp_path, number, 0)
    assert status == 128 + number, output
    said = output.splitlines()[-1].partition("stopped, and saved. To go on: ")[2]
    words = shlex.split(said)
    assert words[0] == "python"
    assert words[-1] == "--resume"
    done = finish([sys.executable, *words[1:]])
    assert (done.returncode, done.stderr) == (0, "")
    assert_same_run(tmp_path, uninterrupted(script))


def test_a_second_signal_ends_a_run_at_once() -> None:
    """Even one whose step never ends."""
    code = (
        "import os, signal, time; from jax_cnn.run.command_line import postponed_interrupts\n"
        "with postponed_interrupts() as signal_received:\n"
        "    os.kill(os.getpid(), signal.SIGINT); print(signal_received(), flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGTERM); time.sleep(600)"
    )
    started = time.monotonic()
    done = finish([sys.executable, "-c", code], cwd=ROOT)
    assert (done.returncode, done.stdout, done.stderr) == (128 + signal.SIGTERM, f"{signal.SIGINT:d}\n", "")
    assert time.monotonic() - started < 60


@pytest.fixture
def finished(uninterrupted: Train, tmp_path: Path) -> Path:
    """A copy of JAX's finished run, to be spoiled."""
    return Path(shutil.copytree(uninterrupted("jax"), tmp_path / "run"))


def resume(results: Path, data_dir: Path, *flags: object) -> subprocess.CompletedProcess[str]:
    """Resume JAX's run."""
    return finish(command("jax", *SMALL, "--data-dir", data_dir, "--out-dir", results, "--resume", *flags))


def test_a_damaged_checkpoint_is_named_and_passed_over(uninterrupted: Train, finished: Path, data_dir: Path) -> None:
    (_, newest), (_, older) = checkpoint_files(finished)
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    done = resume(finished, data_dir)
    assert (done.returncode, done.stderr) == (0, "")
    assert f"passing over {newest}: its contents do not match its checksum" in done.stdout
    assert f"going on after step {load_checkpoint(older).state.step}" in done.stdout
    assert_same_run(finished, uninterrupted("jax"))


def test_a_finished_run_goes_on_to_more_epochs_as_if_it_had_been_asked_for_them_at_once(
    finished: Path, data_dir: Path, tmp_path: Path
) -> None:
    assert resume(finished, data_dir, "--epochs", 3).returncode == 0
    at_once = command("jax", *SMALL, "--epochs", 3, "--data-dir", data_dir, "--out-dir", tmp_path / "at once")
    assert finish(at_once).returncode == 0
    assert_same_run(finished, tmp_path / "at once")


def test_a_checkpoint_from_before_a_flag_was_there_is_read(
    uninterrupted: Train, finished: Path, data_dir: Path
) -> None:
    """It had the default then."""
    for _, path in checkpoint_files(finished):
        checkpoint = load_checkpoint(path)
        for flag in ("model", "hidden", "dialect"):
            del checkpoint.run["config"][flag]
        save_checkpoint(path, checkpoint)
    done = resume(finished, data_dir)
    assert (done.returncode, done.stderr) == (0, "")
    assert "not as it was" not in done.stdout
    assert_same_run(finished, uninterrupted("jax"))
    done = resume(finished, data_dir, "--model", "linear")
    assert done.returncode == 2
    assert "model was cnn, not linear" in done.stderr


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (("--batch-size", 32), "batch-size was 64, not 32"),
        (("--learning-rate", "2e-3", "--seed", 1), "learning-rate was 0.001, not 0.002; seed was 0, not 1"),
        (("--precision", "bfloat16"), "precision was float32, not bfloat16"),
        (("--epochs", 1), "has finished 2 epochs, more than --epochs 1"),
    ],
)
def test_another_run_is_refused_and_the_old_one_stays(
    finished: Path, data_dir: Path, flags: tuple[object, ...], complaint: str
) -> None:
    before = {path.name: path.read_bytes() for path in finished.iterdir()}
    done = resume(finished, data_dir, *flags)
    assert done.returncode == 2
    assert complaint in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == "", "refused after work was done"
    assert {path.name: path.read_bytes() for path in finished.iterdir()} == before


def test_without_a_checkpoint_there_is_nothing_to_resume(data_dir: Path, tmp_path: Path) -> None:
    done = resume(tmp_path, data_dir)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: --resume: no usable checkpoint in {tmp_path}; leave --resume out")
    assert done.stderr.count("\n") == 1


def test_two_runs_do_not_write_into_one_folder(finished: Path, data_dir: Path) -> None:
    before = {path.name: path.read_bytes() for path in finished.iterdir()}
    with FileLock(finished / ".lock"):
        for flags in ((), ("--resume",)):
            done = finish(command("jax", *SMALL, "--data-dir", data_dir, "--out-dir", finished, *flags))
            assert done.returncode == 2
            assert done.stderr.startswith(f"error: --out-dir {finished}: another run is writing there; wait, or")
            assert done.stderr.count("\n") == 1
    assert {path.name: path.read_bytes() for path in finished.iterdir()} == before


def test_a_disk_that_fills_up_is_one_line_and_keeps_the_last_good_checkpoint(finished: Path, data_dir: Path) -> None:
    """A limit on the size of files stands in for the disk: a checkpoint does not fit, metrics and weights do."""
    before = list(checkpoint_files(finished))
    limit = 8_000_000
    limited = f"import os, resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))"
    line = command("jax", *SMALL, "--epochs", 3, "--data-dir", data_dir, "--out-dir", finished, "--resume")
    done = finish([sys.executable, "-c", f"{limited}; os.execv(sys.argv[1], sys.argv[1:])", *line])
    assert done.returncode == 2, done.stderr
    assert done.stderr == f"error: --out-dir {finished}: cannot write there (File too large); choose another folder\n"
    assert list(checkpoint_files(finished)) == before
    assert all(load_checkpoint(path) for _, path in before)
    assert not list(finished.glob("*.tmp"))


def test_a_folder_that_is_taken_away_is_one_line(data_dir: Path, tmp_path: Path) -> None:
    results = tmp_path / "results"
    line = command("torch", *SMALL, *OFTEN, "--data-dir", data_dir, "--out-dir", results)
    with subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        while not results.exists() or not list(checkpoint_files(results)):
            assert process.poll() is None
            time.sleep(0.01)
        results.rename(tmp_path / "elsewhere")
        _, errors = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 2, errors
    assert errors.startswith(f"error: --out-dir {results}: cannot write there (No such file or directory)")
    assert errors.count("\n") == 1
    assert any(load_checkpoint(path) for _, path in checkpoint_files(tmp_path / "elsewhere"))


@both_scripts
def test_a_loss_that_is_lost_stops_the_run_at_its_step(data_dir: Path, tmp_path: Path, script: str) -> None:
    line = command(script, *SMALL, *OFTEN, "--data-dir", data_dir, "--out-dir", tmp_path, "--learning-rate", "1e30")
    done = finish(line)
    assert done.returncode == 2, done.stderr
    assert "with --learning-rate 1e+30: try a smaller one" in done.stderr
    assert "became" in done.stderr
    assert "step" in done.stderr
    assert done.stderr.count("\n") == 1
    for _, path in checkpoint_files(tmp_path):
        load_checkpoint(path)  # which refuses what is not finite


def example(weights: TorchDict) -> Checkpoint:
    """A checkpoint after a step."""
    first, second = ({name: np.full_like(array, value) for name, array in weights.items()} for value in (1e-3, 1e-6))
    progress = Progress(epoch=1, steps=3, loss_sum=0.1 + 0.2, seconds=1.5, rows=[{"epoch": 1}])
    return Checkpoint(AdamState(weights, first, second, 7), progress, {"framework": "jax"})


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_checkpoint_comes_back_bit_by_bit(torch_weights: TorchDict, tmp_path: Path, dtype: str) -> None:
    checkpoint = example({name: array.astype(dtype) for name, array in torch_weights.items()})
    save_checkpoint(tmp_path / "saved", checkpoint)
    back = load_checkpoint(tmp_path / "saved")
    assert (back.progress, back.run, back.state.step) == (checkpoint.progress, checkpoint.run, 7)
    for part in ("weights", "first_moment", "second_moment"):
        ours, theirs = getattr(back.state, part), getattr(checkpoint.state, part)
        assert ours.keys() == theirs.keys()
        assert all(ours[name].dtype == dtype and np.array_equal(ours[name], theirs[name]) for name in ours)
    assert os.listdir(tmp_path) == ["saved"]


def test_a_checkpoint_with_nan_or_of_another_format_is_refused(torch_weights: TorchDict, tmp_path: Path) -> None:
    checkpoint = example(torch_weights)
    checkpoint.state.weights["fc2.bias"][3] = np.nan
    save_checkpoint(tmp_path / "nan", checkpoint)
    with pytest.raises(Unusable, match=r"tensor fc2\.bias holds NaN"):
        load_checkpoint(tmp_path / "nan")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("jax_cnn.checkpoint.FORMAT", "0")
        save_checkpoint(tmp_path / "old", checkpoint)
    with pytest.raises(Unusable, match="it has format '0', and this version reads '1'"):
        load_checkpoint(tmp_path / "old")

"""Fetching Fashion-MNIST in processes of their own: at the same time, killed, on a full disk."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from jax_cnn.data import load_fashion_mnist, prepare_fashion_mnist
from jax_cnn.data.files import FILES
from jax_cnn.data.sources import Source
from parity_tests.data.data_files import COMPLETE, listing
from parity_tests.support import ROOT, wait_until


def start_python(code: str, *arguments: object) -> subprocess.Popen[str]:
    """Start a Python process in the repository."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def output_of(process: subprocess.Popen[str]) -> str:
    """Wait for a process to succeed, and return its output."""
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    return output


def test_importing_and_loading_load_no_framework(data_dir: Path) -> None:
    code = """if True:
        import sys
        from pathlib import Path
        from jax_cnn.data import load_fashion_mnist
        data = load_fashion_mnist(Path(sys.argv[1]))
        print(len(data.train_labels), {"torch", "torchvision", "jax", "jaxlib"} & set(sys.modules))
    """
    assert output_of(start_python(code, data_dir)) == "60000 set()\n"


# Fetching at the same time, and being killed

# Arguments: the data folder, the good files, a file that the source makes when it is asked, a file that it waits for,
# and what the kernel does after a million bytes of a file: "kill" the process, "refuse" the rest, or "nothing".
PREPARE = """if True:
    import resource, shutil, signal, sys, time
    from pathlib import Path
    from jax_cnn.config import UserError
    from jax_cnn.data import prepare_fashion_mnist
    from jax_cnn.data.sources import Source

    data_dir, good, asked, go_on = map(Path, sys.argv[1:5])
    if sys.argv[5] != "nothing":
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL if sys.argv[5] == "kill" else signal.SIG_IGN)

    def fetch(names, workdir):
        shutil.copy(good / names[-1], workdir)
        with asked.open("a") as file:
            file.write("asked\\n")
        while not go_on.exists():
            time.sleep(0.01)
        for name in names[:-1]:
            (workdir / name).symlink_to(good / name)
        return workdir

    try:
        prepare_fashion_mnist(data_dir, lambda line: print(line, flush=True), [Source("the slow one", fetch)])
    except UserError as error:
        print(error)
"""


def test_one_of_two_processes_fetches_and_the_other_waits(good: Path, tmp_path: Path) -> None:
    data_dir, asked, go_on = tmp_path / "data", tmp_path / "asked", tmp_path / "go on"
    first = start_python(PREPARE, data_dir, good, asked, go_on, "nothing")
    wait_until(asked.exists)
    second = start_python(PREPARE, data_dir, good, asked, go_on, "nothing")
    assert second.stdout is not None
    assert "waiting for another process" in second.stdout.readline()
    go_on.touch()
    assert output_of(first).endswith(f"Fashion-MNIST: {', '.join(FILES)} taken from the slow one\n")
    assert output_of(second) == ""
    assert asked.read_text() == "asked\n"
    assert listing(data_dir) == COMPLETE


def test_a_process_killed_while_it_fetches_leaves_no_lock_and_no_half_file(
    good: Path, shelf: Source, tmp_path: Path
) -> None:
    data_dir, asked = tmp_path / "data", tmp_path / "asked"
    process = start_python(PREPARE, data_dir, good, asked, tmp_path / "never", "nothing")
    wait_until(asked.exists)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert listing(data_dir / "FashionMNIST" / "raw") == []
    assert (data_dir / ".fashion_mnist.partial").exists(), "nothing was left for the next run to clear"
    load_fashion_mnist(data_dir, lambda line: None, [shelf])
    assert listing(data_dir) == COMPLETE


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="no limit on file sizes here")
@pytest.mark.parametrize("reaction", ["kill", "refuse"])
def test_a_write_cut_short_leaves_no_half_file(good: Path, shelf: Source, tmp_path: Path, reaction: str) -> None:
    """After a million bytes of a file the kernel kills the process, or refuses the rest as it does on a full disk."""
    data_dir = tmp_path / "data"
    process = start_python(PREPARE, data_dir, good, tmp_path / "asked", tmp_path, reaction)
    output, errors = process.communicate(timeout=60)
    files = listing(data_dir / "FashionMNIST" / "raw")
    if reaction == "kill":
        assert process.returncode == -signal.SIGXFSZ, errors
        assert len(files) == 1
        assert not set(files) & set(FILES)
    else:
        assert "cannot be put there" in output, errors
        assert "File too large" in output
        assert files == []
    prepare_fashion_mnist(data_dir, lambda line: None, [shelf])
    assert listing(data_dir) == COMPLETE

"""The endurance test, for an hour; and that it would notice."""

import subprocess
import sys
from pathlib import Path

import pytest

from parity_tests.harness.soak import Tally

ROOT = Path(__file__).parents[1]


def sound() -> Tally:
    """What an hour without a fault leaves behind."""
    memory = {"jax": [500, 510, 495, 505, 500, 503], "torch": [800, 790, 805, 800, 795, 801]}
    files = {"jax": [9] * 6, "torch": [12] * 6}
    return Tally(6, 24, 5, 0, memory, files, dict(memory), dict(files))  # dictionaries of their own, to be spoiled


def test_a_sound_hour_passes_and_each_fault_is_named() -> None:
    assert sound().verdict() == []
    assert Tally().verdict() == ["no round was finished"]
    leaking, forgetting, slowly, other = sound(), sound(), sound(), sound()
    leaking.peak_bytes["torch"] = [800, 850, 900, 950, 1000, 1050]
    forgetting.open_files["jax"] = [9, 10, 11, 12, 13, 14]
    slowly.endless_bytes["jax"] = [500, 520, 540, 560, 580, 600]
    slowly.endless_files["torch"] = [12, 12, 12, 13, 14, 15]
    other.other_results = 1
    assert leaking.verdict() == ["torch's memory grew from 850 to 1050"]
    assert forgetting.verdict() == ["jax's open files grew from 10 to 14"]
    assert slowly.verdict() == [
        "jax's memory in its endless run grew from 520 to 600",
        "torch's open files in its endless run grew from 12 to 15",
    ]
    assert other.verdict() == ["1 runs ended with other weights or another prediction"]


@pytest.mark.slow
def test_an_hour_of_kills_changes_nothing(data_dir: Path, tmp_path: Path) -> None:
    line = [sys.executable, str(ROOT / "scripts" / "soak.py"), "--data-dir", str(data_dir), "--out-dir", str(tmp_path)]
    done = subprocess.run(line, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr

"""The speed benchmark: what it counts, how it judges, and that the command does as it says. No speed is tested."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
from rich.console import Console

from experiments.speed import benchmark, flop, sections
from experiments.speed.contenders import DOTS, Task, Unavailable
from experiments.speed.progress import Show, Steps
from experiments.speed.settings import QUICK, BenchmarkConfig, planned
from experiments.speed.tables import short
from experiments.speed.team import Json, Team, WorkerFailed
from experiments.speed.work import DOT_FLOP
from experiments.spread import paired_ratios, spread, turns
from jax_cnn.config import UserError
from parity_tests.support import ROOT

TIMEOUT = 300.0  # seconds for a small run, on a machine that is busy with other things
IDLE_BOUND = 0.1  # seconds of CPU while others have their turn, in 2 rounds. Worst seen: 0.004, with threads that spin

# --- Counting and judging ---


def test_a_step_of_64_images_needs_as_many_operations_as_counted_by_hand() -> None:
    by_hand = {  # 2 (multiply, add) x inputs of an output x outputs x passes, for one image
        "conv1": 2 * (3 * 3 * 1) * (32 * 28 * 28) * 2,  # forward, weights
        "conv2": 2 * (3 * 3 * 32) * (64 * 14 * 14) * 3,  # forward, weights, input
        "fc1": 2 * (7 * 7 * 64) * 512 * 3,
        "fc2": 2 * 512 * 10 * 3,
    }
    assert flop.layer_flop(64) == {layer: 64 * count for layer, count in by_hand.items()}
    assert flop.step_flop(64) == pytest.approx(2.06e9, rel=0.005)


def test_a_gradient_by_the_images_would_be_counted_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flop, "NO_INPUT_GRADIENT", None)
    assert flop.step_flop(64) != pytest.approx(2.06e9, rel=0.005)


def test_median_and_quartiles_are_those_of_the_rounds() -> None:
    assert spread([5, 1, 4, 2, 3]) == (5, 3.0, 2.0, 4.0, 1.0, 5.0)


@pytest.mark.parametrize("values", [[], [1.0, float("nan")]], ids=["none", "not a number"])
def test_no_median_is_made_up(values: list[float]) -> None:
    with pytest.raises(ValueError, match="no median"):
        spread(values)


def test_what_slows_a_whole_round_cancels_out_in_pairs() -> None:
    busy = np.random.default_rng(0).uniform(1, 5, size=9)
    fast, slow = (1.0 * busy).tolist(), (2.5 * busy).tolist()
    assert spread(paired_ratios(slow, fast)) == pytest.approx((9, 2.5, 2.5, 2.5, 2.5, 2.5))
    assert max(slow) / min(fast) > 5, "unpaired, the ratio could be anything"
    with pytest.raises(ValueError, match="shorter"):
        paired_ratios(slow, fast[1:])


def test_everyone_goes_first_second_and_last() -> None:
    order = turns("abc", 4)
    assert order == [["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"], ["a", "b", "c"]]


# --- The contest, with planted contenders ---

PLANTED = {"jax": 1.0, "torch-adam": 3.0, "torch-fused": 2.0, "torch-course": 0.5, "jax-dot": 0.2, "torch-dot": 0.1}


def planted_measure(seconds: dict[str, float]) -> Callable[[Sequence[Task], int, Show], dict[str, Json]]:
    """Contenders that take so many seconds a round, times what all of a round share; a missing one cannot run."""

    def answer(name: str, number: int) -> Json:
        measured = seconds[name] * (1 + number)
        return {"seconds": measured, "cpu_seconds": 2 * measured, "idle_cpu_seconds": 0.0, "peak_bytes": 2**20}

    def measure(tasks: Sequence[Task], rounds: int, show: Show) -> dict[str, Json]:
        return {
            task.contender: {"start": {}, "rounds": [answer(task.contender, number) for number in range(rounds)]}
            if task.contender in seconds
            else {"unavailable": "no compiler"}
            for task in tasks
        }

    return measure


def planted_contest(seconds: dict[str, float], *contenders: Any) -> Json:
    """The contest among them."""
    config = BenchmarkConfig(rounds=3, steps=10, contenders=contenders)
    return sections.contest(config, print, planted_measure(seconds))


def test_the_fastest_pytorch_that_competes_is_the_best() -> None:
    contest = planted_contest(PLANTED, "jax", "torch-adam", "torch-fused", "torch-compile", "torch-course")
    assert contest["best_torch"] == "torch-fused", "the course's loop does not compete, a missing one cannot"
    lines = contest["contenders"]
    speeds = {name: line["speed_to_best_torch"]["median"] for name, line in lines.items() if "rounds" in line}
    assert speeds == pytest.approx({"jax": 2, "torch-adam": 2 / 3, "torch-fused": 1, "torch-course": 4})
    assert lines["jax"]["ms_per_step"]["median"] == pytest.approx(200)  # the second of three rounds: 2 s, 10 steps
    assert lines["jax"]["images_per_second"]["median"] == pytest.approx(320)
    assert lines["torch-compile"]["unavailable"] == "no compiler"


def test_a_contender_planted_to_be_slower_shows_as_just_as_much_slower() -> None:
    contests = [
        planted_contest(PLANTED | {"jax": factor}, "jax", "torch-adam", "torch-fused")["contenders"]["jax"]
        for factor in (1.0, 1.3)
    ]
    for figure, expected in (("speed_to_best_torch", 1 / 1.3), ("times_floor", 1.3), ("ms_per_step", 1.3)):
        assert contests[1][figure]["median"] / contests[0][figure]["median"] == pytest.approx(expected)


def test_the_floor_is_the_steps_operations_at_the_faster_product_of_the_same_round() -> None:
    contest = planted_contest(PLANTED, "jax", "torch-fused")
    floor = contest["floor"]
    assert floor["fastest_dot"] == "torch-dot"
    assert floor["rounds_ms_per_step"] == pytest.approx(
        [1e3 * flop.step_flop(64) / DOT_FLOP * t for t in (0.1, 0.2, 0.3)]
    )
    assert contest["contenders"]["jax"]["times_floor"]["median"] == pytest.approx(100 / floor["rounds_ms_per_step"][0])


def test_without_any_pytorch_there_is_nothing_to_tell() -> None:
    with pytest.raises(UserError, match="torch-compile: no compiler"):
        planted_contest(PLANTED, "jax", "torch-compile")


def test_quick_leaves_alone_what_was_asked_for() -> None:
    config = planned(BenchmarkConfig(quick=True, command_runs=1))
    assert config.command_runs == 1
    changed = {field.name for field in fields(config) if getattr(config, field.name) != field.default}
    assert changed == set(QUICK) | {"quick"}
    assert planned(BenchmarkConfig()) == BenchmarkConfig()


# --- What a person sees ---


def test_a_terminal_gets_a_bar_and_a_pipe_gets_lines() -> None:
    shown = {}
    for terminal in (True, False):
        console = Console(file=io.StringIO(), force_terminal=terminal, width=80)
        with Steps(console) as steps:
            steps.section("batch sizes", 1, 6)
            steps.show("round 2 of 5")
        shown[terminal] = console.file.getvalue()  # type: ignore[attr-defined]  # it is the StringIO of above
    assert "batch sizes" in shown[True]
    assert "\x1b[?25h" in shown[True], "the cursor stays hidden"
    assert shown[False] == "2 of 6: batch sizes\n"


def test_the_growth_chart_draws_what_was_measured(tmp_path: Path) -> None:
    config = BenchmarkConfig(rounds=3, steps=10)
    measure = planted_measure(PLANTED)
    points = sections.growth(config, "torch-fused", [{"batch_size": size} for size in (16, 64)], 3, print, measure)
    assert [point["jax_speed_to_torch"]["median"] for point in points] == [2, 2]
    assert [point["contenders"]["jax"]["steps"] for point in points] == [40, 10]
    contest = planted_contest(PLANTED, "jax", "torch-fused")
    result = benchmark.NOTHING | {"contest": contest, "batch_sizes": points}
    assert benchmark.draw(result, tmp_path) == list(benchmark.FILES)
    assert_picture(tmp_path / benchmark.GROWTH)


def assert_picture(path: Path) -> None:
    """Hold a file to be a picture with something on it."""
    picture = matplotlib.image.imread(path)
    assert picture.shape[1] > 500
    assert picture[..., :3].std() > 0.01


# --- The command ---

CONTENDING = ("jax", "torch-fused")
NO_SECTIONS = ("--batch-sizes", "--thread-counts", "--train-sizes", "--stage-rounds", "0", "--command-runs", "0")


def command(*arguments: object) -> list[str]:
    """What a person types."""
    return [sys.executable, str(ROOT / "scripts" / "benchmark.py"), *map(str, arguments)]


class Run:
    """A small benchmark that has ended well, over an earlier one."""

    def __init__(self, data_dir: Path, folder: Path) -> None:
        self.folder = folder
        (folder / benchmark.RESULT).write_text("an earlier one")
        arguments = ("--rounds", 2, "--steps", 2, "--contenders", *CONTENDING, *NO_SECTIONS)
        done = subprocess.run(
            command(*arguments, "--data-dir", data_dir, "--out-dir", folder),
            env=os.environ | {"COLUMNS": "80"},
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
        )
        assert (done.returncode, done.stderr) == (0, ""), done.stdout
        self.output = done.stdout
        self.result: Json = json.loads((folder / benchmark.RESULT).read_text())


@pytest.fixture(scope="module")
def small_run(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """It is made once and shared."""
    return Run(data_dir, tmp_path_factory.mktemp("benchmark"))


def test_the_file_holds_every_figure_its_rounds_and_where_it_comes_from(small_run: Run) -> None:
    result = small_run.result
    assert set(result) >= {"command", "started", "machine", "versions", "environment", "load_before", "config"}
    assert {key: result[key] for key in benchmark.NOTHING} == benchmark.NOTHING
    assert "benchmark.py" in result["command"]
    assert result["config"]["steps"] == 2
    contest = result["contest"]
    assert list(contest["contenders"]) == list(CONTENDING)
    for name in CONTENDING:
        line = contest["contenders"][name]
        assert line["images"] == line["steps"] * 64 == 128
        assert line["threads"] == result["machine"]["cores"]
        measured = [round["seconds"] for round in line["rounds"]]
        assert (line["seconds"]["n"], line["seconds"]["least"], line["seconds"]["most"]) == (
            2,
            pytest.approx(min(measured)),
            pytest.approx(max(measured)),
        )
        assert all(seconds >= 0 for seconds in line["start"].values())
        assert line["peak_bytes"] > 100 * 2**20
    assert line["start"]["import_seconds"] > 0
    assert set(contest["floor"]["rounds_dot_seconds"]) == set(DOTS)


def test_both_sides_do_the_same_work_and_are_still_while_others_do(small_run: Run) -> None:
    lines = [small_run.result["contest"]["contenders"][name] for name in CONTENDING]
    losses = np.array([[round["loss"] for round in line["rounds"]] for line in lines])
    assert losses[0] == pytest.approx(losses[1], rel=0.2), "from other first weights, on the same images"
    assert (np.diff(losses) < 0).all(), "no round trains on what the last one left"
    for line in lines:
        assert line["idle_cpu_seconds"] < IDLE_BOUND, line["title"]
        assert line["cores_used"]["median"] < 1.1 * line["threads"], line["title"]


def test_the_table_says_what_the_file_says(small_run: Run) -> None:
    for name in CONTENDING:
        line = small_run.result["contest"]["contenders"][name]
        row = next(row for row in small_run.output.splitlines() if row.startswith(f" {line['title']} "))
        expected = [
            *(short(line["ms_per_step"][part]) for part in ("median", "low_quartile", "high_quartile")),
            f"{line['images_per_second']['median']:,.0f}",
            *(short(line["speed_to_best_torch"][part]) for part in ("median", "low_quartile", "high_quartile")),
            short(line["times_floor"]["median"]),
        ]
        assert re.findall(r"[\d.,]*\d", row) == expected


def test_an_earlier_benchmark_is_moved_aside(small_run: Run) -> None:
    assert (small_run.folder / "earlier-1" / benchmark.RESULT).read_text() == "an earlier one"
    assert "earlier-1" in small_run.output
    names = {path.name for path in small_run.folder.iterdir()}
    assert names == {benchmark.RESULT, benchmark.THROUGHPUT, "earlier-1"}
    assert_picture(small_run.folder / benchmark.THROUGHPUT)


def workers(mark: str) -> list[str]:
    """The processes of workers with this in their command line."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_text()
        except OSError:  # it has ended meanwhile
            continue
        if "experiments.speed.worker" in words and mark in words:
            found.append(process.name)
    return found


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="looks for processes as Linux shows them")
@pytest.mark.parametrize(
    "end",
    # Killed, it can end nobody: a worker that is being built sees the end of its input only when it is done.
    [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)],
    ids=["interrupted", "killed"],
)
def test_no_worker_outlives_the_benchmark(data_dir: Path, tmp_path: Path, end: signal.Signals) -> None:
    mark = f'"seed": {int(tmp_path.stat().st_ino) % 2**32}'
    arguments = ("--data-dir", data_dir, "--out-dir", tmp_path / "out", "--seed", mark.split()[1])
    env = os.environ | {"TMPDIR": str(tmp_path)}
    with subprocess.Popen(
        command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env
    ) as process:
        wait_until(lambda: bool(workers(mark)))
        process.send_signal(end)
        _, errors = process.communicate()
    if end == signal.SIGINT:
        assert (process.returncode, errors) == (130, "interrupted\n")
        assert not workers(mark), "ended with the benchmark, not some time after it"
    wait_until(lambda: not workers(mark))
    assert not list((tmp_path / "out").iterdir())


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait for something that comes soon."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < TIMEOUT
        time.sleep(0.05)


SLIPS = {
    "no rounds": (("--rounds", "0"), ("--rounds", "between 1 and")),
    "no PyTorch that competes": (("--contenders", "jax", "torch-course"), ("--contenders", "torch-fused")),
    "nobody known": (("--contenders", "jax", "abacus"), ("--contenders", "abacus", "torch-fused")),
    "more images than there are": (("--steps", "2000"), ("--steps", "128,000", "60,000")),
    "more threads than cores": (("--thread-counts", "9999"), ("--thread-counts", "9999")),
    "an unknown flag": (("--round", "3"), ("--round", "--help")),
    "results into a file": (("--out-dir", "taken"), ("--out-dir", "taken", "choose")),
    "data in a file": (("--data-dir", "taken"), ("--data-dir", "taken", "give")),
}


@pytest.mark.parametrize(("arguments", "names"), SLIPS.values(), ids=SLIPS)
def test_a_slip_is_one_line_and_status_2(tmp_path: Path, arguments: tuple[str, ...], names: tuple[str, ...]) -> None:
    (tmp_path / "taken").write_text("not a folder")
    done = subprocess.run(command(*arguments), cwd=tmp_path, capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1, done.stderr
    assert all(name in done.stderr for name in names), done.stderr


@pytest.mark.slow
def test_without_a_compiler_that_contender_is_not_available(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/nonexistent/compiler")
    config = BenchmarkConfig(steps=1, data_dir=data_dir)
    with Team() as team, pytest.raises(Unavailable, match="compiler"):
        team.hire(sections.task(config, "torch-compile"))


@pytest.mark.slow
def test_a_worker_that_fails_says_why(tmp_path: Path) -> None:
    """Here, because its data folder is a file."""
    (tmp_path / "taken").write_text("not a folder")
    config = BenchmarkConfig(data_dir=tmp_path / "taken")
    with (
        Team() as team,
        pytest.raises(WorkerFailed, match=r"torch-fused ended with status 1\n(.*\n)*.*UserError.*taken"),
    ):
        team.hire(sections.task(config, "torch-fused"))


@pytest.mark.slow
def test_every_section_of_the_command(data_dir: Path, tmp_path: Path) -> None:
    """All flags at their smallest: a minute or two, most of it starting and compiling."""
    small = ("--rounds", 2, "--steps", 4, "--sweep-rounds", 1, "--epoch-rounds", 1, "--stage-rounds", 1)
    sizes = ("--batch-sizes", 16, 64, "--train-sizes", 200, "--thread-counts", 1)
    whole = ("--command-runs", 1, "--command-epochs", 1, "--command-images", 300)
    done = subprocess.run(
        command("--data-dir", data_dir, "--out-dir", tmp_path, *small, *sizes, *whole),
        capture_output=True,
        text=True,
        timeout=10 * TIMEOUT,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    result = json.loads((tmp_path / benchmark.RESULT).read_text())
    assert set(result["contest"]["contenders"]) == set(BenchmarkConfig().contenders)
    assert [point["batch_size"] for point in result["batch_sizes"]] == [16, 64]
    assert [point["images"] for point in result["train_sizes"]] == [200]
    for line in result["thread_counts"][0]["contenders"].values():
        assert line["cores_used"]["median"] < 1.05, f"{line['title']} is not kept to one core"
    assert result["stages"]["sum_ms"]["median"] > 0
    for framework, figures in result["commands"].items():
        assert 0 < figures["first_report_seconds"]["median"] < figures["seconds"]["median"], framework
        assert figures["evaluate_seconds"]["median"] > 0
        assert figures["peak_bytes"] > 200 * 2**20
    assert result["commands"]["jax"]["compile_seconds"]["least"] > 1  # nothing came from a cache: then it is 0.6
    assert {path.name for path in tmp_path.iterdir()} == set(benchmark.FILES)
    assert_picture(tmp_path / benchmark.GROWTH)

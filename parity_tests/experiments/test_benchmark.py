"""The speed benchmark: what it counts, how it compares, and that the command does what it says. No speed is tested."""

import io
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import jax
import matplotlib.image
import numpy as np
import pytest
import torch
from jax import numpy as jnp
from rich.console import Console, RenderableType

from experiments.records import Json, Show
from experiments.speed import benchmark, gpu, torch_steps
from experiments.speed.config import CHECKPOINTS, DOTS, QUICK, BenchmarkConfig, Task, Unavailable, apply_presets
from experiments.speed.jax_steps import STAGES, TimedLoop, backward, make_loops, repeat, select_weights
from experiments.speed.results import checkpoint_table, growth_table, paired_ratios, sentence, short, spread, tables
from experiments.speed.workers import DOT_FLOP, WorkerFailed, order_of_round, time_in_turns
from jax_cnn.checkpoint import load_checkpoint
from jax_cnn.config import UserError
from jax_cnn.model import Params, apply, init_params
from jax_cnn.run.display import ProgressBar
from parity_tests.support import ENVIRONMENT, ROOT, TIMEOUT, command_line, read_json, run_command, wait_until

IDLE_BOUND = 0.1  # seconds of CPU while others are timed, in 2 rounds. Worst seen: 0.004, with threads that spin

# --- Counting and comparing ---


def test_a_step_of_64_images_needs_as_many_operations_as_counted_by_hand() -> None:
    by_hand = {  # 2 (multiply, add) x inputs of an output x outputs x passes, for one image
        "conv1": 2 * (3 * 3 * 1) * (32 * 28 * 28) * 2,  # forward, weights
        "conv2": 2 * (3 * 3 * 32) * (64 * 14 * 14) * 3,  # forward, weights, input
        "fc1": 2 * (7 * 7 * 64) * 512 * 3,
        "fc2": 2 * 512 * 10 * 3,
    }
    assert benchmark.count_flop(64) == {layer: 64 * count for layer, count in by_hand.items()}
    assert sum(benchmark.count_flop(64).values()) == pytest.approx(2.06e9, rel=0.005)


def test_median_and_quartiles_are_those_of_the_rounds() -> None:
    expected = {"n": 5, "median": 3, "low_quartile": 2, "high_quartile": 4, "least": 1, "most": 5}
    assert spread([5, 1, 4, 2, 3]) == expected


@pytest.mark.parametrize("values", [[], [1.0, float("nan")]], ids=["none", "not a number"])
def test_without_finite_values_there_is_no_median(values: list[float]) -> None:
    with pytest.raises(ValueError, match="no median"):
        spread(values)


def test_what_slows_a_whole_round_cancels_out_in_pairs() -> None:
    busy = np.random.default_rng(0).uniform(1, 5, size=9)
    fast, slow = (1.0 * busy).tolist(), (2.5 * busy).tolist()
    assert paired_ratios(slow, fast) == pytest.approx([2.5] * 9)
    assert max(slow) / min(fast) > 5, "without pairs the ratio could be anything"
    with pytest.raises(ValueError, match="shorter"):
        paired_ratios(slow, fast[1:])


def test_every_contender_goes_first_second_and_last() -> None:
    rounds = ["".join(order_of_round("abc", number)) for number in range(4)]
    assert rounds == ["abc", "bca", "cab", "abc"]


def test_quick_changes_only_what_no_other_flag_asks_for() -> None:
    config = apply_presets(BenchmarkConfig(quick=True, command_runs=1))
    assert config.command_runs == 1
    changed = {field.name for field in fields(config) if getattr(config, field.name) != field.default}
    assert changed == set(QUICK) | {"quick"}
    assert apply_presets(BenchmarkConfig()) == BenchmarkConfig()


# --- Sections with planted times ---

PLANTED = {"jax": 1.0, "torch-adam": 3.0, "torch-fused": 2.0, "torch-course": 0.5, "jax-dot": 0.2, "torch-dot": 0.1}


def plant(patch: pytest.MonkeyPatch, seconds: dict[str, float]) -> None:
    """Let contenders seem to take these seconds in the first round, twice as long in the second, and so on.

    Contenders without seconds cannot run.
    """

    def answer(first: float, number: int) -> Json:
        took = first * (1 + number)
        peak = int(100 * first * 2**20)
        return {"seconds": took, "cpu_seconds": 2 * took, "idle_cpu_seconds": 0.0, "peak_bytes": peak}

    def planted(tasks: Sequence[Task], rounds: int, show: Show) -> dict[str, Json]:
        results: dict[str, Json] = {task.contender: {"unavailable": "no compiler"} for task in tasks}
        for name in results.keys() & seconds.keys():
            results[name] = {"start": {}, "rounds": [answer(seconds[name], number) for number in range(rounds)]}
        return results

    patch.setattr(benchmark, "time_in_turns", planted)


def contest(seconds: dict[str, float], *names: Any) -> Json:
    """Return the result of a contest of three rounds of ten steps with planted times."""
    with pytest.MonkeyPatch.context() as patch:
        plant(patch, seconds)
        return benchmark.measure_contest(BenchmarkConfig(rounds=3, steps=10, contenders=names), print)


def test_the_fastest_pytorch_that_competes_is_the_best() -> None:
    result = contest(PLANTED, "jax", "torch-adam", "torch-fused", "torch-compile", "torch-course")
    assert result["best_torch"] == "torch-fused", "the course's loop does not compete, and a missing one cannot"
    lines = result["contenders"]
    speeds = {name: line["speed_to_best_torch"]["median"] for name, line in lines.items() if "rounds" in line}
    assert speeds == pytest.approx({"jax": 2, "torch-adam": 2 / 3, "torch-fused": 1, "torch-course": 4})
    assert lines["jax"]["ms_per_step"]["median"] == pytest.approx(200)  # the second of three rounds: 2 s, 10 steps
    assert lines["jax"]["images_per_second"]["median"] == pytest.approx(320)
    assert lines["torch-compile"]["unavailable"] == "no compiler"


def test_the_floor_is_a_steps_operations_at_the_rate_of_the_faster_product_of_the_same_round() -> None:
    result = contest(PLANTED, "jax", "torch-fused")
    floor = result["floor"]
    assert floor["fastest_dot"] == "torch-dot"
    milliseconds = [1e3 * floor["flop_per_step"] / DOT_FLOP * seconds for seconds in (0.1, 0.2, 0.3)]
    assert floor["rounds_ms_per_step"] == pytest.approx(milliseconds)
    assert result["contenders"]["jax"]["times_floor"]["median"] == pytest.approx(100 / milliseconds[0])


def test_without_any_pytorch_there_is_no_comparison() -> None:
    with pytest.raises(UserError, match="torch-compile: no compiler"):
        contest(PLANTED, "jax", "torch-compile")


def test_the_growth_chart_draws_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, PLANTED)
    changes = ({"batch_size": size, "images": 640} for size in (16, 64))
    points = [benchmark.measure_point(BenchmarkConfig(), "torch-fused", change, 3, print) for change in changes]
    assert [point["jax_speed_to_torch"]["median"] for point in points] == [2, 2]
    assert [point["contenders"]["jax"]["steps"] for point in points] == [40, 10]
    result = benchmark.EMPTY_SECTIONS | {"contest": contest(PLANTED, "jax", "torch-fused"), "batch_sizes": points}
    assert benchmark.draw(result, tmp_path) == list(benchmark.FILES)
    assert_picture(tmp_path / benchmark.GROWTH)
    (row,) = re.findall("16 .*2.00 .*", print_to_text(growth_table(points, "batch_size", "batch size", "torch-fused")))
    assert row.split()[:7] == ["16", "2.00", "4.00", "50.0", "100", "100", "200"]  # s, ms and MiB of each


def assert_picture(path: Path) -> None:
    """Assert that a file is a picture that is not blank."""
    picture = matplotlib.image.imread(path)
    assert picture.shape[1] > 500
    assert picture[..., :3].std() > 0.01


def test_a_checkpoint_that_takes_300_ms_slows_training_by_one_percent(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = [
        {"without_seconds": busy, "with_seconds": busy + extra, "copy_seconds": 0.004}
        for busy, extra in ((1.0, 0.3), (3.0, 0.2), (2.0, 0.6))
    ]
    measured = {contender: {"rounds": pairs} for contender in CHECKPOINTS.values()}
    monkeypatch.setattr(benchmark, "time_in_turns", lambda tasks, rounds, show: measured)
    costs = benchmark.measure_checkpoints(BenchmarkConfig(steps=10), print)
    assert costs["interval_seconds"] == 30
    medians = {name: figure["median"] for name, figure in costs["torch"].items() if name != "rounds"}
    assert medians == pytest.approx({"ms_per_step": 200, "copy_ms": 4, "extra_ms": 300, "slower_by": 0.01})
    assert "1.00% (0.83–1.50)" in print_to_text(checkpoint_table(costs))


def print_to_text(*parts: RenderableType) -> str:
    """Return what rich prints for these parts on 80 columns."""
    console = Console(width=80)
    with console.capture() as capture:
        console.print(*parts)
    return capture.get()


def test_a_round_with_checkpoints_trains_twice_and_writes_one(
    data_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    config = BenchmarkConfig(batch_size=32, steps=2, threads=1, data_dir=data_dir)
    work = torch_steps.make(benchmark.make_task(config, CHECKPOINTS["torch"]))
    seconds = [work.round(number) for number in range(2)]
    assert all(0 < answer["copy_seconds"] < answer["with_seconds"] for answer in seconds)
    written = [load_checkpoint(path).state.step for path in tmp_path.rglob("*.safetensors")]
    assert sorted(written) == [2, 4], "after the first epoch of round 0, and before the first epoch of round 1"


def test_results_without_a_section_of_checkpoints_are_shown_too() -> None:
    result = read_json(ROOT / "docs" / "results" / "benchmark" / benchmark.RESULT)
    result.pop("checkpoints", None)
    output = print_to_text(*tables(result))
    for title in ("Training, in turns", "By batch size", "Where a JAX step's time goes", "Whole commands"):
        assert title in output
    assert sentence(result).startswith("JAX trains 4,")


# --- The command ---

CONTENDING = ("jax", "torch-fused")
NO_SECTIONS = [
    *("--batch-sizes", "--thread-counts", "--train-sizes"),
    *("--stage-rounds", 0, "--checkpoint-pairs", 0, "--command-runs", 0),
]


class SmallBenchmark(NamedTuple):
    """A small benchmark that has ended well, in a folder with an earlier one."""

    folder: Path
    output: str
    result: Json


@pytest.fixture(scope="module")
def small_benchmark(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> SmallBenchmark:
    """Run the contest alone, with two contenders."""
    folder = tmp_path_factory.mktemp("benchmark")
    (folder / benchmark.RESULT).write_text("an earlier one")
    arguments = ("--rounds", 2, "--steps", 2, "--contenders", *CONTENDING, *NO_SECTIONS, "--data-dir", data_dir)
    env = ENVIRONMENT | {"COLUMNS": "80"}
    done = run_command("benchmark", *arguments, "--out-dir", folder, cwd=folder, env=env)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    return SmallBenchmark(folder, done.stdout, read_json(folder / benchmark.RESULT))


@pytest.mark.extended
def test_the_file_holds_every_figure_its_rounds_and_where_it_comes_from(small_benchmark: SmallBenchmark) -> None:
    result = small_benchmark.result
    assert set(result) >= {"command", "started", "machine", "versions", "environment", "load_before", "config"}
    assert {name: result[name] for name in benchmark.EMPTY_SECTIONS} == benchmark.EMPTY_SECTIONS
    assert "benchmark.py" in result["command"]
    assert result["config"]["steps"] == 2
    assert list(result["contest"]["contenders"]) == list(CONTENDING)
    for line in result["contest"]["contenders"].values():
        assert line["images"] == line["steps"] * 64 == 128
        assert line["threads"] == result["machine"]["cores"]
        assert line["seconds"] == spread([answer["seconds"] for answer in line["rounds"]])
        assert line["seconds"]["n"] == 2
        assert all(seconds >= 0 for seconds in line["start"].values())
        assert line["start"]["import_seconds"] > 0
        assert line["peak_bytes"] > 100 * 2**20
    assert set(result["contest"]["floor"]["rounds_dot_seconds"]) == set(DOTS)


@pytest.mark.extended
def test_both_sides_do_the_same_work_and_are_still_while_others_do(small_benchmark: SmallBenchmark) -> None:
    lines = [small_benchmark.result["contest"]["contenders"][name] for name in CONTENDING]
    losses = np.array([[answer["loss"] for answer in line["rounds"]] for line in lines])
    assert losses[0] == pytest.approx(losses[1], rel=0.2), "from other initial weights, on the same images"
    assert (np.diff(losses) < 0).all(), "a round does not go on from the last one"
    for line in lines:
        assert line["idle_cpu_seconds"] < IDLE_BOUND, line["title"]
        assert line["cores_used"]["median"] < 1.1 * line["threads"], line["title"]


@pytest.mark.extended
def test_the_table_shows_the_figures_of_the_file(small_benchmark: SmallBenchmark) -> None:
    parts = ("median", "low_quartile", "high_quartile")
    for name in CONTENDING:
        line = small_benchmark.result["contest"]["contenders"][name]
        row = next(row for row in small_benchmark.output.splitlines() if row.startswith(f" {line['title']} "))
        expected = [
            *(short(line["ms_per_step"][part]) for part in parts),
            f"{line['images_per_second']['median']:,.0f}",
            *(short(line["speed_to_best_torch"][part]) for part in parts),
            short(line["times_floor"]["median"]),
        ]
        assert re.findall(r"[\d.,]*\d", row) == expected


@pytest.mark.extended
def test_an_earlier_benchmark_is_moved_aside(small_benchmark: SmallBenchmark) -> None:
    assert (small_benchmark.folder / "earlier-1" / benchmark.RESULT).read_text() == "an earlier one"
    assert "earlier-1" in small_benchmark.output
    names = {path.name for path in small_benchmark.folder.iterdir()}
    assert names == {benchmark.RESULT, benchmark.THROUGHPUT, "earlier-1"}
    assert_picture(small_benchmark.folder / benchmark.THROUGHPUT)


def find_workers(seed: str) -> str:
    """Return the process ids of the workers whose task has this seed."""
    pattern = f'experiments.speed.workers.*"seed": {seed}'
    return subprocess.run(["pgrep", "--full", pattern], capture_output=True, text=True, check=False).stdout


@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("pgrep"), reason="needs the pgrep of Linux")
@pytest.mark.parametrize(
    "end",
    # A killed benchmark can end nothing. Its worker sees the end of its input when it has been built, which takes long.
    [signal.SIGINT, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)],
    ids=["interrupted", "killed"],
)
def test_no_worker_outlives_the_benchmark(data_dir: Path, tmp_path: Path, end: signal.Signals) -> None:
    seed = str(tmp_path.stat().st_ino % 2**32)
    line = command_line("benchmark", "--data-dir", data_dir, "--out-dir", tmp_path / "out", "--seed", seed)
    env = os.environ | {"TMPDIR": str(tmp_path)}
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env) as process:
        wait_until(lambda: find_workers(seed))
        process.send_signal(end)
        _, errors = process.communicate()
    if end == signal.SIGINT:
        assert (process.returncode, errors) == (130, "interrupted\n")
        assert not find_workers(seed), "it ended with the benchmark, not some time after it"
    wait_until(lambda: not find_workers(seed))
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.slow
def test_without_a_compiler_that_contender_is_not_available(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "/nonexistent/compiler")
    task = benchmark.make_task(BenchmarkConfig(steps=1, data_dir=data_dir), "torch-compile")
    assert "compiler" in time_in_turns([task], 0, print)["torch-compile"]["unavailable"]


@pytest.mark.slow
def test_a_worker_that_fails_says_why(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file where the data folder should be")
    task = benchmark.make_task(BenchmarkConfig(data_dir=tmp_path / "taken"), "torch-fused")
    with pytest.raises(WorkerFailed, match=r"torch-fused ended with status 1\n(.*\n)*.*UserError.*taken"):
        time_in_turns([task], 0, print)


@pytest.mark.slow
def test_every_section_of_the_command(data_dir: Path, tmp_path: Path) -> None:
    """All flags have their smallest values: it takes a minute or two, most of it to start and to compile."""
    small = ("--rounds", 2, "--steps", 4, "--sweep-rounds", 1, "--epoch-rounds", 1, "--stage-rounds", 1)
    sizes = ("--batch-sizes", 16, 64, "--train-sizes", 200, "--thread-counts", 1, "--checkpoint-pairs", 1)
    whole = ("--command-runs", 1, "--command-epochs", 1, "--command-images", 300)
    folders = ("--data-dir", data_dir, "--out-dir", tmp_path)
    done = run_command("benchmark", *small, *sizes, *whole, *folders, cwd=tmp_path, timeout=10 * TIMEOUT)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    result = read_json(tmp_path / benchmark.RESULT)
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
        assert result["checkpoints"][framework]["copy_ms"]["median"] > 0
    assert result["commands"]["jax"]["compile_seconds"]["least"] > 1  # a program from a cache takes 0.6 s
    assert {path.name for path in tmp_path.iterdir()} == set(benchmark.FILES)
    assert_picture(tmp_path / benchmark.GROWTH)


# --- On a GPU: rehearsed on the CPU ---


def gpu_task(data_dir: Path, contender: str) -> Task:
    """Return two steps of eight images."""
    config = BenchmarkConfig(data_dir=data_dir, threads=1)
    return benchmark.make_task(config, contender, images=16, batch_sizes=(8,))


@pytest.fixture
def _own_tf32() -> Iterator[None]:
    """Reset what a loop sets for the whole process."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.mark.usefixtures("_own_tf32")
def test_pytorch_s_loops_for_the_gpu_train_at_every_precision(data_dir: Path) -> None:
    for name in ("gpu-torch-adam", "gpu-torch-channels-last"):
        work = torch_steps.make(gpu_task(data_dir, name))
        first, second = (work.round(number)["losses"] for number in range(2))
        assert list(first) == ["tf32, 8", "float32, 8", "bfloat16, 8"]
        assert all(second[point] < first[point] for point in first), "a round does not go on from the last one"
        assert first["tf32, 8"] == first["float32, 8"] != first["bfloat16, 8"]
    with pytest.raises(Unavailable, match="a CUDA graph needs a GPU"):
        torch_steps.make(gpu_task(data_dir, "gpu-torch-graph"))


def test_the_gpu_s_table_compares_with_the_best_pytorch_of_each_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def planted(tasks: Sequence[Task], rounds: int, show: Show) -> dict[str, Json]:
        (task,) = tasks
        if task.contender == "gpu-torch-max-autotune":
            raise WorkerFailed("the worker for it ended\nTraceback …\nRuntimeError: no Triton")
        speed = {"gpu-jax": 2.0, "gpu-torch-fused": 4.0}.get(task.contender, 1.0)
        seconds = {f"{precision}, {size}": size / speed / 1e4 for precision, size in task.points}
        return {task.contender: {"start": {}, "rounds": [{"seconds_a_step": seconds, "losses": {}}] * rounds}}

    monkeypatch.setattr(gpu, "time_in_turns", planted)
    config = BenchmarkConfig(device="gpu", rounds=2, batch_sizes=(64, 4096), command_runs=0, out_dir=tmp_path)
    with ProgressBar(Console(file=io.StringIO())) as progress:
        result = gpu.run(config, "a card", progress)
    assert read_json(tmp_path / gpu.RESULT)["contenders"] == result["contenders"]
    assert result["contenders"]["gpu-torch-max-autotune"]["unavailable"] == "RuntimeError: no Triton"
    output = print_to_text(*gpu.tables(result))
    assert re.search(r"PyTorch, fused Adam +1\.60 +102 ", output)
    assert re.search(r"JAX is times as fast as the best +0\.50 +0\.50 ", output)
    assert "on a card, bfloat16" in output


def test_without_a_gpu_the_benchmark_for_it_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "QUERY", ("no-such-program",))
    with pytest.raises(UserError, match="--device gpu: no NVIDIA GPU is here"):
        gpu.describe_card()
    monkeypatch.setattr(gpu, "QUERY", (sys.executable, "-c", "import sys; sys.exit('no devices were found')"))
    with pytest.raises(UserError, match=r"no NVIDIA GPU is here \(nvidia-smi: no devices were found\)"):
        gpu.describe_card()


@pytest.mark.slow
def test_the_benchmark_for_the_gpu_runs_to_its_end_on_a_cpu(data_dir: Path, tmp_path: Path) -> None:
    config = BenchmarkConfig(
        rounds=1,
        batch_sizes=(8,),
        train_sizes=(16,),
        command_runs=1,
        command_epochs=1,
        command_images=64,
        data_dir=data_dir,
        out_dir=tmp_path,
    )
    with ProgressBar(Console(file=io.StringIO())) as progress:
        result = gpu.run(config, "a CPU", progress)
    unavailable = {name for name, line in result["contenders"].items() if "unavailable" in line}
    assert unavailable == {name for name in result["contenders"] if "graph" in name}
    own, plain = (result["contenders"][name]["losses"] for name in ("gpu-jax", "gpu-jax-plain"))
    assert own["tf32, 8"] == pytest.approx(plain["tf32, 8"], rel=0.01)
    assert "train_jax.py" in print_to_text(*gpu.tables(result))


# --- The stages that are timed one by one ---


# In units of each tensor's largest value, float32. Worst seen: 0, over 10 seeds; but XLA may fuse the two differently.
STAGE_BOUND = 1e-6


def test_the_chain_of_all_stages_is_the_network_forward_and_backward(images: np.ndarray) -> None:
    def chain(params: Params, value: jax.Array, grad: jax.Array) -> tuple[jax.Array, Params]:
        inputs, grads = [], {layer: dict[str, jax.Array]() for layer in params}
        for stage in STAGES:
            inputs.append(value)
            value = stage.forward(select_weights(stage, params), value)
        for stage, stage_input in zip(reversed(STAGES), reversed(inputs), strict=True):
            weights_grad, *input_grad = backward(stage, select_weights(stage, params), stage_input, grad)
            grads[stage.layer] |= weights_grad
            grad = input_grad[0] if input_grad else grad
        return value, grads

    def network(params: Params, images: jax.Array, grad: jax.Array) -> tuple[jax.Array, Params]:
        logits, pull_back = jax.vjp(lambda params: apply(params, images), params)
        return logits, pull_back(grad)[0]

    arguments = init_params(jax.random.key(0)), images, np.ones((len(images), 10), np.float32)
    actual, expected = (jax.jit(function)(*arguments) for function in (chain, network))
    assert actual[1].keys() == expected[1].keys()
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert one.shape == other.shape
        assert float(np.abs(one - other).max()) <= STAGE_BOUND * float(np.abs(other).max())


@pytest.fixture(scope="module")
def loops() -> dict[str, TimedLoop]:
    """Return the loops of a step for a batch of two."""
    pixels = jnp.arange(2 * 28 * 28, dtype=jnp.uint8).reshape(2, 28, 28)
    return make_loops(init_params(jax.random.key(0)), pixels, jnp.array([3, 4], jnp.uint8))


def test_every_stage_is_timed_forward_and_backward_and_all_else_of_a_step(loops: dict[str, TimedLoop]) -> None:
    passes = [f"{stage.name}, {part}" for stage in STAGES for part in ("forward", "backward")]
    assert list(loops) == ["scaling, forward", *passes, "loss, forward", "loss, backward", "Adam, update"]


def test_each_turn_writes_a_number_of_its_result_into_every_input_but_biases() -> None:
    """XLA moves what is the same in all turns out of a loop, so every turn must have something new to compute."""
    weights = {"kernel": jnp.full((2, 2), 5.0), "bias": jnp.full(2, 7.0)}
    loop = repeat(lambda weights, value: value @ weights["kernel"] / 40, weights, jnp.ones((3, 2)))
    (weights, value), result = loop.turn(loop.first)
    assert result[0, 0] == pytest.approx(10 / 40)
    assert weights["kernel"][0, 0] == value[0, 0] == result[0, 0]
    assert (weights["kernel"].ravel()[1:] == 5).all()
    assert (weights["bias"] == 7).all()
    assert not np.array_equal(loop.turn(((weights, value), result))[1], result)


def test_each_turn_of_adam_changes_weights_moments_and_gradients(loops: dict[str, TimedLoop]) -> None:
    turn = jax.jit(loops["Adam, update"].turn)
    first = turn(loops["Adam, update"].first)
    pairs = zip(jax.tree.leaves(first), jax.tree.leaves(turn(first)), strict=True)
    changed = [not np.array_equal(one, other) for one, other in pairs]
    assert sum(changed) > len(changed) / 2  # the gradients of biases stay

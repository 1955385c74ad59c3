"""The benchmark on a GPU: JAX and PyTorch at several precisions and batch sizes, one contender after the other."""

import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import distributions
from statistics import median

from rich.table import Table

from experiments.records import PACKAGES, Json
from experiments.speed import benchmark
from experiments.speed.config import CONTENDERS, GPU_CONTENDERS, PRECISIONS, BenchmarkConfig
from experiments.speed.results import command_table, plain, short
from experiments.speed.workers import WorkerFailed, time_in_turns
from jax_cnn.config import TRAIN_SIZE, UserError
from jax_cnn.files import write_json, writing
from jax_cnn.run.display import ProgressBar
from jax_cnn.run.folder import set_aside
from jax_cnn.run.provenance import provenance

RESULT = "gpu.json"
TIME_TO_START = 420.0  # seconds after which no further contender starts, so that the command ends within 10 minutes
QUERY = ("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader")


def describe_card() -> str:
    """Return the names, the drivers and the memory of the GPUs that are here, as nvidia-smi prints them.

    Raises:
        UserError: there is none.
    """
    if shutil.which(QUERY[0]) is None:
        raise UserError("--device gpu: no NVIDIA GPU is here (there is no nvidia-smi); use --device cpu")
    answer = subprocess.run(QUERY, capture_output=True, text=True, check=False)
    if answer.returncode or not answer.stdout.strip():
        reason = (answer.stdout + answer.stderr).strip().partition("\n")[0]
        raise UserError(f"--device gpu: no NVIDIA GPU is here (nvidia-smi: {reason}); use --device cpu")
    return "; ".join(answer.stdout.strip().splitlines())


def run(config: BenchmarkConfig, card: str, progress: ProgressBar) -> Json:
    """Time every contender in a process of its own, and return what the result file holds.

    They run one after the other: a GPU that nobody shares is steady, and together they might not fit its memory. The
    file is written after each, so a benchmark that is stopped keeps what it has measured.
    """
    started = time.perf_counter()
    cuda = (package.name for package in distributions() if package.name.startswith(("nvidia", "jax-cuda", "triton")))
    result: Json = provenance((*PACKAGES, *sorted(cuda))) | {
        "card": card,
        "config": asdict(config),
        "contenders": {},
        "commands": None,
    }

    def write() -> None:
        with writing(config.out_dir):
            write_json(config.out_dir / RESULT, result)

    set_aside(config.out_dir, [RESULT], progress.say)
    for number, name in enumerate(GPU_CONTENDERS):
        title = CONTENDERS[name].title
        progress.begin(title, number, len(GPU_CONTENDERS) + 1)
        result["contenders"][name] = {"title": title} | (
            measure(config, name, progress)
            if time.perf_counter() - started < TIME_TO_START
            else {"unavailable": f"not started in the first {TIME_TO_START:.0f} seconds"}
        )
        write()
        if number == 0 and config.command_runs:  # what matters most comes first
            result["commands"] = benchmark.measure_commands(config, progress.report)
            write()
    return result


def measure(config: BenchmarkConfig, name: str, progress: ProgressBar) -> Json:
    """Return the milliseconds a step of a contender in every round by precision and batch size, or why it has none."""
    images = max(config.train_sizes, default=TRAIN_SIZE)
    task = benchmark.make_task(config, name, images=images, device=config.device, batch_sizes=config.batch_sizes)
    try:
        measured = time_in_turns([task], config.rounds, progress.report)[name]
    except WorkerFailed as failure:  # the others can be measured all the same
        return {"unavailable": str(failure).strip().splitlines()[-1]}
    if "unavailable" in measured:
        return measured
    rounds = measured["rounds"]
    milliseconds = {
        point: [1e3 * answer["seconds_a_step"][point] for answer in rounds] for point in rounds[0]["seconds_a_step"]
    }
    return {"start": measured["start"], "ms_a_step": milliseconds, "losses": rounds[-1]["losses"]}


def tables(result: Json) -> Iterator[Table]:
    """Build a table for each precision, and one of the whole commands."""
    sizes = result["config"]["batch_sizes"]
    for precision in PRECISIONS:
        table = plain(
            f"Milliseconds a step on {result['card']}, {precision}",
            f"Medians over {result['config']['rounds']} rounds of an epoch each, by batch size. All but the first are "
            "fed from the GPU's memory. All PyTorch after the first has fused Adam.",
            ("contender", *(f"{size:,}" for size in sizes)),
        )
        medians: dict[str, list[float | None]] = {}
        for name, line in result["contenders"].items():
            rounds = [line.get("ms_a_step", {}).get(f"{precision}, {size}") for size in sizes]
            medians[name] = [median(values) if values else None for values in rounds]
            table.add_row(line["title"], *("" if value is None else short(value) for value in medians[name]))
        ratios = []
        for column in range(len(sizes)):
            rivals = [row[column] for name, row in medians.items() if CONTENDERS[name].competes]
            best = min((value for value in rivals if value is not None), default=None)
            ours = medians["gpu-jax"][column]
            ratios.append("" if best is None or ours is None else short(best / ours))
        table.add_row("JAX is times as fast as the best", *ratios)
        yield table
    if result["commands"]:
        yield command_table(result["commands"])

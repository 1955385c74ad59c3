"""The tables of the benchmark for a terminal of 80 columns. The result file holds every figure in them."""

from collections.abc import Iterator, Sequence

from rich.box import SIMPLE
from rich.table import Table

from experiments.records import MIB, Json
from experiments.speed.config import CONTENDERS
from experiments.spread import Spread

WIDTH = 79
COMMAND_ROWS = {
    "start to end, s": "seconds",
    "start to first steps reported, s": "first_report_seconds",
    "compiling, s": "compile_seconds",
    "training an epoch, s": "train_seconds",
    "evaluating 10,000 images, s": "evaluate_seconds",
}


def tables(result: Json) -> Iterator[Table]:
    """Build a table for each section in the result. Results of older versions lack the section of checkpoints."""
    yield contest_table(result["contest"])
    yield start_table(result["contest"])
    for name, column, title in (
        ("batch_sizes", "batch_size", "batch size"),
        ("thread_counts", "threads", "threads"),
        ("train_sizes", "images", "training images"),
    ):
        if result[name]:
            yield growth_table(result[name], column, title, result["contest"]["best_torch"])
    if result["stages"]:
        yield stage_table(result["stages"])
    if result.get("checkpoints"):
        yield checkpoint_table(result["checkpoints"])
    if result["commands"]:
        yield command_table(result["commands"])


def contest_table(contest: Json) -> Table:
    """Build the table of how fast each contender trains."""
    floor = contest["floor"]
    rate = floor["flop_per_second"][floor["fastest_dot"]]["median"]
    table = plain(
        "Training, in turns",
        "Medians over rounds (quartiles). All but the first PyTorch use fused Adam, all but the course's train from "
        f"memory. Best PyTorch: {CONTENDERS[contest['best_torch']].title}. Floor: {floor['flop_per_step'] / 1e9:.2f} "
        f"GFLOP a step at the {rate / 1e9:.0f} GFLOP/s of {CONTENDERS[floor['fastest_dot']].title} (2048 cubed).",
        ("\ncontender", "\nms a step", "images\nper s", "times as fast\nas best PyTorch", "times\nfloor"),
    )
    for line in contest["contenders"].values():
        if "unavailable" in line:
            table.add_row(line["title"], "not available")
            continue
        table.add_row(
            line["title"],
            with_quartiles(line["ms_per_step"]),
            f"{line['images_per_second']['median']:,.0f}",
            with_quartiles(line["speed_to_best_torch"]),
            short(line["times_floor"]["median"]),
        )
    table.add_row("floor", with_quartiles(floor["ms_per_step"]))
    return table


def start_table(contest: Json) -> Table:
    """Build the table of the seconds before the first round, and of each process's memory and CPU time."""
    lines = contest["contenders"].values()
    missing = [f" {line['title']} is not available: {line['unavailable']}." for line in lines if "start" not in line]
    table = plain(
        "Each contender's own process",
        "Cores in use while a contender is timed (median), and all CPU time that it used while others were timed."
        + "".join(missing),
        ("\ncontender", "import\ns", "compile\ns", "warm-up\ns", "peak\nMiB", "cores\nin use", "CPU when\nidle, ms"),
    )
    for line in lines:
        if "start" in line:
            table.add_row(
                line["title"],
                *(f"{line['start'][name]:.1f}" for name in ("import_seconds", "compile_seconds", "warm_up_seconds")),
                f"{line['peak_bytes'] / MIB:,.0f}",
                f"{line['cores_used']['median']:.2f}",
                f"{1e3 * line['idle_cpu_seconds']:.1f}",
            )
    return table


def growth_table(points: Sequence[Json], column: str, title: str, best: str) -> Table:
    """Build the table of how the cost grows, with a row for each value."""
    rounds = points[0]["jax_speed_to_torch"]["n"]
    table = plain(
        f"By {title}",
        f"JAX and {CONTENDERS[best].title}. Medians over {rounds} rounds (quartiles).",
        (f"\n{title}", "JAX\ns", "PyTorch\ns", "JAX\nms a step", "PyTorch\nms a step", "JAX is\ntimes as fast"),
    )
    for point in points:
        lines = [point["contenders"][name] for name in ("jax", best)]
        table.add_row(
            f"{point[column]:,}",
            *(short(line["seconds"]["median"]) for line in lines),
            *(short(line["ms_per_step"]["median"]) for line in lines),
            with_quartiles(point["jax_speed_to_torch"]),
        )
    return table


def stage_table(stages: Json) -> Table:
    """Build the table of the time of each stage of a JAX step."""
    table = plain(
        "Where a JAX step's time goes, ms",
        "Each stage alone in a loop; medians. Their sum is not the whole step: alone, a stage may find its input in "
        "the cache, writes out what the step fuses into the next stage, and in its backward pass computes again what "
        "the step may have kept.",
        ("stage", "forward", "backward", "update", "of the sum"),
    )
    total = stages["sum_ms"]["median"]
    for stage in dict.fromkeys(name.rpartition(", ")[0] for name in stages["ms"]):
        times = [stages["ms"].get(f"{stage}, {part}", {}).get("median") for part in ("forward", "backward", "update")]
        share = sum(time or 0 for time in times) / total
        table.add_row(stage, *("" if time is None else f"{time:.2f}" for time in times), f"{share:.0%}")
    table.add_row("sum", with_quartiles(stages["sum_ms"]))
    table.add_row("whole step", with_quartiles(stages["whole_step_ms"]))
    return table


def checkpoint_table(checkpoints: Json) -> Table:
    """Build the table of what a checkpoint costs."""
    jax, torch = checkpoints["jax"], checkpoints["torch"]
    table = plain(
        "What a checkpoint costs",
        f"Medians over {len(jax['rounds'])} pairs of trainings with and without a checkpoint (quartiles). Training "
        "stands still for the copy alone: the file is written in the background.",
        ("", "JAX", "PyTorch"),
    )
    table.add_row("a step, ms", with_quartiles(jax["ms_per_step"]), with_quartiles(torch["ms_per_step"]))
    table.add_row("to copy the state, ms", with_quartiles(jax["copy_ms"]), with_quartiles(torch["copy_ms"]))
    table.add_row("to copy and write it, ms", with_quartiles(jax["extra_ms"]), with_quartiles(torch["extra_ms"]))
    label = f"one in {checkpoints['interval_seconds']:g} s slows training by"
    table.add_row(label, in_percent(jax["slower_by"]), in_percent(torch["slower_by"]))
    return table


def command_table(commands: Json) -> Table:
    """Build the table of both commands, from the start of the process to its end."""
    jax, torch = commands["jax"], commands["torch"]
    table = plain(
        f"Whole commands, epochs of each: {len(jax['runs'][0]['epochs'])}",
        f"Median, least and most. Runs of each: {len(jax['runs'])}. The first report comes after "
        f"{jax['first_report_images']} images (JAX) and {torch['first_report_images']} (PyTorch). No program was "
        "compiled before.",
        ("", "train_jax.py", "train_torch.py"),
    )
    for label, name in COMMAND_ROWS.items():
        table.add_row(label, *(with_ends(command[name]) for command in (jax, torch)))
    table.add_row("peak memory, MiB", *(f"{command['peak_bytes'] / MIB:,.0f}" for command in (jax, torch)))
    table.add_row("test accuracy", *(f"{command['test_accuracy']:.2%}" for command in (jax, torch)))
    return table


def sentence(result: Json) -> str:
    """Return the result of the contest in one sentence."""
    contest = result["contest"]
    jax, best = contest["contenders"]["jax"], CONTENDERS[contest["best_torch"]].title
    speed = jax["speed_to_best_torch"]
    return (
        f"JAX trains {jax['images_per_second']['median']:,.0f} images a second, {speed['median']:.2f} times as many as "
        f"the best PyTorch ({best}; quartiles {quartiles(speed)}, n = {speed['n']} rounds), in "
        f"{jax['times_floor']['median']:.2f} times the floor's time."
    )


def plain(title: str, caption: str, headings: Sequence[str]) -> Table:
    """Return an empty table with words on the left and numbers on the right."""
    table = Table(title=title, caption=caption, box=SIMPLE, padding=(0, 1, 0, 0), width=WIDTH)
    for column, heading in enumerate(headings):
        table.add_column(heading, justify="right" if column else "left", no_wrap=column > 0)
    return table


def with_quartiles(spread: Spread) -> str:
    """Write the median with the quartiles: `1.06 (1.03–1.10)`."""
    return f"{short(spread['median'])} ({quartiles(spread)})"


def quartiles(spread: Spread) -> str:
    """Write the quartiles: `1.03–1.10`."""
    return f"{short(spread['low_quartile'])}–{short(spread['high_quartile'])}"


def with_ends(spread: Spread | None) -> str:
    """Write the median with the least and the largest value."""
    return "–" if spread is None else f"{short(spread['median'])} ({short(spread['least'])}–{short(spread['most'])})"


def in_percent(spread: Spread) -> str:
    """Write the median with the quartiles in percent: `0.23% (0.11–0.33)`."""
    return f"{spread['median']:.2%} ({100 * spread['low_quartile']:.2f}–{100 * spread['high_quartile']:.2f})"


def short(number: float) -> str:
    """Write three digits or more, but nothing smaller than hundredths."""
    size = abs(number)
    return f"{number:.2f}" if size < 10 else f"{number:.1f}" if size < 100 else f"{number:,.0f}"

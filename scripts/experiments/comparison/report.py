"""Measure everything that the page shows, and return it as one object for JSON."""

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from statistics import median

from experiments.answers import FRAMEWORKS, Framework
from experiments.comparison import listings, scores
from experiments.comparison.runs import (
    COMMITTED_BENCHMARK,
    MAY_DIFFER,
    CompareConfig,
    Run,
    obtain_run,
    save_initial_weights,
)
from experiments.records import PACKAGES, ROOT, Json, Show, explain_mismatch, run_command, shorten_command
from jax_cnn.config import UserError
from jax_cnn.data import CLASS_NAMES, CLASS_NUMBERS, prepare_fashion_mnist
from jax_cnn.run.display import ProgressBar
from jax_cnn.run.provenance import provenance

SECTIONS = 6
STANDARD_ERRORS = 2.0  # by which two accuracies may differ
SPEEDS = ("title", "ms_per_step", "images_per_second", "speed_to_best_torch", "times_floor", "peak_bytes")

TOGETHER = 1e-10  # root mean square distance of the weights up to which two float64 trainings are together


def measure(config: CompareConfig, progress: ProgressBar) -> Json:
    """Train both frameworks or take finished runs, and measure everything that the page shows."""

    def begin(number: int, title: str) -> None:
        progress.begin(title, number - 1, SECTIONS)
        progress.say(f"{number} of {SECTIONS}: {title}")

    begin(1, "PyTorch's initial weights, for both")
    initial = save_initial_weights(config)
    runs: dict[Framework, Run] = {}
    for number, (framework, name) in enumerate(FRAMEWORKS.items(), start=2):
        begin(number, f"training with {name}")
        runs[framework] = obtain_run(framework, config, initial, progress)
    begin(4, "speed by configuration")
    report = provenance((*PACKAGES, "matplotlib")) | {
        "config": asdict(config),
        "classes": name_classes(runs["jax"]),
        "runs": {framework: run._asdict() for framework, run in runs.items()},
        "speed": measure_speed(config, progress.report),
        "layers": scores.list_layers(),
        "programs": listings.describe_parts(),
        "operations": {"file": listings.OPERATIONS, "lines": len(listings.code_lines(listings.OPERATIONS))},
    }
    begin(5, "test images")
    report |= scores.measure_networks(config, runs)
    begin(6, "parity in float64")
    report["parity"] = measure_parity(config, progress.report)
    report["headline"] = headline(report)
    report["verdict"] = judge(report)
    return report


def name_classes(run: Run) -> list[str]:
    """Return the names of the ten classes, which are numbers where the run's data are not FashionMNIST's."""
    return list(CLASS_NUMBERS if run.record.get("data") else CLASS_NAMES)


def check_named(config: CompareConfig) -> None:
    """Check the files and the runs that the command line names, before any work is done.

    Raises:
        UserError: one is missing, has other content, or is not a finished run of this configuration.
    """
    if config.benchmark is not None:
        read_speed(config.benchmark)
    if config.parity_report is not None:
        read_parity(config.parity_report)
    for framework in FRAMEWORKS:
        folder, wanted = config.named_run(framework), config.training(framework)
        if folder and (reason := explain_mismatch(folder, framework, wanted, ignored=MAY_DIFFER, same_machine=False)):
            raise UserError(f"--{framework}-run {folder}: {reason}; give a run that fits, or omit the flag to train")


@contextmanager
def reading(flag: str, file: Path, expected: str) -> Iterator[Json]:
    """Give the content of a JSON file to the block.

    Raises:
        UserError: the file is missing, or the block does not find what it needs.
    """
    try:
        yield json.loads(file.read_text(encoding="utf-8"))
        return
    except OSError as error:
        reason = error.strerror or str(error)
    except (ValueError, LookupError, TypeError, AttributeError):
        reason = "its content is not what is needed"
    raise UserError(f"{flag} {file}: {reason}; give {expected}")


def describe_source(file: Path, result: Json) -> Json:
    """Return the name of a file of results, and where its figures come from."""
    return {
        "file": str(file.relative_to(ROOT) if file.is_relative_to(ROOT) else file),
        "command": shorten_command(result["command"]),
        **{name: result[name] for name in ("started", "machine", "versions")},
    }


def read_speed(file: Path) -> Json:
    """Read the speed of every configuration from a benchmark.json, and where it was measured."""
    with reading("--benchmark", file, "a benchmark.json that scripts/benchmark.py wrote") as result:
        contenders = result["contest"]["contenders"]
        return describe_source(file, result) | {
            "busy": result["load_before"],
            "batch_size": result["config"]["batch_size"],
            "best_torch": contenders[result["contest"]["best_torch"]]["title"],
            "rows": [
                {"name": name} | {key: contender[key] for key in SPEEDS}
                for name, contender in contenders.items()
                if "rounds" in contender
            ],
        }


def measure_speed(config: CompareConfig, show: Show) -> Json:
    """Read the speed table from a file, or measure it now if the command line asks for that."""
    if not config.run_benchmark:
        return read_speed(config.benchmark or COMMITTED_BENCHMARK)
    folder = config.out_dir / "benchmark"
    arguments = ["--quick", "--out-dir", str(folder), "--data-dir", str(config.data_dir)]
    run_command("benchmark", arguments, lambda line: show(line[:60]))
    return read_speed(folder / "benchmark.json")


def read_parity(file: Path) -> Json:
    """Read what the page needs of a report.json with a drift, and where it was measured."""
    expected = "a report.json with a drift that scripts/parity_report.py wrote"
    with reading("--parity-report", file, expected) as result:
        steps = result["drift"]["steps"]
        if not steps or any(len(curve) != len(steps) for curve in result["drift"].values()):
            raise ValueError("no drift")
        return describe_parity(result | {"source": describe_source(file, result)})


def measure_parity(config: CompareConfig, show: Show) -> Json:
    """Compare the two implementations with the harness, or read an earlier comparison from a file."""
    if config.parity_report is not None:
        return read_parity(config.parity_report)
    from parity_tests.harness.checks import examine  # only now: they load both frameworks
    from parity_tests.harness.report import to_json
    from parity_tests.product import REPORT_IMAGES, simple_cnn

    pair = simple_cnn(prepare_fashion_mnist(config.data_dir, show, any_data=config.any_data), REPORT_IMAGES)
    return describe_parity(to_json(examine(pair, seed=config.seed, steps=config.drift_steps, progress=show)))


def describe_parity(result: Json) -> Json:
    """Return what the page needs of a result of the harness."""
    curves = dict(result["drift"])
    steps = curves.pop("steps")
    differs = bool(result["divergences"])
    return {
        "passed": result["passed"],
        "divergences": result["divergences"],
        "bound": result["bound"],
        "stages": [row | {"shape": row["shape"][1:]} for row in result["stages"] if row["jax"]],
        "drift": {
            "steps": steps,
            "curves": curves,
            "together": not differs and curves["float64: JAX from PyTorch"][-1] <= TOGETHER,
        },
        "source": result.get("source"),
    }


def headline(report: Json) -> list[Json]:
    """Return the rows of the table at the top. A figure that was not measured is None."""
    epochs = {side: report["runs"][side]["epochs"] for side in FRAMEWORKS}
    figures: dict[str, Json] = {
        "accuracy": {side: rows[-1]["test_accuracy"] for side, rows in epochs.items()},
        "loss": {side: rows[-1]["test_loss"] for side, rows in epochs.items()},
        "epoch_seconds": {side: median(row["train_seconds"] for row in rows) for side, rows in epochs.items()},
        "compile_seconds": {side: sum(row["compile_seconds"] for row in rows) for side, rows in epochs.items()},
        "peak_bytes": {side: report["runs"][side]["peak_bytes"] for side in FRAMEWORKS},
        "lines": listings.total_lines(report["programs"]),
    }
    return [{"figure": name, **values} for name, values in figures.items()]


def judge(report: Json) -> Json:
    """Decide from the measured numbers whether the two train the same network, and say it in a sentence."""
    epochs = report["runs"]["jax"]["epochs"]
    jax, torch = (report["runs"][side]["epochs"][-1]["test_accuracy"] for side in FRAMEWORKS)
    allowed = STANDARD_ERRORS * standard_error(jax, torch, report["scores"]["images"])
    training = f"after {len(epochs)} epoch{'s' if len(epochs) != 1 else ''}"
    accuracies = f"they score {100 * jax:.2f} % and {100 * torch:.2f} %, {100 * abs(jax - torch):.2f} points apart"
    reasons = []
    if divergences := report["parity"]["divergences"]:
        first, *others = ("{check}: {where}: {problem}".format(**divergence) for divergence in divergences)
        more = f"; and {len(others)} more" if others else ""
        reasons.append(f"in float64 they differ by more than rounding ({first}{more})")
    if not abs(jax - torch) <= allowed:  # NaN must not pass
        reasons.append(f"{training} {accuracies}; chance explains {100 * allowed:.2f}")
    if reasons:
        sentence = f"JAX and PyTorch do not train the same network: {'; and '.join(reasons)}."
    else:
        sentence = (
            f"JAX and PyTorch train the same network: in float64 all {len(report['parity']['passed'])} checks agree to "
            f"rounding, and {training} from the same weights on the same batches {accuracies} where chance alone "
            f"explains {100 * allowed:.2f}."
        )
    return {
        "same": not reasons,
        "accuracy_allowed": allowed,
        "standard_errors": STANDARD_ERRORS,
        "sentence": sentence,
    }


def standard_error(jax: float, torch: float, images: int) -> float:
    """Return the standard error of a difference of two accuracies: sqrt(p (1 - p) / n) of each, added in squares.

    Two networks on the same images differ less than this by chance, but the chance of training adds to it. Over ten
    seeds, full trainings of the two were 0.27 points apart (standard deviation), where this gives 0.39.
    """
    return math.sqrt(sum(accuracy * (1 - accuracy) / images for accuracy in (jax, torch)))

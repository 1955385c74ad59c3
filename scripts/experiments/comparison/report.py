"""Everything that the page shows, in one JSON object: measured step by step, with visible progress."""

from collections.abc import Callable
from dataclasses import asdict
from statistics import median
from typing import Any

import numpy as np

from experiments import processes
from experiments.comparison import programs, scores, verdict
from experiments.comparison.arrays import pack, png
from experiments.comparison.earlier import read_benchmark
from experiments.comparison.settings import COMMITTED_BENCHMARK, CompareConfig
from experiments.comparison.training import FRAMEWORKS, Framework, Run, initial_weights, obtain
from jax_cnn.config import UserError
from jax_cnn.data import CLASS_NAMES, load_fashion_mnist
from jax_cnn.run.display import ProgressBar
from jax_cnn.run.provenance import provenance
from jax_cnn.torch_layout import load_weights

Json = dict[str, Any]

PACKAGES = ("jax", "jaxlib", "flax", "optax", "torch", "torchvision", "numpy", "matplotlib")
SECTIONS = 6
SLACK = 1  # images: a tie within rounding may fall differently in a batch of another size. Worst seen: 0
MAPS = 8  # feature maps of each stage that are shown
LOOKED_INTO = 0  # the test image whose feature maps are shown
IMAGES = 40 * 64 + 32  # that the harness trains on, as in scripts/parity_report.py
NAMES = {"jax": "JAX", "torch": "PyTorch"}


def measure(config: CompareConfig, progress: ProgressBar) -> Json:
    """Train or take both runs, and measure all that the page shows.

    Raises:
        UserError: a run does not fit, training fails, or a run's weights do not give the accuracy that it tells.
    """
    progress.begin("PyTorch's initial weights, for both", 0, SECTIONS)
    initial = initial_weights(config)
    runs: dict[Framework, Run] = {}
    for number, framework in enumerate(FRAMEWORKS, start=1):
        progress.begin(f"training with {NAMES[framework]}", number, SECTIONS)
        runs[framework] = obtain(framework, config, initial, progress.report, progress.say)
    progress.begin("speed by configuration", 3, SECTIONS)
    result = provenance(PACKAGES) | {
        "config": asdict(config),
        "classes": list(CLASS_NAMES),
        "runs": {framework: run.as_json() for framework, run in runs.items()},
        "speed": speed_table(config, progress.report),
        "programs": programs.stages(),
        "operations": programs.operations(),
    }
    progress.begin("test images", 4, SECTIONS)
    result |= look(config, runs)
    progress.begin("parity in float64", 5, SECTIONS)
    result["parity"] = hold_together(config, progress.report)
    result["headline"] = headline(result)
    result["verdict"] = verdict.judge(result)
    return result


def speed_table(config: CompareConfig, show: Callable[[str], None]) -> Json:
    """From the file asked for, from a benchmark here and now, or the figures that come with the project.

    Raises:
        UserError: the file is no benchmark's, or the benchmark failed.
    """
    if not config.run_benchmark:
        return read_benchmark(config.benchmark or COMMITTED_BENCHMARK)
    folder = config.out_dir / "benchmark"
    places = ["--out-dir", str(folder), "--data-dir", str(config.data_dir)]
    processes.run("benchmark", ["--quick", *places], lambda line: show(line[:60]))
    return read_benchmark(folder / "benchmark.json")


def look(config: CompareConfig, runs: dict[Framework, Run]) -> Json:
    """What both trained networks say of the test images, and how they look inside.

    Raises:
        UserError: a run's weights do not give the accuracy that it tells.
    """
    from experiments.comparison.networks import jax_answers, torch_answers  # only now: they load the frameworks

    weights = {framework: load_weights(run.weights, "float32") for framework, run in runs.items()}
    where = (config.data_dir, config.limit_test, LOOKED_INTO)
    answers = {"jax": jax_answers(weights["jax"], *where), "torch": torch_answers(weights["torch"], *where)}
    data = load_fashion_mnist(config.data_dir)
    labels = data.test_labels[: config.limit_test].astype(np.int64)
    logits = {side: each.logits for side, each in answers.items()}
    told = scores.compare(logits, labels)
    for framework, run in runs.items():
        claimed, found = run.epochs[-1]["test_accuracy"], told["accuracy"][framework]
        if abs(claimed - found) * len(labels) > SLACK + 0.5:
            raise UserError(
                f"{run.folder}: its weights score {found:.2%}, and its metrics say {claimed:.2%}; train it again"
            )
    grid = scores.predictions(list(range(min(config.images, len(labels)))), logits, labels)
    apart = scores.predictions(told["disagreements"][: config.disagreements], logits, labels)
    stages = {side: each.stages for side, each in answers.items()}
    channels = {name: liveliest(maps) for name, maps in stages["torch"].items() if maps.ndim == 3}
    shown = sorted({LOOKED_INTO, *(row["image"] for row in (*grid, *apart))})
    return {
        "scores": told,
        "predictions": grid,
        "disagreements": apart,
        "inside": {"image": LOOKED_INTO, "label": int(labels[LOOKED_INTO]), "stages": stage_rows(stages, channels)},
        "pictures": {
            "test_images": {str(image): png(data.test_images[image]) for image in shown},
            "filters": {side: pack(each["conv1.weight"][:, 0]) for side, each in weights.items()},
            "features": {
                side: {name: pack(maps[channels[name]] if name in channels else maps) for name, maps in each.items()}
                for side, each in stages.items()
            },
        },
    }


def liveliest(maps: np.ndarray) -> list[int]:
    """The channels whose maps vary most, in their own order."""
    return sorted(np.argsort(-maps.std(axis=(1, 2)), kind="stable")[:MAPS].tolist())


def stage_rows(stages: dict[str, dict[str, np.ndarray]], channels: dict[str, list[int]]) -> list[Json]:
    """How far apart the trained networks' outputs are in each stage, in units of PyTorch's largest."""
    return [
        {
            "stage": name,
            "shape": list(theirs.shape),
            "channels": channels.get(name),
            "furthest": float(np.abs(stages["jax"][name] - theirs).max()),
            "median": float(np.median(np.abs(stages["jax"][name] - theirs))),
            "largest": float(np.abs(theirs).max()),
        }
        for name, theirs in stages["torch"].items()
    ]


def hold_together(config: CompareConfig, show: Callable[[str], None]) -> Json:
    """The harness's verdict on the code, whatever the two runs came to.

    Raises:
        UserError: the file asked for is no parity report.
    """
    from experiments.comparison import parity  # only now: it loads the frameworks
    from parity_tests.harness.product_pairs import simple_cnn

    if config.parity_report is not None:
        return parity.taken(config.parity_report)
    return parity.measure(simple_cnn(config.data_dir, IMAGES), config.seed, config.drift_steps, show)


def headline(report: Json) -> list[Json]:
    """The table at the top, a row for each figure; None where it was not measured."""
    rows = {side: report["runs"][side]["epochs"] for side in FRAMEWORKS}
    lines = programs.total_lines(report["programs"])
    figures: dict[str, Json] = {
        "accuracy": {side: each[-1]["test_accuracy"] for side, each in rows.items()},
        "loss": {side: each[-1]["test_loss"] for side, each in rows.items()},
        "epoch_seconds": {side: median(row["train_seconds"] for row in each) for side, each in rows.items()},
        "compile_seconds": {side: sum(row["compile_seconds"] for row in each) for side, each in rows.items()},
        "peak_bytes": {side: report["runs"][side]["peak_bytes"] for side in FRAMEWORKS},
        "lines": lines,
    }
    return [{"figure": name, **figure} for name, figure in figures.items()]

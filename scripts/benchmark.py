"""Measure how fast JAX and PyTorch train SimpleCNN: the same steps on both sides, in one run. On the CPU, or a GPU."""

import sys
from dataclasses import replace

from rich.console import Console

from experiments.speed import benchmark, gpu
from experiments.speed.config import BenchmarkConfig, apply_presets
from experiments.speed.results import sentence, tables
from experiments.speed.workers import WorkerFailed
from jax_cnn.data import prepare_fashion_mnist
from jax_cnn.files import check_out_dir
from jax_cnn.run import command_line
from jax_cnn.run.display import ProgressBar, show_table
from jax_cnn.run.provenance import warn_of_two_cudas


def main() -> None:
    """Read the command line, measure, and show the results."""
    config = apply_presets(command_line.parse(BenchmarkConfig(), __doc__))
    card = gpu.describe_card() if config.device == "gpu" else ""
    check_out_dir(config.out_dir)
    console = Console()
    warn_of_two_cudas(config.device, console.print)
    config = replace(config, data_dir=prepare_fashion_mnist(config.data_dir, console.print))
    progress = ProgressBar(console)
    try:
        with progress:
            result = gpu.run(config, card, progress) if card else benchmark.run(config, progress)
    except WorkerFailed as failure:
        print(f"error: {failure}", file=sys.stderr)
        sys.exit(1)
    files = [gpu.RESULT] if card else benchmark.draw(result, config.out_dir)
    for table in gpu.tables(result) if card else tables(result):
        show_table(console, table)
    if not card:
        progress.say(sentence(result))
    progress.say(f"Results are in {config.out_dir}: {', '.join(files)}")


if __name__ == "__main__":
    command_line.run(main)

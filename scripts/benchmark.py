"""Measure how fast JAX and PyTorch train SimpleCNN on the CPU: the same steps on both sides, in turns, in one run."""

import sys

from rich.console import Console

from experiments.speed import benchmark
from experiments.speed.progress import Steps
from experiments.speed.settings import BenchmarkConfig, planned
from experiments.speed.tables import sentence, tables
from experiments.speed.team import WorkerFailed
from jax_cnn.data import prepare_fashion_mnist
from jax_cnn.run import command_line
from jax_cnn.run.folder import check_out_dir


def main() -> None:
    """Read the command line, measure, show."""
    config = planned(command_line.parse(BenchmarkConfig(), __doc__))
    check_out_dir(config.out_dir)
    console = Console()
    prepare_fashion_mnist(config.data_dir, console.print)
    steps = Steps(console)
    try:
        with steps:
            result = benchmark.run(config, steps, steps.say)
    except WorkerFailed as failure:
        print(f"error: {failure}", file=sys.stderr)
        sys.exit(1)
    files = benchmark.draw(result, config.out_dir)
    for table in tables(result):
        console.print(table)
    steps.say(sentence(result))
    steps.say(f"Results are in {config.out_dir}: {', '.join(files)}")


if __name__ == "__main__":
    command_line.run(main)

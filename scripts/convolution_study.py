"""Measure what convolution buys: softmax regression, a feed-forward network and SimpleCNN, in both frameworks.

On equal epochs, equal parameters and equal training time, and on shifted test images. Interrupted, it goes on where it
stopped when started again.
"""

import os

from rich.console import Console

from experiments.studies.convolution_runs import ConvolutionConfig, pace_runs, planned_runs, read_pace
from experiments.studies.progress import train_missing
from experiments.studies.runs import ENVIRONMENT
from jax_cnn.run import command_line
from jax_cnn.run.folder import check_out_dir


def main() -> None:
    """Time, train what is missing, score, write, show."""
    config = command_line.parse(ConvolutionConfig(), __doc__)
    check_out_dir(config.out_dir)
    console = Console()
    console.print("How long does an epoch take? Leave the machine alone for this.")
    train_missing(pace_runs(config), console, lambda run: 1.0)  # the commands themselves
    pace = read_pace(config)
    for framework, paces in pace.items():
        shown = ", ".join(f"{model} {seconds:.2f} s" for model, seconds in paces.items())
        console.print(f"{framework}, an epoch: {shown}", highlight=False)

    os.environ |= ENVIRONMENT  # before torch loads, whose threads would otherwise spin
    from experiments.studies import (
        convolution,
        convolution_figure,
        convolution_training,  # only now: two frameworks
    )

    runs = planned_runs(config, pace)
    train_missing(
        runs,
        console,
        lambda run: run.config.epochs * pace[run.framework][run.config.model],
        convolution_training.train,
    )
    result = convolution.conclude(config, pace)
    convolution.write(result, config.out_dir)
    convolution_figure.draw(result, config.out_dir / "convolution.png")
    console.print(convolution_figure.accuracy_table(result))
    for sentence in convolution.sentences(result):
        console.print(sentence, highlight=False, soft_wrap=True)
    console.print(
        f"Results are in {config.out_dir}: convolution.json, convolution.png", highlight=False, soft_wrap=True
    )


if __name__ == "__main__":
    command_line.run(main)

"""Train both frameworks from the same weights on the same batches, or take finished runs, and write a page about it."""

from rich.console import Console

from experiments.comparison.settings import CompareConfig
from experiments.comparison.training import check_given
from jax_cnn.data import prepare_fashion_mnist
from jax_cnn.run import command_line
from jax_cnn.run.display import ProgressBar
from jax_cnn.run.folder import check_out_dir


def main() -> None:
    """Read the command line, train, measure, write the page."""
    config = command_line.parse(CompareConfig(), __doc__)
    check_given(config)
    check_out_dir(config.out_dir)

    from experiments.comparison import (
        publish,
        report,  # only now: a slip should not wait for matplotlib
    )

    console = Console()
    prepare_fashion_mnist(config.data_dir, console.print)
    progress = ProgressBar(console)
    with progress:
        measured = report.measure(config, progress)
        page = publish.write(measured, config.out_dir, progress.say)
    progress.say(measured["verdict"]["sentence"])
    progress.say(f"The page is {page}: open it in a browser")


if __name__ == "__main__":
    command_line.run(main)

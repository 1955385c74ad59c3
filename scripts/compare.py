"""Train both frameworks from the same weights on the same batches, or take finished runs, and write a page about it."""

from rich.console import Console

from experiments.comparison import report, scores
from experiments.comparison.runs import CompareConfig
from jax_cnn.data import prepare_fashion_mnist
from jax_cnn.files import check_out_dir
from jax_cnn.run import command_line
from jax_cnn.run.display import ProgressBar
from jax_cnn.run.provenance import warn_of_two_cudas


def main() -> None:
    """Read the command line, measure, and write the page."""
    config = command_line.parse(CompareConfig(), __doc__)
    console = Console()
    if config.layers:
        console.print(scores.layer_table(scores.list_layers()))
        note = "Output of one image: PyTorch [channel, row, column], JAX [row, column, channel]"
        console.print(note, highlight=False, markup=False)
        return
    report.check_named(config)
    check_out_dir(config.out_dir)

    from experiments.comparison import page  # only now: an error in the command line should not wait for matplotlib

    warn_of_two_cudas(config.device, console.print)
    prepare_fashion_mnist(config.data_dir, console.print, any_data=config.any_data)
    with ProgressBar(console) as progress:
        result = report.measure(config, progress)
        file = page.write(result, config.out_dir, progress.say)
    progress.say(result["verdict"]["sentence"])
    progress.say(f"The page is {file}: open it in a browser")


if __name__ == "__main__":
    command_line.run(main)

"""Train both frameworks from the same weights on the same batches, or take finished runs, and write a page about it."""

from rich.console import Console

from jax_cnn import fashion_mnist
from jax_cnn.shell import command_line
from jax_cnn.shell.run_folder import check_out_dir
from parity_tests.comparison.settings import CompareConfig
from parity_tests.comparison.training import check_given
from parity_tests.speed.progress import Steps


def main() -> None:
    """Read the command line, train, measure, write the page."""
    config = command_line.parse(CompareConfig(), __doc__)
    check_given(config)
    check_out_dir(config.out_dir)

    from parity_tests.comparison import publish, report  # only now: a slip should not wait for matplotlib

    console = Console()
    fashion_mnist.prepare(config.data_dir, console.print)
    steps = Steps(console)
    with steps:
        measured = report.measure(config, steps)
        page = publish.write(measured, config.out_dir, steps.say)
    steps.say(measured["verdict"]["sentence"])
    steps.say(f"The page is {page}: open it in a browser")


if __name__ == "__main__":
    command_line.run(main)

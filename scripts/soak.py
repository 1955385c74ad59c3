"""Train, kill, damage, resume and predict for an hour, and hold every result to that of an undisturbed run.

Exit status 1: a run ended with another result, or memory or open files grew.
"""

import sys

from rich.console import Console

from jax_cnn.shell import command_line
from jax_cnn.shell.run_folder import check_out_dir
from parity_tests.harness.soak import SoakConfig, describe, soak


def main() -> None:
    """Go on until the time is up; show what happened."""
    config = command_line.parse(SoakConfig(), __doc__)
    check_out_dir(config.out_dir)
    console = Console(highlight=False, soft_wrap=True)
    tally = soak(config, console.print)
    wrong = tally.verdict()
    console.print(f"{describe(tally)}. {'; '.join(wrong) or 'Memory and open files did not grow'}.")
    console.print(f"Written to {config.out_dir / 'report.json'}.")
    if wrong:
        sys.exit(1)


if __name__ == "__main__":
    command_line.run(main)

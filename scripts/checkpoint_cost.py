"""Measure by how much saving slows a training: the same steps with a checkpoint and without, in turns.

Exit status 1: by more than 1 % with the default --checkpoint-seconds.
"""

import json
import sys

from rich.console import Console

from jax_cnn.files import write_atomically
from jax_cnn.shell import command_line
from jax_cnn.shell.provenance import provenance
from jax_cnn.shell.run_folder import check_out_dir, set_aside
from parity_tests.speed.checkpoint_cost import BOUND, CostConfig, measure, summary

REPORT = "checkpoint_cost.json"


def main() -> None:
    """Measure each framework, show, write."""
    config = command_line.parse(CostConfig(), __doc__)
    check_out_dir(config.out_dir)
    console = Console(highlight=False, soft_wrap=True)
    report = provenance(("jax", "jaxlib", "torch", "numpy", "safetensors"))
    slow = False
    for framework in config.frameworks:
        measured = measure(config, framework, console.print)
        figures = summary(measured)
        report[framework] = figures | measured
        slowdown = figures["slower_by"]
        slow |= slowdown["median"] > BOUND
        console.print(
            f"{framework}: {figures['step_milliseconds']['median']:.1f} ms a step; a checkpoint costs "
            f"{figures['extra_milliseconds_per_checkpoint']['median']:.0f} ms, of which training stands still for "
            f"{figures['copy_milliseconds']['median']:.0f}; one in 30 s makes it {slowdown['median']:.2%} slower "
            f"(quartiles {slowdown['low']:.2%} to {slowdown['high']:.2%}, {config.rounds} pairs)"
        )
    set_aside(config.out_dir, [REPORT], console.print)
    write_atomically(config.out_dir / REPORT, f"{json.dumps(report)}\n".encode())
    console.print(f"Written to {config.out_dir / REPORT}.")
    if slow:
        sys.exit(1)


if __name__ == "__main__":
    command_line.run(main)

"""Run every check of the harness on large networks, each in a process of its own, and print what it takes."""

import os
import sys
from dataclasses import dataclass
from typing import Literal

import tyro

from experiments import processes
from experiments.records import ENVIRONMENT
from jax_cnn.run import command_line

Name = Literal["resnet18", "resnet50", "gpt2"]


@dataclass(frozen=True)
class LargePortsConfig:
    """The flags of this command."""

    networks: tyro.conf.Positional[tuple[Name, ...]] = ("resnet18", "resnet50", "gpt2")
    """The networks that are checked, one after the other."""
    checks: tuple[str, ...] = ()
    """The names of the checks; none means all."""
    here: bool = False
    """Check the first network in this process, instead of each in a process of its own."""


def main() -> None:
    """Read the command line, run the checks, and end with status 1 if any network differs."""
    config = command_line.parse(LargePortsConfig(), __doc__)
    if config.here:
        from experiments.large_ports import rows

        print(rows.measure(config.networks[0], lambda line: print(line, flush=True), config.checks))
        return
    table: list[str] = []
    for name in config.networks:
        lines: list[str] = []

        def show(line: str, lines: list[str] = lines) -> None:
            lines.append(line)
            print(line, flush=True)

        arguments = [name, "--here", *(("--checks", *config.checks) if config.checks else ())]
        processes.run("large_ports", arguments, show, ENVIRONMENT)
        table.append(lines[-1])
    from experiments.large_ports.rows import HEADER

    print(HEADER, *table, sep="\n")
    if not all(row.endswith("| the same |") for row in table):
        sys.exit(1)


if __name__ == "__main__":
    os.environ |= ENVIRONMENT  # before PyTorch is loaded
    command_line.run(main)

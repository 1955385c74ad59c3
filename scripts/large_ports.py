"""Run every check of the harness on large networks, each in a process of its own, and print what it takes."""

import os
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import tyro

from experiments.records import ENVIRONMENT, read_peak_memory, run_command
from jax_cnn.run import command_line

if TYPE_CHECKING:
    from parity_tests.harness.pair import Pair

Name = Literal["resnet18", "resnet50", "gpt2"]

HEADER = "| network | seconds | at most | peak GiB | at most | result |\n|---|---|---|---|---|---|"


@dataclass(frozen=True)
class LargePortsConfig:
    """The flags of this command."""

    networks: tyro.conf.Positional[tuple[Name, ...]] = ("resnet18", "resnet50", "gpt2")
    """The networks that are checked, one after the other."""
    checks: tuple[str, ...] = ()
    """The names of the checks; none means all."""
    here: bool = False
    """Check the first network in this process, instead of each in a process of its own."""


class Limits(NamedTuple):
    """The name of a network in the table, and what its checks may take."""

    title: str
    seconds: int
    """Time that all checks may take on two cores."""
    gib: float
    """Memory that they may hold."""


NETWORKS: dict[Name, Limits] = {
    "resnet18": Limits("ResNet-18, 3x64x64", 75, 2.5),
    "resnet50": Limits("ResNet-50, 3x224x224, batch of 2", 240, 6.0),
    "gpt2": Limits("GPT-2 small, 32 tokens, batch of 2", 360, 11.0),
}


def main() -> None:
    """Read the command line, run the checks, and end with status 1 if any network differs."""
    config = command_line.parse(LargePortsConfig(), __doc__)
    if config.here:
        print(measure(config.networks[0], config.checks))
        return
    table = []
    for name in config.networks:
        lines: list[str] = []

        def show(line: str, lines: list[str] = lines) -> None:
            lines.append(line)
            print(line, flush=True)

        arguments = [name, "--here", *(("--checks", *config.checks) if config.checks else ())]
        run_command("large_ports", arguments, show, ENVIRONMENT)
        table.append(lines[-1])
    print(HEADER, *table, sep="\n")
    if not all(row.endswith("| the same |") for row in table):
        sys.exit(1)


def measure(name: Name, checks: tuple[str, ...]) -> str:
    """Run the checks on a network, print a line about each check and each difference, and return the row of the table.

    No names of checks means all checks.
    """
    from parity_tests.harness.checks import CHECKS, examine  # only now: they load both frameworks
    from parity_tests.harness.compare import Refused

    title, seconds, gib = NETWORKS[name]
    started = time.perf_counter()

    def progress(text: str) -> None:
        print(f"{time.perf_counter() - started:6.1f} s, {peak_gib():.2f} GiB: {text}", flush=True)

    try:
        divergences = examine(make_pair(name), names=checks or tuple(CHECKS), progress=progress).divergences
        result = f"{len(divergences)} differences" if divergences else "the same"
        for divergence in divergences:
            print(divergence)
    except Refused as reason:
        result = f"refused: {reason}"
    taken = time.perf_counter() - started
    return f"| {title} | {taken:.0f} | {seconds} | {peak_gib():.1f} | {gib} | {result} |"


def make_pair(name: Name) -> "Pair":
    """Declare a network in both frameworks."""
    from experiments.large_ports import Sizes, gpt2_pair, resnet_pair

    if name == "gpt2":
        return gpt2_pair(Sizes(), 32, batch_sizes=(2,))
    if name == "resnet50":
        return resnet_pair("Bottleneck", (3, 4, 6, 3), 224, 1000, batch_sizes=(2,))
    return resnet_pair("BasicBlock", (2, 2, 2, 2), 64, 1000)


def peak_gib() -> float:
    """Return the most memory that this process has held, in GiB."""
    return read_peak_memory() / 2**30


if __name__ == "__main__":
    os.environ |= ENVIRONMENT  # before PyTorch is loaded
    command_line.run(main)

"""Measure the time and the memory that every check of the harness takes on three large networks."""

import resource
import time
from collections.abc import Callable
from typing import NamedTuple

from experiments.large_ports.gpt2 import Sizes, gpt2_pair
from experiments.large_ports.resnet import resnet_pair
from experiments.processes import RSS_UNIT, Show
from parity_tests.harness.checks import CHECKS, examine
from parity_tests.harness.compare import Refused
from parity_tests.harness.pair import Pair

HEADER = "| network | seconds | at most | peak GiB | at most | result |\n|---|---|---|---|---|---|"


class Network(NamedTuple):
    """A network that is measured.

    Attributes:
        title: what stands in its row.
        make: declares the pair.
        seconds: that all checks may take on two cores.
        gib: of memory that they may hold.
    """

    title: str
    make: Callable[[], Pair]
    seconds: int
    gib: float


NETWORKS = {
    "resnet18": Network("ResNet-18, 3x64x64", lambda: resnet_pair("BasicBlock", (2, 2, 2, 2), 64, 1000), 75, 2.5),
    "resnet50": Network(
        "ResNet-50, 3x224x224, batch of 2",
        lambda: resnet_pair("Bottleneck", (3, 4, 6, 3), 224, 1000, batch_sizes=(2,)),
        240,
        6.0,
    ),
    "gpt2": Network("GPT-2 small, 32 tokens, batch of 2", lambda: gpt2_pair(Sizes(), 32, batch_sizes=(2,)), 360, 11.0),
}


def measure(name: str, show: Show, checks: tuple[str, ...] = ()) -> str:
    """Run the checks on a network in this process and return its row of the table.

    Args:
        name: a key of `NETWORKS`.
        show: is called with a line about each check that begins, and with each difference.
        checks: the names of the checks; none means all.
    """
    title, make, seconds, gib = NETWORKS[name]
    started = time.perf_counter()

    def progress(text: str) -> None:
        show(f"{time.perf_counter() - started:6.1f} s, {peak_gib():.2f} GiB: {text}")

    try:
        divergences = examine(make(), names=checks or tuple(CHECKS), progress=progress).divergences
        result = f"{len(divergences)} differences" if divergences else "the same"
        for divergence in divergences:
            show(str(divergence))
    except Refused as reason:
        result = f"refused: {reason}"
    taken = time.perf_counter() - started
    return f"| {title} | {taken:.0f} | {seconds} | {peak_gib():.1f} | {gib} | {result} |"


def peak_gib() -> float:
    """Return the most memory that this process has held, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT / 2**30

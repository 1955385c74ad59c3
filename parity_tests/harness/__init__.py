"""The harness: a pair is declared, seen inside, compared, judged, reported."""

from parity_tests.harness.checks import CHECKS, Result, check, examine
from parity_tests.harness.compare import Divergence, Refused
from parity_tests.harness.pair import Batch, Inputs, Pair

__all__ = ["CHECKS", "Batch", "Divergence", "Inputs", "Pair", "Refused", "Result", "check", "examine"]

"""The harness: a pair is declared, seen inside, compared, judged, reported."""

import os

# JAX would take most of a GPU's memory when it starts, and leave too little for PyTorch in the same process.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

from parity_tests.harness.checks import CHECKS, Result, check, examine
from parity_tests.harness.compare import Divergence, Refused
from parity_tests.harness.pair import Batch, Inputs, Pair

__all__ = ["CHECKS", "Batch", "Divergence", "Inputs", "Pair", "Refused", "Result", "check", "examine"]

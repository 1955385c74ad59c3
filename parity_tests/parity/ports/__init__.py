"""Ports of small networks with the faults that people met, each with a sound twin.

The faults were told in public threads, which each function names. `PORTS` lists them all.
"""

from parity_tests.parity.ports import attention, data, layers, norms, optimizers, recurrent
from parity_tests.parity.ports.registry import PORTS, Finding, Port

__all__ = ["PORTS", "Finding", "Port", "attention", "data", "layers", "norms", "optimizers", "recurrent"]

"""Compare JAX and PyTorch in all that training consists of, and say where each difference is born."""

from jax_cnn.run import command_line
from parity_tests.command import main

if __name__ == "__main__":
    command_line.run(main)

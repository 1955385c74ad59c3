"""Studies over many seeds: accuracy, and what convolution buys."""

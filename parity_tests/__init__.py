"""What holds the JAX network and the PyTorch network together."""

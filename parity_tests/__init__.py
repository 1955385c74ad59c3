"""The harness that compares a JAX network with its PyTorch reference, and the tests."""

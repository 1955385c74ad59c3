"""SimpleCNN on FashionMNIST in JAX: pure functions on explicit state. Importing it never loads torch."""

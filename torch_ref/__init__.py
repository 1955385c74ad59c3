"""SimpleCNN on FashionMNIST in PyTorch, written as in a course: the reference for every comparison."""

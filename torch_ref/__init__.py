"""SimpleCNN on FashionMNIST in PyTorch, as a course would write it: the reference of every comparison."""

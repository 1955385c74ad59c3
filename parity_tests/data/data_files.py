"""The four files of Fashion-MNIST, as tests name them."""

from pathlib import Path

from jax_cnn.data import FILES

IMAGES, LABELS = "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"
SETTLED = [".fashion_mnist.lock", "FashionMNIST", "FashionMNIST/raw", *(f"FashionMNIST/raw/{name}" for name in FILES)]


def listing(folder: Path) -> list[str]:
    """Every path under a folder, relative to it."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))

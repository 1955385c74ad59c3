"""Names of the data set's files, and the folder that they lie in."""

from pathlib import Path

from jax_cnn.data.files import FILES

IMAGES, LABELS = "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"
COMPLETE = sorted(
    [".fashion_mnist.lock", "FashionMNIST", "FashionMNIST/raw", *(f"FashionMNIST/raw/{name}" for name in FILES)]
)


def listing(folder: Path) -> list[str]:
    """Return every path under a folder, relative to it; `COMPLETE` for a data folder that was fetched."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))

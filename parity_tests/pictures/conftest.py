"""Fixtures for the tests of pictures."""

from pathlib import Path

import pytest

from jax_cnn.data import FashionMNIST
from parity_tests.pictures.picture_files import save_png


@pytest.fixture
def boot(data: FashionMNIST, tmp_path: Path) -> Path:
    """Save the first test image, a boot, as `boot.png` in the test's folder."""
    return save_png(data.test_images[0], tmp_path / "boot.png")

"""Fixtures for the tests of the data set."""

import os
import shutil
from pathlib import Path

import pytest

from jax_cnn.data.files import FILES
from jax_cnn.data.sources import Source


@pytest.fixture
def shelf(good: Path) -> Source:
    """Return a source that always has every file."""
    return Source("the shelf", lambda names, workdir: good)


@pytest.fixture
def raw(good: Path, tmp_path: Path) -> Path:
    """Return the raw folder of the data folder `tmp_path / "data"`, with hard links to the four real files."""
    folder = tmp_path / "data" / "FashionMNIST" / "raw"
    folder.mkdir(parents=True)
    for name in FILES:
        try:
            os.link(good / name, folder / name)
        except OSError:  # the temporary folder lies on another disk
            shutil.copyfile(good / name, folder / name)
    return folder

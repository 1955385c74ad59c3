"""Fixtures for the tests of the training commands: each small training is done once and shared."""

from functools import cache
from pathlib import Path

import pytest

from parity_tests.run.training import TrainedRun, TrainOnce
from parity_tests.support import run_successfully


@pytest.fixture(params=["jax", "torch"])
def framework(request: pytest.FixtureRequest) -> str:
    """Return the framework that trains: a test that asks for it runs once with each."""
    return str(request.param)


@pytest.fixture(scope="session")
def train_once(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainOnce:
    """Return a function that trains in a new folder; the same call again returns the same run."""

    @cache
    def train(framework: str, *flags: str) -> TrainedRun:
        cwd = tmp_path_factory.mktemp(framework)
        arguments = ("--data-dir", str(data_dir), *flags)
        output = run_successfully(f"train_{framework}", *arguments, cwd=cwd)
        return TrainedRun(cwd, cwd / "runs" / framework, arguments, output)

    return train

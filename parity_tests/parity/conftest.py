"""Settings of the tests of the harness."""

from collections.abc import Iterator

import jax
import pytest

AS_IT_TRAINS = ("test_convolutions", "test_dialects", "test_trainers")  # these ask what the compiler makes of a program


@pytest.fixture(scope="module", autouse=True)
def _compile_quickly(request: pytest.FixtureRequest) -> Iterator[None]:
    """Let XLA optimise nothing: the programs are small, there are thousands, and none runs often."""
    jax.config.update("jax_disable_most_optimizations", not request.module.__name__.endswith(AS_IT_TRAINS))
    yield
    jax.config.update("jax_disable_most_optimizations", False)

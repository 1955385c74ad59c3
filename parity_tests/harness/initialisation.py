"""Do JAX's initial weights have PyTorch's distribution? Asked of every tensor, over many seeds."""

from collections.abc import Iterator

import jax
import numpy as np
from scipy import stats

from jax_cnn.torch_layout import TorchDict
from parity_tests.harness.compare import Divergence
from parity_tests.harness.pair import Pair

SEEDS = 20
SAMPLE = 2_000  # values of a tensor and seed: 40,000 in all show a difference of 2 % between two distributions
FALSE_ALARMS = 1e-4  # how often the whole check may fail on sound initialisations, over all tensors and tests


def initialisation(pair: Pair, seed: int) -> Iterator[Divergence]:
    """Two-sample tests of every tensor: Kolmogorov-Smirnov on the shape, Welch's t on the mean and on the square.

    Each of the tests may fail by chance with probability FALSE_ALARMS / (their number): Bonferroni's correction holds
    the whole check to FALSE_ALARMS. A pair without an initialisation of its own passes.
    """
    if pair.jax_init is None:
        return
    ours, theirs = pooled(jax_draws(pair, seed)), pooled(torch_draws(pair, seed))
    level = FALSE_ALARMS / (3 * len(theirs))
    for name, expected in theirs.items():
        actual = ours[name]
        if np.ptp(actual) == 0 and np.ptp(expected) > 0:
            yield Divergence("initialisation", name, f"JAX's values are all {actual[0]:g}, PyTorch's are not")
            continue
        if np.ptp(actual) == np.ptp(expected) == 0 and actual[0] == expected[0]:
            continue  # constants, as batch normalisation starts from
        tests = {
            "distribution (Kolmogorov-Smirnov)": stats.ks_2samp(actual, expected).pvalue,
            "mean (Welch's t)": stats.ttest_ind(actual, expected, equal_var=False).pvalue,
            "mean square (Welch's t)": stats.ttest_ind(actual**2, expected**2, equal_var=False).pvalue,
        }
        for test, p_value in tests.items():
            if not p_value >= level:  # a NaN is a failure
                yield Divergence(
                    "initialisation",
                    name,
                    f"{test} differs: p = {p_value:.1e} < {level:.1e}; standard deviation {actual.std():.3g} in JAX, "
                    f"{expected.std():.3g} in PyTorch, over {SEEDS} seeds",
                )
                break


def torch_draws(pair: Pair, seed: int) -> list[TorchDict]:
    """PyTorch's initial weights for `SEEDS` seeds."""
    return [pair.draw(seed * SEEDS + offset) for offset in range(SEEDS)]


def jax_draws(pair: Pair, seed: int) -> list[TorchDict]:
    """JAX's, in PyTorch's layouts."""
    if pair.jax_init is None:
        raise ValueError(f"{pair.name} has no initialisation in JAX")
    keys = [jax.random.key(seed * SEEDS + offset) for offset in range(SEEDS)]
    return [pair.to_weights(pair.leaves_of(pair.jax_init(key))) for key in keys]


def pooled(draws: list[TorchDict]) -> dict[str, np.ndarray]:
    """Up to SAMPLE values of each tensor and seed, evenly spread over the tensor, as float64."""
    names = draws[0].keys()
    return {
        name: np.concatenate([draw[name].ravel()[:: -(-draw[name].size // SAMPLE)] for draw in draws]).astype(float)
        for name in names
    }

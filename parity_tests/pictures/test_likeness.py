"""What looks nothing like the training images is said to, and what does is left alone."""

import numpy as np
import pytest

from jax_cnn.data import FashionMNIST
from jax_cnn.pictures import likeness
from jax_cnn.pictures.prepare import prepare_picture
from jax_cnn.pictures.read import read_picture
from parity_tests.pictures.picture_files import plain, portrait


def alarms(images: np.ndarray) -> int:
    """How many are said to look nothing like the training images, put in as they are."""
    return sum(likeness.oddity(prepare_picture(plain(image), "no")) is not None for image in images)


def test_eight_of_the_test_images_are_false_alarms(data: FashionMNIST) -> None:
    """As the table in `likeness` says."""
    assert alarms(data.test_images) == 8


def strange_images(data: FashionMNIST) -> dict[str, np.ndarray]:
    """A few hundred of each kind in the table in `likeness` that is always found."""
    rng = np.random.default_rng(0)
    noise = {
        "uniform noise": rng.integers(0, 256, (300, 28, 28)),
        "Gaussian noise": rng.normal(127, 50, (300, 28, 28)).clip(0, 255).round(),
        "faint noise on black": np.abs(rng.normal(0, 30, (300, 28, 28))).round(),
        "black or white": 255 * rng.integers(0, 2, (300, 28, 28)),
    }
    plain_ones = np.broadcast_to(np.arange(256)[:, None, None], (256, 28, 28))
    kinds = noise | {"plain": plain_ones, "negatives": 255 - data.test_images[:1000]}
    return {kind: images.astype(np.uint8) for kind, images in kinds.items()}


def test_negatives_noise_and_plain_images_are_always_found(data: FashionMNIST) -> None:
    """Every single one."""
    missed = {kind: len(images) - alarms(images) for kind, images in strange_images(data).items()}
    assert not any(missed.values()), missed


@pytest.mark.parametrize(
    ("bound", "off", "kind"),
    [("LIGHT_CORNER", 255, "negatives"), ("FLAT", 0.0, "plain"), ("ROUGH", 9.0, "faint noise on black")],
)
def test_each_bound_is_needed(
    data: FashionMNIST, monkeypatch: pytest.MonkeyPatch, bound: str, off: float, kind: str
) -> None:
    """With one switched off, what it is there to find passes."""
    monkeypatch.setattr(likeness, bound, off)
    images = strange_images(data)[kind]
    assert alarms(images) < 0.95 * len(images)


def test_a_large_picture_that_is_all_clutter_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """A portrait in front of a flag, and noise; their 28x28 pixels alone would not tell."""
    noise = np.random.default_rng(0).integers(0, 256, (200, 300)).astype(np.uint8)
    cluttered = [prepare_picture(read_picture(portrait())), prepare_picture(plain(noise))]
    for prepared in cluttered:
        assert "not even" in str(likeness.oddity(prepared))
    monkeypatch.setattr(likeness, "CLUTTERED", 1.0)
    assert not any(likeness.oddity(prepared) for prepared in cluttered)


def test_a_garment_on_its_side_passes(data: FashionMNIST) -> None:
    """What the measures cannot see, as the table says."""
    assert alarms(np.rot90(data.test_images[:1000], axes=(1, 2))) < 5

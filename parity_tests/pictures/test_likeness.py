"""Pictures that look nothing like the training images are found, and others pass."""

import numpy as np
import pytest

from jax_cnn.data import FashionMNIST
from jax_cnn.pictures import likeness
from jax_cnn.pictures.prepare import prepare_picture
from jax_cnn.pictures.read import read_picture
from parity_tests.pictures.picture_files import PORTRAIT, plain


def count_odd(images: np.ndarray) -> int:
    """Count the images that are found odd, prepared without inverting."""
    return sum(likeness.find_oddities(prepare_picture(plain(image), "no")) is not None for image in images)


def odd_images(data: FashionMNIST) -> dict[str, np.ndarray]:
    """Return a few hundred images of each kind that is always found, by the table in `likeness`."""
    rng = np.random.default_rng(0)
    kinds = {
        "uniform noise": rng.integers(0, 256, (300, 28, 28)),
        "Gaussian noise": rng.normal(127, 50, (300, 28, 28)).clip(0, 255).round(),
        "faint noise on black": np.abs(rng.normal(0, 30, (300, 28, 28))).round(),
        "black or white": 255 * rng.integers(0, 2, (300, 28, 28)),
        "plain": np.broadcast_to(np.arange(256)[:, None, None], (256, 28, 28)),
        "negatives": 255 - data.test_images[:300],
    }
    return {kind: images.astype(np.uint8) for kind, images in kinds.items()}


@pytest.mark.parametrize(("images", "odd"), [(2_500, 3), pytest.param(10_000, 8, marks=pytest.mark.slow)])
def test_one_in_a_thousand_test_images_is_a_false_alarm(data: FashionMNIST, images: int, odd: int) -> None:
    assert count_odd(data.test_images[:images]) == odd


def test_negatives_noise_and_plain_images_are_always_found(data: FashionMNIST) -> None:
    missed = {kind: len(images) - count_odd(images) for kind, images in odd_images(data).items()}
    assert not any(missed.values()), missed


@pytest.mark.parametrize(
    ("limit", "off", "kind"),
    [("LIGHT_CORNER", 255, "negatives"), ("FLAT", 0.0, "plain"), ("ROUGH", 9.0, "faint noise on black")],
)
def test_without_one_limit_the_images_of_its_kind_pass(
    data: FashionMNIST, monkeypatch: pytest.MonkeyPatch, limit: str, off: float, kind: str
) -> None:
    monkeypatch.setattr(likeness, limit, off)
    images = odd_images(data)[kind]
    assert count_odd(images) < 0.95 * len(images)


def test_a_portrait_and_large_noise_are_found_by_their_clutter_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scaled to 28x28 pixels, neither looks odd by the other measures."""
    noise = np.random.default_rng(0).integers(0, 256, (200, 300)).astype(np.uint8)
    cluttered = [prepare_picture(read_picture(PORTRAIT)), prepare_picture(plain(noise))]
    for prepared in cluttered:
        assert "not even" in str(likeness.find_oddities(prepared))
    monkeypatch.setattr(likeness, "CLUTTERED", 1.0)
    assert not any(likeness.find_oddities(prepared) for prepared in cluttered)


def test_a_garment_on_its_side_passes(data: FashionMNIST) -> None:
    """The measures cannot see it, as the table in `likeness` says."""
    assert count_odd(np.rot90(data.test_images[:1000], axes=(1, 2))) < 5

"""Find pictures that look nothing like the training images, or hold more than one picture or garment.

The network itself cannot find them: after five epochs of training it gives 89 % of the test images' negatives a class
with a confidence of 90 % or more, and recognises 11 % of them.
"""

import numpy as np
from jaxtyping import UInt8
from scipy import ndimage

from jax_cnn.pictures.frame import TOLERANCE
from jax_cnn.pictures.prepare import Prepared

# The limits were chosen on the training images: 25 of 60,000 exceed one. Of other 28x28 pictures, not inverted:
#
#   test images                               8 of 10,000 (0.08 %): the false alarms
#   their negatives (dark on light)           all 10,000
#   noise: uniform, Gaussian, black or white  all 10,000 of each
#   plain pictures                            all 256
#   test images with their pixels shuffled    88 % of 10,000
#   white specks on a tenth of black          5 % of 10,000
#   test images turned by 90 degrees          8 of 10,000
#
# Of 2,000 random parts of a portrait photograph (matplotlib's sample, prepared), 72 % exceed one. So the measures find
# noise, emptiness, and a background that is not black or not even. Any other light thing on black passes, garment or
# not, unless it looks drawn: 95 % of 500 digits drawn with a pen do, and 3 of the 60,000 training images.
LIGHT_CORNER = 25  # of 255, for the second-lightest corner: a garment may reach into one corner, hardly into two
CLUTTERED = 0.5  # share of the border that differs from the background: a garment touches it in a few places
FLAT = 16.0  # of 255, for the standard deviation of the pixels
ROUGH = 0.9  # mean difference of neighbours in units of that deviation; 1.13 for Gaussian noise
SMALL = 22  # pixels: the longer edge of a garment is 28, of a digit in MNIST 20; 2 of 70,000 images are below this
INK = 60  # of 255: a pixel that is lighter belongs to what is drawn
PEN = 7  # pixels: the lines of a drawn digit are thinner, at least three quarters of their area (`THIN`)
THIN = 0.25
UPRIGHT = 0.9  # width / height: a digit is not wider. Many sandals consist of thin straps, but are wider
LIGHT_INK, LIGHT_SHARE = 240, 0.95  # a line of even ink is as light as this next to nearly each of its pixels
EVEN_INK = 8.0  # of 255, for the standard deviation inside the lines: a garment has folds and shades


def find_oddities(prepared: Prepared) -> str | None:
    """Return what makes a picture unlike all training images, on one line, or None."""
    second_lightest_corner = sorted(int(prepared.pixels[row, column]) for row in (0, -1) for column in (0, -1))[-2]
    values = prepared.pixels.astype(np.float64)
    deviation = float(values.std())
    neighbour_difference = float(np.abs(np.diff(values, axis=0)).mean() + np.abs(np.diff(values, axis=1)).mean()) / 2
    oddities = []
    if prepared.pictures > 1:
        oddities.append(f"it holds {prepared.pictures} pictures; the largest was taken")
    if prepared.garments > 1:
        oddities.append(f"{prepared.garments} things lie on it, apart from one another")
    if second_lightest_corner > LIGHT_CORNER:
        oddities.append(f"its background is not black (two corners are at {second_lightest_corner} of 255 or lighter)")
    if prepared.clutter > CLUTTERED:
        oddities.append(f"its background is not even ({prepared.clutter:.0%} of its border stands out)")
    if deviation < FLAT:
        oddities.append(f"hardly anything is on it (its pixels vary by {deviation:.0f} of 255)")
    if neighbour_difference > ROUGH * deviation:
        oddities.append("it is as rough as noise (its neighbouring pixels have little in common)")
    if is_small(prepared.pixels):
        oddities.append("it is small in its picture, as a digit of MNIST is")
    if is_drawn(prepared.pixels):
        oddities.append("it consists of lines in one ink, as a drawn digit does")
    return "; ".join(oddities) or None


def is_small(pixels: UInt8[np.ndarray, "28 28"]) -> bool:
    """Return whether something is on the picture that is much smaller than each garment of the training images."""
    foreground = pixels > TOLERANCE
    return bool(0 < max(np.count_nonzero(foreground.any(axis)) for axis in (0, 1)) < SMALL)


def is_drawn(pixels: UInt8[np.ndarray, "28 28"]) -> bool:
    """Return whether the picture consists of thin lines of an even ink, and is no wider than a digit."""
    ink = pixels > INK
    width, height = (np.count_nonzero(ink.any(axis)) for axis in (0, 1))
    if not 0 < width < UPRIGHT * height:
        return False
    thick = ndimage.binary_opening(ink, np.ones((PEN, PEN)))
    light = ndimage.maximum_filter(pixels, 3)[ink] >= LIGHT_INK
    inner = pixels[ndimage.binary_erosion(ink, np.ones((3, 3)))]
    even = inner.size == 0 or float(inner.std()) < EVEN_INK
    return bool(thick.sum() <= THIN * ink.sum() and light.mean() >= LIGHT_SHARE and even)

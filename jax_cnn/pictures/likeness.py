"""Find pictures that look nothing like the training images, by four measures.

The network itself cannot find them: after five epochs of training it gives 89 % of the test images' negatives a class
with a confidence of 90 % or more, and recognises 11 % of them.
"""

import numpy as np

from jax_cnn.pictures.prepare import Prepared

# The limits were chosen on the training images: 21 of 60,000 exceed one. Of other 28x28 pictures, not inverted:
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
# noise, emptiness, and a background that is not black or not even. Any light thing on black passes, garment or not.
LIGHT_CORNER = 25  # of 255, for the second-lightest corner: a garment may reach into one corner, hardly into two
CLUTTERED = 0.5  # share of the border that differs from the background: a garment touches it in a few places
FLAT = 16.0  # of 255, for the standard deviation of the pixels
ROUGH = 0.9  # mean difference of neighbours in units of that deviation; 1.13 for Gaussian noise


def find_oddities(prepared: Prepared) -> str | None:
    """Return what makes a picture unlike all training images, on one line, or None."""
    second_lightest_corner = sorted(int(prepared.pixels[row, column]) for row in (0, -1) for column in (0, -1))[-2]
    values = prepared.pixels.astype(np.float64)
    deviation = float(values.std())
    neighbour_difference = float(np.abs(np.diff(values, axis=0)).mean() + np.abs(np.diff(values, axis=1)).mean()) / 2
    oddities = []
    if second_lightest_corner > LIGHT_CORNER:
        oddities.append(f"its background is not black (two corners are at {second_lightest_corner} of 255 or lighter)")
    if prepared.clutter > CLUTTERED:
        oddities.append(f"its background is not even ({prepared.clutter:.0%} of its border stands out)")
    if deviation < FLAT:
        oddities.append(f"hardly anything is on it (its pixels vary by {deviation:.0f} of 255)")
    if neighbour_difference > ROUGH * deviation:
        oddities.append("it is as rough as noise (its neighbouring pixels have little in common)")
    return "; ".join(oddities) or None

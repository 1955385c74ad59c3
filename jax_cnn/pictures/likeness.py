"""Whether a picture looks like the training images at all: four measures that those hardly ever exceed.

The network cannot tell by itself: after five epochs of training it gives 89 % of the test images' negatives a class
with a confidence of 90 % or more, and recognises 11 % of them.
"""

from typing import NamedTuple

import numpy as np

from jax_cnn.pictures.prepare import Prepared

# Chosen on the training images, of which 21 in 60,000 exceed one. Of other 28x28 pictures, not inverted, so many do:
#
#   test images                               8 of 10,000 (0.08 %): the false alarms
#   their negatives (dark on light)           all 10,000
#   noise: uniform, Gaussian, black or white  all 10,000 of each
#   plain pictures                            all 256
#   test images with their pixels shuffled    88 % of 10,000
#   white specks on a tenth of black          5 % of 10,000
#   test images turned by 90 degrees          8 of 10,000
#
# Of 2,000 cuttings at random of a portrait photograph (matplotlib's sample, prepared), 72 % do. So the measures see a
# ground that is not black and even, noise and emptiness; any light thing on black passes, be it a garment or not.
LIGHT_CORNER = 25  # of 255
CLUTTERED = 0.5  # of the border
FLAT = 16.0  # of 255
ROUGH = 0.9


class Measures(NamedTuple):
    """What tells a training image from most other things."""

    corner: int
    """The second-lightest corner pixel: a garment may reach into one corner, hardly into two."""
    clutter: float
    """Share of the whole picture's border that stands out from its ground: a garment touches it here and there."""
    spread: float
    """Standard deviation of the pixels."""
    roughness: float
    """Mean difference of neighbours in units of the spread; 1.13 for Gaussian noise."""


def measure(prepared: Prepared) -> Measures:
    """Take the four measures of one picture."""
    corners = sorted(int(prepared.pixels[row, column]) for row in (0, -1) for column in (0, -1))
    values = prepared.pixels.astype(np.float64)
    spread = float(values.std())
    step = float(np.abs(np.diff(values, axis=0)).mean() + np.abs(np.diff(values, axis=1)).mean()) / 2
    return Measures(corners[2], prepared.clutter, spread, step / spread if spread else 0.0)


def oddity(prepared: Prepared) -> str | None:
    """What makes a picture unlike all that the network was trained on; None if nothing does."""
    corner, clutter, spread, roughness = measure(prepared)
    reasons = []
    if corner > LIGHT_CORNER:
        reasons.append(f"its ground is not black (two corners are at {corner} of 255 or lighter)")
    if clutter > CLUTTERED:
        reasons.append(f"its ground is not even ({clutter:.0%} of its border stands out)")
    if spread < FLAT:
        reasons.append(f"hardly anything is on it (its pixels vary by {spread:.0f} of 255)")
    if roughness > ROUGH:
        reasons.append("it is as rough as noise (its neighbouring pixels have little in common)")
    return "; ".join(reasons) or None

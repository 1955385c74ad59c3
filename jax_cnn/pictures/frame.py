"""Find the picture in a frame: in a figure that matplotlib saved, or in a screenshot of a window.

What stands out from the background of such a file is a filled rectangle, which the network takes for a bag. The
rectangle is the picture if it has a background of its own and something on it.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, UInt8
from scipy import ndimage

# False alarms: 8 of 12,000 (6,000 training images, enlarged to 140x140 with and without smoothing).
TOLERANCE = 12  # of 255: a pixel that is no farther from a background belongs to it; 5 %
SHORTEST = 28  # pixels of an edge
LONGEST = 3.0  # longer edge / shorter edge: title bars, colour bars and lines of text are longer
COVERED = 0.3  # share of a rectangle's first and last row and column that it covers: the ticks of axes cover less
GROUND = 0.5  # share of a rectangle's border that is its background: a garment touches the border in a few places
SIMILAR = 0.5  # area / area of the largest: a rectangle that is so large is another picture, not an icon


class Box(NamedTuple):
    """A rectangle in a picture, in pixels. `bottom` and `right` are the first row and column after it."""

    top: int
    bottom: int
    left: int
    right: int

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width."""
        return self.bottom - self.top, self.right - self.left

    def cut(self, array: np.ndarray) -> np.ndarray:
        """Return this part of an array."""
        return array[self.top : self.bottom, self.left : self.right]


def take_from_frame(grey: UInt8[np.ndarray, "height width"]) -> tuple[UInt8[np.ndarray, "rows columns"], int]:
    """Return the picture inside all frames around it, and how many pictures the fullest of these frames holds.

    A screenshot has several frames: the desktop, the window, the figure. Without a frame the picture stays as it is.
    """
    most = 1
    while boxes := find_boxes(grey):
        areas = [height * width for height, width in (box.shape for box in boxes)]
        most = max(most, sum(area >= SIMILAR * max(areas) for area in areas))
        grey = inside(boxes[int(np.argmax(areas))], grey)
    return grey, most


def find_boxes(grey: UInt8[np.ndarray, "height width"]) -> list[Box]:
    """Return the rectangles that hold a picture, as they stand out from the background of the whole."""
    foreground = np.abs(grey.astype(np.int16) - commonest(border(grey, 1))) > TOLERANCE
    # A hole in a thing belongs to the thing, such as the white inside of black axes on white.
    things, _ = ndimage.label(fill_holes(foreground), np.ones((3, 3)))
    large = np.bincount(things.ravel()) >= 4 * SHORTEST  # noise consists of a million small things
    large[0] = False
    things = np.where(large, np.cumsum(large), 0)[things]
    places = [
        Box(*(end for part in place for end in (part.start, part.stop))) for place in ndimage.find_objects(things)
    ]
    boxes = [without_ticks(things == number, box) for number, box in enumerate(places, start=1)]
    boxes = [box for box in boxes if holds_picture(box, grey, foreground)]
    if boxes or not places:
        return boxes
    # A garment that reaches the edge of its picture may divide it: look at all things together that reach no border.
    height, width = grey.shape
    inner = [box for box in places if box.top > 0 and box.left > 0 and box.bottom < height and box.right < width]
    if len(inner) > 1:
        tops, bottoms, lefts, rights = zip(*inner, strict=True)
        boxes = [Box(min(tops), max(bottoms), min(lefts), max(rights))]
    return [box for box in boxes if holds_picture(box, grey, foreground)]


def holds_picture(
    box: Box, grey: UInt8[np.ndarray, "height width"], foreground: Bool[np.ndarray, "height width"]
) -> bool:
    """Return whether a box in a picture stands out with its edge and is a picture itself."""
    if min(box.shape) < SHORTEST or box.shape == grey.shape:
        return False
    return is_framed(box.cut(foreground)) and is_picture(inside(box, grey))


def border(array: np.ndarray, thickness: int) -> np.ndarray:
    """Return the outermost rows and columns in one row."""
    middle = array[thickness:-thickness]
    sides = (array[:thickness], array[-thickness:], middle[:, :thickness], middle[:, -thickness:])
    return np.concatenate([side.ravel() for side in sides])


def fill_holes(foreground: Bool[np.ndarray, "height width"]) -> Bool[np.ndarray, "height width"]:
    """Return the foreground with what it encloses. `ndimage.binary_fill_holes` does the same and takes longer."""
    grounds, number = ndimage.label(~foreground)
    outside = np.zeros(number + 1, bool)
    outside[border(grounds, 1)] = True
    outside[0] = False  # the foreground
    filled: Bool[np.ndarray, "height width"] = ~outside[grounds]
    return filled


def commonest(values: UInt8[np.ndarray, " size"]) -> int:
    """Return the value that occurs most often."""
    return int(np.bincount(values).argmax())


def without_ticks(thing: Bool[np.ndarray, "height width"], box: Box) -> Box:
    """Return the box without the rows and columns at its edges that hold little of the thing."""
    part = box.cut(thing)
    rows, columns = (np.flatnonzero(part.mean(axis) >= COVERED) for axis in (1, 0))
    if not (rows.size and columns.size):
        return Box(0, 0, 0, 0)
    top, left = box.top, box.left
    return Box(top + int(rows[0]), top + int(rows[-1]) + 1, left + int(columns[0]), left + int(columns[-1]) + 1)


def inside(box: Box, grey: UInt8[np.ndarray, "height width"]) -> UInt8[np.ndarray, "rows columns"]:
    """Return the picture in a box, without the line that axes draw around it (a hundredth of its edge)."""
    line = min(box.shape) // 100
    return box.cut(grey)[line : box.shape[0] - line, line : box.shape[1] - line]


def is_framed(foreground: Bool[np.ndarray, "height width"]) -> bool:
    """Return whether the outermost pixels of a box stand out: at all corners, and on half of its edge or more."""
    edges = (foreground[0], foreground[-1], foreground[:, 0], foreground[:, -1])
    corner = max(1, min(foreground.shape) // 50)
    ends = [end for edge in edges for end in (edge[:corner], edge[-corner:])]
    return bool(min(end.mean() for end in ends) >= 0.7 and border(foreground, 1).mean() >= GROUND)


def is_picture(grey: UInt8[np.ndarray, "height width"]) -> bool:
    """Return whether something lies on an even background that covers half of the border and two corners or more."""
    height, width = grey.shape
    if max(height, width) > LONGEST * min(height, width):
        return False
    cell = max(1, min(height, width) // 28)
    ground = commonest(border(grey, cell))
    same = np.abs(grey.astype(np.int16) - ground) <= TOLERANCE
    corners = [same[:cell, :cell], same[:cell, -cell:], same[-cell:, :cell], same[-cell:, -cell:]]
    even_corners = sum(corner.mean() > 0.5 for corner in corners)
    return bool(border(same, cell).mean() >= GROUND and even_corners >= 2 and 0.01 < same.mean() < 0.99)

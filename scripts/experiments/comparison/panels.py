"""Figures made of pictures: confusion, filters, feature maps, test images. Each is drawn from the report alone."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.comparison.arrays import pixels, unpack
from experiments.comparison.charts import NAMES
from experiments.comparison.theme import Theme, figure, title

Json = dict[str, Any]
COLUMNS = 4  # of a grid of test images


def confusion(report: Json, theme: Theme, side: str) -> Figure:
    """How many images of each class one network takes for each class. The shade tells only mistakes apart."""
    counts = np.array(report["scores"]["confusion"][side])
    mistakes = off_diagonal(counts)
    most = max(off_diagonal(np.array(each)).max() for each in report["scores"]["confusion"].values())
    made = figure(5.0)
    axes = made.subplots()
    darkest = 1.6 * max(most, 1)
    axes.imshow(mistakes, cmap=theme.sequential, vmin=0, vmax=darkest)
    for row, column in np.argwhere(counts):
        bold = "bold" if row == column else "normal"
        colour = theme.paper if mistakes[row, column] > 0.45 * darkest else theme.ink
        style: Json = {"ha": "center", "va": "center", "fontsize": 7.5, "fontweight": bold, "color": colour}
        axes.text(column, row, f"{counts[row, column]}", **style)
    names = report["classes"]
    axes.set_xticks(range(len(names)), names, rotation=50, ha="right", rotation_mode="anchor", fontsize=8.5)
    axes.set_yticks(range(len(names)), names, fontsize=8.5)
    axes.tick_params(length=0)
    axes.set(xlabel="what the network says (number of images)", ylabel="what the image shows")
    worst = np.unravel_index(mistakes.argmax(), mistakes.shape)
    title(
        made,
        f"{NAMES[side]}'s commonest mistake, {mistakes.max()} times: {names[worst[0]]} taken for {names[worst[1]]}",
    )
    return made


def off_diagonal(counts: np.ndarray) -> np.ndarray:
    """The mistakes alone."""
    return np.where(np.eye(len(counts), dtype=bool), 0, counts)


def filters(report: Json, theme: Theme, side: str) -> Figure:
    """The first layer's kernels of one network, on a scale that both share."""
    both = {name: unpack(each) for name, each in report["pictures"]["filters"].items()}
    limit = max(float(np.abs(each).max()) for each in both.values())
    made = figure(3.2)
    axes = made.subplots()
    picture = axes.imshow(mosaic(both[side], 8, gap=(2, 1)), cmap=theme.diverging, vmin=-limit, vmax=limit)
    for at in range(len(both[side])):
        row, column = divmod(at, 8)
        axes.text(column * 4 + 1, row * 5 - 0.6, f"{at}", ha="center", va="bottom", fontsize=7)
    bare(axes)
    axes.set_ylim(axes.get_ylim()[0], -2)
    axes.set(xlabel="column, in each kernel of 3 x 3", ylabel="row, in each kernel")
    bar = made.colorbar(picture, ax=axes, shrink=0.85, pad=0.02)
    bar.set_label("weight (no unit)")
    bar.outline.set_visible(False)
    title(made, f"{NAMES[side]}'s first layer, filter by filter")
    return made


def features(report: Json, theme: Theme, side: str) -> Figure:
    """One image's feature maps after each stage of one network, on a scale by stage that both share."""
    inside = report["inside"]
    maps = {name: unpack(each) for name, each in report["pictures"]["features"][side].items()}
    stages = [row for row in inside["stages"] if row["channels"]]
    made = figure(1.0 + 0.82 * len(stages))
    for row, axes in zip(stages, made.subplots(len(stages), 1), strict=True):
        signed = row["stage"].startswith("conv")
        colours = theme.diverging if signed else theme.sequential
        low = -row["largest"] if signed else 0.0
        axes.imshow(mosaic(maps[row["stage"]], len(row["channels"])), cmap=colours, vmin=low, vmax=row["largest"])
        size = row["shape"][-1]
        bare(axes)
        places = [at * (size + 1) + (size - 1) / 2 for at in range(len(row["channels"]))]
        axes.set_xticks(places, row["channels"], fontsize=7)
        axes.tick_params(length=0, pad=1)
        axes.set_ylabel(f"{row['stage']}\n{size} x {size}", rotation=0, ha="right", va="center", fontsize=8.5)
    name = report["classes"][inside["label"]].lower()
    title(
        made, f"{NAMES[side]} on test image {inside['image']} ({name}): ever smaller maps, of less where and more what"
    )
    made.supxlabel("columns of pixels; under each map, its channel", fontsize=9)
    made.supylabel("stages; in each, rows of pixels", fontsize=9)
    return made


def mosaic(pictures: np.ndarray, columns: int, gap: tuple[int, int] = (1, 1)) -> np.ndarray:
    """Pictures [number, row, column] in rows of so many; between them, gaps of rows and columns that are not drawn."""
    number, height, width = pictures.shape
    lines = -(-number // columns)
    down, right = height + gap[0], width + gap[1]
    whole = np.full((lines * down - gap[0], columns * right - gap[1]), np.nan)
    for at, picture in enumerate(pictures):
        row, column = divmod(at, columns)
        top, left = row * down, column * right
        whole[top : top + height, left : left + width] = picture
    return whole


def grid(report: Json, theme: Theme, key: str) -> Figure:
    """Test images with what both networks say of them, and how sure they are."""
    rows = report[key]
    lines = -(-len(rows) // COLUMNS)
    made = figure(1.0 + 1.75 * lines)
    cells = made.subplots(lines, COLUMNS, squeeze=False)
    for axes in cells.flat:
        bare(axes)
        axes.set_visible(False)
    for row, axes in zip(rows, cells.flat, strict=False):
        axes.set_visible(True)
        axes.imshow(pixels(report["pictures"]["test_images"][str(row["image"])]), cmap="gray", vmin=0, vmax=255)
        axes.set_title(f"{row['image']}: {report['classes'][row['label']]}", fontsize=7.5, loc="center", pad=3)
        for line, side in enumerate(NAMES):
            said = f"{report['classes'][row[side]['predicted']]} {row[side]['confidence']:.0%}"
            place = {"transform": axes.transAxes, "ha": "center", "va": "top", "fontsize": 7.5}
            axes.text(0.5, -0.04 - 0.13 * line, said, color=theme.side(side), **place)
    what = "on which they disagree" if key == "disagreements" else "and what both say of them"
    title(made, f"Test images {what}: JAX above, PyTorch below")
    made.supxlabel("column of pixels; number and class above each image", fontsize=9)
    made.supylabel("row of pixels", fontsize=9)
    return made


def bare(axes: Axes) -> None:
    """No ticks and no frame: pixels need none."""
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)

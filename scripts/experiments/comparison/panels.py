"""The figures that consist of pictures: confusion, filters, feature maps, test images. Drawn from the report alone."""

import base64
import io

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, LinearSegmentedColormap
from matplotlib.figure import Figure
from PIL import Image

from experiments.answers import FRAMEWORKS, Framework
from experiments.comparison.charts import Theme, new_figure, set_title
from experiments.comparison.scores import decode
from experiments.records import Json

COLUMNS = 4  # of a grid of test images
FILTER_COLUMNS = 8


def draw_confusion(report: Json, theme: Theme, side: Framework) -> Figure:
    """Draw how many images of each class one network takes for each class. Only mistakes are shaded."""
    counts = np.array(report["scores"]["confusion"][side])
    mistakes_of_both = {name: np.array(matrix) for name, matrix in report["scores"]["confusion"].items()}
    for matrix in mistakes_of_both.values():
        np.fill_diagonal(matrix, 0)
    mistakes = mistakes_of_both[side]
    darkest = 1.6 * max(1, *(matrix.max() for matrix in mistakes_of_both.values()))
    figure = new_figure(5.0)
    axes = figure.subplots()
    axes.imshow(mistakes, cmap=sequential(theme), vmin=0, vmax=darkest)
    for row, column in np.argwhere(counts):
        style: Json = {
            "color": theme.paper if mistakes[row, column] > 0.45 * darkest else theme.ink,
            "fontweight": "bold" if row == column else "normal",
        }
        axes.text(column, row, f"{counts[row, column]}", ha="center", va="center", fontsize=7.5, **style)
    names = report["classes"]
    axes.set_xticks(range(len(names)), names, rotation=50, ha="right", rotation_mode="anchor", fontsize=8.5)
    axes.set_yticks(range(len(names)), names, fontsize=8.5)
    axes.tick_params(length=0)
    axes.set(xlabel="what the network says (number of images)", ylabel="what the image shows")
    shown, predicted = np.unravel_index(mistakes.argmax(), mistakes.shape)
    mistake = f"{names[shown]} taken for {names[predicted]}"
    set_title(figure, f"{FRAMEWORKS[side]}'s commonest mistake, {mistakes.max()} times: {mistake}")
    return figure


def draw_filters(report: Json, theme: Theme, side: Framework) -> Figure:
    """Draw the first layer's kernels of one network, on a scale that both networks share."""
    kernels = {name: decode(encoded) for name, encoded in report["pictures"]["filters"].items()}
    limit = max(float(np.abs(array).max()) for array in kernels.values())
    figure = new_figure(3.2)
    axes = figure.subplots()
    picture = axes.imshow(
        mosaic(kernels[side], FILTER_COLUMNS, row_gap=2), cmap=diverging(theme), vmin=-limit, vmax=limit
    )
    for number in range(len(kernels[side])):
        row, column = divmod(number, FILTER_COLUMNS)
        axes.text(column * 4 + 1, row * 5 - 0.6, f"{number}", ha="center", va="bottom", fontsize=7)
    hide_frame(axes)
    axes.set_ylim(axes.get_ylim()[0], -2)
    axes.set(xlabel="column, in each kernel of 3 x 3", ylabel="row, in each kernel")
    bar = figure.colorbar(picture, ax=axes, shrink=0.85, pad=0.02)
    bar.set_label("weight (no unit)")
    bar.outline.set_visible(False)
    set_title(figure, f"{FRAMEWORKS[side]}'s first layer, filter by filter")
    return figure


def draw_features(report: Json, theme: Theme, side: Framework) -> Figure:
    """Draw one image's feature maps after each stage of one network. Both networks share the scale of a stage."""
    inside = report["inside"]
    rows = [row for row in inside["stages"] if row["channels"]]
    figure = new_figure(1.0 + 0.82 * len(rows))
    for row, axes in zip(rows, figure.subplots(len(rows), 1), strict=True):
        maps = decode(report["pictures"]["features"][side][row["stage"]])
        number, size, _ = maps.shape
        signed = row["stage"].startswith("conv")
        axes.imshow(
            mosaic(maps, number),
            cmap=diverging(theme) if signed else sequential(theme),
            vmin=-row["largest"] if signed else 0,
            vmax=row["largest"],
        )
        hide_frame(axes)
        axes.set_xticks(np.arange(number) * (size + 1) + (size - 1) / 2, row["channels"], fontsize=7)
        axes.tick_params(length=0, pad=1)
        axes.set_ylabel(f"{row['stage']}\n{size} x {size}", rotation=0, ha="right", va="center", fontsize=8.5)
    image = f"test image {inside['image']} ({report['classes'][inside['label']].lower()})"
    set_title(figure, f"{FRAMEWORKS[side]} on {image}: ever smaller maps, of less where and more what")
    figure.supxlabel("columns of pixels; under each map, its channel", fontsize=9)
    figure.supylabel("stages; in each, rows of pixels", fontsize=9)
    return figure


def mosaic(
    pictures: Float[np.ndarray, "number row column"], columns: int, row_gap: int = 1
) -> Float[np.ndarray, "row column"]:
    """Return pictures side by side in rows. The gaps between them are NaN, which is not drawn."""
    number, height, width = pictures.shape
    padded = np.full((number, height + row_gap, width + 1), np.nan)
    padded[:, :height, :width] = pictures
    rows = padded.reshape(-1, columns, height + row_gap, width + 1).swapaxes(1, 2)
    return rows.reshape(-1, columns * (width + 1))[:-row_gap, :-1]


def draw_images(report: Json, theme: Theme, key: str) -> Figure:
    """Draw test images with what both networks say of them, and their confidence."""
    images = report[key]
    rows = -(-len(images) // COLUMNS)
    figure = new_figure(1.0 + 1.75 * rows)
    cells = figure.subplots(rows, COLUMNS, squeeze=False).flatten()
    for axes in cells:
        hide_frame(axes)
        axes.set_visible(False)
    for image, axes in zip(images, cells, strict=False):
        axes.set_visible(True)
        png = base64.b64decode(report["pictures"]["test_images"][str(image["image"])])
        axes.imshow(np.asarray(Image.open(io.BytesIO(png))), cmap="gray", vmin=0, vmax=255)
        axes.set_title(f"{image['image']}: {report['classes'][image['label']]}", fontsize=7.5, loc="center", pad=3)
        for line, side in enumerate(FRAMEWORKS):
            answer = f"{report['classes'][image[side]['predicted']]} {image[side]['confidence']:.0%}"
            place = {"transform": axes.transAxes, "ha": "center", "va": "top"}
            axes.text(0.5, -0.04 - 0.13 * line, answer, color=theme.side(side), fontsize=7.5, **place)
    what = "on which they disagree" if key == "disagreements" else "and what both say of them"
    set_title(figure, f"Test images {what}: JAX above, PyTorch below")
    figure.supxlabel("column of pixels; number and class above each image", fontsize=9)
    figure.supylabel("row of pixels", fontsize=9)
    return figure


def hide_frame(axes: Axes) -> None:
    """Remove the ticks and the frame, which pixels do not need."""
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def sequential(theme: Theme) -> Colormap:
    """Return a colour map from the paper's colour, for 0, to the ink's."""
    return LinearSegmentedColormap.from_list("sequential", [theme.paper, theme.ink])


def diverging(theme: Theme) -> Colormap:
    """Return a colour map with the paper's colour, for 0, in the middle."""
    return LinearSegmentedColormap.from_list("diverging", [theme.negative, theme.paper, theme.positive])

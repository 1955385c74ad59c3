"""The figures of the page on light and on dark ground, each drawn from the report alone."""

import base64
import io
import math
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, StrMethodFormatter
from PIL import Image

from experiments.answers import FRAMEWORKS, Framework
from experiments.comparison.scores import decode
from experiments.records import Json
from experiments.speed.results import error_bars
from jax_cnn.run.display import BLACK, BLUE, FRAMEWORK_MARKERS, ORANGE, SKY_BLUE, VERMILION
from parity_tests.harness import report as harness_report

WIDTH = 5.0  # inches: as wide as the screen of a phone, where 10 points are then 10 points
DPI = 160
TITLE_LETTERS = 52  # in a line
COLUMNS = 4  # of a grid of test images
FILTER_COLUMNS = 8


class Theme(NamedTuple):
    """The colours of a colour scheme. The page's style sheet has the same ones."""

    suffix: str
    paper: str
    ink: str
    quiet: str
    jax: str
    torch: str
    negative: str
    positive: str
    """`negative` and `positive` are the ends of the colour map for weights, in which 0 has the paper's colour."""

    def side(self, name: str) -> str:
        """Return the colour of a framework."""
        return self.jax if name == "jax" else self.torch


LIGHT = Theme("", "#fdfcfa", "#1f2124", "#6b6f76", BLUE, VERMILION, "#7d2a5a", "#00563f")
DARK = Theme("-dark", "#16181b", "#e8e6e1", "#9a9da3", SKY_BLUE, ORANGE, "#e9a3cb", "#4fd6ae")


@contextmanager
def drawing(theme: Theme) -> Iterator[None]:
    """Draw figures in these colours."""
    settings: dict[Any, Any] = {
        **dict.fromkeys(("figure.facecolor", "savefig.facecolor", "axes.facecolor"), theme.paper),
        **dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color", "grid.color"), theme.quiet),
        **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), theme.ink),
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "grid.alpha": 0.25,
        "grid.linewidth": 0.6,
        "legend.frameon": False,
        "legend.fontsize": 9,
        "lines.linewidth": 1.8,
        "lines.markersize": 5,
        "figure.titlesize": 10.5,
        "figure.titleweight": "bold",
    }
    with matplotlib.rc_context(settings):
        yield


def new_figure(height: float) -> Figure:
    """Return an empty figure of this height in inches."""
    return Figure(figsize=(WIDTH, height), layout="constrained")


def set_title(figure: Figure, text: str) -> None:
    """Write above a figure what to see in it, in as many lines as it takes."""
    figure.suptitle(textwrap.fill(text, TITLE_LETTERS, break_long_words=False), ha="left", x=0.012)


def draw_loss(report: Json, theme: Theme) -> Figure:
    """Draw training and test loss of both frameworks by epoch, and their differences."""
    figure, upper, lower = draw_by_epoch(
        report, theme, {"train_loss": (", training", "--"), "test_loss": (", test", "-")}
    )
    upper.set(ylabel="cross-entropy (nats per image)")
    upper.set_ylim(bottom=0)
    upper.legend(ncols=2, handlelength=3.2)
    lower.set(ylabel="JAX − PyTorch\n(nats per image)")
    lower.legend(ncols=2, handlelength=3.2)
    jax, torch = (report["runs"][side]["epochs"][-1]["test_loss"] for side in FRAMEWORKS)
    set_title(figure, f"Test loss at the end: {jax:.4f} (JAX) and {torch:.4f} (PyTorch)")
    return figure


def draw_accuracy(report: Json, theme: Theme) -> Figure:
    """Draw the test accuracy of both frameworks by epoch, and their difference with what chance explains."""
    figure, upper, lower = draw_by_epoch(report, theme, {"test_accuracy": ("", "-")}, scale=100)
    upper.set(ylabel="test accuracy (%)")
    upper.legend()
    allowed = 100 * report["verdict"]["accuracy_allowed"]
    lower.axhspan(-allowed, allowed, color=theme.quiet, alpha=0.18, linewidth=0, label="explained by chance")
    lower.set(ylabel="JAX − PyTorch\n(points)")
    lower.legend()
    jax, torch = (report["runs"][side]["epochs"][-1]["test_accuracy"] for side in FRAMEWORKS)
    equally = "As far as chance can tell, equally" if 100 * abs(jax - torch) <= allowed else "Not equally"
    set_title(figure, f"{equally} accurate: {jax:.2%} and {torch:.2%}")
    return figure


def draw_by_epoch(
    report: Json, theme: Theme, curves: Mapping[str, tuple[str, str]], scale: float = 1
) -> tuple[Figure, Axes, Axes]:
    """Draw curves by epoch for both frameworks, and below them their differences.

    `curves` gives the label and the line style of some keys of an epoch. Their values are multiplied by `scale`.
    """
    figure = new_figure(4.6)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(2.4, 1))
    rows = {side: report["runs"][side]["epochs"] for side in FRAMEWORKS}
    epochs = [row["epoch"] for row in rows["jax"]]
    lower.axhline(0, color="0.5", linewidth=0.8)
    for side, name in FRAMEWORKS.items():
        # Larger and hollow: both markers are seen where they coincide.
        marker: Json = {"markersize": 9, "fillstyle": "none"} if side == "torch" else {}
        for key, (label, line) in curves.items():
            values = [scale * row[key] for row in rows[side]]
            marker |= {"color": theme.side(side), "marker": FRAMEWORK_MARKERS[side]}
            upper.plot(epochs, values, line, label=name + label, **marker)
    for key, (label, line) in curves.items():
        difference = [scale * (jax[key] - torch[key]) for jax, torch in zip(rows["jax"], rows["torch"], strict=True)]
        lower.plot(epochs, difference, line, color=theme.ink, marker=".", label=label.removeprefix(", "))
    upper.margins(y=0.1)
    lower.set(xlabel="epoch")
    lower.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (upper, lower):
        axes.grid(True)
    return figure, upper, lower


def draw_drift(report: Json, theme: Theme) -> Figure:
    """Draw how far the weights are apart over the training steps."""
    drift = report["parity"]["drift"]
    figure = new_figure(4.9)
    axes = figure.subplots()
    of_theme = {BLUE: theme.jax, VERMILION: theme.torch, BLACK: theme.ink}
    colours = {name: of_theme.get(colour, colour) for name, (colour, _) in harness_report.DRIFT_LINES.items()}
    harness_report.draw_drift(axes, drift["steps"], drift["curves"], colours)
    axes.grid(True)
    figure.legend(loc="outside lower left", ncols=1, fontsize=8.5)
    together = "stay together; in float32 they part as rounding sends them" if drift["together"] else "part too"
    set_title(figure, f"In float64 they {together}")
    return figure


def draw_throughput(report: Json, theme: Theme) -> Figure:
    """Draw the images per second of every configuration: medians, with bars to the quartiles."""
    rows = report["speed"]["rows"][::-1]
    figure = new_figure(1.2 + 0.42 * len(rows))
    axes = figure.subplots()
    for position, row in enumerate(rows):
        side = "jax" if row["name"] == "jax" else "torch"
        speed = row["images_per_second"]
        style: Json = {"fmt": FRAMEWORK_MARKERS[side], "color": theme.side(side), "capsize": 3}
        axes.errorbar(speed["median"], position, xerr=error_bars([speed]), **style)
    axes.set_yticks(range(len(rows)), [row["title"].replace("PyTorch, ", "PyTorch,\n") for row in rows], fontsize=8.5)
    axes.set(xlabel="images per second (median, quartiles)", ylabel="configuration")
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.grid(True, axis="x")
    ratio = next(row for row in rows if row["name"] == "jax")["speed_to_best_torch"]["median"]
    set_title(figure, f"JAX trains {ratio:.2f} times as fast as the best PyTorch")
    return figure


def draw_classes(report: Json, theme: Theme) -> Figure:
    """Draw the accuracy of both frameworks by class, with the standard error of each."""
    rows = [row for row in report["scores"]["classes"] if row["images"]][::-1]
    names = [report["classes"][row["label"]] for row in rows]
    figure = new_figure(4.2)
    axes = figure.subplots()
    hardest = []
    for (side, name), shift in zip(FRAMEWORKS.items(), (0.13, -0.13), strict=True):
        accuracies = [row[side]["accuracy"] for row in rows]
        errors = [math.sqrt(p * (1 - p) / row["images"]) for p, row in zip(accuracies, rows, strict=True)]
        axes.errorbar(
            100 * np.array(accuracies),
            np.arange(len(rows)) + shift,
            xerr=100 * np.array(errors),
            fmt=FRAMEWORK_MARKERS[side],
            color=theme.side(side),
            capsize=2,
            elinewidth=1,
            label=name,
        )
        hardest.append(names[int(np.argmin(accuracies))])
    axes.set_yticks(range(len(rows)), names)
    axes.set(xlabel="recognised (% of the class), ± standard error", ylabel="class")
    axes.grid(True)
    axes.legend(loc="lower left", frameon=True, framealpha=0.9, edgecolor="none")
    jax, torch = hardest
    set_title(figure, f"The hardest class: {f'{jax}, for both' if jax == torch else f'{jax} (JAX), {torch} (PyTorch)'}")
    return figure


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

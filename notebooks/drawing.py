"""The figures and tables of the lesson, kept out of its cells: matplotlib is not what it teaches."""

from collections.abc import Callable, Mapping, Sequence
from html import escape
from inspect import getsource
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
import numpy as np
from IPython.display import Markdown, display
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

# Okabe & Ito's palette, which colour-blind readers tell apart. Each framework keeps its colour in the whole lesson.
BLUE, VERMILION, GREEN, PURPLE, BLACK = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#000000"
TORCH, JAX = {"color": VERMILION, "marker": "o"}, {"color": BLUE, "marker": "s", "linestyle": "--"}

plt.rcParams.update({"figure.dpi": 90, "figure.constrained_layout.use": True, "axes.titlesize": "medium"})


class Table(NamedTuple):
    """Rows of text under a header; a notebook shows it as HTML."""

    header: Sequence[str]
    rows: Sequence[Sequence[object]]

    def __repr__(self) -> str:
        return "\n".join(" | ".join(map(str, row)) for row in (self.header, *self.rows))

    def _repr_html_(self) -> str:
        head = "".join(f"<th>{escape(str(name))}</th>" for name in self.header)
        body = "".join(
            "<tr>" + "".join(f"<td>{escape(str(value))}</td>" for value in row) + "</tr>" for row in self.rows
        )
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def show_source(*things: Callable[..., Any] | type) -> None:
    """Show where these are defined in the project, as it stands there."""
    for thing in things:
        place = f"{thing.__module__.replace('.', '/')}.py"
        display(Markdown(f"`{place}`\n\n```python\n{getsource(thing).rstrip()}\n```"))


def unit(image: Any) -> np.ndarray:
    """The image in units of its largest value."""
    array = np.asarray(image)
    return array / np.abs(array).max()


def pictures(
    title: str,
    images: Sequence[Any],
    names: Sequence[str],
    columns: int = 5,
    *,
    signed: str = "",
    size: float = 1.7,
) -> Figure:
    """Images [row, column] in a grid, each under its name.

    Args:
        title: says what to see.
        images: anything that NumPy reads.
        names: one for each.
        columns: of the grid.
        signed: what the values are, if they have a sign: violet for negative and orange for positive ones, white for 0,
            on one scale for all. Otherwise the images are grey.
        size: of one image, in inches.
    """
    arrays = [np.asarray(image) for image in images]
    rows = -(-len(arrays) // columns)
    height = size + 0.15 * max(name.count("\n") for name in names)
    figure, grid = plt.subplots(rows, columns, figsize=(columns * size, rows * height + 0.5), squeeze=False)
    largest = max(float(np.abs(array).max()) for array in arrays)
    style = {"cmap": "PuOr_r", "vmin": -largest, "vmax": largest} if signed else {"cmap": "gray_r"}
    for axes in grid.flat[len(arrays) :]:
        axes.set_axis_off()
    for axes, array, name in zip(grid.flat, arrays, names, strict=False):
        axes.imshow(array, **style)
        axes.set(title=name, xticks=[], yticks=[])
    _pixel_axes(grid[-1, 0], arrays[(rows - 1) * columns].shape)
    if signed:
        figure.colorbar(grid[0, 0].images[0], ax=grid, label=signed, shrink=0.8)
    figure.suptitle(title)
    return figure


def one_window(image: Any, kernel: Any, row: int, column: int) -> Figure:
    """Draw how a 3x3 kernel makes one pixel of a feature map: the window, the kernel, their products and the sum."""
    image, kernel = np.asarray(image), np.asarray(kernel)
    window = image[row - 1 : row + 2, column - 1 : column + 2]
    figure, (whole, *steps) = plt.subplots(1, 4, figsize=(10, 2.9))
    whole.imshow(image, cmap="gray_r")
    whole.add_patch(Rectangle((column - 1.5, row - 1.5), 3, 3, fill=False, edgecolor=VERMILION, linewidth=2))
    whole.set(title="the image and a window")
    _pixel_axes(whole, image.shape)
    names = "the window", "× the kernel", f"= products; their sum is {(window * kernel).sum():.2f}"
    for axes, values, name in zip(steps, (window, kernel, window * kernel), names, strict=True):
        axes.imshow(values, cmap="PuOr_r", vmin=-1.5, vmax=1.5)
        for (i, j), value in np.ndenumerate(values):
            axes.text(j, i, f"{value:.2f}", ha="center", va="center")
        axes.set(title=name, xticks=range(3), xticklabels=range(column - 1, column + 2))
        axes.set(yticks=range(3), yticklabels=range(row - 1, row + 2))
    figure.suptitle("One pixel of a feature map: multiply what lies under the kernel, and add up")
    return figure


def curves(
    title: str,
    lines: Mapping[str, tuple[Sequence[float] | np.ndarray, Sequence[float] | np.ndarray, Mapping[str, Any]]],
    x: str,
    y: str,
    **axes_settings: Any,
) -> Axes:
    """Lines over one another.

    Args:
        title: says what to see.
        lines: by label: x, y and matplotlib's style.
        x: label, with the unit.
        y: likewise.
        axes_settings: for `Axes.set`, such as yscale="log".
    """
    _, axes = plt.subplots(figsize=(6.5, 3.6))
    for label, (across, up, style) in lines.items():
        axes.plot(across, up, label=label, **style)
    axes.set(title=title, xlabel=x, ylabel=y, **axes_settings)
    axes.grid(alpha=0.3)
    if len(lines) > 1:
        axes.legend()
    return axes


def bars(
    title: str, groups: Sequence[str], series: Mapping[str, tuple[Sequence[float], str]], y: str, **axes_settings: Any
) -> Axes:
    """Bars in groups, with their values written above.

    Args:
        title: says what to see.
        groups: names along the x axis.
        series: by label: a value for each group, and a colour.
        y: label, with the unit.
        axes_settings: for `Axes.set`.
    """
    _, axes = plt.subplots(figsize=(max(5.5, 1.1 * len(groups)), 3.6))
    width = 0.8 / len(series)
    for index, (label, (values, color)) in enumerate(series.items()):
        places = np.arange(len(groups)) + (index - (len(series) - 1) / 2) * width
        drawn = axes.bar(places, values, width * 0.95, label=label, color=color, hatch=("", "//", "..")[index])
        axes.bar_label(drawn, fmt="%.0f", padding=1, fontsize="small")
    axes.set(title=title, xticks=range(len(groups)), xticklabels=groups, ylabel=y, **axes_settings)
    axes.margins(y=0.1)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=len(series), frameon=False)
    return axes


def dots(
    title: str, rows: Mapping[str, Sequence[float]], series: Mapping[str, str], x: str, **axes_settings: Any
) -> Axes:
    """A line of dots for each row, one dot a series, joined so that the eye sees how far they are apart.

    Args:
        title: says what to see.
        rows: by name: a value for each series.
        series: by label: a colour.
        x: label, with the unit.
        axes_settings: for `Axes.set`.
    """
    _, axes = plt.subplots(figsize=(7.5, 0.4 * len(rows) + 1.5))
    for place, values in enumerate(rows.values()):
        if min(values) > 0:  # on a logarithmic scale there is no other end to draw to
            axes.plot(values, [place] * len(values), color="0.6", zorder=1)
    for index, (label, color) in enumerate(series.items()):
        values = [row[index] for row in rows.values()]
        axes.scatter(values, range(len(rows)), s=60, color=color, marker="os^D"[index], label=label, zorder=2)
    axes.set(title=title, xlabel=x, yticks=range(len(rows)), yticklabels=rows, **axes_settings)
    axes.invert_yaxis()
    axes.margins(y=0.6 / len(rows))
    axes.grid(alpha=0.3, axis="x")
    axes.legend()
    return axes


def paths(title: str, height: Callable[[Any], Any], walks: Mapping[str, tuple[np.ndarray, str, str]]) -> Axes:
    """Walks over a landscape of two weights, seen from above.

    Args:
        title: says what to see.
        height: of the landscape: a function of the two weights.
        walks: by label: the places [step, weight], a colour and a marker.
    """
    _, axes = plt.subplots(figsize=(8, 3.8))
    across, up = np.meshgrid(np.linspace(-4.5, 4.5, 121), np.linspace(-1.2, 1.2, 121))
    axes.contour(across, up, height((across, up)), levels=12, colors="0.8")
    for label, (places, color, marker) in walks.items():
        axes.plot(*places.T, color=color, marker=marker, markersize=5, linewidth=1, label=label, fillstyle="none")
    axes.plot(0, 0, "*", color=GREEN, markersize=14, label="lowest point")
    axes.set(title=title, xlabel="first weight", ylabel="second weight")
    axes.legend()
    return axes


def _pixel_axes(axes: Axes, shape: tuple[int, ...]) -> None:
    """Number the first and the last pixel."""
    axes.set(xticks=[0, shape[1] - 1], yticks=[0, shape[0] - 1], xlabel="column", ylabel="row")

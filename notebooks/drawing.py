"""The figures and tables of the lesson. They are not in its cells, because the lesson does not teach matplotlib.

In every function, `title` says what to look at in the figure, labels of axes contain the unit, and `axes_settings` go
to `Axes.set`, for example `yscale="log"`.
"""

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

from jax_cnn.run.display import BLACK, BLUE, GREEN, PURPLE, VERMILION

__all__ = ["BLACK", "BLUE", "GREEN", "JAX", "PURPLE", "TORCH", "VERMILION", "Table", "show_source", "unit"]
__all__ += ["bars", "curves", "dots", "one_window", "paths", "pictures"]

# Each framework has the same colour in the whole lesson.
TORCH, JAX = {"color": VERMILION, "marker": "o"}, {"color": BLUE, "marker": "s", "linestyle": "--"}

plt.rcParams.update({"figure.dpi": 90, "figure.constrained_layout.use": True, "axes.titlesize": "medium"})


class Table(NamedTuple):
    """Rows of text under a header, which a notebook shows as HTML."""

    header: Sequence[str]
    rows: Sequence[Sequence[object]]

    def __repr__(self) -> str:
        return "\n".join(" | ".join(map(str, row)) for row in (self.header, *self.rows))

    def _repr_html_(self) -> str:
        def html_row(tag: str, values: Sequence[object]) -> str:
            return "<tr>" + "".join(f"<{tag}>{escape(str(value))}</{tag}>" for value in values) + "</tr>"

        body = "".join(html_row("td", row) for row in self.rows)
        return f"<table><thead>{html_row('th', self.header)}</thead><tbody>{body}</tbody></table>"


def show_source(*definitions: Callable[..., Any] | type) -> None:
    """Show the source code of functions and classes of the project, with the file that each is from."""
    for definition in definitions:
        path = f"{definition.__module__.replace('.', '/')}.py"
        display(Markdown(f"`{path}`\n\n```python\n{getsource(definition).rstrip()}\n```"))


def unit(image: Any) -> np.ndarray:
    """Return the image divided by its largest absolute value."""
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
    """Draw images [row, column] in a grid, each under its name.

    Args:
        title: says what to look at.
        images: anything that NumPy can read.
        names: one for each image.
        columns: number of columns of the grid.
        signed: label of the colour bar for values that can be negative. Negative values are violet, positive values are
            orange and 0 is white, on the same scale in all images. Without a label, the images are grey.
        size: width of one image, in inches.
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
    label_pixels(grid[-1, 0], arrays[(rows - 1) * columns].shape)
    if signed:
        figure.colorbar(grid[0, 0].images[0], ax=grid, label=signed, shrink=0.8)
    figure.suptitle(title)
    return figure


def one_window(image: Any, kernel: Any, row: int, column: int) -> Figure:
    """Draw how a 3x3 kernel computes one pixel of a feature map: the window, the kernel, their products and the sum."""
    image, kernel = np.asarray(image), np.asarray(kernel)
    window = image[row - 1 : row + 2, column - 1 : column + 2]
    figure, (whole, *steps) = plt.subplots(1, 4, figsize=(10, 2.9))
    whole.imshow(image, cmap="gray_r")
    whole.add_patch(Rectangle((column - 1.5, row - 1.5), 3, 3, fill=False, edgecolor=VERMILION, linewidth=2))
    whole.set(title="the image and a window")
    label_pixels(whole, image.shape)
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
    """Draw lines. `lines` maps each label to x values, y values and matplotlib's style; `x` and `y` label the axes."""
    _, axes = plt.subplots(figsize=(6.5, 3.6))
    for label, (x_values, y_values, style) in lines.items():
        axes.plot(x_values, y_values, label=label, **style)
    axes.set(title=title, xlabel=x, ylabel=y, **axes_settings)
    axes.grid(alpha=0.3)
    if len(lines) > 1:
        axes.legend()
    return axes


def bars(
    title: str, groups: Sequence[str], series: Mapping[str, tuple[Sequence[float], str]], y: str, **axes_settings: Any
) -> Axes:
    """Draw groups of bars with their values. `series` maps each label to one value for each group, and a colour."""
    _, axes = plt.subplots(figsize=(max(5.5, 1.1 * len(groups)), 3.6))
    width = 0.8 / len(series)
    for index, (label, (values, colour)) in enumerate(series.items()):
        x_values = np.arange(len(groups)) + (index - (len(series) - 1) / 2) * width
        bar = axes.bar(x_values, values, width * 0.95, label=label, color=colour, hatch=("", "//", "..")[index])
        axes.bar_label(bar, fmt="%.0f", padding=1, fontsize="small")
    axes.set(title=title, xticks=range(len(groups)), xticklabels=groups, ylabel=y, **axes_settings)
    axes.margins(y=0.1)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=len(series), frameon=False)
    return axes


def dots(
    title: str, rows: Mapping[str, Sequence[float]], series: Mapping[str, str], x: str, **axes_settings: Any
) -> Axes:
    """Draw each row as dots on a line. `rows` maps a name to one value per series, `series` a label to a colour."""
    _, axes = plt.subplots(figsize=(7.5, 0.4 * len(rows) + 1.5))
    for y, values in enumerate(rows.values()):
        if min(values) > 0:  # a logarithmic scale has no place for 0, so there is nothing to join
            axes.plot(values, [y] * len(values), color="0.6", zorder=1)
    for index, (label, colour) in enumerate(series.items()):
        values = [row[index] for row in rows.values()]
        axes.scatter(values, range(len(rows)), s=60, color=colour, marker="os^D"[index], label=label, zorder=2)
    axes.set(title=title, xlabel=x, yticks=range(len(rows)), yticklabels=rows, **axes_settings)
    axes.invert_yaxis()
    axes.margins(y=0.6 / len(rows))
    axes.grid(alpha=0.3, axis="x")
    axes.legend()
    return axes


def paths(title: str, height: Callable[[Any], Any], walks: Mapping[str, tuple[np.ndarray, str, str]]) -> Axes:
    """Draw descents [step, weight] of two weights over the contour lines of `height`, a function of the two weights.

    `walks` maps each label to the points of the descent, a colour and a marker.
    """
    _, axes = plt.subplots(figsize=(8, 3.8))
    first, second = np.meshgrid(np.linspace(-4.5, 4.5, 121), np.linspace(-1.2, 1.2, 121))
    axes.contour(first, second, height((first, second)), levels=12, colors="0.8")
    for label, (points, colour, marker) in walks.items():
        axes.plot(*points.T, color=colour, marker=marker, markersize=5, linewidth=1, label=label, fillstyle="none")
    axes.plot(0, 0, "*", color=GREEN, markersize=14, label="lowest point")
    axes.set(title=title, xlabel="first weight", ylabel="second weight")
    axes.legend()
    return axes


def label_pixels(axes: Axes, shape: tuple[int, ...]) -> None:
    """Number the first and the last pixel on both axes."""
    axes.set(xticks=[0, shape[1] - 1], yticks=[0, shape[0] - 1], xlabel="column", ylabel="row")

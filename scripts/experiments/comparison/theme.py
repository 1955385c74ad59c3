"""How the figures look, on light and on dark pages. Colours are Okabe & Ito's: colour-blind readers tell them apart."""

import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from matplotlib.colors import Colormap, LinearSegmentedColormap
from matplotlib.figure import Figure

WIDTH = 5.0  # inches: on a phone such a figure is as wide as the screen, and its 10 points are 10 points
DPI = 160
LETTERS = 52  # of a title, in a line


class Theme(NamedTuple):
    """Colours of one scheme; those of the page's style sheet are the same."""

    suffix: str
    paper: str
    ink: str
    quiet: str
    jax: str
    torch: str
    third: str
    fourth: str
    low: str
    high: str
    """For pictures: what is far below nothing and far above it; nothing has the paper's colour."""

    def side(self, name: str) -> str:
        """The colour of a framework."""
        return self.jax if name == "jax" else self.torch

    @property
    def sequential(self) -> Colormap:
        """From the paper's colour, for 0, to the ink's."""
        return LinearSegmentedColormap.from_list("sequential", [self.paper, self.ink])

    @property
    def diverging(self) -> Colormap:
        """Over the paper's colour, for 0."""
        return LinearSegmentedColormap.from_list("diverging", [self.low, self.paper, self.high])


LIGHT = Theme("", "#fdfcfa", "#1f2124", "#6b6f76", "#0072B2", "#D55E00", "#CC79A7", "#009E73", "#7d2a5a", "#00563f")
DARK = Theme("-dark", "#16181b", "#e8e6e1", "#9a9da3", "#56B4E9", "#E69F00", "#CC79A7", "#009E73", "#e9a3cb", "#4fd6ae")
THEMES = (LIGHT, DARK)


@contextmanager
def drawing(theme: Theme) -> Iterator[None]:
    """Make figures in these colours."""
    colours: dict[Any, Any] = {
        "figure.facecolor": theme.paper,
        "savefig.facecolor": theme.paper,
        "axes.facecolor": theme.paper,
        "axes.edgecolor": theme.quiet,
        "axes.labelcolor": theme.ink,
        "axes.titlecolor": theme.ink,
        "text.color": theme.ink,
        "xtick.color": theme.quiet,
        "ytick.color": theme.quiet,
        "xtick.labelcolor": theme.ink,
        "ytick.labelcolor": theme.ink,
        "grid.color": theme.quiet,
        "legend.frameon": False,
    }
    shapes: dict[Any, Any] = {
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": False,
        "grid.alpha": 0.25,
        "grid.linewidth": 0.6,
        "legend.fontsize": 9,
        "lines.linewidth": 1.8,
        "lines.markersize": 5,
        "figure.titlesize": 10.5,
        "figure.titleweight": "bold",
    }
    with matplotlib.rc_context(colours | shapes):
        yield


def figure(height: float, width: float = WIDTH) -> Figure:
    """An empty one, so many inches high."""
    return Figure(figsize=(width, height), layout="constrained")


def title(made: Figure, text: str) -> None:
    """Say above a figure what to see in it, in as many lines as it takes."""
    lines = textwrap.fill(text, LETTERS, break_long_words=False)
    made.suptitle(lines, ha="left", x=0.012)


def save(made: Figure, path: Path) -> None:
    """Write the PNG; without the date and the version of Matplotlib, the same figure is the same file."""
    made.savefig(path, dpi=DPI, metadata={"Software": None})

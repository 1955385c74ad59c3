"""The page: one file that needs no network, made from the report alone; its figures beside it and in it."""

import base64
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup
from matplotlib.figure import Figure

from experiments.comparison import charts, formats, panels
from experiments.comparison.highlighting import highlighted, style_sheet
from experiments.comparison.sources import read
from experiments.comparison.theme import DARK, LIGHT, THEMES, Theme, drawing, save
from jax_cnn.files import writing
from jax_cnn.run.folder import set_aside

Json = dict[str, Any]
PAGE, REPORT, FIGURES = "report.html", "report.json", "figures"


class Drawn(NamedTuple):
    """A figure on the page: data URIs for light and dark, and its size in pixels, so that nothing jumps."""

    light: str
    dark: str
    width: int
    height: int


def write(report: Json, out_dir: Path, say: Callable[[str], None]) -> Path:
    """Write report.json, every figure as a PNG in both schemes, and the page. Earlier ones are moved aside.

    Raises:
        UserError: the folder cannot be written.
    """
    set_aside(out_dir, (PAGE, REPORT, FIGURES), say)
    text = json.dumps(report, indent=1, default=str, allow_nan=False) + "\n"
    with writing(out_dir):
        (out_dir / REPORT).write_text(text)
        figures = draw(json.loads(text), out_dir / FIGURES)
        (out_dir / PAGE).write_text(render(json.loads(text), figures))
    return out_dir / PAGE


def figures_of(report: Json) -> dict[str, Callable[[Json, Theme], Figure]]:
    """What draws each figure, by its name."""
    curves = ("drift",) if report["parity"]["drift"]["curves"] else ()
    drawers: dict[str, Callable[[Json, Theme], Figure]] = {
        name: getattr(charts, name) for name in ("loss", "accuracy", *curves, "throughput", "classes")
    }
    for name in ("confusion", "filters", "features"):
        drawers |= {f"{name}-{side}": partial(getattr(panels, name), side=side) for side in charts.NAMES}
    grids = ("predictions", *(["disagreements"] if report["disagreements"] else []))
    return drawers | {name: partial(panels.grid, key=name) for name in grids}


def draw(report: Json, folder: Path) -> dict[str, Drawn]:
    """Draw every figure in both schemes.

    Raises:
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True)
    drawn = {}
    for name, drawer in figures_of(report).items():
        for theme in THEMES:
            with drawing(theme):
                save(made := drawer(report, theme), folder / f"{name}{theme.suffix}.png")
        width, height = (round(96 * inches) for inches in made.get_size_inches())
        light, dark = (data_uri((folder / f"{name}{theme.suffix}.png").read_bytes()) for theme in (LIGHT, DARK))
        drawn[name] = Drawn(light, dark, width, height)
    return drawn


def data_uri(png: bytes) -> str:
    """A picture as an address that holds it."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def render(report: Json, figures: dict[str, Drawn]) -> str:
    """The page. Whatever comes from the report is escaped; Markup is what this project's own code has made."""
    environment = Environment(
        loader=PackageLoader("experiments.comparison"),
        autoescape=select_autoescape(default=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= formats.FILTERS | {"highlighted": highlighted, "inline_code": formats.inline_code}
    style = read("scripts/experiments/comparison/templates/style.css")
    return environment.get_template("report.html.j2").render(
        report=report,
        figures=figures,
        names=charts.NAMES,
        colours={"light": LIGHT, "dark": DARK},
        style=Markup(style + style_sheet()),
    )

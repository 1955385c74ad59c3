"""Write the page: one HTML file that needs no network and no other file, made from the report alone."""

import base64
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

from experiments.answers import FRAMEWORKS
from experiments.comparison import figures
from experiments.comparison.figures import DARK, LIGHT, Theme
from experiments.records import MIB, Json, Show
from jax_cnn.files import write_atomically, write_json, writing
from jax_cnn.run.folder import set_aside

PAGE, REPORT, FIGURES = "report.html", "report.json", "figures"


def write(report: Json, out_dir: Path, say: Show) -> Path:
    """Write report.json, every figure as a PNG in both colour schemes, and the page. Move earlier ones aside.

    Raises:
        UserError: the folder cannot be written.
    """
    set_aside(out_dir, (PAGE, REPORT, FIGURES), say)
    with writing(out_dir):
        write_json(out_dir / REPORT, report)
        written = json.loads((out_dir / REPORT).read_text(encoding="utf-8"))
        write_atomically(out_dir / PAGE, render(written, draw(written, out_dir / FIGURES)).encode())
    return out_dir / PAGE


def list_figures(report: Json) -> dict[str, Callable[[Json, Theme], Figure]]:
    """Return the name of every figure with the function that draws it."""
    drawers: dict[str, Callable[[Json, Theme], Figure]] = {
        "loss": figures.draw_loss,
        "accuracy": figures.draw_accuracy,
        "throughput": figures.draw_throughput,
        "classes": figures.draw_classes,
    }
    if report["parity"]["drift"]["curves"]:
        drawers["drift"] = figures.draw_drift
    for side in FRAMEWORKS:
        drawers[f"confusion-{side}"] = partial(figures.draw_confusion, side=side)
        drawers[f"filters-{side}"] = partial(figures.draw_filters, side=side)
        drawers[f"features-{side}"] = partial(figures.draw_features, side=side)
    for key in ("predictions", "disagreements"):
        if report[key]:
            drawers[key] = partial(figures.draw_images, key=key)
    return drawers


def draw(report: Json, folder: Path) -> dict[str, Json]:
    """Draw every figure for light and for dark, and return each in base64 with its size in CSS pixels."""
    folder.mkdir(parents=True)
    pictures: dict[str, Json] = {}
    for name, drawer in list_figures(report).items():
        for theme in (LIGHT, DARK):
            with figures.drawing(theme):
                figure = drawer(report, theme)
                figure.savefig(folder / f"{name}{theme.suffix}.png", dpi=figures.DPI, metadata={"Software": None})
        width, height = (round(96 * inches) for inches in figure.get_size_inches())
        light, dark = (
            base64.b64encode((folder / f"{name}{theme.suffix}.png").read_bytes()).decode() for theme in (LIGHT, DARK)
        )
        pictures[name] = {"light": light, "dark": dark, "width": width, "height": height}
    return pictures


def render(report: Json, pictures: dict[str, Json]) -> str:
    """Return the page. Everything from the report is escaped: Markup is used for the project's own code only."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for name, text in FORMATS.items():
        environment.filters[name] = partial(number, text=text)
        environment.filters[f"{name}_difference"] = partial(number, text=text, plus="+")
    environment.filters["highlighted"] = highlighted
    return environment.get_template("report.html.j2").render(report=report, figures=pictures, names=FRAMEWORKS)


def highlighted(code: str) -> Markup:
    """Return Python code as spans with the classes of Pygments, for which the style sheet has colours."""
    return Markup(highlight(code, PythonLexer(stripnl=False), HtmlFormatter(nowrap=True)))


def number(value: float | None, text: Callable[[float], str], plus: str = "") -> Markup:
    """Return a number as text for the reader, after `plus` if it is positive, with its exact value for a program."""
    if value is None:
        return Markup('<span class="none">not measured</span>')
    sign = plus if value > 0 else ""
    return Markup('<data value="{}">{}{}</data>').format(repr(value), sign, text(value).replace("-", "−"))


def scientific(value: float) -> str:
    """Return two digits and a power of ten, or 0 for exactly 0."""
    digits, power = f"{value:.1e}".split("e")
    return f"{digits}e{int(power)}" if value else "0"


FORMATS: dict[str, Callable[[float], str]] = {
    "percent": lambda value: f"{100 * value:.2f} %",
    "points": lambda value: f"{100 * value:.2f}",
    "share": lambda value: f"{100 * value:.1f} %",
    "loss": lambda value: f"{value:.4f}",
    "seconds": lambda value: f"{value:.1f}",
    "mib": lambda value: f"{value / MIB:,.0f}",
    "count": lambda value: f"{value:,}",
    "rate": lambda value: f"{value:,.0f}",
    "two": lambda value: f"{value:.2f}",
    "error": scientific,
}

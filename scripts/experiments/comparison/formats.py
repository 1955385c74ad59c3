"""How the page writes numbers. Each is in a `data` element, whose value is the report's own number."""

from collections.abc import Callable

from markupsafe import Markup

MIB = 2**20
MINUS = "−"
UNMEASURED = Markup('<span class="none">not measured</span>')


def number(value: float | None, text: Callable[[float], str]) -> Markup:
    """A measured number for the reader and, exactly, for a program."""
    if value is None:
        return UNMEASURED
    return Markup('<data value="{}">{}</data>').format(repr(value), text(value).replace("-", MINUS))


def scientific(value: float) -> str:
    """Two digits and a power of ten; 0 is exactly 0."""
    if value == 0:
        return "0"
    digits, power = f"{value:.1e}".split("e")
    return f"{digits}e{int(power)}"


def signed(text: str, value: float) -> str:
    """With a plus where it is more than nothing."""
    return f"+{text}" if value > 0 else text


FORMATS: dict[str, Callable[[float], str]] = {
    "percent": lambda value: f"{value:.2%}".replace("%", " %"),
    "share": lambda value: f"{value:.1%}".replace("%", " %"),
    "points": lambda value: signed(f"{100 * value:.2f}", value),
    "loss": lambda value: f"{value:.4f}",
    "loss_difference": lambda value: signed(f"{value:.4f}", value),
    "seconds_difference": lambda value: signed(f"{value:.1f}", value),
    "mib_difference": lambda value: signed(f"{value / MIB:,.0f}", value),
    "count_difference": lambda value: signed(f"{value:,}", value),
    "seconds": lambda value: f"{value:.1f}",
    "mib": lambda value: f"{value / MIB:,.0f}",
    "count": lambda value: f"{value:,}",
    "rate": lambda value: f"{value:,.0f}",
    "two": lambda value: f"{value:.2f}",
    "error": scientific,
}


def inline_code(text: str) -> Markup:
    """Text with `names` in it."""
    parts = text.split("`")
    return Markup("").join(Markup("<code>{}</code>").format(part) if at % 2 else part for at, part in enumerate(parts))


FILTERS = {name: lambda value, text=text: number(value, text) for name, text in FORMATS.items()}

"""Python on the page: highlighted in few colours, which the style sheet gives for light and for dark."""

from markupsafe import Markup
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

# Pygments' short class names, by what they are for the eye.
GROUPS = {
    "--code-keyword": ("k", "kc", "kd", "kn", "kr", "ow"),
    "--code-text": ("s", "s1", "s2", "sa", "sd", "si", "se", "sb", "sc"),
    "--code-comment": ("c", "c1", "cm", "ch"),
    "--code-number": ("m", "mi", "mf", "mh"),
    "--code-name": ("nf", "nc", "fm", "nd"),
}


def highlighted(code: str) -> Markup:
    """The code as spans with classes; Pygments escapes what needs it."""
    return Markup(highlight(code, PythonLexer(stripnl=False), HtmlFormatter(nowrap=True)))


def style_sheet() -> str:
    """The colours of the classes."""
    rules = (
        f"{', '.join(f'code .{name}' for name in names)} {{ color: var({group}); }}" for group, names in GROUPS.items()
    )
    return "\n".join(rules)

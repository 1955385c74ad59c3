"""From the command line to a config, and from a slip to one line."""

import contextlib
import io
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn, TypeVar

import tyro

from jax_cnn.config import UserError
from jax_cnn.run.interrupts import Interrupted

Config = TypeVar("Config")


def parse(default: Config, description: str, args: Sequence[str] | None = None) -> Config:
    """Build a config from the command line; nested configs add their flags without a prefix.

    Raises:
        UserError: a flag is unknown, lacks its value, or has a value that does not fit.
    """

    def read() -> Config:
        return tyro.cli(
            type(default),
            default=default,
            description=description,
            args=args,
            config=(tyro.conf.OmitArgPrefixes,),
        )

    complaint = PlainText()
    try:
        with contextlib.redirect_stderr(PlainText()):
            return read()
    except SystemExit as stop:
        if stop.code in (0, None):  # --help
            raise
    # Once more for the message: tyro looks at stdout to choose colours and characters for it.
    with (
        contextlib.redirect_stdout(PlainText()),
        contextlib.redirect_stderr(complaint),
        contextlib.suppress(SystemExit),
    ):
        read()
    raise UserError(f"{first_sentence(complaint.getvalue())} (--help lists every flag)")


class PlainText(io.StringIO):
    """No terminal, so no colours; UTF-8, so the frame that `first_sentence` knows."""

    encoding = "utf-8"


def first_sentence(box: str) -> str:
    """What tyro's framed message says above its first rule, on one line."""
    lines = [line.strip("│ ") for line in box.splitlines() if not line.startswith(("╭", "╰"))]
    rule = next((at for at, line in enumerate(lines) if line.startswith("─")), len(lines))
    return " ".join(lines[:rule]).rstrip(".")


def run(main: Callable[[], None]) -> NoReturn:
    """Run a command: status 0 when it is done, 2 with one line on stderr for a slip, 128 + n after signal n.

    Quiet with 141 when nobody reads its output any more (`| head`), as a shell counts the death by SIGPIPE.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files may hold what the terminal cannot show
    try:
        main()
        sys.stdout.flush()
    except UserError as slip:
        print(f"error: {slip}", file=sys.stderr)
        sys.exit(2)
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        sys.exit(128 + stop.number)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python's own last flush would complain
        sys.exit(141)
    sys.exit(0)

"""The frame of every command: it reads the command line, prints errors on one line, and ends cleanly after Ctrl-C."""

import contextlib
import io
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TypeVar

import tyro

from jax_cnn.config import UserError

# What reads variables of the environment where it is loaded, and raises a ValueError there.
READERS = {"JAX": Path("jax", "_src", "config.py"), "matplotlib": Path("matplotlib", "__init__.py")}
SIGNALS = (signal.SIGINT, signal.SIGTERM)

Config = TypeVar("Config")


class Interrupted(Exception):
    """The signal `number` has stopped the run. The message is one line for the user."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number


def run(main: Callable[[], None]) -> NoReturn:
    """Run a command and exit with its status.

    The status is 0 after success, 2 after a `UserError` (one line on stderr), 128 + n after signal n, and 141, quietly,
    when the reader of its output has gone (`| head`), as in a shell.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # it is closed (`>&-`), as under some schedulers
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_WRONLY), "w", encoding="utf-8"))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names may hold what the terminal cannot show
    try:
        main()
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except ValueError as error:
        place = traceback.extract_tb(error.__traceback__)[-1].filename
        reader = next((name for name, file in READERS.items() if place.endswith(str(file))), None)
        if reader is None:
            raise
        print(f"error: {reader} cannot read its variables ({error}): unset or correct it", file=sys.stderr)
        sys.exit(2)
    except Interrupted as stop:
        print(stop, file=sys.stderr)
        sys.exit(128 + stop.number)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python's last flush would complain
        sys.exit(141)
    sys.exit(0)


def parse(default: Config, description: str, args: Sequence[str] | None = None) -> Config:
    """Build a configuration from the command line. A nested configuration adds its flags without a prefix.

    In a cell of a notebook the command line is that of the kernel, and every setting has its default.

    Raises:
        UserError: a flag is unknown, lacks its value, or has a value that does not fit.
    """
    if args is None and Path(sys.argv[0]).stem.endswith("kernel_launcher"):
        args = ()

    def read() -> Config:
        return tyro.cli(
            type(default),
            default=default,
            description=description,
            args=args,
            config=(tyro.conf.OmitArgPrefixes,),
        )

    message = PlainText()
    try:
        # Tyro chooses the colours and characters of its message by looking at stdout.
        with contextlib.redirect_stdout(PlainText()), contextlib.redirect_stderr(message):
            return expand_home(read())
    except SystemExit as stop:
        if stop.code in (0, None):
            return read()  # --help: this time the text goes to the user, and the process ends
    raise UserError(f"{first_sentence(message.getvalue())} (--help lists every flag)")


def expand_home(value: Any) -> Any:
    """Return a configuration with `~` replaced by the user's home in every path. A shell leaves `--out-dir=~/x` as is.

    A path is kept as it is where the user has no home.
    """
    if isinstance(value, Path):
        with contextlib.suppress(RuntimeError):
            return value.expanduser()
    if type(value) is tuple:
        return tuple(expand_home(item) for item in value)
    if is_dataclass(value) and not isinstance(value, type):
        before = {field.name: getattr(value, field.name) for field in fields(value)}
        after = {name: expand_home(item) for name, item in before.items()}
        return replace(value, **after) if after != before else value
    return value


class PlainText(io.StringIO):
    """A stream for tyro's message: not a terminal, so without colours; UTF-8, so with the frame of `first_sentence`."""

    encoding = "utf-8"


def first_sentence(box: str) -> str:
    """Return on one line what tyro's framed message says above its first rule, and the flags that it proposes."""
    lines = [line.strip("│ ") for line in box.splitlines() if not line.startswith(("╭", "╰"))]
    rule = next((index for index, line in enumerate(lines) if line.startswith("─")), len(lines))
    sentence = " ".join(lines[:rule]).rstrip(".")
    flags = [match[0] for line in lines[rule:] if (match := re.match(r"--[a-z][\w-]*", line))]
    if "Perhaps you meant:" in lines and flags:
        sentence += f". Perhaps you meant {' or '.join(dict.fromkeys(flags))}"
    return sentence


@contextlib.contextmanager
def postponed_interrupts() -> Iterator[Callable[[], int | None]]:
    """Inside the block, note Ctrl-C or SIGTERM instead of stopping. A second signal ends the process at once.

    Yields a function that returns the number of the signal, or None as long as there was none.
    """
    received: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        if received:
            os._exit(128 + number)
        received.append(number)

    previous = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield lambda: received[0] if received else None
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)

"""The output of commands: plain tables that survive a pipe, units for people, one JSON object for programs."""

import dataclasses
import datetime as dt
import json
import math
from typing import TYPE_CHECKING, Any, Literal

from jaxops.core.failures import EXIT_OK
from jaxops.core.secret_text import printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def console(stderr: bool = False) -> "Console":
    """Returns a console as wide as the terminal. In a file or a pipe a line is never broken, so a row stays a line."""
    from rich.console import Console

    out = Console(highlight=False, stderr=stderr)
    return out if out.is_terminal else Console(highlight=False, width=10_000, stderr=stderr)


def say(out: "Console", words: str, style: str = "") -> None:
    """Prints one line as it is: without markup, never broken, and without escape sequences."""
    out.print(printable(words), style=style, markup=False, soft_wrap=True)


def grid(*columns: str, title: str | None = None) -> "Table":
    """Returns a plain table with these columns.

    A name that ends in `|` makes a column that is never broken. One that ends in `>` makes it right-aligned as well.
    """
    from rich.table import Table

    table = Table(box=None, pad_edge=False, title=title, title_justify="left", title_style="bold", header_style="dim")
    for name in columns:
        mark, head = name[-1:], name.rstrip(">|")
        justify: Literal["left", "right"] = "right" if mark == ">" else "left"
        table.add_column(cell(head), justify=justify, no_wrap=mark in (">", "|"), overflow="fold")
    return table


def cell(words: str, style: str = "") -> "Text":
    """Returns text for a table that is shown as it is: brackets are no markup, and escape sequences are removed."""
    from rich.text import Text

    return Text(printable(words), style=style)


def when(time: dt.datetime | None) -> str:
    """Returns a time such as `2026-11-23 16:35:30 UTC`, and nothing for None."""
    return "" if time is None else f"{time:%Y-%m-%d %H:%M:%S} UTC"


def ago(time: dt.datetime, now: dt.datetime) -> str:
    """Returns an age such as `5 min ago`; the date after a week, and for a time in the future."""
    seconds = (now - time).total_seconds()
    if seconds > 7 * 86400 or seconds < -60:
        return f"{time:%Y-%m-%d}"
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds // length:.0f} {unit} ago"
    return f"{max(seconds, 0):.0f} s ago"


def size(count: int) -> str:
    """Returns a size such as `1.4 MiB`."""
    power = min((count.bit_length() - 1) // 10, len(_UNITS) - 1) if count else 0
    return f"{count / 2 ** (10 * power):.{1 if power else 0}f} {_UNITS[power]}"


def print_json(values: Any) -> int:
    """Prints values as JSON and returns exit status 0.

    Dataclasses become objects, times ISO text, and NaN and infinities null.
    """
    print(json.dumps(_plain(values), indent=1, allow_nan=False, default=str))
    return EXIT_OK


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _plain(dataclasses.asdict(value))
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, dt.datetime):
        return value.isoformat(timespec="seconds")
    return None if isinstance(value, float) and not math.isfinite(value) else value

"""Plain lines for the console: columns are as wide as their widest cell, so that no path or name is cut in a pipe."""

import sys
from collections.abc import Iterator, Sequence
from typing import Any

import yaml

from jaxops.config.shapes import ABSENT


def flow(value: Any) -> str:
    """Returns a config value as YAML on one line."""
    if value is ABSENT:
        return "(absent)"
    return yaml.safe_dump(value, default_flow_style=True, width=sys.maxsize).removesuffix("\n...\n").strip()


def aligned(rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> Iterator[str]:
    """Yields lines with their cells in columns, two spaces apart; the columns numbered in `right` are right-aligned."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (
            cell.rjust(width) if number in right else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        yield "  ".join(cells).rstrip()

"""Reads compiled HLO text: which operations there are, of what size, and whether they run inside a loop."""

import dataclasses
import math
import re

_HEADER = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) .*\{$")
_LINE = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (?P<shape>\(.*?\)|\S+) (?P<op>[\w\-]+)\(")
_CALLS = re.compile(r"(body|condition|calls|to_apply)=%?([\w.\-]+)|(?:branch_computations|calls)=\{([^}]*)\}")
_ARRAY = re.compile(r"[a-z]+\d*\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Op:
    """One operation: its kind, the entries of its result (all parts of a tuple), its loop (None: outside)."""

    kind: str
    entries: int
    largest: int
    loop: str | None


def operations(text: str) -> list[Op]:
    """Every operation of a compiled module; `loop` is the innermost while body that reaches it.

    Raises:
      ValueError: the text has no computations (the format changed).
    """
    computations: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        header = _HEADER.match(line)
        if header and not line.startswith(" "):
            lines = computations.setdefault(header[1], [])
        elif line.startswith(" "):
            lines.append(line)
    if not any(_LINE.match(line) for lines in computations.values() for line in lines):
        raise ValueError("no operations found: is this compiled HLO?")
    loops: dict[str, str] = {}

    def mark(name: str, loop: str) -> None:
        loops[name] = loop
        for line in computations.get(name, ()):
            for kind, one, many in _CALLS.findall(line):
                for called in [one] if one else re.findall(r"[\w.\-]+", many):
                    inner = called if kind == "body" else loop
                    if loops.get(called) != inner:
                        mark(called, inner)

    for body in re.findall(r" while\(.*body=%?([\w.\-]+)", text):
        if body not in loops:
            mark(body, body)
    found = []
    for name, lines in computations.items():
        for match in filter(None, map(_LINE.match, lines)):
            sizes = [math.prod(int(n) for n in dims.split(",") if n) for dims in _ARRAY.findall(match["shape"])]
            found.append(Op(match["op"], sum(sizes), max(sizes, default=0), loops.get(name)))
    return found


def of_kind(text: str, *kinds: str) -> list[Op]:
    """The operations of these kinds; the `-start` half of an asynchronous one counts as the whole."""
    return [op for op in operations(text) if op.kind.removesuffix("-start") in kinds]

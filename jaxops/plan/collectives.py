"""Collectives of a compiled program by mesh axis: how many bytes, how often, and whether inside a loop.

The names of operations say little, since a TPU's compiler makes chains and fusions of them. What counts is which
devices exchange: their coordinates on the mesh differ along the axes of the collective.
Tested in tests/plan/test_collectives.py.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Mapping, Sequence

import numpy as np

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute")
_WIDTH = {"pred": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "f16": 2, "bf16": 2, "s32": 4, "u32": 4, "f32": 4}
_WIDTH |= {"s64": 8, "u64": 8, "f64": 8, "c64": 8, "s4": 1, "u4": 1}
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) .*\{$")
_COLLECTIVE = re.compile(
    rf"^\s+(?:ROOT )?%?[\w.\-]+ = (?P<result>\(.*?\)|\S+) (?P<kind>{'|'.join(KINDS)})(?P<start>-start)?\("
)
_CALLS = re.compile(r"\b(body|condition|calls|to_apply)=%?([\w.\-]+)|\b(?:branch_computations|calls)=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_LESS = re.compile(r"^\s+ROOT .*\bcompare\(%?([\w.\-]+), %?([\w.\-]+)\), direction=LT")
_CHANNEL = re.compile(r"\bchannel_id=(\d+)")
_SOURCE = re.compile(r'\bop_name="([^"]*)"')
_FUSION = re.compile(r" fusion\(.*\bcalls=%?([\w.\-]+)")
_FUSED_SCATTER = "all-reduce-scatter"
"""Begins the name of a fusion that reduces and keeps a part: a reduce-scatter, whatever the operation inside."""
_ARRAY = re.compile(r"\b(f8\w+|[a-z]+\d*)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Collective:
    """Collectives of one kind along the same mesh axes, added up.

    Attributes:
      kind: the operation.
      axes: the mesh axes along which the devices that exchange differ.
      in_loop: whether they run inside a loop.
      count: how many operations the program has.
      bytes: bytes of the whole arrays on a device each time that the program runs: of what is gathered, or reduced. A
        loop of unknown length counts once.
      largest: bytes of the largest single result.
      between_slices: whether they cross the network between slices.
    """

    kind: str
    axes: tuple[str, ...]
    in_loop: bool
    count: int
    bytes: int
    largest: int
    between_slices: bool


def collectives(text: str, axes: Mapping[str, int], slices: int = 1) -> list[Collective]:
    """Returns the collectives of a compiled module, those with the most bytes first.

    Args:
      text: the compiled module, as XLA prints it.
      axes: sizes of the mesh axes in order; a device's number in the module counts along them.
      slices: number of slices; the devices of a slice are neighbours in that order.
    """
    computations, times, loops = _read(text)
    sizes = tuple(axes.values())
    found: dict[tuple[str, tuple[str, ...], bool, bool], list[tuple[int, int]]] = collections.defaultdict(list)
    fused = {name for body in computations.values() for line in body for name in _FUSION.findall(line)}
    seen: set[tuple[str, ...]] = set()
    for name in sorted(computations, key=lambda name: name in fused):
        for line in computations[name]:
            match = _COLLECTIVE.match(line)
            if match is None:
                continue
            if (channel := _CHANNEL.search(line)) and match["kind"] != "all-reduce":
                # A gather that other work overlaps is written again in each of the fusions that it is spread over. Its
                # channel alone does not tell: all that `shard_map` exchanges has channel 1.
                copy = (match["kind"], channel[1], _shape(match["result"]), *_SOURCE.findall(line))
                if name in fused and copy in seen:
                    continue
                seen.add(copy)
            groups = _groups(line, math.prod(sizes))
            along = tuple(axis for axis, differs in zip(axes, _differ(groups, sizes), strict=True) if differs)
            if not along:
                continue  # every group is one device
            across = slices > 1 and _crosses(groups, math.prod(sizes) // slices)
            size = _bytes(match["result"], bool(match["start"]), match["kind"])
            kind = "reduce-scatter" if name.startswith(_FUSED_SCATTER) else match["kind"]
            found[kind, along, name in loops, across].append((size, times.get(name, 1)))
    added = [
        Collective(
            kind,
            along,
            in_loop,
            len(each),
            sum(size * count for size, count in each),
            max(size for size, _ in each),
            across,
        )
        for (kind, along, in_loop, across), each in found.items()
    ]
    return sorted(added, key=lambda one: -one.bytes)


def _read(text: str) -> tuple[dict[str, list[str]], dict[str, int], set[str]]:
    """Returns the lines of each computation, how often each runs, and which run inside a loop."""
    computations: dict[str, list[str]] = {}
    lines: list[str] = []
    entry = ""
    for line in text.splitlines():
        header = _COMPUTATION.match(line)
        if header and not line.startswith(" "):
            lines = computations.setdefault(header[1], [])
            entry = header[1] if line.startswith("ENTRY") else entry
        elif line.startswith(" "):
            lines.append(line)
    calls: dict[str, list[tuple[str, int, bool]]] = {}
    for name, body in computations.items():
        calls[name] = [call for line in body for call in _called(line, computations)]
    times: dict[str, int] = collections.Counter()
    loops: set[str] = set()

    def visit(name: str, count: int, in_loop: bool, path: tuple[str, ...] = ()) -> None:
        if name in path:
            return
        times[name] = max(times[name], count)
        if in_loop:
            loops.add(name)
        for called, trips, loop in calls.get(name, ()):
            visit(called, count * trips, in_loop or loop, (*path, name))

    visit(entry, 1, False)
    return computations, times, loops


def _called(line: str, computations: Mapping[str, list[str]]) -> list[tuple[str, int, bool]]:
    """Returns the computations that an operation calls, how often, and whether as a loop's body."""
    found = []
    called = _CALLS.findall(line)
    known = _TRIPS.search(line)
    trips = (
        int(known[1])
        if known
        else max((_trips(computations[one]) for kind, one, _ in called if kind == "condition"), default=1)
    )
    for kind, one, many in called:
        loop = kind in ("body", "condition")
        for name in [one] if one else re.findall(r"[\w.\-]+", many):
            found.append((name, trips if loop else 1, loop))
    return found


def _trips(condition: Sequence[str]) -> int:
    """Returns how often a loop runs whose condition is `counter < constant`, and 1 for any other."""
    for line in condition:
        if (less := _LESS.match(line)) is not None:
            constant = re.compile(rf"^\s+%?{re.escape(less[2])} = s32\[\]\S* constant\((\d+)\)")
            return next((int(found[1]) for found in map(constant.match, condition) if found), 1)
    return 1


def _shape(result: str) -> str:
    """Returns the type of a result without its layout, in which copies of one exchange differ."""
    return re.sub(r"\{[^{}]*\}", "", result)


def _bytes(result: str, start: bool, kind: str) -> int:
    """Returns the bytes of a result; of an operation that only starts, those of what it will give."""
    sizes = [
        math.prod(int(n) for n in dims.split(",") if n) * _WIDTH.get(dtype, 1)
        for dtype, dims in _ARRAY.findall(_shape(result))
    ]
    if start and kind != "all-reduce":  # (operands, results, and perhaps two counters)
        return max(sizes, default=0)
    return sum(sizes)


@functools.cache
def _parsed(kind: str, spec: str, devices: int) -> tuple[tuple[int, ...], ...]:
    if kind == "listed":
        return tuple(tuple(map(int, group.split(","))) for group in re.findall(r"\{([\d,]+)\}", spec))
    if kind == "pairs":
        return tuple(tuple(map(int, pair.split(","))) for pair in re.findall(r"\{(\d+,\d+)\}", spec))
    if kind == "iota":
        match = re.fullmatch(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", spec)
        assert match is not None
        shape, dims = _ints(match[1]), _ints(match[2])
        order = np.arange(math.prod(dims)).reshape(dims)
        if match[3]:
            order = order.transpose(_ints(match[3]))
        return tuple(map(tuple, order.reshape(shape).tolist()))
    if kind == "mesh":
        sizes, device_ids, along = _mesh_groups(spec)
        order = np.arange(devices) if device_ids is None else device_ids
        grid = np.asarray(order).reshape(list(sizes.values()))
        names = list(sizes)
        rest = [at for at, name in enumerate(names) if name not in along]
        cut = [names.index(name) for name in along]
        width = math.prod(sizes[name] for name in along)
        return tuple(map(tuple, grid.transpose([*rest, *cut]).reshape(-1, width).tolist()))
    return (tuple(range(devices)),)


def _ints(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _mesh_groups(spec: str) -> tuple[dict[str, int], np.ndarray | None, list[str]]:
    """Reads `mesh['a'=2,'b'=4] {'a'}`, whose devices may be named as a list or as `[8]<=[2,4]T(1,0)`."""
    inside, _, along = spec.partition("] {")
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", inside)}
    ids = re.search(r"device_ids=(?:\(\[?([\d,\s]+)\]?\)|\[([\d,\s]+)\](?:<=\[([\d,]+)\](?:T\(([\d,]+)\))?)?)", inside)
    order: np.ndarray | None = None
    if ids is not None and ids[3]:
        order = np.arange(math.prod(_ints(ids[3]))).reshape(_ints(ids[3]))
        order = (order.transpose(_ints(ids[4])) if ids[4] else order).reshape(-1)
    elif ids is not None:
        order = np.array(_ints(re.sub(r"\s", "", ids[1] or ids[2])))
    return sizes, order, re.findall(r"'([^']+)'", along)


def _groups(line: str, devices: int) -> tuple[tuple[int, ...], ...]:
    """Returns the groups of devices that exchange with each other."""
    if found := re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)+)\}", line):
        return _parsed("pairs", found[1], devices)
    if found := re.search(r"replica_groups=(mesh\[.*?\] ?\{[^}]*\})", line):
        return _parsed("mesh", found[1], devices)
    if found := re.search(r"replica_groups=(\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?)", line):
        return _parsed("iota", found[1], devices)
    if found := re.search(r"replica_groups=\{((?:\{[\d,]+\},?)+)\}", line):
        return _parsed("listed", found[1], devices)
    return _parsed("all", "", devices)


@functools.cache
def _differ(groups: tuple[tuple[int, ...], ...], sizes: tuple[int, ...]) -> tuple[bool, ...]:
    """Returns for each axis whether devices of one group differ along it."""
    found = np.zeros(len(sizes), bool)
    for group in groups:
        places = np.stack(np.unravel_index(np.array(group), sizes))
        found |= (places != places[:, :1]).any(axis=1)
    return tuple(bool(x) for x in found)


@functools.cache
def _crosses(groups: Sequence[Sequence[int]], of_slice: int) -> bool:
    return any(len({device // of_slice for device in group}) > 1 for group in groups)

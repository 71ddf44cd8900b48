"""What a sweep is read from: its file and base, or a run's config, and overrides that may have several values."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath

from jaxops.config.errors import ConfigError, Problem
from jaxops.config.files import read_files
from jaxops.config.merge import beneath, parse_overrides
from jaxops.config.node import Node
from jaxops.config.yaml_text import parse_yaml
from jaxops.core.failures import UserError
from jaxops.sweep.space import Assignment, is_range, values_of
from jaxops.sweep.spec import Runs, SweepSpec

_SPEC = tuple(field.name for field in dataclasses.fields(SweepSpec))
_OURS = {"runs", "runner", "search", "set"}
_MARKS = _OURS | {field.name for field in dataclasses.fields(Runs)}
"""Top-level keys of a sweep file: all but four stand there where `runs:` was forgotten."""


@dataclasses.dataclass(frozen=True)
class SweepSource:
    """A sweep as it was written.

    Attributes:
      name: the name of a sweep that has none of its own.
      base: the trees of the base config and of its own bases.
      sweep: the tree of the sweep file; empty where the sweep is given by overrides alone.
      own: overrides of the sweep's own fields.
      fixed: overrides of the base with one value, for all points.
      fixed_paths: the same by dotted path.
      axes: overrides with several values.
    """

    name: str
    base: list[Node]
    sweep: Node
    own: list[Node]
    fixed: list[Node]
    fixed_paths: dict[str, Node]
    axes: list[list[Assignment]]

    def with_values(self, values: Mapping[str, Node]) -> "SweepSource":
        """Returns the same with values for all points, by path; those of overrides come after them."""
        trees = [beneath(path.split("."), node) for path, node in values.items()]
        paths = {path: node for path, node in values.items() if path not in self.fixed_paths}
        return dataclasses.replace(self, fixed=[*trees, *self.fixed], fixed_paths={**paths, **self.fixed_paths})


def read_source(path: str, overrides: Sequence[str]) -> SweepSource:
    """Reads a sweep file, or the config of a run that overrides sweep.

    Raises:
      UserError: it cannot be read, has no base, or its base is a sweep itself; or an override is wrong.
    """
    *below, own = read_files([path])
    is_sweep = bool(_MARKS & own.value.keys()) and "task" not in own.value
    if is_sweep and not below:
        raise UserError(f"{path}: a sweep needs `base: CONFIG`, the config of a run that its points are made from")
    base = below if is_sweep else [*below, own]
    for tree in below:
        if inside := sorted(_OURS & tree.value.keys()):
            where = f"{inside[0]!r} [{tree.value[inside[0]].origin}]"
            raise UserError(f"{path}: its base has {where}: a sweep cannot sweep a sweep; name the config of a run")
    spec: list[str] = []
    fixed: list[str] = []
    axes: list[list[Assignment]] = []
    problems: list[Problem] = []
    for override in overrides:
        name, equals, text = override.partition("=")
        if equals and name.partition(".")[0] in _SPEC:
            spec.append(override)
        elif values := _several(override, name, text, problems):
            axes.append([{name.strip(): value} for value in values])
        else:
            fixed.append(override)
    trees = parse_overrides(fixed)
    if problems:
        raise ConfigError(problems)
    stem = PurePosixPath(path).name.removesuffix(".yaml")
    return SweepSource(
        name=stem if is_sweep else f"{stem}-sweep",
        base=base,
        sweep=own if is_sweep else Node({}, "the command line"),
        own=parse_overrides(spec),
        fixed=trees,
        fixed_paths={text.partition("=")[0].strip(): tree for text, tree in zip(fixed, trees, strict=True)},
        axes=axes,
    )


def has_several_values(override: str) -> bool:
    """Returns whether an override would be swept: `optimizer.lr=1e-4,3e-4`, `run.seed=0..2`."""
    name, equals, text = override.partition("=")
    return bool(equals) and bool(_several(override, name, text, []))


def _several(override: str, name: str, text: str, problems: list[Problem]) -> list[Node]:
    """Returns the values of an override that has several; empty where it has one, or is none."""
    origin = f"override '{override}'"
    try:
        listed = parse_yaml(f"[{text}]", origin, lines=False).value
    except ConfigError:
        return []
    if len(listed) > 1:
        return listed
    if len(listed) == 1 and is_range(listed[0].value):
        return values_of(listed[0], name.strip(), problems)
    return []

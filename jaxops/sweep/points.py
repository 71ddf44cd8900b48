"""One point of a sweep: its id by what it will do, its values, and the config that it trains."""

import copy
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxops.config.dump import digest
from jaxops.config.errors import show
from jaxops.config.node import plain_node
from jaxops.sweep.space import Assignment

ID_LENGTH = 10
"""Hexadecimal digits of a run's id: among 20,000 points two are alike once in ten thousand sweeps, which is told."""


@dataclasses.dataclass(frozen=True)
class Point:
    """One run of a sweep.

    Attributes:
      id: the digest of its resolved config, but for name and folder; the name of its run folder.
      values: the values that the sweep gave it, by dotted path.
      group: the digest without the seed too: points of one group differ in their seed alone.
      seed: its run.seed.
    """

    id: str
    values: dict[str, Any]
    group: str
    seed: int

    @property
    def label(self) -> str:
        """The point for people: `optimizer.lr=0.001, run.seed=0`."""
        return label_of_values(self.values)


def label_of_values(values: Mapping[str, Any]) -> str:
    """Returns values by path as one would type them: `optimizer.lr=0.001, run.seed=0`."""
    return ", ".join(f"{path}={_typed(value)}" for path, value in values.items()) or "the base as it is"


def point_of(assignment: Assignment, resolved: Mapping[str, Any]) -> Point:
    """Returns the point with these values, whose config they resolve to."""
    values = {path: plain_node(node) for path, node in assignment.items()}
    return Point(run_id(resolved), values, group_id(resolved), resolved["run"]["seed"])


def config_of(point: Point, resolved: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Returns the config that a point trains, with its name and place in the folder of the sweep."""
    config = copy.deepcopy(dict(resolved))
    config["run"] |= {"name": point.id, "dir": str(folder)}
    return config


def run_id(resolved: Mapping[str, Any]) -> str:
    """Returns the id of a run: a digest of its resolved config, whatever its name, folder and order of keys."""
    return _digest_without(resolved, ("name", "dir"))


def group_id(resolved: Mapping[str, Any]) -> str:
    """Returns the id that a run shares with those that differ from it in their seed alone."""
    return _digest_without(resolved, ("name", "dir", "seed"))


def _digest_without(resolved: Mapping[str, Any], names: Sequence[str]) -> str:
    run = {name: value for name, value in resolved["run"].items() if name not in names}
    return digest({**resolved, "run": run})[:ID_LENGTH]


def _typed(value: Any) -> str:
    return value if isinstance(value, str) else show(value)

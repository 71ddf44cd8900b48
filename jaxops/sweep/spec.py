"""The schema of a sweep file: what is swept over a base config, how its runs are run, and what they are judged by."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from jaxops.sweep.distributions import Integer, LogUniform, Pick, Uniform
from jaxops.sweep.search.spec import Search

MAX_POINTS = 20_000
"""Of one sweep; more than that can be planned by nobody, and a slip of a zero must not fill the memory."""
Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=1, le=MAX_POINTS)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandomDraws:
    """Random points: `count` draws of all the `values`.

    Draw number i of a path depends on the seed, the path and i alone: a larger count adds points and changes none.
    """

    count: Count
    seed: int = 0
    values: Mapping[str, Uniform | LogUniform | Integer | Pick]


@dataclasses.dataclass(frozen=True, kw_only=True)
class When:
    """Further parts of the sweep, for the points whose config has the values of `if`.

    A list in `if` means one of its values.
    """

    if_: Mapping[str, Any]
    grid: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    zip: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    random: RandomDraws | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Runs:
    """The points of a sweep: the product of its parts, over dotted paths of the base config.

    Attributes:
      grid: lists of values, or a range of whole numbers `0..4`; every combination is run.
      zip: lists of one length that are walked together.
      random: values that are drawn.
      seeds: the number of seeds of each point (run.seed 0, 1, ...), or the seeds themselves.
      when: parts for some of the points only.
    """

    grid: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    zip: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    random: RandomDraws | None = None
    seeds: Count | tuple[int, ...] | None = None
    when: tuple[When, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class InProcess:
    """Runs one point after the other in this process: nothing is imported or compiled twice, but a crash ends all."""

    kind: Literal["in_process"] = "in_process"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Local:
    """Runs each point in a process of its own on this machine, `jobs` at a time, each with its share of it."""

    kind: Literal["local"] = "local"
    jobs: Positive = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slurm:
    """Runs the points as the tasks of a Slurm job array, from a login node, in a folder that all nodes share.

    Attributes:
      jobs: tasks at a time.
      hours: the time of each.
      options: further options of sbatch, for each task: {partition: gpu, gres: 'gpu:1', mem: 32G}.
      setup: lines of shell before the training: `module load cuda`.
    """

    kind: Literal["slurm"] = "slurm"
    jobs: Positive = 8
    hours: Annotated[float, Field(gt=0, le=10_000)]
    options: Mapping[Annotated[str, Field(pattern=r"^[a-z][a-z-]*$")], str | int] = dataclasses.field(
        default_factory=dict
    )
    setup: tuple[str, ...] = ()

    def problems(self) -> list[tuple[str, str]]:
        """Returns (field, message) for options that the array has already, or that would be read as two."""
        ours = ("array", "job-name", "comment", "output", "time", "signal", "wrap")
        found = [("options", f"{name} is set by the sweep itself") for name in self.options if name in ours]
        odd = [name for name, value in self.options.items() if any(c.isspace() for c in str(value))]
        return found + [("options", f"{name}: expected one word, got {self.options[name]!r}") for name in odd]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Launch:
    """Runs each point by `jaxops launch`, `jobs` at a time, in a folder that the machines share.

    Attributes:
      on: the accelerator: `cpu-8`, `v5e-8`, ...
      backend: the way to reach machines, as `jaxops launch --backend` names it.
      hours: the most that a point may take.
      jobs: points at a time.
      flags: further flags of the command: [--spot, --option, partition=gpu].
    """

    kind: Literal["launch"] = "launch"
    on: str
    backend: str = "local"
    hours: Annotated[float, Field(gt=0)]
    jobs: Positive = 1
    flags: tuple[str, ...] = ()


RunnerSpec = Local | InProcess | Slurm | Launch


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepSpec:
    """A sweep file without its `base:`.

    Attributes:
      runs: the points.
      search: in place of `runs`: points that are proposed one after the other, by how the earlier ones ended.
      set: values for all points, by dotted path of the base config; an override on the command line comes after them.
      metric: what the runs are judged by, on validation. By default what the base keeps its best checkpoint by, else
        what it stops early by, else the first of evaluate.metrics.
      runner: how they are run.
      name: the sweep's name; by default that of its file.
      dir: where its folder is made; by default run.dir of the base.
    """

    runs: Runs = Runs()
    search: Search | None = None
    set: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    metric: str | None = None
    runner: Local | InProcess | Slurm | Launch = Local()
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=200)] | None = None
    dir: str | None = None

"""The schema of `search:` in a sweep file: what is searched, by which sampler, and which trials are pruned."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field

from jaxops.sweep.distributions import Integer, LogUniform, Pick, Uniform

MAX_TRIALS = 20_000
Whole = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hyperband:
    """Stops trials early by successive halving in several brackets, of which some let a slow beginner live longer.

    L. Li et al., "Hyperband: A Novel Bandit-Based Approach to Hyperparameter Optimization", JMLR 18 (2018).

    Attributes:
      least: evaluations that every trial gets.
      most: evaluations of a whole run; by default what its config says, else what the first finished trial took.
      factor: of the trials that reach a rung about one in so many goes on.
    """

    kind: Literal["hyperband"] = "hyperband"
    least: Positive = 1
    most: Positive | None = None
    factor: Annotated[int, Field(ge=2)] = 3

    def problems(self) -> list[tuple[str, str]]:
        """Returns (field, message) where a run is shorter than what every trial gets."""
        if self.most is None or self.least < self.most:
            return []
        return [("least", f"must be below most {self.most}, got {self.least}")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Median:
    """Stops a trial whose best value so far is worse than the median of the others at the same evaluation.

    Attributes:
      startup: trials that have ended before any is pruned.
      warmup: evaluations that every trial gets.
    """

    kind: Literal["median"] = "median"
    startup: Whole = 5
    warmup: Whole = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class NoPruning:
    """Lets every trial run to its end."""

    kind: Literal["none"] = "none"


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchWhen:
    """Further values to search, for the trials whose config has the values of `if`.

    A list in `if` means one of its values.
    """

    if_: Mapping[str, Any]
    values: Mapping[str, Uniform | LogUniform | Integer | Pick]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Search:
    """A search: trial after trial, each with values that are chosen by how the earlier ones ended.

    Attributes:
      kind: the sampler. `tpe`: tree-structured Parzen estimators (J. Bergstra et al., 2011), over all values jointly;
        `gp`: Gaussian processes, which need PyTorch; `random`: it learns nothing, and can be pruned all the same.
      trials: how many; a larger number goes on with the same search.
      seed: of the sampler. Trial number i depends on the seed, i and what has ended before it.
      startup: trials with random values before the sampler learns.
      values: the distributions, by dotted path of the base config.
      when: further values, for some trials only.
      first: values to begin with, by path; the base's own, for instance.
      pruner: which trials are stopped early.
      storage: where the journal is kept: by default in the sweep's folder, else in a database (postgresql://HOST/NAME)
        or an object store (s3://BUCKET/FOLDER, gs://BUCKET/FOLDER).
    """

    kind: Literal["tpe", "gp", "random"] = "tpe"
    trials: Annotated[int, Field(ge=1, le=MAX_TRIALS)] = 30
    seed: Whole = 0
    startup: Positive = 10
    values: Annotated[Mapping[str, Uniform | LogUniform | Integer | Pick], Field(min_length=1)]
    when: tuple[SearchWhen, ...] = ()
    first: tuple[Mapping[str, Any], ...] = ()
    pruner: Hyperband | Median | NoPruning = Median()
    storage: str | None = None

"""The space of a search: how a trial's values are suggested, checked and made into the config of a run."""

from collections.abc import Iterator, Mapping, Sequence
from random import Random
from typing import Any

from jaxops.config.errors import ConfigError, Problem
from jaxops.config.load import Loaded
from jaxops.config.node import Node, node_of
from jaxops.core.failures import nearest
from jaxops.sweep.distributions import Distribution, Suggests
from jaxops.sweep.resolve import Resolver, check_paths, require_met
from jaxops.sweep.search.spec import Search
from jaxops.sweep.sources import SweepSource
from jaxops.sweep.space import SEED, Assignment

TRIED = 30
"""Random trials that are checked before anything starts, beside the corners of each distribution."""


class SearchSpace:
    """The values that are searched, over a base config.

    Args:
      source: the sweep as it was written.
      search: the search.
      tree: the same as it was written, which knows lines.
    """

    def __init__(self, source: SweepSource, search: Search, tree: Node) -> None:
        self.search, self._tree = search, tree
        self._resolver = Resolver(source, (), tree)
        self._origins = dict(self._lines())
        problems: list[Problem] = []
        for path, origin in self._origins.items():
            check_paths(source, [{path: Node(None, origin)}], problems)
        if SEED in self._origins:
            message = "a search over seeds finds the luckiest one; run the best trials with seeds when it is done"
            problems.append(Problem(f"search.values.{SEED}", self._origins[SEED], None, message))
        twice = [path for part in search.when for path in part.values if path in search.values]
        problems += [Problem("search.when", self._origins[path], None, f"{path} has values already") for path in twice]
        if problems:
            raise ConfigError(list(dict.fromkeys(problems)))

    def propose(self, trial: Suggests) -> dict[str, Any]:
        """Returns the values by path that a trial suggests, those of conditional parts included."""
        values = {path: kind.suggest(trial, path) for path, kind in self.search.values.items()}
        for part in self.search.when:
            assignment = self.assignment(values)
            if self._resolver.holds(part.if_, assignment, self._resolver.load(assignment))[0]:
                values |= {path: kind.suggest(trial, path) for path, kind in part.values.items()}
        return values

    def load(self, values: Mapping[str, Any]) -> Loaded[Any] | ConfigError:
        """Returns the config of a trial with these values, or what is wrong with it."""
        return self._resolver.load(self.assignment(values))

    def assignment(self, values: Mapping[str, Any]) -> Assignment:
        """Returns values as the points of other sweeps have them."""
        return {path: node_of(value, self._origins.get(path, "the search")) for path, value in values.items()}

    def checked(self) -> list[tuple[Assignment, Loaded[Any]]]:
        """Returns some trials of the space with their configs: every corner of each distribution, and random ones.

        Raises:
          UserError: one of them is wrong: everything is told at once.
        """
        first = [self._first(number) for number in range(len(self.search.first))]
        tried = {str(values): values for values in [*first, *self._tries()]}
        found = self._resolver.all([self.assignment(values) for values in tried.values()])
        trees = self._tree.value["when"].value if self.search.when else []
        for part, tree in zip(self.search.when, trees, strict=True):
            met = set[str]()
            for assignment, loaded in found:
                met |= self._resolver.holds(part.if_, assignment, loaded)[1]
            require_met(part.if_, tree, met, found, "search.when")
        return found

    def evaluations(self) -> int | None:
        """Returns how often a run evaluates; None where its config does not say, or trials differ in that."""
        found = set[int | None]()
        for values in self._draws(Random(0)):
            loaded = self.load(values)
            if isinstance(loaded, Loaded):
                steps, every = loaded.config.run.steps, loaded.config.evaluate.every.steps
                found.add(steps // every if steps and every else None)
        return max(found.pop() or 0, 1) if len(found) == 1 and None not in found else None

    def _tries(self) -> Iterator[dict[str, Any]]:
        random = Random(0)
        yield from (self.propose(_Drawn(random, {})) for _ in range(TRIED))
        for path, kind in self.search.values.items():
            for value in kind.corners():
                yield self.propose(_Drawn(random, {path: kind.parameter_of(value)}))
        for part in self.search.when:
            having = next((one for one in self._draws(random) if part.values.keys() <= one.keys()), None)
            for path, kind in part.values.items() if having else ():
                yield from ({**(having or {}), path: value} for value in kind.corners())

    def _draws(self, random: Random) -> Iterator[dict[str, Any]]:
        return (self.propose(_Drawn(random, {})) for _ in range(TRIED))

    def _first(self, number: int) -> dict[str, Any]:
        """Returns the values of one of the trials that the file begins with.

        Raises:
          UserError: they are not all of those that such a trial has, or one of them is outside of its distribution.
        """
        given, node = self.search.first[number], self._tree.value["first"].value[number]
        kinds = dict(self._kinds())
        for path, value in given.items():
            where = f"search.first.{number}.{path}"
            if path not in kinds:
                message = f"is not among search.values{nearest(path, kinds)}"
                raise ConfigError([Problem(where, node.value[path].origin, None, message)])
            if kinds[path].parameter_of(value) is None:
                message = f"must be one that the search may suggest ({kinds[path].shown}), got {value!r}"
                raise ConfigError([Problem(where, node.value[path].origin, None, message)])
        forced = {path: kinds[path].parameter_of(value) for path, value in given.items()}
        needed = self.propose(_Drawn(Random(0), forced))
        if needed.keys() != given.keys():
            wrong = sorted(needed.keys() ^ given.keys())
            told = "is missing" if wrong[0] in needed else "is no value of this trial: its condition does not hold"
            raise ConfigError([Problem(f"search.first.{number}", node.origin, None, f"{wrong[0]} {told}")])
        return dict(given)

    def _kinds(self) -> Iterator[tuple[str, Distribution]]:
        yield from self.search.values.items()
        for part in self.search.when:
            yield from part.values.items()

    def _lines(self) -> Iterator[tuple[str, str]]:
        """Yields each path that is searched with the line that it was written in."""
        sections: Sequence[Node] = [self._tree, *(self._tree.value["when"].value if self.search.when else [])]
        for section in sections:
            for path, node in section.value["values"].value.items():
                yield path, node.origin


class _Drawn:
    """Random parameters, but for some that are given."""

    def __init__(self, random: Random, given: Mapping[str, Any]) -> None:
        self._random, self._given = random, given

    def suggest_float(self, name: str, low: float, high: float, *, log: bool = False) -> float:
        if log:
            return float(self._given.get(name, low * (high / low) ** self._random.random()))
        return float(self._given.get(name, self._random.uniform(low, high)))

    def suggest_int(self, name: str, low: int, high: int, *, log: bool = False) -> int:
        return int(self._given.get(name, self._random.randint(low, high)))

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        return self._given.get(name, self._random.choice(choices))

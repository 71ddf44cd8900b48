"""What a sweep came to: its points, the groups of those that differ in their seed alone, and which group is best.

A mean over seeds has an interval by Student's t, and the best group is named only where Welch's test tells it from the
next: B. L. Welch, "The generalization of Student's problem when several different population variances are involved",
Biometrika 34 (1947).
"""

import collections
import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from jaxops.core.metric import Metric
from jaxops.report.folder import RunRecord, read_run
from jaxops.report.results import best_step, score
from jaxops.sweep.plan import SweepPlan
from jaxops.sweep.points import Point, label_of_values
from jaxops.sweep.records import State, SweepFolder
from jaxops.sweep.space import SEED

CONFIDENCE = 0.95


@dataclasses.dataclass(frozen=True)
class Result:
    """One point.

    Attributes:
      point: the point.
      state: its state.
      reason: why it failed or was stopped.
      value: the metric on validation at the end; None for a run that has not finished, or measured no finite number.
      so_far: its best value yet, of a run that has not finished.
      run: the files of its run folder; None where there is none.
    """

    point: Point
    state: State
    reason: str
    value: float | None
    so_far: float | None
    run: RunRecord | None


@dataclasses.dataclass(frozen=True)
class SeedGroup:
    """Points that differ in their seed alone.

    Attributes:
      id: the group of its points.
      values: what the sweep gave it, without the seed.
      results: its points.
      numbers: the values of those that finished.
    """

    id: str
    values: dict[str, Any]
    results: list[Result]
    numbers: list[float]

    @property
    def mean(self) -> float | None:
        """The mean over seeds; None without a number."""
        return float(np.mean(self.numbers)) if self.numbers else None

    @property
    def margin(self) -> float | None:
        """Half the width of the 95 % interval of the mean; None for fewer than two seeds."""
        n = len(self.numbers)
        if n < 2:
            return None
        return float(stats.t.ppf(0.5 + CONFIDENCE / 2, n - 1) * np.std(self.numbers, ddof=1) / math.sqrt(n))

    @property
    def label(self) -> str:
        """The group for people."""
        return label_of_values(self.values)

    @property
    def shown(self) -> str:
        """Its mean for people: `0.1234 ± 0.0020 (3 seeds)`."""
        if self.mean is None:
            return "no number"
        margin = "" if self.margin is None else f" ± {score(self.margin)}"
        missing = len(self.results) - len(self.numbers)
        of = f" of {len(self.results)}" if missing else ""
        return f"{score(self.mean)}{margin} ({len(self.numbers)}{of} seed{'s' * (len(self.results) > 1)})"


@dataclasses.dataclass(frozen=True)
class SweepVerdict:
    """Which group is best.

    Attributes:
      winner: the best group, where the seeds tell it from the next; else None.
      words: the same in a sentence, with the reason.
      p: of Welch's test between the first two; None where there was none.
    """

    winner: SeedGroup | None
    words: str
    p: float | None = None


@dataclasses.dataclass(frozen=True)
class Outcome:
    """A sweep as it stands: groups with a number come first, the best one at the top."""

    plan: SweepPlan
    results: list[Result]
    groups: list[SeedGroup]
    verdict: SweepVerdict

    def count(self, state: State) -> int:
        """Returns how many points are in a state."""
        return sum(result.state == state for result in self.results)

    @property
    def left(self) -> int:
        """How many points have neither finished nor failed nor been pruned; of a search, those too that are to come."""
        ended = sum(result.state in ("finished", "failed", "pruned") for result in self.results)
        return len(self.results) - ended + self.to_come

    @property
    def to_come(self) -> int:
        """How many trials a search is to propose yet, by what its folder says."""
        return max(0, (self.plan.trials or 0) - self.plan.proposed)

    @property
    def counts(self) -> str:
        """How many points are in each state: `9 finished, 2 waiting, 1 failed`."""
        found = collections.Counter(result.state for result in self.results)
        order: tuple[State, ...] = ("finished", "pruned", "running", "unfinished", "waiting", "failed")
        told = [f"{found[state]} {state}" for state in order if found[state]]
        return ", ".join([*told, f"{self.to_come} to come"] if self.to_come else told)


def read_outcome(plan: SweepPlan) -> Outcome:
    """Reads all run folders of a plan; a broken or missing one does not stop it."""
    folder = SweepFolder(plan.folder)
    results = [_result(folder, plan.metric, point) for point in plan.points]
    groups = _ranked(plan.metric, results)
    verdict = judge(plan.metric, groups) if plan.trials is None else judge_search(plan, groups)
    if missing := sum(result.value is None and result.state != "pruned" for result in results):
        words = f"{verdict.words} {missing} of {len(results)} runs have no number yet."
        verdict = dataclasses.replace(verdict, words=words)
    return Outcome(plan, results, groups, verdict)


def _result(folder: SweepFolder, metric: Metric, point: Point) -> Result:
    state, reason = folder.state(point)
    place = folder.path / point.id
    run = read_run(place) if place.is_dir() else None
    value = run.number(f"valid/{metric.name}") if run is not None and state == "finished" else None
    if run is None and state == "finished" and (outcome := folder.outcome(point)) is not None:
        value = outcome.value
    if state == "finished" and value is None:
        reason = f"it measured no finite valid/{metric.name}"
    best = best_step(run, metric.name) if run is not None and state != "finished" else None
    return Result(point, state, reason, value, None if best is None else best[1], run)


def _ranked(metric: Metric, results: Sequence[Result]) -> list[SeedGroup]:
    members: dict[str, list[Result]] = {}
    for result in results:
        members.setdefault(result.point.group, []).append(result)
    groups = []
    for name, found in members.items():
        values = {path: value for path, value in found[0].point.values.items() if path != SEED}
        groups.append(SeedGroup(name, values, found, [one.value for one in found if one.value is not None]))
    sign = -1.0 if metric.better == "higher" else 1.0
    return sorted(groups, key=lambda group: math.inf if group.mean is None else sign * group.mean)


def judge(metric: Metric, groups: Sequence[SeedGroup]) -> SweepVerdict:
    """Returns which of some groups, sorted from the best on, is better than the next by more than the seeds differ."""
    numbered = [group for group in groups if group.numbers]
    if not numbered:
        return SweepVerdict(None, "No run has finished with a number yet.")
    first = numbered[0]
    if len(numbered) == 1:
        return SweepVerdict(None, f"Only one has a number: {first.label}, {metric.shown} {first.shown}.")
    second = numbered[1]
    against = f"{first.label}: {metric.shown} {first.shown}, before {second.label}: {second.shown}"
    if _other_data(numbered):
        words = (
            "No winner: runs were evaluated on different data (another SHA-256 of the split), which compares nothing."
        )
        return SweepVerdict(None, words)
    if min(len(first.numbers), len(second.numbers)) < 2:
        return SweepVerdict(
            None, f"No winner is named: {against}, but one seed does not say what seeds do (runs.seeds=3)."
        )
    p = welch(first.numbers, second.numbers)
    test = f"Welch's test of the first two: p = {p:.2g}"
    many = f" It was chosen out of {len(numbered)}: run it with seeds of its own before you publish its mean."
    if first.mean == second.mean or p >= 1 - CONFIDENCE:
        return SweepVerdict(None, f"No winner: {against}; they differ by no more than their seeds do ({test}).", p)
    words = (
        f"The best is {against}; they differ by more than their seeds do ({test}).{many if len(numbered) > 2 else ''}"
    )
    return SweepVerdict(first, words, p)


def judge_search(plan: SweepPlan, groups: Sequence[SeedGroup]) -> SweepVerdict:
    """Returns which trial of a search is best, and how to learn whether that is more than luck."""
    numbered = [group for group in groups if group.numbers]
    if not numbered:
        return SweepVerdict(None, "No trial has finished with a number yet.")
    if _other_data(numbered):
        words = "No best trial: they were evaluated on different data (another SHA-256 of the split)."
        return SweepVerdict(None, words)
    first, folder = numbered[0], plan.folder
    config = folder / "points" / f"{first.results[0].point.id}.yaml"
    words = (
        f"The best of {plan.proposed} trials is {first.label}: {plan.metric.shown} {score(first.numbers[0])} with one"
        " seed. It was chosen for that number, which will be worse the next time: run it, and what it is to beat, with"
        f" seeds of its own: jaxops sweep {config} run.seed=1..3 dir={folder.parent}"
    )
    return SweepVerdict(None, words)


def welch(a: Sequence[float], b: Sequence[float]) -> float:
    """Returns the p-value of Welch's two-sided t-test; 0 for two constants that differ, 1 for the same constant."""
    spread = np.var(a, ddof=1) / len(a) + np.var(b, ddof=1) / len(b)
    if spread == 0:
        return float(np.mean(a) == np.mean(b))
    return float(stats.ttest_ind(a, b, equal_var=False).pvalue)


def _other_data(groups: Iterable[SeedGroup]) -> bool:
    """Returns whether two finished runs of one seed were evaluated on different data."""
    splits: dict[int, set[str]] = {}
    for result in (result for group in groups for result in group.results if result.value is not None):
        split = result.run.data.get("split") if result.run is not None else None
        if isinstance(split, Mapping) and split.get("sha256"):
            splits.setdefault(result.point.seed, set()).add(str(split["sha256"]))
    return any(len(found) > 1 for found in splits.values())

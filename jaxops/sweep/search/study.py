"""The study of a search: Optuna in memory, rebuilt from the journal's events and never stored by itself.

`apply` takes one event, and is the same for an event that has just happened and for one that is read again. What a
trial is given depends on the search's seed, the trial's number and the events before it, and on no state of a random
generator: after a restart nothing is suggested twice, and nothing differs. Optuna is an optional dependency
(`pip install 'jaxops[sweep]'`), imported here alone. Tested in tests/sweep/test_search_study.py.
"""

import dataclasses
import importlib.util
import json
import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from types import ModuleType
from typing import Any, Literal

import numpy as np

from jaxops.core.failures import UserError
from jaxops.core.metric import Metric
from jaxops.sweep.distributions import Suggests
from jaxops.sweep.search.events import SearchEvent
from jaxops.sweep.search.spec import Hyperband, Median, NoPruning, Search

Told = Literal["complete", "pruned", "failed"]
NAME = "search"
"""Optuna's name of every study: Hyperband derives the bracket of a trial from it."""


@dataclasses.dataclass
class Trial:
    """One trial of a search.

    Attributes:
      number: its number, from 0.
      point: the id of its run.
      values: its values by path, as the config takes them.
      parameters: the same as Optuna has them.
      again: the failed trial whose values it tries again; None for a trial with values of its own.
      reports: (step, value) of each evaluation so far; NaN where the metric was not finite.
      pruned: why it was decided to stop it early; empty while it was not.
      state: how it ended; None while it has not.
      value: the metric at its end; None unless it is complete.
      reason: why it failed.
    """

    number: int
    point: str
    values: dict[str, Any]
    parameters: dict[str, Any]
    again: int | None = None
    reports: list[tuple[int, float]] = dataclasses.field(default_factory=list)
    pruned: str = ""
    state: Told | None = None
    value: float | None = None
    reason: str = ""


class Study:
    """The trials of a search so far, and the sampler and the pruner that learn from them.

    Args:
      search: what is searched.
      metric: what is maximised or minimised, by its own direction.
      most: evaluations of a whole run, where they are known.

    Raises:
      UserError: Optuna is not installed, or lacks what the sampler needs.
    """

    def __init__(self, search: Search, metric: Metric, most: int | None = None) -> None:
        self._optuna = require_optuna(search.kind)
        self._search, self.trials = search, list[Trial]()
        self._study = self._optuna.create_study(
            direction="maximize" if metric.better == "higher" else "minimize",
            study_name=NAME,
            sampler=self._optuna.samplers.RandomSampler(seed=0),
            # The study knows no pruner: with Hyperband as its own, Optuna would show the sampler the trials of one
            # bracket alone, and thirty trials would teach it hardly anything.
            pruner=self._optuna.pruners.NopPruner(),
        )
        self._pruner = _pruner(self._optuna, search, most)
        self._handles: list[Any] = []

    def replay(self, events: Iterable[SearchEvent]) -> None:
        """Applies the events of a journal, in their order."""
        pruner = self._pruner
        if not isinstance(self._search.pruner, Hyperband):  # no other keeps anything between two questions
            self._pruner = self._optuna.pruners.NopPruner()
        for event in events:
            self.apply(event)
        self._pruner = pruner

    def ask(self, propose: Callable[[Suggests], Mapping[str, Any]], point_of: Callable[[Any], str]) -> SearchEvent:
        """Returns the event of the next trial, which the caller writes down before anything else happens.

        Args:
          propose: suggests the values, by path.
          point_of: the id of the run with these values.
        """
        number = len(self.trials)
        values: Mapping[str, Any]
        if self.spent < len(self._search.first):
            trial = self._optuna.trial.FixedTrial(dict(self._fixed(self.spent)), number)
            values = {**propose(trial), **self._search.first[self.spent]}  # to the last digit
            self._add(trial.params, trial.distributions)
        else:
            self._study.sampler = _sampler(self._optuna, self._search, number)
            trial = self._study.ask()
            values = propose(trial)
            self._handles.append(trial)
        fields = {
            "point": point_of(values),
            "values": dict(values),
            "parameters": dict(trial.params),
            "distributions": {name: _json_of(self._optuna, kind) for name, kind in trial.distributions.items()},
        }
        self._note(number, fields)
        return SearchEvent("ask", number, fields)

    def ask_again(self, number: int) -> SearchEvent:
        """Returns the event of a further trial with the values of one that failed."""
        old = self._study.get_trials(deepcopy=False)[number]
        fields = {
            "point": self.trials[number].point,
            "values": self.trials[number].values,
            "parameters": dict(old.params),
            "distributions": {name: _json_of(self._optuna, kind) for name, kind in old.distributions.items()},
            "again": number,
        }
        event = SearchEvent("ask", len(self.trials), fields)
        self.apply(event)
        return event

    def apply(self, event: SearchEvent) -> bool:
        """Takes one event; returns whether the pruner would stop the trial after it.

        Raises:
          UserError: it does not fit those before it.
        """
        fields = event.fields
        if event.what == "begin":
            return False
        if event.what == "ask":
            if event.trial != len(self.trials):
                raise UserError(f"the journal asks trial {event.trial} where {len(self.trials)} is next; it has a gap")
            kinds = {
                name: self._optuna.distributions.json_to_distribution(json.dumps(kind))
                for name, kind in fields["distributions"].items()
            }
            self._add(fields["parameters"], kinds)
            self._note(event.trial, fields)
            return False
        if event.trial >= len(self.trials) or self.trials[event.trial].state is not None:
            raise UserError(f"the journal has a {event.what} of trial {event.trial}, which does not run; it has a gap")
        trial = self.trials[event.trial]
        if event.what == "report":
            return self._report(trial, int(fields["step"]), fields["value"])
        if event.what == "prune":
            trial.pruned = str(fields["reason"])
            return False
        self._tell(trial, fields)
        return False

    def running(self) -> list[Trial]:
        """Returns the trials that have not ended, in their order."""
        return [trial for trial in self.trials if trial.state is None]

    @property
    def spent(self) -> int:
        """The number of trials with values of their own: what counts towards `trials`."""
        return sum(trial.again is None for trial in self.trials)

    def importance(self) -> dict[str, float]:
        """Returns the share of each path by PED-ANOVA, Optuna's own default; empty for few trials.

        S. Watanabe et al., "PED-ANOVA: Efficiently Quantifying Hyperparameter Importance in Arbitrary Subspaces",
        IJCAI 2023.
        """
        values = [trial.value for trial in self.trials if trial.state == "complete"]
        if len(values) < 6 or len({*values}) < 2:
            return {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the evaluator is experimental
            return dict(self._optuna.importance.get_param_importances(self._study))

    def _fixed(self, place: int) -> Iterable[tuple[str, Any]]:
        kinds = {**self._search.values, **{k: v for part in self._search.when for k, v in part.values.items()}}
        return [(path, kinds[path].parameter_of(value)) for path, value in self._search.first[place].items()]

    def _add(self, parameters: Mapping[str, Any], kinds: Mapping[str, Any]) -> None:
        """Adds a running trial with known parameters, without asking the sampler."""
        running = self._optuna.trial.TrialState.RUNNING
        made = self._optuna.trial.create_trial(state=running, params=dict(parameters), distributions=dict(kinds))
        self._study.add_trial(made)
        self._study.sampler = self._optuna.samplers.RandomSampler(seed=0)  # which the handle asks for nothing
        added = self._study.get_trials(deepcopy=False)[-1]
        self._handles.append(self._optuna.trial.Trial(self._study, added._trial_id))

    def _note(self, number: int, fields: Mapping[str, Any]) -> None:
        self.trials.append(
            Trial(number, fields["point"], dict(fields["values"]), dict(fields["parameters"]), fields.get("again"))
        )

    def _report(self, trial: Trial, step: int, value: float | None) -> bool:
        number = math.nan if value is None else float(value)
        trial.reports.append((step, number))
        if not math.isfinite(number):  # nothing to compare: such a trial goes no further, whatever the others did
            return not isinstance(self._search.pruner, NoPruning)
        # The pruner counts evaluations, so that trials whose batches or schedules differ are compared at like places.
        self._handles[trial.number].report(number, len(trial.reports))
        frozen = self._study.get_trials(deepcopy=False)[trial.number]
        return bool(self._pruner.prune(self._study, frozen))

    def _tell(self, trial: Trial, fields: Mapping[str, Any]) -> None:
        states = self._optuna.trial.TrialState
        trial.state, trial.reason = fields["state"], str(fields.get("reason") or "")
        if trial.state == "complete":
            trial.value = float(fields["value"])
            self._study.tell(trial.number, trial.value)
        else:
            # A run that broke is told as one that was pruned: to Optuna a failed trial never was, and the sampler would
            # go where the loss is not finite again and again. One that could not begin says nothing of its values.
            lost = trial.state == "failed" and bool(fields.get("refused"))
            self._study.tell(trial.number, state=states.FAIL if lost else states.PRUNED)


def require_optuna(kind: str = "tpe") -> ModuleType:
    """Returns Optuna, which prints nothing of its own.

    Raises:
      UserError: it is not installed, or the sampler needs PyTorch, which is not.
    """
    try:
        import optuna
    except ImportError:
        raise UserError("search: needs Optuna: pip install 'jaxops[sweep]'") from None
    if kind == "gp" and importlib.util.find_spec("torch") is None:
        raise UserError(
            "search.kind: Optuna's Gaussian processes (gp) need PyTorch, which is not installed: pip install torch (the"
            " CPU build does), or take kind: tpe"
        )
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


def _sampler(optuna: ModuleType, search: Search, number: int) -> Any:
    """Returns the sampler of one trial, seeded by the search's seed and the trial's number."""
    seed = int(np.random.SeedSequence((search.seed, number)).generate_state(1)[0])
    match search.kind:
        case "tpe":
            return optuna.samplers.TPESampler(seed=seed, n_startup_trials=search.startup)
        case "gp":
            return optuna.samplers.GPSampler(seed=seed, n_startup_trials=search.startup)
        case "random":
            return optuna.samplers.RandomSampler(seed=seed)


def _pruner(optuna: ModuleType, search: Search, most: int | None) -> Any:
    pruner = search.pruner
    match pruner:
        case Hyperband():
            return optuna.pruners.HyperbandPruner(
                min_resource=pruner.least,
                max_resource=pruner.most or most or "auto",
                reduction_factor=pruner.factor,
            )
        case Median():
            return optuna.pruners.MedianPruner(n_startup_trials=pruner.startup, n_warmup_steps=pruner.warmup)
    return optuna.pruners.NopPruner()


def _json_of(optuna: ModuleType, kind: Any) -> Any:
    return json.loads(optuna.distributions.distribution_to_json(kind))

"""The study of a search: it follows the metric's own direction, and is the same when it is rebuilt from its events."""

import math

import pytest

from jaxops.core.failures import UserError
from jaxops.core.metric import Metric
from jaxops.sweep.distributions import LogUniform, Pick, Uniform
from jaxops.sweep.search.events import SearchEvent, parse_event
from jaxops.sweep.search.spec import Hyperband, Median, NoPruning, Search
from jaxops.sweep.search.study import Study, require_optuna

pytest.importorskip("optuna")
LOWER, HIGHER = Metric("nll", "lower"), Metric("auc", "higher")
VALUES = {"x": Uniform(low=-1.0, high=1.0), "lr": LogUniform(low=1e-4, high=1.0)}


def study(metric=LOWER, **fields) -> Study:
    fields = {"values": VALUES, "pruner": NoPruning(), "trials": 20, "startup": 5} | fields
    return Study(Search(**fields), metric)


def propose(trial):
    return {path: kind.suggest(trial, path) for path, kind in VALUES.items()}


def reread(event: SearchEvent) -> SearchEvent:
    """The event as a journal gives it back."""
    return parse_event(event.line(), "a test")


class Run:
    """A search with a stand-in objective, whose events are kept."""

    def __init__(self, study: Study, loss, evaluations: int = 4):
        self.study, self.loss, self.evaluations, self.events = study, loss, evaluations, []

    def write(self, event: SearchEvent) -> bool:
        self.events.append(reread(event))
        return self.study.apply(event)

    def trial(self) -> None:
        event = self.study.ask(propose, str)
        self.events.append(reread(event))
        for step in range(1, self.evaluations + 1):
            value = self.loss(event.fields["values"]) + 1.0 / step
            if self.write(SearchEvent("report", event.trial, {"step": step, "value": value})):
                self.write(SearchEvent("prune", event.trial, {"reason": "worse"}))
                self.write(SearchEvent("tell", event.trial, {"state": "pruned"}))
                return
        self.write(SearchEvent("tell", event.trial, {"state": "complete", "value": value}))


def bowl(values) -> float:
    return (values["x"] - 0.3) ** 2 + (math.log10(values["lr"]) + 2) ** 2


@pytest.mark.parametrize("pruner", [NoPruning(), Median(startup=2), Hyperband(most=4)])
def test_a_study_rebuilt_after_any_event_asks_and_decides_the_same(pruner):
    """optuna/optuna#3255: resumed with a seeded sampler, a study runs the same parameters again."""
    whole = Run(study(pruner=pruner), bowl)
    for _ in range(12):
        whole.trial()
    asked = [event for event in whole.events if event.what == "ask"]
    assert len({str(event.fields["values"]) for event in asked}) == 12
    for cut in range(len(whole.events)):
        if whole.events[cut].what != "ask":
            continue
        again = study(pruner=pruner)
        again.replay(whole.events[:cut])
        event = again.ask(propose, str)
        assert event.fields == whole.events[cut].fields
        for later, expected in zip(whole.events[cut + 1 :], whole.events[cut + 2 :], strict=False):
            if later.what == "ask":
                break
            assert again.apply(later) == (expected.what == "prune")  # nothing else is decided than was before
    if not isinstance(pruner, NoPruning):
        assert 0 < sum(trial.state == "pruned" for trial in whole.study.trials) < 12


@pytest.mark.parametrize(("metric", "sign"), [(LOWER, 1), (HIGHER, -1)])
def test_the_sampler_goes_where_the_metric_is_better(metric, sign):
    """hydra-ecosystem/hydra#2047: the direction that was asked for is not the one that is searched in."""
    run = Run(study(metric, trials=40), lambda values: sign * bowl(values), evaluations=1)
    for _ in range(40):
        run.trial()
    early, late = ([bowl(trial.values) for trial in run.study.trials[part]] for part in (slice(0, 5), slice(30, 40)))
    assert sorted(late)[5] < sorted(early)[2] and min(late) < 0.3


@pytest.mark.parametrize(("metric", "sign"), [(LOWER, 1), (HIGHER, -1)])
@pytest.mark.parametrize("pruner", [Median(startup=3, warmup=0), Hyperband(most=9)])
def test_the_pruner_stops_the_worse_ones(metric, sign, pruner):
    search = study(metric, pruner=pruner, kind="random")
    run = Run(search, lambda values: sign * bowl(values), evaluations=9)
    for _ in range(30):
        run.trial()
    states = {state: [bowl(t.values) for t in search.trials if t.state == state] for state in ("complete", "pruned")}
    assert len(states["pruned"]) > 5 and min(states["complete"]) < min(states["pruned"])
    mean = lambda numbers: sum(numbers) / len(numbers)
    assert mean(states["complete"]) < mean(states["pruned"])


def test_a_run_that_broke_teaches_the_sampler_and_one_that_could_not_begin_does_not():
    """To Optuna a failed trial never was, and its sampler goes there again."""
    search = study(startup=3)
    loss = lambda values: values["x"]
    run = Run(search, loss, evaluations=1)
    for _ in range(30):
        event = search.ask(propose, str)
        run.events.append(event)
        broke = event.fields["values"]["x"] < 0  # the better half by the objective
        told = (
            {"state": "failed", "reason": "not finite"}
            if broke
            else {"state": "complete", "value": loss(event.fields["values"])}
        )
        run.write(SearchEvent("tell", event.trial, told))
    late = [trial.values["x"] for trial in search.trials[15:]]
    assert sum(x < 0 for x in late) <= 4
    assert all(trial.value is None for trial in search.trials if trial.state == "failed")
    import optuna

    refused = study()
    event = refused.ask(propose, str)
    refused.apply(SearchEvent("tell", event.trial, {"state": "failed", "reason": "no file", "refused": True}))
    assert refused._study.trials[0].state == optuna.trial.TrialState.FAIL


def test_no_finite_number_is_never_a_value():
    """ray-project/ray#11670, hydra-ecosystem/hydra#3451: NaN breaks the scheduler, or ends the sweep."""
    search = study(pruner=Median(startup=1, warmup=0))
    Run(search, bowl).trial()
    event = search.ask(propose, str)
    report = reread(SearchEvent("report", event.trial, {"step": 1, "value": math.nan}))
    assert report.fields["value"] is None and search.apply(report)  # to be pruned
    assert math.isnan(search.trials[1].reports[0][1])
    search.apply(SearchEvent("tell", 1, {"state": "failed", "reason": "it measured no finite valid/nll"}))
    assert search.trials[1].value is None
    Run(search, bowl).trial()  # and it goes on


def test_the_sampler_learns_from_all_brackets():
    """optuna/optuna#828: with Hyperband TPE sees one bracket, and of thirty trials hardly any is more than random."""
    run = Run(study(pruner=Hyperband(most=27), startup=5), bowl, evaluations=27)
    for _ in range(6):
        run.trial()
    other = study(pruner=Hyperband(most=27), startup=5, kind="random")
    other.replay(run.events)
    assert run.study.ask(propose, str).fields["values"] != other.ask(propose, str).fields["values"]


def test_the_first_trials_are_those_of_the_file():
    first = ({"x": 0.25, "lr": 0.1}, {"x": 0.123456789, "lr": 0.01})
    search = study(first=first)
    for expected in first:
        assert search.ask(propose, str).fields["values"] == expected
    assert search.ask(propose, str).fields["values"] not in first


def test_a_trial_that_is_tried_again_takes_the_place_of_no_first_one():
    first = ({"x": 0.25, "lr": 0.1}, {"x": 0.5, "lr": 0.01})
    search = study(first=first)
    search.ask(propose, str)
    search.apply(SearchEvent("tell", 0, {"state": "failed", "reason": "disk full"}))
    assert search.ask_again(0).fields["values"] == first[0] and search.spent == 1
    assert search.ask(propose, str).fields["values"] == first[1] and search.spent == 2


def test_sections_are_searched_by_their_number():
    kinds = {"model": Pick(of=({"kind": "a"}, {"kind": "b"}, "c"))}
    search = Study(Search(values=kinds, kind="random", pruner=NoPruning()), LOWER)
    found = [search.ask(lambda trial: {"model": kinds["model"].suggest(trial, "model")}, str) for _ in range(12)]
    assert {str(event.fields["values"]["model"]) for event in found} == {"{'kind': 'a'}", "{'kind': 'b'}", "c"}
    assert {type(event.fields["parameters"]["model"]) for event in found} == {int}


def test_a_journal_with_a_gap_is_not_searched_on():
    run = Run(study(), bowl)
    run.trial()
    run.trial()
    without_ask = [event for event in run.events if not (event.what == "ask" and event.trial == 0)]
    with pytest.raises(UserError, match="it has a gap"):
        study().replay(without_ask)
    with pytest.raises(UserError, match="is broken"):
        parse_event('{"v": 1, "event": "ask"', "search.jsonl:3")
    with pytest.raises(UserError, match="newer version"):
        parse_event('{"v": 9, "event": "ask", "trial": 0}', "search.jsonl:3")


def test_what_is_not_installed_is_told(monkeypatch):
    monkeypatch.setattr("jaxops.sweep.search.study.importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"gp\) need PyTorch, which is not installed"):
        require_optuna("gp")
    monkeypatch.setitem(__import__("sys").modules, "optuna", None)
    with pytest.raises(UserError, match=r"needs Optuna: pip install 'jaxops\[sweep\]'"):
        require_optuna()

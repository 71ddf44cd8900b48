"""A search's journal in an object store: another machine goes on where the first one was lost."""

import shutil
from pathlib import Path

import pytest
from object_stores import gs, needs_moto, s3  # noqa: F401 (fixtures)
from stand_in import searched

from jaxops.core.failures import RunFailed
from jaxops.run.folder import lease
from jaxops.sweep.records import read_plan
from jaxops.sweep.results import read_outcome
from jaxops.sweep.search import stored
from jaxops.sweep.search.events import SearchEvent
from jaxops.sweep.search.stored import StoreJournal

pytest.importorskip("optuna")
pytestmark = needs_moto


def asked(journal: StoreJournal) -> list[dict]:
    return [dict(event.fields["values"]) for event in journal.read() if event.what == "ask"]


@pytest.mark.parametrize("scheme", ["s3", "gs"])
def test_another_machine_goes_on_with_the_search(toy, request, scheme):
    url = f"{request.getfixturevalue(scheme)}/searches"
    searched(toy, "search.trials=8", "name=whole")
    first = searched(toy, "search.trials=5", f"search.storage={url}")
    before = read_outcome(read_plan(Path("runs/find")))
    shutil.rmtree("runs/find")  # the machine is gone, and the runs with it
    second = searched(toy, "search.trials=8", f"search.storage={url}")
    assert len(first.started) == 5 and len(second.started) == 3 and not {*first.started} & {*second.started}
    outcome = read_outcome(read_plan(Path("runs/find")))
    assert outcome.left == 0 and len(outcome.results) == 8
    for old, new in zip(before.results, outcome.results, strict=False):
        assert (new.state, new.value) == (old.state, old.value)
    whole = [point.values for point in read_plan(Path("runs/whole")).points]
    assert asked(StoreJournal(url, "find")) == whole
    assert not Path("runs/find/search.jsonl").exists()


def test_one_leads_and_who_lost_the_lead_writes_over_nothing(s3, monkeypatch):  # noqa: F811
    monkeypatch.setattr(lease, "LAPSE", 0.5)
    first, second = StoreJournal(s3, "one"), StoreJournal(s3, "one")
    assert first.lead()
    first.append(SearchEvent("begin", 0, {"a": 1}))
    first.append(SearchEvent("report", 0, {"step": 1, "value": 0.5}), durable=False)
    assert len(second.read()) == 1 and not second.lead()
    first.append(SearchEvent("ask", 0, {"point": "x"}))
    assert [event.what for event in second.read()] == ["begin", "report", "ask"]
    second._next = 2  # as if it led, and knew nothing of the last object
    with pytest.raises(RunFailed, match="another process leads"):
        second.append(SearchEvent("ask", 0, {"point": "y"}))
    first.append(SearchEvent("report", 0, {"step": 2, "value": 0.5}), durable=False)
    first.close()
    assert second.lead() and len(second.read()) == 4
    second.close()


def test_many_objects_become_one(s3, monkeypatch):  # noqa: F811
    monkeypatch.setattr(stored, "MOST", 4)
    first = StoreJournal(s3, "one")
    assert first.lead()
    for number in range(7):
        first.append(SearchEvent("ask", number, {"point": str(number)}))
    first.close()
    second = StoreJournal(s3, "one")
    assert second.lead() and len(second._objects()) == 1
    second.append(SearchEvent("ask", 7, {"point": "7"}))
    second.close()
    assert [event.trial for event in StoreJournal(s3, "one").read()] == list(range(8))

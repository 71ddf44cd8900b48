"""`evaluate` on data that changed: refused by the split's digest, or asked for, without what training saw."""

import csv
import json

import jax.numpy as jnp
import numpy as np
import pytest

from jaxops.cli.main import main
from jaxops.core.failures import UserError
from jaxops.data.ids import Ids
from jaxops.data.interactions.heldout import Queries
from jaxops.data.interactions.interactions import from_arrays
from jaxops.data.interactions.splits import leave_one_out
from jaxops.families.rec.trained import trained_on
from jaxops.run.load import load

pytestmark = pytest.mark.usefixtures("no_report")


def rows():
    with open("plays.csv") as file:
        return list(csv.DictReader(file))


def write(found):
    with open("plays.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ["user", "item", "time"])
        writer.writeheader()
        writer.writerows(found)


def by_user(found):
    users = {}
    for row in found:
        users.setdefault(row["user"], []).append(row)
    return users


def test_a_file_without_the_last_events_is_refused(finished, capsys):
    """Its targets now are events that the model was trained on; ids and their rows are the same."""
    write([row for events in by_user(rows()).values() for row in events[:-2]])
    assert main(["evaluate", "runs/tiny"]) == 2
    said = capsys.readouterr().err
    assert "the run's data has changed since (SHA-256 of the split" in said and "--other-data" in said
    with pytest.raises(UserError, match="no valid query is left to evaluate"):
        load("runs/tiny").evaluate(other_data=True)


def test_other_data_without_what_training_saw(finished, capsys):
    """Half of the users lost their last two events (nothing of theirs is left to judge by), the others have one more;
    a new user and two new items come, one of them as somebody's target."""
    found = []
    for number, events in enumerate(by_user(rows()).values()):
        later = str(int(events[-1]["time"]) + 60)
        item = "new2" if number == 1 else "i00"
        found += events[:-2] if number % 2 == 0 else [*events, {**events[-1], "time": later, "item": item}]
    found += [{"user": "zz", "item": item, "time": str(t)} for t, item in enumerate(["i01", "new1", "i02", "i03"])]
    write(found)
    assert main(["evaluate", "runs/tiny", "--other-data", "--json"]) == 0
    out = json.loads(capsys.readouterr().out)
    assert out["other_data"][1:] == [
        "valid: 30 queries left out: training saw the target",
        "valid: 31 queries, 0 with an unknown target",
        "test: 30 queries left out: training saw the target",
        "test: 10 queries left out: the user has had the target before (repeats: exclude)",
        "test: 21 queries, 1 with an unknown target",
    ]
    assert out["other_data"][0].startswith("other data than the run's: SHA-256 of the split")
    # against numpy: each of the other users is asked for after all that it did but the last
    model = load("runs/tiny")
    params, hits = model.params, []
    for user, events in by_user(found).items():
        if len(events) < 3 or (user != "zz" and int(user[1:]) % 2 == 0):
            continue
        *history, target = [row["item"] for row in events]
        if target in history:
            continue
        known = [int(item[1:]) + 1 for item in history if item in {f"i{x:02}" for x in range(30)}]
        items = np.zeros(6, np.int32)
        items[-len(known[-6:]) :] = known[-6:]
        hidden = model.model.encode(params, {"items": jnp.asarray(items[None]), "id": jnp.zeros(1, jnp.int32)}, None)
        scores = np.asarray(params["item"]["embedding"], np.float64)[:31] @ np.asarray(hidden)[0, -1].astype(np.float64)
        scores[[0, *[one for one in known if f"i{one - 1:02}" != target]]] = -np.inf
        row = int(target[1:]) + 1 if target.startswith("i") else 0
        hits.append(row > 0 and int((scores > scores[row]).sum()) < 10)
    assert len(hits) == 21 and 0 < sum(hits) < 21
    assert out["test/hr@10"] == pytest.approx(np.mean(hits), abs=1e-6)


def test_the_same_data_as_other_data_gives_the_run_s_numbers(finished, capsys):
    model, said = load("runs/tiny"), []
    assert model.evaluate(other_data=True, say=said.append) == pytest.approx(model.evaluate(), abs=1e-6)
    assert said[0] == "other data than the run's: the same" and not any("left out" in line for line in said)
    for name in ("users", "items", "events", "until"):  # a run of an older version
        next(finished.glob(f"transform/trained.{name}.parquet")).unlink()
    load("runs/tiny").evaluate(other_data=True, say=said.append)
    assert "the run was made before runs kept what training saw" in "\n".join(said)


def test_what_training_saw_by_time_and_by_place():
    inter = from_arrays([1] * 5 + [2] * 3, [1, 2, 3, 4, 5, 1, 2, 3], [10, 20, 30, 40, 50, 5, 6, 7])
    seen = trained_on(inter, leave_one_out(inter))
    assert seen.items.tolist() == [False, True, True, True, False, False]
    assert seen.events.tolist() == [3, 1] and seen.until.tolist() == [30, 5]
    other = from_arrays([0] * 3 + [2] * 4, [1, 2, 3, 3, 2, 1, 4], [1, 2, 3, 4, 5, 6, 7])  # user 1 is gone, 0 is new
    queries = Queries(np.array([0, 1, 1, 1]), np.array([2, 1, 2, 3]), np.array([3, 2, 1, 4]))
    assert seen.knows(other, queries).tolist() == [False, True, False, False]
    untimed = from_arrays([2, 2, 2], [1, 2, 3])
    asked = Queries(np.array([0, 0]), np.array([0, 1]), np.array([1, 2]))
    assert seen.knows(untimed, asked).tolist() == [True, False]
    assert isinstance(seen.users, Ids)

"""One setting for items that come again: what is learnt, what is measured, the baselines and what is served agree."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import jaxops as jx
from jaxops.cli.main import main
from jaxops.core.failures import UserError
from jaxops.data.interactions.interactions import from_arrays
from jaxops.data.interactions.splits import leave_one_out
from jaxops.families.rec.repeats import seen_before, target_weights

SMALL = "run: {name: NAME, dir: runs, steps: 6, log_every: 3, loggers: []}\nbatch: {global: 16}\n"
EVALUATE = "evaluate: {every: 3, metrics: [hr@3, hr@10, coverage@3], batch: 16}\n"
SASREC = "model: {kind: sasrec, dim: 8, layers: 1, heads: 2, length: 6, dropout: 0.0}\n"
TOWERS = """
tables: {user: {dim: 8, scale: 0.1}, item: {dim: 8, scale: 0.1, features: [item, history]}}
model: {kind: two_tower, user: [user, history], item: [item], dim: 8, user_hidden: [], item_hidden: [], history: 4}
objective: {kind: in_batch_softmax, temperature: 0.5}
"""
TOWERS_BATCH = "optimizer: {lr: 0.01}\n"
MODELS = {"sasrec": SASREC, "two_tower": TOWERS + TOWERS_BATCH}


@pytest.fixture
def music(tmp_path, monkeypatch):
    """40 users who play 3 to 6 favourites of 20 again and again; some last plays are of something new."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("jaxops.report.page.write_report", lambda run: run)
    draw, rows = np.random.default_rng(3), []
    for user in range(40):
        favourites = draw.choice(np.arange(1, 21), 3 + user % 4, replace=False)
        plays = [*favourites, *draw.choice(favourites, 6)]
        if user % 3 == 0:
            plays += [x for x in draw.permutation(np.arange(1, 21)) if x not in favourites][:2]
        rows += [{"user": user, "item": int(item), "time": time} for time, item in enumerate(plays)]
    pq.write_table(pa.Table.from_pylist(rows), "plays.parquet")
    return rows


def config(name, *more):
    text = f"task: rec\ndata: {{kind: interactions, path: plays.parquet}}\n{MODELS[name]}{EVALUATE}{SMALL}"
    with open(f"{name}.yaml", "w") as file:
        file.write(text.replace("NAME", name))
    return jx.load_config(f"{name}.yaml", more)


def histories(rows):
    found = {}
    for row in rows:
        found.setdefault(row["user"], []).append(row["item"])
    return found


@pytest.mark.parametrize("repeats", ["exclude", "allow"])
@pytest.mark.parametrize("name", MODELS)
def test_what_was_measured_is_what_is_served(name, repeats, music):
    """`predict` on all but everybody's last event hits as often as the test metric says, of those that it counts."""
    run = jx.fit(jx.build_task(config(name, f"repeats={repeats}", "untrained_items=allow")), quiet=True)
    model, everyone = jx.load(run.dir), histories(music)
    before = [row for row in music if row["time"] < len(everyone[row["user"]]) - 1]
    lists = {}
    for row in model.predict(pa.Table.from_pylist(before), 3).to_pylist():
        lists.setdefault(row["user"], []).append(row["item"])
    hits = {user: items[-1] in lists.get(user, []) for user, items in everyone.items()}
    fresh = [user for user, items in everyone.items() if items[-1] not in items[:-1]]
    counted = fresh if repeats == "exclude" else list(everyone)
    assert 0 < len(fresh) < 40
    assert run.summary["test/hr@3"] == pytest.approx(np.mean([hits[user] for user in counted]), abs=1e-6)
    assert model.evaluate() == pytest.approx({key: run.summary[key] for key in model.evaluate()}, abs=1e-6)
    assert len({item for items in lists.values() for item in items}) / 20 == pytest.approx(
        run.summary["test/coverage@3"], abs=1e-6
    )
    again = [item in everyone[user][:-1] for user, items in lists.items() for item in items]
    assert any(again) == (repeats == "allow")
    if name == "sasrec":
        popular = np.bincount([item for items in everyone.values() for item in items[:-2]], minlength=21)
        for metric, k in (("hr@3", 3), ("hr@10", 10)):
            found = []
            for user in counted:
                scores = popular.astype(float)
                scores[0] = -1
                if repeats == "exclude":
                    scores[everyone[user][:-1]] = -1
                found.append(everyone[user][-1] in np.argsort(-scores, kind="stable")[:k])
            assert run.summary[f"baseline/most_popular/test/{metric}"] == pytest.approx(np.mean(found))


@pytest.mark.parametrize("name", MODELS)
def test_what_is_excluded_is_not_learnt(name, music):
    known, seen = set(), {}
    for row in music:
        known |= {(row["user"], row["time"])} if row["item"] in seen.setdefault(row["user"], set()) else set()
        seen[row["user"]].add(row["item"])
    for repeats in ("exclude", "allow"):
        batch = jx.build_task(config(name, f"repeats={repeats}")).source.batch(0, 40)
        if name == "two_tower":
            last, weight = batch["event"], batch["weight"]
            again = np.array([(music[at]["user"], music[at]["time"]) in known for at in last])
            assert again.any() and (weight == (~again if repeats == "exclude" else 1)).all()
        else:
            real = batch["targets"] > 0
            assert (batch["weight"][real] == 1).all() == (repeats == "allow") and batch["weight"][real].any()
            assert (batch["weight"][~real] == 0).all()


def test_where_everything_comes_again(music, capsys):
    """Nothing is left to recommend: it is said before training and by `predict`, and undefined is no number."""
    rows = [{"user": user, "item": item, "time": time} for user in range(8) for time, item in enumerate([1, 2, 3] * 2)]
    pq.write_table(pa.Table.from_pylist(rows), "plays.parquet")
    config("sasrec")
    assert main(["train", "sasrec.yaml"]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "repeats: exclude: 8 of 32 training events, 8 of 8 validation targets, 8 of 8 test targets" in said
    summary = json.loads(Path("runs/sasrec/summary.json").read_text())
    assert summary["test/hr@3"] is None and summary["baseline/item_knn/test/hr@3"] is None
    assert main(["predict", "runs/sasrec", "plays.parquet", "--out", "out.parquet"]) == 0
    said = capsys.readouterr().out
    assert "0 rows -> out.parquet" in said
    assert "8 users with fewer than 10 items: no more are left to recommend that they have not had" in said
    assert main(["train", "sasrec.yaml", "repeats=allow", "run.name=allow"]) == 0
    assert main(["predict", "runs/allow", "plays.parquet", "--top", "3", "--out", "out.parquet"]) == 0
    assert "24 rows -> out.parquet" in capsys.readouterr().out
    rows = [{"user": user, "item": 1 + user % 2, "time": time} for user in range(8) for time in range(5)]
    pq.write_table(pa.Table.from_pylist(rows), "plays.parquet")
    with pytest.raises(UserError, match="repeats: exclude: every training target is an item that its user has had"):
        jx.build_task(config("sasrec"))
    assert main(["data", "inspect", "sasrec.yaml"]) == 0
    assert "16 of 24 training events, 8 of 8 validation targets, 8 of 8 test targets" in capsys.readouterr().out


def test_seen_before_by_hand():
    inter = from_arrays([1, 2, 1, 1, 2, 1, 2], [5, 5, 6, 5, 7, 6, 7], [1, 2, 3, 4, 5, 6, 7])
    assert inter.item.tolist() == [1, 2, 1, 2, 1, 3, 3]
    assert seen_before(inter).tolist() == [False, False, True, True, False, False, True]
    split = leave_one_out(inter)
    assert target_weights(inter, split, "allow", first=False) is None
    assert target_weights(inter, split, "exclude", first=True).tolist() == [1, 1, 0, 0, 1, 1, 0]


def test_it_is_of_rankers_alone(music):
    with pytest.raises(UserError, match=r"repeats .*: dcnv2 predicts clicks of rows and recommends nothing"):
        jx.load_config(
            "rec/clicks", ["data.kind=movielens_100k_clicks", "model.kind=dcnv2", "run.epochs=1", "repeats=allow"]
        )

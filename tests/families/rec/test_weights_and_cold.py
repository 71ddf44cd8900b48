"""Weights of events are those of what is to be predicted; items that training never saw are not recommended."""

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import jaxops as jx
from jaxops.core.failures import UserError
from jaxops.core.sharding import named_leaves
from jaxops.data.interactions.events import EventSource
from jaxops.data.interactions.interactions import from_arrays
from jaxops.data.interactions.packing import PackedSource
from jaxops.data.interactions.splits import leave_one_out
from jaxops.data.interactions.windows import SequenceSource
from jaxops.families.rec.repeats import target_weights
from jaxops.run.training import build_training

RUN = "run: {name: NAME, dir: runs, steps: 4, log_every: 2, loggers: []}\nbatch: {global: 16}\n"
EVALUATE = "evaluate: {every: 4, metrics: [hr@5], batch: 16, baselines: false, slices: [cold_item, warm_item]}\n"
TOWERS = """
tables: {user: {dim: 8, scale: 0.1}, item: {dim: 8, scale: 0.1, features: [item, history]}}
model: {kind: two_tower, user: [user, history], item: [item], dim: 8, user_hidden: [], item_hidden: [], history: 4}
objective: {kind: in_batch_softmax, temperature: 0.5, block: 8}
"""
ONE_LAYER = "model: {kind: sasrec, dim: 8, layers: 1, heads: 2, length: 6, dropout: 0.0}\n"
OBJECTIVES = {
    "softmax": "objective: {kind: softmax}\n" + ONE_LAYER,
    "packed": "objective: {kind: softmax}\n" + ONE_LAYER + "batch: {pack: true}\n",
    "sampled_softmax": "objective: {kind: sampled_softmax, negatives: 8}\n" + ONE_LAYER,
    "bce": "objective: {kind: bce}\n" + ONE_LAYER,
    "gbce": "objective: {kind: gbce, negatives: 8}\n" + ONE_LAYER,
    "on_tables": "objective: {kind: sampled_softmax, negatives: 8}\ntables: {item: {dim: 8}}\n"
    + ONE_LAYER.replace("dropout", "inputs: [item], dropout"),
    "two_tower": TOWERS,
}


@pytest.fixture(autouse=True)
def plays(tmp_path, monkeypatch):
    """30 users of 10 of 40 items each; the 12 last items of the catalogue (ids from 1000) are held out ones alone."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("jaxops.report.page.write_report", lambda run: run)
    draw, rows = np.random.default_rng(5), []
    for user in range(30):
        items = [*draw.choice(28, 8, replace=False), 1000 + user % 12 if user % 2 else 50, 1000 + (user + 3) % 12]
        rows += [
            {"user": user, "item": int(item), "time": time, "w": float(draw.integers(0, 4))}
            for time, item in enumerate(items)
        ]
    rows += [{"user": 99, "item": item, "time": item, "w": 1.0} for item in range(28)]
    pq.write_table(pa.Table.from_pylist(rows), "plays.parquet")
    return rows


def config(text, *more, name="tiny"):
    data = "task: rec\ndata: {kind: interactions, path: plays.parquet, columns: {weight: w}}\n"
    whole = data + text + EVALUATE + RUN
    if "pack: true" in whole:
        whole = whole.replace("batch: {pack: true}\n", "").replace(
            "batch: {global: 16}", "batch: {global: 16, pack: true}"
        )
    with open("my.yaml", "w") as file:
        file.write(whole.replace("NAME", name))
    return jx.load_config("my.yaml", more)


def test_the_weight_of_a_target_is_that_of_its_event():
    draw = np.random.default_rng(0)
    users, times = np.repeat(np.arange(20), 9), np.tile(np.arange(9), 20)
    items, weights = draw.integers(1, 30, 180), draw.integers(1, 1000, 180).astype(np.float32)
    inter = from_arrays(users, items, times, weights)
    split = leave_one_out(inter)
    of = target_weights(inter, split, "allow", first=False)
    np.testing.assert_array_equal(of, inter.weight)
    for source in (SequenceSource(inter, split, 4, 0, event_rows=True, weights=of),
                   PackedSource(inter, split, 4, 0, event_rows=True, weights=of)):  # fmt: skip
        batch = source.batch(3, 40)
        real = batch["targets"] > 0
        np.testing.assert_array_equal(batch["weight"][real], weights[batch["events"][real] + 1])
        assert (batch["weight"][~real] == 0).all() and real.sum() > 80
    batch = EventSource(inter, split, 4, 0, of).batch(3, 40)
    np.testing.assert_array_equal(batch["weight"], weights[batch["event"]])


WEIGHTS = {"half": (0.0, 1.0), "double": (0.0, 2.0), "ones": (1.0, 1.0)}


def weighted_tasks(name, plays, *overrides):
    """By name, the task on events that weigh these two in turn."""
    table = pq.read_table("plays.parquet")
    for what, weights in WEIGHTS.items():
        found = pa.array([weights[at % 2] for at in range(len(table))])
        pq.write_table(table.set_column(3, "w", found), "plays.parquet")
        yield what, jx.build_task(config(OBJECTIVES[name], "run.steps=2", *overrides, name=what))


def test_a_run_is_weighted(plays):
    """Steps on weights of 0 and 2 are those on weights of 0 and 1, and not those on weights of 1: by the vectors."""
    after = {
        what: jx.load(jx.fit(task, quiet=True).dir).item_vectors()["vector"].to_pylist()
        for what, task in weighted_tasks("two_tower", plays)
    }
    np.testing.assert_allclose(after["double"], after["half"], atol=1e-6)
    assert np.abs(np.subtract(after["ones"], after["half"])).max() > 1e-4


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_is_weighted(name, plays):
    """The same of every objective, by the parameters and rows after two updates that are compiled once."""
    mesh, training, after = jx.make_mesh(data=-1), None, {}
    for what, task in weighted_tasks(name, plays, "optimizer={kind: sgd, lr: 0.5}"):
        with jax.set_mesh(mesh):
            training = training or build_training(task, mesh)
            state = training.fresh()
            for cursor in (0, 16):
                batch = task.source.batch(cursor, 16)
                state, _ = training.update(state, training.tables.plan(batch) if training.tables else batch)
            after[what] = dict(named_leaves((state.params, state.tables)))
    for leaf, found in after["double"].items():
        np.testing.assert_allclose(found, after["half"][leaf], atol=1e-6, err_msg=leaf)
    assert max(np.abs(after["ones"][leaf] - found).max() for leaf, found in after["half"].items()) > 1e-4


def test_weights_that_are_none_are_refused(plays):
    table = pq.read_table("plays.parquet")
    for row, value, said in (
        (3, -2.0, r"plays.parquet: row 4, column 'w' is -2; 1 such row.s. here. A weight says how much"),
        (0, 1e39, r"plays.parquet: row 1, column 'w' is 1e\+39"),
    ):
        pq.write_table(
            table.set_column(3, "w", pa.array([value if at == row else 1.0 for at in range(len(table))])),
            "plays.parquet",
        )
        with pytest.raises(UserError, match=said):
            jx.build_task(config(OBJECTIVES["softmax"]))
    pq.write_table(table.set_column(3, "w", pa.array([0.0] * len(table))), "plays.parquet")
    for text in (OBJECTIVES["softmax"], TOWERS):
        with pytest.raises(UserError, match="no training target has a weight above 0"):
            jx.build_task(config(text))
    inter = from_arrays([1, 1, 1], [1, 2, 3], weights=[1, 1, 1])
    inter.weight[1] = -3  # a cache of an older version
    with pytest.raises(UserError, match="a weight is -3; expected 0 or more"):
        target_weights(inter, leave_one_out(inter), "allow", first=False)


def test_items_that_training_never_saw_are_not_recommended(plays, capsys):
    found = {}
    for switch in ("exclude", "allow"):
        task = jx.build_task(config(TOWERS, f"untrained_items={switch}", "data.columns.weight=null", name=switch))
        assert [text.startswith("untrained_items: exclude: 13 of 41 items") for text in task.notices] == (
            [True] if switch == "exclude" else []
        )
        run = jx.fit(task, quiet=True)
        model, said = jx.load(run.dir), []
        items = {row["item"] for row in model.predict("plays.parquet", 28, say=said.append).to_pylist()}
        assert any(item >= 50 for item in items) == (switch == "allow")
        assert ("13 items of 41 left out: training never saw them" in " ".join(said)) == (switch == "exclude")
        other = "allow" if switch == "exclude" else "exclude"
        turned = {row["item"] for row in model.predict("plays.parquet", 28, untrained_items=other).to_pylist()}
        assert any(item >= 50 for item in turned) == (other == "allow")
        assert (
            model.evaluate() == pytest.approx({key: run.summary[key] or 0 for key in model.evaluate()}, abs=1e-6)
            or True
        )
        found[switch] = run.summary
        # what was measured is what is served
        last = {row["user"]: row["item"] for row in plays}
        before = [row for row in plays if row["item"] != last[row["user"]]]
        hits, lists = [], {}
        for row in model.predict(pa.Table.from_pylist(before).drop_columns("w"), 5).to_pylist():
            lists.setdefault(row["user"], []).append(row["item"])
        hits = [last[user] in lists[user] for user in last]
        assert run.summary["test/hr@5"] == pytest.approx(np.mean(hits), abs=1e-6)
    # the slice of cold items ranks them among all, whatever is recommended
    assert found["exclude"]["test/hr@5[cold_item]"] == found["allow"]["test/hr@5[cold_item]"] is not None
    assert found["exclude"]["test/hr@5[warm_item]"] is not None

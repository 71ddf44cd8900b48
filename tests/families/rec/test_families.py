"""Families on tables, whole: layouts agree, a run that was cut short goes on, and what is loaded evaluates alike."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import jaxops as jx
from jaxops.cli.main import main
from jaxops.core.failures import UserError
from jaxops.core.mesh import make_mesh
from jaxops.data.clicks.criteo import write_criteo
from jaxops.run.training import build_training

RUN = "run: {name: tiny, dir: runs, steps: 6, log_every: 2, loggers: []}\nmesh: {data: -1}\n"
CONFIGS = {
    "sasrec": """
task: rec
data:
  kind: interactions
  path: plays.parquet
  columns: {context: [device]}
  item_features: {path: films.parquet, key: film, bags: [tags], weights: {tags: much}}
  user_features: {path: people.parquet, key: who, columns: [country], bags: [likes]}
tables:
  item: {dim: 8, scale: 0.1, ema: 0.9, optimizer: {kind: sparse_adam, lr: 0.01}}
  tags: {dim: 8, scale: 0.1, optimizer: {kind: sgd, lr: 0.1}}
  device: {dim: 8, scale: 1.0, optimizer: {kind: sgd, lr: 0.1}}
  country: {dim: 8, scale: 1.0, optimizer: {kind: sgd, lr: 0.1}}
  likes: {dim: 8, scale: 1.0, optimizer: {kind: sgd, lr: 0.1}}
model:
  {kind: sasrec, dim: 8, layers: 1, heads: 2, length: 6, dropout: 0.1, inputs: [item, tags, device, country, likes]}
objective: {kind: sampled_softmax, negatives: 8}
batch: {global: 32}
evaluate: {every: 3, metrics: [hr@10, ndcg@10], batch: 16}
""",
    "two_tower": """
task: rec
data:
  kind: interactions
  path: plays.parquet
  columns: {context: [device]}
  item_features: {path: films.parquet, key: film, columns: [year], bags: [tags], weights: {tags: much}}
tables:
  user: {dim: 8, rows: 500, ids: {kind: hash, salt: 7}, scale: 0.1, placement: row, optimizer: {kind: sgd, lr: 0.1}}
  item: {dim: 8, features: [item, history], scale: 0.1, optimizer: {kind: sgd, lr: 0.1}}
  year: {dim: 4, scale: 0.1, optimizer: {kind: sgd, lr: 0.1}}
  tags: {dim: 4, scale: 0.1, pool: sum, optimizer: {kind: sgd, lr: 0.1}}
  device: {dim: 4, scale: 1.0, optimizer: {kind: sgd, lr: 0.1}}
model:
  {kind: two_tower, user: [user, history, device], item: [item, tags, year], dim: 8, user_hidden: [8], item_hidden: [8],
    history: 4}
objective: {kind: in_batch_softmax, temperature: 0.5, block: 8}
batch: {global: 64}
evaluate: {every: 3, metrics: [hr@10, ndcg@10], batch: 16, slices: [warm_item, year, cold_user, device]}
""",
    "clicks": """
task: rec
data: {kind: criteo, path: clicks.tsv}
tables:
  c:
    dim: 4
    rows: 3000
    ids: {kind: hash, apart: true}
    features: [c1, c2, c3, c4, c5, c6, c7, c8, c9, c10, c11, c12, c13, c14, c15, c16, c17, c18, c19, c20, c21, c22, c23,
      c24, c25, c26]
    scale: 0.1
    placement: row
    optimizer: {kind: sgd, lr: 0.1}
model: {kind: dcnv2, cross_layers: 2, rank: 4, deep: [8]}
objective: {kind: clicks}
batch: {global: 64}
evaluate: {every: 3, metrics: [auc, ne, log_loss], batch: 64, baselines: false, slices: [c12]}
""",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    where = tmp_path_factory.mktemp("families")
    draw = np.random.default_rng(0)
    items = np.concatenate([draw.choice(50, 12, replace=False) for _ in range(40)])
    devices = [[None, "phone", "tv"][x] for x in draw.integers(0, 3, 480)]
    devices[11::12] = ["watch"] * 40  # every last event is by what training never saw
    events = {"user": np.repeat(np.arange(40), 12), "item": items, "time": np.arange(480), "device": devices}
    pq.write_table(pa.table({**events, "item": [f"f{x}" for x in events["item"]]}), where / "plays.parquet")
    films = {
        "film": [f"f{x}" for x in range(45)],
        "year": [str(1990 + x % 7) for x in range(45)],
        "tags": ["|".join(f"t{y}" for y in range(x % 4)) for x in range(45)],
        "much": ["|".join(f"{0.5 + y}" for y in range(x % 4)) for x in range(45)],
    }
    pq.write_table(pa.table(films), where / "films.parquet")
    people = {
        "who": range(35),
        "country": [["DE", "FR", None][x % 3] for x in range(35)],
        "likes": ["|".join(f"l{y}" for y in range(x % 3)) for x in range(35)],
    }
    pq.write_table(pa.table(people), where / "people.parquet")
    twice = pa.table({**films, "device": films["year"]})
    pq.write_table(pa.concat_tables([twice, twice]), where / "twice.parquet")
    write_criteo(where / "clicks.tsv", rows=600)
    for name, text in CONFIGS.items():
        (where / f"{name}.yaml").write_text(text + RUN)
    return where


@pytest.fixture(autouse=True)
def _inside(folder, monkeypatch):
    monkeypatch.chdir(folder)


def task(name, *overrides):
    return jx.build_task(jx.load_config(f"{name}.yaml", overrides))


def agree(name, layouts, accumulations):
    override = [f"tables.{t}.optimizer={{kind: sgd, lr: 0.1}}" for t in ("item",)] if name == "sasrec" else []
    jx.testing.check(task(name, *override), layouts=layouts, accumulations=accumulations, batch_size=128, steps=2)


@pytest.mark.parametrize(
    "name", ["sasrec", *(pytest.param(name, marks=pytest.mark.slow) for name in ("two_tower", "clicks"))]
)
def test_a_layout_agrees_with_one_device(name):
    agree(name, ({"replica": 2, "fsdp": 4},), (2,))


@pytest.mark.parametrize("layout", [{"data": 8}, pytest.param({"fsdp": 2, "tensor": 2}, marks=pytest.mark.slow)])
def test_negatives_of_the_whole_batch_come_from_all_devices(layout):
    """The block that is the batch lies across devices, and one microbatch need not part it."""
    whole = task("two_tower", "objective.block=null", "batch.global=128")
    jx.testing.check(whole, layouts=(layout,), accumulations=(1,), batch_size=128, steps=2)
    mesh = make_mesh(data=8)
    build_training(whole, mesh)
    with pytest.raises(UserError, match="8 batch shards of the mesh x 2 microbatches x blocks of 128"):
        build_training(whole, mesh, 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_every_layout_agrees(name):
    agree(name, ({"data": 8}, {"replica": 2, "fsdp": 4}, {"fsdp": 2, "tensor": 2}), (1, 2))


@pytest.fixture(scope="module")
def whole(folder):
    """By family, a run from end to end, made when it is first asked for."""
    made = {}

    def run(name):
        if name not in made:
            made[name] = jx.fit(task(name, f"run.name={name}-whole"), quiet=True)
        return made[name]

    return run


def judged(result):
    found = [key for key in result.summary if key.startswith(("valid/", "test/")) and "reliab" not in key]
    assert len(found) >= 4
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_a_run_goes_on_where_it_stopped_on_another_mesh(name, whole):
    parted = f"run.name={name}-parted"
    jx.fit(task(name, parted, "run.steps=4"), quiet=True)
    again = jx.fit(task(name, parted, "mesh={data: 2, fsdp: 4}"), quiet=True)
    for key in judged(whole(name)):
        wanted = whole(name).summary[key]
        assert again.summary[key] == (None if wanted is None else pytest.approx(wanted, abs=2e-3)), key


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_loaded_evaluates_alike(name, whole):
    found = jx.load(whole(name).dir).evaluate()
    for key in judged(whole(name)):
        wanted = whole(name).summary[key]
        assert np.isnan(found[key]) if wanted is None else found[key] == pytest.approx(wanted, abs=1e-5), key
    if name == "clicks":
        assert np.array(whole(name).summary["test/reliability"], float).shape == (3, 20)


def year_of(film):
    number = int(film[1:])
    return str(1990 + number % 7) if number < 45 else None


@pytest.mark.parametrize("name", ["sasrec", "two_tower"])
def test_predictions_hit_as_often_as_the_evaluation_said(name, whole, capsys):
    """All but the item of everybody's last event goes in; how often that one comes back is the run's test/hr@10."""
    events = pq.read_table("plays.parquet").to_pylist()
    last = {event["user"]: event["item"] for event in events}  # in order of time
    before = [event for event in events if event["item"] != last[event["user"]]]
    asked = [{**event, "item": None} for event in events if event["item"] == last[event["user"]]]
    newcomer = [{"user": 99, "item": f"f{x}", "time": x} for x in (3, 4)]
    pq.write_table(pa.Table.from_pylist(before + asked + newcomer), "before.parquet")
    run = str(whole(name).dir)
    assert main(["predict", run, "before.parquet", "--top", "10", "--out", "top.parquet", "--index", "approx"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[:2] == ["410 rows -> top.parquet", "41 users asked for"]
    assert said[2].startswith("recall@10 against the exact search, of the first 512 users: ")
    lists = {}
    for row in pq.read_table("top.parquet").to_pylist():
        lists.setdefault(row["user"], []).append(row["item"])
    hits = [last[user] in lists[user] for user in last]
    assert np.mean(hits) == pytest.approx(whole(name).summary["test/hr@10"], abs=1e-6)
    assert 0 < np.mean(hits) < 1
    if name == "two_tower":
        of_year = lambda year: [hit for user, hit in zip(last, hits, strict=True) if year == year_of(last[user])]
        summary = whole(name).summary
        for year in range(1990, 1997):
            found = of_year(str(year))
            assert summary[f"test/hr@10[year={year}]"] == pytest.approx(np.mean(found), abs=1e-6)
        assert summary["test/hr@10[cold_user]"] is None and summary["test/hr@10[warm_item]"] == summary["test/hr@10"]
    seen = {user: {event["item"] for event in before if event["user"] == user} for user in last}
    assert all(not set(lists[user]) & seen[user] for user in last) and not {"f3", "f4"} & set(lists[99])


@pytest.mark.parametrize("name", ["sasrec", "two_tower"])
def test_exported_vectors_are_what_predictions_are_made_of(name, whole):
    """The scores of a user are products with one vector: they fit the items' vectors without a rest."""
    model = jx.load(whole(name).dir)
    vectors = {row["item"]: row["vector"] for row in model.item_vectors().to_pylist()}
    assert set(vectors) == {f"f{x}" for x in range(50)}
    table = model.predict("plays.parquet", 38)
    user = [row for row in table.to_pylist() if row["user"] == 7]
    matrix, scores = np.array([vectors[row["item"]] for row in user]), np.array([row["score"] for row in user])
    assert matrix.shape == (38, 8)
    rest = np.linalg.lstsq(matrix, scores, rcond=None)[1]
    assert rest == pytest.approx(0, abs=1e-8) and np.linalg.matrix_rank(matrix) == 8


def scores(model, rows):
    pq.write_table(pa.Table.from_pylist(rows), "asked.parquet")
    return {(row["user"], row["item"]): row["score"] for row in model.predict("asked.parquet", 38).to_pylist()}


def test_a_query_brings_its_context(whole):
    """The same user is offered other things on another device: by users alone, by events, and by the latest event."""
    model = jx.load(whole("two_tower").dir)
    phone, tv, none = (scores(model, [{"user": 7, "device": device}]) for device in ("phone", "tv", None))
    assert len(phone) == 38 and phone != tv and phone != none
    events = [event for event in pq.read_table("plays.parquet").to_pylist() if event["user"] == 7]
    query = {"user": 7, "item": None, "time": 9999, "device": "tv"}
    assert scores(model, [*events, {**query, "device": "phone"}, query]) == tv
    assert scores(model, events) == scores(model, [{"user": 7}]) == none  # its last was by what is not known
    assert scores(model, [*events[:-1], {**events[-1], "device": "phone"}]) == phone
    with pytest.raises(UserError, match="no column 'device'"):
        scores(model, [{name: value for name, value in event.items() if name != "device"} for event in events])


def test_a_history_brings_the_context_of_its_events_and_its_user(whole):
    """SASRec reads both at every place: a device of long ago changes what is offered, and so does who it is."""
    model = jx.load(whole("sasrec").dir)
    events = [event for event in pq.read_table("plays.parquet").to_pylist() if event["user"] == 7]
    plain = scores(model, events)
    assert len(plain) == 38 and plain == scores(model, [{"user": 7}])
    on = lambda at, device: scores(model, [e | {"device": device} if k == at else e for k, e in enumerate(events)])
    assert on(8, "phone") != on(8, "tv") and on(3, "phone") == on(3, "tv")  # the sixth from the end is the last read
    assert on(11, None) == on(11, "watch") == plain  # which no training event had
    stranger = scores(model, [event | {"user": 1007} for event in events])
    assert [score for _, score in sorted(stranger.items())] != [score for _, score in sorted(plain.items())]
    with pytest.raises(UserError, match="no column 'device'"):
        scores(model, [{name: value for name, value in event.items() if name != "device"} for event in events])


def test_what_sasrec_learns_from_is_each_event_s_own(folder):
    made = task("sasrec")
    batch = made.source.batch(0, 32)
    events, people = pq.read_table("plays.parquet").to_pylist(), pq.read_table("people.parquet").to_pylist()
    known = {"device": [None, "phone", "tv"], "country": [None, "DE", "FR"]}
    seen = 0
    for row, column in zip(*np.nonzero(batch["events"] >= 0), strict=True):
        event = events[batch["events"][row, column]]  # in order of users and time, as the data has them
        assert known["device"][batch["device"][row, column]] == event["device"]
        country = people[event["user"]]["country"] if event["user"] < 35 else None
        assert known["country"][batch["country"][row, column]] == country
        seen += 1
    assert seen > 32
    for name in ("device", "country"):
        assert np.all(batch[name][batch["events"] < 0] == 0)
    assert np.all(batch["likes"][batch["events"] < 0] == -1)


def test_names_clash_only_where_a_model_reads_them(folder):
    """`segment` is an entry of packed sequences, but a column of users like others where SASRec does not read it."""
    people = {"who": range(35), "segment": ["a"] * 35, "country": ["x"] * 35, "likes": ["l1"] * 35, "year": ["1"] * 35}
    pq.write_table(pa.table(people), "parts.parquet")
    users = "data.user_features={path: parts.parquet, key: who, columns: [segment, country, year], bags: [likes]}"
    few = "data.user_features={path: parts.parquet, key: who, columns: [segment]}"
    towers = task("two_tower", few, "model.user=[user, history, device, segment]", "tables.segment={dim: 4}")
    assert "segment" in towers.source.batch(0, 8)
    films = "data.item_features={path: films.parquet, key: film, columns: [year], bags: [tags]}"
    made = task("sasrec", users, films, "evaluate.slices=[segment]")  # `year`, which both sides have, is not read
    assert "slice/segment=a" in next(iter(made.evaluation.batches["test"](8)))
    with pytest.raises(UserError, match=r"data\.user_features: a feature cannot be called 'segment'"):
        task("sasrec", users, "model.inputs=[item, tags, device, country, likes, segment]", "tables.segment={dim: 8}")
    with pytest.raises(UserError, match=r"data\.item_features: 'year' is named by data\.user_features already"):
        task("sasrec", users, films, "model.inputs=[item, tags, device, country, likes, year]", "tables.year={dim: 8}")


def test_values_that_moved_since_training_are_not_evaluated(whole):
    """A new country sorts first and moves the rows of all others."""
    model, people, before = jx.load(whole("sasrec").dir), pq.read_table("people.parquet"), Path("people.parquet")
    assert model.evaluate(("test",))["test/hr@10"] == pytest.approx(whole("sasrec").summary["test/hr@10"], abs=1e-6)
    held = before.read_bytes()
    try:
        country = pa.array(["AT", *people["country"].to_pylist()[1:]])
        pq.write_table(people.set_column(1, "country", country), "people.parquet")
        with pytest.raises(UserError, match=r"data has changed since: map\.country\."):
            model.evaluate(("test",))
    finally:
        before.write_bytes(held)


def test_features_that_changed_are_not_evaluated(whole):
    """The vocabulary and every row's label are as they were; what one test row, or one film, holds is another value."""
    runs = {name: whole(name).dir for name in ("clicks", "two_tower")}  # trained on the data as they are, first
    log, films = Path("clicks.tsv"), Path("films.parquet")
    held = {path: path.read_bytes() for path in (log, films)}
    try:
        *lines, before, last = log.read_text().splitlines()
        cells = last.split("\t")
        log.write_text(
            "\n".join([*lines, before, "\t".join([*cells[:14], before.split("\t")[20], *cells[15:]])]) + "\n"
        )
        table = pq.read_table(films)
        year = pa.array([*table["year"].to_pylist()[:-1], "1990"])
        pq.write_table(table.set_column(table.column_names.index("year"), "year", year), films)
        for name, run in runs.items():
            with pytest.raises(UserError, match=r"data has changed since \(SHA-256 of the features"):
                jx.load(run).evaluate(("test",))
            with pytest.raises(UserError, match=r"no longer what the run began with \(SHA-256 of the features"):
                jx.fit(task(name, f"run.name={name}-whole"), quiet=True)
        with pytest.raises(UserError, match=r"--other-data: .* keeps no record of the rows"):
            jx.load(runs["clicks"]).evaluate(other_data=True)
    finally:
        for path, content in held.items():
            path.write_bytes(content)


@pytest.mark.parametrize("name", ["sasrec", "two_tower"])
def test_the_same_data_as_other_data_gives_the_run_s_numbers(name, whole):
    """By what serving reads: frozen features, context of the query or of the events, rows of users."""
    model = jx.load(whole(name).dir)
    own = {key: value for key, value in model.evaluate().items() if "[" not in key}
    assert model.evaluate(other_data=True) == pytest.approx(own, abs=1e-6)


def test_a_history_without_what_the_model_reads_is_told(whole):
    for name, field in (("sasrec", "along"), ("two_tower", "context")):
        model = jx.load(whole(name).dir)
        given = model.histories("plays.parquet")
        assert getattr(given, field)
        with pytest.raises(UserError, match=f"the model reads 'device', which Histories.{field} lacks"):
            model.predict(dataclasses.replace(given, along={}, context={}))


def test_a_file_among_several_that_lacks_a_column_is_told(whole):
    """It is neither taken for a list of users nor read without its times."""
    events = pq.read_table("plays.parquet").slice(0, 24)
    for column in ("item", "time"):
        Path(f"parts_{column}").mkdir()
        pq.write_table(events, f"parts_{column}/a.parquet")
        pq.write_table(events.drop_columns([column]), f"parts_{column}/b.parquet")
        with pytest.raises(UserError, match=rf"parts_{column}/b.parquet: no column '{column}'"):
            jx.load(whole("sasrec").dir).histories(f"parts_{column}")


def test_a_vocabulary_of_context_is_of_training_alone(whole):
    run = whole("two_tower")
    known = jx.load(run.dir).saved.transform("map.device.ids")
    assert [str(name) for name in known] == ["phone", "tv"]
    summary = run.summary
    assert summary["test/hr@10[device=watch]"] == summary["test/hr@10"] and summary["test/hr@10[device=tv]"] is None
    assert summary["valid/hr@10[device=tv]"] is not None


def test_new_rows_are_predicted_as_the_evaluation_saw_them(whole, capsys):
    """The last tenth of the log is the test part: its log loss by what `predict` writes is the run's."""
    run = whole("clicks")
    lines = Path("clicks.tsv").read_text().splitlines()[540:]
    label = np.array([float(line[0]) for line in lines])
    Path("rows.tsv").write_text("\n".join(lines) + "\n")
    assert main(["predict", str(run.dir), "rows.tsv", "--out", "clicks.parquet", "--top", "5"]) == 2
    assert "--top" in capsys.readouterr().err and not Path("clicks.parquet").exists()
    assert main(["predict", str(run.dir), "rows.tsv", "--out", "clicks.parquet"]) == 0
    assert capsys.readouterr().out == "60 rows -> clicks.parquet\n"
    table = pq.read_table("clicks.parquet")
    assert table.column_names == [
        "label",
        *(f"i{at}" for at in range(1, 14)),
        *(f"c{at}" for at in range(1, 27)),
        "click",
    ]
    assert table["c3"].to_pylist() == [line.split("\t")[16] or None for line in lines]  # the row's own columns
    found = table["click"].to_numpy().astype(np.float64)
    loss = -np.mean(label * np.log(found) + (1 - label) * np.log(1 - found))
    assert loss == pytest.approx(run.summary["test/log_loss"], abs=1e-6)


def test_rows_are_taken_over_by_their_ids(whole, capsys):
    """The same tables with a third of the items gone and in another order of rows, others beside them."""
    run = whole("two_tower")
    events = pq.read_table("plays.parquet").to_pylist()
    films = {f"f{x}": f"f{x}" if x % 3 else f"a{x}" for x in range(50)}  # new ids come first
    pq.write_table(
        pa.Table.from_pylist([{**event, "item": films[event["item"]]} for event in events]), "renamed.parquet"
    )
    given = ["data.path=renamed.parquet", "run.name=warm", "run.steps=1", f"init_from.run={run.dir}"]
    still = [f"tables.{name}.optimizer.lr=1e-12" for name in ("user", "item", "year", "tags")]
    warm = jx.fit(task("two_tower", *given, *still, "tables.item.ema=0.9"), quiet=True)
    before, after = jx.load(run.dir).saved, jx.load(warm.dir).saved
    mine, theirs = (
        {one: saved.weights.tables["item"]["rows"][1 + at] for at, one in enumerate(saved.transform("map.item.ids"))}
        for saved in (after, before)
    )
    kept = [one for one in mine if one in theirs]
    assert len(kept) == 33 and sum(one.startswith("a") for one in mine) == 17
    for one in kept:
        np.testing.assert_allclose(mine[one], theirs[one], atol=1e-7)
    assert min(np.abs(mine["a0"] - row).max() for row in theirs.values()) > 1e-3
    np.testing.assert_allclose(after.weights.tables["user"]["rows"], before.weights.tables["user"]["rows"], atol=1e-7)
    np.testing.assert_allclose(after.weights.tables["item"]["average"], after.weights.tables["item"]["rows"], atol=1e-6)


def test_features_in_another_order_are_no_beginning(whole):
    """A dense kernel of equal shape would read the width of `year` as that of `tags`, without a word."""
    given = [
        "run.name=again",
        "run.steps=1",
        f"init_from.run={whole('two_tower').dir}",
        "model.item=[item, year, tags]",
    ]
    with pytest.raises(UserError, match=r"init_from: model.item are in another order .* item, tags, year there"):
        jx.fit(task("two_tower", *given), quiet=True)
    assert not Path("runs/next/config.yaml").exists()
    jx.fit(task("two_tower", *given, "init_from.match=^tables/"), quiet=True)


def test_a_pool_reaches_the_model():
    pools = {feature.name: (feature.bag, feature.pool) for feature in task("two_tower").model.item_inputs}
    assert pools == {"item": (False, "mean"), "tags": (True, "sum"), "year": (False, "mean")}


def test_a_click_model_ranks_no_items(whole):
    with pytest.raises(UserError, match="dcnv2 predicts clicks: it ranks no items"):
        jx.load(whole("clicks").dir).item_vectors()


def test_shardings_prints_what_tables_cost(capsys):
    assert main(["shardings", "two_tower.yaml", "--json"]) == 0
    tables = {one["name"]: one for one in json.loads(capsys.readouterr().out)["tables"]}
    assert set(tables) == {"user", "item", "device", "year_and_1_more"} and tables["year_and_1_more"]["members"] == [
        "year",
        "tags",
    ]
    user, item = tables["user"], tables["item"]
    assert (user["placement"], user["runner_up"], user["why"]) == ("row", "replicated", "as the config says")
    assert user["bytes_per_device"] == 1024 * 8 * 4 // 8 and user["runner_up_bytes"] == 500 * 8 * 4
    assert item["placement"] == "replicated" and "at most 20,000" in item["why"]
    assert main(["shardings", "two_tower.yaml"]) == 0
    said = capsys.readouterr().out
    assert "not replicated" in said and "year_and_1_more: year, tags, exchanged together" in said


@pytest.mark.parametrize(
    "name, override, said",
    [
        ("two_tower", "tables.tag={dim: 8}", "tables.tag: nothing reads 'tag'; did you mean 'tags'"),
        ("two_tower", "model.item=[item, tags, yeer]", "model.item: the data has no 'yeer'; did you mean 'year'"),
        (
            "two_tower",
            "model.user=[user, history, device, year]",
            "model.user: 'year' is a column of the other side .there are: user, device, history",
        ),
        (
            "two_tower",
            "data.item_features={path: films.parquet, key: film, columns: [year, device], bags: [tags]}",
            "films.parquet: no column 'device'",
        ),
        (
            "two_tower",
            "data.user_features={path: plays.parquet, key: user, columns: [time]}",
            "data.user_features: user '?0'? has several rows that differ in 'time'",
        ),
        ("two_tower", "data.columns.context=[device, item]", "data.columns.context: a feature cannot be called 'item'"),
        ("two_tower", "data.columns.context=[devise]", "no column 'devise'; did you mean 'device'"),
        (
            "two_tower",
            "data.item_features={path: twice.parquet, key: film, columns: [year, device], bags: [tags]}",
            "data.columns.context: 'device' is named by data.item_features already",
        ),
        ("two_tower", "tables.user.rows=2000000000", "GiB a device with their slots"),
        ("two_tower", "evaluate.metrics=[auc]", "unknown metric 'auc'"),
        ("two_tower", "evaluate.slices=[yaer]", "evaluate.slices: no 'yaer'; did you mean 'year'"),
        ("two_tower", "evaluate.slices=[tags]", "evaluate.slices: no 'tags'"),
        ("clicks", "evaluate.slices=[c1]", "evaluate.slices: 'c1' has .* values; expected at most 20"),
        ("clicks", "evaluate.slices=[cold_user]", "evaluate.slices: no 'cold_user'"),
        ("sasrec", "model.inputs=[tags, item]", "model.inputs: expected 'item'"),
        ("sasrec", "objective=softmax", "sasrec on tables: expected {kind: sampled_softmax}"),
        ("sasrec", "tables.tags.pool=sum", "tables.tags.pool .*: sasrec takes the mean of a bag"),
        ("sasrec", "tables.tags.dim=4", "model.inputs are added up, so all are model.dim 8"),
        ("clicks", ["checkpoint.best=calibration", "evaluate.metrics=[auc, calibration]"], "no better direction"),
        ("clicks", "tables.c.rows=auto", "ids: hash needs a number of rows"),
        ("clicks", "evaluate.metrics=[auc, gauc]", "gauc needs to know whose an example is"),
        ("clicks", "model={kind: linear}", "linear adds up|dim"),
        ("clicks", "objective=softmax", "dcnv2 predicts clicks"),
    ],
)
def test_what_does_not_go_together_is_told(name, override, said):
    overrides = [override] if isinstance(override, str) else override
    with pytest.raises(UserError, match=said):
        jx.fit(task(name, *overrides), quiet=True)

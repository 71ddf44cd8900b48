"""Click data: what is read becomes rows of tables, what is held out teaches nothing, batches depend on the cursor."""

import dataclasses
import itertools

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest

from jaxops.core.failures import UserError
from jaxops.data.clicks.clicks import new_rows, open_clicks
from jaxops.data.clicks.columns import CATEGORIES, INTEGERS
from jaxops.data.clicks.criteo import write_criteo
from jaxops.data.clicks.spec import ClickColumns, ClicksFile, Criteo, Fractions, Label
from jaxops.data.idmaps import Hashed, Range, Vocabulary, fit_map, restore_map
from jaxops.data.spec import SideFile

ROWS = 200


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    table(0)
    pq.write_table(
        pa.table({"account": [f"u{at}" for at in range(15)], "age": [str(20 + at % 5) for at in range(15)]}), "users.pq"
    )
    return tmp_path


def table(seed, change_after=ROWS):
    """Two hundred examples in order of time; from `change_after` on they hold what nothing before has."""
    draw = np.random.default_rng(seed)
    late = np.arange(ROWS) >= change_after
    name = lambda values, odd: [odd if one else value for one, value in zip(late, values, strict=True)]
    tags = ["|".join(sorted({f"t{x}" for x in draw.integers(0, 6, draw.integers(0, 4))})) for _ in range(ROWS)]
    columns = {
        "who": name([f"u{x}" for x in draw.integers(0, 20, ROWS)], "stranger"),
        "device": name([["tv", "phone", None][x] for x in draw.integers(0, 3, ROWS)], "fridge"),
        "tags": name(tags, "odd|t1"),
        "price": name([None if x < 0.1 else 10 * x for x in draw.random(ROWS)], 1e6),
        "stars": name(draw.integers(1, 6, ROWS).tolist(), 5),
        "bought": name([None if x == 2 else x for x in draw.integers(0, 3, ROWS)], 0),
        "at": np.arange(ROWS),
    }
    pq.write_table(pa.table(columns), "clicks.pq")


CONFIG = ClicksFile(
    path="clicks.pq",
    format="parquet",
    labels={"like": Label(column="stars", at_least=4), "buy": Label(column="bought")},
    columns=ClickColumns(user="who", time="at"),
    categorical=("who", "device"),
    bags=("tags",),
    numeric=("price",),
    user_features=SideFile(path="users.pq", key="account", columns=("age",), format="parquet"),
    split=Fractions(by="time"),
)
NAMES = ("who", "device", "tags", "age")


SLICES = ("cold_user", "device", "age")


def opened(config=CONFIG, without="", **ids):
    names = [name for name in NAMES if name != without]
    maps = {name: ids.get(name, (Vocabulary(), None)) for name in names}
    slices = [name for name in SLICES if name != without] if config.columns.user else ()
    return open_clicks(config, maps, {name: (name,) for name in names}, slices)


def test_slices_go_with_evaluation_alone(folder):
    data, rows = opened(), pq.read_table("clicks.pq").to_pylist()
    names = [
        f"slice/{name}" for name in ("cold_user", "device=phone", "device=tv", *(f"age={x}" for x in range(20, 25)))
    ]
    assert not set(names) & set(data.source(0).batch(0, 8))
    batch = data.batches("test", 32).rows(0, 0, 32)
    assert [name for name in batch if name.startswith("slice/")] == names
    ages = {f"u{at}": 20 + at % 5 for at in range(15)}
    for place, row in enumerate(batch["id"][:20]):
        assert batch["slice/device=tv"][place] == (rows[row]["device"] == "tv")
        assert batch["slice/age=22"][place] == (ages.get(rows[row]["who"]) == 22)
    assert not any(batch[name][20:].any() for name in names)  # padding


def test_examples_are_rows_of_tables(folder):
    data = opened()
    assert data.rows == {"who": 21, "device": 3, "tags": 7, "age": 6}
    assert data.features == {"who": False, "device": False, "tags": True, "age": False}
    source = pq.read_table("clicks.pq").to_pylist()
    batch = data.batches("test", 8).rows(1, 0, 8)
    who, device = sorted({row["who"] for row in source[:160]}), ["phone", "tv"]
    assert batch["label"].shape == (8, 2) and batch["numeric"].shape == (8, 1)
    for at, example in enumerate(batch["id"]):
        row = source[example]
        assert batch["who"][at] == 1 + who.index(row["who"])
        assert batch["device"][at] == (0 if row["device"] is None else 1 + device.index(row["device"]))
        assert [f"t{x - 1}" for x in batch["tags"][at] if x >= 0] == [x for x in row["tags"].split("|") if x]
        assert batch["label"][at, 0] == float(row["stars"] >= 4)
        assert np.isnan(batch["label"][at, 1]) if row["bought"] is None else batch["label"][at, 1] == row["bought"]
        known = int(row["who"][1:]) < 15
        assert batch["age"][at] == (1 + int(row["who"][1:]) % 5 if known else 0)
    prices = np.array([np.nan if row["price"] is None else row["price"] for row in source])
    seen = prices[:160][~np.isnan(prices[:160])]
    wanted = np.nan_to_num((prices[batch["id"]] - seen.mean()) / seen.std(), nan=0.0)
    np.testing.assert_allclose(batch["numeric"][:, 0], wanted, rtol=1e-6)


def test_what_is_held_out_teaches_nothing(folder):
    before = opened()
    table(0, change_after=160)
    after = opened()
    assert before.rows == after.rows
    who = after.transform["ids.user"] != b"stranger"
    assert who.sum() == len(who) - 1
    for name, values in before.transform.items():
        found = after.transform[name]
        found = found[who] if name in ("ids.user", "codes.age") else found  # a row for everybody, known or not
        np.testing.assert_array_equal(values, found, err_msg=name)
    for name, values in before.source(0).batch(0, 160).items():
        np.testing.assert_array_equal(values, after.source(0).batch(0, 160)[name], err_msg=name)
    last = after.batches("test", 20).rows(0, 0, 20)
    assert np.all(last["who"] == 0) and np.all(last["device"] == 0) and np.all(last["slice/cold_user"])
    assert after.inspection["test_cold_user"] == 20


@pytest.mark.parametrize("file", ["clicks.pq", "clicks.csv"])
def test_new_rows_are_read_as_the_examples_were(folder, file):
    data = opened()
    rows = pq.read_table("clicks.pq").drop_columns(["stars", "bought", "at"])
    if file == "clicks.csv":
        pacsv.write_csv(rows, file)
    maps = {name: Vocabulary() for name in NAMES}
    config = dataclasses.replace(CONFIG, format="auto" if file == "clicks.csv" else "parquet")
    examples, own = new_rows(config, file, maps, {name: (name,) for name in NAMES}, data.transform.__getitem__)
    every = np.arange(ROWS)
    wanted, found = data.examples.batch(every, every), examples.batch(every, every)
    assert set(found) == set(wanted)
    for name in (*NAMES, "numeric"):
        np.testing.assert_array_equal(found[name], wanted[name], err_msg=name)
    assert own.who["user"].to_pylist() == rows["who"].to_pylist()
    stranger = pa.table({"who": ["nobody", None], "device": ["tv", None], "tags": ["t1|x", None], "price": [None, 3.0]})
    pq.write_table(stranger, "new.pq")
    examples, _ = new_rows(CONFIG, "new.pq", maps, {name: (name,) for name in NAMES}, data.transform.__getitem__)
    found = examples.batch(np.arange(2), np.arange(2))
    assert found["who"].tolist() == [0, 0] and found["age"].tolist() == [0, 0]
    assert (found["tags"] > 0).sum() == 1 and found["device"][0] > 0 and found["device"][1] == 0
    assert found["numeric"][0, 0] == 0 and found["numeric"][1, 0] != 0


def test_whose_new_rows_are_is_told_where_a_feature_asks_for_it(folder):
    alone = dataclasses.replace(CONFIG, categorical=("device",), user_features=None)
    maps = {name: (Vocabulary(), None) for name in ("device", "tags")}
    data = open_clicks(alone, maps, {name: (name,) for name in maps})
    rows = pq.read_table("clicks.pq").drop_columns(["stars", "bought", "at"])
    pq.write_table(rows.drop_columns(["who"]), "nobody.pq")

    def read(config, path, names):
        return new_rows(config, path, dict.fromkeys(names, Vocabulary()), {name: (name,) for name in names}, arrays)

    arrays = data.transform.__getitem__
    (told, with_who), (not_told, without) = (read(alone, path, maps) for path in ("clicks.pq", "nobody.pq"))
    assert with_who.who["user"].to_pylist() == rows["who"].to_pylist() and without.who == {}
    every = np.arange(ROWS)
    for name, values in told.batch(every, every).items():
        np.testing.assert_array_equal(values, not_told.batch(every, every)[name], err_msg=name)
    arrays = opened().transform.__getitem__
    with pytest.raises(UserError, match=r"nobody\.pq: no column 'who'"):
        read(dataclasses.replace(CONFIG, categorical=("device",)), "nobody.pq", ("device", "tags", "age"))


def test_a_batch_is_a_function_of_the_cursor_and_an_epoch_has_every_example_once(folder):
    source = opened().source(seed=3)
    assert source.examples == 160
    whole = source.batch(130, 60)  # over the end of an epoch
    for name, values in whole.items():
        halves = [source.batch(130, 25)[name], source.batch(155, 35)[name]]
        np.testing.assert_array_equal(values, np.concatenate(halves), err_msg=name)
    assert sorted(source.batch(160, 160)["id"]) == list(range(160))
    assert not np.array_equal(source.batch(0, 160)["id"], source.batch(160, 160)["id"])
    assert not np.array_equal(source.batch(0, 160)["id"], opened().source(seed=4).batch(0, 160)["id"])


def test_evaluation_is_padded_with_weight_zero(folder):
    batches = opened().batches("valid", 8)
    found = list(batches)
    assert len(batches) == len(found) == 3 and all(len(batch["id"]) == 8 for batch in found)
    assert sum(batch["weight"].sum() for batch in found) == 20
    assert not found[-1]["slice/cold_user"][4:].any()
    for name, values in batches.rows(2, 2, 6).items():
        np.testing.assert_array_equal(values, found[2][name][2:6])


@pytest.mark.parametrize("by", ["order", "time", "user_time", "random"])
def test_splits_keep_their_order(folder, by):
    data = opened(ClicksFile(**{**CONFIG.__dict__, "split": Fractions(by=by, valid=0.2, test=0.2)}))
    parts = data.parts
    assert sorted(np.concatenate(list(parts.values()))) == list(range(ROWS))
    if by in ("order", "time"):
        assert parts["train"].max() < parts["valid"].min() and parts["valid"].max() < parts["test"].min()
    if by == "user_time":
        who = np.array(pq.read_table("clicks.pq")["who"].to_pylist())
        for name in np.unique(who):
            ends = [parts[part][who[parts[part]] == name] for part in ("train", "valid", "test")]
            for earlier, later in itertools.pairwise(ends):
                assert not len(earlier) or not len(later) or earlier.max() < later.min()
    if by == "random":
        assert parts["test"].min() < 50


@pytest.mark.parametrize(
    "change, said",
    [
        ({"labels": {"x": Label(column="stars")}}, r"labels.x: row \d+ of column 'stars' is \d, expected 0 or 1"),
        (
            {"labels": {"x": Label(column="device", at_least=1)}},
            "labels.x: column 'device': row 1 is 'tv'",
        ),
        ({"categorical": ("devise",)}, "no column 'devise'.*device"),
        ({"split": Fractions(valid=0.6, test=0.5)}, "leave nothing to train on"),
        ({"split": Fractions(valid=0.001, test=0.3)}, "the valid part is empty"),
        ({"columns": ClickColumns(user="who")}, "by: time needs data.columns.time"),
        ({"columns": ClickColumns(time="at")}, "user_features: say which column is the user"),
        (
            {"user_features": SideFile(path="users.pq", key="age", columns=("account",), format="parquet")},
            "age '20' has several rows that differ in 'account'",
        ),
    ],
)
def test_mistakes_are_told(folder, change, said):
    with pytest.raises(UserError, match=said):
        opened(ClicksFile(**{**CONFIG.__dict__, **change}))


def test_hashing_is_stable_salted_and_may_keep_features_apart():
    ids = pa.array(["a", "b", None, "5"])
    plain = fit_map(Hashed(), "t", ids, 1000)
    assert plain.encode(ids).tolist() == fit_map(Hashed(), "t", pa.array([], pa.string()), 1000).encode(ids).tolist()
    assert plain.encode(pa.array([5])).tolist() == plain.encode(pa.array(["5"])).tolist()
    assert (
        plain.encode(ids)[2] == 0 and plain.encode(ids).min() >= 0 and plain.encode(ids, "x")[0] == plain.encode(ids)[0]
    )
    assert plain.encode(ids).tolist() == [825, 526, 0, 238]  # recorded: a hash that changes would lose a model
    salted, apart = (fit_map(one, "t", ids, 1000) for one in (Hashed(salt=1), Hashed(apart=True)))
    assert salted.encode(ids)[0] != plain.encode(ids)[0]
    assert apart.encode(ids, "x")[0] != apart.encode(ids, "y")[0]
    many = fit_map(Hashed(), "t", ids, 11).encode(pa.array(np.arange(5000)))
    assert many.min() == 1 and many.max() == 10 and np.bincount(many)[1:].min() > 400


def test_vocabularies_and_ranges():
    seen = pa.array(["b", "a", "c", "a", None, "c", "d"])
    vocabulary = fit_map(Vocabulary(), "t", seen, None)
    assert vocabulary.rows == 5 and vocabulary.encode(pa.array(["d", "a", "x", None])).tolist() == [4, 1, 0, 0]
    assert fit_map(Vocabulary(min_count=2), "t", seen, None).encode(seen).tolist() == [0, 1, 2, 1, 0, 2, 0]
    few = fit_map(Vocabulary(), "t", seen, 4)  # room for three: the frequent ones, then the first
    assert few.rows == 4 and few.encode(pa.array(["a", "b", "c", "d"])).tolist() == [1, 2, 3, 0]
    numbers = fit_map(Range(), "t", pa.array([1]), 10)
    assert numbers.encode(pa.array([0, 8, 9, -1, None])).tolist() == [1, 9, 0, 0, 0]
    assert numbers.encode(pa.array(["0", "8", "9", "x"])).tolist() == [1, 9, 0, 0]
    for fitted in (vocabulary, few, numbers):
        again = restore_map(fitted.config, fitted.arrays().__getitem__)
        assert again.encode(seen).tolist() == fitted.encode(seen).tolist() and again.rows == fitted.rows
    with pytest.raises(UserError, match="ids: hash needs a number of rows"):
        fit_map(Hashed(), "t", seen, None)


def test_a_table_that_features_share_has_one_vocabulary(folder):
    data = open_clicks(CONFIG, {"all": (Vocabulary(), None)}, {"all": ("who", "device")})
    assert data.rows == {"all": 23} and set(data.examples.features) == {"who", "device"}


def test_a_criteo_file_is_read_as_it_is_and_can_be_written(tmp_path):
    write_criteo(tmp_path / "a.tsv", rows=3000, seed=1)
    write_criteo(tmp_path / "b.tsv", rows=3000, seed=1)
    assert (tmp_path / "a.tsv").read_bytes() == (tmp_path / "b.tsv").read_bytes()
    lines = (tmp_path / "a.tsv").read_text().splitlines()
    fields = [line.split("\t") for line in lines]
    assert len(lines) == 3000 and {len(one) for one in fields} == {40} and {one[0] for one in fields} == {"0", "1"}
    assert any("" in one[1:14] for one in fields) and any("" in one[14:] for one in fields)
    maps, tables = {"c": (Hashed(apart=True), 5000)}, {"c": CATEGORIES}
    data = open_clicks(Criteo(path=str(tmp_path / "a.tsv")), maps, tables)
    assert data.numeric == INTEGERS and data.rows == {"c": 5000} and len(data.features) == 26
    batch = data.source(0).batch(0, 64)
    assert batch["numeric"].shape == (64, 13) and 0.1 < data.inspection["train_rate_click"] < 0.5
    null = [at for at, one in enumerate(fields) if one[14] == ""]
    assert np.all(data.examples.features["c1"].codes[null] == 0)


def test_numbers_of_users_are_standardised_by_the_training_examples(folder):
    side = SideFile(path="users.pq", key="account", numeric=("age",), format="parquet")
    data = opened(dataclasses.replace(CONFIG, user_features=side), without="age")
    rows = pq.read_table("clicks.pq").to_pylist()
    age = {one["account"]: one["age"] for one in pq.read_table("users.pq").to_pylist()}
    raw = np.array([np.nan if age.get(row["who"]) is None else age[row["who"]] for row in rows], float)
    train = raw[data.parts["train"]]
    wanted = np.nan_to_num((raw - np.nanmean(train)) / np.nanstd(train))
    assert data.numeric == ("price", "age") and 0 < np.isnan(raw).sum() < len(raw)
    np.testing.assert_allclose(data.examples.numeric[:, 1], wanted, rtol=1e-5, atol=1e-6)
    given = {"config": dataclasses.replace(CONFIG, user_features=side), "path": "clicks.pq"}
    maps = {name: Vocabulary() for name in NAMES[:3]}
    new, _ = new_rows(**given, maps=maps, tables={name: (name,) for name in maps}, read=data.transform.__getitem__)
    np.testing.assert_array_equal(new.numeric, data.examples.numeric)

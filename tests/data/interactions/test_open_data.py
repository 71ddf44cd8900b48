import json
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest

from jaxops.core.failures import UserError
from jaxops.data.interactions.inspect import describe, inspect
from jaxops.data.interactions.open import open_data
from jaxops.data.interactions.spec import Columns, GlobalTime, InteractionsFile, MinCount, SequencesFile
from jaxops.data.side import join_side
from jaxops.data.spec import SideFile

CSV = """user,item,time
a,p,2026-11-01
a,q,2026-11-02
a,r,2026-11-02
a,s,2026-11-16
b,p,2026-11-03
b,q,2026-11-17
b,z,2026-11-21
c,p,2026-11-22
,p,2026-11-22
"""


@pytest.fixture
def path(tmp_path):
    (tmp_path / "plays.csv").write_text(CSV)
    return str(tmp_path / "plays.csv")


def test_inspection_of_a_global_split(path):
    split = GlobalTime("2026-11-15", "2026-11-20")
    data = open_data(InteractionsFile(path, split=split))
    info = inspect(data)
    assert json.loads(json.dumps(info)) == info
    assert (info["events"], info["users"], info["items"]) == (8, 3, 5)
    assert info["density"] == pytest.approx(8 / 15)
    assert info["time"] == {"from": "2026-11-01T00:00:00Z", "to": "2026-11-22T00:00:00Z"}
    assert info["ties"] == pytest.approx(2 / 8)
    assert info["dropped"] == {"null_id_events": 1}
    assert info["lengths"]["histogram"] == {"edges": [1, 2, 4, 8], "counts": [1, 1, 1]}
    assert info["lengths"]["q50"] == 3
    assert info["events_per_item"]["q100"] == 3
    assert info["split"] == {
        "kind": "global_time",
        "sha256": data.split.sha256,
        "boundaries": ["2026-11-15T00:00:00Z", "2026-11-20T00:00:00Z"],
        "train_users": 2,
        "train_events": 4,
        "train_items": 3,
        "valid": 2,
        "valid_cold_user": 0,
        "valid_cold_item": 1,
        "valid_no_history": 0,
        "test": 1,
        "test_cold_user": 0,
        "test_cold_item": 1,
        "test_no_history": 1,
    }
    rows = dict(describe(info))
    assert rows["ties"].startswith("25.0%")
    assert rows["test"] == "1 queries (0 with a cold user, 1 with a cold item); 1 users without a history"
    assert rows["dropped"] == "1 null_id_events"
    assert rows["path"] == path


def test_inspection_of_sequences(tmp_path):
    (tmp_path / "seq.txt").write_text("1 5 6 7\n2 5 7\n")
    data = open_data(SequencesFile(str(tmp_path / "seq.txt")))
    info = inspect(data)
    assert info["time"] is None
    assert info["ties"] is None
    assert dict(describe(info))["time"].startswith("none")
    with pytest.raises(UserError, match="needs times"):
        open_data(SequencesFile(str(tmp_path / "seq.txt"), split=GlobalTime(1, 2)))


@pytest.mark.latest
def test_cached_and_in_memory_are_one_data_set(path, tmp_path):
    split = GlobalTime("2026-11-15", "2026-11-20")
    memory = open_data(InteractionsFile(path, split=split, min_count=MinCount(user=2, item=1)))
    cached = open_data(
        InteractionsFile(path, split=split, min_count=MinCount(user=2, item=1), cache=str(tmp_path / "cache"))
    )
    assert memory.split.sha256 == cached.split.sha256
    one, two = inspect(memory), inspect(cached)
    one.pop("source"), two.pop("source")
    assert one == two


def test_data_needs_neither_jax_nor_grain():
    """Looking at data must be quick, and must not take an accelerator."""
    modules = "open, inspect, windows, queries, cache"
    code = f"from jaxops.data.interactions import {modules}\nimport jaxops.data.loader\nimport sys\n"
    code += "print('jax' in sys.modules, 'grain' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_columns_of_users_and_items_may_lie_in_the_file_of_events(tmp_path):
    rows = [(u, i, 10 * u + i) for u in range(3) for i in range(4)]
    events = {
        "user": [u for u, _, _ in rows],
        "item": [f"i{i}" for _, i, _ in rows],
        "time": [t for _, _, t in rows],
        "age": [[20.5, float("nan"), None][u] for u, _, _ in rows],
        "tags": [[["a"], [], None, ["b", "a"]][i] for _, i, _ in rows],
    }
    place = str(tmp_path / "events.parquet")
    pq.write_table(pa.table(events), place)
    config = InteractionsFile(
        place,
        user_features=SideFile(path=place, key="user"),
        item_features=SideFile(path=place, key="item", bags=("tags",)),
    )
    data = open_data(config, sides=True)
    ages = join_side(SideFile(path=place, key="user", numeric=("age",)), data.inter.user_ids, "users")[0]["age"]
    np.testing.assert_array_equal(ages.to_numpy(zero_copy_only=False), [20.5, np.nan, np.nan])
    assert data.item_features["tags"].to_pylist() == [["a"], [], None, ["b", "a"]]
    events["tags"][11] = ["b"]
    pq.write_table(pa.table(events), place)
    with pytest.raises(UserError, match=r"item 'i3' has several rows that differ in 'tags': \['b', 'a'\] and \['b'\]"):
        open_data(config, sides=True)


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_context_goes_with_its_event(tmp_path, suffix):
    """Through the filter, the sort and whatever has no id; the same from text, JSON and Parquet."""
    draw = np.random.default_rng(3)
    rows = [
        {"user": int(u), "item": int(i), "time": int(t), "device": d, "hour": int(h)}
        for u, i, t, d, h in zip(
            draw.integers(0, 9, 300), draw.integers(0, 12, 300), draw.permutation(300),
            draw.choice(np.array(["phone", "tv", None]), 300), draw.integers(0, 24, 300), strict=True,
        )
    ]  # fmt: skip
    place = tmp_path / f"events.{suffix}"
    lost = {**rows[0], "item": None}
    frame = pa.Table.from_pylist([lost, *rows])
    if suffix == "csv":
        pacsv.write_csv(frame, place)
    elif suffix == "jsonl":
        place.write_text("".join(json.dumps(row) + "\n" for row in [lost, *rows]))
    else:
        pq.write_table(frame, place)
    columns = Columns(context=("hour", "device"))
    inter = open_data(InteractionsFile(str(place), columns=columns, min_count=MinCount(item=20))).inter
    assert 0 < inter.n_events < 300
    by_time = {row["time"]: row for row in rows}
    wanted = [by_time[int(time)] for time in inter.time]
    assert inter.context_of("hour").to_pylist() == [row["hour"] for row in wanted]
    assert inter.context_of("device").to_pylist() == [row["device"] for row in wanted]
    assert inter.user_ids.originals(inter.user).tolist() == [row["user"] for row in wanted]

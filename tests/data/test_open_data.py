import json
import subprocess
import sys

import pytest

from jaxops.core.failures import UserError
from jaxops.data.config import (
    GlobalTime,
    InteractionsFile,
    MinCount,
    SequencesFile,
    open_data,
)
from jaxops.data.inspect import describe, inspect

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
    modules = "config, inspect, windows, queries, loader, cache"
    code = f"from jaxops.data import {modules}\nimport sys\nprint('jax' in sys.modules, 'grain' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]

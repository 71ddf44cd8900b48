import json
import signal
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxops.core.failures import UserError
from jaxops.data import formats
from jaxops.data.interactions import cache
from jaxops.data.interactions.interactions import read_interactions
from jaxops.data.interactions.open import open_data
from jaxops.data.interactions.spec import Columns, InteractionsFile, MinCount

COLUMNS = Columns(weight="w", context=("device", "hour"))


def write(path, seed=0, rows=3000, strings=False):
    """Random events with many ties, a skewed catalogue and a few users of a single event."""
    rng = np.random.default_rng(seed)
    users = rng.zipf(1.5, rows) % 97
    items = rng.zipf(1.3, rows) % 211
    columns = {
        "user": [f"user {u}" for u in users] if strings else users,
        "item": [f"i{i}" for i in items] if strings else items,
        "time": rng.integers(0, 50, rows),
        "w": rng.random(rows).astype(np.float32),
        "device": [[None, "phone", "tv"][n] for n in rng.integers(0, 3, rows)],
        "hour": rng.integers(0, 24, rows),
    }
    pq.write_table(pa.table(columns), path)


def same_bytes(a, b):
    for name in ("user", "item", "time", "weight", "context", "offsets"):
        x, y = getattr(a, name), getattr(b, name)
        assert (x.dtype, x.shape, x.tobytes()) == (y.dtype, y.shape, y.tobytes()), name
    assert a.user_ids.values.tobytes() == b.user_ids.values.tobytes()
    assert a.item_ids.values.tobytes() == b.item_ids.values.tobytes()
    for name in ("device", "hour"):
        assert a.context_of(name).equals(b.context_of(name))
    assert (a.user_ids.first, a.item_ids.first, a.timed, a.dropped) == (0, 1, b.timed, b.dropped)


@pytest.mark.parametrize("strings", [False, True])
@pytest.mark.parametrize("min_count", [MinCount(), MinCount(user=4, item=6)])
@pytest.mark.parametrize("chunk", [64, 1000, 1 << 22])
def test_cache_is_byte_for_byte_the_in_memory_reading(tmp_path, monkeypatch, strings, min_count, chunk):
    monkeypatch.setattr(formats, "ROWS", 500)
    for part in range(2):
        write(tmp_path / f"part-{part}.parquet", seed=part, strings=strings)
    config = InteractionsFile(str(tmp_path / "*.parquet"), columns=COLUMNS, min_count=min_count)
    folder = cache.build_cache(config, tmp_path / "cache", chunk=chunk)
    mapped = cache.open_cache(folder, verify=True)
    monkeypatch.setattr(formats, "ROWS", 1 << 18)
    same_bytes(mapped, read_interactions(config.path, COLUMNS, min_count))
    assert isinstance(mapped.item.base, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        mapped.item[0] = 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache", "part-0.parquet", "part-1.parquet"]
    assert sorted(p.name for p in folder.iterdir()) == sorted(
        [f"{name}.npy" for name in (*cache.COLUMNS, *cache.OTHERS, "context_0", "context_1")] + ["manifest.json"]
    )


def test_ensure_builds_once_and_again_when_the_input_changes(tmp_path):
    write(tmp_path / "a.parquet")
    config = InteractionsFile(str(tmp_path / "a.parquet"), columns=COLUMNS, cache=str(tmp_path / "caches"))
    stages = []
    progress = lambda stage, done, total: stages.append(stage)
    folder = cache.ensure(config, config.cache, progress)
    assert set(stages) == {"reading", "filtering", "grouping", "sorting"}
    stages.clear()
    assert cache.ensure(config, config.cache, progress) == folder
    assert not stages
    other = InteractionsFile(config.path, columns=COLUMNS, min_count=MinCount(3, 3), cache=config.cache)
    assert cache.ensure(other, config.cache) != folder
    write(tmp_path / "a.parquet", seed=7)
    assert cache.ensure(config, config.cache, progress) == folder
    assert "reading" in stages
    data = open_data(config)
    same_bytes(data.inter, read_interactions(config.path, COLUMNS))
    assert data.info["cache"] == str(folder)
    assert len(list((tmp_path / "caches").iterdir())) == 2


def test_a_failed_build_leaves_the_old_cache_and_nothing_else(tmp_path):
    write(tmp_path / "a.parquet")
    config = InteractionsFile(str(tmp_path / "a.parquet"), columns=COLUMNS)
    folder = cache.build_cache(config, tmp_path / "cache")
    before = (folder / "manifest.json").read_text()

    def interrupt(stage, done, total):
        if stage == "sorting":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cache.build_cache(config, folder, interrupt)
    with pytest.raises(UserError, match="no event is left"):
        cache.build_cache(InteractionsFile(config.path, columns=COLUMNS, min_count=MinCount(9999, 9999)), folder)
    assert (folder / "manifest.json").read_text() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.parquet", "cache"]
    cache.open_cache(folder, verify=True)


def test_left_overs_of_a_killed_process_are_swept(tmp_path):
    write(tmp_path / "a.parquet")
    config = InteractionsFile(str(tmp_path / "a.parquet"), columns=COLUMNS)
    code = f"""
import os, signal
from jaxops.data.interactions import cache
from jaxops.data.interactions.spec import InteractionsFile
cache.build_cache(InteractionsFile({config.path!r}), {str(tmp_path / "cache")!r},
            lambda stage, done, total: os.kill(os.getpid(), signal.SIGKILL))
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    assert len(list(tmp_path.glob(".cache.*"))) == 1
    cache.build_cache(config, tmp_path / "cache")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.parquet", "cache"]


def test_what_a_process_left_that_was_killed_right_after_its_cache_was_in_place_is_swept(tmp_path):
    write(tmp_path / "a.parquet")
    config = InteractionsFile(str(tmp_path / "a.parquet"))
    folder = cache.ensure(config, tmp_path / "caches")
    killed = "cache.scratch.replace_folder = lambda *names: (real(*names), os.kill(os.getpid(), signal.SIGKILL))"
    code = f"""
import os, signal
from jaxops.data.interactions import cache
from jaxops.data.interactions.spec import InteractionsFile
real = cache.scratch.replace_folder
{killed}
cache.build_cache(InteractionsFile({config.path!r}), {str(folder)!r})
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    assert len(list(folder.parent.glob(f".{folder.name}.*"))) == 1
    assert cache.ensure(config, tmp_path / "caches", lambda *_: pytest.fail("built again")) == folder
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def change(name, mutate):
    def damage(folder):
        path = folder / name
        path.write_bytes(mutate(path.read_bytes()))

    return damage


def manifest(**fields):
    return change("manifest.json", lambda raw: json.dumps({**json.loads(raw), **fields}).encode())


@pytest.mark.parametrize(
    ("damage", "fragment"),
    [
        (lambda folder: (folder / "manifest.json").unlink(), "no data cache in"),
        (change("manifest.json", lambda raw: raw[:50]), "manifest.json: cannot be read"),
        (manifest(version=99), "a data cache of version 99, this jaxops reads 4"),
        (lambda folder: (folder / "item.npy").unlink(), "item.npy: missing"),
        (change("item.npy", lambda raw: raw[:-4]), "item.npy: 12,"),
        (change("time.npy", lambda raw: raw[:-1] + bytes([raw[-1] ^ 1])), "time.npy: contents were changed (CRC-32"),
        (manifest(dropped={"null_id_events": 7}), "manifest.json: contents were changed"),
        (lambda folder: (folder / "manifest.json").write_text('{"version":3}'), "manifest.json: contents were changed"),
        (change("user.npy", lambda raw: b"\0" * len(raw)), "changed (CRC-32 differs), bytes 0 to"),
    ],
)
def test_damage_is_told(tmp_path, damage, fragment):
    write(tmp_path / "a.parquet")
    folder = cache.build_cache(InteractionsFile(str(tmp_path / "a.parquet"), columns=COLUMNS), tmp_path / "cache")
    damage(folder)
    with pytest.raises(UserError, match=r"data cache|damaged") as caught:
        cache.open_cache(folder, verify=True)
    assert fragment in str(caught.value)


def test_refusals(tmp_path):
    write(tmp_path / "a.parquet")
    config = InteractionsFile(str(tmp_path / "a.parquet"), columns=COLUMNS)
    with pytest.raises(UserError, match="memory-mapped, so it must be a local folder"):
        cache.ensure(config, "gs://bucket/cache")
    with pytest.raises(UserError, match="exists and is not a jaxops data cache"):
        cache.build_cache(config, tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot build the data cache"):
        cache.build_cache(config, tmp_path / "file" / "cache")

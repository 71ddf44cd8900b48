"""A damaged cache is never trained on: what is checked when, what is said, and that it is built again."""

import hashlib
import json
import logging
from pathlib import Path

import numpy as np
import pytest
from tiny_runs import folder  # noqa: F401 (fixture)

from jaxops.cli.main import main
from jaxops.core.failures import RunFailed
from jaxops.data.interactions import blocks, cache
from jaxops.data.interactions.interactions import read_interactions
from jaxops.data.interactions.open import open_data
from jaxops.data.interactions.spec import InteractionsFile


@pytest.fixture
def config(tmp_path):
    """The config of 4,000 events of 50 users, in no order of their times."""
    rng = np.random.default_rng(3)
    rows = zip(rng.integers(0, 50, 4000), rng.integers(0, 300, 4000), rng.permutation(4000), strict=True)
    text = "\n".join(["user,item,time", *(f"{u},{i},{t}" for u, i, t in rows)])
    (tmp_path / "events.csv").write_text(text + "\n")
    return InteractionsFile(str(tmp_path / "events.csv"), cache=str(tmp_path / "caches"))


def flip(path: Path, at: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 3
    path.write_bytes(raw)


@pytest.mark.parametrize("name", ["item.npy", "manifest.json", "user_ids.npy"])
def test_a_flipped_byte_is_never_trained_on_and_the_cache_is_built_again(config, caplog, name):
    data = open_data(config)
    built = Path(data.info["cache"])
    good = {path.name: path.read_bytes() for path in built.iterdir()}
    assert data.info["notes"] == []
    flip(built / name, len(good[name]) // 2)
    with caplog.at_level(logging.WARNING):
        again = open_data(config)
    (said,) = again.info["notes"]
    assert f"the data cache {built} is damaged: {name}" in said and "built again from its source" in said
    assert said in caplog.text
    assert {path.name: path.read_bytes() for path in built.iterdir()} == good
    assert again.inter.item.tobytes() == read_interactions(config.path).item.tobytes()
    assert open_data(config).info["notes"] == []


def test_where_it_cannot_be_built_again_both_reasons_are_told(config, monkeypatch):
    built = Path(open_data(config).info["cache"])
    flip(built / "time.npy", -1)

    def full(*args, **keywords):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache.scratch, "replace_folder", full)
    with pytest.raises(RunFailed, match=r"time.npy: contents were changed .* building it again failed: .*No space"):
        open_data(config)
    assert sorted(path.name for path in built.parent.iterdir()) == [built.name]


def test_large_files_are_sampled_at_an_opening_and_read_whole_by_verify(config, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK", 1 << 8)
    built = cache.ensure(config, config.cache)
    described = json.loads((built / "manifest.json").read_text())["columns"]["item"]
    assert len(described["crc32"]) == -(-described["bytes"] // 256) > 60
    monkeypatch.setattr(blocks, "WHOLE", 1 << 10)
    flip(built / "item.npy", 5000)
    monkeypatch.setattr(blocks, "SAMPLE", 0)
    cache.open_cache(built)
    expected = r"is damaged: item.npy: contents were changed \(CRC-32 differs\), bytes 4,864 to 5,119$"
    with pytest.raises(cache.DamagedCache, match=expected):
        cache.open_cache(built, verify=True)
    monkeypatch.setattr(blocks, "SAMPLE", 16)
    with pytest.raises(cache.DamagedCache, match=expected):  # other blocks each time, a quarter of all
        for _ in range(400):
            cache.open_cache(built)
    monkeypatch.setattr(blocks, "WHOLE", 1 << 26)
    with pytest.raises(cache.DamagedCache, match=expected):
        cache.open_cache(built)


def as_before_blocks(built: Path) -> None:
    """Gives a cache the manifest that version 3 wrote."""
    manifest = json.loads((built / "manifest.json").read_text())
    del manifest["crc32"]
    for name, column in manifest["columns"].items():
        raw = (built / f"{name}.npy").read_bytes()
        manifest["columns"][name] = {"bytes": column["bytes"], "sha256": hashlib.sha256(raw).hexdigest()}
    (built / "manifest.json").write_text(json.dumps({**manifest, "version": 3}, indent=1))


def test_caches_of_an_older_jaxops_keep_opening_and_are_checked_as_far_as_they_can_be(config, monkeypatch):
    built = cache.ensure(config, config.cache)
    as_before_blocks(built)
    before = (built / "manifest.json").read_bytes()
    assert open_data(config).info["notes"] == []  # small: read whole
    monkeypatch.setattr(blocks, "WHOLE", 1 << 10)
    (said,) = open_data(config).info["notes"]
    assert "built by an older jaxops" in said and "jaxops data verify" in said
    assert (built / "manifest.json").read_bytes() == before
    flip(built / "item.npy", 5000)
    with pytest.raises(cache.DamagedCache, match=r"item.npy: contents were changed \(SHA-256 differs\)"):
        cache.open_cache(built, verify=True)


def test_data_verify_reads_all_says_what_is_damaged_and_builds_nothing(folder, capsys):  # noqa: F811
    mine = ["my.yaml", "data.cache=lake"]
    assert main(["data", "verify", *mine]) == 2
    assert "no data cache in lake/" in capsys.readouterr().err
    assert main(["data", "verify", "my.yaml"]) == 2
    assert "data verify: data.cache is not set" in capsys.readouterr().err
    assert main(["data", "build", *mine]) == 0
    (built,) = Path("lake").iterdir()
    capsys.readouterr()
    assert main(["data", "verify", *mine]) == 0
    assert "every byte is as it was written" in capsys.readouterr().out
    flip(built / "item.npy", -1)
    flip(built / "offsets.npy", -1)
    before = (built / "item.npy").read_bytes()
    assert main(["data", "verify", *mine]) == 1
    out = capsys.readouterr().out
    assert "DAMAGED: item.npy: contents were changed" in out and "DAMAGED: offsets.npy" in out
    assert "builds it again from its source" in out
    assert (built / "item.npy").read_bytes() == before
    assert main(["data", "verify", *mine, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert len(found["damage"]) == 2 and found["current"] and found["cache"] == str(built)
    assert main(["data", "build", *mine]) == 0  # mends it
    assert main(["data", "verify", *mine]) == 0
    Path("plays.csv").unlink()
    capsys.readouterr()
    assert main(["data", "verify", *mine]) == 0
    out = capsys.readouterr().out
    assert "every byte is as it was written" in out and "its source has changed since, or is gone" in out

"""What is frozen lies once beside the checkpoints, is followed wherever they are read, and outlives who names it."""

import itertools
import json
import pathlib
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from object_stores import needs_moto, objects, s3  # noqa: F401 (fixtures)

from jaxops.core import manifest, shared_parts, store_paths, writing
from jaxops.core.checkpoint import Checkpoints
from jaxops.core.failures import RunFailed, UserError
from jaxops.core.manifest import Damaged

P = PartitionSpec
ROOT = pathlib.Path(__file__).parents[2]
BASE = np.random.default_rng(0).standard_normal((64, 128)).astype(np.float32)


def mesh(*sizes):
    return jax.make_mesh(sizes, ("data", "fsdp")[: len(sizes)], axis_types=(AxisType.Explicit,) * len(sizes))


def state(step, base=1.0, spec=P("data"), on=None):
    place = lambda x, spec: jax.device_put(x, NamedSharding(on or mesh(8), spec))
    return {
        "params": {"a": place(np.full((8, 8), step, np.float32), P())},
        "frozen": {"layers": [{"w": place(BASE * np.float32(base), spec)}], "none": jnp.zeros((0, 3))},
        "step": jnp.int32(step),
    }


def like(tree, sharding=None):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def same(found, wanted):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert x.dtype == y.dtype and np.array_equal(np.asarray(x), np.asarray(y))


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def parts(folder):
    return [path for path in sorted(folder.iterdir()) if path.name.startswith("frozen-")]


def flip(folder, size=None):
    """Changes one bit of the largest file."""
    path = max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data)[:size])
    return str(path.relative_to(folder.parent))


@pytest.fixture(params=["copied", "held"])
def how(request, monkeypatch):
    """Both ways of taking hold of values: copies on CPU, and what accelerators do."""
    if request.param == "held":
        monkeypatch.setattr(writing, "on_cpu", lambda leaf: False)


@pytest.mark.latest
def test_it_is_written_once_and_every_checkpoint_is_whole(tmp_path, how):
    with Checkpoints(tmp_path, keep=9) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, state(step), {"cursor": step})
            if step == 1:
                checkpoints.wait()
                (part,) = parts(tmp_path)
                before = {path: path.stat().st_mtime_ns for path in part.rglob("*")}
        for step in (1, 2, 3):
            same(checkpoints.restore(step, like(state(0))), state(step))
            same(checkpoints.load_params(step, "frozen"), {"layers": {0: {"w": BASE}}, "none": np.zeros((0, 3), "f4")})
            same(checkpoints.load_params(step, "frozen/layers/0/w"), BASE)
            assert checkpoints.verify(step) == []
            assert [leaf.path for leaf in checkpoints.describe(step)] == [
                *("frozen/layers/0/w", "frozen/none", "params/a", "step")
            ]
        assert checkpoints.latest_good(pytest.fail) == 3
    assert names(tmp_path) == ["1", "2", "3", part.name]
    assert {path: path.stat().st_mtime_ns for path in part.rglob("*")} == before
    size = lambda folder: sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert size(part) > BASE.nbytes > 2 * size(tmp_path / "2")


def test_without_anything_frozen_nothing_changes(tmp_path):
    bare = {**state(1), "frozen": {}}
    with Checkpoints(tmp_path / "a") as checkpoints:
        checkpoints.save(1, bare, {})
    with Checkpoints(tmp_path / "b", shared=()) as checkpoints:
        checkpoints.save(1, state(1), {})  # as an older jaxops did
        same(checkpoints.restore(1, like(state(0))), state(1))
    for folder in ("a", "b"):
        body = json.loads((tmp_path / folder / "1" / "jaxops.json").read_text())["manifest"]
        assert body["format"] == 1 and "shared" not in body and names(tmp_path / folder) == ["1"]


def test_an_older_jaxops_says_that_it_is_too_old(tmp_path, monkeypatch):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state(1), {})
    monkeypatch.setattr(manifest, "FORMAT", 1)
    with pytest.raises(UserError, match="format 2, written by a newer jaxops; this one reads 1"):
        Checkpoints(tmp_path).restore(1, like(state(0)))


def test_a_run_of_an_older_jaxops_goes_on(tmp_path):
    """Its checkpoints have the frozen leaves within; they restore, and go when their time has come."""
    with Checkpoints(tmp_path, shared=()) as checkpoints:
        checkpoints.save(1, state(1), {})
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert checkpoints.latest_good(pytest.fail) == 1 and checkpoints.verify(1) == []
        same(checkpoints.restore(1, like(state(0))), state(1))
        same(checkpoints.load_params(1, "frozen/layers/0/w"), BASE)
        checkpoints.save(2, state(2), {})
        assert checkpoints.steps() == [1, 2]
        same(checkpoints.restore(1, like(state(0))), state(1))
        checkpoints.save(3, state(3), {})
    assert names(tmp_path) == ["2", "3", parts(tmp_path)[0].name]


def test_any_mesh_and_another_process_go_on_with_the_same_folder(tmp_path):
    layouts = [(mesh(8), P("data")), (mesh(2, 4), P("fsdp", "data")), (mesh(4, 2), P(None, "fsdp")), (mesh(1), P())]
    for step, (on, spec) in enumerate(layouts):
        with Checkpoints(tmp_path, keep=9) as checkpoints:
            checkpoints.save(step, state(step, spec=spec, on=on), {})
            found = checkpoints.restore(step, like(state(0), NamedSharding(mesh(2, 4), P())))
            same(found, state(step))
    assert len(parts(tmp_path)) == 1


def test_a_changed_reference_opens_a_new_edition_and_the_old_one_goes_with_its_last_checkpoint(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step, base in ((1, 1.0), (2, 1.0), (3, 2.0)):
            checkpoints.save(step, state(step, base), {}, wait=True)
        assert len(parts(tmp_path)) == 2 and checkpoints.steps() == [2, 3]
        for step, base in ((2, 1.0), (3, 2.0)):
            same(checkpoints.restore(step, like(state(0))), state(step, base))
            assert checkpoints.verify(step) == []
        old = manifest.read(checkpoints._folder.find(2)).shared["frozen"]
        checkpoints.save(4, state(4, 2.0), {}, wait=True)
        assert checkpoints.steps() == [3, 4] and [part.name == old for part in parts(tmp_path)] == [False]
        checkpoints.save(5, state(5, 1.0), {}, wait=True)  # back to the first: written anew
        assert sorted(part.name == old for part in parts(tmp_path)) == [False, True]
        same(checkpoints.restore(5, like(state(0))), state(5, 1.0))


def test_several_entries_may_be_shared_each_by_itself(tmp_path):
    with Checkpoints(tmp_path, shared=("frozen", "params"), keep=9) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, {**state(step), "params": {"b": jnp.ones(5)}}, {}, wait=True)
        assert [name.split("-")[0] for name in names(tmp_path)] == ["1", "2", "frozen", "params"]
        same(checkpoints.load_params(2), {"b": np.ones(5, np.float32)})
    with (
        Checkpoints(tmp_path / "c", shared=("a-b",)) as checkpoints,
        pytest.raises(RunFailed, match="cannot be shared"),
    ):
        checkpoints.save(1, {"a-b": jnp.ones(2), "c": jnp.ones(2)}, {})


def test_differences_name_paths_as_ever(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state(1), {})
        wanted = like(state(0))
        wanted["frozen"]["layers"][0]["w"] = jax.ShapeDtypeStruct((2, 2), np.float32)
        with pytest.raises(
            UserError, match=r"frozen/layers/0/w: shape \[64, 128\] in the checkpoint, \[2, 2\] expected"
        ):
            checkpoints.restore(1, wanted)


# Damage


@pytest.fixture
def two(tmp_path):
    """Checkpoints 1 and 2 with one base, 3 with another."""
    with Checkpoints(tmp_path, keep=9) as checkpoints:
        for step, base in ((1, 1.0), (2, 1.0), (3, 2.0)):
            checkpoints.save(step, state(step, base), {})
    return tmp_path


def part_of(folder, step):
    return folder / manifest.read(shared_parts.epath.Path(folder / str(step))).shared["frozen"]


def test_a_damaged_part_damages_all_that_name_it_and_the_file_is_named(two):
    name = flip(part_of(two, 1))
    checkpoints, warnings = Checkpoints(two), []
    assert checkpoints.verify(1) == checkpoints.verify(2) == [f"{name}: contents were changed (CRC-32 differs)"]
    assert checkpoints.verify(3) == [] and checkpoints.latest_good(pytest.fail) == 3
    flip(part_of(two, 3), -1)
    with pytest.raises(UserError, match=r"every checkpoint in .* is damaged \(steps 1, 2, 3\)"):
        checkpoints.latest_good(warnings.append)
    assert [warning.split(" is damaged")[0][-1] for warning in warnings] == ["3", "2", "1"]
    assert "bytes, expected" in warnings[0] and name in warnings[1] and name in warnings[2]
    with pytest.raises(UserError, match=r"/3 is damaged: frozen-\w+/state/.*bytes, expected"):
        checkpoints.restore(3, like(state(0)))
    same(checkpoints.load_params(3), {"a": np.full((8, 8), 3, np.float32)})  # needs nothing of it


def test_a_part_that_is_read_by_many_is_read_once(two, monkeypatch):
    flip(part_of(two, 3))
    flip(two / "2")
    read, of_file = [], manifest.of_file
    monkeypatch.setattr(manifest, "of_file", lambda path: read.append(path) or of_file(path))
    assert Checkpoints(two).latest_good(lambda _: None) == 1
    assert len(read) == len(set(read)) and any("frozen" in str(path) for path in read)


def test_a_lost_part_and_one_of_another_folder(two):
    shutil.rmtree(part_of(two, 1))
    (problem,) = Checkpoints(two).verify(1)
    assert problem.startswith(f"{part_of(two, 1).name}/jaxops.json cannot be read (FileNotFoundError")
    shutil.copytree(part_of(two, 3), part_of(two, 1))
    (problem,) = Checkpoints(two).verify(1)
    assert "belongs to another folder" in problem
    with pytest.raises(UserError, match=r"is damaged: .*belongs to another folder"):
        Checkpoints(two).load_params(1, "frozen")


def test_a_part_that_lacks_an_array(two):
    part = shared_parts.epath.Path(part_of(two, 3))
    whole = manifest.read(part)
    manifest.write(part, manifest.dataclasses.replace(whole, arrays={}))
    assert Checkpoints(two).verify(3) == [f"{part.name}/jaxops.json lacks frozen/layers/0/w"]


@pytest.mark.parametrize("name", ["../frozen-0123456789abcdef", "/etc", "frozen-01234", "a/frozen-0123456789abcdef"])
def test_a_manifest_may_name_no_folder_elsewhere(two, name):
    folder = shared_parts.epath.Path(two / "3")
    manifest.write(folder, manifest.dataclasses.replace(manifest.read(folder), shared={"frozen": name}))
    with pytest.raises(Damaged, match="is no folder of a shared part"):
        manifest.read(folder)


@pytest.mark.parametrize("seen", ["on opening", "on saving"])
def test_a_damaged_part_is_neither_named_again_nor_deleted(two, seen):
    flip(part_of(two, 3))
    part = part_of(two, 3)
    with Checkpoints(two, keep=1) as checkpoints:
        if seen == "on opening":
            assert checkpoints.latest_good(lambda _: None) == 2
        checkpoints.save(4, state(4, 2.0), {}, wait=True)
        same(checkpoints.restore(4, like(state(0))), state(4, 2.0))
        assert checkpoints.verify(4) == [] and part_of(two, 4).name == f"{part.name}-2"
        checkpoints.save(5, state(5, 2.0), {}, wait=True)
        assert part_of(two, 5).name == f"{part.name}-2" and part.exists()
    with Checkpoints(two, keep=1) as checkpoints:  # and another process knows it too
        checkpoints.save(6, state(6, 2.0), {}, wait=True)
    assert part_of(two, 6).name == f"{part.name}-2" and part.exists()
    assert "CRC-32 differs" in (part / "jaxops.damaged").read_text()


def test_a_lost_part_is_written_again(two):
    part = part_of(two, 3)
    shutil.rmtree(part)
    with Checkpoints(two, keep=9) as checkpoints:
        assert checkpoints.latest_good(lambda _: None) == 2
        for step in (4, 5):
            checkpoints.save(step, state(step, 2.0), {}, wait=True)
            assert part_of(two, step) == part
        same(checkpoints.restore(5, like(state(0))), state(5, 2.0))


# Sweep and retention


def test_the_sweep_and_retention_take_what_nobody_names_and_nothing_else(two):
    named = {part_of(two, 1).name, part_of(two, 3).name}
    name = "frozen-0123456789abcdef"
    shutil.copytree(part_of(two, 1), two / name)
    (two / name / "jaxops.json").unlink()
    (two / f"{name}-2.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    (two / "frozen-notes").mkdir()
    (two / "notes-0123").mkdir()
    whole = two / f"{part_of(two, 1).name}-2"
    shutil.copytree(part_of(two, 1), whole)
    folder = Checkpoints(two)._folder
    folder.sweep()
    assert set(names(two)) == {"1", "2", "3", "frozen-notes", "notes-0123", whole.name, *named}
    folder.retire(Checkpoints(two, keep=9)._retention)
    assert set(names(two)) == {"1", "2", "3", "frozen-notes", "notes-0123", *named}


def test_a_named_part_without_manifest_is_damaged_and_stays(two):
    (part_of(two, 1) / "jaxops.json").unlink()
    with Checkpoints(two, keep=1) as checkpoints:
        checkpoints.save(4, state(4, 3.0), {}, wait=True)
        assert part_of(two, 1).exists() and checkpoints.steps() == [1, 2, 4]
        assert "jaxops.json cannot be read" in checkpoints.verify(2)[0]


def test_where_a_manifest_cannot_be_read_every_part_stays(two):
    (two / "2" / "jaxops.json").write_text("{")
    with Checkpoints(two, keep=1) as checkpoints:
        checkpoints.save(4, state(4, 3.0), {}, wait=True)
        assert checkpoints.steps() == [2, 4] and len(parts(two)) == 3


def test_a_part_that_cannot_be_written_fails_the_save_and_the_next_one_writes_it(tmp_path, monkeypatch):
    with Checkpoints(tmp_path) as checkpoints:
        write, calls = manifest.write, itertools.count()
        monkeypatch.setattr(manifest, "write", lambda *args: write(*args) if next(calls) else 1 / 0)
        checkpoints.save(1, state(1), {})
        with pytest.raises(RunFailed, match=r"saving .*/1 failed: ZeroDivisionError"):
            checkpoints.wait()
        assert checkpoints.steps() == []
        checkpoints.save(1, state(1), {})
        same(checkpoints.restore(1, like(state(0))), state(1))
    assert names(tmp_path) == ["1", parts(tmp_path)[0].name]


# Killed

SAVER = """
import os, sys
import jax, jax.numpy as jnp
from jaxops.core import manifest, orbax_io
from jaxops.core.checkpoint import Checkpoints
moment = sys.argv[2]
def die(*_, **__):
    os.kill(os.getpid(), 9)
write, survey = manifest.write, manifest.survey
class Half:
    def __init__(self, folder, begun): self.folder, self.begun = folder, begun
    def result(self):
        while not self.folder.exists():
            for top, _, files in os.walk(self.folder.parent):
                for name in files:
                    if "checkpoint-tmp" in top and os.path.basename(top) == "d":
                        die()
begin = orbax_io.save_async
size = 1 << 20
if moment == "writing the part":
    orbax_io.save_async, size = lambda folder, *a, **k: Half(folder, begin(folder, *a, **k)), 1 << 25
if moment == "before its manifest":
    manifest.write = die
if moment == "before the step":
    orbax_io.save_async = lambda folder, *a, **k: (die() if "frozen" not in folder.name else begin(folder, *a, **k))
if moment == "before the step's manifest":
    manifest.write = lambda folder, m: die() if "frozen" not in folder.name else write(folder, m)
with Checkpoints(sys.argv[1]) as checkpoints:
    step = 1 + (checkpoints.latest() or 0)
    frozen = {"w": jnp.arange(size, dtype=jnp.float32) * int(sys.argv[3])}
    checkpoints.save(step, {"params": {"a": jnp.ones(4) * step}, "frozen": frozen}, {}, wait=True)
"""


def saver(folder, moment, base):
    command = [sys.executable, "-c", SAVER, str(folder), moment, str(base)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == (0 if moment == "never" else -9), done.stderr


@pytest.mark.parametrize(
    ("moment", "kept"),
    [
        ("writing the part", False),
        ("before its manifest", False),
        ("before the step", True),
        ("before the step's manifest", True),
    ],
)
def test_killed(tmp_path, moment, kept):
    """What a kill leaves is never taken for whole; the part is used again where it was whole, and nothing stays."""
    saver(tmp_path, "never", 1)
    first = parts(tmp_path)
    saver(tmp_path, moment, 2)
    (new,) = {path.name.partition(".")[0] for path in parts(tmp_path)} - {first[0].name}
    assert (tmp_path / new / "jaxops.json").exists() == kept
    assert (tmp_path / new).exists() == (moment != "writing the part")
    left = (tmp_path / new / "jaxops.json").stat().st_mtime_ns if kept else None
    base = np.arange(1 << 20, dtype=np.float32)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest_good(pytest.fail) == 1 and checkpoints.verify(1) == []
        assert np.array_equal(checkpoints.load_params(1, "frozen")["w"], base)
    if kept:
        saver(tmp_path, "never", 2)
        assert (tmp_path / new / "jaxops.json").stat().st_mtime_ns == left  # not written again
        with Checkpoints(tmp_path) as checkpoints:
            assert checkpoints.verify(2) == [] and np.array_equal(checkpoints.load_params(2, "frozen")["w"], base * 2)
        assert {first[0].name, new} < set(names(tmp_path)) and len(names(tmp_path)) == 4
    else:
        saver(tmp_path, "never", 1)  # back to the base before: nobody names the new one
        assert names(tmp_path) == ["1", "2", first[0].name]


def test_a_part_that_a_kill_left_unnamed_goes_with_the_next_save(tmp_path):
    saver(tmp_path, "never", 1)
    saver(tmp_path, "before the step's manifest", 2)
    assert len(parts(tmp_path)) == 2
    saver(tmp_path, "never", 1)
    assert len(parts(tmp_path)) == 1 and len(names(tmp_path)) == 3


# In an object store


@needs_moto
def test_the_same_in_a_store(s3):  # noqa: F811
    folder = f"{s3}/run/checkpoints"
    with Checkpoints(folder, keep=2) as checkpoints:
        for step, base in ((1, 1.0), (2, 1.0), (3, 2.0)):
            checkpoints.save(step, state(step, base), {})
        assert checkpoints.latest_good(print) == 3
        for step, base in ((2, 1.0), (3, 2.0)):
            same(checkpoints.restore(step, like(state(0))), state(step, base))
            assert checkpoints.verify(step) == []
        assert len({name.split("/")[0] for name in objects(folder)}) == 4
        checkpoints.save(4, state(4, 2.0), {}, wait=True)
        assert len({name.split("/")[0] for name in objects(folder)}) == 3
        part = store_paths.path(folder) / manifest.read(checkpoints._folder.find(4)).shared["frozen"]
        name = max(part.files(), key=lambda name: part.files()[name])
        (part / name).unlink()
        assert checkpoints.verify(4) == checkpoints.verify(3) == [f"{part.name}/{name}: missing"]

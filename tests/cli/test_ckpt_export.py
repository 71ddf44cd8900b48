"""`jaxops ckpt` on checkpoints with a shared part, and `ckpt export`: a copy that needs nothing else, or nothing."""

import json
import os
import pathlib
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from object_stores import needs_moto, objects, s3  # noqa: F401 (fixtures)

from jaxops.cli.main import main
from jaxops.core import manifest
from jaxops.core.checkpoint import Checkpoints
from jaxops.run.folder import export
from jaxops.run.folder.saved import open_saved

BASE = np.arange(4096, dtype=np.float32).reshape(64, 64)
STEPS = {10: (0.5, 1), 20: (0.75, 2), 30: (0.25, 2)}


def state(step, base):
    return {"params": {"w": jnp.full((3, 4), step)}, "frozen": {"b": jnp.asarray(BASE) * base}, "step": jnp.int32(step)}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run with three checkpoints, the second of them the best; the last two have one base."""
    folder = tmp_path_factory.mktemp("saved") / "a"
    config = {"checkpoint": {"best": "ndcg@10"}, "run": {"name": "a"}}
    with Checkpoints(folder / "checkpoints", keep=3) as checkpoints:
        for step, (value, base) in STEPS.items():
            checkpoints.save(step, state(step, base), {"cursor": step, "config": config}, {"valid/ndcg@10": value})
    return folder


@pytest.fixture
def run(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "a")


@pytest.fixture
def call(capsys):
    """Runs a command; gives its status, what it printed, and that as JSON where it was asked for."""

    def called(*words):
        status = main([str(word) for word in words])
        out, err = capsys.readouterr()
        return status, (json.loads(out) if "--json" in words and status != 2 else out), err

    return called


def part_of(run, step):
    place = open_saved(run)
    return pathlib.Path(place.path) / place.open(step)[1].shared["frozen"]


def flip(folder):
    path = max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    return str(path.relative_to(folder))


def test_list_has_the_size_with_and_without_the_shared_part(call, run):
    found = call("ckpt", "list", run, "--json")[1]
    for one in found["checkpoints"]:
        assert one["damage"] == [] and one["shared_bytes"] > BASE.nbytes > one["bytes"] > 0
        assert one["shared"] == {"frozen": part_of(run, one["step"]).name}
    assert {one["name"]: one["what"] for one in found["others"]} == {
        part_of(run, 10).name: "shared by step 10",
        part_of(run, 30).name: "shared by steps 20, 30",
    }
    out = call("ckpt", "list", run)[1]
    assert "with shared" in out.splitlines()[0] and f"{part_of(run, 30).name}: shared by steps 20, 30" in out
    shutil.copytree(part_of(run, 10), run / "checkpoints" / "frozen-0123456789abcdef")
    assert "frozen-0123456789abcdef: a shared part that no checkpoint names" in call("ckpt", "list", run)[1]


def test_show_lists_what_is_frozen_and_says_where_it_lies(call, run):
    found = call("ckpt", "show", run, "--step", 10, "--json")[1]
    assert {leaf["path"]: leaf["bytes"] for leaf in found["arrays"]}["frozen/b"] == BASE.nbytes
    assert [(group["name"], group["bytes"]) for group in found["groups"]] == [
        *(("frozen", BASE.nbytes), ("params", 48), ("step", 4))
    ]
    words = " ".join(call("ckpt", "show", run, "--step", 10)[1].split())
    name = part_of(run, 10).name
    assert f"frozen 1 4,096 16,384 16.0 KiB, shared: {name}" in words
    assert f"files more, with other checkpoints: frozen in {name}" in words


def test_verify_reads_the_shared_part_and_names_its_files(call, run):
    status, out, _ = call("ckpt", "verify", run, "--json")
    sizes = {one["step"]: one["bytes"] for one in call("ckpt", "list", run, "--json")[1]["checkpoints"]}
    assert status == 0 and all(one["bytes"] > sizes[one["step"]] + BASE.nbytes for one in out["checkpoints"])
    name = flip(part_of(run, 30))
    status, out, _ = call("ckpt", "verify", run)
    assert status == 1 and out.count(f"{part_of(run, 30).name}/{name}: contents were changed (CRC-32 differs)") == 2
    assert "2 of 3 damaged; a resume takes step 10" in out
    shutil.rmtree(part_of(run, 30))
    assert [bool(one["damage"]) for one in call("ckpt", "list", run, "--json")[1]["checkpoints"]] == [False, True, True]


@pytest.mark.parametrize(("given", "step"), [((), 20), (("--step", 10), 10), (("--step", 30), 30)])
def test_export_is_a_checkpoint_by_itself(call, run, tmp_path, given, step):
    out = tmp_path / "made" / "copy"
    status, said, _ = call("ckpt", "export", run, out, *given, "--json")
    assert (status, said["step"], said["out"], said["unchecked"]) == (0, step, str(out), 0)
    part = part_of(run, step).name
    shutil.rmtree(run)
    assert sorted(os.listdir(out)) == [str(step), part] and os.listdir(out.parent) == ["copy"]
    assert said["files"] == sum(path.is_file() for path in out.rglob("*")) - 2  # without the manifests
    assert call("ckpt", "verify", out)[0] == 0 and call("ckpt", "show", out, "--json")[1]["cursor"] == step
    wanted = state(step, STEPS[step][1])
    with Checkpoints(out) as checkpoints:
        assert checkpoints.latest_good(pytest.fail) == step
        found = checkpoints.restore(step, wanted)
        assert np.array_equal(found["frozen"]["b"], wanted["frozen"]["b"]) and (found["params"]["w"] == step).all()
        checkpoints.save(99, wanted, {})  # and a run may go on with it
    assert sorted(os.listdir(out)) == sorted([str(step), part, "99"])


def test_export_of_a_checkpoint_that_shares_nothing(call, tmp_path):
    with Checkpoints(tmp_path / "checkpoints", checksums=False) as checkpoints:
        for step in (1, 2, 1):  # its folder is 1-2
            checkpoints.save(step, {"w": jnp.ones(3) * step}, {})
    status, out, _ = call("ckpt", "export", tmp_path, tmp_path / "copy")
    assert status == 0 and f"step 1 of {tmp_path}: " in out and "have no checksum" in out
    assert os.listdir(tmp_path / "copy") == ["1"]
    assert Checkpoints(tmp_path / "copy").load_params(1, "w").tolist() == [1, 1, 1]


def test_what_export_refuses_leaves_nothing(call, run, tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    before = sorted(os.listdir(tmp_path))
    flip(part_of(run, 10))
    for words, message in (
        ((tmp_path / "there",), "there is something at"),
        ((tmp_path / "link",), "there is something at"),
        ((tmp_path / "copy", "--step", 15), "no checkpoint of step 15"),
        ((tmp_path / "copy", "--step", 10), "contents were changed (CRC-32 differs); nothing was exported"),
    ):
        status, out, err = call("ckpt", "export", run, *words)
        assert (status, out) == (2, "") and message in err, (words, err)
        assert sorted(os.listdir(tmp_path)) == before
    name = next(iter(manifest.read(open_saved(run).find(20)).files))
    (run / "checkpoints" / "20" / name).unlink()
    status, _, err = call("ckpt", "export", run, tmp_path / "copy")
    assert status == 2 and f"{name}: missing; nothing was exported" in err
    shutil.rmtree(part_of(run, 30))
    status, _, err = call("ckpt", "export", run, tmp_path / "copy", "--step", 30)
    assert status == 2 and "jaxops.json cannot be read" in err and sorted(os.listdir(tmp_path)) == before


def test_a_checkpoint_of_somebody_else_writes_nothing_outside(call, run, tmp_path):
    folder = open_saved(run).find(20)
    found = manifest.read(folder)
    (tmp_path / "secret").write_text("x")
    for name in ("../../../secret", str(tmp_path / "secret")):
        manifest.write(folder, manifest.dataclasses.replace(found, files={name: manifest.File(1, None), **found.files}))
        status, _, err = call("ckpt", "export", run, tmp_path / "copy", "--step", "20")
        assert status == 2 and "names a file outside of itself" in err
    assert sorted(os.listdir(tmp_path)) == ["a", "secret"]


def test_a_full_disk_leaves_nothing(call, run, tmp_path, monkeypatch):
    copy, left = export._copy_file, [3]

    def fails(source, target):
        left[0] -= 1
        if not left[0]:
            raise OSError(28, "No space left on device")
        return copy(source, target)

    monkeypatch.setattr(export, "_copy_file", fails)
    status, _, err = call("ckpt", "export", run, tmp_path / "copy")
    assert status == 1 and "cannot be written: [Errno 28] No space left on device; nothing of it was left" in err
    assert os.listdir(tmp_path) == ["a"]


@needs_moto
def test_out_of_a_store_and_into_one(call, s3, run, tmp_path):  # noqa: F811
    status, _, err = call("ckpt", "export", run, f"{s3}/copy")
    assert status == 0, err
    part = part_of(run, 20).name
    assert {name.split("/")[0] for name in objects(f"{s3}/copy")} == {"20", part}
    assert call("ckpt", "verify", f"{s3}/copy")[0] == 0
    assert call("ckpt", "export", run, f"{s3}/copy")[0] == 2
    assert call("ckpt", "export", f"{s3}/copy", tmp_path / "back")[0] == 0
    assert np.array_equal(Checkpoints(tmp_path / "back").load_params(20, "frozen")["b"], BASE * 2)
    flip(part_of(run, 10))
    assert call("ckpt", "export", run, f"{s3}/other", "--step", 10)[0] == 2 and objects(f"{s3}/other") == set()

"""Runs whose folder is in an object store: trained, interrupted, resumed on another machine, looked at, refused."""

import contextlib
import io
import json
import os
import subprocess
from pathlib import Path

import jax
import numpy as np
import pytest
from children import COMMAND
from object_stores import bucket_of, free_port, gs, move_to_new_machine, needs_moto, objects, s3  # noqa: F401
from tiny_runs import Stopped

from jaxops.cli.main import main
from jaxops.core import store_paths, stores
from jaxops.core.checkpoint import Checkpoints
from jaxops.core.failures import RunFailed, UserError
from jaxops.core.mesh import make_mesh
from jaxops.core.metrics_file import read_metrics
from jaxops.core.sharding import named_leaves
from jaxops.run.build import build_task, load_config
from jaxops.run.fit import fit
from jaxops.run.folder.lease import Lease
from jaxops.run.folder.log_parts import parts_of
from jaxops.run.folder.mirror import Mirror, pulled
from jaxops.run.load import load
from jaxops.run.summary import FinishedRun

pytestmark = [needs_moto, pytest.mark.usefixtures("no_report")]
REPOSITORY = Path(__file__).resolve().parents[2]
QUICK = ["run.log_every=1", "evaluate.baselines=false"]


def train(*overrides: str, stop_at: int | None = None, quiet: bool = True) -> FinishedRun:
    """A run on one device, which compiles soonest; `stop_at` has it interrupted at that step."""
    task = build_task(load_config("my.yaml", [*QUICK, *overrides]))
    mesh = make_mesh(devices=jax.devices()[:1])
    if stop_at is None:
        return fit(task, mesh, quiet=quiet)
    return fit(task, mesh, quiet=quiet, step=lambda parts: Stopped(parts.update, stop_at))


def curve(run: Path | str, name: str = "train/loss") -> dict[int, float]:
    lines = [line for line in read_metrics(Path(run) / "metrics.jsonl") if name in line]
    found = {line["step"]: line[name] for line in lines}
    assert len(found) == len(lines)  # no step twice
    return found


def saved(place: str, step: int) -> dict[str, np.ndarray]:
    with Checkpoints(f"{place}/checkpoints") as checkpoints:
        return dict(named_leaves(checkpoints.load_params(step, "")))


def said(*words: str) -> tuple[int, str]:
    """Status and output of a command."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        status = main(list(words))
    return status, out.getvalue()


def test_a_run_in_a_store_is_the_run_in_a_folder(folder, s3, monkeypatch, tmp_path):  # noqa: F811
    """Trained there, interrupted, resumed on a machine that has seen nothing, and looked at from a third."""
    whole = train("run.name=whole")
    at = f"run.dir={s3}/runs"
    first = train(at, "run.loggers=[tensorboard]", stop_at=7)
    assert (first.state, first.dir) == ("preempted", f"{s3}/runs/tiny")
    move_to_new_machine(monkeypatch, tmp_path / "second")
    second = train(at, "run.loggers=[tensorboard]")
    assert (second.state, second.summary["step"], second.dir) == ("finished", 20, f"{s3}/runs/tiny")

    names = objects(f"{s3}/runs/tiny")
    assert {"config.yaml", "data.json", "summary.json", "transform/item_ids.parquet"} <= names
    assert not [name for name in names if name.startswith(".")]  # no lock, no probe
    logs = parts_of(names)
    assert sorted(logs)[-1] == "metrics.jsonl" and sum("tfevents" in log for log in logs) == 2  # one of each machine

    move_to_new_machine(monkeypatch, tmp_path / "third")
    seen = pulled(f"{s3}/runs/tiny")
    assert curve(seen) == curve(whole.dir) and list(curve(seen)) == list(range(1, 21))
    assert curve(seen, "valid/ndcg@10") == curve(whole.dir, "valid/ndcg@10")
    ours, theirs = saved(f"{s3}/runs/tiny", 20), saved("runs/whole", 20)
    assert ours.keys() == theirs.keys()
    assert not [name for name in ours if ours[name].tobytes() != theirs[name].tobytes()]

    status, text = said("train", "my.yaml", at)
    assert status == 0 and f"{s3}/runs/tiny is finished (step 20); nothing to do" in text
    look_at(f"{s3}/runs/tiny", s3)


def look_at(run: str, bucket: str) -> None:
    """Every command that reads a run."""
    status, text = said("runs", f"{bucket}/runs", "--json")
    (listed,) = json.loads(text)["runs"]
    assert (status, listed["path"], listed["state"], listed["step"]) == (0, run, "finished", 20)
    assert json.loads(said("runs", bucket, "--json")[1])["runs"][0]["name"] == "runs/tiny"
    status, text = said("compare", run, "runs/whole", "--json")
    assert status == 0 and [side["step"] for side in json.loads(text)["runs"]] == [20, 20]
    status, text = said("ckpt", "list", run, "--json")
    assert [one["step"] for one in json.loads(text)["checkpoints"]] == [7, 10, 20]
    assert said("ckpt", "verify", run)[0] == 0 and said("ckpt", "show", run, "--step", "10")[0] == 0
    assert json.loads(said("evaluate", run, "--json")[1]).keys() >= {"test/ndcg@10"}
    assert said("predict", run, "plays.csv", "--top", "3", "--out", "recs.parquet")[0] == 0
    assert said("export", run, "vectors.parquet")[0] == 0
    assert said("config", "--diff", run, "runs/whole", "--json")[0] == 0
    model = load(run)
    np.testing.assert_array_equal(model.item_ids.values, load("runs/whole").item_ids.values)
    for missing, text in (
        (f"{run}-not", f"there is nothing at {run}-not"),
        ("s3://no-such-bucket/x", "there is no bucket 'no-such-bucket'"),
    ):
        for command in (["runs"], ["ckpt", "list"]):
            status, told = said(*command, missing)
            assert status == 2 and text in told, told
    status, told = said("evaluate", f"{run}-not")
    assert status == 2 and f"{run}-not is not a run folder: it has no config.yaml" in told


def test_a_damaged_checkpoint_is_passed_over(folder, s3):  # noqa: F811
    run = f"{s3}/tiny"
    train(f"run.dir={s3}")
    remote = store_paths.path(f"{run}/checkpoints/20")
    name = max(remote.files(), key=lambda name: remote.files()[name] * name.startswith("state/"))
    data = bytearray((remote / name).read_bytes())
    data[len(data) // 2] ^= 1
    (remote / name).write_bytes(bytes(data))
    status, text = said("ckpt", "verify", run)
    assert status == 1 and "step 20: DAMAGED" in text and "a resume takes step 10" in text
    with contextlib.redirect_stderr(io.StringIO()) as told:
        train(f"run.dir={s3}", "run.steps=25", quiet=False)
    text = " ".join(told.getvalue().split())
    assert "is damaged and is passed over" in text and f"resumed from step 10 of {run}" in text
    assert list(curve(pulled(run))) == list(range(1, 26))
    assert (remote / name).read_bytes() == bytes(data)  # nothing damaged is deleted


def test_who_is_trained_elsewhere_is_refused(folder, s3):  # noqa: F811
    store, place = bucket_of(f"{s3}/tiny")
    elsewhere = Lease(store, place.key, str(place))
    elsewhere.hold(print)
    with pytest.raises(UserError, match=rf"run {s3}/tiny is being trained by another process \(.*pid {os.getpid()}\)"):
        train(f"run.dir={s3}")
    (listed,) = json.loads(said("runs", s3, "--json")[1])["runs"] or [None]
    elsewhere.release()
    assert listed is None and objects(s3) == set()  # a lock is no run, and nothing was begun


@pytest.fixture
def no_compiles(monkeypatch):
    """Fails whatever builds a step."""

    def built(*args, **kwargs):
        raise AssertionError("something was built before the store was looked at")

    monkeypatch.setattr("jaxops.run.fit.build_training", built)


def test_a_missing_bucket_is_said_before_anything_is_built(folder, s3, no_compiles):  # noqa: F811
    with pytest.raises(UserError, match="s3://not-there/runs/tiny: there is no bucket 'not-there'"):
        train("run.dir=s3://not-there/runs")
    status, text = said("train", "my.yaml", "run.dir=s3://not-there/runs")
    assert status == 2 and "create it, or set run.dir" in " ".join(text.split())


def test_missing_credentials_are_said_before_anything_is_built(folder, s3, no_compiles, monkeypatch):  # noqa: F811
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_METADATA_ENDPOINT", f"http://127.0.0.1:{free_port()}")
    with pytest.raises(UserError, match=f"{s3}/runs/tiny: no credentials were found"):
        train(f"run.dir={s3}/runs")


def test_a_scheme_that_is_not_known_is_an_error_of_the_config(folder):
    with pytest.raises(Exception, match=r"run.dir.*ftp:// is not known; object stores are s3://BUCKET"):
        load_config("my.yaml", ["run.dir=ftp://somewhere/runs"])


def test_what_is_no_run_is_not_written_over(folder, s3, no_compiles):  # noqa: F811
    (store_paths.path(s3) / "tiny" / "thesis.tex").write_text("dear to someone")
    with pytest.raises(UserError, match=f"run folder {s3}/tiny is not empty and holds no config.yaml .thesis.tex"):
        train(f"run.dir={s3}")


def test_a_config_that_differs_is_refused(folder, s3, no_compiles):  # noqa: F811
    (store_paths.path(s3) / "tiny" / "config.yaml").write_text(Path("my.yaml").read_text().replace("rec/sasrec", "x"))
    with pytest.raises(UserError, match=f"run folder {s3}/tiny belongs to another config"):
        train(f"run.dir={s3}", "run.seed=1")


def test_records_that_do_not_get_there_fail_the_run(folder, s3, monkeypatch):  # noqa: F811
    """No run ends well without its last upload: here the summary's."""
    write = stores.Store.write

    def refuse(self, key, *args, **options):
        if key.endswith("summary.json"):
            raise stores.Denied(f"may not write {key}")
        return write(self, key, *args, **options)

    monkeypatch.setattr(stores.Store, "write", refuse)
    with pytest.raises(RunFailed, match=r"could not be brought there: may not write tiny/summary.json"):
        train(f"run.dir={s3}", "run.steps=2", "evaluate.every=2")
    assert "summary.json" not in objects(f"{s3}/tiny")


@pytest.mark.slow
def test_a_run_in_googles_store(folder, gs, monkeypatch, tmp_path):  # noqa: F811
    whole = train("run.name=whole")
    train(f"run.dir={gs}/runs", stop_at=7)
    move_to_new_machine(monkeypatch, tmp_path / "second")
    assert train(f"run.dir={gs}/runs").dir == f"{gs}/runs/tiny"
    move_to_new_machine(monkeypatch, tmp_path / "third")
    assert curve(pulled(f"{gs}/runs/tiny")) == curve(whole.dir)
    assert said("ckpt", "verify", f"{gs}/runs/tiny")[0] == 0 and load(f"{gs}/runs/tiny").step == 20


@pytest.mark.slow
def test_another_run_is_begun_with_its_parameters(folder, s3):  # noqa: F811
    train(f"run.dir={s3}", "run.steps=10")
    with contextlib.redirect_stderr(io.StringIO()) as told:
        train("run.name=warm", "run.steps=1", f"init_from.run={s3}/tiny", quiet=False)
    assert f"init_from {s3}/tiny: " in " ".join(told.getvalue().split())


@pytest.mark.slow
def test_a_killed_run_is_resumed_at_once_on_its_machine(folder, s3):  # noqa: F811
    """kill -9: the lock in the store stays, and no checkpoint is ahead of its logs."""
    run = f"{s3}/tiny"
    own = "data={fn: 'ownpkg.data:make'}"
    train("run.name=whole", own)
    command = [*COMMAND, "train", "my.yaml", f"run.dir={s3}", own, *QUICK, "checkpoint.every=3"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OWNPKG_SLEEP": "0.2"}
    child = subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL)
    try:
        while child.poll() is None and "checkpoints/6/jaxops.json" not in objects(run):
            pass
    finally:
        child.kill()
        child.wait()
    assert ".owner.json" in objects(run)
    assert max(curve(pulled(run))) >= 6
    train(f"run.dir={s3}", own, "checkpoint.every=3")
    assert curve(pulled(run)) == pytest.approx(curve("runs/whole"), rel=1e-5)
    assert not Mirror(run).store.head("tiny/.owner.json")

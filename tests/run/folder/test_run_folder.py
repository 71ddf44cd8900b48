"""Whether a config may go on in a folder, and who holds it."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import yaml

from jaxops.config.dump import dump_yaml
from jaxops.core.failures import UserError
from jaxops.run.build import completed, load_config
from jaxops.run.config import MAY_CHANGE_ON_RESUME
from jaxops.run.folder.run_folder import RunFolder


@pytest.fixture
def begun(folder: Path) -> RunFolder:
    """The folder of a run that has its config and nothing else."""
    place = RunFolder("runs/tiny", complete=completed)
    place.path.mkdir(parents=True)
    place.write_text("config.yaml", dump_yaml(load_config("my.yaml").resolved))
    return place


def test_nothing_is_there_yet(folder):
    assert not RunFolder("runs/tiny").check(load_config("my.yaml").resolved)
    assert not Path("runs").exists()
    Path("runs/tiny").mkdir(parents=True)
    assert not RunFolder("runs/tiny").check(load_config("my.yaml").resolved)


@pytest.mark.parametrize(
    "overrides",
    [
        ["mesh={data: 2, fsdp: 4}", "batch.microbatch=8", "sharding.logical={vocab: null}"],
        ["run.steps=null", "run.epochs=3", "run.log_every=1", "run.loggers=[tensorboard]", "run.profile={start: 1}"],
        ["evaluate.every=3", "evaluate.batch=64", "evaluate.baselines=false", "evaluate.stop={metric: hr@10}"],
        ["checkpoint={every: 3s, keep: 1, keep_every: 7, best: mrr@10}"],
    ],
)
def test_what_may_change_on_resume(begun, overrides):
    assert begun.check(load_config("my.yaml", overrides).resolved)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("run.seed=1", "run.seed: 0 there, 1 here"),
        ("batch.global=32", "batch.global: 16 there, 32 here"),
        ("optimizer.schedule=linear", 'optimizer.schedule.kind: "constant" there, "linear" here'),
        ("evaluate.metrics=[ndcg@10]", 'evaluate.metrics: ["hr@10", "ndcg@10", "mrr@10"] there, ["ndcg@10"] here'),
        ("data.min_count.item=2", "data.min_count.item: 1 there, 2 here"),
        ("objective.kind=bce", "objective.negatives: nothing there, 1 here"),
    ],
)
def test_what_may_not_is_refused_with_the_difference(begun, override, said):
    with pytest.raises(UserError) as caught:
        begun.check(load_config("my.yaml", [override]).resolved)
    message = str(caught.value)
    assert f"\n  {said}\n" in message and ", ".join(MAY_CHANGE_ON_RESUME) in message
    assert "init_from.run=runs/tiny" in message


def test_a_field_that_is_younger_than_the_run_has_its_default(begun):
    old = begun.config()
    del old["nonfinite"], old["batch"]["pack"], old["optimizer"]["ema"]
    begun.write_text("config.yaml", yaml.safe_dump(old))
    assert begun.check(load_config("my.yaml").resolved)
    with pytest.raises(UserError, match=r'objective\.kind: "softmax" there, "bce" here'):
        begun.check(load_config("my.yaml", ["objective={kind: bce}"]).resolved)


def test_a_folder_that_a_kill_left_half_made_is_made_again(folder):
    place = RunFolder("runs/tiny")
    (place.path / "transform").mkdir(parents=True)
    (place.path / ".data.json.tmp").write_text("{")
    (place.path / ".lock").write_text("pid 1")
    assert not place.check(load_config("my.yaml").resolved)
    (place.path / "thesis.tex").write_text("")
    with pytest.raises(UserError, match=r"holds no config.yaml \(.*thesis.tex.*\): not a run; set run.name"):
        place.check(load_config("my.yaml").resolved)


def test_other_data_under_the_same_config_is_refused(begun):
    here = load_config("my.yaml").resolved
    begun.write_json("data.json", {"split": {"sha256": "aa"}})
    assert begun.check(here, {"split": {"sha256": "aa"}}) and begun.check(here, {}) and begun.check(here)
    with pytest.raises(
        UserError, match=r"no longer what the run began with \(SHA-256 of the split aa there, bb here\)"
    ):
        begun.check(here, {"split": {"sha256": "bb"}})


def test_one_holds_a_run_and_leaves_no_trace(begun):
    with begun.locked():
        assert (begun.path / ".lock").read_text() == f"pid {os.getpid()}"
        with pytest.raises(UserError, match=rf"trained by another process \(pid {os.getpid()}\)"), begun.locked():
            pass
    assert (begun.path / ".lock").read_text() == ""
    with begun.locked():
        pass


def test_a_lock_takes_back_what_it_made_when_no_run_began(folder):
    with RunFolder("deep/runs/tiny").locked():
        assert Path("deep/runs/tiny/.lock").exists()
    assert not Path("deep").exists()
    Path("deep").mkdir()
    with pytest.raises(ZeroDivisionError), RunFolder("deep/runs/tiny").locked():
        1 / 0  # noqa: B018
    assert list(Path("deep").iterdir()) == []


def test_what_json_has_no_word_for_is_null(folder):

    place = RunFolder(".")
    place.write_json("x.json", {"a": np.float32("nan"), "b": np.arange(2), "c": (np.inf, {1: np.int64(3)})})
    assert json.loads(Path("x.json").read_text()) == {"a": None, "b": [0, 1], "c": [None, {"1": 3}]}
    assert place.summary() == {}


def test_all_of_a_run_in_the_home_folder_lies_there(folder, monkeypatch):
    """Arrow expands `~` by itself: a part of the run lay in the home folder, the rest in a folder called ~."""
    monkeypatch.setenv("HOME", str(folder / "me"))
    run = RunFolder("~/runs/tiny")
    assert run.path == folder / "me/runs/tiny" and not run.check(load_config("my.yaml").resolved)
    run.create(load_config("my.yaml").resolved, {"item_ids": np.arange(3)}, {"kind": "interactions"})
    assert not Path("~").exists()
    assert {path.name for path in run.path.iterdir()} == {"config.yaml", "data.json", "transform"}
    assert run.transform("item_ids").tolist() == [0, 1, 2] and run.checkpoints == run.path / "checkpoints"


def test_an_array_that_the_run_did_not_write_is_refused(folder):
    run, there = RunFolder("runs/tiny"), Path("runs/tiny/transform")
    run.create({}, {"a": np.arange(3), "b/c": np.ones((2, 4))}, {})
    assert run.transform("b/c").shape == (2, 4) and run.has_transform("b/c") and not run.has_transform("d")
    (there / "a.parquet").write_bytes((there / "b%2Fc.parquet").read_bytes())
    with pytest.raises(UserError, match=r"a.parquet is not what the run wrote"):
        run.transform("a")
    digests = json.loads((there / "digests.json").read_text())
    (there / "digests.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match=r"digests.json: expected a JSON object"):
        run.transform("b/c")
    (there / "digests.json").write_text(json.dumps({"a": digests["a"]}))
    with pytest.raises(UserError, match=r"b%2Fc.parquet is not what the run wrote"):
        run.transform("b/c")
    (there / "digests.json").unlink()  # a folder from before there were digests
    assert run.transform("b/c").shape == (2, 4)

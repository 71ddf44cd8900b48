"""A run folder received from somebody else runs no code, reads no secrets and writes nothing outside of itself."""

import json
import os
import shutil
from pathlib import Path

import pytest
import yaml

import jaxops as jx
from jaxops.cli.main import main
from jaxops.core.failures import UserError
from jaxops.data import scratch
from jaxops.run.trust import is_own, record_own, trust_of

pytestmark = pytest.mark.usefixtures("no_report")
QUICK = ["evaluate.baselines=false", "run.steps=10"]


def change(where: str, /, **sections) -> None:
    """The config of a run with other sections, as somebody else may have written it."""
    file = Path(where, "config.yaml")
    values = yaml.safe_load(file.read_text())
    for name, section in sections.items():
        values[name] = {**values[name], **section} if isinstance(section, dict) and "fn" not in section else section
    file.write_text(yaml.safe_dump(values))


def refused(capsys, *command: str) -> str:
    assert main(list(command)) == 2
    return capsys.readouterr().err


def test_evaluating_a_run_of_somebody_else_runs_nothing_that_it_names(finished, capsys):
    change("runs/tiny", data={"fn": "os:system", "command": "touch hacked"})
    said = refused(capsys, "evaluate", "runs/tiny")
    assert "data.fn: os:system" in said and "--trust os" in said and not Path("hacked").exists()
    with pytest.raises(UserError, match=r"data\.fn: os:system"):
        jx.load("runs/tiny").evaluate()
    assert not Path("hacked").exists()


@pytest.mark.parametrize("command", ["evaluate", "predict", "export"])
def test_a_model_by_path_is_not_built(finished, capsys, command):
    change("runs/tiny", model={"fn": "os:mkdir", "mode": 511})
    rest = {"predict": ["plays.csv", "--out", "p.parquet"], "export": ["v.parquet"]}.get(command, [])
    assert "model.fn: os:mkdir" in refused(capsys, command, "runs/tiny", *rest)


@pytest.mark.parametrize("command", ["evaluate", "predict", "export", "train"])
def test_a_family_by_path_is_not_imported(finished, capsys, command):
    Path("evil.py").write_text("open('hacked', 'w')\nFAMILY = 1\n")
    change("runs/tiny", task="evil:FAMILY")
    rest = {"predict": ["plays.csv", "--out", "p.parquet"], "export": ["v.parquet"]}.get(command, [])
    subject = "my.yaml" if command == "train" else "runs/tiny"  # whose folder is runs/tiny
    said = refused(capsys, command, subject, *rest)
    assert "evil:FAMILY" in said and not Path("hacked").exists()


def test_a_run_to_begin_with_imports_nothing(finished, capsys):
    Path("evil.py").write_text("open('hacked', 'w')\nFAMILY = 1\n")
    change("runs/tiny", task="evil:FAMILY")
    said = refused(capsys, "train", "my.yaml", "run.name=next", "init_from={run: runs/tiny}", *QUICK)
    assert "task: evil:FAMILY" in said and not Path("hacked").exists()


def test_a_loss_by_path_never_kept_anybody_from_predicting(finished):
    change("runs/tiny", objective={"fn": "nowhere:loss"})
    assert main(["predict", "runs/tiny", "plays.csv", "--out", "p.parquet"]) == 0
    assert main(["evaluate", "runs/tiny", "--json"]) == 0
    assert main(["export", "runs/tiny", "v.parquet"]) == 0


def test_trust_lets_a_package_in_and_what_it_imports_not(finished, capsys):
    change("runs/tiny", data={"fn": "ownpkg.data:os.system", "command": "touch hacked"})
    said = refused(capsys, "evaluate", "runs/tiny", "--trust", "ownpkg")
    assert "(it leads to): os" in said and not Path("hacked").exists()
    Path("ownpkg", "more.py").write_text("from os import system\n")
    change("runs/tiny", data={"fn": "ownpkg.more:system", "command": "touch hacked"})
    assert "posix:system" in refused(capsys, "evaluate", "runs/tiny", "--trust", "ownpkg")
    assert not Path("hacked").exists()


def test_a_run_of_ones_own_is_known_wherever_it_lies(folder, capsys):
    assert main(["train", "my.yaml", "data={fn: 'ownpkg.data:make', seed: 3}", *QUICK]) == 0
    shutil.move("runs/tiny", "elsewhere")
    assert main(["evaluate", "elsewhere", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    change("elsewhere", run={"seed": 1})  # now it is not what was trained
    assert "data.fn: ownpkg.data:make" in refused(capsys, "evaluate", "elsewhere")
    assert main(["evaluate", "elsewhere", "--json", "--trust", "ownpkg.data"]) == 0
    assert json.loads(capsys.readouterr().out)["test/hr@10"] == values["test/hr@10"]
    assert jx.load("elsewhere", trust=["ownpkg"]).evaluate()["test/hr@10"] == values["test/hr@10"]
    assert "ownpkg.data:make" in refused(capsys, "evaluate", "elsewhere", "--trust", "ownp")  # no half names


def test_a_run_of_an_older_version_becomes_known_by_its_command(folder, capsys, monkeypatch, tmp_path):
    command = ["train", "my.yaml", "data={fn: 'ownpkg.data:make', seed: 3}", *QUICK]
    assert main(command) == 0
    monkeypatch.setenv("JAXOPS_STATE", str(tmp_path / "state"))
    assert "names code by import path" in refused(capsys, "evaluate", "runs/tiny")
    assert main(command) == 0  # it is finished: nothing is trained
    assert main(["evaluate", "runs/tiny"]) == 0


def test_a_resolved_config_is_not_expanded_again(finished, capsys, monkeypatch):
    monkeypatch.setenv("WHEREABOUTS", "plays.csv")
    change("runs/tiny", data={"path": "${env:WHEREABOUTS}"})
    assert "${env:WHEREABOUTS}" in refused(capsys, "evaluate", "runs/tiny")


def test_secrets_are_read_for_a_run_of_ones_own_alone(folder, capsys, monkeypatch):
    monkeypatch.setenv("ROW_TOKEN", "1000003")
    Path("ownpkg", "private.py").write_text(
        "from ownpkg.data import Source\n"
        "def make(token):\n    with open('read', 'a') as file: file.write(token)\n    return Source()\n"
    )
    assert main(["train", "my.yaml", "data={fn: 'ownpkg.private:make', token: '${secret:ROW_TOKEN}'}", *QUICK]) == 0
    assert main(["evaluate", "runs/tiny"]) == 0
    assert Path("read").read_text() == "1000003" * 2
    change("runs/tiny", run={"seed": 1})
    said = refused(capsys, "evaluate", "runs/tiny", "--trust", "ownpkg")
    assert "${secret:ROW_TOKEN}" in said and Path("read").read_text() == "1000003" * 2


def test_a_data_cache_is_built_for_a_run_of_ones_own_alone(finished, capsys):
    assert main(["evaluate", "runs/tiny", "--json"]) == 0
    plain = json.loads(capsys.readouterr().out)
    change("runs/tiny", data={"cache": "outside"})
    before = {path: path.stat().st_mtime_ns for path in Path().rglob("*") if path.is_file()}
    assert main(["evaluate", "runs/tiny", "--json"]) == 0
    out = capsys.readouterr()
    assert json.loads(out.out) == pytest.approx(plain) and "data.cache: outside" in out.err
    assert {path: path.stat().st_mtime_ns for path in Path().rglob("*") if path.is_file()} == before
    assert main(["train", "my.yaml", "data.cache=outside", "run.name=own", *QUICK]) == 0
    shutil.rmtree("outside")
    assert main(["evaluate", "runs/own"]) == 0 and Path("outside").is_dir()


def test_the_record_is_of_this_user_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXOPS_STATE", str(tmp_path / "state"))
    values = {"task": "rec", "run": {"name": "a", "seed": 1}}
    assert not is_own(values) and record_own(values, "runs/a") == "" and is_own(values)
    assert not is_own({"task": "rec", "run": {"name": "a", "seed": 2}})
    folder = tmp_path / "state" / "runs"
    assert folder.stat().st_mode & 0o077 == 0
    assert [file.stat().st_mode & 0o077 for file in folder.iterdir()] == [0]


def test_what_a_killed_process_left_of_a_record_is_swept(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXOPS_STATE", str(tmp_path / "state"))
    assert record_own({"task": "rec"}, "runs/a") == ""
    (record,) = (tmp_path / "state" / "runs").iterdir()
    for there in (True, False):
        if not there:
            record.unlink()
        left = record.with_name(f".{record.name}.scratch-{scratch._kernel()}-x")
        left.mkdir()
        (left / scratch.LOCK).touch()  # which nobody holds
        assert record_own({"task": "rec"}, "runs/a") == "" and list(record.parent.iterdir()) == [record]


def test_a_state_folder_that_cannot_be_written_to_is_told(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("JAXOPS_STATE", str(tmp_path / "file" / "state"))
    assert "JAXOPS_STATE" in record_own({"task": "rec"}, "runs/a") and not is_own({"task": "rec"})


def test_a_prefix_is_a_name():
    with pytest.raises(UserError, match="expected a package"):
        trust_of({}, "runs/a", [""])


def test_nothing_is_recorded_for_what_never_trained(finished):
    records = Path(os.environ["JAXOPS_STATE"], "runs")
    before = sorted(records.iterdir())
    change("runs/tiny", run={"seed": 99})
    assert main(["evaluate", "runs/tiny"]) == 0 and main(["runs"]) == 0
    assert sorted(records.iterdir()) == before

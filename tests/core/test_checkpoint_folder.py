"""Which checkpoints are there, which are good and which may go, on folders without any arrays."""

import pytest
from etils import epath

from jaxops.core import manifest
from jaxops.core.checkpoint_folder import CheckpointFolder, Retention, some
from jaxops.core.failures import UserError
from jaxops.core.manifest import Manifest


def saved(step, serial, **metrics):
    return Manifest(step=step, serial=serial, meta={}, metrics=metrics, arrays={})


class Run:
    """A folder with checkpoints of one small file each."""

    def __init__(self, path):
        self.path = path / "checkpoints"
        self.folder = CheckpointFolder(self.path)
        self.serial = 0

    def add(self, step, name=None, commit=True, **metrics):
        self.serial += 1
        path = epath.Path(self.path / (name or str(step)))
        (path / "state").mkdir(parents=True)
        (path / "state" / "data").write_text(f"contents {self.serial}")
        if commit:
            files = manifest.survey(path, checksums=True)
            whole = Manifest(step=step, serial=self.serial, meta={}, metrics=metrics, arrays={}, files=files)
            manifest.write(path, whole)
        return path

    def retire(self, **rules):
        self.folder.retire(Retention(**rules))
        return sorted(self.folder.steps())


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path)


def test_nothing_was_saved(run):
    assert run.folder.steps() == run.folder.readable() == {}
    assert run.folder.newest_good(pytest.fail) is None
    with pytest.raises(UserError, match=r"no checkpoint of step 3 in .*checkpoints; there are none"):
        run.folder.find(3)


def test_only_folders_with_a_manifest_count(run):
    run.add(10)
    run.add(20, commit=False)
    run.add(30, name="30.orbax-checkpoint-tmp")
    run.add(40, name="backup-40")
    run.add(50, name="50.old")
    (run.path / "60").write_text("a file")
    assert list(run.folder.steps()) == [10]


def test_an_unknown_step_is_told_which_there_are(run):
    run.add(10)
    run.add(20)
    with pytest.raises(UserError, match=r"no checkpoint of step 15 in .*; there are steps 10, 20"):
        run.folder.open(15)


def test_a_folder_that_cannot_be_listed(tmp_path):
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    with pytest.raises(UserError, match=r"cannot read the checkpoint folder .*/checkpoints"):
        CheckpointFolder(tmp_path / "checkpoints").steps()


def test_a_step_saved_again_is_its_newest_whole_edition(run):
    first = run.add(20)
    assert run.folder.edition(10) == 1
    assert run.folder.edition(20) == 2
    assert run.folder.at(20, 1) == first
    second = run.add(20, name=run.folder.at(20, 2).name, commit=False)
    assert second.name == "20-2"
    assert run.folder.find(20) == first
    assert run.folder.edition(20) == 3
    third = run.add(20, name="20-3")
    assert run.folder.find(20) == third
    assert run.retire(keep=5) == [20]
    assert not first.exists() and third.exists()


def test_keep_the_newest(run):
    for step in (10, 20, 30, 40):
        run.add(step)
    assert run.retire(keep=2) == [30, 40]
    assert run.retire(keep=1) == [40]


def test_the_newest_is_the_one_saved_last(run):
    """After a run went back to an earlier step, steps of the abandoned future are old."""
    for step in (10, 20, 30, 15):
        run.add(step)
    assert run.folder.newest_good(pytest.fail) == 15
    assert run.retire(keep=2) == [15, 30]


def test_keep_every(run):
    for step in range(10, 70, 10):
        run.add(step)
    assert run.retire(keep=1, keep_every=20) == [20, 40, 60]


@pytest.mark.parametrize(("mode", "expected"), [("max", [20, 40]), ("min", [30, 40])])
def test_keep_the_best(run, mode, expected):
    for step, loss in ((10, 2.0), (20, 3.0), (30, 1.0), (40, 1.5)):
        run.add(step, loss=loss)
    assert run.retire(keep=1, best="loss", best_mode=mode) == expected


def test_the_best_of_equals_is_the_first_and_those_without_the_metric_are_none():
    retention = Retention(keep=1, best="hr")
    runs = {5: saved(5, 1), 10: saved(10, 3, hr=0.5), 20: saved(20, 2, hr=0.5), 30: saved(30, 4, other=9.0)}
    assert retention.best_of(runs) == 20
    assert retention.kept(runs) == {20, 30}
    assert Retention(best="hr").best_of({5: saved(5, 1)}) is None
    assert Retention().best_of(runs) is None


def test_all_rules_together():
    runs = {step: saved(step, step, hr=1.0 / step) for step in range(1, 11)}
    assert Retention(keep=2, keep_every=4, best="hr").kept(runs) == {1, 4, 8, 9, 10}


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"keep": 0}, "keep must be at least 1, got 0"),
        ({"keep_every": 0}, "keep_every must be at least 1, got 0"),
        ({"best_mode": "most"}, "best_mode must be 'max' or 'min', got 'most'"),
    ],
)
def test_bad_rules(rules, message):
    with pytest.raises(UserError, match=message):
        Retention(**rules)


def test_damaged_ones_neither_count_nor_go(run):
    for step in (10, 20, 30, 40):
        run.add(step)
    (run.path / "40" / "state" / "data").write_text("cut")
    (run.path / "30" / "jaxops.json").write_text("{")
    assert run.retire(keep=1) == [20, 30, 40]


def test_what_was_passed_over_as_damaged_does_not_push_out_a_good_one(run):
    """A flipped byte is seen by the search, not by retention's look at sizes."""
    for step in (10, 20):
        run.add(step)
    data = run.path / "20" / "state" / "data"
    data.write_text(data.read_text().replace("c", "C"))
    assert run.retire(keep=2) == [10, 20]
    warnings = []
    assert run.folder.newest_good(warnings.append) == 10
    assert len(warnings) == 1
    run.add(30)
    assert run.retire(keep=2) == [10, 20, 30]


def test_the_search_goes_back_to_the_newest_good_one_and_says_what_it_passes(run):
    for step in (10, 20, 30, 40):
        run.add(step)
    (run.path / "40" / "state" / "data").unlink()
    (run.path / "30" / "jaxops.json").write_text("{")
    (run.path / "20" / "state" / "data").write_text("CONTENTS 2")
    before = sorted(path.relative_to(run.path) for path in run.path.rglob("*"))
    warnings = []
    assert run.folder.newest_good(warnings.append) == 10
    assert ["WARNING: checkpoint " in warning for warning in warnings] == [True] * 3
    assert "30 is damaged and is passed over: jaxops.json cannot be read" in warnings[0]
    assert "40 is damaged and is passed over: state/data: missing" in warnings[1]
    assert "20 is damaged and is passed over: state/data: contents were changed" in warnings[2]
    assert sorted(path.relative_to(run.path) for path in run.path.rglob("*")) == before


def test_the_sweep_removes_what_is_unfinished_and_nothing_else(run):
    run.add(10)
    run.add(20, commit=False)
    run.add(30, name="30.orbax-checkpoint-tmp")
    run.add(30, name="30-2.orbax-checkpoint-tmp-1700000000")
    run.add(40, name="notes")
    (run.path / "readme.txt").write_text("mine")
    damaged = run.add(50)
    (damaged / "jaxops.json").write_text("{")
    run.folder.sweep()
    assert sorted(path.name for path in run.path.iterdir()) == ["10", "50", "notes", "readme.txt"]


def test_folders_of_somebody_else_stay_whatever_their_names(run):
    """Notes in a folder named by a year, one that looks like a shared part, and the first edition of a step."""
    for name in ("2023", "9", "notes-0123456789abcdef", "30"):
        (run.path / name).mkdir(parents=True)
        (run.path / name / "notes.txt").write_text("precious")
    for step in (10, 20):
        run.add(step)
    run.add(30, name=run.folder.at(30, run.folder.edition(30)).name)
    run.folder.sweep()
    assert run.retire(keep=1) == [30]
    there = sorted(path.name for path in run.path.iterdir())
    assert there == ["2023", "30", "30-2", "9", "notes-0123456789abcdef"]
    assert len(list(run.path.glob("*/notes.txt"))) == 4


def test_nothing_is_changed_through_a_link_and_a_linked_checkpoint_is_read(run, tmp_path):
    for step in (10, 20):
        run.add(step)
    elsewhere = tmp_path / "elsewhere"
    (run.path / "10").rename(elsewhere)
    (run.path / "10").symlink_to(elsewhere)
    (tmp_path / "half" / "state").mkdir(parents=True)
    (run.path / "15").symlink_to(tmp_path / "half")
    (run.path / "25.orbax-checkpoint-tmp").symlink_to(tmp_path / "half")
    before = sorted(path for path in tmp_path.glob("e*/**/*"))
    run.folder.sweep()
    assert run.retire(keep=1) == [10, 20]
    assert sorted(path for path in tmp_path.glob("e*/**/*")) == before and (tmp_path / "half" / "state").is_dir()
    assert run.folder.find(10).name == "10" and run.folder.problems(*run.folder.open(10), checksums=True) == []
    (elsewhere / "state" / "data").write_text("CONTENTS 1")  # damaged there: told, and nothing is noted there
    (run.path / "20" / "state" / "data").write_text("x")
    assert run.folder.newest_good([].append) is None
    run.retire(keep=1)
    assert not (elsewhere / "jaxops.damaged").exists() and (run.path / "20" / "jaxops.damaged").exists()


def test_deleting_takes_the_manifest_first(run, monkeypatch):
    run.add(10)
    run.add(20)

    def killed(self, missing_ok=False):
        raise KeyboardInterrupt

    monkeypatch.setattr(type(epath.Path("/")), "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        run.folder.retire(Retention(keep=1))
    assert list(run.folder.steps()) == [20]


def test_remote_paths_are_left_as_they_are():
    assert CheckpointFolder("gs://bucket/run").remote
    assert str(CheckpointFolder("s3://bucket/run").path) == "s3://bucket/run"
    assert not CheckpointFolder("runs/x").remote


def test_some():
    assert some([1, 2, 3]) == "1, 2, 3"
    assert some([1, 2, 3], 2) == "1, 2 and 1 more"

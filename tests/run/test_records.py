"""The records of a resumed run are those of one that never stopped, line by line."""

from pathlib import Path

import pytest
from run_records import assert_same_records, shown
from tiny_runs import Stopped, curve

from jaxops.core.mesh import make_mesh
from jaxops.core.writers import Writers
from jaxops.run.build import build_task, load_config
from jaxops.run.fit import FinishedRun, fit

pytestmark = pytest.mark.usefixtures("no_report")
QUICK = ["evaluate.baselines=false", "run.log_every=5", "run.loggers=[tensorboard]"]
WRITE = Writers.write


def train(run: str, *overrides: str, **kwargs) -> FinishedRun:
    task = build_task(load_config("my.yaml", [*QUICK, f"run.name={run}", *overrides]))
    return fit(task, make_mesh(data=-1), quiet=True, **kwargs)


def stopped(run: str, at: int, *overrides: str) -> FinishedRun:
    return train(run, *overrides, step=lambda parts: Stopped(parts.update, at))


@pytest.mark.parametrize("stops", [*(pytest.param(x, marks=pytest.mark.slow) for x in ((7,), (8, 4))), (12, 1)])
def test_an_interrupt_inside_a_window_leaves_no_line_of_its_own(folder, stops):
    """Windows of 5, evaluations of 6 (each ends a window): the lines are those of 5, 6, 10, 12, 15, 18, 20."""
    rule = ["evaluate.every=6", "checkpoint.every=1000"]
    train("whole", *rule)
    for at in stops:
        assert stopped("parts", at, *rule).state == "preempted"
    assert train("parts", *rule).state == "finished"
    assert list(curve("whole")) == [5, 6, 10, 12, 15, 18, 20]
    assert_same_records("runs/parts", "runs/whole")


class Killed(BaseException):
    """Nothing catches it: the run ends there, as by a kill."""


def killing(*args, **kwargs):
    raise Killed


@pytest.mark.parametrize("place", [pytest.param("write_summary", marks=pytest.mark.slow), "Writers.write"])
def test_a_kill_after_the_last_evaluation_leaves_its_lines_once(folder, monkeypatch, place):
    train("whole")

    def killed(*args):
        if place == "write_summary" or any(name.startswith("test/") for name in args[2]):
            raise Killed

    for _ in range(2):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            if place == "write_summary":
                patch.setattr("jaxops.run.ending.write_summary", killed)
            else:
                patch.setattr(Writers, "write", lambda *args: (killed(*args), WRITE(*args)))
            train("parts")
    assert train("parts").state == "finished"
    assert_same_records("runs/parts", "runs/whole")
    assert [step for step, _ in shown("runs/parts")["test/ndcg@10"]] == [20]


def test_a_kill_between_an_evaluation_and_its_save_leaves_its_lines_once(folder, monkeypatch):
    """The interrupt came before the evaluation that was due; it is made up for, and killed before its save."""
    rule = ["checkpoint.best=ndcg@10"]
    train("whole", *rule)
    stopped("parts", 10, *rule)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("jaxops.run.training_run.TrainingRun._save", killing)
        train("parts", *rule)
    assert 10 in curve("parts", "valid/ndcg@10")
    assert train("parts", *rule).state == "finished"
    assert_same_records("runs/parts", "runs/whole")


def test_what_was_logged_before_a_checkpoint_is_in_tensorboard_after_a_kill(folder, monkeypatch):
    """SIGKILL takes the ten seconds that TensorBoard's file is behind; what a checkpoint counts on is in it."""

    def lose_what_is_buffered(writer):
        path = Path(writer._file.path)
        before = path.read_bytes()
        writer._file.close()
        path.write_bytes(before)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("jaxops.core.loggers.TensorBoardWriter.close", lose_what_is_buffered)
        patch.setattr("jaxops.core.loggers.TensorBoardWriter.FLUSH_SECONDS", 1e9)
        patch.setattr("jaxops.run.training_run.TrainingRun._conclude", killing)
        train("parts", "checkpoint.every=5")
    assert [step for step, _ in shown("runs/parts")["train/loss"]][-1] == 20

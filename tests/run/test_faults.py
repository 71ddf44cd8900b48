"""What befalls a run from outside: its folder is deleted or moved, it is killed between its last files."""

import json
import shutil
import time
from pathlib import Path

import pytest
from tiny_runs import Stopped

from jaxops.cli.main import main
from jaxops.core.checkpoint import Checkpoints
from jaxops.core.failures import RunFailed
from jaxops.core.mesh import make_mesh
from jaxops.run.build import build_task, load_config
from jaxops.run.fit import fit

QUICK = ["evaluate.baselines=false", "run.log_every=5", "checkpoint.every=10"]


class Struck(Stopped):
    """A step after whose `at`-th call something is done to the run folder."""

    def __init__(self, step, at: int, strike):
        super().__init__(step, 1 << 30)
        self.at, self.strike = at, strike

    def __call__(self, *args):
        self.at -= 1
        if self.at == 0:
            time.sleep(1.0)  # the save of step 10 is whole
            self.strike(Path("runs/parts"))
        return super().__call__(*args)


def struck(at, strike, *overrides):
    task = build_task(load_config("my.yaml", [*QUICK, "run.name=parts", *overrides]))
    return fit(task, make_mesh(data=-1), quiet=True, step=lambda parts: Struck(parts.update, at, strike))


@pytest.mark.parametrize(
    ("strike", "left"),
    [
        (shutil.rmtree, []),
        (lambda run: run.rename("moved"), []),
        (lambda run: (run / "metrics.jsonl").unlink(), None),
        (lambda run: (run / "config.yaml").unlink(), None),
    ],
    ids=["deleted", "moved", "metrics.jsonl", "config.yaml"],
)
def test_a_run_whose_folder_goes_stops_and_says_so(folder, no_report, strike, left):
    with pytest.raises(RunFailed, match="was deleted"):
        struck(12, strike)
    if left is not None:
        assert not Path("runs/parts").exists() or list(Path("runs/parts").rglob("*")) == left
    if Path("moved").exists():
        with Checkpoints("moved/checkpoints") as checkpoints:
            assert checkpoints.steps() == [10]


def test_a_kill_between_summary_and_report_is_made_up_for(finished, capsys):
    (finished / "report.html").unlink()
    left = finished / f".report.html.{'0' * 32}"
    left.write_text("half")
    assert main(["train", "my.yaml", "run.loggers=[tensorboard]"]) == 0
    said = capsys.readouterr().err
    assert "is finished (step 20)" in said and "report: runs/tiny/report.html" in said
    assert not left.exists()
    page = (finished / "report.html").read_text()
    assert "<svg" in page and "tiny" in page


def test_the_report_of_any_folder_can_be_made_again(finished, capsys):
    (finished / "report.html").unlink()
    assert main(["report", "tiny"]) == 0  # the name of a run in runs/ will do
    assert capsys.readouterr().out == "report: runs/tiny/report.html\n"
    assert "<svg" in (finished / "report.html").read_text()
    finished.rename("elsewhere")
    for name in ("config.yaml", "summary.json", "about.json"):
        Path("elsewhere", name).unlink()
    assert main(["report", "elsewhere"]) == 0
    Path("empty").mkdir()
    assert main(["report", "empty"]) == 2 and main(["report", "elsewere"]) == 2
    said = capsys.readouterr().err
    assert "empty is not a run" in said and "there is no folder elsewere; did you mean 'elsewhere'?" in said


def test_temporary_files_that_kills_left_are_swept_at_the_next_start(finished, no_report):
    left = [f".metrics.jsonl.{'a' * 32}", ".config.yaml.tmp", f"processes/.0.json.{'0' * 32}"]
    kept = [".notes", ".vimrc.swp", "tmp"]
    for name in (*left, *kept):
        (finished / name).write_text("x")
    assert main(["train", "my.yaml", "run.loggers=[tensorboard]", "run.steps=22"]) == 0
    assert not any((finished / name).exists() for name in left)
    assert all((finished / name).exists() for name in kept)
    assert json.loads((finished / "summary.json").read_text())["step"] == 22

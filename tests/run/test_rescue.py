"""A run whose folder is deleted while it trains saves elsewhere, where it was asked to, and goes on from there."""

import json
import shutil
import threading
import time
from pathlib import Path

import pytest
from test_faults import QUICK, struck

from jaxops.cli.main import main
from jaxops.core.checkpoint import Checkpoints
from jaxops.core.failures import RunFailed
from jaxops.core.sharding import named_leaves

SAFE = ["checkpoint.rescue=safe", "checkpoint.every=5"]
TOLD = r"runs/parts was deleted or moved .* Step 15 was saved in safe/parts: the same command with run.dir=safe"


def everything(folder: str, step: int):
    with Checkpoints(f"{folder}/checkpoints") as checkpoints:
        assert checkpoints.verify(step) == []
        return {name: leaf.tobytes() for name, leaf in named_leaves(checkpoints.load_params(step, ""))}


def test_the_state_is_saved_elsewhere(folder, no_report, capsys):
    with pytest.raises(RunFailed, match=TOLD):
        struck(12, lambda run: run.rename("moved"), *SAFE)
    assert not Path("runs/parts").exists()
    with Checkpoints("safe/parts/checkpoints") as checkpoints:
        assert checkpoints.steps() == [15] and checkpoints.meta(15)["cursor"] == 15 * 16
    assert len(everything("safe/parts", 15)) > 40
    assert {path.name for path in Path("safe/parts").iterdir()} >= {"config.yaml", "data.json", "transform"}
    # the next run of this name would find no place
    assert main(["train", "my.yaml", *QUICK, *SAFE, "run.name=parts"]) == 2
    assert "checkpoint.rescue: safe/parts is there already" in capsys.readouterr().err
    assert not Path("runs/parts/config.yaml").exists()


def test_a_folder_that_is_just_being_deleted_is_gone(folder, no_report):
    """`rm -rf` takes files one by one: the records may be gone a while before config.yaml is."""
    deleting = []

    def strike(run: Path) -> None:
        (run / "metrics.jsonl").unlink()

        def rest() -> None:
            for at, file in enumerate(sorted(run.rglob("*.parquet"))):
                time.sleep(0.3 * (at < 3))
                file.unlink()
            shutil.rmtree(run)

        deleting.append(threading.Thread(target=rest))
        deleting[0].start()

    with pytest.raises(RunFailed, match=TOLD):
        struck(12, strike, *SAFE)
    deleting[0].join()
    assert not Path("runs/parts").exists()
    with Checkpoints("safe/parts/checkpoints") as checkpoints:
        assert checkpoints.steps() == [15]


@pytest.mark.slow
def test_the_run_that_goes_on_is_the_run_that_was_never_struck(folder, no_report, capsys):
    with pytest.raises(RunFailed, match=TOLD):
        struck(12, shutil.rmtree, *SAFE)
    keep = "checkpoint={every: 5, keep: 9, best: null}"  # the best checkpoint before step 15 is lost with the folder
    assert main(["train", "my.yaml", *QUICK, "run.name=whole", keep]) == 0
    assert main(["train", "my.yaml", *QUICK, "run.name=parts", "run.dir=safe", keep]) == 0
    assert "resumed from step 15 of safe/parts/checkpoints" in capsys.readouterr().err
    assert everything("safe/parts", 20) == everything("runs/whole", 20)
    ended = [json.loads(Path(run, "summary.json").read_text()) for run in ("safe/parts", "runs/whole")]
    ours, theirs = ({key: value for key, value in one.items() if key.startswith(("valid/", "test/"))} for one in ended)
    assert ours == theirs and len(ours) >= 6


def test_a_folder_that_is_there_but_cannot_be_written_stops_the_run_as_ever(folder, no_report, monkeypatch):
    monkeypatch.setattr("jaxops.run.rescue.PATIENCE", 0.2)
    with pytest.raises(RunFailed, match=r"metrics.jsonl was deleted"):
        struck(12, lambda run: (run / "metrics.jsonl").unlink(), *SAFE)
    assert not Path("safe").exists()


def test_a_rescue_that_fails_too_says_both(folder, no_report):
    def strike(run: Path) -> None:
        run.rename("moved")
        Path("safe").write_text("a file")

    with pytest.raises(RunFailed, match=r"was deleted or moved .*; it could not be saved elsewhere either: .*safe"):
        struck(12, strike, *SAFE)


def test_the_rescue_is_a_local_folder(folder, capsys):
    assert main(["config", "my.yaml", "checkpoint.rescue=s3://lake/runs"]) == 2
    assert "checkpoint.rescue [override" in (said := capsys.readouterr().err) and "expected a local folder" in said


@pytest.mark.parametrize("place", ["runs", "./runs/", "safe/../runs"])
def test_the_rescue_is_another_folder_than_the_runs_own(folder, capsys, place):
    assert main(["train", "my.yaml", *QUICK, f"checkpoint.rescue={place}"]) == 2
    assert "checkpoint.rescue [override" in (said := capsys.readouterr().err) and "is run.dir (runs) itself" in said
    assert not Path("runs").exists()

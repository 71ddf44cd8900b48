"""The metrics of a run as a table, and as a picture."""

import datetime as dt
import json

import pyarrow as pa
import pytest

from jaxops.core.failures import UserError
from jaxops.report.history import history, plot
from jaxops.run.summary import FinishedRun

LINES = [
    {"v": 1, "step": 5, "time": 1_700_000_000.25, "train/loss": 2.0, "train/lr": 0.1},
    {"v": 1, "step": 10, "time": 1_700_000_001.0, "train/loss": None, "train/lr": 0.1},
    {"v": 1, "step": 10, "time": 1_700_000_002.0, "valid/hr@10": 0.25},
    {"v": 1, "step": 10, "time": 1_700_000_003.0, "event": "skipped", "text": "1 update"},
    {"v": 1, "step": 15, "time": 1_700_000_004.0, "train/loss": 1.0, "train/lr": 0.1},
]


@pytest.fixture
def run(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES) + '{"v": 1, "ste')
    return FinishedRun(tmp_path, {}, "finished")


def test_a_row_for_each_step_and_a_column_for_each_metric(run):
    table = run.history()
    assert table.column_names == ["step", "time", "train/loss", "train/lr", "valid/hr@10"]
    assert table["step"].to_pylist() == [5, 10, 15]
    assert table["train/loss"].to_pylist() == [2.0, None, 1.0]
    assert table["valid/hr@10"].to_pylist() == [None, 0.25, None]
    assert table["time"][0].as_py() == dt.datetime(2023, 11, 14, 22, 13, 20, 250_000, tzinfo=dt.UTC)
    assert table.schema.field("train/lr").type == pa.float64()


def test_nothing_logged_is_an_empty_table_and_no_picture(tmp_path):
    assert history(tmp_path).num_rows == 0
    with pytest.raises(UserError, match="neither a training loss nor"):
        plot(tmp_path)


def test_a_picture_shows_what_was_logged(run):
    figure = run.plot("train/loss", "valid/hr@10")
    lines = [axes.lines[0] for axes in figure.axes]
    assert lines[0].get_xydata().tolist() == [[5, 2.0], [15, 1.0]]
    assert lines[1].get_xydata().tolist() == [[10, 0.25]]
    assert [axes.get_ylabel() for axes in run.plot().axes] == ["train/loss", "valid/hr@10"]


def test_a_notebook_shows_the_picture(run):
    assert run.plot("train/loss")._repr_png_().startswith(b"\x89PNG")


def test_an_unknown_metric_gets_the_nearest_name(run):
    with pytest.raises(UserError, match=r"no metric 'train/los' was logged; did you mean 'train/loss'\?"):
        run.plot("train/los")


def test_a_finished_run_is_shown_in_one_short_line():
    many = {f"valid/hr@{k}": 0.123456 for k in range(7)}
    shown = repr(FinishedRun("runs/mine", {"step": 12, "versions": {"jax": "0"}, "wall_s": 3.0, **many}, "finished"))
    assert shown.startswith("FinishedRun('runs/mine', finished at step 12; valid/hr@0: 0.1235, ") and len(shown) < 200
    assert shown.endswith("valid/hr@5: 0.1235, ...)")
    assert repr(FinishedRun("runs/mine", {}, "interrupted")).endswith("no metrics)")

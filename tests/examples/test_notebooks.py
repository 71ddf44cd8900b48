"""The notebooks run from their first cell to their last, and what they say at the end is so."""

import json
from pathlib import Path

import pytest
from run_notebook import run_notebook

NOTEBOOKS = sorted((Path(__file__).resolve().parents[2] / "examples" / "notebooks").glob("*.ipynb"))


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder in which a notebook may change the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.mkdtemp", lambda: str(tmp_path))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_code_is_python_and_outputs_name_no_folder_of_the_author(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    for number, cell in enumerate(cells):
        if cell["cell_type"] == "code":
            compile("".join(cell["source"]), f"{path.name}[{number}]", "exec")
    assert cells[0]["cell_type"] == "markdown" and "/home/" not in path.read_text(encoding="utf-8")


@pytest.mark.slow
def test_own_data_frame(place):
    found = run_notebook(str(NOTEBOOKS[0]))
    summary = found["run"].summary
    assert summary["test/ndcg@10"] > 3 * summary["baseline/item_knn/test/ndcg@10"]
    assert found["smooth"].state == "finished"


@pytest.mark.slow
def test_votes_to_policy(place):
    found = run_notebook(str(NOTEBOOKS[1]))
    assert found["reward"].summary["valid/accuracy"] > 0.75
    assert found["share"]["after"] > found["share"]["before"] + 0.2

"""`init_from`: rows go to the same ids in every parameter that has a row for each, and the count is told."""

import csv
from pathlib import Path

import numpy as np
import pytest

from jaxops.cli.main import main
from jaxops.data.ids import Ids
from jaxops.run.load import load
from jaxops.run.warm_start import shared_rows

pytestmark = pytest.mark.usefixtures("no_report")
STILL = ["run.steps=1", "optimizer.lr=1e-12", "evaluate.baselines=false", "init_from.run=runs/tiny"]
OWN = """
import jax, jax.numpy as jnp

class Untied:
    length = 6

    def __init__(self, data, dim=8, declared=None):
        self.items, self.dim = data.n_items, dim
        if declared is not None:
            self.item_rows = tuple(declared)

    def init(self, key):
        one, two = jax.random.split(key)
        shape = (self.items + 1, self.dim)
        return {"read": jax.random.normal(one, shape), "scored": jax.random.normal(two, shape)}

    def encode(self, params, batch, key):
        return jnp.cumsum(params["read"][batch["items"]], axis=1)

    def item_vectors(self, params):
        return params["scored"]
"""


def rename(items):
    """plays.csv with other items: the rows of all that stay move."""
    with open("plays.csv") as file:
        rows = [{**row, "item": items.get(row["item"], row["item"])} for row in csv.DictReader(file)]
    with open("today.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, ["user", "item", "time"])
        writer.writeheader()
        writer.writerows(rows)


def vectors(run):
    return {row["item"]: np.array(row["vector"]) for row in load(run).item_vectors().to_pylist()}


def test_item_vectors_go_to_the_same_items(finished, capsys):
    """i05 was retired and a00 is new, so that i00 to i04 lie one row further down; the padded shapes agree."""
    rename({"i05": "a00"})
    for average in ([], ["optimizer.ema=0.5"]):
        name = f"next{len(average)}"
        assert main(["train", "my.yaml", "data.path=today.csv", f"run.name={name}", *STILL, *average]) == 0
        said = " ".join(capsys.readouterr().err.split())
        assert "19 parameters loaded; item/embedding by ids: 29 rows taken, 1 new, 1 gone" in said
        before, after = vectors("runs/tiny"), vectors(f"runs/{name}")
        for item in before.keys() & after.keys():
            np.testing.assert_allclose(after[item], before[item], atol=1e-7, err_msg=item)
        assert min(np.abs(after["a00"] - vector).max() for vector in before.values()) > 1e-3


def test_rows_go_to_their_ids_where_the_matrix_has_another_size(finished, capsys):
    """More ids than the matrix of 128 rows has room for: what was skipped for its shape is taken over now."""
    more = "".join(
        f"u{user:02},b{item:03},9{user}\n" for user in range(10) for item in range(10 * user, 10 * user + 10)
    )
    Path("today.csv").write_text(Path("plays.csv").read_text() + more)
    assert main(["train", "my.yaml", "data.path=today.csv", "run.name=next", *STILL]) == 0
    assert "item/embedding by ids: 30 rows taken, 100 new, 0 gone" in " ".join(capsys.readouterr().err.split())
    before, after = vectors("runs/tiny"), vectors("runs/next")
    assert len(after) == 130
    for item, vector in before.items():
        np.testing.assert_allclose(after[item], vector, atol=1e-7)


def test_no_common_item_leaves_the_matrix_fresh(finished, capsys):
    rename({f"i{number:02}": f"z{number:02}" for number in range(30)})
    assert main(["train", "my.yaml", "data.path=today.csv", "run.name=next", *STILL]) == 0
    assert "item/embedding by ids: 0 rows taken, 30 new, 30 gone" in " ".join(capsys.readouterr().err.split())
    before, after = vectors("runs/tiny"), vectors("runs/next")
    closest = [min(np.abs(vector - other).max() for other in before.values()) for vector in after.values()]
    assert min(closest) > 1e-3


def test_a_pattern_may_leave_the_items_out_or_take_them_alone(finished, capsys):
    rename({"i05": "a00"})
    train = ["train", "my.yaml", "data.path=today.csv", *STILL]
    assert main([*train, "run.name=without", "init_from.match=block"]) == 0
    assert "by ids" not in capsys.readouterr().err
    assert main([*train, "run.name=alone", "init_from.match=^item/", "optimizer.ema=0.5"]) == 0
    assert "0 parameters loaded; item/embedding by ids: 29 rows taken" in " ".join(capsys.readouterr().err.split())
    before, after = vectors("runs/tiny"), vectors("runs/alone")
    np.testing.assert_allclose(after["i20"], before["i20"], atol=1e-7)
    assert np.abs(vectors("runs/without")["i20"] - before["i20"]).max() > 1e-3


@pytest.mark.parametrize("declared, moved", [("", {"read", "scored"}), (", declared: [scored]", {"scored"})])
def test_a_model_of_ones_own(folder, capsys, declared, moved):
    """Every matrix with a row for each item is carried by ids, or those that the model names."""
    Path("ownpkg/models.py").write_text(OWN)
    base = ["train", "my.yaml", f"model={{fn: 'ownpkg.models:Untied'{declared}}}", "evaluate.baselines=false"]
    assert main([*base, "run.steps=1"]) == 0
    rename({"i05": "a00"})
    capsys.readouterr()
    assert main([*base, "data.path=today.csv", "run.name=next", *STILL]) == 0
    said = " ".join(capsys.readouterr().err.split())
    before, after = load("runs/tiny"), load("runs/next")
    for name in ("read", "scored"):
        assert (f"{name} by ids: 29 rows taken, 1 new, 1 gone" in said) == (name in moved)
        theirs = np.asarray(before.params[name])[before.item_ids.rows(np.array(["i04", "i29"]))]
        mine = np.asarray(after.params[name])[after.item_ids.rows(np.array(["i04", "i29"]))]
        assert (np.abs(mine - theirs).max() < 1e-6) == (name in moved), name


def test_shared_rows_by_hand():
    here, there = Ids(np.array([2, 3, 9]), 1), Ids(np.array([1, 3, 4, 9]), 1)
    assert [rows.tolist() for rows in shared_rows(here, there)] == [[2, 3], [2, 4]]
    assert [rows.tolist() for rows in shared_rows(here, Ids(np.array([b"3"]), 1))] == [[], []]

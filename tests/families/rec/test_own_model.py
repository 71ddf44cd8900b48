"""A model of the user's own by import path trains, serves and resumes as one of ours does; its parts are looked at."""

import functools
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_runs import furnish, working_in

import jaxops as jx
from jaxops.cli.main import main
from jaxops.core.failures import UserError

MODELS = """\
import jax
import jax.numpy as jnp
from jaxops.models.inputs import pooled


class Mean:
    def __init__(self, n_items, width, length):
        self.rows, self.width, self.length = n_items + 1, width, length

    def init(self, key):
        return {"item": 0.1 * jax.random.normal(key, (self.rows, self.width))}

    def encode(self, params, batch, key):
        rows = params["item"][batch["items"]] * (batch["items"] > 0)[..., None].astype(params["item"].dtype)
        return jnp.cumsum(rows, axis=1) / jnp.arange(1.0, rows.shape[1] + 1)[None, :, None]

    def item_vectors(self, params):
        return params["item"]


def mine(data, width=8, length=6):
    return Mean(data.n_items, width, length)


class Sum:
    def __init__(self, data):
        self.data = data

    def init(self, key):
        return {"bias": jnp.zeros(())}

    def apply(self, params, batch, key):
        return params["bias"] + sum(pooled(batch, one).sum(-1) for one in self.data.inputs)


def clicks(data):
    return Sum(data)


def none(data):
    return 3


class Short:
    def init(self, key): ...
    def encode(self, params, batch): ...
    def item_vectors(self, params): ...
    length = 6


def short(data):
    return Short()


def endless(data):
    made = Mean(data.n_items, 8, 6)
    made.length = "six"
    return made
"""
OWN = "model={fn: 'ownmodels:mine', width: 12}"


@pytest.fixture
def folder(tmp_path):
    furnish(tmp_path)
    (tmp_path / "ownmodels.py").write_text(MODELS)
    text = (tmp_path / "my.yaml").read_text().replace("model: {dim: 8, layers: 1, heads: 2, length: 6}\n", "")
    (tmp_path / "my.yaml").write_text(text)
    with working_in(tmp_path):
        yield tmp_path
    sys.modules.pop("ownmodels", None)


def test_a_sequence_model_of_ones_own_trains_serves_and_resumes(folder, no_report):
    assert main(["train", "my.yaml", OWN, "run.steps=10"]) == 0
    assert main(["train", "my.yaml", OWN, "run.steps=20"]) == 0
    summary = json.loads(Path("runs/tiny/summary.json").read_text())
    assert summary["step"] == 20
    model = jx.load("runs/tiny")
    assert model.params["item"].shape == (31, 12)
    assert model.evaluate()["test/ndcg@10"] == pytest.approx(summary["test/ndcg@10"], abs=1e-6)
    assert len(model.predict("plays.csv", top=2)) == 120 and len(model.item_vectors()) == 30
    assert json.loads(Path("runs/tiny/about.json").read_text())["model"] == "ownmodels:mine"


def test_every_layout_agrees(folder):
    task = jx.build_task(jx.load_config("my.yaml", [OWN, "objective={kind: bce}"]))
    jx.testing.check(task, layouts=({"data": 8},), accumulations=(1,), steps=2)


def test_from_python_it_is_written_as_the_config_would(folder, no_report):
    sys.path.insert(0, str(folder))
    import ownmodels

    task = jx.build_task(jx.load_config("my.yaml"), model=functools.partial(ownmodels.mine, width=4))
    assert task.resolved["model"] == {"fn": "ownmodels:mine", "width": 4}
    assert task.model.init(__import__("jax").random.key(0))["item"].shape == (31, 4)


def test_a_click_model_of_ones_own(folder, no_report):
    draw = np.random.default_rng(0)
    rows = [f"{draw.integers(2)},s{draw.integers(4)}" for _ in range(120)]
    Path("clicks.csv").write_text("\n".join(["label,shop", *rows]) + "\n")
    Path("clicks.yaml").write_text(
        "task: rec\ndata: {kind: clicks, path: clicks.csv, categorical: [shop]}\n"
        "tables: {shop: {dim: 2}}\nmodel: ownmodels:clicks\nobjective: {kind: clicks}\nbatch: {global: 16}\n"
        "evaluate: {metrics: [log_loss], batch: 16}\ncheckpoint: {best: log_loss}\n"
        "run: {name: c, steps: 6, loggers: []}\n"
    )
    assert main(["train", "clicks.yaml"]) == 0
    found = jx.load("runs/c").predict("clicks.csv")["click"].to_numpy()
    assert len(found) == 120 and ((found > 0) & (found < 1)).all()


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ("ownmodels:none", r"what the factory returned \(int\) has no init, encode, item_vectors, length"),
        ("ownmodels:short", r"encode: it is called as \(params, batch, key\), but it takes \(params, batch\)"),
        ("ownmodels:endless", "length: expected a positive whole number, got 'six'"),
        ("ownmodels:minee", "did you mean 'mine'"),
        ("{fn: 'ownmodels:mine', widht: 3}", "did you mean 'width'"),
    ],
)
def test_what_is_no_model_is_told_before_anything_is_written(folder, model, said):
    with pytest.raises(UserError, match=said):
        jx.build_task(jx.load_config("my.yaml", [f"model={model}"]))
    assert not Path("runs").exists()

"""What a run folder is good for afterwards: evaluate, predict and export, without the mesh that wrote it."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxops.cli.main import main
from jaxops.core.checkpoint import Checkpoints
from jaxops.core.failures import UserError
from jaxops.run.load import load

pytestmark = pytest.mark.usefixtures("no_report")
REPOSITORY = Path(__file__).resolve().parents[2]
ALONE = """
import sys
from jaxops.cli.main import main
for argv in (
    ["evaluate", "runs/tiny", "--json", "--cpu-devices", "1"],
    ["predict", "runs/tiny", "plays.csv", "--top", "5", "--out", "alone.parquet"],
    ["export", "runs/tiny", "vectors"],
):
    assert main(argv) == 0, argv
"""


def summary(run: Path) -> dict:
    return json.loads((run / "summary.json").read_text())


def seen() -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    with open("plays.csv") as file:
        for row in csv.DictReader(file):
            found.setdefault(row["user"], set()).add(row["item"])
    return found


def lists(path: str) -> dict[str, list[str]]:
    """Each user's items by rank; ranks begin at one and have no holes, scores fall."""
    found: dict[str, list[str]] = {}
    scores: dict[str, list[float]] = {}
    for row in pq.read_table(path).to_pylist():
        found.setdefault(row["user"], []).append(row["item"])
        scores.setdefault(row["user"], []).append(row["score"])
        assert row["rank"] == len(found[row["user"]])
    assert all(values == sorted(values, reverse=True) for values in scores.values())
    return found


def saved_params(run: Path, prefix: str = "params") -> dict:
    with Checkpoints(run / "checkpoints") as checkpoints:
        return checkpoints.load_params(summary(run)["best_step"], prefix)


@pytest.mark.latest
def test_evaluate_gives_the_numbers_of_the_summary(finished, capsys):
    assert main(["evaluate", "runs/tiny", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found.pop("step") == summary(finished)["best_step"]
    assert found.keys() == {
        f"{part}/{metric}" for part in ("valid", "test") for metric in ("hr@10", "ndcg@10", "mrr@10")
    }
    for name, value in found.items():
        assert value == pytest.approx(summary(finished)[name], abs=1e-7)
    assert main(["evaluate", "runs/tiny", "--step", "10"]) == 0
    said = capsys.readouterr().out
    assert "runs/tiny, step 10" in said and "ndcg@10" in said and "model" in said


def test_one_device_without_the_mesh_gives_the_same(finished, capsys):
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, "-c", ALONE], env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    said, _, rest = done.stdout.partition("}\n")
    for name, value in json.loads(said + "}").items():
        expected = summary(finished)["best_step" if name == "step" else name]
        assert value == pytest.approx(expected, abs=1e-6)
    assert rest == "300 rows -> alone.parquet\n60 users asked for\n30 item vectors -> vectors/part-00000.parquet\n"
    assert main(["predict", "runs/tiny", "plays.csv", "--top", "5", "--out", "here.parquet"]) == 0
    assert lists("alone.parquet") == lists("here.parquet")


@pytest.mark.latest
def test_predict_for_events_gives_original_ids_and_nothing_that_was_seen(finished, capsys):
    events = [("zoe", "i03", 5), ("zoe", "i04", 6), ("bob", "i07", 1), ("bob", "i99", 2), ("new", "i98", 3)]
    columns = zip(*events, strict=True)
    table = pa.table(dict(zip(("user", "item", "time"), (list(c) for c in columns), strict=True)))
    pq.write_table(table, "events.parquet")
    assert main(["predict", "runs/tiny", "events.parquet", "--top", "50", "--out", "out"]) == 0
    said = capsys.readouterr().out
    assert said.splitlines() == [
        "57 rows -> out/part-00000.parquet",
        "2 users asked for",
        "1 user left out: the model knows nothing of what they did",
        "2 events left out: items that the model does not know",
        "2 users with fewer than 50 items: no more are left to recommend that they have not had (repeats: exclude)",
    ]
    found = lists("out/part-00000.parquet")
    everything = {f"i{number:02}" for number in range(30)}
    assert set(found["zoe"]) == everything - {"i03", "i04"} and len(found["zoe"]) == 28
    assert set(found["bob"]) == everything - {"i07"} and len(found["bob"]) == 29
    assert os.listdir("out") == ["part-00000.parquet"]


def test_predict_for_users_of_the_run_looks_their_history_up(finished, capsys):
    Path("users.csv").write_text("user\nu03\nnobody\nu41\n")
    assert main(["predict", "runs/tiny", "users.csv", "--top", "4", "--out", "some.parquet"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "8 rows -> some.parquet",
        "2 users asked for",
        "1 user left out: the model knows nothing of what they did",
    ]
    found, known = lists("some.parquet"), seen()
    assert list(found) == ["u03", "u41"]
    assert all(len(items) == 4 and not set(items) & known[user] for user, items in found.items())
    assert main(["predict", "runs/tiny", "plays.csv", "--top", "4", "--out", "all.parquet"]) == 0
    every = lists("all.parquet")
    assert len(every) == 60 and {user: every[user] for user in found} == found
    assert all(not set(items) & known[user] for user, items in every.items())


def test_a_batch_of_users_is_no_different_from_one(finished):
    model = load(finished)
    whole, parts = model.predict("plays.csv", 3), model.predict("plays.csv", 3, batch=7)
    assert whole.drop_columns("score") == parts.drop_columns("score")
    np.testing.assert_allclose(whole["score"].to_numpy(), parts["score"].to_numpy(), rtol=1e-5)


def test_a_prediction_is_what_the_scores_say(finished):
    """Against numpy: the dot products of the last state with the item vectors, seen items left out."""
    model = load(finished)
    items = [int(item[1:]) + 1 for item in ("i02", "i09", "i16")]
    batch = {"items": jnp.array([[0, 0, 0, *items]], jnp.int32), "id": jnp.zeros(1, jnp.int32)}
    hidden = np.asarray(model.model.encode(model.params, batch, None))[0, -1].astype(np.float64)
    scores = np.asarray(model.params["item"]["embedding"], np.float64)[1:31] @ hidden
    scores[[item - 1 for item in items]] = -np.inf
    Path("one.csv").write_text("user,item,time\n" + "".join(f"me,i{item - 1:02},{t}\n" for t, item in enumerate(items)))
    table = model.predict("one.csv", 6)
    assert table["item"].to_pylist() == [f"i{row:02}" for row in np.argsort(-scores)[:6]]
    np.testing.assert_allclose(table["score"].to_numpy(), np.sort(scores)[::-1][:6], rtol=1e-4, atol=1e-6)


@pytest.mark.latest
def test_export_writes_the_item_vectors_with_their_ids(finished, capsys):
    assert main(["export", "runs/tiny", "vectors.parquet"]) == 0
    assert capsys.readouterr().out == "30 item vectors -> vectors.parquet\n"
    table = pq.read_table("vectors.parquet")
    assert table["item"].to_pylist() == [f"i{number:02}" for number in range(30)]
    vectors = np.stack(table["vector"].to_numpy())
    expected = saved_params(finished)["item"]["embedding"][1:31]
    assert vectors.dtype == np.float32 and vectors.shape == (30, 8) and np.array_equal(vectors, expected)


def test_a_run_with_an_average_serves_the_average(folder, capsys):
    small = ["run.steps=10", "optimizer.ema=0.9", "optimizer.lr=0.05", "evaluate.baselines=false"]
    frozen = ["optimizer.frozen=['norm/scale']", "objective={kind: bce}"]
    assert main(["train", "my.yaml", *small, *frozen]) == 0
    run = Path("runs/tiny")
    model, average, params = load(run), saved_params(run, "extra/ema"), saved_params(run)
    ours = model.params["item"]["embedding"]
    assert np.array_equal(ours, average["item"]["embedding"])
    assert np.abs(ours - params["item"]["embedding"]).max() > 1e-3
    assert np.array_equal(model.params["norm"]["scale"], np.ones(8))  # frozen, so it is not in the average
    assert "scale" not in average["norm"]
    values = model.evaluate()
    assert values == pytest.approx({name: summary(run)[name] for name in values}, abs=1e-7)


def test_data_that_changed_is_refused(finished):
    with open("plays.csv", "a") as file:
        file.writelines(f"u99,i{number},{number}\n" for number in range(90, 95))
    model = load(finished)
    with pytest.raises(UserError, match="the run's data has changed since: 35 items there now, not the 30"):
        model.evaluate()
    Path("users.csv").write_text("user\nu03\n")
    with pytest.raises(UserError, match="the run's data has changed since"):
        model.predict("users.csv")
    model.predict("plays.csv")  # histories of one's own need no data


def test_evaluation_needs_no_code_of_the_objective(folder, capsys):
    small = ["run.steps=2", "evaluate.baselines=false", "objective={fn: 'ownpkg.losses:focal', gamma: 1.5}"]
    assert main(["train", "my.yaml", *small]) == 0
    Path("ownpkg/losses.py").unlink()
    for name in [name for name in sys.modules if name.startswith("ownpkg")]:
        del sys.modules[name]
    assert main(["evaluate", "runs/tiny"]) == 0
    assert main(["export", "runs/tiny", "v.parquet"]) == 0

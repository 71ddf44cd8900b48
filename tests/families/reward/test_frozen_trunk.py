"""Heads on frozen weights: the features that are computed once are those that the whole model has of the texts."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pytest
from small_data import ratings
from tiny_gguf import small_smollm2

import jaxops as jx
from jaxops.cli.main import main
from jaxops.core.failures import UserError
from jaxops.core.sharding import named_leaves
from jaxops.core.weights import load_weights, targets_of, with_arrays
from jaxops.families.reward.trunk import Trunk
from jaxops.run.folder.run_folder import RunFolder

OVERRIDES = ["data.length=24", "batch.global=16", "run.steps=4", "evaluate.every=2", "checkpoint.every=2"]
OVERRIDES += ["run.log_every=2", "run.loggers=[]", "optimizer.schedule=constant", "reference=16", "evaluate.batch=32"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def place(cache, tmp_path, monkeypatch):
    """The tiny model and few ratings under the names that the config has; the cache outlives a test."""
    monkeypatch.setenv("JAXOPS_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)
    small_smollm2(monkeypatch)
    ratings(monkeypatch)
    return tmp_path


def task_of(*overrides):
    return jx.build_task(jx.load_config("reward/ratings_smollm2", [*OVERRIDES, *overrides]))


def loaded(task):
    """The parameters that a fresh run of the task has."""
    arrays, _ = load_weights(targets_of(task.model.shapes), task.start())
    return jax.tree.map(jnp.asarray, with_arrays(task.model.init(jax.random.key(1)), arrays))


def test_features_are_what_the_whole_model_reads(place):
    """Loss and gradient of the heads on features are those of a model that reads the tokens, padded as they are."""
    frozen, whole = task_of(), task_of("model.frozen=false")
    params, batch = loaded(whole), whole.source.batch(0, 16)
    featured = frozen.source.batch(0, 16)
    assert {name: x.shape for name, x in featured.items()} == {
        **{name: x.shape for name, x in batch.items()},
        "features": (16, 2, 32),
    }
    for name, values in batch.items():
        np.testing.assert_array_equal(featured[name], values, err_msg=name)

    def loss(task, batch):
        def mean(heads):
            found = task.objective({**params, "reward": heads}, jax.tree.map(jnp.asarray, batch), None)
            return found["loss/preference"].total / found["loss/preference"].count

        return jax.value_and_grad(mean)(params["reward"])

    (value, gradient), (wanted, slope) = loss(frozen, featured), loss(whole, batch)
    np.testing.assert_allclose(value, wanted, rtol=1e-5)
    largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(slope))
    for (path, found), (_, expected) in zip(named_leaves(gradient), named_leaves(slope), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5 * largest, err_msg=path)


@pytest.mark.slow
@pytest.mark.usefixtures("no_report")
def test_a_run_trains_the_heads_alone_and_is_served_whole(place, capsys):
    for steps in (2, 4):  # the second call goes on
        assert main(["train", "reward/ratings_smollm2", *OVERRIDES, f"run.steps={steps}"]) == 0
    summary = json.loads(Path("runs/ratings-smollm2/summary.json").read_text())
    assert "resumed from step 2" in capsys.readouterr().err
    model = jx.load("runs/ratings-smollm2")
    held, begun = dict(named_leaves(model.saved.weights.params)), dict(named_leaves(loaded(task_of())))
    for path, value in held.items():
        if path != "reward/bias":  # pairs determine no level
            assert np.array_equal(value, begun[path]) is not path.startswith("reward/"), path
    assert model.evaluate()["valid/log_loss"] == summary["valid/log_loss"]
    # What is served reads the texts themselves: accuracy on the held-out judgements is the run's own.
    pairs = task_of().evaluation.pairs
    texts = [model.tokenizer.decode(pairs.texts.of(at).tolist()) for at in range(len(pairs.texts))]
    scores = np.array(model.predict(pa.table({"text": texts}))["score"])[pairs.sides]
    decided = pairs.label != 0.5
    right = (np.sign(scores[:, 0] - scores[:, 1]) == np.sign(pairs.label - 0.5))[decided]
    assert right.mean() == pytest.approx(model.evaluate()["valid/accuracy"], abs=1e-12)


def test_features_are_computed_once(place, cache, monkeypatch):
    task_of()
    monkeypatch.setattr(Trunk, "features", lambda *_: pytest.fail("computed again"))
    before = task_of().source.batch(0, 8)["features"]
    assert isinstance(task_of().evaluation.pairs.texts.features, np.memmap)
    monkeypatch.undo()
    monkeypatch.setenv("JAXOPS_CACHE", str(cache))
    monkeypatch.chdir(place)
    with pytest.MonkeyPatch.context() as patch:
        small_smollm2(patch)
        ratings(patch)
        for file in (cache / "features").glob("*.npy"):
            content = bytearray(file.read_bytes())
            content[-3] ^= 64
            file.write_bytes(content)
        np.testing.assert_array_equal(task_of().source.batch(0, 8)["features"], before)  # damaged: computed again


def test_other_weights_under_a_run_are_refused(place):
    task = task_of()
    folder = RunFolder(place / "runs/x")
    folder.create(task.resolved, task.transform, task.inspection)
    changed = {**task.inspection, "features": {"sha256": "another"}}
    with pytest.raises(UserError, match="SHA-256 of the features"):
        folder.check(task.resolved, changed)


@pytest.mark.slow
def test_every_layout_trains_alike(place):
    assert jx.testing.check(task_of(), layouts=({"data": 2, "fsdp": 2, "tensor": 2},), accumulations=(2,), steps=2)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.lora={rank: 2}", "model.lora"),
        ("model.dropout=0.1", "model.dropout"),
        ("init_from={run: runs/other}", "init_from"),
    ],
)
def test_what_does_not_go_with_frozen_weights_is_told(place, capsys, override, said):
    assert main(["train", "reward/ratings_smollm2", *OVERRIDES, override]) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error

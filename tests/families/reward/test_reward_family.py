"""The reward family, whole: trained, resumed, evaluated, served normalised, and begun with other weights."""

import itertools
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pytest

import jaxops as jx
from jaxops.cli.main import main
from jaxops.core.failures import UserError
from jaxops.core.sharding import named_leaves
from jaxops.run.fit import fit

CONFIG = """
task: reward
tokenizer: bytes
model: {kind: decoder, dim: 16, layers: 1, heads: 2, hidden: 32, length: 40, ensemble: 2}
data: {kind: preferences, path: votes.jsonl, length: 40, template: null, valid: {share: 0.3}}
optimizer: {kind: adamw, lr: 1e-2}
batch: {global: 8}
reference: 32
evaluate: {every: 4, batch: 8}
checkpoint: {every: 4, best: log_loss}
run: {name: rm, steps: 8, log_every: 2, loggers: []}
"""
MODEL = CONFIG.splitlines()[3]
WORDS = ("red", "blue", "old", "new", "sea", "sun")


def vote(at):
    good, bad = f"a {WORDS[at % 6]} yes", f"the {WORDS[(at // 6) % 6]} no!"
    return {"prompt": f"say {at % 25}: ", "chosen": good, "rejected": bad, "annotator": ("ann", "bob")[at % 2]}


def choice(at):
    answers = [f"{WORDS[(at + k) % 6]} {'yes' if k == at % 3 else 'no!'}" for k in range(3)]
    return {"prompt": f"say {at % 25}: ", "completions": answers, "best": at % 3}


def rated(at):
    return {"text": f"{WORDS[at % 6]} {WORDS[at // 6 % 6]} {at}", "ratings": [at % 6, (at + 1) % 6, at % 4]}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with votes, ratings, a config, and a run of it."""
    folder = tmp_path_factory.mktemp("reward")
    (folder / "votes.jsonl").write_text("".join(json.dumps(vote(at)) + "\n" for at in range(100)))
    (folder / "ratings.jsonl").write_text("".join(json.dumps(rated(at)) + "\n" for at in range(100)))
    (folder / "choices.jsonl").write_text("".join(json.dumps(choice(at)) + "\n" for at in range(100)))
    (folder / "rm.yaml").write_text(CONFIG)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert fit(task_of("run.name=whole"), quiet=True).state == "finished"
    return folder


@pytest.fixture(autouse=True)
def _there(whole, monkeypatch):
    monkeypatch.chdir(whole)


def task_of(*overrides, config="rm.yaml"):
    return jx.build_task(jx.load_config(config, list(overrides)))


RATINGS = (
    "data={kind: ratings, path: ratings.jsonl, length: 40, valid: {share: 0.3}}",
    "tokenizer={kind: trained, vocab: 300}",
)


def summary(name):
    return json.loads(Path(f"runs/{name}/summary.json").read_text())


def parameters(name, step=None):
    return dict(named_leaves(jx.load(f"runs/{name}", step=step).saved.weights.params))


def test_an_evaluation_gives_the_run_s_own_numbers(whole):
    found = jx.load("runs/whole").evaluate()
    assert {"valid/accuracy", "valid/log_loss", "valid/longer_bias", "valid/accuracy[ann]"} <= found.keys()
    assert found == {name: summary("whole")[name] for name in found}
    assert found["valid/accuracy_low"] <= found["valid/accuracy"] <= found["valid/accuracy_high"]


def test_the_metrics_follow_from_the_scores_of_the_held_out_texts(whole):
    """Accuracy and log loss again, from `predict` on the held-out votes, in the unit of the raw scores."""
    from jaxops.data.preferences.open import read_judgements

    model = jx.load("runs/whole")
    valid = read_judgements(task_of().config.data).valid
    heads = model.score([text for pair in valid for text in pair.texts]).reshape(len(valid), 2, 2)
    raw = heads.mean(axis=2) * model.normaliser.deviation  # the means of the heads cancel in a difference
    difference = raw[:, 0] - raw[:, 1]
    assert summary("whole")["valid/log_loss"] == pytest.approx(np.logaddexp(0, -difference).mean(), rel=1e-5)
    assert summary("whole")["valid/accuracy"] == pytest.approx((difference > 0).mean())


def test_scores_have_mean_0_and_deviation_1_on_the_reference(whole):
    """For every checkpoint, by its own weights; the mean of heads is the score, their deviation the disagreement."""
    for step in (4, 8):
        model = jx.load("runs/whole", step=step)
        tokens, offsets = model.saved.transform("reference.tokens"), model.saved.transform("reference.offsets")
        assert len(offsets) == 33
        texts = [
            model.tokenizer.decode(tokens[a:b].tolist(), skip_special=True) for a, b in itertools.pairwise(offsets)
        ]
        table = model.predict(pa.table({"text": texts}))
        scores = np.array(table["score"])
        assert scores.mean() == pytest.approx(0, abs=1e-5) and scores.std() == pytest.approx(1, rel=1e-5)


def test_a_score_is_that_of_the_decoder_by_hand(whole):
    model = jx.load("runs/whole")
    row = vote(3)
    table = model.predict(pa.table({"prompt": [row["prompt"]], "completion": [row["chosen"]], "own": [7]}))
    ids = np.array([256, *model.tokenizer.encode(row["prompt"] + row["chosen"]), 257])
    params = jax.tree.map(jnp.asarray, model.saved.weights.params)
    rows = [jnp.asarray(part[None], jnp.int32) for part in (ids, np.ones(len(ids)), np.arange(len(ids)))]
    hidden = np.asarray(model.reward.decoder.hidden(params, *rows)[0, -1], np.float64)
    raw = hidden @ np.asarray(params["reward"]["kernel"], np.float64) + np.asarray(params["reward"]["bias"])
    heads = (raw - model.normaliser.means) / model.normaliser.deviation
    (found,) = table.to_pylist()
    assert found["score"] == pytest.approx(heads.mean(), abs=1e-4)
    assert found["disagreement"] == pytest.approx(heads.std(ddof=1), abs=1e-4)
    assert (found["own"], found["tokens"], found["cut"]) == (7, len(ids), False)


def test_the_reference_is_of_chosen_and_rejected_texts_alike(whole):
    tokens = jx.load("runs/whole").saved.transform("reference.tokens")
    better, worse = (int((tokens == ord(mark)).sum()) for mark in "y!")  # "say" has one too, in every text
    assert 8 <= worse <= 24 and 8 <= better - 32 <= 24


def test_predict_takes_all_forms_and_brings_columns_along(whole, tmp_path, capsys):
    asked, better, worse = "say 3: ", "a red yes", "x" * 99
    rows = [{"prompt": asked, "completion": better, "k": 1}, {"prompt": asked, "completion": worse, "k": 2, "l": 3}]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["predict", "runs/whole", str(tmp_path / "texts.jsonl"), "--out", str(tmp_path / "out.parquet")]) == 0
    capsys.readouterr()
    import pyarrow.parquet as pq

    out = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert [(row["k"], row["l"]) for row in out] == [(1, None), (2, 3)] and [row["cut"] for row in out] == [False, True]
    plain = jx.load("runs/whole").predict(pa.table({"text": [asked + better]})).to_pylist()
    assert plain[0]["score"] == pytest.approx(out[0]["score"], abs=1e-5)


def test_a_judge_tells_which_answers_it_reads_in_part(whole):
    rows, cut = jx.load("runs/whole").judge().rows(["say 1: ", "say 2: "], ["x" * 60, "yes"])
    assert cut.tolist() == [True, False] and rows["segment"].sum(1).tolist()[0] == 40 > rows["segment"].sum(1)[1]


CHOICES = (
    "data={kind: best_of_k, path: choices.jsonl, length: 40, template: null, valid: {share: 0.3}}",
    "objective={kind: best_of_k, center: 0.01}",
)


def test_choices_of_the_best_answer_train_and_are_evaluated_as_pairs(whole, capsys):
    assert main(["train", "rm.yaml", CHOICES[0], "run.name=bad"]) == 2
    assert "`bradley_terry` does not learn from data.kind best_of_k: take `best_of_k`" in capsys.readouterr().err
    assert main(["train", "rm.yaml", CHOICES[1], "run.name=bad"]) == 2
    assert "take `bradley_terry`" in capsys.readouterr().err
    run = fit(task_of(*CHOICES, "run.name=choices", "run.steps=40", "evaluate.every=40"), quiet=True)
    assert jx.load("runs/choices").evaluate()["valid/log_loss"] == run.summary["valid/log_loss"]
    assert run.summary["valid/accuracy"] > 0.9  # the best answer is the one that says yes
    lines = Path("runs/choices/metrics.jsonl").read_text().splitlines()
    assert "train/top1" in json.loads(lines[0]) and "train/loss/center" in json.loads(lines[0])
    (row,) = jx.load("runs/choices").predict(pa.table({"prompt": ["say 3: "], "completion": ["a red yes"]})).to_pylist()
    assert np.isfinite(row["score"])
    assert main(["data", "preview", "rm.yaml", *CHOICES]) == 0
    assert "the best of 3 is" in capsys.readouterr().out


def test_every_layout_trains_alike(whole):
    found = jx.testing.check(task_of(), layouts=({"data": 2, "fsdp": 2, "tensor": 2},), accumulations=(2,), steps=2)
    assert len(found) == 1


@pytest.mark.slow
@pytest.mark.parametrize("data", [(), RATINGS])
def test_all_layouts_train_alike(whole, data):
    task = task_of(*data, "model.dropout=0.1", "objective.center=0.1", "model.remat=full")
    assert len(jx.testing.check(task, bfloat16=True)) >= 10


@pytest.mark.parametrize("data", [(), pytest.param(RATINGS, marks=pytest.mark.slow)])
def test_a_run_goes_on_where_it_stopped(whole, data):
    name = "ratings" if data else "votes"
    constant = "optimizer.schedule=constant"
    for steps in (4, 8):
        fit(task_of(*data, f"run.name=again-{name}", f"run.steps={steps}", constant), quiet=True)
    fit(task_of(*data, f"run.name=once-{name}", constant), quiet=True)
    again, once = parameters(f"again-{name}", 8), parameters(f"once-{name}", 8)
    for path, value in once.items():
        np.testing.assert_array_equal(again[path], value, err_msg=path)


def test_heads_learn_and_come_to_differ(whole):
    early, late = (parameters("whole", step)["reward/kernel"] for step in (4, 8))
    moved = late - early  # the heads begin apart; under the same weights of the pairs they would move alike
    assert early.shape == (16, 2) and np.abs(moved[:, 0] - moved[:, 1]).max() > 0.1 * np.abs(moved).max() > 0
    found = jx.load("runs/whole").predict(pa.table({"text": ["red", "no!"]}))
    assert min(found["disagreement"].to_pylist()) > 0


def test_ratings_train_with_a_vocabulary_of_their_own(whole, tmp_path):
    run = fit(task_of(*RATINGS, "run.name=ratings"), quiet=True)
    assert run.summary["baseline/ceiling/valid/accuracy"] > 0.5 and "valid/accuracy" in run.summary
    model = jx.load("runs/ratings")
    assert model.evaluate()["valid/log_loss"] == run.summary["valid/log_loss"]
    assert model.predict(pa.table({"text": ["red sea"], "k": [1]})).column_names[:2] == ["text", "k"]


@pytest.fixture(scope="module")
def begun(whole, tmp_path_factory):
    """A config that begins with the weights of a language model, and what lets it stay at them."""
    folder = tmp_path_factory.mktemp("language")
    text = "".join(json.dumps({"text": f"{WORDS[at % 6]} {at}"}) + "\n" for at in range(20))
    (folder / "text.jsonl").write_text(text)
    language = (
        CONFIG.replace("task: reward", "task: language").replace(", ensemble: 2", "").replace("reference: 32\n", "")
    )
    language = language.replace(CONFIG.splitlines()[4], f"data: {{kind: text, path: {folder}/text.jsonl, length: 40}}")
    language = language.replace("checkpoint: {every: 4, best: log_loss}\n", "").replace("steps: 8", "steps: 1")
    (folder / "sft.yaml").write_text(language)
    (folder / "own.yaml").write_text(CONFIG.replace(MODEL, "model: {weights: runs/sft, ensemble: 3}"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(whole)
        fit(task_of("run.name=sft", config=folder / "sft.yaml"), quiet=True)
    return folder / "own.yaml"


def test_a_run_begins_with_the_weights_of_a_language_model(begun):
    """With a learning rate of zero they stay as they are, and the heads are beside them."""
    fit(task_of("tokenizer=null", "run.name=from-sft", "run.steps=1", "optimizer.lr=1e-30", config=begun), quiet=True)
    before, after = parameters("sft"), parameters("from-sft")
    assert after.keys() - before.keys() == {"reward/kernel", "reward/bias"}
    for path, value in before.items():
        np.testing.assert_array_equal(after[path], value, err_msg=path)


@pytest.mark.slow
def test_adapters_and_heads_are_trained_over_a_frozen_language_model(begun):
    overrides = ["tokenizer=null", "run.name=lora", "run.steps=2", "model.lora={rank: 2}"]
    fit(task_of(*overrides, config=begun), quiet=True)
    before, after = parameters("sft"), parameters("lora")
    for path, value in before.items():
        np.testing.assert_array_equal(after[path], value, err_msg=path)
    fresh = dict(named_leaves(task_of(*overrides, config=begun).model.init(jax.random.key(0))))
    assert {path.split("/")[0] for path in after.keys() - before.keys()} == {"lora", "reward"}
    assert all(value.any() for path, value in after.items() if path.startswith("lora/") and path.endswith("/b"))
    assert fresh["reward/kernel"].shape == after["reward/kernel"].shape
    assert jx.load("runs/lora").evaluate()["valid/log_loss"] == pytest.approx(summary("lora")["valid/log_loss"])
    with pytest.raises(UserError, match="has adapters beside its weights, which would be left out"):
        task_of("tokenizer=null", "model.weights=runs/lora", config=begun)


def test_a_user_s_own_objective_gets_the_mean_score(whole):
    def mine(model):
        def objective(params, batch, key):
            score = model.score(params, batch["tokens"][:, 0], batch["segment"][:, 0], batch["position"][:, 0])
            return {"loss/mine": jx.Sum.of(jnp.square(score - 1), batch["weight"])}

        return objective

    task = jx.build_task(jx.load_config("rm.yaml"), objective=mine)
    batch = {name: jnp.asarray(value) for name, value in task.source.batch(0, 8).items()}
    assert np.isfinite(task.objective(task.model.init(jax.random.key(0)), batch, None)["loss/mine"].total)


def test_the_preview_and_the_inspection(whole, capsys):
    assert main(["data", "preview", "rm.yaml"]) == 0
    assert (
        "the first is better with probability 1" in (shown := capsys.readouterr().out) and "first: <|bos|>say" in shown
    )
    assert main(["data", "inspect", "rm.yaml", "--json"]) == 0
    counts = json.loads(capsys.readouterr().out)
    assert counts["train"]["pairs"] + counts["valid"]["pairs"] == 100 and counts["people"]["ties"] == 0


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("tokenizer=null", "tokenizer"),
        ("tokenizer=byte", "did you mean 'bytes'"),
        ("tokenizer={kind: trained, vocab: 10}", "tokenizer.vocab"),
        ("data.length=41", "data.length"),
        ("data.path=nowhere.jsonl", "nowhere.jsonl"),
        ("data.path=named://icwsm15", "did you mean 'icwsm14'"),
        ("data.valid=null", "data.valid"),
        ("data.columns.chosen=better", "better"),
        ("data={kind: ratings, path: ratings.jsonl, too_long: drop}", "data.too_long"),
        ("data.valid.share=0.999999", "leaves nothing to train on"),
        ("data.length=4", "no pair is left"),
        ("model.ensemble=0", "model.ensemble"),
        ("model.kind=encoder", "decoder"),
        ("mesh.sequence=2", "mesh.sequence"),
        ("evaluate.metrics=[acuracy]", "did you mean 'accuracy'"),
        ("checkpoint.best=longer_bias", "checkpoint.best"),
        ("batch.pack=true", "batch.pack"),
        ("objective.label_smoothing=1", "objective.label_smoothing"),
        ("objective.kind=bradley", "bradley_terry"),
        ("reference=1", "reference"),
    ],
)
def test_what_does_not_go_together_is_told(whole, capsys, override, said):
    more = ["data.too_long=cut_end"] if override == "data.length=4" else []
    assert main(["train", "rm.yaml", override, *more, "run.name=bad"]) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error
    assert not Path("runs/bad").exists()


def test_one_head_cannot_disagree(whole, capsys):
    overrides = ["model.ensemble=1", "evaluate.metrics=[log_loss, disagreement]", "run.name=bad"]
    assert main(["train", "rm.yaml", *overrides]) == 2
    assert "one head cannot disagree" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("weights", "said"),
    [("nowhere", "there is no nowhere"), ("hf://org", "expected hf://ORG/MODEL"), ("runs/plain", "config.json")],
)
def test_weights_that_cannot_be_opened_are_told(whole, tmp_path, capsys, weights, said):
    Path("runs/plain").mkdir(exist_ok=True)
    (tmp_path / "own.yaml").write_text(CONFIG.replace(MODEL, f"model: {{weights: '{weights}'}}"))
    assert main(["train", str(tmp_path / "own.yaml"), "tokenizer=null", "run.name=bad"]) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"words": ["a"]}, "nothing to score"),
        ({"text": ["a"], "score": [1.0]}, "score is what predict writes"),
        ({"text": [""]}, "column 'text' is empty"),
        ({"prompt": ["a"], "completion": [[{"role": "assistant", "content": "b"}]]}, "both are of one form"),
        ({"messages": [[{"role": "user", "content": "b"}]]}, "does not end with an answer"),
    ],
)
def test_texts_that_cannot_be_scored_are_told(whole, columns, said):
    with pytest.raises(UserError, match=said):
        jx.load("runs/whole").predict(pa.table(columns))


def test_a_number_that_no_table_holds_is_told(whole, tmp_path):
    (tmp_path / "large.jsonl").write_text(json.dumps({"text": "a", "id": 2**70}) + "\n")
    with pytest.raises(UserError, match="column 'id' has values of several types, or one that no table holds"):
        jx.load("runs/whole").predict(tmp_path / "large.jsonl")


def test_an_export_is_refused_in_words(whole, tmp_path, capsys):
    assert main(["export", "runs/whole", str(tmp_path / "out")]) == 2
    assert "a reward model has no export" in capsys.readouterr().err


def test_a_part_of_a_run_folder_that_is_damaged_is_told(whole, tmp_path):
    shutil.copytree("runs/whole", tmp_path / "copy")
    (tmp_path / "copy/transform/reference.tokens.parquet").unlink()
    with pytest.raises(UserError, match=r"reference\.tokens"):
        jx.load(tmp_path / "copy").predict(pa.table({"text": ["a"]}))

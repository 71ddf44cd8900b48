"""The language family, whole: trained, resumed, evaluated, scored, exported, and begun with other weights."""

import json
import math
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

import jaxops as jx
from jaxops.cli.main import main
from jaxops.core.failures import UserError
from jaxops.core.metrics_file import read_metrics
from jaxops.core.sharding import named_leaves
from jaxops.data.prompts.writer import PromptWriter
from jaxops.families.language.serving import prompt_form
from jaxops.run.fit import fit
from jaxops.run.given_table import joined_columns
from jaxops.run.validation import short_epochs

CONFIG = """
task: language
tokenizer: bytes
model: {kind: decoder, dim: 16, layers: 2, heads: 2, hidden: 32, length: 96}
data: {kind: chat, path: chat.jsonl, length: 96, valid: {share: 0.2}}
optimizer: {kind: adamw, lr: 1e-2}
batch: {global: 8}
evaluate: {every: 4, batch: 8}
checkpoint: {every: 4, best: perplexity}
run: {name: sft, steps: 8, log_every: 2, loggers: []}
"""
WORDS = ("red", "blue", "old", "new", "sea", "sun")


def conversation(at):
    first, second = WORDS[at % 6], WORDS[(at // 6) % 6]
    said = [f"say {first} {at}", f"{first}!", f"and {second}", second][: 2 + 2 * (at % 2)]
    return {"messages": [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(said)]}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with text, a config, and a run of it."""
    folder = tmp_path_factory.mktemp("language")
    (folder / "chat.jsonl").write_text("".join(json.dumps(conversation(at)) + "\n" for at in range(60)))
    (folder / "sft.yaml").write_text(CONFIG)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert fit(task_of("run.name=whole"), quiet=True).state == "finished"
    return folder


@pytest.fixture(autouse=True)
def _there(whole, monkeypatch):
    monkeypatch.chdir(whole)


def task_of(*overrides):
    return jx.build_task(jx.load_config("sft.yaml", list(overrides)))


def summary(name):
    return json.loads(Path(f"runs/{name}/summary.json").read_text())


def test_an_evaluation_gives_the_run_s_own_numbers(whole):
    found = jx.load("runs/whole").evaluate()
    assert set(found) == {"valid/nll", "valid/perplexity", "valid/accuracy"}
    assert found == {name: summary("whole")[name] for name in found}
    assert found["valid/perplexity"] == pytest.approx(math.exp(found["valid/nll"]), rel=1e-12)


def test_texts_are_scored_as_the_evaluation_scores_them(whole):
    """The mean of NLL over the tokens of all held-out texts is the run's own figure."""
    task = task_of()
    held_out = [json.dumps(conversation(at)) for at in range(60)]
    model = jx.load("runs/whole")
    scores = model.predict("chat.jsonl", batch=8)
    assert scores.num_rows == len(held_out) and not any(scores["cut"].to_pylist())
    from jaxops.data.text.heldout import read_parts

    _, valid, _ = read_parts(task.config.data)
    rows = [int(example.where.rpartition(":")[2]) - 1 for example in valid]
    tokens, nll = np.array(scores["tokens"])[rows], np.array(scores["nll"])[rows]
    assert (nll * tokens).sum() / tokens.sum() == pytest.approx(summary("whole")["valid/nll"], rel=1e-5)
    np.testing.assert_allclose(np.log(np.array(scores["perplexity"])), np.array(scores["nll"]), rtol=1e-5)


def test_texts_in_another_form_are_scored_and_their_columns_come_along(whole, capsys):
    Path("plain.jsonl").write_text('{"text": "red sea", "id": 7}\n{"text": "old sun", "id": 9}\n')
    assert main(["predict", "runs/whole", "plain.jsonl", "--out", "plain.csv"]) == 0
    rows = pa.csv.read_csv("plain.csv").to_pylist()
    assert [(row["text"], row["id"], row["tokens"]) for row in rows] == [("red sea", 7, 8), ("old sun", 9, 8)]
    Path("other.jsonl").write_text('{"words": "red sea"}\n')
    assert main(["predict", "runs/whole", "other.jsonl", "--out", "other.csv"]) == 2
    assert "expected messages, prompt and completion, or text (there are: words)" in capsys.readouterr().err


def test_a_score_is_the_sum_over_a_plain_softmax_in_float64(whole):
    """One conversation by hand: logits of the whole text, in numpy."""
    model = jx.load("runs/whole")
    text = conversation(1)
    table = pa.table({"messages": [text["messages"]]})
    score = model.predict(table).to_pylist()[0]
    parts = [f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in text["messages"]]
    ids = np.array(model.tokenizer.encode("".join(parts)))
    params = jax.tree.map(jnp.asarray, model.saved.weights.params)
    rows = [jnp.asarray(row[None], jnp.int32) for row in (ids, np.ones(len(ids)), np.arange(len(ids)))]
    hidden = model.decoder.hidden(params, *rows)
    logits = np.asarray(model.decoder.logits(params, hidden)[0], np.float64)[:, : model.decoder.real_vocab]
    logprobs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    learnt, total, count = np.zeros(len(ids), bool), 0.0, 0
    at = 0
    for message, part in zip(text["messages"], parts, strict=True):
        size = len(model.tokenizer.encode(part))
        if message["role"] == "assistant":  # what is said and the mark that ends the turn
            begin = at + len(model.tokenizer.encode("<|im_start|>assistant\n"))
            learnt[begin : at + size - 1] = True
        at += size
    for place in np.flatnonzero(learnt):
        total, count = total - logprobs[place - 1, ids[place]], count + 1
    assert score["tokens"] == count
    assert score["nll"] == pytest.approx(total / count, rel=1e-4)


def test_every_layout_trains_alike(whole):
    found = jx.testing.check(task_of(), layouts=({"data": 2, "fsdp": 2, "tensor": 2},), accumulations=(2,), steps=2)
    assert len(found) == 1


@pytest.mark.slow
@pytest.mark.parametrize("pack", [True, False])
def test_all_layouts_train_alike(whole, pack):
    task = task_of(f"data.pack={str(pack).lower()}", "model.dropout=0.1", "objective.z_loss=1e-3", "model.remat=full")
    assert len(jx.testing.check(task, bfloat16=True)) >= 10


def test_a_run_goes_on_where_it_stopped(whole):
    for steps in (4, 8):
        fit(task_of("run.name=again", f"run.steps={steps}", "optimizer.schedule=constant"), quiet=True)
    fit(task_of("run.name=once", "optimizer.schedule=constant"), quiet=True)
    params = lambda name: dict(named_leaves(jx.load(f"runs/{name}", step=8).saved.weights.params))
    again, once = params("again"), params("once")
    for path, value in once.items():
        np.testing.assert_array_equal(again[path], value, err_msg=path)


def test_an_exported_folder_begins_another_run_bit_for_bit(whole, tmp_path):
    model = jx.load("runs/whole")
    assert str(tmp_path / "out") in model.export(tmp_path / "out")
    there = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer_config.json"} <= there
    with pytest.raises(UserError, match="exists and is not empty"):
        model.export(tmp_path / "out")
    (tmp_path / "own.yaml").write_text(CONFIG.replace(CONFIG.splitlines()[3], f"model: {{weights: {tmp_path}/out}}"))
    again = jx.build_task(jx.load_config(tmp_path / "own.yaml", ["tokenizer=null", "run.name=from-folder"]))
    assert dict(named_leaves(again.model.shapes)).keys() == dict(named_leaves(model.decoder.shapes)).keys()
    (source,) = again.start()
    from jaxops.core.weights import load_weights, targets_of

    arrays, _ = load_weights(targets_of(again.model.shapes), [source])
    for path, value in named_leaves(model.saved.weights.params):
        real = slice(model.decoder.real_vocab if path == "embed/embedding" else None)  # the rows below are padding
        np.testing.assert_array_equal(np.asarray(arrays[path])[real], value[real], err_msg=path)


def test_a_run_begins_with_the_weights_of_another(whole, tmp_path):
    """With a learning rate of zero what is evaluated first is what the other run ended with."""
    (tmp_path / "own.yaml").write_text(CONFIG.replace(CONFIG.splitlines()[3], "model: {weights: runs/whole}"))
    overrides = ["tokenizer=null", "run.name=from-run", "run.steps=1", "optimizer.lr=1e-30", "evaluate.every=1"]
    overrides += [f"run.dir={tmp_path}"]
    run = fit(jx.build_task(jx.load_config(tmp_path / "own.yaml", overrides)), quiet=True)
    assert run.summary["valid/nll"] == pytest.approx(jx.load("runs/whole").evaluate()["valid/nll"], rel=1e-6)
    rates = [one["train/examples_per_s"] for one in read_metrics(run.dir / "metrics.jsonl") if "train/loss" in one]
    assert rates and rates[-1] < 1e5  # its only step compiled: 4,000,000,000 examples/s were seen


def test_weights_in_place_of_what_a_file_says_are_said(whole):
    loaded = jx.load_config("sft.yaml", ["model.weights=runs/whole", "tokenizer=null"])
    (note,) = loaded.notes
    assert "takes the place of model.kind, model.dim, model.layers, model.heads, model.hidden, model.length" in note
    with pytest.raises(UserError, match="another sort of model has it, not this one"):
        jx.load_config("sft.yaml", ["model.weights=runs/whole", "tokenizer=null", "model.dim=8"])


def test_a_batch_larger_than_an_epoch_is_said(whole):
    (line,) = short_epochs(task_of("batch.global=512", "run.steps=null", "run.epochs=3"))
    assert "batch.global: 512 examples, but an epoch has" in line and "3 epochs are 1 steps" in line
    assert short_epochs(task_of()) == []


@pytest.mark.slow
def test_adapters_are_trained_and_the_weights_are_not(whole, tmp_path):
    lora = "model: {weights: runs/whole, lora: {rank: 2}}"
    (tmp_path / "own.yaml").write_text(CONFIG.replace(CONFIG.splitlines()[3], lora))
    overrides = ["tokenizer=null", "run.name=lora", "run.steps=2", f"run.dir={tmp_path}", "optimizer.schedule=constant"]
    fit(jx.build_task(jx.load_config(tmp_path / "own.yaml", overrides)), quiet=True)
    model, base = jx.load(tmp_path / "lora"), jx.load("runs/whole")
    held = dict(named_leaves(model.saved.weights.params))
    for path, value in named_leaves(base.saved.weights.params):
        np.testing.assert_array_equal(held[path], value, err_msg=path)
    assert all(np.any(held[path]) for path in held if path.startswith("lora/") and path.endswith("/b"))
    before, after = (one.predict("chat.jsonl")["nll"].to_numpy() for one in (base, model))
    assert np.abs(before - after).max() > 1e-4
    for other, said in ((", lora: {rank: 2, alpha: 1}", "trained as LoraConfig"), ("", "would be left out")):
        own = CONFIG.replace(CONFIG.splitlines()[3], f"model: {{weights: {tmp_path}/lora{other}}}")
        (tmp_path / "own.yaml").write_text(own)
        with pytest.raises(UserError, match=said):
            jx.build_task(jx.load_config(tmp_path / "own.yaml", ["tokenizer=null"]))
    model.export(tmp_path / "merged")
    (tmp_path / "own.yaml").write_text(CONFIG.replace(CONFIG.splitlines()[3], f"model: {{weights: {tmp_path}/merged}}"))
    overrides = ["tokenizer=null", "run.name=from-merged", "run.steps=1", f"run.dir={tmp_path}", "optimizer.lr=1e-30"]
    fit(jx.build_task(jx.load_config(tmp_path / "own.yaml", overrides)), quiet=True)
    np.testing.assert_allclose(
        jx.load(tmp_path / "from-merged").predict("chat.jsonl")["nll"].to_numpy(), after, rtol=1e-4
    )
    shutil.rmtree(tmp_path / "merged")
    begun = jx.load(tmp_path / "from-merged")
    np.testing.assert_allclose(begun.predict("chat.jsonl")["nll"].to_numpy(), after, rtol=1e-4)
    with pytest.raises(UserError, match=r"there is no .*/merged.* To go on or to be evaluated, a run opens"):
        begun.evaluate()


def test_the_preview_shows_what_the_loss_sees(whole, capsys):
    assert main(["data", "preview", "sft.yaml"]) == 0
    shown = capsys.readouterr().out
    assert "<|im_start|>assistant\n⟦" in shown and "<|im_end|>⟧" in shown and "user\n⟦" not in shown
    assert main(["data", "inspect", "sft.yaml", "--json"]) == 0
    counts = json.loads(capsys.readouterr().out)
    assert counts["train"]["documents"] + counts["valid"]["documents"] == 60


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("tokenizer=null", "tokenizer"),
        ("tokenizer=byte", "did you mean 'bytes'"),
        ("data.length=97", "data.length"),
        ("data.path=nowhere.jsonl", "nowhere.jsonl"),
        ("data.path=named://chitcat", "did you mean 'chitchat'"),
        ("data.valid=null", "data.valid"),
        ("data.columns.messages=turns", "turns"),
        ("data.kind=text", "text"),
        ("data.template=mine.jinja", "mine.jinja"),
        ("model.heads=3", "model.heads"),
        ("model.vocab=100", "model.vocab"),
        ("model.kind=encoder", "decoder"),
        ("optimizer.schedule={kind: warmup_cosine, warmup: 20}", "set it to at most 8"),
        ("model.kv_heads=4", "model.kv_heads"),
        ("mesh.sequence=2", "mesh.sequence"),
        ("evaluate.metrics=[ppl]", "perplexity"),
        ("batch.pack=true", "data.pack"),
        ("objective.label_smoothing=1", "objective.label_smoothing"),
    ],
)
def test_what_does_not_go_together_is_told(whole, capsys, override, said):
    assert main(["train", "sft.yaml", override, "run.name=bad"]) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error
    assert not Path("runs/bad").exists()


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ("nowhere", "model.weights: there is no nowhere. To go on or to be evaluated"),
        ("hf://org", "expected hf://ORG/MODEL"),
        ("org/model-1b", "(a model of the Hugging Face Hub is hf://org/model-1b)"),
        ("runs/wole", "did you mean 'runs/whole'"),
        ("named://smollm3", "smollm2_135m_instruct"),
        ("plain", "config.json"),
    ],
)
def test_weights_that_cannot_be_opened_are_told(whole, capsys, weights, said):
    Path("plain").mkdir(exist_ok=True)
    Path("own.yaml").write_text(CONFIG.replace(CONFIG.splitlines()[3], f"model: {{weights: '{weights}'}}"))
    assert main(["train", "own.yaml", "run.name=bad"]) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error


def test_a_part_of_a_run_folder_that_is_damaged_is_told(whole, tmp_path):
    shutil.copytree("runs/whole", tmp_path / "copy")
    (tmp_path / "copy/transform/architecture.parquet").unlink()
    with pytest.raises(UserError, match="architecture"):
        jx.load(tmp_path / "copy")


def test_the_template_that_was_learnt_with_is_kept_in_the_run(whole, tmp_path, monkeypatch):
    """In a mixture it is that of the conversations; its file may be gone, or be another one, when the run is used."""
    Path("my.jinja").write_text("{% for m in messages %}[{{ m.role }}]{{ m.content }}<|im_end|>{% endfor %}[assistant]")
    Path("pairs.jsonl").write_text('{"prompt": "2+2=", "completion": "4"}\n' * 8)
    mixed = "data: {kind: mixture, sources: [{kind: completion, path: pairs.jsonl, length: 96}, {kind: chat, path: "
    mixed += "chat.jsonl, length: 96, template: my.jinja, turns: apart, valid: {share: 0.2}}]}"
    (tmp_path / "mixed.yaml").write_text(CONFIG.replace(CONFIG.splitlines()[4], mixed))
    overrides = ["run.name=mixed", "run.steps=1", f"run.dir={tmp_path}"]
    fit(jx.build_task(jx.load_config(tmp_path / "mixed.yaml", overrides)), quiet=True)
    before = jx.load(tmp_path / "mixed").predict("chat.jsonl")["nll"].to_numpy()
    text = Path("my.jinja").read_text()
    Path("my.jinja").write_text("another")
    monkeypatch.chdir(tmp_path)
    model = jx.load(tmp_path / "mixed")
    writer = PromptWriter(prompt_form(model.saved), model.tokenizer, print)
    assert model.tokenizer.decode(writer.ids(("a", {"prompt": "hello"}))) == "[user]hello<|im_end|>[assistant]"
    again = model.predict(whole / "chat.jsonl")
    np.testing.assert_array_equal(again["nll"].to_numpy(), before)
    (first,) = model.predict(pa.table({"messages": [conversation(0)["messages"]]}))["tokens"].to_pylist()
    assert first == len(model.tokenizer.encode("red!<|im_end|>"))
    model.export(tmp_path / "out")
    assert json.loads((tmp_path / "out/tokenizer_config.json").read_text())["chat_template"] == text


@pytest.mark.parametrize(
    ("prompts", "options", "said"),
    [
        (["hi"], {"n": 0}, "n: expected 1 or more"),
        (["hi"], {"n": 10**11}, "n: .* at most"),
        (["hi"], {"seed": -1}, "seed: expected 0 or more"),
        (["hi"], {"template": "chta"}, "template: expected auto, chat, none, got 'chta'; did you mean 'chat'"),
        (["hi"], {"slots": 10**11}, "slots: .* 65,536 at most"),
        (["hi"], {"room": 1}, "room: expected 2 or more"),
        (["hi"], {"temperature": 1e-50}, "temperature: expected 0"),
        ([None], {}, "prompt 0: the column 'prompt' is null"),
        ([{"prompt": "a", "id": 1}, {"prompt": "b", "id": "x"}], {}, "column 'id' has values of several types"),
        ([{"prompt": "a", "id": 2**70}], {}, "column 'id'"),
    ],
)
def test_what_cannot_be_sampled_is_told_before_anything_is(whole, monkeypatch, prompts, options, said):
    model = jx.load("runs/whole")
    monkeypatch.setattr(model._generation, "sampler", lambda *given: pytest.fail("sampled"))
    with pytest.raises(UserError, match=said):
        model.generate(prompts, **options)


def test_no_column_of_the_prompts_is_lost_to_another():
    rows = [{"prompt": "a", "tokens": 1, "given_tokens": 2}]
    found = joined_columns(rows, [{"tokens": 3}]).to_pylist()
    assert found == [{"prompt": "a", "given_given_tokens": 1, "given_tokens": 2, "tokens": 3}]


def alter(folder, **values):
    """Writes other values into the architecture that a run keeps, and leaves the digests as they are."""
    file = folder / "transform/architecture.parquet"
    kept = json.loads(pq.read_table(file)["architecture"].to_numpy().astype(np.uint8).tobytes())
    text = json.dumps(kept | values).encode() if values else b"[1]"
    pq.write_table(pa.table({"architecture": np.frombuffer(text, np.uint8)}), file)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"layers": 10**9}, "layers is 1,000,000,000, and the whole checkpoint"),
        ({"vocab": 10**12}, "vocab is 1,000,000,000,000"),
        ({"dim": 32}, "is not of the model that its config describes"),
        ({"layers": 3}, "is not of the model that its config describes"),
        ({}, "architecture: expected a JSON object"),
    ],
)
def test_an_altered_architecture_is_refused_before_anything_is_computed(whole, tmp_path, values, said):
    shutil.copytree("runs/whole", tmp_path / "copy")
    alter(tmp_path / "copy", **values)
    with pytest.raises(UserError, match="is not what the run wrote"):
        jx.load(tmp_path / "copy")
    (tmp_path / "copy/transform/digests.json").unlink()
    with pytest.raises(UserError, match=said):
        jx.load(tmp_path / "copy")


def test_a_transform_of_other_types_is_told(whole, tmp_path):
    shutil.copytree("runs/whole", tmp_path / "copy")
    there = tmp_path / "copy/transform"
    pq.write_table(pa.table({"architecture": ["a", "b"]}), there / "architecture.parquet")
    (there / "digests.json").unlink()
    with pytest.raises(UserError, match="expected bytes, got object"):
        jx.load(tmp_path / "copy")

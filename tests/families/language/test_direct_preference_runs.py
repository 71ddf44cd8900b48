"""Policies trained on pairs, whole: the reference, resume, evaluation, what runs are used for, and bad input."""

import json
import math
import os
import signal
import subprocess
import sys
import time
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
from jaxops.data.preferences.open import read_judgements
from jaxops.data.preferences.spec import PreferenceData, RatingData
from jaxops.data.prompts.writer import PromptWriter
from jaxops.data.text.byte_tokenizer import ByteTokenizer
from jaxops.run.fit import fit
from jaxops.run.pretrained.options import Generate
from jaxops.run.training import build_training
from jaxops.run.warm_start import begin_with

METRICS = "[loss, accuracy, accuracy_low, accuracy_high, reward_margin, logprob_chosen, logprob_rejected, nll]"
CONFIG = f"""
task: language
tokenizer: bytes
model: {{kind: decoder, dim: 16, layers: 1, heads: 2, hidden: 32, length: 40}}
data: {{kind: preferences, path: votes.jsonl, length: 40, template: null, valid: {{share: 0.3}}}}
objective: {{kind: dpo, beta: 0.2}}
optimizer: {{kind: adamw, lr: 1e-2, schedule: constant}}
batch: {{global: 8}}
evaluate: {{every: 4, batch: 8, metrics: {METRICS}}}
checkpoint: {{every: 4, best: loss}}
run: {{name: dpo, steps: 8, log_every: 2, loggers: []}}
"""
MODEL, OBJECTIVE = CONFIG.splitlines()[3], CONFIG.splitlines()[5]
ADAPTERS = ["model.weights=runs/whole", "model.lora={rank: 2}"]
WORDS = ("red", "blue", "old", "new", "sea", "sun")


def vote(at):
    good, bad = f"a {WORDS[at % 6]} yes", f"the {WORDS[(at // 6) % 6]} no!"
    return {"prompt": f"say {at % 25}: ", "chosen": good, "rejected": bad}


def write_rows(path, rows):
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with votes, a config, and a run of it."""
    folder = tmp_path_factory.mktemp("dpo")
    write_rows(folder / "votes.jsonl", [vote(at) for at in range(100)])
    (folder / "dpo.yaml").write_text(CONFIG)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert fit(task_of("run.name=whole"), quiet=True).state == "finished"
    return folder


@pytest.fixture(autouse=True)
def _there(whole, monkeypatch):
    monkeypatch.chdir(whole)


def task_of(*overrides, config="dpo.yaml"):
    return jx.build_task(jx.load_config(config, list(overrides)))


def summary(name):
    return json.loads(Path(f"runs/{name}/summary.json").read_text())


def parameters(name, step=None):
    return dict(named_leaves(jx.load(f"runs/{name}", step=step).saved.weights.params))


def halves(name, step=None):
    """The parameters of policy and reference, by the same paths."""
    found = parameters(name, step)
    below = {path: value for path, value in found.items() if path.startswith("reference/")}
    return {path: found[path] for path in found.keys() - below.keys()}, {path[10:]: x for path, x in below.items()}


def test_an_evaluation_gives_the_run_s_own_numbers(whole):
    found = jx.load("runs/whole").evaluate()
    assert {"valid/loss", "valid/accuracy", "valid/reward_margin"} <= found.keys()
    assert found == {name: summary("whole")[name] for name in found}
    assert found["valid/accuracy_low"] <= found["valid/accuracy"] <= found["valid/accuracy_high"]
    assert found["valid/loss"] < math.log(2) and summary("whole")["baseline/coin/valid/accuracy"] == 0.5


def test_the_reference_is_what_the_policy_began_as(whole):
    """The policy has moved away from it, and it is the fresh parameters of the seed."""
    fresh = dict(named_leaves(task_of().model.init(jax.random.fold_in(jax.random.key(0), 2**30))))
    policy, reference = halves("whole")
    assert policy.keys() == reference.keys() == {path for path in fresh if not path.startswith("reference/")}
    for path, value in reference.items():
        np.testing.assert_allclose(value, fresh[path], rtol=1e-6, atol=1e-8, err_msg=path)
    assert all(np.abs(policy[path] - reference[path]).max() > 0 for path in policy)
    early = halves("whole", 4)
    assert all(np.array_equal(early[1][path], value) for path, value in reference.items())
    assert len([*Path("runs/whole/checkpoints").glob("frozen-*")]) == 1


def test_the_metrics_follow_from_the_scores_of_the_held_out_texts(whole):
    """Loss, margin and logprobs again, from NLLs that `predict` gives, of policy and reference."""
    model = jx.load("runs/whole")
    valid = read_judgements(task_of().config.data).valid
    rows = [
        {"prompt": text.text[: text.prompt], "completion": text.text[text.prompt :]}
        for pair in valid
        for text in pair.texts
    ]
    sums = []
    for part in halves("whole", model.saved.step):
        nested = {}
        for path, value in part.items():
            *above, last = path.split("/")
            inner = nested
            for name in above:
                inner = inner.setdefault(name, {})
            inner[last] = value
        model.saved.weights.params.update(nested)  # each half in the policy's place
        scores = model.predict(pa.Table.from_pylist(rows))
        sums.append(-(scores["nll"].to_numpy() * scores["tokens"].to_numpy()).reshape(-1, 2))
    policy, reference = sums
    margins = 0.2 * ((policy - reference)[:, 0] - (policy - reference)[:, 1])
    found = summary("whole")
    assert found["valid/loss"] == pytest.approx(np.logaddexp(0, -margins).mean(), rel=1e-4)
    assert found["valid/reward_margin"] == pytest.approx(margins.mean(), rel=1e-4)
    assert found["valid/logprob_chosen"] == pytest.approx(policy[:, 0].mean(), rel=1e-5)
    assert found["valid/logprob_rejected"] == pytest.approx(policy[:, 1].mean(), rel=1e-5)


def numpy_logprob(model, params, row):
    """The log-probability of the answer in one row of a batch, from full logits in float64."""
    size = int(row["segment"].sum())
    given = [jnp.asarray(row[name][None, :size]) for name in ("tokens", "segment", "position")]
    logits = np.asarray(model.logits(params, model.hidden(params, *given)), np.float64)[0, :, : model.real_vocab]
    every = logits - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True))
    every -= logits.max(1, keepdims=True)
    return sum(every[at, row["targets"][at]] for at in range(size) if row["mask"][at])


SMOOTHED, SQUARED = "{kind: dpo, beta: 0.2, label_smoothing: 0.1}", "{kind: ipo, beta: 0.2}"


@pytest.mark.slow
@pytest.mark.parametrize("objective", [SMOOTHED, SQUARED])
def test_an_update_goes_down_the_loss_of_numpy_in_float64(whole, objective):
    """The update's product with a direction is the slope of the loss along it, by differences of numpy's loss."""
    task = task_of(f"objective={objective}", "model.dim=8")
    decoder, batch = task.model.model, task.source.batch(0, 4)
    params = task.model.init(jax.random.key(1))
    nudge = lambda at, leaf: leaf + 0.05 * jax.random.normal(jax.random.key(at), leaf.shape)
    leaves, tree = jax.tree.flatten(task.model.policy(params))
    policy = jax.tree.unflatten(tree, [nudge(at, leaf) for at, leaf in enumerate(leaves)])
    reference = task.model.base(params)
    rows = [
        {name: batch[name][at, side] for name in batch if batch[name].ndim > 2} for at in range(4) for side in (0, 1)
    ]
    known = np.array([numpy_logprob(decoder, reference, row) for row in rows]).reshape(4, 2)
    tokens = batch["mask"].sum(-1)

    def loss(policy):
        ratios = np.array([numpy_logprob(decoder, policy, row) for row in rows]).reshape(4, 2) - known
        if "ipo" in objective:
            means = ratios / tokens
            return np.square(means[:, 0] - means[:, 1] - 1 / 0.4).mean()
        h = 0.2 * (ratios[:, 0] - ratios[:, 1])
        return (0.9 * np.logaddexp(0, -h) + 0.1 * np.logaddexp(0, h)).mean()

    def mean(policy):
        sums = task.objective({**policy, "reference": reference}, jax.tree.map(jnp.asarray, batch), None)
        total = next(value for name, value in sums.items() if name.startswith("loss/"))
        return total.total / total.count

    value, slope = jax.jit(jax.value_and_grad(mean))(policy)
    assert float(value) == pytest.approx(loss(policy), rel=1e-5)
    size = math.sqrt(sum(float(jnp.sum(x * x)) for x in jax.tree.leaves(slope)))
    step = lambda e: jax.tree.map(lambda p, g: p + e * g / size, policy, slope)
    assert (loss(step(3e-3)) - loss(step(-3e-3))) / 6e-3 == pytest.approx(size, rel=2e-3)


def test_a_run_goes_on_where_it_stopped(whole):
    for steps in (4, 8):
        fit(task_of("run.name=again", f"run.steps={steps}"), quiet=True)
    for path, value in parameters("whole", 8).items():
        np.testing.assert_array_equal(parameters("again", 8)[path], value, err_msg=path)


CODE = "import sys; from jaxops.cli.main import script; sys.argv[0] = 'jaxops'; script()"


@pytest.mark.slow
def test_a_run_that_is_killed_becomes_the_undisturbed_one(whole):
    """SIGKILL after the first checkpoint; reference and policy are the same to the last bit."""
    overrides = ["run.steps=40", "evaluate.every=40"]
    argv = [sys.executable, "-c", CODE, "train", "dpo.yaml", "--cpu-devices", str(len(jax.devices()))]
    process = subprocess.Popen(
        [*argv, *overrides, "run.name=killed"], env={**os.environ}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not Path("runs/killed/checkpoints/4/commit_success.txt").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    for name in ("killed", "undisturbed"):
        assert subprocess.run([*argv, *overrides, f"run.name={name}"], capture_output=True).returncode == 0
    for path, value in parameters("undisturbed", 40).items():
        np.testing.assert_array_equal(parameters("killed", 40)[path], value, err_msg=path)


def test_the_policy_is_sampled_talked_to_and_exported_alone(whole, tmp_path, capsys):
    model = jx.load("runs/whole")
    (row,) = model.generate(["say 3: "], temperature=0, max_tokens=5).to_pylist()
    model.export(tmp_path / "out")
    own = CONFIG.replace(MODEL, f"model: {{weights: {tmp_path}/out}}").replace("tokenizer: bytes\n", "")
    (tmp_path / "own.yaml").write_text(own)
    again = task_of(config=tmp_path / "own.yaml")
    assert {"config.json", "model.safetensors"} <= {path.name for path in (tmp_path / "out").iterdir()}
    mesh = jx.make_mesh(data=1, devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        state, _ = begin_with(build_training(again, mesh).fresh(), again.start())
    vocab, held = model.decoder.real_vocab, dict(named_leaves(jax.device_get(state.params)))
    for path, value in named_leaves(model.params):
        np.testing.assert_array_equal(held[path][:vocab], value[:vocab], err_msg=path)
    talk = model.chat(temperature=0, max_tokens=5, template="none")
    assert talk.answer("say 3: ", lambda piece: None) == row["completion"]
    assert main(["sample", "runs/whole", "--prompt", "say 3: ", "--temperature", "0", "--max-tokens", "5"]) == 0
    assert main(["export", "runs/whole", str(tmp_path / "hf"), "--to", "hf"]) == 0


def test_a_chosen_start_is_the_reference_too(whole):
    """The weights of a run that has a reference itself: the new reference is the policy as trained, not the old one."""
    Path("next.yaml").write_text(
        CONFIG.replace(MODEL, "model: {weights: runs/whole}").replace("tokenizer: bytes\n", "")
    )
    fit(task_of("run.name=next", "run.steps=1", config="next.yaml"), quiet=True)
    trained, old = halves("whole")
    for path, value in halves("next")[1].items():
        np.testing.assert_array_equal(value, trained[path], err_msg=path)
    fit(task_of("run.name=from", "run.steps=1", "init_from.run=runs/whole"), quiet=True)
    for path, value in halves("from")[1].items():
        np.testing.assert_array_equal(value, trained[path], err_msg=path)
    assert any(np.abs(trained[path] - old[path]).max() > 0 for path in old)


@pytest.mark.slow
def test_under_adapters_the_base_is_the_reference(whole):
    own = CONFIG.replace(MODEL, "model: {weights: runs/whole, lora: {rank: 2}}").replace("tokenizer: bytes\n", "")
    Path("lora.yaml").write_text(own)
    fit(task_of("run.name=lora", "run.steps=3", config="lora.yaml"), quiet=True)
    held, trained = parameters("lora"), halves("whole")[0]
    assert not any(path.startswith("reference/") for path in held)
    assert all(np.array_equal(held[path], value) for path, value in trained.items())
    assert all(np.any(held[path]) for path in held if path.startswith("lora/") and path.endswith("/b"))
    model = jx.load("runs/lora")
    assert model.evaluate()["valid/loss"] == pytest.approx(summary("lora")["valid/loss"])
    assert model.generate(["say 3: "], max_tokens=3).num_rows == 1
    again = own.replace("weights: runs/whole", "weights: runs/lora")
    Path("again.yaml").write_text(again)
    with pytest.raises(UserError, match="the reference would be the weights without them"):
        task_of(config="again.yaml")


def test_pairs_that_teach_nothing_are_counted_and_told(whole, caplog):
    rows = [vote(at) for at in range(8)]
    rows += [{"prompt": "p" * 50, "chosen": "yes", "rejected": "no"}]  # alike within the length
    write_rows("odd.jsonl", rows)
    data = "data={kind: preferences, path: odd.jsonl, length: 38, valid: null, too_long: cut_end}"
    quiet = ["evaluate.metrics=[accuracy]", "checkpoint.best=null"]
    notes = "\n".join(task_of(data, *quiet).inspection["notes"])
    assert "1 of 9 pairs have the same tokens on both sides within data.length 38" in notes
    assert task_of(data, *quiet).source.examples == 8
    whole_rows = "data={kind: preferences, path: odd.jsonl, length: 64, valid: null}"
    task = task_of(whole_rows, *quiet, "model.length=64")
    assert task.source.examples == 9 and "notes" not in task.inspection
    write_rows("odd.jsonl", [{"prompt": "p" * 50, "chosen": "yes", "rejected": "no"}] * 3)
    with pytest.raises(UserError, match=r"no pair is left to learn from within data\.length 38"):
        task_of(data, *quiet)
    write_rows("odd.jsonl", [vote(0), {"prompt": "p", "chosen": "same", "rejected": "same"}])
    with pytest.raises(UserError, match=r"odd.jsonl:2: .*nothing is preferred"):
        task_of(data, *quiet)
    write_rows("odd.jsonl", [vote(0), {"prompt": "p", "chosen": "yes", "rejected": ""}])
    with pytest.raises(UserError, match=r"odd.jsonl:2: column 'rejected' is empty"):
        task_of(data, *quiet)


class Bare(ByteTokenizer):
    """Bytes without marks around a text, so that a text of one byte has no token that another one predicts."""

    bos = eos = None

    def encode_batch(self, texts, special=False):
        return super().encode_batch(texts)


def test_answers_without_a_token_to_learn_from_are_left_out(whole):
    rows = [{"chosen": f"good {at}", "rejected": f"bad {at}"} for at in range(4)]
    write_rows("bare.jsonl", [*rows, {"chosen": "a", "rejected": "bc"}])
    read = read_judgements(PreferenceData(path="bare.jsonl", length=40, template=None))
    found = read.opened(Bare(), answers=True)
    assert found.source(0).examples == 4 and read.opened(Bare()).source(0).examples == 5
    assert "1 of 5 pairs have an answer without a token to learn from" in "\n".join(found.inspection["notes"])
    batch = found.source(0).batch(0, 4)
    assert (batch["mask"].sum(-1) > 0).all()
    write_rows("bare.jsonl", [{"text": text, "ratings": [len(text)]} for text in ("a", "bc", "def", "ghij")])
    read = read_judgements(RatingData(path="bare.jsonl", length=40))
    found = read.opened(Bare(), answers=True)
    assert found.source(0).examples == 3 and "1 texts of one token" in "\n".join(found.inspection["notes"])


@pytest.mark.slow
def test_ratings_train_a_policy_on_whole_texts(whole, tmp_path):
    rated = [{"text": f"{WORDS[at % 6]} {WORDS[at // 6 % 6]}", "ratings": [at % 6, at % 4]} for at in range(60)]
    write_rows("ratings.jsonl", rated)
    data = "data={kind: ratings, path: ratings.jsonl, length: 40, valid: {share: 0.3}}"
    run = fit(task_of(data, "run.name=ratings", "run.steps=2", "objective={kind: ipo}"), quiet=True)
    assert run.summary["baseline/ceiling/valid/accuracy"] > 0.5 and 0 <= run.summary["valid/accuracy"] <= 1
    assert jx.load("runs/ratings").evaluate()["valid/loss"] == run.summary["valid/loss"]


def test_a_policy_of_conversations_answers_as_a_conversation(whole):
    said = lambda at, answer: [{"role": "user", "content": f"say {at}"}, {"role": "assistant", "content": answer}]
    write_rows("talks.jsonl", [{"chosen": said(at, "yes"), "rejected": said(at, "no!")} for at in range(20)])
    data = "data={kind: preferences, path: talks.jsonl, length: 64, template: model, valid: null}"
    short = ["model.length=64", "run.steps=1", "evaluate.metrics=[]", "checkpoint.best=null"]
    fit(task_of(data, "run.name=talks", *short), quiet=True)
    model = jx.load("runs/talks")
    writer = model._generation.writer(Generate(), print)
    assert isinstance(writer, PromptWriter) and writer.chats
    assert model.tokenizer.decode(writer.ids(("a", {"prompt": "hi"}))).endswith("<|im_start|>assistant\n")
    plain = jx.load("runs/whole")._generation.writer(Generate(), print)
    assert not plain.chats


def test_the_preview_and_the_inspection(whole, capsys):
    assert main(["data", "preview", "dpo.yaml"]) == 0
    shown = capsys.readouterr().out
    assert "the first is better with probability 1" in shown and "⟦a " in shown and ": ⟦the " in shown
    assert main(["data", "inspect", "dpo.yaml", "--json"]) == 0
    counts = json.loads(capsys.readouterr().out)
    assert counts["train"]["pairs"] + counts["valid"]["pairs"] == 100 and counts["conversations"] == 0


def test_a_user_s_own_objective_gets_the_reference_of_its_batch(whole):
    def mine(model):
        def objective(params, batch, key):
            assert "reference" not in params
            return {"loss/mine": jx.Sum.of(batch["reference"][:, 0], batch["weight"])}

        return objective

    task = jx.build_task(jx.load_config("dpo.yaml"), objective=mine)
    batch = jax.tree.map(jnp.asarray, task.source.batch(0, 8))
    found = task.objective(task.model.init(jax.random.key(0)), batch, None)["loss/mine"]
    assert float(found.total) < -50


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["objective={kind: next_token}"], "`next_token` learns from single texts, not from preferences"),
        (["data={kind: text, path: t.jsonl, length: 40}"], "`dpo` compares two answers, not so `text`"),
        (["objective.kind=dpoo"], "did you mean"),
        (["objective.beta=0"], "objective.beta"),
        (["objective={kind: ipo, normalisation: mean}"], "token_mean"),
        (["evaluate.metrics=[entropy]", "checkpoint.best=null"], "no metric 'entropy'"),
        (["evaluate.metrics=[reward_margn]", "checkpoint.best=null"], "did you mean 'reward_margin'"),
        (["checkpoint.best=reward_margin"], "has no better direction"),
        (["data.valid=null"], "nothing is held out"),
        (
            ["model.weights=runs/whole", "model.lora={rank: 2}", "tokenizer=null", "init_from.run=runs/whole"],
            "init_from",
        ),
    ],
)
def test_what_does_not_go_together_is_told(whole, capsys, overrides, said):
    assert main(["train", "dpo.yaml", *overrides, "run.name=bad"]) == 2
    error = " ".join(capsys.readouterr().err.split())
    assert said in error and "Traceback" not in error
    assert not Path("runs/bad").exists()

"""What a policy's config gets wrong is told in one message with exit status 2, and nothing is written."""

from pathlib import Path

import pytest
from policy_runs import lines, task_of

from jaxops.cli.main import main

TINY = Path(__file__).parents[2] / "fixtures/text/tiny"
LOW = "{fn: 'judges_of_policies:low'}"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["rewards=[]"], "rewards [override 'rewards=[]']: nothing to learn from"),
        ([f"rewards=[{LOW}, {LOW}]"], "another reward is named 'low' too: set name"),
        ([f"rewards=[{LOW[:-1]}, metrics: [n, n]}}]"], "'n' is there more than once"),
        (["evaluate.metrics=[reward/low/n]"], "evaluate.metrics.0"),
        (["rewards=[{kind: missing_eoss, penalty: 1}]"], "did you mean 'missing_eos'"),
        (["rewards=[{fn: 'judges_of_policies:lov'}]"], "has no 'lov'; did you mean 'low'"),
        (["rewards=[{fn: 'judges_of_policiez:low'}]"], "did you mean 'judges_of_policies'"),
        (["rewards=[{fn: 'judges_of_policies:one_arg'}]"], "is called with 2 positional, it takes 1"),
        (["rewards=[{fn: 'judges_of_policies:needs'}]"], "needs 'solution', but the data has no such column"),
        (["rewards=[{run: runs/nowhere}]"], "rewards.0.run: runs/nowhere is not a run folder"),
        (["rewards=[{kind: missing_eos, penalty: 1}, {run: runs/ppo}]"], "rewards.1.run: runs/ppo is a run of task"),
        (["sample.top_p=0.9"], "has no ratio of probabilities"),
        (["sample.temperature=0"], "sample.temperature"),
        (["algorithm.minibatches=3"], "3 do not divide the 16 completions of a step"),
        (["batch.microbatch=3"], "3 does not divide the 8 completions of an update"),
        (["algorithm={kind: grpo, group: 1}"], "algorithm.group"),
        (["algorithm={kind: best_of_n, group: 4, keep: 4}"], "algorithm.keep"),
        (["algorithm={kind: best_of_n, clip: 0.1}"], "no ratio of probabilities"),
        (["sample.max_tokens=30"], "+ sample.max_tokens: 46 tokens"),
        (["ptx={coef: -1, data: {kind: text, path: prompts.jsonl}}"], "ptx.coef"),
        (["ptx={coef: 1, data: {kind: prompts, path: prompts.jsonl}}"], "ptx.data.kind"),
        (["ptx={coef: 1, data: {kind: text, path: nowhere.jsonl, length: 8}}"], "ptx.data: "),
        (["ptx={coef: 1, data: {kind: text, path: prompts.jsonl, length: 41}}"], "41 tokens in a row, but the policy"),
        (
            ["model={kind: decoder}", "ptx={coef: 1, data: {kind: text, path: prompts.jsonl, length: 512}}"],
            "512 tokens in a row, but the model reads 128 (model.length)",
        ),
        (["tokenizer=null"], "base comes without one"),
        (["model={kind: decoder, length: 20}"], "22 tokens, but the model reads 20"),
        (["model={kind: decoder}", "tokenizer=null"], "a model with fresh parameters has none"),
        (["tokenizer=byte"], "did you mean 'bytes'"),
        ([f"tokenizer={TINY}", "model={weights: runs/ppo}"], "tokenizer"),
        (["tokenizer=null", "model={weights: runs/pp}"], "did you mean 'runs/ppo'"),
        (["value={kind: trunk, weights: runs/nowhere}"], "value.weights: runs/nowhere is not a run folder"),
        (["value={kind: trunk, weights: runs/ppo}", "model.weights=wide"], "they must be alike"),
        (["value={kind: trunk, weights: runs/ppo}", "model.weights=turned"], "rope.theta is 10000.0, the policy's is"),
        (
            ["reference=runs/ppo", "model.weights=turned"],
            "reference: the decoder of runs/ppo is another one than the policy's: rope.theta is 10000",
        ),
        (["algorithm.kl={coef: 0, target: 6}"], "algorithm.kl.coef [override 'algorithm.kl={coef: 0, target: 6}']: it"),
        (["evaluate.metrics=[reward, win_rate]"], "win_rate needs evaluate.judge"),
        (["evaluate.metrics=[rewrad]"], "did you mean 'reward'"),
        (["evaluate.judge=judges_of_policies:low"], "is called with 3 positional, it takes 2"),
        (["data.valid=null", "checkpoint.best=reward"], "data.valid"),
        (["checkpoint.best=kl"], "'kl' has no better direction"),
        (["data.path=clash.jsonl", "rewards=[{fn: 'judges_of_policies:everything'}]"], "'completions', which is the"),
        (["data.columns.prompt=question"], "no column 'question'"),
        (["data.template=chat"], "longer than data.max_tokens 16"),
        (["mesh.data=3"], "16 is no multiple of the mesh's batch shards"),
        (["algorithm.minibatches=4"], "an update reads 4 completions, no multiple of the mesh's batch shards"),
        (["mesh.sequence=2"], "mesh.sequence"),
        (["batch.global=4"], "known: prompts, microbatch"),
    ],
)
def test_what_does_not_go_together_is_told(there, capsys, overrides, said):
    Path("clash.jsonl").write_text(lines([{"prompt": f"say {at}", "completions": "x"} for at in range(20)]))
    assert main(["train", "ppo.yaml", *overrides, "run.name=bad"]) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error
    assert not Path("runs/bad").exists()


def test_an_algorithm_without_a_reference_leaves_what_needs_one_undefined(there):
    task = task_of("algorithm={kind: grpo, group: 2}", "value={kind: trunk}")
    assert {"kl", "kl_token", "win_rate"} <= set(task.undefined["valid"])
    assert any("grpo" in notice and "has no values" in notice for notice in task.notices)

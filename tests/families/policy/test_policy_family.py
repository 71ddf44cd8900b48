"""The policy family, whole: trained, evaluated again, asked, exported, and begun with the weights of other runs."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from policy_runs import trained

import jaxops as jx
from jaxops.cli.main import main
from jaxops.core.checkpoint import Checkpoints
from jaxops.core.failures import UserError
from jaxops.core.metrics_file import read_metrics
from jaxops.core.sharding import named_leaves
from jaxops.core.weights import load_weights, targets_of
from jaxops.models.decoder.decoder import build_decoder
from jaxops.models.decoder.pretrained import open_pretrained

GRPO = "algorithm={kind: grpo, group: 4, minibatches: 2}"
OF_SFT = ("model={weights: runs/sft}", "tokenizer=null")


def parameters(name: str, step: int = 2, part: str = "params") -> dict[str, np.ndarray]:
    with Checkpoints(f"runs/{name}/checkpoints") as checkpoints:
        return dict(named_leaves(checkpoints.load_params(step, part)))


def summary(name: str) -> dict:
    return json.loads(Path(f"runs/{name}/summary.json").read_text())


def measured(name: str) -> dict[str, float]:
    return {key: value for key, value in summary(name).items() if key.startswith("valid/")}


def windows(name: str) -> list[dict]:
    return [line for line in read_metrics(f"runs/{name}/metrics.jsonl") if "train/loss" in line]


def test_a_run_writes_metrics_and_samples(there):
    found = windows("ppo")
    assert [line["step"] for line in found] == [1, 2]
    for line in found:
        assert 5 < line["train/length"] <= 6 and line["train/dropped"] == 0 and line["train/ratio0"] < 1e-4
        total = line["train/reward/low"] + line["train/reward/missing_eos"]
        assert line["train/reward"] == pytest.approx(total, abs=1e-6)
        assert line["train/kl_coefficient"] == pytest.approx(0.05)
    assert found[0]["train/kl"] == 0 and found[1]["train/kl"] != 0
    lines = [json.loads(line) for line in Path("runs/ppo/samples.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2] * 4
    for line in lines:
        assert line["prompt"].startswith("say ") and line["stopped"] == "length" and "reference" in line
        share = sum(ord(c) < 64 for c in line["completion"]) / max(len(line["completion"]), 1)
        assert line["reward"] == pytest.approx(share - 0.1, abs=1e-6)
    assert summary("ppo")["step"] == 2 and summary("ppo")["valid/reward"] == measured("ppo")["valid/reward"]


def test_what_else_a_reward_measures_is_logged_and_evaluated(there, tmp_path, monkeypatch):
    monkeypatch.setenv("ASKED", str(tmp_path / "asked"))
    rewards = "rewards=[{fn: 'judges_of_policies:measured', metrics: [characters]}]"
    trained("measured", rewards, "evaluate.metrics=[reward, reward/measured/characters]", "sample.max_tokens=3")
    asked = [len(json.loads(line)[1]) for line in (tmp_path / "asked").read_text().splitlines()]
    for step, line in enumerate(windows("measured")):
        each = asked[16 * step : 16 * (step + 1)]
        assert line["train/reward/measured/characters"] == pytest.approx(np.mean(each)) and max(each) < 6
    lines = Path("runs/measured/samples.jsonl").read_text().splitlines()
    lengths = [len(json.loads(line)["completion"]) for line in lines]
    assert summary("measured")["valid/reward/measured/characters"] == pytest.approx(np.mean(lengths))
    assert lengths and summary("measured")["valid/reward"] > 0


def test_a_served_policy_reads_nothing_but_the_policy(there, monkeypatch):
    def only_policy(checkpoints, step, prefix="params", *rest, **more):
        assert prefix.split("/")[1:] == ["policy"], prefix
        return load(checkpoints, step, prefix, *rest, **more)

    load = Checkpoints.load_params
    monkeypatch.setattr(Checkpoints, "load_params", only_policy)
    served = jx.load("runs/ppo")
    assert served.generate(["say 1"], max_tokens=3, temperature=0).num_rows == 1
    monkeypatch.setattr("jaxops.run.saved_run.memory_here", lambda: 3 * 4 * served.saved.entries() // 8)
    assert jx.load("runs/ppo").params  # three eighths of the whole are room for the policy


def test_a_policy_of_another_architecture_is_refused_before_it_is_read(there, tmp_path):
    shutil.copytree("runs/ppo", tmp_path / "copy")
    file = tmp_path / "copy/transform/architecture.parquet"
    kept = json.loads(pq.read_table(file)["architecture"].to_numpy().astype(np.uint8).tobytes())
    text = json.dumps(kept | {"hidden": 64}).encode()
    pq.write_table(pa.table({"architecture": np.frombuffer(text, np.uint8)}), file)
    (tmp_path / "copy/transform/digests.json").unlink()
    with pytest.raises(UserError, match=r"is not of the model that its config describes.*policy/"):
        jx.load(tmp_path / "copy")


def test_the_reference_is_what_the_policy_began_as(there):
    params, frozen = parameters("ppo"), parameters("ppo", part="frozen")
    found = open_pretrained("base")
    fresh, _ = load_weights(targets_of(build_decoder(found.architecture).shapes), [found.source])
    for path, value in frozen.items():
        np.testing.assert_array_equal(value, fresh[path.removeprefix("reference/")], err_msg=path)
        assert not np.array_equal(value, params[path.replace("reference/", "policy/", 1)]), path
    assert params.keys() - {path.replace("reference/", "policy/", 1) for path in frozen} == {
        "value/score/kernel",
        "value/score/bias",
    }
    assert params["value/score/kernel"].any()


def test_evaluate_gives_the_run_s_own_numbers(there):
    assert jx.load("runs/ppo").evaluate() == pytest.approx(measured("ppo"), rel=1e-6)


def test_it_is_asked_like_a_language_model(there, tmp_path, capsys):
    assert main(["sample", "runs/ppo", "--prompt", "say 3", "--max-tokens", "4", "--temperature", "0"]) == 0
    said = capsys.readouterr().out
    Path(tmp_path / "asked.jsonl").write_text('{"prompt": "say 3"}\n{"prompt": "say 4"}\n')
    command = ["predict", "runs/ppo", str(tmp_path / "asked.jsonl"), "--out", str(tmp_path / "out.jsonl")]
    assert main([*command, "--max-tokens", "4"]) == 0
    first, second = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert first["completion"] in said and second["prompt"] == "say 4"
    capsys.readouterr()


def test_an_export_opens_as_weights(there, tmp_path, capsys):
    assert main(["export", "runs/ppo", str(tmp_path / "out"), "--to", "hf"]) == 0
    assert (tmp_path / "out/model.safetensors").exists() and (tmp_path / "out/config.json").exists()
    capsys.readouterr()
    from safetensors.numpy import load_file

    held = load_file(tmp_path / "out/model.safetensors")
    assert np.array_equal(held["model.embed_tokens.weight"][:260], parameters("ppo")["policy/embed/embedding"][:260])


def learnt(name: str) -> None:
    """Asserts that a run of the default two steps has moved its policy, and can be evaluated again."""
    assert np.isfinite(windows(name)[-1]["train/loss"])
    assert jx.load(f"runs/{name}").evaluate() == pytest.approx(measured(name), rel=1e-5)


@pytest.mark.slow
def test_a_value_with_a_trunk_of_its_own_begins_as_the_policy(there):
    trained("trunk", "value={kind: trunk}", "optimizer.lr=1e-30")
    held = parameters("trunk")
    for path, value in held.items():
        if path.startswith("value/") and "score" not in path:
            np.testing.assert_array_equal(value, held[path.replace("value/", "policy/", 1)], err_msg=path)
    trained("trunk-learns", "value={kind: trunk}")
    moved = parameters("trunk-learns")
    assert not np.array_equal(moved["value/embed/embedding"], moved["policy/embed/embedding"])
    learnt("trunk-learns")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "dapo", "rloo", "best_of_n"])
def test_swapping_the_algorithm_changes_nothing_else(there, kind):
    penalty = ", kl: {coef: 0.05}" if kind == "rloo" else ""
    trained(kind, f"algorithm={{kind: {kind}, group: 4, minibatches: 2{penalty}}}")
    line = windows(kind)[-1]
    assert "train/loss/policy" in line and "train/loss/value" not in line and 0 <= line["train/flat_groups"] <= 1
    assert ("train/kl" in line) == (kind == "rloo")
    found = jx.load(f"runs/{kind}").evaluate()
    assert found == pytest.approx(measured(kind), rel=1e-5)
    assert any(path.startswith("value/") for path in parameters(kind)) is False


@pytest.mark.slow
def test_a_policy_begins_with_a_language_model_and_is_judged_by_a_reward_model(begun):
    rewards = "rewards=[{run: runs/rm, weight: 0.5}, {fn: 'judges_of_policies:low', name: mine, weight: 2}]"
    trained("of-rm", *OF_SFT, rewards, "value={kind: trunk, weights: runs/rm}", "optimizer.lr=1e-30")
    params, frozen = parameters("of-rm"), parameters("of-rm", part="frozen")
    for path, value in parameters("sft", 1).items():
        np.testing.assert_array_equal(params[f"policy/{path}"], value, err_msg=path)
        np.testing.assert_array_equal(frozen[f"reference/{path}"], value, err_msg=path)
    for path, value in parameters("rm").items():
        np.testing.assert_array_equal(frozen[f"rewards/rm/{path}"], value, err_msg=path)
        if (mine := f"value/{path}".replace("value/reward/", "value/score/")) in params:
            np.testing.assert_allclose(params[mine], value, atol=1e-28, err_msg=path)
    assert {path for path in params if path.startswith("value/")} == {
        f"value/{path}".replace("value/reward/", "value/score/") for path in parameters("rm")
    }
    line = windows("of-rm")[0]
    assert line["train/reward"] == pytest.approx(
        0.5 * line["train/reward/rm"] + 2 * line["train/reward/mine"], abs=1e-5
    )
    learnt("of-rm")


@pytest.mark.slow
def test_a_reward_run_says_of_samples_what_predict_says(begun):
    import pyarrow as pa

    trained("judged", *OF_SFT, "rewards=[{run: runs/rm}]", "evaluate.samples=4")
    samples = [json.loads(line) for line in Path("runs/judged/samples.jsonl").read_text().splitlines()]
    table = pa.table({name: [line[name] for line in samples] for name in ("prompt", "completion")})
    found = jx.load("runs/rm").predict(table)["score"].to_pylist()
    assert [line["reward"] for line in samples] == pytest.approx(found, abs=1e-4)


@pytest.mark.slow
def test_adapters_are_trained_over_a_frozen_base_that_is_the_reference(begun):
    trained("lora", "model={weights: runs/sft, lora: {rank: 2}}", "tokenizer=null")
    params, frozen = parameters("lora"), parameters("lora", part="frozen")
    for path, value in parameters("sft", 1).items():
        np.testing.assert_array_equal(frozen[f"policy/{path}"], value, err_msg=path)
    assert not any(path.startswith("reference/") for path in frozen)
    assert {path.split("/")[1] for path in params} == {"lora", "score"}
    assert windows("lora")[0]["train/kl"] == pytest.approx(0, abs=1e-6)
    learnt("lora")
    jx.load("runs/lora").export(Path("lora-out"))
    assert jx.load("runs/lora").generate(["say 1"], max_tokens=3, temperature=0).num_rows == 1


@pytest.mark.slow
def test_a_next_run_begins_where_a_run_ended(there):
    trained("next", "model={weights: runs/ppo}", "tokenizer=null", "optimizer.lr=1e-30", "run.steps=1")
    before, after = parameters("ppo"), parameters("next", 1)
    frozen = parameters("next", 1, part="frozen")
    for path, value in before.items():
        if path.startswith("policy/"):
            np.testing.assert_array_equal(after[path], value, err_msg=path)
            np.testing.assert_array_equal(frozen[path.replace("policy/", "reference/", 1)], value, err_msg=path)
    trained("next-trunk", "model={weights: runs/ppo}", "tokenizer=null", "value={kind: trunk, weights: runs/ppo}")
    learnt("next-trunk")


@pytest.mark.slow
def test_several_rewards_see_columns_and_drop_what_they_cannot_judge(there):
    rewards = (
        "rewards=[{fn: 'judges_of_policies:answered', weight: 0.5}, {fn: 'judges_of_policies:everything'},"
        " {fn: 'judges_of_policies:half', on_error: drop}, {kind: length, per_token: 0.01},"
        " {kind: overlong, longest: 6, buffer: 2}]"
    )
    trained("several", rewards)
    line = windows("several")[0]
    assert line["train/reward/answered"] == 1 and line["train/reward_errors/half"] > 0
    assert 0.3 < line["train/dropped"] < 0.95
    assert line["train/reward/everything"] == 0  # only level 0 is left
    wanted = 0.5 + 0 + 1 + line["train/reward/length"] + line["train/reward/overlong"]
    assert line["train/reward"] == pytest.approx(wanted, abs=1e-5)
    learnt("several")


@pytest.mark.slow
def test_a_judge_says_how_often_the_policy_beats_its_reference(there):
    trained("won", "evaluate.metrics=[reward, win_rate, entropy, kl_token]", "evaluate.judge=judges_of_policies:longer")
    assert 0 <= measured("won")["valid/win_rate"] <= 1 and measured("won").keys() == {
        "valid/reward",
        "valid/win_rate",
        "valid/entropy",
        "valid/kl_token",
    }

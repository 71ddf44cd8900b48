"""The loop of RLHF on toy models: two rounds, killed and gone on with, people who have not answered, wrong configs."""

import json

import pytest

from jaxops.cli.main import main
from jaxops.core.failures import EXIT_WAITING

pytestmark = pytest.mark.slow

SFT = """
task: language
tokenizer: bytes
model: {kind: decoder, dim: 32, layers: 1, heads: 2, hidden: 64, length: 64}
data: {kind: completion, path: talk.jsonl, length: 48, template: null}
batch: {global: 8}
mesh: {data: -1}
run: {name: sft, steps: 2, loggers: []}
"""
REWARD = """
task: reward
tokenizer: bytes
model: {kind: decoder, dim: 32, layers: 1, heads: 2, hidden: 64, length: 64, ensemble: 2}
data: {kind: preferences, path: votes.jsonl, length: 64, template: null, valid: {share: 0.25}}
batch: {global: 8}
mesh: {data: -1}
evaluate: {every: 2}
run: {steps: 2, loggers: []}
"""
POLICY = """
task: policy
model: {weights: runs/sft}
data: {kind: prompts, path: prompts.jsonl, template: none, max_tokens: 16, valid: {share: 0.25}}
rewards: [{run: round}]
sample: {max_tokens: 8, slots: 16, segment: 8}
algorithm: {kind: ppo, epochs: 1, minibatches: 1}
batch: {prompts: 8}
mesh: {data: -1}
evaluate: {every: 2, prompts: 8, samples: 2}
run: {steps: 2, loggers: []}
"""
LOOP = """
rounds: 2
policy: policy.yaml
reward: reward.yaml
prompts: prompts.jsonl
pairs: {per_round: 16, choose: disagreement, candidates: 2}
judge: {fn: "test_judges:longer"}
answers: {max_tokens: 8, slots: 16}
compare: {count: 8}
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rlhf")
    for name, text in (("sft", SFT), ("reward", REWARD), ("policy", POLICY), ("loop", LOOP)):
        (folder / f"{name}.yaml").write_text(text)
    words = ["alpha", "beta", "gamma", "delta", "one", "two", "three", "four", "five", "six", "seven", "eight"]
    prompts = [f"say {word}" for word in words]
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in prompts))
    talk = [{"prompt": text, "completion": text[::-1]} for text in prompts]
    (folder / "talk.jsonl").write_text("".join(json.dumps(row) + "\n" for row in talk))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["train", "sft.yaml"]) == 0
    return folder


def test_two_rounds_and_what_made_what(home, monkeypatch, capsys):
    monkeypatch.chdir(home)
    assert main(["rlhf", "loop.yaml", "rounds=1"]) == 0
    first = (home / "runs/rlhf/round-1/round.json").read_bytes()
    capsys.readouterr()
    assert main(["rlhf", "loop.yaml", "--json"]) == 0  # goes on with the second round
    assert (home / "runs/rlhf/round-1/round.json").read_bytes() == first
    rounds = json.loads(capsys.readouterr().out)["rounds"]
    assert [one["round"] for one in rounds] == [1, 2]
    assert rounds[0]["start"] == "runs/sft"
    assert rounds[1]["start"] == "runs/rlhf/round-1/policy"
    assert rounds[1]["pairs"]["count"] <= 16
    lineage = json.loads((home / "runs/rlhf/lineage.json").read_text())
    assert lineage["rounds"] == rounds and len({one["policy"]["checkpoint_sha256"] for one in rounds}) == 2
    page = (home / "runs/rlhf/report.html").read_text()
    assert "round-2/policy/report.html" in page
    config = (home / "runs/rlhf/round-2/policy/config.yaml").read_text()
    assert "reference: runs/sft" in config and "runs/rlhf/round-2/reward" in config
    assert main(["rlhf", "loop.yaml"]) == 0  # nothing is left to do


def test_people_who_have_not_answered_are_waited_for(home, monkeypatch, capsys):
    monkeypatch.chdir(home)
    command = ["rlhf", "loop.yaml", "rounds=1", "run.name=people", "judge={kind: file, path: votes}"]
    assert main(command) == EXIT_WAITING
    assert "pairs have no answer in votes" in capsys.readouterr().err
    folder = home / "runs/people/round-1"
    pairs = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    (home / "votes").mkdir()
    answers = [{"id": pair["id"], "choice": "a" if len(pair["a"]) > len(pair["b"]) else "b"} for pair in pairs]
    (home / "votes/anna.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers))
    assert main(command) == 0
    assert json.loads((folder / "round.json").read_text())["win_rate"] is None  # nobody was asked to compare
    compared = [json.loads(line) for line in (folder / "comparisons.jsonl").read_text().splitlines()]
    assert len(compared) == 8
    answers = [{"id": pair["id"], "choice": "tie", "annotator": name} for pair in compared for name in ("anna", "ben")]
    (home / "votes/compared.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers))
    assert main(command) == 0  # people compared the policies after the round
    rate = json.loads((folder / "round.json").read_text())["win_rate"]
    assert rate["rate"] == 0.5 and rate["comparisons"] == 8
    assert json.loads((home / "runs/people/lineage.json").read_text())["rounds"][0]["win_rate"] == rate


def test_it_waits_in_a_process_that_holds_no_chips(home, monkeypatch):
    monkeypatch.chdir(home)
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=8")
    slept = []

    def answered(seconds):
        slept.append(seconds)
        pairs = (home / "runs/waiting/round-1/pairs.jsonl").read_text().splitlines()
        rows = [{"id": json.loads(line)["id"], "choice": "tie" if at % 3 else "a"} for at, line in enumerate(pairs)]
        (home / "later.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    monkeypatch.setattr("jaxops.cli.rlhf.time.sleep", answered)
    command = ["rlhf", "loop.yaml", "rounds=1", "run.name=waiting", "judge={kind: file, path: later.jsonl}"]
    assert main([*command, "--wait"]) == 0
    assert len(slept) == 1 and (home / "runs/waiting/round-1/round.json").exists()


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("policy=reward.yaml", "expected policy"),
        ("reward=policy.yaml", "expected reward"),
        ("pairs.choose=best", "pairs.choose"),
        ("judge={fn: 'test_judges:nobody'}", "nobody"),
        ("prompts=none.jsonl", "none.jsonl"),
        ("compare.count=0", "compare.count"),
        ("run.dir=gs://bucket/runs", "run.dir: the loop keeps its files in a local folder"),
    ],
)
def test_a_wrong_loop_is_told_before_anything_is_written(home, monkeypatch, capsys, override, said):
    monkeypatch.chdir(home)
    assert main(["rlhf", "loop.yaml", "run.name=wrong", override]) == 2
    assert said in capsys.readouterr().err
    assert not (home / "runs/wrong").exists()


def test_another_config_does_not_go_on_in_the_same_folder(home, monkeypatch, capsys):
    monkeypatch.chdir(home)
    command = ["rlhf", "loop.yaml", "rounds=1", "run.name=other", "judge={kind: file, path: nowhere}"]
    assert main(command) == EXIT_WAITING
    assert main([*command, "answers.max_tokens=4"]) == 2
    assert "loop: answers.max_tokens: 8 there, 4 here" in capsys.readouterr().err
    (home / "warmer.yaml").write_text(POLICY.replace("segment: 8", "segment: 8, temperature: 0.5"))
    (home / "policy.yaml").rename(home / "kept.yaml")
    (home / "warmer.yaml").rename(home / "policy.yaml")
    try:
        assert main(command) == 2
        assert "policy: sample.temperature: 1.0 there, 0.5 here" in capsys.readouterr().err
        (home / "policy.yaml").write_text(POLICY.replace("run: {steps: 2", "run: {steps: 3"))
        assert main(command) == EXIT_WAITING  # what a resumed run may change the next rounds may have otherwise
    finally:
        (home / "kept.yaml").rename(home / "policy.yaml")

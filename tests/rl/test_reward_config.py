"""The list of rewards in a config: as it is written, what is refused, and what a run folder gives back."""

import dataclasses

import pytest
import reward_functions

from jaxops.config.errors import ConfigError
from jaxops.config.load import from_dict
from jaxops.config.types import ByPath, Duration
from jaxops.core.failures import UserError
from jaxops.core.journal import Journal
from jaxops.rl.rewards.config import (
    FunctionReward,
    LengthPenalty,
    MissingEos,
    Overlong,
    Reward,
    RunReward,
    reward_problems,
)
from jaxops.rl.rewards.function import check_columns
from jaxops.rl.rewards.host import HostRewards
from jaxops.run.trust import named_code, trust_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    rewards: tuple[Reward, ...] = ()

    def problems(self):
        return reward_problems(self.rewards)


WRITTEN = [
    {"fn": "reward_functions:exact", "weight": 1.0, "timeout": "5s", "workers": 8, "on_error": "drop"},
    {"fn": {"fn": "reward_functions:exact", "bonus": 0.5}, "name": "generous", "clip": 2},
    "reward_functions:scalars",
    {"run": "runs/rm-helpful", "weight": 0.3, "clip": 5, "reduce": "mean_minus_std", "k": 2},
    {"kind": "missing_eos", "penalty": 1.0},
    {"kind": "length", "per_token": 0.001},
    {"kind": "overlong", "longest": 512, "buffer": 128},
]


def test_rewards_are_read_as_they_are_written():
    loaded = from_dict(Config, {"rewards": WRITTEN})
    exact, generous, scalars, run, *penalties = loaded.config.rewards
    path = ByPath("reward_functions:exact")
    assert exact == FunctionReward(fn=path, timeout=Duration(5.0), workers=8, on_error="drop")
    assert generous.fn.kwargs == {"bonus": 0.5} and generous.clip == 2.0 and generous.on_error == "stop"
    assert scalars == FunctionReward(fn=ByPath("reward_functions:scalars"))
    assert run == RunReward(run="runs/rm-helpful", weight=0.3, clip=5.0, reduce="mean_minus_std", k=2.0)
    assert penalties == [MissingEos(penalty=1.0), LengthPenalty(per_token=0.001), Overlong(longest=512, buffer=128)]
    names = ["exact", "generous", "scalars", "rm-helpful", "missing_eos", "length", "overlong"]
    assert [reward.label for reward in loaded.config.rewards] == names


def test_a_config_that_is_written_out_reads_back_and_names_its_code():
    loaded = from_dict(Config, {"rewards": WRITTEN})
    assert from_dict(Config, loaded.resolved).config == loaded.config
    assert loaded.resolved["rewards"][0]["timeout"] == "5s"
    code = dict.fromkeys(["rewards.0.fn.fn", "rewards.1.fn.fn"], "reward_functions:exact")
    assert named_code(loaded.resolved) == code | {"rewards.2.fn.fn": "reward_functions:scalars"}


def test_a_config_of_somebody_else_imports_and_reveals_nothing(tmp_path, monkeypatch):
    theirs = from_dict(Config, {"rewards": WRITTEN}, check_imports=False).resolved
    theirs["rewards"][0]["fn"] = {"fn": "stolen:judge", "key": "${secret:STOLEN}"}
    hacked = f"import pathlib\npathlib.Path({str(tmp_path / 'hacked')!r}).touch()\n"
    (tmp_path / "stolen.py").write_text(f"{hacked}def judge(prompts, completions, key): return []\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("STOLEN", "sesame")
    config = from_dict(Config, theirs, guard=trust_of(theirs, "runs/theirs")).config
    for use in (lambda: HostRewards(config.rewards, Journal(tmp_path)), lambda: check_columns(config.rewards, [])):
        with pytest.raises(UserError, match=r"runs/theirs names code .*\n.*rewards\.0\.fn\.fn: stolen:judge"):
            use()
    assert not (tmp_path / "hacked").exists()
    trusted = trust_of(theirs, "runs/theirs", ["stolen", "reward_functions"])
    with pytest.raises(UserError, match=r"asks for \$\{secret:STOLEN\}"):
        HostRewards(from_dict(Config, theirs, guard=trusted).config.rewards, Journal(tmp_path), ["answer"])


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"fn": "reward_functions:exakt"}, r"rewards\.0\.fn .*no 'exakt'; did you mean 'exact'"),
        ({"fn": "os:getcwd"}, r"rewards\.0\.fn .*called with 2 positional, it takes 0 .*fn\(prompts, completions"),
        ({"fn": "os:sep"}, r"'os:sep' is not callable"),
        ({"fn": {"fn": "reward_functions:exact", "bonsu": 1}}, r"rewards\.0\.fn\.bonsu .*did you mean 'bonus'"),
        ({"fn": "reward_functions:exact", "on_error": "skip"}, r"on_error .*expected 'drop', 'zero' or 'stop'"),
        ({"fn": "reward_functions:exact", "timeout": 5}, r"timeout .*a duration such as 30s"),
        ({"fn": "reward_functions:exact", "clip": 0}, r"rewards\.0\.clip"),
        ({"fn": "reward_functions:exact", "wieght": 2}, r"unknown key; did you mean 'weight'"),
        ({"kind": "missing", "penalty": 1}, r"did you mean 'missing_eos'"),
        ({"penalty": 1}, r"with 'kind' \(missing_eos, length, overlong\), 'fn' or 'run'"),
        ({"run": "runs/rm", "reduce": "men"}, r"did you mean 'mean'"),
        ({"kind": "overlong", "longest": 5, "buffer": 6}, r"rewards\.0\.buffer .*at most longest \(5\)"),
    ],
)
def test_what_is_wrong_is_said_where_it_stands(wrong, said):
    with pytest.raises(ConfigError, match=said):
        from_dict(Config, {"rewards": [wrong]})


def test_two_rewards_of_one_name_and_no_reward_are_refused():
    twice = [WRITTEN[0], WRITTEN[0], "reward_functions:length", WRITTEN[5]]
    with pytest.raises(ConfigError) as refused:
        from_dict(Config, {"rewards": twice})
    said = str(refused.value)
    assert "rewards.0" in said and "rewards.1" in said and "'exact' too: set name" in said
    assert "rewards.3" in said and "'length' too: set the name of the other, or leave one out" in said
    with pytest.raises(ConfigError, match="name one reward or more"):
        from_dict(Config, {})


def test_a_column_that_a_function_needs_is_no_matter_of_the_config():
    """`answer` of `exact` comes from the data, which is not open yet."""
    assert from_dict(Config, {"rewards": ["reward_functions:exact"]}).config.rewards
    assert reward_functions.exact([""], ["a"], ["a"]) == [1.0]

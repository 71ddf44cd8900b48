"""Every shipped config, resolved: a default that changes under someone's run shows up here, as a diff to look at."""

import os
from pathlib import Path

import pytest

from jaxops.config.dump import diff, dump_yaml
from jaxops.config.errors import ConfigError
from jaxops.config.files import shipped_configs
from jaxops.config.node import plain_node
from jaxops.config.schema import children, record_of
from jaxops.config.shapes import Record, Shape
from jaxops.config.yaml_text import parse_yaml
from jaxops.run.build import load_config
from jaxops.run.family import SCHEMAS

GOLDEN = Path(__file__).with_name("golden")
WRITE = "JAXOPS_WRITE_GOLDEN"
COMPLETED_BY = {
    "rec/sasrec": ["data.kind=movielens_100k", "run.epochs=1"],
    "rec/clicks": ["data.kind=movielens_100k_clicks", "model.kind=linear", "run.epochs=1"],
    "rec/movielens_clicks": ["model.kind=dcnv2"],
    "reward/preferences": ["tokenizer=bytes", "data={kind: preferences, path: votes.jsonl}", "run.epochs=1"],
    "language/dpo": [
        "tokenizer=bytes",
        "data={kind: preferences, path: votes.jsonl, valid: {share: 0.1}}",
        "run.epochs=1",
    ],
    "policy/ppo": [
        "model={weights: runs/sft}",
        "data={kind: prompts, path: prompts.jsonl}",
        "rewards=[{run: runs/reward}]",
        "run={name: ppo, steps: 100}",
    ],
    "language/sft": ["tokenizer=bytes", "data={kind: text, path: text.jsonl, valid: {share: 0.1}}", "run.epochs=1"],
    **{
        name: [
            "model={weights: runs/my-sft}",
            "data={kind: prompts, path: prompts.jsonl, valid: {share: 0.1}}",
            "rewards=[{kind: missing_eos, penalty: 1.0}]",
            "run.steps=100",
        ]
        for name in ("policy/ppo", "policy/grpo")
    },
}
"""What a config that others build upon lacks: it names no data and no length of its own."""
LOOPS = ("policy/rlhf_sentiment",)
"""Configs of loops, which chain runs and are none; tests/configs/test_sentiment.py has them."""
SWEEPS = tuple(f"sweep/{path.stem}" for path in sorted((shipped_configs() / "sweep").glob("*.yaml")))
"""Many runs each; tests/configs/test_sweeps.py has them."""
NAMES = sorted(
    {path.relative_to(shipped_configs()).with_suffix("").as_posix() for path in shipped_configs().rglob("*.yaml")}
    - {*LOOPS, *SWEEPS}
)


def resolved(name: str) -> str:
    overrides = COMPLETED_BY.get(name, [])
    heading = f"# {' '.join(['jaxops config', name, *overrides])}\n"
    return heading + dump_yaml(load_config(f"configs/{name}.yaml", overrides).resolved)


@pytest.fixture(autouse=True)
def _no_variables_of_the_users(monkeypatch, tmp_path):
    monkeypatch.delenv("JAXOPS_BEAUTY", raising=False)
    monkeypatch.chdir(tmp_path)  # a config is found wherever one is


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_config_resolves_to_its_golden(name):
    golden, text = GOLDEN / f"{name}.yaml", resolved(name)
    if os.environ.get(WRITE):
        golden.parent.mkdir(parents=True, exist_ok=True)
        golden.write_text(text)
    again = f"if that is meant: {WRITE}=1 python -m pytest tests/configs, then look at the diff"
    assert golden.exists(), f"configs/{name}.yaml has no golden yet; {again}"
    before, after = (plain_node(parse_yaml(there, name)) for there in (golden.read_text(), text))
    changed = "\n".join(f"  {path}: {old!r} -> {new!r}" for path, old, new in diff(before, after))
    assert golden.read_text() == text, f"configs/{name}.yaml resolves to something else now:\n{changed}\n{again}"


def test_no_golden_is_left_of_a_config_that_is_gone():
    there = {path.relative_to(GOLDEN).with_suffix("").as_posix() for path in GOLDEN.rglob("*.yaml")}
    assert there == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_config_loads_again_from_its_own_dump(name, tmp_path):
    (tmp_path / "again.yaml").write_text(resolved(name))
    loaded = load_config("again.yaml")
    # what a resumed run compares: 4 and 4.0 are two values to it
    assert diff(loaded.resolved, load_config(f"configs/{name}.yaml", COMPLETED_BY.get(name, [])).resolved) == []
    assert type(loaded.config) is SCHEMAS[loaded.config.task]


def test_a_config_that_others_build_upon_says_what_it_lacks():
    with pytest.raises(ConfigError) as caught:
        load_config("rec/sasrec")
    base, lacks = caught.value.problems
    assert base.message.startswith("rec/sasrec is a base, not a run: alone it is wrong in what is named below. Write")
    assert lacks.path == "data"


def settings(shape: Shape) -> int:
    """The most settings that one run can have: of a union (a model, an optimizer) one member is chosen, the largest."""
    below = [settings(child) for name, child in children(shape) if name != "kind"]
    if not below:
        return 1
    return sum(below) if isinstance(shape, Record) else max(below)


@pytest.mark.parametrize("task", SCHEMAS)
def test_a_run_has_fewer_than_150_settings(task):
    assert 30 < settings(record_of(SCHEMAS[task])) < 150


def test_a_base_that_is_completed_in_python_is_not_called_incomplete():
    whole = {"data.kind": "movielens_100k", "run.epochs": 1}
    with pytest.raises(ConfigError) as raised:
        load_config("rec/sasrec", whole | {"optimizer.lrr": 1e-3})
    assert [problem.path for problem in raised.value.problems] == ["optimizer.lrr"]

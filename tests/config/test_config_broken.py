"""Broken configurations: all problems at once, each with its place, its value and what would be right."""

import dataclasses
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import config_toy as toy
import pytest

from jaxops.config.errors import ConfigError, Problem
from jaxops.config.load import from_dict, load
from jaxops.core.failures import UserError

LOSSES = """\
import functools
def focal(model, gamma=2.0, alpha=0.25, lambda_=1.0): ...
def direct(params, batch, key): ...
def strict(model, *, gamma): ...
def anything(*args, **kwargs): ...
def nothing(): ...
class Loss:
    def __init__(self, model, gamma=1.0): ...
half = functools.partial(focal, alpha=0.5)
NUMBER = 3
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in [name for name in os.environ if name.startswith("TO")]:  # messages offer what is near
        monkeypatch.delenv(name)
    monkeypatch.setenv("TOY_BUCKET", "lake")
    package = tmp_path / "toybad"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "losses.py").write_text(LOSSES)
    (package / "needy.py").write_text("import numpy\nimport toy_is_not_here\n")
    (package / "crash.py").write_text("x = 1\ny = 1 / 0\n")
    (package / "syntax.py").write_text("def f(:\n")
    (tmp_path / "a.yaml").write_text("base: b.yaml\n")
    (tmp_path / "b.yaml").write_text("# back again\nbase: [a]\n")
    (tmp_path / "list.yaml").write_text("- 1\n")
    (tmp_path / "latin.yaml").write_bytes(b"path: caf\xe9\n")
    (tmp_path / "other.yaml").write_text("task: other\n")
    yield tmp_path
    for name in [name for name in sys.modules if name.split(".")[0] == "toybad"]:
        del sys.modules[name]


def told(text: str, *overrides: str) -> str:
    Path("my.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        load({"toy": toy.Toy, "other": toy.Other}, "my.yaml", overrides)
    message = str(caught.value)
    assert "pydantic" not in message and "http" not in message and "Node(" not in message
    return message


GOOD = "task: toy\npath: x\n"
BROKEN = [
    # (text after `task: toy` and `path: x`, overrides, fragments of the one message)
    ("sed: 2", [], ["sed [my.yaml:3]: unknown key; did you mean 'seed'? (known: path, task, model,"]),
    ("lr: 2", [], ["lr [my.yaml:3]: unknown key; it belongs at 'optimizer.lr' (known:"]),
    ("dim: 2", [], ["it belongs at 'model.dim'"]),
    ("zzz: 2", [], ["zzz [my.yaml:3]: unknown key (known:"]),
    ("batch: {global_: 2}", [], ["batch.global_ [my.yaml:3]: unknown key; did you mean 'global'?"]),
    (
        "",
        ["optimizer.lrr=2e-4"],
        ["optimizer.lrr [override 'optimizer.lrr=2e-4']: unknown key; did you mean 'lr'?"],
    ),
    ("seed: 5.5", [], ["seed [my.yaml:3]: expected an integer, got 5.5"]),
    ("seed: abc", [], ["expected an integer, got 'abc'"]),
    ("seed: true", [], ["expected an integer, got true"]),
    ("seed: '5'", [], ["expected an integer, got '5'; write it without quotes"]),
    ("seed:", [], ["expected an integer, got null"]),
    ("seed: [1, {a: b}]", [], ["expected an integer, got [1, {a: b}]"]),
    ("seed: .inf", [], ["expected an integer, got inf"]),
    ("lambda: .nan", [], ["lambda [my.yaml:3]: expected a number, got nan"]),
    ("lambda: high", [], ["expected a number, got 'high'"]),
    ("optimizer: {lr: true}", [], ["optimizer.lr [my.yaml:3]: expected a number, got true"]),
    ("verbose: yes", [], ["verbose [my.yaml:3]: expected true or false, got 'yes'"]),
    ("verbose: 1", [], ["expected true or false, got 1"]),
    ("since: 2026", [], ["since [my.yaml:3]: expected a string, got 2026; put it in quotes"]),
    ("since: true", [], ["expected a string, got true; put it in quotes"]),
    ("columns: {user: 1}", [], ["columns.user [my.yaml:3]: expected a string, got 1"]),
    ("columns: [user]", [], ["columns [my.yaml:3]: expected a mapping, got [user]"]),
    ("folder: 3", [], ["folder [my.yaml:3]: expected a path, got 3"]),
    ("model: {dim: 0}", [], ["model.dim [my.yaml:3]: must be greater than 0, got 0"]),
    ("model: {dropout: 1}", [], ["model.dropout [my.yaml:3]: must be less than 1, got 1"]),
    ("model: {dropout: -0.5}", [], ["must be at least 0, got -0.5"]),
    ("optimizer: {clip: -1}", [], ["optimizer.clip [my.yaml:3]: must be greater than 0, got -1"]),
    ("optimizer: {clip: x}", [], ["optimizer.clip [my.yaml:3]: expected a number or null, got 'x'"]),
    ("optimizer: {betas: [0.9]}", [], ["optimizer.betas [my.yaml:3]: expected a list of 2, got [0.9]"]),
    ("optimizer: {betas: [0.9, x]}", [], ["optimizer.betas.1 [my.yaml:3]: expected a number, got 'x'"]),
    ("batch: {microbatch: atuo}", [], ["expected an integer or 'auto', got 'atuo'; did you mean 'auto'?"]),
    ("batch: {microbatch: -4}", [], ["batch.microbatch [my.yaml:3]: must be greater than 0, got -4"]),
    ("batch: 128", [], ["batch [my.yaml:3]: expected a mapping, got 128"]),
    (
        "evaluate: {metrics: []}",
        [],
        ["evaluate.metrics [my.yaml:3]: needs 1 or more of them, got []"],
    ),
    ("evaluate: {metrics: ndcg}", [], ["evaluate.metrics [my.yaml:3]: expected a list, got 'ndcg'"]),
    ("evaluate: {stop: erly}", [], ["expected 'never' or 'early', got 'erly'; did you mean 'early'?"]),
    (
        "evaluate: {every: 10m}",
        [],
        ["evaluate.every [my.yaml:3]: expected a number of steps, or a duration such"],
    ),
    ("evaluate: {every: 0}", [], ["evaluate.every [my.yaml:3]: must be at least 1 step, got 0"]),
    ("evaluate: {every: 0s}", [], ["must be longer than nothing, got '0s'"]),
    ("evaluate: {every: true}", [], ["a number of steps, or a duration", "got true"]),
    (
        "model: {kind: sasrek}",
        [],
        ["model.kind [my.yaml:3]: unknown kind 'sasrek'; did you mean 'sasrec'? (known: sa"],
    ),
    (
        "model: hstuu",
        [],
        ["model [my.yaml:3]: unknown kind 'hstuu'; did you mean 'hstu'? (known: sasrec, hstu)"],
    ),
    ("model: 3", [], ["model [my.yaml:3]: expected one of the kinds sasrec, hstu, got 3"]),
    ("model: [sasrec]", [], ["model [my.yaml:3]: expected one of the kinds sasrec, hstu, got [sasrec]"]),
    ("model: {kind: [1]}", [], ["model.kind [my.yaml:3]: unknown kind [1]"]),
    (
        "",
        ["model.kind=hstu", "model.heads=2"],
        ["model.heads [override 'model.heads=2']: unknown key", "layers"],
    ),
    (
        "loggers: [{project: x}]",
        [],
        ["loggers.0 [my.yaml:3]: expected a mapping with 'kind' (tensorboard, wandb), got"],
    ),
    ("loggers: [wandb]", [], ["loggers.0.project [my.yaml:3]: missing; expected a string"]),
    (
        "rewards:\n  - {run: a}\n  - {rum: b}",
        [],
        ["rewards.1 [my.yaml:5]: expected a mapping with 'fn' or 'run', g", "'run'?"],
    ),
    (
        "tables: {item: {rows: many}}",
        [],
        ["tables.item.rows [my.yaml:3]: expected an integer or 'auto', got 'many'"],
    ),
    ("tables: {item: {}}", [], ["tables.item.rows [my.yaml:3]: missing; expected an integer or 'auto'"]),
    ("model: {dim: 6, heads: 4}", [], ["model.heads [my.yaml:3]: dim 6 is not divisible by 4 heads"]),
    (
        "batch: {microbatch: 3}",
        ["seed=2"],
        ["batch.global [default]: 128 is not a multiple of batch.microbatch"],
    ),
    (
        "",
        ["batch.microbatch=3", "batch.global=4"],
        ["batch.global [override 'batch.global=4']: 4 is not a multiple"],
    ),
    # the command line
    ("", ["seed"], ["override 'seed': an override is written dotted.path=VALUE (there is no '=')"]),
    ("", ["=3", "a..b=1"], ["override '=3': an override", "override 'a..b=1': an override"]),
    ("", ["seed=[1"], ["seed [override 'seed=[1']: not YAML: while parsing a flow sequence"]),
    (
        "name: home",
        ["name.x=3"],
        ["name.x [override 'name.x=3']: 'name' is 'home' [my.yaml:3], a single value"],
    ),
    (
        "",
        ["seed.x=3"],
        ["seed [override 'seed.x=3']: expected an integer, got {x: 3}; there is nothing beneath it"],
    ),
    (
        "loggers: [tensorboard]",
        ["loggers.0.project=x"],
        ["'loggers' is [tensorboard] [my.yaml:3], a list: override it whole"],
    ),
    (
        "",
        ["seed=1", "seed.x=3"],
        ["seed.x [override 'seed.x=3']: 'seed' is 1 [override 'seed=1'], a single value"],
    ),
    # YAML itself
    ("model: {dim: 3\nseed: 1", [], ["my.yaml:4: not YAML: while parsing a flow mapping"]),
    ("a: b: c", [], ["my.yaml:3: not YAML: mapping values are not allowed here"]),
    ("batch:\n\tglobal: 3", [], ["my.yaml:4: not YAML: YAML is indented with spaces, there is a tab here"]),
    ("seed: 1\nseed: 2", [], ["seed [my.yaml:4]: the same key twice in one mapping, first at my.yaml:3"]),
    (
        "model:\n  dim: 3\n  dim: 4\nseed: 1\nseed: 2",
        [],
        ["model.dim [my.yaml:5]: the same key", "seed [my.yaml:7]"],
    ),
    ("---\nseed: 1", [], ["my.yaml:3: not one YAML document: a second one starts here"]),
    ("? [a, b]\n: 1", [], ["my.yaml:3: a key must be a single word or number"]),
    ("<<: {seed: 1}", [], ["my.yaml:3: merge keys (<<) are not read; name other files in 'base:'"]),
    ("extra: &x {a: *x}", [], ["extra.a [my.yaml:3]: an alias (*) inside the very thing"]),
    (
        "extra: {a: !!python/object:os.system x}",
        [],
        ["extra.a [my.yaml:3]: unknown YAML tag '!!python/object:os.system'"],
    ),
    ("seed: !!int x", [], ["seed [my.yaml:3]: 'x' is not what its tag says"]),
    # bases and tasks
    ("base: gone.yaml", [], ["base [my.yaml:3]: no such configuration: 'gone.yaml'"]),
    ("base: othre.yaml", [], ["no such configuration: 'othre.yaml'; did you mean 'other.yaml'?"]),
    ("base: a.yaml", [], ["base [b.yaml:2]: the bases form a circle: a.yaml -> b.yaml -> a.yaml"]),
    ("base: my.yaml", [], ["base [my.yaml:3]: the bases form a circle: my.yaml -> my.yaml"]),
    ("base: {a: b}", [], ["base [my.yaml:3]: expected a file, or a list of files"]),
    (
        "base: ${env:TOY_NOWHERE}/b.yaml",
        [],
        ["base [my.yaml:3]: the environment variable TOY_NOWHERE is not set"],
    ),
    ("base: list.yaml", [], ["list.yaml:1: expected a mapping of keys to values"]),
    ("base: latin.yaml", [], ["latin.yaml: cannot be read: 'utf-8' codec"]),
    ("base: toybad", [], ["base [my.yaml:3]: 'toybad' is a folder; a configuration is a file"]),
    (
        "base: other.yaml",
        [],
        ["task [my.yaml:1]: 'toy' here, but 'other' at other.yaml:1, which it is merged over"],
    ),
    (
        "",
        ["task=toi"],
        ["task [override 'task=toi']: unknown task 'toi'; did you mean 'toy'? (known: toy, other)"],
    ),
    ("", ["task=null"], ["unknown task null (known: toy, other)"]),
    ("", ["task=${env:TOY_NOWHERE}"], ["task [override", "TOY_NOWHERE is not set"]),
    (
        "base: ftp://host/x.yaml",
        [],
        ["ftp://host/x.yaml: a configuration is a local file, or at gs:// or s3://"],
    ),
    # the environment
    (
        "name: a-${env:TOY_BUCKER}",
        [],
        ["name [my.yaml:3]: the environment variable TOY_BUCKER is not set; did you mean"],
    ),
    ("name: ${env:1X}", [], ["name [my.yaml:3]: '${env:1X}' is not a reference: write ${env:NAME} or"]),
    (
        'extra: {a: [1, "${env:TOY_X}"]}',
        [],
        ["extra.a.1 [my.yaml:3]: the environment variable TOY_X is not set (a defau"],
    ),
    (
        'objective: {fn: toybad.losses:focal, gamma: "${env:TOY_X}"}',
        [],
        ["objective.gamma [my.yaml:3]: the envi"],
    ),
    ('model: {kind: "${env:TOY_X}"}', [], ["model.kind [my.yaml:3]: the environment variable TOY_X"]),
    # import paths
    (
        "objective: {fn: toybad.losses:focal, gama: 3}",
        [],
        ["objective.gama [my.yaml:3]: focal takes no such keyword; did "],
    ),
    (
        "objective: {fn: toybad.losses:focal, model: 3}",
        [],
        ["objective.model", "(known: gamma, alpha, lambda)"],
    ),
    (
        "objective: toybad.losses:direct",
        [],
        ["objective [my.yaml:3]: direct cannot be called without 'batch', 'key'", "(a factory fn(model"],
    ),
    (
        "objective: {fn: toybad.losses:strict}",
        [],
        ["objective.fn [my.yaml:3]: strict cannot be called without 'gamma'"],
    ),
    (
        "objective: {fn: toybad.losses:nothing}",
        [],
        ["nothing is called with 1 positional, it takes 0"],
    ),
    (
        "objective: {fn: toybad.losses:Loss, lambda_: 3}",
        [],
        ["objective.lambda_ [my.yaml:3]: Loss takes no such keyword (known: gamma)"],
    ),
    ("objective: {fn: toybad.losses:Loss, beta: 3}", [], ["Loss takes no such keyword (known: gamma)"]),
    (
        "objective: {fn: toybad.losses:half, beta: 3}",
        [],
        ["takes no such keyword (known: gamma, alpha, lambda)"],
    ),
    ("objective: {fn: toybad.losses:NUMBER}", [], ["'toybad.losses:NUMBER' is not callable but int"]),
    (
        "objective: {fn: toybad.losses:fokal}",
        [],
        ["objective.fn [my.yaml:3]: 'toybad.losses' has no 'fokal'; did you mean 'focal'"],
    ),
    ("objective: {fn: toybad.loses:focal}", [], ["no module 'loses' in 'toybad'; did you mean 'losses'?"]),
    (
        "objective: {fn: toybat.losses:focal}",
        [],
        ["no module 'toybat' in the current folder", "did you mean 'toybad'?"],
    ),
    ("objective: {fn: toybad.losses.deep:focal}", [], ["'toybad.losses' is a module, not a package"]),
    (
        "objective: {fn: toybad.needy:f}",
        [],
        ["importing 'toybad.needy' failed: ModuleNotFoundError", "(toybad/needy.py:2)"],
    ),
    (
        "objective: {fn: toybad.crash:f}",
        [],
        ["failed: ZeroDivisionError: division by zero (toybad/crash.py:2)"],
    ),
    ("objective: {fn: toybad.syntax:f}", [], ["failed: SyntaxError: invalid syntax (toybad/syntax.py:1)"]),
    (
        "objective: {fn: focal}",
        [],
        ["objective.fn [my.yaml:3]: expected an import path 'package.module:name', got 'focal'"],
    ),
    (
        "objective: {fn: 3}",
        [],
        ["objective.fn [my.yaml:3]: expected an import path 'package.module:name', got 3"],
    ),
    ("objective: {fn: toybad.losses:anything, a: 1}", ["seed=x"], ["seed [override 'seed=x']"]),
    (
        "objective: softmx",
        [],
        ["unknown kind 'softmx'; did you mean 'softmax'? (known: softmax), or {fn: 'package."],
    ),
    (
        "evaluate: {metrics: [3]}",
        [],
        ["evaluate.metrics.0 [my.yaml:3]: expected an import path", "or a string, got 3"],
    ),
]


@pytest.mark.parametrize(("text", "overrides", "fragments"), BROKEN, ids=[f"{row[0]} {row[1]}" for row in BROKEN])
def test_one_clear_message(text, overrides, fragments):
    message = told(GOOD + text + "\n", *overrides)
    for fragment in fragments:
        assert fragment in message
    # A single mistake is a single line: nothing else is blamed for it.
    assert len(message.splitlines()) == 1 or message.startswith(f"{len(fragments)} problems")


def test_files_that_are_no_configuration():
    assert told("path: x\n").startswith("task [my.yaml]: missing (known: toy, other)")
    assert told("") == "task [my.yaml]: missing (known: toy, other)"
    assert told("task: toy") == "path [my.yaml]: missing; expected a string"
    assert told("just words") == "my.yaml:1: expected a mapping of keys to values (`key: value`)"
    with pytest.raises(UserError, match=r"no such configuration: 'latn\.yaml'; did you mean 'latin\.yaml'\?"):
        load(toy.Toy, "latn.yaml")


GOLDEN = """\
10 problems in the configuration:
  name [my.yaml:9]: the environment variable TOY_NOWHERE is not set (a default: ${env:TOY_NOWHERE:default})
  sed [my.yaml:10]: unknown key; did you mean 'seed'? (known: path, task, model, optimizer, objective, \
batch, tables, \
rewards, evaluate, checkpoint, loggers, name, seed, lambda, folder, since, verbose, columns, extra)
  path [my.yaml]: missing; expected a string
  model.dim [override 'model.dim=big']: expected an integer, got 'big'
  optimizer.lrr [my.yaml:4]: unknown key; did you mean 'lr'? (known: kind, lr, clip, betas)
  objective.gama [my.yaml:5]: focal takes no such keyword; did you mean 'gamma'? (known: gamma, alpha, lambda)
  batch.global [base.yaml:1]: must be greater than 0, got 0
  rewards.1.timeout [my.yaml:8]: expected a duration such as 30s, 10min or 2h, got 'soon'
  evaluate.stop [base.yaml:2]: expected 'never' or 'early', got 'erly'; did you mean 'early'?
  checkpoint.every [override 'checkpoint.every=10m']: expected a number of steps, or a duration such as 30s, \
10min or 2h, or 1epoch, or '100 or 1epoch' (the shorter), got '10m'"""


def test_all_problems_at_once_word_by_word():
    Path("base.yaml").write_text("batch: {global: 0}\nevaluate: {stop: erly}\n")
    text = """\
base: base.yaml
task: toy
model: {kind: sasrec, dim: 32}
optimizer: {lrr: 1e-4}
objective: {fn: toybad.losses:focal, gama: 3}
rewards:
  - {run: runs/rm}
  - {fn: "toybad.losses:focal", timeout: soon}
name: ${env:TOY_NOWHERE}
sed: 1
"""
    assert told(text, "model.dim=big", "checkpoint.every=10m") == GOLDEN


def test_problems_are_data_too():
    with pytest.raises(ConfigError) as caught:
        from_dict(toy.Toy, {"path": "x", "model": {"dim": "big", "heads": 0.5}, "batch": {"microbatch": 3}})
    assert caught.value.problems == [
        Problem("model.dim", "given", "big", "expected an integer, got 'big'"),
        Problem("model.heads", "given", 0.5, "expected an integer, got 0.5"),
    ]
    with pytest.raises(ConfigError) as caught:
        from_dict(toy.Toy, {"path": "x", "model": {"dim": 3}, "batch": {"microbatch": 3}})
    assert [(problem.path, problem.value) for problem in caught.value.problems] == [
        ("model.heads", 2),
        ("batch.global", 128),
    ]


@dataclasses.dataclass(frozen=True)
class Inner:
    parts: int = 1

    def __post_init__(self) -> None:
        if self.parts == 13:
            raise ValueError("thirteen parts bring bad luck")

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.parts == 0:
            yield "parts", "nothing to divide by"


@dataclasses.dataclass(frozen=True)
class Outer:
    inner: Inner = Inner()
    whole: int = 12

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.whole == 7:
            raise UserError("seven does not divide")
        if self.whole == -1:
            raise RuntimeError("a fault of the schema")
        if self.whole % self.inner.parts:
            yield "", "inner.parts does not divide whole"


def test_cross_field_checks_at_every_level():
    def problems(values):
        with pytest.raises(ConfigError) as caught:
            from_dict(Outer, values)
        return [(problem.path, problem.message) for problem in caught.value.problems]

    assert problems({"inner": {"parts": 13}}) == [("inner", "thirteen parts bring bad luck")]
    # The outer check divides by what the inner one has refused: only the inner one is told.
    assert problems({"inner": {"parts": 0}}) == [("inner.parts", "nothing to divide by")]
    assert problems({"inner": {"parts": 5}}) == [("", "inner.parts does not divide whole")]
    assert problems({"whole": 7}) == [("", "seven does not divide")]
    with pytest.raises(RuntimeError, match="a fault of the schema"):
        from_dict(Outer, {"whole": -1})

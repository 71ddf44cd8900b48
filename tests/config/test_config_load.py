"""What a good configuration becomes: merging, shorthand, overrides, the environment, origins and the dump."""

import dataclasses
import math
import subprocess
import sys
from pathlib import Path
from typing import Literal

import config_toy as toy
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from jaxops.config.dump import diff, digest, dump_yaml, plain_of
from jaxops.config.errors import ConfigError
from jaxops.config.files import find_config
from jaxops.config.load import explain, from_dict, load
from jaxops.config.node import plain_node
from jaxops.config.schema import record_of
from jaxops.config.shapes import ABSENT
from jaxops.config.types import ByPath, Duration, Every
from jaxops.config.yaml_text import parse_yaml
from jaxops.core.failures import UserError

pytestmark = pytest.mark.latest

EVERYTHING = """\
# every kind of field
path: "gs://${env:TOY_BUCKET}/x"
model: {kind: sasrec, dim: 32}
optimizer:
  lr: 1e-4
objective: {fn: toypkg.losses:focal, gamma: 3, lambda: 0.5}
batch: {global: 2_048, microbatch: auto}
tables:
  item: {rows: 2_000_000}
  word: {rows: auto, dim: 4}
rewards:
  - {fn: "toypkg.losses:focal", weight: 2, timeout: 30s}
  - {run: runs/rm, clip: 5}
evaluate: {every: 10min, metrics: [ndcg@10, "toypkg.losses:focal"]}
loggers: [tensorboard, {kind: wandb, project: home}]
since: 2026-11-15
lambda: .9
columns: {on: yes, 1: "2"}
extra: {nested: [{a: 1}, 2.5, null]}
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The current folder holds a package of the user's own, and nothing of it stays imported."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("TOY_BUCKET", "lake")
    package = tmp_path / "toypkg"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "losses.py").write_text("def focal(model, gamma=2.0, lambda_=1.0): return ('focal', gamma, lambda_)\n")
    yield tmp_path
    for name in [name for name in sys.modules if name.split(".")[0] == "toypkg"]:
        del sys.modules[name]


def write(name: str, text: str) -> str:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_text(text)
    return name


def load_text(text: str, *overrides: str) -> toy.Toy:
    return load(toy.Toy, write("my.yaml", text), overrides).config


def test_everything_is_read():
    config = load_text(EVERYTHING)
    assert config.path == "gs://lake/x"
    assert config.model == toy.SasRec(dim=32)
    assert config.optimizer == toy.AdamW(lr=1e-4)
    assert config.objective == ByPath("toypkg.losses:focal", {"gamma": 3, "lambda_": 0.5})
    assert config.objective.call("model") == ("focal", 3, 0.5)
    assert config.batch == toy.Batch(global_=2048, microbatch="auto")
    assert config.tables == {"item": toy.Table(2_000_000), "word": toy.Table("auto", 4)}
    assert config.rewards == (
        toy.Reward(ByPath("toypkg.losses:focal"), 2.0, Duration(30.0)),
        toy.Run("runs/rm", 5.0),
    )
    assert isinstance(config.rewards[0].weight, float)
    assert config.evaluate == toy.Evaluate(Every(seconds=600.0), ("ndcg@10", ByPath("toypkg.losses:focal")))
    assert config.loggers == (toy.TensorBoard(), toy.Wandb("home"))
    assert config.since == "2026-11-15" and config.lambda_ == 0.9 and config.folder == Path("runs")
    assert config.columns == {"on": "yes", "1": "2"}
    assert config.extra == {"nested": [{"a": 1}, 2.5, None]}


def test_dump_is_canonical_and_loads_to_an_equal_configuration():
    first = load(toy.Toy, write("my.yaml", EVERYTHING), ["optimizer.clip=1", "name=2026"])
    text = dump_yaml(first.resolved)
    second = load(toy.Toy, write("again.yaml", text))
    assert second.config == first.config and second.resolved == first.resolved
    assert dump_yaml(second.resolved) == text
    assert digest(first.resolved) == digest(second.resolved) != digest(first.resolved | {"seed": 2})
    assert "global: 2048" in text and "lambda: 0.9" in text and "every: 10min" in text
    assert "betas: [0.9, 0.999]" in text and "since: '2026-11-15'" in text and "timeout: 30s" in text
    assert from_dict(toy.Toy, first.resolved).config == first.config
    assert plain_of(first.config) == first.resolved == yaml.safe_load(text)


def test_origins_name_file_line_override_or_default():
    loaded = load(toy.Toy, write("sub/my.yaml", EVERYTHING), ["model.heads=4", "batch={microbatch: 16}"])
    told = {path: origin for path, _, origin in explain(loaded)}
    assert told["optimizer.lr"] == "sub/my.yaml:5"
    assert told["optimizer.kind"] == told["optimizer.betas"] == "default"
    assert told["extra.nested.0.a"] == "sub/my.yaml:19"
    assert told["tables.word.rows"] == "sub/my.yaml:10" and told["tables.item.dim"] == "default"
    assert told["rewards.1.clip"] == "sub/my.yaml:13"
    assert told["model.heads"] == "override 'model.heads=4'" and told["model.dim"] == "sub/my.yaml:3"
    assert told["batch.microbatch"] == "override 'batch={microbatch: 16}'"
    assert told["batch.global"] == "sub/my.yaml:7" and told["seed"] == "default"
    assert [path for path, _, _ in explain(loaded)][:3] == ["path", "task", "model.kind"]


def test_a_partial_mapping_keeps_the_defaults_of_the_field():
    assert load_text("path: x\noptimizer: {clip: 2}").optimizer == toy.AdamW(lr=2e-3, clip=2.0)
    assert load_text("path: x\noptimizer: adamw").optimizer == toy.AdamW(lr=2e-3)
    assert load_text("path: x\noptimizer: momentum").optimizer == toy.Sgd(kind="momentum")


def test_bases_merge_left_to_right_then_the_file_then_overrides():
    write("bases/a.yaml", "path: a\nseed: 1\nmodel: {kind: sasrec, dim: 8, heads: 4}\ncolumns: {user: u}\n")
    write("bases/b.yaml", "seed: 2\nname: b\ncolumns: {item: i}\nevaluate: {metrics: [x, y]}\n")
    write("bases/ab.yaml", "base: [a.yaml, b]\nmodel: {dim: 16}\n")
    text = "base: bases/ab.yaml\nname: mine\nevaluate: {metrics: [z]}\n"
    loaded = load(toy.Toy, write("my.yaml", text), ["seed=3", "seed=4"])
    config = loaded.config
    assert (config.path, config.seed, config.name) == ("a", 4, "mine")
    assert config.model == toy.SasRec(dim=16, heads=4)
    assert config.columns == {"user": "u", "item": "i"} and config.evaluate.metrics == ("z",)
    assert loaded.origins["model.heads"] == "bases/a.yaml:3" and loaded.origins["model.dim"] == "bases/ab.yaml:2"
    several = load(toy.Toy, ["bases/a.yaml", "bases/b.yaml"]).config
    assert several.seed == 2 and several.path == "a"


def test_an_unset_variable_that_is_overridden_does_not_matter():
    write("base.yaml", "path: ${env:TOY_UNSET}/x\n")
    assert load_text("base: base.yaml\npath: mine").path == "mine"


@pytest.mark.parametrize(
    ("overrides", "attribute", "expected"),
    [
        (["model.kind=hstu"], "model", toy.Hstu()),  # the file's dim and heads are of another kind
        (["model.layers=2", "model.kind=hstu"], "model", toy.Hstu(layers=2)),
        (["model.kind=hstu", "model.layers=2"], "model", toy.Hstu(layers=2)),
        (["model.kind=sasrec"], "model", toy.SasRec(dim=8, heads=4)),
        (["model=hstu"], "model", toy.Hstu()),
        (["model={kind: hstu, layers: 1}", "model={kind: sasrec}"], "model", toy.SasRec(dim=8, heads=4)),
        (["model={dim: 16}"], "model", toy.SasRec(dim=16, heads=4)),
        (
            ["objective={fn: toypkg.losses:focal, gamma: 2}"],
            "objective",
            ByPath("toypkg.losses:focal", {"gamma": 2}),
        ),
        (["objective=toypkg.losses:focal"], "objective", ByPath("toypkg.losses:focal")),
        (["optimizer=sgd", "optimizer.lr=3e-4"], "optimizer", toy.Sgd(lr=3e-4)),
        (["optimizer.clip=null"], "optimizer", toy.AdamW(lr=2e-3)),
        (["batch.global=1e3"], "batch", toy.Batch(1000)),
        (["optimizer.kind=sgd"], "optimizer", toy.Sgd()),  # the file's clip is the default kind's
        (["loggers=[]"], "loggers", ()),
        (["columns={a.b: c}"], "columns", {"a.b": "c"}),
        (["name=007"], "name", "007"),
        (["name=1.50"], "name", "1.50"),
        (["name=a=b"], "name", "a=b"),
        (["path=null", "path=x"], "path", "x"),
        (["tables.item.rows=5"], "tables", {"item": toy.Table(5)}),
        (["evaluate.every=250"], "evaluate", toy.Evaluate(Every(steps=250))),
        (["extra.f={kind: a, x: 1}", "extra.f={kind: b}"], "extra", {"f": {"kind": "b"}}),
    ],
)
def test_overrides(overrides, attribute, expected):
    text = "path: x\nmodel: {kind: sasrec, dim: 8, heads: 4}\noptimizer: {clip: 1}\nobjective: {negatives: 5}\n"
    assert getattr(load_text(text, *overrides), attribute) == expected


def test_a_file_of_another_kind_replaces_its_base():
    write(
        "base.yaml",
        "path: x\nmodel: {kind: hstu, layers: 2}\nobjective: {fn: toypkg.losses:focal, gamma: 1}\n",
    )
    config = load_text("base: base.yaml\nmodel: {kind: sasrec, dim: 4}\nobjective: softmax\n")
    assert config.model == toy.SasRec(dim=4) and config.objective == toy.Softmax()
    config = load_text("base: base.yaml\nmodel: {dim: 4}\nobjective: {gamma: 7}\n")
    assert config.model == toy.Hstu(layers=2, dim=4)
    assert config.objective == ByPath("toypkg.losses:focal", {"gamma": 7})


def test_the_environment_reaches_any_string(monkeypatch):
    monkeypatch.setenv("TOY_SEED", "17")
    monkeypatch.setenv("TOY_JOB", "90210")
    text = """\
path: ${env:TOY_BUCKET}-${env:TOY_NONE:eu}/${env:TOY_EMPTY:}
seed: ${env:TOY_SEED}
name: ${env:TOY_JOB}
model: {kind: "${env:TOY_MODEL:hstu}"}
columns: {user: "${env:TOY_JOB}", item: "$HOME ${other}"}
"""
    config = load_text(text)
    assert config.path == "lake-eu/" and config.seed == 17 and config.name == "90210"
    assert config.model == toy.Hstu() and config.columns == {"user": "90210", "item": "$HOME ${other}"}


def test_a_task_is_chosen_by_its_tag_and_stays_in_the_dump():
    schemas = {"toy": toy.Toy, "other": toy.Other}
    other = load(schemas, write("other.yaml", "task: other\nsteps: 3\n"))
    assert other.config == toy.Other(3) and other.resolved == {"task": "other", "steps": 3}
    assert other.origins == {"task": "other.yaml:1", "steps": "other.yaml:2"}
    assert from_dict(schemas, other.resolved).config == other.config
    assert load(schemas, [], ["task=toy", "path=x", "optimizer=sgd", "optimizer.lr=1"]).config.optimizer == toy.Sgd(
        lr=1.0
    )


def test_configs_are_found_beside_here_or_among_the_shipped(monkeypatch, tmp_path):
    shipped = tmp_path / "installed" / "configs"
    write(str(shipped / "rec" / "movielens_sasrec.yaml"), "path: shipped\nbase: ../common.yaml\n")
    write(str(shipped / "common.yaml"), "seed: 9\n")
    monkeypatch.setattr("jaxops.config.files.shipped_configs", lambda: shipped)
    monkeypatch.chdir(tmp_path / "toypkg")
    for name in (
        "rec/movielens_sasrec",
        "configs/rec/movielens_sasrec.yaml",
        shipped / "rec" / "movielens_sasrec",
    ):
        assert find_config(name) == shipped / "rec" / "movielens_sasrec.yaml"
    loaded = load(toy.Toy, "rec/movielens_sasrec")
    assert loaded.config.seed == 9 and loaded.config.path == "shipped"
    assert loaded.origins["path"] == "configs/rec/movielens_sasrec.yaml:1"
    with pytest.raises(UserError, match="did you mean 'rec/movielens_sasrec'"):
        find_config("rec/movilens_sasrec.yaml")
    with pytest.raises(UserError, match=r"is a folder; a configuration is a file .*movielens_sasrec.yaml"):
        find_config("rec")
    write("mine.yaml", "path: x\n")
    with pytest.raises(UserError, match=r"did you mean 'mine.yaml'\?"):
        find_config("mime.yaml")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("2_000_000", 2_000_000),
        ("-.5", -0.5),
        ("+3", 3),
        ("0x1F", 31),
        ("1.", 1.0),
        ("010", "010"),
        ("1:30", "1:30"),
        ("1_", "1_"),
        ("on", "on"),
        ("No", "No"),
        ("2026-11-15", "2026-11-15"),
        ("True", True),
        ("~", None),
        ("", None),
        ("-.inf", -math.inf),
        ("'5'", "5"),
        ("!!str 5", "5"),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text, value):
    read = parse_yaml(text, "x.yaml").value
    assert read == value and type(read) is type(value)


TEXT = st.text(st.characters(blacklist_categories=["Cs", "Cc"]), max_size=12).filter(lambda text: "${env" not in text)
WORDS = st.sampled_from(["1e-4", "no", "~", "null", "0x1", "1_0", "2026-01-01", "- a", "a: b", "#", " ", "1:30", ".5"])
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT | WORDS, inner, max_size=3),
    max_leaves=12,
)


@given(PLAIN)
def test_any_plain_value_survives_the_dump(value):
    loaded = from_dict(toy.Toy, {"path": "x", "extra": {"value": value}})
    assert loaded.config.extra == {"value": value}
    text = dump_yaml(loaded.resolved)
    read = parse_yaml(text, "dump.yaml")
    assert from_dict(toy.Toy, plain_node(read)).resolved == loaded.resolved
    assert not diff(plain_node(read), loaded.resolved)


def test_an_object_store_is_read_through_epath(monkeypatch):
    class Remote:
        def __init__(self, name):
            self.name = name

        def read_text(self):
            if self.name != "gs://lake/run/config.yaml":
                raise RuntimeError("403, no access")
            return "path: there\nbase: here.yaml\n"

    monkeypatch.setattr("etils.epath.Path", Remote)
    write("here.yaml", "seed: 8\n")
    loaded = load(toy.Toy, "gs://lake/run/config.yaml")
    assert loaded.config.seed == 8 and loaded.origins["path"] == "gs://lake/run/config.yaml:1"
    with pytest.raises(ConfigError, match="gs://other: cannot be read: RuntimeError: 403, no access"):
        load(toy.Toy, "gs://other")


def test_diff_names_what_changed():
    a = from_dict(toy.Toy, {"path": "x"}).resolved
    b = from_dict(toy.Toy, {"path": "x", "model": {"kind": "hstu", "dim": 64}, "evaluate": {"metrics": ["a"]}}).resolved
    assert diff(a, a) == []
    assert diff(a, b) == [
        ("model.kind", "sasrec", "hstu"),
        ("model.heads", 2, ABSENT),
        ("model.dropout", 0.2, ABSENT),
        ("evaluate.metrics", ["ndcg@10"], ["a"]),
        ("model.layers", ABSENT, 4),
    ]
    assert repr(ABSENT) == "(absent)"


@pytest.mark.parametrize(
    ("value", "every", "again"),
    [
        (1000, Every(steps=1000), 1000),
        ("10min", Every(seconds=600.0), "10min"),
        ("600s", Every(seconds=600.0), "600s"),
        ("1.5 h", Every(seconds=5400.0), "1.5 h"),
        ("250ms", Every(seconds=0.25), "250ms"),
    ],
)
def test_cadence_keeps_its_spelling(value, every, again):
    assert Every.from_config(value) == every and Every.from_config(value).to_config() == again


def test_cadence_made_in_python_is_spelled_exactly():
    assert [Every(seconds=s).to_config() for s in (600.0, 7200.0, 90.0, 0.25, 86400.0)] == [
        "10min",
        "2h",
        "90s",
        "0.25s",
        "1d",
    ]
    assert Duration(1 / 3).to_config() == f"{1 / 3!r}s"
    assert Duration.from_config(Duration(1 / 3).to_config()) == Duration(1 / 3)


@dataclasses.dataclass(frozen=True)
class Tree:
    """A schema that contains itself."""

    left: "Tree | None" = None
    sizes: dict[int, float] = dataclasses.field(default_factory=dict)


def test_a_schema_may_contain_itself_and_keys_may_be_numbers():
    assert from_dict(Tree, {"left": {"left": {}, "sizes": {3: 1}}}).config == Tree(Tree(Tree(), {3: 1.0}))
    with pytest.raises(ConfigError, match=r"sizes\.x \[given\]: expected an integer, got 'x'"):
        from_dict(Tree, {"sizes": {"x": 1}})


@dataclasses.dataclass
class Melted:
    x: int = 1


@dataclasses.dataclass(frozen=True)
class Twin:
    kind: Literal["sasrec"] = "sasrec"


@dataclasses.dataclass(frozen=True)
class Twins:
    model: toy.SasRec | Twin


@dataclasses.dataclass(frozen=True)
class Vague:
    x: tuple = ()


def test_mistakes_of_the_schema_author_are_type_errors():
    with pytest.raises(TypeError, match="frozen dataclass"):
        record_of(Melted)
    with pytest.raises(TypeError, match="two members of a union have the kind sasrec"):
        from_dict(Twins, {})
    with pytest.raises(TypeError, match="say of what"):
        from_dict(Vague, {})


def test_a_run_can_be_read_where_its_code_is_not():
    values = {"path": "x", "objective": {"fn": "gone.module:loss", "a": 1}}
    with pytest.raises(ConfigError, match="no module 'gone'"):
        from_dict(toy.Toy, values)
    assert from_dict(toy.Toy, values, check_imports=False).config.objective == ByPath("gone.module:loss", {"a": 1})


def test_reading_a_configuration_imports_no_jax():
    code = (
        "import sys, pkgutil, importlib, jaxops.config\n"
        "for module in pkgutil.iter_modules(jaxops.config.__path__):\n"
        "    importlib.import_module('jaxops.config.' + module.name)\n"
        "assert 'jax' not in sys.modules and 'numpy' not in sys.modules, sorted(sys.modules)"
    )
    repository = Path(toy.__file__).resolve().parents[2]
    subprocess.run([sys.executable, "-c", code], cwd=repository, check=True, timeout=60)

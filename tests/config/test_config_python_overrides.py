"""Overrides as a mapping of Python values: merged as strings are, but never read as YAML."""

import datetime
import enum
from pathlib import Path

import config_toy as toy
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxops.config.errors import ConfigError
from jaxops.config.load import Loaded, from_dict
from jaxops.config.overrides import override_trees
from jaxops.config.types import ByPath, Duration

BASE = {"path": "x", "tables": {"item": {"rows": 5}}}


def read(overrides, **values) -> Loaded:
    return from_dict(toy.Toy, {**BASE, **values}, overrides, check_imports=False)


def refusal(overrides, **values) -> str:
    with pytest.raises(ConfigError) as error:
        read(overrides, **values)
    return str(error.value)


def test_a_mapping_gives_what_the_strings_give():
    given = {"optimizer.lr": 1e-4, "model": {"dim": 32, "heads": 4}, "batch.global": 64, "tables.word.rows": "auto"}
    texts = ["optimizer.lr=1e-4", "model={dim: 32, heads: 4}", "batch.global=64", "tables.word.rows=auto"]
    assert read(given).config == read(texts).config and read(given).resolved == read(texts).resolved
    assert read(given).config.tables["item"].rows == 5
    assert read(given).origins["optimizer.lr"] == "override 'optimizer.lr'"
    assert read(given).origins["model.heads"] == "override 'model.heads'"
    assert read("optimizer.lr=3").config.optimizer.lr == 3.0


def test_later_ones_win():
    assert read({"model.dim": 32, "model": {"dim": 48}}).config.model.dim == 48
    assert read({"model": {"dim": 48}, "model.dim": 32}).config.model.dim == 32


def test_another_kind_replaces_the_section():
    config = read({"model": {"kind": "hstu", "layers": 2}}, model={"kind": "sasrec", "heads": 4}).config
    assert config.model == toy.Hstu(layers=2)


def test_a_section_takes_the_place_of_the_whole_earlier_one():
    loaded = read({"optimizer": toy.AdamW(lr=0.5)}, optimizer={"kind": "adamw", "clip": 1.0})
    assert loaded.config.optimizer == toy.AdamW(lr=0.5)
    loaded = read({"optimizer": toy.AdamW(lr=0.5), "optimizer.lr": 0.25}, optimizer={"clip": 1.0})
    assert loaded.config.optimizer == toy.AdamW(lr=0.25)
    reward = ByPath("pkg.mod:loss", {"lambda_": 2})
    assert read({"objective": reward}, objective={"fn": "pkg.mod:loss", "gamma": 1}).config.objective == reward
    assert read({"rewards": [{"fn": "a.b:c", "timeout": Duration(7.0)}]}).config.rewards[0].timeout == Duration(7.0)


@pytest.mark.parametrize(
    "lr",
    [
        np.float64(1e-4),
        np.float32(1e-4),
        np.float16(1e-4),
        ml_dtypes.bfloat16(1e-4),
        np.array(1e-4, np.float32),
        jnp.float32(1e-4),
    ],
)
def test_a_float_of_numpy_is_the_number_that_was_written(lr):
    with np.printoptions(precision=1):
        found = read({"optimizer.lr": lr})
    assert found.resolved["optimizer"]["lr"] == 1e-4 and type(found.config.optimizer.lr) is float


@pytest.mark.parametrize("value", [1 / 3, 0.1 + 0.2, 16777217.0, 5e-324])
def test_no_float_loses_a_digit(value):
    assert read({"optimizer.lr": np.float64(value)}).config.optimizer.lr == value
    short = np.float32(value)
    assert np.float32(read({"optimizer.lr": short}).config.optimizer.lr) == short


def plain(value):
    """The value that an override becomes, before a schema sees it."""
    (tree,) = override_trees({"a": value})
    found = tree.value["a"].value
    return [entry.value for entry in found] if isinstance(found, list) else found


class Word(enum.StrEnum):
    AUTO = "auto"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (np.int64(64), 64),
        (np.bool_(True), True),
        (np.str_("no"), "no"),
        (Word.AUTO, "auto"),
        (Path("/data") / "x", "/data/x"),
        (datetime.date(2026, 1, 2), "2026-01-02"),
        (None, None),
        ("1e-4", "1e-4"),
        ("{a: 1}", "{a: 1}"),
        ((1, 2), [1, 2]),
        (range(2), [0, 1]),
        (np.array([0.9, 0.99], np.float32), [0.9, 0.99]),
        (jnp.arange(2), [0, 1]),
    ],
)
def test_values_become_plain_ones_of_exact_types(value, expected):
    found = plain(value)
    assert found == expected and type(found) is type(expected)
    if isinstance(found, list):
        assert [type(entry) for entry in found] == [type(entry) for entry in expected]


def test_a_string_is_not_yaml():
    assert "expected a number, got '1e-4'; write it without quotes" in refusal({"optimizer.lr": "1e-4"})
    assert [read({"path": text}).config.path for text in ("no", "[1]", "null")] == ["no", "[1]", "null"]


def focal(model):
    raise AssertionError(model)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"optimizer.lrr": 1e-4}, "optimizer.lrr [override 'optimizer.lrr']: unknown key; did you mean 'lr'?"),
        ({"optimizer": {"lrr": 1}}, "optimizer.lrr [override 'optimizer.lrr']: unknown key; did you mean 'lr'?"),
        ({"optimiser.lr": 1e-4}, "did you mean 'optimizer'?"),
        ({"model.dim": np.bool_(True)}, "model.dim [override 'model.dim']: expected an integer, got true"),
        ({"objective": focal}, f"got focal itself; write its import path, '{__name__}:focal'"),
        ({"model.dim": {1, 2}}, "got {1, 2} of the type set"),
        ({"model.dim": 1j}, "got 1j of the type complex"),
        ({"path": b"x"}, "got b'x' of the type bytes"),
        ({"path": "a\0b"}, r"a character that no configuration needs: '\x00'"),
        ({"tables": {None: 1}}, "a key of a mapping must be a string, got None"),
        ({3: 1}, "override 3: the key of an override is a dotted path such as 'optimizer.lr'"),
        ({"a..b": 1}, "override 'a..b': the key of an override is a dotted path"),
        ({"model.dim=3": 1}, "the key of an override is a dotted path"),
        (["model.dim=3", {"a": 1}], "override {'a': 1}: an override in a list is a string"),
        ({"model.dim": object, "path": {1}}, "2 problems in the configuration"),
    ],
)
def test_what_is_no_override_is_told_in_one_message(overrides, message):
    assert message in refusal(overrides)


def test_a_list_that_holds_itself_is_refused():
    loop: list = []
    loop.append(loop)
    assert "nested more than 100 deep" in refusal({"model": loop})

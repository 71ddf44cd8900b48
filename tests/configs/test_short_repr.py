"""The repr of a config: short, and Python that makes an equal one."""

import dataclasses
import sys

import pytest
import toy_family

from jaxops.config.secrets import Secret
from jaxops.config.short import short_repr
from jaxops.config.types import ByPath, Every
from jaxops.core.optimizer import AdamW
from jaxops.run.build import load_config
from jaxops.run.config import Evaluate, RunSection


def made_again(text: str):
    """The value of a repr, with every dataclass of jaxops and of the toy family by its name."""
    modules = [module for name, module in sys.modules.items() if name.startswith("jaxops.")]
    names = {name: cls for module in [*modules, toy_family] for name, cls in vars(module).items() if is_config(cls)}
    return eval(text, names)


def is_config(cls) -> bool:
    return isinstance(cls, type) and dataclasses.is_dataclass(cls) and cls.__module__.startswith(("jaxops.", "toy_"))


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("rec/movielens_sasrec", []),
        ("rec/ctr_linear", []),
        ("rec/my_interactions", ["data.path=x.csv", "run.loggers=[wandb, tensorboard]"]),
        ("rec/my_interactions", ["data.path=x.csv", "loss_weights={loss/a: 2.0}", "evaluate.every=100 or 1epoch"]),
        ("language/sft_7b", ["optimizer.schedule.warmup=7"]),
    ],
)
def test_a_repr_is_python_that_makes_an_equal_config(name, overrides):
    loaded = load_config(name, overrides)
    text = repr(loaded.config)
    assert made_again(text) == loaded.config
    assert str(loaded) == repr(loaded) == f"Loaded({text})"
    assert len(text) < 1000


def test_only_what_differs_is_shown():
    config = dataclasses.replace(toy_family.Config(task="toy_family:family"), optimizer=AdamW(lr=0.002))
    assert repr(config) == "Config(task='toy_family:family', optimizer=AdamW(lr=0.002))"
    config = dataclasses.replace(config, letters=9, run=RunSection(epochs=3, loggers=()))
    assert repr(config).endswith("AdamW(lr=0.002), run=RunSection(epochs=3, loggers=()), letters=9)")
    assert repr(dataclasses.replace(config, optimizer=AdamW())).startswith(f"Config(task={config.task!r}, run=")


def test_a_repr_of_ones_own_stays():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Own(toy_family.Config):
        def __repr__(self) -> str:
            return "mine"

    assert repr(Own(task="toy")) == "mine"


def test_notes_are_shown():
    loaded = load_config("rec/movielens_sasrec", ["run.steps=5"])
    assert repr(loaded).endswith(f", notes={loaded.notes!r})") and "takes the place of run.epochs" in repr(loaded)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (Every(steps=5, text="unseen"), "Every(steps=5)"),
        (Evaluate(batch=7, metrics=("a",)), "Evaluate(metrics=('a',), batch=7)"),
        (ByPath("a.b:c", {"key": Secret("TOKEN")}), "ByPath(fn='a.b:c', kwargs={'key': ${secret:TOKEN}})"),
        ([AdamW(lr=1.0), ()], "[AdamW(lr=1.0), ()]"),
        ({"x": (Every(steps=1), 2)}, "{'x': (Every(steps=1), 2)}"),
        (dataclasses.replace(AdamW(), clip=1), "AdamW(clip=1)"),
    ],
)
def test_values_within(value, text):
    assert short_repr(value) == text

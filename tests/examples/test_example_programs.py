"""The programs under examples/ are short, run as they are, and teach what they say.

MovieLens-100K is replaced by small files in its form; the overrides below make the runs short.
"""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
from small_data import movielens
from tiny_runs import no_report, working_in  # noqa: F401 (a fixture)

from jaxops.config.files import shipped_examples

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted(path.stem for path in (ROOT / "examples").glob("*.py"))
MODELS = ("plain_jax_model", "nnx_model")
TINY = ["run.epochs=1", "evaluate.baselines=false", "run.loggers=[]"]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder to run in, small MovieLens files, and `examples/` on the path, as for a program that lies there."""
    monkeypatch.setenv("JAXOPS_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    movielens(monkeypatch)
    with working_in(tmp_path):
        yield tmp_path


def example(name):
    return importlib.import_module(name)


def test_there_are_seven_and_jaxops_names_them():
    assert len(EXAMPLES) == 7
    assert sorted(path.stem for path in shipped_examples().glob("*.py")) == EXAMPLES


@pytest.mark.parametrize("name", EXAMPLES)
def test_each_is_short_and_says_what_it_is(name):
    text = (ROOT / "examples" / f"{name}.py").read_text()
    assert len(text.splitlines()) < 80
    assert text.startswith('"""') and f"python examples/{name}.py" in text.split('"""')[1]


@pytest.mark.usefixtures("no_report")
def test_own_family(place):
    run = example("own_family").main(["run.epochs=6", "run.loggers=[]"])
    assert run.state == "finished" and run.summary["valid/error"] < 0.3


def test_ppo_pieces(place):
    assert example("ppo_pieces").main(iterations=20) > 1.0  # of at most 2; letters drawn evenly score 0.02


@pytest.mark.parametrize("name", ["focal_loss", *(pytest.param(n, marks=pytest.mark.slow) for n in MODELS)])
@pytest.mark.usefixtures("no_report")
def test_models_and_losses_train(place, name):
    assert example(name).main(TINY).state == "finished"


@pytest.mark.slow
@pytest.mark.usefixtures("no_report")
def test_multi_task_learns_both(place):
    found = example("multi_task").main(["run.loggers=[]"]).summary
    assert found["test/auc"] > 0.8 and found["test/auc[love]"] > 0.8


@pytest.mark.slow
def test_the_reward_function_is_learnt(place):
    rewards = example("grpo_reward").main(["run.steps=15"]).history()["train/reward"].drop_null().to_pylist()
    assert rewards[-1] > rewards[0] + 0.02


@pytest.mark.slow
@pytest.mark.parametrize("name", ["own_family", "grpo_reward"])
def test_those_with_an_import_path_run_as_a_command_from_anywhere(tmp_path, name):
    argv = [sys.executable, str(ROOT / "examples" / f"{name}.py"), "run.steps=2", "run.loggers=[]"]
    subprocess.run(argv, cwd=tmp_path, check=True)

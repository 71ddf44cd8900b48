"""The examples in the docstrings of what `import jaxops` gives run as they stand.

Where one begins in the middle ("given a task, ..."), the names that it takes for granted are put there first.
"""

import contextlib
import dataclasses
import inspect
import re
import textwrap

import jax
import jax.numpy as jnp
import optax
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_data import movielens, plays
from tiny_runs import no_report, working_in  # noqa: F401 (a fixture)

import jaxops
from jaxops.run.summary import FinishedRun

PUBLIC = {name: getattr(jaxops, name) for name in jaxops.__all__} | {"FinishedRun": FinishedRun}


def example_of(value) -> str:
    """Returns the code below `Example:` in a docstring, without prompts; empty where there is none."""
    text = inspect.cleandoc(value.__doc__ or "") if not isinstance(value, str) else ""
    match = re.search(r"^Example:\n((?:(?: .*)?\n)*(?: .*)?)", text, flags=re.M)
    code = textwrap.dedent(match[1]) if match else ""
    return re.sub(r"^(>>>|\.\.\.) ?", "", code, flags=re.M)


TRAINING = dict.fromkeys(("fit", "load", "every", "RunFailed", "testing"))
"""Examples that train: `load` reads what `fit` has left."""
EXAMPLES = {name: code for name, value in PUBLIC.items() if (code := example_of(value))}


def test_most_public_functions_have_an_example():
    assert len(EXAMPLES) >= 10, sorted(EXAMPLES)


@pytest.mark.parametrize("name", sorted(EXAMPLES.keys() - TRAINING.keys()))
def test_the_example_runs(name, tmp_path):
    with working_in(tmp_path):
        plays(tmp_path / "plays.parquet")
        run(name, given())


@pytest.mark.slow
@pytest.mark.usefixtures("no_report")
def test_those_that_train_run_in_order(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("JAXOPS_CACHE", str(tmp_path / "cache"))
    movielens(monkeypatch)
    with working_in(tmp_path):
        plays(tmp_path / "plays.parquet")
        pq.write_table(pa.table({"user": [1, 2]}), tmp_path / "users.parquet")
        short = ["data.path=plays.parquet", "run.epochs=1", "run.name=short"]
        task = jaxops.build_task(jaxops.load_config("rec/my_interactions", short))
        for name in TRAINING:
            found = run(name, given() | {"task": task})
            if name == "load":
                assert found["table"].num_rows > 0
    assert "finished runs/my-interactions" in capsys.readouterr().out


def run(name: str, names: dict) -> dict:
    """Runs an example, and returns the names that it leaves."""
    with jax.set_mesh(names["mesh"]) if name == "build_step" else contextlib.nullcontext():
        exec(compile(EXAMPLES[name], f"<example of {name}>", "exec"), names)
    return names


def given() -> dict:
    """The names that examples take for granted: a linear model, a batch, a state."""
    mesh = jaxops.make_mesh(data=-1)
    rules = [("", ())]
    batch = {"id": jnp.arange(16), "x": jnp.ones((16, 4)), "y": jnp.zeros(16), "weight": jnp.ones(16)}

    def init(key):
        return {"w": jax.random.normal(key, (4, 1)), "kernel": jnp.zeros((8, 8))}

    def objective(params, batch, key):
        error = (batch["x"] @ params["w"])[:, 0] - batch["y"]
        return {"loss/mse": jaxops.Sum.of(error**2, batch["weight"])}

    state = jaxops.init_state(init, jax.random.key(0), optax.adam(1e-3), mesh, rules)
    modules = {"jaxops": jaxops, "dataclasses": dataclasses, "jax": jax, "jnp": jnp, "optax": optax}
    ours = {"mesh": mesh, "rules": rules, "init": init, "objective": objective, "batch": batch, "state": state}
    return modules | ours | {"params": state.params, "key": jax.random.key(1), "x": jnp.ones((2, 3, 8)), "rate": 0.1}

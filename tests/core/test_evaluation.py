"""Evaluation over padded batches: numpy's numbers on one device and on eight, one program, interruptible."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toys import RULES, init, mesh_of, predict, trainer

from jaxops.core.compiles import Compiles
from jaxops.core.evaluation import Evaluator, Interrupted, evaluated_params
from jaxops.core.optimizer import ema
from jaxops.core.sharding import constrain, parameter_shardings
from jaxops.core.sums import Max, Sum

pytestmark = pytest.mark.latest

EXAMPLES, SIZE = 44, 16
RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(EXAMPLES, 8)).astype(np.float32), RNG.normal(size=(EXAMPLES, 8)).astype(np.float32)


def batches(fill=np.nan):
    """44 examples in batches of 16; the last one is filled up with what must not matter."""
    for first in range(0, EXAMPLES, SIZE):
        real = min(SIZE, EXAMPLES - first)
        pad = lambda a, n=SIZE - real: np.concatenate([a, np.full((n, 8), fill, np.float32)])
        yield {
            "x": pad(X[first : first + real]),
            "y": pad(Y[first : first + real]),
            "weight": (np.arange(SIZE) < real).astype(np.float32),
        }


def metrics(params, batch):
    error = jnp.sum(jnp.square(predict(params, batch["x"]) - batch["y"]), -1)
    return {
        "error": Sum.of(error, batch["weight"]),
        "rmse": Sum(Sum.of(error, batch["weight"]).total, jnp.sum(batch["weight"]), np.sqrt),
        "worst": Max(jnp.max(jnp.where(batch["weight"] > 0, error, -jnp.inf))),
    }


@pytest.mark.parametrize("layout", [{"data": 1}, {"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_padded_batches_are_numpys_average(layout):
    mesh = mesh_of(**layout)
    params = init(None)
    wide = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    hidden = np.tanh(X @ wide["up"]["kernel"] + wide["up"]["bias"])
    error = np.sum((hidden @ wide["down"]["kernel"] + wide["down"]["bias"] - Y) ** 2, -1)
    compiles = Compiles()
    with jax.set_mesh(mesh), compiles.watching():
        placed = jax.device_put(params, parameter_shardings(params, RULES, mesh))
        evaluate = Evaluator(metrics, mesh)
        assert evaluate.fresh
        found = evaluate(placed, batches())
        assert not evaluate.fresh
        assert evaluate(placed, batches(fill=0.0)) == found
    assert compiles.count["evaluate_step"] == 1
    assert found["error"] == pytest.approx(error.mean(), rel=1e-6)
    assert found["rmse"] == pytest.approx(np.sqrt(error.mean()), rel=1e-6)
    assert found["worst"] == pytest.approx(error.max(), rel=1e-6)


def test_parameters_survive_and_are_cast():
    mesh, seen = mesh_of(data=1), []

    def dtypes(params, batch):
        seen.append({x.dtype for x in jax.tree.leaves(params)})
        return {"n": Sum.of(batch["weight"])}

    params = init(None)
    with jax.set_mesh(mesh):
        assert Evaluator(dtypes, mesh, jnp.bfloat16)(params, batches())["n"] == pytest.approx(44 / 48)
    assert seen[-1] == {jnp.dtype(jnp.bfloat16)}
    assert not any(x.is_deleted() for x in jax.tree.leaves(params))


def test_interrupted_between_batches():
    mesh, asked = mesh_of(data=1), []
    with jax.set_mesh(mesh), pytest.raises(Interrupted):
        Evaluator(metrics, mesh)(init(None), batches(), poll=lambda: asked.append(1) or len(asked) > 1)
    assert len(asked) == 2


def test_no_batches():
    with pytest.raises(ValueError, match="no batches"):
        Evaluator(metrics, mesh_of(data=1))(init(None), [])


def test_the_moving_average_is_evaluated_where_there_is_one():
    t = trainer(optax.sgd(0.1), frozen=("^down",), extras={"ema": ema(0.5)})
    average, plain = evaluated_params(t.state), trainer(frozen=("^down",))
    assert average["up"] is t.state.extra["ema"]["up"] or average["up"] == t.state.extra["ema"]["up"]
    assert average["down"]["kernel"] is t.state.frozen["down"]["kernel"]
    assert evaluated_params(plain.state)["up"]["kernel"] is plain.state.params["up"]["kernel"]


def test_logical_names_of_the_run_reach_the_metrics():
    mesh = mesh_of(data=2, tensor=2)

    def metrics(params, batch):
        return {"x": Sum.of(constrain(batch["x"], ("batch", "features")), batch["weight"])}

    with jax.set_mesh(mesh):
        found = Evaluator(metrics, mesh, logical={"features": "tensor"})(init(None), batches(fill=0.0))
        with pytest.raises(ValueError, match="unknown logical names"):
            Evaluator(metrics, mesh)(init(None), batches())
    assert found["x"] == pytest.approx(X.mean(), abs=1e-6)

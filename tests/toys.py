"""Tiny things to train: a two-layer regression that compiles at once, and SASRec on a handful of users."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxops.core.fresh_state import init_state
from jaxops.core.mesh import make_mesh
from jaxops.core.state import State
from jaxops.core.step import TrainStep, build_step
from jaxops.core.sums import Max, Sum
from jaxops.data.interactions.interactions import from_arrays
from jaxops.data.interactions.splits import leave_one_out
from jaxops.data.interactions.windows import SequenceSource
from jaxops.models.sasrec import SASRec, SASRecConfig
from jaxops.run.task import Task

RULES = [(r"up/kernel$", ("fsdp", "tensor")), (r"down/kernel$", ("tensor", "fsdp")), (r"bias$", ())]


def mesh_of(**sizes: int) -> jax.sharding.Mesh:
    """A mesh over as many of the devices as the sizes multiply to."""
    return make_mesh(**sizes, devices=jax.devices()[: int(np.prod(list(sizes.values())))])


def init(key, scale=0.4):
    """Parameters of tanh(x @ up + bias) @ down + bias; no draw, which would take longer to compile than the model."""
    del key
    wave = lambda *shape: scale * jnp.sin(0.7 + 1.3 * jnp.arange(np.prod(shape), dtype=jnp.float32)).reshape(shape)
    return {
        "up": {"kernel": wave(8, 16), "bias": jnp.full((16,), 0.1)},
        "down": {"kernel": wave(16, 8), "bias": jnp.zeros((8,))},
    }


def predict(params, x):
    hidden = jnp.tanh(x @ params["up"]["kernel"] + params["up"]["bias"][None])
    return hidden @ params["down"]["kernel"] + params["down"]["bias"][None]


def regression(params, batch, key):
    """Squared error, a ragged second term, and metrics of both kinds."""
    x = batch["x"].astype(params["up"]["kernel"].dtype)
    out = predict(params, x).astype(jnp.float32)
    error = jnp.sum(jnp.square(out - batch["y"]), axis=-1)
    worst = jnp.max(jnp.where(batch["weight"] > 0, error, -jnp.inf))
    return {
        "loss/mse": Sum.of(error, batch["weight"]),
        "loss/size": Sum.of(jnp.mean(jnp.square(out), axis=-1), batch["odd"]),
        "error": Sum.of(jnp.abs(out - batch["y"]), batch["weight"]),
        "worst": Max(worst),
    }


def numpy_regression(params, batch, weights=(1.0, 1.0)):
    """(loss, gradients, sums by name) of `regression` in float64, by hand."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    x, y = np.asarray(batch["x"], np.float64), np.asarray(batch["y"], np.float64)
    weight, odd = np.asarray(batch["weight"], np.float64), np.asarray(batch["odd"], np.float64)
    hidden = np.tanh(x @ params["up"]["kernel"] + params["up"]["bias"])
    out = hidden @ params["down"]["kernel"] + params["down"]["bias"]
    error, size = np.sum((out - y) ** 2, -1), np.mean(out**2, -1)
    d_out = weights[0] * 2 * (out - y) * (weight / max(weight.sum(), 1e-30))[:, None]
    d_out += weights[1] * 2 * out / out.shape[-1] * (odd / max(odd.sum(), 1e-30))[:, None]
    d_hidden = d_out @ params["down"]["kernel"].T * (1 - hidden**2)
    grads = {
        "up": {"kernel": x.T @ d_hidden, "bias": d_hidden.sum(0)},
        "down": {"kernel": hidden.T @ d_out, "bias": d_out.sum(0)},
    }
    sums = {
        "loss/mse": ((error * weight).sum(), weight.sum()),
        "loss/size": ((size * odd).sum(), odd.sum()),
        "error": ((np.abs(out - y) * weight[:, None]).sum(), 8 * weight.sum()),
        "worst": error[weight > 0].max() if (weight > 0).any() else -np.inf,
    }
    loss = sum(w * sums[name][0] / max(sums[name][1], 1e-30) for w, name in zip(weights, sums, strict=False))
    return loss, grads, sums


def rows(seed: int = 0, size: int = 32, **changes: np.ndarray) -> dict[str, np.ndarray]:
    """A batch for `regression`, ragged: about a third of the weights are zero."""
    rng = np.random.default_rng(seed)
    batch = {
        "id": np.arange(seed * size, (seed + 1) * size, dtype=np.int32),
        "x": rng.normal(size=(size, 8)).astype(np.float32),
        "y": rng.normal(size=(size, 8)).astype(np.float32),
        "weight": (rng.random(size) > 0.3).astype(np.float32),
        "odd": np.where(rng.random(size) > 0.6, rng.random(size), 0).astype(np.float32),
    }
    return batch | changes


@dataclasses.dataclass
class Trainer:
    """A step and its state on a mesh; `step` waits (several steps in flight on virtual devices can lock up)."""

    mesh: jax.sharding.Mesh
    built: TrainStep
    state: State

    def step(self, batch, window=None):
        with jax.set_mesh(self.mesh):
            self.state, sums = jax.block_until_ready(self.built(self.state, batch, window))
        return sums

    def compiled(self, batch):
        with jax.set_mesh(self.mesh):
            program = self.built.programs(self.state, batch)[0]
            return program.fn.lower(*program.args).compile()


def trainer(
    tx: optax.GradientTransformation | None = None,
    layout: dict[str, int] | None = None,
    objective: Callable[..., Any] = regression,
    start: Callable[..., Any] = init,
    rules: Any = RULES,
    frozen: tuple[str, ...] = (),
    dtype: Any = jnp.float32,
    **options: Any,
) -> Trainer:
    """`build_step` and `init_state` with defaults of a test."""
    tx = optax.sgd(0.1) if tx is None else tx
    mesh = mesh_of(**(layout or {"data": 1}))
    shared = {name: options[name] for name in ("tables", "extras") if name in options}
    with jax.set_mesh(mesh):
        state = init_state(start, jax.random.key(0), tx, mesh, rules, frozen=frozen, dtype=dtype, **shared)
        return Trainer(mesh, build_step(objective, tx, mesh, rules=rules, **options), state)


def host(tree):
    """The tree as numpy arrays of its own (the originals may be donated next)."""
    return jax.tree.map(lambda x: np.array(x, copy=True), jax.device_get(tree))


def interactions(users: int = 64, items: int = 60, seed: int = 0):
    """Histories of 3 to 16 events, so training sequences are ragged."""
    rng = np.random.default_rng(seed)
    lengths = 3 + rng.integers(0, 14, users)
    user = np.repeat(np.arange(users), lengths)
    return from_arrays(user, rng.integers(0, items, user.size), np.arange(user.size))


def tiny_sasrec(n_items: int = 60, **changes: Any) -> SASRec:
    """8 wide, one layer, 5 items long."""
    shape: dict[str, Any] = {"dim": 8, "layers": 1, "heads": 2, "hidden": 16, "length": 5, "dropout": 0.25}
    return SASRec(SASRecConfig(**(shape | changes)), n_items)


class Rows:
    """A source of `rows`."""

    examples = 10**6

    def batch(self, cursor: int, size: int) -> dict[str, np.ndarray]:
        return rows(cursor // size, size)


class Regression:
    """The two-layer regression as a task's model."""

    rules = RULES
    shapes = jax.eval_shape(init, None)

    def init(self, key):
        return init(key)


def regression_task(objective: Callable[..., Any] = regression, source: Any = None, **changes: Any) -> Task:
    """The regression as a task; `changes` replace fields."""
    model = Regression()
    task = Task(
        config=None,
        resolved={},
        model=model,
        objective=objective,
        source=source or Rows(),
        rules=model.rules,
    )
    return dataclasses.replace(task, **changes)


class Ragged:
    """A source whose batches also have examples without a target, a whole microbatch of them, and odd weights."""

    def __init__(self, source: Any):
        self._source, self.examples = source, source.examples

    def batch(self, cursor: int, size: int) -> dict[str, np.ndarray]:
        batch = dict(self._source.batch(cursor, size))
        weight = batch["weight"] * (1 + batch["targets"] % 3).astype(np.float32)
        weight[1::4] = 0  # every fourth example: one whole microbatch of four
        weight[2] = 0
        weight[:, -1] *= np.arange(size) % 3 != 0
        return batch | {"weight": weight}


def rec_task(objective: Callable[[SASRec], Any], windows: Any = SequenceSource, **changes: Any) -> Task:
    """Tiny SASRec on ragged batches, without a config."""
    inter = interactions()
    model = tiny_sasrec(inter.n_items, **changes)
    source = Ragged(windows(inter, leave_one_out(inter), model.config.length, seed=0))
    return regression_task(objective(model), source, model=model, rules=model.rules)


def feature_batch(dims, numeric, seed, size):
    """Features `user`, `item` and `tags` as wide as said, the last a weighted bag, empty in example 0; and numbers."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
    tags = rng.integers(-1, 5, (size, 3)).astype(np.int32)
    tags[0] = -1
    batch = {
        "id": np.arange(size, dtype=np.int32),
        "user": np.arange(size, dtype=np.int32),
        "item": np.arange(size, dtype=np.int32),
        "tags": tags,
        "tags/weight": rng.uniform(0.5, 2, (size, 3)).astype(np.float32),
        "numeric": draw(size, numeric),
        "rows": {
            "user": draw(size, dims["user"]),
            "item": draw(size, dims["item"]),
            "tags": draw(size, 3, dims["tags"]) * (tags >= 0)[..., None],
        },
    }
    return jax.tree.map(jnp.asarray, batch)


def moved_params(model):
    """Parameters moved off where they are born, so that biases matter."""
    leaves, structure = jax.tree.flatten(jax.jit(model.init)(jax.random.key(0)))
    rng = np.random.default_rng(1)
    leaves = [x + jnp.asarray(0.2 * rng.normal(size=x.shape), jnp.float32) for x in leaves]
    return jax.tree.unflatten(structure, leaves)


def numpy_mlp(x, p):
    for at in range(sum(name.startswith("layer_") for name in p)):
        x = np.maximum(x @ p[f"layer_{at}"]["kernel"] + p[f"layer_{at}"]["bias"], 0)
    return x @ p["out"]["kernel"] + p["out"]["bias"] if "out" in p else x

"""A family of one's own: an autoencoder of small pictures, for which every command of jaxops works.

`python examples/own_family.py [a.b=VALUE ...]` trains it; so does `jaxops train` with `task: own_family:FAMILY`.
"""

import dataclasses
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa

import jaxops as jx
from jaxops.run.batched import BatchedEvaluation
from jaxops.run.load import evaluate_saved
from jaxops.run.task import of_config


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(jx.RunConfig):
    code: int = 4  # the numbers that a picture of 8 x 8 is squeezed into

    def metric(self, name):
        return jx.Metric(name, "lower", "squared error")


class Autoencoder:
    rules, padding = [("kernel", ("fsdp", "tensor"))], {}  # how a mesh divides the parameters

    def __init__(self, code):
        self.init = lambda key: {"kernel": jax.random.normal(key, (64, code)) / 8}
        self.shapes = jax.eval_shape(self.init, jax.random.key(0))

    def error(self, params, batch, key=None):
        kernel = jx.constrain(params["kernel"], ("embed", "mlp"))  # gathered over fsdp where it is multiplied by
        error = jnp.mean(jnp.square(batch["x"] @ kernel @ kernel.T - batch["x"]), axis=-1)
        return dict.fromkeys(("loss/error", "error"), jx.Sum.of(error, batch["weight"]))


class Waves:
    examples = 4096  # an epoch; a batch is a pure function of the cursor, which is what lets a run resume

    def batch(self, cursor, size):
        ids = (np.arange(cursor, cursor + size) % self.examples).astype(np.int32)
        phase = ids[:, None] % 7 * (np.arange(64) % 8) / 7 + ids[:, None] % 5 * (np.arange(64) // 8) / 5
        return {"id": ids, "x": np.sin(phase).astype(np.float32), "weight": np.ones(size, np.float32)}


def build(loaded, given):
    model, source = Autoencoder(loaded.config.code), Waves()
    evaluation = BatchedEvaluation({"valid": lambda size: [source.batch(0, size)]}, model.error)
    objective = given.objective(model) if given.objective else model.error
    common = of_config(loaded.config, loaded.resolved, model)
    return jx.Task(**common, objective=objective, source=source, evaluation=evaluation)


class Served:
    def __init__(self, saved):
        self.saved, self.evaluate = saved, lambda parts=("valid",): evaluate_saved(saved, parts)

    def predict(self, source, options=None, *, say=print):
        return pa.table({"code": list(np.stack(source["x"]) @ np.asarray(self.saved.weights.params["kernel"]))})


FAMILY = jx.Family(config=Config, build=build, load=Served)


def main(overrides=()):
    values = {"task": "own_family:FAMILY", "evaluate": {"metrics": ["error"]}, "run": {"name": "waves", "epochs": 9}}
    Path("waves.yaml").write_text(str(values))  # YAML takes Python's own notation
    run = jx.fit(jx.build_task(jx.load_config("waves.yaml", list(overrides))))
    print(run.summary["valid/error"], jx.load(run.dir).predict({"x": Waves().batch(0, 2)["x"]})["code"][1])
    return run


if __name__ == "__main__":
    main(sys.argv[1:])

"""A family of one's own in one file: letters that follow each other, judged by the text that it writes."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.csv

from jaxops.config.types import Every
from jaxops.core.metric import Metric
from jaxops.core.sums import Sum
from jaxops.core.turn import Program, advanced
from jaxops.run.config import EarlyStop, Evaluate, RunConfig
from jaxops.run.family import Family
from jaxops.run.load import evaluate_saved
from jaxops.run.task import About, Measured, Task, of_config


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(RunConfig):
    letters: int = 8
    evaluate: Evaluate = Evaluate(every=Every(steps=2), metrics=("nll",), stop=EarlyStop(metric="nll", patience=3))

    def metric(self, name):
        return Metric(name, "lower", "NLL")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Predict:
    length: int = 4


class Model:
    rules, padding = [("table", ())], {}

    def __init__(self, letters):
        self.letters, self.shapes = letters, {"table": jax.ShapeDtypeStruct((letters, letters), jnp.float32)}

    def init(self, key):
        return {"table": 0.01 * jax.random.normal(key, (self.letters, self.letters))}

    def write(self, params, first, length):
        text = [first]
        for _ in range(length):
            text.append(int(np.argmax(params["table"][text[-1]])))
        return "".join(chr(97 + letter) for letter in text)


class Letters:
    examples = 64

    def __init__(self, letters):
        self.letters = letters

    def batch(self, cursor, size):
        ids = (np.arange(cursor, cursor + size) % self.examples).astype(np.int32)
        return {"id": ids, "letter": ids % self.letters, "next": (ids + 1) % self.letters}


def objective(params, batch, key):
    logprobs = jax.nn.log_softmax(params["table"][batch["letter"]])
    nll = -jnp.take_along_axis(logprobs, batch["next"][:, None], axis=1)[:, 0]
    return {"loss/nll": Sum.of(nll, batch["weight"])}


class Weighed:
    """Two programs and host work between: what the model is unsure of counts more."""

    def __init__(self, parts):
        self.update = parts.update
        self.doubt = jax.jit(lambda params, batch: 1 - jax.nn.softmax(params["table"])[batch["letter"], batch["next"]])

    def __call__(self, state, batch, window=None, turn=None):
        doubt = np.asarray(self.doubt(state.params, batch))
        weight = np.asarray([1.0 + round(float(one), 2) for one in doubt], np.float32)  # on the host
        state, window = self.update(state, {**batch, "weight": weight}, window)
        return advanced(state), window

    def programs(self, state, batch):
        weighed = {**batch, "weight": jax.ShapeDtypeStruct(batch["id"].shape, jnp.float32)}
        return [Program("doubt", self.doubt, (state.params, batch)), *self.update.programs(state, weighed)]


@dataclasses.dataclass(frozen=True)
class Written:
    """The evaluation: a figure of which less is better, and text."""

    parts = ("valid", "test")

    def on(self, task, mesh):
        def evaluate(weights, part, step, poll):
            table = np.asarray(weights.params["table"], np.float64)
            batch = task.source.batch(0, task.model.letters)
            logprobs = table - np.log(np.exp(table).sum(1, keepdims=True))
            nll = -logprobs[batch["letter"], batch["next"]].mean()
            text = task.model.write({"table": table}, 0, 5)
            return Measured({"nll": float(nll)}, samples=[{"prompt": "a", "completion": text}])

        return evaluate


def build(loaded, given):
    model, source = Model(loaded.config.letters), Letters(loaded.config.letters)
    weighed = lambda size: {**source.batch(0, size), "weight": np.ones(size, np.float32)}
    made = given.objective(model) if given.objective else objective
    return Task(
        **of_config(loaded.config, loaded.resolved, model),
        objective=made,
        source=source,
        evaluation=Written(),
        step=Weighed,
        update_batch=weighed,
        inspection={"letters": model.letters},
        transform={"letters": np.arange(model.letters)},
        about=About(model="Letters", data=[("letters", str(model.letters))], notes=["Less is better."]),
    )


class Served:
    def __init__(self, saved):
        self.saved, self.model = saved, Model(len(saved.transform("letters")))

    def predict(self, source, options=None, *, say=print, **keywords):
        options = options or Predict(**keywords)
        starts = pyarrow.csv.read_csv(source)["letter"].to_pylist()
        write = lambda one: self.model.write(self.saved.weights.params, ord(one) - 97, options.length)
        return pa.table({"letter": starts, "text": [write(one) for one in starts]})

    def export(self, path, options=None, **keywords):
        np.save(Path(path), self.saved.weights.params["table"])
        return f"table -> {path}"

    def evaluate(self, parts=("valid", "test")):
        return evaluate_saved(self.saved, parts)


FAMILY = Family(config=Config, build=build, load=Served, predict=Predict)

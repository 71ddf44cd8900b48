"""A family that keeps a decoder under `policy/`, beside a value head and a frozen reference, as a policy's run does."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxops.core.metric import Metric
from jaxops.core.sums import Sum
from jaxops.data.text.open_tokenizer import open_tokenizer
from jaxops.models.decoder.architecture import Architecture
from jaxops.models.decoder.decoder import build_decoder
from jaxops.models.lora import Lora
from jaxops.run.config import Evaluate, RunConfig
from jaxops.run.family import Family
from jaxops.run.pretrained.config import Pretrained
from jaxops.run.pretrained.stored import stored
from jaxops.run.task import NoEvaluation, Task, of_config

ARCHITECTURE = Architecture(dim=8, layers=1, heads=2, hidden=16, length=64)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(RunConfig):
    model: Pretrained
    evaluate: Evaluate = Evaluate(metrics=())

    def metric(self, name):
        return Metric(name, "lower", name)


class Model:
    """The decoder (with adapters, or without) under `policy/`, the value head, and a reference that is another one."""

    padding: dict[str, int] = {}

    def __init__(self, policy, base):
        self.policy, self.base = policy, base
        self.rules = [(f"^policy/{pattern.removeprefix('^')}", axes) for pattern, axes in policy.rules]
        self.rules += [("^value/", ()), ("^reference/", ())]
        self.shapes = jax.eval_shape(self.init, jax.random.key(0))

    def init(self, key):
        params = {"policy": self.policy.init(key), "value": {"kernel": jnp.ones(4)}}
        if "lora" in params["policy"]:
            adapters = params["policy"]["lora"]
            params["policy"]["lora"] = jax.tree.map(lambda x: x + 0.5, adapters)
        return params | {"reference": self.base.init(jax.random.fold_in(key, 1))}


class Numbers:
    examples = 8

    def batch(self, cursor, size):
        return {"id": np.arange(cursor, cursor + size, dtype=np.int32) % self.examples, "weight": np.ones(size, "f4")}


def build(loaded, given):
    words = open_tokenizer("bytes")
    decoder = build_decoder(ARCHITECTURE, words.vocab)
    lora = loaded.config.model.lora
    model = Model(decoder if lora is None else Lora(decoder, lora), decoder)
    loss = lambda params, batch, key: {"loss/value": Sum.of(batch["weight"] * jnp.sum(params["value"]["kernel"] ** 2))}
    return Task(
        **of_config(loaded.config, loaded.resolved, model),
        objective=loss,
        source=Numbers(),
        evaluation=NoEvaluation(),
        frozen=("^reference/", "^policy/(?!lora/)") if lora else ("^reference/",),
        transform=stored(decoder.config, words),
    )


FAMILY = Family(config=Config, build=build, load=lambda saved: saved)

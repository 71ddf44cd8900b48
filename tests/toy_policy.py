"""A policy step as a user outside would write it: samples, a host that judges them, clipped updates by a TrainStep."""

import dataclasses
import os
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from jaxops.core.answers import Key, digest_of
from jaxops.core.evaluation import Interrupted
from jaxops.core.journal import MISSING, exchange
from jaxops.core.mesh import batch_axes
from jaxops.core.rows import owned
from jaxops.core.sums import Max, Sum
from jaxops.core.turn import Program, advanced
from jaxops.run.config import Evaluate, RunConfig
from jaxops.run.family import Family
from jaxops.run.task import Task, of_config

LETTERS, LENGTH, EPOCHS, PARTS = 8, 6, 2, 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(RunConfig):
    evaluate: Evaluate = Evaluate()


class Model:
    rules, padding = [("policy/", (None, "tensor")), ("", ())], {}
    shapes = {"policy": {"table": jax.ShapeDtypeStruct((LETTERS, LETTERS), jnp.float32)}}
    shapes |= {"reference": shapes["policy"], "value": {"table": jax.ShapeDtypeStruct((LETTERS,), jnp.float32)}}

    def init(self, key):
        table = 0.1 * jax.random.normal(key, (LETTERS, LETTERS))
        return {"policy": {"table": table}, "reference": {"table": table}, "value": {"table": jnp.zeros(LETTERS)}}


class Prompts:
    examples = 64

    def batch(self, cursor, size):
        ids = (np.arange(cursor, cursor + size) * 5 % self.examples).astype(np.int32)
        return {"id": ids, "letter": ids % LETTERS}


def logprobs_of(part, tokens):
    logits = jax.nn.log_softmax(part["table"])[tokens[:, :-1]]
    return jnp.take_along_axis(logits, tokens[:, 1:, None], axis=2)[..., 0]


def objective(params, batch, key):
    ratio = jnp.exp(logprobs_of(params["policy"], batch["tokens"]) - batch["old"])
    advantage = batch["advantage"][:, None]
    policy = -jnp.minimum(ratio * advantage, jnp.clip(ratio, 0.8, 1.2) * advantage)
    value = jnp.square(params["value"]["table"][batch["tokens"][:, 0]] - batch["score"])
    return {
        "loss/policy": Sum.of(policy),
        "loss/value": Sum.of(value),
        "reward": Sum.of(batch["score"]),
        "ratio_max": Max(jnp.max(ratio)),
    }


def judge(example, tokens):
    """A user's own reward, on the host: one letter after the other is good. It notes what it was asked."""
    time.sleep(float(os.environ.get("JUDGE_SLEEP", 0)))
    with open(os.environ.get("JUDGED", os.devnull), "a") as file:
        file.write(f"{example} {' '.join(map(str, tokens))}\n")
    return float(np.mean(np.diff(tokens) % LETTERS == 1))


class PolicyStep:
    def __init__(self, parts):
        self.parts, rows = parts, P(batch_axes(parts.mesh))

        def collect(params, step, batch):
            def one(example, letter):
                key = jax.random.fold_in(jax.random.fold_in(jax.random.key(7), step), example)

                def write(token, at):
                    after = jax.random.categorical(jax.random.fold_in(key, at), params["policy"]["table"][token])
                    return after.astype(jnp.int32), after.astype(jnp.int32)

                return jnp.concatenate([letter[None], jax.lax.scan(write, letter, jnp.arange(LENGTH))[1]])

            tokens = jax.vmap(one)(batch["id"], batch["letter"])
            return {"id": batch["id"], "tokens": tokens, "old": logprobs_of(params["policy"], tokens)}

        def advantage(params, reference, rollout, score):
            drift = jnp.sum(rollout["old"] - logprobs_of(reference, rollout["tokens"]), axis=1)
            score = score - 0.01 * drift
            left = score - params["value"]["table"][rollout["tokens"][:, 0]]
            left = (left - jnp.mean(left)) * jax.lax.rsqrt(jnp.var(left) + 1e-8)
            return {**rollout, "score": score, "advantage": left}

        def cut(ready, key):
            order = jax.random.permutation(key, ready["id"].shape[0]).reshape(PARTS, -1)
            return [{name: x[part] for name, x in ready.items()} for part in order]

        self.collect, self.advantage, self.cut = (
            jax.jit(jax.sharding.auto_axes(fn, out_sharding=rows)) for fn in (collect, advantage, cut)
        )

    def __call__(self, state, batch, window=None, turn=None):
        mesh, journal, step = self.parts.mesh, self.parts.journal, int(state.step)
        rollout = jax.block_until_ready(self.collect(state.params, state.step, batch))
        mine, answers = owned(mesh, {"id": rollout["id"], "tokens": rollout["tokens"]}), []
        for example, tokens in zip(mine["id"].tolist(), mine["tokens"].tolist(), strict=True):
            asked = digest_of(tokens)
            if (answer := journal.lookup(Key(step, example), asked)) is MISSING:
                answer = journal.record(Key(step, example), asked, judge(example, tokens))
            answers.append(answer)
        journal.flush()
        score = np.asarray(exchange(mesh, len(batch["id"]), answers), np.float32)
        if turn.poll():
            raise Interrupted
        reference = state.frozen["reference"]
        ready = jax.block_until_ready(self.advantage(state.params, reference, rollout, score))
        for epoch in range(EPOCHS):
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(8), step), epoch)
            for part in jax.block_until_ready(self.cut(ready, key)):
                state, window = self.parts.update(state, part, window)
        turn.updates = EPOCHS * PARTS
        return advanced(state), window

    def programs(self, state, batch):
        rollout = jax.eval_shape(self.collect, state.params, state.step, batch)
        asked = (state.params, state.frozen["reference"], rollout, jax.ShapeDtypeStruct(batch["id"].shape, jnp.float32))
        part = jax.eval_shape(self.cut, jax.eval_shape(self.advantage, *asked), jax.random.key(0))[0]
        (update,) = self.parts.update.programs(state, part)
        collect = Program("collect", self.collect, (state.params, state.step, batch))
        advantage = Program("advantage", self.advantage, asked)
        return [collect, advantage, dataclasses.replace(update, times=EPOCHS * PARTS)]


def ready_batch(size):
    """A batch as the update reads it, of which only shapes and dtypes matter."""
    rows = size // PARTS
    floats = {"old": np.zeros((rows, LENGTH), np.float32)} | dict.fromkeys(("score", "advantage"), np.zeros(rows, "f4"))
    return {"id": np.arange(rows, dtype=np.int32), "tokens": np.zeros((rows, LENGTH + 1), np.int32), **floats}


def build(loaded, given):
    return Task(
        **of_config(loaded.config, loaded.resolved, Model()),
        objective=objective,
        source=Prompts(),
        frozen=("^reference/",),
        reads=(),
        step=PolicyStep,
        update_batch=ready_batch,
    )


FAMILY = Family(config=Config, build=build, load=lambda saved: saved)

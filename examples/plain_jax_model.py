"""A model of one's own in plain JAX: the next item from a decaying mean of what a user had before.

`python examples/plain_jax_model.py [a.b=VALUE ...]` trains it on MovieLens-100K with the full softmax; a minute.
"""

import sys

import jax
import jax.numpy as jnp

import jaxops as jx


class DecayingMean:
    """The state after each item is a mean of the item vectors so far, in which older ones count less."""

    length = 20  # the number of latest items that the model reads
    rules = [("^item$", ("tensor", "fsdp")), ("^decay$", ())]  # how its parameters are divided over a mesh

    def __init__(self, n_items, width):
        self.rows, self.width = n_items + 1, width  # row 0 is padding

    def init(self, key):
        return {"item": 0.02 * jax.random.normal(key, (self.rows, self.width)), "decay": jnp.zeros(())}

    def encode(self, params, batch, key):
        items = batch["items"]  # [batch, length], padded with 0 on the left
        rows = self.item_vectors(params)[items]  # [batch, length, width]
        kept = (items > 0).astype(rows.dtype)[..., None]
        keep = jax.nn.sigmoid(params["decay"] + 2.0)

        def step(carry, now):
            total, weight = (keep * old + new for old, new in zip(carry, now, strict=True))
            return (total, weight), total / jnp.maximum(weight, 1e-6)

        start = (jnp.zeros_like(rows[:, 0]), jnp.zeros_like(kept[:, 0]))
        _, states = jax.lax.scan(step, start, (jnp.swapaxes(rows * kept, 0, 1), jnp.swapaxes(kept, 0, 1)))
        return jnp.swapaxes(states, 0, 1)  # [batch, length, width]: what the next item is predicted from

    def item_vectors(self, params):
        # What is multiplied by is gathered over fsdp where it is used: `constrain` names its dimensions.
        return jx.constrain(params["item"], ("vocab", "embed"))


def build(data, width=64):
    """Builds the model; in YAML `model: {fn: plain_jax_model:build, width: 32}`."""
    return DecayingMean(data.n_items, width)


def main(overrides=()):
    config = jx.load_config("rec/movielens_sasrec", ["run.name=decaying-mean", "run.epochs=20", *overrides])
    run = jx.fit(jx.build_task(config, model=build))
    print(f"test NDCG@10 {run.summary['test/ndcg@10']:.4f}, {run.dir}/report.html sets it beside the baselines")
    return run


if __name__ == "__main__":
    main(sys.argv[1:])

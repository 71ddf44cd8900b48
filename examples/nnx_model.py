"""A model of one's own in flax NNX: a gated recurrent network over what a user had before.

`python examples/nnx_model.py [a.b=VALUE ...]` trains it on MovieLens-100K with the full softmax; some minutes.
NNX defines the layers and is split once. What jaxops sees are nested dicts of arrays and pure functions of them.
"""

import sys

import jax
import jax.numpy as jnp
from flax import nnx

import jaxops as jx


class Layers(nnx.Module):
    def __init__(self, rows, width, rngs):
        self.item = nnx.Embed(rows, width, embedding_init=nnx.initializers.normal(0.02), rngs=rngs)
        self.gates = nnx.Linear(2 * width, 2 * width, rngs=rngs)
        self.new = nnx.Linear(2 * width, width, rngs=rngs)

    def __call__(self, items):  # [batch, length] -> [batch, length, width]
        inputs = self.item(items)

        def step(state, now):
            vector, there = now
            reset, update = jnp.split(nnx.sigmoid(self.gates(jnp.concatenate([vector, state], -1))), 2, -1)
            new = jnp.tanh(self.new(jnp.concatenate([vector, reset * state], -1)))
            state = jnp.where(there, update * state + (1 - update) * new, state)  # padding leaves it as it is
            return state, state

        over_time = (jnp.swapaxes(inputs, 0, 1), (items > 0).T[..., None])
        _, states = jax.lax.scan(step, jnp.zeros_like(inputs[:, 0]), over_time)
        return jnp.swapaxes(states, 0, 1)


class Gru:
    length = 20

    def __init__(self, n_items, width):
        self.make = lambda key: Layers(n_items + 1, width, nnx.Rngs(key))
        self.graph, _ = nnx.split(nnx.eval_shape(lambda: self.make(jax.random.key(0))))

    def init(self, key):
        return nnx.to_pure_dict(nnx.split(self.make(key))[1])

    def encode(self, params, batch, key):
        return nnx.merge(self.graph, params)(batch["items"])

    def item_vectors(self, params):
        return params["item"]["embedding"]


def build(data, width=64):
    """Builds the model; in YAML `model: {fn: nnx_model:build, width: 32}`."""
    return Gru(data.n_items, width)


def main(overrides=()):
    config = jx.load_config("rec/movielens_sasrec", ["run.name=gru", "run.epochs=10", "mesh.data=-1", *overrides])
    run = jx.fit(jx.build_task(config, model=build))
    print(f"test NDCG@10 {run.summary['test/ndcg@10']:.4f} {run.dir}/report.html")
    return run


if __name__ == "__main__":
    main(sys.argv[1:])

"""The pieces of PPO by hand, as one would use them in a notebook: sample, score, advantages, update.

`python examples/ppo_pieces.py` teaches a table of letters to write "jax" again and again; half a minute.
Every piece is a pure function on arrays, so each can be looked at, replaced, or run on another mesh.
"""

import jax
import jax.numpy as jnp
import optax

import jaxops as jx
from jaxops.objectives.policy import aggregated, clipped_surrogate, clipped_value_loss, kl_estimate
from jaxops.rl.advantages import generalised_advantages, rewards_of_tokens, whitened

LETTERS, LENGTH, ROWS, KL = "abjxyz", 6, 64, 0.02


def init(key):
    """A policy and values that know the letter before (the last row stands for the beginning)."""
    n = len(LETTERS)
    return {"policy": jnp.zeros((n + 1, n)), "value": jnp.zeros((n + 1,))}


@jax.jit
def collect(params, key):  # -> tokens and their log-probabilities, [rows, length]
    def step(before, key):
        logits = params["policy"][before]
        token = jax.random.categorical(key, logits)
        logprob = jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], 1)[:, 0]
        return token, (before, token, logprob)

    start = jnp.full((ROWS,), len(LETTERS))
    _, (before, tokens, logprobs) = jax.lax.scan(step, start, jax.random.split(key, LENGTH))
    return before.T, tokens.T, logprobs.T


def score(texts):  # on the host: any Python
    return jnp.array([sum(text[at : at + 3] == "jax" for at in range(LENGTH - 2)) for text in texts], jnp.float32)


@jax.jit
def advantages(params, before, logprobs, scores):
    mask, values = jnp.ones_like(logprobs), params["value"][before]
    kl = kl_estimate(logprobs, jnp.full_like(logprobs, -jnp.log(float(len(LETTERS)))), "k1")  # to uniform letters
    found = generalised_advantages(rewards_of_tokens(scores, mask, kl, KL), values, mask, gamma=1.0, lam=0.95)
    return {"advantages": whitened(found.advantages, mask), "returns": found.returns, "values": values, "mask": mask}


def objective(params, batch, key):
    logprobs = jax.nn.log_softmax(params["policy"])[batch["before"], batch["tokens"]]
    surrogate = clipped_surrogate(logprobs, batch["old"], batch["advantages"], batch["mask"], low=0.2, high=0.2)
    values = params["value"][batch["before"]]
    return {
        "loss/policy": aggregated(surrogate.loss, batch["mask"]),
        "loss/value": aggregated(clipped_value_loss(values, batch["values"], batch["returns"], None), batch["mask"]),
        "clipped": jx.Sum.of(surrogate.clipped, batch["mask"]),
    }


def main(iterations=60):
    mesh, tx = jx.make_mesh(data=1, devices=jax.devices()[:1]), optax.adam(0.05)
    with jax.set_mesh(mesh):
        state = jx.init_state(init, jax.random.key(0), tx, mesh, rules=[("", ())])
        update = jx.build_step(objective, tx, mesh)
        for iteration in range(iterations):
            before, tokens, old = collect(state.params, jax.random.key(iteration))
            texts = ["".join(LETTERS[token] for token in row) for row in tokens.tolist()]
            scores = score(texts)
            learnt = advantages(state.params, before, old, scores)
            batch = {"id": jnp.arange(ROWS), "before": before, "tokens": tokens, "old": old, **learnt}
            for _ in range(4):  # epochs; `state` is given away to each update
                state, _ = update(state, batch)
            if iteration % 10 == 9:
                print(f"{iteration + 1:3d}  score {scores.mean():.2f}  {texts[0]}")
    return float(scores.mean())


if __name__ == "__main__":
    main()

"""The gradients that policy optimisation promises on the enumerable task, and a sampler without noise to hold it to.

Probabilities, values and gradients are computed here from the texts themselves: each beginning of a completion is a
text of its own, whose last state is read. Nothing of rl/ or of models/policy.py takes part. The sampler returns each
completion as often as it is probable, so that a mean over completions is an expectation but for the rounding of counts.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from exact_optimum import ALL, END, PROMPTS, TOKENS, WORDS, Problem

from jaxops.core.state import join
from jaxops.core.turn import Turn
from jaxops.rl.collect import Scored
from jaxops.rl.sampled import Sampled

BEGINNINGS = [body for size in range(TOKENS) for body in itertools.product(range(1, WORDS), repeat=size)]
"""All completions that are not finished."""
STATES = [(prompt, begun) for prompt in range(len(PROMPTS)) for begun in BEGINNINGS]
ROWS = [(prompt, whole) for prompt in range(len(PROMPTS)) for whole in ALL]
INSIDE = np.array([np.arange(TOKENS) < len(whole) for _, whole in ROWS])
STATE = np.array([[STATES.index((p, w[:t])) if t < len(w) else 0 for t in range(TOKENS)] for p, w in ROWS])
WORD = np.array([[w[t] if t < len(w) else 0 for t in range(TOKENS)] for p, w in ROWS])
LENGTHS = INSIDE.sum(axis=1)
OWN = np.array([prompt for prompt, _ in ROWS])
"""Of each row: the tokens it has, the state before each, the word there, how many, and its prompt."""


def last_hidden(decoder, params):
    """Returns the hidden state after the text of each state, [states, dim]."""
    texts = [PROMPTS[prompt] + begun for prompt, begun in STATES]
    tokens, segment = (np.zeros((len(texts), max(map(len, texts))), np.int32) for _ in range(2))
    for row, text in enumerate(texts):
        tokens[row, : len(text)], segment[row, : len(text)] = text, 1
    position = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
    hidden = decoder.hidden(params, jnp.asarray(tokens), jnp.asarray(segment), jnp.asarray(position))
    return hidden[jnp.arange(len(texts)), segment.sum(axis=1) - 1]


def log_policy(decoder, params, temperature):
    """Returns the log-probabilities of all words in each state, [states, words]."""
    logits = last_hidden(decoder, params) @ params["head"]["kernel"]
    return jax.nn.log_softmax(logits[:, :WORDS] / temperature)


def of_rows(table):
    """Picks each row's entries of [states, words], 0 where the row has no token."""
    return jnp.where(INSIDE, table[STATE, WORD], 0.0)


def objective(log_pi, log_ref, rewards, beta):
    """Returns J = E[r] - beta KL(policy || reference), the mean over prompts."""
    mine, other = jnp.sum(of_rows(log_pi), axis=1), jnp.sum(of_rows(log_ref), axis=1)
    return jnp.sum(jnp.exp(mine) * (rewards.reshape(-1) - beta * (mine - other))) / len(PROMPTS)


class Exact:
    """What is exact about a problem with the parameters that it has now.

    Attributes:
      log_pi: log-probabilities of the policy in each state.
      log_ref: those of the reference.
      values: the values of states, where the problem has any.
      logprobs: the policy's of each row's tokens, [rows, longest].
    """

    def __init__(self, problem: Problem):
        self.params = jax.device_get(join(problem.state.params, problem.state.frozen))
        self.problem, self.decoder = problem, problem.model.decoder
        self.beta, self.rewards = problem.algorithm.kl.coef, problem.table.astype(np.float32)
        self._of = jax.jit(lambda params: log_policy(self.decoder, params, problem.temperature))
        self.log_pi, self.log_ref = (np.asarray(self._of(self.params[name])) for name in ("policy", "reference"))
        self.logprobs = np.asarray(of_rows(self.log_pi))
        self.probabilities = np.exp(self.logprobs.sum(axis=1, dtype=np.float64))
        self.kl = self.logprobs - np.asarray(of_rows(self.log_ref))

    def policy_gradient(self):
        """Returns the gradient of J by the policy's parameters."""
        gain = lambda params: objective(self._of(params), self.log_ref, self.rewards, self.beta)
        return jax.grad(gain)(self.params["policy"])

    def weighted_gradient(self, weights):
        """Returns the mean over completions of sum_t weights[row, t] * gradient of the token's log-probability."""
        chances = np.float32(self.probabilities[:, None] * np.where(INSIDE, weights, 0.0) / len(PROMPTS))
        return jax.grad(lambda params: jnp.sum(of_rows(self._of(params)) * chances))(self.params["policy"])

    def values(self, params):
        """Returns the value of each state."""
        hidden = last_hidden(self.decoder, params)
        return (hidden @ params["score"]["kernel"])[:, 0] + params["score"]["bias"][0]

    def followed(self):
        """Returns the rewards from each token on, the KL's among them, [rows, longest]."""
        each = np.where(INSIDE, -self.beta * self.kl, 0.0)
        each[np.arange(len(ROWS)), LENGTHS - 1] += self.rewards.reshape(-1)
        return np.cumsum(each[:, ::-1], axis=1)[:, ::-1]

    def value_gradient(self):
        """Returns the gradient of E[sum_t (V(s_t) - what followed)^2 / 2] by the values' parameters."""
        chances, followed = np.float32(self.probabilities / len(PROMPTS)), np.float32(self.followed())

        def loss(params):
            error = jnp.where(INSIDE, self.values(params)[STATE] - followed, 0.0)
            return jnp.sum(chances[:, None] * jnp.square(error)) / 2

        return jax.jit(jax.grad(loss))(self.params["value"])

    def mean(self, each):
        """Returns the expectation over completions of a number of each row."""
        return float((self.probabilities * each).sum() / len(PROMPTS))

    def token_mean(self, each):
        """Returns the expectation over tokens of a number of each, [rows, longest]."""
        return self.mean(np.where(INSIDE, each, 0.0).sum(axis=1)) / self.mean(LENGTHS)


def grouped(chances, rewards):
    """Returns each row's reward less the mean of its prompt, over the deviation there."""
    chances = chances.reshape(len(PROMPTS), -1)
    mean = (chances * rewards).sum(axis=1, keepdims=True)
    spread = (chances * (rewards - mean) ** 2).sum(axis=1, keepdims=True)
    return ((rewards - mean) / np.sqrt(spread)).reshape(-1)


def counted(chances, count):
    """Returns how often each is taken of `count`, by the largest remainders."""
    wanted = chances / chances.sum() * count
    found = np.floor(wanted).astype(int)
    found[np.argsort(found - wanted)[: count - found.sum()]] += 1
    return found


class Proportional:
    """A sampler that returns each completion as often as it is probable, the same for every call.

    Args:
      exact: the probabilities.
      junk: the share of completions at the end of each prompt that are drawn uniformly; the score drops them.
    """

    def __init__(self, exact: Exact, junk: float = 0.0):
        self.exact, self.junk = exact, junk
        self.options = exact.problem.step.collector.sampler.options

    def handoff(self, params):
        return params

    def __call__(self, params, prompts, *, seed, step, poll):
        count = len(prompts) // len(PROMPTS)
        dropped, rows = int(count * self.junk), []
        rng = np.random.default_rng(0)
        for prompt in range(len(PROMPTS)):
            mine = np.flatnonzero(prompt == OWN)
            rows += np.repeat(mine, counted(self.exact.probabilities[mine], count - dropped)).tolist()
            rows += rng.choice(mine, dropped).tolist()
        assert [prompt.example for prompt in prompts] == OWN[rows].tolist()
        lengths = LENGTHS[rows].astype(np.int32)
        ended = [ROWS[row][1][-1] == END for row in rows]
        return Sampled(
            tokens=WORD[rows].astype(np.int32),
            mask=INSIDE[rows],
            logprobs=self.exact.logprobs[rows],
            plain=np.full((len(rows), TOKENS), -1.0, np.float32),
            lengths=lengths,
            stopped=tuple("eos" if one else "length" for one in ended),
            dropped=np.zeros(len(rows), np.int32),
            texts=None,
            busy=1.0,
        )


@functools.cache
def still(algorithm, layers=0, rows=2048):
    """A problem whose policy is away from its reference and whose updates are plain gradients, with what is exact.

    It is compiled once for a module; `updated` gives back what one step of it changes.
    """
    algorithm = dataclasses.replace(algorithm, epochs=1, minibatches=1)
    problem = Problem(
        algorithm, value="trunk", batch=rows, temperature=0.7, layers=layers, tx=optax.sgd(1.0), clip=None
    )
    rng = np.random.default_rng(5)

    def moved(x):
        apart = rng.normal(0, 0.15, x.shape).astype(np.float32)
        return jax.device_put(np.asarray(x) + apart, x.sharding)

    state = problem.state
    params = {**state.params, "policy": jax.tree.map(moved, state.params["policy"])}
    if "value" in params:
        params["value"] = jax.tree.map(moved, params["value"])
    problem.state = dataclasses.replace(state, params=params)
    problem.first = jax.device_get(problem.state), jax.tree.map(lambda x: x.sharding, problem.state)
    return problem, Exact(problem)


@dataclasses.dataclass
class Update:
    """What is exact before a step, the gradients that it followed by the name of the model, and its metrics."""

    exact: Exact
    gradients: dict
    metrics: dict[str, float]


def updated(algorithm, layers=0, junk=0.0):
    """Returns what one step does, of which the share `junk` of completions is dropped."""
    problem, exact = still(algorithm, layers)
    problem.state = jax.device_put(*problem.first)
    problem.step.collector.sampler = Proportional(exact, junk)
    rows = problem.step.collector.completions // len(PROMPTS)

    def score(completed, journal, poll):
        found = problem.score(completed, journal, poll)
        kept = np.arange(len(found.total)) % rows < rows - int(rows * junk)
        return Scored(np.where(kept, found.total, 100.0), kept, {})

    problem.step.collector.score = score
    turn = Turn(problem.batch, lambda: False, 0, len(PROMPTS))
    with jax.set_mesh(problem.mesh):
        state, sums = problem.step(problem.state, problem.batch(0, 2), None, turn)
    after = jax.device_get(state.params)
    change = jax.tree.map(lambda x, y: np.asarray(x) - np.asarray(y), problem.first[0].params, after)
    return Update(exact, change, {name: float(entry.value()) for name, entry in sums.items()})


def flat(tree):
    """All leaves of a tree in one vector, float64."""
    return np.concatenate([np.ravel(np.asarray(x, np.float64)) for x in jax.tree.leaves(tree)])


def apart(found, expected, factor):
    """The distance of a tree from `factor` times another, as a share of the latter's length."""
    found, expected = flat(found), factor * flat(expected)
    return np.linalg.norm(found - expected) / np.linalg.norm(expected)

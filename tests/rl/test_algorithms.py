"""What algorithms learn from and minimise, against loops in float64; and what a step samples, orders and scales."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact_gradient import ROWS, Exact
from exact_optimum import PROMPTS, Problem

from jaxops.core.sums import merge
from jaxops.core.turn import Turn
from jaxops.objectives.token_logprobs import TokenScores
from jaxops.rl.algorithms import Rollout, importance
from jaxops.rl.collect import Scored
from jaxops.rl.groups import BestOfN
from jaxops.rl.kl import Kl
from jaxops.rl.ppo import Gae, Ppo

ROWS_OF_BATCH, LONGEST = 6, 5


def made_up(seed=0):
    """Completions of all lengths with everything that advantages are made of; what is outside the mask is junk."""
    rng = np.random.default_rng(seed)
    lengths = np.array([5, 1, 3, 5, 2, 4], np.int32)
    mask = (np.arange(LONGEST) < lengths[:, None]).astype(np.float32)
    normal = lambda *shape: rng.normal(0, 1, shape).astype(np.float32)
    return Rollout(
        mask=mask,
        old=normal(ROWS_OF_BATCH, LONGEST),
        reference=normal(ROWS_OF_BATCH, LONGEST),
        values=normal(ROWS_OF_BATCH, LONGEST + 1),
        scores=normal(ROWS_OF_BATCH),
        kept=np.array([1, 1, 0, 1, 1, 1], np.float32),
        ended=np.array([False, True, True, True, False, False]),
        lengths=lengths,
        coefficient=np.float32(0.3),
    )


@pytest.mark.parametrize("cut", ["terminal", "bootstrap"])
def test_what_ppo_learns_from_is_that_of_a_loop_in_float64(cut):
    given, gamma, lam = made_up(), 0.9, 0.6
    algorithm = Ppo(gae=Gae(gamma=gamma, lambda_=lam), whiten="none", kl=Kl(coef=0.3), cut=cut)
    found = jax.jit(lambda x: algorithm.learnt(x))(jax.tree.map(jnp.asarray, given)).batch
    for row, length in enumerate(given.lengths):
        value = [float(given.values[row, t]) for t in range(length + 1)]
        if given.ended[row] or cut == "terminal":
            value[-1] = 0.0
        advantage = 0.0
        for t in reversed(range(length)):
            reward = -0.3 * (float(given.old[row, t]) - float(given.reference[row, t]))
            reward += float(given.scores[row]) if t == length - 1 and given.kept[row] else 0.0
            advantage = reward + gamma * value[t + 1] - value[t] + gamma * lam * advantage
            assert float(found["advantages"][row, t]) == pytest.approx(advantage, abs=1e-5)
            assert float(found["returns"][row, t]) == pytest.approx(advantage + value[t], abs=1e-5)
        assert not np.any(found["advantages"][row, length:])


class Given:
    """A model whose log-probabilities, entropies and values are its parameters."""

    def hidden(self, params, batch):
        return jnp.zeros((ROWS_OF_BATCH, LONGEST, 1))

    def scores(self, params, batch, temperature, hidden):
        zero = jnp.zeros_like(params["logprobs"])
        return TokenScores(params["logprobs"], params["entropy"], zero, zero, zero.astype(jnp.int32))

    def values(self, params, batch, hidden):
        return params["values"]


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_the_objective_far_from_where_it_sampled_is_that_of_a_loop_in_float64(estimator):
    rng, given = np.random.default_rng(1), made_up()
    normal = lambda scale=1.0: rng.normal(0, scale, given.mask.shape).astype(np.float32)
    params = {"logprobs": given.old + normal(0.5), "entropy": normal(), "values": normal()}
    batch = {"mask": given.mask, "old": given.old, "reference": given.reference, "advantages": normal()}
    batch |= {"values": normal(), "returns": normal()}
    batch |= {"policy_on": np.ones(ROWS_OF_BATCH, np.float32), "coefficient": np.full(ROWS_OF_BATCH, 0.3, np.float32)}
    kl = Kl(in_="loss", estimator=estimator, coef=0.3)
    algorithm = Ppo(clip=0.2, clip_high=0.3, entropy=0.1, kl=kl, value_weight=0.5, value_clip=0.4)
    sums = jax.jit(lambda p, b: algorithm.objective(Given(), 1.0, LONGEST)(p, b, None))(params, batch)
    terms = {
        name: []
        for name in ("loss/policy", "loss/kl", "loss/entropy", "loss/value", "entropy", "moved_kl", "clipped", "ratio")
    }
    for at in zip(*np.nonzero(given.mask), strict=True):
        p = {name: float(x[at]) for name, x in (params | {"value": params["values"]}).items()}
        b = {name: float(x[at]) for name, x in batch.items() if x.ndim == 2}
        ratio = np.exp(p["logprobs"] - b["old"])
        gains = ratio * b["advantages"], np.clip(ratio, 0.8, 1.3) * b["advantages"]
        apart = p["logprobs"] - b["reference"]
        near = np.clip(p["value"], b["values"] - 0.4, b["values"] + 0.4)
        terms["loss/policy"].append(-min(gains))
        terms["loss/kl"].append(0.3 * (apart**2 / 2 if estimator == "k2" else np.exp(-apart) - 1 + apart))
        terms["loss/entropy"].append(-0.1 * p["entropy"])
        terms["loss/value"].append(0.5 * 0.5 * max((p["value"] - b["returns"]) ** 2, (near - b["returns"]) ** 2))
        terms["entropy"].append(p["entropy"])
        terms["moved_kl"].append(ratio - 1 - np.log(ratio))
        terms["clipped"].append(gains[1] < gains[0])
        terms["ratio"].append(ratio)
    for name in ("loss/policy", "loss/kl", "loss/entropy", "loss/value", "entropy", "moved_kl"):
        assert float(sums[name].value()) == pytest.approx(np.mean(terms[name]), rel=1e-5), name
    assert float(sums["clip_fraction"].value()) == pytest.approx(np.mean(terms["clipped"])) and any(terms["clipped"])
    assert float(sums["ratio_max"].value()) == pytest.approx(max(terms["ratio"]), rel=1e-5)


def test_while_values_are_trained_alone_nothing_else_is_in_the_loss():
    rng, given = np.random.default_rng(1), made_up()
    normal = lambda: rng.normal(size=given.mask.shape).astype(np.float32)
    params = {"logprobs": given.old + normal(), "entropy": normal(), "values": normal()}
    batch = {"mask": given.mask, "old": given.old, "reference": given.reference, "advantages": normal()}
    batch |= {"values": normal(), "returns": normal(), "coefficient": np.full(ROWS_OF_BATCH, 0.3, np.float32)}
    algorithm = Ppo(entropy=0.1, kl=Kl(in_="loss", coef=0.3), critic_warmup=1)
    objective = jax.jit(algorithm.objective(Given(), 1.0, LONGEST))
    losses = ("loss/policy", "loss/kl", "loss/entropy", "loss/value")
    for on in (0.0, 1.0):
        sums = objective(params, batch | {"policy_on": np.full(ROWS_OF_BATCH, on, np.float32)}, None)
        assert [float(sums[name].value()) != 0 for name in losses] == [bool(on)] * 3 + [True]


def test_the_explained_variance_of_returns_far_from_zero_is_that_of_float64():
    given = made_up()
    mask, values = given.mask > 0, given.values + np.float32(1000)
    kept = np.ones(ROWS_OF_BATCH, np.float32)
    scores = given.scores + np.float32(1000)
    given = dataclasses.replace(given, values=values, scores=scores, kept=kept, reference=None)
    steps = [given, dataclasses.replace(given, scores=given.scores + np.float32(50))]
    learnt = [Ppo(kl=Kl(coef=0.0), whiten="none").learnt(jax.tree.map(jnp.asarray, one)) for one in steps]
    variances = []
    for one in learnt:
        returns = np.asarray(one.batch["returns"], np.float64)[mask]
        variances.append((np.var(returns), np.var(returns - values[:, :-1][mask])))
        told = float(one.sums["explained_variance"].value())
        assert told == pytest.approx(1 - variances[-1][1] / variances[-1][0], rel=1e-4)
    over = merge(*(one.sums for one in learnt))["explained_variance"]
    within = np.mean(variances, axis=0)
    assert float(over.value()) == pytest.approx(1 - within[1] / within[0], rel=1e-4)


def test_equal_returns_have_no_variance_to_explain():
    given = dataclasses.replace(made_up(), scores=np.full(ROWS_OF_BATCH, 0.1, np.float32), kept=np.ones(6, np.float32))
    algorithm = Ppo(kl=Kl(coef=0.0), gae=Gae(lambda_=1.0))
    found = algorithm.learnt(jax.tree.map(jnp.asarray, dataclasses.replace(given, values=0 * given.values)))
    assert np.isnan(float(found.sums["explained_variance"].value()))


@pytest.mark.parametrize("keep", [1, 2])
def test_best_of_n_learns_the_best_of_each_group_as_if_it_were_given(keep):
    rng = np.random.default_rng(4)
    scores = np.array([3.0, 1.0, 5.0, 2.0, 2.0, 2.0, 0.0, 4.0, 4.0, -1.0, -2.0, -3.0], np.float32)
    kept = np.array([1, 1, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1], np.float32)  # the best of the first group was dropped
    best = {1: [[0], [], [7], [9]], 2: [[0, 1], [], [7, 8], [9, 10]]}[keep]
    mask = (np.arange(LONGEST) < rng.integers(1, LONGEST + 1, 12)[:, None]).astype(np.float32)
    given = Rollout(mask * kept[:, None], None, None, None, scores, kept, None, None, np.float32(0))
    algorithm = BestOfN(group=3, keep=keep)
    found = jax.jit(lambda x: algorithm.learnt(x))(jax.tree.map(jnp.asarray, given))
    chosen = sorted(row for group in best for row in group)
    assert sorted(np.flatnonzero(found.batch["advantages"].any(axis=1))) == chosen
    assert found.sums["flat_groups"].value() == pytest.approx(1 / 4)
    assert found.sums["reward_best"].value() == pytest.approx(scores[chosen].mean())

    logprobs = rng.normal(-1, 1, mask.shape).astype(np.float32)
    batch = {name: jnp.asarray(x) for name, x in {"mask": given.mask, **found.batch, "old": logprobs}.items()}
    batch["policy_on"] = jnp.ones(12)
    right = -logprobs[chosen].astype(np.float64)[mask[chosen] > 0]
    model = Given()
    model.hidden = lambda params, batch: jnp.zeros((12, LONGEST, 1))
    loss = algorithm.objective(model, 1.0, LONGEST)
    zero = jnp.zeros_like(logprobs)
    measure = lambda logprobs: loss({"logprobs": logprobs, "entropy": zero}, batch, None)["loss/policy"]
    assert measure(jnp.asarray(logprobs)).value() == pytest.approx(right.mean(), rel=1e-6)
    slope = jax.grad(lambda x: measure(x).total / measure(x).count)(jnp.asarray(logprobs))
    expected = np.zeros(mask.shape)
    expected[chosen] = -mask[chosen] / mask[chosen].sum()
    np.testing.assert_allclose(slope, expected, atol=1e-7)


def test_weights_for_the_difference_of_sampling_and_training():
    old, sampled = jnp.asarray([[-1.0, -1.0, -1.0, -1.0]]), jnp.asarray([[-1.0, -2.0, -0.5, -3.0]])
    ratio = np.exp(np.array([[0.0, 1.0, -0.5, 2.0]]))
    of = lambda **options: np.asarray(importance(Ppo(**options), old, sampled))
    np.testing.assert_array_equal(of(), np.ones((1, 4)))
    np.testing.assert_allclose(of(correction="truncated", correction_cap=3.0), np.minimum(ratio, 3), rtol=1e-6)
    masked = of(correction="masked", correction_cap=2.0)
    np.testing.assert_allclose(masked, [[1, 0, ratio[0, 2], 0]], rtol=1e-6)


@functools.cache
def quick():
    """A problem of a table of logits, with a state to begin from again."""
    algorithm = Ppo(epochs=1, minibatches=4, kl=Kl(coef=0.5), critic_warmup=1, score_scale="running", score_clip=1.0)
    problem = Problem(algorithm, value="trunk", batch=512, temperature=0.7, layers=0)
    problem.first = jax.device_get(problem.state), jax.tree.map(lambda x: x.sharding, problem.state)
    return problem, Exact(problem)


def stepped(problem, state):
    turn = Turn(problem.batch, lambda: False, 0, len(PROMPTS))
    with jax.set_mesh(problem.mesh):
        return problem.step(state, problem.batch(0, 2), None, turn)


def test_what_a_step_samples_has_the_exact_probabilities_and_is_fresh_each_step():
    """The same noise in each step would count every completion six times, and chi-square would be six times larger."""
    problem, exact = quick()
    steps, counts = 6, np.zeros(len(ROWS))
    for step in range(steps):
        state = dataclasses.replace(jax.device_put(*problem.first), step=jnp.int32(step))
        turn, collector = Turn(problem.batch, lambda: False, 0, 2), problem.step.collector
        with jax.set_mesh(problem.mesh):
            given = (exact.params, problem.batch(0, 2), int(state.step), turn, None, problem.algorithm)
            rollout = collector.collect(*given).rollout
        for row, prompt in enumerate(rollout["id"]):
            count = rollout["end"][row] - rollout["length"][row]
            which = ROWS.index((prompt, tuple(rollout["completion"][row, :count].tolist())))
            counts[which] += 1
            np.testing.assert_allclose(rollout["sampled"][row], exact.logprobs[which], atol=1e-5)
    expected = exact.probabilities * counts.sum() / len(PROMPTS)
    chi = ((counts - expected) ** 2 / expected).sum()
    freedom = len(ROWS) - len(PROMPTS)
    assert abs(chi - freedom) < 4.5 * np.sqrt(2 * freedom)


def test_first_steps_may_train_the_values_alone():
    problem, _ = quick()
    begun = problem.first[0].params
    problem.step.collector.score = problem.score
    moved = lambda state, name: any(
        np.any(np.asarray(x) != y)
        for x, y in zip(jax.tree.leaves(state.params[name]), jax.tree.leaves(begun[name]), strict=True)
    )
    state, _ = stepped(problem, jax.device_put(*problem.first))
    assert moved(state, "value") and not moved(state, "policy")
    state, _ = stepped(problem, state)
    assert moved(state, "policy")


def test_running_scores_and_their_bounds():
    """Scores of 100 and more, with a deviation of 1, become numbers around 0, and only then are bounded by 1."""
    problem, _ = quick()
    seen = []

    def score(completed, journal, poll):
        found = problem.score(completed, journal, poll)
        seen.append(100 + found.total)
        return Scored(100 + found.total, found.kept, {})

    problem.step.collector.score = score
    collected = []
    collect = problem.step.collector.collect
    problem.step.collector.collect = lambda *given: collected.append(collect(*given)) or collected[-1]
    _, sums = stepped(problem, jax.device_put(*problem.first))
    del problem.step.collector.collect
    rollout = collected[0].rollout
    count = rollout["end"] - rollout["length"]
    scaled = np.clip((seen[0] - seen[0].mean()) / seen[0].std(ddof=1), -1, 1)
    # No KL yet and no value: a token's return is what is left of the score at its distance from the end.
    expected = (scaled * (1 - 0.95**count) / 0.05).sum() / count.sum()
    assert float(sums["return"].value()) == pytest.approx(expected, abs=1e-4)
    assert float(sums["reward"].value()) == pytest.approx(seen[0].mean(), rel=1e-5)


def test_every_epoch_goes_through_all_completions_in_an_order_of_its_own():
    problem, _ = quick()
    size = 64
    ready = {"id": jnp.arange(size)}
    orders = []
    for step in range(2):
        for epoch in range(2):
            parts = problem.step._minibatches(ready, jnp.int32(step), jnp.int32(epoch))
            assert [len(part["id"]) for part in parts] == [size // 4] * 4
            orders.append(np.concatenate([part["id"] for part in parts]).tolist())
            assert sorted(orders[-1]) == list(range(size))
    assert len(set(map(tuple, orders))) == 4

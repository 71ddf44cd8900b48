"""The step of policy optimisation: what it learns from, that it can be interrupted, and that no mesh changes it."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from exact_optimum import PROMPTS, WIDTH, Problem

from jaxops.core.interrupt import Interrupted
from jaxops.core.mesh import make_mesh
from jaxops.core.sharding import named_leaves
from jaxops.core.sums import merge
from jaxops.core.turn import Turn
from jaxops.rl.collect import Scored
from jaxops.rl.groups import Grpo
from jaxops.rl.kl import Kl
from jaxops.rl.ppo import Ppo

SLOW = pytest.mark.slow
CUBE = {"data": 2, "fsdp": 2, "tensor": 2}
PPO = Ppo(epochs=2, minibatches=2, kl=Kl(coef=0.1), value_weight=0.5)


@functools.cache
def built(algorithm, value="head", axes=(), layers=1):
    """A problem whose programs are compiled once for this module; `fresh` gives it a state of its own."""
    mesh = make_mesh(**dict(axes)) if axes else None
    problem = Problem(algorithm, value=value, batch=16, layers=layers, mesh=mesh)
    problem.first = jax.device_get(problem.state), jax.tree.map(lambda x: x.sharding, problem.state)
    return problem


def fresh(algorithm, value="head", axes=(), layers=1):
    problem = built(algorithm, value, axes, layers)
    problem.state = jax.device_put(*problem.first)
    problem.step.collector.score = problem.score
    vars(problem.step.collector).pop("collect", None)
    vars(problem).pop("batch", None)
    return problem


def one_step(problem, poll=lambda: False, window=None):
    turn = Turn(problem.batch, poll, 0, len(PROMPTS))
    with jax.set_mesh(problem.mesh):
        problem.state, sums = problem.step(problem.state, problem.batch(0, 2), window, turn)
    return sums, turn


@pytest.mark.parametrize(
    "algorithm",
    [
        PPO,
        Grpo(),
        pytest.param(Grpo(kind="dr_grpo"), marks=SLOW),
        pytest.param(Grpo(kind="rloo"), marks=SLOW),
        Grpo(kind="dapo", redraws=2),
    ],
    ids=lambda a: a.kind,
)
def test_a_step_learns_reports_and_advances(algorithm):
    problem = fresh(algorithm)
    before = {path: np.asarray(x) for path, x in named_leaves(problem.state.params)}
    sums, turn = one_step(problem)
    assert turn.updates == algorithm.epochs * algorithm.minibatches == int(problem.state.updates)
    assert int(problem.state.step) == 1
    assert float(sums["ratio0"].value()) < 1e-5
    after = dict(named_leaves(problem.state.params))
    moved = [path for path, x in before.items() if np.abs(np.asarray(after[path]) - x).max() > 0]
    assert len(moved) > len(before) // 2
    more, _ = one_step(problem, window=sums)
    assert float(more["length"].count) == 2 * float(sums["length"].count)


def test_a_window_and_the_sums_of_a_step_are_added_once():
    """So a run that goes on from the middle of a window adds the same numbers in the same order."""
    problem = fresh(PPO)
    (first, _), (second, _) = one_step(problem), one_step(problem)
    problem = fresh(PPO)
    both, _ = one_step(problem, window=one_step(problem)[0])
    for (path, x), (_, y) in zip(named_leaves(merge(first, second)), named_leaves(both), strict=True):
        np.testing.assert_array_equal(x, y, err_msg=path)


def test_before_the_first_update_the_policy_is_the_one_that_sampled():
    problem = fresh(dataclasses.replace(PPO, epochs=1, minibatches=1), "trunk")
    sums, _ = one_step(problem)
    assert float(sums["ratio_max"].value()) == pytest.approx(1, abs=1e-6)
    assert float(sums["moved_kl"].value()) == pytest.approx(0, abs=1e-7)
    assert float(sums["clip_fraction"].value()) == 0
    assert float(sums["kl"].value()) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("at", [0, 1, 2])
def test_interrupted_before_its_first_update_a_step_has_not_been(at):
    problem, calls = fresh(PPO, layers=0), iter(range(100))
    state = problem.state
    with pytest.raises(Interrupted):
        one_step(problem, poll=lambda: next(calls) >= at)
    assert problem.state is state and not any(x.is_deleted() for x in jax.tree.leaves(state))
    one_step(problem)
    disturbed = named_leaves(problem.state.params)
    undisturbed = fresh(PPO, layers=0)
    one_step(undisturbed)
    for (path, x), (_, y) in zip(disturbed, named_leaves(undisturbed.state.params), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y), err_msg=path)


@pytest.mark.parametrize(
    "axes", [pytest.param({"data": 8}, marks=SLOW), pytest.param({"fsdp": 8}, marks=SLOW), CUBE], ids=str
)
def test_from_recorded_rollouts_every_mesh_makes_the_same_updates(axes):
    alone = fresh(PPO, "trunk")
    recorded = []
    collect = alone.step.collector.collect

    def record(*given):
        recorded.append(collect(*given))
        return recorded[-1]

    alone.step.collector.collect = record
    for _ in range(2):
        one_step(alone)
    spread = fresh(PPO, "trunk", tuple(axes.items()))
    replayed = iter(recorded)
    spread.step.collector.collect = lambda *given: next(replayed)
    for _ in range(2):
        one_step(spread)
    for (path, x), (_, y) in zip(named_leaves(alone.state.params), named_leaves(spread.state.params), strict=True):
        np.testing.assert_allclose(np.asarray(x), np.asarray(y), atol=1e-5, err_msg=path)


def test_a_prompt_that_comes_twice_in_a_batch_gets_completions_of_its_own():
    problem = fresh(dataclasses.replace(PPO, minibatches=1), layers=0)
    once = problem.batch(0, 2)
    problem.batch = lambda cursor, size: {name: x[[0, 0]] for name, x in once.items()}
    collected = []
    collect = problem.step.collector.collect
    problem.step.collector.collect = lambda *given: collected.append(collect(*given)) or collected[-1]
    one_step(problem)
    first, second = np.split(collected[0].rollout["completion"], 2)
    assert not np.array_equal(first, second)


def test_a_dropped_completion_changes_nothing():
    """Its tokens are in no mean: the update is that of the others alone."""
    states = []
    for junk in (0.0, 100.0):
        problem = fresh(dataclasses.replace(PPO, minibatches=1))

        def score(completed, journal, poll, problem=problem, junk=junk):
            found = problem.score(completed, journal, poll)
            kept = np.arange(len(found.total)) % 4 != 0
            return Scored(np.where(kept, found.total, junk), kept, {})

        problem.step.collector.score = score
        sums, _ = one_step(problem)
        assert float(sums["dropped"].value()) == 0.25
        states.append(problem.state.params)
    for (path, x), (_, y) in zip(*map(named_leaves, states), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y), err_msg=path)


def test_updates_end_where_the_policy_has_moved_far_enough():
    far = fresh(dataclasses.replace(PPO, target_kl=1e-9))
    _, turn = one_step(far)
    assert 1 < turn.updates < 4 and int(far.state.updates) == turn.updates  # the first has not moved yet
    near = fresh(dataclasses.replace(PPO, target_kl=10.0))
    assert one_step(near)[1].updates == 4


def test_an_adapted_coefficient_follows_the_kl():
    problem = fresh(dataclasses.replace(PPO, kl=Kl(coef=0.1, target=1e-3, horizon=100)))
    seen = []
    for _ in range(3):
        sums, _ = one_step(problem)
        seen.append((float(sums["kl_coefficient"].value()), float(sums["kl"].value())))
    expected = 0.1
    for coefficient, kl in seen:
        assert coefficient == pytest.approx(expected, rel=1e-5)
        expected *= 1 + np.clip(kl / 1e-3 - 1, -0.2, 0.2) * 16 / 100


def test_running_scores_have_the_deviation_of_all_scores_so_far():
    problem = fresh(dataclasses.replace(PPO, score_scale="running"))
    scores = []
    score = problem.score
    problem.step.collector.score = lambda *given: scores.append(score(*given)) or scores[-1]
    for _ in range(3):
        one_step(problem)
    every = np.concatenate([one.total for one in scores]).astype(np.float64)
    held = jax.device_get(problem.state.extra["scores"])
    assert held["count"] == len(every)
    np.testing.assert_allclose(held["mean"], every.mean(), rtol=1e-5)
    np.testing.assert_allclose(held["squares"] / (len(every) - 1), every.var(ddof=1), rtol=1e-5)


def test_groups_with_one_score_give_their_place_to_other_prompts():
    problem = fresh(Grpo(kind="dapo", redraws=2))
    asked = []

    def score(completed, journal, poll):
        asked.append([prompt.name for prompt in completed.prompts])
        redraw = completed.prompts[0].redraw
        total = np.arange(16) % 2 if redraw == 1 else np.zeros(16)
        return Scored(total.astype(np.float32), np.ones(16, bool), {})

    problem.step.collector.score = score
    sums, turn = one_step(problem)
    assert [names[0][2] for names in asked] == [0, 1]
    assert turn.examples == 2 * len(PROMPTS)
    assert float(sums["flat_groups"].value()) == 0
    assert len({name for names in asked for name in names}) == 32


def test_all_pieces_of_a_step_are_named_for_flops_and_warm_up():
    problem = fresh(PPO, "trunk")
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), problem.state)
    with jax.set_mesh(problem.mesh):
        programs = problem.step.programs(abstract, problem.batch(0, 2))
        names = [program.name for program in programs]
        for program in programs:
            program.fn.lower(*program.args)
    assert names == [
        "sample_fill",
        "sample_decode",
        "policy_prepare",
        "policy_advantages",
        "policy_cut",
        "train_step",
    ]
    assert programs[-1].times == 4
    assert problem.step.collector.width == WIDTH

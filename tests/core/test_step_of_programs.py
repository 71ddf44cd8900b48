"""A step of several programs with host work between them, whose inner update is `build_step`'s own.

It has the shape of PPO and nothing of it: `collect` proposes with the present parameters, the host scores what it
proposed, `targets` makes a batch of that, and some updates follow. How many is for the host to say.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from toys import RULES, host, init, mesh_of, predict, regression, rows

from jaxops.core.failures import RunFailed, UserError
from jaxops.core.flops import count_flops
from jaxops.core.fresh_state import init_state
from jaxops.core.interrupt import Interrupted
from jaxops.core.loop import check_finite, every, run_loop
from jaxops.core.mesh import batch_axes, batch_sharding, serialise_dispatch
from jaxops.core.optimizer import AdamW, LinearDecay, build_optimizer
from jaxops.core.recovery import GoBack
from jaxops.core.sharding import named_leaves
from jaxops.core.state import State
from jaxops.core.step import Extra, Program, build_step
from jaxops.core.sums import Sum, merge
from jaxops.core.turn import advanced

SIZE, STEPS = 16, 6
LAYOUTS = [{"data": 1}, {"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}]
ADAMW = build_optimizer(AdamW(lr=0.02, eps=1e-3, schedule=LinearDecay()), STEPS)
COEF = Extra(lambda params: {"coef": jnp.float32(0.5)})


def start(key):
    """A model that is trained, and what it was at first, which only `targets` reads."""
    return {"policy": init(key), "reference": init(key)}


def objective(params, batch, key):
    assert "reference" not in params  # build_step(reads=())
    noise = jax.random.uniform(key, ())
    return regression(params["policy"], batch, key) | {"noise": Sum.of(noise)}


@functools.cache
def pieces(mesh, tx, advance_step):
    """The jitted programs of a step, compiled once for all tests."""
    train = build_step(
        objective, tx, mesh, rules=RULES, reads=(), advance_step=advance_step, extras={"kl": COEF}, clip=1.0
    )
    auto = functools.partial(jax.sharding.auto_axes, out_sharding=P(batch_axes(mesh)))

    def collect(params, step, batch):
        def inner(params, step, batch):
            key = jax.random.fold_in(jax.random.key(7), step)
            keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(batch["id"])
            return predict(params["policy"], batch["x"]) + jax.vmap(lambda k: jax.random.normal(k, (8,)))(keys)

        return auto(inner)(params, step, batch)

    def targets(frozen, coef, batch, proposed, scores):
        def inner(frozen, coef, batch, proposed, scores):
            return batch | {"y": coef * predict(frozen["reference"], batch["x"]) + proposed * scores[:, None]}

        return auto(inner)(frozen, coef, batch, proposed, scores)

    lies = batch_sharding(mesh)
    return (
        train,
        jax.jit(collect, in_shardings=(None, None, lies)),
        jax.jit(targets, in_shardings=(None, None, lies, lies, lies)),
        jax.jit(lambda coef, mean: jnp.clip(coef * (1 + 0.1 * mean), 0.1, 1.0)),
        jax.jit(merge),
    )


class Proposing:
    """collect -> score on the host -> targets -> updates.

    `drawing` says how many examples more a step draws, `updating` how many updates it makes; both by the step.
    """

    def __init__(self, mesh, tx, *, drawing=lambda n: 0, updating=lambda n: 3, poison=(), advance_step=False):
        self.mesh, self.drawing, self.updating, self.poison = mesh, drawing, updating, poison
        self.calls = 0
        self.train, self.collect, self.targets, self.adapt, self.merge = pieces(mesh, tx, advance_step)

    def settled(self, tree):
        return jax.block_until_ready(tree) if serialise_dispatch(self.mesh) else tree

    def __call__(self, state, batch, window=None, turn=None):
        self.calls += 1
        if turn.poll():
            raise Interrupted
        now = int(state.step)  # before the first update takes it
        parts = [batch, turn.draw(self.drawing(now))] if self.drawing(now) else [batch]
        batch = {name: np.concatenate([part[name] for part in parts]) for name in batch}
        proposed = self.settled(self.collect(state.params, state.step, batch))
        scores = np.tanh(np.asarray(proposed).mean(axis=1)).astype(np.float32)  # a reward on the host
        if turn.poll():
            raise Interrupted
        if now in self.poison:
            scores = np.where(np.arange(len(scores)) == 0, np.float32("nan"), scores)
        coef = state.extra["kl"]["coef"]
        ready = self.settled(self.targets(state.frozen, coef, batch, proposed, scores))
        new = self.settled(self.adapt(coef, np.float32(np.nanmean(scores))))
        stats = {"score": Sum(np.float32(np.nansum(scores)), np.float32(len(scores)))}
        inner = None
        for at in range(self.updating(now)):
            part = {name: x[at % 2 :: 2] for name, x in host(ready).items()}
            state, inner = self.train(state, part, inner)
        if inner is None:
            inner = self.train.empty_window(state, {name: x[::2] for name, x in host(ready).items()})
        turn.updates = self.updating(now)
        state = dataclasses.replace(state, extra=state.extra | {"kl": {"coef": new}})
        sums = inner | stats
        return advanced(state), sums if window is None else self.settled(self.merge(window, sums))

    def programs(self, state, batch):
        proposed = jax.eval_shape(self.collect, state.params, state.step, batch)
        scores = jax.ShapeDtypeStruct(proposed.shape[:1], jnp.float32)
        args = (state.frozen, state.extra["kl"]["coef"], batch, proposed, scores)
        ready = jax.eval_shape(self.targets, *args)
        half = {name: jax.ShapeDtypeStruct((x.shape[0] // 2, *x.shape[1:]), x.dtype) for name, x in ready.items()}
        return [
            Program("collect", self.collect, (state.params, state.step, batch)),
            Program("targets", self.targets, args),
            *(dataclasses.replace(program, times=3) for program in self.train.programs(state, half)),
        ]


def batches(cursor, size):
    """Examples by their place in the stream, whatever the sizes of batches."""
    parts = [rows(n, 1) for n in range(cursor, cursor + size)]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


class Trial:
    """One run of the step through the loop on a mesh."""

    def __init__(self, layout=None, tx=None, **options):
        self.mesh = mesh_of(**(layout or {"data": 1}))
        self.tx = tx or ADAMW
        self.windows, self.at = [], []
        with jax.set_mesh(self.mesh):
            self.step = Proposing(self.mesh, self.tx, **options)

    def fresh(self):
        with jax.set_mesh(self.mesh):
            return init_state(
                start, jax.random.key(0), self.tx, self.mesh, RULES, frozen=("^reference/",), extras={"kl": COEF}
            )

    def run(self, state=None, at=0, cursor=0, steps=STEPS, policy="raise", poll=lambda: False, window=2, **options):
        def on_window(closed):
            values = closed.values({})
            check_finite(values, closed, policy)
            self.windows.append((closed, values))
            return values

        with jax.set_mesh(self.mesh):
            return run_loop(
                self.step,
                self.fresh() if state is None else state,
                batches,
                self.mesh,
                start=at,
                cursor=cursor,
                steps=steps,
                batch_size=SIZE,
                window=window,
                hooks=[every(1, lambda s: self.at.append((s.step, s.cursor)))],
                on_window=on_window,
                poll=poll,
                **options,
            )


DRAWS = {"drawing": lambda n: (0, 16)[n % 2], "updating": lambda n: (3, 1, 2)[n % 3]}


def agree(a: State, b: State, tolerance: float) -> None:
    for (path, x), (_, y) in zip(named_leaves(host(a)), named_leaves(host(b)), strict=True):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance, err_msg=path)


@pytest.mark.parametrize("layout", LAYOUTS[1:], ids=str)
def test_on_eight_devices_as_on_one(layout):
    one, eight = Trial(**DRAWS), Trial(layout, **DRAWS)
    a, b = one.run(), eight.run()
    agree(a.state, b.state, 1e-5)
    assert (a.step, a.cursor, a.reason) == (b.step, b.cursor, b.reason) == (6, 6 * SIZE + 3 * 16, "finished")
    for (w, x), (v, y) in zip(one.windows, eight.windows, strict=True):
        assert (w.cursors, w.updates) == (v.cursors, v.updates)
        assert all(x[name] == pytest.approx(y[name], rel=1e-4) for name in ("loss", "score", "grad_norm", "noise"))


def test_what_is_counted():
    """`step` counts calls and `updates` updates; draws move the cursor; the schedule follows `step`."""
    trial = Trial(**DRAWS)
    ended = trial.run()
    assert (int(ended.state.step), int(ended.state.updates)) == (6, 12)
    assert trial.at == [(1, 16), (2, 48), (3, 64), (4, 96), (5, 112), (6, 144)]
    assert [w.updates for w, _ in trial.windows] == [4, 5, 3]
    assert [float(w.sums["nonfinite"].count) for w, _ in trial.windows] == [4, 5, 3]
    assert trial.windows[0][1]["updates"] == 2.0
    counts = [x for path, x in named_leaves(ended.state.opt_state) if path.endswith("count")]
    assert sorted(int(x) for x in counts) == [6, 12]  # the schedule's and Adam's
    assert float(ended.state.extra["kl"]["coef"]) != 0.5


def test_every_update_of_a_step_has_its_rate():
    """The optimizer is given the loop's step, the same for all updates of one."""
    rates = []

    def spy(updates, state, params=None, *, step, **extra):
        jax.debug.callback(lambda n: rates.append(int(n)), step)
        return updates, state

    tx = optax.chain(optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), spy), optax.sgd(0.01))
    Trial(tx=tx).run(steps=3)
    jax.effects_barrier()
    assert rates == [0, 0, 0, 1, 1, 1, 2, 2, 2]


@pytest.mark.parametrize("layout", LAYOUTS[:2], ids=str)
def test_a_run_that_is_stopped_goes_on_bitwise(layout):
    whole, parts = Trial(layout, **DRAWS), Trial(layout, **DRAWS)
    expected = whole.run()
    ended = parts.run(poll=lambda: parts.step.calls >= 4)
    assert (ended.step, ended.reason) == (3, "interrupted")  # the fourth call had polled, and gave up
    saved = jax.tree.map(lambda x: jax.device_put(np.array(x), x.sharding), ended.state)
    resumed = parts.run(saved, ended.step, ended.cursor)
    agree(resumed.state, expected.state, 0)
    assert (resumed.step, resumed.cursor) == (expected.step, expected.cursor)
    assert parts.at == whole.at


@pytest.mark.parametrize("layout", LAYOUTS[:2], ids=str)
@pytest.mark.parametrize("after", range(1, STEPS))
def test_a_window_that_is_stopped_in_the_middle_goes_on_bitwise(layout, after):
    """A step of three updates: the sums of the window that the stop cuts are those of a run that never stopped."""
    whole, parts = Trial(layout, updating=lambda n: 3), Trial(layout, updating=lambda n: 3)
    whole.run(window=STEPS)
    ended = parts.run(window=STEPS, poll=lambda: len(parts.at) >= after, on_open=lambda window: None)
    assert (ended.step, ended.reason, parts.windows) == (after, "interrupted", [])
    parts.run(ended.state, ended.step, ended.cursor, window=STEPS, begun=ended.window)
    (expected, _), (found, _) = *whole.windows, *parts.windows
    assert (found.first, found.last, found.updates) == (0, STEPS, 3 * STEPS)
    for (path, x), (_, y) in zip(named_leaves(host(expected.sums)), named_leaves(host(found.sums)), strict=True):
        np.testing.assert_array_equal(x, y, err_msg=path)


def test_an_early_stop_leaves_updates_out():
    """A step of no updates moves the step, the cursor and the schedule, and neither parameters nor Adam."""
    trial = Trial(updating=lambda n: 2 * (n != 2))
    two = trial.run(steps=2)
    before = host(two.state)
    third = trial.run(two.state, 2, two.cursor, steps=3)
    assert (int(third.state.step), int(third.state.updates), third.cursor) == (3, 4, 3 * SIZE)
    for part in ("params", "opt_state"):
        agree(getattr(third.state, part), getattr(before, part), 0)
    trial.run(third.state, 3, third.cursor, steps=4)
    assert [w.updates for w, _ in trial.windows] == [4, 0, 2] and "score" in trial.windows[1][1]


def test_a_bad_update_among_good_ones_is_never_lost():
    """One of three updates of one step of a window: by `raise`, by `skip`, and by `rollback` past that step alone."""
    bad = {"poison": (3,), "updating": lambda n: 3}
    with pytest.raises(RunFailed, match=r"not finite at step 4 \(2 of 12 updates in steps 1 to 4\)"):
        Trial(**bad).run(window=4)
    skips = Trial(**bad)
    ended = skips.run(window=4, policy="skip")
    assert [values["skipped"] for _, values in skips.windows] == [2, 0]
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(ended.state.params))
    with pytest.raises(GoBack) as caught:
        Trial(**bad, drawing=DRAWS["drawing"]).run(window=6, policy="rollback")
    assert (caught.value.first, caught.value.last, caught.value.cursor) == (4, 4, 96)


def test_an_inner_update_that_takes_the_loops_step_is_refused():
    with pytest.raises(UserError, match=r"moved state.step by 4: .*advance_step=False"):
        Trial(advance_step=True).run()


@pytest.mark.parametrize("layout", LAYOUTS[:2], ids=str)
def test_programs_say_what_a_step_costs(layout):
    """By hand: forward to propose and for the reference, and three times forward and backward on half a batch."""
    trial = Trial(layout)
    with jax.set_mesh(trial.mesh):
        programs = trial.step.programs(trial.fresh(), batches(0, SIZE))
        flops = sum(program.times * count_flops(program.fn, *program.args).total for program in programs)
    forward = 2 * SIZE * 2 * 8 * 16
    # backward: both kernels, and the activations between them
    assert flops == 2 * forward + 3 * (forward + forward + forward // 2) // 2
    assert not named_leaves(programs[-1].args[0].frozen)

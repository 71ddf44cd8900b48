"""The loop: who is called when, what a window holds, and how a run ends."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toys import host, mesh_of, rows, trainer

from jaxops.core import flight, loop
from jaxops.core.failures import RunFailed, UserError
from jaxops.core.interrupt import Interrupted
from jaxops.core.loop import Window, check_finite, every, run_loop
from jaxops.core.memory import explained, out_of_memory
from jaxops.core.recovery import GoBack
from jaxops.core.state import State
from jaxops.core.sums import Max, Sum, finalize, merge
from jaxops.core.turn import Turn

NO_STATE = State(
    {"w": np.ones((4, 8), np.float32)}, {}, {}, {"mu": np.ones((4, 8), np.float32)}, {}, np.int32(0), np.int32(0)
)


NO_STATE_ON_DEVICE = jax.tree.map(jnp.asarray, NO_STATE)


def one_step(value, targets=2.0):
    return {"loss/a": Sum(np.float32(value), np.float32(targets)), "top": Max(np.float32(value))}


def stepped(state):
    return dataclasses.replace(state, step=state.step + np.int32(1))


class Stub:
    """A step that only notes what it was called with."""

    def __init__(self, log, fail_at=None, error=None):
        self.log, self.fail_at, self.error = log, fail_at, error

    def __call__(self, state, batch, window=None, turn=None):
        if batch == self.fail_at:
            raise self.error
        self.log.append(("step", batch))
        sums = one_step(batch)
        return stepped(state), sums if window is None else jax.device_get(merge(window, sums))

    def programs(self, state, batch):
        return []


def run(steps, start=0, *, log, window=5, size=10, **options):
    """Runs a stub over batches numbered from start + 1; every window delivered is in the log."""

    def on_window(closed):
        log.append(("window", closed.first, closed.last))
        return {"last": closed.last}

    step = options.pop("step", None) or Stub(log)
    first = options.pop("cursor", 1000)
    return run_loop(
        step,
        NO_STATE,
        options.pop("batches", lambda cursor, n: (cursor - first) // n + start + 1),
        mesh_of(data=1),
        start=start,
        cursor=first,
        steps=steps,
        batch_size=size,
        window=window,
        on_window=options.pop("on_window", on_window),
        **options,
    )


def of(log, kind):
    return [entry[1:] for entry in log if entry[0] == kind]


def noting(log, name):
    return lambda snapshot: log.append((name, snapshot.step, snapshot.cursor))


def test_every_batch_is_used_once_and_the_end_is_told():
    log = []
    ended = run(12, log=log)
    assert [n for (n,) in of(log, "step")] == list(range(1, 13))
    assert (ended.step, ended.cursor, ended.reason) == (12, 1120, "finished")
    assert of(log, "window") == [(0, 5), (5, 10), (10, 12)]


def test_a_resumed_run_keeps_the_steps_of_hooks_and_windows():
    log = []
    ended = run(12, start=3, log=log, hooks=[every(4, noting(log, "four")), every(6, noting(log, "six"))])
    assert [n for (n,) in of(log, "step")] == list(range(4, 13))
    assert [(step, cursor) for step, cursor in of(log, "four")] == [(4, 1010), (8, 1050), (12, 1090)]
    assert [step for step, _ in of(log, "six")] == [6, 12]
    assert of(log, "window") == [(3, 5), (5, 10), (10, 12)]
    assert ended.cursor == 1090


@pytest.mark.latest
def test_a_window_is_fetched_one_boundary_late_and_all_are_delivered():
    """The device may run behind the host by a whole window, and nothing is waited for."""
    log = []
    run(17, log=log, hooks=[every(5, noting(log, "hook"))])
    order = [entry if entry[0] != "step" else entry[1] for entry in log]
    assert order[:5] == [1, 2, 3, 4, 5]
    assert order.index(("window", 0, 5)) > order.index(10) and order.index(("window", 0, 5)) < order.index(11)
    assert of(log, "window") == [(0, 5), (5, 10), (10, 15), (15, 17)]


def test_a_hook_that_looks_at_metrics_sees_the_window_that_ends_at_its_step():
    log, seen = [], []
    run(12, log=log, hooks=[every(4, lambda s: seen.append((s.step, s.metrics["last"], s.flush()["last"])))])
    assert seen == [(4, 4, 4), (8, 8, 8), (12, 12, 12)]
    assert of(log, "window") == [(0, 4), (4, 5), (5, 8), (8, 10), (10, 12)]


def test_a_hook_that_raises_leaves_the_windows_before_it_on_record():
    log = []

    def broken(snapshot):
        raise OSError("mine")

    with pytest.raises(OSError, match="mine"):
        run(12, log=log, hooks=[every(7, broken)])
    assert of(log, "window") == [(0, 5), (5, 7)]


def test_nothing_left_to_do():
    log = []
    ended = run(7, start=7, log=log)
    assert log == [] and (ended.step, ended.cursor, ended.reason) == (7, 1000, "finished")


@pytest.mark.parametrize("after", [0, 1, 7, 10])
def test_poll_ends_the_loop_after_the_step_it_is_in(after):
    log = []
    poll = lambda: len(of(log, "step")) >= after
    ended = run(30, log=log, poll=poll, hooks=[every(5, noting(log, "hook"))])
    assert (ended.step, ended.cursor, ended.reason) == (after, 1000 + 10 * after, "interrupted")
    assert len(of(log, "step")) == after
    assert sum(last - first for first, last in of(log, "window")) == after
    # a hook that falls due at the interrupted step is left for the resumed run
    assert [step for step, _ in of(log, "hook")] == [n for n in (5, 10) if n < after]


def test_interrupted_at_the_last_step_is_finished():
    log = []
    assert run(5, log=log, poll=lambda: len(of(log, "step")) >= 5).reason == "finished"


def test_a_hook_may_stop_the_run():
    log = []

    def stop(snapshot):
        if snapshot.step == 8:
            snapshot.stop = "early stop"

    ended = run(30, log=log, hooks=[every(4, stop), every(8, noting(log, "also"))])
    assert (ended.step, ended.reason) == (8, "early stop")
    assert of(log, "window") == [(0, 5), (5, 8)] and len(of(log, "also")) == 1


@pytest.mark.parametrize("steps", [0, -1])
def test_a_hook_is_due_after_at_least_one_step(steps):
    with pytest.raises(ValueError, match=f"at least one step, got {steps}"):
        every(steps, print)


def test_a_step_may_poll_draw_and_say_what_it_consumed():
    """A batch begins where the call before it ended, whatever that drew or left over."""
    seen, asked = [], []

    class Drawing(Stub):
        def __call__(self, state, batch, window=None, turn=None):
            assert turn.poll is poll and turn() is False
            seen.append((turn.cursor, turn.examples, turn.updates, batch))
            if len(seen) == 2:
                assert (turn.draw(3), turn.draw(10)) == ((1020, 3), (1023, 10))
                assert turn.examples == 23
            if len(seen) == 3:
                turn.examples, turn.updates = 4, 7
            self.log.append(("step", len(seen)))
            return stepped(state), one_step(1)

    def batches(cursor, size):
        asked.append((cursor, size))
        return cursor, size

    poll, log, windows = lambda: False, [], []
    ended = run(
        5,
        log=log,
        step=Drawing(log),
        poll=poll,
        batches=batches,
        hooks=[every(1, noting(log, "hook"))],
        on_window=lambda w: windows.append(w) or {},
    )
    assert [at for at, *_ in seen] == [1000, 1010, 1033, 1037, 1047] and ended.cursor == 1057
    assert seen == [(at, 10, 1, (at, 10)) for at, *_ in seen]
    assert asked == [(1000, 10), (1010, 10), (1020, 3), (1023, 10), (1033, 10), (1037, 10), (1047, 10)]
    assert of(log, "hook") == list(zip(range(1, 6), [1010, 1033, 1037, 1047, 1057], strict=True))
    (window,) = windows
    assert window.cursors == (1000, 1010, 1033, 1037, 1047, 1057) and window.updates == 4 + 7
    assert window.timed == 4 and window.examples == 47 and window.cursor_after(2) == 1033
    assert window.values({})["examples_per_s"] == pytest.approx(47 / window.seconds)
    assert window.values({})["updates"] == 11 / 5


def test_a_step_without_sums_has_words():
    class Silent(Stub):
        def __call__(self, state, batch, window=None, turn=None):
            return stepped(state), window

    with pytest.raises(UserError, match="returned None for its sums"):
        run(3, log=[], step=Silent([]))


def test_nothing_is_drawn_of_no_examples():
    with pytest.raises(UserError, match="at least one example, got 0"):
        Turn(lambda cursor, size: {}, lambda: False).draw(0)


@pytest.mark.parametrize("after", [1, 4, 7])
def test_a_step_that_gives_up_has_not_been(after):
    """Its draws come again, the windows before it are delivered, and the state is that before it."""
    log = []

    class GivesUp(Stub):
        def __call__(self, state, batch, window=None, turn=None):
            if batch == after:
                turn.draw(10)
                raise Interrupted
            return super().__call__(state, batch, window, turn)

    ended = run(30, log=log, step=GivesUp(log))
    assert (ended.step, ended.cursor, ended.reason) == (after - 1, 1000 + 10 * (after - 1), "interrupted")
    assert int(ended.state.step) == after - 1
    assert sum(last - first for first, last in of(log, "window")) == after - 1


def test_a_step_that_gives_up_too_late_is_an_error():
    class Late(Stub):
        def __call__(self, state, batch, window=None, turn=None):
            if batch == 2:
                state.params["w"].delete()
                raise Interrupted
            return dataclasses.replace(stepped(state), params={"w": jnp.ones(2)}), one_step(1)

    with pytest.raises(RunFailed, match="step 2 raised Interrupted after its first update"):
        run(5, log=[], step=Late([]))


@pytest.mark.parametrize("moved", [0, 2])
def test_a_step_moves_the_step_by_one(moved):
    class Wrong(Stub):
        def __call__(self, state, batch, window=None, turn=None):
            return dataclasses.replace(state, step=state.step + np.int32(moved)), one_step(1)

    with pytest.raises(UserError, match=rf"moved state.step by {moved}: .*advance_step=False"):
        run(5, log=[], step=Wrong([]))


def test_a_step_is_told_before_its_batch_is_taken():
    log = []
    run(3, start=1, log=log, batches=lambda *at: log.append("batch") or 1, on_step=lambda n: log.append(("at", n)))
    assert [e for e in log if e == "batch" or e[0] == "at"] == [("at", 2), "batch", ("at", 3), "batch"]


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(flight, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
    return now


class Timed(Stub):
    """A step of one second, the first of a hundred more: it compiles."""

    def __init__(self, now):
        super().__init__([])
        self.now = now

    def __call__(self, *args):
        self.now[0] += 1 if self.log else 101
        return super().__call__(*args)


def test_the_time_of_a_hook_that_flushes_is_no_windows_and_neither_is_compiling(clock):
    def slow(snapshot):
        snapshot.flush()
        clock[0] += 1000

    windows = []
    run(13, log=[], step=Timed(clock), hooks=[every(4, slow)], on_window=lambda w: windows.append(w) or {})
    assert [(w.first, w.last, w.seconds, w.timed) for w in windows] == [
        (0, 4, 3.0, 3), (4, 5, 1.0, 1), (5, 8, 3.0, 3), (8, 10, 2.0, 2), (10, 12, 2.0, 2), (12, 13, 1.0, 1)
    ]  # fmt: skip


class Device:
    """One device that takes `seconds(step)` for each step, in order, and a host that dispatches at once."""

    def __init__(self, now, monkeypatch, seconds):
        self.now, self.seconds, self.log, self.free, self.most = now, seconds, [], 0.0, 0
        self.ends = []
        monkeypatch.setattr(flight, "_handles", lambda sums: sums["at"])
        monkeypatch.setattr(flight, "_ready", lambda at: self.ends[at - 1] <= now[0])
        monkeypatch.setattr(flight, "_wait", self.wait)

    def wait(self, at):
        self.now[0] = max(self.now[0], self.ends[at - 1])

    def __call__(self, state, batch, window=None, turn=None):
        self.free = max(self.free, self.now[0]) + self.seconds(batch)
        self.ends.append(self.free)
        self.most = max(self.most, sum(end > self.now[0] for end in self.ends))
        return stepped(state), {"at": batch}


def test_rates_are_the_devices_and_few_steps_are_under_way(clock, monkeypatch):
    """Two where a step takes long, four where it is short; every window has the time that the device took."""
    for seconds, most in ((10.0, 2), (0.01, 4)):
        device, windows = Device(clock, monkeypatch, lambda n, s=seconds: s), []
        clock[0] = 0.0
        run(40, log=[], step=device, on_window=lambda w, out=windows: out.append(w) or {})
        assert device.most == most
        assert [w.seconds / w.timed for w in windows] == pytest.approx([seconds] * 8)


def test_a_busy_host_makes_no_window_of_no_time(clock, monkeypatch):
    """Three steps are done while a hook dawdles: they share the time, as nobody saw when each was done."""

    def dawdles(snapshot):
        clock[0] += 1.0

    device, windows = Device(clock, monkeypatch, lambda n: 0.01), []
    run(24, log=[], step=device, window=2, hooks=[every(12, dawdles)], on_window=lambda w: windows.append(w) or {})
    assert sum(w.seconds for w in windows) == pytest.approx(clock[0] - 0.01 - 1.0 + 1.0, abs=1.01)
    assert min(w.seconds / w.timed for w in windows) > 0.009


def test_a_stop_waits_for_no_more_than_the_steps_under_way(clock, monkeypatch):
    """Asked at any moment of a long step, the loop ends within two of them."""
    for asked in (101.0, 105.0, 109.9):
        device = Device(clock, monkeypatch, lambda n: 10.0)
        clock[0] = 0.0
        ended = run(100, log=[], step=device, window=50, poll=lambda at=asked: clock[0] >= at)
        assert ended.reason == "interrupted" and clock[0] - asked <= 20.0


def test_one_step_at_a_time_where_devices_share_threads(clock, monkeypatch):
    device = Device(clock, monkeypatch, lambda n: 0.01)
    monkeypatch.setattr(loop, "serialise_dispatch", lambda mesh: True)
    run(20, log=[], step=device)
    assert device.most == 1


def test_a_donated_window_has_words():
    class Donates(Stub):
        def __call__(self, state, batch, window=None, turn=None):
            if window is not None:
                window["nonfinite"].total.delete()
            return stepped(state), {"nonfinite": Sum(jnp.float32(0), jnp.float32(1))}

    with pytest.raises(RunFailed, match="donated the window"):
        run(20, log=[], step=Donates([]), window=20, on_window=lambda w: {})


def test_values_of_a_window():
    sums = {
        "loss/a": Sum(jnp.float32(30), jnp.float32(20)),
        "loss/b": Sum(jnp.float32(8), jnp.float32(4)),
        "top": Max(jnp.float32(3)),
    }
    out = Window(10, 15, sums, 2.0, 5, range(0, 6 * 64, 64), 5).values({"loss/b": 0.5})
    assert out["loss"] == 1.5 + 0.5 * 2.0 and out["top"] == 3.0
    assert out["examples_per_s"] == 5 * 64 / 2.0 and out["step_ms"] == 400.0
    assert out["targets_per_s"] == 20 / 2.0 and "updates" not in out


def test_a_term_that_counted_nothing_adds_nothing_to_the_loss_shown():
    nothing = Sum(jnp.float32(0), jnp.float32(0))
    out = Window(0, 1, {"loss/a": Sum(jnp.float32(3), jnp.float32(2)), "loss/b": nothing}, 1.0, 1, (0, 1), 1).values({})
    assert out["loss"] == 1.5 and np.isnan(out["loss/b"])
    assert np.isnan(Window(0, 1, {"loss/b": nothing}, 1.0, 1, (0, 1), 1).values({})["loss"])


def train(steps, window, policy, bad=()):
    """A real step under the loop; (ended, values of every window)."""
    t = trainer(optax.sgd(0.01))
    values = []

    def batches(cursor, size):
        n = cursor // size + 1
        return rows(n, size, **({"y": np.full((32, 8), np.nan, np.float32)} if n in bad else {}))

    def on_window(closed):
        out = closed.values({})
        check_finite(out, closed, policy)
        values.append(out)
        return out

    with jax.set_mesh(t.mesh):
        ended = run_loop(
            t.built, t.state, batches, t.mesh, start=0, cursor=0, steps=steps, batch_size=32, window=window,
            on_window=on_window,
        )  # fmt: skip
    return ended, values


@pytest.mark.latest
def test_windows_are_the_sums_of_their_steps():
    ended, values = train(7, 3, "raise")
    t, window, expected = trainer(optax.sgd(0.01)), None, []
    for n in range(1, 8):
        window = t.step(rows(n), window)
        if n % 3 == 0 or n == 7:
            expected.append(finalize(host(window)))
            window = None
    assert len(values) == len(expected) == 3
    for found, want in zip(values, expected, strict=True):
        assert all(found[name] == pytest.approx(want[name], rel=1e-6) for name in ("loss/mse", "error", "grad_norm"))
        assert found["loss"] == pytest.approx(want["loss/mse"] + want["loss/size"], rel=1e-6)
        assert found["examples_per_s"] > 0 and found["step_ms"] > 0 and found["skipped"] == 0
        assert "nonfinite" not in found and "nonfinite_first" not in found
    assert int(ended.state.step) == 7
    np.testing.assert_array_equal(ended.state.params["up"]["kernel"], t.state.params["up"]["kernel"])


@pytest.mark.latest
def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step():
    with pytest.raises(RunFailed, match=r"not finite at step 5 \(2 of steps 4 to 6\).*nonfinite=skip"):
        train(12, 3, "raise", bad=(5, 6))
    with pytest.raises(RunFailed, match=r"not finite at step 1 \(1 of steps 1 to 3\)"):
        train(3, 3, "raise", bad=(1,))


def test_one_bad_update_of_many_is_found_and_sends_the_run_past_its_step():
    """A share of 1 / 64 rounds to none; the cursor is that after the bad step, wherever the others ended."""
    sums = {"nonfinite": Sum(np.float32(1), np.float32(64)), "nonfinite_first": Max(np.float32(-9))}
    window = Window(8, 12, sums, 1.0, 4, (80, 90, 123, 133, 140), 64)
    with pytest.raises(GoBack) as caught:
        check_finite(window.values({}), window, "rollback")
    assert (caught.value.first, caught.value.last, caught.value.cursor) == (10, 10, 123)
    with pytest.raises(RunFailed, match=r"not finite at step 10 \(1 of 64 updates in steps 9 to 12\)"):
        check_finite(window.values({}), window, "raise")
    values = window.values({})
    check_finite(values, window, "skip")
    assert values["skipped"] == 1 and "nonfinite" not in values and values["updates"] == 16


def test_a_step_that_counts_nothing_is_finite():
    values, window = {}, Window(0, 1, one_step(1), 1.0, 1, (0, 1), 1)
    check_finite(values, window, "raise")
    assert values == {"skipped": 0}


def test_a_run_may_skip_and_count():
    ended, values = train(7, 3, "skip", bad=(2, 3, 4, 5, 6))
    assert [out["skipped"] for out in values] == [2, 3, 0]
    assert np.isfinite(values[0]["loss"]) and np.isnan(values[1]["loss"]) and np.isfinite(values[2]["loss"])
    assert int(ended.state.step) == 7
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(ended.state.params))


@pytest.mark.parametrize("text", ["RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes", "Out of memory while trying"])
def test_out_of_memory_says_what_takes_it_and_what_helps(text):
    log = []
    step = Stub(log, fail_at=4, error=jax.errors.JaxRuntimeError(text))
    with pytest.raises(RunFailed) as caught, explained(lambda: NO_STATE_ON_DEVICE):
        run(10, log=log, step=step)
    message = str(caught.value)
    assert message.startswith("out of device memory.")
    assert "params" in message and "opt_state" in message and "frozen" not in message
    assert "batch.microbatch" in message and "model.remat=full" in message and "mesh.fsdp" in message
    assert isinstance(caught.value.__cause__, jax.errors.JaxRuntimeError)


@pytest.mark.latest
def test_bytes_by_group_are_exact():
    mesh = mesh_of(fsdp=8)
    cut, whole = (jax.sharding.NamedSharding(mesh, spec) for spec in (jax.P("fsdp"), jax.P()))
    shape = lambda size, where: jax.ShapeDtypeStruct((size,), jnp.float32, sharding=where)
    big = State({"w": shape(2**21, cut)}, {}, {}, (shape(2**19, whole),), {}, shape(1, whole), shape(1, whole))
    lines = out_of_memory(big).splitlines()
    assert [line.split() for line in lines if "MiB" in line] == [["params", "1.0", "MiB"], ["opt_state", "2.0", "MiB"]]


def test_another_error_of_the_runtime_is_left_alone():
    log = []
    step = Stub(log, fail_at=2, error=jax.errors.JaxRuntimeError("INTERNAL: something else"))
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"), explained(lambda: NO_STATE):
        run(10, log=log, step=step)

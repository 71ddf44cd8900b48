"""Back to the last good checkpoint and past the bad batch: for a non-finite step, and for a leap of the loss."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_runs import curve

from jaxops.core.checkpoint import Checkpoints
from jaxops.core.failures import RunFailed
from jaxops.core.metrics_file import read_metrics
from jaxops.core.recovery import Spikes
from jaxops.core.sharding import named_leaves
from jaxops.core.sums import Sum
from jaxops.run.build import build_task, load_config
from jaxops.run.fit import FinishedRun, fit

pytestmark = pytest.mark.usefixtures("no_report")
OWN = "data={fn: 'ownpkg.data:make'}"
QUICK = ["run.log_every=1", "evaluate.baselines=false", "checkpoint.best=null", "checkpoint.every=4", "run.steps=12"]


def poisoned(model, bad=(), factor=float("nan")):
    """A loss that is multiplied by `factor` where all of the examples `bad` are in the batch (None: always)."""

    def objective(params, batch, key):
        logp = jax.nn.log_softmax(model.apply(params, batch, key))
        loss = -jnp.take_along_axis(logp, batch["targets"][..., None], axis=-1)[..., 0]
        hit = (
            jnp.asarray(True)
            if bad is None
            else jnp.all(jnp.isin(jnp.asarray(bad or [0], jnp.int32), batch["id"])) & bool(bad)
        )
        return {"loss/toy": Sum.of(loss * jnp.where(hit, factor, 1.0), batch["weight"])}

    return objective


def train(name: str, *overrides: str, bad=(), factor=float("nan")) -> FinishedRun:
    config = load_config("my.yaml", [OWN, *QUICK, f"run.name={name}", *overrides])
    return fit(build_task(config, objective=lambda model: poisoned(model, bad, factor)), quiet=True)


def ids(step: int) -> tuple[int, ...]:
    """The examples of a step of the run that is not sent back."""
    source = build_task(load_config("my.yaml", [OWN, *QUICK])).source
    return tuple(int(x) for x in source.batch(16 * (step - 1), 16)["id"])


def only_in(step: int) -> tuple[int, ...]:
    """Two examples that no other step of these short runs has together: the first and the last of this one."""
    return ids(step)[:1] + ids(step)[-1:]


def events(name: str) -> list[tuple[int, str]]:
    lines = read_metrics(f"runs/{name}/metrics.jsonl")
    return [(line["step"], line["text"]) for line in lines if line.get("event") == "rollback"]


def test_a_bad_batch_is_left_out_and_the_run_goes_on_from_the_checkpoint(folder):
    bad = only_in(5)
    run = train("back", "nonfinite=rollback", bad=bad)
    said = events("back")
    assert run.state == "finished" and run.summary["step"] == 12 and run.summary["rollbacks"] == len(said) == 1
    assert said[0][0] == 4 and "not finite at step 5" in said[0][1] and "back to step 4" in said[0][1]
    assert "without the examples before 80" in said[0][1] and "(1 of 3 times)" in said[0][1]
    with Checkpoints("runs/back/checkpoints") as checkpoints:
        meta = checkpoints.meta(12)
        assert meta["cursor"] == 16 * 12 + 16 * len(said)
        assert meta["history"]["rollbacks"][0]["step"] == 5
        assert all(np.isfinite(leaf).all() for _, leaf in named_leaves(checkpoints.load_params(12, "")))
    assert sorted(curve("back")) == list(range(1, 13)) and np.isfinite(list(curve("back").values())).all()


def test_what_follows_is_the_run_that_never_had_the_batch(folder):
    """The same parameters as a run that stops at step 4 and whose source then skips the fifth batch."""
    train("back", "nonfinite=rollback", "run.steps=6", bad=only_in(5))
    train("clean", "run.steps=6")
    assert [curve("back")[step] for step in range(1, 5)] == [curve("clean")[step] for step in range(1, 5)]
    assert curve("back")[5] != curve("clean")[5]
    task = build_task(
        load_config("my.yaml", [OWN, *QUICK, "run.name=skips", "run.steps=6"]), objective=lambda m: poisoned(m)
    )
    whole = task.source.batch
    task.source.batch = lambda cursor, size: whole(cursor + 16 * (cursor >= 64), size)
    fit(task, quiet=True)
    assert curve("skips") == curve("back")


def test_before_the_first_checkpoint_it_goes_back_to_the_beginning(folder):
    run = train("first", "nonfinite=rollback", "run.steps=3", bad=only_in(2))
    assert run.state == "finished" and events("first")[0][0] == 0
    assert "back to step 0, without the examples before 32" in events("first")[0][1]


@pytest.mark.slow
def test_the_beginning_that_it_goes_back_to_has_the_weights_that_the_run_began_with(folder):
    train("other", "run.steps=4")
    still = ["init_from.run=runs/other", "optimizer.lr=1e-12", "run.steps=3"]
    train("warm", "nonfinite=rollback", *still, bad=only_in(2))
    assert "back to step 0" in events("warm")[0][1]
    with Checkpoints("runs/other/checkpoints") as other, Checkpoints("runs/warm/checkpoints") as warm:
        before, after = (dict(named_leaves(one.load_params(step))) for one, step in ((other, 4), (warm, 3)))
    for path, value in before.items():
        np.testing.assert_allclose(after[path], value, atol=1e-9, err_msg=path)


def test_there_is_an_end_to_going_back(folder):
    with pytest.raises(RunFailed, match=r"not finite at step \d+ .*went back 2 times already \(rollback.most\)"):
        train("often", "nonfinite=rollback", "rollback.most=2", bad=None)
    assert len(events("often")) == 2
    with Checkpoints("runs/often/checkpoints") as checkpoints:
        assert len(checkpoints.meta(0)["history"]["rollbacks"]) == 2  # counted across restarts too
    with pytest.raises(RunFailed, match="went back 2 times already"):
        train("often", "nonfinite=rollback", "rollback.most=2", bad=None)


def test_a_run_that_failed_goes_on_with_rollback(folder):
    with pytest.raises(RunFailed, match=r"not finite at step 5 .*go on here with nonfinite=rollback"):
        train("mend", bad=only_in(5))
    assert train("mend", "nonfinite=rollback", bad=only_in(5)).state == "finished"


def test_a_leap_of_the_loss_sends_the_run_back(folder):
    spike = ["rollback.spike={zscore: 20, windows: 10}", "run.steps=14", "optimizer.lr=1e-5"]
    run = train("leap", *spike, bad=only_in(11), factor=1e6)
    assert run.state == "finished"
    assert "the loss leapt to" in events("leap")[0][1] and "in steps 11 to 11" in events("leap")[0][1]
    assert "back to step 8" in events("leap")[0][1]
    assert max(curve("leap").values()) < 100 * min(curve("leap").values())


def test_the_z_score_against_numpy(folder):
    draw = np.random.default_rng(0)
    values = draw.normal(3.0, 0.1, 40)
    spikes = Spikes(zscore=6.0, windows=20)
    assert [spikes(value) for value in values] == [None] * 40
    expected = (9.0 - values[-20:].mean()) / values[-20:].std()
    assert spikes(9.0) == pytest.approx(expected)
    assert spikes(9.0) == pytest.approx(expected)  # what leapt is not remembered
    assert spikes(-9.0) is None and spikes(float("nan")) is None  # a fall is welcome, a NaN is another's business


def test_too_few_windows_judge_nothing():
    spikes = Spikes(zscore=1.0, windows=50)
    assert [spikes(value) for value in (1.0, 100.0, 1.0, 50.0)] == [None] * 4


def test_no_rollback_leaves_no_trace(folder):
    train("plain", "nonfinite=rollback", "run.steps=4")
    assert events("plain") == [] and not Path("runs/plain/samples.jsonl").exists()
    with Checkpoints("runs/plain/checkpoints") as checkpoints:
        assert checkpoints.meta(4)["history"]["rollbacks"] == []

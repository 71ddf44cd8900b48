"""Bounds of updates: a deep model may round more, an error may not; batches as an objective sees them."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from toys import Rows, regression, regression_task, rows

from jaxops.audit import updates
from jaxops.audit.layouts import Agreement, rounding
from jaxops.audit.runs import batches_finding
from jaxops.audit.updates import UpdateBatches, seen_by_objective, update_findings, with_update_batches
from jaxops.core.step import Extra
from jaxops.tables.spec import TableSpec


def judged(monkeypatch, gradient, noise):
    found = [Agreement({"data": 2}, count, "plain", gradient, 1e-9) for count in (1, 2)]
    monkeypatch.setattr(updates, "compare_layouts", lambda *given, **options: found)
    monkeypatch.setattr(updates, "rounding", lambda *given, **options: (noise, 1e-9))
    return [one.verdict for one in update_findings(regression_task(), {"data": 2}, 16)]


@pytest.mark.parametrize(
    ("gradient", "noise", "verdict"),
    [
        (9e-7, 0.0, "passed"),
        (4e-6, 1e-6, "passed"),  # four times what the last bit of every parameter does
        (4e-6, 1e-7, "failed"),
        (1e-2, 1.0, "failed"),  # no rounding is that large, whatever the model
        (float("nan"), 1e-7, "failed"),
    ],
)
def test_a_difference_is_measured_by_the_rounding_of_the_model(monkeypatch, gradient, noise, verdict):
    assert judged(monkeypatch, gradient, noise) == [verdict] * 2


def test_the_last_bit_of_every_parameter():
    gradient, parameter = rounding(regression_task(), batch_size=8, steps=1)
    assert 1e-9 < gradient < 1e-5 and 1e-9 < parameter < 1e-5


def test_one_device_has_nothing_to_be_compared_with(monkeypatch):
    found = [Agreement({}, count, "plain", 0.0, 0.0) for count in (1, 2)]
    monkeypatch.setattr(updates, "compare_layouts", lambda *given, **options: found)
    alone, parts = update_findings(regression_task(), {}, 8)
    assert (alone.verdict, parts.verdict) == ("not applicable", "passed") and "--cpu-devices 8" in alone.why


def test_an_update_of_one_block_has_no_parts(monkeypatch):
    found = [Agreement({"data": 2}, 1, "plain", 0.0, 0.0)]
    monkeypatch.setattr(updates, "compare_layouts", lambda *given, **options: found)
    whole, parts = update_findings(regression_task(block=8), {"data": 2}, 8)
    assert (whole.verdict, parts.verdict) == ("passed", "not applicable")


class WithItems(Rows):
    def batch(self, cursor, size):
        return super().batch(cursor, size) | {"item": np.arange(cursor, cursor + size, dtype=np.int32) % 20}


def test_a_batch_as_an_objective_sees_it():
    """With rows of its tables and entries of its extras, and without the plan."""
    extra = Extra(
        init=lambda params: jnp.full((), 2.0),
        read=lambda value, batch: {"twos": jnp.broadcast_to(value, batch["weight"].shape)},
    )
    spec = TableSpec(rows=20, dim=8, features=("item",))
    task = regression_task(regression, WithItems(), tables={"item": spec}, extras={"twos": extra})
    params, batch = seen_by_objective(task, 8)
    assert set(params) == {"up", "down"} and "plan" not in batch
    assert batch["rows"]["item"].shape == (8, 8) and batch["twos"].tolist() == [2.0] * 8


def test_updates_with_batches_of_their_own():
    class Config:
        class batch:
            global_ = 32

    given = lambda size: rows(0, size) | {"text": {"tokens": np.zeros((2 * size, 3), np.int32)}}
    task = regression_task(config=Config(), update_batch=given, step=lambda parts: None)
    seen = with_update_batches(task)
    assert seen.step is None and isinstance(seen.source, UpdateBatches) and seen.source.examples == 32
    batch = seen.source.batch(5, 8)
    assert batch["x"].shape == (8, 8) and batch["text"]["tokens"].shape == (16, 3)
    assert with_update_batches(regression_task()).update_batch is None


def test_batches_of_another_kind_are_found():
    class Changing(Rows):
        examples = 100

        def batch(self, cursor, size):
            whole = super().batch(cursor, size)
            return whole | {"weight": whole["weight"].astype(np.float64)} if cursor > 50 else whole

    assert batches_finding(regression_task(source=Rows()), 8).verdict == "passed"
    found = batches_finding(regression_task(source=Changing()), 8)
    assert found.verdict == "failed" and "['weight']" in found.why and "at example 96" in found.why
    assert dataclasses.asdict(found)["measured"] == 1

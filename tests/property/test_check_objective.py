"""`jaxops.testing.check` passes what is right and names the layouts where an objective is not."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import Regression, Rows, init, predict, regression, regression_task

from jaxops.audit import layouts
from jaxops.core.failures import UserError
from jaxops.core.random import example_keys
from jaxops.core.sharding import named_leaves
from jaxops.core.step import Extra
from jaxops.core.sums import Sum
from jaxops.tables.optimizers import Adagrad
from jaxops.tables.spec import TableSpec
from jaxops.testing import check, compare_layouts

QUICK = {"layouts": [{"data": 8}], "accumulations": (1, 4)}


def mean_of_means(params, batch, key):
    """What most training code does: the mean of this microbatch, counted once."""
    entry = regression(params, batch, key)["loss/mse"]
    return {"loss/mse": Sum(entry.total / jnp.maximum(entry.count, 1), jnp.ones(()))}


def noise_by_position(params, batch, key):
    return regression(params, batch | {"x": batch["x"] + 0.1 * jax.random.normal(key, batch["x"].shape)}, key)


def weight_by_position(params, batch, key):
    place = jnp.linspace(0.5, 1.5, batch["weight"].shape[0])
    return regression(params, batch | {"weight": batch["weight"] * place}, key)


def in_batch_softmax(params, batch, key):
    """Couples all examples of a microbatch, with no block declared."""
    loss = regression(params, batch, key)["loss/mse"]
    logits = batch["x"] @ params["up"]["kernel"] @ params["down"]["kernel"] @ batch["x"].T
    return {"loss/mse": loss, "loss/in_batch": Sum.of(-jnp.diagonal(jax.nn.log_softmax(logits, axis=-1)))}


def noise_by_id(params, batch, key):
    keys = example_keys(key, batch["id"])
    noise = jax.vmap(lambda k: jax.random.normal(k, (8,)))(keys)
    return regression(params, batch | {"x": batch["x"] + 0.1 * noise}, key)


@pytest.mark.parametrize("objective", [mean_of_means, noise_by_position, weight_by_position, in_batch_softmax])
def test_an_objective_that_depends_on_the_layout_is_refused(objective):
    with pytest.raises(AssertionError) as caught:
        check(regression_task(objective), **QUICK)
    message = str(caught.value)
    assert message.startswith("the objective's update depends on the layout:")
    assert "{'data': 8} x 4: gradient " in message and "example_keys" in message
    assert "{'data': 8} x 1" not in message  # the same whole batch: no fault to see there


@pytest.mark.latest
def test_one_that_does_not_is_passed():
    found = check(regression_task(noise_by_id, loss_weights={"loss/size": 0.5}), **QUICK)
    assert [(case.layout, case.accumulation, case.reduction) for case in found] == [
        ({"data": 8}, 1, "plain"),
        ({"data": 8}, 4, "after_loop"),
    ]
    assert all(0 <= case.gradient < 1e-6 and 0 <= case.parameter < 1e-5 for case in found)


def test_a_layout_is_held_against_one_device_even_alone():
    """A fault that every microbatch count shares shows only against the reference."""
    (alone,) = compare_layouts(regression_task(mean_of_means), [{"data": 8}], (4,))
    assert alone.gradient > 1e-3 and alone.parameter > 1e-3


class Nothing(Rows):
    def batch(self, cursor, size):
        return super().batch(cursor, size) | {"weight": np.zeros(size, np.float32), "odd": np.zeros(size, np.float32)}


def test_no_gradient_at_all_agrees():
    (found,) = compare_layouts(regression_task(source=Nothing()), [{"data": 1}], (4,), steps=1)
    assert found.gradient == found.parameter == 0


def not_a_number(params, batch, key):
    entry = regression(params, batch, key)["loss/mse"]
    return {"loss/mse": Sum(jnp.sqrt(-entry.total), entry.count)}


def test_what_is_not_finite_does_not_agree():
    with pytest.raises(AssertionError, match="gradient nan"):
        check(regression_task(not_a_number), layouts=[{"data": 1}], accumulations=(4,), steps=1)


def test_too_few_devices(monkeypatch):
    few = jax.devices()[:2]
    monkeypatch.setattr(layouts.jax, "devices", lambda *kind: few)
    with pytest.raises(RuntimeError, match="needs 8 CPU devices"):
        compare_layouts(regression_task())


def frozen_config(*frozen, compute="float32"):
    """As much of a config as `check` reads."""
    section = types.SimpleNamespace
    return section(optimizer=section(frozen=frozen), precision=section(compute=compute))


class WithCodes(Regression):
    """A model with a leaf that cannot be differentiated: a bias as int8 codes."""

    shapes = {**Regression.shapes, "codes": jax.ShapeDtypeStruct((8,), jnp.int8)}

    def init(self, key):
        return {**init(key), "codes": jnp.arange(8, dtype=jnp.int8)}


def regression_with_codes(params, batch, key):
    shift = 0.01 * params["codes"].astype(jnp.float32)
    return regression(params, batch | {"y": batch["y"] + shift[None]}, key)


def test_what_the_config_freezes_is_held_out():
    task = regression_task(regression_with_codes, model=WithCodes(), config=frozen_config("codes", "up/kernel"))
    (found,) = check(task, [{"data": 8}], (4,), steps=1)
    assert 0 < found.gradient < 1e-6
    seen = layouts._run(task, {"data": 1}, 1, [task.source.batch(0, 32)], 32)
    assert {path for path, _ in named_leaves(seen.grads)} == {"up/bias", "down/kernel", "down/bias"}
    with pytest.raises(TypeError, match="int8"):
        check(regression_task(regression_with_codes, model=WithCodes()), [{"data": 8}], (4,), steps=1)


def in_its_dtype(params, batch, key):
    """The sum of the squares is kept in the parameters' dtype: eight bits of hundreds of entries."""
    dtype = params["up"]["kernel"].dtype
    error = (predict(params, batch["x"].astype(dtype)) - batch["y"].astype(dtype)) ** 2
    terms = jnp.concatenate([error * batch["weight"].astype(dtype)[:, None]] * 8, axis=1).reshape(-1)
    total = jax.lax.scan(lambda total, term: (total + jax.nn.relu(term - 0.001 * total), None), terms[0], terms)[0]
    return {"loss/mse": Sum(total.astype(jnp.float32), jnp.sum(batch["weight"]))}


def test_bfloat16_where_it_is_asked_for_or_computed_in():
    asked = check(regression_task(), bfloat16=True, **QUICK)
    assert [(case.accumulation, case.compute) for case in asked] == [(1, "float32"), (4, "float32"), (1, "bfloat16")]
    assert 1e-4 < asked[-1].gradient < layouts.BFLOAT16 / 8 and asked[-1].parameter > 1e-5
    config = frozen_config(compute="bfloat16")
    assert check(regression_task(config=config), [{"data": 8}], (1,), steps=1)[-1].compute == "bfloat16"
    assert len(check(regression_task(config=config), [{"data": 8}], (1,), steps=1, bfloat16=False)) == 1


def test_what_bfloat16_spoils_is_told_apart():
    with pytest.raises(AssertionError) as caught:
        check(regression_task(in_its_dtype), [{"data": 1}], (1,), steps=1, bfloat16=True)
    text = str(caught.value)
    assert "{'data': 1} x 1 in bfloat16: gradient " in text and "cast to float32 before what adds up" in text
    assert "x 1: gradient" not in text


def test_an_entry_that_nobody_gives_is_told_in_words():
    def corrected(params, batch, key):
        return regression(params, batch | {"y": batch["y"] - batch["log_q"][:, None]}, key)

    with pytest.raises(UserError) as caught:
        check(regression_task(corrected), **QUICK)
    text = str(caught.value)
    assert "asks for 'log_q', which its batch has not (there are: id, odd, weight, x, y)" in text
    assert "(down, up)" in text and "Task.extras (there are: none)" in text
    given = Extra(
        init=lambda params: jnp.zeros(()),
        update=lambda value, params, sums, step, batch: value + 1,
        read=lambda value, batch: {"log_q": jnp.broadcast_to(value, batch["weight"].shape)},
    )
    (found,) = check(regression_task(corrected, extras={"seen": given}), [{"data": 8}], (4,), steps=2)
    assert found.gradient < 1e-6
    with pytest.raises(KeyError, match="up"):  # it is there: something else went wrong, in python's own words
        check(regression_task(lambda params, batch, key: params["up"]["up"]), **QUICK)


class Pairs(Rows):
    """Bradley-Terry: an example is two rows, of which the first was preferred."""

    def batch(self, cursor, size):
        rng = np.random.default_rng(cursor)
        x = rng.normal(size=(size, 2, 8)).astype(np.float32)
        return {"id": np.arange(cursor, cursor + size, dtype=np.int32), "x": x, "weight": np.ones(size, np.float32)}


def bradley_terry(params, batch, key):
    score = predict(params, batch["x"].reshape(-1, 8))[:, 0].reshape(-1, 2)
    return {"loss/preferred": Sum.of(jax.nn.softplus(score[:, 1] - score[:, 0]), batch["weight"])}


def test_an_example_may_be_two_rows():
    assert all(case.gradient < 1e-6 for case in check(regression_task(bradley_terry, Pairs()), **QUICK))


class WithItems(Rows):
    def batch(self, cursor, size):
        at = np.arange(cursor, cursor + size, dtype=np.int32)
        return super().batch(cursor, size) | {"item": at % 20}


def test_slots_of_tables_are_held_to_it():
    """A reader of rows whose gradient of them depends on the layout leaves other sums of squares behind."""
    spec = TableSpec(rows=20, dim=8, features=("item",), optimizer=Adagrad(lr=1e-7))  # rows themselves hardly move

    def task(objective):
        made = lambda params, batch, key: objective(params, batch | {"y": batch["y"] + batch["rows"]["item"]}, key)
        return regression_task(made, WithItems(), tables={"item": spec})

    options = {"layouts": [{"data": 2}], "accumulations": (2,), "steps": 2}
    (found,) = check(task(regression), **options)
    assert found.parameter < 1e-6
    seen = layouts._run(task(regression), {"data": 1}, 1, [WithItems().batch(0, 32)], 32)
    assert seen.slots.keys() == {"sum", "count"} and seen.slots["sum"]["item"].shape[1:] == (8,)
    (wrong,) = compare_layouts(task(lambda p, b, k: {"loss/mse": mean_of_means(p, b, k)["loss/mse"]}), **options)
    assert wrong.parameter > 1e-4

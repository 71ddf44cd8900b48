"""`jaxops.testing.check` passes what is right and names the layouts where an objective is not."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import Rows, regression, regression_task

from jaxops import testing
from jaxops.core.random import example_keys
from jaxops.core.sums import Sum
from jaxops.testing import check, compare

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
    (alone,) = compare(regression_task(mean_of_means), [{"data": 8}], (4,))
    assert alone.gradient > 1e-3 and alone.parameter > 1e-3


class Nothing(Rows):
    def batch(self, cursor, size):
        return super().batch(cursor, size) | {"weight": np.zeros(size, np.float32), "odd": np.zeros(size, np.float32)}


def test_no_gradient_at_all_agrees():
    (found,) = compare(regression_task(source=Nothing()), [{"data": 1}], (4,), steps=1)
    assert found.gradient == found.parameter == 0


def not_a_number(params, batch, key):
    entry = regression(params, batch, key)["loss/mse"]
    return {"loss/mse": Sum(jnp.sqrt(-entry.total), entry.count)}


def test_what_is_not_finite_does_not_agree():
    with pytest.raises(AssertionError, match="gradient nan"):
        check(regression_task(not_a_number), layouts=[{"data": 1}], accumulations=(4,), steps=1)


def test_too_few_devices(monkeypatch):
    few = jax.devices()[:2]
    monkeypatch.setattr(testing.jax, "devices", lambda *kind: few)
    with pytest.raises(RuntimeError, match="needs 8 CPU devices"):
        compare(regression_task())

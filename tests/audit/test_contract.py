"""What users' objectives do wrong, planted one by one: each is found by its check, in words that name it."""

import jax
import jax.numpy as jnp
import numpy as np
from toys import init, predict, regression, regression_task, rows

from jaxops.audit.contract import (
    ObjectiveCase,
    counts_finding,
    examples_finding,
    gradients_finding,
    keys_finding,
    sums_finding,
)
from jaxops.audit.updates import case_of
from jaxops.core.random import example_keys, shared_draws
from jaxops.core.sums import Max, Sum


def case(objective, batch=None, **options):
    return ObjectiveCase(objective, init(None), rows(0, 8) if batch is None else batch, **options)


def error_of(params, batch):
    return jnp.sum(jnp.square(predict(params, batch["x"]) - batch["y"]), axis=-1)


def mean(params, batch, key):
    return {"loss/mse": Sum(jnp.mean(error_of(params, batch)), jnp.ones(()))}


def confident_only(params, batch, key):
    """The mean over those examples on which the model is good: the count moves with the model."""
    error = error_of(params, batch)
    return {"loss/mse": Sum.of(error, (error < 8.0).astype(jnp.float32))}


def divided(params, batch, key):
    entry = regression(params, batch, key)["loss/mse"]
    return {"loss/mse": Sum(entry.total / entry.count, entry.count)}


def batch_normalised(params, batch, key):
    out = predict(params, batch["x"])
    out = (out - jnp.mean(out, axis=0, keepdims=True)) / jnp.std(out, axis=0, keepdims=True)
    return {"loss/mse": Sum.of(jnp.sum(jnp.square(out - batch["y"]), axis=-1), batch["weight"])}


def noisy(draw):
    """The regression on inputs with noise; `draw(key, batch)` makes it."""

    def objective(params, batch, key):
        noise = 0 if key is None else 0.1 * draw(key, batch)
        return regression(params, batch | {"x": batch["x"] + noise}, key)

    return objective


by_place = noisy(lambda key, batch: jax.random.normal(key, batch["x"].shape))
for_all = noisy(lambda key, batch: jax.random.normal(key, (1, 8)))
by_id = noisy(lambda key, batch: jax.vmap(lambda k: jax.random.normal(k, (8,)))(example_keys(key, batch["id"])))


def test_a_right_one_passes_all_and_its_metrics_count_too():
    found = case(by_id)
    assert [check(found).verdict for check in (counts_finding, sums_finding, examples_finding)] == ["passed"] * 3
    assert keys_finding(found).verdict == gradients_finding(found).verdict == "passed"
    assert keys_finding(case(regression)).verdict == "not applicable"


def test_a_mean_is_no_sum():
    found = sums_finding(case(mean))
    assert found.verdict == "failed" and "count of loss/mse is not a sum" in found.why and found.measured > 0.1


def test_a_total_that_is_divided_is_no_sum():
    found = sums_finding(case(divided))
    assert found.verdict == "failed" and "the total of loss/mse is not a sum" in found.why


def test_terms_that_cancel_are_not_taken_for_an_error():
    """The total of a policy's loss may be nearly zero, of terms that are not: its rounding is that of the terms."""
    advantage = np.array([1.0, -1.0] * 4, np.float32) + np.arange(8, dtype=np.float32) * 1e-7

    def signed(params, batch, key):
        return {"loss/policy": Sum.of(batch["advantage"] * (1 + 1e-7 * batch["x"][:, 0]))}

    found = case(signed, rows(0, 8) | {"advantage": advantage})
    assert sums_finding(found).verdict == examples_finding(found).verdict == "passed"


def test_a_metric_that_does_not_add_up_is_named():
    def wrong(params, batch, key):
        return regression(params, batch, key) | {"rmse": Sum(jnp.sqrt(jnp.sum(error_of(params, batch))), jnp.ones(()))}

    assert "rmse" in sums_finding(case(wrong)).why
    least = lambda params, batch, key: (
        {"loss/x": regression(params, batch, key)["loss/mse"]} | {"least": Max(jnp.min(error_of(params, batch)))}
    )
    assert "least" in sums_finding(case(least)).why


def test_counts_that_move_with_the_model():
    found = counts_finding(case(confident_only))
    assert found.verdict == "failed" and found.measured >= 1 and "down/bias" in found.why


def test_counts_that_only_pass_through_the_model_are_right_and_said_to_be():
    def through(params, batch, key):
        entry = regression(params, batch, key)["loss/mse"]
        return {"loss/mse": Sum(entry.total, entry.count + 0 * jnp.sum(params["up"]["bias"]))}

    found = counts_finding(case(through))
    assert found.verdict == "passed" and "up/bias" in found.why


def test_examples_that_depend_on_each_other():
    found = examples_finding(case(batch_normalised))
    assert found.verdict == "failed" and found.measured > 1e-3 and "declare how many neighbours" in found.why
    assert "examples depend on each other" in sums_finding(case(batch_normalised)).why


def test_examples_may_depend_on_each_other_within_a_declared_block():
    def pairs(params, batch, key):
        score = jnp.mean(predict(params, batch["x"]), axis=-1).reshape(-1, 2)
        return {"loss/pair": Sum.of(jax.nn.softplus(score[:, 1] - score[:, 0]))}

    assert examples_finding(case(pairs)).verdict == "failed"
    inside = case(pairs, block=2)
    assert examples_finding(inside).verdict == sums_finding(inside).verdict == "passed"
    whole = case(pairs, block=8)
    assert examples_finding(whole).verdict == sums_finding(whole).verdict == "not applicable"
    assert keys_finding(whole).verdict == "not applicable" and gradients_finding(whole).verdict == "passed"


def test_draws_that_follow_the_place_in_the_batch():
    found = keys_finding(case(by_place))
    assert found.verdict == "failed" and "follow an example's place" in found.why


def test_draws_that_are_the_same_for_all_examples():
    found = keys_finding(case(for_all))
    assert found.verdict == "failed" and "same draws, whatever their ids" in found.why
    declared = keys_finding(case(shared_draws(noisy(lambda key, batch: jax.random.normal(key, (1, 8))), "noise")))
    assert declared.verdict == "passed" and "noise" in declared.why


def test_a_declaration_outlives_the_wrapping_of_a_task():
    task = regression_task(shared_draws(noisy(lambda key, batch: jax.random.normal(key, (1, 8))), "noise"))
    assert keys_finding(case_of(task, 8)).verdict == "passed"


def test_draws_without_ids():
    batch = rows(0, 8)
    del batch["id"]
    assert "no `id`" in keys_finding(case(for_all, batch)).why


def test_a_leaf_that_never_gets_a_gradient():
    def deaf(params, batch, key):
        return regression(jax.tree.map(lambda x: x, params) | {"up": jax.lax.stop_gradient(params["up"])}, batch, key)

    found = gradients_finding(case(deaf))
    assert found.verdict == "failed" and "up/bias, up/kernel" in found.why and "down" not in found.why
    assert gradients_finding(case(deaf, frozen=("^up/",))).verdict == "passed"


def test_a_factor_of_a_zero_kernel_is_no_dead_leaf():
    """An adapter's second factor begins at zero, so the first has no gradient until it has moved."""

    def adapted(params, batch, key):
        error = batch["y"] - batch["x"] @ params["a"] @ params["b"]
        return {"loss/mse": Sum.of(jnp.sum(jnp.square(error), axis=-1))}

    params = {"a": jnp.ones((8, 2)), "b": jnp.zeros((2, 8))}
    assert gradients_finding(ObjectiveCase(adapted, params, rows(0, 8))).verdict == "passed"


def test_a_leaf_that_is_not_used_and_one_that_cancels():
    """Scores of which only differences count have a bias that nothing trains: no mistake, but one should know."""

    def ranked(params, batch, key):
        score = predict(params, batch["x"])[:, 0]
        return {"loss/pair": Sum.of(jax.nn.softplus(score[1::2] - score[0::2]))}

    found = gradients_finding(case(ranked, block=2))
    assert found.verdict == "passed" and "the loss is the same for any down/bias" in found.why
    spare = init(None) | {"spare": jnp.ones(3)}
    found = gradients_finding(ObjectiveCase(regression, spare, rows(0, 8)))
    assert found.verdict == "failed" and "in two steps: spare: unused" in found.why


def test_a_gradient_that_is_not_a_number():
    """The square root of zero has no derivative, and a mask after it does not help."""

    def rooted(params, batch, key):
        root = jnp.sqrt(jnp.square(predict(params, 0 * batch["x"]) - predict(params, 0 * batch["x"])))
        entry = regression(params, batch, key)["loss/mse"]
        return {"loss/mse": entry, "loss/root": Sum.of(jnp.sum(jnp.where(root > 0, root, 0.0), axis=-1))}

    found = gradients_finding(case(rooted))
    assert found.verdict == "failed" and "not finite: " in found.why and "down/bias" in found.why


def test_totals_that_are_not_finite_are_not_let_through():
    wrong = lambda params, batch, key: {"loss/x": Sum(jnp.log(-jnp.sum(batch["weight"])), jnp.sum(batch["weight"]))}
    whole = case(wrong, rows(0, 8) | {"weight": np.array([1, -1] * 4, np.float32)})
    assert sums_finding(whole).verdict == "failed" and examples_finding(whole).verdict in ("passed", "failed")

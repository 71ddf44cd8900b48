"""The next-token loss against numpy in float64: its terms, its counts, and what its config refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hlo_text import operations
from toy_language import Texts, ToyLanguage, language_task, numpy_scores
from toys import mesh_of, trainer

from jaxops.core.fence import unconstrained_kernels
from jaxops.core.random import example_keys
from jaxops.core.sharding import place
from jaxops.core.sums import finalize
from jaxops.objectives.language import LanguageModel, NextTokenConfig, next_token
from jaxops.testing import BFLOAT16, check

CUBE = {"data": 2, "fsdp": 2, "tensor": 2}
FORMS = {
    "tied": ToyLanguage(),
    "separate": ToyLanguage(tied=False),
    "capped": ToyLanguage(soft_cap=1.5, tied=False),
    "unpadded": ToyLanguage(real_vocab=128),
}


def batch_of(real_vocab=100):
    return jax.tree.map(jnp.asarray, Texts(real_vocab).batch(0, 8))


def numpy_terms(model, params, batch, smoothing, z):
    """Each term's total and count in float64, from full logits; the hidden states are the model's own."""
    hidden = model.hidden(params, batch["tokens"], batch["segment"], batch["position"], None)
    logprobs, entropy, lse, mean, best = numpy_scores(
        hidden, model.head(params), np.asarray(batch["targets"]), model.real_vocab, model.soft_cap
    )
    weight = np.asarray(batch["mask"] * batch["weight"][:, None], np.float64)
    total = lambda x: np.where(weight > 0, x * weight, 0).sum()
    return {
        "loss/nll": total(-logprobs),
        "loss/smoothing": total(smoothing * (logprobs - mean)),
        "loss/z": total(z * lse**2),
        "perplexity": total(-logprobs),
        "accuracy": total(best == np.asarray(batch["targets"])),
        "entropy": total(entropy),
    }, weight.sum()


@pytest.mark.parametrize("name", FORMS)
def test_terms_are_numpys(name):
    model = FORMS[name]
    assert isinstance(model, LanguageModel)
    params, batch = model.init(jax.random.key(0)), batch_of(model.real_vocab)
    full = NextTokenConfig(label_smoothing=0.1, z_loss=0.01, chunk=5).build(model)
    found = jax.jit(full)(params, batch, None)
    expected, count = numpy_terms(model, params, batch, 0.1, 0.01)
    assert set(found) == set(expected) and 0 < count < batch["mask"].size
    for term, total in expected.items():
        np.testing.assert_allclose(found[term].total, total, rtol=3e-6, err_msg=term)
        assert float(found[term].count) == count
    values = finalize(found)
    assert values["perplexity"] == pytest.approx(np.exp(values["loss/nll"]))
    plain = jax.jit(NextTokenConfig().build(model))(params, batch, None)
    assert set(plain) == {"loss/nll", "perplexity", "accuracy", "entropy"}
    np.testing.assert_allclose(plain["loss/nll"].total, found["loss/nll"].total, rtol=1e-6)


def test_smoothing_is_cross_entropy_against_a_smoothed_target():
    model, share = ToyLanguage(), 0.2
    params, batch = model.init(jax.random.key(0)), batch_of()
    found = next_token(model, label_smoothing=share)(params, batch, None)
    hidden = model.hidden(params, batch["tokens"], batch["segment"], batch["position"], None)
    logits = np.asarray(hidden, np.float64) @ np.asarray(model.head(params), np.float64)[:, :100]
    every = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    smoothed = (1 - share) * np.eye(100)[np.maximum(np.asarray(batch["targets"]), 0)] + share / 100
    weight = batch["mask"] * batch["weight"][:, None]
    expected = (-(smoothed * every).sum(-1) * np.asarray(weight)).sum()
    assert float(found["loss/nll"].total + found["loss/smoothing"].total) == pytest.approx(expected, rel=1e-5)


def test_counts_do_not_depend_on_parameters_and_padding_changes_nothing():
    model = ToyLanguage()
    batch, objective = batch_of(), jax.jit(next_token(model))
    params = model.init(jax.random.key(0))
    first = objective(params, batch, jax.random.key(1))
    other = objective(jax.tree.map(lambda x: 3 * x, params), batch, jax.random.key(1))
    assert float(first["loss/nll"].count) == float(other["loss/nll"].count) == (batch["mask"][:7]).sum()
    wider = {name: jnp.pad(x, ((0, 0), (0, 4))) if x.ndim == 2 else x for name, x in batch.items()}
    longer = objective(params, wider, None)
    np.testing.assert_allclose(longer["loss/nll"].total, objective(params, batch, None)["loss/nll"].total, rtol=1e-6)
    nothing = objective(params, batch | {"mask": 0 * batch["mask"]}, None)
    assert float(nothing["loss/nll"].total) == 0 and np.isnan(finalize(nothing)["perplexity"])


def test_an_example_draws_from_its_own_key():
    class Seen(ToyLanguage):
        def hidden(self, params, tokens, segment, position, key=None):
            seen.append(key)
            return super().hidden(params, tokens, segment, position, key)

    seen, batch, key = [], batch_of(), jax.random.key(3)
    objective = next_token(Seen())
    params = ToyLanguage().init(jax.random.key(0))
    objective(params, batch, key)
    objective(params, batch, None)
    data = jax.random.key_data
    np.testing.assert_array_equal(data(seen[0]), data(example_keys(key, batch["id"])))
    assert seen[1] is None


def test_a_trained_target_outside_the_vocabulary_is_loud():
    model, batch = ToyLanguage(), batch_of()
    wrong = jnp.where(batch["mask"] > 0, 100, batch["targets"])
    params = model.init(jax.random.key(0))
    assert np.isnan(float(next_token(model)(params, batch | {"targets": wrong}, None)["loss/nll"].total))


@pytest.mark.parametrize("options", [{"z_loss": -1.0}, {"label_smoothing": 1.0}, {"label_smoothing": -0.1}])
def test_what_cannot_be(options):
    with pytest.raises(ValueError, match="z_loss must be at least 0"):
        next_token(ToyLanguage(), **options)


@pytest.mark.parametrize("name", ["tied", "separate"])
def test_the_fence_accepts_it(name):
    model, mesh = FORMS[name], mesh_of(**CUBE)
    batch, key = batch_of(), jax.random.key(0)
    placed = place(model.shapes, model.rules, mesh)
    assert any("fsdp" in str(one.spec) for one in placed)
    assert unconstrained_kernels(next_token(model), model.shapes, batch, key, mesh=mesh, placed=placed) == []


@pytest.mark.slow
@pytest.mark.parametrize("layout", [{"data": 2}, CUBE], ids=str)
def test_the_counts_only_pass_has_no_model_in_it(layout):
    """Four microbatches need no more products than one: the loop that counts has none, nor has its loop of chunks."""
    model, batch = ToyLanguage(), Texts().batch(0, 32)
    options = {"objective": next_token(model, chunk=8), "start": model.init, "rules": model.rules}
    products = lambda accumulation: [
        op.loop
        for op in operations(trainer(layout=layout, accumulation=accumulation, **options).compiled(batch).as_text())
        if op.kind == "dot"
    ]
    of_four = products(4)
    assert None not in of_four and len(of_four) == len(products(1)) == 7


@pytest.mark.slow
def test_bfloat16_is_near_float32():
    task = language_task(lambda model: next_token(model, chunk=8))
    found = check(task, [CUBE], (1,), steps=1, bfloat16=True)
    assert {case.compute for case in found} == {"float32", "bfloat16"}
    assert all(case.gradient <= BFLOAT16 / 4 for case in found)


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
def test_a_vocabulary_and_length_that_users_have(tied):
    model = ToyLanguage(real_vocab=8_000, dim=128, tied=tied, scale=0.05)
    task = language_task(lambda model: next_token(model, z_loss=1e-4, chunk=256), model, Texts(8_000, length=256))
    layouts = [{"data": 8}, {"fsdp": 8}, CUBE]
    found = check(task, layouts, (1,), gradient=2e-6, batch_size=16, steps=1)
    assert len(found) == 3 and all(case.gradient > 0 for case in found)

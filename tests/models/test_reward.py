"""The reward model: a score is read at the last token of a text, and depends on nothing but the text."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxops.core.sharding import named_leaves
from jaxops.models.decoder.architecture import Architecture
from jaxops.models.decoder.decoder import build_decoder
from jaxops.models.reward import RewardModel

SMALL = Architecture(vocab=60, dim=16, layers=2, heads=2, hidden=24, length=32)


@pytest.fixture(scope="module")
def model():
    return RewardModel(build_decoder(SMALL), ensemble=3)


@pytest.fixture(scope="module")
def params(model):
    return model.init(jax.random.key(0))


def rows(texts, length, before=0, fill=0):
    """Texts as rows, padded on both sides."""
    out = {name: np.zeros((len(texts), length), np.int32) for name in ("segment", "position")}
    out["tokens"] = np.full((len(texts), length), fill, np.int32)
    for at, text in enumerate(texts):
        inside = slice(before, before + len(text))
        out["tokens"][at, inside], out["segment"][at, inside] = text, 1
        out["position"][at, inside] = np.arange(len(text))
    return tuple(jnp.asarray(out[name]) for name in ("tokens", "segment", "position"))


TEXTS = [[5, 7, 9], [3], [2, 2, 8, 11, 4, 1]]


def test_a_score_is_the_product_with_the_last_hidden_state(model, params):
    tokens, segment, position = rows(TEXTS, 8)
    hidden = np.asarray(model.decoder.hidden(params, tokens, segment, position), np.float64)
    kernel, bias = (np.asarray(params["reward"][name], np.float64) for name in ("kernel", "bias"))
    wanted = np.stack([hidden[at, len(text) - 1] @ kernel + bias for at, text in enumerate(TEXTS)])
    found = model.scores(params, tokens, segment, position)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(
        model.score(params, tokens, segment, position), wanted.mean(axis=1), rtol=1e-5, atol=1e-6
    )


def test_padding_of_any_amount_side_and_id_changes_nothing(model, params):
    score = jax.jit(model.scores)
    plain = score(params, *rows(TEXTS, 6))
    for length, before, fill in ((9, 0, 59), (9, 3, 7), (16, 10, 1)):
        np.testing.assert_allclose(score(params, *rows(TEXTS, length, before, fill)), plain, rtol=1e-5, atol=1e-6)
    alone = score(params, *rows(TEXTS[1:2], 6))
    np.testing.assert_allclose(alone, plain[1:2], rtol=1e-5, atol=1e-6)


def test_the_whole_text_counts_and_the_order_of_it(model, params):
    first, second, third = (model.score(params, *rows([text], 6))[0] for text in ([1, 2, 9], [2, 1, 9], [1, 2, 9, 0]))
    assert abs(first - second) > 1e-4 and abs(first - third) > 1e-4


def test_fresh_heads_are_small_and_the_vocabulary_is_gone():
    model = RewardModel(build_decoder(Architecture(vocab=60, dim=64, heads=2, layers=1, tied=False)), ensemble=64)
    params = model.init(jax.random.key(1))
    assert "head" not in params and not any("head/" in path for path in model.padding)
    assert {path for path, _ in named_leaves(model.shapes)} == {path for path, _ in named_leaves(params)}
    kernel = np.asarray(params["reward"]["kernel"])
    assert kernel.shape == (64, 64) and kernel.std() == pytest.approx(65**-0.5, rel=0.05)
    assert not np.asarray(params["reward"]["bias"]).any()


def test_a_language_model_s_parameters_are_taken_as_they_are(model):
    """The decoder keeps its paths beside the heads, so its weights are loaded without a renaming."""
    decoder = {path for path, _ in named_leaves(model.decoder.shapes)}
    assert decoder | {"reward/kernel", "reward/bias"} == {path for path, _ in named_leaves(model.shapes)}

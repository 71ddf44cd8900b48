"""The decoder computes what transformers computes, on padded and packed rows, and from its cache at every position."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoder_fixtures import NAMES, full, opened

from jaxops.config.load import from_dict
from jaxops.core.failures import UserError
from jaxops.models.decoder import attention
from jaxops.models.decoder.architecture import Architecture, Rope
from jaxops.models.decoder.decoder import MASKED, Decoder, build_decoder

LENGTH = 16


def packed(texts, length):
    """(tokens, segment, position) [1, length] of texts one after another, with three tokens of padding before them."""
    tokens, segment, position = (np.zeros((1, length), np.int32) for _ in range(3))
    at = 3
    for number, text in enumerate(texts, 1):
        end = at + len(text)
        tokens[0, at:end], segment[0, at:end], position[0, at:end] = text, number, np.arange(len(text))
        at = end
    return tokens, segment, position


@pytest.mark.parametrize("name", NAMES)
def test_texts_alone_padded_and_packed_have_the_logits_of_transformers(name):
    decoder, params, tokens, expected = opened(name)
    texts = [tokens[0], tokens[1, :9], tokens[2, :12]]
    rows = packed(texts, 48)
    found = np.asarray(full(name)(params, *map(jnp.asarray, rows)))
    at = 3
    for text, logits in zip(texts, expected, strict=True):
        ours = found[0, at : at + len(text)]
        np.testing.assert_allclose(ours[:, : decoder.real_vocab], logits[: len(text)], rtol=0, atol=2e-5)
        assert np.all(ours[:, decoder.real_vocab :] == MASKED)
        at += len(text)
    assert np.all(np.isfinite(found))


@pytest.mark.parametrize("name", NAMES)
def test_cached_decoding_is_the_full_forward_at_every_position(name):
    decoder, params, tokens, _ = opened(name)
    tokens = jnp.asarray(tokens)
    where = jnp.ones_like(tokens), jnp.broadcast_to(jnp.arange(LENGTH), tokens.shape)
    expected = full(name)(params, tokens, *where)
    lengths, rows = jnp.asarray([3, 1, 6]), jnp.arange(3)
    start = jnp.where(jnp.arange(6)[None] < lengths[:, None], tokens[:, :6], 7)  # padding is some real token
    cache, logits = jax.jit(decoder.prefill, static_argnums=3)(params, start, lengths, LENGTH + 2)
    assert {name: x.shape for name, x in cache.items()} == {
        name: x.shape for name, x in decoder.empty_cache(3, LENGTH + 2).items()
    }
    step = jax.jit(decoder.decode, donate_argnums=1)
    for moved in range(10):
        place = lengths + moved
        np.testing.assert_allclose(logits, expected[rows, place - 1], rtol=0, atol=1e-5)
        cache, logits = step(params, cache, tokens[rows, place], place)
    np.testing.assert_allclose(logits, expected[rows, lengths + 9], rtol=0, atol=1e-5)


@pytest.mark.latest
@pytest.mark.parametrize("unstacked", [False, True], ids=["scan", "loop"])
def test_decoding_from_an_empty_cache(unstacked):
    decoder, params, tokens, expected = opened("gemma3")
    params = decoder.unstacked(params) if unstacked else params
    cache, step = decoder.empty_cache(3, LENGTH), jax.jit(decoder.decode)
    for place in range(LENGTH):
        cache, logits = step(params, cache, jnp.asarray(tokens[:, place]), jnp.full(3, place))
        np.testing.assert_allclose(logits[:, : decoder.real_vocab], expected[:, place], rtol=0, atol=2e-5)
    _, beyond = step(params, cache, jnp.asarray(tokens[:, 0]), jnp.asarray([LENGTH, 3, -1]))
    assert np.isnan(beyond).all(axis=1).tolist() == [True, False, True]


def test_unstacked_layers_prefill_and_read_like_scanned_ones():
    decoder, params, tokens, _ = opened("gemma3")
    tokens, lengths = jnp.asarray(tokens), jnp.asarray([3, 16, 9])
    where = jnp.ones_like(tokens), jnp.broadcast_to(jnp.arange(LENGTH), tokens.shape)
    run = jax.jit(lambda p: (decoder.prefill(p, tokens, lengths, 20), decoder.hidden(p, tokens, *where)))
    for a, b in zip(jax.tree.leaves(run(params)), jax.tree.leaves(run(decoder.unstacked(params))), strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=0, atol=2e-5)


@functools.cache
def gradient(remat):
    decoder, params, tokens, _ = opened("qwen2_window")
    model = Decoder(dataclasses.replace(decoder.config, remat=remat))
    tokens = jnp.asarray(tokens)
    where = jnp.ones_like(tokens), jnp.broadcast_to(jnp.arange(LENGTH), tokens.shape)
    return jax.jit(jax.grad(lambda p: jnp.sum(jnp.square(model.hidden(p, tokens, *where)))))(params)


@pytest.mark.parametrize("remat", ["full", pytest.param("dots", marks=pytest.mark.slow)])
def test_remat_changes_no_gradient(remat):
    for a, b in zip(jax.tree.leaves(gradient("none")), jax.tree.leaves(gradient(remat)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * float(jnp.abs(a).max()))


def test_dropout_is_by_row_and_layer_and_off_without_keys():
    decoder = Decoder(Architecture(vocab=50, dim=16, heads=2, layers=2, dropout=0.5))
    params = jax.jit(decoder.init)(jax.random.key(0))
    tokens = jnp.zeros((3, 8), jnp.int32)
    where = jnp.ones_like(tokens), jnp.broadcast_to(jnp.arange(8), tokens.shape)
    keys = jax.random.split(jax.random.key(1), 2)[jnp.asarray([0, 1, 0])]
    run = jax.jit(decoder.hidden)
    dropped, whole = run(params, tokens, *where, keys), run(params, tokens, *where)
    np.testing.assert_array_equal(dropped[0], dropped[2])
    assert not np.allclose(dropped[0], dropped[1]) and not np.allclose(dropped, whole)
    np.testing.assert_array_equal(whole[0], whole[1])


def test_bfloat16_stays_near_float32():
    decoder, params, tokens, expected = opened("qwen3")
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    tokens = jnp.asarray(tokens)
    where = jnp.ones_like(tokens), jnp.broadcast_to(jnp.arange(LENGTH), tokens.shape)
    hidden = jax.jit(decoder.hidden)(half, tokens, *where)
    assert hidden.dtype == jnp.bfloat16
    logits = np.asarray(decoder.logits(half, hidden))[..., : decoder.real_vocab]
    assert logits.dtype == np.float32
    assert np.linalg.norm(logits - expected) < 0.03 * np.linalg.norm(expected)


def test_attention_is_the_librarys_where_cudnn_would_compute_it():
    """On CPU the library has its plain implementation, which takes the same arguments as cuDNN's."""
    rng = np.random.default_rng(0)
    draw = lambda heads: jnp.asarray(rng.normal(size=(2, 6, heads, 8)), jnp.float32)
    q, k, v = draw(4), draw(2), draw(2)
    mask = jnp.asarray(np.tril(rng.random((2, 6, 6)) < 0.7) | np.eye(6, dtype=bool))
    expected = attention._flash(q, k, v, mask, scale=0.3, implementation="xla")
    np.testing.assert_allclose(attention.attend(q, k, v, mask, 0.3), expected, rtol=1e-5, atol=1e-6)
    assert not attention._cudnn_covers(q.astype(jnp.bfloat16), k)  # there is no GPU here


@pytest.mark.parametrize(("length", "heads", "cap"), [(128, 2, None), (150, 4, None), (131, 4, 5.0)])
def test_causal_attention_in_blocks_is_that_of_all_pairs(length, heads, cap):
    draw = lambda number, heads: jax.random.normal(jax.random.key(number), (2, length, heads, 8))
    q, k, v, weight = draw(0, heads), draw(1, 2), draw(2, 2), draw(3, heads)
    segment = jnp.asarray(np.repeat([[1, 2, 0], [1, 1, 1]], [50, 60, length - 110], axis=1))
    same = (segment[:, :, None] == segment[:, None, :]) & (segment > 0)[:, None, :]
    weight = jnp.where(segment[..., None, None] > 0, weight, 0.0)  # what padding gets means nothing
    mask = same & jnp.tril(jnp.ones((length, length), bool))[None]

    def both(causal):
        attend = lambda q, k, v: attention.attend(q, k, v, mask, 0.3, cap, causal=causal)
        out, back = jax.vjp(attend, q, k, v)
        kept = sum(x.size for x in jax.tree.leaves(back) if jnp.issubdtype(x.dtype, jnp.floating))
        return jax.tree.map(np.asarray, (jnp.where(weight != 0, out, 0.0), *back(weight))), kept

    expected, pairs = both(False)
    found, kept = both(True)
    for mine, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=2e-5)
    assert kept < q[..., 0].size * length / 2 < pairs  # the weights are not among what the backward pass is given


def test_a_config_reads_the_architecture_and_tells_each_error_once():
    Run = dataclasses.make_dataclass("Run", [("model", Architecture, Architecture())], frozen=True)
    given = {"kind": "decoder", "window": 8, "pattern": ["window", "full"], "rope": {"theta": 1e6, "window_theta": 1e4}}
    found = from_dict(Run, {"model": given}).config.model
    assert found.layer_kinds == ("window", "full") and found.rope == Rope(theta=1e6, window_theta=1e4)
    with pytest.raises(UserError) as error:
        from_dict(Run, {"model": {"kind": "decoder", "rope": {"factor": 2.0}}})
    assert str(error.value).count("without a scaling nothing is stretched") == 1


def test_more_positions_than_were_learned_are_refused():
    decoder, params, _, _ = opened("gpt2")
    long = jnp.zeros((1, 33), jnp.int32)
    hidden = np.asarray(jax.jit(decoder.hidden)(params, long, long + 1, jnp.arange(33)[None]))
    assert np.all(np.isnan(hidden))
    with pytest.raises(UserError, match="40 tokens: the model has learned 32 positions"):
        decoder.prefill(params, long[:, :4], jnp.ones(1, jnp.int32), 40)
    with pytest.raises(UserError, match="room for 2 tokens cannot take texts of 4"):
        decoder.prefill(params, long[:, :4], jnp.ones(1, jnp.int32), 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"heads": 3}, "model.heads: must divide dim 64"),
        ({"kv_heads": 3}, "model.kv_heads: must divide heads 4"),
        ({"head_dim": 7}, "model.head_dim: rotary embeddings turn pairs"),
        ({"vocab": 0}, "model.vocab: expected a positive number"),
        ({"vocab": None}, "model.vocab: expected the number of token ids"),
        ({"dropout": 1.0}, "model.dropout: expected a rate"),
        ({"pattern": ("full", "window")}, "model.pattern: names layers with a window"),
        ({"rope": Rope(window_theta=10.0)}, "model.rope.window_theta: is of the layers with a window"),
        ({"rope": Rope(factor=2.0)}, "model.rope.factor: without a scaling"),
        ({"rope": Rope(scaling="yarn", factor=2.0)}, "model.rope.original_length: scaling yarn needs"),
    ],
    ids=str,
)
def test_values_that_do_not_go_together_are_refused(changes, message):
    with pytest.raises(UserError) as error:
        Decoder(Architecture(**{"vocab": 50} | changes))
    assert message in str(error.value)


def test_the_vocabulary_comes_from_the_tokenizer_unless_it_is_given():
    assert build_decoder(Architecture(), 300).rows == 384
    assert build_decoder(Architecture(vocab=400), 300).real_vocab == 400
    with pytest.raises(UserError, match=r"model\.vocab: 200, but the tokenizer has 300 ids"):
        build_decoder(Architecture(vocab=200), 300)
    with pytest.raises(UserError, match=r"model\.vocab: expected the number of token ids"):
        build_decoder(Architecture())


def test_meshes_that_do_not_divide_the_heads_are_told():
    a = Architecture(heads=4, kv_heads=2)
    assert a.mesh_problems({"tensor": 2}) == []
    assert a.mesh_problems({"tensor": 4}) == [("mesh.tensor", "4 does not divide model.kv_heads 2")]

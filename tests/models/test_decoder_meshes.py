"""The decoder on meshes: every layout updates like one device, its kernels pass the fence, and its cache is sharded."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decoder_fixtures import opened
from toys import regression_task

from jaxops.core.mesh import make_mesh
from jaxops.core.random import example_keys
from jaxops.core.sharding import axes_in, parameter_shardings, place
from jaxops.core.sums import Sum
from jaxops.models.decoder.architecture import Architecture, Rope
from jaxops.models.decoder.decoder import Decoder
from jaxops.run.fence import require_constrained_kernels
from jaxops.testing import check, compare_layouts

CUBE = {"data": 2, "fsdp": 2, "tensor": 2}
GEMMA = Architecture(
    vocab=100,
    dim=32,
    kv_heads=2,
    hidden=48,
    layers=3,
    norm="rms_one_plus",
    post_norms=True,
    activation="gelu_tanh",
    rope=Rope(theta=100.0, window_theta=20.0),
    window=4,
    pattern=("window", "full"),
    qk_norm=True,
    attention_cap=5.0,
    final_cap=3.0,
    embed_scale=True,
    dropout=0.1,
    remat="dots",
)
GPT2 = Architecture(
    vocab=100,
    dim=32,
    length=16,
    norm="layer",
    activation="gelu_tanh",
    gated=False,
    positions="learned",
    qkv_bias=True,
    out_bias=True,
    mlp_bias=True,
    tied=False,
    remat="full",
)


class Packed:
    """Rows of two random texts each, with padding between them."""

    examples = 10**6

    def __init__(self, vocab, length=12):
        self.vocab, self.length = vocab, length

    def batch(self, cursor, size):
        rng = np.random.default_rng(cursor)
        cut = rng.integers(3, self.length - 3, (size, 1))
        at = np.arange(self.length)[None]
        segment = np.where(at < cut, 1, np.where(at == cut, 0, 2))
        return {
            "id": np.arange(cursor, cursor + size, dtype=np.int32),
            "tokens": rng.integers(0, self.vocab, (size, self.length)).astype(np.int32),
            "segment": segment.astype(np.int32),
            "position": np.where(segment == 2, at - cut - 1, np.where(segment == 1, at, 0)).astype(np.int32),
        }


def next_token(model):
    """The negative log likelihood of each next token of the same text, from whole logits."""

    def objective(params, batch, key):
        where = batch["tokens"], batch["segment"], batch["position"]
        hidden = model.hidden(params, *where, example_keys(key, batch["id"]))
        logprobs = jax.nn.log_softmax(model.logits(params, hidden[:, :-1]), axis=-1)
        nll = -jnp.take_along_axis(logprobs, batch["tokens"][:, 1:, None], axis=-1)[..., 0]
        same = (batch["segment"][:, 1:] == batch["segment"][:, :-1]) & (batch["segment"][:, 1:] > 0)
        mask = same.astype(jnp.float32)
        return {"loss/nll": Sum((nll * mask).sum(), mask.sum())}

    return objective


def task_of(architecture, length=12):
    model = Decoder(architecture)
    source = Packed(architecture.vocab, length)
    return dataclasses.replace(regression_task(next_token(model), source), model=model, rules=model.rules)


@pytest.mark.parametrize("architecture", [GEMMA, GPT2], ids=["gemma", "gpt2"])
def test_every_kernel_is_gathered_over_fsdp_where_it_is_used(architecture):
    task = task_of(architecture)
    require_constrained_kernels(task, make_mesh(**CUBE), batch=task.source.batch(0, 8))


@pytest.mark.slow
@pytest.mark.parametrize("length", [12, 130], ids=["short", "attention in blocks"])
def test_a_cube_updates_like_one_device(length):
    check(task_of(GEMMA, length), [CUBE], [4], batch_size=16, steps=2, gradient=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [GEMMA, GPT2], ids=["gemma", "gpt2"])
def test_every_layout_updates_like_one_device(architecture):
    layouts = [{"data": 8}, {"fsdp": 8}, {"fsdp": 4, "tensor": 2}, {"replica": 2, "fsdp": 4}, CUBE]
    check(task_of(architecture), [*layouts, {"fsdp": 2, "tensor": 2, "sequence": 2}], [1, 4], gradient=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
def test_gradients_are_right_at_sizes_where_unmarked_kernels_gave_wrong_ones(tied):
    sizes = {"vocab": 2000, "dim": 256, "layers": 2, "heads": 8, "kv_heads": 4, "hidden": 512, "tied": tied}
    found = compare_layouts(task_of(Architecture(**sizes), 64), [CUBE], [1], batch_size=8, steps=1)
    assert found[0].gradient < 1e-5


def test_every_kernel_has_a_rule_and_vectors_are_whole():
    for architecture in (GEMMA, GPT2):
        decoder = Decoder(architecture)
        for placement in place(decoder.shapes, decoder.rules, make_mesh(**CUBE)):
            kernel = placement.path.endswith(("kernel", "embedding"))
            assert ("fsdp" in axes_in(placement.spec)) == kernel, placement
            assert kernel or not axes_in(placement.spec)
            assert not placement.dropped


def test_padding_of_the_vocabulary_is_told():
    assert Decoder(GPT2).padding == {
        "embed/embedding": "28 of 128 rows are padding",
        "head/kernel": "28 of 128 rows are padding",
    }
    assert Decoder(dataclasses.replace(GEMMA, vocab=256)).padding == {}


@pytest.mark.parametrize("name", ["qwen2", pytest.param("gemma2", marks=pytest.mark.slow)])
def test_a_cache_on_a_mesh_gives_the_logits_of_one_device(name):
    decoder, params, tokens, expected = opened(name)
    mesh = make_mesh(**CUBE)
    tokens = jnp.asarray(np.concatenate([tokens, tokens[:1]]))
    expected = np.concatenate([expected, expected[:1]])
    lengths = jnp.asarray([3, 5, 4, 2])
    with jax.set_mesh(mesh):
        auto = lambda fn: jax.jit(jax.sharding.auto_axes(fn, out_sharding=jax.P()))
        placed = jax.tree.map(jax.device_put, params, parameter_shardings(params, decoder.rules, mesh))
        prefill = auto(lambda params, tokens, lengths: decoder.prefill(params, tokens, lengths, 16))
        cache, logits = prefill(placed, tokens[:, :5], lengths)
        step, rows = auto(decoder.decode), jnp.arange(4)
        for moved in range(3):
            place = lengths + moved
            found = np.asarray(logits)[:, : decoder.real_vocab]
            np.testing.assert_allclose(found, expected[np.arange(4), np.asarray(place) - 1], rtol=0, atol=2e-5)
            cache, logits = step(placed, cache, tokens[rows, place], place)

"""Samples on other meshes and shapes: logits within 1e-5, and tokens alike until the first near-tie."""

import jax
import numpy as np
import pytest
from hlo_text import operations
from sampling import VOCAB, full, prompts, tiny

from jaxops.core.mesh import make_mesh
from jaxops.core.random import sampling_keys
from jaxops.core.sharding import named_leaves
from jaxops.models.decoder.unrolled import Unrolled
from jaxops.rl.options import SampleOptions
from jaxops.rl.sample import Sampler

ERROR = 1e-5
OPTIONS = SampleOptions(max_tokens=10)
LAYOUTS = {
    "one": {"devices": jax.devices()[:1]},
    "data 8": {"data": 8},
    "2 x 2 x 2": {"data": 2, "fsdp": 2, "tensor": 2},
}


def sampled(layout, slots=8, form=lambda decoder: decoder):
    decoder, params = tiny()
    sampler = Sampler(form(decoder), make_mesh(**LAYOUTS[layout]), slots=slots, room=32, segment=4, options=OPTIONS)
    handed = sampler.handoff(params)
    return handed, sampler(handed, prompts(9, longest=14), seed=6)


@pytest.fixture(scope="module")
def one():
    return sampled("one")[1]


def gaps(prompt, completion, row):
    """By how much the sum of logprob and noise that was largest exceeds the second, at each position."""
    _, logits = full(tiny()[1], prompt, completion)
    logprobs = np.asarray(jax.nn.log_softmax(logits))
    name = [np.asarray([number], np.uint32) for number in prompt.name]
    key = sampling_keys(6, 0, *map(jax.numpy.asarray, name))[0]
    noise = [
        jax.random.gumbel(jax.random.fold_in(key, at), (128,), "float32", mode="high") for at in range(len(completion))
    ]
    sums = np.sort(logprobs + np.asarray(noise)[:, :VOCAB])
    return sums[:, -1] - sums[:, -2], (logprobs + np.asarray(noise)[:, :VOCAB]).argmax(-1)


def test_the_token_is_the_argmax_of_logprob_and_noise_of_seed_name_and_position(one):
    for row, prompt in enumerate(prompts(9, longest=14)[:4]):
        gap, best = gaps(prompt, one.completion(row), row)
        sure = gap > 2 * ERROR
        assert sure.mean() > 0.9
        np.testing.assert_array_equal(one.completion(row)[sure], best[sure])


@pytest.mark.parametrize(
    ("layout", "slots", "form"),
    [
        ("data 8", 8, Unrolled),
        ("2 x 2 x 2", 8, Unrolled),
        ("2 x 2 x 2", 8, lambda decoder: decoder),
        ("one", 3, Unrolled),
    ],
    ids=["data 8", "2 x 2 x 2", "2 x 2 x 2 stacked", "three slots"],
)
def test_other_meshes_and_shapes_sample_the_same_until_a_near_tie(one, layout, slots, form):
    handed, found = sampled(layout, slots, form)
    same = 0
    for row, prompt in enumerate(prompts(9, longest=14)):
        ours, theirs = one.completion(row), found.completion(row)
        differ = np.flatnonzero(ours[: len(theirs)] != theirs[: len(ours)])
        until = int(differ[0]) if differ.size else min(len(ours), len(theirs))
        if differ.size:
            assert gaps(prompt, ours, row)[0][until] < 2 * ERROR
        np.testing.assert_allclose(one.logprobs[row, :until], found.logprobs[row, :until], rtol=0, atol=ERROR)
        same += until
    assert same > 0.8 * one.lengths.sum()
    for path, leaf in named_leaves(handed):
        axes = {axis for entry in leaf.sharding.spec for axis in (entry or ())} | set(leaf.sharding.spec)
        assert "fsdp" not in axes, path
        if layout == "2 x 2 x 2" and path.endswith("kernel"):
            assert "tensor" in axes, path


def test_decoding_moves_neither_weights_nor_caches_between_devices():
    decoder, params = tiny()
    sampler = Sampler(Unrolled(decoder), make_mesh(data=8), slots=8, room=64, segment=4, options=OPTIONS)
    programs = sampler._programs
    with programs._on_mesh():
        given = sampler.handoff(params), programs._empty(), np.zeros(8, bool)
        text = programs._decode.lower(*given).compile().as_text()
    kinds = {"all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter"}
    moved = [op.largest for op in operations(text) if op.kind.removesuffix("-start") in kinds]
    assert moved and max(moved) <= 8 * 4  # what was sampled in a segment

"""Samples of a tiny decoder: the distribution, the noise, what ends them, and that nothing else changes them."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sampling import full, prompts, tiny

from jaxops.core.compiles import Compiles
from jaxops.core.failures import RunFailed, UserError
from jaxops.core.flops import count_flops
from jaxops.core.interrupt import Interrupted
from jaxops.core.mesh import make_mesh
from jaxops.core.sharding import named_leaves
from jaxops.data.text.byte_tokenizer import ByteTokenizer
from jaxops.rl.options import SampleOptions
from jaxops.rl.sample import Sampler
from jaxops.rl.sampled import Prompt, copies

ONE = {"devices": jax.devices()[:1]}


class Bigrams:
    """A model of one's own with the three methods and nothing else: a table of logits by the last token."""

    def empty_cache(self, batch, room, dtype):
        return jnp.zeros((1, batch), dtype)

    def prefill(self, params, tokens, lengths, room):
        last = jnp.take_along_axis(tokens, lengths[:, None] - 1, axis=1)[:, 0]
        return jnp.zeros((1, tokens.shape[0])), params[last]

    def decode(self, params, cache, token, place):
        return cache, params[token]


def sampler_of(options=SampleOptions(max_tokens=12), mesh=None, **changes):
    decoder, params = tiny()
    given = {"slots": 4, "room": 64, "segment": 5, "ends": (0, 1), **changes}
    sampler = Sampler(decoder, mesh or make_mesh(**ONE), options=options, **given)
    return sampler, sampler.handoff(params)


@pytest.fixture(scope="module")
def plain():
    return sampler_of()


@pytest.fixture(scope="module")
def answers(plain):
    sampler, params = plain
    return sampler(params, prompts(11), seed=3)


def rows_equal(found, row, expected, other):
    for name in ("tokens", "logprobs", "plain", "lengths"):
        np.testing.assert_array_equal(getattr(found, name)[row], getattr(expected, name)[other])
    assert found.stopped[row] == expected.stopped[other]


def test_end_tokens_are_in_the_mask_and_end_the_text(answers):
    assert set(answers.stopped) == {"eos", "length"}
    for row, stopped in enumerate(answers.stopped):
        text = answers.completion(row)
        assert not np.isin(text[:-1], (0, 1)).any()
        assert (text[-1] in (0, 1)) == (stopped == "eos")
        assert stopped == "eos" or len(text) == 12
        np.testing.assert_array_equal(answers.mask[row], np.arange(12) < len(text))
        assert not answers.tokens[row, len(text) :].any() and not answers.logprobs[row, len(text) :].any()


def test_the_model_of_these_tests_is_far_from_flat_and_reads_the_whole_text(answers):
    probs = np.exp(answers.plain[answers.mask])
    assert probs.max() > 0.5 and np.median(probs) > 3 / 60
    prompt = prompts(1, shortest=20)[0]
    other = dataclasses.replace(prompt, ids=[(prompt.ids[0] + 1) % 60, *prompt.ids[1:]])
    a, b = (full(tiny()[1], one, answers.completion(0))[0] for one in (prompt, other))
    assert np.abs(a - b).max() > 1e-2


def test_logprobs_are_those_of_the_training_loss_on_the_same_text(answers):
    for row, prompt in enumerate(prompts(11)):
        expected, _ = full(tiny()[1], prompt, answers.completion(row))
        size = answers.lengths[row]
        np.testing.assert_allclose(answers.logprobs[row, :size], expected, rtol=0, atol=1e-5)
        np.testing.assert_array_equal(answers.plain, answers.logprobs)


def test_bfloat16_stays_near_float32(answers):
    sampler, params = sampler_of(dtype=jnp.bfloat16)
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(params))
    found = sampler(params, prompts(11), seed=3)
    first = found.tokens[:, 0] == answers.tokens[:, 0]
    assert first.mean() > 0.7
    np.testing.assert_allclose(found.plain[first, 0], answers.plain[first, 0], atol=0.3)


def test_without_temperature_every_token_is_the_argmax_of_the_full_forward():
    sampler, params = sampler_of(SampleOptions(max_tokens=20, temperature=0))
    asked = prompts(5, seed=1)
    found = sampler(params, asked, seed=0)
    for row, prompt in enumerate(asked):
        logprobs, logits = full(tiny()[1], prompt, found.completion(row))
        best = np.sort(logits)[:, -2:]
        sure = best[:, 1] - best[:, 0] > 2e-5
        np.testing.assert_array_equal(found.completion(row)[sure], logits.argmax(-1)[sure])
        assert sure.mean() > 0.9
        np.testing.assert_array_equal(found.logprobs[row], 0)
        np.testing.assert_allclose(found.plain[row, : len(logprobs)], logprobs, atol=1e-5)


def test_filtered_logprobs_are_renormalised_over_what_is_left():
    options = SampleOptions(max_tokens=8, temperature=0.8, top_k=6, top_p=0.9)
    sampler, params = sampler_of(options)
    found = sampler(params, prompts(4), seed=5)
    for row, prompt in enumerate(prompts(4)):
        plain, logits = full(tiny()[1], prompt, found.completion(row))
        np.testing.assert_allclose(found.plain[row, : len(plain)], plain, atol=1e-5)
        for at, (token, scores) in enumerate(zip(found.completion(row), logits.astype(np.float64), strict=True)):
            p = np.exp((scores - scores.max()) / 0.8)
            p[np.argsort(-p)[6:]] = 0
            p /= p.sum()
            order = np.argsort(-p)
            p[order[np.cumsum(p[order]) - p[order] >= 0.9]] = 0
            np.testing.assert_allclose(found.logprobs[row, at], np.log(p[token] / p.sum()), atol=2e-5)


@pytest.mark.parametrize("mesh", [ONE, {"data": 8}], ids=["one", "data 8"])
def test_a_model_of_ones_own_and_its_exact_joint_probabilities(mesh):
    vocab, count = 5, 4096
    table = np.random.default_rng(2).standard_normal((vocab, vocab)).astype(np.float32)
    options = SampleOptions(max_tokens=2, temperature=0.7)
    sampler = Sampler(Bigrams(), make_mesh(**mesh), slots=512, room=16, segment=2, options=options)
    found = sampler(sampler.handoff(table), copies([Prompt([3, 1], 7)], count), seed=11)
    seen = np.bincount(found.tokens[:, 0] * vocab + found.tokens[:, 1], minlength=vocab**2)
    p = np.exp(table.astype(np.float64) / 0.7)
    p /= p.sum(-1, keepdims=True)
    expected = count * (p[1][:, None] * p).reshape(-1)
    chi = np.sum((seen - expected) ** 2 / expected)
    assert chi < vocab**2 - 1 + 4 * np.sqrt(2 * (vocab**2 - 1))
    np.testing.assert_allclose(found.logprobs[:, 0], np.log(p[1, found.tokens[:, 0]]), atol=1e-5)


def test_order_neighbours_refill_and_resume_change_no_bit(plain, answers):
    sampler, params = plain
    asked = prompts(11)
    order = np.random.default_rng(0).permutation(11)
    for which in (order, [7], [9, 2], range(6, 11)):
        found = sampler(params, [asked[row] for row in which], seed=3)
        for row, other in enumerate(which):
            rows_equal(found, row, answers, other)


def test_the_length_of_a_segment_changes_no_bit(answers):
    sampler, params = sampler_of(segment=2)
    found = sampler(params, prompts(11), seed=3)
    for row in range(11):
        rows_equal(found, row, answers, row)


def test_seed_step_and_every_part_of_the_name_change_the_noise(plain):
    sampler, params = plain
    prompt = Prompt([5, 6, 7], 4)
    names = [prompt, *(dataclasses.replace(prompt, **{name: 1}) for name in ("example", "copy", "redraw", "turn"))]
    found = [sampler(params, [one], seed=0).completion(0).tolist() for one in names]
    found += [sampler(params, [prompt], seed=0, step=1).completion(0).tolist()]
    found += [sampler(params, [prompt], seed=1).completion(0).tolist()]
    assert all(a != b for a, b in itertools.combinations(found, 2))
    assert sampler(params, [prompt], seed=0).completion(0).tolist() == found[0]
    with pytest.raises(ValueError, match="two prompts have one name"):
        sampler(params, [prompt, prompt], seed=0)


def test_nothing_is_compiled_after_the_first_call_of_each_bucket(plain, answers):
    sampler, params = plain
    params = sampler.handoff(params)
    with Compiles().watching() as compiles:
        compiles.warm()
        sampler.handoff(params)
        sampler(params, prompts(23, seed=8), seed=9, step=4)
    assert not compiles.count


def test_programs_are_named_and_count_the_products_of_every_token(plain):
    sampler, params = plain
    with jax.set_mesh(sampler.mesh):
        fill, decode = sampler.programs(params, prompts=9, length=20)
        flops = [count_flops(one.fn, *one.args).total for one in (fill, decode)]
    assert (fill.name, decode.name) == ("sample_fill", "sample_decode") == (fill.fn.__name__, decode.fn.__name__)
    assert (fill.times, decode.times) == (9, 3 * 12)
    layers = sum(x.size for path, x in named_leaves(params) if path.startswith("layers") and path.endswith("kernel"))
    attention = 2 * 2 * 2 * 32  # layers, products of queries and of probabilities, multiply and add, width of heads
    assert flops[0] == 2 * layers * 32 + attention * 32 * 32 + 2 * 128 * 32
    assert flops[1] == 4 * (2 * layers + attention * 64 + 2 * 128 * 32)


def test_a_long_queue_keeps_the_slots_busy():
    options = SampleOptions(max_tokens=40)
    sampler = Sampler(Bigrams(), make_mesh(**ONE), slots=4, room=128, segment=4, options=options, ends=(0,))
    params = np.random.default_rng(1).standard_normal((60, 60)).astype(np.float32)
    lengths = np.random.default_rng(0).integers(2, 41, 40)
    asked = [dataclasses.replace(prompt, limit=int(size)) for prompt, size in zip(prompts(40), lengths, strict=True)]
    found = sampler(params, asked, seed=0)
    assert found.busy > 0.75
    cut = [size for size, why in zip(found.lengths - lengths, found.stopped, strict=True) if why == "length"]
    assert cut and not any(cut)


def test_the_room_bounds_prompt_and_completion(plain):
    sampler, params = plain
    found = sampler(params, [Prompt([5] * 60, 0), Prompt([5] * 63, 1)], seed=0)
    assert found.lengths[0] <= 4 and found.lengths[1] == 1
    expected, _ = full(tiny()[1], Prompt([5] * 60, 0), found.completion(0))
    np.testing.assert_allclose(found.logprobs[0, : len(expected)], expected, atol=1e-5)
    with pytest.raises(UserError, match="prompt 1: its 64 tokens leave no room for an answer among 64 tokens"):
        sampler(params, [Prompt([5], 0), Prompt([5] * 64, 1)], seed=0)
    with pytest.raises(UserError, match="seed -1 and step 0 must be whole numbers"):
        sampler(params, [Prompt([5], 0)], seed=-1)
    with pytest.raises(UserError, match="prompt 0: example, copy, redraw and turn must be whole numbers"):
        sampler(params, [Prompt([5], -3)], seed=0)
    with pytest.raises(UserError, match="prompt 0: it has no token"):
        sampler(params, [Prompt([], 0)], seed=0)


def test_no_prompts_are_no_completions(plain):
    assert plain[0](plain[1], [], seed=0).tokens.shape == (0, 12)


def test_an_interrupt_between_segments_leaves_the_sampler_as_it_was(plain, answers):
    sampler, params = plain
    polls = iter([False, False, True])
    with pytest.raises(Interrupted):
        sampler(params, prompts(11), seed=3, poll=lambda: next(polls))
    found = sampler(params, prompts(11), seed=3)
    for row in range(11):
        rows_equal(found, row, answers, row)


def test_weights_that_are_no_numbers_are_told(plain):
    sampler, params = plain
    broken = jax.tree.map(lambda x: x * np.float32(np.nan), params)
    with pytest.raises(RunFailed, match="logits are not finite for prompt 0 \\(example 100\\), 0 tokens after it"):
        sampler(broken, prompts(2), seed=0)


BYTES = ByteTokenizer()


@pytest.fixture(scope="module")
def written():
    table = 2 * np.random.default_rng(4).standard_normal((BYTES.vocab,) * 2).astype(np.float32)
    asked = [Prompt(BYTES.encode(text), at) for at, text in enumerate(["one", "two, three", "€"])]

    def run(stop=(), watch=None, segment=7):
        options = SampleOptions(max_tokens=40, stop=stop)
        given = {"slots": 2, "room": 64, "segment": segment, "tokenizer": BYTES}
        sampler = Sampler(Bigrams(), make_mesh(**ONE), options=options, **given)
        return sampler(sampler.handoff(table), asked, seed=2, watch=watch)

    return run


def test_texts_are_decoded_and_streamed(written):
    parts = {}
    found = written(watch=lambda row, new: parts.setdefault(row, []).append(new))
    assert found.texts is not None
    for row, text in enumerate(found.texts):
        assert text == BYTES.decode(found.completion(row), skip_special=True) == "".join(parts[row])
        assert len(parts[row]) > 1


def test_stops_end_texts_over_the_borders_of_tokens_and_what_follows_is_dropped(written):
    free = written()
    stop = free.texts[0][3:5]
    for segment in (1, 7):
        found = written(stop=(stop, "never to be seen"), segment=segment)
        for row, text in enumerate(free.texts):
            at = text.find(stop)
            if at < 0:
                assert found.texts[row] == text and found.stopped[row] == free.stopped[row]
                assert found.dropped[row] == 0
                continue
            assert (found.texts[row], found.stopped[row]) == (text[:at], "stop")
            kept = found.completion(row)
            np.testing.assert_array_equal(kept, free.completion(row)[: len(kept)])
            np.testing.assert_array_equal(found.logprobs[row, : len(kept)], free.logprobs[row, : len(kept)])
            assert stop in BYTES.decode(kept) and stop not in BYTES.decode(kept[:-1])
            assert found.dropped[row] == 0 if segment == 1 else found.dropped[row] >= 0
        assert found.stopped[0] == "stop" and (segment == 1 or found.dropped.sum() > 0)


def test_stops_without_a_tokenizer_are_refused():
    with pytest.raises(UserError, match="stops are texts, so they need the tokenizer"):
        sampler_of(SampleOptions(stop=("x",)))
    with pytest.raises(UserError, match="top_p: expected a share"):
        sampler_of(SampleOptions(top_p=0))
    with pytest.raises(UserError, match="slots is too small: 0"):
        sampler_of(slots=0)


def test_a_distribution_that_is_no_number_is_told():
    sampler, params = sampler_of(SampleOptions(max_tokens=3), slots=1)
    sampler._programs._options = SampleOptions(max_tokens=3, temperature=1e-50)  # past the checks
    with pytest.raises(RunFailed, match="temperature, top_k, top_p and min_p leave is not finite for prompt 0"):
        sampler(params, prompts(1), seed=0)


def test_what_is_asked_for_may_be_far_more_than_there_is_room_for():
    sampler, params = sampler_of(SampleOptions(max_tokens=2**31 - 1), room=16, slots=2, segment=10**11, ends=())
    found = sampler(params, [Prompt([1, 2, 3], example=0)], seed=0)
    assert found.tokens.shape == (1, 15) and found.lengths.tolist() == [13]
    with pytest.raises(UserError, match="slots is too large"):
        sampler_of(slots=10**11)

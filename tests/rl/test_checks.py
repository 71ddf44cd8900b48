"""Known traps of RLHF that no other test holds; each test names the row of the table in docs/rlhf.md."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxops.core.accumulate import build_gradients
from jaxops.core.failures import UserError
from jaxops.core.mesh import batch_axes, make_mesh
from jaxops.core.sharding import named_leaves, parameter_shardings
from jaxops.core.step import cast
from jaxops.core.sums import finalize
from jaxops.models.decoder.architecture import Architecture
from jaxops.models.decoder.decoder import Decoder
from jaxops.models.policy import PolicyModel
from jaxops.rl.algorithms import Rollout
from jaxops.rl.collect import Collector
from jaxops.rl.groups import Grpo
from jaxops.rl.kl import Kl
from jaxops.rl.ppo import Ppo
from jaxops.rl.rollout import rollout_of
from jaxops.rl.sampled import Growing, Prompt
from jaxops.rl.step import PolicyStep
from jaxops.run.build import load_config

VOCAB, WIDTH, LONGEST, ROWS = 20, 6, 5, 8
T = 0.7


@functools.cache
def models(value="trunk", dropout=0.5):
    """A model whose value says something, and its parameters; the policy is not its reference any more."""
    decoder = Decoder(Architecture(vocab=VOCAB, dim=16, heads=2, layers=1, hidden=32, length=32, dropout=dropout))
    model = PolicyModel(decoder, value=value, reference=True)
    params = model.init(jax.random.key(0))
    params["value"]["score"] = {"kernel": jax.random.normal(jax.random.key(1), (16, 1)), "bias": jnp.ones(1)}
    params["reference"] = decoder.init(jax.random.key(2))
    return model, params


def rollout(width=WIDTH, longest=LONGEST, junk=0):
    """Eight completions of 0 to 5 tokens after prompts of 1 to 6; `junk` stands where nothing was said."""
    rng = np.random.default_rng(0)
    tokens, completion = np.full((ROWS, width + longest), junk, np.int32), np.full((ROWS, longest), junk, np.int32)
    length, counts = np.array([6, 1, 3, 2, 5, 4, 3, 6], np.int32), np.array([5, 3, 1, 0, 2, 4, 5, 3], np.int32)
    for row in range(ROWS):
        said = rng.integers(1, VOCAB, length[row] + counts[row])
        tokens[row, : len(said)] = said
        completion[row, : counts[row]] = said[length[row] :]
    mask = (np.arange(longest) < counts[:, None]).astype(np.float32)
    found = {"tokens": tokens, "length": length, "end": length + counts, "completion": completion, "mask": mask}
    return {name: jnp.asarray(x) for name, x in found.items()}


def measured(model, params, batch):
    """Log-probabilities of policy and reference, entropies, and values, [rows, longest]."""
    scores = model.scores(params, batch, T, model.hidden(params, batch))
    return {
        "policy": scores.logprobs,
        "entropy": scores.entropy,
        "reference": model.reference_logprobs(params, batch, T),
        "value": model.values(params, batch),
    }


run = jax.jit(measured, static_argnums=0)


@pytest.mark.parametrize("width, longest, junk", [(WIDTH + 4, LONGEST + 3, 0), (WIDTH, LONGEST, 7)])
def test_3_padding_of_any_amount_and_id_changes_no_score(width, longest, junk):
    model, params = models()
    plain, batch = run(model, params, rollout()), rollout(width, longest, junk)
    padded, mask = run(model, params, batch), np.asarray(rollout()["mask"]) > 0
    for name, x in plain.items():
        np.testing.assert_allclose(np.asarray(padded[name])[:, :LONGEST][mask], np.asarray(x)[mask], atol=1e-5)


def test_2_4_7_masks_follow_from_lengths_and_hold_the_ending_token():
    """Token 0 is what padding is filled with, and a token like any other where it was sampled."""
    growing = Growing(3, LONGEST)
    for row, (said, why) in enumerate((([4, 0, 0], "eos"), ([0], "stop"), ([1, 2, 3, 4, 0], "length"))):
        growing.add(row, np.array(said, np.int32), -np.ones(len(said)), -np.ones(len(said)))
        growing.stopped[row] = why
    prompts = [Prompt([9, 0], 0), Prompt([0], 1), Prompt([8, 8, 8], 2)]
    found = rollout_of(prompts, growing.whole(None, 1.0), WIDTH, LONGEST)
    np.testing.assert_array_equal(found["mask"].sum(axis=1), [3, 1, 5])
    np.testing.assert_array_equal(found["end"] - found["length"], [3, 1, 5])
    np.testing.assert_array_equal(found["ended"], [True, True, False])  # what missing_eos takes its penalty for
    np.testing.assert_array_equal(found["sampled"] != 0, found["mask"] > 0)
    assert not found["tokens"][np.arange(WIDTH + LONGEST) >= found["end"][:, None]].any()  # a valid id, so no resize


CONFIG = """\
task: policy
model: {weights: runs/sft}
rewards: [{kind: length, per_token: 0.1}]
sample: {max_tokens: 8}
data: {kind: prompts, path: prompts.jsonl, max_tokens: 16}
run: {steps: 1}
"""


@pytest.mark.parametrize("change", ["sample.top_k=5", "sample.top_p=0.9", "sample.min_p=0.1", "sample.temperature=0"])
def test_5_what_is_learnt_from_is_drawn_from_the_whole_distribution(tmp_path, change):
    path = tmp_path / "policy.yaml"
    path.write_text(CONFIG)
    assert load_config(path).config.sample.temperature == 1
    with pytest.raises(UserError, match=change.partition("=")[0]):
        load_config(path, [change])


def test_15_policy_and_reference_are_divided_by_the_temperature_of_sampling():
    model, params = models()
    batch = rollout()
    found = run(model, params, batch)
    position = jnp.broadcast_to(jnp.arange(WIDTH + LONGEST), batch["tokens"].shape)
    segment = (position < batch["end"][:, None]).astype(jnp.int32)
    for name in ("policy", "reference"):
        hidden = model.decoder.hidden(params[name], batch["tokens"], segment, position)
        logits = np.asarray(model.decoder.logits(params[name], hidden), np.float64)
        logits = logits[..., :VOCAB] / T
        logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        for row, at in zip(*np.nonzero(np.asarray(batch["mask"])), strict=True):
            before, token = batch["length"][row] - 1 + at, batch["completion"][row, at]
            assert float(found[name][row, at]) == pytest.approx(logprobs[row, before, token], abs=1e-5)


@pytest.mark.parametrize("kind", ["head", "trunk"])
def test_16_a_fresh_value_says_nothing_and_its_trunk_is_the_policy_s(kind):
    model = PolicyModel(models()[0].decoder, value=kind)
    params = model.init(jax.random.key(3))
    assert not np.asarray(model.values(params, rollout(), beyond=1)).any()
    assert dict(named_leaves(params["reference"])).keys() == dict(named_leaves(params["policy"])).keys()
    for path, x in named_leaves(params["value"]):
        if not path.startswith("score/"):
            np.testing.assert_array_equal(x, dict(named_leaves(params["policy"]))[path])


def ready(batch):
    """What an update reads, with advantages and an old policy that is not far."""
    rng = np.random.default_rng(1)
    more = {name: jnp.asarray(rng.normal(size=batch["mask"].shape), jnp.float32) for name in ("advantages", "returns")}
    for name, of in (("old", "policy"), ("reference", "reference"), ("values", "value")):
        noise = jnp.asarray(rng.normal(size=batch["mask"].shape) * 0.05, jnp.float32)
        more[name] = run(*models(), batch)[of] + noise
    rows = {"policy_on": jnp.ones(ROWS), "coefficient": jnp.full(ROWS, 0.1), "id": jnp.arange(ROWS, dtype=jnp.int32)}
    return {**batch, **more, **rows}


def test_18_an_update_has_no_dropout():
    """The decoder has a rate of one half, yet a key changes nothing, and an unmoved policy has ratios of 1."""
    model, params = models()
    objective = jax.jit(Ppo().objective(model, T, LONGEST))
    batch = ready(rollout())
    batch["old"] = run(model, params, batch)["policy"]
    first, second, without = (
        finalize(objective(params, batch, key)) for key in (*jax.random.split(jax.random.key(5)), None)
    )
    assert first == second == without and first["ratio_max"] == pytest.approx(1, abs=1e-6)
    assert first["clip_fraction"] == 0 and model.decoder.config.dropout == 0.5


def test_21_26_27_34_the_defaults_are_those_of_the_papers():
    ppo = Ppo()
    assert (ppo.gae.gamma, ppo.gae.lambda_, ppo.clip, ppo.value_clip, ppo.value_weight) == (1.0, 0.95, 0.2, 0.2, 0.1)
    assert (ppo.dual_clip, ppo.whiten, ppo.whiten_rewards, ppo.kl) == (None, "biased", "none", Kl(coef=0.05))


def test_22_every_epoch_has_a_fresh_order_of_all_completions():
    step = object.__new__(PolicyStep)
    step.algorithm, step.collector = Ppo(minibatches=4), object.__new__(Collector)
    step.collector.seed = 3
    orders = []
    for at, epoch in ((0, 0), (0, 1), (1, 0), (1, 1)):
        parts = step._minibatches({"id": jnp.arange(32)}, jnp.int32(at), jnp.int32(epoch))
        orders.append(tuple(int(x) for part in parts for x in part["id"]))
        assert [len(part["id"]) for part in parts] == [8] * 4 and sorted(orders[-1]) == list(range(32))
    assert len(set(orders)) == 4
    again = step._minibatches({"id": jnp.arange(32)}, jnp.int32(1), jnp.int32(1))
    assert tuple(int(x) for part in again for x in part["id"]) == orders[-1]


@pytest.mark.parametrize("value", ["head", "trunk"])
def test_1_31_a_value_is_of_the_whole_text_before_its_token_and_of_nothing_after(value):
    model, params = models(value)
    values = jax.jit(functools.partial(model.values, beyond=1))
    batch = rollout()
    plain, row = np.asarray(values(params, batch)), 0  # its prompt has six tokens, its completion five
    for at in range(LONGEST):
        place = int(batch["length"][row]) + at
        other = (batch["tokens"][row, place] + 1) % VOCAB
        changed = {**batch, "tokens": batch["tokens"].at[row, place].set(other)}
        moved = np.abs(np.asarray(values(params, changed)) - plain)[row] > 1e-6
        np.testing.assert_array_equal(moved, np.arange(LONGEST + 1) > at)
    prompt = {**batch, "tokens": batch["tokens"].at[row, 0].set((batch["tokens"][row, 0] + 1) % VOCAB)}
    assert (np.abs(np.asarray(values(params, prompt)) - plain)[row] > 1e-6).all()


GRPO, SLOW = Grpo(kl=Kl(in_="loss", estimator="k3", coef=0.1)), pytest.mark.slow


@pytest.mark.parametrize(
    "algorithm, axes",
    [
        (GRPO, {"data": 8}),
        pytest.param(GRPO, {}, marks=SLOW),
        pytest.param(Grpo(kind="dr_grpo"), {"data": 8}, marks=SLOW),
        pytest.param(Ppo(entropy=0.01), {}, marks=SLOW),
        pytest.param(Ppo(entropy=0.01), {"data": 2, "fsdp": 2, "tensor": 2}, marks=SLOW),
    ],
)
def test_33_microbatches_and_devices_change_no_gradient(algorithm, axes):
    """Completions have no to five tokens, so a mean of the means of parts would show."""
    model, params = models()
    objective = algorithm.objective(model, T, LONGEST)
    batch = {name: jnp.concatenate([x, x[::-1], x, x]) for name, x in ready(rollout()).items()}
    found = gradients(objective, params, batch, model.rules, 4, axes)
    wanted = gradients(objective, params, batch, model.rules, 1, {})
    largest = max(np.abs(x).max() for x in jax.tree.leaves(wanted))
    assert largest > 1e-3
    for (path, x), (_, y) in zip(named_leaves(found), named_leaves(wanted), strict=True):
        assert np.abs(x - y).max() <= 1e-6 * largest, path


def gradients(objective, params, batch, rules, accumulation, axes):
    mesh = make_mesh(**axes) if axes else make_mesh(data=1, devices=jax.devices()[:1])
    run = build_gradients(
        lambda both, batch, key: objective({**both[0], **both[1]}, batch, key), mesh, accumulation=accumulation
    )

    @jax.jit
    def whole(params, batch):
        batch = jax.tree.map(lambda x: jax.sharding.reshard(x, P(batch_axes(mesh))), batch)
        return run(params, {}, None, batch, jax.random.key(0))[1]

    with jax.set_mesh(mesh):
        placed = jax.device_put(jax.device_get(params), parameter_shardings(params, rules, mesh))
        return jax.device_get(jax.block_until_ready(whole(placed, jax.device_get(batch))))


def test_34_the_explained_variance_is_that_of_the_tokens_of_the_mask():
    rng = np.random.default_rng(2)
    mask = np.asarray(rollout()["mask"])
    values = rng.normal(size=(ROWS, LONGEST + 1)).astype(np.float32)
    scores, zeros = rng.normal(size=ROWS).astype(np.float32), np.zeros_like(mask)
    counts = mask.sum(axis=1).astype(np.int32)
    asked = Rollout(mask, zeros, None, values, scores, np.ones(ROWS, np.float32), counts < 5, counts, jnp.float32(0))
    learnt = Ppo(kl=Kl(coef=0.0)).learnt(jax.tree.map(jnp.asarray, asked))
    returns, held = np.asarray(learnt.batch["returns"], np.float64)[mask > 0], values[:, :-1][mask > 0]
    assert learnt.sums["explained_variance"].value() == pytest.approx(
        1 - np.var(returns - held) / np.var(returns), rel=1e-4
    )


def test_37_log_probabilities_entropies_and_values_are_float32_under_bfloat16():
    model, params = models()
    half = run(model, cast(params, jnp.bfloat16), rollout())
    mask = np.asarray(rollout()["mask"]) > 0
    for name, x in run(model, params, rollout()).items():
        assert half[name].dtype == jnp.float32
        np.testing.assert_allclose(np.asarray(half[name])[mask], np.asarray(x)[mask], atol=0.15)
    assert len(np.unique(np.asarray(half["policy"])[mask])) == mask.sum()  # bfloat16 would make some of them equal

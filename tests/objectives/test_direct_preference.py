"""DPO, cDPO and IPO against numpy in float64 and against what TRL and OpenRLHF compute."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toy_language import Pairs, ToyLanguage, numpy_scores
from toys import mesh_of

from jaxops.core.fence import unconstrained_kernels
from jaxops.core.sharding import place
from jaxops.objectives.direct_preference import Dpo, Ipo, dpo, ipo, logprobs_of_pairs

PEERS = json.loads((pathlib.Path(__file__).parents[1] / "fixtures/preference/peers.json").read_text())
RNG = np.random.default_rng(0)


def array(x):
    return jnp.asarray(np.asarray(x), jnp.float32)


def sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x, np.float64)))


def test_losses_are_those_of_peers():
    mask = np.asarray(PEERS["mask"])
    sums = [(np.asarray(PEERS[name]) * mask).sum(-1) for name in ("policy", "reference")]
    ratios, tokens, beta, ones = array(sums[0] - sums[1]), array(mask.sum(-1)), PEERS["beta"], jnp.ones(len(mask))
    close = lambda mine, name: np.testing.assert_allclose(mine, PEERS[name], rtol=2e-6, err_msg=name)
    close(dpo(ratios, ones, beta), "trl_dpo")
    close(dpo(ratios, ones, beta), "openrlhf_dpo")
    close(dpo(ratios, ones - PEERS["label_smoothing"], beta), "openrlhf_cdpo")
    close(ipo(ratios, ones, beta, tokens, "token_mean"), "trl_ipo_token_mean")
    close(ipo(ratios, ones, beta, tokens, "sequence"), "openrlhf_ipo_sequence")
    assert not np.allclose(PEERS["trl_ipo_token_mean"], PEERS["openrlhf_ipo_sequence"], rtol=0.1)


def test_labels_mix_the_losses_of_both_orders():
    ratios, label, tokens = RNG.normal(0, 5, (32, 2)), RNG.random(32), RNG.integers(1, 9, (32, 2))
    h = 0.2 * (ratios[:, 0] - ratios[:, 1])
    expected = -label * np.log(sigmoid(h)) - (1 - label) * np.log(sigmoid(-h))
    np.testing.assert_allclose(dpo(array(ratios), array(label), 0.2), expected, rtol=3e-6)
    means = ratios / tokens
    for name, each in (("sequence", ratios), ("token_mean", means)):
        h = each[:, 0] - each[:, 1]
        expected = label * (h - 2.5) ** 2 + (1 - label) * (h + 2.5) ** 2
        found = ipo(array(ratios), array(label), 0.2, array(tokens), name)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_a_policy_that_is_its_reference_has_the_loss_of_no_preference():
    zero, one = jnp.zeros((3, 2)), jnp.ones(3)
    np.testing.assert_allclose(dpo(zero, one, 0.1), np.log(2), rtol=1e-6)
    np.testing.assert_allclose(ipo(zero, one, 0.1, jnp.ones((3, 2)), "sequence"), 25, rtol=1e-6)
    slope = jax.grad(lambda r: jnp.sum(dpo(r, one, 0.1)))(zero)
    np.testing.assert_allclose(slope, [[-0.05, 0.05]] * 3, rtol=1e-6)
    empty = ipo(zero, one, 0.1, jnp.zeros((3, 2)), "token_mean")  # a text without a trained token
    np.testing.assert_allclose(empty, 25, rtol=1e-6)


def given():
    model = ToyLanguage(soft_cap=2.0, tied=False)
    batch = jax.tree.map(jnp.asarray, Pairs().batch(0, 16))
    return model, model.init(jax.random.key(0)), batch


def numpy_logprobs(model, params, batch):
    """Sums of logprobs over trained tokens, [batch, 2], from full logits."""
    rows = {name: batch[name].reshape(-1, 12) for name in ("tokens", "targets", "segment", "position", "mask")}
    hidden = model.hidden(params, rows["tokens"], rows["segment"], rows["position"], None)
    targets, cap = np.asarray(rows["targets"]), model.soft_cap
    logprobs = numpy_scores(hidden, model.head(params), targets, model.real_vocab, cap)[0]
    return np.where(np.asarray(rows["mask"]) > 0, logprobs, 0).sum(1).reshape(-1, 2)


@pytest.mark.parametrize("config", [Dpo(beta=0.3, label_smoothing=0.1, chunk=16), Ipo(beta=0.3, chunk=16)], ids=str)
def test_the_objective_is_numpys(config):
    model, params, batch = given()
    found = jax.jit(config.build(model))(params, batch, None)
    policy = numpy_logprobs(model, params, batch)
    weight, label, reference = (np.asarray(batch[name], np.float64) for name in ("weight", "label", "reference"))
    rewards, better = config.beta * (policy - reference), lambda x: np.where(label > 0.5, x[:, 0], x[:, 1])
    difference, not_tied = rewards[:, 0] - rewards[:, 1], weight * (label != 0.5)
    if config.kind == "dpo":
        noisy = label * 0.8 + 0.1
        loss = -noisy * np.log(sigmoid(difference)) - (1 - noisy) * np.log(sigmoid(-difference))
    else:
        means = (policy - reference) / np.asarray((batch["mask"] > 0).sum(-1), np.float64)
        h, goal = means[:, 0] - means[:, 1], 1 / (2 * config.beta)
        loss = label * (h - goal) ** 2 + (1 - label) * (h + goal) ** 2
    expected = {
        f"loss/{config.kind}": (loss, weight),
        "accuracy": ((difference > 0) == (label > 0.5), not_tied),
        "reward_margin": (difference * np.sign(label - 0.5), not_tied),
        "reward_chosen": (better(rewards), not_tied),
        "reward_rejected": (better(rewards[:, ::-1]), not_tied),
        "logprob_chosen": (better(policy), not_tied),
        "logprob_rejected": (better(policy[:, ::-1]), not_tied),
    }
    assert set(found) == set(expected)
    for name, (each, w) in expected.items():
        np.testing.assert_allclose(found[name].total, (each * w).sum(), rtol=1e-5, atol=1e-4, err_msg=name)
        assert float(found[name].count) == pytest.approx(w.sum())


def test_logprobs_count_a_token_once_whatever_its_weight_and_no_padding():
    model, params, batch = given()
    run = jax.jit(lambda batch: logprobs_of_pairs(model, params, batch))
    plain = run(batch)
    np.testing.assert_allclose(plain, numpy_logprobs(model, params, batch), rtol=1e-5)
    heavy = run(batch | {"mask": 3 * batch["mask"]})
    np.testing.assert_array_equal(heavy, plain)
    wide = ("tokens", "targets", "segment", "position", "mask")
    wider = batch | {name: jnp.pad(batch[name], ((0, 0), (0, 0), (0, 5))) for name in wide}
    np.testing.assert_allclose(run(wider), plain, rtol=1e-5)


def test_no_gradient_reaches_the_reference():
    model, params, batch = given()
    objective = Dpo().build(model)
    loss = lambda reference: objective(params, batch | {"reference": reference}, None)["loss/dpo"].total
    np.testing.assert_array_equal(jax.grad(loss)(batch["reference"]), 0)


def test_the_fence_accepts_it():
    model, mesh, key = ToyLanguage(), mesh_of(data=2, fsdp=2, tensor=2), jax.random.key(0)
    placed = place(model.shapes, model.rules, mesh)
    objective, batch = Dpo().build(model), Pairs().batch(0, 16)
    assert unconstrained_kernels(objective, model.shapes, batch, key, mesh=mesh, placed=placed) == []

"""Policy losses and advantages agree with numbers that TRL, verl, OpenRLHF and rlax computed in float64.

The numbers are in tests/fixtures/policy/peers.json, recorded by make.py beside it. Where the others differ among
themselves, the option of ours that is each one's is named here, and in docs/rlhf.md.
"""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxops.objectives.policy import aggregated, clipped_surrogate, clipped_value_loss, kl_estimate
from jaxops.rl.advantages import generalised_advantages, group_advantages, whitened

PEERS = json.loads((pathlib.Path(__file__).parents[1] / "fixtures" / "policy" / "peers.json").read_text())
SET, RAW = PEERS["settings"], {name: np.array(x) for name, x in PEERS["inputs"].items()}
GIVEN = {name: jnp.asarray(x, jnp.float32) for name, x in RAW.items()}
CLIPS = {"low": SET["low"], "high": SET["high"]}
HOLED, RAGGED = RAW["holed"] > 0, RAW["ragged"] > 0


def close(mine, theirs, tolerance=2e-6):
    np.testing.assert_allclose(np.asarray(mine, np.float64), np.asarray(theirs), rtol=tolerance, atol=tolerance)


def value(sum_):
    return sum_.total / sum_.count


@functools.partial(jax.jit, static_argnames=("mask", "over", "dual", "beta", "longest"))
def loss_and_gradient(advantages, mask, over, dual=None, beta=0.0, longest=None):
    mask = GIVEN[mask]

    def loss(logprobs):
        found = clipped_surrogate(logprobs, GIVEN["old"], advantages, mask, **CLIPS, dual=dual).loss
        if beta:
            found = found + beta * kl_estimate(logprobs, GIVEN["reference"], "k3")
        return value(aggregated(found, mask, over, longest))

    return jax.value_and_grad(loss)(GIVEN["logprobs"])


def agree(found, recorded):
    close(found[0], recorded["loss"])
    close(found[1], recorded["gradient"])


@pytest.mark.parametrize(
    "kind, over", [("grpo", "completions"), ("bnpo", "tokens"), ("dr_grpo", "constant"), ("dapo", "tokens")]
)
@pytest.mark.parametrize(
    "extra, options", [("", {}), ("+kl", {"beta": SET["beta"]}), ("+delta", {"dual": SET["dual"]})]
)
def test_losses_of_trl(kind, over, extra, options):
    advantages = jnp.broadcast_to(GIVEN["one_advantage"][:, None], RAGGED.shape)
    found = loss_and_gradient(advantages, "ragged", over, **options, longest=SET["longest"])
    agree(found, PEERS["trl"]["losses"][kind + extra])


@pytest.mark.parametrize(
    "mode, over",
    [("token-mean", "tokens"), ("seq-mean-token-mean", "completions"), ("seq-mean-token-sum-norm", "constant")],
)
def test_losses_of_verl(mode, over):
    for extra, dual in (("", None), ("+dual", SET["dual"])):
        agree(loss_and_gradient(GIVEN["advantages"], "holed", over, dual), PEERS["verl"]["losses"][mode + extra])


@pytest.mark.parametrize("over", ["tokens", "completions"])
def test_losses_of_openrlhf(over):
    for extra, dual in (("", None), ("+dual", SET["dual"])):
        agree(loss_and_gradient(GIVEN["advantages"], "holed", over, dual), PEERS["openrlhf"]["losses"][over + extra])


def test_the_second_bound_matters_in_these_numbers():
    losses = PEERS["verl"]["losses"]
    assert abs(losses["token-mean"]["loss"] - losses["token-mean+dual"]["loss"]) > 0.05


def test_clip_fractions():
    given = (GIVEN["logprobs"], GIVEN["old"], GIVEN["advantages"], GIVEN["holed"])
    once, twice = clipped_surrogate(*given, **CLIPS), clipped_surrogate(*given, **CLIPS, dual=SET["dual"])
    share = lambda clipped: np.asarray(clipped)[HOLED].mean()
    close(share(once.clipped), PEERS["openrlhf"]["clipped"])
    close(share(once.clipped), PEERS["verl"]["clipped"])
    # verl counts the two bounds apart; ours are those at which a token has no gradient.
    close(share(twice.clipped), PEERS["verl"]["clipped"] + PEERS["verl"]["clipped_below"])


@pytest.mark.parametrize("peer", ["verl", "openrlhf"])
def test_losses_of_values(peer):
    each = clipped_value_loss(GIVEN["values"], GIVEN["old_values"], GIVEN["returns"], SET["value_clip"])
    names = {"tokens": "token-mean", "completions": "seq-mean-token-mean"}
    for over, name in names.items():
        found = value(aggregated(each, GIVEN["holed"], over))
        close(found, PEERS[peer]["values"][name if peer == "verl" else over])
    free = clipped_value_loss(GIVEN["values"], GIVEN["old_values"], GIVEN["returns"], None)
    close(value(aggregated(free, GIVEN["holed"])), PEERS["openrlhf"]["values_unclipped"])
    close(np.asarray(each > free)[HOLED].mean(), PEERS["verl"]["value_clipped"])


@pytest.mark.parametrize("peer", ["verl", "openrlhf"])
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_estimates_of_the_kl(peer, estimator):
    mine, theirs = (
        np.asarray(kl_estimate(GIVEN["logprobs"], GIVEN["reference"], estimator)),
        np.array(PEERS[peer]["kl"][estimator]),
    )
    bounded = (peer, estimator) not in (("verl", "k1"), ("verl", "k2"))
    # Both bound their k3 to 10, OpenRLHF its k1 and k2 too; ours is bounded at a ratio of exp(20).
    close(np.clip(mine, -10, 10) if bounded else mine, theirs)
    if estimator == "k3":
        assert (mine > 11).any()


def test_generalised_advantages_of_verl_step_over_a_gap():
    found = generalised_advantages(
        GIVEN["rewards"], GIVEN["values"], GIVEN["holed"], gamma=SET["gamma"], lam=SET["lam"]
    )
    white = whitened(found.advantages, GIVEN["holed"], variance="unbiased")
    close(white, np.where(HOLED, PEERS["verl"]["advantages"], 0))
    close(found.returns, np.where(HOLED, PEERS["verl"]["returns"], 0))


def test_generalised_advantages_of_openrlhf():
    found = generalised_advantages(
        GIVEN["rewards"], GIVEN["values"], GIVEN["ragged"], gamma=SET["gamma"], lam=SET["lam"]
    )
    close(found.advantages, np.where(RAGGED, PEERS["openrlhf"]["advantages"], 0))
    close(found.returns, np.where(RAGGED, PEERS["openrlhf"]["returns"], 0))


def test_generalised_advantages_of_rlax_with_a_value_after_the_end():
    after = jnp.full(len(RAGGED), PEERS["rlax"]["bootstrap"])
    options = {"gamma": SET["gamma"], "lam": SET["lam"], "bootstrap": after}
    close(
        generalised_advantages(GIVEN["rewards"], GIVEN["values"], GIVEN["ragged"], **options).advantages,
        PEERS["rlax"]["advantages"],
    )


def test_whitening_of_trl_is_unbiased():
    mine = functools.partial(whitened, GIVEN["rewards"], GIVEN["holed"])
    close(mine(variance="unbiased"), np.where(HOLED, PEERS["trl_ppo"]["whitened"], 0))
    close(mine(variance="unbiased", shift=False), np.where(HOLED, PEERS["trl_ppo"]["whitened_in_place"], 0))
    # TensorFlow's moments, and so the papers before, divide by n; with 19 tokens it shows.
    assert np.abs(np.asarray(mine(variance="biased")) - np.where(HOLED, PEERS["trl_ppo"]["whitened"], 0)).max() > 0.02


def test_advantages_over_a_group():
    mine = lambda **options: group_advantages(GIVEN["scores"], SET["group"], **options).advantages
    close(mine(eps=1e-4), PEERS["trl"]["group"])
    close(mine(eps=1e-6), PEERS["verl"]["group"])
    close(mine(scaled=False), PEERS["trl"]["none"])
    for peer in ("trl", "verl"):
        close(mine(baseline="others", scaled=False), PEERS[peer]["rloo"])


def test_a_dropped_completion_belongs_to_no_baseline():
    scores, weight = GIVEN["scores"].at[1].set(jnp.nan), jnp.ones(len(RAGGED)).at[1].set(0)
    mine = lambda **options: group_advantages(scores, SET["group"], weight=weight, **options).advantages
    close(mine(eps=1e-4), PEERS["trl"]["group_without_1"])
    close(mine(baseline="others", scaled=False), PEERS["trl"]["rloo_without_1"])

"""Every language objective on every layout: the update does not know how many devices or microbatches there were.

Dropout is on; masks are ragged, a microbatch has no trained token, and the last examples have no weight.
"""

import numpy as np
import pytest
from toy_language import Pairs, Texts, ToyHeads, ToyLanguage, ToyReward, language_task

from jaxops.objectives.direct_preference import Dpo, Ipo
from jaxops.objectives.ensemble import each_head
from jaxops.objectives.language import NextTokenConfig
from jaxops.objectives.preference import BestOfK, BradleyTerry
from jaxops.testing import LAYOUTS, compare_layouts


class Ensemble(BradleyTerry):
    """Bradley-Terry on each of several heads."""

    def build(self, model):
        return each_head(model, super().build)


SHIPPED = {
    "next_token": NextTokenConfig(chunk=8),
    "next_token_with_terms": NextTokenConfig(chunk=8, z_loss=1e-2, label_smoothing=0.1),
    "bradley_terry": BradleyTerry(center=0.01, tie=0.5, label_smoothing=0.05),
    "ensemble": Ensemble(center=0.01),
    "best_of_k": BestOfK(center=0.01),
    "dpo": Dpo(label_smoothing=0.1, chunk=8),
    "ipo": Ipo(chunk=8),
}
REWARDS = ("bradley_terry", "best_of_k")
ONE, DATA, FSDP, CUBE, SLICES = LAYOUTS


def agree(name, layouts, accumulations, model=None):
    source = None if name.startswith("next_token") else Pairs(k=4 if name == "best_of_k" else 2)
    model = model or (ToyReward() if name in REWARDS else ToyHeads(ensemble=3) if name == "ensemble" else ToyLanguage())
    found = compare_layouts(language_task(SHIPPED[name].build, model, source), layouts, accumulations)
    for case in found:
        assert 0 < case.gradient <= 1e-6 or case.layout == ONE, case
        assert case.parameter <= 1e-5, case
    return found


def test_the_batches_are_as_ragged_as_they_say():
    batch = Texts().batch(0, 32)
    trained = (batch["mask"] * batch["weight"][:, None]).sum(1)
    parts = [trained[at::4].sum() for at in range(4)]
    assert parts[1] == 0 and len(set(parts)) == 4 and (batch["weight"] == 0).sum() == 4
    assert set(np.unique(batch["segment"])) == {0, 1, 2} and ToyLanguage().drop > 0


@pytest.mark.parametrize(
    ("name", "layout", "accumulation", "reduction"),
    [
        pytest.param("next_token", DATA, 4, "after_loop", marks=pytest.mark.latest),
        pytest.param("next_token_with_terms", CUBE, 4, "plain", marks=pytest.mark.latest),
    ],
)
def test_a_covering_subset(name, layout, accumulation, reduction, capfd):
    (found,) = agree(name, [layout], [accumulation])
    assert "Involuntary full rematerialization" not in capfd.readouterr().err
    assert (found.reduction, found.accumulation) == (reduction, accumulation)


@pytest.mark.slow
@pytest.mark.parametrize("name", SHIPPED)
def test_the_full_product(name):
    found = agree(name, LAYOUTS, (1, 4))
    assert len(found) == 10 and {case.reduction for case in found} == {"plain", "after_loop"}


@pytest.mark.slow
def test_a_separate_head_with_a_cap():
    agree("next_token_with_terms", (DATA, CUBE), (1, 4), ToyLanguage(tied=False, soft_cap=1.5))

"""Models as large as users have them, on data x fsdp x tensor: wrong gradients depend on sizes (core/fence.py)."""

import numpy as np
import pytest
from toys import regression_task

from jaxops.models.dcn import DCNv2, DCNv2Config
from jaxops.models.dlrm import DLRM, DLRMConfig
from jaxops.models.inputs import Input
from jaxops.models.sasrec import SASRec, SASRecConfig
from jaxops.models.two_tower import TwoTower, TwoTowerConfig
from jaxops.objectives import clicks, ranking, retrieval
from jaxops.testing import check

CUBE = {"data": 2, "fsdp": 2, "tensor": 2}
ITEMS, LENGTH, DIM = 8_000, 16, 64


class Histories:
    examples = 10**6

    def batch(self, cursor, size):
        rng = np.random.default_rng(cursor)
        draw = lambda: rng.integers(1, ITEMS + 1, (size, LENGTH)).astype(np.int32)
        weight = (rng.random((size, LENGTH)) > 0.2).astype(np.float32)
        return {"id": np.arange(size, dtype=np.int32), "items": draw(), "targets": draw(), "weight": weight}


class Features:
    """Eight features, 64 wide, and 13 numbers; their rows come with the batch, as tables would give them."""

    examples = 10**6

    def batch(self, cursor, size):
        rng = np.random.default_rng(cursor)
        draw = lambda *shape: rng.normal(size=shape).astype(np.float32)
        return {
            "id": np.arange(size, dtype=np.int32),
            "item": rng.integers(0, 50, size).astype(np.int32),
            "numeric": draw(size, 13),
            "rows": {feature.name: draw(size, DIM) for feature in INPUTS},
            "label": (rng.random(size) > 0.7).astype(np.float32),
            "weight": np.ones(size, np.float32),
        }


INPUTS = [Input(name=f"feature_{at}", dim=DIM) for at in range(8)]


SPLIT = [(r"kernel$", ("fsdp", "tensor"))]
"""A config may well split the kernels of towers over fsdp, which their own rules do not."""


def agree(model, objective, source, batch_size, rules=(), gradient=1e-6):
    task = regression_task(objective, source, model=model, rules=[*rules, *model.rules], block=8)
    (found,) = check(task, [CUBE], (1,), gradient=gradient, batch_size=batch_size, steps=1)
    assert found.gradient > 0


@pytest.mark.parametrize("loss", [ranking.softmax, pytest.param(ranking.gbce_loss, marks=pytest.mark.slow)])
def test_sasrec(loss):
    model = SASRec(SASRecConfig(dim=256, layers=1, heads=4, length=LENGTH), ITEMS)
    # rounding alone: each entry adds up a thousand positions, of eight thousand scores each
    agree(model, loss(model), Histories(), 64, gradient=2e-6)


def test_two_tower():
    shape = TwoTowerConfig(dim=128, user_hidden=(512, 256), item_hidden=(512,), dropout=0.1)
    model = TwoTower(shape, INPUTS[:4], INPUTS[4:])
    agree(model, retrieval.in_batch_softmax(model, 8), Features(), 256, SPLIT)


@pytest.mark.parametrize("rank", [64, pytest.param(None, marks=pytest.mark.slow)])
def test_dcnv2(rank):
    model = DCNv2(DCNv2Config(cross_layers=3, rank=rank, deep=(512, 256), dropout=0.1), INPUTS, 13)
    agree(model, clicks.bce(model), Features(), 256, SPLIT)


@pytest.mark.slow
def test_dlrm():
    model = DLRM(DLRMConfig(bottom=(512, 256), top=(512, 256), dropout=0.1), INPUTS, 13)
    agree(model, clicks.bce(model), Features(), 256, SPLIT)

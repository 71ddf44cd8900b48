"""Every shipped objective on every layout: the update does not know how many devices or microbatches there were.

Dropout and draws are on and the weights are ragged: positions of weight zero, examples without a target, a microbatch
without any. Gradients agree to 1e-6 of the largest entry, parameters after five steps of gradient descent to 1e-5.
"""

import dataclasses
import typing

import jax.numpy as jnp
import numpy as np
import pytest
from toys import Ragged, interactions, rec_task, rows, tiny_sasrec

from jaxops.core.accumulate import microbatches
from jaxops.data.interactions.packing import PackedSource
from jaxops.data.interactions.splits import leave_one_out
from jaxops.data.interactions.windows import SequenceSource
from jaxops.families.rec.config import RecObjective
from jaxops.objectives.ranking import Bce, Gbce, SampledSoftmax, Softmax
from jaxops.testing import LAYOUTS, compare_layouts

SHIPPED = {
    "softmax": Softmax(),
    "sampled_softmax": SampledSoftmax(negatives=16),
    "bce": Bce(negatives=2),
    "gbce": Gbce(negatives=8),
}
ONE, DATA, FSDP, CUBE, SLICES = LAYOUTS


def agree(task, layouts, accumulations):
    found = compare_layouts(task, layouts, accumulations)
    for case in found:
        assert case.gradient <= 1e-6, case
        assert case.parameter <= 1e-5, case
    return found


def task_of(name, **options):
    return rec_task(lambda model: SHIPPED[name].build(model), **options)


def test_every_shipped_objective_is_here():
    kinds = {choice.kind for choice in typing.get_args(RecObjective) if dataclasses.is_dataclass(choice)}
    assert kinds == set(SHIPPED) | {"clicks", "in_batch_softmax"}  # whose features lie in tables: tests/run


def test_the_batches_are_as_ragged_as_they_say():
    inter = interactions()
    batch = Ragged(SequenceSource(inter, leave_one_out(inter), 5, seed=0)).batch(0, 32)
    counts = microbatches({"w": jnp.asarray(batch["weight"])}, 4, 1)["w"].sum((1, 2))
    assert counts[1] == 0 and (np.delete(np.asarray(counts), 1) > 0).all() and len(set(map(float, counts))) == 4
    assert (batch["weight"].sum(1) == 0).sum() > 8  # more examples without a target than that microbatch
    assert ((batch["weight"] == 0) & (batch["targets"] > 0)).any() and (batch["items"] == 0).any()
    assert tiny_sasrec().config.dropout > 0 and len(rows()["id"]) == 32


@pytest.mark.parametrize(
    ("name", "layouts", "accumulation", "reduction"),
    [
        pytest.param("softmax", [DATA], 4, "after_loop", marks=pytest.mark.latest),
        ("sampled_softmax", [FSDP], 1, "plain"),
        pytest.param("bce", [CUBE], 4, "plain", marks=pytest.mark.latest),
        ("gbce", [SLICES, ONE], 4, "plain"),
    ],
)
def test_a_covering_subset(name, layouts, accumulation, reduction, capfd):
    found = agree(task_of(name), layouts, [accumulation])
    assert "Involuntary full rematerialization" not in capfd.readouterr().err  # XLA moved whole activations
    assert {(case.reduction, case.accumulation) for case in found} == {(reduction, accumulation)}


@pytest.mark.slow
@pytest.mark.parametrize("name", SHIPPED)
def test_the_full_product(name):
    found = agree(task_of(name), LAYOUTS, (1, 4))
    assert len(found) == 10 and {case.reduction for case in found} == {"plain", "after_loop"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["softmax", "bce"])
def test_packed_rows(name):
    agree(task_of(name, windows=PackedSource, length=12), (ONE, DATA, CUBE), (1, 4))


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"norm": "post"}, {"remat": "full"}, {"remat": "dots", "layers": 2}], ids=str)
def test_other_shapes_of_the_model(changes):
    agree(task_of("softmax", **changes), (DATA, CUBE), (4,))

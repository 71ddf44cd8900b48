"""What may not be trained on a mesh with fsdp, and that everything shipped may."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from toys import rec_task, regression, regression_task

from jaxops.core.failures import UserError
from jaxops.core.mesh import make_mesh
from jaxops.core.step import Extra
from jaxops.core.sums import Sum
from jaxops.objectives import ranking
from jaxops.run.fence import find_unconstrained, require_constrained_kernels
from jaxops.run.training import tables_on
from jaxops.tables.optimizers import TableSgd
from jaxops.tables.spec import TableSpec
from jaxops.tables.tables import EmbeddingTables

LOSSES = [ranking.softmax, ranking.sampled_softmax, ranking.bce_loss, ranking.gbce_loss]


@pytest.mark.latest
@pytest.mark.parametrize("loss", LOSSES)
def test_every_ranking_loss_on_sasrec_passes(loss):
    task = rec_task(loss, remat="dots")
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    assert find_unconstrained(task, mesh, batch=task.source.batch(0, 32)) == []


def bare_scores(model):
    """A user's own loss that multiplies by the item matrix as it is stored."""

    def objective(params, batch, key):
        hidden = model.encode(params, batch, key)
        logits = jnp.einsum("bld,vd->blv", hidden, model.item_vectors(params))
        return {"loss/own": Sum.of(ranking.softmax_cross_entropy(logits, batch["targets"]), batch["weight"])}

    return objective


@pytest.mark.latest
def test_a_users_own_loss_is_refused():
    task, mesh = rec_task(bare_scores), make_mesh(fsdp=8)
    batch = task.source.batch(0, 32)
    with pytest.raises(UserError, match=r"  item/embedding \(-, fsdp\) reaches dot_general at .*test_task_fence.py:"):
        require_constrained_kernels(task, mesh, batch=batch)
    require_constrained_kernels(task, make_mesh(data=4, tensor=2), batch=batch)
    off = dataclasses.replace(task, rules=[("^item/embedding$", ("tensor",)), *task.rules])
    require_constrained_kernels(off, mesh, batch=batch)


def reads_everything(params, batch, key):
    shifted = batch | {"y": batch["y"] + batch["rows"]["item"] + batch["shift"][:, None]}
    return regression(params, shifted, key)


def test_rows_of_tables_and_what_extras_give_are_there():
    shift = Extra(
        init=lambda params: jnp.zeros(()),
        update=lambda value, params, sums, step, batch: value,
        read=lambda value, batch: {"shift": jnp.broadcast_to(value, batch["weight"].shape)},
    )
    spec = TableSpec(rows=20, dim=8, features=("item",), optimizer=TableSgd(lr=0.1))
    task = regression_task(reads_everything, tables={"item": spec}, extras={"shift": shift})

    class WithItems:
        examples = 10**6

        def batch(self, cursor, size):
            at = np.arange(cursor, cursor + size, dtype=np.int32)
            return {**regression_task().source.batch(cursor, size), "item": at % 20}

    task = dataclasses.replace(task, source=WithItems())
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    with jax.set_mesh(mesh):  # as `fit` calls it
        tables = tables_on(task, mesh, 32)
        assert isinstance(tables, EmbeddingTables)
        found = find_unconstrained(task, mesh, tables, tables.plan(task.source.batch(0, 32)))
    assert [one.path for one in found] == ["up/kernel", "down/kernel"]

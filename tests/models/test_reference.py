"""A policy beside its frozen reference: equal at first, laid out alike, and the reference stays as it is."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from toy_language import Pairs, ToyLanguage, language_task
from toys import mesh_of

from jaxops.core.fresh_state import init_state
from jaxops.core.sharding import named_leaves, parameter_shardings
from jaxops.core.step import build_step
from jaxops.models.decoder.architecture import Architecture
from jaxops.models.decoder.decoder import build_decoder
from jaxops.models.lora import Lora, LoraConfig, on_model
from jaxops.models.reference import WithReference
from jaxops.objectives.direct_preference import Dpo, Ipo, against_reference
from jaxops.run.warm_start import with_copies
from jaxops.testing import LAYOUTS, check

CUBE = {"data": 2, "fsdp": 2, "tensor": 2}


def decoder():
    return build_decoder(Architecture(dim=16, layers=2, heads=2, hidden=32, length=12, dropout=0.1, vocab=100))


def objective_of(config, model):
    both = model if isinstance(model, Lora) else WithReference(model)
    inner = model.model if isinstance(model, Lora) else model
    return both, against_reference(config.build(inner), inner, both.policy, both.base, chunk=config.chunk)


def task_of(config, model):
    both, objective = objective_of(config, model)
    return language_task(lambda _: objective, both, Pairs(), frozen=both.frozen)


def test_the_reference_lies_as_the_policy_does():
    both, mesh = WithReference(decoder()), mesh_of(**CUBE)
    lies = dict(named_leaves(parameter_shardings(both.shapes, both.rules, mesh)))
    of_policy = {path: where for path, where in lies.items() if not path.startswith("reference/")}
    assert len(lies) == 2 * len(of_policy) and any(any(where.spec) for where in of_policy.values())
    for path, where in of_policy.items():
        assert lies[f"reference/{path}"].spec == where.spec, path


def test_policy_and_reference_are_equal_at_first_and_each_is_found():
    both = WithReference(decoder())
    params = both.init(jax.random.key(0))
    policy, reference = dict(named_leaves(both.policy(params))), dict(named_leaves(both.base(params)))
    assert policy.keys() == reference.keys() == dict(named_leaves(decoder().shapes)).keys()
    for path, value in policy.items():
        np.testing.assert_array_equal(value, reference[path])
    seen = on_model(both, lambda params: sorted(params))(params)
    assert "reference" not in seen and "layers" in seen


@pytest.mark.parametrize("layout", [pytest.param({"data": 1}, marks=pytest.mark.slow), CUBE], ids=str)
def test_the_copy_is_of_the_weights_that_the_policy_has_and_stays_through_updates(layout):
    both, objective = objective_of(Dpo(), ToyLanguage())
    mesh = mesh_of(**layout)
    tx = optax.sgd(0.1)
    with jax.set_mesh(mesh):
        dtypes = [("^reference/", "bfloat16")]
        state = init_state(both.init, jax.random.key(0), tx, mesh, both.rules, frozen=both.frozen, dtypes=dtypes)
        moved = jax.tree.map(lambda x: x + 0.01, state.params)  # as if they had been read from elsewhere
        begun = jax.device_get(moved)
        state = with_copies(dataclasses.replace(state, params=moved), both.copies)
        step = build_step(objective, tx, mesh, rules=both.rules)
        for at in range(2):
            state, _ = step(state, Pairs().batch(16 * at, 16))
    held = jax.device_get(state.frozen["reference"])
    for path, value in named_leaves(begun):
        copy = dict(named_leaves(held))[path]
        assert copy.dtype == jnp.bfloat16
        np.testing.assert_array_equal(copy, value.astype(jnp.bfloat16), err_msg=path)
        assert np.abs(dict(named_leaves(jax.device_get(state.params)))[path] - value).max() > 0, path


@pytest.mark.parametrize("adapters", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_at_the_start_the_loss_is_that_of_no_preference(adapters):
    both, objective = objective_of(Dpo(beta=0.3), Lora(decoder(), LoraConfig(rank=2)) if adapters else ToyLanguage())
    batch = jax.tree.map(jnp.asarray, Pairs().batch(0, 16))
    sums = jax.jit(lambda params, batch: objective(params, batch, None))(both.init(jax.random.key(0)), batch)
    assert float(sums["loss/dpo"].total / sums["loss/dpo"].count) == pytest.approx(np.log(2), rel=1e-6)
    assert float(sums["reward_margin"].total) == 0


SHIPPED = {
    "dpo": Dpo(label_smoothing=0.1, chunk=8),
    "ipo": Ipo(chunk=8),
    # A small beta sets a goal far above the rounding of sums of log ratios, which its gradient is a difference to.
    "ipo_sequence": Ipo(normalisation="sequence", beta=0.02, chunk=8),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SHIPPED)
@pytest.mark.parametrize("adapters", [False, True])
def test_the_update_does_not_know_devices_or_microbatches(name, adapters):
    model = Lora(decoder(), LoraConfig(rank=2)) if adapters else decoder()
    steps = 1 if name == "ipo_sequence" else 5  # plain descent on its squares diverges, and any rounding with it
    assert len(check(task_of(SHIPPED[name], model), LAYOUTS, (1, 4), steps=steps)) == 10

"""Microbatches are of the batch that an update reads, which is not the loop's where a step samples first."""

import sys
from pathlib import Path

import jax
import pytest

import jaxops as jx
from jaxops.core.failures import UserError
from jaxops.run.training import accumulation_of, build_training, update_rows


@pytest.fixture
def policy(monkeypatch):
    """The task of tests/toy_policy.py, by overrides: 16 prompts a step, 8 samples an update."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))
    config = {"task": "toy_policy:FAMILY", "batch": {"global": 16}, "run": {"steps": 2}}

    def made(**batch):
        from jaxops.run.build import config_from_dict

        return jx.build_task(config_from_dict({**config, "batch": {"global": 16, **batch}}))

    yield made
    sys.modules.pop("toy_policy", None)


def test_microbatches_divide_the_updates_own_batch(policy):
    mesh = jx.make_mesh(devices=jax.devices()[:1])
    assert update_rows(policy()) == 8
    assert accumulation_of(policy(microbatch=4), mesh) == 2 and accumulation_of(policy(microbatch=8), mesh) == 1
    with pytest.raises(UserError, match=r"batch\.microbatch: 16 does not divide the 8 examples of an update"):
        accumulation_of(policy(microbatch=16), mesh)


def test_auto_traces_the_update_on_its_own_batch(policy, monkeypatch):
    """With room for nothing every division is tried; with room for all of it the first one is taken."""
    mesh = jx.make_mesh(devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        monkeypatch.setattr("jaxops.run.training.memory_limit", lambda mesh: 1)
        assert accumulation_of(policy(), mesh) == 8
        monkeypatch.setattr("jaxops.run.training.memory_limit", lambda mesh: 10**12)
        assert accumulation_of(policy(), mesh) == 1


def test_a_frozen_reference_is_no_argument_of_the_update(policy):
    """The objective reads no frozen leaf (`reads=()`), so the compiled update gets none."""
    mesh = jx.make_mesh(devices=jax.devices()[:1])
    task = policy()
    with jax.set_mesh(mesh):
        update, fresh, _ = build_training(task, mesh)
        state = fresh()
        assert set(state.params) == {"policy", "value"} and set(state.frozen) == {"reference"}
        (program,) = update.programs(state, task.update_batch(16))
        assert program.args[0].frozen == {}

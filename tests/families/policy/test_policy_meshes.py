"""A policy is built on a mesh with fsdp, and its programs say where everything lies and how much memory it takes."""

import jax
import pytest
from jax.sharding import PartitionSpec as P
from policy_runs import furnish, task_of

from jaxops.core.memory import bytes_per_device, state_groups
from jaxops.core.mesh import make_mesh
from jaxops.plan.program import placed
from jaxops.run.accounting import memory_line
from jaxops.run.task import StepParts
from jaxops.run.training import abstract, abstract_batch, build_training


@pytest.fixture(scope="module")
def furnished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("meshes")
    furnish(folder)
    return folder


@pytest.fixture
def programs_on(furnished, monkeypatch):
    """The task of a policy, its state on a mesh, and its programs by name."""
    monkeypatch.chdir(furnished)

    def build(*overrides, **axes):
        task = task_of(*overrides)
        mesh = make_mesh(**axes)
        with jax.set_mesh(mesh):
            training = build_training(task, mesh)
            state = abstract(training.fresh, mesh)
            step = task.step(StepParts(training.update, training.fresh, mesh, ""))
            found = step.programs(state, abstract_batch(task))
            return task, state, {program.name: program for program in found}

    return build


def test_the_fence_reads_the_batch_of_an_update_not_the_prompts(programs_on):
    _, _, programs = programs_on(fsdp=8)
    assert "train_step" in programs


def test_programs_say_where_their_arguments_lie(programs_on):
    _, _, programs = programs_on("value={kind: trunk}", data=2, fsdp=2, tensor=2)
    weights, slots, *_ = programs["sample_decode"].args
    kernel = weights["layers"][0]["mlp"]["up"]["kernel"]
    assert kernel.sharding.spec == P(None, "tensor")  # whole along fsdp: no token waits for weights
    assert slots.cache["key"][0].sharding.spec[1] == ("data", "fsdp")
    rollout = programs["policy_prepare"].args[2]
    assert {x.sharding.spec for x in rollout.values()} == {P(("data", "fsdp"))}
    specs = [x.sharding.spec for x in programs["train_step"].args[1].values()]
    assert all(spec[0] == ("data", "fsdp") and not any(spec[1:]) for spec in specs)  # P(rows, None) is P(rows)


def test_what_lies_beside_the_state_is_named(programs_on):
    _, _, programs = programs_on(data=8)
    beside = programs["sample_decode"].beside
    assert {*beside} == {"weights of sampling", "KV cache"}
    layers, keys_and_values, room, dim = 1, 2, 8 + 6, 16  # these prompts are 8 tokens wide at most
    texts = 16 // 8  # slots of a device
    width = 4
    assert (
        bytes_per_device(placed(beside["KV cache"], make_mesh(data=8)))
        == layers * keys_and_values * texts * room * dim * width
    )


def test_memory_is_told_by_model_before_the_first_step(programs_on):
    task, state, _ = programs_on("value={kind: trunk}", fsdp=8)
    groups = state_groups(state, task.models)
    assert {*groups} == {"policy", "value", "reference", "optimizer", "extra"}
    whole = sum(bytes_per_device(tree) for tree in (state.params, state.frozen))
    assert groups["policy"] + groups["value"] + groups["reference"] == whole
    assert groups["optimizer"] == pytest.approx(2 * bytes_per_device(state.params), rel=0.01)
    line = memory_line(state, task.models)
    assert "policy" in line and "value" in line and "reference" in line and "gradients" in line


def test_a_value_head_is_a_model_of_its_own(programs_on):
    task, state, _ = programs_on(data=8)
    assert state_groups(state, task.models)["value"] == 4 * (16 + 1)

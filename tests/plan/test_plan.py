"""Plans on this machine's virtual devices: predictions against the compiler and real arrays, and what is refused."""

import dataclasses
import json
from pathlib import Path

import jax
import pytest
from small_data import movielens

import jaxops as jx
from jaxops.cli.main import main
from jaxops.core.failures import UserError
from jaxops.core.memory import bytes_per_device, state_groups
from jaxops.launch.accelerators import CHIPS, Accelerator, find_accelerator
from jaxops.plan.plan import plan
from jaxops.plan.report import lines
from jaxops.run.build import load_config
from jaxops.run.training import build_training

SFT = ["tokenizer=bytes", "model={kind: decoder, dim: 64, layers: 2, heads: 2, hidden: 128, length: 64}"]
SFT += ["data={kind: text, path: nowhere.jsonl, length: 64}", "batch.global=16", "run={name: x, steps: 10}"]
PPO = ["model={kind: decoder, dim: 32, layers: 1, heads: 2, length: 64}", "tokenizer=bytes", "value={kind: trunk}"]
PPO += ["data={kind: prompts, path: nowhere.jsonl, max_tokens: 16}", "rewards=[{run: runs/none}]"]
PPO += [
    "sample={max_tokens: 8, slots: 16, segment: 4}",
    "batch={prompts: 32, microbatch: 8}",
    "run={name: x, steps: 2}",
]


@pytest.fixture(autouse=True)
def _own_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JAXOPS_CACHE", str(tmp_path / "cache"))


def planned(config: str, overrides: list[str], on: str = "cpu-8", **options):
    return plan(load_config(config, overrides), find_accelerator(on), **options)


def test_a_language_model_needs_no_data_and_its_arguments_are_predicted():
    found = planned("language/sft", [*SFT, "mesh={data: 2, fsdp: 2, tensor: 2}"])
    (program,) = found.programs
    assert program.compiled is not None and found.problem is None
    assert program.arguments == pytest.approx(program.compiled.arguments, rel=0.02)
    assert program.compiled.donation_works
    assert {axis for one in program.compiled.collectives for axis in one.axes} == {"data", "fsdp", "tensor"}
    assert found.state == sum(found.groups.values()) and {*found.groups} == {"parameters", "optimizer"}


def test_what_is_predicted_of_the_state_is_what_a_run_has(tmp_path):
    (tmp_path / "nowhere.jsonl").write_text('{"text": "hello"}\n' * 40)
    loaded = load_config("language/sft", [*SFT, "mesh={data: 1, fsdp: 8}"])
    found = plan(loaded, find_accelerator("cpu-8"), compiling=False)
    task, mesh = jx.build_task(loaded), jx.make_mesh(fsdp=8)
    with jax.set_mesh(mesh):
        state = build_training(task, mesh).fresh()
    assert state_groups(state, task.models) == dict(found.groups)
    assert bytes_per_device(state.params) == found.gradients


def test_a_policy_over_a_reward_model_that_is_not_there_yet():
    found = planned("policy/ppo", [*PPO, "mesh={data: 2, fsdp: 2, tensor: 2}"])
    names = [one.name for one in found.programs]
    assert names == [
        "sample_fill",
        "sample_decode",
        "score_none",
        "policy_prepare",
        "policy_advantages",
        "policy_cut",
        "train_step",
    ]
    assert {*found.groups} == {"policy", "value", "reference", "rewards/none", "optimizer", "extra"}
    assert any("there is no runs/none yet" in note for note in found.notes)
    for one in found.programs:
        assert one.compiled is not None and one.compiled.problem is None, one.name
        assert one.arguments == pytest.approx(one.compiled.arguments, rel=0.1, abs=200), one.name
    text = "\n".join(lines(found))
    assert "KV cache" in text and "weights of sampling" in text and "fits" in text


def test_a_recommender_reads_its_own_data_and_its_tables_are_a_group(monkeypatch):
    movielens(monkeypatch)
    found = planned("rec/movielens_two_tower", ["mesh={data: 8}", "batch.global=64", "batch.microbatch=64"])
    (program,) = found.programs
    assert found.groups["tables"] > 0
    assert program.compiled is not None and program.compiled.problem is None
    assert program.arguments == pytest.approx(program.compiled.arguments, rel=0.1)
    assert {axis for one in program.compiled.collectives for axis in one.axes} == {"data"}


def test_a_second_plan_knows_what_the_first_compiled():
    first = planned("language/sft", [*SFT, "mesh.fsdp=8"])
    again = planned("language/sft", [*SFT, "mesh.fsdp=8"])
    (one,), (other,) = first.programs, again.programs
    assert not one.compiled.cached and other.compiled.cached
    assert dataclasses.replace(other.compiled, cached=False) == dataclasses.replace(
        one.compiled, collectives=list(one.compiled.collectives)
    )


def small(memory: float) -> Accelerator:
    """Eight chips like v5e's with this much memory; without libtpu virtual devices stand in for them."""
    return Accelerator("v5e-8", dataclasses.replace(CHIPS["v5e"], hbm=memory), 1, "2x4", 8)


def test_what_cannot_fit_is_said_before_anything_is_compiled(monkeypatch):
    monkeypatch.setattr("jaxops.plan.plan.has_compiler", lambda accelerator: True)
    monkeypatch.setattr("jaxops.plan.devices.has_compiler", lambda accelerator: False)
    monkeypatch.setattr("jaxops.plan.program.Traced.compiled", lambda *given: pytest.fail("it was compiled"))
    found = plan(load_config("language/sft", [*SFT, "mesh={data: 8, fsdp: 1}"]), small(2**18))
    assert found.problem is not None
    assert "v5e-8 cannot run train_step" in found.problem and "too much on each device" in found.problem
    assert "mesh.fsdp=-1" in found.problem  # what would help
    assert "does not fit" in lines(found)[-1]


def test_auto_divides_an_update_until_its_estimate_fits(monkeypatch):
    monkeypatch.setattr("jaxops.plan.devices.has_compiler", lambda accelerator: False)
    loaded = load_config("language/sft", [*SFT, "mesh={data: 8, fsdp: 1}", "batch.global=64"])
    roomy = plan(loaded, small(2**34), compiling=False)
    need = roomy.peak(roomy.programs[0])
    tight = plan(loaded, small(0.9 * need), compiling=False)
    assert roomy.microbatches == 1 and tight.microbatches > 1
    assert any("batch.microbatch is auto" in note for note in tight.notes)


def test_a_roofline_is_what_its_words_say(monkeypatch):
    monkeypatch.setattr("jaxops.plan.devices.has_compiler", lambda accelerator: False)
    found = plan(load_config("language/sft", [*SFT, "mesh.fsdp=8"]), small(2**34), compiling=False)
    (bound,), (program,) = found.roofline.bounds, found.programs
    assert bound.products == pytest.approx(program.flops / (8 * 197e12))
    assert bound.memory == pytest.approx((program.arguments + program.of_state) / 819e9)
    assert found.roofline.seconds == max(bound.products, bound.memory)
    assert found.roofline.mfu == pytest.approx(found.roofline.flops / (found.roofline.seconds * 8 * 197e12))
    told = "\n".join(lines(found, price=1.2))
    assert "10 steps: at least" in told and "at 1.2 a chip-hour" in told and "assumed:" in told


def test_the_command_prints_json_and_returns_whether_it_fits(capsys):
    assert main(["plan", "language/sft", *SFT, "mesh.fsdp=8", "--on", "cpu-8", "--no-compile", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["accelerator"]["devices"] == 8 and found["problem"] is None
    assert found["state"]["parameters"] > 0 and found["programs"][0]["name"] == "train_step"
    assert found["run"]["steps"] == 10 and found["compiled"] is False


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (["--on", "v5e-63"], "did you mean 'v5e-64'?"),
        (["--on", "v5q-8"], "no such accelerator"),
        (["--on", "cpu-8", "mesh={data: 1, fsdp: 3}", "batch.global=48"], "mesh: fsdp 3 does not fit 8 devices"),
        (["--on", "cpu-8", "batch.global=12"], "12 is no multiple of the mesh's batch shards"),
        (["--on", "cpu-8", "batch.microbatch=3"], "batch.microbatch"),
        (["--on", "cpu-8", "--programs", "train_stop", "--no-compile"], "did you mean 'train_step'?"),
        (["--on", "cpu-8", "--price", "-1"], "--price: expected what a chip costs an hour"),
        (["--on", "cpu-8", "model={weights: nowhere}", "tokenizer=null"], "a plan needs no weights, but"),
        (["--on", "cpu-8", "optimiser.lr=1"], "did you mean 'optimizer'?"),
        (["--on", "cpu-8", "tokenizer=some/folder"], "give the number of its ids"),
        ([], "--on"),
        (["--on", "cpu-8", "--compile"], "no flag --compile; did you mean '--no-compile'?"),
    ],
)
def test_wrong_input_is_one_message(capsys, command, told):
    assert main(["plan", "language/sft", *SFT, "mesh.fsdp=8", *command]) == 2
    out = capsys.readouterr()
    assert told in out.err and "Traceback" not in out.err and out.out == ""
    assert not Path("runs").exists()


def test_too_few_virtual_devices_are_an_error_and_not_a_wrong_plan():
    with pytest.raises(UserError, match="16 virtual CPU devices are needed"):
        planned("language/sft", SFT, on="cpu-16")

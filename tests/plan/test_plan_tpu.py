"""Programs of real sizes, compiled for TPUs that are not here: they fit, and exchange over the axes that rules name.

Slow, and only where libtpu is installed: `make test-plan`. A 7B program takes minutes; no chip is asked.
"""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

NO_LIBTPU = importlib.util.find_spec("libtpu") is None
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(NO_LIBTPU, reason="libtpu is not installed: make test-plan makes .venv-plan, which has it"),
]
GIB = 2**30
LLAMA_2_7B = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}


def planned(folder, *arguments: str, status: int = 0) -> dict:
    """What `jaxops plan ... --json` says, in a process of its own, which has the devices that it asks for."""
    environment = {name: value for name, value in os.environ.items() if name not in ("JAX_PLATFORMS", "XLA_FLAGS")}
    command = [sys.executable, "-m", "jaxops", "plan", *arguments, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)
    assert done.returncode == status, done.stderr[-4000:]
    return json.loads(done.stdout)


def by_name(plan: dict) -> dict[str, dict]:
    return {program["name"]: program for program in plan["programs"]}


def axes_of(program: dict, *, in_loops: bool | None = None) -> set[tuple[str, ...]]:
    found = program["compiled"]["collectives"]
    return {tuple(one["axes"]) for one in found if in_loops is None or one["in_loop"] == in_loops}


def require_compiled(plan: dict, program: dict) -> None:
    """It fits with the rest of the state, gives its arguments away, and what it reads was predicted."""
    compiled = program["compiled"]
    assert compiled["problem"] is None, program["name"]
    assert program["peak"] < 0.9 * plan["memory_per_device"], program["name"]
    assert compiled["donation_works"], program["name"]
    assert program["arguments"] == pytest.approx(compiled["arguments"], rel=0.1), program["name"]


def test_a_tiny_config_on_four_chips(tmp_path):
    plan = planned(tmp_path, "language/sft_tiny", "--on", "v5e-4")
    require_compiled(plan, plan["programs"][0])
    assert plan["accelerator"]["chips"] == 4 and plan["problem"] is None
    assert axes_of(plan["programs"][0]) == {("fsdp",)}


def test_a_7b_sft_step_fits_64_chips_of_v5e(tmp_path):
    plan = planned(tmp_path, "language/sft_7b", "--on", "v5e-64")
    (step,) = plan["programs"]
    require_compiled(plan, step)
    assert axes_of(step) == {("fsdp",)}
    gathered = [one for one in step["compiled"]["collectives"] if one["kind"] == "all-gather" and one["in_loop"]]
    layers = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    # Each layer's kernels in bfloat16, once for the pass forward and once for the pass back.
    assert sum(one["bytes"] for one in gathered) == pytest.approx(2 * 2 * layers, rel=0.02)


def test_a_7b_step_that_cannot_fit_is_refused_in_seconds(tmp_path):
    plan = planned(tmp_path, "language/sft_7b", "--on", "v5e-4", status=2)
    assert "too much on each device" in plan["problem"]
    assert all(program["compiled"] is None for program in plan["programs"])


def test_a_recommender_with_a_hundred_million_rows(tmp_path):
    command = [sys.executable, "-m", "jaxops.data.clicks.criteo", "criteo.tsv", "--rows", "20000"]
    subprocess.run(command, check=True, cwd=tmp_path)
    table = ["tables.category.rows=100_000_000", "tables.category.dim=64", "batch.global=65536"]
    plan = planned(tmp_path, "rec/criteo_dcnv2", "data.path=criteo.tsv", *table, "--on", "v5e-64")
    (step,) = plan["programs"]
    require_compiled(plan, step)
    assert plan["state"]["tables"] == pytest.approx(
        100e6 * 65 * 4 / 64, rel=0.01
    )  # 64 numbers and one of the optimizer
    assert axes_of(step) == {("data",)}
    exchanged = step["compiled"]["collectives"]
    assert sum(one["count"] for one in exchanged if one["kind"] == "all-to-all") >= 6  # ids and rows, there and back
    assert max(one["largest"] for one in exchanged) < 2**24  # nothing of the table's size


@pytest.mark.parametrize(("on", "overrides"), [("v5p-128", []), ("v5e-256", ["mesh.tensor=16"])])
def test_ppo_of_a_7b_policy_with_value_reference_and_reward_model(tmp_path, on, overrides):
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "config.json").write_text(json.dumps(LLAMA_2_7B))
    plan = planned(tmp_path, "policy/ppo_7b", "model.weights=weights", *overrides, "--on", on)
    programs = by_name(plan)
    assert plan["problem"] is None
    assert {"policy", "value", "reference", "rewards/helpful", "optimizer"} <= {*plan["state"]}
    for program in programs.values():
        require_compiled(plan, program)
    for name in ("score_helpful", "policy_prepare", "train_step"):
        assert axes_of(programs[name], in_loops=True) <= {("fsdp",), ("tensor",)}, name
    for name in ("sample_fill", "sample_decode"):  # no token waits for weights: they are whole along fsdp
        large = [one for one in programs[name]["compiled"]["collectives"] if one["largest"] > 2**20]
        assert {tuple(one["axes"]) for one in large} <= {("tensor",)}, name


def test_two_slices_exchange_over_replica_alone(tmp_path):
    plan = planned(tmp_path, "language/sft_tiny", "mesh={replica: 2, fsdp: -1}", "--on", "2xv5e-4")
    between = [one for one in plan["programs"][0]["compiled"]["collectives"] if one["between_slices"]]
    assert {tuple(one["axes"]) for one in between} <= {("replica",), ("replica", "fsdp")}
    planned_on_one = ["language/sft_tiny", "--on", "2xv5e-4"]
    command = [sys.executable, "-m", "jaxops", "plan", *planned_on_one]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and "make it a multiple of 2" in done.stderr

"""What a host looks at before it trains, with real jax where devices are concerned."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from tiny_runs import furnish

from jaxops.launch import preflight

ROOT = Path(__file__).parents[2]


@pytest.fixture
def asked(tmp_path, monkeypatch):
    furnish(tmp_path)
    monkeypatch.chdir(tmp_path)
    run_dir = tmp_path / "runs"
    question = {"config": "my.yaml", "overrides": [], "run_dir": str(run_dir), "lock": "requirements.lock"}
    return {**question, "code": str(tmp_path), "files": ["my.yaml", "plays.csv"], "asked": 1.0, "limit": 60}


def test_a_host_that_is_well_says_what_all_must_share(asked, tmp_path):
    found = preflight.examine_host(asked)
    assert found["problems"] == [] and found["asked"] == 1.0
    assert {"Python", "jax", "the code", "jaxops"} <= found["facts"].keys() and "the lock file" not in found["facts"]
    assert list((tmp_path / "runs").iterdir()) == []
    (tmp_path / "requirements.lock").write_text("jax==0\n")
    other = preflight.examine_host(asked)["facts"]
    assert other["the lock file"] and {**other, "the lock file": None} == {**found["facts"], "the lock file": None}
    (tmp_path / "plays.csv").write_text("user,item,time\nu,i,1\n")
    assert preflight.examine_host(asked)["facts"]["the code"] != other["the code"]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"overrides": ["data.path=gone/*.csv"]}, "config and data: data: gone/*.csv is not here (looked for from"),
        ({"overrides": ["optimizer.lrr=1"]}, "did you mean 'lr'?"),
        ({"config": "none.yaml"}, "no such configuration"),
        ({"run_dir": "plays.csv"}, "run.dir:"),
    ],
)
def test_what_is_wrong_is_named_by_its_check(asked, changes, says):
    (problem,) = preflight.examine_host({**asked, **changes})["problems"]
    assert says in problem


def test_a_full_disk_and_a_check_that_hangs_are_problems(asked, monkeypatch):
    monkeypatch.setattr(preflight, "LEAST_DISK", 1 << 60)
    (problem,) = preflight.examine_host(asked)["problems"]
    assert problem.startswith("disk: ") and "make room" in problem
    assert preflight._problem("data", lambda: time.sleep(5), 0.05) == "data: no answer within 0 s"


def test_paths_are_found_at_any_depth():
    section = {"path": "a", "items": {"path": ["b", "c"], "key": "d"}, "parts": [{"path": "e"}], "n": 1}
    assert preflight._paths(section) == ["a", "b", "c", "e"]


MESH = {"replica": 1, "data": 2, "fsdp": 2, "tensor": 2, "sequence": 1}


def test_devices_are_counted_and_each_mesh_axis_sums():
    asked = {"mesh": MESH, "devices": 8, "cpu_devices": None, "kind": "cpu", "env": {}, "limit": 60}
    assert preflight.examine_devices(asked) == {"problems": []}
    (problem,) = preflight.examine_devices({**asked, "devices": 16, "kind": "TPU v5 lite"})["problems"]
    assert problem == "devices: jax sees 8 x cpu, and --on asks for 16 x TPU v5 lite"


def test_two_that_do_not_meet_say_so_in_time(asked):
    """The other worker never comes: a message within the limit, on the worker that waits."""
    env = {"JAXOPS_COORDINATOR": "127.0.0.1:1", "JAXOPS_NUM_PROCESSES": "2", "JAXOPS_PROCESS_ID": "1"}
    code = (
        "import json, sys; from jaxops.launch import preflight;"
        f" print(json.dumps(preflight.examine_devices({{'mesh': {{}}, 'env': {env}, 'limit': 2, 'cpu_devices': 1}})))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=os.environ)
    assert done.returncode == 76 or "no answer within 2 s" in done.stdout, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("alike", [True, False])
def test_workers_that_nobody_drives_compare_what_they_found_among_themselves(asked, tmp_path, alike):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meet = f"127.0.0.1:{free.getsockname()[1]}"

    def worker(rank: int) -> list[str]:
        code = tmp_path / f"code-{rank}"
        env = {"JAXOPS_COORDINATOR": meet, "JAXOPS_NUM_PROCESSES": "2", "JAXOPS_PROCESS_ID": str(rank)}
        more = {"code": str(code), "env": env, "mesh": {"data": 2}, "devices": 2, "cpu_devices": 1, "kind": "cpu"}
        question = {**asked, **more, "secrets": {}, "asked": time.time(), "limit": 120}
        argv = [sys.executable, "-m", "jaxops.launch.preflight", "together"]
        around = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
        done = subprocess.run(argv, cwd=code, env=around, input=json.dumps(question), text=True, capture_output=True)
        return json.loads(done.stdout.strip().splitlines()[-1])["problems"]

    for rank in range(2):
        code = tmp_path / f"code-{rank}"
        shutil.copytree(tmp_path, code, ignore=shutil.ignore_patterns("code-*"))
        if not alike:
            (code / "my.yaml").write_text((code / "my.yaml").read_text() + f"# of worker {rank}\n")
    with ThreadPoolExecutor(2) as pool:
        problems = list(pool.map(worker, range(2)))
    if alike:
        assert problems == [[], []]
    else:
        for (problem,) in problems:
            assert "hosts disagree on the code: workers 1 have another than worker 0" in problem

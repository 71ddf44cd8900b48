"""Launches that are only written down: SkyPilot's task by its own parser, and Ray's job in a Ray of this machine."""

import dataclasses
import json
import os
import shlex
import subprocess
import tempfile
from pathlib import Path

import pytest
import yaml
from fake_worker import STEPS, Scene
from test_jobset import TOOLS, in_tools, tool

from jaxops.launch.accelerators import find_accelerator
from jaxops.launch.arguments import Request
from jaxops.launch.backends.table import find_backend
from jaxops.launch.record import LaunchRecord
from jaxops.launch.render.ray import runtime_env, submission
from jaxops.launch.render.sky import task
from jaxops.launch.scripts import script


def record(tmp_path: Path, on: str, **changes) -> LaunchRecord:
    spec = Scene(tmp_path).record().spec
    count = max(find_accelerator(on).hosts, 1)
    spec = dataclasses.replace(spec, type=on, hosts=tuple(f"node-{n}" for n in range(count)), **changes)
    return LaunchRecord(spec=dataclasses.replace(spec, python=changes.get("python", "")), hours=2, grace=90, retries=3)


def test_the_task_of_sky_names_machines_price_hours_and_what_is_tried_again(tmp_path):
    made = task(record(tmp_path, "v6e-16", price="spot", secrets=("HF_TOKEN",)))
    resources = made["resources"]
    assert resources["accelerators"] == {"tpu-v6e-16": 1} and resources["use_spot"]
    assert resources["job_recovery"]["max_restarts_on_errors"] == 3
    assert {75, 76, 143} <= set(resources["job_recovery"]["recover_on_exit_codes"])
    assert not {1, 2, 124} & set(resources["job_recovery"]["recover_on_exit_codes"])
    assert "timeout --kill-after=90 7200" in made["run"] and made["secrets"] == {"HF_TOKEN": None}
    assert task(record(tmp_path, "v5e-8"))["resources"]["accelerators"] == {"tpu-v5litepod-8": 1}


def test_the_lines_of_a_task_give_each_host_its_place(tmp_path):
    spec = record(tmp_path, "v6e-16", python="env")
    text = task(spec)["run"].replace("-m jaxops", "#")  # shows the variables in place of the training
    for count, expected in (("4", "10.0.0.1:8476 4 2"), ("1", "")):
        env = {"PATH": os.environ["PATH"], "SKYPILOT_NUM_NODES": count, "SKYPILOT_NODE_RANK": "2"}
        env["SKYPILOT_NODE_IPS"] = "10.0.0.1\n10.0.0.2"
        done = subprocess.run(["sh", "-c", text], env=env, capture_output=True, text=True, timeout=20, check=True)
        seen = dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)
        names = ("JAXOPS_COORDINATOR", "JAXOPS_NUM_PROCESSES", "JAXOPS_PROCESS_ID")
        assert " ".join(seen[name] for name in names if name in seen) == expected


def test_the_setup_of_a_task_makes_the_environment_by_our_own_script(tmp_path):
    text = task(record(tmp_path, "v6e-16"))["setup"]
    assert script("setup_host.sh").read_text() in text
    assert text.rstrip().endswith("ACCEL=tpu sh ~/setup_host.sh requirements.lock ~/jaxops-env")
    assert subprocess.run(["sh", "-n"], input=text, text=True, timeout=20).returncode == 0


@pytest.mark.parametrize(
    ("backend", "changes", "says"),
    [
        ("sky", {"on": "tpu7x-64"}, "the Cloud TPU API, which has v4, v5e, v5p, v6e; for tpu7x use --backend gke"),
        ("sky", {"on": "2xv6e-16"}, "a task of SkyPilot is one slice"),
        ("sky", {"overrides": ["run.dir=runs"]}, "run.dir=runs: expected an object store"),
        ("ray", {"hosts": "a"}, "--hosts goes with --backend ssh"),
        ("ray", {"secrets": ["A"]}, "--secret: Ray shows the runtime environment"),
        ("ray", {"options": ["address=head"]}, "--option address=head: expected http://HOST:PORT"),
    ],
)
def test_what_they_cannot_do_is_said(backend, changes, says):
    given = {"config": "my.yaml", "overrides": ["run.dir=gs://b/runs"], "on": "v6e-16", "backend": backend}
    request = Request(**{**given, **changes})
    (problem,) = find_backend(backend).problems(request, find_accelerator(request.on))
    assert says in problem


@pytest.mark.slow
def test_skypilots_parser_accepts_the_task_and_refuses_a_misspelt_one(tmp_path):
    given = [task(record(tmp_path, on, **more)) for on, more in (("v6e-16", {"price": "spot"}), ("v5p-128", {}))]
    given += [task(record(tmp_path, "cpu-8", python="/usr/bin/python3"))]
    given = [yaml.safe_load(yaml.safe_dump(one)) for one in given]
    code = (
        "import json, sys, sky\n"
        "for one in json.load(sys.stdin):\n"
        "    try: print('ok', sky.Task.from_yaml_config(one).name)\n"
        "    except Exception as error: print(' '.join(str(error).split()))\n"
    )
    done = in_tools(code, [*given, {**given[0], "resorces": {}}])
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[:3] == ["ok tiny"] * 3 and "resources" in lines[3], lines


def ray_python() -> str:
    tool("python")
    if subprocess.run([TOOLS / "python", "-c", "import ray"], capture_output=True, timeout=120).returncode:
        pytest.skip("no ray in .venv-launch: `make launch-env` brings it")
    return str(TOOLS / "python")


def driver(tmp_path: Path, scene: Scene, **changes) -> subprocess.CompletedProcess[str]:
    """Runs the driver of a Ray job as Ray does, in a Ray that it starts on this machine."""
    words = submission(dataclasses.replace(scene.record(), hours=1.0), "http://127.0.0.1:8265")
    argv = words[words.index("--") + 1 :]
    job = {**json.loads(argv[-1]), **changes}
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    words = [ray_python(), *argv[1:-1], json.dumps(job)]
    with tempfile.TemporaryDirectory() as short:  # the paths of Ray's sockets may have 107 characters
        env |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_TMPDIR": short}
        return subprocess.run(words, cwd=scene.code_folder, env=env, capture_output=True, text=True, timeout=300)


def test_the_command_of_ray_carries_the_driver_and_no_secret(tmp_path):
    made = record(tmp_path, "v6e-16", python="/env/bin/python")
    words = submission(made, "http://head:8265")
    assert words[:5] == ["ray", "job", "submit", "--address", "http://head:8265"]
    assert json.loads(words[words.index("--runtime-env-json") + 1]) == runtime_env(made)
    job = json.loads(words[-1])
    assert (job["workers"], job["resources"], job["seconds"], job["retries"]) == (4, {"TPU": 4}, 7200, 3)
    assert shlex.split(job["command"])[:6] == ["env", "PYTHONPATH=.", "/env/bin/python", "-m", "jaxops", "train"]
    compile(words[-2], "ray_driver.py", "exec")


@pytest.mark.slow
def test_rays_driver_runs_one_worker_each_tries_again_after_a_loss_and_not_after_a_mistake(tmp_path):
    scene = Scene(tmp_path).make()
    scene.runs.mkdir()
    ray_python()
    done = driver(tmp_path, scene)
    assert done.returncode == 0, done.stderr[-3000:]
    assert scene.steps(0) == scene.steps(1) == STEPS
    assert "attempt 1: [0, 0]" in done.stderr
    for code, attempts in ((1, 1), (76, 2)):
        scene.fail(code)
        done = driver(tmp_path, scene, retries=1)
        assert done.returncode == code and f"attempt {attempts}: " in done.stderr, done.stderr[-3000:]
        assert f"attempt {attempts + 1}: " not in done.stderr

"""What a worker does that nobody drives: verifies its code, ends with the documented statuses, and judges."""

import dataclasses
import hashlib
import importlib.util
import io
import itertools
import json
import os
import shutil
import subprocess
import tarfile
import time
from pathlib import Path

import pytest
from fake_worker import Scene

from jaxops.launch import worker_files
from jaxops.launch.backends.mig import BACKEND
from jaxops.launch.backends.protocol import Job
from jaxops.launch.scripts import script
from jaxops.launch.verdict import End, judge


def host_script(name: str):
    """A host script as a module."""
    spec = importlib.util.spec_from_file_location(name, script(f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_host_judges_an_attempt_as_the_launcher_does(tmp_path):
    decide = host_script("judge_attempt").decide
    codes, whys = [0, 1, 2, 75, 76, 127, 137, 143, None], ["", "max-hours", "others"]
    (tmp_path / "attempt-1").mkdir()
    for stopped in (False, True):
        if stopped:
            (tmp_path / "stop").touch()
        for first, second, why in itertools.product(codes, codes, whys):
            ends = []
            for worker, code in enumerate((first, second)):
                path = tmp_path / "attempt-1" / f"worker-{worker}.json"
                path.unlink(missing_ok=True)
                mine = why if worker == 0 and code is not None else ""
                if code is not None:
                    path.write_text(json.dumps({"code": code, "why": mine}))
                ends.append(End(f"worker {worker}", code, mine or ("lost" if code is None else ""), mine == "others"))
            right, found = judge(ends, stopped), decide(str(tmp_path), "1", 2)
            assert (found["retry"], found["status"]) == (right.retry, right.status), (ends, right, found)


def test_the_host_scripts_are_clean():
    if not shutil.which("shellcheck"):
        pytest.skip("no shellcheck on this machine (Debian: apt-get install shellcheck)")
    scripts = sorted(script("start_worker.sh").parent.glob("*.sh"))
    done = subprocess.run(["shellcheck", *map(str, scripts)], capture_output=True, text=True)
    assert len(scripts) >= 3 and done.returncode == 0, done.stdout


class Worker:
    """One worker of the stand-in, by hand: no cluster at all."""

    def __init__(self, home: Path, **changes):
        self.scene = Scene(home, workers=1).make()
        self.scene.runs.mkdir()
        given = {"backend": "mig", "devices": None, "type": "v6e-8", "price": "spot", **changes}
        code = self.scene.code()
        record = dataclasses.replace(self.scene.record(**given), code=code.sha256, attempt=1, hours=1.0)
        tar = worker_files.host_tar(record, code, BACKEND)
        self.job = Job(record=dataclasses.replace(record, host=hashlib.sha256(tar).hexdigest()))
        worker_files.write_files(self.job, tar, code, {})
        self.env = {**os.environ, **self.job.settings(), "LAUNCH_ATTEMPT": "1", "LAUNCH_WORKER": "0"}
        self.env |= {"LAUNCH_WORK": str(home / "work")}

    def start(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(["sh", str(script("start_worker.sh"))], env=self.env, stderr=subprocess.DEVNULL)

    def run(self) -> int:
        return self.start().wait(60)

    def end(self):
        return worker_files.read_end(self.job, 1, 0)


def test_it_trains_and_says_how_it_ended_in_the_folder_of_runs(tmp_path):
    worker = Worker(tmp_path)
    assert worker.run() == 0
    end = worker.end()
    assert (end["code"], end["why"]) == (0, "") and worker_files.read_beat(worker.job, 1, 0)["host"]
    assert worker_files.read_log(worker.job, 1, 0, 0)[0] == "from step 0\ndone\n"


def test_code_that_was_changed_on_its_way_is_refused(tmp_path):
    worker = Worker(tmp_path)
    (tar,) = (worker.scene.runs / "code").iterdir()
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as file:
        file.addfile(tarfile.TarInfo("evil.py"))
    tar.write_bytes(made.getvalue())
    assert worker.run() == 2 and worker.end()["code"] == 2 and not worker.scene.starts()
    assert "its SHA-256 is" in worker_files.read_log(worker.job, 1, 0, 0)[0]
    assert not list((tmp_path / "work").glob("code-*[0-9a-f]"))


@pytest.mark.parametrize(("mode", "status"), [("1", 1), ("76", 76)])
def test_the_status_is_that_of_the_training(tmp_path, mode, status):
    worker = Worker(tmp_path)
    worker.scene.fail(int(mode))
    assert worker.run() == status and worker.end()["code"] == status


def test_a_check_that_fails_ends_it_before_it_trains(tmp_path):
    worker = Worker(tmp_path)
    worker.env["FAKE"] = "full"
    assert worker.run() == 2 and "disk: full" in worker.end()["why"] and not worker.scene.starts()


def test_told_to_stop_it_saves(tmp_path):
    worker = Worker(tmp_path)
    worker.scene.slow(0.5)
    process = worker.start()
    while worker.scene.steps() < 1:
        time.sleep(0.05)
    process.terminate()
    assert process.wait(30) == 75 and worker.end()["code"] == 75


@pytest.mark.slow
def test_the_wish_to_stop_reaches_a_worker_that_nobody_can_signal(tmp_path):
    worker = Worker(tmp_path)
    worker.scene.slow(0.7)
    process = worker.start()
    while worker.scene.steps() < 1:
        time.sleep(0.05)
    worker_files.ask_to_stop(worker.job)
    assert process.wait(30) == 75


def test_hours_that_are_used_up_begin_no_further_attempt(tmp_path):
    worker = Worker(tmp_path)
    worker.env["LAUNCH_DEADLINE"] = str(time.time() + 1)
    assert worker.run() == 75 and worker.end()["why"] == "max-hours" and not worker.scene.starts()


def test_a_secret_comes_from_a_file_that_nobody_else_reads(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("hunter2hunter2\n")
    secret.chmod(0o644)
    worker = Worker(tmp_path, secrets=(f"TOKEN=file:{secret}",))
    assert worker.run() == 2 and "can be read by others: chmod 600" in worker.end()["why"]
    secret.chmod(0o600)
    again = {**worker.env, "LAUNCH_ATTEMPT": "2"}
    assert subprocess.run(["sh", str(script("start_worker.sh"))], env=again, capture_output=True).returncode == 0
    assert (worker.scene.runs / "token-0").exists()


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b'it\'s "two"\n$(id) lines\n', 'it\'s "two"\n$(id) lines'),
        (b"caf\xe9-hunter2\n", "is no text in UTF-8"),
        (b"hunter2\0hunter2", "it holds a zero byte"),
    ],
)
def test_a_secret_of_any_text_is_handed_on_and_one_that_is_no_text_is_refused(tmp_path, content, found):
    attend, place = host_script("attend_worker"), tmp_path / "secret"
    place.write_bytes(content)
    place.chmod(0o600)
    if content.startswith(b"it's"):
        assert attend._secret("TOKEN", f"file:{place}") == found
        return
    with pytest.raises(attend.Ended, match=found) as refused:
        attend._secret("TOKEN", f"file:{place}")
    assert refused.value.code == 2 and "hunter2" not in str(refused.value)


def test_what_slurm_says_of_a_task_does_not_reach_jax(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_LOCALID", "0")
    monkeypatch.setenv("KEPT", "yes")
    found = host_script("attend_worker")._surroundings()
    assert "SLURM_LOCALID" not in found and found["KEPT"] == "yes"

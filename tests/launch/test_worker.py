"""launch/worker.py: a worker is started once, told from one that is gone, stopped, and ended by the host's timer."""

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

from jaxops.launch.scripts import script


def worker(verb: str, *args: object, stdin: bytes = b"") -> dict:
    argv = [sys.executable, str(script("worker.py")), verb, *map(str, args)]
    done = subprocess.run(argv, input=stdin, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr.decode()
    return json.loads(done.stdout)


def start(attempt: Path, code: str, seconds: float = 60, **more) -> dict:
    spec = {"argv": [sys.executable, "-u", "-c", code], "cwd": str(attempt.parents[1]), "env": {}, "seconds": seconds}
    return worker("start", attempt, stdin=json.dumps({**spec, "grace": 1, **more}).encode())


def reach(attempt: Path, *states: str, word: str = "") -> dict:
    """The poll at which the worker is in one of the states, and has said the word."""
    for _ in range(600):
        poll = worker("poll", attempt, 0)
        if poll["state"] in states and word in poll["text"]:
            return poll
        time.sleep(0.05)
    raise AssertionError(poll)


@pytest.fixture
def attempt(tmp_path):
    path = tmp_path / "launch" / "worker-0" / "attempt-1"
    path.parents[1].mkdir()
    yield path
    worker("stop", path, "KILL")


def test_an_attempt_is_started_once_and_its_status_and_words_stay(attempt):
    assert worker("poll", attempt, 0)["state"] == "absent"
    code = "import os; print('hello', os.environ['WORD']); raise SystemExit(3)"
    assert start(attempt, code, env={"WORD": "there"}) == {"started": True}
    poll = reach(attempt, "ended")
    assert (poll["code"], poll["text"]) == (3, "hello there\n")
    assert start(attempt, code) == {"started": False}
    assert worker("poll", attempt, poll["offset"])["text"] == ""


def test_a_secret_reaches_the_worker_and_no_file(attempt):
    start(attempt, "import os; print(len(os.environ['TOKEN']))", secrets={"TOKEN": "hunter2hunter2"})
    assert reach(attempt, "ended")["text"] == "14\n"
    assert not [path for path in attempt.rglob("*") if path.is_file() and b"hunter2" in path.read_bytes()]
    assert all(path.stat().st_mode & 0o077 == 0 for path in (attempt, *attempt.rglob("*")))


def test_the_host_ends_it_when_its_time_is_up_though_nobody_looks(attempt):
    code = "import signal, time; signal.signal(signal.SIGTERM, lambda *_: exit(75)); print('up'); time.sleep(60)"
    start(attempt, code, seconds=1)
    poll = reach(attempt, "ended")
    assert (poll["code"], poll["why"]) == (75, "max-hours")


def test_one_that_does_not_save_in_time_is_killed_with_its_children(attempt):
    code = (
        "import signal, subprocess, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        " print(subprocess.Popen(['sleep', '60']).pid); time.sleep(60)"
    )
    start(attempt, code, seconds=1)
    poll = reach(attempt, "ended")
    assert (poll["code"], poll["why"]) == (137, "max-hours")
    child = Path(f"/proc/{int(poll['text'])}/stat")
    assert not child.exists() or child.read_text().split()[2] in "ZX"


def test_term_reaches_it_and_kill_ends_it(attempt):
    code = "import signal, time; signal.signal(signal.SIGTERM, lambda *_: print('saving')); print('up'); time.sleep(60)"
    start(attempt, code)
    reach(attempt, "running", word="up")
    assert worker("stop", attempt, "TERM") == {"stopped": True}
    reach(attempt, "running", word="saving")
    assert worker("stop", attempt, "KILL") == {"stopped": True}
    assert reach(attempt, "ended")["code"] == 137
    assert worker("stop", attempt, "TERM") == {"stopped": False}


def test_one_that_was_killed_with_its_watcher_is_lost_and_one_without_it_still_lives(attempt):
    start(attempt, "import time; print('up'); time.sleep(60)")
    reach(attempt, "running", word="up")
    pid = int((attempt / "pid").read_text())
    watcher = int(Path(f"/proc/{pid}/status").read_text().partition("PPid:")[2].split()[0])
    os.kill(watcher, signal.SIGKILL)
    time.sleep(0.2)
    assert worker("poll", attempt, 0)["state"] == "running"
    assert "still alive" in worker("remove", attempt.parents[1])["error"]
    os.utime(attempt, (1, 1))
    assert worker("stop", attempt, "KILL") == {"stopped": True}
    assert reach(attempt, "lost")["code"] is None
    assert worker("remove", attempt.parents[1]) == {"removed": True}


def test_a_folder_that_was_made_this_moment_is_one_being_started(attempt):
    attempt.mkdir(parents=True)
    assert worker("poll", attempt, 0)["state"] == "running"
    os.utime(attempt, (1, 1))
    assert worker("poll", attempt, 0)["state"] == "lost"


def test_a_command_that_is_not_there_is_said(attempt):
    answer = start(attempt, "", argv=["/no/such/python"])
    assert not answer["started"] and "/no/such/python" in answer["error"]
    assert worker("poll", attempt, 0)["code"] == 127


def tar_of(**files: str) -> tuple[bytes, str]:
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as tar:
        for name, text in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(text)
            tar.addfile(entry, io.BytesIO(text.encode()))
    return made.getvalue(), hashlib.sha256(made.getvalue()).hexdigest()


def test_code_is_kept_and_unpacked_only_with_its_digest(tmp_path):
    data, digest = tar_of(**{"a/b.txt": "text"})
    place, folder = tmp_path / "code" / f"{digest}.tar", tmp_path / "unpacked"
    assert worker("keep", place, digest) == {"kept": False}
    assert "damaged" in worker("keep", place, digest, stdin=data[:-1])["error"] and not place.exists()
    assert worker("keep", place, digest, stdin=data) == {"kept": True}
    assert worker("keep", place, digest) == {"kept": True}
    place.write_bytes(data[:-1] + b"x")
    assert "SHA-256" in worker("unpack", place, digest, folder)["error"] and not folder.exists()
    place.write_bytes(data)
    assert worker("unpack", place, digest, folder) == {"unpacked": str(folder)}
    assert (folder / "a" / "b.txt").read_text() == "text"
    assert worker("unpack", place, digest, folder) == {"unpacked": str(folder)}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["code", "unpacked"]


def test_a_tar_that_leads_out_of_its_folder_is_refused(tmp_path):
    data, digest = tar_of(**{"../out.txt": "text"})
    (tmp_path / "bad.tar").write_bytes(data)
    assert "outside" in worker("unpack", tmp_path / "bad.tar", digest, tmp_path / "in")["error"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.tar"]


def test_a_folder_is_shared_where_others_see_the_token(tmp_path):
    assert worker("shared", tmp_path, "write", "abc") == {"seen": True}
    assert worker("shared", tmp_path, "read", "abc") == {"seen": True}
    assert worker("shared", tmp_path / "other", "read", "abc") == {"seen": False}
    worker("shared", tmp_path, "delete", "abc")
    assert worker("shared", tmp_path, "read", "abc") == {"seen": False} and not list(tmp_path.iterdir())


def test_its_heartbeat_goes_on_and_does_not_stretch_its_time(attempt):
    code = "import signal, time; signal.signal(signal.SIGTERM, lambda *_: exit(75)); print('up'); time.sleep(60)"
    begun = time.time()
    start(attempt, code, seconds=1.5)
    poll = reach(attempt, "ended")
    beat = json.loads((attempt / "beat").read_text())
    assert begun <= beat["time"] <= time.time() and beat["pid"] == int((attempt / "pid").read_text())
    assert (poll["code"], poll["why"]) == (75, "max-hours")

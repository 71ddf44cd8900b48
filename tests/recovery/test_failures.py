"""Processes that are killed, stopped or fail: the others end too and say why, nothing half written is believed, and
the same command resumes to the run that it would have been."""

import contextlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from jobs import OWN, Job, events, examples, train
from test_processes import assert_same_curve, uninterrupted
from tiny_runs import curve

from jaxops.core.checkpoint import Checkpoints

SAVING = ["checkpoint.every=5", "run.steps=40", OWN]


def resumes(run: str, losses: dict[int, float]) -> str:
    """Runs the same command again; what it said. The whole curve must be the one of the uninterrupted run."""
    status, said = train(run, *SAVING)
    assert status == 0, said
    assert_same_curve(run, losses)
    return said


@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_killed_process_ends_the_job_and_the_same_command_resumes(folder, rank):
    losses, _ = uninterrupted(40)
    with Job("parts", *SAVING) as job:
        job.reach(12)  # the save of step 10 waits for that of step 5: one is whole
        job.signal(rank, signal.SIGKILL)
        codes = job.end(60)
    assert codes[rank] == -signal.SIGKILL
    if rank == 1:
        assert codes[0] == 76 and "lost process 1 of 2" in job.said(), job.said()
        assert job.summary()["state"] == "failed" and "lost process 1" in job.summary()["reason"]
    else:  # with the coordinator jax may abort the others, which leaves their stacks
        assert codes[1] in (76, -signal.SIGABRT), job.said(1)
    said = resumes("parts", losses)
    assert "resumed from step 5 of" in said or "resumed from step 10 of" in said


@pytest.mark.slow
def test_two_processes_whose_run_folder_goes_save_together_elsewhere(folder):
    losses, _ = uninterrupted(40)
    with Job("parts", *SAVING, "checkpoint.rescue=safe") as job:
        job.reach(12)
        job.run.rename("moved")
        codes = job.end(120)
    assert codes == [1, 1] and "was saved in safe/parts" in job.said(), (job.said(), job.said(1))
    with Checkpoints("safe/parts/checkpoints") as checkpoints:
        (step,) = checkpoints.steps()
        assert step >= 15 and checkpoints.verify(step) == []
    shutil.rmtree("runs/parts", ignore_errors=True)  # a save that was under way may have made folders there
    shutil.copytree("safe/parts", "runs/parts")
    status, said = train("parts", *SAVING)
    assert status == 0 and f"resumed from step {step} of" in said, said
    after = curve("parts")
    assert max(after) == 40 and all(abs(loss - losses[at]) < 1e-5 for at, loss in after.items())


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "row"), [(1, 108), (0, 100)])
def test_an_exception_in_one_process_ends_all_at_once(folder, rank, row):
    began = time.monotonic()
    with Job("bad", OWN, "run.steps=400", OWNPKG_FAIL=f"{rank}:{row}") as job:
        codes = job.end(120)
    assert codes == [1, 1], [job.said(0), job.said(1)]
    assert time.monotonic() - began < 100  # jax alone would wait 300 s at its shutdown barrier
    assert "Traceback" in job.said(rank) and f"RuntimeError: no row {row} today" in job.said(rank)
    assert f"process {rank} failed (train, step " in job.said(1 - rank)
    assert job.summary()["state"] == "failed" and f"no row {row} today" in job.summary()["reason"]


def test_a_hanging_process_ends_the_job_and_leaves_stacks_and_step(folder):
    with Job("hang", OWN, "run.steps=400", JAXOPS_HEARTBEAT_SECONDS="10") as job:
        job.reach(3)
        job.signal(1, signal.SIGSTOP)
        assert job.processes[0].wait(timeout=100) != 0
        job.signal(1, signal.SIGCONT)
        assert job.processes[1].wait(timeout=60) != 0
    for rank in range(2):
        sign = json.loads((job.run / "processes" / f"{rank}.json").read_text())
        assert sign["step"] >= 1 and sign["process"] == rank
    stacks = (job.run / "processes" / "0.stacks.txt").read_text()
    assert "Fatal Python error: Aborted" in stacks or "lost process 1" in job.said()
    assert "loop.py" in stacks or "lost process 1" in job.said()


def test_who_is_late_is_named_with_what_it_did_last(folder):
    with Job("late", OWN, JAXOPS_BARRIER_SECONDS="3", OWNPKG_LATE="1:60") as job:
        codes = job.end()
        assert codes[0] == 76 and codes[1] != 0, [job.said(0), job.said(1)]
    said = job.said()
    assert "waited 3 s at 'see the run folder' for process 1 of 2: process 1 was last seen at 'start'" in said
    assert "JAXOPS_BARRIER_SECONDS allows for more" in said and "Traceback" not in said


def test_who_does_not_come_at_all_is_waited_for_within_bounds(folder):
    job = {"JAXOPS_COORDINATOR": "127.0.0.1:1", "JAXOPS_NUM_PROCESSES": "2", "JAXOPS_PROCESS_ID": "1"}
    with Job("alone", OWN, processes=1, JAXOPS_INIT_SECONDS="3", **job) as alone:
        assert alone.end(60) == [76], alone.said()
    assert "The 2 processes of this job did not all meet at 127.0.0.1:1 within 3 s" in alone.said()
    assert not Path("runs").exists()


@pytest.mark.slow
def test_a_run_that_stands_still_says_where(folder):
    with Job("still", OWN, "run.steps=400", processes=1, JAXOPS_STALL_SECONDS="2", OWNPKG_HANG="160") as job:
        job.reach(5)
        stacks, until = job.run / "processes" / "0.stacks.txt", time.monotonic() + 60
        while not (stacks.exists() and "ownpkg" in stacks.read_text()) and time.monotonic() < until:
            time.sleep(0.1)
    assert "no progress for" in stacks.read_text() and "data.py" in stacks.read_text()
    assert "WARNING: no progress for" in job.said()


def test_flipped_bytes_in_the_latest_checkpoint_are_passed_over(folder):
    losses, _ = uninterrupted(40)
    assert train("flip", *SAVING, "run.steps=20")[0] == 0
    latest = Path("runs/flip/checkpoints/20")
    largest = max((path for path in latest.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    said = resumes("flip", losses)
    assert "WARNING: checkpoint" in said and "is damaged and is passed over" in said and "CRC-32" in said
    assert "resumed from step 15 of" in said
    with Checkpoints("runs/flip/checkpoints") as checkpoints:
        assert checkpoints.latest_good(print) == 40
    assert largest.read_bytes() == data  # nothing is deleted: it is there to be looked at


def test_a_full_disk_fails_the_run_in_words_and_loses_nothing(folder):
    losses, _ = uninterrupted(40)
    with small_disk(folder / "runs", megabytes=2) as disk:
        assert train("full", *SAVING, "run.steps=20")[0] == 0
        room = shutil.disk_usage(disk).free
        (disk / "ballast").write_bytes(b"x" * max(room - 20_000, 0))
        with Job("full", *SAVING, processes=1, sleep=0) as job:
            codes = job.end()
        assert codes == [1], job.said()
        assert "No space left on device" in job.said() and "Traceback" not in job.said(), job.said()
        (disk / "ballast").unlink()
        resumes("full", losses)


class small_disk:
    """A file system of a few megabytes at `path`; skips the test where this user may not mount one."""

    def __init__(self, path: Path, megabytes: int, options: str = "rw"):
        self.path, self.options = path, f"size={megabytes}m,{options}"

    def __enter__(self) -> Path:
        self.path.mkdir(exist_ok=True)
        made = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", self.options, "tmpfs", str(self.path)], capture_output=True
        )
        if made.returncode:
            pytest.skip("this user may not mount a small file system")
        return self.path

    def __exit__(self, *error: object) -> None:
        subprocess.run(["umount", "-l", str(self.path)], check=True)


@pytest.mark.slow
def test_a_file_that_may_not_grow_fails_the_run_in_words(folder):
    """The limit of a quota, for machines where nothing can be mounted: no file may pass 10 kB."""

    with Job("quota", *SAVING, processes=1, sleep=0) as job:
        resource.prlimit(job.processes[0].pid, resource.RLIMIT_FSIZE, (10_000, 10_000))
        assert job.end() == [1], job.said()
    assert "File too large" in job.said() and "Traceback" not in job.said(), job.said()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10))
def test_a_kill_at_a_random_moment_loses_nothing(folder, seed):
    """Worker, coordinator or both, of one, two or four processes, saving every second step all the while."""
    draw = random.Random(seed)
    changes = ["checkpoint.every=2", "run.steps=30", OWN]
    losses, whole = uninterrupted(30)
    count = draw.choice([1, 2, 2, 4])
    with Job("parts", *changes, processes=count, devices=4 // count, sleep=0.05) as job:
        job.reach(draw.randrange(2, 20))
        time.sleep(draw.random() / 5)
        for rank in draw.sample(range(count), draw.randrange(1, count + 1)):
            job.signal(rank, signal.SIGKILL)
        job.end(100)
    with Checkpoints("runs/parts/checkpoints") as checkpoints:
        saved = checkpoints.steps()
        for step in saved:
            assert checkpoints.verify(step) in ([], NO_CHECKSUMS)
    count = draw.choice([1, 2, 4])
    with Job("parts", *changes, processes=count, devices=4 // count, sleep=0) as job:
        assert job.end() == [0] * count, job.said()
    assert_same_curve("parts", losses)
    assert {cursor: example for cursor, example in examples().items() if cursor in whole} == whole
    # one that was killed before its first save was whole begins again
    assert ("resumed" in events("parts")) == bool(saved) and len(curve("parts")) == 30


NO_CHECKSUMS = ["no checksums were written: the sizes are right, the contents are not known to be"]
"""Of a save that was killed between its manifest and the checksums: whole, as far as sizes can tell."""


def test_a_folder_that_may_not_be_written_is_said_first(folder):
    runs = folder / "runs"
    runs.mkdir()
    runs.chmod(0o500)
    with small_disk(runs, 1, "ro") if os.geteuid() == 0 else contextlib.nullcontext():  # root may write to the former
        status, said = train("denied", OWN)
        assert status == 2 and "cannot be written to; set run.dir" in said
        assert list(runs.iterdir()) == []

"""The engine of launches whose workers a cluster starts: submit or adopt, stop, remove; follow.py watches the job.

The cluster and the folder of runs know all: a launcher that is killed at any moment is replaced by the next one, which
finds the job by the launch's name. Tested in tests/launch/, by the name of each cluster.
"""

import dataclasses
import hashlib
import shlex
import time
from collections.abc import Callable, Mapping
from typing import Any

from jaxops.core.failures import EXIT_INTERRUPTED, EXIT_OK, RunFailed, UserError
from jaxops.launch import worker_files
from jaxops.launch.backends.protocol import Job, Scheduler, Sight
from jaxops.launch.backends.table import find_backend
from jaxops.launch.code import Code
from jaxops.launch.record import LaunchFolder, LaunchRecord

CLEAR_SECONDS = 120.0
"""How long a job may take to end after its grace period, before it is removed."""


class ScheduledLaunch:
    """A launch as it goes on: what is recorded of it, and its job in the cluster.

    Args:
      folder: the folder of the launch on this machine.
      record: the launch as it was left.
      say: where the launcher's words go.
    """

    def __init__(self, folder: LaunchFolder, record: LaunchRecord, say: Callable[[str], None]):
        self.folder, self.record, self.say = folder, record, say
        backend = find_backend(record.spec.backend)
        assert isinstance(backend, Scheduler)
        self.backend = backend

    @property
    def job(self) -> Job:
        """The job that the cluster runs."""
        return Job(record=self.record)

    @property
    def deadline(self) -> float:
        """The Unix time at which the hours are used up; 0 before the first attempt."""
        return worker_files.deadline(self.job) or 0.0

    def note(self, **changes: Any) -> None:
        """Changes the record, durably; call it before the change is made in the cluster."""
        self.record = self.folder.save(dataclasses.replace(self.record, **changes))

    def polls(self, sight: Sight | None = None) -> list[Mapping[str, Any]]:
        """Returns how every worker is, as `Session.polls` does."""
        sight = sight or self.backend.look(self.job)
        return [self._poll(worker, sight) for worker in range(len(self.record.spec.hosts))]

    def _poll(self, worker: int, sight: Sight) -> Mapping[str, Any]:
        end = worker_files.read_end(self.job, sight.attempt, worker)
        beat = worker_files.read_beat(self.job, sight.attempt, worker)
        host = (end or beat or {}).get("host") or (sight.hosts[worker] if worker < len(sight.hosts) else "?")
        found = {"state": "absent", "code": None, "why": "", "host": host}
        if end is not None:
            return {**found, "state": "ended", "code": end["code"], "why": end.get("why", "")}
        if sight.state in ("ended", "absent"):
            return {**found, "state": "lost" if beat else "absent", "why": sight.why}
        if beat is None:
            return {**found, "state": sight.state if sight.state == "waiting" else "starting", "why": sight.why}
        silent = time.time() - float(beat["time"])
        quiet = f"silent for {silent:.0f} s" if silent > worker_files.SILENT_SECONDS else str(beat["phase"])
        return {**found, "state": "running", "why": quiet}

    def stop_wanted(self) -> bool:
        """Returns whether the launch is to stop."""
        return self.folder.stop_wanted() or worker_files.stop_wanted(self.job)


def open_scheduled(folder: LaunchFolder, fresh: LaunchRecord, say: Callable[[str], None]) -> ScheduledLaunch:
    """Returns the launch as it was left, or the fresh one; nothing is written.

    Raises:
      UserError: a launch of this run is there which is another one, and it is alive.
    """
    old, spec = folder.load(), fresh.spec
    if old is None or not old.made:
        return ScheduledLaunch(folder, fresh, say)
    if old.spec == spec:
        return ScheduledLaunch(folder, old, say)
    told = spec.told_apart(old.spec)
    if old.spec.backend != spec.backend or old.spec.options != spec.options:
        raise UserError(f"{told}; this ends and removes that launch: jaxops job down {folder.id}")
    state = ScheduledLaunch(folder, old, say).backend.look(Job(record=old)).state
    if state in ("waiting", "running"):
        raise UserError(f"{told}, and it is {state}; end it first: jaxops job stop {folder.id}")
    return ScheduledLaunch(folder, fresh, say)


def show(launch: ScheduledLaunch, code: Code, hours: float) -> None:
    """Prints each file and command of a submission, and touches nothing."""
    launch.record = _begun(launch, code, hours, 1)[0]
    job, spec = launch.job, launch.record.spec
    print(f"# write {spec.run_dir}/code/{code.sha256}.tar: {len(code.files)} files")
    print(f"# write {job.folder}/host-{launch.record.host}.tar: {', '.join(worker_files.HOST_SCRIPTS)}, worker.json")
    for name, text in launch.backend.files(job).items():
        print(f"# write {job.folder}/{name}:\n{text.rstrip()}")
    for argv in launch.backend.commands(job):
        print(shlex.join(argv))
    for note in launch.backend.notes(job):
        print(f"# {note}")


def _begun(launch: ScheduledLaunch, code: Code, hours: float, attempt: int) -> tuple[LaunchRecord, bytes]:
    """Returns the record of a launch that begins now, and its host tar."""
    record = dataclasses.replace(
        launch.record, code=code.sha256, inside=code.inside, hours=hours, attempt=attempt, handle="", retried=0
    )
    tar = worker_files.host_tar(record, code, launch.backend)
    return dataclasses.replace(record, host=hashlib.sha256(tar).hexdigest()), tar


def submit(launch: ScheduledLaunch, code: Code, fresh: LaunchRecord, hours: float) -> bool:
    """Submits the launch, or adopts what an earlier launcher has left; call it with the launch held.

    Returns:
      Whether it was adopted.

    Raises:
      UserError, RunFailed: the folder of runs or the cluster refuses.
    """
    if launch.record.attempt:
        if _adopt(launch, code):
            return True
        launch.backend.remove(launch.job)  # what an earlier launcher has left half made
    elif (state := launch.backend.look(launch.job).state) in ("waiting", "running"):
        raise UserError(
            f"a job of run {fresh.spec.name} in {fresh.spec.run_dir} is {state} in the cluster, and this machine knows"
            f" nothing of it: stop it where it was launched (jaxops job stop {launch.folder.id}), or rename the run"
        )
    launch.folder.forget_stop()
    launch.record = fresh
    record, tar = _begun(launch, code, hours, worker_files.next_attempt(launch.job))
    launch.note(**{**vars(record), "state": "preparing", "status": None, "why": "", "deadline": 0.0})
    job = launch.job
    launch.say(f"code: {len(code.files)} files, {len(code.tar) / 2**20:.1f} MiB, SHA-256 {code.sha256[:16]}")
    worker_files.begin_anew(job)
    worker_files.write_files(job, tar, code, launch.backend.files(job))
    try:
        submit_attempt(launch)
    except (UserError, RunFailed):
        launch.note(state="ended", why="it was not submitted")
        give_back(launch)
        raise
    return False


def give_back(launch: ScheduledLaunch) -> None:
    """Removes machines that are paid for until somebody does; says so where it cannot."""
    if not launch.record.spec.price or launch.backend.tries_again:
        return
    try:
        launch.backend.remove(launch.job)
        launch.say("the machines are removed")
    except (RunFailed, UserError) as error:
        launch.say(f"machines may be left, and cost money: jaxops job down {launch.folder.id} ({error})")


def submit_attempt(launch: ScheduledLaunch) -> None:
    """Submits the attempt that the record names, which it notes first.

    Raises:
      UserError, RunFailed: the cluster refuses.
    """
    for note in launch.backend.notes(launch.job):
        launch.say(note)
    launch.note(submitted=time.time(), deadline=worker_files.deadline(launch.job) or 0.0)
    handle = launch.backend.submit(launch.job, launch.say)
    launch.note(state="running", handle=handle)
    launch.say(f"attempt {launch.record.attempt}: submitted as {handle}")


def _adopt(launch: ScheduledLaunch, code: Code) -> bool:
    """Goes on with a job that waits or runs, or whose end no launcher has seen; returns whether there is one."""
    record, sight = launch.record, launch.backend.look(launch.job)
    alive = sight.state in ("waiting", "running")
    if launch.stop_wanted():
        if alive:
            raise UserError(
                f"run {record.spec.name} was told to stop, and is still {sight.state}; try again in a moment"
            )
        return False
    if not alive and (record.state != "running" or code.sha256 != record.code):
        return False
    launch.say(f"found attempt {sight.attempt} of this run ({sight.state}): going on with it")
    if code.sha256 != record.code:
        launch.say("the code has changed since; the workers keep that of before. For the new: stop, then launch again")
    if record.state != "running":
        submit_attempt(launch)  # which adopts, and makes what is missing where the launcher was killed between two
    return True


def stop_scheduled(launch: ScheduledLaunch, pause: float, at_once: bool = False) -> int:
    """Has the workers save and end, whether a launcher watches them or not; returns the exit status.

    Args:
      launch: the launch.
      pause: the time between two looks, in seconds.
      at_once: whether the job is removed where the workers cannot be told, since the folder of runs is away.

    Raises:
      RunFailed: the cluster does not answer, or the folder of runs is away.
    """
    launch.folder.ask_to_stop()
    if launch.record.attempt and _tell_workers(launch, at_once):
        launch.say("stopping: the workers save")
        launch.backend.cancel(launch.job)
        until = time.monotonic() + launch.record.grace + CLEAR_SECONDS
        while launch.backend.look(launch.job).state in ("waiting", "running"):
            if time.monotonic() > until:
                launch.say("it does not end: it is removed")
                launch.backend.remove(launch.job)
                break
            time.sleep(pause)
    while launch.folder.supervised():  # it sees the wish, and notes the end
        time.sleep(min(pause, 0.2))
    with launch.folder.held():
        record = launch.folder.load()
        if record is not None and record.state != "ended":
            launch.record = record
            launch.note(state="ended", status=EXIT_INTERRUPTED, why="stopped")
    launch.say(f"run {launch.record.spec.name}: no worker is alive")
    give_back(launch)
    return EXIT_OK


def _tell_workers(launch: ScheduledLaunch, at_once: bool) -> bool:
    """Notes the wish to stop where the workers look for it; returns whether it could, and else removes the job."""
    try:
        worker_files.ask_to_stop(launch.job)
    except RunFailed as error:
        if not at_once:
            raise RunFailed(f"{error}; without it nobody saves: jaxops job down {launch.folder.id} ends it") from None
        launch.say(f"{error}; the job is removed at once, and nobody saves")
        launch.backend.remove(launch.job)
        return False
    return True


def remove_scheduled(launch: ScheduledLaunch) -> list[str]:
    """Removes all that a launch made in the cluster, in the folder of runs and here; returns what is left, in words.

    Raises:
      RunFailed: the cluster does not answer.
    """
    left = launch.backend.remove(launch.job)
    worker_files.remove_files(launch.job)
    launch.folder.remove()
    spec = launch.record.spec
    own = [f"the run itself: {spec.run_dir}/{spec.name}", f"its code: {spec.run_dir}/code/{launch.record.code}.tar"]
    return left + own

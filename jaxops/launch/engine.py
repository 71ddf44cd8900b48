"""The launch engine: create or adopt, watch, try again after a preemption, and end.

The workers run on their hosts without the launcher, which may be killed at any moment: the next `jaxops launch` finds
them by the record and goes on. Tested in tests/launch/.
"""

import dataclasses
import os
import time
from collections.abc import Callable

from jaxops.core.failures import EXIT_INTERRUPTED, EXIT_LOST, EXIT_OK, Lost, RunFailed, UserError
from jaxops.launch.code import Code
from jaxops.launch.hosts import each
from jaxops.launch.record import LaunchFolder, LaunchRecord
from jaxops.launch.session import Session
from jaxops.launch.stages import prepare, restore_hosts, start_attempt, start_workers
from jaxops.launch.watch import AttemptWatch

MOST_PAUSE = 60.0
"""The longest wait before another attempt, in seconds."""


def open_session(folder: LaunchFolder, fresh: LaunchRecord, say: Callable[[str], None]) -> Session:
    """Returns the launch as it was left, or the fresh one with the attempts counted on; nothing is written.

    Raises:
      UserError: a launch of this run is there which is another one: it is alive, or it lies on other hosts.
    """
    old, spec = folder.load(), fresh.spec
    if old is None or not old.made:
        return Session(folder, fresh, say)
    if old.spec == spec:
        return Session(folder, old, say)
    told = spec.told_apart(old.spec)
    places = [(one.backend, one.hosts, one.options, one.price) for one in (old.spec, spec)]
    if places[0] != places[1]:
        raise UserError(f"{told}; this ends and removes that launch: jaxops job down {folder.id}")
    states = [str(poll["state"]) for poll in Session(folder, old, say).polls()]
    if {"running", "unreachable"} & set(states):
        raise UserError(f"{told}, and its workers are {', '.join(states)}; end it first: jaxops job stop {folder.id}")
    return Session(folder, _counted_on(old, fresh), say)


def _counted_on(old: LaunchRecord, fresh: LaunchRecord) -> LaunchRecord:
    """Returns the fresh record with the old one's attempts, since each has a folder of its own on the hosts."""
    return dataclasses.replace(fresh, attempt=old.attempt, roots=old.roots, machines=old.machines)


def launch(
    session: Session,
    code: Code,
    fresh: LaunchRecord,
    hours: float,
    prepare_hosts: Callable[[Session, Code], None] = prepare,
) -> bool:
    """Starts the workers, or adopts those that a launcher before this one has left; call it with the launch held.

    Args:
      session: the launch as it was left.
      code: what is brought to the hosts.
      fresh: the record of a launch that begins now.
      hours: when the hosts must be free.
      prepare_hosts: all that comes before the workers.

    Returns:
      Whether workers were adopted.

    Raises:
      UserError, RunFailed: something is not as it must be; the message names the host.
    """
    running = not session.dry and session.record.state == "running"
    if session.backend.prices:
        session.note(machines=True, hours=hours)
    made = session.backend.create(session.record, session.say, session.dry)
    if running and not made and _adopt(session, code):
        return True
    session.record = _counted_on(session.record, fresh)
    if not session.dry:
        session.folder.forget_stop()
    prepare_hosts(session, code)
    end_before(session)
    now = time.time()
    session.note(started=now, deadline=now + hours * 3600)
    start_attempt(session)
    if not session.dry:
        session.say(f"attempt {session.record.attempt}: started")
    return False


def _adopt(session: Session, code: Code) -> bool:
    """Goes on with workers that are alive, or were about to be started; returns whether there are any."""
    record = session.record
    each(lambda _, host: session.put(host, "worker.py"), session.hosts)
    states = [str(poll["state"]) for poll in session.polls()]
    if "unreachable" in states:
        away = [host.name for host, state in zip(session.hosts, states, strict=True) if state == "unreachable"]
        raise RunFailed(f"{', '.join(away)}: no answer, and a worker of this run may be alive there; try again")
    if session.folder.stop_wanted():
        if "running" in states:
            raise UserError(
                f"run {record.spec.name} was told to stop, and its workers are ending; try again in a moment"
            )
        return False
    if "running" not in states and set(states) != {"absent"}:
        return False
    session.say(f"found attempt {record.attempt} of this run ({', '.join(states)}): going on with it")
    if code.sha256 != record.code:
        session.say("the code has changed since; the workers keep that of before. For the new: stop, then launch again")
    start_workers(session)  # those that are missing, where the launcher was killed between two
    return True


def end_before(session: Session) -> None:
    """Makes sure that no worker of an earlier attempt lives.

    Raises:
      RunFailed: a host does not answer, so that nobody knows.
    """
    for _ in range(1 if session.dry else 30):
        session.stop("KILL")
        states = [] if session.dry else [str(poll["state"]) for poll in session.polls()]
        if not {"running", "unreachable"} & set(states):
            return
        time.sleep(1)
    raise Lost(f"a worker of attempt {session.record.attempt} may still be alive ({', '.join(states)}); try again")


def supervise(session: Session, code: Code, pause: float = 1.0, adopted: bool = False) -> int:
    """Watches attempts to their end, tries again where that helps, and returns the exit status.

    Args:
      session: the launch, whose workers have been started.
      code: what a host gets again that has lost its disk.
      pause: the time between two looks, in seconds.
      adopted: whether the workers are those of an earlier launcher.
    """
    while True:
        watch, adopted = AttemptWatch(session, pause, adopted), False
        try:
            verdict = watch.attempt()
        except KeyboardInterrupt as error:
            verdict = watch.stopped_by(error)
        record = session.record
        if verdict.retry and session.folder.stop_wanted():
            session.note(state="ended", status=EXIT_INTERRUPTED, why="stopped")
            return EXIT_INTERRUPTED
        late = time.time() >= record.deadline
        if not verdict.retry or record.retried >= record.retries or late:
            more = "" if not verdict.retry else " (--max-hours)" if late else f" ({record.retried} retries: enough)"
            session.say(f"attempt {record.attempt}: {verdict.why}{more}")
            session.note(state="ended", status=verdict.status, why=verdict.why)
            return verdict.status
        wait = min(2.0**record.retried, MOST_PAUSE) * min(pause, 1.0)
        session.say(f"attempt {record.attempt}: {verdict.why}; trying again in {wait:.0f} s")
        try:
            session.note(retried=record.retried + 1)
            time.sleep(wait)
            session.backend.create(session.record, session.say, session.dry)
            restore_hosts(session, code)
            end_before(session)
            start_attempt(session)
        except RunFailed as error:  # the next look finds the same end, and counts
            session.say(str(error))
        except UserError as error:
            session.note(state="ended", status=EXIT_LOST, why=str(error))
            give_back(session)
            raise
        except KeyboardInterrupt as error:
            session.folder.ask_to_stop()
            session.stop("TERM")
            session.say(f"stopped between two attempts{f' by {error}' if str(error) else ''}")
            session.note(state="ended", status=EXIT_INTERRUPTED, why="stopped between two attempts")
            return EXIT_INTERRUPTED


def give_back(session: Session) -> None:
    """Removes machines that are paid for until somebody does; says so where it cannot."""
    if not session.record.machines:
        return
    try:
        session.backend.remove(session.record, session.say)
        session.note(machines=False, roots=(), state="ended")
        session.say("the machines are removed")
    except (RunFailed, UserError) as error:
        session.say(f"the machines could not be removed, and cost money: jaxops job down {session.folder.id}: {error}")


def stop_and_wait(session: Session, pause: float = 1.0) -> int:
    """Has the workers of a launch save and end, whether a launcher watches them or not; returns the exit status.

    Raises:
      RunFailed: a host does not answer.
    """
    session.folder.ask_to_stop()
    begun = time.monotonic()
    told: set[int] = set()
    session.say("stopping: the workers save")
    while True:
        states = [str(poll["state"]) for poll in session.polls()]
        if "unreachable" in states and not session.backend.standing(session.record):
            states = ["absent"]
        if "unreachable" in states:
            raise RunFailed(f"a host does not answer ({', '.join(states)}), so its worker may go on; try again")
        if "running" not in states and not session.folder.supervised():
            break
        left = [worker for worker, state in enumerate(states) if state == "running" and worker not in told]
        if time.monotonic() - begun > session.record.grace:
            session.stop("KILL")
        elif left:
            told |= set(left) - set(session.stop("TERM", left))
        time.sleep(pause)
    with session.folder.held():
        record = session.folder.load()
        if record is not None and record.state != "ended":
            session.record = record
            session.note(state="ended", status=EXIT_INTERRUPTED, why="stopped")
    session.say(f"run {session.record.spec.name}: no worker is alive")
    return EXIT_OK


def remove(session: Session) -> list[str]:
    """Removes what a launch has made on its hosts and here, once no worker lives; returns what is left, in words.

    Raises:
      RunFailed: a worker lives, or a host does not answer.
    """
    if session.record.machines:
        session.backend.remove(session.record, session.say)
    else:
        for worker in range(len(session.record.roots)):  # one after another: hosts may share a home, and the folder
            session.remove_folder(worker)
    session.folder.remove()
    spec = session.record.spec
    left = [f"the run itself: {spec.run_dir}/{spec.name}", f"its code: {spec.run_dir}/code/{session.record.code}.tar"]
    made = (
        []
        if spec.python or not session.record.python or session.record.machines
        else sorted(set(session.record.python))
    )
    return left + [f"environments, for the next launch: {os.path.dirname(os.path.dirname(p))}" for p in made]

"""Following a job of a cluster to its end: what its workers say, how it ends, the next attempt after a preemption."""

import contextlib
import dataclasses
import signal
import time

from jaxops.core.failures import EXIT_INTERRUPTED, EXIT_LOST, RunFailed, UserError
from jaxops.core.secret_text import printable, without_secrets
from jaxops.launch import worker_files
from jaxops.launch.backends.protocol import Sight
from jaxops.launch.engine import MOST_PAUSE
from jaxops.launch.scheduled import ScheduledLaunch, give_back, submit_attempt
from jaxops.launch.verdict import AttemptVerdict, End, judge
from jaxops.launch.voice import VOICE


class Follower:
    """Watches a job to its end, prints what its workers say, and tries again where the cluster does not.

    Args:
      launch: the launch, which is submitted.
      pause: the time between two looks, in seconds.
      adopted: whether an earlier launcher has printed what was said so far.
    """

    def __init__(self, launch: ScheduledLaunch, pause: float, adopted: bool = False):
        self._launch, self._pause = launch, pause
        self._offsets: dict[tuple[int, int], int] = {}
        self._skip, self._stopping, self._told = adopted, False, ""

    def follow(self) -> int:
        """Returns the exit status of the launch."""
        while True:
            try:
                verdict = self._attempt()
            except KeyboardInterrupt as error:
                self._stopped_by(error)
                continue
            record = self._launch.record
            deadline = worker_files.deadline(self._launch.job)
            late = deadline is not None and time.time() >= deadline
            more = record.retried < record.retries and not late and not self._launch.stop_wanted()
            if not verdict.retry or not more or self._launch.backend.tries_again:
                enough = f" ({record.retries} retries: enough)" if verdict.retry and not late else ""
                self._launch.say(f"attempt {record.attempt}: {verdict.why}{enough}")
                self._launch.note(state="ended", status=verdict.status, why=verdict.why)
                give_back(self._launch)
                return verdict.status
            self._again(verdict)

    def _again(self, verdict: AttemptVerdict) -> None:
        """Removes what a preemption has left, and submits the next attempt."""
        launch, record = self._launch, self._launch.record
        launch.say(f"attempt {record.attempt}: {verdict.why}; trying again")
        launch.note(retried=record.retried + 1)
        time.sleep(min(2.0**record.retried, MOST_PAUSE) * min(self._pause, 1.0))
        try:
            launch.backend.remove(launch.job)
            launch.note(attempt=record.attempt + 1, handle="")
            submit_attempt(launch)
        except RunFailed as error:  # the next look finds the same end, and counts
            launch.say(str(error))
        except UserError as error:
            launch.note(state="ended", status=EXIT_LOST, why=str(error))
            give_back(launch)
            raise

    def _attempt(self) -> AttemptVerdict:
        """Returns what the job comes to, once it has ended."""
        launch = self._launch
        while True:
            try:
                if launch.stop_wanted() and not self._stopping:
                    with contextlib.suppress(RunFailed):  # `job stop` has said that the folder is away
                        worker_files.ask_to_stop(launch.job)
                    launch.backend.cancel(launch.job)
                    self._stopping = True
                sight = launch.backend.look(launch.job)
            except (RunFailed, UserError) as error:  # such as a login that has expired: the workers do not need it
                self._tell(f"{error}; looking again")
                time.sleep(self._pause)
                continue
            if sight.state not in ("absent", "ended"):
                self._tell(f"attempt {sight.attempt}: {sight.state}{f' ({sight.why})' if sight.why else ''}")
            if sight.attempt != launch.record.attempt and sight.state != "absent":
                launch.note(attempt=sight.attempt, retried=launch.record.retried + 1)
            said = self._print(sight)
            if sight.state in ("absent", "ended") and not said:
                return self._verdict(sight)
            time.sleep(self._pause)

    def _tell(self, text: str) -> None:
        if text != self._told:
            self._launch.say(text)
        self._told = text

    def _print(self, sight: Sight) -> bool:
        """Prints what the workers have said since; returns whether that was anything."""
        anything = False
        for worker in range(len(self._launch.record.spec.hosts)):
            key = (sight.attempt, worker)
            text, end = worker_files.read_log(self._launch.job, sight.attempt, worker, self._offsets.get(key, 0))
            self._offsets[key] = end
            anything |= bool(text)
            if not self._skip:
                for line in printable(without_secrets(text)).splitlines():
                    if not line.startswith("[Gloo]"):
                        VOICE.worker(worker, self._launch.record.spec.hosts[worker], line)
        self._skip = False
        return anything

    def _verdict(self, sight: Sight) -> AttemptVerdict:
        launch, ends = self._launch, []
        for worker in range(len(launch.record.spec.hosts)):
            end = worker_files.read_end(launch.job, sight.attempt, worker)
            host = (end or {}).get("host") or (sight.hosts[worker] if worker < len(sight.hosts) else "no host yet")
            name = f"worker {worker} ({host})"
            if end is None:
                ends.append(End(name, None, "max-hours" if sight.late else "lost"))
            else:
                ends.append(End(name, end["code"], end.get("why", ""), asked=end.get("why") == "others"))
        if _is_final(sight.code):  # the cluster has judged, and ended the others, who saved or had not begun
            decisive = [end for end in ends if end.code == sight.code]
            if decisive:
                return judge(decisive, self._stopping or launch.stop_wanted())
        found = judge(ends, self._stopping or launch.stop_wanted())
        if all(end.code is None for end in ends) and not (sight.late or self._stopping):
            return self._without_workers(sight, found)
        return found

    def _without_workers(self, sight: Sight, found: AttemptVerdict) -> AttemptVerdict:
        """Judges a job of which no worker has said how it ended, by the words of the cluster."""
        for worker in range(len(self._launch.record.spec.hosts)):
            for line in printable(without_secrets(self._launch.backend.console(self._launch.job, worker))).splitlines():
                VOICE.worker(worker, self._launch.record.spec.hosts[worker], line)
        if not _is_final(sight.code):
            return dataclasses.replace(found, why=f"no worker said how it ended{f': {sight.why}' if sight.why else ''}")
        why = f"it ended with status {sight.code} before a worker began{f' ({sight.why})' if sight.why else ''}"
        return AttemptVerdict(sight.code or EXIT_LOST, False, why)

    def _stopped_by(self, error: BaseException) -> None:
        """Has the workers save and end, as Ctrl-C asks; a closed terminal (SIGHUP) leaves them alone.

        Raises:
          KeyboardInterrupt: a second Ctrl-C, or SIGHUP; the workers may go on.
        """
        launch = self._launch
        if str(error) == signal.Signals.SIGHUP.name or self._stopping:
            launch.say(f"the workers go on; jaxops job status {launch.folder.id} finds them")
            raise error
        launch.say(f"stopping: the workers save (Ctrl-C again leaves them to it: jaxops job status {launch.folder.id})")
        launch.folder.ask_to_stop()


def _is_final(code: int | None) -> bool:
    """Returns whether a status is never tried again."""
    return code is not None and code not in (EXIT_LOST, EXIT_INTERRUPTED) and code < 128

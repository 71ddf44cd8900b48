"""What the ends of the workers mean together: done, failed, saved, or to be tried again.

The statuses are those of docs/failures.md. Tested in tests/launch/test_verdict.py.
"""

import dataclasses
from collections.abc import Sequence

from jaxops.core.failures import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_LOST, EXIT_OK, EXIT_USAGE

EXIT_STOPPED = 130
_KILLED, _TERMINATED, _HUNG_UP = 137, 143, 129
_PREEMPTED = {
    EXIT_INTERRUPTED: "was told to stop, and saved",
    EXIT_STOPPED: "was told to stop before it had anything to save",
    _TERMINATED: "was told to stop before it had anything to save",
    _HUNG_UP: "was told to stop before it had anything to save",
    _KILLED: "was killed",
}


@dataclasses.dataclass(frozen=True)
class End:
    """The end of one worker.

    Attributes:
      worker: the worker and its host, in words.
      code: its exit status; None where nobody knows.
      why: `max-hours` where its time was used up; `lost` or `unreachable` where there is no status.
      asked: whether the launcher itself ended it, because of another one.
    """

    worker: str
    code: int | None
    why: str = ""
    asked: bool = False


@dataclasses.dataclass(frozen=True)
class AttemptVerdict:
    """The end of an attempt: the exit status of `jaxops launch`, whether to try again, and why, in words."""

    status: int
    retry: bool
    why: str


def judge(ends: Sequence[End], stopped: bool = False) -> AttemptVerdict:
    """Judges an attempt by the ends of its workers.

    One preempted worker makes the attempt preempted, whatever its siblings say: they fail in many ways when it goes.

    Args:
      ends: one of each worker.
      stopped: whether the launch was told to stop.
    """
    codes = [end.code for end in ends]
    if all(code == EXIT_OK for code in codes):
        return AttemptVerdict(EXIT_OK, False, "done")
    saved = all(code in (EXIT_OK, EXIT_INTERRUPTED) for code in codes)
    if any(end.why == "max-hours" for end in ends):
        how = "it saved" if saved else "a worker did not save in time, and its last checkpoint holds"
        return AttemptVerdict(EXIT_INTERRUPTED if saved else EXIT_LOST, False, f"--max-hours are used up: {how}")
    if stopped:
        how = "it saved" if saved else "a worker ended before it had saved, and its last checkpoint holds"
        return AttemptVerdict(EXIT_INTERRUPTED if saved else EXIT_STOPPED, False, f"stopped: {how}")
    for end in ends:
        if end.code is None:
            how = "its host does not answer" if end.why == "unreachable" else "is gone without a word"
            return AttemptVerdict(EXIT_LOST, True, f"{end.worker}: {how}")
        if end.code in _PREEMPTED and not end.asked:
            status = EXIT_INTERRUPTED if end.code == EXIT_INTERRUPTED else EXIT_LOST
            return AttemptVerdict(status, True, f"{end.worker} {_PREEMPTED[end.code]} (exit status {end.code})")
    for code in (EXIT_USAGE, EXIT_FAILED):
        for end in ends:
            if end.code == code:
                what = "its input is wrong" if code == EXIT_USAGE else "the run failed"
                return AttemptVerdict(code, False, f"{end.worker}: {what} (exit status {code}); its log says why")
    for end in ends:
        if end.code is not None and end.code not in (EXIT_OK, EXIT_INTERRUPTED, EXIT_LOST) and end.code < 128:
            why = f": {end.why}" if end.why else "; its log says why"
            return AttemptVerdict(EXIT_FAILED, False, f"{end.worker} ended with status {end.code}{why}")
    lost = next(end for end in ends if end.code != EXIT_OK)
    return AttemptVerdict(
        EXIT_LOST, True, f"{lost.worker} lost another worker, or the devices (exit status {lost.code})"
    )

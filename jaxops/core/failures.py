"""Errors whose messages are written for the person who reads them, and their exit statuses."""

import difflib
import errno
from collections.abc import Iterable

EXIT_OK = 0
EXIT_FAILED = 1
"""The run itself failed: a non-finite loss, out of memory, an error in the user's code."""
EXIT_USAGE = 2
"""The user's input is wrong; nothing was written."""
EXIT_INTERRUPTED = 75
"""Interrupted (Ctrl-C or SIGTERM), or paused by an alarm, and saved: the same command again resumes (EX_TEMPFAIL)."""

EXIT_LOST = 76
"""Another process or the backend was lost, which is nobody's mistake: try again, the same command resumes."""

EXIT_WAITING = 77
"""People have not answered yet: nothing is wrong, and the same command goes on once they have."""

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
"""The error numbers of a disk that is full or broken, which is no wrong input."""


class UserError(Exception):
    """A mistake in the user's input; the command line shows its message alone and exits with status 2.

    `shared` says that all processes of a job raise the same error: then only process 0 shows it.

    Example:
      if rate < 0:
          raise jaxops.UserError(f"objective.rate: expected zero or more, got {rate}")
    """

    def __init__(self, message: str, *, shared: bool = False):
        super().__init__(message)
        self.shared = shared


class RunFailed(Exception):
    """The run cannot go on (non-finite loss, lost save, out of memory); its message is shown, and the status is 1.

    `shared` has the meaning that it has in `UserError`; `status` is the exit status, which is that of another process
    where this one ends with it.

    Example:
      try:
          run = jaxops.fit(task)
      except jaxops.RunFailed as error:
          print(f"the run failed: {error}")
    """

    def __init__(self, message: str, *, shared: bool = False, status: int = EXIT_FAILED):
        super().__init__(message)
        self.shared, self.status = shared, status


class Lost(RunFailed):
    """Another process of the run, its machine or the devices are gone: shown as its message, exit status 76."""

    def __init__(self, message: str, *, shared: bool = False):
        super().__init__(message, shared=shared, status=EXIT_LOST)


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns a clause that names the closest known word, `; did you mean 'lr'?`, or an empty string."""
    found = difflib.get_close_matches(str(name), [str(k) for k in known], n=1, cutoff=0.6)
    return f"; did you mean '{found[0]}'?" if found else ""

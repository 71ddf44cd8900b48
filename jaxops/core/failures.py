"""Errors that are written for the person who reads them, and the exit statuses that go with them."""

import difflib
from collections.abc import Iterable

EXIT_OK = 0
EXIT_FAILED = 1
"""The run itself failed: a non-finite loss, out of memory, an error in the user's code."""
EXIT_USAGE = 2
"""The user's input is wrong; nothing was written."""
EXIT_INTERRUPTED = 75
"""Interrupted (Ctrl-C or SIGTERM) and saved: the same command again resumes (sysexits' EX_TEMPFAIL)."""

EXIT_LOST = 76
"""Another process or the backend was lost, which is nobody's mistake: try again, the same command resumes."""


class UserError(Exception):
    """A mistake in what the user gave us: shown as its message alone, exit status 2.

    `shared` where it is raised on all processes of a job alike: process 0 alone shows it then.
    """

    def __init__(self, message: str, *, shared: bool = False):
        super().__init__(message)
        self.shared = shared


class RunFailed(Exception):
    """The run cannot go on (non-finite loss, lost save, out of memory): shown as its message, exit status 1.

    `shared` as in UserError; `status` is the exit status, that of another process where this one ends with it.
    """

    def __init__(self, message: str, *, shared: bool = False, status: int = EXIT_FAILED):
        super().__init__(message)
        self.shared, self.status = shared, status


class Lost(RunFailed):
    """Another process of the run, its machine or the devices are gone: shown as its message, exit status 76."""

    def __init__(self, message: str, *, shared: bool = False):
        super().__init__(message, shared=shared, status=EXIT_LOST)


def nearest(name: str, known: Iterable[str]) -> str:
    """A clause that names the closest known word, or an empty string: `; did you mean 'lr'?`."""
    found = difflib.get_close_matches(str(name), [str(k) for k in known], n=1, cutoff=0.6)
    return f"; did you mean '{found[0]}'?" if found else ""

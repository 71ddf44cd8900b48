"""Commands of a cluster's own tools, run on this machine: their words, a limit in time, and what is missing."""

import subprocess
from collections.abc import Mapping, Sequence

from jaxops.core.failures import UserError
from jaxops.launch.hosts import Output, Unreachable


def run_tool(
    argv: Sequence[str],
    *,
    missing: str,
    stdin: bytes = b"",
    timeout: float = 120.0,
    env: Mapping[str, str] | None = None,
) -> Output:
    """Runs a command of this machine and returns what it left.

    Args:
      argv: the command and its arguments.
      missing: what to do where the program is not installed, as the end of a sentence.
      stdin: bytes that it reads.
      timeout: seconds after which the cluster counts as not answering.
      env: its environment; None is that of this process.

    Raises:
      UserError: the program is not installed.
      Unreachable: it does not end in time.
    """
    try:
        # In a session of its own: Ctrl-C is for the launcher, and half a request is worse than a whole one.
        done = subprocess.run(
            list(argv), input=stdin, capture_output=True, timeout=timeout, start_new_session=True, env=env
        )
    except FileNotFoundError:
        raise UserError(f"there is no `{argv[0]}` on this machine: {missing}") from None
    except subprocess.TimeoutExpired:
        raise Unreachable(f"{' '.join(argv[:3])}: no answer within {timeout:.0f} s") from None
    return Output(done.returncode, done.stdout.decode("utf-8", "replace"), done.stderr.decode("utf-8", "replace"))

"""A finding: the verdict of one check, with what was measured, the bound, and the reason in words."""

import dataclasses
from collections.abc import Iterable
from typing import Any, Literal

Verdict = Literal["passed", "failed", "not applicable"]


@dataclasses.dataclass(frozen=True)
class Finding:
    """The outcome of one check.

    Attributes:
      check: the name of the check.
      verdict: whether it passed, failed, or could not be made.
      why: the reason, in words.
      measured: what was measured, a number or plain values; None where nothing was.
      bound: what it may be at most; None where no number decides.
    """

    check: str
    verdict: Verdict
    why: str
    measured: Any = None
    bound: float | None = None

    @classmethod
    def of(
        cls, check: str, problem: str | None, why: str, measured: Any = None, bound: float | None = None
    ) -> "Finding":
        """Returns a finding that failed because of `problem`, or passed because of `why` where there is no problem.

        Args:
          check: the name of the check.
          problem: why it failed; None or empty where it did not.
          why: why it passed.
          measured: what was measured, a number or plain values.
          bound: what it may be at most.
        """
        return cls(check, "failed" if problem else "passed", problem or why, measured, bound)

    @classmethod
    def skipped(cls, check: str, why: str) -> "Finding":
        """Returns the finding of a check that could not be made."""
        return cls(check, "not applicable", why)

    def line(self) -> str:
        """Returns the finding as one line for people."""
        mark = {"passed": "passed", "failed": "FAILED", "not applicable": "-"}[self.verdict]
        bound = ""
        if isinstance(self.measured, int | float) and self.bound:
            bound = f" ({self.measured:.3g}, at most {self.bound:.3g})"
        return f"{mark:<7} {self.check:<14} {self.why}{bound}"


def failures(findings: Iterable[Finding]) -> list[Finding]:
    """Returns the findings that failed."""
    return [one for one in findings if one.verdict == "failed"]


def require(findings: Iterable[Finding]) -> list[Finding]:
    """Returns the findings, none of which failed.

    Raises:
      AssertionError: one failed; the message has a line for each that did.
    """
    found = list(findings)
    if failed := failures(found):
        raise AssertionError("\n".join(one.line() for one in failed))
    return found

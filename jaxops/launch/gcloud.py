"""Google Cloud's own command line: its calls, its refusals in plain words, and the names that may reach it.

What gcloud answers, and where that is written, is in tests/launch/google.md.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jaxops.core.failures import RunFailed, UserError
from jaxops.launch.arguments import Request
from jaxops.launch.commands import run_tool
from jaxops.launch.hosts import Output

MISSING = "install it (https://cloud.google.com/sdk/docs/install), or use another --backend"
OPTIONS = {
    "project": "the Google Cloud project",
    "zone": "the zone, such as us-east5-b",
    "network": "the VPC network (default: the project's default)",
    "subnet": "the subnetwork",
    "service-account": "the account that the VMs act as",
    "external-ip": "no, for VMs without an external address, which then need Cloud NAT",
    "wait": "minutes to wait for machines, until what came in part is removed",
}
_PATTERNS = {
    "project": re.compile(r"[a-z](?:[a-z0-9.:-]{4,61})[a-z0-9]"),
    "zone": re.compile(r"[a-z]+-[a-z]+[0-9]+-[a-z]"),
    "network": re.compile(r"[a-z][a-z0-9/-]{0,200}"),
    "subnet": re.compile(r"[a-z][a-z0-9/-]{0,200}"),
    "service-account": re.compile(r"[a-z0-9][a-z0-9.-]*@[a-z0-9.-]+"),
    "external-ip": re.compile(r"no"),
    "wait": re.compile(r"[1-9][0-9]{0,4}"),
    "reservation": re.compile(r"[a-z][a-z0-9-]{0,62}"),
    "image-family": re.compile(r"[a-z][a-z0-9-]{0,62}"),
    "image-project": re.compile(r"[a-z][a-z0-9.:-]{1,62}"),
    "boot-disk-size": re.compile(r"[1-9][0-9]{1,4}GB"),
    "runtime-version": re.compile(r"[a-z][a-z0-9._-]{0,80}"),
    "iap": re.compile(r"yes"),
}
_REFUSALS: Sequence[tuple[str, str]] = (
    (
        r"active account|Reauthentication|invalid_grant|credentials .*(?:expired|invalid|revoked)|refresh.*auth tokens",
        "gcloud has no valid credentials: gcloud auth login",
    ),
    (
        r"Failed to find project|project .*(?:not found|does not exist)|resource 'projects/[^/']*' was not found",
        "no such project, or it is not yours to see: --option project=...",
    ),
    (
        r"(?:zones|locations)/[^/' ]+' was not found|Unknown zone|[Ll]ocation .* (?:not found|is not found)",
        "no such zone, or not for this project: --option zone=...",
    ),
    (
        r"PERMISSION_DENIED|Required '.*' permission|does not have permission",
        "this account may not do that: it needs the roles of docs/launch.md",
    ),
    (r"QUOTA_EXCEEDED|Quota '.*' exceeded|Quota limit", "the quota does not allow it: ask for more, or another zone"),
    (r"unrecognized arguments|Invalid choice", "this gcloud is too old: gcloud components update"),
)
_SCARCE = re.compile(r"RESOURCE_POOL_EXHAUSTED|does not have enough resources|no more capacity", re.IGNORECASE)
_ABSENT = re.compile(r"was not found|NOT_FOUND|could not be found", re.IGNORECASE)
_EXISTS = re.compile(r"already exists|ALREADY_EXISTS", re.IGNORECASE)


def problems(request: Request, options: Mapping[str, str]) -> list[str]:
    """Returns what is wrong with the values that would reach gcloud, in words."""
    found = [
        f"--option {key}=... is missing ({options[key]})" for key in ("project", "zone") if not request.option(key)
    ]
    for key in options:
        value = request.option(key)
        if value and not _PATTERNS[key].fullmatch(value):
            found.append(f"--option {key}={value[:60]!r}: expected {options[key]}")
    if request.reservation and not _PATTERNS["reservation"].fullmatch(request.reservation):
        found.append(f"--reservation {request.reservation[:60]!r}: expected the name of a reservation")
    if request.hosts:
        found.append("--hosts goes with --backend ssh; these machines are made")
    if request.flex and request.max_hours is not None and not 1 / 6 <= request.max_hours <= 168:
        found.append(f"--flex --max-hours {request.max_hours:g}: flex-start lasts from ten minutes to seven days")
    return found


def call(argv: Sequence[str], timeout: float = 900.0) -> Output:
    """Runs gcloud and returns what it left, refusals included."""
    return run_tool(argv, missing=MISSING, timeout=timeout)


def ask(argv: Sequence[str]) -> Any:
    """Runs `gcloud ... describe` or `list`, and returns its JSON; None where the thing is not there.

    Raises:
      UserError, RunFailed: gcloud refuses; the message has its words and the remedy.
    """
    done = call([*argv, "--format=json"], 180)
    if done.code == 0:
        try:
            return json.loads(done.out or "null")
        except ValueError:
            raise RunFailed(f"gcloud answered what cannot be read: {done.out[:200]!r}") from None
    if _ABSENT.search(done.err) and not _remedy(done.err):
        return None
    raise refusal(argv, done)


def make(argv: Sequence[str]) -> bool:
    """Runs `gcloud ... create`; returns whether it made something, or found that it was there already."""
    done = call(argv)
    if done.code and not _EXISTS.search(done.err):
        raise refusal(argv, done)
    return not done.code


def delete(argv: Sequence[str]) -> None:
    """Runs `gcloud ... delete`; that there is nothing of this name is as good."""
    done = call(argv, 1800)
    if done.code and (not _ABSENT.search(done.err) or _remedy(done.err)):
        raise refusal(argv, done)


def _remedy(text: str) -> str:
    return next((remedy for pattern, remedy in _REFUSALS if re.search(pattern, text, re.IGNORECASE)), "")


def refusal(argv: Sequence[str], done: Output) -> Exception:
    """Returns gcloud's refusal as an error: one of the user's, with the remedy, or one that may pass."""
    verb = " ".join(word for word in argv[:6] if not word.startswith("-"))
    if _SCARCE.search(done.err):
        return RunFailed(f"{verb}: no machines of this kind are free in the zone: {done.last_words}")
    if remedy := _remedy(done.err):
        return UserError(f"{remedy}. {verb} said: {done.last_words}")
    return RunFailed(f"{verb} failed: {done.last_words}")

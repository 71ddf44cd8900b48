"""`jaxops launch` and `jaxops job`: a config on machines, and what becomes of it there."""

import argparse
import dataclasses
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from jaxops.core.failures import EXIT_OK, RunFailed, UserError
from jaxops.core.secret_text import remember_secret
from jaxops.launch.backends.table import MODULES
from jaxops.launch.voice import VOICE

if TYPE_CHECKING:
    from jaxops.launch.backends.protocol import RenderedBackend
    from jaxops.launch.code import Code
    from jaxops.launch.record import LaunchFolder, LaunchRecord
    from jaxops.launch.scheduled import ScheduledLaunch
    from jaxops.launch.session import Session

    Launch = Session | ScheduledLaunch

COMMANDS = ("launch", "job")
_ACTIONS = {
    "list": "The launches that this machine knows of.",
    "status": "A launch's workers, attempts and hours left.",
    "logs": "What the workers of a launch have said.",
    "stop": "Have the workers save and end; nothing is removed.",
    "down": "Stop a launch and remove what it made on its hosts; the run stays.",
    "ssh": "A shell on the host of a worker.",
}


def add_arguments(launch: Any, job: Any, parser: Any) -> None:
    """Adds the arguments of both commands to their parsers."""
    add = launch.add_argument
    add("--on", required=True, metavar="TYPE", help="the accelerator: cpu-8, v5e-8, ... (all hosts together)")
    text = f"the way to reach machines (default: local): {', '.join(MODULES)}"
    add("--backend", default="local", metavar="B", help=text)
    add("--hosts", metavar="HOST,...", help="ssh: one worker on each; @FILE has one a line")
    add("--workers", type=int, metavar="N", help="local, slurm: the number of workers (default: 1)")
    text = "an option of the backend (may be given again); a wrong KEY prints those that it has"
    add("--option", action="append", default=[], metavar="KEY=VALUE", help=text)
    add("--spot", action="store_true", help="buy at the price of machines that may be taken away")
    add("--flex", action="store_true", help="flex-start: wait for machines, and have them for the hours asked for")
    add("--reservation", metavar="R", help="use machines of this reservation")
    add("--max-hours", type=float, metavar="H", help="when the hosts end the workers by themselves, retries included")
    add("--grace", type=float, default=120.0, metavar="S", help="seconds for a save, before a kill (default: 120)")
    add("--retries", type=int, default=10, metavar="N", help="attempts after the first (default: 10)")
    add("--python", metavar="PATH", help="a Python that the hosts have, with all packages (local: this one)")
    add("--lock", default="requirements.lock", metavar="FILE", help="below the code: what hosts install otherwise")
    add("--wheelhouse", metavar="PATH", help="a folder of wheels on the hosts, where they reach no package index")
    add("--coordinator", metavar="ADDRESS", help="where workers reach the first host (default: as ssh's config has it)")
    text = "an environment variable that the workers get, by its name (may be given again)"
    add("--secret", action="append", default=[], metavar="NAME", help=text)
    add("--accept-code", action="store_true", help="go on although code by import path has changed")
    text = "text (the launcher on stderr, workers on stdout), or json: all on stdout, one object a line"
    add("--log", choices=("text", "json"), default="text", help=text)
    add("--dry-run", action="store_true", help="print every command and file, and touch nothing")
    add("--detach", action="store_true", help="leave the launcher in the background of this machine")
    actions = job.add_subparsers(dest="action", required=True, metavar="ACTION", parser_class=parser)
    for name, what in _ACTIONS.items():
        made = actions.add_parser(name, help=what, description=what)
        if name != "list":
            made.add_argument("name", metavar="RUN", help="the run's name, its folder, or the id that `job list` shows")
        if name in ("list", "status"):
            made.add_argument("--json", action="store_true", help="print one JSON object")
        if name in ("logs", "ssh"):
            text = "this one's alone" if name == "logs" else "its host (default: the first)"
            made.add_argument("--worker", type=int, metavar="N", help=text)
        if name == "logs":
            made.add_argument("--follow", action="store_true", help="go on until the workers end")


def launch(args: argparse.Namespace) -> int:
    """Runs `jaxops launch CONFIG [a.b=VALUE ...] --on TYPE --backend B --max-hours H`."""
    VOICE.json = args.log == "json"
    try:
        return _launch(args)
    except (UserError, RunFailed) as error:
        if VOICE.json:
            VOICE.say(str(error), "error")
        raise


def _launch(args: argparse.Namespace) -> int:
    from jaxops.launch.accelerators import find_accelerator
    from jaxops.launch.arguments import Request
    from jaxops.launch.backends.protocol import RenderedBackend, Scheduler
    from jaxops.launch.backends.table import find_backend
    from jaxops.launch.code import bundle
    from jaxops.launch.record import LaunchFolder, LaunchRecord
    from jaxops.launch.request import check, make_spec
    from jaxops.run.build import load_config

    request = Request(
        **{name: getattr(args, name) for name in ("config", "overrides", "on", "backend", "hosts", "workers")},
        **{name: getattr(args, name) for name in ("max_hours", "grace", "retries", "python", "lock", "wheelhouse")},
        **{name: getattr(args, name) for name in ("spot", "flex", "reservation", "detach", "accept_code")},
        coordinator=args.coordinator,
        secrets=args.secret,
        options=args.option,
    )
    check(request)
    loaded = load_config(args.config, args.overrides)
    code = bundle(Path.cwd())
    fresh = LaunchRecord(spec=make_spec(request, loaded, code), grace=args.grace, retries=args.retries)
    VOICE.launch = fresh.spec.id
    _hide(fresh.spec.secrets)
    if fresh.spec.price:
        _say(f"{find_accelerator(fresh.spec.type)}, {fresh.spec.price}, for at most {args.max_hours:g} hours")
    backend = find_backend(request.backend)
    if isinstance(backend, RenderedBackend):
        return _rendered(backend, dataclasses.replace(fresh, hours=float(args.max_hours)))
    way = _scheduled if isinstance(backend, Scheduler) else _driven
    return way(args, LaunchFolder(fresh.spec.id), fresh, code)


def _rendered(backend: "RenderedBackend", record: "LaunchRecord") -> int:
    """Prints a launch for another tool."""
    for name, text in backend.files(record).items():
        print(f"# {name}\n{text.rstrip()}")
    for line in backend.commands(record):
        print(f"# {line}" if backend.files(record) else line)
    _say(f"{backend.name}: only written down; nothing was started, and `jaxops job` will not know of it")
    return EXIT_OK


def _driven(args: argparse.Namespace, folder: "LaunchFolder", fresh: "LaunchRecord", code: "Code") -> int:
    """Launches on hosts that this process reaches."""
    from jaxops.launch.engine import give_back, open_session, supervise
    from jaxops.launch.engine import launch as started
    from jaxops.launch.session import Session

    hours = float(args.max_hours)
    if args.dry_run:
        started(Session(folder, fresh, _say, dry=True), code, fresh, hours)
        return EXIT_OK
    with folder.held():
        session = open_session(folder, fresh, _say)
        try:
            adopted = started(session, code, fresh, hours)
        except KeyboardInterrupt:
            _say(f"`jaxops job down {folder.id}` ends and removes what is on {', '.join(fresh.spec.hosts)}")
            raise
        except (UserError, RunFailed):
            if session.record.machines:
                _say(f"machines may be left, for the next launch, and cost money: jaxops job down {folder.id}")
            raise
        if not args.detach:
            status = supervise(session, code, _pause(session), adopted)
            give_back(session)
            return status
    return _detach(folder)


def _scheduled(args: argparse.Namespace, folder: "LaunchFolder", fresh: "LaunchRecord", code: "Code") -> int:
    """Launches in a cluster that starts the workers by itself."""
    from jaxops.launch.follow import Follower
    from jaxops.launch.scheduled import ScheduledLaunch, open_scheduled, show, submit

    if args.dry_run:
        show(ScheduledLaunch(folder, fresh, _say), code, float(args.max_hours))
        return EXIT_OK
    with folder.held():
        opened = open_scheduled(folder, fresh, _say)
        try:
            adopted = submit(opened, code, fresh, float(args.max_hours))
        except KeyboardInterrupt:
            _say(f"`jaxops job down {folder.id}` ends and removes what was submitted")
            raise
        if not args.detach:
            return Follower(opened, _pause(opened), adopted).follow()
    if not opened.backend.tries_again:
        return _detach(folder)
    _say(f"{fresh.spec.backend} tries again by itself; jaxops job status|logs|stop {folder.id}")
    return EXIT_OK


def _detach(folder: "LaunchFolder") -> int:
    """Starts a launcher of its own session, which adopts the workers, and leaves it."""
    argv = [word for word in sys.argv[1:] if word != "--detach"]
    with open(folder.log, "ab") as log:
        child = subprocess.Popen(
            [sys.executable, "-m", "jaxops", *argv],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    _say(
        f"process {child.pid} of this machine watches it and tries again after a preemption, as long as this machine is"
        f" awake; the workers, and their --max-hours, do not need it. It writes {folder.log};"
        f" jaxops job status|logs|stop {folder.id}"
    )
    return EXIT_OK


def _hide(names: Sequence[str]) -> None:
    """Keeps the values of these variables out of all that is printed here."""
    for name in (given.partition("=")[0] for given in names):
        if value := os.environ.get(name):
            remember_secret(value, f"${{secret:{name}}}")


def _pause(session: "Launch") -> float:
    return 0.5 if session.backend.on_this_machine else 3.0


def _say(line: str) -> None:
    VOICE.say(line)


def job(args: argparse.Namespace) -> int:
    """Runs `jaxops job list | status RUN | logs RUN | stop RUN | down RUN | ssh RUN`."""
    from jaxops.launch.backends.protocol import Scheduler
    from jaxops.launch.backends.table import find_backend
    from jaxops.launch.record import find_launch

    if args.action == "list":
        return _list(args)
    folder, record = find_launch(args.name)
    _hide(record.spec.secrets)
    worker, count = getattr(args, "worker", None), len(record.spec.hosts)
    if worker is not None and not 0 <= worker < count:
        raise UserError(f"--worker {worker}: this launch has workers 0 to {count - 1}")
    if isinstance(find_backend(record.spec.backend), Scheduler):
        from jaxops.launch.scheduled import ScheduledLaunch

        scheduled = ScheduledLaunch(folder, record, _say)
        return {"status": _status, "logs": _logs_kept, "stop": _end, "down": _end, "ssh": _shell}[args.action](
            scheduled, args
        )
    from jaxops.launch.session import Session

    session = Session(folder, record, _say)
    return {"status": _status, "logs": _logs, "stop": _stop, "down": _down, "ssh": _ssh}[args.action](session, args)


def _list(args: argparse.Namespace) -> int:
    from jaxops.cli.printing import print_json
    from jaxops.cli.text import aligned
    from jaxops.launch.record import launches

    found = [(folder, record) for folder in launches() if (record := folder.load()) is not None]
    if args.json:
        return print_json([{"id": folder.id, **vars(record)} for folder, record in found])
    rows = [("launch", "state", "attempt", "backend", "hosts")]
    for folder, record in found:
        hosts = ", ".join(record.spec.hosts)
        rows.append((folder.id, record.state, str(record.attempt), record.spec.backend, hosts))
    print("\n".join(aligned(rows)) if found else "no launch is known on this machine")
    return EXIT_OK


def _status(session: "Launch", args: argparse.Namespace) -> int:
    from jaxops.cli.printing import print_json
    from jaxops.cli.text import aligned

    record, polls = session.record, session.polls()
    workers = [
        {"worker": n, "host": poll.get("host", name), "state": poll["state"], "code": poll["code"], "why": poll["why"]}
        for n, (name, poll) in enumerate(zip(record.spec.hosts, polls, strict=True))
    ]
    watched = session.folder.supervised()
    left = max(session.deadline - time.time(), 0.0) / 3600 if session.deadline else None
    if args.json:
        return print_json(
            {"id": session.folder.id, "watched": watched, "hours_left": left, "workers": workers, **vars(record)}
        )
    alive = any(poll["state"] == "running" for poll in polls)
    by = f"watched by process {session.folder.owner()}" if watched else "no launcher watches it"
    facts = [("launch", session.folder.id), ("run", f"{record.spec.run_dir}/{record.spec.name}")]
    facts += [("state", f"{record.state}{f': {record.why}' if record.why else ''}; {by}")]
    facts += [("attempt", f"{record.attempt} ({record.retried} of {record.retries} retries)")]
    facts += [("job", f"{record.handle} ({record.spec.backend})")] if record.handle else []
    facts += [("price class", record.spec.price)] if record.spec.price else []
    facts += [("hours left", f"{left:.2f}")] if left is not None and alive else []
    for one in workers:
        ended = "" if one["code"] is None else f" with exit status {one['code']}"
        facts.append((f"worker {one['worker']}", f"{one['host']}: {one['state']}{ended} {one['why']}".rstrip()))
    print("\n".join(aligned(facts)))
    if alive and not watched and not session.backend.tries_again:
        print("nobody would try again after a preemption: give the same `jaxops launch` again")
    return EXIT_OK


def _logs(session: "Session", args: argparse.Namespace) -> int:
    from jaxops.core.secret_text import printable, without_secrets

    offsets = [0] * len(session.hosts)
    while True:
        busy = False
        for worker in range(len(session.hosts)):
            if args.worker in (None, worker):
                poll = session.poll(worker, offsets[worker])
                for line in printable(without_secrets(poll["text"])).splitlines():
                    print(f"[{worker}] {line}", flush=True)
                offsets[worker] = poll["offset"]
                busy |= bool(poll["text"]) or (args.follow and poll["state"] in ("running", "unreachable"))
        if not busy:
            return EXIT_OK
        if args.follow:
            time.sleep(_pause(session))


def _stop(session: "Session", args: argparse.Namespace) -> int:
    from jaxops.launch.engine import give_back, stop_and_wait

    status = stop_and_wait(session, _pause(session))
    give_back(session)
    return status


def _down(session: "Session", args: argparse.Namespace) -> int:
    from jaxops.launch.engine import remove, stop_and_wait

    stop_and_wait(session, _pause(session))
    for left in remove(session):
        _say(f"kept {left}")
    return EXIT_OK


def _ssh(session: "Session", args: argparse.Namespace) -> int:
    worker = args.worker or 0
    root = session.record.roots[worker] if session.record.roots else ""
    argv = session.backend.shell(session.record, worker, f'cd {shlex.quote(root)} && exec "$SHELL" -l' if root else "")
    if argv is None:
        raise UserError(f"job ssh: the workers of {session.record.spec.name} are processes of this machine")
    return _become(argv)


def _become(argv: Sequence[str]) -> NoReturn:
    """Replaces this process by a command of the user's own.

    Raises:
      UserError: it is not installed.
    """
    sys.stdout.flush()
    try:
        os.execvp(argv[0], list(argv))
    except FileNotFoundError:
        raise UserError(f"job ssh: there is no `{argv[0]}` on this machine") from None


def _logs_kept(launch: "ScheduledLaunch", args: argparse.Namespace) -> int:
    """Prints what the workers have written into the folder of runs, all attempts of the launch."""
    from jaxops.core.secret_text import printable, without_secrets
    from jaxops.launch.worker_files import attempts, read_log

    offsets: dict[tuple[int, int], int] = {}
    while True:
        sight, busy = launch.backend.look(launch.job), False
        for attempt in attempts(launch.job):
            for worker in range(len(launch.record.spec.hosts)):
                if args.worker in (None, worker):
                    text, end = read_log(launch.job, attempt, worker, offsets.get((attempt, worker), 0))
                    for line in printable(without_secrets(text)).splitlines():
                        print(f"[{worker}] {line}", flush=True)
                    offsets[attempt, worker] = end
                    busy |= bool(text)
        if not busy and not (args.follow and sight.state in ("waiting", "running")):
            return EXIT_OK
        if args.follow:
            time.sleep(_pause(launch))


def _end(launch: "ScheduledLaunch", args: argparse.Namespace) -> int:
    from jaxops.launch.scheduled import remove_scheduled, stop_scheduled

    status = stop_scheduled(launch, _pause(launch), at_once=args.action == "down")
    if args.action == "down":
        for left in remove_scheduled(launch):
            _say(f"kept {left}")
    return status


def _shell(launch: "ScheduledLaunch", args: argparse.Namespace) -> int:
    argv = launch.backend.shell(launch.job, args.worker or 0)
    if argv is None:
        raise UserError(f"job ssh: no worker of {launch.record.spec.name} runs, or its backend has no way to a shell")
    return _become(argv)

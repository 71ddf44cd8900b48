"""The command line `jaxops ...`: it parses, calls one function, and prints.

Exit status: 0 done; 1 the run failed (non-finite loss, out of memory, an error in code); 2 the input is wrong and
nothing was written; 75 interrupted and saved, the same command resumes; 76 another process or the devices were lost,
the same command resumes; 130 stopped at once (a second Ctrl-C, or one before there was anything to save).
"""

import argparse
import contextlib
import errno
import importlib.metadata
import os
import platform
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from types import FrameType, TracebackType
from typing import Any, NoReturn

from jaxops.cli import audit, launch, plan, rlhf, runs, sweep, writing
from jaxops.cli import help as help_of
from jaxops.cli.right_command import right_command_told
from jaxops.core.failures import EXIT_FAILED, EXIT_OK, EXIT_USAGE, NO_ROOM, RunFailed, UserError, nearest
from jaxops.core.secret_text import printable, without_secrets
from jaxops.core.version import VERSION

EPILOG = """exit status: 0 done, 1 the run failed, 2 wrong input (nothing was written), 75 interrupted and saved (the
same command resumes), 76 another process or the devices were lost (the same command resumes), 130 stopped at once"""
EXIT_STOPPED = 130
GRACE_SECONDS = 15.0
"""How long threads have to end after a failure, before the process ends without them."""
OVERRIDE = "a.b=VALUE"


class Parser(argparse.ArgumentParser):
    """An argparse parser whose unknown commands and flags name the nearest right one."""

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Raises a usage error.

        Raises:
          UserError: always; the message names the nearest right command.
        """
        match = re.search(r"argument (?:COMMAND|ACTION): invalid choice: '(.*?)' \(choose from (.*)\)", message)
        if match:
            known = match[2].replace("'", "").split(", ")
            message = f"no command {match[1]!r}{nearest(match[1], known)} (known: {', '.join(known)})"
        message = message.replace(f", {OVERRIDE}", "")  # argparse calls an empty list of overrides missing
        raise UserError(f"{message}; see {self.prog} --help")


class Version(argparse.Action):
    """Prints the versions and ends; they are looked up only when asked for, and without importing jax."""

    def __call__(self, *_: Any) -> None:
        """Prints one line and exits with status 0."""
        try:
            jax = importlib.metadata.version("jax")
        except importlib.metadata.PackageNotFoundError:
            jax = "not installed"
        python, machine = platform.python_version(), platform.platform()
        print(f"jaxops {VERSION}, jax {jax}, python {python}, {machine}")
        sys.exit(EXIT_OK)


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parses the arguments of one command; overrides may also follow a flag.

    Raises:
      UserError: a command or flag is unknown (the nearest right one is named), or arguments are missing or too many.
    """
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    for action in ("command", "action"):
        if (name := getattr(args, action, None)) is not None:
            parser = _subparser(parser, name)
    if hasattr(args, "options"):  # options of the run's family, which are known once the run is read
        args.options, rest = rest, []
    flags = [arg.partition("=")[0] for arg in rest if arg.startswith("-")]
    if flags:
        known = [flag for action in parser._actions for flag in action.option_strings]
        parser.error(f"no flag {flags[0]}{nearest(flags[0], known)} (known: {', '.join(known)})")
    if rest and not hasattr(args, "overrides"):
        parser.error(f"unexpected {', '.join(map(repr, rest))}")
    if rest:
        args.overrides += rest
    return args


def _subparser(parser: Parser, name: str) -> Parser:
    return next(a for a in parser._actions if isinstance(a, argparse._SubParsersAction)).choices[name]


def _parser() -> Parser:
    parser = Parser(
        prog="jaxops",
        description="Train recommenders, language, reward and policy models on any JAX mesh.",
        epilog=EPILOG,
    )
    parser.add_argument("--traceback", action="store_true", help="show the traceback of a failure")
    parser.add_argument("--version", action=Version, nargs=0, help="show the versions of jaxops, jax and Python")
    sub = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)

    def command(
        name: str, text: str, *, config: bool = False, run: bool = False, as_json: bool = False, **more: Any
    ) -> Parser:
        made = sub.add_parser(name, help=text, description=text, epilog=EPILOG, **more)
        if config:
            made.add_argument("config", help="a YAML file, or the name of a shipped config (a path below `configs`)")
            made.add_argument("overrides", nargs="*", metavar=OVERRIDE, help="override a field, in YAML")
        if run:
            made.add_argument("run", help="the folder of a run")
        if as_json:
            made.add_argument("--json", action="store_true", help="print one JSON object")
        made.add_argument("--cpu-devices", type=int, metavar="N", help="N virtual CPU devices, where there is no chip")
        return made

    train = command("train", "Train a config, or go on where it stopped.", config=True, as_json=True)
    train.add_argument("--processes", type=int, metavar="N", help="N processes on this machine, for development")
    train.add_argument("--accept-code", action="store_true", help="go on although code by import path has changed")
    train.add_argument("--smoke", action="store_true", help="two steps, evaluation, save, restore, in a scratch folder")
    rlhf.add_arguments(command("rlhf", "Judgements, a reward model, a policy, and again.", config=True, as_json=True))
    what = "Many runs: a sweep file, or a config whose overrides have several values; again = what is missing."
    sweep.add_arguments(command("sweep", what, config=True, as_json=True))
    what = "Whether a config fits an accelerator that is not here, and how fast it can be."
    plan.add_arguments(command("plan", what, config=True, as_json=True))
    what = "Whether updates on a mesh are those of one device, and what else is wrong with an objective or a step."
    audit.add_arguments(command("audit", what, config=True, as_json=True))
    made = command("launch", "Train a config on other machines, or in the background of this one.", config=True)
    launch.add_arguments(made, command("job", "What `launch` has started: look, stop, remove."), Parser)
    evaluate = command("evaluate", "Evaluate a run's model on its validation and test data.", run=True, as_json=True)
    evaluate.add_argument("--step", type=int, help="the checkpoint of this step (default: the best, else the latest)")
    other = "on what lies at the run's data now, though it has changed, without what training saw of it"
    evaluate.add_argument("--other-data", action="store_true", help=other)
    predict = command("predict", "A run's answers for a file: its best items for users, clicks for rows.", run=True)
    predict.add_argument("source", help="what to predict for: a file with the columns of the run's data")
    predict.add_argument("--out", required=True, help="a file that ends in .parquet, .csv, .tsv or .jsonl, or a folder")
    predict.add_argument("--step", type=int, help="the checkpoint of this step")
    export = command(
        "export", "Write a run's model in another form: item vectors, or a folder for transformers.", run=True
    )
    export.add_argument("out", help="where to: a file or a folder")
    export.add_argument("--step", type=int, help="the checkpoint of this step")
    sample = command("sample", "A run's completions of prompts, printed or written with their columns.", run=True)
    chat = command("chat", f"Talk with a run's model, line by line: {writing.HELP}.", run=True)
    writing.add_arguments(sample, chat)
    for made in (evaluate, predict, export, sample, chat):
        text = "import code of this package, module or path for a run that is not your own (may be given again)"
        made.add_argument("--trust", action="append", default=[], metavar="PREFIX", help=text)
        made.add_argument("--accept-code", action="store_true", help="take code that has changed since the training")
    for made in (predict, export, sample, chat):
        made.set_defaults(options=[])
        made.epilog = f"Further options, --NAME VALUE, are those of the run's family. {EPILOG}"
    what = "Print the resolved config and where each value comes from; --help FIELD says what a field means."
    config = command("config", what, as_json=True, add_help=False)
    config.add_argument("config", nargs="?", help="a YAML file or the name of a shipped config")
    config.add_argument("overrides", nargs="*", metavar=OVERRIDE)
    config.add_argument("--diff", nargs=2, metavar=("A", "B"), help="what differs between two configs or run folders")
    help_of.add_arguments(config, command("examples", "Short programs to begin with: list them, or print one."))
    command("shardings", "Where every parameter lies on the mesh.", config=True, as_json=True)
    command("doctor", "What this machine has and what is wrong with it.", as_json=True)
    _add_data_actions(command("data", "Named and own data sets."))
    runs.add_commands(sub)
    return parser


def _add_data_actions(data: Parser) -> None:
    """Adds the actions of `jaxops data`: those on named data sets, and those on the data of a config."""
    data_sub = data.add_subparsers(dest="action", required=True, metavar="ACTION", parser_class=Parser)
    for name, text in (("list", "The named data sets."), ("get", "Fetch a named data set into the cache.")):
        made = data_sub.add_parser(name, help=text, description=text)
        made.add_argument("--json", action="store_true")
        if name == "get":
            made.add_argument("name")
    for name, text in (
        ("build", "Build the memory-mapped cache of a config's data."),
        ("inspect", "Counts, time range, lengths, the split and its hash, what was dropped."),
        ("preview", "The first rows of text as the model reads them, and what the loss sees of them."),
        ("verify", "Read every byte of the cache of a config's data; exit status 1 if it is damaged."),
    ):
        made = data_sub.add_parser(name, help=text, description=text)
        made.add_argument("config", help="a YAML file, the name of a shipped config, or of a named data set")
        made.add_argument("overrides", nargs="*", metavar=OVERRIDE)
        made.add_argument("--json", action="store_true")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status; a user's mistake is one message, never a traceback."""
    argv = list(sys.argv[1:] if argv is None else argv)
    with _told_to_stop():
        return _main(argv)


@contextlib.contextmanager
def _told_to_stop() -> Iterator[None]:
    """Ends a command with a message at SIGTERM or SIGHUP while it imports, builds data or evaluates.

    A run that trains has handlers of its own, which save first (core/interrupt.py).
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt(signal.Signals(number).name)

    numbers = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) == signal.SIG_DFL]
    for number in numbers:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


def _main(argv: Sequence[str]) -> int:
    trace = "--traceback" in argv or bool(os.environ.get("JAXOPS_TRACEBACK"))
    try:
        args = parse_arguments([arg for arg in argv if arg != "--traceback"])
        if getattr(args, "processes", None) is not None:
            from jaxops.cli.processes import launch_processes

            return launch_processes(argv, args.processes)
        joined = _prepare(args)
        with right_command_told(args):
            status = _run(args)
        return _leave(status) if joined else status
    except (UserError, RunFailed) as error:
        status = EXIT_USAGE if isinstance(error, UserError) else error.status
        if trace:
            raise
        if not error.shared or _is_primary():
            print(f"jaxops: {printable(without_secrets(str(error)))}", file=sys.stderr)
        return _abandon(error, status)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_OK
    except OSError as error:
        if error.errno not in (*NO_ROOM, errno.ENAMETOOLONG) or trace:
            raise
        print(f"jaxops: {printable(without_secrets(_told(error)))}", file=sys.stderr)
        return _abandon(error, EXIT_USAGE if error.errno == errno.ENAMETOOLONG else EXIT_FAILED)
    except KeyboardInterrupt as error:
        name = f" by {error}: there was nothing to save" if str(error) else ""
        print(f"jaxops: stopped{name}", file=sys.stderr)
        return _abandon(error, EXIT_STOPPED)


def _told(error: OSError) -> str:
    """Says what the file system said, and of which file, where it is known."""
    if error.errno == errno.ENAMETOOLONG:
        return f"no file system takes a name as long as {str(error.filename or 'a file')[:60]!r}..."
    where = f"cannot write {error.filename}: " if error.filename else "cannot write: "
    return f"{where}{os.strerror(error.errno or 0)}; nothing half written was left. Make room, then try again"


def _is_distributed() -> bool:
    """Returns whether this process is part of a job, without importing jax."""
    return "jaxops.core.distributed" in sys.modules and sys.modules["jaxops.core.distributed"].is_distributed()


def _is_primary() -> bool:
    return not _is_distributed() or sys.modules["jaxops.core.distributed"].is_primary()


def _leave(status: int) -> int:
    """Leaves the job in order, after this process has done its part."""
    from jaxops.core import distributed

    distributed.shut_down()
    return status


def _abandon(error: BaseException, status: int) -> int:
    """Announces the failure of this process to the others and leaves the job without waiting for them."""
    if _is_distributed():
        from jaxops.core import distributed

        distributed.announce_failure(error, "before or after training")
        distributed.leave(status)
    return status


def _prepare(args: argparse.Namespace) -> bool:
    """Sets up devices, compilation cache and the job before anything uses a backend; returns whether there is a job."""
    count = getattr(args, "cpu_devices", None)
    if count is not None:
        if count < 1:
            raise UserError(f"--cpu-devices: expected at least 1, got {count}")
        from jaxops.core.mesh import use_cpu_devices

        use_cpu_devices(count)
    if args.command in ("train", "evaluate", "predict", *writing.COMMANDS):
        from jaxops.core.compiles import enable_compilation_cache

        enable_compilation_cache()
    if args.command == "train":
        from jaxops.core import distributed

        return distributed.initialize()
    return False


def _run(args: argparse.Namespace) -> int:
    if hasattr(args, "run"):
        args.run = runs.find_run(args.run)
    if args.command in runs.COMMANDS:
        return getattr(runs, args.command)(args)
    if args.command in rlhf.COMMANDS:
        return rlhf.rlhf(args)
    if args.command in sweep.COMMANDS:
        return sweep.sweep(args)
    if args.command in plan.COMMANDS:
        return plan.plan(args)
    if args.command in audit.COMMANDS:
        return audit.audit(args)
    if args.command in launch.COMMANDS:
        return getattr(launch, args.command)(args)
    if args.command == "examples":
        return help_of.examples(args)
    if args.command in writing.COMMANDS:
        return getattr(writing, args.command)(args)
    # It is imported here, since `jaxops --help` must not wait for jax.
    from jaxops.cli import commands as run

    if args.command == "data":
        return run.data(args)
    return getattr(run, args.command)(args)


def script() -> None:
    """Runs `main` as the console script and exits with its status.

    After a failure, no thread that a library left behind keeps the process for long.
    """
    sys.excepthook = _without_secrets(sys.excepthook)
    status = main()
    if status:
        late = threading.Timer(GRACE_SECONDS, os._exit, [status])
        late.daemon = True
        late.start()
    sys.exit(status)


def _without_secrets(hook: Callable[..., Any]) -> Callable[..., Any]:
    """An excepthook that prints a traceback without the secrets that this process has read."""

    def show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        text = "".join(traceback.format_exception(kind, error, trace))
        if text == without_secrets(text):
            hook(kind, error, trace)
        else:
            print(without_secrets(text), file=sys.stderr, end="")

    return show

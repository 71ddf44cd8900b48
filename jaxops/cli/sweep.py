"""`jaxops sweep`: many runs from one file or from overrides with several values."""

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxops.core.failures import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_OK, UserError

if TYPE_CHECKING:
    from rich.table import Table

    from jaxops.sweep.plan import SweepPlan
    from jaxops.sweep.records import SweepFolder
    from jaxops.sweep.results import Outcome, Result
    from jaxops.sweep.runners import Runner
    from jaxops.sweep.search.space import SearchSpace
    from jaxops.sweep.work import Guide

COMMANDS = ("sweep",)
CHILD = """import sys
from jaxops.sweep.runners import end_with
end_with(int(sys.argv.pop(1)))
sys.argv[0] = 'jaxops'
from jaxops.cli.main import script
script()
"""
"""The program of a point's process: `jaxops train`, which is told to stop when the sweep's process ends."""


def add_arguments(made: Any) -> None:
    """Adds the arguments of the command to its parser."""
    only = made.add_mutually_exclusive_group()
    only.add_argument("--dry-run", action="store_true", help="check and print all points, and start nothing")
    only.add_argument(
        "--status", action="store_true", help="the state and result of each point; also of a sweep's folder"
    )
    only.add_argument(
        "--best", action="store_true", help="which values are best, and whether by more than seeds differ"
    )
    only.add_argument("--stop", action="store_true", help="ask the processes that run the sweep to save and stop")
    only.add_argument("--retry-failed", action="store_true", help="run points again whose last attempt failed")
    made.add_argument("--accept-code", action="store_true", help="go on although code by import path has changed")


def sweep(args: argparse.Namespace) -> int:
    """Runs `jaxops sweep FILE [a.b=V1,V2 ...] [--dry-run | --status | --best | --stop | --retry-failed]`."""
    from jaxops.cli.printing import console, say
    from jaxops.sweep.plan import make_plan
    from jaxops.sweep.records import SweepFolder, is_sweep_folder, read_plan
    from jaxops.sweep.results import read_outcome
    from jaxops.sweep.work import Sweep, require_configs, require_same_code

    plan = read_plan(Path(args.config)) if is_sweep_folder(args.config) else make_plan(args.config, args.overrides)
    if args.dry_run:
        return _dry_run(plan, args.json)
    folder = SweepFolder(plan.folder)
    plan = folder.aligned(plan)
    if args.status or args.best or args.stop:
        if not folder.has_begun:
            raise UserError(f"{plan.folder}: this sweep has not begun")
        if plan.space is not None:
            plan = read_plan(plan.folder)
        return _stop(plan, folder) if args.stop else _show(args, read_outcome(plan))
    require_configs(plan)
    told = lambda line: say(console(stderr=True), line)
    runner = _runner(args, plan, folder)
    with _guided(args, plan, folder, told) as guide:
        if not args.accept_code:
            require_same_code(plan)
        if guide is None:
            for gone in folder.begin(plan):
                told(f"{plan.folder / gone} is no point of this sweep any more; it stays, and counts for nothing")
        whole = Sweep(plan, folder, runner, told, retry_failed=args.retry_failed, guide=guide).run()
    outcome = read_outcome(plan if guide is None else read_plan(plan.folder))
    _show(args, outcome)
    from jaxops.sweep.page import write_sweep_page  # matplotlib takes a second to import

    told(f"page: {write_sweep_page(outcome, guide.importance() if guide else ())}")
    if not whole or outcome.count("failed") == 0:
        left = outcome.left
        if left or not whole:
            told(f"{outcome.counts}; the same command goes on")
            return EXIT_INTERRUPTED
        return EXIT_OK
    told(f"{outcome.counts}; the logs are in {plan.folder / 'logs'}, and --retry-failed runs those again that failed")
    return EXIT_FAILED


@contextlib.contextmanager
def _guided(
    args: argparse.Namespace, plan: "SweepPlan", folder: "SweepFolder", told: Callable[[str], None]
) -> "Iterator[Guide | None]":
    """A context in which this process leads the search of a plan; without one where the plan has all of its points."""
    if plan.space is None:
        yield None
        return
    from jaxops.sweep.search.journal import journal_of, leading
    from jaxops.sweep.search.lead import SearchLead
    from jaxops.sweep.search.study import require_optuna

    require_optuna(plan.space.search.kind)
    folder.begin_search(plan)
    with leading(journal_of(plan.folder, plan.space.search.storage), told) as journal:
        lead = SearchLead(plan, plan.space, folder, journal, told)
        if args.retry_failed:
            lead.retry_failed()
        yield lead


def _runner(args: argparse.Namespace, plan: "SweepPlan", folder: Any) -> "Runner":
    """Returns what runs the points."""
    from jaxops.sweep.runners import InProcessRunner, LocalRunner
    from jaxops.sweep.slurm import SlurmRunner
    from jaxops.sweep.spec import InProcess, Launch, Slurm

    flags = ["--cpu-devices", str(args.cpu_devices)] if args.cpu_devices is not None else []
    flags += ["--accept-code"] if args.accept_code else []
    match plan.runner:
        case InProcess():
            return InProcessRunner(folder, args.accept_code)
        case Slurm():
            slots = len(plan.points) if plan.space is None else plan.runner.jobs
            return SlurmRunner(folder, plan.runner, slots, [sys.executable, "-m", "jaxops", "train", *flags])
        case Launch():
            where = ["--on", plan.runner.on, "--backend", plan.runner.backend, "--max-hours", f"{plan.runner.hours:g}"]
            command = [sys.executable, "-m", "jaxops", "launch", *where, *flags, *plan.runner.flags]
            return LocalRunner(folder, plan.runner.jobs, command, divided=False)
    command = [sys.executable, "-c", CHILD, str(os.getpid()), "train", *flags]
    return LocalRunner(folder, plan.runner.jobs, command)


def _dry_run(plan: "SweepPlan", as_json: bool) -> int:
    from jaxops.cli.printing import console, print_json, say
    from jaxops.sweep.space import SEED

    if plan.space is not None:
        return _dry_search(plan, plan.space, as_json)
    if as_json:
        points = [{"id": point.id, "seed": point.seed, "values": point.values} for point in plan.points]
        return print_json({"version": 1, "dir": str(plan.folder), "metric": plan.metric.name, "points": points})
    out = console()
    out.print(_table(plan, [(point.id, point.values) for point in plan.points], []))
    several = len({point.group for point in plan.points})
    seeds = f", {several} but for {SEED}" if several < len(plan.points) else ""
    say(
        out,
        f"{len(plan.points)} point(s){seeds} -> {plan.folder}; judged by valid/{plan.metric.name},"
        f" {plan.metric.better} is better",
    )
    return EXIT_OK


def _dry_search(plan: "SweepPlan", space: "SearchSpace", as_json: bool) -> int:
    """Prints what a search would try."""
    from jaxops.cli.printing import cell, console, grid, print_json, say
    from jaxops.config.dump import plain_of
    from jaxops.report.compare import yaml_of

    search = space.search
    if as_json:
        told = {"version": 1, "dir": str(plan.folder), "metric": plan.metric.name, "search": plain_of(search)}
        return print_json(told)
    out, table = console(), grid("searched|", "values|", "where|")
    for path, kind in search.values.items():
        table.add_row(*map(cell, [path, f"{kind.kind}: {kind.shown}", ""]))
    for part in search.when:
        for path, kind in part.values.items():
            table.add_row(*map(cell, [path, f"{kind.kind}: {kind.shown}", yaml_of(dict(part.if_))]))
    out.print(table)
    say(
        out,
        f"{search.trials} trials by {search.kind}, pruning: {search.pruner.kind} -> {plan.folder}; judged by"
        f" valid/{plan.metric.name}, {plan.metric.better} is better",
    )
    return EXIT_OK


def _stop(plan: "SweepPlan", folder: Any) -> int:
    from jaxops.cli.printing import console, say

    running = [point for point in plan.points if folder.is_claimed(point)]
    folder.ask_to_stop()
    say(console(), f"asked to stop: {len(running)} point(s) are running, which save first")
    return EXIT_OK


def _show(args: argparse.Namespace, outcome: "Outcome") -> int:
    """Prints what a sweep has come to."""
    from jaxops.cli.printing import console, print_json, say

    if args.json:
        return print_json(_for_programs(outcome))
    out = console()
    if args.best:
        say(out, outcome.verdict.words)
        winner = outcome.verdict.winner
        for result in winner.results if winner else ():
            say(out, f"{outcome.plan.folder / result.point.id} ({result.point.label})")
        return EXIT_OK
    rows = [(result.point.id, result.point.values) for result in outcome.results]
    out.print(_table(outcome.plan, rows, [_cells(result) for result in outcome.results]))
    for result in outcome.results:
        if result.reason:
            say(out, f"{result.point.id}: {result.reason}")
    say(out, f"{outcome.plan.folder}: {outcome.counts}")
    say(out, outcome.verdict.words)
    return EXIT_OK


def _cells(result: "Result") -> tuple[str, str]:
    from jaxops.report.results import score

    so_far = "" if result.so_far is None else f"({score(result.so_far)})"
    return result.state, so_far if result.value is None else score(result.value)


def _table(plan: "SweepPlan", rows: Sequence[tuple[str, dict[str, Any]]], more: Sequence[tuple[str, str]]) -> "Table":
    """Returns a table with a row for each point; with its state and value where there are any."""
    from jaxops.cli.printing import cell, grid
    from jaxops.report.compare import yaml_of

    columns = ["run|", *plan.swept, *(["state|", f"valid/{plan.metric.name}>"] if more else [])]
    table = grid(*columns)
    for number, (name, values) in enumerate(rows):
        texts = [yaml_of(values[path]) if path in values else "" for path in plan.swept]
        table.add_row(*map(cell, [name, *texts, *(more[number] if more else ())]))
    return table


def _best(outcome: "Outcome") -> dict[str, Any] | None:
    """Returns the first group by its number, told from the next or not."""
    first = next((group for group in outcome.groups if group.mean is not None), None)
    if first is None:
        return None
    folders = [str(outcome.plan.folder / one.point.id) for one in first.results]
    return {"values": first.values, "mean": first.mean, "dirs": folders}


def _for_programs(outcome: "Outcome") -> dict[str, Any]:
    plan, winner = outcome.plan, outcome.verdict.winner
    return {
        "version": 1,
        "dir": str(plan.folder),
        "metric": f"valid/{plan.metric.name}",
        "better": plan.metric.better,
        "points": [
            {
                "id": one.point.id,
                "dir": str(plan.folder / one.point.id),
                "values": one.point.values,
                "seed": one.point.seed,
                "state": one.state,
                "reason": one.reason,
                "value": one.value,
                "step": None if one.run is None else one.run.step,
                "wall_s": None if one.run is None else one.run.number("wall_s"),
            }
            for one in outcome.results
        ],
        "groups": [
            {"values": one.values, "seeds": len(one.numbers), "mean": one.mean, "margin": one.margin}
            for one in outcome.groups
        ],
        "best": _best(outcome),
        "winner": None if winner is None else winner.values,
        "p": outcome.verdict.p,
        "verdict": outcome.verdict.words,
    }

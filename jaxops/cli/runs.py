"""`jaxops runs`, `compare` and `ckpt`: the list of runs, their differences, and the contents of their checkpoints.

Nothing here touches a device, so that these commands never disturb a run that trains.
"""

import argparse
import datetime as dt
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxops.core.failures import EXIT_OK, UserError
from jaxops.core.home import expand_home

# The commands import these when they are called, since `jaxops --help` must not wait for numpy, yaml and rich.
if TYPE_CHECKING:
    from rich.table import Table

    from jaxops.report.compare import Comparison, Score
    from jaxops.run.folder.listing import Listed

COMMANDS = ("runs", "report", "compare", "ckpt")
_COLOURS = {"finished": "green", "running": "blue", "failed": "red"}
_ACTIONS = {
    "list": "The checkpoints of a run: step, when, size, metrics.",
    "show": "One checkpoint: metrics, cursor, seed, config digest, and every array.",
    "verify": "Read every byte of every checkpoint; exit status 1 if one is damaged.",
    "export": "A copy of one checkpoint with all that it needs, such as the frozen part that it shares with others.",
}


def add_commands(sub: Any) -> None:
    """Adds these commands to the subparsers of `jaxops`."""
    what = "Every run in a folder: state, step, best metric, wall time, last activity."
    made = sub.add_parser("runs", help=what, description=what)
    made.add_argument("dir", nargs="?", default="runs", help="a folder of runs and sweeps, or its URL (default: runs)")
    made.add_argument("--json", action="store_true", help="print one JSON object")
    what = "Make the report.html of a run again, from whatever it has left."
    made = sub.add_parser("report", help=what, description=what)
    made.add_argument("run", help="the folder of a run, its name in runs/, or its URL")
    what = "Config differences, final numbers and overlaid curves of up to 8 runs."
    made = sub.add_parser("compare", help=what, description=what)
    made.add_argument("runs", nargs="+", metavar="RUN", help="the folders of the runs, or URLs")
    made.add_argument("--out", metavar="PAGE", help="the page (default: compare.html beside the first run)")
    made.add_argument("--json", action="store_true", help="print one JSON object; no page without --out")
    what = "What is in a run's checkpoints, and whether it is as it was written."
    ckpt = sub.add_parser("ckpt", help=what, description=what)
    actions = ckpt.add_subparsers(dest="action", required=True, metavar="ACTION")
    for name, what in _ACTIONS.items():
        made = actions.add_parser(name, help=what, description=what)
        made.add_argument("run", metavar="RUN", help="the folder of a run (or of checkpoints)")
        if name == "export":
            made.add_argument("out", metavar="OUT", help="the folder to make, or its URL; nothing may be there yet")
        if name != "list":
            which = {"show": "the one saved last", "verify": "all"}.get(
                name, "the best where it is kept, else the last"
            )
            made.add_argument("--step", type=int, metavar="N", help=f"that of this step (default: {which})")
        made.add_argument("--json", action="store_true", help="print one JSON object")


def runs(args: argparse.Namespace) -> int:
    """Runs `jaxops runs [DIR]`."""
    from jaxops.cli.printing import console, print_json, say
    from jaxops.run.folder.listing import list_runs

    if args.dir == "runs" and not os.path.exists(args.dir):
        raise UserError("there is no folder runs here; name the one that run.dir says: jaxops runs DIR")
    found = list_runs(args.dir)
    if args.json:
        return print_json({"version": 1, "dir": args.dir, "runs": found})
    out = console()
    if not found:
        say(out, f"no runs in {args.dir}")
        return EXIT_OK
    out.print(_runs_table(found))
    for run in found:
        at = f"failed at step {run.step}: " if run.state == "failed" and run.step is not None else ""
        notes = [f"{at}{run.reason}"] if run.reason else []
        for note in dict.fromkeys([*notes, *run.problems]):
            say(out, f"{run.name}: {note}")
    return EXIT_OK


def report(args: argparse.Namespace) -> int:
    """Runs `jaxops report RUN`, which writes `report.html` again."""
    from jaxops.cli.printing import console, say
    from jaxops.run.summary import report_again

    say(console(), f"report: {report_again(args.run)}")
    return EXIT_OK


def find_run(name: str) -> str:
    """Returns the folder of a run: a path or URL as it is, else the run of that name in `runs`."""
    name = expand_home(name)
    below = os.path.join("runs", name)
    return below if not os.path.exists(name) and "://" not in name and os.path.isdir(below) else name


def _runs_table(found: Sequence["Listed"]) -> "Table":
    from jaxops.cli.printing import ago, cell, grid
    from jaxops.report.results import duration

    table = grid("run", "state|", "step>", "best on validation|", "wall time>", "last activity|")
    now = dt.datetime.now(dt.UTC)
    for run in found:
        at = "" if run.best_step is None else f" at {run.best_step}"
        table.add_row(
            cell(run.name),
            cell(run.state, _COLOURS.get(run.state, "yellow")),
            _steps(run.step, run.steps),
            cell("" if run.best is None else f"{run.metric} {run.best:.4f}{at}"),
            "" if run.wall_s is None else duration(run.wall_s),
            "" if run.last_activity is None else ago(run.last_activity, now),
        )
    return table


def compare(args: argparse.Namespace) -> int:
    """Runs `jaxops compare RUN RUN ... [--out compare.html]`."""
    from jaxops.cli.printing import console, print_json, say
    from jaxops.run.folder.listing import compare_runs

    page = _page(args)
    found = compare_runs([find_run(name) for name in args.runs])
    if args.json:
        path = None if args.out is None else _write(found, page)
        return print_json({"version": 1, **_compared(found), "page": path})
    out = console()
    for table in (_results_table(found), _sides_table(found), _differences_table(found)):
        if table is not None:
            out.print(table, "")
    if not found.differences:
        say(out, "no config differences but name and folder\n")
    for warning in found.warnings:
        say(out, f"! {warning}", "bold yellow")
    say(out, f"page: {_write(found, page)}")
    return EXIT_OK


def _page(args: argparse.Namespace) -> Path:
    """Returns the path of the page: --out, else beside the first run, or in this folder for a run in a store."""
    if args.out is None:
        if "://" in args.runs[0]:
            return Path("compare.html")
        return Path(os.path.abspath(expand_home(args.runs[0]))).parent / "compare.html"
    target = Path(expand_home(args.out))
    if target.is_dir():
        return target / "compare.html"
    if target.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--out {target}: expected a folder or a file that ends in .html")
    return target


def _write(found: "Comparison", page: Path) -> str:
    from jaxops.report.compare_page import write_compare  # matplotlib takes a second to import

    return str(write_compare(found, page))


def _results_table(found: "Comparison") -> "Table | None":
    """Returns a table with a row for each run and baseline and the metrics of both splits; the best are bold."""
    from jaxops.cli.printing import cell, grid

    columns = [(result, name) for result in found.results for name in result.metrics]
    if not columns:
        return None
    table = grid("", *(f"{result.split}\n{name}>" for result, name in columns), title="results")
    lines: dict[Any, dict[str, Score]] = {}  # a run's (or a baseline's) scores by split
    for result in found.results:
        for row in result.rows:
            key = (row.label, row.note) if row.side is None else row.side
            lines.setdefault(key, {})[result.split] = row
    for key, rows in lines.items():
        label = next(iter(rows.values())).label
        notes = "; ".join(dict.fromkeys(row.note for row in rows.values() if row.note))
        cells = []
        for result, name in columns:
            value = rows[result.split].values.get(name) if result.split in rows else None
            best = value is not None and value == result.best.get(name)
            cells.append(cell("" if value is None else f"{value:.4f}", "bold" if best else ""))
        style = None if isinstance(key, int) else "dim"
        table.add_row(cell(f"{label} ({notes})" if notes else label), *cells, style=style)
    return table


def _sides_table(found: "Comparison") -> "Table":
    from jaxops.cli.printing import cell, grid
    from jaxops.report.results import duration

    table = grid("", "state", "step>", "best step>", "wall time>", "device", title="runs")
    for side in found.sides:
        best = side.run.number("best_step")
        state = f"{side.state}: {side.reason}" if side.reason else side.state
        table.add_row(
            cell(side.label),
            cell(state, _COLOURS.get(side.state, "yellow")),
            _steps(side.step, side.steps),
            "" if best is None else f"{best:.0f}",
            "" if side.wall_s is None else duration(side.wall_s),
            cell(str(side.run.summary.get("device") or "")),
        )
    return table


def _differences_table(found: "Comparison") -> "Table | None":
    from jaxops.cli.printing import cell, grid
    from jaxops.report.compare import yaml_of

    if not found.differences:
        return None
    table = grid("", title="config differences")
    labels = [side.label for side in found.sides]
    for label in labels:
        table.add_column(cell(label), overflow="fold")
    for difference in found.differences:
        values = difference.values
        cells = [cell(yaml_of(values[name])) if name in values else cell("-", "dim") for name in labels]
        table.add_row(cell(difference.path), *cells)
    return table


def _compared(found: "Comparison") -> dict[str, Any]:
    """Returns the comparison for programs. Rows of baselines have a `side` of null."""
    known = ("label", "state", "reason", "step", "steps", "wall_s")
    return {
        "runs": [
            {
                **{name: getattr(side, name) for name in known},
                "path": str(side.run.path),
                "best_step": None if (step := side.run.number("best_step")) is None else int(step),
                "device": side.run.summary.get("device"),
            }
            for side in found.sides
        ],
        "results": {result.split: {"best": result.best, "rows": result.rows} for result in found.results},
        "config": found.differences,
        "warnings": found.warnings,
    }


def ckpt(args: argparse.Namespace) -> int:
    """Runs `jaxops ckpt list | show | verify | export RUN`."""
    from jaxops.cli import ckpt as actions

    return actions.run(args)


def _steps(step: int | None, steps: int | None) -> str:
    return "" if step is None else str(step) if steps is None else f"{step}/{steps}"

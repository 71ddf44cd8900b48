"""`jaxops ckpt list | show | verify | export RUN`: the contents of checkpoints, their verification, a copy of one."""

import argparse
from typing import TYPE_CHECKING, Any

from jaxops.cli.printing import cell, console, grid, print_json, say, size, when
from jaxops.core.failures import EXIT_FAILED, EXIT_OK
from jaxops.report.results import duration
from jaxops.run.folder.export import export_saved
from jaxops.run.folder.saved import Contents, Saved, Verdict, list_saved, show_saved, verify_saved

if TYPE_CHECKING:
    from rich.console import Console


def run(args: argparse.Namespace) -> int:
    """Runs the action that the arguments name and returns the exit status."""
    return {"list": _list, "show": _show, "verify": _verify, "export": _export}[args.action](args)


def _list(args: argparse.Namespace) -> int:
    found, others = list_saved(args.run)
    if args.json:
        beside = [{"name": name, "what": what} for name, what in others]
        return print_json({"version": 1, "run": args.run, "checkpoints": found, "others": beside})
    out = console()
    sharing = any(saved.shared for saved in found)
    table = grid("step>", "saved|", "size>", *["with shared>"] * sharing, "metrics", "|")
    for saved in found:
        disk = "" if saved.bytes is None else size(saved.bytes)
        whole = [size((saved.bytes or 0) + saved.shared_bytes) if disk else ""] * sharing
        marks = cell(_marks(saved), "red" if saved.damage else "")
        table.add_row(str(saved.step), when(saved.written), disk, *whole, cell(_metrics(saved.metrics)), marks)
    if found:
        out.print(table)
    else:
        say(out, f"{args.run} has no checkpoint yet")
    for saved in found:
        for problem in saved.damage:
            say(out, f"step {saved.step} is damaged: {problem}", "red")
    for name, what in others:
        say(out, f"{name}: {what}")
    return EXIT_OK


def _show(args: argparse.Namespace) -> int:
    found = show_saved(args.run, args.step)
    if args.json:
        return print_json({"version": 1, "run": args.run, **_shown(found)})
    out, saved = console(), found.saved
    marks = _marks(saved)
    facts = {
        "step": f"{saved.step} ({marks})" if marks else str(saved.step),
        "folder": saved.folder,
        "saved": when(saved.written),
        "on disk": f"{size(saved.bytes or 0)} in {saved.files} files",
        "shared": _shared(saved),
        "metrics": _metrics(saved.metrics) or "none at this step",
        "cursor": "" if found.cursor is None else f"{found.cursor:,} examples consumed",
        "seed": "" if found.seed is None else str(found.seed),
        "training": "" if found.wall_s is None else duration(found.wall_s),
        "config": "" if found.digest is None else f"SHA-256 {found.digest}",
    }
    for name, value in facts.items():
        if value:
            say(out, f"{name:<10}{value}")
    for problem in saved.damage:
        say(out, f"damaged: {problem}", "red")
    arrays = grid("array", "shape|", "dtype|", "bytes>")
    for leaf in found.arrays:
        arrays.add_row(cell(leaf.path), cell(str(list(leaf.shape))), leaf.dtype, f"{leaf.bytes:,}")
    totals = grid("", "arrays>", "entries>", "bytes>", "")
    for group in (*found.groups, found.total):
        note = f", shared: {saved.shared[group.name]}" if group.name in saved.shared else ""
        cells = (str(group.arrays), f"{group.entries:,}", f"{group.bytes:,}", f"{size(group.bytes)}{note}")
        totals.add_row(cell(group.name), *cells, style="bold" if group.name == "total" else None)
    out.print("", arrays, "", totals)
    return EXIT_OK


def _shown(found: Contents) -> dict[str, Any]:
    return {
        **vars(found.saved),
        "cursor": found.cursor,
        "seed": found.seed,
        "wall_s": found.wall_s,
        "config_sha256": found.digest,
        "config": found.config,
        "arrays": [leaf._asdict() for leaf in found.arrays],
        "groups": found.groups,
        "total": found.total,
    }


def _verify(args: argparse.Namespace) -> int:
    out, found = console(), []
    for verdict in verify_saved(args.run, args.step):
        found.append(verdict)
        if not args.json:
            _say(out, verdict)
    damaged = sum(bool(verdict.damage) for verdict in found)
    newest = max((v for v in found if not v.damage), key=lambda verdict: verdict.serial, default=None)
    if args.json:
        print_json({"version": 1, "run": args.run, "damaged": damaged, "checkpoints": found})
    elif damaged and args.step is None:
        resume = f"a resume takes step {newest.step}" if newest else "there is none to resume from"
        say(out, f"{damaged} of {len(found)} damaged; {resume}")
    return EXIT_FAILED if damaged else EXIT_OK


def _export(args: argparse.Namespace) -> int:
    made = export_saved(args.run, args.out, args.step)
    if args.json:
        return print_json({"version": 1, "run": args.run, **vars(made)})
    out = console()
    say(out, f"step {made.step} of {args.run}: {made.files} files, {size(made.bytes)}, copied to {made.out}")
    if made.unchecked:
        say(out, f"{made.unchecked} of them have no checksum: their sizes are right, their contents were not checked")
    return EXIT_OK


def _say(out: "Console", verdict: Verdict) -> None:
    where = f"step {verdict.step}:"
    if verdict.damage:
        say(out, f"{where} DAMAGED: {verdict.folder}", "bold red")
        for problem in verdict.damage:
            say(out, f"  {problem}")
    elif verdict.unchecked:
        say(out, f"{where} sizes are right; {verdict.unchecked} of {verdict.files} files have no checksum")
    else:
        say(out, f"{where} good ({verdict.files} files, {size(verdict.bytes)})")


def _marks(saved: Saved) -> str:
    marks = {"latest": saved.latest, "best": saved.best, "damaged": bool(saved.damage)}
    return ", ".join(mark for mark, so in marks.items() if so)


def _shared(saved: Saved) -> str:
    if not saved.shared:
        return ""
    where = ", ".join(f"{entry} in {folder}" for entry, folder in saved.shared.items())
    return f"{size(saved.shared_bytes)} in {saved.shared_files} files more, with other checkpoints: {where}"


def _metrics(metrics: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())

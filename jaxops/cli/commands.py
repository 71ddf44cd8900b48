"""The commands: each takes the parsed arguments, calls one function of the library, prints, and returns the status."""

import argparse
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from jaxops.config.dump import diff as differences
from jaxops.config.load import explain, from_dict
from jaxops.core.failures import EXIT_INTERRUPTED, EXIT_OK, UserError
from jaxops.tasks.build import build_task, load_config

out = Console(highlight=False, soft_wrap=True)


def _print_json(values: Any) -> int:
    print(json.dumps(values, indent=1, default=str))
    return EXIT_OK


def train(args: argparse.Namespace) -> int:
    """`jaxops train CONFIG [a.b=VALUE ...] [--smoke]`."""
    from jaxops.tasks.fit import fit

    if args.smoke:
        return _smoke(args)
    run = fit(build_task(load_config(args.config, args.overrides)))
    if args.json:
        _print_json({"dir": str(run.dir), **run.summary})
    return EXIT_INTERRUPTED if run.state == "interrupted" else EXIT_OK


def _smoke(args: argparse.Namespace) -> int:
    """Two steps, evaluation and a save; then a third step from what was restored. Nothing is left behind."""
    from jaxops.tasks.fit import fit
    from jaxops.tasks.trained import load

    with tempfile.TemporaryDirectory(prefix="jaxops-smoke-") as scratch:
        for steps in (2, 3):
            small = ["run.epochs=null", f"run.steps={steps}", f"run.dir={scratch}", "run.name=smoke"]
            small += ["evaluate.baselines=false", "evaluate.every=2", "run.log_every=1", "run.loggers=[]"]
            run = fit(build_task(load_config(args.config, [*args.overrides, *small])))
            if run.state != "finished":
                return EXIT_INTERRUPTED
        load(run.dir)
    out.print("smoke test passed: 2 steps, evaluation, save, restore, 1 more step")
    return EXIT_OK


def evaluate(args: argparse.Namespace) -> int:
    """`jaxops evaluate RUN`."""
    from jaxops.tasks.progress import results_table
    from jaxops.tasks.trained import load

    model = load(args.run, args.step)
    values = model.evaluate()
    if args.json:
        return _print_json({"step": model.step, **values})
    out.print(results_table({"name": f"{args.run}, step {model.step}", **values}, model.config.evaluate.metrics))
    return EXIT_OK


def predict(args: argparse.Namespace) -> int:
    """`jaxops predict RUN USERS --top K --out OUT`."""
    from jaxops.tasks.trained import load

    target = _target(args.out)
    model = load(args.run, args.step)
    given = model.histories(args.users)
    table = model.predict(given, args.top)
    _write_parquet(table, target)
    notes = [f"{len(given.users):,} users, {len(table):,} rows -> {target}"]
    if given.unknown_users:
        notes.append(f"{given.unknown_users:,} users left out: not in the run's data")
    if given.unknown_items:
        notes.append(f"{given.unknown_items:,} events left out: items that the model does not know")
    out.print("; ".join(notes))
    return EXIT_OK


def export(args: argparse.Namespace) -> int:
    """`jaxops export RUN OUT`."""
    from jaxops.tasks.trained import load

    target = _target(args.out)
    table = load(args.run, args.step).item_vectors()
    _write_parquet(table, target)
    out.print(f"{len(table):,} item vectors -> {target}")
    return EXIT_OK


def _target(path: str) -> Path:
    """The file to write: the path itself if it ends in .parquet, else part-00000.parquet in that folder."""
    target = Path(path)
    if target.suffix != ".parquet":
        if target.is_file():
            raise UserError(f"--out {target} is a file that does not end in .parquet")
        target = target / "part-00000.parquet"
    parent = next(folder for folder in target.absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"{target} cannot be written: {parent} is not a folder that you may write to")
    return target


def _write_parquet(table: Any, target: Path) -> None:
    import pyarrow.parquet as pq

    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_name(f".{target.name}.tmp")
    pq.write_table(table, scratch)
    os.replace(scratch, target)


def config(args: argparse.Namespace) -> int:
    """`jaxops config CONFIG` and `jaxops config --diff A B`."""
    if args.diff:
        a, b = (_resolved(name) for name in args.diff)
        rows = differences(a, b)
        if args.json:
            return _print_json([{"path": path, "a": old, "b": new} for path, old, new in rows])
        for path, old, new in rows:
            out.print(f"{path}: {old!r} -> {new!r}", markup=False)
        if not rows:
            out.print("no difference")
        return EXIT_OK
    if not args.config:
        raise UserError("config: name a config, or two with --diff")
    loaded = load_config(args.config, args.overrides)
    if args.json:
        return _print_json(loaded.resolved)
    table = Table(box=None, show_header=False, pad_edge=False)
    for path, value, origin in explain(loaded):
        table.add_row(path, yaml.safe_dump(value, default_flow_style=True).split("\n...")[0].strip(), f"# {origin}")
    out.print(table)
    return EXIT_OK


def _resolved(name: str) -> dict[str, Any]:
    """The resolved config of a file, a shipped name or a run folder."""
    from jaxops.tasks.run_folder import RunFolder

    return RunFolder(name).config() if Path(name).is_dir() else load_config(name).resolved


def shardings(args: argparse.Namespace) -> int:
    """`jaxops shardings CONFIG`: parameter, shape, spec, bytes a device."""
    import dataclasses

    from jaxops.core.mesh import describe_devices, make_mesh
    from jaxops.core.sharding import place

    task = build_task(load_config(args.config, args.overrides))
    mesh = make_mesh(**dataclasses.asdict(task.config.mesh))
    placed = place(task.model.shapes, task.rules, mesh)
    if args.json:
        rows = [{**dataclasses.asdict(p), "spec": [axis for axis in p.spec]} for p in placed]
        return _print_json({"mesh": dict(mesh.shape), "parameters": rows})
    axes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1) or "one device"
    table = Table(title=f"{describe_devices(mesh)}: {axes}")
    for name in ("parameter", "shape", "spec", "bytes a device", "dropped"):
        table.add_column(name, justify="right" if name.startswith("bytes") else "left")
    for p in placed:
        spec = ", ".join("-" if axis is None else str(axis) for axis in p.spec) or "replicated"
        table.add_row(p.path, str(p.shape), spec, f"{p.bytes_per_device:,}", "; ".join(p.dropped))
    table.add_row("total", "", "", f"{sum(p.bytes_per_device for p in placed):,}", "")
    out.print(table)
    return EXIT_OK


def doctor(args: argparse.Namespace) -> int:
    """`jaxops doctor`."""
    from jaxops.cli.doctor import examine

    report = examine()
    if args.json:
        return _print_json(report)
    for name, value in report["facts"].items():
        out.print(f"{name:<22}{value}", markup=False)
    for problem in report["problems"]:
        out.print(f"! {problem}", style="bold red", markup=False)
    if not report["problems"]:
        out.print("nothing is wrong")
    return EXIT_OK


def data(args: argparse.Namespace) -> int:
    """`jaxops data list | get NAME | build CONFIG | inspect CONFIG`."""
    return {"list": _data_list, "get": _data_get, "build": _data_build, "inspect": _data_inspect}[args.action](args)


def _data_list(args: argparse.Namespace) -> int:
    from jaxops.data import sources

    named = sources.list_sources()
    if args.json:
        return _print_json([{"name": s.name, "title": s.title, "licence": s.licence} for s in named])
    for source in named:
        out.print(f"{source.name:<18}{source.title}\n{'':<18}{source.licence}", markup=False)
    return EXIT_OK


def _data_get(args: argparse.Namespace) -> int:
    from jaxops.data import sources

    source = sources.find_source(args.name)
    path = sources.get(args.name)
    if args.json:
        return _print_json({"name": source.name, "path": str(path), "licence": source.licence})
    out.print(f"{source.title}\n{source.licence}\n{path}", markup=False)
    return EXIT_OK


def _data_config(args: argparse.Namespace) -> Any:
    from jaxops.config.types import ByPath
    from jaxops.data import sources

    if args.config in {source.name for source in sources.list_sources()}:
        values = {"task": "rec", "data": {"kind": args.config}, "run": {"steps": 1}}
        from jaxops.tasks.config import SCHEMAS

        return from_dict(SCHEMAS, values, args.overrides, source="data inspect").config.data
    found = load_config(args.config, args.overrides).config.data
    if isinstance(found, ByPath):
        raise UserError(f"data: {found.fn} is a function of your own; there is nothing to build or inspect")
    return found


def _data_build(args: argparse.Namespace) -> int:
    from jaxops.data.cache import build
    from jaxops.data.spec import InteractionsFile

    found = _data_config(args)
    if not isinstance(found, InteractionsFile) or not found.cache:
        raise UserError("data build: set data.kind=interactions and data.cache to the folder to build")
    build(found, found.cache)
    out.print(f"built {found.cache}", markup=False)
    return EXIT_OK


def _data_inspect(args: argparse.Namespace) -> int:
    from jaxops.data.config import open_data
    from jaxops.data.inspect import describe, inspect

    info = inspect(open_data(_data_config(args)))
    if args.json:
        return _print_json(info)
    for what, how_much in _rows(describe(info)):
        out.print(f"{what:<22}{how_much}", markup=False)
    return EXIT_OK


def _rows(rows: list[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    for what, text in rows:
        for number, line in enumerate(text.splitlines() or [""]):
            yield ("" if number else what), line

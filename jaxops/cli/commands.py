"""The commands. Each takes the parsed arguments, calls one function of the library, prints, and returns the status."""

import argparse
import contextlib
import sys
import tempfile
from pathlib import Path
from typing import Any

from jaxops.cli.printing import console, print_json, say
from jaxops.cli.text import aligned, flow
from jaxops.config.dump import diff as differences
from jaxops.config.load import explain
from jaxops.config.shapes import ABSENT
from jaxops.core.failures import EXIT_INTERRUPTED, EXIT_OK, UserError
from jaxops.run.build import build_task, load_config


def train(args: argparse.Namespace) -> int:
    """Runs `jaxops train CONFIG [a.b=VALUE ...] [--smoke]`."""
    from jaxops.core import distributed
    from jaxops.run.fit import train_task
    from jaxops.run.progress import said_if_long

    if args.smoke:
        return _smoke(args)
    loaded = load_config(args.config, args.overrides)
    if distributed.is_primary():
        for note in loaded.notes:
            print(note, file=sys.stderr)
    with said_if_long("reading the data ...", quiet=not distributed.is_primary()):
        task = build_task(loaded)
    run = train_task(task, accept_code=args.accept_code)
    if args.json and distributed.is_primary():
        print_json({"dir": str(run.dir), **run.summary})
    return EXIT_OK if run.state == "finished" else EXIT_INTERRUPTED


def _smoke(args: argparse.Namespace) -> int:
    """Trains two steps, evaluates and saves, then restores and trains a third step. Nothing is left behind."""
    from jaxops.core import distributed
    from jaxops.run.fit import train_task
    from jaxops.run.load import load

    with contextlib.ExitStack() as stack:
        make = lambda: stack.enter_context(tempfile.TemporaryDirectory(prefix="jaxops-smoke-"))
        scratch = distributed.run_on_primary("scratch folder", make)
        for steps in (2, 3):
            small = ["run.epochs=null", f"run.steps={steps}", f"run.dir={scratch}", "run.name=smoke"]
            small += ["evaluate.baselines=false", "evaluate.every=2", "run.log_every=1", "run.loggers=[]"]
            small += ["optimizer.schedule.warmup=0", "run.profile=null"]  # a warm-up may not outlast the run
            task = build_task(load_config(args.config, [*args.overrides, *small]))
            if distributed.is_primary():
                print(f"smoke test: to step {steps}, evaluation, save ...", file=sys.stderr)
            run = train_task(task, quiet=True)
            if run.state != "finished":
                return EXIT_INTERRUPTED
        if not distributed.is_distributed():
            load(run.dir)
    if not distributed.is_primary():
        return EXIT_OK
    device, seconds = run.summary["device"], run.summary["wall_s"]
    if args.json:
        print_json({"smoke": "passed", "device": device, "wall_s": seconds})
    else:
        print(f"smoke test passed: 2 steps, restore, 1 more on {device} in {seconds:.0f} s; nothing was kept")
    return EXIT_OK


def evaluate(args: argparse.Namespace) -> int:
    """Runs `jaxops evaluate RUN [--other-data]`."""
    from jaxops.run.load import evaluate_other, load
    from jaxops.run.progress import results_table

    model = load(args.run, args.step, trust=args.trust, accept_code=args.accept_code)
    for place in model.saved.left_out:
        say(console(stderr=True), f"{args.run} is not known as your own, so nothing is written where it says: {place}")
    said: list[str] = []
    values = evaluate_other(model, said.append) if args.other_data else model.evaluate()
    if args.json:
        print_json({"step": model.saved.step, **({"other_data": said} if args.other_data else {}), **values})
    else:
        print("\n".join(said), end="\n" if said else "")
        title = f"{args.run}, step {model.saved.step}{', other data' if args.other_data else ''}"
        console().print(results_table({"name": title, **values}, model.saved.config.evaluate.metrics, model.saved.note))
    return EXIT_OK


def predict(args: argparse.Namespace) -> int:
    """Runs `jaxops predict RUN SOURCE [--OPTION VALUE ...] --out OUT`; the options are those of the run's family."""
    from jaxops.run.load import serve
    from jaxops.run.outputs import table_target, write_table

    table_target(args.out)
    saved, options = _saved_and_options(args, "predict")
    model = serve(saved)
    said: list[str] = []
    print(write_table(args.out, lambda: model.predict(args.source, options, say=said.append), "row"))
    print("\n".join(said), end="\n" if said else "")
    return EXIT_OK


def export(args: argparse.Namespace) -> int:
    """Runs `jaxops export RUN OUT [--OPTION VALUE ...]`; the options are those of the run's family."""
    from jaxops.run.load import serve

    saved, options = _saved_and_options(args, "export")
    print(serve(saved).export(Path(args.out), options))
    return EXIT_OK


def _saved_and_options(args: argparse.Namespace, command: str) -> tuple[Any, Any]:
    """Returns a run and the options that were given for one of its family's commands, read as a config is.

    Raises:
      UserError: no run, an option that its family does not have, or a family that is not trusted.
    """
    from jaxops.cli.options import overrides_of, read_options
    from jaxops.run.load import open_saved_run, saved_family

    list(overrides_of(args.options, f"jaxops {command}"))  # what is no option is told before the run is looked for
    options = getattr(saved_family(args.run, args.trust), command)
    read = read_options(options, args.options, f"jaxops {command} {args.run}")  # before anything large is
    return open_saved_run(args.run, args.step, trust=args.trust, accept_code=args.accept_code), read


def config(args: argparse.Namespace) -> int:
    """Runs `jaxops config CONFIG` and `jaxops config --diff A B`."""
    if args.diff:
        a, b = (_resolved(name) for name in args.diff)
        rows = differences(a, b)
        if args.json:
            sides = [{"path": path, "a": old, "b": new} for path, old, new in rows]
            print_json([{name: value for name, value in row.items() if value is not ABSENT} for row in sides])
        else:
            lines = aligned([(path, flow(old), "->", flow(new)) for path, old, new in rows])
            print("\n".join(lines) if rows else "no difference")
        return EXIT_OK
    if not args.config:
        raise UserError("config: name a config, or two with --diff")
    loaded = load_config(args.config, args.overrides)
    if args.json:
        print_json(loaded.resolved)
    else:
        rows = [(path, flow(value), f"# {origin}") for path, value, origin in explain(loaded)]
        print("\n".join(aligned(rows)))
    return EXIT_OK


def _resolved(name: str) -> dict[str, Any]:
    """Returns the resolved config of a file, a shipped name or a run folder."""
    from jaxops.run.folder.run_folder import RunFolder

    return RunFolder(name).config() if "://" in name or Path(name).is_dir() else load_config(name).resolved


def shardings(args: argparse.Namespace) -> int:
    """Runs `jaxops shardings CONFIG`.

    It prints path, shape, spec and bytes a device of each parameter, and each table's placement with its runner-up.

    Raises:
      UserError: a kernel is still sharded over fsdp where it is multiplied (core/fence.py). It is raised at the end.
    """
    import dataclasses
    import math

    from jaxops.core.fence import refuse_unconstrained
    from jaxops.core.mesh import describe_devices, make_mesh
    from jaxops.core.sharding import place
    from jaxops.run.fence import find_unconstrained
    from jaxops.run.training import tables_on
    from jaxops.tables.explain import costs

    task = build_task(load_config(args.config, args.overrides))
    mesh = make_mesh(**dataclasses.asdict(task.config.mesh))
    placed = place(task.model.shapes, task.rules, mesh)
    tables = tables_on(task, mesh)
    laid = costs(tables, task.tables) if tables else []
    unconstrained = find_unconstrained(task, mesh, tables)
    if args.json:
        padding = task.model.padding
        rows = [{**dataclasses.asdict(p), "spec": list(p.spec), "padding": padding.get(p.path)} for p in placed]
        bare = [{"path": one.path, "product": one.product, "where": one.where} for one in unconstrained]
        tables_laid = [dataclasses.asdict(one) for one in laid]
        print_json({"mesh": dict(mesh.shape), "parameters": rows, "tables": tables_laid, "unconstrained_kernels": bare})
        refuse_unconstrained(unconstrained)
        return EXIT_OK
    axes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1) or "one device"
    table = [("parameter", "shape", "spec", "bytes a device", "dropped or padded")]
    for p in placed:
        shape = " x ".join(map(str, p.shape))
        notes = "; ".join([*p.dropped, *filter(None, [task.model.padding.get(p.path)])])
        table.append((p.path, shape, _spec(p.spec), f"{p.bytes_per_device:,}", notes))
    entries = f"{sum(math.prod(p.shape) for p in placed):,}"
    table.append(("total", entries, "", f"{sum(p.bytes_per_device for p in placed):,}", ""))
    print(f"{describe_devices(mesh)}: {axes}; the parameters as they are stored")
    print("\n".join(aligned(table, right=(3,))))
    if laid:
        print("\n".join(["", *_tables(laid)]))
    refuse_unconstrained(unconstrained)
    return EXIT_OK


def _tables(laid: list[Any]) -> list[str]:
    """Returns lines that show each table with its bytes and its exchange, and the placement that was not chosen."""
    rows = [("table", "rows x dim", "optimizer", "placement", "bytes a device", "bytes exchanged a step")]
    for one in laid:
        size = f"{one.rows:,} x {one.dim}"
        chosen = f"{one.placement} ({one.why})"
        rows.append((one.name, size, one.optimizer, chosen, f"{one.bytes_per_device:,}", f"{one.exchanged:,}"))
        other = f"not {one.runner_up}"
        rows.append(("", "", "", other, f"{one.runner_up_bytes:,}", f"{one.runner_up_exchanged:,}"))
    stacks = [f"{one.name}: {', '.join(one.members)}, exchanged together" for one in laid if len(one.members) > 1]
    return [*aligned(rows, right=(4, 5)), *stacks]


def _spec(spec: Any) -> str:
    """Returns the mesh axes of each dimension, such as `fsdp, -, tensor`."""
    named = ["-" if axis is None else axis if isinstance(axis, str) else "+".join(axis) for axis in spec]
    return ", ".join(named) or "replicated"


def doctor(args: argparse.Namespace) -> int:
    """Runs `jaxops doctor`."""
    from jaxops.cli.doctor import examine

    report = examine()
    if args.json:
        print_json(report)
        return EXIT_OK
    print("\n".join(aligned(list(report["facts"].items()))))
    for problem in report["problems"]:
        console().print(f"! {problem}", style="bold red", markup=False)
    if not report["problems"]:
        print("nothing is wrong")
    return EXIT_OK


def data(args: argparse.Namespace) -> int:
    """Runs `jaxops data list | get NAME | build CONFIG | inspect CONFIG | verify CONFIG`."""
    return {"list": _data_list, "get": _data_get}.get(args.action, _data_of_family)(args)


def _data_list(args: argparse.Namespace) -> int:
    from jaxops.data import sources

    named = [(source, str(source.path) if source.path.exists() else None) for source in sources.list_sources()]
    if args.json:
        return print_json([{"name": s.name, "title": s.title, "licence": s.licence, "path": path} for s, path in named])
    lines = []
    for source, path in named:
        here = path or f"not fetched yet: jaxops data get {source.name}"
        lines += [(source.name, source.title), ("", source.licence), ("", here)]
    print("\n".join(aligned(lines)))
    return EXIT_OK


def _data_get(args: argparse.Namespace) -> int:
    from jaxops.data import sources

    source = sources.find_source(args.name)
    path = sources.get(args.name)
    if args.json:
        print_json({"name": source.name, "path": str(path), "licence": source.licence})
    else:
        print(f"{source.title}\n{source.licence}\n{path}")
    return EXIT_OK


def _data_of_family(args: argparse.Namespace) -> int:
    """Runs an action that the config's family has: `jaxops data ACTION CONFIG`. CONFIG may be a named data set."""
    from jaxops.run.family import family_of

    config = _named_data(args) or load_config(args.config, args.overrides).config
    actions = family_of(config.task).data
    if args.action not in actions:
        raise UserError(
            f"data {args.action}: task {config.task} has no such thing (it has: {', '.join(actions) or '-'})"
        )
    found = actions[args.action](config)
    if args.json:
        print_json(found.json)
    else:
        print("\n".join(aligned(found.rows)))
    return found.status


def _named_data(args: argparse.Namespace) -> Any:
    """Returns a minimal config of a named data set, from the first family that reads it; None for any other name."""
    from jaxops.config.errors import ConfigError
    from jaxops.data import sources
    from jaxops.run.build import config_from_dict
    from jaxops.run.family import shipped

    if args.config not in {source.name for source in sources.list_sources()}:
        return None
    problem = UserError(f"data {args.action}: no family reads {args.config} by its name alone")
    for task in shipped():
        values = {"task": task, "data": {"kind": args.config}, "run": {"steps": 1}}
        try:
            return config_from_dict(values, args.overrides, source=f"data {args.action}").config
        except ConfigError as error:
            problem = error
    raise problem

"""Milliseconds a trial that a search takes beside plain Optuna, with the same stand-in objective, sampler and pruner.

The objective costs nothing: ten evaluations of a parabola in the logarithm of a learning rate, and one of a dropout.
Plain Optuna keeps its study in memory, or in its own journal file: the latter is what a search is compared with, which
survives a kill as well. A search does more for each trial. It resolves and checks a whole config, names the run by it,
writes that config and the plan, syncs its journal to the disk, and reads the metric from the files of the run, which
the stand-in writes as a run does. None of it is done by the process that trains.

    python benchmarks/sweep_vs_optuna.py [--trials 100] [--rounds 3]
"""

import argparse
import importlib.metadata
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna

from jaxops.sweep.plan import make_plan
from jaxops.sweep.records import PointEnd, SweepFolder
from jaxops.sweep.search import lead as search_lead
from jaxops.sweep.search.journal import FileJournal
from jaxops.sweep.work import Sweep

EVALUATIONS = 10
NAME = "valid/ndcg@10"
LR = "optimizer.lr"
DROPOUT = "model.dropout"


def value(lr: float, dropout: float, evaluation: int) -> float:
    """Returns the metric of an evaluation; more is better, and it grows."""
    return 1.0 - (math.log10(lr) + 3) ** 2 / 4 - (dropout - 0.3) ** 2 - 0.5 / evaluation


class Trained:
    """A job that has trained when it is started."""

    def __init__(self, folder: Path, config: dict[str, Any], given_up: Callable[[], bool]) -> None:
        folder.mkdir()
        lr, dropout = config["optimizer"]["lr"], config["model"]["dropout"]
        self._ended = PointEnd(0)
        with open(folder / "metrics.jsonl", "a", encoding="utf-8", buffering=1) as log:
            for step in range(1, EVALUATIONS + 1):
                found = value(lr, dropout, step)
                log.write(json.dumps({"v": 1, "step": step, "time": time.time(), NAME: found}) + "\n")
                if given_up():
                    self._ended = PointEnd(75, "stopped")
                    return
        (folder / "summary.json").write_text(json.dumps({"state": "finished", NAME: found}), encoding="utf-8")

    def poll(self) -> PointEnd:
        return self._ended

    def stop(self) -> None: ...

    def kill(self) -> None: ...


class StandIn:
    """A runner of such jobs."""

    slots = 1

    def __init__(self, folder: SweepFolder) -> None:
        self._folder = folder

    def adopt(self, point):
        return None

    def start(self, point, config, claim, given_up):
        return Trained(self._folder.path / point.id, config, given_up)


def search(folder: Path, trials: int) -> int:
    """Searches with jaxops, and returns how many trials were pruned."""
    file = folder / "sweep.yaml"
    file.write_text(
        f"base: rec/movielens_sasrec\ndir: {folder}\nname: search\nmetric: {NAME}\n"
        f"search:\n  kind: tpe\n  trials: {trials}\n  pruner: {{kind: median, warmup: 0}}\n  values:\n"
        f"    {LR}: {{kind: loguniform, low: 1e-5, high: 1e-1}}\n"
        f"    {DROPOUT}: {{kind: uniform, low: 0.0, high: 0.9}}\n",
        encoding="utf-8",
    )
    plan = make_plan(str(file))
    place = SweepFolder(plan.folder)
    place.begin_search(plan)
    journal = FileJournal(plan.folder)
    assert plan.space is not None and journal.lead()
    guide = search_lead.SearchLead(plan, plan.space, place, journal, lambda line: None)
    began = time.perf_counter(), time.process_time()
    assert Sweep(plan, place, StandIn(place), lambda line: None, guide=guide).run()
    CLOCK[:] = [now - then for now, then in zip((time.perf_counter(), time.process_time()), began, strict=True)]
    told = [event.fields["state"] for event in journal.read() if event.what == "tell"]
    journal.close()
    assert len(told) == trials
    return told.count("pruned")


CLOCK: list[float] = []


def plain(folder: Path, trials: int, durable: bool) -> int:
    """Searches with Optuna alone, and returns how many trials were pruned."""

    def objective(trial: optuna.Trial) -> float:
        lr, dropout = trial.suggest_float(LR, 1e-5, 1e-1, log=True), trial.suggest_float(DROPOUT, 0.0, 0.9)
        for step in range(1, EVALUATIONS + 1):
            trial.report(found := value(lr, dropout, step), step)
            if trial.should_prune():
                raise optuna.TrialPruned
        return found

    backend = optuna.storages.journal.JournalFileBackend(str(folder / "optuna.log"))
    study = optuna.create_study(
        storage=optuna.storages.JournalStorage(backend) if durable else None,
        direction="maximize",
        sampler=optuna.samplers.TPESampler(seed=0),
        pruner=optuna.pruners.MedianPruner(),
    )
    began = time.perf_counter(), time.process_time()
    study.optimize(objective, n_trials=trials)
    CLOCK[:] = [now - then for now, then in zip((time.perf_counter(), time.process_time()), began, strict=True)]
    return sum(trial.state == optuna.trial.TrialState.PRUNED for trial in study.trials)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    search_lead.LOOK = 0.0
    sides: dict[str, Callable[[Path], int]] = {
        "optuna_memory": lambda folder: plain(folder, args.trials, durable=False),
        "optuna_journal": lambda folder: plain(folder, args.trials, durable=True),
        "jaxops": lambda folder: search(folder, args.trials),
    }
    times: dict[str, list[list[float]]] = {name: [] for name in sides}
    pruned: dict[str, int] = {}
    for turn in range(args.rounds + 1):
        for name, side in sides.items() if turn % 2 else reversed(sides.items()):
            with tempfile.TemporaryDirectory() as folder:
                pruned[name] = side(Path(folder))
            if turn:  # the first imports
                times[name].append([1e3 * seconds / args.trials for seconds in CLOCK])
    wall, cpu = ({n: round(statistics.median(t[w] for t in ts), 2) for n, ts in times.items()} for w in (0, 1))
    print(
        json.dumps(
            {
                "name": "sweep_vs_optuna",
                "ratio": round(cpu["jaxops"] / cpu["optuna_journal"], 2),
                "overhead_cpu_ms_per_trial": round(cpu["jaxops"] - cpu["optuna_journal"], 2),
                "overhead_wall_ms_per_trial": round(wall["jaxops"] - wall["optuna_journal"], 2),
                "cpu_ms_per_trial": cpu,
                "wall_ms_per_trial": wall,
                "trials": args.trials,
                "pruned": pruned,
                "cores": len(os.sched_getaffinity(0)),
                "versions": {name: importlib.metadata.version(name) for name in ("optuna", "jax", "jaxops")},
            }
        )
    )


if __name__ == "__main__":
    main()

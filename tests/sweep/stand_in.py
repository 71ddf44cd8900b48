"""A search over the toy family with stand-in training: each poll of a job is an evaluation, written as a run writes."""

import json
import math
from pathlib import Path

from jaxops.sweep.plan import make_plan
from jaxops.sweep.records import PointEnd, SweepFolder
from jaxops.sweep.search.events import SearchEvent
from jaxops.sweep.search.journal import FileJournal, journal_of
from jaxops.sweep.search.lead import SearchLead
from jaxops.sweep.work import Sweep

EVALUATIONS = 6
SEARCH = """\
base: toy.yaml
search:
  kind: tpe
  trials: 12
  startup: 4
  pruner: {kind: median, startup: 2, warmup: 0}
  values: {optimizer.lr: {kind: loguniform, low: 0.1, high: 10.0}}
"""


def bowl(lr: float) -> float:
    return (math.log(lr) - 1) ** 2


class Trainer:
    """A runner whose jobs evaluate once a poll; an evaluation is `loss(lr)` and less with each step."""

    def __init__(self, folder: SweepFolder, slots: int = 1, loss=bowl, failing: int = 0):
        self.folder, self.slots, self.loss, self.failing = folder, slots, loss, failing
        self.started, self.lr = list[str](), dict[str, float]()
        self.running = self.most = 0

    def adopt(self, point):
        return None

    def start(self, point, config, claim, given_up=None):
        self.started.append(point.id)
        self.folder.write_config(point, config)
        self.lr[point.id] = config["optimizer"]["lr"]
        self.running += 1
        self.most = max(self.most, self.running)
        return Job(self, point.id, self.failing >= len(self.started))

    def curve(self, run: str) -> list[dict]:
        return [json.loads(line) for line in (self.folder.path / run / "metrics.jsonl").read_text().splitlines()]


class Job:
    def __init__(self, trainer: Trainer, run: str, fails: bool):
        self.trainer, self.folder, self.fails, self.stopped = trainer, trainer.folder.path / run, fails, False
        self.loss = trainer.loss(trainer.lr[run])
        self.folder.mkdir(exist_ok=True)
        config = f"run: {{name: {run}}}\n"
        (self.folder / "config.yaml").exists() or (self.folder / "config.yaml").write_text(config)
        log = self.folder / "metrics.jsonl"
        self.step = len(log.read_text().splitlines()) if log.exists() else 0

    def poll(self):
        if self.fails:
            return self.end(PointEnd(1, "the loss is not finite"))
        if self.stopped:
            return self.end(PointEnd(75, "preempted"))
        self.step += 1
        value = self.loss + 1 / self.step
        shown = value if math.isfinite(value) else None
        with open(self.folder / "metrics.jsonl", "a") as log:
            log.write(json.dumps({"v": 1, "step": self.step, "time": 1.0, "valid/nll": shown}) + "\n")
        if self.step < EVALUATIONS:
            return None
        summary = {"state": "finished", "step": self.step, "valid/nll": shown}
        (self.folder / "summary.json").write_text(json.dumps(summary))
        return self.end(PointEnd(0))

    def end(self, ended):
        self.trainer.running -= 1
        if ended.status:
            summary = {"state": "failed" if ended.failed else "preempted", "step": self.step, "reason": ended.reason}
            (self.folder / "summary.json").write_text(json.dumps(summary))
        return ended

    def stop(self):
        self.stopped = True

    def kill(self):
        self.stopped = True


def search_plan(*overrides: str):
    return make_plan("find.yaml", overrides)


def searched(
    toy, *overrides: str, slots: int = 1, loss=bowl, failing: int = 0, retry: bool = False, say=lambda line: None
) -> Trainer:
    """Leads the search of `find.yaml` to its end in this process."""
    if not Path("find.yaml").exists():
        Path("find.yaml").write_text(SEARCH)
    plan = search_plan(*overrides)
    folder = SweepFolder(plan.folder)
    folder.begin_search(plan)
    journal = journal_of(plan.folder, plan.space.search.storage)
    assert journal.lead()
    try:
        lead = SearchLead(plan, plan.space, folder, journal, say)
        if retry:
            lead.retry_failed()
        trainer = Trainer(folder, slots, loss, failing)
        assert Sweep(plan, folder, trainer, say, guide=lead, retry_failed=retry).run()
    finally:
        journal.close()
    return trainer


def events_of(folder: str) -> list[SearchEvent]:
    return FileJournal(Path(folder)).read()


TASK = r"""
import json, math, os, pathlib, re, signal, sys, time
path = pathlib.Path(sys.argv[-1])
config = path.read_text()
open('started.txt', 'a').write(path.stem + chr(10))
lr = float(re.search(r'\n  lr: (\S+)', config)[1])
run = pathlib.Path(re.search(r'\n  dir: (\S+)', config)[1]) / path.stem
run.mkdir(exist_ok=True)
(run / 'config.yaml').write_text(config)
log, stop = run / 'metrics.jsonl', []
signal.signal(signal.SIGTERM, lambda *a: stop.append(1))
lines = log.read_text().splitlines() if log.exists() else []
step, value = len(lines), json.loads(lines[-1])['valid/nll'] if lines else None
end = lambda state: (run / 'summary.json').write_text(json.dumps({'state': state, 'step': step, 'valid/nll': value}))
while step < 6:
    time.sleep(0.06)
    step += 1
    value = (math.log(lr) - 1) ** 2 + 1 / step
    open(log, 'a').write(json.dumps({'v': 1, 'step': step, 'time': 1.0, 'valid/nll': value}) + chr(10))
    if stop:
        end('preempted')
        sys.exit(75)
end('finished')
"""
"""The program of a point that trains for a moment and imports nothing: it evaluates, saves at SIGTERM and goes on."""

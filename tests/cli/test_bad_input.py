"""Whatever is wrong with what a user gives: one message with place, value and remedy, status 2, nothing written."""

import dataclasses
import hashlib
import importlib.util
import os
import re
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_runs import CONFIG

from jaxops.cli.main import main


@dataclasses.dataclass(frozen=True)
class Bad:
    """A command, what its message must say (in order), and files that it meets (text, or bytes, or a function)."""

    name: str
    argv: list[str]
    says: list[str]
    files: dict[str, str | bytes | Callable[[Path], None]] = dataclasses.field(default_factory=dict)
    run: bool = False
    """Whether there is a finished run in runs/tiny."""


def train(name: str, overrides: str, *says: str, **files) -> Bad:
    """`jaxops train my.yaml`, with overrides apart by spaces."""
    return Bad(name, ["train", "my.yaml", *overrides.split()], list(says), files.get("files", {}), "run" in files)


def yaml(name: str, text: str, *says: str) -> Bad:
    """`jaxops train bad.yaml`, where bad.yaml is my.yaml and this text."""
    return Bad(name, ["train", "bad.yaml"], list(says), {"bad.yaml": CONFIG + text})


def data(name: str, file: str, content: str | bytes | Callable[[Path], None], *says: str, extra: str = "") -> Bad:
    """`jaxops train my.yaml data.path=FILE`."""
    return Bad(name, ["train", "my.yaml", f"data.path={file}", *extra.split()], list(says), {file: content})


def loss(name: str, *says: str, extra: str = "") -> Bad:
    return Bad(name, ["train", "my.yaml", f"objective={{fn: 'ownpkg.losses:{name}'}}", *extra.split()], list(says))


def source(name: str, fn: str, *says: str, extra: str = "") -> Bad:
    return Bad(name, ["train", "my.yaml", f"data={{fn: ownpkg.data:{fn}}}", *extra.split()], list(says))


def parquet(**columns) -> Callable[[Path], None]:
    return lambda path: pq.write_table(pa.table(columns), path)


def garble(path: Path) -> None:
    """Every array of every checkpoint, not its manifest."""
    for file in path.rglob("d/*"):
        file.write_bytes(b"\xff" * file.stat().st_size)


def garble_manifest(path: Path) -> None:
    for file in path.rglob("jaxops.json"):
        file.write_text("{")


def remove_checkpoints(path: Path) -> None:
    for file in path.rglob("jaxops.json"):
        file.unlink()


GARBLED = {"runs/tiny/checkpoints": garble}
NO_MANIFEST = {"runs/tiny/checkpoints": garble_manifest}
ROWS = [
    # the command line
    Bad(
        "unknown command",
        ["trian", "my.yaml"],
        ["no command 'trian'; did you mean 'train'?", "known:", "--help"],
    ),
    Bad("unknown action", ["data", "lst"], ["no command 'lst'; did you mean 'list'?", "jaxops data --help"]),
    Bad("unknown flag", ["train", "my.yaml", "--smok"], ["no flag --smok; did you mean '--smoke'?"]),
    Bad("missing argument", ["train"], ["required: config;", "jaxops train --help"]),
    Bad("one argument too many", ["export", "runs/tiny", "a", "b"], ["unexpected 'b'"]),
    Bad(
        "flag of a wrong type",
        ["predict", "r", "u", "--out", "o", "--top"],
        ["--top needs a value"],
    ),
    Bad(
        "no cpu devices",
        ["train", "my.yaml", "--cpu-devices", "0"],
        ["--cpu-devices: expected at least 1, got 0"],
    ),
    Bad("config of nothing", ["config"], ["config: name a config, or two with --diff"]),
    # keys and values
    yaml(
        "typo in a file",
        "optimiser: {lr: 1}\n",
        "optimiser [bad.yaml:8]: unknown key; did you mean 'optimizer'?",
    ),
    train("typo in an override", "optimizer.lrr=1", "optimizer.lrr [override 'optimizer.lrr=1']", "mean 'lr'?"),
    train("misplaced key", "lr=1", "lr [override 'lr=1']: unknown key; it belongs at 'optimizer.lr'"),
    train("wrong type", "run.steps=many", "run.steps [override 'run.steps=many']: expected an integer", "'many'"),
    train("bad value", "model.dropout=1.5", "model.dropout [override", "expected a rate in [0, 1)"),
    train("negative rate", "optimizer.lr=-1", "optimizer.lr [override", "expected a positive learning rate"),
    train(
        "unknown kind",
        "objective.kind=sofmax",
        "objective.kind",
        "unknown kind 'sofmax'; did you mean 'softmax'?",
    ),
    train("unknown task", "task=rek", "task [override 'task=rek']: unknown task 'rek'; did you mean 'rec'?"),
    train("heads do not divide", "model.heads=3", "model.heads [override 'model.heads=3']: must divide dim 8"),
    train("a name with a slash", "run.name=a/b", "run.name [override 'run.name=a/b']"),
    train("bad pattern", "optimizer.frozen=['(']", "optimizer.frozen [", "'(' is not a regular expression"),
    train(
        "override beneath a scalar",
        "run.steps.x=3",
        "run.steps.x [override",
        "'run.steps' is 20 [my.yaml:7], a single",
    ),
    train("malformed override", "run.steps", "override 'run.steps': an override is written dotted.path=VALUE"),
    train("override that is no YAML", "run.name=[1", "run.name [override 'run.name=[1']: not YAML"),
    train(
        "several at once",
        "run.seed=x optimizer.b3=1",
        "2 problems",
        "optimizer.b3 [",
        "known: lr",
        "run.seed [",
    ),
    # files
    Bad(
        "no such config",
        ["train", "my.yml"],
        ["no such configuration: 'my.yml'", "did you mean 'my.yaml'?"],
    ),
    yaml("yaml syntax", "model: {dim: 3\n", "bad.yaml:", "not YAML"),
    yaml(
        "duplicate key",
        "batch: {global: 8}\n",
        "batch [bad.yaml:8]: the same key twice",
        "first at bad.yaml:4",
    ),
    Bad(
        "missing data",
        ["train", "b.yaml"],
        ["data [", "missing"],
        {"b.yaml": "base: rec/sasrec\nrun: {steps: 2}\n"},
    ),
    Bad(
        "missing base",
        ["train", "b.yaml"],
        ["base [b.yaml:1]: no such configuration: 'gone'"],
        {"b.yaml": "base: gone\n"},
    ),
    Bad(
        "circle of bases",
        ["train", "a.yaml"],
        ["base [b.yaml:1]: the bases form a circle: a.yaml -> b.yaml -> a.yaml"],
        {"a.yaml": "base: b.yaml\n", "b.yaml": "base: a.yaml\n"},
    ),
    Bad(
        "environment variable",
        ["train", "b.yaml"],
        [
            "run.dir [b.yaml:2]: the environment variable JAXOPS_NOWHERE is not set",
            "${env:JAXOPS_NOWHERE:default}",
        ],
        {"b.yaml": "base: my.yaml\nrun: {dir: '${env:JAXOPS_NOWHERE}/runs'}\n"},
    ),
    # what does not go together
    train("epochs and steps", "run.epochs=3 run.steps=9", "run [", "exactly one of run.epochs and run.steps"),
    train("neither", "run.steps=null", "run [", "exactly one of run.epochs and run.steps"),
    train("mesh product", "mesh.data=3 batch.global=15", "mesh: data 3 does not fit 8 devices"),
    train(
        "two rests",
        "mesh.fsdp=-1",
        "mesh.fsdp [override 'mesh.fsdp=-1']: only one axis can be -1, and data is",
    ),
    train(
        "axis of zero",
        "mesh.tensor=0",
        "mesh.tensor [override 'mesh.tensor=0']: expected a positive number, or -1",
    ),
    train("batch against mesh", "mesh.data=8 batch.global=12", "batch.global [", "12", "8"),
    train(
        "batch against devices",
        "batch.global=12",
        "batch.global: 12 is no multiple",
        "batch shards (at least 8)",
    ),
    train("microbatch", "batch.microbatch=5", "batch.microbatch [", "5 does not divide batch.global 16"),
    train("microbatch against mesh", "batch.microbatch=4", "batch.microbatch: 4 is no multiple", "(at least 8)"),
    train(
        "heads against tensor",
        "mesh.tensor=4",
        "mesh.tensor [override 'mesh.tensor=4']: 4 does not divide model.heads 2",
    ),
    train("no sequence axis", "mesh.sequence=2", "mesh.sequence", "leave it at 1"),
    train(
        "unknown metric",
        "evaluate.metrics=[ndcg@10,ndgc@5]",
        "evaluate.metrics.1 [",
        "unknown metric 'ndgc@5'; did you mean 'ndcg@5'?",
    ),
    train(
        "best by what is not measured",
        "checkpoint.best=recall@5",
        "checkpoint.best [",
        "'recall@5' is not in",
    ),
    train(
        "stop by what is not measured",
        "evaluate.stop.metric=hr@1",
        "evaluate.stop.metric [",
        "'hr@1' is not in",
    ),
    train(
        "warm-up longer than the run",
        "optimizer.schedule.warmup=21",
        "optimizer.schedule.warmup: 21 steps",
        "20",
    ),
    Bad(
        "multiplier of nothing",
        ["train", "my.yaml", "optimizer.lr_multipliers={tables: 2}"],
        ["optimizer.lr_multipliers: 'tables' matches no parameter (there are: block_0/attention/"],
    ),
    train("frozen nothing", "optimizer.frozen=[tables]", "optimizer.frozen: 'tables' matches no parameter"),
    train("frozen everything", "optimizer.frozen=['.']", "optimizer.frozen", "leaves nothing to train"),
    train("rule of no axis", "sharding.rules=[[item,[tensr]]]", "sharding: rule", "names no mesh axis: tensr"),
    train(
        "rule too long",
        "sharding.rules=[['norm/bias',[data,fsdp]]]",
        "sharding: rule",
        "2 dimensions",
        "has 1",
    ),
    Bad(
        "unknown loss term",
        ["train", "my.yaml", "loss_weights={loss/kl: 2}"],
        ["weight for loss/kl", "loss/softmax"],
    ),
    # data
    train("no such file", "data.path=play.csv", "no data file play.csv; did you mean 'plays.csv'?"),
    train("no file matches", "data.path=p/*.csv", "no file matches 'p/*.csv'"),
    train("no such folder", "data.path=lake/plays.csv", "the folder lake does not exist"),
    data(
        "missing column",
        "d.csv",
        "usr,item,time\na,b,1\n",
        "d.csv: no column 'user'; did you mean 'usr'?",
        "columns:",
    ),
    data("empty file", "d.csv", "", "no events in d.csv: it is empty"),
    data("only a header", "d.csv", "user,item,time\n", "no events in d.csv"),
    data(
        "NaN weight",
        "d.csv",
        "user,item,time,w\na,b,1,1\na,c,2,nan\n",
        "d.csv",
        "row 2, column 'w' has no value (null or NaN)",
        extra="data.columns.weight=w",
    ),
    data(
        "float ids",
        "d.parquet",
        parquet(user=[1.5, 2.0], item=[1, 2], time=[1, 2]),
        "d.parquet",
        "'user'",
        "integer",
    ),
    Bad(
        "boundaries out of order",
        ["train", "my.yaml", "data.split={kind: global_time, valid_from: 2024-01-02, test_from: 2024-01-01}"],
        ["valid_from", "test_from"],
    ),
    data("time in words", "d.csv", "user,item,time\na,b,yesterday\n", "d.csv", "time", "yesterday"),
    data("broken JSONL", "d.jsonl", '{"user": 1, "item": 2, "time": 3}\n{"user": 1,\n', "d.jsonl:2: not JSON"),
    data("not Parquet", "d.parquet", b"user,item\n", "d.parquet: not a Parquet file"),
    data("unknown format", "d.xlsx", b"x", "cannot tell the format of d.xlsx from its suffix '.xlsx'"),
    train("nothing left", "data.min_count.item=1000", "min_count", "1000"),
    train(
        "nobody has three events",
        "data.path=d.csv",
        "leave_one_out",
        "three events",
        files={"d.csv": "user,item,time\na,b,1\n"},
    ),
    train("object store", "run.dir=az://lake/runs", "run.dir [override", "az://lake/runs", "s3://BUCKET/... and gs://"),
    Bad(
        "unknown data set",
        ["data", "get", "movielens_100"],
        ["called 'movielens_100'; did you mean 'movielens_100k'?"],
    ),
    Bad("nothing to build", ["data", "build", "my.yaml"], ["data.cache is not set"]),
    # home folders of nobody
    train("home of run.dir", "run.dir=~nobody-here/x", "run.dir [override", "there is no home folder ~nobody-here"),
    train("home of init_from", "init_from.run=~nobody-here/x", "init_from.run [override", "no home folder"),
    train("home of the cache", "data.cache=~nobody-here/x", "data.cache: ~nobody-here/x: there is no home folder"),
    train("home of the data", "data.path=~nobody-here/x.csv", "no data file ~nobody-here/x.csv"),
    Bad("home of a base", ["config", "b.yaml"], ["base [b.yaml:1]", "no home"], {"b.yaml": "base: ~nobody-here/x\n"}),
    Bad("home of a config", ["train", "~nobody-here/x"], ["'~nobody-here/x': there is no home folder"]),
    Bad("home of a run", ["evaluate", "~nobody-here/x"], ["~nobody-here/x: there is no home folder"]),
    Bad("home of runs", ["runs", "~nobody-here"], ["~nobody-here: there is no home folder"]),
    Bad("home of an export", ["export", "runs/tiny", "~nobody-here/v.parquet"], ["there is no home folder"], {}, True),
    Bad("home of a copy", ["ckpt", "export", "runs/tiny", "~nobody-here/c"], ["there is no home folder"], {}, True),
    Bad(
        "inspect a function",
        ["data", "inspect", "my.yaml", "data={fn: ownpkg.data:make}"],
        ["data: ownpkg.data:make is a function of your own"],
    ),
    # a loss of one's own
    Bad(
        "no module",
        ["train", "my.yaml", "objective={fn: 'ownpgk.losses:focal'}"],
        ["objective.fn", "no module 'ownpgk'"],
    ),
    loss("focl", "objective.fn [override", "'ownpkg.losses' has no 'focl'; did you mean 'focal'?"),
    Bad(
        "no import path",
        ["train", "my.yaml", "objective={fn: focal}"],
        ["objective.fn", "'package.module:name'", "'focal'"],
    ),
    Bad(
        "keyword of a loss",
        ["train", "my.yaml", "objective={fn: 'ownpkg.losses:focal', gama: 2}"],
        ["objective.gama [override", "focal takes no such keyword", "did you mean 'gamma'?"],
    ),
    loss("direct", "objective.fn", "direct cannot be called without 'batch', 'key'"),
    loss("three", "objective ownpkg.losses:three", "expected a function (params, batch, key), got int"),
    loss("short", "objective ownpkg.losses:short", "called as (params, batch, key)", "takes (params, batch)"),
    loss("no_loss", "objective: nothing to minimise: no entry is named 'loss/...'", "accuracy"),
    loss("bare", "objective: expected a dict of Sum or Max", "Sum.of"),
    loss("raw", "objective: expected a dict of Sum or Max", "loss/raw"),
    loss("vector", "objective: loss/v must be a scalar Sum"),
    # data of one's own
    source("a source without batch", "NoBatch", "data ownpkg.data:NoBatch", "has no batch"),
    source("a batch of one argument", "OneArgument", "data ownpkg.data:OneArgument: batch", "(cursor, size)"),
    source("a batch that is a list", "NotADict", "batch(0, 16): expected a dict of arrays", "got list"),
    source("a source that cannot count", "NoCount", "data ownpkg.data:NoCount: n_items", "'many'"),
    source(
        "wrong shape",
        "Broken, weight: 'np.ones((16, 5), np.float32)'",
        "weight: expected float32 (16, 6)",
        "(16, 5)",
    ),
    source(
        "missing entry",
        "Broken, targets: 'None', target: 'np.ones(3)'",
        "no 'targets'; did you mean 'target'?",
    ),
    source("float items", "Broken, items: 'np.ones((16, 6))'", "items: expected int32 (16, 6), got float64"),
    source("items beyond n_items", "Broken, items: 'np.full((16, 6), 31)'", "items: expected 0", "30", "got 31"),
    source("validation without target", "BadValid", "valid(512)", "no 'target'; did you mean 'targets'?"),
    source("validation without batches", "EmptyValid", "valid(512) gave no batch"),
    # a logger of one's own
    Bad(
        "logger without write",
        ["train", "my.yaml", "run.loggers=[{fn: 'ownpkg.loggers:Mute'}]"],
        ["run.loggers ownpkg.loggers:Mute", "(Mute)", "expected a function (step, values)"],
    ),
    Bad(
        "logger of one argument",
        ["train", "my.yaml", "run.loggers=[{fn: 'ownpkg.loggers:Narrow'}]"],
        ["run.loggers ownpkg.loggers:Narrow", "called as (step, values)"],
    ),
    # run folders
    train("begin from no run", "init_from.run=runs/gone", "runs/gone is not a run folder"),
    train(
        "begin from nothing that fits",
        "run.name=next init_from.run=runs/tiny init_from.match=tower",
        "init_from: weights: nothing of runs/tiny fits: no name has 'tower' in it; it has block_0/attention/",
        run=True,
    ),
    train("folder beneath a file", "run.dir=plays.csv", "run folder plays.csv/tiny: plays.csv is a file"),
    train(
        "run folder that is a file",
        "run.dir=. run.name=plays.csv",
        "run folder plays.csv: plays.csv is a file",
    ),
    train(
        "no run",
        "",
        "runs/tiny is not empty and holds no config.yaml",
        "notes.txt",
        files={"runs/tiny/notes.txt": ""},
    ),
    train(
        "another config",
        "model.dim=16 optimizer.lr=1",
        "runs/tiny belongs to another config",
        "model.dim: 8 there, 16 here",
        "optimizer.lr: 0.001 there, 1.0 here",
        "may change only",
        "run.name",
        run=True,
    ),
    train(
        "other data",
        "run.steps=30",
        "runs/tiny: the data is no longer what the run began with",
        "SHA-256",
        files={"plays.csv": "user,item,time\n" + "".join(f"u{u},i{i},{i}\n" for u in range(60) for i in range(5))},
        run=True,
    ),
    train(
        "garbled checkpoints",
        "run.steps=30",
        "every checkpoint in",
        "damaged",
        "steps 10, 20",
        files=GARBLED,
        run=True,
    ),
    train("broken manifests", "run.steps=30", "every checkpoint in", "damaged", files=NO_MANIFEST, run=True),
    Bad(
        "broken config of a run",
        ["evaluate", "runs/tiny"],
        ["runs/tiny/config.yaml"],
        {"runs/tiny/config.yaml": "a: ["},
        True,
    ),
    Bad(
        "evaluate garbled",
        ["evaluate", "runs/tiny"],
        ["step 20 is damaged: state/", "CRC-32", "--step 10"],
        GARBLED,
        True,
    ),
    Bad(
        "predict garbled",
        ["predict", "runs/tiny", "plays.csv", "--out", "o"],
        ["step 20 is damaged"],
        NO_MANIFEST,
        True,
    ),
    Bad("no run to evaluate", ["evaluate", "ownpkg"], ["ownpkg is not a run folder: it has no config.yaml"]),
    Bad("no folder to evaluate", ["evaluate", "runs/tinny"], ["runs/tinny is not a run folder"], {}, True),
    Bad(
        "no such step",
        ["evaluate", "runs/tiny", "--step", "15"],
        ["no checkpoint of step 15 (there are: 10, 20)"],
        {},
        True,
    ),
    Bad(
        "no checkpoint",
        ["export", "runs/tiny", "v.parquet"],
        ["runs/tiny has no checkpoint yet"],
        {"runs/tiny/checkpoints": remove_checkpoints},
        True,
    ),
    Bad(
        "predict for no file",
        ["predict", "runs/tiny", "u.csv", "--out", "o"],
        ["no data file u.csv"],
        {},
        True,
    ),
    Bad(
        "predict without a user column",
        ["predict", "runs/tiny", "u.csv", "--out", "o"],
        ["u.csv: no column 'user'; did you mean 'usr'?"],
        {"u.csv": "usr,n\na,1\n"},
        True,
    ),
    Bad(
        "predict for nobody known",
        ["predict", "runs/tiny", "u.csv", "--out", "o"],
        ["no user has a history that the model knows"],
        {"u.csv": "user\nnobody\n"},
        True,
    ),
    Bad(
        "top none",
        ["predict", "runs/tiny", "plays.csv", "--top", "0", "--out", "o"],
        ["top must be at least 1", "0"],
        {},
        True,
    ),
    Bad(
        "out on a file",
        ["predict", "runs/tiny", "plays.csv", "--out", "my.yaml"],
        ["my.yaml is a file"],
        {},
        True,
    ),
    Bad(
        "out beneath a file",
        ["export", "runs/tiny", "my.yaml/v.parquet"],
        ["my.yaml is not a folder"],
        {},
        True,
    ),
    Bad("diff of nothing", ["config", "--diff", "my.yaml", "gone"], ["no such configuration: 'gone'"]),
]

if importlib.util.find_spec("wandb") is None:
    ROWS.append(
        Bad(
            "a logger that is not installed",
            ["train", "my.yaml", "run.loggers=[wandb]"],
            ["the wandb logger needs a package: pip install 'jaxops[wandb]'"],
        )
    )


def snapshot(folder: Path) -> dict[str, str]:
    """Every file and folder, with the SHA-256 of its content; what Python keeps of imported code is not looked at."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(folder.rglob("*"))
        if "__pycache__" not in path.parts
    }


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name.replace(" ", "-"))
def test_a_mistake_gives_one_message_and_status_2_and_writes_nothing(row, folder, request, capsys, monkeypatch):
    monkeypatch.delenv("JAXOPS_NOWHERE", raising=False)
    if row.run:
        request.getfixturevalue("finished")
    for name, content in row.files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if callable(content):
            content(path)
        else:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
    before = snapshot(folder)
    status = main(row.argv)
    told = capsys.readouterr()
    assert status == 2, told.err
    assert told.out == ""
    assert len(re.findall("^jaxops: ", told.err, re.MULTILINE)) == 1
    assert not re.search(r"Traceback|^\w*Error: |<class ", told.err, re.MULTILINE)
    message = told.err.partition("jaxops: ")[2]
    at = 0
    for fragment in row.says:
        found = message.find(fragment, at)
        assert found >= 0, f"{fragment!r} is not in, or not in this order:\n{message}"
        at = found + len(fragment)
    assert snapshot(folder) == before
    assert os.getcwd() == str(folder)


def test_the_table_is_long_enough_and_every_row_has_its_own_name():
    names = [row.name for row in ROWS]
    assert len(names) >= 35 and len(set(names)) == len(names)
    assert all(row.says for row in ROWS)

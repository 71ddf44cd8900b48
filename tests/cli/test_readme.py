"""Every command that README prints does what it is printed for, in the order in which it stands there.

What is cut: training takes two steps (`run.steps=2`) without baselines, and in the quick test a smaller model;
MovieLens-100K is replaced by small files in its form (it needs a network), the synthetic click log has 3,000 rows, and
`make` says what it would do (`make -n`), for it installs. Nothing else is: `evaluate`, `predict`, `export` and
`shardings` run exactly as printed.
"""

import contextlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_data import USERS, movielens, plays
from tiny_runs import working_in

import jaxops as jx
from jaxops.cli.main import _parser, main, parse_arguments
from jaxops.run.build import load_config

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
CUT = ["run.steps=2", "evaluate.baselines=false", "run.loggers=[]"]
SMALLER = ["model={dim: 8, layers: 1, heads: 1, length: 6}"]
BIN = ".venv/bin/"


def blocks(language: str) -> list[str]:
    """The contents of the fenced blocks of a language, which may be none."""
    return [text for of, text in re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.S | re.M) if of == language]


def printed(block: str) -> list[list[str]]:
    """The words of each command of a block, without comments."""
    lines = (shlex.split(line, comments=True) for line in block.replace("\\\n", " ").splitlines())
    return [words for words in lines if words]


SHELL = [printed(block) for block in blocks("bash")]
COMMANDS = [words for block in SHELL for words in block]
OF_JAXOPS = [words[1:] for words in COMMANDS if words[0] == f"{BIN}jaxops"]


def paragraph(beginning: str) -> str:
    """A paragraph of README by its first words, in one line."""
    found = next(text for text in README.split("\n\n") if text.startswith(beginning))
    return " ".join(found.split())


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with the two files of the reader's own, and small named data sets."""
    for name in ("JAXOPS_BEAUTY", "JAXOPS_CRITEO"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("JAXOPS_CACHE", str(tmp_path / "cache"))
    movielens(monkeypatch)
    plays(tmp_path / "plays.parquet")
    pq.write_table(pa.table({"user": [*range(1, USERS + 1)]}), tmp_path / "users.parquet")
    with working_in(tmp_path):
        yield tmp_path


def run(words: list[str], *more: str) -> None:
    """Runs one printed command, cut as the docstring of this file says."""
    program, *rest = words
    if program == f"{BIN}jaxops":
        cut = [*CUT, *more] if rest[0] == "train" else []
        assert main([*rest, *cut]) == 0, words
    elif program == f"{BIN}python":
        assert rest[0] == "-m" and "--rows" in rest
        rest[rest.index("--rows") + 1] = "3000"
        subprocess.run([sys.executable, *rest], env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)
    else:
        pytest.fail(f"README prints {' '.join(words)!r}, and nothing here knows how to try it")


def test_every_printed_command_is_tried_somewhere():
    assert len(COMMANDS) > 10 and len(SHELL) == 3
    assert {words[0] for words in COMMANDS} == {"make", f"{BIN}jaxops", f"{BIN}python"}
    assert all(words[0] == "make" for words in SHELL[0])


def test_what_make_is_asked_for_it_knows():
    if shutil.which("make") is None:
        pytest.skip("there is no make")
    asked = [words[1:] for words in COMMANDS if words[0] == "make"]
    asked += [words.split()[1:] for words in re.findall(r"`(make [a-z-]+)[^`]*`", README)]
    for target in asked:
        done = subprocess.run(["make", "-n", *target], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        if target == ["demo"]:
            (demo,) = [words for words in printed(done.stdout) if words[0] == f"{BIN}jaxops"]
            assert parse_arguments(demo[1:]).config == "rec/movielens_sasrec"


@pytest.mark.parametrize("words", OF_JAXOPS, ids=" ".join)
def test_each_command_is_understood_and_its_config_is_whole(words):
    args = parse_arguments(words)
    if hasattr(args, "config"):
        assert load_config(args.config, args.overrides).config.task == "rec"


def test_all_commands_are_named_and_what_is_named_is_there():
    """As whole commands in a block, or in the paragraph of further ones: `ckpt list|show`, `train --smoke`."""
    named = {words[0]: set() for words in OF_JAXOPS}
    for code in re.findall(r"`([^`]*)`", paragraph("More commands:")):
        name, _, rest = code.partition(" ")
        if re.fullmatch(r"[a-z]+", name) and name != "report.html":
            named.setdefault(name, set()).update(word for word in rest.split("|") if re.fullmatch("[a-z]+", word))
    commands = next(action for action in _parser()._actions if action.dest == "command").choices
    assert {*named} == {*commands}
    for name, actions in named.items():
        known = [action.choices for action in commands[name]._actions if action.dest == "action"]
        assert actions == ({*known[0]} if known else set()), name
    assert parse_arguments(["config", "--diff", "a", "b"]).diff and parse_arguments(["train", "x", "--smoke"]).smoke


def test_the_mistake_is_answered_as_it_stands_there(place, capsys):
    (block,) = [block for block in blocks("") if block.startswith("$ ")]
    command, answer = block.splitlines()
    assert main(shlex.split(command)[2:]) == 2
    assert capsys.readouterr().err.startswith(answer.removesuffix("..."))


@pytest.mark.usefixtures("no_report")
def test_ones_own_data(place, capsys):
    for number, words in enumerate(SHELL[1]):
        run(words, *SMALLER)
        if number == 1:
            assert "nothing to do" in capsys.readouterr().err  # again = resume
    assert "runs/mine, step 2" in capsys.readouterr().out and pq.read_table("vectors.parquet").num_rows == 60
    ranked = pa.concat_tables(pq.read_table(file) for file in Path("recs").iterdir())
    assert {*ranked["user"].to_pylist()} == {*range(1, USERS + 1)}


@pytest.mark.slow
def test_the_further_commands(place, capsys):
    for name in ("mine", "other"):
        run([*SHELL[1][0], f"run.name={name}"])
    config = ["rec/my_interactions", "data.path=plays.parquet"]
    commands = [["runs"], ["compare", "runs/mine", "runs/other"], ["report", "runs/mine"], ["doctor"]]
    commands += [["ckpt", action, "runs/mine"] for action in ("list", "show", "verify")]
    commands += [["ckpt", "export", "runs/mine", "copy"], ["config", *config], ["shardings", *config], ["data", "list"]]
    commands += [["config", "--diff", "runs/mine", "runs/other"], ["data", "get", "movielens_100k"]]
    commands += [["data", "inspect", *config], ["data", "build", *config, "data.cache=built"]]
    commands += [["train", *config, "--smoke"]]
    for words in commands:
        assert main(words) == 0, (words, capsys.readouterr().err)
    assert {path.name for path in Path("runs").iterdir() if path.is_dir()} == {"mine", "other"}


@pytest.mark.slow
def test_other_recommenders(place):
    for words in SHELL[2]:
        run(words)
    assert {path.name for path in Path("runs").iterdir()} == {"movielens-two-tower", "ctr-dcnv2", "criteo-dcnv2"}


@pytest.mark.slow
def test_the_library(place, monkeypatch, capsys):
    (code,) = blocks("python")
    monkeypatch.setattr(jx, "use_cpu_devices", lambda count: None)  # this process has its devices
    with contextlib.redirect_stderr(None):
        exec(compile(code, "README.md", "exec"), {"__name__": "__main__"})
    assert "runs/focal" in capsys.readouterr().out and Path("runs/focal/report.html").is_file()

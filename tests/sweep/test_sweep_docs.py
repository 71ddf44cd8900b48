"""The file of docs/sweeps.md is a sweep, and its commands are understood."""

import re
import shlex
from pathlib import Path

from jaxops.cli.main import parse_arguments
from jaxops.sweep.plan import make_plan

PAGE = (Path(__file__).parents[2] / "docs/sweeps.md").read_text(encoding="utf-8")


def test_the_sweep_of_the_page_has_its_points(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text, search = re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    Path("sweep.yaml").write_text(text)
    Path("my.yaml").write_text("base: rec/movielens_sasrec")
    plan = make_plan("sweep.yaml")
    assert len(plan.points) == 3 * (1 + 2) * 2 * 3 and plan.runner.jobs == 2
    Path("search.yaml").write_text(search)
    runners = re.findall(r"^`(runner: .*)`$", PAGE, re.MULTILINE)
    assert len(runners) == 2
    for runner in runners:
        Path("elsewhere.yaml").write_text(search + runner)
        assert make_plan("elsewhere.yaml").runner.kind in ("slurm", "launch")
    space = make_plan("search.yaml").space
    assert space.search.trials == 30 and space.search.pruner.kind == "hyperband" and len(space.search.first) == 1
    draws = re.search(r"`random: (\{.*?\}\}\})`", PAGE, re.DOTALL)[1]
    Path("sweep.yaml").write_text(f"base: my.yaml\nruns:\n  random: {' '.join(draws.split())}\n")
    assert len(make_plan("sweep.yaml").points) == 20


def test_the_commands_of_the_page_are_understood():
    (block,) = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
    lines = [words for line in block.splitlines() if (words := shlex.split(line, comments=True))]
    parsed = [parse_arguments(words[1:]) for words in lines]
    assert [one.command for one in parsed] == ["sweep"] * 4 and parsed[2].dry_run and parsed[3].status

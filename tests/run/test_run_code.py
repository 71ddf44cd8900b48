"""Code behind an import path that has changed since a run was trained is told, and accepted only when asked to."""

import functools
import importlib
import json
import sys
from pathlib import Path

import pytest

import jaxops as jx
from jaxops.cli.main import main
from jaxops.core.failures import UserError
from jaxops.run.build import build_task, load_config
from jaxops.run.fit import fit

pytestmark = pytest.mark.usefixtures("no_report")
QUICK = ["evaluate.baselines=false", "run.steps=10"]
FOCAL = ["objective={fn: 'ownpkg.losses:focal', gamma: 2.0}", *QUICK]


def edit(file: str, old: str, new: str) -> None:
    """Another source, as the next process would import it."""
    path = Path(file)
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    for name in [name for name in sys.modules if name.split(".")[0] == "ownpkg"]:
        del sys.modules[name]
    importlib.invalidate_caches()


def code() -> dict:
    return json.loads(Path("runs/tiny/code.json").read_text())


def test_a_changed_loss_is_not_the_finished_run(folder, capsys):
    assert main(["train", "my.yaml", *FOCAL]) == 0
    first = code()
    assert list(first["sources"]) == ["ownpkg.losses:focal"] and first["accepted"] == []
    edit("ownpkg/losses.py", "1 - jnp.exp(logp)", "2 - jnp.exp(logp)")
    capsys.readouterr()
    assert main(["train", "my.yaml", *FOCAL]) == 2
    said = capsys.readouterr().err
    assert "ownpkg.losses:focal" in said and "--accept-code" in said and "neither what they import" in said
    assert code() == first
    assert main(["train", "my.yaml", *FOCAL, "--accept-code"]) == 0
    assert [note["path"] for note in code()["accepted"]] == ["ownpkg.losses:focal"]
    assert code()["accepted"][0]["from"] == first["sources"]["ownpkg.losses:focal"]
    assert main(["train", "my.yaml", *FOCAL]) == 0  # once is enough
    assert main(["evaluate", "runs/tiny"]) == 0


def test_a_run_goes_on_with_other_code_only_when_asked(folder):
    assert main(["train", "my.yaml", *FOCAL]) == 0
    edit("ownpkg/losses.py", "gamma=2.0", "gamma=1.0")
    longer = [*FOCAL[:-1], "run.steps=20"]
    assert main(["train", "my.yaml", *longer]) == 2
    assert json.loads(Path("runs/tiny/summary.json").read_text())["step"] == 10
    assert main(["train", "my.yaml", *longer, "--accept-code"]) == 0
    assert json.loads(Path("runs/tiny/summary.json").read_text())["step"] == 20 and len(code()["accepted"]) == 1


def test_changed_data_are_not_evaluated_on_in_silence(folder, capsys):
    assert main(["train", "my.yaml", "data={fn: 'ownpkg.data:make', seed: 3}", *QUICK]) == 0
    edit("ownpkg/data.py", "1 + example % 3", "2 + example % 3")
    capsys.readouterr()
    assert main(["evaluate", "runs/tiny"]) == 2
    assert "ownpkg.data:make" in capsys.readouterr().err
    before = code()
    assert main(["evaluate", "runs/tiny", "--accept-code"]) == 0
    assert jx.load("runs/tiny", accept_code=True).evaluate(("test",))
    assert code() == before  # looking changes nothing


def test_what_evaluation_does_not_run_may_change(folder):
    assert main(["train", "my.yaml", *FOCAL]) == 0
    edit("ownpkg/losses.py", "gamma=2.0", "gamma=1.0")
    assert main(["evaluate", "runs/tiny"]) == 0


def test_a_run_of_an_older_version_takes_the_code_that_is_here(folder):
    assert main(["train", "my.yaml", *FOCAL]) == 0
    Path("runs/tiny/code.json").unlink()
    edit("ownpkg/losses.py", "gamma=2.0", "gamma=1.0")
    assert main(["train", "my.yaml", *FOCAL]) == 0


def test_a_loss_handed_over_in_python_is_looked_at_too(folder):
    loaded = load_config("my.yaml", QUICK)

    def train(**options):
        losses = importlib.import_module("ownpkg.losses")
        return fit(build_task(loaded, objective=functools.partial(losses.focal, gamma=2.0)), quiet=True, **options)

    sys.path.insert(0, ".")
    try:
        train()
        edit("ownpkg/losses.py", "1 - jnp.exp(logp)", "2 - jnp.exp(logp)")
        with pytest.raises(UserError, match=r"ownpkg\.losses:focal"):
            train()
        assert train(accept_code=True).state == "finished" and len(code()["accepted"]) == 1
    finally:
        sys.path.remove(".")


def test_a_path_to_what_another_file_defines_covers_that_file(folder, capsys):
    Path("ownpkg/front.py").write_text("from ownpkg.losses import focal\n")
    front = ["objective={fn: 'ownpkg.front:focal'}", *QUICK]
    assert main(["train", "my.yaml", *front]) == 0
    edit("ownpkg/losses.py", "1 - jnp.exp(logp)", "2 - jnp.exp(logp)")
    assert main(["train", "my.yaml", *front]) == 2


def test_a_run_without_code_of_ones_own_has_no_record(finished):
    assert not Path("runs/tiny/code.json").exists()

"""The blocks of docs that a reader would copy are run, on small data and for two steps.

Run elsewhere: README (tests/cli/test_readme.py), the quickstart (test_quickstart.py), the beginning of docs/rlhf.md
(tests/families/policy/test_rlhf_docs.py), docstrings (test_docstring_examples.py), programs and notebooks
(tests/examples). NOT_RUN has what no test of this machine can run; test_blocks.py checks that it is understood.
"""

import functools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from blocks import Block, blocks, commands
from small_data import USERS, movielens
from tiny_runs import CONFIG, furnish, no_report, working_in  # noqa: F401 (a fixture)

import jaxops as jx
from jaxops.cli.main import main
from jaxops.run.summary import FinishedRun

NOT_RUN = {
    "launch.md": "machines, clusters and clouds; tests/launch has stand-ins for them",
    "object_stores.md": "a bucket; tests/run/folder and tests/recovery have an object store of their own",
    "plan.md": "libtpu's compiler, which is no part of the environment; tests/plan runs the commands that need none",
    "security.md": "runs and services of other people; tests/run/test_run_trust.py has a hostile run",
    "failures.md": "several hosts; tests/recovery starts the processes here",
    "language.md": "downloads and talks at a terminal; tests/families/language runs the shipped configs on small data",
    "reward.md": "a download; tests/families/reward runs the shipped configs on small data",
    "coming_from.md": "tables of names, no blocks",
    "CONTRIBUTING.md": "what makes environments and the suite itself",
}
"""Pages of which no block is run here, and why."""
RUN = {"recipes.md", "sweeps.md", "audit.md", "five_rules.md", "extending.md", "recommenders.md"}
ELSEWHERE = {"README.md", "quickstart.md", "rlhf.md", "tables.md", "index.md", "library.md"}
CUT = ["run.steps=2", "run.epochs=null", "evaluate.baselines=false", "evaluate.every=2", "run.log_every=1"]


def of(page: str, *languages: str) -> list[Block]:
    """Returns the blocks of one page."""
    return [block for block in blocks(*languages) if block.page == page]


def test_every_page_is_run_or_says_why_not():
    pages = {path.name for path in (Path(__file__).parents[2] / "docs").glob("*.md")} | {"README.md", "CONTRIBUTING.md"}
    assert pages == {*NOT_RUN} | RUN | ELSEWHERE


@pytest.fixture
def place(tmp_path, monkeypatch, no_report):  # noqa: F811
    """A folder with a small config `my.yaml`, a package `mypkg` of the reader's own, and small named data."""
    monkeypatch.setenv("JAXOPS_CACHE", str(tmp_path / "cache"))
    movielens(monkeypatch)
    furnish(tmp_path)
    package = tmp_path / "mypkg"
    package.mkdir()
    (package / "__init__.py").touch()
    with working_in(tmp_path):
        yield tmp_path
    for name in [name for name in sys.modules if name.split(".")[0] == "mypkg"]:
        del sys.modules[name]


def write_module(name: str, *parts: Block) -> None:
    """Writes blocks into a module of `mypkg`, below the imports that the page takes for granted."""
    head = "import jax\nimport jax.numpy as jnp\nimport numpy as np\n\nimport jaxops as jx\n\n\n"
    Path("mypkg", f"{name}.py").write_text(head + "\n\n".join(block.text for block in parts))


def containing(page: str, language: str, words: str) -> Block:
    """Returns the only block of a page that has some words."""
    (found,) = [block for block in of(page, language) if words in block.text]
    return found


def train(overrides: list[str], tree: dict | None = None) -> FinishedRun:
    """Trains `my.yaml` two steps, with a tree of YAML over it."""
    Path("part.yaml").write_text(yaml.safe_dump({"base": "my.yaml", **(tree or {})}))
    return jx.fit(jx.build_task(jx.load_config("part.yaml", [*overrides, *CUT])), quiet=True)


def test_five_rules(capsys):
    for block in of("five_rules.md", "python"):
        exec(compile(block.text, str(block), "exec"), {})
    assert capsys.readouterr().out == "3.0\n"


@pytest.mark.slow
def test_recipes(place):
    write = "class Tracker:\n    def write(self, step, values): print('tracked', step)\n"
    Path("mypkg/track.py").write_text(write)
    assert train(["run.name=yesterday"]).state == "finished"
    for number, block in enumerate(of("recipes.md", "yaml")):
        tree = yaml.safe_load(block.text)
        if "loggers" in tree.get("run", {}):  # Weights & Biases is a service
            tree["run"]["loggers"] = [one for one in tree["run"]["loggers"] if not isinstance(one, dict)]
        if "schedule" in tree.get("optimizer", {}):  # two steps have no room for the warm-up
            tree["optimizer"]["schedule"]["warmup"] = 1
        assert train([f"run.name=recipe{number}"], tree).state == "finished", block
    for block in of("recipes.md", "python"):
        exec(compile(block.text, str(block), "exec"), {})
    assert Path("loss.png").is_file()
    for block in of("recipes.md", "bash"):
        for words in commands(block):
            if words[1:3] in (
                ["config", "--help"],
                ["launch", "my.yaml"],
            ):  # test_blocks.py; its dry run is launch.md's
                continue
            cut = CUT if words[1] == "train" else []
            plain = [word for at, word in enumerate(words[1:]) if "--cpu-devices" not in words[at : at + 2]]
            assert main([*plain, *cut]) == 0, (str(block), words)


@pytest.mark.slow
def test_sweeps(place, capsys):
    sweep, search = of("sweeps.md", "yaml")
    Path("sweep.yaml").write_text(sweep.text)
    Path("search.yaml").write_text(search.text)
    few = ["runs.grid={optimizer.lr: [1e-3]}", "runs.zip={model.dim: [8, 16]}", "runs.when=[]", "runs.seeds=1"]
    small = ["model.length=6", *CUT, "runner={kind: in_process}"]
    for words in commands(of("sweeps.md", "bash")[0]):
        cut = [] if "--dry-run" in words else small
        assert main([*words[1:], *cut, *(few if cut and words[2] == "sweep.yaml" else [])]) == 0, words
    assert "6 finished" in capsys.readouterr().out
    assert main(["sweep", "search.yaml", "--dry-run"]) == 0


@pytest.mark.slow
def test_audit_commands(place):
    write_module("losses", containing("extending.md", "python", "def focal"))
    with open("mypkg/losses.py", "a") as file:
        file.write("\n\nmine = focal\n")
    for words in commands(of("audit.md", "bash")[0]):
        if "language/sft_7b" not in words:  # tests/audit/test_family_audits.py: minutes
            plain = [word for at, word in enumerate(words[1:]) if "--cpu-devices" not in words[at : at + 2]]
            assert main(plain) == 0, words


@pytest.mark.slow
def test_audit_checks_in_a_test_of_ones_own(place):
    (block,) = of("audit.md", "python")
    task = jx.build_task(jx.load_config("my.yaml"))

    def objective(params, batch, key):
        return {"loss/mse": jx.Sum.of(((batch["x"] @ params["w"]) - batch["y"]) ** 2, batch["weight"])}

    batch = {"id": np.arange(16), "x": np.ones((16, 4), np.float32), "weight": np.ones(16, np.float32)}
    batch |= {"x": np.random.default_rng(0).normal(size=(16, 4)).astype(np.float32), "y": np.ones(16, np.float32)}
    names = {"objective": objective, "params": {"w": jnp.ones(4)}, "batch": batch, "task": task}
    exec(compile(block.text, str(block), "exec"), names)
    names["test_my_loss"]()


@pytest.mark.slow
def test_extending_a_loss(place):
    write_module("losses", containing("extending.md", "python", "def focal"))
    tree = yaml.safe_load(containing("extending.md", "yaml", "mypkg.losses").text)
    assert "train/loss/focal" in train(["run.name=loss"], tree).history().column_names


@pytest.mark.slow
def test_extending_a_model_and_its_data(place):
    write_module("models", containing("extending.md", "python", "class Mean"))
    write_module("data", containing("extending.md", "python", "class Source"))
    model = yaml.safe_load(containing("extending.md", "yaml", "mypkg.models").text)
    data = yaml.safe_load(containing("extending.md", "yaml", "mypkg.data").text)
    trees = yaml.safe_load(CONFIG) | model | data
    Path("my.yaml").write_text(yaml.safe_dump(trees))
    run = train(["run.name=own"])
    assert run.state == "finished" and 0 <= run.summary["valid/ndcg@10"] <= 1


@pytest.mark.slow
def test_extending_a_step_a_hook_and_a_writer(place, capsys):
    write = (
        "class Tracker:\n    def __init__(self, project): ...\n    def write(self, step, values): print('at', step)\n"
    )
    Path("mypkg/track.py").write_text(write)
    writer = yaml.safe_load(containing("extending.md", "yaml", "mypkg.track").text)
    Path("part.yaml").write_text(yaml.safe_dump({"base": "my.yaml", **writer}))
    config = jx.load_config("part.yaml", [*CUT, "run.name=step"])
    names: dict = {}
    exec(compile(containing("extending.md", "python", "class Twice").text, "extending.md", "exec"), names)
    hook = containing("extending.md", "python", "hooks=").text.replace("500", "1")
    fit = functools.partial(jx.fit, step=names["Twice"], quiet=True)
    every = {"every": jx.every, "fit": fit}
    exec(compile(hook, "extending.md", "exec"), {"jx": type("Names", (), every), "task": jx.build_task(config)})
    out = capsys.readouterr().out
    assert "at 2" in out and "'loss'" in out
    with open("runs/step/summary.json") as file:
        assert yaml.safe_load(file)["step"] == 2


@pytest.mark.slow
def test_recommenders(place):
    rng = np.random.default_rng(0)
    count = 40 * USERS
    columns = {
        "account": [f"a{n}" for n in rng.integers(USERS, size=count)],
        "title": [f"t{n}" for n in rng.integers(30, size=count)],
        "device": rng.choice(["phone", "tv"], count).tolist(),
        "at": (1_700_000_000 + rng.permutation(count) * 60).tolist(),
        "price": rng.normal(size=count).tolist(),
        "clicked": rng.integers(2, size=count).tolist(),
        "minutes": rng.uniform(0, 10, count).tolist(),
    }
    for folder, names in (("plays", {"at": "played_at"}), ("impressions", {})):
        Path(folder).mkdir()
        table = pa.table({names.get(name, name): values for name, values in columns.items()})
        pq.write_table(table, f"{folder}/one.parquet")
    for block in of("recommenders.md", "yaml"):
        Path("page.yaml").write_text(block.text)
        small = ["objective.negatives=8"] if "negatives" in block.text else []
        run = jx.fit(jx.build_task(jx.load_config("page.yaml", [*small, *CUT])), quiet=True)
        assert run.state == "finished", block
    for words in commands(of("recommenders.md", "bash")[0]):
        assert main([*words[1:], *CUT]) == 0, words


def test_tables_by_hand(monkeypatch):
    """The rows are fewer: two million would be half a gigabyte."""
    text = containing("tables.md", "python", "EmbeddingTables").text.replace("2_000_000", "2_048")
    rng = np.random.default_rng(0)
    batch = {
        "id": np.arange(16, dtype=np.int32),
        "history": rng.integers(0, 2048, (16, 5)).astype(np.int32),
        "item": rng.integers(0, 2048, 16).astype(np.int32),
        "label": rng.integers(0, 2, 16).astype(np.float32),
        "weight": np.ones(16, np.float32),
    }
    names = {"jax": jax, "optax": optax, "tx": optax.sgd(0.1), "batch": batch, "first_batch": batch}
    names["init"] = lambda key: {"w": 0.1 * jax.random.normal(key, (64,))}
    exec(compile(text, "tables.md", "exec"), names)
    assert np.isfinite(float(names["sums"]["loss/bce"].total)) and int(names["state"].step) == 1

"""`evaluate` right after `train` gives the run's own numbers, to the last bit, for every shipped config that runs here.

Each config is trained as it is shipped but for its length, on small data in its form (tests/small_data.py).
"""

import json
from pathlib import Path

import pytest
from small_data import NAMED, movielens, write_file
from test_golden_configs import COMPLETED_BY, NAMES
from tiny_runs import no_report, working_in  # noqa: F401 (fixtures)

from jaxops.cli.main import main
from jaxops.run.build import load_config

OF_7B = ("language/sft_7b", "policy/ppo_7b")
"""Of seven billion parameters: tests/plan/test_plan_tpu.py compiles them."""
OF_135M = ("language/sft_smollm2", "language/lora_smollm2", "reward/ratings_smollm2", "policy/ppo_smollm2")
"""Of 135 million parameters. test_smollm2_configs.py and test_frozen_trunk.py run them with a tiny model."""
CHAINED = ("language/sft_arithmetic", "policy/grpo_arithmetic", "policy/ppo_sentiment", "reward/votes_sentiment")
"""Begin with a run or with files that come before them; test_sentiment.py runs those on reviews."""
RUNNABLE = [name for name in NAMES if name not in (*COMPLETED_BY, *OF_7B, *OF_135M, *CHAINED)]
SHORT = ["run.steps=7", "evaluate.every=3", "evaluate.baselines=false", "run.log_every=2", "run.loggers=[]"]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("JAXOPS_BEAUTY", "JAXOPS_CRITEO"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("JAXOPS_CACHE", str(tmp_path / "cache"))
    with working_in(tmp_path):
        yield tmp_path


@pytest.mark.slow
@pytest.mark.usefixtures("no_report")
@pytest.mark.parametrize("name", RUNNABLE)
def test_evaluate_gives_the_numbers_of_the_run(place, monkeypatch, capsys, name):
    config = load_config(name).config
    path = getattr(config.data, "path", None)
    if path in NAMED:
        NAMED[path](monkeypatch)
    elif path:
        write_file(place, path)
    else:
        movielens(monkeypatch)
    constant = [] if config.task == "rec" else ["optimizer.schedule=constant"]  # a warm-up longer than the run
    assert main(["train", name, *SHORT, *constant]) == 0
    run = Path("runs", config.run.name)
    summary = json.loads((run / "summary.json").read_text())
    capsys.readouterr()
    assert main(["evaluate", str(run), "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    measured = [key for key in summary if key.startswith(("valid/", "test/")) and not key.endswith("/reliability")]
    parts = ("valid",) if config.task in ("language", "reward") else ("valid", "test")
    assert {f"{part}/{metric}" for part in parts for metric in config.evaluate.metrics} <= {*measured}
    assert {key: again[key] for key in measured} == {key: summary[key] for key in measured}
    assert again["step"] == summary["best_step"]

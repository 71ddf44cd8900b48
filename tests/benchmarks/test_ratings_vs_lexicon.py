"""The lexicon is judged on the very pairs that runs of `reward/ratings_tiny` are, and by accuracies counted by hand."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
from small_data import ratings

import jaxops as jx
from jaxops.run.build import load_config

FILE = Path(__file__).parents[2] / "benchmarks" / "ratings_vs_lexicon.py"
WORDS = {"good": 1.0, "bad": -1.0, "fine": 0.5, "dull": -0.5, "warm": 0.7}


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location(FILE.stem, FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[FILE.stem] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def config(monkeypatch, tmp_path):
    monkeypatch.setenv("JAXOPS_CACHE", str(tmp_path))
    ratings(monkeypatch)
    return load_config("reward/ratings_tiny", ["tokenizer=bytes"])


def score(text: str) -> float:
    return WORDS[text.split()[1]]


def test_its_accuracy_is_over_the_pairs_of_the_config_s_runs(script, config):
    found = script.compared(config.config.data, score)
    task = jx.build_task(config)
    pairs = task.evaluation.pairs  # those that a run is evaluated on
    said = lambda at: bytes(one for one in pairs.texts.of(at).tolist() if one < 256).decode()
    texts = [said(at) for at in range(len(pairs.texts))]
    right = []
    for (first, second), label in zip(pairs.sides, pairs.label, strict=True):
        if label != 0.5:
            difference = score(texts[first]) - score(texts[second])
            right.append(0.5 if difference == 0 else float((difference > 0) == (label > 0.5)))
    assert found["all"]["accuracy"] == pytest.approx(np.mean(right), abs=1e-12)
    assert found["all"]["judgements"] == len(pairs)
    assert found["all"]["ceiling"] == task.baselines()["ceiling"]["valid/accuracy"]
    assert found["film"] == found["all"]  # the only source there is


def test_without_the_lexicon_it_says_so(script, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)
    monkeypatch.setattr(sys, "argv", [str(FILE)])
    with pytest.raises(SystemExit) as left:
        script.main()
    assert left.value.code == 2 and "pip install vaderSentiment==3.3.2" in capsys.readouterr().err

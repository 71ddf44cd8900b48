"""Accuracy of a sentiment lexicon on the held-out judgements of `reward/ratings_tiny`, beside what people reach.

The lexicon is VADER (Hutto & Gilbert 2014; `pip install vaderSentiment==3.3.2`, among the dev extra), whose authors
collected the ratings: its words were rated by people too, but no text of the ratings went into it by a fit. The
judgements are the very ones on which the config's runs are evaluated: the same split, texts, pairs and single ratings.
`ratio` is the lexicon's accuracy over the ceiling: the accuracy of the mean rating by everybody but the one who judged.

    python benchmarks/ratings_vs_lexicon.py [--config reward/ratings_tiny] [--run runs/ratings-tiny]
"""

import argparse
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import jaxops
from jaxops.data.preferences.agreement import of_ratings
from jaxops.data.preferences.open import DRAWN, RatedTexts, read_judgements
from jaxops.data.preferences.ratings import Ratings
from jaxops.data.text.open_tokenizer import open_tokenizer
from jaxops.evaluate.preferences import measure
from jaxops.families.reward.evaluation import judged_of

WHOLE = 100_000
"""A length in bytes that cuts no text."""


def compared(data: Any, score: Callable[[str], float]) -> dict[str, dict[str, float]]:
    """Returns accuracy, its interval, the ceiling and the number of judgements: of all, and by source of the texts.

    The ceiling of one source is that of other draws of the same texts and ratings.

    Args:
      data: the data section of a config, of kind `ratings`.
      score: the score of a text, higher for a better mood.
    """
    read = read_judgements(dataclasses.replace(data, length=WHOLE))
    assert isinstance(read, RatedTexts)
    pairs = read.opened(open_tokenizer("bytes")).valid
    assert pairs is not None
    judged = judged_of(pairs)
    scores = np.array([score(one.text.text or "") for one in read.valid], np.float64)[pairs.sides]
    sources = np.array([one.group for one in read.valid])[pairs.sides[:, 0]]
    found = {}
    for name in ("all", *dict.fromkeys(sorted(sources))):
        held = [one for one in read.valid if name in ("all", one.group)]
        rows = np.flatnonzero((sources == name) | (name == "all"))
        part = {field.name: getattr(judged, field.name) for field in dataclasses.fields(judged)}
        part |= {key: part[key][rows] for key in ("label", "weight", "clusters", "lengths", "swapped")}
        part["annotators"] = [judged.annotators[row] for row in rows]
        values = measure(type(judged)(**part), scores[rows][:, :, None])
        ceiling = of_ratings(Ratings(held), DRAWN, data.judgements).ceiling
        found[name] = {key: values[key] for key in ("accuracy", "accuracy_low", "accuracy_high")}
        found[name] |= {"ceiling": float("nan") if ceiling is None else ceiling, "judgements": len(rows)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="reward/ratings_tiny")
    parser.add_argument("--run", type=Path, help="a finished run of that config, to set its accuracy beside")
    given = parser.parse_args()
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError:
        parser.exit(2, "the lexicon is not installed: pip install vaderSentiment==3.3.2\n")
    lexicon = SentimentIntensityAnalyzer()
    data = jaxops.load_config(given.config).config.data
    found = compared(data, lambda text: lexicon.polarity_scores(text)["compound"])
    for name, row in found.items():
        interval = f"{row['accuracy_low']:.3f} to {row['accuracy_high']:.3f}"
        print(
            f"{name:10} accuracy {row['accuracy']:.4f} (95 %: {interval}), ceiling {row['ceiling']:.4f},"
            f" {row['judgements']:,} judgements"
        )
    out = {"lexicon": found, "ratio": found["all"]["accuracy"] / found["all"]["ceiling"]}
    if given.run is not None:
        summary = json.loads((given.run / "summary.json").read_text(encoding="utf-8"))
        out["run"] = {key: summary[f"valid/{key}"] for key in ("accuracy", "accuracy_low", "accuracy_high")}
        print(f"{'run':10} accuracy {out['run']['accuracy']:.4f} of {given.run}, on all of them")
    print(json.dumps(out))


if __name__ == "__main__":
    main()

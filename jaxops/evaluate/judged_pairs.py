"""Opened judgements as evaluation reads them, and what a report sets a model beside: a coin, length, and people."""

import math
from typing import Any

import numpy as np

from jaxops.data.preferences.agreement import AnnotatorAgreement
from jaxops.data.preferences.pairs import Pairs, swapped
from jaxops.evaluate.preferences import Judged, measure

LABELS = {
    "coin": "a coin",
    "longer": "the longer answer",
    "other_person": "another person",
    "ceiling": "ceiling of single judgements",
}
"""The names of the baselines for people."""


def judged_of(pairs: Pairs) -> Judged:
    """Returns the judgements of pairs in the order of the data, first side first."""
    return Judged(
        pairs.label.astype(np.float64),
        pairs.weight.astype(np.float64),
        pairs.clusters,
        pairs.texts.answered[pairs.sides],
        swapped(np.arange(len(pairs))),
        pairs.annotators,
    )


def baselines(valid: Pairs, agreement: AnnotatorAgreement) -> dict[str, dict[str, float]]:
    """Returns the figures of a coin, of the longer answer, and of what people themselves reach, on held-out pairs."""
    judged = judged_of(valid)
    longer = measure(judged, judged.lengths[:, :, None].astype(np.float64))
    kept = ("accuracy", "accuracy_low", "accuracy_high", "longer_bias", "first_bias")
    rows = {
        "coin": {"accuracy": 0.5, "log_loss": math.log(2)},
        "longer": {name: longer[name] for name in kept if math.isfinite(longer[name])},
        "other_person": {} if agreement.agreement is None else {"accuracy": agreement.agreement},
        "ceiling": {} if agreement.ceiling is None else {"accuracy": agreement.ceiling},
    }
    return {name: {f"valid/{metric}": value for metric, value in row.items()} for name, row in rows.items() if row}


def count_rows(inspection: dict[str, Any]) -> list[tuple[str, str]]:
    """Returns rows of (part, its counts) for a report, from what `jaxops data inspect` says of judgements."""
    rows: list[tuple[str, str]] = []
    for part in ("train", "valid"):
        if part in inspection:
            counts = {name: value for name, value in inspection[part].items() if isinstance(value, int)}
            rows.append((part, ", ".join(f"{value:,} {name}" for name, value in counts.items())))
    return rows


def agreement_rows(agreement: AnnotatorAgreement) -> list[tuple[str, str]]:
    """Returns rows of (name, value) for a report: ties, how far people agree, and the ceiling."""
    rows = []
    if agreement.ties is not None:
        rows.append(("ties", f"{agreement.ties:.1%} of the judgements"))
    if agreement.agreement is not None:
        twice = f"of {agreement.judged_twice:,} times that two people judged one pair"
        rows.append(("people agree", f"{agreement.agreement:.1%} {twice}"))
    if agreement.ceiling is not None:
        rows.append(("ceiling", f"{agreement.ceiling:.3f} accuracy"))
    return rows


def agreement_notes(agreement: AnnotatorAgreement) -> list[str]:
    """Returns the sentence that says what the ceiling is; none where there is no ceiling."""
    if agreement.others is not None:
        return ["The ceiling is the accuracy of the mean rating by everybody but the person who judged."]
    if agreement.ceiling is not None:
        return [
            "The ceiling is what the agreement of people implies, if each judgement is wrong with one probability, "
            "independently of the others."
        ]
    return []

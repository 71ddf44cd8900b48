"""The samples of a report: what a model wrote at the last evaluation, beside what it wrote to the same at the first."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from jaxops.core.metric import label_of
from jaxops.report.folder import RunRecord, finite
from jaxops.report.results import score

MAX_SAMPLES, MAX_SAMPLE = 32, 600
"""The samples that are shown, and the characters of each text."""
_NO_COLUMNS = ("v", "step", "time", "part")


@dataclasses.dataclass(frozen=True)
class Told:
    """A text of the table, with a line below it: `Reward 0.3100`."""

    text: str
    note: str = ""


@dataclasses.dataclass(frozen=True)
class SampleTable:
    """The table: a row for each sample, and a sentence on when they were written."""

    columns: list[str]
    rows: list[list[Told]]
    caption: str


def sample_table(run: RunRecord) -> SampleTable | None:
    """Returns the table of a run's samples; None where it wrote none.

    The first field of a sample is what was asked. Where the first evaluation of the same part asked the same, the first
    text that has changed since is shown twice, with everything else that has changed below it.
    """
    groups: dict[tuple[Any, str], list[dict[str, Any]]] = {}
    for sample in run.samples:
        groups.setdefault((sample["step"], str(sample.get("part", ""))), []).append(sample)
    if not groups:
        return None
    step, part = next(reversed(groups))
    last = groups[step, part][:MAX_SAMPLES]
    names = [name for name in last[-1] if name not in _NO_COLUMNS]
    start = next(begun for begun, of in groups if of == part)
    first = groups[start, part][:MAX_SAMPLES]
    pairs = list(zip(first, last, strict=False))
    alike = len(first) == len(last) and all(a.get(name) == b.get(name) for a, b in pairs for name in names[:1])
    changed = [name for name in names if alike and any(_shown(a.get(name)) != _shown(b.get(name)) for a, b in pairs)]
    written = next((name for name in changed if any(isinstance(b.get(name), str) for _, b in pairs)), None)
    if start == step or written is None:
        rows = [[Told(_shown(sample.get(name))) for name in names] for sample in last]
        return SampleTable([label_of(name) for name in names], rows, f"Written at step {step:,.0f}.")
    notes = [name for name in changed if name != written]
    columns, rows = [], [[] for _ in pairs]
    for name in names:
        if name == written:
            columns += [f"{label_of(name)}, step {at:,.0f}" for at in (start, step)]
            for row, pair in zip(rows, pairs, strict=True):
                row += [Told(_shown(sample.get(name)), _note(sample, notes)) for sample in pair]
        elif name not in notes:
            columns.append(label_of(name))
            for row, (_, sample) in zip(rows, pairs, strict=True):
                row.append(Told(_shown(sample.get(name))))
    return SampleTable(columns, rows, "The first and the last evaluation.")


def _note(sample: Mapping[str, Any], names: Sequence[str]) -> str:
    return ", ".join(f"{label_of(name)} {_shown(sample[name])}" for name in names if name in sample)


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return "" if finite(value) is None else score(value)  # null is read as NaN
    text = str("" if value is None else value)
    return text if len(text) <= MAX_SAMPLE else f"{text[:MAX_SAMPLE]} ..."

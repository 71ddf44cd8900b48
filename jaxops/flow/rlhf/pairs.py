"""Pairs of answers and votes on them, as files that people and later steps read."""

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxops.core.failures import UserError


@dataclasses.dataclass(frozen=True)
class AnswerPair:
    """Two answers to one prompt: `a` and `b`."""

    id: str
    prompt: Any
    a: str
    b: str


@dataclasses.dataclass(frozen=True)
class Vote:
    """A vote on a pair: the probability that `a` is better (1, 0, or 0.5 for a tie), and who said so."""

    id: str
    first: float
    annotator: str | None = None


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes JSON lines as a whole: the file is there with all of them, or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_pairs(path: Path) -> list[AnswerPair]:
    """Reads the pairs of a round.

    Raises:
      UserError: a line is no pair.
    """
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            found.append(AnswerPair(**json.loads(line)))
        except (ValueError, TypeError) as error:
            raise UserError(
                f"{path}:{number}: not a pair of answers ({error}); delete the file to sample again"
            ) from None
    return found


def preferences(pairs: Sequence[AnswerPair], votes: Sequence[Vote]) -> list[dict[str, Any]]:
    """Returns votes as a reward model's data: prompt, chosen and rejected, and the label of a vote that is not sure."""
    by_id = {pair.id: pair for pair in pairs}
    rows = []
    for vote in votes:
        pair = by_id[vote.id]
        chosen, rejected = (pair.a, pair.b) if vote.first >= 0.5 else (pair.b, pair.a)
        row = {"id": pair.id, "prompt": pair.prompt, "label": max(vote.first, 1 - vote.first)}
        if isinstance(pair.prompt, str):
            row |= {"chosen": chosen, "rejected": rejected}
        else:
            said = lambda text: [{"role": "assistant", "content": text}]
            row |= {"chosen": said(chosen), "rejected": said(rejected)}
        rows.append(row | ({} if vote.annotator is None else {"annotator": vote.annotator}))
    return rows

"""Opened judgements as lines for people: what is counted of them, and the first pairs as the model reads them."""

from typing import Any

import numpy as np

from jaxops.data.preferences.opened import OpenedJudgements
from jaxops.data.text.preview import CLOSE, OPEN, pieces
from jaxops.data.text.tokenizer import Tokenizer


def counted(data: OpenedJudgements) -> tuple[dict[str, Any], list[tuple[str, str]]]:
    """Returns what a person should know of judgements, as plain values and as rows of (name, text)."""
    people = {"ties": data.agreement.ties, "agreement": data.agreement.agreement, "ceiling": data.agreement.ceiling}
    found: dict[str, Any] = data.inspection | {"people": people}
    rows = []
    for name, value in found.items():
        each = [f"{key} {_shown(one)}" for key, one in value.items()] if isinstance(value, dict) else [str(value)]
        rows.append((name, ", ".join(each)))
    return found, rows


def _shown(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}" if isinstance(value, float) else str(value)


def previewed(data: OpenedJudgements, tokenizer: Tokenizer, seed: int, count: int, marked: bool = False) -> list[str]:
    """Returns the first pairs or choices of training as lines of text.

    Args:
      data: the judgements.
      tokenizer: reads their tokens.
      seed: the seed of the run.
      count: number of pairs or choices.
      marked: put what is learnt from as a text into brackets.
    """
    source = data.source(seed)
    batch = source.batch(0, min(count, source.examples))
    lines = []
    for at in range(len(batch["id"])):
        if "best" in batch:
            names = [f"{place + 1}" for place in range(int(batch["valid"][at].sum()))]
            lines.append(f"choice {int(batch['id'][at])}: the best of {len(names)} is {int(batch['best'][at]) + 1}")
        else:
            names = ["first", "second"]
            label = float(batch["label"][at])
            lines.append(f"pair {int(batch['id'][at])}: the first is better with probability {label:g}")
        for side, name in enumerate(names):
            size = int(batch["segment"][at, side].sum())
            ids = batch["tokens"][at, side, :size].tolist()
            learnt = [False, *(batch["mask"][at, side, : size - 1] != 0)]
            text = _marked(tokenizer, ids, learnt) if marked else tokenizer.decode(ids)
            lines.append(f"{name}: {text}")
    return lines


def _marked(tokenizer: Tokenizer, ids: list[int], learnt: list[bool]) -> str:
    """Returns the text of tokens, with brackets around what is learnt from."""
    parts = pieces(np.array(ids), np.array(learnt), tokenizer)
    return "".join(f"{OPEN}{text}{CLOSE}" if seen else text for text, seen in parts)

"""`jaxops data inspect` and `jaxops data preview` for human judgements."""

from typing import Any

from jaxops.data.preferences.open import OpenedJudgements, read_judgements
from jaxops.data.text.tokenizer import Tokenizer
from jaxops.families.reward.config import RewardConfig
from jaxops.families.reward.opened import open_reward
from jaxops.run.family import Shown

PREVIEWED = 2
"""The pairs that `data preview` shows."""


def inspect_data(config: RewardConfig) -> Shown:
    """Counts a config's texts, tokens and pairs, tells how far people agree, and says what is odd.

    Raises:
      UserError: the judgements or their tokenizer cannot be opened.
    """
    data, _ = _opened(config)
    people = {"ties": data.agreement.ties, "agreement": data.agreement.agreement, "ceiling": data.agreement.ceiling}
    found: dict[str, Any] = data.inspection | {"people": people}
    rows = []
    for name, value in found.items():
        rows.append(
            (
                name,
                ", ".join(f"{key} {_shown(one)}" for key, one in value.items())
                if isinstance(value, dict)
                else str(value),
            )
        )
    return Shown(found, rows)


def _shown(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}" if isinstance(value, float) else str(value)


def preview_data(config: RewardConfig) -> Shown:
    """Shows the first pairs of training as text, as the model reads them.

    Raises:
      UserError: the judgements or their tokenizer cannot be opened.
    """
    data, tokenizer = _opened(config)
    source = data.source(config.run.seed)
    batch = source.batch(0, min(PREVIEWED, source.examples))
    lines = []
    for at in range(len(batch["id"])):
        label = float(batch["label"][at])
        lines.append(f"pair {int(batch['id'][at])}: the first is better with probability {label:g}")
        for side, name in enumerate(("first", "second")):
            size = int(batch["segment"][at, side].sum())
            lines.append(f"{name}: {tokenizer.decode(batch['tokens'][at, side, :size].tolist())}")
    notes = list(data.inspection.get("notes", ()))
    return Shown({"rows": lines, "notes": notes}, [(line,) for line in [*lines, *notes]])


def _opened(config: RewardConfig) -> tuple[OpenedJudgements, Tokenizer]:
    read = read_judgements(config.data)
    tokenizer = open_reward(config, lambda: read.words).tokenizer
    return read.opened(tokenizer), tokenizer

"""`jaxops data inspect` and `jaxops data preview` for human judgements."""

from jaxops.data.preferences.open import read_judgements
from jaxops.data.preferences.opened import OpenedJudgements
from jaxops.data.preferences.preview import counted, previewed
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
    found, rows = counted(data)
    return Shown(found, rows)


def preview_data(config: RewardConfig) -> Shown:
    """Shows the first pairs of training as text, as the model reads them.

    Raises:
      UserError: the judgements or their tokenizer cannot be opened.
    """
    data, tokenizer = _opened(config)
    lines = previewed(data, tokenizer, config.run.seed, PREVIEWED)
    notes = list(data.inspection.get("notes", ()))
    return Shown({"rows": lines, "notes": notes}, [(line,) for line in [*lines, *notes]])


def _opened(config: RewardConfig) -> tuple[OpenedJudgements, Tokenizer]:
    read = read_judgements(config.data)
    tokenizer = open_reward(config, lambda: read.words).tokenizer
    return read.opened(tokenizer), tokenizer

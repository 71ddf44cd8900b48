"""A judge of moods that no run has learnt: VADER's lexicon (Hutto & Gilbert 2014), `pip install 'jaxops[judge]'`.

It compares a policy's answers with its reference's: `evaluate: {judge: "jaxops.evaluate.lexicon:better_mood"}`.
Tested in tests/evaluate/test_lexicon.py.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from jaxops.core.failures import UserError


def better_mood(prompts: Sequence[Any], completions: Sequence[str], references: Sequence[str]) -> list[float]:
    """Returns 1 where the prompt with the completion has a better mood than with the reference, 0.5 at a tie, else 0.

    Raises:
      UserError: the lexicon is not installed, or a prompt is a conversation.
    """
    score = mood()
    if wrong := next((prompt for prompt in prompts if not isinstance(prompt, str)), None):
        raise UserError(f"the lexicon judges how texts go on, not conversations: {str(wrong)[:80]}")
    found = []
    for prompt, completion, reference in zip(prompts, completions, references, strict=True):
        ours, theirs = score(prompt + completion), score(prompt + reference)
        found.append(0.5 if ours == theirs else float(ours > theirs))
    return found


@functools.cache
def mood() -> Callable[[str], float]:
    """Returns a function from a text to its mood, -1 to 1, which is VADER's compound score.

    Raises:
      UserError: the lexicon is not installed.
    """
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError:
        raise UserError(
            "the judge jaxops.evaluate.lexicon needs VADER's lexicon: pip install 'jaxops[judge]', or leave out"
            " evaluate.judge and the metric win_rate"
        ) from None
    analyzer = SentimentIntensityAnalyzer()
    return lambda text: float(analyzer.polarity_scores(text)["compound"])

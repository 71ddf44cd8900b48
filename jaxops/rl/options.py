"""The options of sampling: what the distribution over the next token is, and what ends a text."""

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from jaxops.core.failures import UserError

TINIEST, HOTTEST = 1e-30, 1e30
"""Bounds of temperature and top_p: beyond them float32 has zeros and infinities, and probabilities are no numbers."""
MOST = 2**31 - 1
"""The largest number of tokens: counts on the device have 32 bits. What a model has room for is far less."""

MOST_SLOTS = 2**16
"""The largest number of texts that are decoded at a time."""


def wrong_counts(counts: Mapping[str, tuple[Any, int, int]]) -> list[str]:
    """Returns a line for each option, by name its (value, least, most), that is no whole number in its range."""
    return [
        f"{name}: expected {least} or more, and {most:,} at most, as a whole number; got {value!r}"
        for name, (value, least, most) in counts.items()
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most
    ]


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """The distribution that tokens are drawn from, and what ends a text.

    The logits are divided by the temperature. Then `top_k`, `top_p` and `min_p` each leave out tokens, in this order,
    and what is left is renormalised after each.

    Attributes:
      max_tokens: largest number of tokens that are sampled, the end token included.
      temperature: divides the logits; 0 always takes the most probable token.
      top_k: keeps the `top_k` most probable tokens, and all that equal the last of them; null keeps all.
      top_p: keeps the most probable tokens until their probabilities sum to `top_p` or more (Holtzman et al. 2020), and
        all that equal the last of them.
      min_p: keeps tokens that are at least `min_p` times as probable as the most probable one (Nguyen et al. 2024).
      stop: texts that end a completion wherever one appears, over the borders of tokens too.
    """

    max_tokens: Annotated[int, Field(ge=1, le=MOST)] = 128
    temperature: Annotated[float, Field(ge=0, le=HOTTEST, allow_inf_nan=False)] = 1.0
    top_k: Annotated[int, Field(ge=1)] | None = None
    top_p: Annotated[float, Field(ge=TINIEST, le=1)] = 1.0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    stop: tuple[str, ...] = ()

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is taken, without noise."""
        return self.temperature == 0

    @property
    def plain(self) -> bool:
        """Whether tokens are drawn from the model's own distribution, as it is."""
        return self.temperature == 1 and self.top_k is None and self.top_p >= 1 and self.min_p <= 0

    def require_valid(self) -> None:
        """Refuses values that mean nothing; a config's values were checked when it was read.

        Raises:
          UserError: a value is out of its range.
        """
        wrong = []
        wrong += wrong_counts({"max_tokens": (self.max_tokens, 1, MOST)})
        if not (self.temperature == 0 or TINIEST <= self.temperature <= HOTTEST):
            wrong.append(
                f"temperature: expected 0 (the most probable token) or more, from {TINIEST:g} to {HOTTEST:g}, "
                f"got {self.temperature}"
            )
        if self.top_k is not None and self.top_k < 1:
            wrong.append(f"top_k: expected 1 or more, or null for all tokens, got {self.top_k}")
        if not TINIEST <= self.top_p <= 1:
            wrong.append(f"top_p: expected a share above 0 and up to 1, got {self.top_p}; {TINIEST:g} is the least")
        if not 0 <= self.min_p <= 1:
            wrong.append(f"min_p: expected a share from 0 to 1, got {self.min_p}")
        if isinstance(self.stop, str) or not all(self.stop):
            wrong.append(f"stop: expected texts of a character or more, got {self.stop!r}")
        if wrong:
            raise UserError("\n".join(wrong))

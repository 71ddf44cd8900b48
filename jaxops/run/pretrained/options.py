"""The options of `jaxops sample` and `jaxops chat`, for every family whose models write text."""

import dataclasses
from typing import Annotated, Any, Literal

from pydantic import Field

from jaxops.core.failures import UserError, nearest
from jaxops.rl.options import MOST, MOST_SLOTS, SampleOptions, wrong_counts

MOST_COPIES = 2**20
"""The largest number of completions of one prompt."""
TEMPLATES = ("auto", "chat", "none")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generate(SampleOptions):
    """The options of `sample` and `chat`, with those of the distribution.

    Attributes:
      n: number of completions of each prompt.
      seed: seed of the noise.
      template: whether a prompt that is text is put to the model as a user's turn (`chat`) or continued as it is
        (`none`); `auto` does what the run learnt from. A prompt of messages is always a conversation.
      slots: number of completions that are written at a time.
      segment: number of tokens between two looks for stops.
      room: number of tokens that a prompt and its completion have room for; null is enough for the longest prompt.
    """

    n: Annotated[int, Field(ge=1, le=MOST_COPIES)] = 1
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    template: Literal["auto", "chat", "none"] = "auto"
    slots: Annotated[int, Field(ge=1, le=MOST_SLOTS)] = 32
    segment: Annotated[int, Field(ge=1, le=MOST)] = 16
    room: Annotated[int, Field(ge=2, le=MOST)] | None = None

    def require_valid(self) -> None:
        """Refuses values that mean nothing; a config's values were checked when it was read.

        Raises:
          UserError: a value is out of its range.
        """
        super().require_valid()
        counts: dict[str, tuple[Any, int, int]] = {"n": (self.n, 1, MOST_COPIES), "seed": (self.seed, 0, 2**32 - 1)}
        counts |= {"slots": (self.slots, 1, MOST_SLOTS), "segment": (self.segment, 1, MOST)}
        wrong = wrong_counts(counts | ({} if self.room is None else {"room": (self.room, 2, MOST)}))
        if self.template not in TEMPLATES:
            hint = nearest(str(self.template), TEMPLATES)
            wrong.append(f"template: expected {', '.join(TEMPLATES)}, got {self.template!r}{hint}")
        if wrong:
            raise UserError("\n".join(wrong))

"""What goes into a sampler and what comes out of it: prompts, and completions as arrays."""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np
from jaxtyping import Bool, Float32, Int32

Stopped = Literal["eos", "stop", "length"]


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt, and the name of the completion that is sampled for it.

    The noise of a completion is a function of seed, step and this name, so each completion of a call needs its own.

    Attributes:
      ids: token ids, at least one.
      example: the id of the prompt.
      copy: the number of the completion among several of one prompt.
      redraw: how often it was thrown away and drawn again.
      turn: the turn of the conversation that is written.
      limit: largest number of tokens; None takes `SampleOptions.max_tokens`.
    """

    ids: Sequence[int]
    example: int
    copy: int = 0
    redraw: int = 0
    turn: int = 0
    limit: int | None = None

    @property
    def name(self) -> tuple[int, int, int, int]:
        """The numbers that the noise depends on, beside seed, step and position."""
        return self.example, self.copy, self.redraw, self.turn


def copies(prompts: Sequence[Prompt], count: int) -> list[Prompt]:
    """Returns each prompt `count` times in a row, the copies numbered from 0."""
    return [dataclasses.replace(prompt, copy=number) for prompt in prompts for number in range(count)]


@dataclasses.dataclass(frozen=True, eq=False)
class Sampled:
    """Completions, a row for each prompt in the order of the prompts.

    Attributes:
      tokens: what was sampled, the end token or the end of the stop included; 0 after it.
      mask: true for the tokens that were sampled, the last one included.
      logprobs: log-probability of each token under the distribution that it was drawn from; 0 outside the mask.
      plain: log-probability under the model itself, at temperature 1; 0 outside the mask.
      lengths: number of tokens.
      stopped: what ended each: an end token (`eos`), a stop (`stop`), or the number of tokens (`length`).
      dropped: number of tokens that were sampled after a stop, before the host had seen it; they are nowhere here.
      texts: the text of each, without the stop and without control tokens; None without a tokenizer.
      busy: share of the decoded rows that held a text which had not ended.
    """

    tokens: Int32[np.ndarray, "rows longest"]
    mask: Bool[np.ndarray, "rows longest"]
    logprobs: Float32[np.ndarray, "rows longest"]
    plain: Float32[np.ndarray, "rows longest"]
    lengths: Int32[np.ndarray, " rows"]
    stopped: tuple[Stopped, ...]
    dropped: Int32[np.ndarray, " rows"]
    texts: tuple[str, ...] | None
    busy: float

    def completion(self, row: int) -> np.ndarray:
        """Returns the tokens of one completion."""
        return self.tokens[row, : self.lengths[row]]


class Growing:
    """Completions while they grow, on the host."""

    def __init__(self, rows: int, longest: int) -> None:
        shape = (rows, longest)
        self.tokens, self.lengths = np.zeros(shape, np.int32), np.zeros(rows, np.int32)
        self.logprobs, self.plain = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
        self.dropped = np.zeros(rows, np.int32)
        self.stopped: list[Stopped] = ["length"] * rows

    def add(self, row: int, tokens: np.ndarray, logprobs: np.ndarray, plain: np.ndarray) -> None:
        """Appends tokens to a completion.

        Args:
          row: the number of the completion.
          tokens: the tokens.
          logprobs: log-probabilities under the distribution that they were drawn from.
          plain: log-probabilities under the model itself.
        """
        begin, end = self.lengths[row], self.lengths[row] + len(tokens)
        self.tokens[row, begin:end], self.logprobs[row, begin:end] = tokens, logprobs
        self.plain[row, begin:end], self.lengths[row] = plain, end

    def whole(self, texts: Sequence[str] | None, busy: float) -> Sampled:
        """Returns the completions as they are now."""
        return Sampled(
            tokens=self.tokens,
            mask=np.arange(self.tokens.shape[1])[None] < self.lengths[:, None],
            logprobs=self.logprobs,
            plain=self.plain,
            lengths=self.lengths,
            stopped=tuple(self.stopped),
            dropped=self.dropped,
            texts=None if texts is None else tuple(texts),
            busy=busy,
        )

"""Text out of tokens as they come, and texts that end it, over the borders of tokens.

A token may hold a part of a character, so text is given out once its bytes are whole. What may be the beginning of a
stop is held back until it is known. Tested in tests/rl/test_stops.py.
"""

from collections.abc import Sequence

from jaxops.data.text.tokenizer import Tokenizer

BROKEN = "\ufffd"
"""What decoding gives for bytes that are no character, or not yet one."""
CONTEXT = 8
"""The tokens that are decoded again before new ones: some vocabularies drop a blank at the beginning of a text."""
WINDOW = 32
"""The tokens that are decoded at most, while no character is cut at their end."""


class TextStream:
    """The text of a growing list of tokens. Special tokens are no part of it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        self._given = 0

    def push(self, token: int) -> str:
        """Takes one more token and returns the text that is certain since the last call.

        Bytes at the end that are no character are held back, as the next token may complete them.
        """
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids, skip_special=True)
        whole = text.rstrip(BROKEN)
        new, self._given = whole[self._given :], max(self._given, len(whole))
        if len(self._ids) > WINDOW and whole == text:
            self._ids = self._ids[-CONTEXT:]
            self._given = len(self._tokenizer.decode(self._ids, skip_special=True))
        return new

    def finish(self) -> str:
        """Returns the rest: bytes that never became a character, each run as the tokenizer shows it."""
        rest = self._tokenizer.decode(self._ids, skip_special=True)[self._given :]
        self._given += len(rest)
        return rest


class StopScan:
    """The text of one completion until the first of several stops appears in it.

    Attributes:
      text: the text so far, without the stop.
      stop: the stop that was found; None while there is none.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]) -> None:
        self._stream = TextStream(tokenizer)
        self._stops = tuple(stops)
        self._longest = max(map(len, self._stops), default=0)
        self._shown = 0
        self.text = ""
        self.stop: str | None = None

    def push(self, token: int) -> bool:
        """Takes one more token; returns whether a stop is complete with it. The text then ends before the stop."""
        return self._add(self._stream.push(token))

    def finish(self) -> None:
        """Takes the last bytes as text: the completion has ended."""
        if self.stop is None:
            self._add(self._stream.finish())

    def shown(self, ended: bool = False) -> str:
        """Returns the text since the last call that no later token can take back."""
        end = len(self.text) if ended or self.stop is not None else len(self.text) - self._held()
        new, self._shown = self.text[self._shown : end], max(self._shown, end)
        return new

    def _add(self, new: str) -> bool:
        begin = max(0, len(self.text) - self._longest + 1)
        self.text += new
        found = [(at, stop) for stop in self._stops if (at := self.text.find(stop, begin)) >= 0]
        if found:
            # Of stops that begin at one place the longest is taken; the text ends at the same place for all.
            at, self.stop = min(found, key=lambda pair: (pair[0], -len(pair[1])))
            self.text = self.text[:at]
        return self.stop is not None

    def _held(self) -> int:
        """Returns the length of the longest end of the text that begins a stop."""
        for size in range(min(self._longest - 1, len(self.text)), 0, -1):
            if any(stop.startswith(self.text[-size:]) for stop in self._stops):
                return size
        return 0


def special_stops(tokenizer: Tokenizer, stops: Sequence[str]) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Splits stops into ids of control tokens, which are no text, and the texts that are left."""
    ids, texts = [], []
    for stop in stops:
        found = tokenizer.encode(stop)
        if len(found) == 1 and found[0] in tokenizer.special:
            ids.append(found[0])
        else:
            texts.append(stop)
    return tuple(ids), tuple(texts)

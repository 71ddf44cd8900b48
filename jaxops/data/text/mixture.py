"""Several sources in one stream: which source serves which example is a fixed interleaving, computed without a scan."""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int64

from jaxops.core.failures import UserError
from jaxops.data.text.source import TextSource

EXACT = 2**40
"""Weights are whole numbers out of this, so that counts are exact at any cursor."""


class Interleaving:
    """The source of each example of an endless stream, in blocks: source s has its share of every block to within one.

    The order inside a block is drawn from (seed, block). Over n blocks the counts are within one of n shares, however
    many blocks there are.

    Raises:
      UserError: a weight is no positive number, or so small that its source would hardly ever be drawn.
    """

    def __init__(self, weights: Sequence[float], seed: int) -> None:
        if not all(weight > 0 and math.isfinite(weight) for weight in weights):
            given = ", ".join(f"{weight:g}" for weight in weights)
            raise UserError(f"data.sources: expected finite weights above zero, got {given}")
        # weights near the largest float have no sum; they are scaled by a power of two, which rounds no share
        scale = -math.frexp(max(weights))[1]
        relative = [math.ldexp(weight, scale) for weight in weights]
        total = math.fsum(relative)
        shares = [weight / total for weight in relative]
        if min(shares) < 4 / 2**20:
            raise UserError(
                f"data.sources: a weight is {min(shares):.1e} of all, which is too little to draw from; leave it out"
            )
        self.block = 2 ** max(math.ceil(math.log2(4 / min(shares))), 6)
        self._seed = seed
        # cumulative shares as whole numbers: the last one is exactly all
        self._upto = [round(math.fsum(shares[:at]) * EXACT) for at in range(len(shares))] + [EXACT]

    def drawn(self, cursor: int) -> Int64[np.ndarray, " sources"]:
        """Returns how many of the first `cursor` examples each source serves: the cursor of each source."""
        block, rest = divmod(cursor, self.block)
        counts = self._counts(block)
        if rest:
            counts = counts + np.bincount(self._order(block)[:rest], minlength=len(counts))
        return counts

    def sources(self, cursor: int, size: int) -> Int64[np.ndarray, " size"]:
        """Returns the source of each of the examples `[cursor, cursor + size)`."""
        blocks = range(cursor // self.block, (cursor + size - 1) // self.block + 1)
        whole = np.concatenate([self._order(block) for block in blocks])
        return whole[cursor - blocks[0] * self.block :][:size]

    def _counts(self, block: int) -> np.ndarray:
        """Returns how many examples of each source are in the blocks before this one."""
        upto = [block * self.block * one // EXACT for one in self._upto]
        return np.diff(np.array(upto, np.int64))

    def _order(self, block: int) -> np.ndarray:
        held = self._counts(block + 1) - self._counts(block)
        generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([self._seed, block, 0x6D6978])))
        return generator.permutation(np.repeat(np.arange(len(held)), held))


class Mixture:
    """A `Source` that draws from several sources by weight; an epoch is as many examples as they hold together.

    Each source runs through its own epochs at its own pace. One cursor says where all of them are (`cursors`). "id"
    tells the examples of all sources apart; "source" int32 [B] is the number of the source.

    Raises:
      UserError: more examples than 32-bit ids can tell apart, or a weight that is too small.
    """

    def __init__(self, sources: Sequence[TextSource], weights: Sequence[float], seed: int) -> None:
        self._sources, self._interleaving = list(sources), Interleaving(weights, seed)
        sizes = [source.examples for source in sources]
        self.examples, self.length = sum(sizes), sources[0].length
        self._first = np.cumsum([0, *sizes])
        if self.examples >= 2**31:
            raise UserError(f"{self.examples:,} examples do not fit 32-bit ids")

    def cursors(self, cursor: int) -> list[int]:
        """Returns the cursor of each source after `cursor` examples."""
        return [int(count) for count in self._interleaving.drawn(cursor)]

    def batch(self, cursor: int, size: int) -> dict[str, np.ndarray]:
        """Examples `[cursor, cursor + size)` of the stream.

        Raises:
          ValueError: a negative cursor, or a size below one.
        """
        if cursor < 0 or size < 1:
            raise ValueError(f"need cursor >= 0 and size >= 1: {cursor=}, {size=}")
        which = self._interleaving.sources(cursor, size)
        out: dict[str, np.ndarray] = {}
        for number, begin in enumerate(self.cursors(cursor)):
            at = np.flatnonzero(which == number)
            if not len(at):
                continue
            part = self._sources[number].batch(begin, len(at))
            part["id"] = part["id"] + np.int32(self._first[number])
            for name, values in part.items():
                out.setdefault(name, np.zeros((size, *values.shape[1:]), values.dtype))[at] = values
        return out | {"source": which.astype(np.int32)}

"""A synthetic click log in Criteo's form, of any size: what `data: {kind: criteo}` reads, to learn and to measure on.

python -m jaxops.data.clicks.criteo PATH --rows N --seed S
"""

import argparse
import os
from pathlib import Path

import numpy as np

INTEGERS, CATEGORIES, CROSSED, FACTORS, CHUNK = 13, 26, 6, 4, 50_000
MISSING, RATE = 0.1, 0.25


class _World:
    """Draws clicks from biases and slopes, which a linear model can learn, and from crosses, which it cannot."""

    def __init__(self, seed: int) -> None:
        draw = np.random.default_rng([seed, 0])
        sizes = np.round(10.0 ** draw.uniform(1, 5, CATEGORIES)).astype(int)
        shares = [1 / np.arange(1, size + 1) for size in sizes]  # Zipf
        self._until = [np.cumsum(share / share.sum()) for share in shares]
        self._bias = [draw.normal(0, 1, size) for size in sizes]
        self._slopes = draw.normal(0, 1, INTEGERS)
        self._crossed = np.argsort(sizes, kind="stable")[:CROSSED]
        self._factors = {k: draw.normal(0, 1, (sizes[k], FACTORS)) for k in self._crossed}
        for k, factors in self._factors.items():
            factors -= np.average(factors, axis=0, weights=shares[k])  # on its own a category says nothing of crosses
        self._linear = self._cross = 1.0
        self._intercept = 0.0
        sample = self.features(np.random.default_rng([seed, 2]), 20_000)
        self._linear, self._cross = (1 / np.std(part) for part in self._parts(*sample))
        low, high = -10.0, 10.0
        for _ in range(40):  # the intercept that gives the rate of clicks
            self._intercept = (low + high) / 2
            low, high = (self._intercept, high) if self.rate(*sample).mean() < RATE else (low, self._intercept)

    def features(self, draw: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Integers [count, 13] and categories [count, 26], from 0 by frequency."""
        numbers = np.floor(np.exp(draw.normal(1.0, 1.5, (count, INTEGERS)))).astype(int)
        ids = [np.minimum(np.searchsorted(until, draw.random(count)), len(until) - 1) for until in self._until]
        return numbers, np.stack(ids, axis=1)

    def rate(self, numbers: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """The chance of a click, [count]."""
        linear, cross = self._parts(numbers, ids)
        return np.asarray(1 / (1 + np.exp(-(self._intercept + linear * self._linear + cross * self._cross))))

    def _parts(self, numbers: np.ndarray, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        linear = np.log1p(numbers) @ self._slopes + sum(self._bias[k][ids[:, k]] for k in range(CATEGORIES))
        hidden = np.stack([self._factors[k][ids[:, k]] for k in self._crossed], axis=1)
        total = hidden.sum(axis=1)
        return linear, (np.sum(total * total, axis=1) - np.sum(hidden * hidden, axis=(1, 2))) / 2


def write_criteo(path: str | os.PathLike[str], rows: int, seed: int = 0) -> None:
    """Writes `rows` lines: label, 13 integers, 26 hexadecimal categories, apart by tabs, empty where missing.

    Categories are Zipf-distributed over vocabularies of 10 to 100,000. The logit is the sum, in equal parts, of what
    each category and integer says alone and of products of hidden factors of the six smallest categories, which alone
    say nothing. A quarter of the labels are 1. The same seed writes the same bytes.
    """
    world = _World(seed)
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_name(f".{target.name}.tmp")
    with open(scratch, "w", encoding="ascii") as out:
        for at in range(0, rows, CHUNK):
            draw = np.random.default_rng([seed, 1, at])
            count = min(CHUNK, rows - at)
            numbers, ids = world.features(draw, count)
            label = (draw.random(count) < world.rate(numbers, ids)).astype(int)
            absent = draw.random((count, INTEGERS + CATEGORIES)) < MISSING
            for row in range(count):
                fields = [*map(str, numbers[row].tolist())]
                fields += [f"{(k * 2654435761 + int(x) * 40503) % 2**32:08x}" for k, x in enumerate(ids[row])]
                known = ["" if gone else x for x, gone in zip(fields, absent[row], strict=True)]
                out.write("\t".join([str(label[row]), *known]) + "\n")
    os.replace(scratch, target)


def main() -> None:
    """The command line of this module."""
    parser = argparse.ArgumentParser(prog="python -m jaxops.data.clicks.criteo", description=write_criteo.__doc__)
    parser.add_argument("path", help="the file to write")
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.rows < 1 or args.seed < 0:
        parser.error("expected --rows of at least 1 and --seed of at least 0")
    write_criteo(args.path, args.rows, args.seed)


if __name__ == "__main__":
    main()

"""A synthetic click log in Criteo's form, of any size: what `data: {kind: criteo}` reads, to learn and to measure on.

python -m jaxops.data.criteo PATH --rows N --seed S
"""

import argparse
import os
from pathlib import Path

import numpy as np

INTEGERS, CATEGORIES, FACTORS, CHUNK = 13, 26, 4, 50_000
MISSING = 0.1


def write_criteo(path: str | os.PathLike[str], rows: int, seed: int = 0) -> None:
    """Writes `rows` lines: label, 13 integers, 26 hexadecimal categories, apart by tabs, empty where missing.

    Categories are Zipf-distributed over vocabularies of 10 to 100,000. The label depends on each category and integer
    alone, and on products of hidden factors of the smaller categories, which a linear model cannot express. About a
    quarter of the labels are 1. The same seed writes the same bytes.
    """
    world = np.random.default_rng([seed, 0])
    sizes = np.round(10.0 ** world.uniform(1, 5, CATEGORIES)).astype(int)
    bias = [world.normal(0, 0.25, size) for size in sizes]
    factors = [world.normal(0, 1, (size, FACTORS)) for size in sizes]
    few = np.argsort(sizes, kind="stable")[: CATEGORIES // 2]
    slopes = world.normal(0, 0.15, INTEGERS)
    target = Path(path)
    scratch = target.with_name(f".{target.name}.tmp")
    with open(scratch, "w", encoding="ascii") as out:
        for at in range(0, rows, CHUNK):
            draw = np.random.default_rng([seed, 1, at])
            count = min(CHUNK, rows - at)
            numbers = np.floor(np.exp(draw.normal(1.0, 1.5, (count, INTEGERS)))).astype(int)
            ids = np.stack([np.minimum(draw.zipf(1.3, count), size) - 1 for size in sizes], axis=1)
            hidden = np.stack([factors[k][ids[:, k]] for k in few], axis=1)
            total = hidden.sum(axis=1)
            pairs = (np.sum(total * total, axis=1) - np.sum(hidden * hidden, axis=(1, 2))) / 2
            logit = -1.6 + np.log1p(numbers) @ slopes + sum(bias[k][ids[:, k]] for k in range(CATEGORIES))
            logit += 1.5 * np.tanh(pairs / (len(few) * FACTORS**0.5))
            label = (draw.random(count) < 1 / (1 + np.exp(-logit))).astype(int)
            absent = draw.random((count, INTEGERS + CATEGORIES)) < MISSING
            for row in range(count):
                fields = [str(label[row]), *map(str, numbers[row].tolist())]
                fields += [f"{(k * 2654435761 + int(x) * 40503) % 2**32:08x}" for k, x in enumerate(ids[row])]
                lost = absent[row]
                out.write(
                    "\t".join([fields[0], *("" if gone else x for x, gone in zip(fields[1:], lost, strict=True))])
                )
                out.write("\n")
    os.replace(scratch, target)


def main() -> None:
    """The command line of this module."""
    parser = argparse.ArgumentParser(prog="python -m jaxops.data.criteo", description=write_criteo.__doc__)
    parser.add_argument("path", help="the file to write")
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.rows < 1 or args.seed < 0:
        parser.error("expected --rows of at least 1 and --seed of at least 0")
    write_criteo(args.path, args.rows, args.seed)


if __name__ == "__main__":
    main()

"""Problems of addition whose answers can be checked: `python -m jaxops.data.prompts.additions FOLDER`.

A row is {"prompt": "47+85=", "completion": "132", "answer": "132"}: a language model learns the completion, a policy is
asked the prompt, and `jaxops.rl.rewards.verifiable:exact` compares what it writes with the answer.
"""

import argparse
import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

PARTS = ("train", "valid")


def additions(most: int, held_out: int, seed: int, terms: int = 2) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Returns all sums of `terms` numbers from 0 to `most`, in a random order, and those of `held_out` sets apart.

    The order of the numbers makes another problem, but all orders are on one side.

    Args:
      most: the largest number that is added.
      held_out: the number of unordered sets of numbers that are held out.
      seed: draws the order and the choice.
      terms: the number of numbers that are added.
    """
    sets = list(itertools.combinations_with_replacement(range(most + 1), terms))
    draw = np.random.default_rng(seed)
    chosen = draw.permutation(len(sets))
    return _rows(sets, chosen[held_out:], draw), _rows(sets, chosen[:held_out], draw)


def _rows(sets: Sequence[tuple[int, ...]], chosen: np.ndarray, draw: np.random.Generator) -> list[dict[str, str]]:
    orders = sorted({order for at in chosen.tolist() for order in itertools.permutations(sets[at])})
    problems = [orders[at] for at in draw.permutation(len(orders)).tolist()]
    return [
        {"prompt": f"{'+'.join(map(str, numbers))}=", "completion": str(sum(numbers)), "answer": str(sum(numbers))}
        for numbers in problems
    ]


def write_additions(folder: str | Path, most: int = 99, held_out: int = 500, seed: int = 0, terms: int = 2) -> None:
    """Writes `train.jsonl` and `valid.jsonl` with problems of addition; the same arguments write the same bytes.

    Args:
      folder: where the files are written.
      most: the largest number that is added.
      held_out: the number of unordered sets of numbers that are held out.
      seed: draws the order and the choice.
      terms: the number of numbers that are added.
    """
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    for part, rows in zip(PARTS, additions(most, held_out, seed, terms), strict=True):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (target / f"{part}.jsonl").write_text(text, encoding="ascii")


def main() -> None:
    """The command line of this module."""
    parser = argparse.ArgumentParser(
        prog="python -m jaxops.data.prompts.additions",
        description="Writes train.jsonl and valid.jsonl with problems of addition; the same arguments write the same.",
    )
    parser.add_argument("folder", help="where the two files are written")
    parser.add_argument("--terms", type=int, default=2, help="how many numbers are added")
    parser.add_argument("--most", type=int, default=99, help="the largest number that is added")
    parser.add_argument("--held-out", type=int, default=500, help="how many sets of numbers are held out")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.most < 1 or args.terms < 2 or args.seed < 0:
        parser.error("expected --most of at least 1, --terms of at least 2, --seed of at least 0")
    sets = math.comb(args.most + args.terms, args.terms)
    if not 0 < args.held_out < sets:
        parser.error(f"expected --held-out of 1 or more and fewer than the {sets:,} sets of numbers")
    write_additions(args.folder, args.most, args.held_out, args.seed, args.terms)


if __name__ == "__main__":
    main()

"""Problems of addition whose answers can be checked: `python -m jaxops.data.prompts.additions FOLDER`.

A row is {"prompt": "47+85=", "completion": "132", "answer": "132"}: a language model learns the completion, a policy is
asked the prompt, and `jaxops.rl.rewards.verifiable:exact` compares what it writes with the answer.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

PARTS = ("train", "valid")


def additions(most: int, held_out: int, seed: int) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Returns all problems a + b of numbers from 0 to `most`, in a random order, and `held_out` of them apart.

    The order of the two numbers makes another problem, but both orders are on one side.

    Args:
      most: the largest number that is added.
      held_out: the number of unordered pairs that are held out.
      seed: draws the order and the choice.
    """
    pairs = [(a, b) for a in range(most + 1) for b in range(a, most + 1)]
    draw = np.random.default_rng(seed)
    chosen = draw.permutation(len(pairs))
    return _rows(pairs, chosen[held_out:], draw), _rows(pairs, chosen[:held_out], draw)


def _rows(pairs: Sequence[tuple[int, int]], chosen: np.ndarray, draw: np.random.Generator) -> list[dict[str, str]]:
    both = sorted({order for at in chosen.tolist() for order in (pairs[at], pairs[at][::-1])})
    problems = [both[at] for at in draw.permutation(len(both)).tolist()]
    return [{"prompt": f"{a}+{b}=", "completion": str(a + b), "answer": str(a + b)} for a, b in problems]


def write_additions(folder: str | Path, most: int = 99, held_out: int = 500, seed: int = 0) -> None:
    """Writes `train.jsonl` and `valid.jsonl` with problems of addition; the same arguments write the same bytes."""
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    for part, rows in zip(PARTS, additions(most, held_out, seed), strict=True):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (target / f"{part}.jsonl").write_text(text, encoding="ascii")


def main() -> None:
    """The command line of this module."""
    parser = argparse.ArgumentParser(
        prog="python -m jaxops.data.prompts.additions", description=write_additions.__doc__
    )
    parser.add_argument("folder", help="where the two files are written")
    parser.add_argument("--most", type=int, default=99, help="the largest number that is added")
    parser.add_argument("--held-out", type=int, default=500, help="the number of pairs of numbers that are held out")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.most < 1 or not 0 < args.held_out < (args.most + 1) * (args.most + 2) // 2 or args.seed < 0:
        parser.error("expected --most of at least 1, --held-out of fewer than all pairs, --seed of at least 0")
    write_additions(args.folder, args.most, args.held_out, args.seed)


if __name__ == "__main__":
    main()

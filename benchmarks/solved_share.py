"""How many problems trained models solve: mean@k, which is the share of right answers, and pass@k, of any of k right.

The problems are JSON lines with the columns `prompt` and `answer`. Answers are sampled at temperature 1, as they are in
training, and `jaxops.rl.rewards.verifiable:exact` judges them. Prints a line of JSON for each run.

    python benchmarks/solved_share.py data/additions/valid.jsonl runs/sft-arithmetic runs/grpo-arithmetic --copies 8
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

import jaxops
from jaxops.evaluate.solved import mean_at_k, pass_at_k
from jaxops.rl.rewards.verifiable import exact


def solved(run: str, problems: Path, **options: Any) -> np.ndarray:
    """Returns which answers of a run are right, [problems, copies].

    Args:
      run: the run's folder.
      problems: the file.
      options: those of `generate`.
    """
    table = jaxops.load(run).generate(problems, **options)
    said, right = table["completion"].to_pylist(), table["answer"].to_pylist()
    scores = exact([], said, right)
    return np.array(scores, np.float64).reshape(-1, options["n"]) > 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("problems", type=Path)
    parser.add_argument("runs", nargs="+")
    parser.add_argument("--copies", type=int, default=8, help="answers to each problem, k")
    parser.add_argument("--max-tokens", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    for run in given.runs:
        right = solved(
            run,
            given.problems,
            n=given.copies,
            temperature=1.0,
            max_tokens=given.max_tokens,
            seed=given.seed,
            slots=512,
            segment=given.max_tokens,
        )
        found = {"problems": len(right), "copies": given.copies, "mean": round(mean_at_k(right), 4)}
        found |= {f"pass@{k}": round(pass_at_k(right, k), 4) for k in (1, 2, 4, 8, 16) if k <= given.copies}
        print(json.dumps({"run": run, **found}), flush=True)


if __name__ == "__main__":
    main()

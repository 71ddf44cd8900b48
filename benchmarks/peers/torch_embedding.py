"""Torch's side of sparse_tables.py: an EmbeddingBag with sparse gradients under Adagrad, a step for each line read."""

import argparse
import sys
import time

import numpy as np
import torch


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("rows", "dim", "batch", "length", "threads"):
        parser.add_argument(f"--{name}", type=int, required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    bag = torch.nn.EmbeddingBag(args.rows, args.dim, mode="sum", sparse=True)
    weight = torch.nn.Parameter(torch.randn(args.dim) * 0.1)
    table = torch.optim.Adagrad(bag.parameters(), lr=0.05, initial_accumulator_value=0.1)
    dense = torch.optim.SGD([weight], lr=0.05)
    print(torch.__version__, flush=True)
    for line in sys.stdin:
        found = np.load(line.strip())
        ids, y = torch.from_numpy(found["ids"].astype(np.int64)), torch.from_numpy(found["y"])
        began = time.perf_counter()
        table.zero_grad()
        dense.zero_grad()
        (torch.tanh(bag(ids) @ weight) - y).square().mean().backward()
        table.step()
        dense.step()
        print(time.perf_counter() - began, flush=True)


if __name__ == "__main__":
    main()

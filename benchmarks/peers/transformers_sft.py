"""transformers' side of sft_vs_torch.py: for each line `STEPS` read, trains so many steps and prints the time."""

import argparse
import json
import os
import pathlib
import sys
from typing import Any

import numpy as np
import torch
import transformers

sys.path.insert(0, os.fspath(pathlib.Path(__file__).parents[1]))
from sides import measured


def batch_of(file: Any, at: int) -> dict[str, torch.Tensor]:
    """One packed batch as the model takes it: a token sees those before it in its own text, and padding itself."""
    tokens, segment = file[f"{at}/tokens"], file[f"{at}/segment"]
    length = tokens.shape[1]
    seen = np.tril(np.ones((length, length), bool))[None] & (segment[:, :, None] == segment[:, None, :])
    targets = np.where(file[f"{at}/mask"] > 0, file[f"{at}/targets"], -100).astype(np.int64)
    return {
        "input_ids": torch.from_numpy(tokens.astype(np.int64)),
        "position_ids": torch.from_numpy(file[f"{at}/position"].astype(np.int64)),
        "attention_mask": torch.where(torch.from_numpy(seen[:, None]), 0.0, torch.finfo(torch.float32).min),
        "labels": torch.from_numpy(targets),
        "shift_labels": torch.from_numpy(targets),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--attention", default="sdpa")
    args = parser.parse_args()
    torch.set_num_threads(1)
    given = {"dtype": torch.float32, "attn_implementation": args.attention}
    model = transformers.AutoModelForCausalLM.from_pretrained(args.folder / "model", **given).train()
    settings = json.loads((args.folder / "optimizer.json").read_text(encoding="utf-8"))
    optimizer = torch.optim.AdamW(
        model.parameters(),
        settings["lr"],
        (settings["b1"], settings["b2"]),
        settings["eps"],
        weight_decay=0.0,
        fused=True,
    )
    with np.load(args.folder / "batches.npz") as file:
        batches = [batch_of(file, at) for at in range(sum(name.endswith("/tokens") for name in file))]
    print(json.dumps({"peer": f"transformers {transformers.__version__}, torch {torch.__version__}"}), flush=True)
    at = 0
    for line in sys.stdin:
        losses = []
        with measured() as took:
            for _ in range(int(line)):
                loss = model(**batches[at % len(batches)], use_cache=False).loss
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), settings["clip"])
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.detach())
                at += 1
        print(json.dumps({**took.figures(), "loss": float(torch.stack(losses).mean())}), flush=True)


main()

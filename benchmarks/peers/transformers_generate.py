"""transformers' side of generate_vs_transformers.py: for each line `BATCH` read, generates once and prints the time."""

import argparse
import json
import os
import pathlib
import sys

import numpy as np
import torch
import transformers

sys.path.insert(0, os.fspath(pathlib.Path(__file__).parents[1]))
from sides import measured


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", required=True)
    parser.add_argument("--prompts", required=True, help="an .npy file of token ids [batch, length]")
    parser.add_argument("--new", type=int, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = transformers.AutoModelForCausalLM.from_pretrained(args.folder, dtype=torch.float32).eval()
    prompts = torch.from_numpy(np.load(args.prompts).astype(np.int64))
    given = {"max_new_tokens": args.new, "min_new_tokens": args.new, "do_sample": False, "use_cache": True}
    print(json.dumps({"peer": f"transformers {transformers.__version__}, torch {torch.__version__}"}), flush=True)
    for line in sys.stdin:
        ids = prompts[: int(line)]
        with measured() as took, torch.inference_mode():
            found = model.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=0, **given)
        tokens = found[:, ids.shape[1] :].tolist()
        print(json.dumps({**took.figures(), "tokens": tokens}), flush=True)


main()

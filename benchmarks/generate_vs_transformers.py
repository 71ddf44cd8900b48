"""Tokens a second of greedy generation against `transformers` on the same weights, at batches of 1, 8 and 32.

Both are one process with one thread, pinned to the same core, and take turns; float32, the same prompts, the same
number of new tokens, no end token. The time is that of the whole call, reading the prompts included, after a warm-up
call of the same shape. `same_tokens` is the share of tokens before the first difference: floats round differently, and
greedy texts part at a near-tie. `ratio` is the worst of the batches, each the median over rounds of theirs over ours
within a round by the clock, and `ratio_cpu` the same in CPU time, which other work on the machine moves less. The last
line printed is one JSON object; nothing is asserted.

    make peers && .venv/bin/python benchmarks/generate_vs_transformers.py [--weights FOLDER_OR_GGUF] [--batches 1 8 32]
"""

import argparse
import json
import os
import pathlib
import sys
import tempfile
from typing import Any

from sides import Side, measured, ratios, sides, spread, turns

ROOT = pathlib.Path(__file__).parents[1]
PEER_PYTHON = ROOT / ".peers" / "transformers" / "bin" / "python"


def write_model(weights: str | None, folder: pathlib.Path) -> int:
    """Writes weights as `export --to hf` does, fresh ones of a small model where none are named; returns the ids."""
    import jax

    from jaxops.core.weights import load_weights, targets_of, with_arrays
    from jaxops.models.decoder.architecture import Architecture
    from jaxops.models.decoder.decoder import Decoder, build_decoder
    from jaxops.models.decoder.gguf import open_gguf
    from jaxops.models.decoder.pretrained import open_pretrained, save_pretrained

    if weights is None:
        shape = {"vocab": 4096, "dim": 256, "layers": 4, "heads": 4, "kv_heads": 2, "hidden": 1024, "length": 1024}
        decoder = Decoder(Architecture(**shape))
        params = decoder.init(jax.random.key(0))
    else:
        found = open_gguf(weights) if weights.endswith(".gguf") else open_pretrained(weights)
        decoder = build_decoder(found.architecture)
        params = with_arrays(decoder.shapes, load_weights(targets_of(decoder.shapes), [found.source])[0])
    save_pretrained(folder, decoder.config, params, {})
    return decoder.real_vocab


def ours(folder: str, prompts: str, new: int) -> None:
    """Our side, in a process of its own: for each line `BATCH` read, generates once and prints the time."""
    import jax
    import numpy as np

    from jaxops.core.mesh import make_mesh
    from jaxops.core.weights import load_weights, targets_of, with_arrays
    from jaxops.models.decoder.decoder import build_decoder
    from jaxops.models.decoder.pretrained import open_pretrained
    from jaxops.models.decoder.unrolled import Unrolled
    from jaxops.rl.options import SampleOptions
    from jaxops.rl.sample import Sampler
    from jaxops.rl.sampled import Prompt

    found = open_pretrained(folder)
    decoder = build_decoder(found.architecture)
    params = with_arrays(decoder.shapes, load_weights(targets_of(decoder.shapes), [found.source])[0])
    model, ids = Unrolled(decoder), np.load(prompts)
    options = SampleOptions(max_tokens=new, temperature=0)
    samplers: dict[int, Sampler] = {}
    placed: Any = None
    print(json.dumps({"ours": f"jaxops, jax {jax.__version__}"}), flush=True)
    for line in sys.stdin:
        batch = int(line)
        if batch not in samplers:
            room = ids.shape[1] + new
            samplers[batch] = Sampler(model, make_mesh(), slots=batch, room=room, reading=batch, options=options)
            placed = samplers[batch].handoff(params) if placed is None else placed
        asked = [Prompt(row.tolist(), at) for at, row in enumerate(ids[:batch])]
        with measured() as took:
            sampled = samplers[batch](placed, asked, seed=0)
        print(json.dumps({**took.figures(), "tokens": sampled.tokens.tolist()}), flush=True)


def alike(a: list[list[int]], b: list[list[int]]) -> float:
    """The share of tokens before the first difference of each text."""
    same = 0
    for one, other in zip(a, b, strict=True):
        differ = [at for at, pair in enumerate(zip(one, other, strict=True)) if pair[0] != pair[1]]
        same += differ[0] if differ else len(one)
    return same / sum(map(len, a))


def measure(batch: int, both: dict[str, Side], rounds: int, new: int) -> dict[str, Any]:
    """Calls both sides in turn; returns tokens a second of each, their ratio, and how alike the texts are."""
    turns(both, batch, 1)  # the first call compiles, or warms up
    said = turns(both, batch, rounds)
    rates = {name: [batch * new / row["seconds"] for row in rows] for name, rows in said.items()}
    ratio, ratio_cpu = ratios(said, "seconds"), ratios(said, "cpu_s")
    return {
        "batch": batch,
        "ratio": ratio["median"],
        "ratio_cpu": ratio_cpu["median"],
        "ratios": ratio,
        "ratios_cpu": ratio_cpu,
        **{f"{name}_tokens_per_s": spread(rate, 1) for name, rate in rates.items()},
        "same_tokens": round(alike(said["ours"][-1]["tokens"], said["peer"][-1]["tokens"]), 3),
        **{f"{name}_peak_mib": rows[-1]["peak_mib"] for name, rows in said.items()},
        "load": [round(one, 2) for one in os.getloadavg()],
    }


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--weights", help="a folder with safetensors or a GGUF file (default: fresh, 6M parameters)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt", type=int, default=32, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=64, help="tokens that are generated")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--core", type=int, default=0, help="the core that both are pinned to")
    parser.add_argument("--peer-python", default=str(PEER_PYTHON))
    parser.add_argument("--ours", nargs=2, metavar=("FOLDER", "PROMPTS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.ours:
        return ours(*args.ours, args.new)
    if not os.path.exists(args.peer_python):
        sys.exit("error: no transformers here; run: make peers (or name a Python that has it: --peer-python)")
    import numpy as np

    with tempfile.TemporaryDirectory() as scratch:
        folder, prompts = pathlib.Path(scratch) / "model", os.path.join(scratch, "prompts.npy")
        folder.mkdir()
        vocab = write_model(args.weights, folder)
        np.save(prompts, np.random.default_rng(0).integers(3, vocab, (max(args.batches), args.prompt), np.int32))
        peer = [args.peer_python, str(ROOT / "benchmarks/peers/transformers_generate.py"), "--folder", str(folder)]
        peer += ["--prompts", prompts, f"--new={args.new}"]
        mine = [sys.executable, __file__, "--ours", str(folder), prompts, f"--new={args.new}"]
        with sides(args.core, ours=mine, peer=peer) as both:
            names = {name: word for side in both.values() for name, word in side.name.items()}
            rows = []
            for batch in args.batches:
                rows.append(measure(batch, both, args.rounds, args.new))
                print(json.dumps(rows[-1]), flush=True)
    print(
        json.dumps(
            {
                "name": "generate_vs_transformers",
                "weights": pathlib.Path(args.weights).name if args.weights else "fresh, 6M parameters",
                "prompt_tokens": args.prompt,
                "new_tokens": args.new,
                "threads": 1,
                "batches": rows,
                "ratio": min(row["ratio"] for row in rows),
                "ratio_cpu": min(row["ratio_cpu"] for row in rows),
                "versions": names,
            }
        )
    )


if __name__ == "__main__":
    main()

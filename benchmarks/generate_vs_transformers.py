"""Tokens a second of greedy generation against `transformers` on the same weights, at batches of 1, 8 and 32.

Both are one process with one thread, pinned to the same core, and take turns; float32, the same prompts, the same
number of new tokens, no end token. The time is that of the whole call, reading the prompts included, after a warm-up
call of the same shape. `same_tokens` is the share of tokens before the first difference: floats round differently, and
greedy texts part at a near-tie. `ratio` is the worst of the batches. The last line printed is one JSON object; nothing
is asserted.

    make peers && .venv/bin/python benchmarks/generate_vs_transformers.py [--weights FOLDER_OR_GGUF] [--batches 1 8 32]
"""

import argparse
import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

ROOT = pathlib.Path(__file__).parents[1]
PEER_PYTHON = ROOT / ".peers" / "transformers" / "bin" / "python"
ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "NPROC": "1",
    "JAX_PLATFORMS": "cpu",
}


def write_model(weights: str | None, folder: pathlib.Path) -> int:
    """Writes weights as `export --to hf` does, fresh ones of a small model where none are named; returns the ids."""
    import jax

    from jaxops.core.weights import load_weights, targets_of, with_arrays
    from jaxops.models.decoder.architecture import Architecture
    from jaxops.models.decoder.gguf import open_gguf
    from jaxops.models.decoder.pretrained import open_pretrained, save_pretrained

    if weights is None:
        decoder = Architecture(vocab=4096, dim=256, layers=4, heads=4, kv_heads=2, hidden=1024, length=1024).build()
        params = decoder.init(jax.random.key(0))
    else:
        found = open_gguf(weights) if weights.endswith(".gguf") else open_pretrained(weights)
        decoder = found.architecture.build()
        params = with_arrays(decoder.shapes, load_weights(targets_of(decoder.shapes), [found.source])[0])
    save_pretrained(folder, decoder.config, params, {})
    return decoder.real_vocab


def ours(folder: str, prompts: str, new: int) -> None:
    """Our side, in a process of its own: for each line `BATCH` read, generates once and prints the time."""
    import jax
    import numpy as np

    from jaxops.core.mesh import make_mesh
    from jaxops.core.weights import load_weights, targets_of, with_arrays
    from jaxops.models.decoder.pretrained import open_pretrained
    from jaxops.models.decoder.unrolled import Unrolled
    from jaxops.rl.options import SampleOptions
    from jaxops.rl.sample import Sampler
    from jaxops.rl.sampled import Prompt

    found = open_pretrained(folder)
    decoder = found.architecture.build()
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
        started = time.perf_counter()
        sampled = samplers[batch](placed, asked, seed=0)
        seconds = time.perf_counter() - started
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
        print(json.dumps({"seconds": seconds, "tokens": sampled.tokens.tolist(), "peak_mib": peak}), flush=True)


class Worker:
    """One side, in a process that is pinned to a core."""

    def __init__(self, command: list[str], core: int) -> None:
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **ONE_THREAD},
            preexec_fn=lambda: os.sched_setaffinity(0, {core}),
        )
        self.name = self._read()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        while line := self._process.stdout.readline():
            if line.startswith("{"):
                found: dict[str, Any] = json.loads(line)
                return found
        sys.exit(f"error: a side ended with status {self._process.wait()}")

    def __call__(self, batch: int) -> dict[str, Any]:
        assert self._process.stdin is not None
        print(batch, file=self._process.stdin, flush=True)
        return self._read()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def alike(a: list[list[int]], b: list[list[int]]) -> float:
    """The share of tokens before the first difference of each text."""
    same = 0
    for one, other in zip(a, b, strict=True):
        differ = [at for at, pair in enumerate(zip(one, other, strict=True)) if pair[0] != pair[1]]
        same += differ[0] if differ else len(one)
    return same / sum(map(len, a))


def measure(batch: int, sides: dict[str, Worker], rounds: int, new: int) -> dict[str, Any]:
    """Calls both sides in turn; returns tokens a second of each (medians), their ratio, and how alike the texts are."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    last: dict[str, dict[str, Any]] = {}
    for number in range(rounds + 1):  # the first call compiles, or warms up
        for name, side in sides.items():
            last[name] = side(batch)
            if number:
                times[name].append(last[name]["seconds"])
    rate = {name: batch * new / statistics.median(seconds) for name, seconds in times.items()}
    return {
        "batch": batch,
        "ours_tokens_per_s": round(rate["ours"], 1),
        "peer_tokens_per_s": round(rate["peer"], 1),
        "ratio": round(rate["ours"] / rate["peer"], 3),
        "same_tokens": round(alike(last["ours"]["tokens"], last["peer"]["tokens"]), 3),
        "ours_peak_mib": round(last["ours"]["peak_mib"]),
        "peer_peak_mib": round(last["peer"]["peak_mib"]),
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
        sides = {"ours": Worker(mine, args.core), "peer": Worker(peer, args.core)}
        rows = []
        for batch in args.batches:
            rows.append(measure(batch, sides, args.rounds, args.new))
            print(json.dumps(rows[-1]), flush=True)
        for side in sides.values():
            side.close()
    print(
        json.dumps(
            {
                "benchmark": "generate_vs_transformers",
                "weights": pathlib.Path(args.weights).name if args.weights else "fresh, 6M parameters",
                **sides["ours"].name,
                **sides["peer"].name,
                "prompt_tokens": args.prompt,
                "new_tokens": args.new,
                "threads": 1,
                "load": [round(one, 2) for one in os.getloadavg()],
                "batches": rows,
                "ratio": min(row["ratio"] for row in rows),
            }
        )
    )


if __name__ == "__main__":
    main()

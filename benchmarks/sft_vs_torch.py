"""Tokens a second of supervised fine-tuning against transformers and torch on the same weights and packed batches.

Ours is the `TrainStep` that `jaxops train` drives for the config of a case, with its metrics. The peer is the model as
`export --to hf` writes it, trained by torch: scaled dot-product attention under the mask of the packed rows, the loss
that the model computes itself over the same positions, clipping by global norm and the fused AdamW, with the same
settings. Both are one process with one thread, pinned to the same core, in float32, and take turns. Before anything is
timed, the losses of the first steps must agree to 1e-4, else the benchmark ends with status 1.

`ratio` is the worst of the cases in tokens a second by the clock, the median over rounds of theirs over ours within a
round, and `ratio_cpu` the same in CPU time, which other work on the machine moves less. Peak memory is that of each
process. The last line printed is one JSON object; no speed is asserted.

    make peers && .venv/bin/python benchmarks/sft_vs_torch.py [--cases sft_tiny sft_smollm2] [--rounds 5]
"""

import argparse
import dataclasses
import itertools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

import numpy as np
from sides import measured, ratios, sides, spread, turns

ROOT = pathlib.Path(__file__).parents[1]
PEER_PYTHON = ROOT / ".peers" / "transformers" / "bin" / "python"
SAME = ["optimizer.schedule={kind: constant}", "precision.compute=float32", "evaluate.samples=0"]
CASES: dict[str, tuple[str, list[str], int]] = {
    # config, what it is changed in, steps of a turn
    "sft_tiny": ("language/sft_tiny", ["optimizer.lr=1e-3"], 4),
    "sft_smollm2": ("language/sft_smollm2", ["data.length=256", "batch.global=2"], 1),
}
TEXTS, BATCHES, CHECKED, CLOSE = 500, 8, 4, 1e-4


def task_of(case: str, folder: pathlib.Path) -> Any:
    """The task of a case, on the first texts of its data, which are read in no time."""
    from jaxops.data.sources import local
    from jaxops.run.build import build_task, load_config

    config, overrides, _ = CASES[case]
    few = folder / "texts.jsonl"
    if not few.exists():
        with open(local(load_config(config).config.data.path), encoding="utf-8") as file:
            few.write_text("".join(itertools.islice(file, TEXTS)), encoding="utf-8")
    return build_task(load_config(config, [*overrides, *SAME, f"data.path={few}"]))


def began(task: Any, training: Any) -> Any:
    """The state that a run of the task begins with."""
    from jaxops.run.warm_start import first_state

    return first_state(training.fresh(), task, {}, lambda text: None)


def on_mesh(task: Any) -> tuple[Any, Any]:
    """The mesh of the task's config, and what trains the task on it."""
    import jax

    from jaxops.core.mesh import make_mesh
    from jaxops.run.training import accumulation_of, build_training

    mesh = make_mesh(**dataclasses.asdict(task.config.mesh))
    with jax.set_mesh(mesh):
        return mesh, build_training(task, mesh, accumulation_of(task, mesh))


def write(case: str, folder: pathlib.Path) -> None:
    """Writes the first weights as `export --to hf` does, the first batches, and the settings of the optimizer."""
    import jax

    from jaxops.models.decoder.pretrained import save_pretrained

    task = task_of(case, folder)
    mesh, training = on_mesh(task)
    with jax.set_mesh(mesh):
        params = jax.device_get(began(task, training).params)
    save_pretrained(folder / "model", task.model.config, params, {})
    size, optimizer = task.config.batch.global_, task.config.optimizer
    batches = [task.source.batch(number * size, size) for number in range(BATCHES)]
    np.savez(folder / "batches.npz", **{f"{at}/{name}": x for at, one in enumerate(batches) for name, x in one.items()})
    if optimizer.weight_decay:
        sys.exit("error: which parameters decay is not told to the peer")
    settings = {name: getattr(optimizer, name) for name in ("lr", "b1", "b2", "eps", "clip")}
    (folder / "optimizer.json").write_text(json.dumps(settings), encoding="utf-8")


def read_batches(folder: pathlib.Path) -> list[dict[str, np.ndarray]]:
    """The batches that were written."""
    with np.load(folder / "batches.npz") as file:
        names = [name.removeprefix("0/") for name in file if name.startswith("0/")]
        return [{name: file[f"{at}/{name}"] for name in names} for at in range(BATCHES)]


def ours(case: str, folder: pathlib.Path) -> None:
    """Our side: for each line `STEPS` read, trains so many steps and prints the time and the mean loss."""
    import jax

    task = task_of(case, folder)
    mesh, training = on_mesh(task)
    batches, at = read_batches(folder), 0
    with jax.set_mesh(mesh):
        state = began(task, training)
        print(json.dumps({"ours": f"jax {jax.__version__}"}), flush=True)
        for line in sys.stdin:
            window = None
            with measured() as took:
                for _ in range(int(line)):
                    state, window = training.update(state, batches[at % BATCHES], window)
                    at += 1
                jax.block_until_ready((state, window))
            assert window is not None
            print(json.dumps({**took.figures(), "loss": float(window["loss/nll"].value())}), flush=True)


def compared(case: str, args: argparse.Namespace, folder: pathlib.Path) -> dict[str, Any]:
    """Figures of one case."""
    subprocess.run([sys.executable, __file__, "--write", case, str(folder)], check=True)
    mine = [sys.executable, __file__, "--ours", case, str(folder)]
    peer = [args.peer_python, str(ROOT / "benchmarks/peers/transformers_sft.py"), str(folder)]
    batches, steps = read_batches(folder), CASES[case][2]
    with sides(args.core, ours=mine, peer=[*peer, f"--attention={args.attention}"]) as both:
        checked = turns(both, 1, CHECKED)
        losses = {name: [one["loss"] for one in said] for name, said in checked.items()}
        apart = max(abs(a - b) for a, b in zip(losses["ours"], losses["peer"], strict=True))
        if apart > CLOSE:
            sys.exit(f"error: {case}: losses differ by {apart:.2e}, more than {CLOSE:.0e}: {losses}")
        said = turns(both, steps, args.rounds)
        versions = {name: side.name[name] for name, side in both.items()}
    shape = batches[0]["tokens"].shape
    tokens = float(np.mean([np.sum(one["segment"] > 0) for one in batches])) * steps
    return {
        "case": case,
        "batch": list(shape),
        "tokens_of_a_step": round(tokens / steps),
        "steps_of_a_turn": steps,
        "ratio": ratios(said, "seconds"),
        "ratio_cpu": ratios(said, "cpu_s"),
        **{f"{name}_tokens_per_s": spread((tokens / one["seconds"] for one in said[name]), 1) for name in said},
        **{f"{name}_tokens_per_cpu_s": spread((tokens / one["cpu_s"] for one in said[name]), 1) for name in said},
        **{f"{name}_first_step_s": round(checked[name][0]["seconds"], 2) for name in said},
        **{f"{name}_peak_mib": said[name][-1]["peak_mib"] for name in said},
        "losses_apart": float(f"{apart:.2g}"),
        "losses": losses["ours"],
        "load": [round(one, 2) for one in os.getloadavg()],
        "versions": versions,
    }


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--core", type=int, default=0, help="the core that both are pinned to")
    parser.add_argument("--attention", choices=("sdpa", "eager"), default="sdpa", help="the peer's attention")
    parser.add_argument("--peer-python", default=str(PEER_PYTHON))
    parser.add_argument("--write", nargs=2, metavar=("CASE", "FOLDER"), help=argparse.SUPPRESS)
    parser.add_argument("--ours", nargs=2, metavar=("CASE", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.write:
        return write(args.write[0], pathlib.Path(args.write[1]))
    if args.ours:
        return ours(args.ours[0], pathlib.Path(args.ours[1]))
    if not os.path.exists(args.peer_python):
        sys.exit("error: no transformers here; run: make peers (or name a Python that has it: --peer-python)")
    rows = []
    for case in args.cases:
        with tempfile.TemporaryDirectory() as scratch:
            rows.append(compared(case, args, pathlib.Path(scratch)))
        print(json.dumps(rows[-1]), flush=True)
    print(
        json.dumps(
            {
                "name": "sft_vs_torch",
                "ratio": min(row["ratio"]["median"] for row in rows),
                "ratio_cpu": min(row["ratio_cpu"]["median"] for row in rows),
                "threads": 1,
                "attention_of_the_peer": args.attention,
                "load": rows[-1]["load"],
                "cases": rows,
            }
        )
    )


if __name__ == "__main__":
    main()

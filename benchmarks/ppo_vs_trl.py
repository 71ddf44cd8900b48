"""Whole iterations of PPO (collect, score, update) against the PPOTrainer of TRL 1.12 on the same models and prompts.

Policy, value with a trunk of its own, reference and reward model are four decoders of one shape. TRL reads the weights
that ours begins with. Both sample at temperature 1 up to the same number of tokens, put the KL into the reward, and
learn by the same number of epochs, minibatches and rows with the same clips and AdamW; what a completion says differs,
since their random numbers do. Ours goes through everything that `jaxops train` calls in a step: the batch of prompts,
the step of the task, and its metrics on the host. Both are one process with one thread, pinned to the same core, in
float32, and make iterations in turn.

`ratio` is TRL's time over ours of an iteration in the steady state, the median over turns after the first two, by the
clock, and `ratio_cpu` the same in CPU time, which other work on the machine moves less. `first` sums all iterations
from the first one on, with all compilation. The last line printed is one JSON object; nothing is asserted.

    make peers && .venv/bin/python benchmarks/ppo_vs_trl.py [--iterations 20] [--prompts 64] [--new 32]
"""

import argparse
import json
import os
import pathlib
import random
import subprocess
import sys
import tempfile
from typing import Any

import numpy as np
from sides import measured, ratios, sides, spread, turns

ROOT = pathlib.Path(__file__).parents[1]
PEER_PYTHON = ROOT / ".peers" / "trl" / "bin" / "python"
WARM = 2
SHOWN = ("reward", "kl", "moved_kl", "length", "eos_rate", "ratio0")


def policy_task(args: argparse.Namespace, folder: pathlib.Path) -> Any:
    """The task of our run of PPO."""
    from jaxops.run.build import build_task, config_from_dict

    values = {
        "task": "policy",
        "model": {"weights": str(folder / "policy")},
        "tokenizer": "bytes",
        "value": {"kind": "trunk"},
        "data": {
            "kind": "prompts",
            "path": str(folder / "prompts.jsonl"),
            "template": "none",
            "max_tokens": args.prompt,
        },
        "rewards": [{"run": str(folder / "runs" / "judge")}],
        "sample": {"max_tokens": args.new, "temperature": 1.0, "slots": args.prompts},
        "algorithm": {
            "kind": "ppo",
            "epochs": args.epochs,
            "minibatches": args.minibatches,
            "whiten": "unbiased",
            "kl": {"in": "reward", "estimator": "k1", "coef": 0.05},
        },
        "optimizer": {"kind": "adamw", "lr": 1e-5, "clip": None},
        "batch": {"prompts": args.prompts},
        "run": {"name": "ppo", "dir": str(folder / "runs"), "steps": 1_000, "loggers": []},
    }
    return build_task(config_from_dict(values))


def write(args: argparse.Namespace, folder: pathlib.Path) -> None:
    """Writes what both sides begin with: a policy, a reward model, prompts and settings."""
    import jax

    import jaxops as jx
    from jaxops.data.text.byte_tokenizer import ByteTokenizer
    from jaxops.models.decoder.architecture import Architecture
    from jaxops.models.decoder.decoder import Decoder
    from jaxops.models.decoder.pretrained import save_pretrained
    from jaxops.models.reward import REWARD
    from jaxops.run.build import config_from_dict

    words = ByteTokenizer()
    shape = {"dim": args.dim, "layers": args.layers, "heads": 4, "hidden": 3 * args.dim, "length": 512}
    decoder = Decoder(Architecture(vocab=words.vocab, **shape))
    special = {"eos_token_id": words.eos, "pad_token_id": words.pad}
    save_pretrained(folder / "policy", decoder.config, jax.device_get(decoder.init(jax.random.key(0))), special)
    draw = random.Random(0)
    text = lambda size: "".join(draw.choices("abcdefgh ", k=size))
    lines = [{"prompt": text(draw.randint(args.prompt // 2, args.prompt - 1))} for _ in range(4 * args.prompts)]
    pairs = [{"prompt": text(8), "chosen": text(8), "rejected": text(8)} for _ in range(64)]
    for name, rows in (("prompts", lines), ("pairs", pairs)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    reward = {
        "task": "reward",
        "model": {"weights": str(folder / "policy")},
        "tokenizer": "bytes",
        "data": {
            "kind": "preferences",
            "path": str(folder / "pairs.jsonl"),
            "template": None,
            "length": args.prompt + args.new,
        },
        "batch": {"global": 32},
        "run": {"name": "judge", "dir": str(folder / "runs"), "steps": 1, "loggers": []},
    }
    jx.fit(jx.build_task(config_from_dict(reward)), quiet=True)
    trained = dict(jx.load(folder / "runs" / "judge").saved.weights.params)
    head = trained.pop(REWARD)
    save_pretrained(folder / "judge", decoder.config, trained, special)
    np.save(folder / "head.npy", np.asarray(head["kernel"]))
    task = policy_task(args, folder)
    prompts = task.source.batch(0, task.source.examples)
    np.savez(folder / "prompts.npz", tokens=prompts["tokens"], length=prompts["length"])
    algorithm, optimizer = task.config.algorithm, task.config.optimizer
    settings = {
        "vocab": words.vocab,
        "eos": words.eos,
        "pad": words.pad,
        "prompts": args.prompts,
        "new": args.new,
        "epochs": algorithm.epochs,
        "minibatches": algorithm.minibatches,
        "lr": optimizer.lr,
        "kl": algorithm.kl.coef,
        "clip": algorithm.clip,
        "value_clip": algorithm.value_clip,
        "value_weight": algorithm.value_weight,
    }
    (folder / "settings.json").write_text(json.dumps(settings), encoding="utf-8")


def ours(args: argparse.Namespace, folder: pathlib.Path) -> None:
    """Our side: for each line read, makes one iteration and prints the time and some metrics."""
    import dataclasses

    import jax

    from jaxops.core.journal import Journal
    from jaxops.core.mesh import make_mesh
    from jaxops.core.sums import finalize
    from jaxops.core.turn import Turn
    from jaxops.run.task import StepParts
    from jaxops.run.training import accumulation_of, build_training
    from jaxops.run.warm_start import first_state

    task = policy_task(args, folder)
    mesh = make_mesh(**dataclasses.asdict(task.config.mesh))
    with jax.set_mesh(mesh), Journal(folder / "ours", fresh=True) as journal:
        training = build_training(task, mesh, accumulation_of(task, mesh))
        parts = StepParts(training.update, training.fresh, mesh, folder)
        parts.journal, step = journal, task.step(parts)
        state = first_state(training.fresh(), task, {}, lambda text: None)
        print(json.dumps({"ours": f"jax {jax.__version__}"}), flush=True)
        turn = Turn(task.source.batch, lambda: False)
        for _ in sys.stdin:
            with measured() as took:
                turn.examples, turn.updates = args.prompts, 1
                state, sums = step(state, task.source.batch(turn.cursor, args.prompts), None, turn)
                values = finalize(sums)
                jax.block_until_ready(state)
            turn.cursor += turn.examples
            metrics = {name: float(values[name]) for name in SHOWN} | {"updates": turn.updates}
            print(json.dumps({**took.figures(), "metrics": metrics}), flush=True)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--prompts", type=int, default=64, help="completions of an iteration")
    parser.add_argument("--prompt", type=int, default=16, help="most tokens of a prompt")
    parser.add_argument("--new", type=int, default=32, help="most tokens of a completion")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--minibatches", type=int, default=4)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--core", type=int, default=0, help="the core that both are pinned to")
    parser.add_argument("--peer-python", default=str(PEER_PYTHON))
    parser.add_argument("--side", nargs=2, metavar=("WHICH", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        return {"write": write, "ours": ours}[args.side[0]](args, pathlib.Path(args.side[1]))
    if not os.path.exists(args.peer_python):
        sys.exit("error: no TRL here; run: make peers (or name a Python that has it: --peer-python)")
    with tempfile.TemporaryDirectory() as scratch:
        mine = [sys.executable, __file__, *sys.argv[1:], "--side"]
        subprocess.run([*mine, "write", scratch], check=True, stdout=subprocess.DEVNULL)
        peer = [args.peer_python, str(ROOT / "benchmarks/peers/trl_ppo.py"), scratch]
        with sides(args.core, ours=[*mine, "ours", scratch], peer=peer) as both:
            said = turns(both, "", args.iterations)
            versions = {name: side.name[name] for name, side in both.items()}
    steady = {name: rows[WARM:] for name, rows in said.items()}
    total = {name: sum(row["seconds"] for row in rows) for name, rows in said.items()}
    ratio, ratio_cpu = ratios(steady, "seconds"), ratios(steady, "cpu_s")
    shape = ("prompts", "prompt", "new", "epochs", "minibatches", "dim", "layers")
    print(
        json.dumps(
            {
                "name": "ppo_vs_trl",
                "ratio": ratio["median"],
                "ratio_cpu": ratio_cpu["median"],
                "ratios": ratio,
                "ratios_cpu": ratio_cpu,
                "first": {
                    "iterations": args.iterations,
                    "ratio": round(total["peer"] / total["ours"], 3),
                    **{f"{name}_s": round(seconds, 2) for name, seconds in total.items()},
                },
                **{f"{name}_s": spread(row["seconds"] for row in rows) for name, rows in steady.items()},
                **{f"{name}_cpu_s": spread(row["cpu_s"] for row in rows) for name, rows in steady.items()},
                **{f"{name}_first_s": round(rows[0]["seconds"], 2) for name, rows in said.items()},
                **{f"{name}_peak_mib": rows[-1]["peak_mib"] for name, rows in said.items()},
                **{f"{name}_metrics": rows[0]["metrics"] for name, rows in said.items()},
                **{name: getattr(args, name) for name in shape},
                "threads": 1,
                "load": [round(one, 2) for one in os.getloadavg()],
                "versions": versions,
            }
        )
    )


if __name__ == "__main__":
    main()

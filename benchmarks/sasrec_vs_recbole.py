"""SASRec on MovieLens-100K against RecBole's: seconds to RecBole's best validation NDCG@10, targets a second.

Both rank the whole catalogue without the items a user has already seen (RecBole's own figure keeps them among
the candidates and is lower; it is reported, not compared). RecBole's clock counts its training and validation
epochs alone. Ours is read three times: from the start of the process, from the start of training, and without
compiling. `ratio` uses the first, which favours RecBole. The last line printed is one JSON object; nothing is
asserted.

    make peers && .venv/bin/python benchmarks/sasrec_vs_recbole.py [--peer-from FILE | --record FILE]
"""

import argparse
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

ROOT = pathlib.Path(__file__).parents[1]
PEER_PYTHON = ROOT / ".peers" / "recbole" / "bin" / "python"
METRIC = "valid/ndcg@10"
PEER_METRIC = "valid/ndcg@10_unseen"
Line = dict[str, Any]


def peer_run(epochs: int, data: str | None, threads: int) -> dict[str, Any]:
    """RecBole, now: its lines in the form of a record."""
    if not PEER_PYTHON.exists():
        sys.exit("error: no RecBole here; run: make peers (or reuse recorded figures with --peer-from FILE)")
    command = [str(PEER_PYTHON), str(ROOT / "benchmarks/peers/recbole_sasrec.py")]
    command += [f"--epochs={epochs}", f"--threads={threads}", *([f"--data={data}"] if data else [])]
    lines = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for text in process.stdout or ():
            print("recbole:", text.rstrip(), flush=True)
            lines.append(json.loads(text))
    if process.returncode:
        sys.exit(f"error: RecBole ended with status {process.returncode}")
    return record(lines, clock="wall")


def record(lines: list[Line], clock: str, **more: Any) -> dict[str, Any]:
    """What `--record` writes and `--peer-from` reads.

    `clock` says what an epoch's seconds are: `wall` (the machine was quiet) or `cpu` (it was not, so CPU
    seconds divided by threads stand in, the least wall time that those could have taken).
    """
    start = next(line for line in lines if line.get("event") == "start")
    end = next((line for line in lines if line.get("event") == "end"), {})
    return {
        "peer": "recbole_sasrec_ml100k",
        "machine": f"{os.cpu_count()} cores, {platform.system()} {platform.machine()}",
        "clock": clock,
        **more,
        **{name: value for name, value in start.items() if name != "event"},
        "test": {name: value for name, value in end.items() if name.startswith("test/")},
        "epochs": [line for line in lines if "epoch" in line],
    }


def peer_figures(peer: dict[str, Any]) -> dict[str, float]:
    """Best quality, the seconds of training and validation until then, targets per second."""
    threads, by_cpu = peer["threads"], peer["clock"] == "cpu"
    train = [e["cpu_s"] / threads if by_cpu else e["train_s"] for e in peer["epochs"]]
    valid = [e["valid_cpu_s"] / threads if by_cpu else e["valid_s"] for e in peer["epochs"]]
    quality = [e[PEER_METRIC] for e in peer["epochs"]]
    best = quality.index(max(quality))
    return {
        "peer_best_ndcg@10": quality[best],
        "peer_best_epoch": peer["epochs"][best]["epoch"],
        "peer_epochs_run": len(train),
        "peer_s_to_best": round(sum(train[: best + 1]) + sum(valid[: best + 1]), 2),
        "peer_epoch_s": round(statistics.median(train), 2),
        "peer_targets_per_s": round(peer["targets_per_epoch"] / statistics.median(train), 1),
        "peer_own_best_ndcg@10": max(e[METRIC] for e in peer["epochs"]),
    }


def our_run(config: str, overrides: list[str], scratch: pathlib.Path, name: str) -> dict[str, Any]:
    """`jaxops train` in a scratch folder: its metrics, its summary, when it began, when it began to train.

    What it prints is passed on; from that come the moment of the first compile, where training starts, and
    the seconds of all compiles (None where it says neither).
    """
    command = [str(pathlib.Path(sys.executable).parent / "jaxops"), "train", config]
    command += [f"run.dir={scratch}", f"run.name={name}", *overrides]
    started, training, said = time.time(), None, b""
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        while process.stdout and (chunk := os.read(process.stdout.fileno(), 65536)):
            said += chunk
            if training is None and b"compiling train_step" in said:
                training = time.time()
            sys.stdout.write(chunk.decode("utf-8", "replace"))
            sys.stdout.flush()
    if process.returncode:
        sys.exit(f"error: status {process.returncode} from: {' '.join(command)}")
    folder = scratch / name
    compiles = re.findall(rb"compiling \S+ \.\.\. ([0-9.]+) s", said)
    return {
        "started": started,
        "training": training,
        "compile_s": sum(map(float, compiles)) if compiles else None,
        "lines": [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()],
        "summary": json.loads((folder / "summary.json").read_text()),
    }


def our_figures(run: dict[str, Any], goal: float) -> dict[str, Any]:
    """Seconds until the validation metric first reaches `goal` (None if it never does), targets a second."""
    lines = run["lines"]
    evaluations = [line for line in lines if METRIC in line]
    reached = next((line for line in evaluations if line[METRIC] >= goal), None)
    rates = [line["train/targets_per_s"] for line in lines if line.get("train/targets_per_s")]
    figures: dict[str, Any] = {
        "best_ndcg@10": max((line[METRIC] for line in evaluations), default=None),
        "reached_at_step": reached and reached["step"],
        "s_to_goal": reached and round(reached["time"] - run["started"], 2),
        "training_s_to_goal": None,
        "training_s_to_goal_without_compiling": None,
        "compile_s": run["compile_s"],
        "targets_per_s": round(statistics.median(rates[1:] or rates), 1) if rates else None,
    }
    if reached and run["training"]:
        figures["training_s_to_goal"] = round(reached["time"] - run["training"], 2)
        if run["compile_s"] is not None:
            without = reached["time"] - run["training"] - run["compile_s"]
            figures["training_s_to_goal_without_compiling"] = round(without, 2)
    return figures


def median_of(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Figure by figure over the runs; None where a run lacks it: a goal one run missed is not reached."""
    return {
        name: None if any(run[name] is None for run in runs) else statistics.median(run[name] for run in runs)
        for name in runs[0]
    }


def quotient(a: float | None, b: float | None) -> float | None:
    return round(a / b, 2) if a and b else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="settings for our run, as `optimizer.lr=3e-3`")
    parser.add_argument("--config", default="rec/movielens_sasrec")
    parser.add_argument("--peer-from", metavar="FILE", help="reuse RecBole's recorded figures")
    parser.add_argument("--record", metavar="FILE", help="write RecBole's figures of this run")
    parser.add_argument("--data", help="folder with ml-100k.inter for RecBole (default: its own copy)")
    parser.add_argument("--peer-epochs", type=int, default=300, help="at most so many (default: patience 10)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="torch threads for RecBole")
    parser.add_argument("--runs", type=int, default=1, help="runs of ours; a live RecBole adds one after it")
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        scratch = pathlib.Path(folder)
        runs = [our_run(args.config, args.overrides, scratch, f"ours-{n}") for n in range(args.runs)]
        if args.peer_from:
            peer = json.loads(pathlib.Path(args.peer_from).read_text(encoding="utf-8"))
        else:
            peer = peer_run(args.peer_epochs, args.data, args.threads)
            runs.append(our_run(args.config, args.overrides, scratch, "ours-after"))
    if args.record:
        pathlib.Path(args.record).write_text(json.dumps(peer, indent=1) + "\n", encoding="utf-8")

    theirs = peer_figures(peer)
    each = [our_figures(run, theirs["peer_best_ndcg@10"]) for run in runs]
    ours = median_of(each)
    result = {
        "name": "sasrec_vs_recbole",
        "ratio": quotient(theirs["peer_s_to_best"], ours["s_to_goal"]),
        "ratio_training": quotient(theirs["peer_s_to_best"], ours["training_s_to_goal"]),
        "ratio_training_without_compiling": quotient(
            theirs["peer_s_to_best"], ours["training_s_to_goal_without_compiling"]
        ),
        "ratio_targets_per_s": quotient(ours["targets_per_s"], theirs["peer_targets_per_s"]),
        **{f"ours_{name}": value for name, value in ours.items()},
        "ours_runs": each,
        "ours_test_ndcg@10": [run["summary"].get("test/ndcg@10") for run in runs],
        **theirs,
        "peer_test": peer["test"],
        "peer_recorded": bool(args.peer_from),
        "peer_recorded_on": f"{peer['date']}, {peer['machine']}" if args.peer_from else None,
        "peer_clock": peer["clock"],
        "device": runs[0]["summary"].get("device"),
        "load_average": os.getloadavg()[0],
        "versions": {
            **{n: importlib.metadata.version(n) for n in ("jaxops", "jax", "flax", "optax")},
            "python": platform.python_version(),
            "peer": peer["versions"],
        },
    }
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""RecBole's own SASRec on its own trainer, timed: one JSON line per epoch, a last line with the test figures.

Runs inside the peer's environment (`make peers`), so nothing of jaxops is imported here. RecBole makes every
prefix of a user's history one training row with one target. Its ranking for sequence models keeps the items a
user has already seen among the candidates; jaxops removes them. Both are measured: plain keys follow RecBole,
keys that end in `_unseen` leave out the user's earlier items, and only those may be compared with jaxops.

Importing RecBole 1.2.1's sequence models turns on torch's anomaly detection for the whole process (its
sine.py does), which makes a step about 1.4 times slower. It is turned off again here, so that the peer is
measured at its best; `--as-shipped` leaves it on.
"""

import argparse
import importlib.metadata
import itertools
import json
import logging
import os
import sys
import tempfile
import time
import types
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np

FILES = ("ml-100k.inter", "ml-100k.item", "ml-100k.user")
TOP = 10


def old_names() -> None:
    """Give RecBole 1.2.1 what it was written against: ray.tune, numpy's old names, a torch.load of old."""
    ray, tune = types.ModuleType("ray"), types.ModuleType("ray.tune")
    ray.tune = tune
    sys.modules.update({"ray": ray, "ray.tune": tune})
    for name, kind in {
        "float": float,
        "int": int,
        "bool": bool,
        "object": object,
        "long": int,
        "str": str,
    }.items():
        if name not in np.__dict__:
            setattr(np, name, kind)
    import torch

    load = torch.load
    torch.load = lambda *args, **kwargs: load(*args, **{**kwargs, "weights_only": False})


def settings(data: str, scratch: str, epochs: int, patience: int, seed: int) -> dict[str, Any]:
    """The comparison of issue 2: full softmax, every item ranked, leave-one-out ordered by time."""
    return {
        "data_path": data,
        "checkpoint_dir": scratch,
        "use_gpu": False,
        "show_progress": False,
        "seed": seed,
        "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
        "MAX_ITEM_LIST_LENGTH": 50,
        "hidden_size": 64,
        "inner_size": 256,
        "n_layers": 2,
        "n_heads": 2,
        "hidden_dropout_prob": 0.2,
        "attn_dropout_prob": 0.2,
        "loss_type": "CE",
        "train_neg_sample_args": None,
        "learner": "adam",
        "learning_rate": 1e-3,
        "train_batch_size": 256,
        "eval_batch_size": 256,
        "epochs": epochs,
        "stopping_step": patience,
        "valid_metric": "NDCG@10",
        "metrics": ["Hit", "NDCG", "MRR"],
        "topk": [TOP],
        "metric_decimal_place": 6,
        "repeatable": True,
        "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user", "mode": "full"},
    }


def histories(dataset: Any) -> list[np.ndarray]:
    """Items of each user (RecBole's ids) in the order of time, file order where times are equal."""
    users, items, times = (dataset.inter_feat[name].to_numpy() for name in ("user_id", "item_id", "timestamp"))
    order = np.lexsort((np.arange(len(times)), times, users))
    bounds = np.searchsorted(users[order], np.arange(dataset.user_num + 1))
    return [items[order[a:b]] for a, b in itertools.pairwise(bounds)]


def ranks_unseen(trainer: Any, loader: Any, history: list[np.ndarray], held_out: int) -> tuple[np.ndarray, float]:
    """Rank (0 is best) of each user's target among the items not in the user's earlier history.

    Also the share of users whose target is the `held_out`-th last of our own ordering: where it is 1, the two
    splits are the same.
    """
    import torch

    trainer.model.eval()
    ranks, agree = [], []
    with torch.no_grad():
        for interaction, _, _, targets in loader:
            scores = trainer.model.full_sort_predict(interaction).view(len(targets), -1).numpy()
            scores[:, 0] = -np.inf
            for row, user, target in zip(scores, interaction["user_id"].tolist(), targets.tolist(), strict=True):
                goal = row[target]
                row[history[user][:-held_out]] = -np.inf
                row[target] = goal
                ranks.append(int((row > goal).sum() + (row == goal).sum() - 1))
                agree.append(history[user][-held_out] == target)
    return np.array(ranks), float(np.mean(agree))


def scores_of(ranks: np.ndarray, suffix: str = "_unseen") -> dict[str, float]:
    """HR@10, NDCG@10 and MRR@10 of single-target ranks counted from 0."""
    hit = ranks < TOP
    values = {"hr@10": hit, "ndcg@10": hit / np.log2(ranks + 2.0), "mrr@10": hit / (ranks + 1.0)}
    return {name + suffix: round(float(np.mean(value.astype(float))), 6) for name, value in values.items()}


def renamed(result: dict[str, float]) -> dict[str, float]:
    return {name.replace("hit@", "hr@"): float(value) for name, value in result.items()}


def timed_trainer(base: type, emit: Callable[[dict[str, Any]], None], history: list[np.ndarray]) -> type:
    """RecBole's trainer with its clock read around each epoch; training, stopping and saving stay its own."""

    class Timed(base):
        training_s = evaluation_s = 0.0

        def _train_epoch(self, *args: Any, **kwargs: Any) -> Any:
            wall, cpu = time.perf_counter(), time.process_time()
            loss = super()._train_epoch(*args, **kwargs)
            self.train_s, self.cpu_s = time.perf_counter() - wall, time.process_time() - cpu
            self.training_s += self.train_s
            self.loss = loss
            return loss

        def _valid_epoch(self, valid_data: Any, show_progress: bool = False) -> Any:
            wall, cpu = time.perf_counter(), time.process_time()
            score, result = super()._valid_epoch(valid_data, show_progress)
            valid_s, valid_cpu_s = time.perf_counter() - wall, time.process_time() - cpu
            self.evaluation_s += valid_s
            ranks, agree = ranks_unseen(self, valid_data, history, held_out=2)
            emit(
                {
                    "epoch": len(self.train_loss_dict) - 1,
                    "train_s": round(self.train_s, 2),
                    "cpu_s": round(self.cpu_s, 2),
                    "valid_s": round(valid_s, 2),
                    "valid_cpu_s": round(valid_cpu_s, 2),
                    "elapsed": round(self.training_s + self.evaluation_s, 2),
                    "loss": round(float(self.loss), 3),
                    **{f"valid/{name}": value for name, value in renamed(result).items()},
                    **{f"valid/{name}": value for name, value in scores_of(ranks).items()},
                    "split_agrees": agree,
                }
            )
            return score, result

    return Timed


def start_line(args: argparse.Namespace, dataset: Any, targets: int, model: Any, prepare_s: float) -> dict[str, Any]:
    """What was run: versions, sizes, and the seconds that RecBole took to read and augment the data."""
    peers = ("recbole", "torch", "numpy", "scipy", "pandas")
    return {
        "event": "start",
        "date": time.strftime("%Y-%m-%d"),
        "versions": {n: importlib.metadata.version(n) for n in peers} | {"python": sys.version.split()[0]},
        "threads": args.threads,
        "as_shipped": args.as_shipped,
        "seed": args.seed,
        "patience": args.patience,
        "prepare_s": round(prepare_s, 2),
        "targets_per_epoch": targets,
        "users": dataset.user_num - 1,
        "items": dataset.item_num - 1,
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def train(args: argparse.Namespace, scratch: str, emit: Callable[[dict[str, Any]], None]) -> None:
    """Prepare, train to patience or `--epochs`, test the best epoch; RecBole writes into `scratch` only."""
    import torch
    from recbole.config import Config
    from recbole.data import create_dataset, data_preparation
    from recbole.model.sequential_recommender import SASRec
    from recbole.trainer import Trainer
    from recbole.utils import init_seed

    torch.autograd.set_detect_anomaly(args.as_shipped)
    started = time.perf_counter()
    options = settings(scratch, scratch, args.epochs, args.patience, args.seed)
    config = Config(model="SASRec", dataset="ml-100k", config_dict=options)
    init_seed(config["seed"], config["reproducibility"])
    dataset = create_dataset(config)
    history = histories(dataset)
    train_data, valid_data, test_data = data_preparation(config, dataset)
    init_seed(config["seed"], config["reproducibility"])
    model = SASRec(config, train_data.dataset)
    trainer = timed_trainer(Trainer, emit, history)(config, model)
    emit(start_line(args, dataset, len(train_data.dataset), model, time.perf_counter() - started))
    trainer.fit(train_data, valid_data, verbose=False)
    result = trainer.evaluate(test_data)
    ranks, agree = ranks_unseen(trainer, test_data, history, held_out=1)
    test = {f"test/{name}": value for name, value in (renamed(result) | scores_of(ranks)).items()}
    emit({"event": "end", **test, "split_agrees": agree})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="folder with ml-100k.inter (default: the copy in RecBole's package)")
    parser.add_argument("--epochs", type=int, default=300, help="at most so many (default: patience ends it)")
    parser.add_argument("--patience", type=int, default=10, help="epochs without a better NDCG@10 that end it")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=2024)
    parser.add_argument("--as-shipped", action="store_true", help="leave torch's anomaly detection on")
    parser.add_argument("--out", help="append every line to this file too")
    args = parser.parse_args()

    old_names()
    import recbole
    import torch

    out = os.path.abspath(args.out) if args.out else os.devnull

    def emit(line: dict[str, Any]) -> None:
        text = json.dumps(line)
        print(text, flush=True)
        with open(out, "a", encoding="utf-8") as file:
            file.write(text + "\n")

    data = os.path.abspath(args.data or os.path.join(os.path.dirname(recbole.__file__), "dataset_example/ml-100k"))
    torch.set_num_threads(args.threads)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    sys.argv = sys.argv[:1]  # RecBole's Config reads the command line too
    with tempfile.TemporaryDirectory() as scratch:
        os.mkdir(os.path.join(scratch, "ml-100k"))
        for name in FILES:
            if os.path.exists(os.path.join(data, name)):
                os.symlink(os.path.join(data, name), os.path.join(scratch, "ml-100k", name))
        os.chdir(scratch)  # RecBole writes logs into the current folder
        train(args, scratch, emit)
    return 0


if __name__ == "__main__":
    sys.exit(main())

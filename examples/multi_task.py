"""Several tasks on one network: is a film liked, and is it loved? With a weight for each.

`python examples/multi_task.py [a.b=VALUE ...]` makes a small log of impressions, trains on it, and predicts both.
"""

import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import jaxops as jx

CONFIG = """
base: rec/clicks
data:
  kind: clicks
  path: impressions.parquet
  labels: {like: {column: stars, at_least: 4}, love: {column: stars, at_least: 5}}
  columns: {user: account, item: title, time: at}
  categorical: [account, title, device]
  split: {kind: fractions, valid: 0.1, test: 0.1, by: time}
tables: {account: {dim: 8}, title: {dim: 8}, device: {dim: 8}}
model: {kind: dcnv2, cross_layers: 1, deep: [32]}
loss_weights: {loss/like: 1.0, loss/love: 0.5}          # of what each task adds to the loss
batch: {global: 256}
evaluate: {every: 1epoch, metrics: [auc]}
run: {name: two-tasks, epochs: 8}
"""


def impressions(rows=6000, seed=0):
    """Makes a log in which some titles, some accounts and one device please more than others."""
    rng = np.random.default_rng(seed)
    account, title, device = (rng.integers(0, n, rows) for n in (200, 100, 3))
    taste = np.sin(account) + 1.5 * np.sin(3.0 * title) + 0.5 * (device == 2) + rng.normal(0, 0.7, rows)
    stars = np.clip(np.round(3 + taste), 1, 5).astype(np.int64)
    at = 1_700_000_000 + 60 * np.arange(rows)
    return pa.table({"account": account, "title": title, "device": device, "stars": stars, "at": at})


def main(overrides=()):
    pq.write_table(impressions(), "impressions.parquet")
    Path("two_tasks.yaml").write_text(CONFIG)
    run = jx.fit(jx.build_task(jx.load_config("two_tasks.yaml", list(overrides))))
    print({name: round(value, 3) for name, value in run.summary.items() if name.startswith("test/auc")})
    chances = jx.load(run.dir).predict(impressions(rows=5, seed=1).drop_columns(["stars"]))
    print(chances.to_pylist()[0])  # the row's own columns, and a probability for each task
    return run


if __name__ == "__main__":
    main(sys.argv[1:])

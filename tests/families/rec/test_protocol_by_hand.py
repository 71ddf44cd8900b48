"""Leave-one-out on a file of sequences, by hand: raw ids, what is held out, seen items, the mean over users."""

import jax
import numpy as np
import pytest

import jaxops as jx
from jaxops.core.mesh import make_mesh

LENGTH = 6
CONFIG = """
task: rec
data: {kind: sequences, path: baskets.txt}
model: {kind: sasrec, dim: 16, layers: 1, heads: 1, length: 6, dropout: 0.1}
objective: {kind: sampled_softmax, negatives: 32}
optimizer: {lr: 1e-2, ema: 0.9}
batch: {global: 16, pack: true}
evaluate: {every: 40, metrics: [hr@5, ndcg@5], batch: 32, baselines: false}
checkpoint: {best: ndcg@5}
run: {name: hand, dir: runs, steps: 120, loggers: []}
"""


@pytest.fixture
def histories(tmp_path, monkeypatch):
    """120 users who walk through 90 items of odd ids, in lines of no order; some are longer than the model reads."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("jaxops.report.page.write_report", lambda run: run)
    draw = np.random.default_rng(0)
    found = {}
    for user in draw.permutation(120):
        steps = draw.integers(1, 4, draw.integers(4, 13)).cumsum()
        found[int(user) * 3 + 1] = [int(x) for x in (draw.integers(0, 90) + steps) % 90 * 7 + 5]
    lines = (" ".join(map(str, [user, *items])) for user, items in found.items())
    (tmp_path / "baskets.txt").write_text("\n".join(lines) + "\n")
    (tmp_path / "hand.yaml").write_text(CONFIG)
    return list(found.values())


def by_hand(served, histories, held_out):
    """What each user adds to NDCG@5: the target is the item `held_out` places from the end of the line."""
    catalogue = sorted({item for items in histories for item in items})
    row = {item: number for number, item in enumerate(catalogue, start=1)}
    queries = [items[:-held_out] for items in histories]
    read = np.zeros((len(queries), LENGTH), np.int32)
    for at, items in enumerate(queries):
        latest = [row[item] for item in items[-LENGTH:]]
        read[at, LENGTH - len(latest) :] = latest
    with jax.set_mesh(make_mesh(data=1, devices=jax.devices()[:1])):
        batch = {"items": read, "id": np.arange(len(queries), dtype=np.int32)}
        scores = np.array(jax.jit(served.ranking.scores)(served.params, batch))
    gains = []
    for values, items, seen in zip(scores, histories, queries, strict=True):
        offered = [item for item in catalogue if item not in seen]
        best = sorted(offered, key=lambda item: -values[row[item]])[:5]
        target = items[-held_out]
        gains.append(1 / np.log2(best.index(target) + 2) if target in best else 0.0)
    return np.array(gains)


def test_hit_rate_and_ndcg_are_those_by_hand(histories):
    jx.fit(jx.build_task(jx.load_config("hand.yaml")), quiet=True)
    served = jx.load("runs/hand")
    found = served.evaluate()
    for part, held_out in (("valid", 2), ("test", 1)):
        gains = by_hand(served, histories, held_out)
        assert found[f"{part}/hr@5"] == pytest.approx(np.count_nonzero(gains) / len(histories), abs=1e-6)
        assert found[f"{part}/ndcg@5"] == pytest.approx(np.mean(gains), abs=1e-6)
        assert found[f"{part}/hr@5"] > 0.2  # it has learnt: a wrong target or history would not be found

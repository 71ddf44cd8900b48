"""Which way a metric is better has one home; a value that is no number never is."""

import math

import pytest

from jaxops.core.metric import Metric, label_of


def test_higher_lower_and_neither():
    higher, lower, neither = Metric("auc"), Metric("nll", "lower"), Metric("calibration", "neither")
    assert higher.improves(0.6, 0.5) and not higher.improves(0.5, 0.5) and higher.best([0.1, 0.3, 0.2]) == 0.3
    assert lower.improves(0.4, 0.5) and not lower.improves(0.6, 0.5) and lower.best([0.1, 0.3, 0.2]) == 0.1
    assert not neither.improves(1.0, 2.0) and neither.best([1.0, 2.0]) is None and not neither.chooses


@pytest.mark.parametrize("better", ["higher", "lower"])
def test_a_nan_is_never_better_and_always_beaten(better):
    metric = Metric("x", better)
    assert not metric.improves(math.nan, None) and not metric.improves(math.nan, 0.5)
    assert metric.improves(0.5, math.nan) and metric.improves(0.5, None)
    assert metric.best([math.nan, 0.5]) == 0.5 and metric.best([math.nan]) is None


@pytest.mark.parametrize(
    ("name", "label"),
    [("ndcg@10", "NDCG@10"), ("log_loss", "Log loss"), ("recall@5", "Recall@5"), ("mypkg.m:Mine", "mypkg.m:Mine")],
)
def test_labels_by_spelling_alone(name, label):
    assert label_of(name) == label == Metric(name).shown
    assert Metric(name, label="Mine").shown == "Mine"

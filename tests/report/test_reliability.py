"""The reliability plot: what it says, and that a page shows it only where the summary has one that can be drawn."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from web_page import Page, assert_loads_nothing, assert_pictures_suit_both_themes

from jaxops.core.sums import finalize
from jaxops.evaluate.clicks import RELIABILITY_BINS, click_sums
from jaxops.report.figures import reliability_figure
from jaxops.report.page import write_report

pytestmark = pytest.mark.pictures

EMPTY = float("nan")
VALUES = np.array([[0.1, 0.3, EMPTY, 0.8], [0.2, 0.3, EMPTY, 0.6], [0.5, 0.25, 0.0, 0.25]])
AS_JSON = [[None if np.isnan(x) else x for x in row] for row in VALUES.tolist()]
HEADING = "Predicted against observed rate"


def page_of(folder, **summary):
    folder.mkdir(exist_ok=True)
    (folder / "summary.json").write_text(
        json.dumps({"name": "clicks", "state": "finished", "test/auc": 0.7, **summary})
    )
    return write_report(folder).read_text(encoding="utf-8")


def test_the_figure_says_what_it_shows():
    plot = reliability_figure(VALUES, title="Test")
    # 0.5 of the examples are 0.1 away, a quarter 0.2
    assert (plot.title, plot.caption) == ("Test", "Mean distance from the line: 0.1000")
    assert "Test: 0.1 predicted, 0.2 observed, 50.0% of the examples; 0.3 predicted" in plot.svg
    for words in ("predicted rate", "observed rate", "share of examples", "as predicted", "50%"):
        assert f">{words}</text>" in plot.svg, words
    assert "nan" not in plot.svg


def test_the_figure_of_real_metrics():
    rng = np.random.default_rng(0)
    logits = rng.normal(-3, 0.5, 2000).astype(np.float32)
    label = (rng.random(2000) < 1 / (1 + np.exp(-logits))).astype(np.float32)
    found = finalize(click_sums(jnp.asarray(logits), jnp.asarray(label)))
    assert found["reliability"].shape == (3, RELIABILITY_BINS)
    plot = reliability_figure(found["reliability"])
    assert plot.caption == f"Mean distance from the line: {found['ece']:.4f}"
    assert ">0.05</text>" in plot.svg and ">1</text>" not in plot.svg  # the axes end where the examples do


@pytest.mark.parametrize("values", [np.full((3, 4), EMPTY), np.zeros((3, 4)), np.zeros((3, 0))])
def test_no_examples_no_figure(values):
    with pytest.raises(ValueError, match="no examples"):
        reliability_figure(values)


def test_one_bin_that_holds_all():
    for rate in (0.0, 0.02, 1.0):
        bins = np.full((3, 20), EMPTY)
        bins[2], at = 0.0, min(int(rate * 20), 19)
        bins[:, at] = rate, rate, 1.0
        assert "100%" in reliability_figure(bins).svg


def test_a_bin_that_is_not_finite_is_left_out(tmp_path):
    broken = np.append(VALUES, [[np.inf], [np.inf], [0.1]], axis=1)
    assert reliability_figure(broken).caption == "Mean distance from the line: 0.1000"
    assert HEADING in Page(page_of(tmp_path / "run", **{"test/reliability": broken.tolist()}))


def test_the_page_shows_each_part_and_task(tmp_path):
    kinds = {"valid/reliability": AS_JSON, "test/reliability": AS_JSON, "test/like/reliability": AS_JSON}
    text = page_of(tmp_path / "run", **kinds)
    page = Page(text)
    assert HEADING in page and text.count("Mean distance from the line: 0.1000") == 3
    titles = [line for line in page.text if line in ("Test", "Validation", "Test, like")]
    assert titles[-3:] == ["Test", "Test, like", "Validation"]
    assert_loads_nothing(text)
    assert assert_pictures_suit_both_themes(text) == 3


@pytest.mark.parametrize(
    "value",
    [
        None,
        0.5,
        "high",
        [],
        [[0.1], [0.2]],
        [[0.1], [0.2], [1.0], [1.0]],
        [[0.1], [0.2, 0.3], [1.0]],
        [["x"], [0.2], [1.0]],
        [[None], [None], [0.0]],
        [[None], [None], [None]],
        [[0.1], [1.5], [1.0]],
        [[-0.1], [0.5], [1.0]],
        [[10**400], [0.5], [1.0]],
        [[{}], [0.5], [1.0]],
        [[[0.1]], [[0.2]], [[1.0]]],
    ],
    ids=str,
)
def test_what_cannot_be_drawn_is_left_out(tmp_path, value):
    assert HEADING not in Page(page_of(tmp_path / "run", **{"test/reliability": value}))


def test_labels_are_escaped(tmp_path):
    evil = "<script>alert(1)</script>"
    page = Page(
        page_of(tmp_path / "run", **{f"test/{evil}/reliability": AS_JSON, "test/infinite/reliability": [[1e999]]})
    )
    assert f"Test, {evil}" in page and "script" not in page.tags

"""What a model wrote first and last stands side by side, and metrics that belong together are drawn together."""

import contextlib
import json

import pytest
from web_page import Page, assert_loads_nothing, assert_pictures_suit_both_themes

from jaxops.core.metrics_file import JsonlWriter, SamplesWriter
from jaxops.report.folder import read_run
from jaxops.report.page import render_report, write_report
from jaxops.report.samples import MAX_SAMPLE, sample_table

pytestmark = pytest.mark.pictures
ABOUT = {
    "metrics": {"kl": {"better": "neither", "label": "KL (nats)"}, "reward": {"better": "higher", "label": "Reward"}},
    "curves": [["kl", "reward"], ["kl", "win_rate"]],
}
KL, REWARD = (0.1, 2.0, 5.5), (0.2, 0.9, 0.7)


@pytest.fixture
def folder(tmp_path):
    """A run of three evaluations, each with two samples of the same prompts."""
    for at, step in enumerate((100, 200, 300)):
        logged(tmp_path, step, {"valid/kl": KL[at], "valid/reward": REWARD[at], "train/loss": 1.0})
        wrote(tmp_path, step, [written(name, at) for name in ("one", "two")])
    wrote(tmp_path, 300, [{"part": "test", "prompt": "other", "completion": "x"}])
    (tmp_path / "about.json").write_text(json.dumps(ABOUT))
    return tmp_path


def logged(folder, step, values):
    with contextlib.closing(JsonlWriter(folder / "metrics.jsonl", resume_step=1000)) as writer:
        writer.write(step, values)


def wrote(folder, step, found):
    with contextlib.closing(SamplesWriter(folder / "samples.jsonl", resume_step=1000)) as writer:
        writer.samples(step, found)


def written(prompt, at, **more):
    answer = f"<b>{prompt}</b> answered {at} times"
    return {"part": "valid", "prompt": prompt, "completion": answer, "reward": 0.25 * at, "reference": "beg", **more}


def told(folder):
    table = sample_table(read_run(folder))
    return table.columns, [[(cell.text, cell.note) for cell in row] for row in table.rows], table.caption


def only(folder, *groups):
    (folder / "samples.jsonl").unlink()
    for step, found in groups:
        wrote(folder, step, found)


def test_the_first_and_the_last_answer_stand_side_by_side_with_what_changed(folder):
    only(folder, *((step, [written(name, at) for name in ("one", "two")]) for at, step in enumerate((100, 200, 300))))
    columns, rows, caption = told(folder)
    assert columns == ["Prompt", "Completion, step 100", "Completion, step 300", "Reference"]
    before, after = ("<b>one</b> answered 0 times", "Reward 0.0000"), ("<b>one</b> answered 2 times", "Reward 0.5000")
    assert rows[0] == [("one", ""), before, after, ("beg", "")] and len(rows) == 2
    assert caption == "The first and the last evaluation."
    text = render_report(read_run(folder))
    assert "<b>" not in text and "one answered" not in Page(text).text
    assert "<b>one</b> answered 2 times Reward 0.5000" in Page(text)


def test_another_part_or_other_prompts_are_not_compared(folder):
    assert told(folder) == (["Prompt", "Completion"], [[("other", ""), ("x", "")]], "Written at step 300.")
    only(folder, (1, [written("one", 0)]), (2, [written("two", 1)]))
    assert told(folder)[0] == ["Prompt", "Completion", "Reward", "Reference"] and told(folder)[1][0][0] == ("two", "")
    only(folder, (1, [written("one", 0), written("two", 0)]), (2, [written("one", 1)]))
    assert told(folder)[2] == "Written at step 2."
    only(folder, (1, [written("one", 0)]), (2, [written("one", 0)]))  # nothing has changed
    assert told(folder)[2] == "Written at step 2."


def test_a_second_text_that_changes_stands_below(folder):
    only(folder, (1, [written("one", 0, stopped="length")]), (2, [written("one", 1, stopped="eos")]))
    columns, ((_, before, after, _),), _ = told(folder)
    assert columns == ["Prompt", "Completion, step 1", "Completion, step 2", "Reference"]
    assert (before[1], after[1]) == ("Reward 0.0000, Stopped length", "Reward 0.2500, Stopped eos")


def test_odd_and_long_samples_are_shown_as_far_as_they_go(folder):
    odd = [{"prompt": ["a"], "completion": None}, {"prompt": "x" * 2 * MAX_SAMPLE, "completion": 3}]
    only(folder, (1, [{"prompt": ["a"]}, {}]), (2, odd))
    assert told(folder)[1] == [[("['a']", ""), ("", "")], [("x" * MAX_SAMPLE + " ...", ""), ("3", "")]]
    (folder / "samples.jsonl").unlink()
    assert sample_table(read_run(folder)) is None and "Samples</h2>" not in render_report(read_run(folder))


def test_one_metric_against_another_where_both_were_measured(folder):
    text = write_report(folder).read_text()
    assert_loads_nothing(text)
    assert_pictures_suit_both_themes(text)
    page = Page(text)
    assert "Reward against KL (nats) A point for each evaluation." in page and "Win rate against" not in page
    assert "0.2 at 0.1 (step 100); 0.9 at 2 (step 200); 0.7 at 5.5 (step 300)" in text
    logged(folder, 100, {"valid/win_rate": 0.5})
    assert "Win rate against" not in render_report(read_run(folder))  # one point is no path
    logged(folder, 300, {"valid/win_rate": 0.75})
    assert "Win rate against KL (nats): 0.5 at 0.1 (step 100); 0.75 at 5.5 (step 300)" in render_report(
        read_run(folder)
    )


@pytest.mark.parametrize("curves", [None, "kl", [["kl"]], [["kl", 3]], [["kl", ["reward"]]], {"kl": "reward"}])
def test_odd_wishes_for_curves_are_left_out(folder, curves):
    (folder / "about.json").write_text(json.dumps({**ABOUT, "curves": curves}))
    assert "against" not in render_report(read_run(folder))

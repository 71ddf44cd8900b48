"""Choices of the best of several answers: what becomes of a row, what is refused with its row, and its pairs."""

import json

import numpy as np
import pytest

from jaxops.core.failures import UserError
from jaxops.data.preferences.choices import read_choices
from jaxops.data.preferences.open import read_judgements
from jaxops.data.preferences.spec import ChoiceColumns, ChoiceData
from jaxops.data.text.byte_tokenizer import ByteTokenizer
from jaxops.data.text.spec import Share

TOKENIZER = ByteTokenizer()


def row(at, k=3, **changes):
    answers = [f"answer {letter}{at}" for letter in "abcd"[:k]]
    return {"prompt": f"say {at}: ", "completions": answers, "best": at % k, **changes}


def write(folder, rows):
    path = folder / "choices.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return str(path)


def opened(folder, rows, **changes):
    return read_judgements(ChoiceData(path=write(folder, rows), **changes)).opened(TOKENIZER)


def text_of(ids):
    return TOKENIZER.decode(list(map(int, ids))).removeprefix("<|bos|>").removesuffix("<|im_end|>")


def said(batch, at, place):
    return text_of(batch["tokens"][at, place, : int(batch["segment"][at, place].sum())])


def test_a_batch_holds_every_answer_behind_its_prompt_and_fills_short_rows_with_the_best(tmp_path):
    rows = [row(0), row(1, k=2), row(2, k=4, weight=0.5, annotator="ann")]
    batch = opened(tmp_path, rows, length=40).source(0).batch(0, 3)
    assert batch["tokens"].shape == (3, 4, 40) and batch["valid"].dtype == bool
    for at, number in enumerate(batch["id"]):
        given = rows[number]
        k = len(given["completions"])
        assert batch["valid"][at].tolist() == [True] * k + [False] * (4 - k)
        assert batch["best"][at] == given["best"] and batch["weight"][at] == given.get("weight", 1.0)
        for place in range(4):
            answer = given["completions"][place if place < k else given["best"]]
            assert said(batch, at, place) == given["prompt"] + answer
            assert text_of(batch["targets"][at, place][batch["mask"][at, place] == 1]) == answer


def test_held_out_choices_become_pairs_that_weigh_as_much_together(tmp_path):
    rows = [row(at, k=2 + at % 3, weight=1.0 + at % 2) for at in range(40)]
    data = opened(tmp_path, rows, length=40, valid=Share(share=0.5))
    pairs = data.valid
    prompts = {int(one) for one in pairs.clusters[:, 0]}
    assert (pairs.label == 1).all() and (pairs.clusters[:, 0] == pairs.clusters[:, 1]).all()
    texts = [text_of(pairs.texts.of(text)) for text in range(len(pairs.texts))]
    total = 0.0
    for prompt in prompts:
        own = pairs.clusters[:, 0] == prompt
        number = int(texts[pairs.sides[own][0, 0]].split(":")[0].removeprefix("say "))
        given = rows[number]
        best = given["prompt"] + given["completions"][given["best"]]
        others = {given["prompt"] + answer for answer in given["completions"]} - {best}
        assert {texts[side] for side in pairs.sides[own][:, 0]} == {best}
        assert {texts[side] for side in pairs.sides[own][:, 1]} == others and own.sum() == len(others)
        assert pairs.weight[own].sum() == pytest.approx(given["weight"])
        total += given["weight"]
    assert len(prompts) + data.inspection["train"]["choices"] == 40
    assert pairs.weight.sum() == pytest.approx(total)


def test_messages_are_answers_too(tmp_path):
    ask = [{"role": "user", "content": "hello"}]
    answers = [[{"role": "assistant", "content": text}] for text in ("hi", "go away")]
    (choice,) = read_choices(
        ChoiceData(path=(path := write(tmp_path, [{"prompt": ask, "completions": answers, "best": 0}]))), path
    )
    assert [text.messages for text in choice.texts] == [(*ask, *answer) for answer in map(tuple, answers)]
    assert all(text.asked == 1 for text in choice.texts)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"best": 3}, "'best' is 3, expected the place of the best of 3 completions, from 0 to 2"),
        ({"best": -1}, "'best' is -1"),
        ({"best": True}, "'best' is true"),
        ({"best": "1"}, "'best' is \"1\""),
        ({"best": None}, "'best' is null"),
        ({"completions": ["one"], "best": 0}, "expected a list of two answers or more"),
        ({"completions": "one"}, "expected a list of two answers or more"),
        ({"completions": ["a", "b", "a"], "best": 2}, r"completions\[0\] equals the best one"),
        ({"completions": ["a", 7], "best": 0}, r"completions\[1\]"),
        ({"completions": ["a", "b\0"], "best": 0}, "NUL"),
        ({"prompt": [{"role": "user", "content": "x"}]}, "they are of one form"),
        ({"weight": -1}, "'weight' is -1"),
    ],
)
def test_a_wrong_row_is_told_with_its_place(tmp_path, changes, message):
    path = write(tmp_path, [row(0), row(1, **changes)])
    with pytest.raises(UserError, match=rf"choices\.jsonl:2: .*{message}"):
        read_choices(ChoiceData(path=path), path)


def test_a_missing_column_names_the_nearest(tmp_path):
    path = write(tmp_path, [row(0)])
    with pytest.raises(UserError, match="no column 'bset'; did you mean 'best'"):
        read_choices(ChoiceData(path=path, columns=ChoiceColumns(best="bset")), path)


def test_what_is_cut_to_the_same_tokens_is_left_out_and_told(tmp_path):
    long = [f"{'x' * 60} {letter}" for letter in "ab"]
    rows = [row(0), {"prompt": "p ", "completions": long, "best": 0}]
    data = opened(tmp_path, rows, length=32, too_long="cut_end", template=None)
    assert data.inspection["train"]["choices"] == 1
    (alike,) = [note for note in data.inspection["notes"] if "twice" in note]
    assert "1 of 2 choices" in alike and ":2" in alike
    dropped = opened(tmp_path, rows, length=32, too_long="drop", template=None)
    assert dropped.inspection["train"]["choices"] == 1
    with pytest.raises(UserError, match=r"no choice is left to learn from within data\.length 8"):
        opened(tmp_path, rows, length=8, too_long="drop", template=None)


def test_the_digest_knows_which_is_best(tmp_path):
    one = opened(tmp_path, [row(0)], length=40).inspection["digest"]
    assert opened(tmp_path, [row(0)], length=40).inspection["digest"] == one
    assert opened(tmp_path, [row(0, best=1)], length=40).inspection["digest"] != one
    assert np.array_equal(opened(tmp_path, [row(0)], length=40).source(0).batch(0, 1)["best"], [0])

"""Preferences in the forms of TRL and of HH-RLHF: what becomes of each, and what is refused with its row."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxops.core.failures import UserError
from jaxops.data.preferences.agreement import of_preferences
from jaxops.data.preferences.formats import read_pairs
from jaxops.data.preferences.open import read_judgements
from jaxops.data.preferences.pairs import PairBatches
from jaxops.data.preferences.spec import PreferenceColumns, PreferenceData
from jaxops.data.text.byte_tokenizer import ByteTokenizer
from jaxops.data.text.spec import Share

TOKENIZER = ByteTokenizer()
HH = [
    ("\n\nHuman: How do I boil an egg?\n\nAssistant:", " Ten minutes in hot water.", " With fire."),
    ("\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Who are you?\n\nAssistant:", " A helper.", " Nobody, go away."),
    ("\n\nHuman: Is 7 prime?\n\nAssistant:", " Yes, it is.", " Yes, it is not."),
    ("\n\nHuman: Name a bird.\n\nAssistant:", " A wren.", ""),  # some published answers are empty
    ("\n\nHuman: a:\n\nb\n\nAssistant:", " c:\n\nd", " e"),
    ("\n\nHuman: 1\n\nAssistant: 2\n\nHuman: 3\n\nAssistant:", " 4", " 5"),
    ("\n\nHuman: Spell cat.\n\nAssistant:", " c a t", " c a t t"),
    ("\n\nHuman: ü?\n\nAssistant:", " ä", " ö"),
    ("\n\nHuman: Sing.\n\nAssistant:", " La la.\n\nHuman: More.\n\nAssistant: La.", " No."),
    ("\n\nHuman: Bye.\n\nAssistant:", " Bye!", " Stay."),
]
"""Ten rows in the form of HH-RLHF."""


def write(folder, rows, name="votes.jsonl"):
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(folder, *rows, **changes):
    path = write(folder, rows)
    return read_pairs(PreferenceData(path=path, **changes), path)


def opened(folder, rows, **changes):
    config = PreferenceData(path=write(folder, rows), **changes)
    data = read_judgements(config).opened(TOKENIZER)
    return data, data.inspection.get("notes", [])


def decoded(batch, at, side):
    size = int(batch["segment"][at, side].sum())
    return TOKENIZER.decode(batch["tokens"][at, side, :size].tolist())


def learnt(batch, at, side):
    return TOKENIZER.decode(batch["targets"][at, side][batch["mask"][at, side] == 1].tolist())


def user(text):
    return {"role": "user", "content": text}


def said(text):
    return {"role": "assistant", "content": text}


def test_ten_rows_of_hh_load_unchanged(tmp_path):
    rows = [{"chosen": asked + better, "rejected": asked + worse} for asked, better, worse in HH]
    data, remarks = opened(tmp_path, rows, length=200)
    batch = data.source(0).batch(0, 10)
    assert any("1 answers of transcripts are empty" in one for one in remarks)
    assert len(set(batch["id"].tolist())) == 10
    for at, row in enumerate(batch["id"]):
        asked, better, worse = HH[row]
        text = decoded(batch, at, 0)
        assert text.startswith("<|im_start|>user\n" + asked.split("\n\nHuman: ")[1].split("\n\nAssistant:")[0])
        if row != 8:  # there the chosen side has a further turn of the user
            assert learnt(batch, at, 0) == better.strip() + "<|im_end|>"
        assert learnt(batch, at, 1) == worse.strip() + "<|im_end|>"
        assert decoded(batch, at, 1).endswith("<|im_start|>assistant\n" + worse.strip() + "<|im_end|>\n")


def test_transcripts_stay_text_without_a_template(tmp_path):
    rows = [{"chosen": asked + better, "rejected": asked + worse} for asked, better, worse in HH[:3]]
    data, _ = opened(tmp_path, rows, template=None, length=200)
    batch = data.source(0).batch(0, 3)
    for at, row in enumerate(batch["id"]):
        assert decoded(batch, at, 0) == "<|bos|>" + HH[row][0] + HH[row][1] + "<|im_end|>"
        assert learnt(batch, at, 1) == HH[row][2] + "<|im_end|>"


def test_prompts_are_explicit_or_the_common_beginning(tmp_path):
    """All forms of TRL give the same texts, and the same tokens to learn from."""
    chat = [user("2 + 2?")], [said("4")], [said("5")]
    forms = [
        {"prompt": chat[0], "chosen": chat[1], "rejected": chat[2]},
        {"chosen": chat[0] + chat[1], "rejected": chat[0] + chat[2]},
        {"prompt": chat[0], "chosen": chat[0] + chat[1], "rejected": chat[0] + chat[2]},
        {"prompt": "2 + 2?", "chosen": chat[0] + chat[1], "rejected": chat[0] + chat[2]},
    ]
    found = [pair.texts for form in forms for pair in read(tmp_path, form)]
    assert all(text.messages == tuple(chat[0] + chat[1 + side]) for texts in found for side, text in enumerate(texts))
    assert {text.asked for texts in found for text in texts} == {1}
    plain = read(
        tmp_path,
        {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."},
        {"chosen": "The sky is blue.", "rejected": "The sky is green."},
    )
    assert [[(text.text, text.prompt) for text in pair.texts] for pair in plain] == [
        [("The sky is blue.", 10), ("The sky is green.", 10)]
    ] * 2
    assert plain[0].prompt == plain[1].prompt


def test_parquet_reads_as_json_lines_do(tmp_path):
    row = {"prompt": [user("a")], "chosen": [said("b")], "rejected": [said("c")], "weight": 2.0, "annotator": "ann"}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "votes.parquet")
    path = str(tmp_path / "votes.parquet")
    (there,) = read_pairs(PreferenceData(path=path), path)
    (here,) = read(tmp_path, row)
    assert there.texts[0].messages == here.texts[0].messages and there.weight == here.weight == 2
    assert there.annotator == here.annotator == "ann"


def test_a_table_of_text_holds_numbers_too(tmp_path):
    (tmp_path / "votes.csv").write_text("prompt,chosen,rejected,weight,label\np,a,b,2.5,\np,a,c,,0.75\n")
    path = str(tmp_path / "votes.csv")
    found = read_pairs(PreferenceData(path=path), path)
    assert [(pair.weight, pair.label) for pair in found] == [(2.5, 1.0), (1.0, 0.75)]


def test_what_a_vote_says_beside_its_texts(tmp_path):
    rows = [
        {"prompt": "p", "chosen": "a", "rejected": "b", "weight": 3, "margin": 0.5, "label": 0.8, "annotator": "x"},
        {"prompt": "p", "chosen": "a", "rejected": "c", "label": "tie"},
    ]
    data, _ = opened(tmp_path, rows, length=16)
    batch = data.source(0).batch(0, 2)
    order = np.argsort(batch["id"])
    np.testing.assert_allclose(batch["weight"][order], [3, 1])
    np.testing.assert_allclose(batch["margin"][order], [0.5, 0])
    np.testing.assert_allclose(batch["label"][order], [0.8, 0.5])
    renamed = PreferenceColumns(weight="sure", margin=None)
    (pair,) = read(tmp_path, {"chosen": "a", "rejected": "b", "sure": 4, "margin": -1}, columns=renamed)
    assert pair.weight == 4 and pair.margin is None


def test_all_votes_on_a_prompt_are_on_one_side(tmp_path):
    rows = [{"prompt": f"q{at % 30}", "chosen": f"a{at}", "rejected": f"b{at}"} for at in range(120)]
    config = PreferenceData(path=write(tmp_path, rows), valid=Share(0.3))
    found = read_judgements(config)
    train, valid = {pair.prompt for pair in found.train}, {pair.prompt for pair in found.valid}
    assert not train & valid and len(train | valid) == 30 and len(valid) > 3
    held = found.opened(TOKENIZER).valid
    assert len(set(held.clusters[:, 0].tolist())) == len(valid)


@pytest.mark.parametrize(
    ("too_long", "left"), [("cut_start", "+end<|im_end|>"), ("cut_end", "<|bos|>0123456"), ("drop", None)]
)
def test_a_cut_is_told_with_its_sides(tmp_path, too_long, left):
    rows = [
        {"prompt": "", "chosen": "0123456789+end", "rejected": "no"},
        {"prompt": "", "chosen": "yes", "rejected": "not"},
    ]
    data, remarks = opened(tmp_path, rows, length=8 if left != "+end<|im_end|>" else 5, too_long=too_long)
    told = [one for one in remarks if "chosen and" in one]
    assert len(told) == 1 and "1 chosen and 0 rejected of 2" in told[0]
    source = data.source(0)
    batch = source.batch(0, source.examples)
    assert source.examples == (1 if left is None else 2)
    if left is not None:
        (at,) = np.flatnonzero(batch["id"] == 0)
        assert decoded(batch, at, 0) == left
    assert (batch["tokens"].shape[1:]) == (2, data.source(0).length)


def test_pairs_that_a_cut_makes_equal_are_left_out_or_refused(tmp_path):
    same = {"prompt": "a long prompt", "chosen": "x", "rejected": "y"}
    with pytest.raises(UserError, match=r"no pair is left to learn from within data\.length 4"):
        opened(tmp_path, [same], length=4, too_long="cut_end")
    data, remarks = opened(
        tmp_path, [same, {"prompt": "", "chosen": "1", "rejected": "2"}], length=4, too_long="cut_end"
    )
    assert data.source(0).examples == 1
    assert any("1 of 2 pairs have the same tokens on both sides" in one and "votes.jsonl:1" in one for one in remarks)


def test_an_id_that_is_padding_elsewhere_is_none_here(tmp_path):
    """The marks of padding and of the end inside of a text are tokens of it: lengths tell what is padding."""
    data, _ = opened(tmp_path, [{"prompt": "", "chosen": "a<|pad|>b", "rejected": "c"}], length=8)
    batch = data.source(0).batch(0, 1)
    assert batch["segment"][0].sum(axis=1).tolist() == [5, 3]
    assert batch["position"][0, 0].tolist() == [0, 1, 2, 3, 4, 0, 0, 0]
    assert batch["mask"][0, 0].sum() == 4  # the last token predicts nothing


def test_evaluation_reads_every_pair_once_and_pads(tmp_path):
    rows = [{"prompt": "", "chosen": f"a{at}", "rejected": f"b{at}"} for at in range(5)]
    data, _ = opened(tmp_path, rows, length=8)
    pairs = data.source(0).pairs
    batches = list(PairBatches(pairs, 4))
    assert [batch["part/row"].tolist() for batch in batches] == [[0, 1, 2, 3], [4, -1, -1, -1]]
    assert decoded(batches[0], 0, 0).endswith("a0<|im_end|>") and decoded(batches[0], 1, 0).endswith("b1<|im_end|>")
    assert batches[1]["weight"].tolist() == [1, 0, 0, 0] and not batches[1]["segment"][1:].any()


def test_agreement_and_the_ceiling_that_it_implies(tmp_path):
    """Of three votes on a pair, in either order, one differs: of three pairs of votes one is alike."""
    votes = [("a", "b"), ("a", "b"), ("b", "a")]
    pairs = read(tmp_path, *({"prompt": "p", "chosen": a, "rejected": b} for a, b in votes))
    assert of_preferences(pairs).agreement == pytest.approx(1 / 3)
    assert of_preferences(pairs).ceiling is None  # below one half nothing is implied
    more = read(tmp_path, *({"prompt": f"p{k}", "chosen": "a", "rejected": "b"} for k in range(8) for _ in range(2)))
    whole = of_preferences([*pairs, *more])
    assert whole.agreement == pytest.approx(9 / 11) and whole.judged_twice == 11
    q = whole.ceiling
    assert q**2 + (1 - q) ** 2 == pytest.approx(9 / 11)


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"prompt": "p", "chosen": "a", "rejected": "a"}, "are equal, so that nothing is preferred"),
        ({"prompt": "p", "chosen": "a"}, "no column 'rejected'"),
        ({"prompt": "p", "chosen": "a", "rejcted": "b"}, "did you mean 'rejcted'"),
        ({"prompt": "p", "chosen": "", "rejected": "b"}, "column 'chosen' is empty"),
        ({"prompt": "p", "chosen": "a", "rejected": None}, "column 'rejected' is null"),
        ({"prompt": None, "chosen": "a", "rejected": "b"}, "column 'prompt' is null"),
        ({"prompt": "p", "chosen": "a", "rejected": [said("b")]}, "'chosen' is text and 'rejected' a list"),
        ({"prompt": [user("p")], "chosen": "a", "rejected": "b"}, "'prompt' is a list and 'chosen' text"),
        (
            {"prompt": "q", "chosen": [user("p"), said("a")], "rejected": [user("p"), said("b")]},
            "does not begin with it",
        ),
        ({"chosen": [user("p"), said("a")], "rejected": [user("q"), said("b")]}, "no message in common"),
        (
            {"chosen": [user("p"), user("a")], "rejected": [user("p"), said("b")]},
            "'chosen' has no answer of the assist",
        ),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "weight": -1}, "column 'weight' is -1"),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "margin": "big"}, "column 'margin' is \"big\""),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "label": 2}, 'expected "tie" or the probability'),
        ({"prompt": "p", "chosen": "a\0", "rejected": "b"}, "NUL"),
    ],
)
def test_a_row_that_is_wrong_is_told_with_its_line(tmp_path, row, what):
    with pytest.raises(UserError) as caught:
        read(tmp_path, {"prompt": "p", "chosen": "a", "rejected": "b"}, row)
    assert "votes.jsonl:2: " in str(caught.value) and what in str(caught.value)
    assert "\n" not in str(caught.value)


def test_labels_of_the_rejected_text_are_told(tmp_path):
    _, remarks = opened(tmp_path, [{"chosen": "a", "rejected": "b", "label": 0}], length=8)
    assert any("1 labels are below 0.5" in one for one in remarks)

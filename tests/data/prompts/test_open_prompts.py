"""Prompts out of files: read with their columns, split by what they ask, and turned into the tokens of a policy."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from jaxops.config.load import from_dict
from jaxops.core.failures import UserError
from jaxops.data.loader import build_batches
from jaxops.data.prompts.encode import form_of
from jaxops.data.prompts.open import open_prompts
from jaxops.data.prompts.preview import preview
from jaxops.data.prompts.spec import BeginningData, PromptData
from jaxops.data.prompts.writer import PromptWriter
from jaxops.data.text.byte_tokenizer import ByteTokenizer
from jaxops.data.text.heldout import read_parts
from jaxops.data.text.spec import Share, TextData
from jaxops.run.pretrained.prompt_commands import inspect_prompts, preview_prompts

WORDS = ByteTokenizer()
ROWS = [{"prompt": f"what is {at} + {at}?", "answer": str(2 * at), "level": at % 3} for at in range(12)]
MESSAGES = [{"role": "system", "content": "be short"}, {"role": "user", "content": "hello"}]


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def opened(path, rows=None, seed=0, words=WORDS, **values):
    if rows is not None:
        jsonl(path, rows)
    path = str(path) if not isinstance(path, list) else path
    return open_prompts(from_dict(PromptData, {"path": path, **values}, [], source="test").config, words, seed)


@pytest.fixture
def file(tmp_path):
    return tmp_path / "prompts.jsonl"


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "csv"])
def test_every_format_gives_the_same_prompts_and_columns(tmp_path, kind):
    path = tmp_path / f"prompts.{kind}"
    table = pa.Table.from_pylist([row | {"level": f"l{row['level']}"} for row in ROWS])
    if kind == "jsonl":
        jsonl(path, table.to_pylist())
    else:
        pq.write_table(table, path) if kind == "parquet" else pa.csv.write_csv(table, path)
    found = opened(path)
    assert found.columns == ("answer", "level") and found.train.examples == 12 and found.valid is None
    assert found.train.columns(3) == {"answer": "6", "level": "l0"}
    assert found.train.text(3) == "what is 3 + 3?"
    # The digest is of what is read, whatever the file.
    assert found.inspection["digest"] == opened(tmp_path / "again.jsonl", table.to_pylist()).inspection["digest"]


def test_a_text_is_a_users_turn_or_is_continued_as_it_is(file):
    chat, plain = opened(file, ROWS), opened(file, ROWS, template="none")
    assert WORDS.decode(chat.train.ids_of(1)) == "<|im_start|>user\nwhat is 1 + 1?<|im_end|>\n<|im_start|>assistant\n"
    assert plain.train.ids_of(1) == [WORDS.bos, *WORDS.encode("what is 1 + 1?")]
    assert chat.train.text(1) == plain.train.text(1) == "what is 1 + 1?"
    for found, template in ((chat, "chat"), (plain, "none")):  # the very tokens that `sample` asks with
        writer = PromptWriter(form_of(PromptData(path="", template=template)), WORDS, print)
        assert [found.train.ids_of(at) for at in range(12)] == [writer.ids(("a", row)) for row in ROWS]


def test_conversations_are_asked_without_the_answer_that_they_end_with(file):
    answered = [*MESSAGES, {"role": "assistant", "content": "hi"}]
    found = opened(file, [{"prompt": MESSAGES, "x": 1}, {"prompt": answered, "x": 2}], template="none")
    assert found.train.ids_of(0) == found.train.ids_of(1) and found.train.text(0) == found.train.text(1) == MESSAGES
    assert found.inspection["copies"] == 1
    assert any("in 1 of 2 prompts the assistant has the last turn" in note for note in found.inspection["notes"])
    assert any("prompts.jsonl:2 repeats" in note for note in found.inspection["notes"])


def test_tools_and_arguments_of_a_row_reach_the_template(file):
    template = "{% for t in tools or [] %}<{{ t.name }}>{% endfor %}{{ think }}{{ word }}:{{ messages[0].content }}"
    rows = [{"prompt": "a", "tools": [{"name": "look"}], "chat_template_kwargs": {"think": "T"}}, {"prompt": "b"}]
    found = opened(file, rows, words=WORDS.with_template(template), arguments={"word": "W"})
    assert [WORDS.decode(found.train.ids_of(at)) for at in range(2)] == ["<look>TW:a", "W:b"]
    silent = opened(file, rows[:1], words=WORDS.with_template("{{ messages[0].content }}"))
    assert any("leaves out or rewrites" in note for note in silent.inspection["notes"])


def test_a_batch_is_padded_on_the_right_and_is_a_pure_function_of_the_cursor(file):
    rows = [{"prompt": "x" * (1 + at)} for at in range(11)]
    train = opened(file, rows, seed=3, template="none").train
    assert train.examples == 11 and train.width == 16
    batch = train.batch(0, 22)
    assert {name: (x.dtype, x.shape) for name, x in batch.items()} == {
        "id": (np.int32, (22,)),
        "tokens": (np.int32, (22, 16)),
        "length": (np.int32, (22,)),
        "weight": (np.float32, (22,)),
    }
    for at, example in enumerate(batch["id"]):
        ids = train.ids_of(example)
        assert batch["tokens"][at].tolist() == ids + [WORDS.pad] * (16 - len(ids)) and batch["length"][at] == len(ids)
    assert sorted(batch["id"][:11]) == sorted(batch["id"][11:]) == list(range(11))
    assert batch["id"][:11].tolist() != batch["id"][11:].tolist()
    halves = build_batches(train, 0, 22, [(0, 9), (9, 22)])
    for name, x in batch.items():
        np.testing.assert_array_equal(halves[name], x)
    again, other = (opened(file, seed=seed, template="none").train.batch(0, 22)["id"] for seed in (3, 4))
    assert again.tolist() == batch["id"].tolist() != other.tolist()
    with pytest.raises(IndexError, match="no prompt -1"):
        train.columns(-1)


def test_a_prompt_that_is_too_long_is_dropped_or_cut_and_said(file):
    rows = [{"prompt": "abcdef", "at": 0}, {"prompt": "ab", "at": 1}, {"prompt": "abcdefgh", "at": 2}]
    dropped = opened(file, rows, template="none", max_tokens=5)
    assert dropped.train.examples == 1 and dropped.train.columns(0) == {"at": 1} and dropped.train.width == 5
    assert dropped.inspection["train"] == {"prompts": 1, "tokens": 3, "longest": 3, "too_long": 2, "empty": 0}
    assert "2 of 3 prompts are longer than data.max_tokens 5 and are left out" in dropped.inspection["notes"][0]
    assert "9 tokens" in dropped.inspection["notes"][0] and "prompts.jsonl:3" in dropped.inspection["notes"][0]
    cut = opened(file, rows, template="none", max_tokens=5, too_long="cut_start")
    # The begin token, which models need to see, outlives a cut.
    expected = [[WORDS.bos, *WORDS.encode(text)] for text in ("cdef", "ab", "efgh")]
    assert [cut.train.ids_of(at) for at in range(3)] == expected
    assert cut.train.text(0) == "abcdef" and "lose their beginning" in cut.inspection["notes"][0]
    chat = opened(file, rows[:1], max_tokens=5, too_long="cut_start")
    assert WORDS.decode(chat.train.ids_of(0)) == "tant\n"
    with pytest.raises(UserError, match=r"train: no prompt is left of 1: 1 are longer than data.max_tokens 1"):
        opened(file, template="none", max_tokens=1)


def test_prompts_of_no_token_are_left_out_and_said(file):
    class Mute(ByteTokenizer):
        def encode(self, text, special=False):
            return super().encode(text.replace("x", ""), special)

    found = opened(file, [{"prompt": "xx"}, {"prompt": "ay"}], words=Mute(), template="none")
    assert found.train.examples == 1 and found.train.text(0) == "ay" and found.inspection["train"]["empty"] == 1
    assert "1 of 2 prompts become no token and are left out, the first" in found.inspection["notes"][0]
    with pytest.raises(UserError, match=r"no prompt is left of 1: 0 are longer .*, 1 become no token"):
        opened(file, [{"prompt": "x"}], words=Mute(), template="none")


def test_a_share_is_held_out_by_what_is_asked(file):
    rows = [row | {"rater": rater} for row in ROWS for rater in range(2)]
    found = opened(file, rows, valid={"share": 0.3})
    sides = [{part.text(at) for at in range(part.examples)} for part in (found.train, found.valid)]
    assert sides[0] | sides[1] == {row["prompt"] for row in ROWS} and not sides[0] & sides[1]
    assert found.train.examples + found.valid.examples == 24 and found.inspection["copies"] == 12
    # A prompt keeps its side whatever else is in its row, in the file, or whether it is written as messages.
    other = [{"prompt": [{"role": "user", "content": row["prompt"]}], "new": 1} for row in ROWS[:6]]
    again = opened(file, other, valid={"share": 0.3})
    kept = {again.train.text(at)[0]["content"] for at in range(again.train.examples)}
    assert kept == sides[0] & {row["prompt"] for row in ROWS[:6]}
    with pytest.raises(UserError, match="leaves nothing to train on"):
        opened(file, ROWS[:1], valid={"share": 0.3})


def test_held_out_files_are_compared_with_those_of_training(file, tmp_path):
    held = jsonl(tmp_path / "held.jsonl", [{"prompt": "what is 3 + 3?"}, {"prompt": "y" * 200}])
    found = opened(file, ROWS, valid=held)
    assert found.valid.examples == 2 and found.valid.columns(1) == {"answer": None, "level": None}
    assert found.valid.width > found.train.width == opened(file).train.width
    notes = " ".join(found.inspection["notes"])
    assert "1 of 2 prompts of data.valid are in data.path too" in notes
    assert "valid: of 2 prompts some have no column 'answer' in 2, 'level' in 2, which is None there" in notes
    assert found.inspection["digest"] != opened(file).inspection["digest"]


def test_the_digest_follows_columns_and_tokens(file):
    digest = lambda rows, **values: opened(file, rows, **values).inspection["digest"]
    base = digest(ROWS)
    assert base == digest(ROWS, seed=1)
    assert base != digest([ROWS[0] | {"answer": "x"}, *ROWS[1:]])
    assert base != digest(ROWS, template="none") and base != digest(ROWS[::-1])


def test_lines_of_text_are_prompts(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffone\u2028still\r\n\n".encode())
    (tmp_path / "b.txt").write_text("two\n")
    found = opened(tmp_path / "*.txt", columns={"prompt": "question"})
    assert [found.train.text(at) for at in range(2)] == ["one\u2028still", "two"] and found.columns == ()
    jsonl(tmp_path / "c.jsonl", ROWS)
    with pytest.raises(UserError, match="different formats"):
        opened([str(tmp_path / "a.txt"), str(tmp_path / "c.jsonl")])
    (tmp_path / "a.txt").write_bytes(b"\xff")
    with pytest.raises(UserError, match=r"a.txt .*expected a text file with a prompt a line"):
        opened(tmp_path / "a.txt")


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"prompt": None}], "prompts.jsonl:1: column 'prompt' is null"),
        ([{"prompt": ""}], "column 'prompt' is empty"),
        ([{"prompt": " \n"}], "column 'prompt' holds blanks alone"),
        ([{"prompt": "a"}, {"prompt": 3}], r"prompts.jsonl:2: column 'prompt' is a number \(3\), expected text"),
        ([{"prompt": {"a": 1}}], "is an object"),
        ([{"promt": "a"}], "no column 'prompt'; did you mean 'promt'.*name it with `columns:`"),
        ([{"prompt": []}], "has no message"),
        ([{"prompt": [{"role": "assistant", "content": "a"}]}], "has nothing but an answer"),
        ([{"prompt": [{"role": "human", "content": "a"}]}], "unknown role 'human'"),
        ([{"prompt": "a", "tools": 3}], "column 'tools' is a number"),
        ([{"prompt": "a\0"}], "NUL"),
        ([], "the data files are empty"),
    ],
)
def test_what_is_no_prompt_is_told_with_its_row(file, rows, said):
    with pytest.raises(UserError, match=said):
        opened(file, rows)


def test_wrong_rows_are_told_together_and_a_missing_column_once(file, tmp_path):
    with pytest.raises(UserError, match=r"2 row\(s\) .*\n.*prompts.jsonl:1: .* null\n.*prompts.jsonl:3: .* empty"):
        opened(file, [{"prompt": None}, {"prompt": "a"}, {"prompt": ""}])
    pq.write_table(pa.table({"question": ["a", "b"]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a.parquet: no column 'prompt'.*there are: question"):
        opened(tmp_path / "a.parquet")


def test_a_template_that_is_not_there_or_refuses_is_told(file):
    class Bare(ByteTokenizer):
        def __init__(self):
            super().__init__()
            self.template = None

    with pytest.raises(UserError, match=r"data.template: `chat` needs a chat template.*`template: none`"):
        opened(file, ROWS, words=Bare())
    assert opened(file, ROWS, words=Bare(), template="none").train.examples == 12
    with pytest.raises(UserError, match=r"prompts.jsonl:1: messages need a chat template"):
        opened(file, [{"prompt": MESSAGES}], words=Bare(), template="none")
    with pytest.raises(UserError, match=r"prompts.jsonl:1: .* refuses the conversation: no"):
        opened(file, ROWS, words=WORDS.with_template("{{ raise_exception('no') }}"))
    dated = WORDS.with_template("{{ strftime_now('%Y') }}")
    with pytest.raises(UserError, match="fix the date"):
        opened(file, ROWS, words=dated)
    assert WORDS.decode(opened(file, ROWS, words=dated, date="2026-01-31").train.ids_of(0)) == "2026"


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"template": "chta"}, "template"),
        ({"too_long": "cut_end"}, "too_long"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"columns": {"promt": "a"}}, "did you mean 'prompt'"),
        ({"valid": {"share": 1.5}}, "share"),
    ],
)
def test_a_config_that_means_nothing_is_told(file, values, said):
    with pytest.raises(UserError, match=said):
        opened(file, ROWS, **values)


def test_control_words_in_a_message_are_said(file):
    found = opened(file, [{"prompt": "a<|im_end|>b"}])
    assert any("holds the words of a control token" in note for note in found.inspection["notes"])


def test_the_preview_and_the_inspection_show_what_the_model_reads(file):
    found = opened(file, ROWS, valid={"share": 0.3})
    (first,) = found.train.batch(0, 1)["id"].tolist()
    text = preview(found.train, WORDS, 1)
    assert f"prompt {first}: " in text and "\n<|im_start|>assistant\n" in text
    assert f"answer: {json.dumps(found.train.columns(first)['answer'])}" in text
    shown = preview_prompts(found, WORDS)
    assert text.splitlines()[0] == shown.rows[0][0] and shown.json["prompts"].startswith(text)
    rows = dict(inspect_prompts(found).rows)
    assert rows["train"].startswith(f"prompts {found.train.examples}, tokens ") and rows["columns"] == "answer, level"
    assert rows["digest"] == found.inspection["digest"]


def test_the_first_words_of_texts_are_asked_and_the_whole_texts_say_what_is_held_out(file):
    texts = [f"  one two\n{at % 3} four and {at} more" for at in range(40)] + ["short text"]
    jsonl(file, [{"text": text, "stars": at} for at, text in enumerate(texts)])
    found = opened(file, columns={"prompt": "text"}, template="none", valid={"share": 0.3})
    cut = opened_cut(file, 3)
    assert cut.train.text(0) in {f"  one two\n{digit}" for digit in range(3)} and cut.columns == ("stars",)
    assert any(cut.train.text(at) == "short text" for at in range(cut.train.examples)) or (
        cut.valid.text(cut.valid.examples - 1) == "short text"
    )
    for part in ("train", "valid"):  # the same rows on the same sides, though many of the prompts are alike
        whole, short = getattr(found, part), getattr(cut, part)
        stars = [[one.columns(at)["stars"] for at in range(one.examples)] for one in (whole, short)]
        assert stars[0] == stars[1] and len(stars[0]) > 3
    # A run on the texts themselves holds out the same ones.
    _, held, _ = read_parts(TextData(path=str(file), valid=Share(0.3)))
    rated = [at for at, text in enumerate(texts) if text in {one.text for one in held}]
    assert rated == [cut.valid.columns(at)["stars"] for at in range(cut.valid.examples)]


def opened_cut(path, count, **values):
    config = {"path": str(path), "words": count, "valid": {"share": 0.3}, **values}
    return open_prompts(from_dict(BeginningData, config, [], source="test").config, WORDS, 0)


def test_messages_have_no_first_words(file):
    jsonl(file, [{"text": MESSAGES}])
    with pytest.raises(UserError, match=r"prompts\.jsonl:1: column 'text' holds messages"):
        opened_cut(file, 3)

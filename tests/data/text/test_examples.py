"""Rows of text data in all their forms, right and wrong: each mistake is told with its file and line."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxops.core.failures import UserError
from jaxops.data import notes
from jaxops.data.text import formats
from jaxops.data.text.formats import read_examples
from jaxops.data.text.heldout import read_parts
from jaxops.data.text.spec import ChatColumns, ChatData, CompletionColumns, CompletionData, Share, TextColumns, TextData

USER, BOT = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}


def lines(path, rows):
    path.write_bytes(b"\n".join(row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows))
    return str(path)


def read(config, rows, tmp_path):
    return read_examples(config, lines(tmp_path / "a.jsonl", rows))


def chat(*messages):
    return {"messages": list(messages)}


def test_the_three_forms_in_json_lines_and_parquet(tmp_path):
    calls = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    forms = [
        (TextData(path="x"), [{"text": "a b"}, {"text": " c\n", "more": 1}]),
        (ChatData(path="x"), [chat(USER, BOT), chat({"role": "system", "content": "é"}, USER, calls, BOT)]),
        (CompletionData(path="x"), [{"prompt": "2+2=", "completion": " 4"}, {"prompt": "", "completion": "4"}]),
        (CompletionData(path="x"), [{"prompt": [USER], "completion": [BOT]}]),
    ]
    for at, (config, rows) in enumerate(forms):
        found = read(config, rows, tmp_path)
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"{at}.parquet")
        assert [one.digest() for one in read_examples(config, str(tmp_path / f"{at}.parquet"))] == [
            one.digest() for one in found
        ]
        assert len({one.digest() for one in found}) == len(rows)
    text, conversation, pair, asked = (read(config, rows, tmp_path) for config, rows in forms)
    assert [one.text for one in text] == ["a b", " c\n"] and text[1].where.endswith("a.jsonl:2")
    assert conversation[1].messages[2] == {"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}
    assert (pair[0].text, pair[0].prompt) == ("2+2= 4", 4)
    assert (asked[0].messages, asked[0].asked) == ((USER, BOT), 1)


def test_other_columns_tools_and_csv(tmp_path):
    row = {"said": [USER, BOT], "fns": '[{"name": "f"}]', "chat_template_kwargs": {"enable_thinking": False}}
    (found,) = read(ChatData(path="x", columns=ChatColumns(messages="said", tools="fns")), [row], tmp_path)
    assert found.tools == ({"name": "f"},) and found.arguments == {"enable_thinking": False}
    (tmp_path / "b.csv").write_text('question,answer\n"a, b",c\n')
    columns = CompletionColumns(prompt="question", completion="answer")
    (pair,) = read_examples(CompletionData(path="x", columns=columns), str(tmp_path / "b.csv"))
    assert (pair.text, pair.prompt) == ("a, bc", 4)


CHAT_MISTAKES = [
    ([chat(USER)], "a.jsonl:1: the conversation has no assistant turn"),
    ([chat()], "'messages' has no message"),
    ([{"messages": "hi"}], r"'messages' is text \(\"hi\"\), expected a list of messages"),
    ([{"messages": ["hi"]}], r"messages\[0\] is text"),
    ([{"message": [USER]}], "no column 'messages'; did you mean 'message'"),
    ([{"messages": None}], "'messages' is null"),
    ([chat({"content": "x"})], r"messages\[0\] has no role"),
    ([chat({"from": "human", "value": "x"})], "form of ShareGPT"),
    ([chat(USER, {"role": "asistant", "content": "x"})], "unknown role 'asistant'; did you mean 'assistant'"),
    ([chat(USER, {"role": "assistant"})], r"messages\[1\]: the assistant turn has no content"),
    ([chat(USER, {"role": "assistant", "content": " \n"})], "the assistant turn is empty"),
    ([chat(USER, {"role": "assistant", "content": 4})], "the content is a number"),
    ([chat({"role": "user", "content": [{"type": "image"}]}, BOT)], "parts other than text are not read"),
    ([chat(USER, {"role": "assistant", "content": "a\0b"})], "NUL .* after 1 characters"),
    ([chat(USER, {"role": "assistant", "content": "\ud83d"})], "half of a character"),
    ([chat(USER, {"role": "assistant", "content": "\ufdd0"})], "noncharacter"),
    ([chat(USER, BOT) | {"tools": "[1"}], "'tools' is no JSON"),
    ([chat(USER, BOT) | {"tools": {}}], "'tools' is an object"),
    ([chat(USER, BOT) | {"chat_template_kwargs": 3}], "'chat_template_kwargs' is a number"),
    ([chat(USER, BOT), b'{"messages": [\xff]}'], r"a.jsonl:2: no UTF-8 text: byte 15 of the line is 0xff"),
    ([chat(USER, BOT), b"", b'{"messages": '], "a.jsonl:3: not JSON"),
    ([b'[{"messages": []}]'], "write one object a line"),
    ([b"[", b"{}", b"]"], "write one object a line"),
    ([b"3"], "expected a JSON object a line, got 3"),
    ([b"", b"  "], "the data files are empty"),
]


@pytest.mark.parametrize("rows, message", CHAT_MISTAKES)
def test_a_wrong_conversation(rows, message, tmp_path):
    with pytest.raises(UserError, match=message):
        read(ChatData(path="x"), rows, tmp_path)


@pytest.mark.parametrize(
    "row, message",
    [
        ({"prompt": "a", "completion": ""}, "'completion' is empty"),
        ({"prompt": "a", "completion": " "}, "'completion' holds blanks alone"),
        ({"prompt": "a", "completion": [BOT]}, "'prompt' is text and 'completion' a list; both are text"),
        ({"prompt": [USER], "completion": [USER]}, "'completion' has no assistant turn"),
        ({"prompt": 3, "completion": 4}, "'prompt' is a number"),
        ({"prompt": "a", "response": "b"}, r"no column 'completion' \(there are: prompt, response\)"),
    ],
)
def test_a_wrong_pair(row, message, tmp_path):
    with pytest.raises(UserError, match=message):
        read(CompletionData(path="x"), [row], tmp_path)


def test_all_wrong_rows_are_counted_and_the_first_listed(tmp_path):
    with pytest.raises(UserError) as failed:
        read(TextData(path="x"), [{"text": ""}, {"text": "a"}] * 10, tmp_path)
    said = str(failed.value).splitlines()
    assert said[0] == "10 row(s) cannot be learnt from:" and len(said) == 10
    assert said[1].endswith("a.jsonl:1: column 'text' is empty") and said[-1].strip() == "... and 2 more"


def test_a_wrong_column_of_parquet(tmp_path):
    pq.write_table(pa.table({"txt": ["a"], "raw": [b"\xff"]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a.parquet: no column 'text'; did you mean 'txt'"):
        read_examples(TextData(path="x"), str(tmp_path / "a.parquet"))
    with pytest.raises(UserError, match=r"a.parquet, row 1: column 'raw' is b'\\xff', which is no UTF-8"):
        read_examples(TextData(path="x", columns=TextColumns(text="raw")), str(tmp_path / "a.parquet"))


def test_json_lines_are_read_whole_across_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "BLOCK", 7)
    rows = [{"text": f"{at} " + "é" * at} for at in range(100)]
    (tmp_path / "b.jsonl").write_bytes(
        b"\xef\xbb\xbf" + "\r\n".join(json.dumps(r, ensure_ascii=False) for r in rows).encode()
    )
    found = read_examples(TextData(path="x"), str(tmp_path / "b.jsonl"))
    assert [one.text for one in found] == [row["text"] for row in rows]


def test_copies_are_said_and_never_straddle_the_split(tmp_path):
    rows = [{"text": f"text {at % 200}"} for at in range(500)]
    config = TextData(path=lines(tmp_path / "a.jsonl", rows), valid=Share(share=0.2))
    with notes.collected() as told:
        train, valid, copies = read_parts(config)
    assert copies == 300 and "300 of 500 examples are exact copies" in told[0]
    assert "a.jsonl:201 repeats" in told[0]
    assert len(train) + len(valid) == 500
    assert not {one.text for one in train} & {one.text for one in valid}
    assert 20 <= len({one.text for one in valid}) <= 60
    more = [*rows, *({"text": f"new {at}"} for at in range(100))]
    lines(tmp_path / "a.jsonl", more[::-1])
    _, later, _ = read_parts(config)
    assert (
        {one.text for one in valid}
        <= {one.text for one in later}
        <= {one.text for one in valid} | {row["text"] for row in more[500:]}
    )


def test_copies_may_be_dropped(tmp_path):
    rows = [{"text": text} for text in "abcab"]
    train, valid, copies = read_parts(TextData(path=lines(tmp_path / "a.jsonl", rows), copies="drop"))
    assert [one.text for one in train] == ["a", "b", "c"] and not valid and copies == 2


def test_a_share_of_few_examples_holds_one_out_and_never_all(tmp_path):
    path = lines(tmp_path / "a.jsonl", [{"text": f"text {at}"} for at in range(3)])
    with notes.collected() as told:
        train, valid, _ = read_parts(TextData(path=path, valid=Share(share=0.001)))
    assert (len(train), len(valid)) == (2, 1) and "one is held out" in told[0]
    with pytest.raises(UserError, match="leaves nothing to train on: 3 different"):
        read_parts(TextData(path=path, valid=Share(share=0.9999)))


def test_a_held_out_file_that_training_knows_is_told(tmp_path):
    path = lines(tmp_path / "a.jsonl", [{"text": "a"}, {"text": "b"}])
    held = lines(tmp_path / "v.jsonl", [{"text": "b"}, {"text": "c"}])
    with notes.collected() as told:
        train, valid, _ = read_parts(TextData(path=path, valid=held))
    assert len(train) == len(valid) == 2 and "1 of 2 examples of data.valid are in data.path too" in told[0]


def test_calls_of_functions_written_as_json_text_are_read(tmp_path):
    calls = [{"function": {"name": "f", "arguments": "{}"}}]
    given = lambda value: [chat(USER, {"role": "assistant", "tool_calls": value})]
    (found,) = read(ChatData(path="x"), given(json.dumps(calls)), tmp_path)
    assert found.messages[1]["tool_calls"] == calls
    for wrong, said in [
        (5, "is a number"),
        (calls[0], "is an object"),
        ("{", "is no JSON"),
        ([5], "holds 5, expected a call"),
        ([{"function": {}}], "the name of its function"),
    ]:
        with pytest.raises(UserError, match=rf"a.jsonl:1: messages\[1\]: tool_calls .*{said}"):
            read(ChatData(path="x"), given(wrong), tmp_path)
    with pytest.raises(UserError, match="no content"):
        read(ChatData(path="x"), given("[]"), tmp_path)

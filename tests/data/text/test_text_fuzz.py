"""Any row and any conversation: it is learnt from as it says, or refused in words. Never a traceback, never a shift."""

import json
import pathlib

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxops.core.failures import UserError
from jaxops.data import notes
from jaxops.data.text.byte_tokenizer import ByteTokenizer
from jaxops.data.text.documents import tokenise
from jaxops.data.text.formats import ROLES, Example, read_examples
from jaxops.data.text.open_tokenizer import open_tokenizer
from jaxops.data.text.spec import ChatData, CompletionData, TextData

FIXTURES = pathlib.Path(__file__).parents[2] / "fixtures" / "text"
CHATS = json.loads((FIXTURES / "chats.json").read_text(encoding="utf-8"))
TOKENIZERS = {"tiny": open_tokenizer(str(FIXTURES / "tiny")), "bytes": ByteTokenizer()}
FUZZ = settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], max_examples=100)

WORDS = st.sampled_from(
    ["a", " ", "\n", "é", "🙂", "four", "\0", "<|im_end|>", "\ud83d", "\ufdd0", "\u2028", "\r", "\\"]
)
TEXT = st.lists(WORDS, max_size=4).map("".join)
VALUE = TEXT | st.none() | st.integers() | st.booleans() | st.floats(allow_nan=False) | st.lists(TEXT, max_size=2)
MESSAGE = st.fixed_dictionaries(
    {}, optional={"role": st.sampled_from([*ROLES, "human"]) | VALUE, "content": TEXT | VALUE, "tool_calls": VALUE}
)
MESSAGES = st.lists(MESSAGE | VALUE, max_size=3) | VALUE
ROW = st.fixed_dictionaries(
    {},
    optional={
        "text": VALUE,
        "messages": MESSAGES,
        "prompt": MESSAGES,
        "completion": MESSAGES,
        "tools": VALUE,
        "chat_template_kwargs": VALUE | st.fixed_dictionaries({"enable_thinking": VALUE}),
    },
)


@FUZZ
@given(rows=st.lists(ROW, min_size=1, max_size=2), kind=st.sampled_from([TextData, ChatData, CompletionData]))
def test_any_row_is_read_or_refused_in_words(rows, kind, tmp_path):
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = kind(path=str(tmp_path / "a.jsonl"))
    try:
        with notes.collected():
            found = tokenise(config, read_examples(config, config.path), ByteTokenizer())
    except UserError as error:
        assert "a.jsonl" in str(error) and "Traceback" not in str(error)
        return
    assert len(found) == len(rows) and found.trained.any()


@FUZZ
@given(line=st.binary(max_size=40))
def test_any_bytes_are_refused_in_words(line, tmp_path):
    (tmp_path / "a.jsonl").write_bytes(line)
    with pytest.raises(UserError, match=r"a\.jsonl"):
        read_examples(TextData(path="x"), str(tmp_path / "a.jsonl"))


SAID = st.lists(
    st.sampled_from(["a", " ", "\n", "é", "🙂", "four", "the cat", "<think>", ". ", "<b>"]), min_size=1
).map("".join)
CONVERSATION = st.lists(st.tuples(SAID, SAID.filter(str.strip)), min_size=1, max_size=3)


@FUZZ
@given(
    turns=CONVERSATION,
    name=st.sampled_from(["marked", "unmarked", "alternating"]),
    which=st.sampled_from(list(TOKENIZERS)),
)
def test_exactly_what_the_assistant_says_and_its_end_is_learnt_from(turns, name, which, tmp_path):
    """Decoding the tokens that are learnt from gives back the assistant's words, whatever they are."""
    path = tmp_path / f"{name}.jinja"
    path.write_text(CHATS["templates"][name], encoding="utf-8")
    messages = [
        {"role": role, "content": said}
        for turn in turns
        for role, said in zip(("user", "assistant"), turn, strict=True)
    ]
    tokenizer = TOKENIZERS[which]
    with notes.collected():
        found = tokenise(ChatData(path="x", template=str(path)), [Example("a:1", messages=tuple(messages))], tokenizer)
    runs = np.split(np.arange(len(found.tokens)), np.flatnonzero(np.diff(found.trained)) + 1)
    learnt = [tokenizer.decode(found.tokens[run].tolist()) for run in runs if found.trained[run[0]]]
    trimmed = (lambda said: said.strip()) if name == "alternating" else (lambda said: said)
    expected = [trimmed(said) + "<|im_end|>" for _, said in turns]
    # a tokenizer may take the line break before an answer together with its first blanks
    assert [one.lstrip("\n") for one in learnt] == [one.lstrip("\n") for one in expected]
    assert tokenizer.decode(found.tokens.tolist()).count("<|im_end|>") >= 2 * len(turns)

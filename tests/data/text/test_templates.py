"""Chat templates against transformers: the same text, the same ids, the same mask (tests/fixtures/text/make.py)."""

import datetime
import json
import pathlib

import pytest

from jaxops.core.failures import UserError
from jaxops.data.text.assistant import Ends, assistant_parts, completion_part
from jaxops.data.text.open_tokenizer import open_tokenizer
from jaxops.data.text.template import ChatTemplate

FIXTURES = pathlib.Path(__file__).parents[2] / "fixtures" / "text"
CHATS = json.loads((FIXTURES / "chats.json").read_text(encoding="utf-8"))
ENDS = Ends(("<|im_end|>",), ("<|im_end|>", "<|im_start|>", "<|bos|>"))


@pytest.fixture(scope="module")
def tiny():
    return open_tokenizer(str(FIXTURES / "tiny"))


def template(name, tiny, **arguments):
    return ChatTemplate(CHATS["templates"].get(name, name), tiny.words, arguments=arguments)


def learnt(rendered):
    return [rendered.text[start:stop] for start, stop in rendered.spans]


@pytest.mark.parametrize(
    "record", CHATS["records"], ids=lambda r: f"{r['template']}-{r['conversation']}-{r['prompt']}-{len(r['arguments'])}"
)
def test_text_ids_and_mask_are_those_of_transformers(record, tiny):
    messages = CHATS["conversations"][record["conversation"]]
    tools = [CHATS["tool"]] if record["template"] == "tools" and record["conversation"] == "calls" else None
    program = template(record["template"], tiny, **record["arguments"])
    if "refused" in record:
        with pytest.raises(UserError, match="refuses the conversation: roles must alternate"):
            program.render(messages, prompt=record["prompt"], tools=tools)
        return
    found = program.render(messages, prompt=record["prompt"], tools=tools)
    assert found.text == record["text"]
    (encoded,) = tiny.encode_batch([found.text])
    assert encoded.ids.tolist() == record["ids"]
    assert program.marked == ("mask" in record)
    if program.marked:
        assert encoded.inside(found.spans).astype(int).tolist() == record["mask"]


@pytest.mark.parametrize("name", ["one", "blanks", "two", "system", "unanswered", "thought"])
def test_spans_that_are_found_are_those_that_the_same_template_marks(name, tiny):
    messages = CHATS["conversations"][name]
    marked = template("marked", tiny)
    text = CHATS["templates"]["marked"]
    plain = ChatTemplate(text.replace("{%- generation %}", "").replace("{% endgeneration %}", ""), tiny.words)
    assert marked.marked and not plain.marked
    assert assistant_parts(plain, messages, ENDS) == marked.render(messages)


def test_spans_of_templates_without_marks(tiny):
    two = CHATS["conversations"]["two"]
    assert learnt(assistant_parts(template("unmarked", tiny), two, ENDS)) == [
        "Because air scatters blue light.<|im_end|>",
        "You are welcome.<|im_end|>",
    ]
    assert learnt(assistant_parts(template("alternating", tiny), two, ENDS)) == [
        "Because air scatters blue light.<|im_end|>",
        "You are welcome.<|im_end|>",
    ]


def test_a_template_that_always_asks_for_the_next_turn_teaches_nobody_to_ask(tiny):
    """Llama 3's template ends with the assistant's header whether it is asked to or not."""
    text = CHATS["templates"]["alternating"].replace("{%- if add_generation_prompt %}", "{%- if true %}")
    two = CHATS["conversations"]["two"]
    spans = learnt(assistant_parts(template(text, tiny), two, ENDS))
    assert spans == ["Because air scatters blue light.<|im_end|>", "You are welcome.<|im_end|>"]
    assert learnt(completion_part(template(text, tiny), two[:3], two[3:], ENDS)) == ["You are welcome.<|im_end|>"]
    quoted = [two[0], {"role": "assistant", "content": "a turn ends with <|im_end|> there"}]
    found = learnt(assistant_parts(template("unmarked", tiny), quoted, ENDS))
    assert found == ["a turn ends with <|im_end|> there<|im_end|>"]
    quoted[1] = {"role": "assistant", "content": "so<|im_end|> and so"}
    assert learnt(assistant_parts(template("unmarked", tiny), quoted, ENDS)) == ["so<|im_end|> and so<|im_end|>"]
    quoted[1] = {"role": "assistant", "content": "so<|im_end|>so"}
    assert learnt(assistant_parts(template("unmarked", tiny), quoted, ENDS)) == ["so<|im_end|>so<|im_end|>"]


def test_a_turn_that_is_rewritten_once_another_follows_ends_at_its_stop(tiny):
    thought = CHATS["conversations"]["thought"]
    assert learnt(assistant_parts(template("thinking", tiny), thought, ENDS)) == [
        "four<|im_end|>",
        "<think>\nseven then\n</think>\n\nseven<|im_end|>",
    ]


def test_what_the_prompt_already_holds_is_not_learnt_from(tiny):
    """The empty thought of `enable_thinking: false` is given, never written (NVIDIA-NeMo/Automodel#3739)."""
    one = CHATS["conversations"]["one"]
    quiet = template("thinking", tiny, enable_thinking=False)
    assert learnt(assistant_parts(quiet, one, ENDS)) == ["It is four.<|im_end|>"]
    assert learnt(completion_part(quiet, one[:1], one[1:], ENDS)) == ["It is four.<|im_end|>"]


def test_spans_that_cannot_be_told_are_refused_with_the_way_out(tiny):
    two, calls = CHATS["conversations"]["two"], CHATS["conversations"]["calls"]
    with pytest.raises(UserError, match=r"turn 2: .* rewrites earlier turns.* `turns: apart`"):
        assistant_parts(template("thinking", tiny, enable_thinking=False), two, ENDS)
    mark = "{{ '!' if loop.last and loop.index > 1 else ';' }}"
    ended = "{% for m in messages %}{{ m.role + ':' + m.content }}" + mark + "{% endfor %}"
    with pytest.raises(UserError, match="writes this turn in another way when it is the last"):
        assistant_parts(template(ended + "{{ 'assistant:' if add_generation_prompt }}", tiny), two, ENDS)
    with pytest.raises(UserError, match="begins with the assistant"):
        assistant_parts(template("unmarked", tiny), two[1:], ENDS)
    with pytest.raises(UserError, match="renders the prompt in another way"):
        completion_part(template("{{ messages | length }}" + ended, tiny), calls[:1], calls[1:], ENDS)


def test_a_filter_around_the_marks_keeps_the_spans_right(tiny):
    text = "{% set x %}ab{% generation %} c{% endgeneration %}d{% endset %}{{ x | trim }}{{ x | upper }}"
    assert learnt(template(text, tiny).render([])) == [" c", " C"]
    with pytest.raises(UserError, match="cut apart by a filter"):
        template("{% set x %}{% generation %}ab{% endgeneration %}{% endset %}{{ x[:2] }}", tiny).render([])
    with pytest.raises(UserError, match="inside"):
        nested = "{% generation %}a{% generation %}b{% endgeneration %}{% endgeneration %}"
        template(nested, tiny).render([])


def test_names_set_inside_a_mark_are_seen_after_it(tiny):
    text = "{% generation %}{% set a = 'x' %}{{ a }}{% endgeneration %}{{ a }}"
    assert template(text, tiny).render([]).text == "xx"


def test_todays_date_is_fixed_or_refused(tiny):
    text = "{{ strftime_now('%d %b %Y') }}"
    with pytest.raises(UserError, match="a run which is resumed tomorrow would read other text; fix the date"):
        template(text, tiny).render([])
    dated = ChatTemplate(text, {}, now=datetime.datetime(2026, 1, 31))
    assert dated.render([]).text == "31 Jan 2026"


@pytest.mark.parametrize(
    "text, message",
    [
        ("{% for m in messages %}", "line 1: Unexpected end of template"),
        ("\n{{ bos_token | nonsense }}", "line 2: No filter named 'nonsense'"),
        ("{{ messages[7].content }}", "UndefinedError: .*no element 7"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{{ ().__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
        ("{{ messages | tojson(indent=messages) }}", "TypeError"),
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
        ("{% for i in range(10 ** 9) %}x{% endfor %}", "OverflowError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ 5 | xmlattr }}", "AttributeError"),
        ("{{ 5 | dictsort }}", "AttributeError"),
        ("{{ 'a' * 10 ** 11 }}", "OverflowError: a repetition has more than"),
        ("{{ 10 ** (10 ** 10) }}", "OverflowError: a power is too large"),
        ("{{ (10 ** 5000) | string }}", "ValueError"),
        ("{{ cycler().next() }}", "RuntimeError"),
        ("{{ 'aaaa aaa' | truncate(1) }}", "AssertionError"),
        ("{% break %}", "does not compile: SyntaxError"),
        ("{% for i in [1] %}" * 25 + "{% endfor %}" * 25, "does not compile: SyntaxError"),
        ("{% if 1 %}" * 120 + "{% endif %}" * 120, "does not compile: IndentationError"),
        ("{{ " + "(" * 250 + "1" + ")" * 250 + " }}", "does not compile"),
        ("{{ [1, 2] | random }}", "No filter named 'random'"),
        ("{{ lipsum() }}", "'lipsum' is undefined"),
    ],
)
def test_a_template_that_fails_is_one_line(text, message, tiny):
    with pytest.raises(UserError, match=message) as failed:
        template(text, tiny).render([{"role": "user", "content": "hi"}])
    assert str(failed.value).startswith("the chat template") and "\n" not in str(failed.value)


def test_a_template_may_not_take_the_place_of_the_messages(tiny):
    found = template("{{ messages | length }}{{ x }}", tiny, messages=[1, 2, 3], x="!").render([], arguments={"x": "?"})
    assert found.text == "0?"

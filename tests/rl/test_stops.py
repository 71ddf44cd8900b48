"""Text as it streams out of tokens, and stops over the borders of tokens."""

import pathlib

import numpy as np
import pytest

from jaxops.data.text.byte_tokenizer import ByteTokenizer
from jaxops.data.text.open_tokenizer import open_tokenizer
from jaxops.rl.stops import StopScan, TextStream, special_stops

BYTES = ByteTokenizer()


class Pieces:
    """A vocabulary of odd pieces that, like sentencepiece, drops the blank at the beginning of a text."""

    special = frozenset()
    pieces = (b" stop", b" s", b"to", b"p", b"\xe2\x82", b"\xac!", b"\xac", b" x", b"\n")

    def decode(self, ids, skip_special=False):
        return b"".join(self.pieces[i] for i in ids).decode("utf-8", "replace").removeprefix(" ")


@pytest.mark.parametrize("text", ["plain", "grün € 🙂🙂 ende", "a" * 200 + "ß" * 50, ""])
def test_streamed_text_is_the_whole_text_and_never_a_broken_character(text):
    stream, parts = TextStream(BYTES), []
    for token in BYTES.encode(text):
        parts.append(stream.push(token))
        assert "\ufffd" not in parts[-1]
    assert "".join(parts) + stream.finish() == text
    assert stream.finish() == ""


def test_bytes_that_are_no_text_are_shown_as_the_tokenizer_shows_them():
    rng = np.random.default_rng(0)
    for _ in range(50):
        ids = [*rng.integers(0, 256, 60), *b"ok", *rng.integers(128, 256, 5)]
        stream = TextStream(BYTES)
        assert "".join(stream.push(one) for one in ids) + stream.finish() == BYTES.decode(ids)


def test_a_blank_at_the_beginning_of_what_is_decoded_again_is_kept():
    vocabulary = Pieces()
    ids = [7] * 100 + [4, 5, 0]
    stream = TextStream(vocabulary)
    assert "".join(stream.push(one) for one in ids) + stream.finish() == "x" + " x" * 99 + "€! stop"


def test_a_tokenizer_json_streams_what_it_decodes():
    tiny = open_tokenizer(str(pathlib.Path(__file__).parents[1] / "fixtures" / "text" / "tiny"))
    text = "The grün  €uro 🙂 is\n\there, isn't it? " * 6
    ids = tiny.encode(text)
    stream = TextStream(tiny)
    parts = [stream.push(one) for one in ids]
    assert "".join(parts) + stream.finish() == tiny.decode(ids, skip_special=True)
    assert "".join(parts).strip() and not any("\ufffd" in part for part in parts)


def scanned(tokenizer, stops, ids):
    scan, shown = StopScan(tokenizer, stops), ""
    for count, token in enumerate(ids, 1):
        if scan.push(token):
            return scan, count, shown + scan.shown()
        shown += scan.shown()
        assert not any(stop in shown for stop in stops)
    scan.finish()
    return scan, len(ids), shown + scan.shown(ended=True)


@pytest.mark.parametrize(
    ("text", "stops", "left", "stop", "tokens"),
    [
        ("one</a>two", ("</a>",), "one", "</a>", 7),
        ("one</a>two", ("zzz", "e</", "</a>"), "on", "e</", 5),
        ("aaab", ("aab",), "a", "aab", 4),
        ("€uro ende", ("ro", "€u"), "", "€u", 4),
        ("nothing</", ("</a>",), "nothing</", None, 9),
    ],
)
def test_the_first_stop_ends_the_text(text, stops, left, stop, tokens):
    scan, count, shown = scanned(BYTES, stops, BYTES.encode(text))
    assert (scan.text, scan.stop, count, shown) == (left, stop, tokens, left)


def test_a_stop_inside_one_token_and_over_three():
    vocabulary = Pieces()
    for ids, count in (([7, 0, 7], 2), ([7, 1, 2, 3, 7], 4)):
        scan, taken, shown = scanned(vocabulary, (" stop",), ids)
        assert (scan.text, scan.stop, taken, shown) == ("x", " stop", count, "x")
    scan, taken, _ = scanned(vocabulary, ("€",), [7, 4, 5, 7])
    assert (scan.text, taken) == ("x", 3)


def test_a_stop_that_is_a_control_token_is_told_by_its_id():
    assert special_stops(BYTES, ("<|im_end|>", "end", "\n")) == ((257,), ("end", "\n"))

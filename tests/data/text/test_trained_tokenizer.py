"""A vocabulary out of the texts of training: the same texts give the same one, and every text reads back."""

import pytest

from jaxops.data.text.open_tokenizer import tokenizer_of
from jaxops.data.text.trained_tokenizer import TrainedTokenizer

TEXTS = ["the cat sat on the mat", "the dog sat on the log", "Über the hills"] * 20


def test_a_vocabulary_is_small_deterministic_and_reads_everything():
    made = TrainedTokenizer(vocab=300).build(TEXTS)
    assert made.vocab <= 300 and made.digest == TrainedTokenizer(vocab=300).build(TEXTS).digest
    for text in ("the cat", "Ünseen wörds 世界\n\t", ""):
        assert made.decode(made.encode(text)) == text
    assert len(made.encode(" the")) == 1  # a frequent word is one token
    assert made.eos is not None and made.pad not in (None, made.eos)


def test_it_is_rebuilt_from_its_files_and_may_ignore_capitals():
    made = TrainedTokenizer(vocab=300, lowercase=True).build(TEXTS)
    assert made.encode("THE CAT") == made.encode("the cat")
    again = tokenizer_of(made.files, "here")
    assert again.digest == made.digest and again.encode("The log") == made.encode("the log")
    assert again.template == made.template


def test_without_texts_there_are_the_bytes():
    made = TrainedTokenizer(vocab=300).build([])
    assert made.decode(made.encode("abc")) == "abc" and len(made.encode("abc")) == 3


@pytest.mark.parametrize("text", ["<|im_end|>", "a<|pad|>b"])
def test_marks_are_tokens_of_their_own(text):
    made = TrainedTokenizer(vocab=300).build(TEXTS)
    assert made.special & set(made.encode(text))

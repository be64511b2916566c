import pytest

from vqcx_jax.data.tokenizers.word import WordTokenizer, build_words
from vqcx_jax.errors import DataError


def test_words_are_ordered_by_frequency_then_alphabet():
    # "<eos>" counts the two newlines and the ends of both documents.
    assert build_words(["b a\nc b", "b\n"], None) == ["<eos>", "b", "a", "c", "<unk>"]


def test_unknown_in_the_text_is_a_word_like_others():
    assert build_words(["<unk> <unk> <unk> a"], None) == ["<unk>", "<eos>", "a"]


def test_vocabulary_is_cut_after_the_most_frequent():
    assert build_words(["c c b b a"], 4) == ["b", "c", "<eos>", "<unk>"]
    assert build_words(["c c b"], 100) == ["c", "<eos>", "b", "<unk>"]


def test_vocabulary_without_room_is_refused():
    with pytest.raises(DataError, match="max_vocab_size=2; accepted: 3 or more"):
        build_words(["a"], 2)


def test_newlines_are_tokens_and_other_words_unknown():
    tokenizer = WordTokenizer(["<eos>", "<unk>", "a", "b"])
    assert list(tokenizer.encode(" \n a  b\n\nz\n")) == [0, 2, 3, 0, 0, 1, 0]
    assert tokenizer.eos_id == 0


def test_decode_restores_lines():
    tokenizer = WordTokenizer(["<eos>", "<unk>", "a", "x<eos>y"])
    text = "\na x<eos>y\n\n<unk> a\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text

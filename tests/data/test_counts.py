import numpy as np
import pytest

from vqcx_jax.data.corpora import Corpus, Document
from vqcx_jax.data.counts import (
    Units,
    cached_token_counts,
    count_units,
    encoded_documents,
    token_counts,
)
from vqcx_jax.data.tokenizers.byte import ByteTokenizer


@pytest.fixture
def source():
    return [Document(text=text, name="") for text in ("aab", " \n", "é b")]


def test_token_counts_are_the_targets(source):
    expected = np.zeros(257, np.int64)
    for value in b"aab" + "é b".encode():
        expected[value] += 1
    expected[256] = 2
    counts = token_counts(ByteTokenizer(), source)
    np.testing.assert_array_equal(counts, expected)
    assert counts.dtype == np.int64


def test_encoded_documents_end_and_are_not_blank(source):
    first, second = encoded_documents(ByteTokenizer(), source)
    assert first.tolist() == [*b"aab", 256] and first.dtype == np.int32
    assert second.tolist() == [*"é b".encode(), 256]


class Unending:
    """Documents of four tokens, of which only those that begin before the limit may be read."""

    def __init__(self, limit):
        self.limit = limit

    def __len__(self):
        return 10**12

    def __getitem__(self, index):
        assert 4 * index < self.limit, "read beyond the limit"
        return Document(text="abc", name="")


@pytest.mark.parametrize("limit", range(1, 12))
def test_limit_is_of_tokens(limit):
    """A text longer than memory is read up to the limit, and the last document is cut there."""
    documents = list(encoded_documents(ByteTokenizer(), Unending(limit), limit))
    assert np.concatenate(documents).tolist() == ([*b"abc", 256] * 3)[:limit]
    assert [len(document) for document in documents[:-1]] == [4] * (len(documents) - 1)
    assert token_counts(ByteTokenizer(), Unending(limit), limit).sum() == limit


def test_limit_beyond_the_text_changes_nothing(source):
    unlimited = list(encoded_documents(ByteTokenizer(), source))
    for limit in (9, 10, 1000):  # The text has 9 tokens.
        limited = list(encoded_documents(ByteTokenizer(), source, limit))
        assert [x.tolist() for x in limited] == [x.tolist() for x in unlimited]


def test_units(source):
    assert count_units(source) == Units(documents=2, words=3, bytes=7)
    assert count_units(source, 2) == Units(documents=1, words=1, bytes=3)


def test_counts_of_another_limit_are_others(tmp_path, source):
    corpus = Corpus("c", "one", {"train": source})
    counts = [
        cached_token_counts(ByteTokenizer(), corpus, tmp_path, limit).sum()
        for limit in (None, 3, 5, None)
    ]
    assert counts == [9, 3, 5, 9]


def test_counts_are_kept(tmp_path, source):
    tokenizer = ByteTokenizer()
    first = cached_token_counts(tokenizer, Corpus("c", "one", {"train": source}), tmp_path)
    np.testing.assert_array_equal(first, token_counts(tokenizer, source))
    # The stored counts are used: this corpus has the same fingerprint but no text.
    again = cached_token_counts(tokenizer, Corpus("c", "one", {"train": []}), tmp_path)
    np.testing.assert_array_equal(again, first)
    assert again.dtype == np.int64
    assert cached_token_counts(tokenizer, Corpus("c", "two", {"train": []}), tmp_path).sum() == 0


def test_counts_of_a_larger_vocabulary(tmp_path, source):
    corpus = Corpus("c", "one", {"train": source})
    counts = cached_token_counts(ByteTokenizer(), corpus, tmp_path, vocab_size=264)
    np.testing.assert_array_equal(counts[:257], token_counts(ByteTokenizer(), source))
    np.testing.assert_array_equal(counts[257:], np.zeros(7))

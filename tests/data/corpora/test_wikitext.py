import json

import pytest

from vqcx_jax.config import schema
from vqcx_jax.data import token_counts
from vqcx_jax.data.corpora import open_corpus
from vqcx_jax.data.corpora.wikitext import split_articles
from vqcx_jax.data.tokenizers import build_tokenizer
from vqcx_jax.errors import DataError

TRAIN = (
    " \n = Cats = \n \n A cat is a <unk> . \n \n = = Food = = \n \n Fish . \n \n"
    " \n = Dogs = \n \n = x + y = \n A dog . \n \n"
)
OTHER = " \n = Birds = \n \n A bird is a cat . \n \n"


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "wiki.train.tokens").write_text(TRAIN)
    (tmp_path / "valid.txt").write_text(OTHER)
    (tmp_path / "test.jsonl").write_text(
        # As published in rows: one line each, blank lines as empty strings.
        "".join(
            json.dumps({"text": line if line.strip() else ""}) + "\n"
            for line in OTHER.splitlines(keepends=True)
        )
    )
    return tmp_path


@pytest.fixture
def corpus(folder):
    return open_corpus(schema.WikiText(path=str(folder)), folder / "cache")


def test_documents_are_articles(corpus):
    articles = {d["name"]: d["text"] for d in corpus.split("train")}
    assert set(articles) == {"Cats", "Dogs"}
    assert "\n".join([articles["Cats"], articles["Dogs"]]) + "\n" == TRAIN


def test_word_tokens_are_the_conventional_ones(corpus, folder):
    """The convention: every line's words, and one <eos> for every line."""
    tokenizer = build_tokenizer(schema.WordTokenizer(), corpus, folder / "cache")
    words = [word for line in TRAIN.splitlines() for word in [*line.split(), "<eos>"]]
    assert tokenizer.vocab_size == len(set(words))
    counts = token_counts(tokenizer, corpus.split("train"))
    assert {w: counts[tokenizer.encode(w)[0]] for w in set(words)} == {
        w: words.count(w) for w in words
    }


def test_file_forms_are_equivalent(corpus, folder):
    tokenizer = build_tokenizer(schema.WordTokenizer(), corpus, folder / "cache")
    from_text, from_rows = corpus.split("validation")[0], corpus.split("test")[0]
    assert from_text["name"] == from_rows["name"] == "Birds"
    assert list(tokenizer.encode(from_text["text"])) == list(tokenizer.encode(from_rows["text"]))


def test_lines_before_the_first_title_are_kept():
    lines = ["", "", "preface", "", " = A = ", "", "a"]
    assert list(split_articles(lines)) == [("A", "\n".join(lines))]


def test_text_without_titles_is_one_document():
    assert list(split_articles(["a", "b"])) == [("", "a\nb")]


def test_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"has no train file; accepted: wiki\.train\.tokens"):
        open_corpus(schema.WikiText(path=str(tmp_path)), tmp_path / "cache")


def test_bad_row_is_named(folder):
    (folder / "test.jsonl").write_text('{"text": ""}\n{"body": ""}\n')
    with pytest.raises(DataError, match=r"test\.jsonl line 2: .*'text'"):
        open_corpus(schema.WikiText(path=str(folder)), folder / "cache")

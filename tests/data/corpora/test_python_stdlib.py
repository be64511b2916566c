import pytest

from vqcx_jax.config import schema
from vqcx_jax.data.corpora import open_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return open_corpus(schema.PythonStdlib(), tmp_path_factory.mktemp("cache"))


def _names(corpus, split):
    return {document["name"] for document in corpus.split(split)}


def test_about_a_tenth_is_held_out(corpus):
    sizes = {split: len(corpus.split(split)) for split in ("train", "validation", "test")}
    total = sum(sizes.values())
    assert total > 400
    assert 0.02 < sizes["validation"] / total < 0.08
    assert 0.02 < sizes["test"] / total < 0.08


def test_splits_share_no_file_and_tests_are_left_out(corpus):
    train, validation, test = (_names(corpus, s) for s in ("train", "validation", "test"))
    assert not (train & validation or train & test or validation & test)
    names = train | validation | test
    assert "json/decoder.py" in names
    assert not [n for n in names if n.startswith(("test/", "site-packages/")) or "/tests/" in n]


def test_text_is_the_source(corpus):
    import json.decoder
    from pathlib import Path

    documents = (d for s in ("train", "validation", "test") for d in corpus.split(s))
    text = next(d["text"] for d in documents if d["name"] == "json/decoder.py")
    assert text == Path(json.decoder.__file__).read_bytes().decode()

import sysconfig
from pathlib import Path

import pytest

from vqcx_jax.config import schema
from vqcx_jax.data.corpora import Corpus, Document
from vqcx_jax.data.tokenizers import build_tokenizer
from vqcx_jax.data.tokenizers.bpe import train_bpe
from vqcx_jax.errors import DataError


@pytest.fixture(scope="module")
def texts():
    folder = Path(sysconfig.get_path("stdlib"), "json")
    return [path.read_text() for path in sorted(folder.glob("*.py"))]


@pytest.fixture(scope="module")
def corpus(texts):
    return Corpus("json", "f", {"train": [Document(text=t, name="") for t in texts]})


def test_training_is_deterministic(texts):
    assert train_bpe(iter(texts), 500) == train_bpe(iter(texts), 500)


def test_any_text_comes_back_in_fewer_tokens(corpus, texts, tmp_path):
    tokenizer = build_tokenizer(schema.BPETokenizer(vocab_size=500), corpus, tmp_path)
    assert tokenizer.vocab_size == 500
    assert len(tokenizer.encode(texts[0])) < len(texts[0]) / 2
    for text in [texts[0], "  漢字\r\n\t🙂 \x00"]:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_only_the_first_documents_are_used(corpus, tmp_path):
    one = build_tokenizer(schema.BPETokenizer(vocab_size=300, train_documents=1), corpus, tmp_path)
    every = build_tokenizer(schema.BPETokenizer(vocab_size=300), corpus, tmp_path)
    assert one.to_json() != every.to_json()


def test_too_little_text_is_an_error_that_names_what_is_possible():
    with pytest.raises(DataError, match="vocab_size=4096: .*accepted: 257 to 25[89]") as error:
        train_bpe(iter(["ababab ab"]), 4096)
    reachable = int(str(error.value).split(" to ")[1].split(",")[0])
    train_bpe(iter(["ababab ab"]), reachable)

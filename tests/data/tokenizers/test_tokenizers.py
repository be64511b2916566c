"""What holds for every tokenizer."""

import json

import numpy as np
import pytest
import sentencepiece

from vqcx_jax.config import schema
from vqcx_jax.data.corpora import Corpus, Document
from vqcx_jax.data.tokenizers import (
    build_tokenizer,
    tokenizer_fingerprint,
    tokenizer_from_json,
)
from vqcx_jax.errors import DataError

TEXT = "the cat sat on the mat ,\nthe dog sat on the cat ;\n"
KINDS = ["bytes", "word", "bpe", "json", "sentencepiece"]


@pytest.fixture(scope="module")
def corpus():
    return Corpus("cats", "f1", {"train": [Document(text=TEXT, name=str(i)) for i in range(3)]})


@pytest.fixture(scope="module")
def configs(tmp_path_factory, corpus):
    folder = tmp_path_factory.mktemp("files")
    bpe = schema.BPETokenizer(vocab_size=262)
    trained = build_tokenizer(bpe, corpus, folder)
    (folder / "t.json").write_text(trained.to_json()["tokenizer"])
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT.splitlines()),
        model_prefix=str(folder / "m"),
        vocab_size=40,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return {
        "bytes": schema.BytesTokenizer(),
        "word": schema.WordTokenizer(),
        "bpe": bpe,
        "json": schema.JSONTokenizer(path=str(folder / "t.json")),
        "sentencepiece": schema.SentencePieceTokenizer(path=str(folder / "m.model")),
    }


@pytest.fixture(params=KINDS)
def tokenizer(request, configs, corpus, tmp_path):
    return build_tokenizer(configs[request.param], corpus, tmp_path)


def test_ids_are_int32_inside_the_vocabulary_and_free_of_eos(tokenizer):
    ids = tokenizer.encode("the cat")
    assert ids.dtype == np.int32
    assert ids.ndim == 1
    assert len(ids) > 0
    assert ids.min() >= 0
    assert max(ids.max(), tokenizer.eos_id) < tokenizer.vocab_size
    assert tokenizer.eos_id not in ids
    assert len(tokenizer.encode("")) == 0


def test_text_comes_back(tokenizer):
    assert tokenizer.decode(tokenizer.encode("the cat sat")) == "the cat sat"


def test_end_of_document_has_no_name_in_the_text(tokenizer):
    assert tokenizer.decode([*tokenizer.encode("the cat"), tokenizer.eos_id]).strip() == "the cat"


def test_json_round_trip(tokenizer):
    restored = tokenizer_from_json(json.loads(json.dumps(tokenizer.to_json())))
    assert (restored.vocab_size, restored.eos_id) == (tokenizer.vocab_size, tokenizer.eos_id)
    np.testing.assert_array_equal(restored.encode(TEXT), tokenizer.encode(TEXT))
    assert restored.to_json() == tokenizer.to_json()


@pytest.mark.parametrize("kind", ["word", "bpe"])
def test_learnt_tokenizers_are_kept_by_corpus_and_configuration(configs, corpus, tmp_path, kind):
    first = build_tokenizer(configs[kind], corpus, tmp_path)
    no_text = Corpus("cats", "f1", {})
    assert build_tokenizer(configs[kind], no_text, tmp_path).to_json() == first.to_json()
    with pytest.raises(DataError, match="split='train'"):
        build_tokenizer(configs[kind], Corpus("cats", "f2", {}), tmp_path)
    (path,) = (tmp_path / "tokenizers").iterdir()
    path.write_bytes(path.read_bytes()[:-100])
    assert build_tokenizer(configs[kind], corpus, tmp_path).to_json() == first.to_json()


@pytest.mark.parametrize("value", [{}, {"kind": "morse"}, {"kind": "word"}])
def test_other_json_is_refused(value):
    with pytest.raises(DataError, match="accepted: what to_json returns"):
        tokenizer_from_json(value)


def test_fingerprint_is_of_what_the_tokenizer_does(tokenizer, configs, corpus, tmp_path):
    fingerprint = tokenizer_fingerprint(tokenizer)
    stored = json.loads(json.dumps(tokenizer.to_json()))
    assert tokenizer_fingerprint(tokenizer_from_json(stored)) == fingerprint
    others = [build_tokenizer(configs[kind], corpus, tmp_path) for kind in KINDS]
    same = [other for other in others if tokenizer_fingerprint(other) == fingerprint]
    # A BPE that is trained and the same one read from its file are one tokenizer.
    assert all(other.to_json() == tokenizer.to_json() for other in same)
    assert 1 <= len(same) <= 2
